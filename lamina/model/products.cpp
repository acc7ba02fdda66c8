// Products with packed bfloat16 weights: as fast as memory delivers the weights with few rows, and as fast as the
// processor multiplies with many.
//
// The weights lie as oneDNN packs them for AVX-512: panels of 64 outputs; in a panel, pairs of inputs; of a pair, two
// numbers for each of the 64 outputs. A panel is computed in chunks, a small part of the second-level cache, and each
// chunk for all rows of a block, so each byte of it is read from memory once for so many rows. Meanwhile the next chunk
// is prefetched into the second-level cache: the hardware alone would begin when its first byte is needed.
//
// Every number of y is one sum over the inputs in their order, in single precision, however many rows there are and
// whichever thread computes it. So the numbers of a row do not depend on the rows beside it.

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kOutputs = 64;  // of a panel
constexpr int kVectors = kOutputs / 16;
constexpr int64_t kPairBytes = kOutputs * 4;
constexpr int64_t kChunk = 512;           // pairs: 128 KiB of a panel
constexpr int64_t kStride = kChunk + 16;  // pairs from row to row, so that rows do not share the sets of a cache
constexpr int64_t kBlockRows = 128;

// A tile is what the accumulators hold: 24 of the 32 registers, beside a pair's weights and numbers of x.
constexpr int kWideRows = 6;     // of 64 outputs
constexpr int kNarrowRows = 12;  // of 32
constexpr int kNarrow = kVectors / 2;

struct alignas(kLine) Line {
    uint32_t pairs[kLine / 4];
};

struct Product {
    const char *weights;
    const uint16_t *x;
    const uint16_t *bias;
    int64_t rows, inputs, stored, outputs;
    uint16_t *y;

    int64_t pairs() const { return (inputs + 1) / 2; }
    int64_t chunks() const { return (pairs() + kChunk - 1) / kChunk; }
    int64_t panels() const { return (outputs + kOutputs - 1) / kOutputs; }
    int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
    const char *panel(int64_t i) const { return weights + i * stored * kOutputs * 2; }
};

// Add to sums [Rows, 16 Vectors of 64] the products of `pairs` pairs of inputs, and prefetch so many Lines for each.
template <int Rows, int Vectors, int Lines>
AVX512_BF16 void tile(const char *weights, const uint32_t *x, int64_t pairs, float *sums, const char *ahead) {
    __m512 sum[Rows][Vectors];
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) sum[row][v] = _mm512_load_ps(sums + row * kOutputs + v * 16);
    }
    for (int64_t pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 2
        for (int line = 0; line < Lines; line++) _mm_prefetch(ahead + (pair * Lines + line) * kLine, _MM_HINT_T1);
        __m512bh w[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) {
            w[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weights + pair * kPairBytes + v * kLine));
        }
#pragma GCC unroll 16
        for (int row = 0; row < Rows; row++) {
            const __m512bh both =
                reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x[row * kStride + pair])));
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) sum[row][v] = _mm512_dpbf16_ps(sum[row][v], both, w[v]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) _mm512_store_ps(sums + row * kOutputs + v * 16, sum[row][v]);
    }
}

using Tile = void (*)(const char *, const uint32_t *, int64_t, float *, const char *);

template <int Vectors, int Lines, int... Less>
constexpr std::array<Tile, sizeof...(Less)> tiles(std::integer_sequence<int, Less...>) {
    return {tile<Less + 1, Vectors, Lines>...};
}

constexpr auto kWideTiles = tiles<kVectors, 0>(std::make_integer_sequence<int, kWideRows>());
template <int Lines>
constexpr auto kNarrowTiles = tiles<kNarrow, Lines>(std::make_integer_sequence<int, kNarrowRows>());

// Lines that will be needed next: of the weights, then of x.
class Ahead {
  public:
    Ahead(const char *weights, int64_t weight_lines, const char *x, int64_t x_lines)
        : at_{weights, x}, left_{weight_lines, x_lines} {}

    // The next `lines`, or null where none are left.
    const char *take(int64_t lines) {
        for (int i = 0; i < 2; i++) {
            if (left_[i] <= 0) continue;
            left_[i] -= lines;
            at_[i] += lines * kLine;
            return at_[i] - lines * kLine;
        }
        return nullptr;
    }

  private:
    const char *at_[2];
    int64_t left_[2];
};

// A chunk of a panel, for all rows.
void multiply(int64_t rows, const char *weights, const uint32_t *x, int64_t pairs, float *sums, Ahead ahead) {
    if (rows <= kWideRows) {  // one pass in order, which the hardware prefetches itself
        kWideTiles[rows - 1](weights, x, pairs, sums, nullptr);
        return;
    }
    const int64_t count = (rows + kNarrowRows - 1) / kNarrowRows;
    for (int v = 0; v < kVectors; v += kNarrow) {
        for (int64_t i = 0, row = 0; i < count; i++) {
            const int64_t now = (rows + i) / count;  // in all, rows
            const char *next = ahead.take(count == 1 ? 2 * pairs : pairs);
            const auto &kind = !next ? kNarrowTiles<0> : count == 1 ? kNarrowTiles<2> : kNarrowTiles<1>;
            kind[now - 1](weights + v * kLine, x + row * kStride, pairs, sums + row * kOutputs + v * 16, next);
            row += now;
        }
    }
}

