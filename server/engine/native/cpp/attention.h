// Attention over the blocks of a KV cache, which are read in place.
//
// The positions of a sequence are divided into parts. Each gives a softmax and a weighted sum of
// its own, which are added up in order (online softmax). The parts are the same however many
// threads there are, and whatever other rows: so threads share a long sequence, and a row's bits
// depend on nothing but its own positions. Neighbouring tokens of a sequence, a tile, read a part
// together, head by head. Keys lie turned over (cached_kv.h), so that a score is one lane's sum.
//
// Shapes: H query heads over h key-value heads of size e, g = H / h; blocks of z positions.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "cached_kv.h"
#include "each_row.h"
#include "few_rows.h"
#include "outcome.h"
#include "scores.h"
#include "vectors.h"

constexpr int64_t TILE_ROWS = 32;  // at most

// Neighbouring tokens of one sequence: rows [first, first + count).
struct RowTile {
    int64_t sequence, first, count;
};

// The rows of a batch: of each sequence as many.
template <typename T> struct Attention {
    const T* query;  // [rows, H, e]
    int64_t query_stride;
    CachedKv<const T> cached;
    const int64_t* blocks;  // [sequences, blocks_of_sequence]
    int64_t blocks_of_sequence;
    const int64_t* positions;  // [rows]
    int64_t window;            // 0: none
    ScoreScale scale;
    int64_t sequences, rows_of_sequence, H;

    int64_t queries_of_head() const { return H / cached.h; }

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

    // Call visit(first, count, block) for those of the positions that a block has.
    template <typename Visit> void each_block(int64_t sequence, Range range, Visit visit) const {
        const int64_t* table = blocks + sequence * blocks_of_sequence;
        for (int64_t p = range.first; p < range.stop;) {
            const int64_t next = std::min(range.stop, (p / cached.z + 1) * cached.z);
            visit(p, next - p, table[p / cached.z]);
            p = next;
        }
    }
};

