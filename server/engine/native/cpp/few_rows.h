// Products of a few rows with what lies in memory as it came: values of attention, A and B of
// adapters. The rows share what they read.
//
// Numbers are float or bfloat16, sums are float, T is multiplied as F (factors.h). Each sum adds up
// in one order, whatever other rows it is computed with: a row's bits depend on nothing else.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "factors.h"
#include "vectors.h"

// A vector's lanes, joined to four.
template <typename Join> inline Four folded(Floats x, Join join) {
    Four parts[LANES / 4];
    std::memcpy(parts, &x, sizeof x);
    for (int n = LANES / 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) parts[i] = join(parts[i], parts[i + n]);
    return parts[0];
}

inline Four added_up(Floats x) {
    return folded(x, [](Four a, Four b) { return a + b; });
}

// Turn four rows of four numbers into columns.
inline void transpose(Four& a, Four& b, Four& c, Four& d) {
    const Four ab = SHUFFLED(a, b, 0, 4, 1, 5), ab_high = SHUFFLED(a, b, 2, 6, 3, 7);
    const Four cd = SHUFFLED(c, d, 0, 4, 1, 5), cd_high = SHUFFLED(c, d, 2, 6, 3, 7);
    a = SHUFFLED(ab, cd, 0, 1, 4, 5);
    b = SHUFFLED(ab, cd, 2, 3, 6, 7);
    c = SHUFFLED(ab_high, cd_high, 0, 1, 4, 5);
    d = SHUFFLED(ab_high, cd_high, 2, 3, 6, 7);
}

constexpr int SUMS_AT_ONCE = 4;  // of a row: with those of another and their factors, they fit 16
                                 // registers

// The sums of the lanes of four vectors.
inline Four lane_sums(const Floats (&x)[SUMS_AT_ONCE]) {
    Four a = added_up(x[0]), b = added_up(x[1]), c = added_up(x[2]), d = added_up(x[3]);
    transpose(a, b, c, d);
    return (a + c) + (b + d);
}

inline float lane_sum(Floats x) {
    const Four four = added_up(x);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

inline float largest_lane(Floats x) {
    const Four four = folded(x, [](Four a, Four b) { return a > b ? a : b; });
    return std::max(std::max(four[0], four[2]), std::max(four[1], four[3]));
}

// Of each of `count` rows, `width` numbers from the one at `offset` on. A lane takes whole numbers
// of rows.
template <typename T, typename F = float> struct RowList {
    const T* const* rows;
    int64_t count, offset, width;

    const T* operator[](int64_t k) const { return rows[k] + offset; }

    // From row k on, as many as a lane takes.
    auto vector(int64_t k, int64_t column) const {
        return columns<F>((*this)[k] + column, (*this)[k + PER_LANE<F> - 1] + column);
    }
};

// Numbers by which rows are multiplied: [rows, stride].
template <typename N> struct Matrix {
    N* values;
    int64_t stride;

    N* operator[](int64_t row) const { return values + row * stride; }
};

// Each of some rows of x times each of four rows of a, which have n numbers.
template <int ROWS, typename T>
__attribute__((noinline)) void multiply_four(const float* const* x,
                                             const T* const (&a)[SUMS_AT_ONCE], int64_t n,
                                             Four* products) {
    Floats sums[ROWS][SUMS_AT_ONCE];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < SUMS_AT_ONCE; j++) sums[r][j] = Floats{};
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        Floats of_x[ROWS];
        for (int r = 0; r < ROWS; r++) of_x[r] = load_vector(x[r] + i);
        for (int j = 0; j < SUMS_AT_ONCE; j++) {
            const Floats of_a = load_vector(a[j] + i);
            for (int r = 0; r < ROWS; r++) sums[r][j] += of_x[r] * of_a;
        }
    }
    for (int r = 0; r < ROWS; r++) products[r] = lane_sums(sums[r]);
    for (int64_t i = whole; i < n; i++)
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < SUMS_AT_ONCE; j++) products[r][j] += x[r][i] * load(a[j][i]);
}

// z[r][k] = x[r] times row k of a.
template <typename T>
void multiply_by_rows(int64_t rows, const float* const* x, const RowList<T>& a,
                      Matrix<float> z) {
    constexpr int64_t ROWS_AT_ONCE = 2;
    for (int64_t k = 0; k < a.count; k += SUMS_AT_ONCE) {
        const int64_t num = std::min<int64_t>(SUMS_AT_ONCE, a.count - k);
        const T* four[SUMS_AT_ONCE];  // where there are fewer, the last one takes the free places
        for (int64_t j = 0; j < SUMS_AT_ONCE; j++) four[j] = a[k + std::min(j, num - 1)];
        for (int64_t r = 0; r < rows; r += ROWS_AT_ONCE) {
            const int64_t at_once = std::min<int64_t>(ROWS_AT_ONCE, rows - r);
            Four products[ROWS_AT_ONCE];
            auto multiply = at_once == 2 ? multiply_four<2, T> : multiply_four<1, T>;
            multiply(x + r, four, a.width, products);
            for (int64_t i = 0; i < at_once; i++)
                for (int64_t j = 0; j < num; j++) z[r + i][k + j] = products[i][j];
        }
    }
}

