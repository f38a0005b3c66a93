// Where the time of a step goes.

#pragma once

#include <chrono>
#include <cstdint>

// In the order of `PARTS` in packed_blocks.py.
enum class StepPart { LINEARS, ATTENTION, ADAPTERS };

// While it lives, time counts for a part of a step: nanoseconds are added to its number, if anybody
// wants to know.
class PartTimer {
    using Clock = std::chrono::steady_clock;
    int64_t* const taken;
    const Clock::time_point start;

  public:
    PartTimer(int64_t* parts, StepPart part)
        : taken(parts ? parts + int64_t(part) : nullptr),
          start(parts ? Clock::now() : Clock::time_point()) {}
    ~PartTimer() {
        if (taken) *taken += std::chrono::nanoseconds(Clock::now() - start).count();
    }
};