// One thread's work on the queries of a key-value head in a tile. Query i of row r of the tile has
// the number r · g + i.
template <typename T> class HeadAttention {
    using F = FactorOf<T>;

    const Attention<T>& all;
    const RowTile tile;
    const int64_t k, g, e, z, M;  // M queries
    const int64_t width;          // e, up to whole lanes
    const bool copies_keys;
    const std::unique_ptr<F[]> queries;       // [M, width]
    const std::unique_ptr<Lane<F>[]> copies;  // of the keys of a part, [lanes, PART], if at all
    const std::unique_ptr<T[]> zeros;         // in place of numbers that are not seen
    const T* values[PART];                    // of each position of a part
    float scores[MAX_FEW_ROWS * PART];        // of some queries; at first, products with keys
    F weights[MAX_FEW_ROWS * PART];

  public:
    HeadAttention(const Attention<T>& all, const RowTile& tile, int64_t k)
        : all(all), tile(tile), k(k), g(all.queries_of_head()), e(all.cached.e), z(all.cached.z),
          M(tile.count * g), width(up_to_lane(e)), copies_keys(must_copy_keys()),
          queries(new F[M * width]),
          copies(new Lane<F>[copies_keys ? width / PER_LANE<F> * PART : 0]),
          zeros(new T[std::max(e, z)]()) {
        for (int64_t m = 0; m < M; m++) {
            const T* from = all.query + row(m) * all.query_stride + head(m) * e;
            F* to = &queries[m * width];
            for (int64_t j = 0; j < e; j++) to[j] = store<F>(load(from[j]));
            for (int64_t j = e; j < width; j++) to[j] = F{};
        }
    }

    Outcome outcome(float* memory) const { return Outcome(memory, M, e); }

    // Whether any of the queries sees a position of a part.
    bool sees(int64_t part) const {
        return !all.seen(tile).within({part * PART, (part + 1) * PART}).is_empty();
    }

    // Attend to one part of the positions, of which a query sees some.
    void attend(int64_t part, const Outcome& outcome) {
        outcome.clear();
        const Range positions{part * PART, (part + 1) * PART};
        find_values(positions);
        if (copies_keys)
            attend(positions, copied_keys(positions), outcome);
        else
            attend(positions, found_keys(positions), outcome);
    }

    // Write the queries' results to rows [rows, H, e], from the outcome of all positions.
    void write(const Outcome& outcome, T* out) const {
        for (int64_t m = 0; m < M; m++) {
            T* to = out + (row(m) * all.H + head(m)) * e;
            for (int64_t j = 0; j < e; j++)
                to[j] = store<T>(outcome.sum(m)[j] / outcome.total(m));
        }
    }

  private:
    int64_t row(int64_t m) const { return tile.first + m / g; }
    int64_t head(int64_t m) const { return k * g + m % g; }

    // Keys are read where they lie, unless that would not be whole vectors or pairs, or they would
    // too often be made float or paired.
    bool must_copy_keys() const {
        const bool converts = !std::is_same_v<T, float>;
        return z % LANES != 0 || width != e || (converts && M > MAX_FEW_ROWS);
    }

    // Call visit(first, count, block) for those of the positions that are seen.
    template <typename Visit> void each_block(Range positions, Visit visit) const {
        all.each_block(tile.sequence, all.seen(tile).within(positions), visit);
    }

    void find_values(Range positions) {
        std::fill_n(values, PART, zeros.get());
        each_block(positions, [&](int64_t first, int64_t count, int64_t block) {
            const T* from = all.cached.values(block, k) + first % z * e;
            for (int64_t p = 0; p < count; p++) values[first % PART + p] = from + p * e;
        });
    }

    KeyVectors<T, T> found_keys(Range positions) const {
        KeyVectors<T, T> keys{.starts = {}, .stride = PER_LANE<F> * z, .values = values};
        std::fill_n(keys.starts, PART / LANES, all.cached.keys(0, k));
        each_block(positions, [&](int64_t first, int64_t count, int64_t block) {
            const T* from = all.cached.keys(block, k) + first % z;
            for (int64_t p = -(first % LANES); p < count; p += LANES)
                keys.starts[(first + p) % PART / LANES] = from + p;
        });
        return keys;
    }

    KeyVectors<Lane<F>, T> copied_keys(Range positions) const {
        each_block(positions, [&](int64_t first, int64_t count, int64_t block) {
            const T* from = all.cached.keys(block, k) + first % z;
            Lane<F>* to = &copies[first % PART];
            for (int64_t j = 0; j < e; j += PER_LANE<F>, from += PER_LANE<F> * z, to += PART)
                copy_lanes(from, j + 1 < e ? from + z : zeros.get(), to, count);
        });
        KeyVectors<Lane<F>, T> keys{.starts = {}, .stride = PART, .values = values};
        for (int64_t v = 0; v < PART / LANES; v++) keys.starts[v] = &copies[v * LANES];
        return keys;
    }

    template <typename K>
    void attend(Range positions, const KeyVectors<K, T>& keys, const Outcome& outcome) {
        for (int64_t m = 0; m < M; m += MAX_FEW_ROWS) {
            const FewQueries few = few_queries(m, positions);
            weigh(few, keys, outcome);
            add_values(few, outcome);
        }
    }

    // Some of the queries, and the places of a part that each sees.
    struct FewQueries {
        int64_t first, count;
        Range places[MAX_FEW_ROWS];

        Range any() const { return {places[0].first, places[count - 1].stop}; }
        Range common() const { return places[0].within(places[count - 1]); }

        // Call visit(place among the few, number, places) for each that sees a place.
        template <typename Visit> void each(Visit visit) const {
            for (int64_t i = 0; i < count; i++)
                if (!places[i].is_empty()) visit(i, first + i, places[i]);
        }
    };

    FewQueries few_queries(int64_t first, Range positions) const {
        FewQueries few{first, std::min<int64_t>(MAX_FEW_ROWS, M - first), {}};
        for (int64_t i = 0; i < few.count; i++)
            few.places[i] = all.seen(row(first + i)).within(positions).from(positions.first);
        return few;
    }

    // The weights of some queries at the places that they see.
    template <typename K>
    void weigh(const FewQueries& few, const KeyVectors<K, T>& keys, const Outcome& outcome) {
        score_few(few.count, &queries[few.first * width], width, keys, few.any(), scores);
        // First all queries' largest scores, then all weights: a processor computes what does not
        // wait for each other at the same time.
        few.each([&](int64_t i, int64_t m, Range places) {
            outcome.largest(m) = to_scores(scores + i * PART, places, all.scale);
        });
        few.each([&](int64_t i, int64_t m, Range places) {
            outcome.total(m) =
                to_weights(scores + i * PART, places, outcome.largest(m), weights + i * PART);
        });
    }

    // Add the values: of places that all of some queries see together, of others token by token. A
    // lane's places are not divided between the two.
    void add_values(const FewQueries& few, const Outcome& outcome) const {
        Range common = few.common();
        if (common.is_empty()) common = {PART, PART};
        common = {up_to_lane(common.first), down_to_lane(common.stop)};
        float* sums[MAX_FEW_ROWS];
        for (int64_t i = 0; i < few.count; i++) sums[i] = outcome.sum(few.first + i);
        auto each_token = [&](auto range) {
            for (int64_t i = 0, next; i < few.count; i = next) {
                next = std::min(i + g - (few.first + i) % g, few.count);
                add_values_at(range(few.places[i]), next - i, i, sums);
            }
        };
        each_token([&](Range own) { return Range{own.first, std::min(own.stop, common.first)}; });
        add_values_at(common, few.count, 0, sums);
        each_token([&](Range own) { return Range{std::max(own.first, common.stop), own.stop}; });
    }

    static int64_t down_to_lane(int64_t n) { return n / PER_LANE<F> * PER_LANE<F>; }
    static int64_t up_to_lane(int64_t n) { return down_to_lane(n + PER_LANE<F> - 1); }

    // Add the values at some places to `count` sums from number i on. The first and last lane may
    // have one place more: zeros are taken for its value.
    void add_values_at(Range places, int64_t count, int64_t i, float* const* sums) const {
        if (places.is_empty()) return;
        const Range lanes{down_to_lane(places.first), up_to_lane(places.stop)};
        const T* rows[PART];
        std::copy(values + lanes.first, values + lanes.stop, rows);
        if (lanes.first < places.first) rows[0] = zeros.get();
        if (lanes.stop > places.stop) rows[lanes.count() - 1] = zeros.get();
        add_to_few_rows(count, Matrix<const F>{weights + i * PART + lanes.first, PART},
                        RowList<T, F>{rows, lanes.count(), 0, e}, sums + i);
    }
};

// Attend from rows to the positions of their sequences, as far as their own.
template <typename T>
void attend(const T* query, int64_t query_stride, const T* cache, const int64_t* blocks,
            int64_t blocks_of_sequence, const int64_t* positions, T* out, int64_t window,
            float scaling, float softcap, int64_t sequences, int64_t rows_of_sequence, int64_t H,
            int64_t h, int64_t e, int64_t z) {
    const Attention<T> all{query,     query_stride, {cache, h, e, z}, blocks,  blocks_of_sequence,
                           positions, window,       {scaling, softcap},   sequences,
                           rows_of_sequence,        H};
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
        const Outcome whole = one.outcome(sums.data()), next = one.outcome(more.data());
        bool is_first = true;  // it needs no adding up: added to nothing, it has the same bits
        for (int64_t part = 0; part < parts; part++) {
            if (!one.sees(part)) continue;
            if (is_shared) {
                whole.add(one.outcome(memory.get() + (n * parts + part) * size));
            } else if (is_first) {
                one.attend(part, whole);
            } else {
                one.attend(part, next);
                whole.add(next);
            }
            is_first = false;
        }
        one.write(whole, out);
    };
    each_row(heads, 4 * parts * queries * e * (is_shared ? 1 : PART), attend_head);
}
