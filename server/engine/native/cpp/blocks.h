// The blocks of a decoder, all in one call: what lies between two of them in Python would take a
// third of the time of a step with few rows.
//
// packed_blocks.py lays out what is described here: numbers of 64 bits, in this order. Shapes: rows
// of one token each; d numbers of a row between blocks; f of the MLP; H query heads over h
// key-value heads of size e; L blocks; cache [L, N, z, 2h, e].

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "attention.h"
#include "fetch.h"
#include "lora.h"
#include "product.h"
#include "product_int8.h"
#include "row_functions.h"
#include "step_clock.h"

// Linears on the same input, with their outputs side by side.
template <typename T> struct Linear {
    const uint32_t* words;
    int64_t words_of_column, in, out;
    const T* bias;         // null: none
    const float* scales;   // of a weight in 8 bits; null: it is in bfloat16
    const int32_t* sums;   // likewise

    void multiply(const T* x, T* y, int64_t rows, Fetch* others) const {
        if (!scales) return product(x, words, bias, y, rows, in, words_of_column, out, others);
        product_int8(x, words, scales, sums, y, rows, in, words_of_column, out, others);
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

    // Have the positions of a block's cache fetched that the rows see.
    template <typename T>
    void fetch(const T* cache, int64_t window, int64_t z, int64_t position_size, Fetch& soon) const {
        for (int64_t n = 0; n < sequences; n++) {
            const int64_t* of_sequence = positions + n * rows_of_sequence;
            const int64_t stop = of_sequence[rows_of_sequence - 1] + 1;
            const int64_t first = window > 0 ? std::max<int64_t>(0, *of_sequence + 1 - window) : 0;
            for (int64_t p = first / z * z; p < stop && !soon.is_full(); p += z) {
                const T* block = cache + blocks[n * blocks_of_sequence + p / z] * z * position_size;
                soon.add(block, std::min(z, stop - p) * position_size * sizeof(T));
            }
        }
    }
};

// The adapter of each row, by the address of its pairs; null for a row without one.
template <typename T> struct RowAdapters {
    const LoraPair<T>* const* loras;  // null: no row has one
    int64_t pairs_of_site, first_site;

    void add_to(T* y, const T* x, int64_t site, int64_t rows, int64_t in, int64_t out) const {
        if (!loras) return;
        add_lora(y, x, loras, first_site + site, pairs_of_site, rows, in, out);
    }

    // The adapters of the rows, each once.
    std::vector<const LoraPair<T>*> distinct(int64_t rows) const {
        if (!loras) return {};
        std::set<const LoraPair<T>*> found(loras, loras + rows);
        found.erase(nullptr);
        return {found.begin(), found.end()};
    }

    // Have the pairs of a site fetched.
    void fetch(const LoraPair<T>* lora, int64_t site, int64_t in, Fetch& soon) const {
        const LoraPair<T>* pairs = lora + (first_site + site) * pairs_of_site;
        for (int64_t p = 0; p < pairs_of_site; p++) {
            soon.add(pairs[p].A, pairs[p].rank * in * sizeof(T));
            soon.add(pairs[p].B, pairs[p].rank * pairs[p].width * sizeof(T));
        }
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
    RowAdapters<T> adapters;         // with the sites of a block side by side
    const RowAdapters<T>* backbones;  // with a site a block
    int64_t num_backbones;
    int64_t* taken;  // receives what each StepPart takes; null: nobody wants to know
};

// The rows' memory during a pass.
template <typename T> class Scratch {
    std::unique_ptr<T[]> memory;

  public:
    T *normed, *wide, *narrow, *out;

    Scratch(int64_t rows, const Block<T>& block) {
        const int64_t d = block.qkv.in;
        const int64_t widest = std::max(block.qkv.out, block.gate_up.out);
        const int64_t narrower = std::max(block.attention_out.in, block.down.in);
        memory.reset(new T[rows * (2 * d + widest + narrower)]);
        normed = memory.get();
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
    const std::vector<const LoraPair<T>*> adapters;
    const bool fetches;  // with fewer rows products need all of the memory's time, with more none

  public:
    BlockRunner(const Pass<T>& pass, float eps, float scaling, T* h)
        : pass(pass), eps(eps), scaling(scaling), h(h), d(pass.blocks->qkv.in),
          scratch(pass.rows, *pass.blocks), adapters(pass.adapters.distinct(pass.rows)),
          fetches(pass.rows > MAX_ROWS && pass.rows <= 64) {}

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
    // A linear and its adapters, which are fetched meanwhile.
    void multiply(const Linear<T>& linear, int64_t site, const T* x, T* y, Fetch soon = {}) const {
        {
            const PartTimer timer(pass.taken, StepPart::LINEARS);
            if (fetches)
                for (const LoraPair<T>* lora : adapters)
                    pass.adapters.fetch(lora, site, linear.in, soon);
            linear.multiply(x, y, pass.rows, soon.is_empty() ? nullptr : &soon);
        }
        const PartTimer timer(pass.taken, StepPart::ADAPTERS);
        pass.adapters.add_to(y, x, site, pass.rows, linear.in, linear.out);
    }

    T* cache_of(int64_t index) const {
        return pass.cache + index * pass.N * pass.z * 2 * pass.h * pass.e;
    }

    // The keys and values of a block that attention reads.
    Fetch keys_and_values(int64_t index) const {
        Fetch soon;
        if (!fetches || index == pass.L) return soon;
        for (int64_t g = 0; g < pass.num_groups; g++)
            pass.groups[g].fetch(cache_of(index), pass.blocks[index].window, pass.z,
                                 2 * pass.h * pass.e, soon);
        return soon;
    }

    void attention(int64_t index) const {
        const Block<T>& block = pass.blocks[index];
        const int64_t site = index * LINEARS_OF_BLOCK;
        norm(h, block.attention_norm, eps, scratch.normed, pass.rows, d);
        multiply(block.qkv, site, scratch.normed, scratch.wide);
        T* cache = cache_of(index);
        rotate(scratch.wide, block.head_norms, eps, pass.cos, pass.sin, cache, pass.slots,
               pass.rows, pass.H, pass.h, pass.e);
        attend_in_groups(block, cache);
        multiply(block.attention_out, site + 1, scratch.narrow, scratch.out);
        add(h, scratch.out, pass.rows, d);
    }

    void attend_in_groups(const Block<T>& block, const T* cache) const {
        const PartTimer timer(pass.taken, StepPart::ATTENTION);
        int64_t row = 0;
        for (int64_t g = 0; g < pass.num_groups; g++) {
            const AttentionGroup& group = pass.groups[g];
            attend(scratch.wide + row * block.qkv.out, block.qkv.out, cache, group.blocks,
                   group.blocks_of_sequence, group.positions,
                   scratch.narrow + row * pass.H * pass.e, block.window, scaling, group.sequences,
                   group.rows_of_sequence, pass.H, pass.h, pass.e, pass.z);
            row += group.rows();
        }
    }

    void mlp(int64_t index) const {
        const Block<T>& block = pass.blocks[index];
        const int64_t site = index * LINEARS_OF_BLOCK + 2;
        norm(h, block.mlp_norm, eps, scratch.normed, pass.rows, d);
        multiply(block.gate_up, site, scratch.normed, scratch.wide, keys_and_values(index + 1));
        gate(scratch.wide, scratch.narrow, pass.rows, block.down.in);
        multiply(block.down, site + 1, scratch.narrow, scratch.out);
        add(h, scratch.out, pass.rows, d);
    }
};

template <typename T> void run_blocks(T* h, const Pass<T>* pass, float eps, float scaling) {
    BlockRunner<T>(*pass, eps, scaling, h).run();
}
