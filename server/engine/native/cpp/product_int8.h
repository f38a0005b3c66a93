// Matrix products with weights of 8 bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "each_row.h"

// Products in 8 bits. x_bytes [rows, width] and w [out, width] are padded to `width`, a multiple
// of 64; outputs are computed in tiles of TILE columns and up to TILE rows.

constexpr int64_t TILE = 4;

// AVX-512's product of bytes takes one factor unsigned, so x is shifted by this much: 128 is 0.
constexpr int32_t ZERO_POINT = 128;

// sums[r * TILE + c] = dot of row r of x_bytes and row c of w.
template <int ROWS>
inline void multiply_tile(const uint8_t* x_bytes, const int8_t* w, int64_t width, int32_t* sums) {
#ifdef __AVX512VNNI__
    __m512i dots[ROWS][TILE] = {};
    for (int64_t i = 0; i < width; i += 64)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < TILE; c++)
                dots[r][c] =
                    _mm512_dpbusd_epi32(dots[r][c], _mm512_loadu_si512(x_bytes + r * width + i),
                                        _mm512_loadu_si512(w + c * width + i));
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < TILE; c++) sums[r * TILE + c] = _mm512_reduce_add_epi32(dots[r][c]);
#else
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < TILE; c++) {
            int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; i++)
                sum += int32_t(x_bytes[r * width + i]) * w[c * width + i];
            sums[r * TILE + c] = sum;
        }
#endif
}

// Round a row to bytes around ZERO_POINT and return its scale, which is NaN for a row that is not
// finite.
template <typename T> inline float quantise_row(const T* x, uint8_t* x_bytes, int64_t in) {
    float largest = 0;
    float zero_or_nan = 0;
#pragma omp simd reduction(max : largest) reduction(+ : zero_or_nan)
    for (int64_t i = 0; i < in; i++) {
        float v = load(x[i]);
        largest = std::max(largest, std::abs(v));
        zero_or_nan += v * 0.0f;
    }
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < in; i++)
        x_bytes[i] = uint8_t(int32_t(std::rint(load(x[i]) * inverse)) + ZERO_POINT);
    return largest / 127.0f + zero_or_nan;
}

template <typename T>
void product_int8(const T* x, const int8_t* w, const float* w_scales, const int32_t* w_sums, T* y,
             int64_t rows, int64_t in, int64_t width, int64_t out) {
    std::vector<uint8_t> x_bytes(rows * width, ZERO_POINT);
    std::vector<float> x_scales(rows);
    each_row(rows, 8 * in, [&](int64_t r) {
        x_scales[r] = quantise_row(x + r * in, &x_bytes[r * width], in);
    });
    auto write_tile = [&](int64_t first_row, int64_t num_rows, int64_t column,
                          const int32_t* sums) {
        for (int64_t r = 0; r < num_rows; r++)
            for (int64_t c = 0; c < TILE; c++) {
                int32_t sum = sums[r * TILE + c] - ZERO_POINT * w_sums[column + c];
                float scale = x_scales[first_row + r] * w_scales[column + c];
                y[(first_row + r) * out + column + c] = store<T>(scale * float(sum));
            }
    };
    constexpr int64_t strip = 32;  // columns that a thread takes at a time
    each_row((out + strip - 1) / strip, strip * rows * width, [&](int64_t s) {
        int64_t stop = std::min(out, (s + 1) * strip);
        int32_t sums[TILE * TILE];
        for (int64_t column = s * strip; column < stop; column += TILE) {
            const int8_t* columns = w + column * width;
            int64_t r = 0;
            for (; r + TILE <= rows; r += TILE) {
                multiply_tile<TILE>(&x_bytes[r * width], columns, width, sums);
                write_tile(r, TILE, column, sums);
            }
            for (; r < rows; r++) {
                multiply_tile<1>(&x_bytes[r * width], columns, width, sums);
                write_tile(r, 1, column, sums);
            }
        }
    });
}
