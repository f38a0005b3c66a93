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
#include "panel_tiles.h"

#if defined(__AMX_BF16__)
template <typename T> using Factor = T;  // what a number of x is multiplied as
template <typename T> constexpr int64_t ROW_STEP = std::is_same_v<T, bfloat16> ? AMX_ROWS : 1;
template <typename T> constexpr int64_t PAIR_STEP = std::is_same_v<T, bfloat16> ? AMX_PAIRS : 1;
#else
#if defined(__AVX512BF16__)
template <typename T> using Factor = T;
#else
template <typename T> using Factor = float;
#endif
template <typename T> constexpr int64_t ROW_STEP = 1;
template <typename T> constexpr int64_t PAIR_STEP = 1;
#endif

inline int64_t up_to(int64_t step, int64_t n) { return (n + step - 1) / step * step; }

// The factors of x, [rows, stride]: x itself, or a copy that is padded with zeros to the steps.
template <typename T> class Factors {
    using F = Factor<T>;
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

// How many pairs of k are multiplied before the next ones. Each tile of rows reads the same part of a
// panel: where there are many, it should stay in the nearest cache.
inline int64_t pairs_at_once(int64_t rows, int64_t pairs) {
    constexpr int64_t many_rows = 24, block = 256;
    return rows < many_rows ? pairs : block;
}

// sums = x times the panels, of which each has `pairs` pairs of k.
template <typename F>
void multiply_in_blocks(int64_t rows, const F* x, int64_t x_stride, Panels panels, Sums sums) {
    const int64_t pairs = panels.pairs;
    const int64_t block = pairs_at_once(rows, pairs);
    for (int64_t first = 0; first < pairs; first += block) {
        panels.pairs = std::min(block, pairs - first);
        bool is_last = first + block >= pairs;
        panels.ahead = is_last ? panels.count * panels.stride - first * PANEL : block * PANEL;
        multiply_rows(rows, x + 2 * first, x_stride, panels, sums);
        panels.words += block * PANEL;
        sums.start_at_0 = false;
    }
}

// y [rows, out] = x [rows, in] times w, plus bias [out] if there is one. w is `out` columns in panels
// of `panel_pairs` pairs of k; both are padded with zeros.
template <typename T>
void product(const T* x, const uint32_t* w, const T* bias, T* y, int64_t rows, int64_t in,
             int64_t panel_pairs, int64_t out) {
    using F = Factor<T>;
    const Factors<T> factors(x, rows, in);
    const int64_t stride = panel_pairs * PANEL, panels = up_to(PANEL, out) / PANEL;
    const int64_t chunk = std::min(factors.rows, rows_at_once(factors.stride * sizeof(F)));
    const int64_t strip = std::clamp<int64_t>(panels / 32 * 2, 2, 32);  // panels of a turn
    each_row((panels + strip - 1) / strip, strip * PANEL * in * rows, [&](int64_t turn) {
        std::vector<float> memory(chunk * 2 * PANEL);
        const int64_t stop = std::min(panels, (turn + 1) * strip);
        for (int64_t first = 0; first < factors.rows; first += chunk) {
            const int64_t num_rows = std::min(chunk, factors.rows - first);
            for (int64_t panel = turn * strip; panel < stop; panel += 2) {
                const int count = int(std::min<int64_t>(2, stop - panel));
                const Sums sums{memory.data(), count * PANEL, true};
                const Panels two{w + panel * stride, count, stride, factors.stride / 2, 0};
                multiply_in_blocks(num_rows, factors.values + first * factors.stride,
                                   factors.stride, two, sums);
                const int64_t column = panel * PANEL;
                const int64_t columns = std::min<int64_t>(count * PANEL, out - column);
                for (int64_t r = first; r < std::min(rows, first + num_rows); r++) {
                    const float* sum = sums.from(r - first, 0).values;
                    T* to = y + r * out + column;
                    for (int64_t c = 0; c < columns; c++)
                        to[c] = store<T>(sum[c] + (bias ? load(bias[column + c]) : 0.0f));
                }
            }
        }
    });
}
