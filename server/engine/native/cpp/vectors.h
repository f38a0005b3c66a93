// Vectors as the compiler knows them, of the width that the processor has.

#pragma once

#include <cstdint>

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
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef Floats FloatsInMemory __attribute__((aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef Halves HalvesInMemory __attribute__((aligned(2), may_alias));

inline Floats load_vector(const float* from) { return *(const FloatsInMemory*)from; }
inline Floats load_vector(const bfloat16* from) {
    return (Floats)(__builtin_convertvector(*(const HalvesInMemory*)from, Words) << 16);
}

inline void store_vector(Floats x, float* to) { *(FloatsInMemory*)to = x; }
inline void store_vector(Floats x, bfloat16* to) {
    float each[LANES];
    store_vector(x, each);
#pragma omp simd
    for (int i = 0; i < LANES; i++) to[i] = store<bfloat16>(each[i]);
}
