// The products as a program: it reads a problem from stdin and writes the result to stdout. So it can be
// built for another processor and run by an emulator. test_product.py calls it.

#include <cstdint>
#include <cstdio>
#include <vector>

#include "product.h"
#include "product_int8.h"

template <typename N> std::vector<N> numbers(int64_t count) {
    std::vector<N> read(count);
    if (fread(read.data(), sizeof(N), count, stdin) != size_t(count)) exit(1);
    return read;
}

template <typename T> void run() {
    const auto sizes = numbers<int64_t>(5);
    const int64_t rows = sizes[0], in = sizes[1], words = sizes[2], out = sizes[3];
    const auto x = numbers<T>(rows * in);
    const auto w = numbers<uint32_t>(up_to(PANEL, out) * words);
    const auto bias = numbers<T>(sizes[4]);
    std::vector<T> y(rows * out);
    product(x.data(), w.data(), bias.empty() ? nullptr : bias.data(), y.data(), rows, in, words, out);
    fwrite(y.data(), sizeof(T), y.size(), stdout);
}

void run_int8() {
    const auto sizes = numbers<int64_t>(4);
    const int64_t rows = sizes[0], in = sizes[1], words = sizes[2], out = sizes[3];
    const auto x = numbers<float>(rows * in);
    const auto w = numbers<uint32_t>(up_to(PANEL, out) * words);
    const auto scales = numbers<float>(out);
    const auto sums = numbers<int32_t>(out);
    std::vector<float> y(rows * out);
    product_int8(x.data(), w.data(), scales.data(), sums.data(), y.data(), rows, in, words, out);
    fwrite(y.data(), sizeof(float), y.size(), stdout);
}

int main(int, char** arguments) {
    switch (arguments[1][0]) {
        case 'f': return run<float>(), 0;
        case 'b': return run<bfloat16>(), 0;
        default: return run_int8(), 0;
    }
}
