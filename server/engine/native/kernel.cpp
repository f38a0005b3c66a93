// What lies between a decoder's matrix products, for rows that are looked at one by one: each row gets the same bits
// whatever is beside it. Built and called by kernel.py, which says what the shapes are. T: float or bfloat16; sums are
// float, and where transformers' modules round to T on the way, so does this.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

template <typename T> inline T store(float x);
template <> inline float store<float>(float x) { return x; }
template <> inline bfloat16 store<bfloat16>(float x) {  // to nearest, ties to even; a NaN stays one
    uint32_t u = std::bit_cast<uint32_t>(x), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

template <typename T> inline float rounded(float x) { return load(store<T>(x)); }

// exp to 2 ulp (Cephes' polynomial), in a form that compilers turn into vectors; 0 below -87.
inline float exponential(float x) {
    float k = std::rint(std::min(x, 88.0f) * 1.44269504f), r = std::min(x, 88.0f) - k * 0.693359375f + k * 2.12194440e-4f;
    float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
               1.6666665459e-1f) * r + 5.0000001201e-1f;
    float y = (p * r * r + r + 1.0f) * std::bit_cast<float>((int32_t(std::max(k, -126.0f)) + 127) << 23);
    return x < -87.0f ? 0.0f : y;  // NaN: y
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

// Little work is done by one thread: to meet the others costs some microseconds, and milliseconds where a core has more
// to do than this. (No `if` clause: libgomp ends the threads that a team of one leaves over, and makes them anew.)
template <typename F> void each_row(int64_t rows, int64_t operations, F visit) {
    if (rows == 1 || rows * operations < 100000) {
        for (int64_t r = 0; r < rows; r++) visit(r);
    } else {
#pragma omp parallel for schedule(dynamic)
        for (int64_t r = 0; r < rows; r++) visit(r);
    }
}

template <typename T> void norm_row(const T* x, const T* weight, float eps, T* y, int64_t d) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < d; i++) squares += load(x[i]) * load(x[i]);
    float scale = 1.0f / std::sqrt(squares / float(d) + eps);
#pragma omp simd
    for (int64_t i = 0; i < d; i++) y[i] = store<T>(rounded<T>(load(x[i]) * scale) * load(weight[i]));
}

template <typename T> void norm(const T* x, const T* weight, float eps, T* y, int64_t rows, int64_t d) {
    each_row(rows, 2 * d, [&](int64_t r) { norm_row(x + r * d, weight, eps, y + r * d, d); });
}

template <typename T> void gate(const T* x, T* y, int64_t rows, int64_t d) {
    each_row(rows, 4 * d, [&](int64_t r) {
        const T *a = x + r * 2 * d, *b = a + d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            float v = load(a[i]);
            y[r * d + i] = store<T>(rounded<T>(v / (1.0f + exponential(-v))) * load(b[i]));
        }
    });
}

template <typename T>
void rotate(T* heads, const T* head_norms, float eps, const T* cos, const T* sin, T* cache, const int64_t* slots,
            int64_t rows, int64_t H, int64_t h, int64_t e) {
    each_row(rows, 4 * (H + h) * e, [&](int64_t r) {
        T* row = heads + r * (H + 2 * h) * e;
        for (int64_t i = 0; i < H + h; i++) {
            T* x = row + i * e;
            if (head_norms) norm_row(x, head_norms + i * e, eps, x, e);
#pragma omp simd
            for (int64_t j = 0; j < e / 2; j++) {
                float a = load(x[j]), b = load(x[j + e / 2]);
                float ac = rounded<T>(a * load(cos[r * e + j])), bs = rounded<T>(b * load(sin[r * e + j]));
                float bc = rounded<T>(b * load(cos[r * e + j + e / 2])), as = rounded<T>(a * load(sin[r * e + j + e / 2]));
                x[j] = store<T>(ac + bs);
                x[j + e / 2] = store<T>(bc + as);
            }
        }
        std::copy_n(row + H * e, 2 * h * e, cache + slots[r] * 2 * h * e);
    });
}

// One row over the blocks of its sequence, each read once: the softmax so far is scaled when a larger score comes. E: the
// size of a head, where the compiler may know it (0: it does not).
template <typename T, int64_t E>
void attend_row(const T* query, const T* cache, const int64_t* blocks, T* out, int64_t first, int64_t length,
                float scaling, int64_t H, int64_t h, int64_t size, int64_t z) {
    const int64_t e = E ? E : size;
    std::vector<float> memory(2 * H * e + 2 * H + z);
    float *q = memory.data(), *sums = q + H * e, *tops = sums + H * e, *totals = tops + H, *scores = totals + H;
    for (int64_t i = 0; i < H * e; i++) q[i] = load(query[i]) * scaling;
    std::fill_n(tops, H, -INFINITY);
    for (int64_t b = first / z; b * z < length; b++) {
        int64_t start = std::max(first - b * z, int64_t(0)), stop = std::min(length - b * z, z);
        const T* block = cache + blocks[b] * z * 2 * h * e;
        if ((b + 1) * z < length) {  // a head's part of each position is too little for the processor to see a stream
            const char* next = reinterpret_cast<const char*>(cache + blocks[b + 1] * z * 2 * h * e);
            for (size_t at = 0; at < z * 2 * h * e * sizeof(T); at += 64) __builtin_prefetch(next + at, 0, 2);
        }
        for (int64_t i = 0; i < H; i++) {
            const T *keys = block + i / (H / h) * e, *values = keys + h * e;
            float top = tops[i], total = 0;
            for (int64_t p = start; p < stop; p++) {
                scores[p] = dot(q + i * e, keys + p * 2 * h * e, e);
                top = std::max(top, scores[p]);
            }
#pragma omp simd reduction(+ : total)
            for (int64_t p = start; p < stop; p++) total += scores[p] = exponential(scores[p] - top);
            float scale = exponential(tops[i] - top);
            float* __restrict sum = sums + i * e;
            for (int64_t j = 0; j < e; j++) sum[j] *= scale;
            for (int64_t p = start; p < stop; p++) add_scaled(sum, scores[p], values + p * 2 * h * e, e);
            totals[i] = totals[i] * scale + total;
            tops[i] = top;
        }
    }
    for (int64_t i = 0; i < H; i++)
        for (int64_t j = 0; j < e; j++) out[i * e + j] = store<T>(sums[i * e + j] / totals[i]);
}

