// Attention over the blocks of a KV cache, which are read in place.
//
// The positions of a sequence are divided into parts. Each gives a softmax and a weighted sum of
// its own, which are added up in order (online softmax). The parts are the same however many
// threads there are, and whatever other rows: so threads share a long sequence, and a row's bits
// depend on nothing but its own positions. Neighbouring tokens of a sequence, a tile, read it
// together.
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

constexpr int64_t PART = 64;      // positions
constexpr int64_t TILE_ROWS = 8;  // at most
static_assert(PART % LANES == 0);

// Positions [first, stop), from 0 on or from the first one of a part on.
struct Range {
    int64_t first, stop;

    bool is_empty() const { return stop <= first; }
    Range within(Range other) const {
        return {std::max(first, other.first), std::min(stop, other.stop)};
    }
};

// Of Q queries, what attention to some positions gives: the largest score, the sum of the weights
// exp(score - largest), and the sum of the values with these weights, [Q, e]. All are 0 for a query
// that sees none of the positions.
class Outcome {
    float* memory;
    int64_t Q, e;

  public:
    Outcome(float* memory, int64_t Q, int64_t e) : memory(memory), Q(Q), e(e) {}
    static int64_t size(int64_t Q, int64_t e) { return Q * (e + 2); }

    float& largest(int64_t q) const { return memory[q]; }
    float& total(int64_t q) const { return memory[Q + q]; }
    float* sum(int64_t q) const { return memory + 2 * Q + q * e; }
    void clear() const { std::fill_n(memory, size(Q, e), 0.0f); }

