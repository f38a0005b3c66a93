// Attention over the blocks of a KV cache, which are read in place.
//
// The positions of a sequence are divided into parts. Each gives a softmax and a weighted sum of
// its own, which are added up in order (online softmax). The parts are the same however many
// threads there are, and whatever other rows: so threads share a long sequence, and a row's bits
// depend on nothing but its own positions. Neighbouring tokens of a sequence, a tile, read a part
// together, head by head: its keys are turned over once, so that a score is one lane's sum.
//
// Shapes: H query heads over h key-value heads of size e, g = H / h; blocks of z positions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "bfloat16.h"
#include "each_row.h"
#include "exponential.h"
#include "few_rows.h"
#include "outcome.h"
#include "vectors.h"

constexpr int64_t PART = 64;       // positions
constexpr int64_t TILE_ROWS = 32;  // at most
constexpr int SCORE_VECTORS = 2;   // of positions, whose scores are computed at once
static_assert(PART % (SCORE_VECTORS * LANES) == 0);

// Positions [first, stop), from 0 on or from the first one of a part on.
struct Range {
    int64_t first, stop;

    bool is_empty() const { return stop <= first; }
    Range within(Range other) const {
        return {std::max(first, other.first), std::min(stop, other.stop)};
    }
    Range from(int64_t start) const { return {first - start, stop - start}; }
};

// Turn the scores at some places of a part into weights, and return the largest score. All places
// before them, and those behind them up to a whole vector, become 0.
inline float to_weights(float* scores, Range places, float& total) {
    const int64_t stop = (places.stop + LANES - 1) / LANES * LANES;
    std::fill(scores, scores + places.first, -INFINITY);
    std::fill(scores + places.stop, scores + stop, -INFINITY);
    Floats largests = Floats{} - INFINITY;
    for (int64_t p = 0; p < stop; p += LANES) {
        const Floats some = load_vector(scores + p);
        largests = some > largests ? some : largests;
    }
    float largest = largests[0];
    for (int i = 1; i < LANES; i++) largest = std::max(largest, largests[i]);
#pragma omp simd
    for (int64_t p = 0; p < stop; p++) scores[p] = exponential(scores[p] - largest);
    Floats sums{};
    for (int64_t p = 0; p < stop; p += LANES) sums += load_vector(scores + p);
    total = lane_sum(sums);
    return largest;
}

// The scores of some queries, [QUERIES, e], at the next SCORE_VECTORS vectors of places. The keys of
// a part are turned over: [e, PART]. Not inlined: by itself, the loop gets all registers.
template <int QUERIES>
__attribute__((noinline)) void score_vectors(const float* queries, int64_t e, const float* keys,
                                             float* scores) {
    Floats sums[QUERIES][SCORE_VECTORS];
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < SCORE_VECTORS; v++) sums[q][v] = Floats{};
    for (int64_t j = 0; j < e; j++, queries++, keys += PART) {
        Floats of_keys[SCORE_VECTORS];
        for (int v = 0; v < SCORE_VECTORS; v++) of_keys[v] = load_vector(keys + v * LANES);
        for (int q = 0; q < QUERIES; q++)
            for (int v = 0; v < SCORE_VECTORS; v++) sums[q][v] += queries[q * e] * of_keys[v];
    }
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < SCORE_VECTORS; v++)
            store_vector(sums[q][v], scores + q * PART + v * LANES);
}

// score_vectors<queries>, for a number of queries that is known only now, at most MAX_FEW_ROWS.
template <int QUERIES = MAX_FEW_ROWS>
void score_few(int64_t count, const float* queries, int64_t e, const float* keys, float* scores) {
    if constexpr (QUERIES > 0) {
        if (count == QUERIES) return score_vectors<QUERIES>(queries, e, keys, scores);
        score_few<QUERIES - 1>(count, queries, e, keys, scores);
    }
}

// Ask the processor for what is read soon: a head has too little of each position for the processor
// to see a pattern.
inline void prefetch(const void* start, size_t num_bytes) {
    constexpr size_t cache_line = 64;
    const char* bytes = reinterpret_cast<const char*>(start);
    for (size_t at = 0; at < num_bytes; at += cache_line) __builtin_prefetch(bytes + at);
}

// Neighbouring tokens of one sequence: rows [first, first + count).
struct RowTile {
    int64_t sequence, first, count;
};

