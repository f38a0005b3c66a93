// The inner loops of products: some rows of x times one or two panels of the weight.
//
// A panel is PANEL columns of the weight, as [width / n][PANEL][n] numbers: of each column n
// consecutive k lie side by side, in one 32-bit word. In bfloat16 n is 2: a vector of words becomes
// two of floats by a shift and a mask, and is what the instructions on pairs of bfloat16 take as it
// is. In 8 bits n is 4 (int8_words.h).
//
// Every variant adds up the products of a row and a column in the order of k, whatever the number of
// rows: so a row's bits depend on nothing but itself and the weight.

#pragma once

#include <algorithm>
#include <cstdint>
#if defined(__AVX2__) || defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "vectors.h"

constexpr int PANEL = 16;           // columns
constexpr int64_t CACHE_LINE = 64;  // bytes: a word of each column
constexpr int PANEL_VECTORS = PANEL / LANES;

// What a number of x takes part in. PER_WORD of them meet a word of the weight.
template <typename X> struct Arithmetic {
    using Sum = float;
    static constexpr int PER_WORD = 2;
};
template <typename X> using SumOf = typename Arithmetic<X>::Sum;
template <typename X> constexpr int PER_WORD = Arithmetic<X>::PER_WORD;

// One or two panels side by side, from some k on.
struct Panels {
    const uint32_t* words;
    int count;
    int64_t stride;           // words from a panel to the next
    int64_t words_of_column;  // that are to be multiplied
    const char* next;         // what is read after them, and is fetched meanwhile
    int64_t next_step;        // bytes of that for each word that is multiplied

    int64_t panel_bytes() const { return stride * sizeof(uint32_t); }

    // One of the two.
    Panels only(int n) const {
        Panels one = *this;
        one.words += n * stride;
        one.next += n * panel_bytes();
        one.count = 1;
        return one;
    }

    // For one of some tiles of rows, which share the fetching: all at once in the first tile would
    // be more than the memory gives in its time.
    Panels shared(int64_t tile, int64_t tiles) const {
        Panels part = *this;
        part.next += words_of_column * tile / tiles * next_step;
        part.next_step = std::max<int64_t>(next_step / tiles, 1);
        return part;
    }
};

// Sums of rows and the columns of the panels. They start at 0, or go on from what they are.
template <typename Sum> struct Sums {
    Sum* values;
    int64_t stride;  // from a row to the next
    bool start_at_0;

    Sums from(int64_t row, int column) const {
        return {values + row * stride + column, stride, start_at_0};
    }
};

// sums[row][vector], while they are in registers.
template <typename Sum, int ROWS, int VECTORS> struct Tile {
    typedef Sum Vector __attribute__((vector_size(4 * LANES)));
    typedef Vector VectorInMemory __attribute__((aligned(4), may_alias));
    Vector sums[ROWS][VECTORS];

    explicit Tile(const Sums<Sum>& from) {
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < VECTORS; c++)
                sums[r][c] = from.start_at_0 ? Vector{} : *at(from, r, c);
    }
    void store_to(const Sums<Sum>& to) const {
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < VECTORS; c++) *at(to, r, c) = sums[r][c];
    }
    static VectorInMemory* at(const Sums<Sum>& place, int r, int c) {
        return (VectorInMemory*)(place.values + r * place.stride + c * LANES);
    }
};

// One word of each column of one or two panels.
template <int VECTORS> struct WordsOfColumns {
    const uint32_t* words;
    int64_t stride;

    Words at(int vector) const {
        const uint32_t* panel = words + vector / PANEL_VECTORS * stride;
        return *(const WordsInMemory*)(panel + vector % PANEL_VECTORS * LANES);
    }
};

// What meets a word of the weight, in each of some rows. There is a pointer for every third row: an
// address can have a stride in it, or two, but three take a register.
template <typename X, int ROWS> class RowsOfX {
    const X* thirds[(ROWS + 2) / 3];
    const int64_t stride;

  public:
    RowsOfX(const X* x, int64_t stride) : stride(stride) {
        for (const X*& third : thirds) {
            third = x;
            x += 3 * stride;
        }
    }
    const X& at(int row, int n) const { return thirds[row / 3][row % 3 * stride + n]; }
    void advance() {
        for (const X*& third : thirds) third += PER_WORD<X>;
    }
};

// The first and the second number of each of some words, as floats. On AVX2 the second ones get
// their lower halves, which are 0, from the first ones: a mask would take the register of a sum.
inline Floats first_numbers(Words words) { return (Floats)(words << 16); }
inline Floats second_numbers(Words words, [[maybe_unused]] Floats first) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Floats)_mm256_blend_epi16((__m256i)first, (__m256i)words, 0b10101010);
#else
    return (Floats)(words & 0xffff0000);
