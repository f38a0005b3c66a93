// The inner loop of `product` on AMX, the matrix unit of some processors: 16 rows by 16 columns at
// once, in bfloat16. It takes the panels of panel_tiles.h as they are.

#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "panel_tiles.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

constexpr int64_t AMX_ROWS = 16;   // of a tile of x, and of sums
constexpr int64_t AMX_PAIRS = 16;  // of k, in a tile of x and of the weight

// Ask Linux for the registers, once for the process. False: it refuses.
inline bool may_use_amx() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// While it lives, the calling thread's tiles are 16 rows of 64 bytes.
class AmxTiles {
    struct alignas(64) Layout {  // of 8 tiles; the other 8 must be zero
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };

  public:
    AmxTiles() {
        Layout layout;
        _tile_loadconfig(&layout);
    }
    ~AmxTiles() { _tile_release(); }
};

// Sums are tiles 0 to 3, two rows of tiles by two columns; x is tiles 4 and 5, the weight 6 and 7.
template <bool TWO_ROWS>
void multiply_amx(const bfloat16* x, int64_t x_stride, const Panel& panel,
                  const Sums<float>& sums) {
    constexpr int AMX_COLUMNS = 16;
    static_assert(PANEL == 2 * AMX_COLUMNS);
    const int64_t sum_bytes = sums.stride * sizeof(float);
    const int64_t x_bytes = x_stride * sizeof(bfloat16);
    float* const corner = sums.values;
    float* const below = corner + AMX_ROWS * sums.stride;
    if (sums.start_at_0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, corner, sum_bytes);
        _tile_loadd(1, corner + AMX_COLUMNS, sum_bytes);
        if (TWO_ROWS) _tile_loadd(2, below, sum_bytes);
        if (TWO_ROWS) _tile_loadd(3, below + AMX_COLUMNS, sum_bytes);
    }
    for (int64_t pair = 0; pair < panel.words_of_column; pair += AMX_PAIRS) {
        const uint32_t* w = panel.words + pair * PANEL;
        for (int64_t n = pair; n < pair + AMX_PAIRS; n++) {
            const char* next = panel.next + n * panel.next_step;
            __builtin_prefetch(next);  // into the first cache: not measured against the second
            __builtin_prefetch(next + CACHE_LINE);
        }
        _tile_loadd(4, x + 2 * pair, x_bytes);
        _tile_loadd(6, w, Panel::WORD_BYTES);
        _tile_loadd(7, w + AMX_COLUMNS, Panel::WORD_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO_ROWS) {
            _tile_loadd(5, x + AMX_ROWS * x_stride + 2 * pair, x_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, corner, sum_bytes);
    _tile_stored(1, corner + AMX_COLUMNS, sum_bytes);
    if (TWO_ROWS) _tile_stored(2, below, sum_bytes);
    if (TWO_ROWS) _tile_stored(3, below + AMX_COLUMNS, sum_bytes);
}

// As the template of panel_tiles.h, for a multiple of AMX_ROWS rows and of AMX_PAIRS pairs.
inline void multiply_rows(int64_t rows, const bfloat16* x, int64_t x_stride, const Panel& panel,
                          const Sums<float>& sums) {
    AmxTiles tiles;
    for (int64_t row = 0; row < rows; row += 2 * AMX_ROWS) {
        const bool two_rows = row + AMX_ROWS < rows;
        auto multiply = two_rows ? multiply_amx<true> : multiply_amx<false>;
        multiply(x + row * x_stride, x_stride, panel, sums.from(row, 0));
    }
}
#endif