// The rows of a batch: of each sequence as many.
template <typename T> struct Attention {
    const T* query;  // [rows, H, e]
    int64_t query_stride;
    const T* cache;
    const int64_t* blocks;  // [sequences, blocks_of_sequence]
    int64_t blocks_of_sequence;
    const int64_t* positions;  // [rows]
    int64_t window;            // 0: none
    float scaling;
    int64_t sequences, rows_of_sequence, H, h, e, z;

    int64_t position_size() const { return 2 * h * e; }
    int64_t queries_of_head() const { return H / h; }

    std::vector<RowTile> tiles() const {
        std::vector<RowTile> found;
        for (int64_t n = 0; n < sequences; n++)
            for (int64_t r = 0; r < rows_of_sequence; r += TILE_ROWS)
                found.push_back({n, n * rows_of_sequence + r,
                                 std::min(TILE_ROWS, rows_of_sequence - r)});
        return found;
    }

    // The positions that a row sees.
    Range seen(int64_t row) const {
        const int64_t stop = positions[row] + 1;
        return {window > 0 ? std::max<int64_t>(0, stop - window) : 0, stop};
    }

    // Those that any row of a tile sees.
    Range seen(const RowTile& tile) const {
        return {seen(tile.first).first, seen(tile.first + tile.count - 1).stop};
    }

    // Call visit(first, count, keys) for those of the positions that a block has; `keys` are the
    // first one's.
    template <typename Visit> void each_block(int64_t sequence, Range range, Visit visit) const {
        const int64_t* table = blocks + sequence * blocks_of_sequence;
        for (int64_t p = range.first; p < range.stop;) {
            const int64_t next = std::min(range.stop, (p / z + 1) * z);
            visit(p, next - p, cache + (table[p / z] * z + p % z) * position_size());
            p = next;
        }
    }
};

// One thread's work on the queries of a key-value head in a tile. Query i of row r of the tile has
// the number r · g + i.
template <typename T> class HeadAttention {
    const Attention<T>& all;
    const RowTile tile;
    const int64_t k, g, M;                   // M queries
    const std::unique_ptr<float[]> queries;  // [M, e], scaled
    const std::unique_ptr<float[]> keys;     // of a part, [e, PART]
    float weights[MAX_FEW_ROWS * PART];      // of some queries; before that, scores
    const T* places[PART];                   // in the cache, of those positions of a part that are
                                             // seen

  public:
    HeadAttention(const Attention<T>& all, const RowTile& tile, int64_t k)
        : all(all), tile(tile), k(k), g(all.queries_of_head()), M(tile.count * g),
          queries(new float[M * all.e]), keys(new float[all.e * PART]) {
        for (int64_t m = 0; m < M; m++) {
            const T* from = all.query + row(m) * all.query_stride + head(m) * all.e;
            float* to = &queries[m * all.e];
            for (int64_t j = 0; j < all.e; j++) to[j] = load(from[j]) * all.scaling;
        }
    }

    Outcome outcome(float* memory) const { return Outcome(memory, M, all.e); }

    // Whether any of the queries sees a position of a part.
    bool sees(int64_t part) const {
        return !all.seen(tile).within({part * PART, (part + 1) * PART}).is_empty();
    }

    // Attend to one part of the positions, of which a query sees some.
    void attend(int64_t part, const Outcome& outcome) {
        outcome.clear();
        const Range positions{part * PART, (part + 1) * PART};
        const Range seen = all.seen(tile).within(positions);
        all.each_block(tile.sequence, seen, [&](int64_t first, int64_t count, const T* block) {
            for (int64_t p = 0; p < count; p++)
                places[first % PART + p] = block + p * all.position_size();
        });
        turn_keys(seen.from(positions.first));
        for (int64_t m = 0; m < M; m += MAX_FEW_ROWS) {
            const int64_t count = std::min<int64_t>(MAX_FEW_ROWS, M - m);
            weigh(m, count, positions, outcome);
            add_values(m, count, positions, outcome);
        }
    }

    // Write the queries' results to rows [rows, H, e], from the outcome of all positions.
    void write(const Outcome& outcome, T* out) const {
        for (int64_t m = 0; m < M; m++) {
            T* to = out + (row(m) * all.H + head(m)) * all.e;
            for (int64_t j = 0; j < all.e; j++)
                to[j] = store<T>(outcome.sum(m)[j] / outcome.total(m));
        }
    }

  private:
    int64_t row(int64_t m) const { return tile.first + m / g; }
    int64_t head(int64_t m) const { return k * g + m % g; }

    const T* key(int64_t place) const { return places[place] + k * all.e; }

    // Copy the keys at some places, turned over. The first head fetches the keys and values of all
    // meanwhile, in the order in which they lie in memory: the next heads are the same thread's.
    void turn_keys(Range seen) {
        constexpr int64_t AHEAD = 4;  // places
        const int64_t whole = all.e / 4 * 4;
        for (int64_t p = seen.first; p < seen.stop; p += 4) {
            const T* four[4];  // where there are fewer, the last one takes the free places
            for (int64_t i = 0; i < 4; i++) {
                four[i] = key(std::min(p + i, seen.stop - 1));
                if (k == 0)
                    prefetch(places[std::min(p + i + AHEAD, seen.stop - 1)],
                             all.position_size() * sizeof(T));
            }
            const int64_t count = std::min<int64_t>(4, PART - p);
            if (count == 4) turn_four(four, p, whole);
            for (int64_t j = count == 4 ? whole : 0; j < all.e; j++)
                for (int64_t i = 0; i < count; i++) keys[j * PART + p + i] = load(four[i][j]);
        }
    }

    // Copy the first numbers of four keys, a multiple of four, to places [p, p + 4).
    void turn_four(const T* const (&from)[4], int64_t p, int64_t count) {
        for (int64_t j = 0; j < count; j += 4) {
            Four a = load_four(from[0] + j), b = load_four(from[1] + j);
            Four c = load_four(from[2] + j), d = load_four(from[3] + j);
            transpose(a, b, c, d);
            float* to = &keys[j * PART + p];
            store_four(a, to);
            store_four(b, to + PART);
            store_four(c, to + 2 * PART);
            store_four(d, to + 3 * PART);
        }
    }

    // Those of the positions that any of some queries sees.
    Range seen(int64_t first, int64_t count, Range positions) const {
        const Range whole{all.seen(row(first)).first, all.seen(row(first + count - 1)).stop};
        return whole.within(positions);
    }

    // The weights of some queries at the places that they see, from their scores.
    void weigh(int64_t first, int64_t count, Range positions, const Outcome& outcome) {
        const Range places = seen(first, count, positions).from(positions.first);
        constexpr int64_t STEP = SCORE_VECTORS * LANES;
        for (int64_t p = places.first / STEP * STEP; p < places.stop; p += STEP)
            score_few(count, &queries[first * all.e], all.e, &keys[p], weights + p);
        for (int64_t i = 0; i < count; i++) {
            const Range own = seen(first + i, 1, positions);
            if (own.is_empty()) continue;
            outcome.largest(first + i) = to_weights(
                weights + i * PART, own.from(positions.first), outcome.total(first + i));
        }
    }

    // Add the values: of positions that all of some queries see together, of others one by one.
    void add_values(int64_t first, int64_t count, Range positions, const Outcome& outcome) const {
        Range common = seen(first, 1, positions).within(seen(first + count - 1, 1, positions));
        if (common.is_empty()) common = {positions.stop, positions.stop};
        float* sums[MAX_FEW_ROWS];
        for (int64_t i = 0; i < count; i++) sums[i] = outcome.sum(first + i);
        for (int64_t i = 0; i < count; i++) {
            const Range own = seen(first + i, 1, positions);
            add_values_at({own.first, std::min(own.stop, common.first)}, 1, i, sums);
        }
        add_values_at(common, count, 0, sums);
        for (int64_t i = 0; i < count; i++) {
            const Range own = seen(first + i, 1, positions);
            add_values_at({std::max(own.first, common.stop), own.stop}, 1, i, sums);
        }
    }

    // Add the values of some positions to `count` sums from number i on.
    void add_values_at(Range positions, int64_t count, int64_t i, float* const* sums) const {
        if (positions.is_empty()) return;
        const int64_t place = positions.first % PART;
        const RowList<T> values{places + place, positions.stop - positions.first,
                                (all.h + k) * all.e, all.e};
        add_to_few_rows(count, {weights + i * PART + place, PART}, values, sums + i);
    }
};

