// Products of few rows with packed bfloat16 weights, at the speed at which memory delivers the weights.
//
// The weights lie as oneDNN packs them for AVX-512: panels of 64 outputs; in a panel, pairs of inputs; of a pair, two
// numbers for each of the 64 outputs. oneDNN's own kernels are made for many rows and leave half of the bandwidth
// unused with few.

#include <immintrin.h>

#include <cstdint>

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

constexpr int kOutputs = 64;  // of a panel
constexpr int kVectors = kOutputs / 16;
constexpr int kPairBytes = kOutputs * 4;
constexpr int kTileRows = 6;          // 24 accumulators, 4 vectors of weights and one of x: of 32 registers
constexpr int kMaxRows = 16;          // beyond, oneDNN is as fast
constexpr int64_t kChunkPairs = 512;  // 128 KiB of a panel, which stay in the second-level cache for the next tile

// Add to sums [Rows, 64] the products of `pairs` pairs of inputs.
template <int Rows>
AVX512_BF16 inline void tile(const char *weights, const uint32_t *x, int64_t stride, int64_t pairs, float *sums) {
    __m512 sum[Rows][kVectors];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; row++) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[row][v] = _mm512_load_ps(sums + row * kOutputs + v * 16);
    }
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512bh w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
            w[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weights + pair * kPairBytes + v * 64));
        }
#pragma GCC unroll 8
        for (int row = 0; row < Rows; row++) {
            const __m512bh both =
                reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x[row * stride + pair])));
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) sum[row][v] = _mm512_dpbf16_ps(sum[row][v], both, w[v]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < Rows; row++) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) _mm512_store_ps(sums + row * kOutputs + v * 16, sum[row][v]);
    }
}

AVX512_BF16 void tiles(int rows, const char *weights, const uint32_t *x, int64_t stride, int64_t pairs, float *sums) {
    for (; rows > 0; rows -= kTileRows, x += kTileRows * stride, sums += kTileRows * kOutputs) {
        switch (rows) {
            case 1: tile<1>(weights, x, stride, pairs, sums); break;
            case 2: tile<2>(weights, x, stride, pairs, sums); break;
            case 3: tile<3>(weights, x, stride, pairs, sums); break;
            case 4: tile<4>(weights, x, stride, pairs, sums); break;
            case 5: tile<5>(weights, x, stride, pairs, sums); break;
            default: tile<kTileRows>(weights, x, stride, pairs, sums);
        }
    }
}

AVX512_BF16 void panel(int rows, const char *weights, const uint32_t *x, int64_t pairs, const uint16_t *bias,
                       uint16_t *y, int64_t outputs, int64_t first) {
    alignas(64) float sums[kMaxRows * kOutputs];
    __mmask16 there[kVectors];
    for (int v = 0; v < kVectors; v++) {
        const int64_t left = outputs - first - v * 16;
        there[v] = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1 << left) - 1);
        __m512 start = _mm512_setzero_ps();
        if (bias) {
            const __m256i half = _mm256_maskz_loadu_epi16(there[v], bias + first + v * 16);
            start = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
        for (int row = 0; row < rows; row++) _mm512_store_ps(sums + row * kOutputs + v * 16, start);
    }
    const int64_t chunk = rows <= kTileRows ? pairs : kChunkPairs;
    for (int64_t done = 0; done < pairs; done += chunk) {
        const int64_t now = pairs - done < chunk ? pairs - done : chunk;
        tiles(rows, weights + done * kPairBytes, x + done, pairs, now, sums);
    }
    for (int row = 0; row < rows; row++) {
        for (int v = 0; v < kVectors; v++) {
            const __m256bh half = _mm512_cvtneps_pbh(_mm512_load_ps(sums + row * kOutputs + v * 16));
            _mm256_mask_storeu_epi16(y + row * outputs + first + v * 16, there[v], reinterpret_cast<__m256i>(half));
        }
    }
}

}  // namespace

// The most rows that lamina_product takes, or 0 where this processor lacks the instructions.
extern "C" int lamina_product_rows() { return __builtin_cpu_supports("avx512bf16") ? kMaxRows : 0; }

// y [rows, outputs] = x [rows, inputs] times the weights, plus bias [outputs] if there is one. inputs is even; a pair
// of x is read as one number. stored: inputs of a panel as they lie there, with padding.
extern "C" void lamina_product(const char *weights, const uint32_t *x, const uint16_t *bias, int64_t rows,
                               int64_t inputs, int64_t stored, int64_t outputs, uint16_t *y, int threads) {
    const int64_t panels = (outputs + kOutputs - 1) / kOutputs;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < panels; i++) {
        panel(static_cast<int>(rows), weights + i * stored * kOutputs * 2, x, inputs / 2, bias, y, outputs,
              i * kOutputs);
    }
}
