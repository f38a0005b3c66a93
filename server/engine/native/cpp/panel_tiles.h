// The inner loops of products: some rows of x times a panel of the weight.
//
// A panel is PANEL columns of the weight, as [width / n][PANEL][n] numbers: of each column n
// consecutive k lie side by side, in one 32-bit word. In bfloat16 n is 2: a vector of words becomes
// two of floats by a shift and a mask, and is what the instructions on pairs of bfloat16 take as it
// is. In 8 bits n is 4 (int8_words.h). A thread reads panel after panel, and so memory from front
// to back. A panel has two vectors of AVX-512, because a row's next sum waits for its last one.
//
// Every variant adds up the products of a row and a column in the order of k, whatever the number
// of rows: so a row's bits depend on nothing but itself and the weight.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#if defined(__AVX2__) || defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "factors.h"
#include "vectors.h"

constexpr int PANEL = 32;  // columns
constexpr int PANEL_VECTORS = PANEL / LANES;
constexpr int VECTOR_BYTES = 4 * LANES;
constexpr int64_t CACHE_LINE = 64;  // bytes
constexpr int SECOND_CACHE = 2;     // where __builtin_prefetch leaves what is not needed at once

// What a number of x takes part in. PER_WORD of them meet a word of the weight. A tile of no more
// than READING_ROWS, if there is no other, reads longer than it computes.
template <typename X> struct Arithmetic {
    using Sum = float;
    static constexpr int PER_WORD = 2;
    static constexpr int READING_ROWS = std::is_same_v<X, float> ? 2 : 8;
};
template <typename X> using SumOf = typename Arithmetic<X>::Sum;
template <typename X> constexpr int PER_WORD = Arithmetic<X>::PER_WORD;

// A panel, from some k on.
struct Panel {
    const uint32_t* words;
    int64_t words_of_column;  // that are to be multiplied
    const char* next;         // what is read after them, and is fetched meanwhile
    int64_t next_step;        // bytes of that for each word of a column

    static constexpr int64_t WORD_BYTES = PANEL * sizeof(uint32_t);  // a word of each column

    // From a column on.
    Panel from(int column) const {
        Panel rest = *this;
        rest.words += column;
        return rest;
    }

    // For one of some tiles, which share the fetching: all at once in the first tile would be more
    // than the memory gives in its time.
    Panel shared(int64_t tile, int64_t tiles) const {
        Panel part = *this;
        part.next += words_of_column * tile / tiles * WORD_BYTES;
        part.next_step = WORD_BYTES / tiles;
        return part;
    }

    // For a tile that reads longer than it computes. It fetches no more than where the next panel
    // begins: the processor sees by itself what comes next, and is slower if told.
    Panel by_itself() const {
        Panel part = *this;
        part.next_step = 0;
        return part;
    }
};

// Sums of rows and the columns of a panel. They start at 0, or go on from what they are.
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

// A word of each of some columns.
template <int VECTORS> struct WordsOfColumns {
    const uint32_t* words;

    Words at(int vector) const { return *(const WordsInMemory*)(words + vector * LANES); }
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
        const Pair pair = lane_at(&x.at(r, 0));
        for (int c = 0; c < VECTORS; c++) add_product(tile.sums[r][c], pair, w[c]);
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
template <int ROWS, int VECTORS, typename X>
BY_ITSELF void multiply_tile(const X* x, int64_t x_stride, const Panel& panel,
                             const Sums<SumOf<X>>& sums) {
    Tile<SumOf<X>, ROWS, VECTORS> tile(sums);
    const int64_t count = panel.words_of_column;
    const uint32_t* words = panel.words;
    const char* next = panel.next;
    RowsOfX<X, ROWS> of_x(x, x_stride);
    for (int64_t i = 0; i < count; i++, next += panel.next_step) {
        for (int64_t line = 0; line < VECTORS * VECTOR_BYTES; line += CACHE_LINE)
            __builtin_prefetch(next + line, 0, SECOND_CACHE);
        add_word(tile, of_x, WordsOfColumns<VECTORS>{words + i * PANEL});
        of_x.advance();
    }
    tile.store_to(sums);
}

// The vectors of a tile of many rows: a panel's, or half of them where those do not fit.
constexpr int NARROW = LANES == 16 ? PANEL_VECTORS : PANEL_VECTORS / 2;

// Rows of a tile: with as many sums as there are registers beside two for the weight and one for x.
template <int VECTORS> constexpr int MAX_ROWS = LANES == 8 ? 2 : 1;
template <> constexpr int MAX_ROWS<NARROW> = LANES == 16 ? 8 : LANES == 8 ? 6 : 5;

// multiply_tile<rows>, for a number of rows that is known only now.
template <int VECTORS, typename X, int ROWS = MAX_ROWS<VECTORS>>
void multiply_few(int64_t rows, const X* x, int64_t x_stride, const Panel& panel,
                  const Sums<SumOf<X>>& sums) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply_tile<ROWS, VECTORS>(x, x_stride, panel, sums);
        multiply_few<VECTORS, X, ROWS - 1>(rows, x, x_stride, panel, sums);
    }
}

// Add the products of all rows and part of a panel's columns, in tiles of nearly the same number of
// rows.
template <int VECTORS, typename X>
void multiply_columns(int64_t rows, const X* x, int64_t x_stride, const Panel& panel, int part,
                      const Sums<SumOf<X>>& sums) {
    constexpr int PARTS = PANEL_VECTORS / VECTORS;
    const int column = part * VECTORS * LANES;
    const int64_t tiles = (rows + MAX_ROWS<VECTORS> - 1) / MAX_ROWS<VECTORS>;
    const bool only_reads = PARTS * tiles == 1 && rows <= Arithmetic<X>::READING_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t first = rows * t / tiles;
        const int64_t stop = rows * (t + 1) / tiles;
        const Panel own = only_reads ? panel.by_itself()
                                     : panel.shared(part * tiles + t, PARTS * tiles);
        multiply_few<VECTORS>(stop - first, x + first * x_stride, x_stride, own.from(column),
                              sums.from(first, column));
    }
}

// Add the products of all rows. Few rows take all columns at once, since each sum waits for the
// last one.
template <typename X>
void multiply_rows(int64_t rows, const X* x, int64_t x_stride, const Panel& panel,
                   const Sums<SumOf<X>>& sums) {
    if (rows <= MAX_ROWS<PANEL_VECTORS>)
        return multiply_columns<PANEL_VECTORS>(rows, x, x_stride, panel, 0, sums);
    for (int part = 0; part < PANEL_VECTORS / NARROW; part++)
        multiply_columns<NARROW>(rows, x, x_stride, panel, part, sums);
}
