// A decoder step, row by row: a row's result has the same bits whatever other rows are in the batch.
// kernel_build.py compiles this file with the headers beside it; kernel.py calls it and documents
// each function.
//
// T is float or bfloat16. Sums are float. Intermediate results are rounded to T where transformers'
// modules round them.
//
// Shapes: rows of one token each; H query heads over h key-value heads of size e; blocks of z
// positions. Tensors are contiguous unless there is a stride.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "each_row.h"
#include "product.h"
#include "product_int8.h"

// exp(x) within 2 units in the last place, by Cephes' polynomial. It has no branches, so loops that
// call it become vector code. Below -87 the result is 0.
inline float exponential(float x) {
    float clamped = std::min(x, 88.0f);
    float k = std::rint(clamped * 1.44269504f);  // x / ln 2
    float r = clamped - k * 0.693359375f + k * 2.12194440e-4f;  // x - k ln 2
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float power_of_2 = std::bit_cast<float>((int32_t(std::max(k, -126.0f)) + 127) << 23);
    float y = (p * r * r + r + 1.0f) * power_of_2;
    return x < -87.0f ? 0.0f : y;  // the comparison is false for NaN, which y keeps
}

template <typename T> inline float dot(const float* a, const T* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * load(b[i]);
    return sum;
}

template <typename T> inline void add_scaled(float* y, float scale, const T* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] += scale * load(x[i]);
}

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
    each_row(rows, 2 * d, [&](int64_t r) { norm_row(x + r * d, weight, eps, y + r * d, d); });
}

template <typename T> void gate(const T* x, T* y, int64_t rows, int64_t d) {
    each_row(rows, 4 * d, [&](int64_t r) {
        const T* gates = x + r * 2 * d;
        const T* ups = gates + d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            float v = load(gates[i]);
            float silu = v / (1.0f + exponential(-v));
            y[r * d + i] = store<T>(rounded<T>(silu) * load(ups[i]));
        }
    });
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

template <typename T>
void rotate(T* heads, const T* head_norms, float eps, const T* cos, const T* sin, T* cache,
            const int64_t* slots, int64_t rows, int64_t H, int64_t h, int64_t e) {
    each_row(rows, 4 * (H + h) * e, [&](int64_t r) {
        T* row = heads + r * (H + 2 * h) * e;
        for (int64_t i = 0; i < H + h; i++) {
            T* head = row + i * e;
            if (head_norms) norm_row(head, head_norms + i * e, eps, head, e);
            rotate_head(head, cos + r * e, sin + r * e, e);
        }
        const T* keys_and_values = row + H * e;
        std::copy_n(keys_and_values, 2 * h * e, cache + slots[r] * 2 * h * e);
    });
}

// Ask the processor for a block ahead of its use: each head reads too little of each position for
// the processor to see a pattern.
inline void prefetch(const void* block, size_t num_bytes) {
    constexpr size_t cache_line = 64;
    const char* bytes = reinterpret_cast<const char*>(block);
    for (size_t at = 0; at < num_bytes; at += cache_line) __builtin_prefetch(bytes + at, 0, 2);
}

