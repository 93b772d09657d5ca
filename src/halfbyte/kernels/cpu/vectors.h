// Vector types and the few primitives that know the instruction set.
//
// Everything else in this folder is written with the compiler's portable vector types, 16 lanes of
// f32; where the machine has narrower registers the compiler splits them. Three primitives have a
// second form for AVX-512 with BF16 and VBMI: the product of bf16 pairs, and the decoding of e4m3
// and e2m1 codes to bf16 by table look-up. Both forms decode exactly; sums differ by rounding.

#ifndef HALFBYTE_VECTORS_H
#define HALFBYTE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define HB_AVX512 1
#include <immintrin.h>
#else
#define HB_AVX512 0
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t bf16;

INLINE f32x16 splat(float value) { return value - (f32x16){0}; }

// a * b + c, fused where the machine has it. The compiler itself may not fuse (-ffp-contract=off): it
// would do so in one inlined copy of a loop and not in another, and results would depend on which
// copy a batch happened to use.
INLINE f32x16 fused(f32x16 a, f32x16 b, f32x16 c) {
#if HB_AVX512
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

INLINE f32x16 load_f32(const float *from) {
    f32x16 v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE f32x16 load_f32_part(const float *from, int count) {
    if (count == 16) return load_f32(from);
    f32x16 v = {0};
    memcpy(&v, from, (size_t)count * sizeof(float));
    return v;
}

INLINE void store_f32(float *to, f32x16 v) { memcpy(to, &v, sizeof v); }

// The compiler splits these two conversions in halves where one instruction would do.
INLINE u32x16 to_u32(u16x16 words) {
#if HB_AVX512
    return (u32x16)_mm512_cvtepu16_epi32((__m256i)words);
#else
    return __builtin_convertvector(words, u32x16);
#endif
}

INLINE u16x16 to_u16(u32x16 words) {
#if HB_AVX512
    return (u16x16)_mm512_cvtepi32_epi16((__m512i)words);
#else
    return __builtin_convertvector(words, u16x16);
#endif
}

INLINE f32x16 widen(u16x16 words) { return (f32x16)(to_u32(words) << 16); }

INLINE f32x16 load_bf16(const bf16 *from) {
    u16x16 words;
    memcpy(&words, from, sizeof words);
    return widen(words);
}

// Nearest, ties to even; NaN stays NaN. (The hardware's conversion flushes subnormals, this not.)
INLINE u16x16 narrow(f32x16 v) {
    u32x16 bits = (u32x16)v;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32x16 is_nan = (u32x16)(v != v);
    rounded = (is_nan & 0x7fc0) | (~is_nan & rounded);
    return to_u16(rounded);
}

INLINE void store_bf16(bf16 *to, f32x16 v) {
    u16x16 words = narrow(v);
    memcpy(to, &words, sizeof words);
}

INLINE float bf16_to_float(bf16 word) {
    uint32_t bits = (uint32_t)word << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE bf16 float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7fc0;
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// First `count` values of a row, zeros behind.
INLINE f32x16 load_bf16_part(const bf16 *from, int count) {
    if (count == 16) return load_bf16(from);
    u16x16 words = {0};
    memcpy(&words, from, (size_t)count * sizeof(bf16));
    return widen(words);
}

INLINE void store_bf16_part(bf16 *to, f32x16 v, int count) {
    if (count == 16) {
        store_bf16(to, v);
        return;
    }
    u16x16 words = narrow(v);
    memcpy(to, &words, (size_t)count * sizeof(bf16));
}

// Lanes added in one fixed order, whatever the instruction set.
INLINE float sum_lanes(f32x16 v) {
    float lane[16];
    memcpy(lane, &v, sizeof lane);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

INLINE float max_lanes(f32x16 v) {
    float lane[16];
    memcpy(lane, &v, sizeof lane);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
}

INLINE f32x16 select_f32(i32x16 mask, f32x16 a, f32x16 b) {
    return (f32x16)((mask & (i32x16)a) | (~mask & (i32x16)b));
}

// e^x to within 2 ulp; 0 below -87.3, where the result would be subnormal, infinity above 88.
// Cody-Waite reduction, Taylor terms to the sixth: |r| <= ln(2) / 2 leaves 1.2e-7 relative.
INLINE f32x16 exp_f32(f32x16 x) {
    i32x16 is_tiny = x < splat(-87.3f), is_huge = x > splat(88.0f);
    x = select_f32(is_tiny | is_huge, splat(0.0f), x);
    f32x16 shifted = fused(x, splat(1.44269504f), splat(12582912.0f));  // 1.5 * 2^23: rounds to a whole number
    f32x16 n = shifted - 12582912.0f;
    f32x16 r = fused(n, splat(-0.693359375f), x);
    r = fused(n, splat(2.12194440e-4f), r);
    f32x16 p = fused(r, splat(1.3888889e-3f), splat(8.3333333e-3f));
    p = fused(p, r, splat(4.1666667e-2f));
    p = fused(p, r, splat(1.6666667e-1f));
    p = fused(p, r, splat(0.5f));
    p = fused(p, r, splat(1.0f));
    p = fused(p, r, splat(1.0f));
    i32x16 power = ((i32x16)shifted - (i32x16)splat(12582912.0f)) << 23;
    f32x16 result = select_f32(is_tiny, splat(0.0f), (f32x16)((i32x16)p + power));
    return select_f32(is_huge, splat(INFINITY), result);
}

// ---- codes -> bf16 -------------------------------------------------------------------------

// bf16 bits of e4m3 magnitude `code` (7 bits): 4 exponent bits with bias 7, 3 mantissa bits.
INLINE bf16 e4m3_magnitude(int code) {
    if (code == 0x7f) return 0x7fc0;
    float value = code < 8 ? (float)code / 512.0f : ldexpf((float)(8 + (code & 7)), (code >> 3) - 10);
    return float_to_bf16(value);
}

// Look-up tables, filled once when the library is loaded (vectors.c).
extern bf16 hb_e4m3_words[256];
extern uint8_t hb_e4m3_high[128], hb_e4m3_low[128];
extern bf16 hb_e2m1_words[32];

#if HB_AVX512

// Sum of products of bf16 pairs: lane i gains w[2i] x[0] + w[2i + 1] x[1], f32. The pair is read as
// one f32 so that it is broadcast on its way from memory, not through an integer register.
INLINE f32x16 dot_pair(f32x16 sum, u16x32 w, const bf16 *x) {
    float pair;
    memcpy(&pair, x, sizeof pair);
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_ps(pair));
}

// 64 e4m3 codes -> two vectors of bf16 words. Within each 16-byte lane the first gets bytes 0-7, the
// second bytes 8-15; the packed layouts are made for that.
INLINE void decode_e4m3_64(u8x64 codes, u16x32 *first, u16x32 *second) {
    __m512i c = (__m512i)codes;
    __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(hb_e4m3_high), c,
                                            _mm512_loadu_si512(hb_e4m3_high + 64));
    __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(hb_e4m3_low), c,
                                           _mm512_loadu_si512(hb_e4m3_low + 64));
    // high | (codes & 0x80): the sign
    high = _mm512_ternarylogic_epi32(high, c, _mm512_set1_epi8((char)0x80), 0xf8);
    *first = (u16x32)_mm512_unpacklo_epi8(low, high);
    *second = (u16x32)_mm512_unpackhi_epi8(low, high);
}

// 64 e4m3 codes -> 64 f32 in an order that is cheap: code 16 q + 4 n + e goes to 16 n + 4 q + e.
INLINE void decode_e4m3_64_f32(u8x64 codes, f32x16 values[4]) {
    u16x32 words[2];
    decode_e4m3_64(codes, &words[0], &words[1]);
    for (int n = 0; n < 2; n++) {  // a bf16 behind 16 zero bits is an f32
        values[2 * n] = (f32x16)_mm512_unpacklo_epi16(_mm512_setzero_si512(), (__m512i)words[n]);
        values[2 * n + 1] = (f32x16)_mm512_unpackhi_epi16(_mm512_setzero_si512(), (__m512i)words[n]);
    }
}

// The e2m1 code in bits 0-3 of each word -> bf16; higher bits are ignored.
INLINE u16x32 decode_e2m1_words(u16x32 words) {
    return (u16x32)_mm512_permutexvar_epi16((__m512i)words, _mm512_loadu_si512(hb_e2m1_words));
}

#else

INLINE f32x16 dot_pair(f32x16 sum, u16x32 w, const bf16 *x) {
    u32x16 words = (u32x16)w;
    f32x16 even = (f32x16)(words << 16), odd = (f32x16)(words & 0xffff0000u);
    sum += even * bf16_to_float(x[0]);
    return sum + odd * bf16_to_float(x[1]);
}

INLINE void decode_e4m3_64(u8x64 codes, u16x32 *first, u16x32 *second) {
    uint8_t c[64];
    bf16 a[32], b[32];
    memcpy(c, &codes, sizeof c);
    for (int lane = 0; lane < 4; lane++)
        for (int i = 0; i < 8; i++) {
            a[lane * 8 + i] = hb_e4m3_words[c[lane * 16 + i]];
            b[lane * 8 + i] = hb_e4m3_words[c[lane * 16 + 8 + i]];
        }
    memcpy(first, a, sizeof a);
    memcpy(second, b, sizeof b);
}

INLINE void decode_e4m3_64_f32(u8x64 codes, f32x16 values[4]) {
    uint8_t c[64];
    memcpy(c, &codes, sizeof c);
    for (int q = 0; q < 4; q++)
        for (int n = 0; n < 4; n++)
            for (int e = 0; e < 4; e++)
                values[n][4 * q + e] = bf16_to_float(hb_e4m3_words[c[16 * q + 4 * n + e]]);
}

INLINE u16x32 decode_e2m1_words(u16x32 words) {
    bf16 w[32];
    memcpy(w, &words, sizeof w);
    for (int i = 0; i < 32; i++) w[i] = hb_e2m1_words[w[i] & 15];
    memcpy(&words, w, sizeof w);
    return words;
}

#endif

// e4m3 of x, nearest, ties to even, clamped to +-448; NaN gives 0x7f.
INLINE uint8_t encode_e4m3(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint8_t sign = (uint8_t)((bits >> 24) & 0x80);
    if (x != x) return sign | 0x7f;
    float magnitude = fabsf(x);
    if (magnitude >= 448.0f) return sign | 0x7e;
    if (magnitude < 0.015625f) {                  // below the smallest normal, 2^-6
        float shifted = magnitude + 16384.0f;     // 2^14 has steps of 2^-9: rounds to them
        memcpy(&bits, &shifted, sizeof bits);
        return sign | (uint8_t)(bits & 0x0f);
    }
    memcpy(&bits, &magnitude, sizeof bits);
    bits += 0x7ffff + ((bits >> 20) & 1);
    return sign | (uint8_t)((bits >> 20) - ((127 - 7) << 3));
}

#endif
