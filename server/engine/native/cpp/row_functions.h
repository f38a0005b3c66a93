// What is computed of a row by itself: norms, gates, rotations, and sums of two rows.
//
// T is float or bfloat16. Intermediate results are rounded to T where transformers' modules round
// them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bfloat16.h"
#include "cached_kv.h"
#include "each_row.h"
#include "exponential.h"
#include "few_rows.h"
#include "vectors.h"

template <typename T> void norm_row(const T* x, const T* weight, float eps, T* y, int64_t d) {
    Floats sums{};
    const int64_t whole = d / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) sums += load_vector(x + i) * load_vector(x + i);
    float squares = lane_sum(sums);
    for (int64_t i = whole; i < d; i++) squares += load(x[i]) * load(x[i]);
    const float scale = 1.0f / std::sqrt(squares / float(d) + eps);
    each_number(d, [&](int64_t i, auto some) {
        using F = decltype(some);
        const F scaled = rounded<T>(load_some<F>(x + i) * scale);
        store_some(scaled * load_some<F>(weight + i), y + i);
    });
}

template <typename T>
void norm(const T* x, const T* weight, float eps, T* y, int64_t rows, int64_t d) {
    auto norm_one = [&](int64_t r) { norm_row(x + r * d, weight, eps, y + r * d, d); };
    each_row(rows, 2 * d, norm_one, rows_of_turn(rows));
}

template <typename T> void gate(const T* x, T* y, int64_t rows, int64_t d) {
    auto gate_row = [&](int64_t r) {
        const T* gates = x + r * 2 * d;
        const T* ups = gates + d;
        each_number(d, [&](int64_t i, auto some) {
            using F = decltype(some);
            const F v = load_some<F>(gates + i);
            const F silu = rounded<T>(v / (1.0f + exponential(-v)));
            store_some(silu * load_some<F>(ups + i), y + r * d + i);
        });
    };
    each_row(rows, 8 * d, gate_row, rows_of_turn(rows));
}

// x += y.
template <typename T> void add(T* x, const T* y, int64_t rows, int64_t d) {
    auto add_row = [&](int64_t r) {
        T* to = x + r * d;
        const T* from = y + r * d;
        each_number(d, [&](int64_t i, auto some) {
            using F = decltype(some);
            store_some(load_some<F>(to + i) + load_some<F>(from + i), to + i);
        });
    };
    each_row(rows, d, add_row, rows_of_turn(rows));
}

// Turn one head in place. The first half of `sin` is negated.
template <typename T> inline void rotate_head(T* x, const T* cos, const T* sin, int64_t e) {
    const int64_t half = e / 2;
    each_number(half, [&](int64_t i, auto some) {
        using F = decltype(some);
        const F a = load_some<F>(x + i), b = load_some<F>(x + i + half);
        const F a_cos = rounded<T>(a * load_some<F>(cos + i));
        const F b_sin = rounded<T>(b * load_some<F>(sin + i));
        const F b_cos = rounded<T>(b * load_some<F>(cos + i + half));
        const F a_sin = rounded<T>(a * load_some<F>(sin + i + half));
        store_some(a_cos + b_sin, x + i);
        store_some(b_cos + a_sin, x + i + half);
    });
}

// Turn the queries and keys of rows [rows, H + 2h, e] in place, after their norms, if any, and
// store keys and values in the cache.
template <typename T>
void rotate(T* heads, const T* head_norms, float eps, const T* cos, const T* sin, T* cache,
            const int64_t* slots, int64_t rows, int64_t H, int64_t h, int64_t e, int64_t z) {
    const CachedKv<T> cached{cache, h, e, z};
    auto rotate_row = [&](int64_t r) {
        T* row = heads + r * (H + 2 * h) * e;
        for (int64_t i = 0; i < H + h; i++) {
            T* head = row + i * e;
            if (head_norms) norm_row(head, head_norms + i * e, eps, head, e);
            rotate_head(head, cos + r * e, sin + r * e, e);
        }
        cached.store(slots[r], row + H * e);
    };
    const int64_t operations = 4 * (H + h) * e + STORE_OPERATIONS * h * e;
    each_row(rows, operations, rotate_row, stored_at_once(rows));
}
