// Vectors as the compiler knows them, of the width that the processor has.

#pragma once

#include <cstdint>
#include <type_traits>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "bfloat16.h"

#if defined(__AVX512F__)
constexpr int LANES = 16;  // 32-bit numbers of a vector
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef Words WordsInMemory __attribute__((aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef Floats FloatsInMemory __attribute__((aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16)));
typedef Four FourInMemory __attribute__((aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef Halves HalvesInMemory __attribute__((aligned(2), may_alias));

inline Halves load_halves(const bfloat16* from) { return *(const HalvesInMemory*)from; }

// Words of two halves each, the first one below the second.
inline Words paired(Halves first, Halves second) {
#if defined(__AVX512F__) && __has_builtin(__builtin_shufflevector)
    // One instruction, where g++ 12 converts a vector of halves in two parts.
    return (Words)__builtin_shufflevector(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                          6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                          29, 14, 30, 15, 31);
#else
    return __builtin_convertvector(first, Words) | __builtin_convertvector(second, Words) << 16;
#endif
}

inline Floats load_vector(const float* from) { return *(const FloatsInMemory*)from; }
inline Floats load_vector(const bfloat16* from) {
    return (Floats)paired(Halves{}, load_halves(from));
}

inline void store_vector(Floats x, float* to) { *(FloatsInMemory*)to = x; }
inline void store_vector(Floats x, bfloat16* to) {
#if defined(__AVX512BF16__)
    *(HalvesInMemory*)to = (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    float each[LANES];
    store_vector(x, each);
#pragma omp simd
    for (int i = 0; i < LANES; i++) to[i] = store<bfloat16>(each[i]);
#endif
}

// The same for one number or LANES of them: F is float or Floats.
template <typename F, typename T> inline F load_some(const T* from) {
    if constexpr (std::is_same_v<F, float>)
        return load(*from);
    else
        return load_vector(from);
}
template <typename F, typename T> inline void store_some(F x, T* to) {
    if constexpr (std::is_same_v<F, float>)
        *to = store<T>(x);
    else
        store_vector(x, to);
}
template <typename T, typename F> inline F rounded(F x) {
    if constexpr (std::is_same_v<T, float>) return x;
    T numbers[sizeof(F) / sizeof(float)];
    store_some(x, numbers);
    return load_some<F>(numbers);
}

// Call visit(i, F{}) for n numbers: LANES at a time, from number i on, as long as there are so
// many, then one by one.
template <typename Visit> inline void each_number(int64_t n, Visit visit) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) visit(i, Floats{});
    for (; i < n; i++) visit(i, 0.0f);
}

inline Four load_four(const float* from) { return *(const FourInMemory*)from; }
inline Four load_four(const bfloat16* from) {
    return Four{load(from[0]), load(from[1]), load(from[2]), load(from[3])};
}
inline void store_four(Four x, float* to) { *(FourInMemory*)to = x; }

// Four numbers of two vectors of four, by their places in both.
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLED(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else  // g++ before 12
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define SHUFFLED(x, y, ...) __builtin_shuffle(x, y, FourPlaces{__VA_ARGS__})
#endif
