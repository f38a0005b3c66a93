// What is read soon, and is fetched while products compute: with several tiles of rows they leave
// most of the memory's time unused.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

constexpr int64_t CACHE_LINE = 64;  // bytes

class Fetch {
  public:
    struct Piece {
        const char* start = nullptr;
        int64_t bytes = 0;
    };

  private:
    static constexpr int64_t PIECE_BYTES = 1 << 15;  // what a tile of rows fetches, at most
    static constexpr int64_t MAX_BYTES = 1 << 22;    // of all: more would displace the first of it
    std::vector<Piece> pieces;
    int64_t total = 0;            // bytes
    std::atomic<size_t> next{0};  // piece; the threads take turns

  public:
    Fetch() = default;
    Fetch(Fetch&& other) : pieces(std::move(other.pieces)), total(other.total) {}

    bool is_empty() const { return pieces.empty(); }
    bool is_full() const { return total >= MAX_BYTES; }

    void add(const void* start, int64_t bytes) {
        const char* from = static_cast<const char*>(start);
        for (int64_t at = 0; at < bytes && !is_full(); at += PIECE_BYTES) {
            pieces.push_back({from + at, std::min(PIECE_BYTES, bytes - at)});
            total += pieces.back().bytes;
        }
    }

    // The next piece; an empty one: all are taken.
    Piece take() {
        if (next.load(std::memory_order_relaxed) >= pieces.size()) return {};
        const size_t taken = next.fetch_add(1, std::memory_order_relaxed);
        return taken < pieces.size() ? pieces[taken] : Piece{};
    }
};
