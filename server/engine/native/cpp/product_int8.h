// The product of rows and a weight in 8 bits. Each row is rounded to 8 bits, by its own largest value.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "each_row.h"
#include "int8_words.h"
#include "product.h"

// Round a row to 8 bits and return its scale, which is NaN for a row that is not finite. `rounded` is
// longer than the row by what fills the last word.
template <typename T> inline float round_row(const T* x, int8_t* rounded, int64_t in) {
    int32_t largest_bits = 0;  // of a number without its sign: they are in the order of the numbers
    float zero_or_nan = 0;
#pragma omp simd reduction(max : largest_bits) reduction(+ : zero_or_nan)
    for (int64_t i = 0; i < in; i++) {
        const float v = load(x[i]);
        const int32_t bits = std::bit_cast<int32_t>(v) & 0x7fffffff;
        largest_bits = bits > largest_bits ? bits : largest_bits;
        zero_or_nan += v * 0.0f;
    }
    const float largest = std::bit_cast<float>(largest_bits);
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < in; i++) rounded[i] = int8_t(int32_t(std::rint(load(x[i]) * inverse)));
    return largest / 127.0f + zero_or_nan;
}

// Rows of x in 8 bits, laid out as the processor multiplies them, and their scales.
struct RoundedRows {
    int64_t words;  // of the weight, that a row meets
    std::vector<Bytes> bytes;
    std::vector<float> scales;

    template <typename T>
    RoundedRows(const T* x, int64_t rows, int64_t in)
        : words(up_to(4, in) / 4), bytes(rows * words * WORDS_OF_X), scales(rows) {
        each_row(rows, 8 * in, [&](int64_t r) {
            std::vector<int8_t> rounded(words * 4);
            scales[r] = round_row(x + r * in, rounded.data(), in);
            for (int64_t i = 0; i < words; i++) {
                const int8_t four[] = {rounded[4 * i], rounded[4 * i + 1], rounded[4 * i + 2],
                                       rounded[4 * i + 3]};
                lay_out(four, &bytes[(r * words + i) * WORDS_OF_X]);
            }
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
        T* to = y + row * columns + column;
        for (int64_t c = 0; c < count; c++) {
            int32_t sum = sums[c] - ZERO_POINT * w_sums[column + c];
            to[c] = store<T>(x_rows.scales[row] * w_scales[column + c] * float(sum));
        }
    };
    multiply(rows, x_rows.bytes.data(), x_rows.words * WORDS_OF_X, w, write);
}
