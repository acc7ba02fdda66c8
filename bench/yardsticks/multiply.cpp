// How fast one core multiplies bfloat16 numbers that are in registers already: the bound of every matrix product.

#include <immintrin.h>

// Time it; returns the operations that it has done, two for each product added.
extern "C" __attribute__((target("avx512f,avx512bf16"))) double lamina_multiply(long rounds) {
    constexpr int kSums = 12;  // more than the instruction takes cycles
    __m512 sums[kSums];
#pragma GCC unroll 12
    for (int i = 0; i < kSums; i++) sums[i] = _mm512_setzero_ps();
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums; i++) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sums[i]) : "v"(ones));
    }
    return 64.0 * kSums * static_cast<double>(rounds);
}
