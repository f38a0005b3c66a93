// The inner loops of `product`: some rows of x times one or two panels of the weight.
//
// A panel is PANEL columns of the weight, as [width / 2][PANEL][2] numbers in bfloat16: of each
// column two consecutive k lie side by side, in one 32-bit word. A vector of words becomes two of
// floats by a shift and a mask, and is what the instructions on pairs of bfloat16 take as it is.
//
// Every variant adds up the products of a row and a column in the order of k, whatever the number of
// rows: so a row's bits depend on nothing but itself and the weight.

#pragma once

#include <algorithm>
#include <cstdint>
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#include "bfloat16.h"

#if defined(__AVX512F__)
constexpr int LANES = 16;  // 32-bit numbers of a vector
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int PANEL = 16;  // columns
constexpr int PANEL_VECTORS = PANEL / LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef Floats FloatsInMemory __attribute__((aligned(4), may_alias));
typedef Words WordsInMemory __attribute__((aligned(4), may_alias));

// One or two panels side by side, from some k on.
struct Panels {
    const uint32_t* words;
    int count;
    int64_t stride;  // words from a panel to the next
    int64_t pairs;   // of k that are to be multiplied
    int64_t ahead;   // words from here to what will be read next, and is fetched meanwhile
};

// Sums of rows and the columns of the panels. They start at 0, or go on from what they are.
struct Sums {
    float* values;
    int64_t stride;  // from a row to the next
    bool start_at_0;

    Sums from(int64_t row, int column) const {
        return {values + row * stride + column, stride, start_at_0};
    }
};

// sums[row][vector], while they are in registers.
template <int ROWS, int VECTORS> struct Tile {
    Floats sums[ROWS][VECTORS];

    explicit Tile(const Sums& from) {
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < VECTORS; c++)
                sums[r][c] = from.start_at_0 ? Floats{} : *at(from, r, c);
    }
    void store_to(const Sums& to) const {
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < VECTORS; c++) *at(to, r, c) = sums[r][c];
    }
    static FloatsInMemory* at(const Sums& place, int r, int c) {
        return (FloatsInMemory*)(place.values + r * place.stride + c * LANES);
    }
};

// The words of one pair of k, from the first column of one or two panels on.
template <int VECTORS> struct PairOfK {
    const uint32_t* words;
    int64_t stride;

    Words at(int vector) const {
        const uint32_t* panel = words + vector / PANEL_VECTORS * stride;
        return *(const WordsInMemory*)(panel + vector % PANEL_VECTORS * LANES);
    }
};

// Add the products of a pair of k; x points to it in the first row. In floats: all vectors of one k
// first and then row by row, so that the compiler keeps all sums in registers.
template <int ROWS, int VECTORS>
inline void add_pair(Tile<ROWS, VECTORS>& tile, const float* x, int64_t x_stride,
                     PairOfK<VECTORS> pair) {
    Floats w[VECTORS];
    for (int c = 0; c < VECTORS; c++) w[c] = (Floats)(pair.at(c) << 16);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) tile.sums[r][c] += x[r * x_stride] * w[c];
    for (int c = 0; c < VECTORS; c++) w[c] = (Floats)(pair.at(c) & 0xffff0000);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) tile.sums[r][c] += x[r * x_stride + 1] * w[c];
}

#ifdef __AVX512BF16__
template <int ROWS, int VECTORS>
inline void add_pair(Tile<ROWS, VECTORS>& tile, const bfloat16* x, int64_t x_stride,
                     PairOfK<VECTORS> pair) {
    Words w[VECTORS];
    for (int c = 0; c < VECTORS; c++) w[c] = pair.at(c);
    for (int r = 0; r < ROWS; r++) {
        uint32_t both;
        __builtin_memcpy(&both, x + r * x_stride, sizeof both);
        const Words of_row = Words{} + both;
        for (int c = 0; c < VECTORS; c++)
            tile.sums[r][c] = (Floats)_mm512_dpbf16_ps((__m512)tile.sums[r][c], (__m512bh)of_row,
                                                       (__m512bh)w[c]);
    }
}
#endif

// Not inlined: by itself, the loop gets all registers.
template <int ROWS, int COUNT, typename X>
__attribute__((noinline)) void multiply_tile(const X* x, int64_t x_stride, const Panels& panels, const Sums& sums) {
    constexpr int VECTORS = COUNT * PANEL_VECTORS;
    Tile<ROWS, VECTORS> tile(sums);
    const int64_t stride = panels.stride, pairs = panels.pairs;
    const uint32_t* words = panels.words;
    const uint32_t* ahead = words + panels.ahead;
    for (int64_t i = 0; i < pairs; i++) {
        for (int n = 0; n < COUNT; n++) __builtin_prefetch(ahead + n * stride + i * PANEL);
        add_pair(tile, x + 2 * i, x_stride, PairOfK<VECTORS>{words + i * PANEL, stride});
    }
    tile.store_to(sums);
}

constexpr int MAX_ROWS = LANES == 16 ? 8 : 5;  // of a tile: as many sums as there are registers

// Rows for which two panels at once fit the registers; with fewer, each sum waits for the last one.
constexpr int MAX_WIDE_ROWS = LANES == 16 ? MAX_ROWS : LANES == 8 ? 2 : 1;

template <int ROWS, typename X>
void multiply_panels(const X* x, int64_t x_stride, const Panels& panels, const Sums& sums) {
    if constexpr (ROWS <= MAX_WIDE_ROWS) {
        if (panels.count == 2) return multiply_tile<ROWS, 2>(x, x_stride, panels, sums);
    }
    Panels one = panels;
    for (int n = 0; n < panels.count; n++, one.words += panels.stride)
        multiply_tile<ROWS, 1>(x, x_stride, one, sums.from(0, n * PANEL));
}

// multiply_panels<rows>, for a number of rows that is known only now.
template <typename X, int ROWS = MAX_ROWS>
void multiply_few(int64_t rows, const X* x, int64_t x_stride, const Panels& panels,
                  const Sums& sums) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply_panels<ROWS>(x, x_stride, panels, sums);
        multiply_few<X, ROWS - 1>(rows, x, x_stride, panels, sums);
    }
}

// Add the products of all rows, in tiles of nearly the same number of rows.
template <typename X>
void multiply_rows(int64_t rows, const X* x, int64_t x_stride, const Panels& panels,
                   const Sums& sums) {
    int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t first = rows * t / tiles;
        int64_t stop = rows * (t + 1) / tiles;
        multiply_few(stop - first, x + first * x_stride, x_stride, panels, sums.from(first, 0));
    }
}