// Attention of one row to positions [first, length) of its sequence. Each block is read once: when
// a larger score comes, the sums so far are scaled down to it (online softmax). E is the size of a
// head where the compiler may know it, else 0.
template <typename T, int64_t E>
void attend_row(const T* query, const T* cache, const int64_t* blocks, T* out, int64_t first,
                int64_t length, float scaling, int64_t H, int64_t h, int64_t head_size, int64_t z) {
    const int64_t e = E ? E : head_size;
    const int64_t position_size = 2 * h * e;
    const int64_t block_size = z * position_size;
    std::vector<float> memory(2 * H * e + 2 * H + z);
    float* scaled_query = memory.data();    // [H, e]
    float* sums = scaled_query + H * e;     // [H, e], weighted values
    float* maxima = sums + H * e;           // [H], the largest score so far
    float* totals = maxima + H;             // [H], the sum of the weights
    float* weights = totals + H;            // [z], scores of a block and then their exponentials
    for (int64_t i = 0; i < H * e; i++) scaled_query[i] = load(query[i]) * scaling;
    std::fill_n(maxima, H, -INFINITY);
    for (int64_t b = first / z; b * z < length; b++) {
        int64_t start = std::max(first - b * z, int64_t(0));
        int64_t stop = std::min(length - b * z, z);
        const T* block = cache + blocks[b] * block_size;
        bool is_last = (b + 1) * z >= length;
        if (!is_last) prefetch(cache + blocks[b + 1] * block_size, block_size * sizeof(T));
        for (int64_t i = 0; i < H; i++) {
            const T* keys = block + i / (H / h) * e;
            const T* values = keys + h * e;
            float maximum = maxima[i];
            float total = 0;
            for (int64_t p = start; p < stop; p++) {
                weights[p] = dot(scaled_query + i * e, keys + p * position_size, e);
                maximum = std::max(maximum, weights[p]);
            }
#pragma omp simd reduction(+ : total)
            for (int64_t p = start; p < stop; p++) {
                weights[p] = exponential(weights[p] - maximum);
                total += weights[p];
            }
            float scale = exponential(maxima[i] - maximum);
            float* __restrict sum = sums + i * e;
            for (int64_t j = 0; j < e; j++) sum[j] *= scale;
            for (int64_t p = start; p < stop; p++)
                add_scaled(sum, weights[p], values + p * position_size, e);
            totals[i] = totals[i] * scale + total;
            maxima[i] = maximum;
        }
    }
    for (int64_t i = 0; i < H; i++)
        for (int64_t j = 0; j < e; j++) out[i * e + j] = store<T>(sums[i * e + j] / totals[i]);
}

template <typename T>
void attend(const T* query, int64_t query_stride, const T* cache, const int64_t* blocks,
            int64_t blocks_per_row, const int64_t* positions, T* out, int64_t window, float scaling,
            int64_t rows, int64_t H, int64_t h, int64_t e, int64_t z) {
    auto attend_one = e == 64    ? attend_row<T, 64>
                      : e == 128 ? attend_row<T, 128>
                                 : attend_row<T, 0>;
    each_row(rows, 2 * H * e * z * blocks_per_row, [&](int64_t r) {
        int64_t length = positions[r] + 1;
        int64_t first = window > 0 ? std::max<int64_t>(0, length - window) : 0;
        attend_one(query + r * query_stride, cache, blocks + r * blocks_per_row, out + r * H * e,
                   first, length, scaling, H, h, e, z);
    });
}

// One pair of a LoRA: y[start, start + width) += x times A [rank, in] times B [rank, width].
template <typename T> struct LoraPair {
    const T* A;
    const T* B;
    int64_t rank, start, width;
};

// `loras` has for each row where its adapter's pairs are, [sites, pairs of a site], or null.
template <typename T>
void add_lora(T* y, const T* x, const LoraPair<T>* const* loras, int64_t site, int64_t site_pairs,
              int64_t rows, int64_t in, int64_t out) {
    each_row(rows, 8 * (in + out), [&](int64_t r) {
        if (!loras[r]) return;
        const LoraPair<T>* pairs = loras[r] + site * site_pairs;
        std::vector<float> inputs(in), sums(out);
        for (int64_t i = 0; i < in; i++) inputs[i] = load(x[r * in + i]);
        for (int64_t i = 0; i < out; i++) sums[i] = load(y[r * out + i]);
        for (int64_t p = 0; p < site_pairs; p++) {
            const LoraPair<T>& pair = pairs[p];
            for (int64_t j = 0; j < pair.rank; j++) {
                float z = dot(inputs.data(), pair.A + j * in, in);
                add_scaled(sums.data() + pair.start, z, pair.B + j * pair.width, pair.width);
            }
        }
        for (int64_t i = 0; i < out; i++) y[r * out + i] = store<T>(sums[i]);
    });
}

// Each function's address for each type, under a name that kernel.py finds: norm_float32.
#define EXPORT(name) auto* name##_float32 = &name<float>; auto* name##_bfloat16 = &name<bfloat16>;
extern "C" {
EXPORT(norm)
EXPORT(gate)
EXPORT(rotate)
EXPORT(attend)
EXPORT(add_lora)
EXPORT(product)
EXPORT(product_int8)

// Whether the system lets this process use all that the kernel is built for.
int may_run() {
#ifdef __AMX_BF16__
    return may_use_amx();
#else
    return true;
#endif
}
}