// Attend from rows to the positions of their sequences, as far as their own.
template <typename T>
void attend(const T* query, int64_t query_stride, const T* cache, const int64_t* blocks,
            int64_t blocks_of_sequence, const int64_t* positions, T* out, int64_t window,
            float scaling, int64_t sequences, int64_t rows_of_sequence, int64_t H, int64_t h,
            int64_t e, int64_t z) {
    const Attention<T> all{query,  query_stride, cache,     blocks,           blocks_of_sequence,
                           positions, window,    scaling,   sequences,        rows_of_sequence,
                           H,      h,            e,         z};
    const std::vector<RowTile> tiles = all.tiles();
    const int64_t heads = tiles.size() * h;  // of the tiles, the last one first: it has most to do
    const int64_t parts = (blocks_of_sequence * z + PART - 1) / PART;
    const int64_t queries = std::min(TILE_ROWS, rows_of_sequence) * all.queries_of_head();
    const int64_t size = Outcome::size(queries, e);
    auto head = [&](int64_t n) {
        return HeadAttention<T>(all, tiles[(heads - 1 - n) / h], n % h);
    };
    // Too few heads to keep all threads busy: they share the parts.
    const bool is_shared = num_threads() > 1 && heads < 4 * num_threads();
    const std::unique_ptr<float[]> memory(new float[is_shared ? heads * parts * size : 0]);
    auto attend_part = [&](int64_t task) {
        const int64_t part = task % parts;
        HeadAttention<T> one = head(task / parts);
        if (one.sees(part)) one.attend(part, one.outcome(memory.get() + task * size));
    };
    if (is_shared) each_row(heads * parts, 4 * PART * queries * e, attend_part);
    auto attend_head = [&](int64_t n) {
        HeadAttention<T> one = head(n);
        std::vector<float> sums(size), more(is_shared ? 0 : size);
        const Outcome whole = one.outcome(sums.data());
        for (int64_t part = 0; part < parts; part++) {
            if (!one.sees(part)) continue;
            float* found = is_shared ? memory.get() + (n * parts + part) * size : more.data();
            if (!is_shared) one.attend(part, one.outcome(found));
            whole.add(one.outcome(found));
        }
        one.write(whole, out);
    };
    each_row(heads, 4 * parts * queries * e * (is_shared ? 1 : PART), attend_head, h);
}