// Call visit(r, v) for each sum of a tile. GCC unrolls this early: else the sums have a place in
// memory too, which is filled before the loop that has them in registers, and read after it.
template <int ROWS, int VECTORS, typename Visit> inline void each_sum(Visit visit) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) visit(r, v);
}

// sums[r][v] += x[r · stride] times vector v. What there is less of stays in registers: with 12
// sums, the others and one of those, it is 16.
template <int ROWS, int VECTORS, typename F, typename Load>
inline __attribute__((always_inline)) void add_products(Floats (&sums)[ROWS][VECTORS], const F* x,
                                                        int64_t stride, Load vector) {
    if constexpr (ROWS < VECTORS) {
        Lane<F> factors[ROWS];
        for (int r = 0; r < ROWS; r++) factors[r] = lane_at(x + r * stride);
        for (int v = 0; v < VECTORS; v++) {
            const auto one = vector(v);
            for (int r = 0; r < ROWS; r++) add_product(sums[r][v], factors[r], one);
        }
    } else {
        decltype(vector(0)) vectors[VECTORS];
        for (int v = 0; v < VECTORS; v++) vectors[v] = vector(v);
        each_sum<ROWS, VECTORS>(
            [&](int r, int v) { add_product(sums[r][v], lane_at(x + r * stride), vectors[v]); });
    }
}

// y[r][c] += the sum of z[r][k] b[k][c], for some vectors of columns c.
template <int ROWS, int VECTORS, typename F, typename Y, typename T>
__attribute__((noinline)) void add_columns(Matrix<const F> z, const RowList<T, F>& b, Y* const* y,
                                           int64_t column) {
    Floats sums[ROWS][VECTORS];
    each_sum<ROWS, VECTORS>(
        [&](int r, int v) { sums[r][v] = load_vector(y[r] + column + v * LANES); });
    const F* weights = z.values;
    for (int64_t k = 0; k < b.count; k += PER_LANE<F>, weights += PER_LANE<F>)
        add_products(sums, weights, z.stride,
                     [=](int v) { return b.vector(k, column + v * LANES); });
    each_sum<ROWS, VECTORS>(
        [&](int r, int v) { store_vector(sums[r][v], y[r] + column + v * LANES); });
}

constexpr int MAX_FEW_ROWS = 6;
// Beside so many rows. Their sums fit the registers: 24 of 32, or 12 of 16.
template <int ROWS> constexpr int VECTORS_BESIDE = ROWS > 3 && LANES < 16 ? 2 : 4;

// y[r] += the sum of z[r][k] times row k of b.
template <int ROWS, typename F, typename Y, typename T>
void add_to_rows(Matrix<const F> z, const RowList<T, F>& b, Y* const* y) {
    constexpr int VECTORS = VECTORS_BESIDE<ROWS>;
    int64_t column = 0;
    for (; column + VECTORS * LANES <= b.width; column += VECTORS * LANES)
        add_columns<ROWS, VECTORS>(z, b, y, column);
    for (; column + LANES <= b.width; column += LANES) add_columns<ROWS, 1>(z, b, y, column);
    for (; column < b.width; column++)
        for (int64_t r = 0; r < ROWS; r++) {
            float sum = load(y[r][column]);
            for (int64_t k = 0; k < b.count; k++) sum += load(z[r][k]) * load(b[k][column]);
            y[r][column] = store<Y>(sum);
        }
}

// The same for a number of rows that is known only now, at most MAX_FEW_ROWS.
template <int ROWS = MAX_FEW_ROWS, typename F, typename Y, typename T>
void add_to_few_rows(int64_t rows, Matrix<const F> z, const RowList<T, F>& b, Y* const* y) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return add_to_rows<ROWS>(z, b, y);
        add_to_few_rows<ROWS - 1>(rows, z, b, y);
    }
}

// The same for any number of rows, in tiles of nearly the same number.
template <typename F, typename Y, typename T>
void add_weighted_rows(int64_t rows, Matrix<const F> z, const RowList<T, F>& b, Y* const* y) {
    const int64_t tiles = (rows + MAX_FEW_ROWS - 1) / MAX_FEW_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t first = rows * t / tiles;
        const int64_t count = rows * (t + 1) / tiles - first;
        add_to_few_rows(count, Matrix<const F>{z[first], z.stride}, b, y + first);
    }
}
