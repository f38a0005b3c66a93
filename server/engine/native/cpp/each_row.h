// Work on rows, by several threads where the compiler has OpenMP.

#pragma once

#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

// How many threads share the work of the calling one.
inline int64_t num_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// How many neighbouring rows a thread takes at a time where each is as much work as the others:
// eight turns a thread. To ask for every row by itself would take as long as to norm it.
inline int64_t rows_of_turn(int64_t rows) {
    return std::max<int64_t>(rows / (8 * num_threads()), 1);
}

// Call visit(row) for each row; a thread takes `at_once` neighbouring rows at a time. One thread does
// little work alone: meeting the other threads costs microseconds, or milliseconds when another
// program is using their cores. An `if` clause would not do: after a team of one thread, libgomp ends
// its other threads and later starts new ones.
constexpr int64_t MIN_PARALLEL_OPERATIONS = 100000;
template <typename F>
void each_row(int64_t rows, int64_t operations_per_row, F visit, int64_t at_once = 1) {
    if (rows == 1 || rows * operations_per_row < MIN_PARALLEL_OPERATIONS) {
        for (int64_t r = 0; r < rows; r++) visit(r);
    } else {
#pragma omp parallel for schedule(dynamic, at_once)
        for (int64_t r = 0; r < rows; r++) visit(r);
    }
}
