// Attention and adapters as a program that checks itself: against sums in double, and every row against
// itself alone, bit by bit. So it can be built for another processor and run by an emulator.
// test_kernel.py calls it.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention.h"
#include "lora.h"

std::mt19937 generator(0);

template <typename T> std::vector<T> draw(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<T> drawn(count);
    for (T& x : drawn) x = store<T>(normal(generator));
    return drawn;
}

void require(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

// Whether a sum is within rounding, where those that were added up have this size together.
template <typename T> bool is_close(T found, double exact, double size) {
    const double rounding = sizeof(T) == 2 ? 1.0 / 128 : 1e-5;
    const double rounding_of_factors = std::is_same_v<FactorOf<T>, float> ? 0 : 1.0 / 256;
    return std::abs(load(found) - exact) <=
           rounding * std::abs(exact) + rounding_of_factors * size + 1e-4;
}

template <typename T> bool same_bits(const T* a, const T* b, int64_t count) {
    return std::memcmp(a, b, count * sizeof(T)) == 0;
}

template <typename T> struct Sequence {
    const int64_t H = 6, h = 2, e = 72, length = 270, first = 240, rows = length - first, z;
    const std::vector<T> query = draw<T>(rows * H * e);
    std::vector<T> cache = draw<T>((length + z) * 2 * h * e);
    const CachedKv<T> cached{cache.data(), h, e, z};
    std::vector<int64_t> blocks, positions;

    explicit Sequence(int64_t z) : z(z) {
        for (int64_t b = (length + z - 1) / z; b > 0; b--) blocks.push_back(b - 1);
        for (int64_t p = first; p < length; p++) positions.push_back(p);
        for (int64_t p = 0; p < length; p++)
            cached.store(blocks[p / z] * z + p % z, draw<T>(2 * h * e).data());
    }

    std::vector<T> attended(int64_t row, int64_t count, int64_t window) const {
        std::vector<T> out(count * H * e);
        attend(query.data() + row * H * e, H * e, cache.data(), blocks.data(), int64_t(blocks.size()),
               positions.data() + row, out.data(), window, 0.2f, 0.0f, 1, count, H, h, e, z);
        return out;
    }

    double key(int64_t position, int64_t k, int64_t j) const {
        return load(cached.keys(blocks[position / z], k)[j * z + position % z]);
    }
    double value(int64_t position, int64_t k, int64_t j) const {
        return load(cached.values(blocks[position / z], k)[position % z * e + j]);
    }

    // One head's result in double, and that of the values without their signs.
    std::pair<std::vector<double>, std::vector<double>> expected(int64_t row, int64_t i,
                                                                 int64_t window) const {
        std::vector<double> sums(e), sizes(e);
        double total = 0;
        const int64_t stop = first + row + 1, k = i / (H / h);
        for (int64_t p = window ? std::max<int64_t>(0, stop - window) : 0; p < stop; p++) {
            double score = 0;
            for (int64_t j = 0; j < e; j++)
                score += load(query[(row * H + i) * e + j]) * key(p, k, j);
            const double weight = std::exp(0.2 * score);
            total += weight;
            for (int64_t j = 0; j < e; j++) sums[j] += weight * value(p, k, j);
            for (int64_t j = 0; j < e; j++) sizes[j] += weight * std::abs(value(p, k, j));
        }
        for (double& sum : sums) sum /= total;
        for (double& size : sizes) size /= total;
        return {sums, sizes};
    }
};

template <typename T> void check_attention(int64_t window, int64_t z) {
    const Sequence<T> sequence(z);
    const int64_t H = sequence.H, e = sequence.e;
    const std::vector<T> found = sequence.attended(0, sequence.rows, window);
    for (int64_t row = 0; row < sequence.rows; row++) {
        const std::vector<T> alone = sequence.attended(row, 1, window);
        require(same_bits(alone.data(), &found[row * H * e], H * e), "a row's attention alone");
        for (int64_t i = 0; i < H; i++) {
            const auto [exact, sizes] = sequence.expected(row, i, window);
            for (int64_t j = 0; j < e; j++)
                require(is_close(alone[i * e + j], exact[j], sizes[j]), "attention against double");
        }
    }
}

template <typename T> void check_lora() {
    const int64_t in = 50, out = 80, rows = 11;
    const auto x = draw<T>(rows * in), y = draw<T>(rows * out);
    const auto A = draw<T>(14 * in), B = draw<T>(5 * 33 + 9 * 40);
    const LoraPair<T> pairs[] = {{A.data(), B.data(), 5, 0, 33},
                                 {A.data() + 5 * in, B.data() + 5 * 33, 9, 40, 40}};
    const std::vector<const LoraPair<T>*> loras(rows, pairs);
    std::vector<T> found = y;
    add_lora(found.data(), x.data(), loras.data(), 0, 2, rows, in, out);
    for (int64_t row = 0; row < rows; row++) {
        std::vector<T> alone(&y[row * out], &y[row * out] + out);
        std::vector<double> exact;
        for (T number : alone) exact.push_back(load(number));
        for (const LoraPair<T>& pair : pairs)
            for (int64_t k = 0; k < pair.rank; k++) {
                double z = 0;
                for (int64_t i = 0; i < in; i++)
                    z += double(load(x[row * in + i])) * load(pair.A[k * in + i]);
                for (int64_t c = 0; c < pair.width; c++)
                    exact[pair.start + c] += z * load(pair.B[k * pair.width + c]);
            }
        add_lora(alone.data(), &x[row * in], loras.data(), 0, 2, 1, in, out);
        require(same_bits(alone.data(), &found[row * out], out), "a row's adapter alone");
        for (int64_t c = 0; c < out; c++)
            require(is_close(alone[c], exact[c], 0), "an adapter against double");
    }
}

int main() {
    for (int64_t window : {0, 70})
        for (int64_t z : {16, 24, 4}) {  // keys in whole vectors of any width, of some, of none
            check_attention<float>(window, z);
            check_attention<bfloat16>(window, z);
        }
    check_lora<float>();
    check_lora<bfloat16>();
}
