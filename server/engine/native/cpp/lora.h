// The adapters of a batch: each row has its own, and rows that have the same one read it together.

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "each_row.h"
#include "few_rows.h"

// One pair of a LoRA: y[start, start + width) += x times A [rank, in] times B [rank, width]. Before
// that, if it has a scale and a shift [width], as DoRA's do, these columns are rescaled.
template <typename T> struct LoraPair {
    const T* A;
    const T* B;
    int64_t rank, start, width;
    const float* scale;  // null: the columns stay as they are
    const float* shift;

    void rescale(T* columns) const {
        if (!scale) return;
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            columns[i] = store<T>(load(columns[i]) * scale[i] + shift[i]);
    }
};

// Rows in float, by a pointer each: those of x themselves, or copies.
template <typename T> class FloatRows {
    std::vector<float> memory;

  public:
    std::vector<const float*> each;

    FloatRows(int64_t rows, const T* const* x, int64_t in) : each(rows) {
        if constexpr (std::is_same_v<T, float>) {
            std::copy_n(x, rows, each.begin());
        } else {
            memory.resize(rows * in);
            for (int64_t r = 0; r < rows; r++) {
                float* copy = memory.data() + r * in;
                for (int64_t i = 0; i < in; i++) copy[i] = load(x[r][i]);
                each[r] = copy;
            }
        }
    }
};

template <typename T> std::vector<const T*> rows_of(const T* matrix, int64_t rows, int64_t width) {
    std::vector<const T*> found(rows);
    for (int64_t r = 0; r < rows; r++) found[r] = matrix + r * width;
    return found;
}

// Add the pairs of a site to some rows, all of which have them. All of x is read before y is
// written: they may be the same.
template <typename T>
void add_pairs(const LoraPair<T>* pairs, int64_t num_pairs, int64_t rows, const T* const* x,
               T* const* y, int64_t in) {
    std::vector<int64_t> firsts{0};  // of each pair's products
    for (int64_t p = 0; p < num_pairs; p++) firsts.push_back(firsts[p] + pairs[p].rank);
    const int64_t ranks = firsts[num_pairs];
    const FloatRows<T> inputs(rows, x, in);
    std::vector<float> products(rows * ranks);
    for (int64_t p = 0; p < num_pairs; p++) {
        const std::vector<const T*> A = rows_of(pairs[p].A, pairs[p].rank, in);
        const RowList<T> all_of_A{A.data(), pairs[p].rank, 0, in};
        multiply_by_rows(rows, inputs.each.data(), all_of_A,
                         Matrix<float>{products.data() + firsts[p], ranks});
    }
    std::vector<T*> outputs(rows);
    for (int64_t p = 0; p < num_pairs; p++) {
        const LoraPair<T>& pair = pairs[p];
        for (int64_t r = 0; r < rows; r++) {
            outputs[r] = y[r] + pair.start;
            pair.rescale(outputs[r]);
        }
        const std::vector<const T*> B = rows_of(pair.B, pair.rank, pair.width);
        const RowList<T> all_of_B{B.data(), pair.rank, 0, pair.width};
        add_weighted_rows(rows, {products.data() + firsts[p], ranks}, all_of_B, outputs.data());
    }
}

// `loras` has for each row where its adapter's pairs are, [sites, pairs of a site], or null.
template <typename T>
void add_lora(T* y, const T* x, const LoraPair<T>* const* loras, int64_t site, int64_t site_pairs,
              int64_t rows, int64_t in, int64_t out) {
    constexpr int64_t MAX_ROWS_OF_RUN = 8;
    std::vector<int64_t> order;  // rows with an adapter, those with the same one side by side
    for (int64_t r = 0; r < rows; r++)
        if (loras[r]) order.push_back(r);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return std::less<>()(loras[a], loras[b]);
    });
    const int64_t count = order.size();
    std::vector<const T*> inputs(count);
    std::vector<T*> outputs(count);
    std::vector<int64_t> starts;  // of runs of rows with the same adapter
    for (int64_t i = 0; i < count; i++) {
        inputs[i] = x + order[i] * in;
        outputs[i] = y + order[i] * out;
        const bool goes_on = i > 0 && loras[order[i]] == loras[order[i - 1]];
        if (!goes_on || i - starts.back() == MAX_ROWS_OF_RUN) starts.push_back(i);
    }
    const int64_t runs = starts.size();
    if (runs == 0) return;
    starts.push_back(count);
    each_row(runs, 8 * (in + out) * count / runs, [&](int64_t run) {
        const int64_t first = starts[run];
        add_pairs(loras[order[first]] + site * site_pairs, site_pairs, starts[run + 1] - first,
                  inputs.data() + first, outputs.data() + first, in);
    });
}
