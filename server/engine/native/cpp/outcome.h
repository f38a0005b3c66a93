// What attention to some positions gives, and how that of several is added up.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "exponential.h"

// Of M queries, what attention to some positions gives: the largest score, the sum of the weights
// exp(score - largest), and the sum of the values with these weights, [M, e]. All are 0 for a query
// that sees none of the positions.
class Outcome {
    float* memory;
    int64_t M, e;

  public:
    Outcome(float* memory, int64_t M, int64_t e) : memory(memory), M(M), e(e) {}
    static int64_t size(int64_t M, int64_t e) { return M * (e + 2); }

    float& largest(int64_t m) const { return memory[m]; }
    float& total(int64_t m) const { return memory[M + m]; }
    float* sum(int64_t m) const { return memory + 2 * M + m * e; }
    void clear() const { std::fill_n(memory, size(M, e), 0.0f); }

    // Add what comes from other positions.
    void add(const Outcome& other) const {
        constexpr int64_t AT_ONCE = 64;
        float own_scales[AT_ONCE], scales[AT_ONCE];
        for (int64_t first = 0; first < M; first += AT_ONCE) {
            const int64_t count = std::min(AT_ONCE, M - first);
            scale(other, first, count, own_scales, scales);
            for (int64_t i = 0; i < count; i++) {
                float* to = sum(first + i);
                const float* from = other.sum(first + i);
                const float own = own_scales[i], others = scales[i];
#pragma omp simd
                for (int64_t j = 0; j < e; j++) to[j] = to[j] * own + from[j] * others;
            }
        }
    }

  private:
    // Bring the weights of some queries to the largest score of both, and say by which factors.
    void scale(const Outcome& other, int64_t first, int64_t count, float* own_scales,
               float* scales) const {
        float* largests = memory + first;
        float* totals = memory + M + first;
        const float* other_largests = other.memory + first;
        const float* other_totals = other.memory + M + first;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            const float own = totals[i] == 0.0f ? -INFINITY : largests[i];
            const float others = other_totals[i] == 0.0f ? -INFINITY : other_largests[i];
            const float both = std::max(own, others);
            const float highest = both == -INFINITY ? 0.0f : both;  // infinity - infinity is NaN
            own_scales[i] = exponential(own - highest);
            scales[i] = exponential(others - highest);
            totals[i] = totals[i] * own_scales[i] + other_totals[i] * scales[i];
            largests[i] = highest;
        }
    }
};
