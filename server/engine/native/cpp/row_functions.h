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

template <typename T> void norm_row(const T* x, const T* weight, float eps, T* y, int64_t d) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < d; i++) squares += load(x[i]) * load(x[i]);
    float scale = 1.0f / std::sqrt(squares / float(d) + eps);
#pragma omp simd
    for (int64_t i = 0; i < d; i++)
        y[i] = store<T>(rounded<T>(load(x[i]) * scale) * load(weight[i]));
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
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            float v = load(gates[i]);
            float silu = v / (1.0f + exponential(-v));
            y[r * d + i] = store<T>(rounded<T>(silu) * load(ups[i]));
        }
    };
    each_row(rows, 8 * d, gate_row, rows_of_turn(rows));
}

// x += y.
template <typename T> void add(T* x, const T* y, int64_t rows, int64_t d) {
    auto add_row = [&](int64_t r) {
        T* to = x + r * d;
        const T* from = y + r * d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) to[i] = store<T>(load(to[i]) + load(from[i]));
    };
    each_row(rows, d, add_row, rows_of_turn(rows));
}

// Turn one head in place. The first half of `sin` is negated.
template <typename T> inline void rotate_head(T* x, const T* cos, const T* sin, int64_t e) {
    int64_t half = e / 2;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        float a = load(x[j]);
        float b = load(x[j + half]);
        float a_cos = rounded<T>(a * load(cos[j]));
        float b_sin = rounded<T>(b * load(sin[j]));
        float b_cos = rounded<T>(b * load(cos[j + half]));
        float a_sin = rounded<T>(a * load(sin[j + half]));
        x[j] = store<T>(a_cos + b_sin);
        x[j + half] = store<T>(b_cos + a_sin);
    }
}

// Turn the queries and keys of rows [rows, H + 2h, e] in place, after their norms, if any, and store
// keys and values in the cache.
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
