// The product of rows and a weight in bfloat16, which lies in panels (panel_tiles.h).
//
// Rows in bfloat16 are multiplied as they are where the processor can, else in float. Sums are
// float.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "amx_tiles.h"
#include "bfloat16.h"
#include "each_row.h"
#include "factors.h"
#include "panel_tiles.h"
#include "turns.h"

#if defined(__AMX_BF16__)
template <typename T> constexpr int64_t ROW_STEP = std::is_same_v<T, bfloat16> ? AMX_ROWS : 1;
template <typename T> constexpr int64_t PAIR_STEP = std::is_same_v<T, bfloat16> ? AMX_PAIRS : 1;
#else
template <typename T> constexpr int64_t ROW_STEP = 1;
template <typename T> constexpr int64_t PAIR_STEP = 1;
#endif

inline int64_t up_to(int64_t step, int64_t n) { return (n + step - 1) / step * step; }

// The factors of x, [rows, stride]: x itself, or a copy that is padded with zeros to the steps.
template <typename T> class Factors {
    using F = FactorOf<T>;
    std::vector<F> memory;

  public:
    const int64_t rows, stride;
    const F* values;

    Factors(const T* x, int64_t x_rows, int64_t in)
        : rows(up_to(ROW_STEP<F>, x_rows)), stride(up_to(2 * PAIR_STEP<F>, in)) {
        if constexpr (std::is_same_v<T, F>) {
            values = x;
            if (rows == x_rows && stride == in) return;
        }
        memory.resize(rows * stride);
        for (int64_t r = 0; r < x_rows; r++)
            for (int64_t i = 0; i < in; i++)
                memory[r * stride + i] = store<F>(load(x[r * in + i]));
        values = memory.data();
    }
};

// How many rows are multiplied by a panel before the next panel: they stay in the core's cache.
inline int64_t rows_at_once(int64_t row_bytes) {
    constexpr int64_t cache_bytes = 1 << 18, step = 32;
    return std::max(cache_bytes / row_bytes / step, int64_t(1)) * step;
}

// How many words of a column are multiplied before the next ones, in parts of nearly the same
// number. Each tile of rows reads the same part of a panel: where there are many, it should stay in
// the nearest cache.
inline int64_t words_at_once(int64_t rows, int64_t words) {
    constexpr int64_t many_rows = 24, most = 160, step = 16;  // AMX takes no fewer words
    if (rows < many_rows) return words;
    const int64_t parts = up_to(most, words) / most;
    return up_to(step, (words + parts - 1) / parts);
}

// sums = x times a panel, of which each column has so many words.
template <typename X>
void multiply_in_blocks(int64_t rows, const X* x, int64_t x_stride, const uint32_t* panel,
                        int64_t words, const uint32_t* next_panel, Sums<SumOf<X>> sums) {
    const int64_t block = words_at_once(rows, words);
    for (int64_t first = 0; first < words; first += block) {
        const uint32_t* const from = panel + first * PANEL;
        const bool is_last = first + block >= words;
        const uint32_t* const next = is_last ? next_panel : from + block * PANEL;
        const Panel part{from, std::min(block, words - first),
                         reinterpret_cast<const char*>(next), Panel::WORD_BYTES};
        multiply_rows(rows, x + PER_WORD<X> * first, x_stride, part, sums);
        sums.start_at_0 = false;
    }
}

// A weight of `columns` columns in panels of `words_of_column` words a column; both are padded.
struct Weight {
    const uint32_t* words;
    int64_t words_of_column, columns;
};

// Multiply x, [rows, x_stride], and call write(row, first column, number of columns, sums) for
// parts of rows, which lie next to each other. A turn is a chunk of rows and a panel.
template <typename X, typename Write>
void multiply(int64_t rows, const X* x, int64_t x_stride, Weight w, Write write) {
    if (rows == 0) return;  // of the head, in a step that ends no prompt
    const int64_t panels = up_to(PANEL, w.columns) / PANEL;
    const int64_t chunk = std::min(rows, rows_at_once(x_stride * sizeof(X)));
    const int64_t num_turns = (rows + chunk - 1) / chunk * panels;
    const int64_t parts = std::min(num_threads(), num_turns);
    auto words_of_panel = [&](int64_t panel) {
        return w.words + panel * w.words_of_column * PANEL;
    };
    auto take_turn = [&](int64_t turn, SumOf<X>* memory) {
        const int64_t first = turn / panels * chunk, panel = turn % panels;
        const int64_t num_rows = std::min(chunk, rows - first);
        const int64_t column = panel * PANEL;
        const int64_t num_columns = std::min<int64_t>(PANEL, w.columns - column);
        const Sums<SumOf<X>> sums{memory, PANEL, true};
        multiply_in_blocks(num_rows, x + first * x_stride, x_stride, words_of_panel(panel),
                           x_stride / PER_WORD<X>, words_of_panel((panel + 1) % panels), sums);
        for (int64_t r = 0; r < num_rows; r++)
            write(first + r, column, num_columns, sums.from(r, 0).values);
    };
    Turns turns(num_turns, parts);
    each_row(parts, rows * panels * PANEL * x_stride / parts, [&](int64_t part) {
        std::vector<SumOf<X>> memory(chunk * PANEL);
        turns.take(part, [&](int64_t turn) { take_turn(turn, memory.data()); });
    });
}

// Write sums of neighbouring columns as numbers, plus their biases if there are any.
template <typename T>
void write_row(const float* sums, const T* biases, int64_t count, T* to) {
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) {
        const Floats bias = biases ? load_vector(biases + c) : Floats{};
        store_vector(load_vector(sums + c) + bias, to + c);
    }
    for (; c < count; c++) to[c] = store<T>(sums[c] + (biases ? load(biases[c]) : 0.0f));
}

// y [rows, columns] = x [rows, in] times w, plus bias [columns] if there is one.
template <typename T>
void product(const T* x, const uint32_t* words, const T* bias, T* y, int64_t rows, int64_t in,
             int64_t words_of_column, int64_t columns) {
    const Factors<T> factors(x, rows, in);
    const Weight w{words, words_of_column, columns};
    auto write = [&](int64_t row, int64_t column, int64_t count, const float* sums) {
        if (row >= rows) return;
        write_row(sums, bias ? bias + column : nullptr, count, y + row * columns + column);
    };
    multiply(factors.rows, factors.values, factors.stride, w, write);
}