#endif
}

// Add the products of a word of each column. In floats: all vectors of one k first and then row by
// row, so that the compiler keeps all sums in registers.
template <int ROWS, int VECTORS>
inline void add_word(Tile<float, ROWS, VECTORS>& tile, const RowsOfX<float, ROWS>& x,
                     WordsOfColumns<VECTORS> words) {
    Floats w[VECTORS];
    for (int c = 0; c < VECTORS; c++) w[c] = first_numbers(words.at(c));
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) tile.sums[r][c] += x.at(r, 0) * w[c];
    for (int c = 0; c < VECTORS; c++) w[c] = second_numbers(words.at(c), w[c]);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECTORS; c++) tile.sums[r][c] += x.at(r, 1) * w[c];
}

#ifdef __AVX512BF16__
template <int ROWS, int VECTORS>
inline void add_word(Tile<float, ROWS, VECTORS>& tile, const RowsOfX<bfloat16, ROWS>& x,
                     WordsOfColumns<VECTORS> words) {
    Words w[VECTORS];
    for (int c = 0; c < VECTORS; c++) w[c] = words.at(c);
    for (int r = 0; r < ROWS; r++) {
        uint32_t pair;
        __builtin_memcpy(&pair, &x.at(r, 0), sizeof pair);
        const Words of_row = Words{} + pair;
        for (int c = 0; c < VECTORS; c++)
            tile.sums[r][c] = (Floats)_mm512_dpbf16_ps((__m512)tile.sums[r][c], (__m512bh)of_row,
                                                       (__m512bh)w[c]);
    }
}
#endif

// Not inlined: by itself, the loop gets all registers. From AVX2 on without a pass of GCC that
// computes products of 8 bits long before they are added, in the registers that sums should have.
#if defined(__AVX2__) && !defined(__clang__)
#define BY_ITSELF __attribute__((noinline, optimize("no-tree-ter")))
#else
#define BY_ITSELF __attribute__((noinline))
#endif
template <int ROWS, int COUNT, typename X>
BY_ITSELF void multiply_tile(const X* x, int64_t x_stride, const Panels& panels,
                             const Sums<SumOf<X>>& sums) {
    constexpr int VECTORS = COUNT * PANEL_VECTORS;
    Tile<SumOf<X>, ROWS, VECTORS> tile(sums);
    const int64_t stride = panels.stride, count = panels.words_of_column;
    const uint32_t* words = panels.words;
    const char* next = panels.next;
    RowsOfX<X, ROWS> of_x(x, x_stride);
    for (int64_t i = 0; i < count; i++, next += panels.next_step) {
        for (int n = 0; n < COUNT; n++) __builtin_prefetch(next + n * panels.panel_bytes());
        add_word(tile, of_x, WordsOfColumns<VECTORS>{words + i * PANEL, stride});
        of_x.advance();
    }
    tile.store_to(sums);
}

// Of a tile: with as many sums as there are registers beside two for the weight and one for x.
constexpr int MAX_ROWS = LANES == 16 ? 8 : LANES == 8 ? 6 : 5;

// Rows for which two panels at once fit the registers; with fewer, each sum waits for the last one.
constexpr int MAX_WIDE_ROWS = LANES == 16 ? MAX_ROWS : LANES == 8 ? 2 : 1;

template <int ROWS, typename X>
void multiply_panels(const X* x, int64_t x_stride, const Panels& panels,
                     const Sums<SumOf<X>>& sums) {
    if constexpr (ROWS <= MAX_WIDE_ROWS) {
        if (panels.count == 2) return multiply_tile<ROWS, 2>(x, x_stride, panels, sums);
    }
    for (int n = 0; n < panels.count; n++)
        multiply_tile<ROWS, 1>(x, x_stride, panels.only(n), sums.from(0, n * PANEL));
}

// multiply_panels<rows>, for a number of rows that is known only now.
template <typename X, int ROWS = MAX_ROWS>
void multiply_few(int64_t rows, const X* x, int64_t x_stride, const Panels& panels,
                  const Sums<SumOf<X>>& sums) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply_panels<ROWS>(x, x_stride, panels, sums);
        multiply_few<X, ROWS - 1>(rows, x, x_stride, panels, sums);
    }
}

// Add the products of all rows, in tiles of nearly the same number of rows.
template <typename X>
void multiply_rows(int64_t rows, const X* x, int64_t x_stride, const Panels& panels,
                   const Sums<SumOf<X>>& sums) {
    int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t first = rows * t / tiles;
        int64_t stop = rows * (t + 1) / tiles;
        multiply_few(stop - first, x + first * x_stride, x_stride, panels.shared(t, tiles),
                     sums.from(first, 0));
    }
}
