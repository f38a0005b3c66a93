// Scores of queries at the positions of a part, and the weights that they become.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bfloat16.h"
#include "exponential.h"
#include "few_rows.h"
#include "vectors.h"

constexpr int64_t PART = 64;  // positions

// Positions [first, stop), from 0 on or from the first one of a part on.
struct Range {
    int64_t first, stop;

    bool is_empty() const { return stop <= first; }
    Range within(Range other) const {
        return {std::max(first, other.first), std::min(stop, other.stop)};
    }
    Range from(int64_t start) const { return {first - start, stop - start}; }
};

// The keys of a part, LANES places at a time: number j of those of vector v is at starts[v] + j ·
// stride. They are read before the values, which the processor is asked for meanwhile.
template <typename K, typename T> struct KeyVectors {
    const K* starts[PART / LANES];
    int64_t stride;
    const T* const* values;  // where those of each place lie
};

// The scores of some queries, [QUERIES, e], at some vectors of places from vector `first` on. Not
// inlined: by itself, the loop gets all registers.
template <int QUERIES, int VECTORS, typename K, typename T>
__attribute__((noinline)) void score_vectors(const float* queries, int64_t e,
                                             const KeyVectors<K, T>& keys, int64_t first,
                                             float* scores) {
    // Vectors of places that lie in one block, if it has 16. In float, what is fetched for a number
    // of their keys is then one cache line.
    constexpr int SIDE_BY_SIDE = std::min(VECTORS, std::max(1, 16 / LANES));
    Floats sums[QUERIES][VECTORS];
    const K* starts[VECTORS];
    const T* values[VECTORS];  // LANES · e numbers each
    for (int v = 0; v < VECTORS; v++) {
        for (int q = 0; q < QUERIES; q++) sums[q][v] = Floats{};
        starts[v] = keys.starts[first + v];
        values[v] = keys.values[(first + v) * LANES];
    }
    for (int64_t j = 0, at = 0; j < e; j++, at += keys.stride, queries++) {
        for (int v = 0; v < VECTORS; v += SIDE_BY_SIDE)
            __builtin_prefetch(values[v] + j * SIDE_BY_SIDE * LANES);
        add_products(sums, queries, e, [&](int v) { return load_vector(starts[v] + at); });
    }
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < VECTORS; v++)
            store_vector(sums[q][v], scores + q * PART + (first + v) * LANES);
}

// The scores [count, PART] of some queries, at most MAX_FEW_ROWS, at some places and those beside
// them.
template <int QUERIES = MAX_FEW_ROWS, typename K, typename T>
void score_few(int64_t count, const float* queries, int64_t e, const KeyVectors<K, T>& keys,
               Range places, float* scores) {
    if constexpr (QUERIES > 0) {
        if (count < QUERIES)
            return score_few<QUERIES - 1>(count, queries, e, keys, places, scores);
        constexpr int VECTORS = QUERIES > 3 ? 2 : 4;  // their sums fit 16 registers
        constexpr int64_t STEP = VECTORS * LANES;
        static_assert(PART % STEP == 0);
        for (int64_t p = places.first / STEP * STEP; p < places.stop; p += STEP)
            score_vectors<QUERIES, VECTORS>(queries, e, keys, p / LANES, scores);
    }
}

// Bound scores softly, each x to limit · tanh(x / limit).
inline void bound(float* scores, Range places, float limit) {
#pragma omp simd
    for (int64_t p = places.first; p < places.stop; p++)
        scores[p] = limit - 2.0f * limit / (exponential(2.0f / limit * scores[p]) + 1.0f);
}

// Turn the scores at some places of a part into weights, and return the largest score. All places
// before them, and those behind them up to a whole vector, become 0.
inline float to_weights(float* scores, Range places, float& total) {
    const int64_t stop = (places.stop + LANES - 1) / LANES * LANES;
    std::fill(scores, scores + places.first, -INFINITY);
    std::fill(scores + places.stop, scores + stop, -INFINITY);
    Floats largests = Floats{} - INFINITY;
    for (int64_t p = 0; p < stop; p += LANES) {
        const Floats some = load_vector(scores + p);
        largests = some > largests ? some : largests;
    }
    float largest = largests[0];
    for (int i = 1; i < LANES; i++) largest = std::max(largest, largests[i]);
#pragma omp simd
    for (int64_t p = 0; p < stop; p++) scores[p] = exponential(scores[p] - largest);
    Floats sums{};
    for (int64_t p = 0; p < stop; p += LANES) sums += load_vector(scores + p);
    total = lane_sum(sums);
    return largest;
}
