// The two types of numbers: float, and bfloat16, which is the upper half of a float.

#pragma once

#include <bit>
#include <cstdint>

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

template <typename T> inline T store(float x);
template <> inline float store<float>(float x) { return x; }
template <> inline bfloat16 store<bfloat16>(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits = std::bit_cast<uint32_t>(x);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return {uint16_t(is_nan ? 0x7fc0 : nearest)};
}
