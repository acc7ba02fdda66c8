// Vectors have W 32-bit lanes and use the compiler's vector extensions, so that one source serves every instruction
// set, from 16 lanes of AVX-512 to what the compiler makes of 8 lanes on another architecture. Intrinsics appear only
// where the extensions do not suffice, each with a portable form beside it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lamina {
// Without a name, because the linker would keep one version of a function for all instruction sets, and these pass
// vectors to functions in different ways.
namespace {

#if LAMINA_WIDE
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int16_t I16 __attribute__((vector_size(4 * W)));  // two 16-bit numbers in each lane

template <class V, class T>
inline V load(const T *p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
inline void store(T *p, V v) {
    std::memcpy(p, &v, sizeof v);
}
inline F all(float x) { return x - F{}; }
inline U all(uint32_t x) { return x - U{}; }
inline F as_float(U x) { return (F)x; }
inline U as_bits(F x) { return (U)x; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F select(I mask, F yes, F no) { return mask ? yes : no; }

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits

// Lane i of the result is lane i ^ Bit.
template <int Bit>
inline F swapped(F v) {
    I lanes;
    for (int i = 0; i < W; ++i) lanes[i] = i ^ Bit;
#if defined(__clang__)
    F x;
    for (int i = 0; i < W; ++i) x[i] = v[lanes[i]];
    return x;
#else
    return __builtin_shuffle(v, lanes);
#endif
}
inline float horizontal_max(F v) {
    if (W > 8) v = max(v, swapped<8 % W>(v));
    v = max(v, swapped<4>(v));
    v = max(v, swapped<2>(v));
    return max(v, swapped<1>(v))[0];
}
inline float horizontal_sum(F v) {
    if (W > 8) v = v + swapped<8 % W>(v);
    v = v + swapped<4>(v);
    v = v + swapped<2>(v);
    return (v + swapped<1>(v))[0];
}

// 2^x for x <= 0; exactly 0 below -126, where float32's normal numbers end; NaN stays NaN. Relative error below 3e-7.
inline F exp2_negative(F x) {
    const F magic = all(TO_INTEGER);
    F t = x + magic;
    F r = x - (t - magic);  // -0.5 .. 0.5, for a polynomial of least relative error
    F p = all(0.0013276457f);
    p = p * r + 0.009675541f;
    p = p * r + 0.055507135f;
    p = p * r + 0.2402212f;
    p = p * r + 0.69314694f;
    p = p * r + 1.0f;
    // This is a product, because an addition to the exponent's bits could turn a NaN into a number.
    F two_n = as_float((as_bits(t) - as_bits(magic) + 127u) << 23);
    return select(x < -126.0f, F{}, p * two_n);
}

// tanh(x). Relative error below 1e-6 near 0 too, where the quotient would cancel.
inline F tanh(F x) {
    F a = max(x, -x);
    F e = exp2_negative(a * (-2 * LOG2_E));
    F far = (1.0f - e) / (1.0f + e);
    far = select(x < 0.0f, -far, far);
    // This is the odd series of tanh, which is short for |x| < 0.25.
    F z = x * x;
    F p = all(-1382.0f / 155925);
    p = p * z + all(62.0f / 2835);
    p = p * z + all(-17.0f / 315);
    p = p * z + all(2.0f / 15);
    p = p * z + all(-1.0f / 3);
    F near = x + x * z * p;
    return select(a < 0.25f, near, far);
}

// -- bfloat16

inline F from_bfloat16_low(U pairs) { return as_float(pairs << 16); }
inline F from_bfloat16_high(U pairs) { return as_float(pairs & 0xffff0000u); }

inline U to_bfloat16(F x) {  // round to nearest even, in the low half of each lane
    U u = as_bits(x);
    U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (I)(x != x) ? (u >> 16) | 0x40u : rounded;
}

// -- 8-bit integers

typedef int8_t B __attribute__((vector_size(2 * W)));
typedef int16_t S __attribute__((vector_size(2 * W)));

// The compiler's own conversion takes a vector apart and puts it together again.
inline I16 widen(B x) {
#if defined(__AVX512BW__) && LAMINA_WIDE
    return (I16)_mm512_cvtepi8_epi16((__m256i)x);
#elif defined(__AVX2__) && !LAMINA_WIDE
    return (I16)_mm256_cvtepi8_epi16((__m128i)x);
#else
    return __builtin_convertvector(x, I16);
#endif
}
inline I widen(S x) {
#if defined(__AVX512F__) && LAMINA_WIDE
    return (I)_mm512_cvtepi16_epi32((__m256i)x);
#elif defined(__AVX2__) && !LAMINA_WIDE
    return (I)_mm256_cvtepi16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, I);
#endif
}

// -- 16-bit floating point

typedef uint16_t H __attribute__((vector_size(2 * W)));

inline F from_float16(const uint16_t *p) {
#if defined(__AVX512F__) && LAMINA_WIDE
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__) && !LAMINA_WIDE
    return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    U h = __builtin_convertvector(load<H>(p), U);
    U magnitude = (h & 0x7fffu) << 13;
    F finite = as_float(magnitude) * 0x1p112f;
    F special = as_float(magnitude | 0x7f800000u);
    F value = select((I)(magnitude >= 0x0f800000u), special, finite);
    return as_float(as_bits(value) | ((h & 0x8000u) << 16));
#endif
}

inline H to_float16(F x) {  // round to nearest even
#if defined(__AVX512F__) && LAMINA_WIDE
    return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && !LAMINA_WIDE
    return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    U u = as_bits(x);
    U sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    U normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
    U subnormal = as_bits(as_float(a) + 0.5f) - 0x3f000000u;  // the addition rounds to multiples of 2^-24
    U h = (I)(a < 0x38800000u) ? subnormal : normal;
    h = (I)(a >= 0x477ff000u) ? all(0x7c00u) : h;
    h = (I)(a > 0x7f800000u) ? all(0x7e00u) : h;
    return __builtin_convertvector(h | sign, H);
#endif
}

// -- dot products of pairs

// acc + the products of both bfloat16 numbers in each lane, accumulated in float32.
inline F dot_bfloat16(F acc, U a, U b) {
#if defined(__AVX512BF16__) && LAMINA_WIDE
    return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    // This stands in for the instruction in tests. Like the instruction, it takes subnormals for 0.
    auto normal = [](F x) { return select((max(x, -x) >= 0x1p-126f) | (x != x), x, F{}); };
    acc = acc + normal(from_bfloat16_low(a)) * normal(from_bfloat16_low(b));
    return acc + normal(from_bfloat16_high(a)) * normal(from_bfloat16_high(b));
#endif
}

// acc + the products of both 16-bit integers in each lane, exact in 32 bits.
inline I dot_int16(I acc, I16 a, I16 b) {
#if defined(__AVX512VNNI__) && LAMINA_WIDE
    return (I)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__) && LAMINA_WIDE
    return acc + (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !LAMINA_WIDE
    return acc + (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    I x = (I)a, y = (I)b;
    return acc + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// Prefetch into the second-level cache, which can have far more lines on their way than the first.
inline void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace lamina
