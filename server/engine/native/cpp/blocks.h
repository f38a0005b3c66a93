// The blocks of a decoder, all in one call: what lies between two of them in Python would take a
// third of the time of a step with few rows.
//
// packed_blocks.py lays out what is described here: numbers of 64 bits, in this order. Shapes: rows
// of one token each; d numbers of a row between blocks; f of the MLP; H query heads over h
// key-value heads of size e; L blocks; the cache is that of cached_kv.h for each.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "lora.h"
#include "product.h"
#include "product_int8.h"
#include "row_functions.h"
#include "step_clock.h"

// Linears on the same input, with their outputs side by side.
template <typename T> struct Linear {
    const uint32_t* words;
    int64_t words_of_column, in, out;
    const T* bias;        // null: none
    const float* scales;  // of a weight in 8 bits; null: it is in bfloat16
    const int32_t* sums;  // likewise

    void multiply(const T* x, T* y, int64_t rows) const {
        if (!scales) return product(x, words, bias, y, rows, in, words_of_column, out);
        product_int8(x, words, scales, sums, y, rows, in, words_of_column, out);
        if (!bias) return;
        for (int64_t r = 0; r < rows; r++) add(y + r * out, bias, 1, out);
    }
};

template <typename T> struct Block {
    Linear<T> qkv, attention_out, gate_up, down;
    const T* attention_norm;  // [d]
    const T* mlp_norm;        // [d]
    const T* head_norms;      // [H + h, e], of queries and keys; null: they are not normed
    int64_t window;           // 0: none
};
constexpr int64_t LINEARS_OF_BLOCK = 4;

// Sequences with as many rows each, which lie side by side.
struct AttentionGroup {
    const int64_t* blocks;  // [sequences, blocks_of_sequence]
    int64_t blocks_of_sequence;
    const int64_t* positions;  // [sequences, rows_of_sequence]
    int64_t sequences, rows_of_sequence;

    int64_t rows() const { return sequences * rows_of_sequence; }
};

// The adapter of each row, by the address of its pairs; null for a row without one.
template <typename T> struct RowAdapters {
    const LoraPair<T>* const* loras;  // null: no row has one
    int64_t pairs_of_site, first_site;

    void add_to(T* y, const T* x, int64_t site, int64_t rows, int64_t in, int64_t out) const {
        if (!loras) return;
        add_lora(y, x, loras, first_site + site, pairs_of_site, rows, in, out);
    }
};

// What the blocks of a model share, and the rows of a batch.
template <typename T> struct Pass {
    const Block<T>* blocks;
    int64_t L, H, h, e;
    T* cache;
    int64_t N, z;
    int64_t rows;
    const T* cos;  // [rows, e]
    const T* sin;  // [rows, e]; the first half is negated
    const int64_t* slots;
    const AttentionGroup* groups;
    int64_t num_groups;
    RowAdapters<T> adapters;          // with the sites of a block side by side
    const RowAdapters<T>* backbones;  // with a site a block
    int64_t num_backbones;
    int64_t* taken;  // receives what each StepPart takes; null: nobody wants to know
};

// The rows' memory during a pass. It begins at a cache line: else every other vector would be in
// two. A thread keeps it for its next pass: the system gives new memory page by page, which takes
// 6 ms of a prompt of 512 tokens.
template <typename T> class Scratch {
    struct alignas(CACHE_LINE) Line {
        std::byte bytes[CACHE_LINE];
    };

    static T* kept(int64_t num_bytes) {
        thread_local std::vector<Line> memory;
        const size_t lines = num_bytes / CACHE_LINE + 1;
        if (memory.size() < lines) memory = std::vector<Line>(lines);
        return reinterpret_cast<T*>(memory.data());
    }

  public:
    T *normed, *wide, *narrow, *out;

    Scratch(int64_t rows, const Block<T>& block) {
        const int64_t d = block.qkv.in;
        const int64_t widest = std::max(block.qkv.out, block.gate_up.out);
        const int64_t narrower = std::max(block.attention_out.in, block.down.in);
        const int64_t num_bytes = rows * (2 * d + widest + narrower) * sizeof(T);
        normed = kept(num_bytes);
        out = normed + rows * d;
        wide = out + rows * d;
        narrow = wide + rows * widest;
    }
};

// Run all blocks on h [rows, d], in place.
template <typename T> class BlockRunner {
    const Pass<T>& pass;
    const float eps, scaling;
    T* const h;
    const int64_t d;
    const Scratch<T> scratch;

  public:
    BlockRunner(const Pass<T>& pass, float eps, float scaling, T* h)
        : pass(pass), eps(eps), scaling(scaling), h(h), d(pass.blocks->qkv.in),
          scratch(pass.rows, *pass.blocks) {}

    void run() const {
        for (int64_t index = 0; index < pass.L; index++) {
            attention(index);
            mlp(index);
            const PartTimer timer(pass.taken, StepPart::ADAPTERS);
            for (int64_t b = 0; b < pass.num_backbones; b++)
                pass.backbones[b].add_to(h, h, index, pass.rows, d, d);
        }
    }

  private:
    void multiply(const Linear<T>& linear, int64_t site, const T* x, T* y) const {
        {
            const PartTimer timer(pass.taken, StepPart::LINEARS);
            linear.multiply(x, y, pass.rows);
        }
        const PartTimer timer(pass.taken, StepPart::ADAPTERS);
        pass.adapters.add_to(y, x, site, pass.rows, linear.in, linear.out);
    }

    void attention(int64_t index) const {
        const Block<T>& block = pass.blocks[index];
        const int64_t site = index * LINEARS_OF_BLOCK;
        norm(h, block.attention_norm, eps, scratch.normed, pass.rows, d);
        multiply(block.qkv, site, scratch.normed, scratch.wide);
        T* cache = pass.cache + index * pass.N * pass.z * 2 * pass.h * pass.e;
        rotate(scratch.wide, block.head_norms, eps, pass.cos, pass.sin, cache, pass.slots,
               pass.rows, pass.H, pass.h, pass.e, pass.z);
        attend_in_groups(block, cache);
        multiply(block.attention_out, site + 1, scratch.narrow, scratch.out);
        add(h, scratch.out, pass.rows, d);
    }

    void attend_in_groups(const Block<T>& block, const T* cache) const {
        const PartTimer timer(pass.taken, StepPart::ATTENTION);
        constexpr float no_softcap = 0;
        int64_t row = 0;
        for (int64_t g = 0; g < pass.num_groups; g++) {
            const AttentionGroup& group = pass.groups[g];
            attend(scratch.wide + row * block.qkv.out, block.qkv.out, cache, group.blocks,
                   group.blocks_of_sequence, group.positions,
                   scratch.narrow + row * pass.H * pass.e, block.window, scaling, no_softcap,
                   group.sequences, group.rows_of_sequence, pass.H, pass.h, pass.e, pass.z);
            row += group.rows();
        }
    }

    void mlp(int64_t index) const {
        const Block<T>& block = pass.blocks[index];
        const int64_t site = index * LINEARS_OF_BLOCK + 2;
        norm(h, block.mlp_norm, eps, scratch.normed, pass.rows, d);
        multiply(block.gate_up, site, scratch.normed, scratch.wide);
        gate(scratch.wide, scratch.narrow, pass.rows, block.down.in);
        multiply(block.down, site + 1, scratch.narrow, scratch.out);
        add(h, scratch.out, pass.rows, d);
    }
};

template <typename T> void run_blocks(T* h, const Pass<T>* pass, float eps, float scaling) {
    BlockRunner<T>(*pass, eps, scaling, h).run();
}