AVX512_BF16 void begin(const Product &p, int64_t first, int64_t rows, float *sums) {
    for (int v = 0; v < kVectors; v++) {
        const int64_t left = p.outputs - first - v * 16;
        const __mmask16 there = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
        __m512 start = _mm512_setzero_ps();
        if (p.bias) {
            const __m256i half = _mm256_maskz_loadu_epi16(there, p.bias + first + v * 16);
            start = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
        for (int64_t row = 0; row < rows; row++) _mm512_store_ps(sums + row * kOutputs + v * 16, start);
    }
}

AVX512_BF16 void finish(const Product &p, int64_t first, int64_t first_row, int64_t rows, const float *sums) {
    for (int v = 0; v < kVectors; v++) {
        const int64_t left = p.outputs - first - v * 16;
        const __mmask16 there = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
        for (int64_t row = 0; row < rows; row++) {
            const __m256bh half = _mm512_cvtneps_pbh(_mm512_load_ps(sums + row * kOutputs + v * 16));
            uint16_t *y = p.y + (first_row + row) * p.outputs + first + v * 16;
            _mm256_mask_storeu_epi16(y, there, reinterpret_cast<__m256i>(half));
        }
    }
}

// What a thread computes with: sums, and its own copy of a block of x, chunk by chunk.
class Worker {
  public:
    explicit Worker(const Product &product) : p_(product) {
        const int64_t rows = std::min(p_.rows, kBlockRows);
        if (static_cast<int64_t>(copy().size()) < p_.chunks() * rows * kStride / 16) {
            copy().resize(p_.chunks() * rows * kStride / 16);
        }
    }

    // Panel unit % panels for the rows of block unit / panels.
    void compute(int64_t unit) {
        const int64_t block = unit / p_.panels(), i = unit % p_.panels();
        const int64_t row = p_.rows * block / p_.blocks(), rows = p_.rows * (block + 1) / p_.blocks() - row;
        const bool copied = block == block_;
        const char *weights = p_.panel(i), *next = p_.panel(i + 1 < p_.panels() ? i + 1 : 0);
        begin(p_, i * kOutputs, rows, sums_);
        for (int64_t chunk = 0; chunk < p_.chunks(); chunk++) {
            const bool last = chunk + 1 == p_.chunks();
            const int64_t pairs = std::min(kChunk, p_.pairs() - chunk * kChunk), size = rows * kStride;
            uint32_t *x = copy().data()->pairs;
            if (!copied) fill(x + chunk * size, chunk, row, rows);
            const char *following = last ? next : weights + (chunk + 1) * kChunk * kPairBytes;
            const char *x_following = reinterpret_cast<const char *>(x + (last ? 0 : chunk + 1) * size);
            multiply(rows, weights + chunk * kChunk * kPairBytes, x + chunk * size, pairs, sums_,
                     {following, kChunk * kPairBytes / kLine, x_following, copied ? size * 4 / kLine : 0});
        }
        finish(p_, i * kOutputs, row, rows, sums_);
        block_ = block;
    }

  private:
    // Stays from call to call: it grows to what the largest product needs.
    static std::vector<Line> &copy() {
        static thread_local std::vector<Line> lines;
        return lines;
    }

    void fill(uint32_t *to, int64_t chunk, int64_t row, int64_t rows) const {
        const int64_t first = chunk * kChunk * 2, inputs = std::min(kChunk * 2, p_.inputs - first);
        for (int64_t i = 0; i < rows; i++, to += kStride) {
            if (inputs % 2) to[inputs / 2] = 0;
            std::memcpy(to, p_.x + (row + i) * p_.inputs + first, inputs * 2);
        }
    }

    const Product &p_;
    int64_t block_ = -1;
    alignas(kLine) float sums_[kBlockRows * kOutputs];
};

// The units of a thread: it takes them in order, and others take from the end what it has not come to.
class alignas(kLine) Share {
  public:
    void set(int64_t first, int64_t end) { range_ = static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(first); }

    // A unit, or -1 if none are left.
    int64_t take(bool own) {
        uint64_t range = range_;
        for (;;) {
            const uint64_t first = range & 0xffffffff, end = range >> 32;
            if (first == end) return -1;
            const uint64_t rest = own ? range + 1 : range - (uint64_t{1} << 32);
            if (range_.compare_exchange_weak(range, rest)) return static_cast<int64_t>(own ? first : end - 1);
        }
    }

  private:
    std::atomic<uint64_t> range_;
};

bool has_tiles_of_amx() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}

}  // namespace

// The most rows for which lamina_product is as fast as oneDNN, or 0 where this processor lacks the instructions.
extern "C" int64_t lamina_product_rows() {
    if (!__builtin_cpu_supports("avx512bf16")) return 0;
    return has_tiles_of_amx() ? 16 : std::numeric_limits<int64_t>::max();
}

// y [rows, outputs] = x [rows, inputs] times the weights, plus bias [outputs] if there is one. stored: inputs of a
// panel as they lie there, with padding, of which at least one is 0 if inputs is odd.
extern "C" void lamina_product(const char *weights, const uint16_t *x, const uint16_t *bias, int64_t rows,
                               int64_t inputs, int64_t stored, int64_t outputs, uint16_t *y, int threads) {
    const Product product{weights, x, bias, rows, inputs, stored, outputs, y};
    const int64_t units = product.panels() * product.blocks();
    std::vector<Share> shares(threads);
    for (int64_t i = 0; i < threads; i++) shares[i].set(units * i / threads, units * (i + 1) / threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int i = 0; i < threads; i++) {
        Worker worker(product);
        for (int victim = 0; victim < threads; victim++) {
            Share &share = shares[(i + victim) % threads];
            for (int64_t unit; (unit = share.take(victim == 0)) >= 0;) worker.compute(unit);
        }
    }
}
