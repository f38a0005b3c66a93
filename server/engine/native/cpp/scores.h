// Scores of queries at the positions of a part, and the weights that they become.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bfloat16.h"
#include "exponential.h"
#include "few_rows.h"
#include "vectors.h"

// Positions. A part has a cost of its own for each query: it is cleared, and added to the others.
constexpr int64_t PART = 256;

// Positions [first, stop), from 0 on or from the first one of a part on.
struct Range {
    int64_t first, stop;

    bool is_empty() const { return stop <= first; }
    int64_t count() const { return stop - first; }
    Range within(Range other) const {
        return {std::max(first, other.first), std::min(stop, other.stop)};
    }
    Range from(int64_t start) const { return {first - start, stop - start}; }
};

// The keys of a part, LANES places at a time: what meets the first lane of a query is at starts[v]
// for vector v, and the next is `stride` further. They are read before the values, which the
// processor is asked for meanwhile.
template <typename K, typename T> struct KeyVectors {
    const K* starts[PART / LANES];
    int64_t stride;
    const T* const* values;  // where those of each place lie
};

// Products of some queries, [QUERIES, e], and keys of some vectors of places, from `first` on.
// Not inlined: by itself, the loop gets all registers.
template <int QUERIES, int VECTORS, typename F, typename K, typename T>
__attribute__((noinline)) void score_vectors(const F* queries, int64_t e,
                                             const KeyVectors<K, T>& keys, int64_t first,
                                             float* scores) {
    // Vectors of places that lie in one block, if it has 16. In float, what is fetched for a number
    // of their keys is then one cache line.
    constexpr int SIDE_BY_SIDE = std::min(VECTORS, std::max(1, 16 / LANES));
    Floats sums[QUERIES][VECTORS];
    each_sum<QUERIES, VECTORS>([&](int q, int v) { sums[q][v] = Floats{}; });
    const K* starts[VECTORS];
    const T* values[VECTORS];  // LANES · e numbers each
    for (int v = 0; v < VECTORS; v++) {
        starts[v] = keys.starts[first + v];
        values[v] = keys.values[(first + v) * LANES];
    }
    const int64_t stride = keys.stride, next = stride / PER_LANE<F>;
    for (int64_t j = 0, at = 0; j < e; j += PER_LANE<F>, at += stride, queries += PER_LANE<F>) {
        for (int v = 0; v < VECTORS; v += SIDE_BY_SIDE)
            __builtin_prefetch(values[v] + j * SIDE_BY_SIDE * LANES);
        add_products(sums, queries, e, [&](int v) {
            const K* from = starts[v] + at;
            return columns<F>(from, from + next);
        });
    }
    each_sum<QUERIES, VECTORS>([&](int q, int v) {
        store_vector(sums[q][v], scores + q * PART + (first + v) * LANES);
    });
}

// The same for a number of vectors that is known only now.
template <int QUERIES, int VECTORS, typename F, typename K, typename T>
void score_some_vectors(int64_t vectors, const F* queries, int64_t e, const KeyVectors<K, T>& keys,
                        int64_t first, float* scores) {
    if constexpr (VECTORS > 0) {
        if (vectors >= VECTORS)
            return score_vectors<QUERIES, VECTORS>(queries, e, keys, first, scores);
        score_some_vectors<QUERIES, VECTORS - 1>(vectors, queries, e, keys, first, scores);
    }
}

// Products [count, PART] of some queries, at most MAX_FEW_ROWS, and the keys at some places and
// those beside them.
template <int QUERIES = MAX_FEW_ROWS, typename F, typename K, typename T>
void score_few(int64_t count, const F* queries, int64_t e, const KeyVectors<K, T>& keys,
               Range places, float* scores) {
    if constexpr (QUERIES > 0) {
        if (count < QUERIES)
            return score_few<QUERIES - 1>(count, queries, e, keys, places, scores);
        constexpr int VECTORS = VECTORS_BESIDE<QUERIES>;
        static_assert(PART % (VECTORS * LANES) == 0);
        const int64_t stop = (places.stop + LANES - 1) / LANES;
        for (int64_t v = places.first / LANES / VECTORS * VECTORS; v < stop; v += VECTORS)
            score_some_vectors<QUERIES, VECTORS>(stop - v, queries, e, keys, v, scores);
    }
}

// How products of queries and keys become scores.
struct ScoreScale {
    float scaling, softcap;  // 0: scores have no bound

    // A softcap bounds each score x to softcap · tanh(x / softcap).
    Floats scores(Floats products) const {
        const Floats scaled = products * scaling;
        if (softcap <= 0) return scaled;
        return softcap - 2.0f * softcap / (exponential(2.0f / softcap * scaled) + 1.0f);
    }
};

// Of LANES places from p on, those that are within the range: all bits of a lane, or none.
inline Integers lanes_within(Range range, int64_t p) {
    Integers places;
    for (int i = 0; i < LANES; i++) places[i] = i;
    return (places >= int32_t(range.first - p)) & (places < int32_t(range.stop - p));
}

// Turn products at some places into scores, and return the largest. Those at the other places of
// their vectors become minus infinity.
inline float to_scores(float* products, Range places, ScoreScale scale) {
    const Floats nothing = Floats{} - INFINITY;
    Floats largests = nothing;
    for (int64_t p = places.first / LANES * LANES; p < places.stop; p += LANES) {
        const Floats all = scale.scores(load_vector(products + p));
        const Floats scores = lanes_within(places, p) ? all : nothing;
        store_vector(scores, products + p);
        largests = scores > largests ? scores : largests;
    }
    return largest_lane(largests);
}

// Turn scores at some places into weights exp(score - largest), and return their sum as F has them.
// Beside the places, weights of their vectors become 0.
template <typename F>
inline float to_weights(const float* scores, Range places, float largest, F* weights) {
    Floats sums{};
    for (int64_t p = places.first / LANES * LANES; p < places.stop; p += LANES) {
        store_vector(exponential(load_vector(scores + p) - largest), weights + p);
        sums += load_vector(weights + p);
    }
    return lane_sum(sums);
}
