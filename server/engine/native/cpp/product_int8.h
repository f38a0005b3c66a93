// The product of rows and a weight in 8 bits. Each row is rounded to 8 bits, by its own largest value.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "bfloat16.h"
#include "each_row.h"
#include "int8_words.h"
#include "product.h"

// Round a row to 8 bits and return its scale, which is NaN for a row that is not finite.
template <typename T> inline float round_row(const T* x, int8_t* rounded, int64_t in) {
    constexpr int32_t infinity_bits = 0x7f800000;  // those of NaN are more
    int32_t largest_bits = 0;  // of a number without its sign: they are in the order of the numbers
#pragma omp simd reduction(max : largest_bits)
    for (int64_t i = 0; i < in; i++) {
        const int32_t bits = std::bit_cast<int32_t>(load(x[i])) & 0x7fffffff;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    const float largest = std::bit_cast<float>(largest_bits);
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < in; i++) rounded[i] = int8_t(int32_t(std::rint(load(x[i]) * inverse)));
    if (largest_bits >= infinity_bits) return std::numeric_limits<float>::quiet_NaN();
    return largest / 127.0f;
}

// Rows of x in 8 bits, laid out as the processor multiplies them, and their scales.
struct RoundedRows {
    const int64_t words;  // of the weight, that a row meets
    const std::unique_ptr<Bytes[]> bytes;
    const std::unique_ptr<float[]> scales;

    template <typename T>
    RoundedRows(const T* x, int64_t rows, int64_t in)
        : words(up_to(4, in) / 4), bytes(new Bytes[rows * words * WORDS_OF_X]),
          scales(new float[rows]) {
        const std::unique_ptr<uint32_t[]> rounded(new uint32_t[rows * words]);
        each_row(rows, 8 * in, [&](int64_t r) {
            uint32_t* const row = rounded.get() + r * words;
            row[words - 1] = 0;  // what fills it
            scales[r] = round_row(x + r * in, reinterpret_cast<int8_t*>(row), in);
            Bytes* const to = bytes.get() + r * words * WORDS_OF_X;
#pragma omp simd
            for (int64_t i = 0; i < words; i++) lay_out(row[i], to + i * WORDS_OF_X);
        });
    }
};

// y [rows, columns] = x [rows, in] times w, of which each column has a scale; w_sums are the sums of
// its numbers.
template <typename T>
void product_int8(const T* x, const uint32_t* words, const float* w_scales, const int32_t* w_sums,
                  T* y, int64_t rows, int64_t in, int64_t words_of_column, int64_t columns) {
    const RoundedRows x_rows(x, rows, in);
    const Weight w{words, words_of_column, columns};
    auto write = [&](int64_t row, int64_t column, int64_t count, const int32_t* sums) {
        T* const to = y + row * columns + column;
        const float x_scale = x_rows.scales[row];
        const float* const scales = w_scales + column;
        const int32_t* const zeros = w_sums + column;
#pragma omp simd
        for (int64_t c = 0; c < count; c++)
            to[c] = store<T>(x_scale * scales[c] * float(sums[c] - ZERO_POINT * zeros[c]));
    };
    multiply(rows, x_rows.bytes.get(), x_rows.words * WORDS_OF_X, w, write);
}
