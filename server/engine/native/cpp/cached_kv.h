// Where keys and values lie in a KV cache: as attention reads them, one after the other, so that
// nothing has to be turned over.
//
// A block of positions has, for each key-value head, the keys turned over, [e, z], and then the
// values, [z, e]. kv_cache.py allocates the memory.
//
// Shapes: N blocks of z positions; h key-value heads of size e.

#pragma once

#include <algorithm>
#include <cstdint>

#include "each_row.h"

// The cache of one layer.
template <typename T> struct CachedKv {
    T* memory;  // [N, h, 2 · z · e]
    int64_t h, e, z;

    // Of a head in a block: number j of the key at place p is at j · z + p.
    T* keys(int64_t block, int64_t head) const { return memory + (block * h + head) * 2 * z * e; }

    // Of a head in a block: number j of the value at place p is at p · e + j.
    T* values(int64_t block, int64_t head) const { return keys(block, head) + z * e; }

    // Write the keys and values [2h, e] of a position; slots count the places of all blocks.
    void store(int64_t slot, const T* keys_and_values) const {
        const int64_t block = slot / z, place = slot % z;
        for (int64_t k = 0; k < h; k++) {
            const T* key = keys_and_values + k * e;
            T* to = keys(block, k) + place;
            for (int64_t j = 0; j < e; j++) to[j * z] = key[j];
            std::copy_n(key + h * e, e, values(block, k) + place * e);
        }
    }
};

// Operations that take as long as writing a number of a key: it has a cache line of its own, which
// comes from memory.
constexpr int64_t STORE_OPERATIONS = 32;

// How many neighbouring rows a thread stores at a time. Keys of neighbouring positions share their
// cache lines, which two threads at once would take from each other.
inline int64_t stored_at_once(int64_t rows) {
    return (rows + num_threads() - 1) / num_threads();
}

// Store the keys and values of rows [rows, 2h, e].
template <typename T>
void store_kv(const T* keys_and_values, T* cache, const int64_t* slots, int64_t rows, int64_t h,
              int64_t e, int64_t z) {
    const CachedKv<T> cached{cache, h, e, z};
    each_row(
        rows, STORE_OPERATIONS * h * e,
        [&](int64_t r) { cached.store(slots[r], keys_and_values + r * 2 * h * e); },
        stored_at_once(rows));
}
