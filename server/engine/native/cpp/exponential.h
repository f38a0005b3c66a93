// exp(x), for loops that become vector code.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

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
