// Instructions of AVX512-BF16, AVX512-VNNI and AMX in plain C++. Included before all else, it lets the code that
// uses them run on any processor. It stops the program where the processor would.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#define __AVX512F__ 1
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1

inline float float_of(uint16_t bits) {
    uint32_t all = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &all, sizeof x);
    return x;
}

inline __m512 emulated_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    float s[16];
    uint16_t x[32], y[32];
    memcpy(s, &sums, sizeof s);
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    for (int i = 0; i < 16; i++)
        for (int j : {2 * i + 1, 2 * i}) s[i] += float_of(x[j]) * float_of(y[j]);
    memcpy(&sums, s, sizeof s);
    return sums;
}
#define _mm512_dpbf16_ps emulated_dpbf16_ps

inline __m256i emulated_cvtneps_pbh(__m512 from) {
    uint32_t bits[16];
    uint16_t rounded[16];
    memcpy(bits, &from, sizeof bits);
    for (int i = 0; i < 16; i++) {
        const bool is_nan = (bits[i] & 0x7fffffff) > 0x7f800000;
        rounded[i] = is_nan ? 0x7fc0 : (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16;
    }
    __m256i to;
    memcpy(&to, rounded, sizeof to);
    return to;
}
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh

inline __m512i emulated_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
    int32_t s[16];
    uint8_t x[64];
    int8_t y[64];
    memcpy(s, &sums, sizeof s);
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    for (int i = 0; i < 64; i++) s[i / 4] += x[i] * y[i];
    memcpy(&sums, s, sizeof s);
    return sums;
}
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32

#ifdef EMULATE_AMX
#define __AMX_BF16__ 1

struct EmulatedTiles {
    bool is_configured = false;
    unsigned char bytes[8][16][64];

    unsigned char (*operator[](int tile))[64] {
        if (!is_configured || tile < 0 || tile >= 8) abort();
        return bytes[tile];
    }
};
inline thread_local EmulatedTiles emulated_tiles;

inline void emulated_loadconfig(const void* config) {
    unsigned char bytes[64], expected[64] = {1};
    memcpy(bytes, config, sizeof bytes);
    for (int tile = 0; tile < 8; tile++) expected[16 + 2 * tile] = 64;
    for (int tile = 0; tile < 8; tile++) expected[48 + tile] = 16;
    if (memcmp(bytes, expected, sizeof bytes)) abort();
    emulated_tiles.is_configured = true;
}

inline void emulated_loadd(int tile, const void* from, int64_t stride) {
    for (int row = 0; row < 16; row++)
        memcpy(emulated_tiles[tile][row], (const char*)from + row * stride, 64);
}

inline void emulated_stored(int tile, void* to, int64_t stride) {
    for (int row = 0; row < 16; row++)
        memcpy((char*)to + row * stride, emulated_tiles[tile][row], 64);
}

inline void emulated_dpbf16ps(int to, int a, int b) {
    for (int row = 0; row < 16; row++) {
        float sums[16];
        memcpy(sums, emulated_tiles[to][row], sizeof sums);
        for (int k = 0; k < 16; k++) {
            uint16_t x[2], w[32];
            memcpy(x, emulated_tiles[a][row] + 4 * k, sizeof x);
            memcpy(w, emulated_tiles[b][k], sizeof w);
            for (int column = 0; column < 16; column++)
                for (int j : {0, 1}) sums[column] += float_of(x[j]) * float_of(w[2 * column + j]);
        }
        memcpy(emulated_tiles[to][row], sums, sizeof sums);
    }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release() (emulated_tiles.is_configured = false)
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_zero(tile) memset(emulated_tiles[tile], 0, sizeof emulated_tiles.bytes[0])
#define _tile_dpbf16ps emulated_dpbf16ps
#endif
