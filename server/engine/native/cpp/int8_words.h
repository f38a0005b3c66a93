// Words of four numbers of 8 bits, of x and of a weight. Their products add up to 32 bits exactly,
// so all variants give the same sums.

#pragma once

#include <cstdint>
#if defined(__AVX512VNNI__) || defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "panel_tiles.h"

// A part of what meets a word of the weight, four numbers of x: all, two or one of them.
struct Bytes {
    uint32_t word;
};

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

#if defined(__AVX512VNNI__)
// The instruction takes one factor unsigned, so x is shifted by this much: 128 is 0.
constexpr int32_t ZERO_POINT = 128;
constexpr int WORDS_OF_X = 1;
#elif defined(__AVX512BW__) || defined(__AVX2__)
constexpr int32_t ZERO_POINT = 0;
constexpr int WORDS_OF_X = 2;
#else
constexpr int32_t ZERO_POINT = 0;
constexpr int WORDS_OF_X = 4;
#endif

template <> struct Arithmetic<Bytes> {
    using Sum = int32_t;
    static constexpr int PER_WORD = WORDS_OF_X;
    static constexpr int READING_ROWS = 8;
};

// One of the four numbers of a word.
inline int32_t byte_of(uint32_t word, int n) { return int32_t(word << (24 - 8 * n)) >> 24; }

// Lay four numbers of x out for add_word.
inline void lay_out(uint32_t four, Bytes* to) {
#if defined(__AVX512VNNI__)
    to[0] = {four ^ 0x80808080};  // adds ZERO_POINT to each
#elif defined(__AVX512BW__) || defined(__AVX2__)
    for (int i = 0; i < 2; i++)
        to[i] = {(byte_of(four, i) & 0xffff) | uint32_t(byte_of(four, i + 2)) << 16};
#else
    for (int i = 0; i < 4; i++) to[i] = {uint32_t(byte_of(four, i))};
#endif
}

#if defined(__AVX512VNNI__)
template <int ROWS, int VECTORS>
inline void add_word(Tile<int32_t, ROWS, VECTORS>& tile, const RowsOfX<Bytes, ROWS>& x,
                     WordsOfColumns<VECTORS> words) {
    Words w[VECTORS];
    for (int c = 0; c < VECTORS; c++) w[c] = words.at(c);
    for (int r = 0; r < ROWS; r++) {
        const Words of_row = Words{} + x.at(r, 0).word;
        for (int c = 0; c < VECTORS; c++)
            tile.sums[r][c] = (Ints)_mm512_dpbusd_epi32((__m512i)tile.sums[r][c], (__m512i)of_row,
                                                        (__m512i)w[c]);
    }
}
#elif defined(__AVX512BW__) || defined(__AVX2__)
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

// The sums of two products each, in 32 bits. `vpmaddubsw` would take bytes, and saturate at 16
// bits.
inline Ints pair_products(Words a, Shorts b) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

template <int ROWS, int VECTORS>
inline void add_word(Tile<int32_t, ROWS, VECTORS>& tile, const RowsOfX<Bytes, ROWS>& x,
                     WordsOfColumns<VECTORS> words) {
    Shorts w[VECTORS];
    for (int c = 0; c < VECTORS; c++) w[c] = (Shorts)words.at(c) << 8 >> 8;  // bytes 0 and 2
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++)
            tile.sums[r][c] += pair_products(Words{} + x.at(r, 0).word, w[c]);
    for (int c = 0; c < VECTORS; c++) w[c] = (Shorts)words.at(c) >> 8;  // bytes 1 and 3
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++)
            tile.sums[r][c] += pair_products(Words{} + x.at(r, 1).word, w[c]);
}
#else
template <int ROWS, int VECTORS>
inline void add_word(Tile<int32_t, ROWS, VECTORS>& tile, const RowsOfX<Bytes, ROWS>& x,
                     WordsOfColumns<VECTORS> words) {
    for (int k = 0; k < 4; k++) {
        Ints w[VECTORS];
        for (int c = 0; c < VECTORS; c++) w[c] = (Ints)words.at(c) << (24 - 8 * k) >> 24;
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < VECTORS; c++)
                tile.sums[r][c] += int32_t(x.at(r, k).word) * w[c];
    }
}
#endif