    // Add what comes from other positions.
    void add(const Outcome& other) const {
        for (int64_t q = 0; q < Q; q++) {
            if (other.total(q) == 0.0f) continue;
            const bool is_first = total(q) == 0.0f;
            const float both = is_first ? other.largest(q)
                                        : std::max(largest(q), other.largest(q));
            const float own_scale = is_first ? 0.0f : exponential(largest(q) - both);
            const float scale = exponential(other.largest(q) - both);
            float* to = sum(q);
            const float* from = other.sum(q);
#pragma omp simd
            for (int64_t j = 0; j < e; j++) to[j] = to[j] * own_scale + from[j] * scale;
            total(q) = total(q) * own_scale + other.total(q) * scale;
            largest(q) = both;
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

// Ask the processor for a block ahead of its use: each head reads too little of each position for
// the processor to see a pattern.
inline void prefetch(const void* block, size_t num_bytes) {
    constexpr size_t cache_line = 64;
    const char* bytes = reinterpret_cast<const char*>(block);
    for (size_t at = 0; at < num_bytes; at += cache_line) __builtin_prefetch(bytes + at, 0, 2);
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

    // Fetch the block after that of a position, if it has some that are before `stop`.
    void prefetch_next(int64_t sequence, int64_t position, int64_t stop) const {
        const int64_t next = position / z + 1;
        if (next * z >= stop) return;
        const int64_t block = blocks[sequence * blocks_of_sequence + next];
        prefetch(cache + block * z * position_size(), z * position_size() * sizeof(T));
    }
};

// One thread's work on a tile. Query i of key-value head k in row r of the tile has the number
// (k · count + r) · g + i.
template <typename T> class TileAttention {
    const Attention<T>& all;
    const RowTile tile;
    const int64_t g, M;  // queries of a key-value head: in a row, in the tile
    std::vector<float> scaled, memory;
    std::vector<const float*> queries;  // by number, each [e]
    std::vector<float*> scores;         // of a head's queries, each [PART]
    const T* places[PART];              // in the cache, of the positions of a part that are seen

  public:
    const int64_t Q;  // queries of the tile

    TileAttention(const Attention<T>& all, const RowTile& tile)
        : all(all), tile(tile), g(all.H / all.h), M(tile.count * g),
          scaled(tile.count * all.H * all.e), memory(M * PART), Q(tile.count * all.H) {
        for (int64_t q = 0; q < Q; q++) {
            const T* from = all.query + row(q) * all.query_stride + head(q) * all.e;
            float* to = scaled.data() + q * all.e;
            for (int64_t j = 0; j < all.e; j++) to[j] = load(from[j]) * all.scaling;
            queries.push_back(to);
        }
        for (int64_t m = 0; m < M; m++) scores.push_back(memory.data() + m * PART);
    }

    int64_t row(int64_t q) const { return tile.first + q % M / g; }
    int64_t head(int64_t q) const { return q / M * g + q % g; }

    // Attend to one part of the positions.
    void attend(int64_t part, const Outcome& outcome) {
        outcome.clear();
        const Range positions{part * PART, (part + 1) * PART};
        const Range seen = all.seen(tile).within(positions);
        all.each_block(tile.sequence, seen, [&](int64_t first, int64_t count, const T* keys) {
            for (int64_t p = 0; p < count; p++)
                places[first % PART + p] = keys + p * all.position_size();
        });
        for (int64_t k = 0; k < all.h; k++) {
            score(k, positions);
            for (int64_t m = 0; m < M; m++) {
                const Range own = all.seen(row(m)).within(positions);
                if (own.is_empty()) continue;
                const Range places{own.first - positions.first, own.stop - positions.first};
                const int64_t q = k * M + m;
                outcome.largest(q) = to_weights(scores[m], places, outcome.total(q));
            }
            add_values(k, positions, outcome);
        }
    }

    // Write the rows' results, [rows, H, e], from the outcome of all positions.
    void write(const Outcome& outcome, T* out) const {
        for (int64_t q = 0; q < Q; q++) {
            T* to = out + (row(q) * all.H + head(q)) * all.e;
            for (int64_t j = 0; j < all.e; j++)
                to[j] = store<T>(outcome.sum(q)[j] / outcome.total(q));
        }
    }

  private:
    // Scores of a head's queries at all positions that a row of the tile sees.
    void score(int64_t k, Range positions) {
        const Range seen = all.seen(tile);
        auto of_block = [&](int64_t p, int64_t count, const T*) {
            if (k == 0) all.prefetch_next(tile.sequence, p, seen.stop);
            const RowList<T> keys{places + p % PART, count, k * all.e, all.e};
            multiply_by_rows(M, queries.data() + k * M, keys, scores.data(), p % PART);
        };
        all.each_block(tile.sequence, seen.within(positions), of_block);
    }

    // Add the values: of positions that all rows see together, of others row by row.
    void add_values(int64_t k, Range positions, const Outcome& outcome) {
        Range common = positions;
        for (int64_t r = 0; r < tile.count; r++) common = common.within(all.seen(tile.first + r));
        if (common.is_empty()) common = {positions.stop, positions.stop};
        for (int64_t r = 0; r < tile.count; r++) {
            const Range own = all.seen(tile.first + r).within(positions);
            add_values_of(k, r, 1, {own.first, std::min(own.stop, common.first)}, outcome);
        }
        add_values_of(k, 0, tile.count, common, outcome);
        for (int64_t r = 0; r < tile.count; r++) {
            const Range own = all.seen(tile.first + r).within(positions);
            add_values_of(k, r, 1, {std::max(own.first, common.stop), own.stop}, outcome);
        }
    }

    // Add the values of positions that all of these rows see.
    void add_values_of(int64_t k, int64_t first, int64_t rows, Range seen,
                       const Outcome& outcome) {
        if (seen.is_empty()) return;
        const int64_t m = first * g, count = rows * g;
        std::vector<float*> sums(count);
        for (int64_t i = 0; i < count; i++) sums[i] = outcome.sum(k * M + m + i);
        const int64_t place = seen.first % PART;
        const RowList<T> values{places + place, seen.stop - seen.first, (all.h + k) * all.e, all.e};
        add_weighted_rows(count, scores.data() + m, place, values, sums.data());
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
    const int64_t num_tiles = tiles.size();
    const int64_t parts = (blocks_of_sequence * z + PART - 1) / PART;
    const int64_t queries = std::min(TILE_ROWS, rows_of_sequence) * H;
    const int64_t size = Outcome::size(queries, e);
    // Too few tiles to keep all threads busy: they share the parts.
    const bool is_shared = num_threads() > 1 && num_tiles < 4 * num_threads();
    const std::unique_ptr<float[]> memory(new float[is_shared ? num_tiles * parts * size : 0]);
    auto outcome = [&](int64_t t, int64_t part, int64_t Q) {
        return Outcome(memory.get() + (t * parts + part) * size, Q, e);
    };
    auto sees = [&](int64_t t, int64_t part) {
        return !all.seen(tiles[t]).within({part * PART, (part + 1) * PART}).is_empty();
    };
    auto attend_part = [&](int64_t task) {
        const int64_t t = task / parts, part = task % parts;
        if (!sees(t, part)) return;
        TileAttention<T> tile(all, tiles[t]);
        tile.attend(part, outcome(t, part, tile.Q));
    };
    if (is_shared) each_row(num_tiles * parts, PART * queries * e, attend_part);
    each_row(num_tiles, parts * queries * e * (is_shared ? 1 : PART), [&](int64_t t) {
        TileAttention<T> tile(all, tiles[t]);
        std::vector<float> sums(size), more(size);
        const Outcome whole(sums.data(), tile.Q, e), one(more.data(), tile.Q, e);
        for (int64_t part = 0; part < parts; part++) {
            if (!sees(t, part)) continue;
            if (!is_shared) tile.attend(part, one);
            whole.add(is_shared ? outcome(t, part, tile.Q) : one);
        }
        tile.write(whole, out);
    });
}
