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

// Turn the scores at some places of a part into weights, and return the largest score. All places
// before them, and those behind them up to a whole vector, become 0.
inline float to_weights(float* scores, Range places, float& total) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t p = places.first; p < places.stop; p++) largest = std::max(largest, scores[p]);
    const int64_t stop = (places.stop + LANES - 1) / LANES * LANES;
    std::fill(scores, scores + places.first, -INFINITY);
    std::fill(scores + places.stop, scores + stop, -INFINITY);
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

// One thread's work on the queries of a key-value head in a tile. Query i of row r of the tile has the
// number r · g + i.
template <typename T> class HeadAttention {
    const Attention<T>& all;
    const RowTile tile;
    const int64_t k, g;
    std::vector<float> queries;  // [M, e], scaled
    std::vector<float> keys;     // of a part, [e, PART]
    std::vector<float> scores;   // [M, PART]
    const T* places[PART] = {};  // in the cache, of the positions of a part that are seen

  public:
    const int64_t M;  // queries

    HeadAttention(const Attention<T>& all, const RowTile& tile, int64_t k)
        : all(all), tile(tile), k(k), g(all.queries_of_head()), queries(tile.count * g * all.e),
          keys(all.e * PART), scores(tile.count * g * PART), M(tile.count * g) {
        for (int64_t m = 0; m < M; m++) {
            const T* from = all.query + row(m) * all.query_stride + head(m) * all.e;
            float* to = &queries[m * all.e];
            for (int64_t j = 0; j < all.e; j++) to[j] = load(from[j]) * all.scaling;
        }
    }

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
    const T* value(int64_t place) const { return places[place] + (all.h + k) * all.e; }

    // Copy the keys at some places, turned over, and fetch the values meanwhile.
    void turn_keys(Range seen) {
        constexpr int64_t AHEAD = 8;  // places
        const int64_t whole = all.e / 4 * 4;
        for (int64_t p = seen.first; p < seen.stop; p += 4) {
            const T* four[4];  // where there are fewer, the last one takes the free places
            for (int64_t i = 0; i < 4; i++) {
                const int64_t place = std::min(p + i, seen.stop - 1);
                four[i] = key(place);
                prefetch(key(std::min(place + AHEAD, seen.stop - 1)), all.e * sizeof(T));
                prefetch(value(place), all.e * sizeof(T));
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
            const Four turned[] = {a, b, c, d};
            for (int i = 0; i < 4; i++)
                std::memcpy(&keys[(j + i) * PART + p], &turned[i], sizeof(Four));
        }
    }

    // What a query, or any of some queries, sees of the positions.
    Range seen(int64_t m, Range positions) const { return all.seen(row(m)).within(positions); }
    Range seen(int64_t m, int64_t count, Range positions) const {
        return Range{all.seen(row(m)).first, all.seen(row(m + count - 1)).stop}.within(positions);
    }

    // The weights of some queries at the places that they see, from their scores.
    void weigh(int64_t m, int64_t count, Range positions, const Outcome& outcome) {
        const Range places = seen(m, count, positions).from(positions.first);
        constexpr int64_t STEP = SCORE_VECTORS * LANES;
        for (int64_t p = places.first / STEP * STEP; p < places.stop; p += STEP)
            score_few(count, &queries[m * all.e], all.e, &keys[p], &scores[m * PART + p]);
        for (int64_t i = m; i < m + count; i++) {
            const Range own = seen(i, positions);
            if (!own.is_empty())
                outcome.largest(i) =
                    to_weights(&scores[i * PART], own.from(positions.first), outcome.total(i));
        }
    }

    // Add the values: of positions that all of some queries see together, of others row by row.
    void add_values(int64_t m, int64_t count, Range positions, const Outcome& outcome) {
        const Range first = seen(m, positions), last = seen(m + count - 1, positions);
        Range common = first.within(last);
        if (common.is_empty()) common = {positions.stop, positions.stop};
        for (int64_t i = m; i < m + count; i++) {
            const Range own = seen(i, positions);
            add_values_of(i, 1, {own.first, std::min(own.stop, common.first)}, outcome);
        }
        add_values_of(m, count, common, outcome);
        for (int64_t i = m; i < m + count; i++) {
            const Range own = seen(i, positions);
            add_values_of(i, 1, {std::max(own.first, common.stop), own.stop}, outcome);
        }
    }

    // Add the values of positions that all of these queries see.
    void add_values_of(int64_t m, int64_t count, Range seen, const Outcome& outcome) {
        if (seen.is_empty()) return;
        float* sums[MAX_FEW_ROWS];
        for (int64_t i = 0; i < count; i++) sums[i] = outcome.sum(m + i);
        const int64_t place = seen.first % PART;
        const RowList<T> values{places + place, seen.stop - seen.first, (all.h + k) * all.e, all.e};
        add_to_few_rows(count, {&scores[m * PART + place], PART}, values, sums);
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
    auto tile_of = [&](int64_t n) { return tiles[(heads - 1 - n) / h]; };
    // Too few heads to keep all threads busy: they share the parts.
    const bool is_shared = num_threads() > 1 && heads < 4 * num_threads();
    const std::unique_ptr<float[]> memory(new float[is_shared ? heads * parts * size : 0]);
    auto attend_part = [&](int64_t task) {
        const int64_t n = task / parts, part = task % parts;
        HeadAttention<T> head(all, tile_of(n), n % h);
        if (head.sees(part)) head.attend(part, Outcome(memory.get() + task * size, head.M, e));
    };
    if (is_shared) each_row(heads * parts, 4 * PART * queries * e, attend_part);
    each_row(heads, 4 * parts * queries * e * (is_shared ? 1 : PART), [&](int64_t n) {
        HeadAttention<T> head(all, tile_of(n), n % h);
        std::vector<float> sums(size), more(is_shared ? 0 : size);
        const Outcome whole(sums.data(), head.M, e);
        for (int64_t part = 0; part < parts; part++) {
            if (!head.sees(part)) continue;
            const int64_t task = n * parts + part;
            const Outcome one(is_shared ? memory.get() + task * size : more.data(), head.M, e);
            if (!is_shared) head.attend(part, one);
            whole.add(one);
        }
        head.write(whole, out);
    });
}
