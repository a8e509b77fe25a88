// The numerics contract on the device: conversions and exact scaling.
//
// src/numerics.rs explains the contract; names and order here and in rule.cuh are those of
// src/numerics.rs and src/rule.rs. Every operation that rounds is written as the intrinsic that rounds once.
#pragma once

#include "abi.h"

typedef unsigned int u32;
typedef unsigned long long u64;

// threadIdx.x, read again: loops over 64-bit numbers that begin with it would otherwise keep it, for all of
// them, in registers that the update needs.
__device__ inline u32 thread_number() {
    u32 number;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
    return number;
}

// 16-bit floats as bits: their arithmetic is in f32.
struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};

__device__ inline bool is_finite(double x) {
    return fabs(x) < __longlong_as_double(0x7ff0000000000000ll);
}

// -------------------------------------------------------------------------------------------------
// Conversions

__device__ inline float widen(float x) {
    return x;
}
__device__ inline double widen(double x) {
    return x;
}
__device__ inline float widen(bf16 x) {
    return __uint_as_float((u32)x.bits << 16);
}
__device__ inline float widen(f16 x) {
    const u32 EXPONENT = 0x7c00u << 13;
    u32 sign = (u32)(x.bits & 0x8000) << 16;
    u32 magnitude = (u32)(x.bits & 0x7fff) << 13;
    u32 exponent = magnitude & EXPONENT;
    u32 normal = magnitude + ((127 - 15) << 23);
    u32 special = magnitude + ((255 - 31) << 23);
    float subnormal = __fsub_rn(__uint_as_float(normal + (1 << 23)), __uint_as_float((127 - 14) << 23));
    u32 bits = exponent == EXPONENT ? special : exponent == 0 ? __float_as_uint(subnormal) : normal;
    return __uint_as_float(sign | bits);
}

__device__ inline void narrow(float x, float &out) {
    out = x;
}
__device__ inline void narrow(double x, double &out) {
    out = x;
}
__device__ inline void narrow(float x, bf16 &out) {
    u32 bits = __float_as_uint(x);
    u32 odd = (bits >> 16) & 1;
    out.bits = x != x ? 0x7fc0 : (unsigned short)((bits + 0x7fff + odd) >> 16);
}
__device__ inline void narrow(float x, f16 &out) {
    const u32 INFINITE = 0x7c00;
    const u32 FIRST_INFINITE = 0x477ff000; // 65520
    const u32 FIRST_NORMAL = (127 - 14) << 23;
    u32 sign = (__float_as_uint(x) >> 16) & 0x8000;
    u32 magnitude = __float_as_uint(x) & 0x7fffffff;
    u32 odd = (magnitude >> 13) & 1;
    u32 normal = (magnitude - ((127 - 15) << 23) + 0xfff + odd) >> 13;
    u32 subnormal = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0.5f)) - __float_as_uint(0.5f);
    u32 bits = magnitude >= FIRST_INFINITE ? INFINITE : magnitude < FIRST_NORMAL ? subnormal : normal;
    out.bits = x != x ? 0x7e00 : (unsigned short)(sign | bits);
}

__device__ inline bool same_bits(bf16 a, bf16 b) {
    return a.bits == b.bits;
}
__device__ inline bool same_bits(f16 a, f16 b) {
    return a.bits == b.bits;
}

// To a compute type, by way of f64, which holds every value of the others: one rounding.
__device__ inline void from_f64(double x, float &out) {
    out = __double2float_rn(x);
}
__device__ inline void from_f64(double x, double &out) {
    out = x;
}

__device__ inline float canonical(float x) {
    return x != x ? __uint_as_float(0x7fc00000) : x;
}
__device__ inline double canonical(double x) {
    return x != x ? __longlong_as_double(0x7ff8000000000000ll) : x;
}

// -------------------------------------------------------------------------------------------------
// Exact scaling

// `2^e`, 0 below the subnormals; `e <= 1023`.
__device__ inline double pow2(int e) {
    if (e >= -1022) return __longlong_as_double((long long)(e + 1023) << 52);
    if (e >= -1074) return __longlong_as_double(1ll << (e + 1074));
    return 0.;
}

// The exponent that scales a chunk whose largest finite magnitude is `max`.
__device__ inline int scale_exponent(double max) {
    int biased = (int)(__double_as_longlong(max) >> 52) & 0x7ff;
    return (biased > 1 ? biased : 1) - 1023;
}

// -------------------------------------------------------------------------------------------------
// Arithmetic in either compute type, each operation rounded once

__device__ inline float add(float a, float b) {
    return __fadd_rn(a, b);
}
__device__ inline double add(double a, double b) {
    return __dadd_rn(a, b);
}
__device__ inline float sub(float a, float b) {
    return __fsub_rn(a, b);
}
__device__ inline double sub(double a, double b) {
    return __dsub_rn(a, b);
}
__device__ inline float mul(float a, float b) {
    return __fmul_rn(a, b);
}
__device__ inline double mul(double a, double b) {
    return __dmul_rn(a, b);
}
__device__ inline float div(float a, float b) {
    return __fdiv_rn(a, b);
}
__device__ inline double div(double a, double b) {
    return __ddiv_rn(a, b);
}
__device__ inline float root(float x) {
    return __fsqrt_rn(x);
}
__device__ inline double root(double x) {
    return __dsqrt_rn(x);
}
// `a * b + c`
__device__ inline float mul_add(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
}
__device__ inline double mul_add(double a, double b, double c) {
    return __fma_rn(a, b, c);
}

// `x^(k / 8)` by square roots, for `k` from 0 to 8.
__device__ inline double eighths(double x, u32 k) {
    double half = root(x), quarter = root(half), eighth = root(quarter);
    double power = k >= 8 ? x : 1.;
    power = k & 4 ? mul(power, half) : power;
    power = k & 2 ? mul(power, quarter) : power;
    power = k & 1 ? mul(power, eighth) : power;
    return power;
}

// -------------------------------------------------------------------------------------------------
// Random numbers

__device__ inline u64 mix(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// What random_bits makes of all but the word.
__device__ inline u64 random_key(u64 seed, u64 draw, u64 stream) {
    return mix(mix(mix(seed) ^ draw) ^ stream);
}

// The `word`-th 64 random bits by a key.
__device__ inline u64 random_word(u64 key, u64 word) {
    return mix(key ^ word);
}

// The `word`-th 64 random bits of a stream.
__device__ inline u64 random_bits(u64 seed, u64 draw, u64 stream, u64 word) {
    return random_word(random_key(seed, draw, stream), word);
}
