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
    float scaling, softcap;    // 0: scores have no bound
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
    const Attention<T>& all;
    const RowTile tile;
    const int64_t k, g, e, z, M;             // M queries
    const bool copies_keys;
    const std::unique_ptr<float[]> queries;  // [M, e], scaled
    const std::unique_ptr<float[]> copies;   // of the keys of a part, [e, PART], if at all
    const T* values[PART];               // of each position of a part; block 0 for those not seen
    float weights[MAX_FEW_ROWS * PART];  // of some queries; before that, scores

  public:
    HeadAttention(const Attention<T>& all, const RowTile& tile, int64_t k)
        : all(all), tile(tile), k(k), g(all.queries_of_head()), e(all.cached.e), z(all.cached.z),
          M(tile.count * g), copies_keys(must_copy_keys()), queries(new float[M * e]),
          copies(new float[copies_keys ? e * PART : 0]) {
        for (int64_t m = 0; m < M; m++) {
            const T* from = all.query + row(m) * all.query_stride + head(m) * e;
            float* to = &queries[m * e];
            for (int64_t j = 0; j < e; j++) to[j] = load(from[j]) * all.scaling;
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

    // Keys are read where they lie, unless that would not be whole vectors, or too often made float.
    bool must_copy_keys() const {
        const bool converts = !std::is_same_v<T, float>;
        return z % LANES != 0 || (converts && M > MAX_FEW_ROWS);
    }

    // Call visit(first, count, block) for those of the positions that are seen.
    template <typename Visit> void each_block(Range positions, Visit visit) const {
        all.each_block(tile.sequence, all.seen(tile).within(positions), visit);
    }

    void find_values(Range positions) {
        std::fill_n(values, PART, all.cached.values(0, k));
        each_block(positions, [&](int64_t first, int64_t count, int64_t block) {
            const T* from = all.cached.values(block, k) + first % z * e;
            for (int64_t p = 0; p < count; p++) values[first % PART + p] = from + p * e;
        });
    }

    KeyVectors<T, T> found_keys(Range positions) const {
        KeyVectors<T, T> keys{.stride = z, .values = values};
        std::fill_n(keys.starts, PART / LANES, all.cached.keys(0, k));
        each_block(positions, [&](int64_t first, int64_t count, int64_t block) {
            const T* from = all.cached.keys(block, k) + first % z;
            for (int64_t p = -(first % LANES); p < count; p += LANES)
                keys.starts[(first + p) % PART / LANES] = from + p;
        });
        return keys;
    }

    KeyVectors<float, T> copied_keys(Range positions) const {
        each_block(positions, [&](int64_t first, int64_t count, int64_t block) {
            const T* from = all.cached.keys(block, k) + first % z;
            float* to = &copies[first % PART];
            for (int64_t j = 0; j < e; j++, from += z, to += PART)
                for (int64_t p = 0; p < count; p++) to[p] = load(from[p]);
        });
        KeyVectors<float, T> keys{.stride = PART, .values = values};
        for (int64_t v = 0; v < PART / LANES; v++) keys.starts[v] = &copies[v * LANES];
        return keys;
    }

    template <typename K>
    void attend(Range positions, const KeyVectors<K, T>& keys, const Outcome& outcome) {
        for (int64_t m = 0; m < M; m += MAX_FEW_ROWS) {
            const int64_t count = std::min<int64_t>(MAX_FEW_ROWS, M - m);
            weigh(m, count, positions, keys, outcome);
            add_values(m, count, positions, outcome);
        }
    }

    // Those of the positions that any of some queries sees.
    Range seen(int64_t first, int64_t count, Range positions) const {
        const Range whole{all.seen(row(first)).first, all.seen(row(first + count - 1)).stop};
        return whole.within(positions);
    }

    // The weights of some queries at the places that they see, from their scores.
    template <typename K>
    void weigh(int64_t first, int64_t count, Range positions, const KeyVectors<K, T>& keys,
               const Outcome& outcome) {
        const Range any = seen(first, count, positions).from(positions.first);
        score_few(count, &queries[first * e], e, keys, any, weights);
        for (int64_t i = 0; i < count; i++) {
            const Range own = seen(first + i, 1, positions);
            if (own.is_empty()) continue;
            float* scores = weights + i * PART;
            const Range places = own.from(positions.first);
            if (all.softcap > 0) bound(scores, places, all.softcap);
            outcome.largest(first + i) = to_weights(scores, places, outcome.total(first + i));
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
        const RowList<T> rows{values + place, positions.stop - positions.first, 0, e};
        add_to_few_rows(count, {weights + i * PART + place, PART}, rows, sums + i);
    }
};

// Attend from rows to the positions of their sequences, as far as their own.
template <typename T>
void attend(const T* query, int64_t query_stride, const T* cache, const int64_t* blocks,
            int64_t blocks_of_sequence, const int64_t* positions, T* out, int64_t window,
            float scaling, float softcap, int64_t sequences, int64_t rows_of_sequence, int64_t H,
            int64_t h, int64_t e, int64_t z) {
    const Attention<T> all{query,     query_stride, {cache, h, e, z}, blocks,  blocks_of_sequence,
                           positions, window,       scaling,          softcap, sequences,
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
