// What a lane multiplies: a number of a row in float, or with AVX512-BF16 two numbers in bfloat16,
// whose products it adds up. They meet one number of a column, or two that lie side by side in a
// word.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "vectors.h"

#if defined(__AVX512BF16__)
constexpr bool MULTIPLIES_BFLOAT16 = true;
#else
constexpr bool MULTIPLIES_BFLOAT16 = false;
#endif

// What numbers of T are multiplied as: as they are where the processor can.
template <typename T> using FactorOf = std::conditional_t<MULTIPLIES_BFLOAT16, T, float>;

// How many numbers of F a lane multiplies at once.
template <typename F> constexpr int64_t PER_LANE = sizeof(float) / sizeof(F);

struct alignas(uint32_t) Pair {
    bfloat16 first, second;
};
// What a lane gets of F at once.
template <typename F> using Lane = std::conditional_t<std::is_same_v<F, float>, float, Pair>;

inline float lane_at(const float* from) { return *from; }
inline void add_product(Floats& sum, float a, Floats b) { sum += a * b; }

#if defined(__AVX512BF16__)
inline Pair lane_at(const bfloat16* from) { return {from[0], from[1]}; }
inline void add_product(Floats& sum, Pair a, Words b) {
    uint32_t word;
    std::memcpy(&word, &a, sizeof word);
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Words{} + word), (__m512bh)b);
}
#endif

// What some columns give the lanes of F: numbers of one row, or of two that follow each other, or
// those of two that lie side by side already.
template <typename F, typename T> inline auto columns(const T* row, const T* next_row) {
    if constexpr (std::is_same_v<F, float>)
        return load_vector(row);
    else if constexpr (std::is_same_v<T, Pair>)
        return *(const WordsInMemory*)row;
    else
        return paired(load_halves(row), load_halves(next_row));
}

// Lay the numbers of a row, and of the next one, out for the columns of a lane.
inline void copy_lanes(const float* row, const float*, float* to, int64_t count) {
    std::copy_n(row, count, to);
}
inline void copy_lanes(const bfloat16* row, const bfloat16*, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = load(row[i]);
}
inline void copy_lanes(const bfloat16* row, const bfloat16* next_row, Pair* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = {row[i], next_row[i]};
}
