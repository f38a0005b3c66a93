// exp(x).

#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "vectors.h"

// exp(x) within 2 units in the last place, by Cephes' polynomial. It has no branches, so loops that
// call it become vector code; and F is float or Floats. Below -87 the result is 0.
template <typename F> inline F exponential(F x) {
    using Bits = std::conditional_t<std::is_same_v<F, float>, uint32_t, Words>;
    // The last bits of a sum with so much are those of an integer. They become an exponent, which
    // is k + 127.
    constexpr float integers = 0x1.8p23f + 127;
    const F most = F{} + 88.0f;
    const F clamped = x > most ? most : x;
    const F shifted = clamped * 1.44269504f + integers;  // x / ln 2
    const F k = shifted - integers;
    const F r = clamped - k * 0.693359375f + k * 2.12194440e-4f;  // x - k ln 2
    F p = F{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const F power_of_2 = std::bit_cast<F>(std::bit_cast<Bits>(shifted) << 23);
    const F y = (p * r * r + r + 1.0f) * power_of_2;
    return x < -87.0f ? F{} : y;  // the comparison is false for NaN, which y keeps
}
