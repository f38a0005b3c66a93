// Turns at work that lies side by side in memory. Each thread begins with a part of its own, which
// it takes from front to back, so that what it fetches ahead is what it needs; then it helps with
// what the others have left.

#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

class Turns {
    struct alignas(64) Part {
        std::atomic<int64_t> next;
        int64_t stop;
    };
    std::vector<Part> parts;

  public:
    Turns(int64_t turns, int64_t num_parts) : parts(num_parts) {
        for (int64_t p = 0; p < num_parts; p++) {
            parts[p].next = turns * p / num_parts;
            parts[p].stop = turns * (p + 1) / num_parts;
        }
    }

    template <typename F> void take(int64_t first_part, F visit) {
        const int64_t count = parts.size();
        for (int64_t n = 0; n < count; n++) {
            Part& part = parts[(first_part + n) % count];
            while (part.next < part.stop) {
                const int64_t turn = part.next++;
                if (turn < part.stop) visit(turn);
            }
        }
    }
};