template <typename T>
void attend(const T* query, int64_t stride, const T* cache, const int64_t* blocks, int64_t width,
            const int64_t* positions, T* out, int64_t window, float scaling, int64_t rows, int64_t H, int64_t h,
            int64_t e, int64_t z) {
    auto of_size = e == 64 ? attend_row<T, 64> : e == 128 ? attend_row<T, 128> : attend_row<T, 0>;
    each_row(rows, 2 * H * e * z * width, [&](int64_t r) {
        int64_t length = positions[r] + 1, first = window > 0 ? std::max<int64_t>(0, length - window) : 0;
        of_size(query + r * stride, cache, blocks + r * width, out + r * H * e, first, length, scaling, H, h, e, z);
    });
}

template <typename T>
void add_lora(T* y, const T* x, const T* A, const T* B, const int64_t* first, const int64_t* spans,
              const int64_t* adapters, int64_t rows, int64_t in, int64_t out) {
    each_row(rows, 8 * (in + out), [&](int64_t r) {
        if (adapters[r] < 0) return;
        std::vector<float> wide(in), sums(out);
        for (int64_t i = 0; i < in; i++) wide[i] = load(x[r * in + i]);
        for (int64_t i = 0; i < out; i++) sums[i] = load(y[r * out + i]);
        for (int64_t j = first[adapters[r]]; j < first[adapters[r] + 1]; j++) {
            float read = dot(wide.data(), A + j * in, in);
            int64_t start = spans[2 * j], stop = spans[2 * j + 1];
            add_scaled(sums.data() + start, read, B + j * out + start, stop - start);
        }
        for (int64_t i = 0; i < out; i++) y[r * out + i] = store<T>(sums[i]);
    });
}

// sums[r * 4 + c] = dot of row r of x and row c of w, both of K bytes, a multiple of 64.
template <int R> inline void tile(const uint8_t* x, const int8_t* w, int64_t K, int32_t* sums) {
#ifdef __AVX512VNNI__
    __m512i dots[R][4] = {};
    for (int64_t i = 0; i < K; i += 64)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < 4; c++)
                dots[r][c] = _mm512_dpbusd_epi32(dots[r][c], _mm512_loadu_si512(x + r * K + i),
                                                 _mm512_loadu_si512(w + c * K + i));
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++) sums[r * 4 + c] = _mm512_reduce_add_epi32(dots[r][c]);
#else
    for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++) {
            int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < K; i++) sum += int32_t(x[r * K + i]) * w[c * K + i];
            sums[r * 4 + c] = sum;
        }
#endif
}

template <typename T>
void product(const T* x, const int8_t* w, const float* scales, const int32_t* w_sums, T* y, int64_t rows, int64_t in,
             int64_t K, int64_t N) {
    std::vector<uint8_t> quantised(rows * K, 128);  // 128 is 0: signed bytes, but for an instruction that has none
    std::vector<float> x_scales(rows);
    each_row(rows, 8 * in, [&](int64_t r) {
        float largest = 0, zero = 0;  // or NaN, where the row is not finite
#pragma omp simd reduction(max : largest) reduction(+ : zero)
        for (int64_t i = 0; i < in; i++) {
            float v = load(x[r * in + i]);
            largest = std::max(largest, std::abs(v));
            zero += v * 0.0f;
        }
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        x_scales[r] = largest / 127.0f + zero;
#pragma omp simd
        for (int64_t i = 0; i < in; i++)
            quantised[r * K + i] = uint8_t(int32_t(std::rint(load(x[r * in + i]) * inverse)) + 128);
    });
    auto write = [&](int64_t first, int64_t count, int64_t n, const int32_t* sums) {
        for (int64_t r = first; r < first + count; r++)
            for (int64_t c = n; c < n + 4; c++)
                y[r * N + c] = store<T>(x_scales[r] * scales[c] * float(sums[(r - first) * 4 + c - n] - 128 * w_sums[c]));
    };
    each_row((N + 31) / 32, 32 * rows * K, [&](int64_t block) {
        for (int64_t n = block * 32; n < std::min(N, block * 32 + 32); n += 4) {
            int64_t r = 0;
            int32_t sums[16];
            for (; r + 4 <= rows; r += 4) tile<4>(&quantised[r * K], w + n * K, K, sums), write(r, 4, n, sums);
            for (; r < rows; r++) tile<1>(&quantised[r * K], w + n * K, K, sums), write(r, 1, n, sums);
        }
    });
}

// A pointer to each, under its name and type.
#define EXPORT(name) auto* name##_float32 = &name<float>; auto* name##_bfloat16 = &name<bfloat16>;
extern "C" {
EXPORT(norm)
EXPORT(gate)
EXPORT(rotate)
EXPORT(attend)
EXPORT(add_lora)
EXPORT(product)
}
