// Compact state: both moments in 2 bytes, masters of bf16 in 2 bytes beside the parameter, averages in bf16.
// src/compact.rs explains the formats; names and order here are those there.
#pragma once

#include "numerics.cuh"

// The key of the offsets of a parameter in a step.
__device__ inline u64 offset_key(u64 seed, u64 step, u64 place) {
    return random_key(seed, step, place);
}

// The base of the offsets of a unit.
__device__ inline u32 offset_base(u64 key, u64 unit) {
    return (u32)(random_word(key, unit) >> 32);
}

// 32 bits for element `i` of a unit.
__device__ inline u32 offset(u32 base, u32 i) {
    return base + i * 0x9e3779b1;
}

// The bits of infinity: those of finite numbers are below.
static const u32 INFINITE = 0x7f800000;

// The least exponent field of a unit: what is then least is normal.
static const u32 LEAST_EXPONENT = 34;

// `2^e`, for `e` from -126 to 127.
__device__ inline float pow2f(int e) {
    return __uint_as_float((u32)(e + 127) << 23);
}

// What a `v` counts for in the maximum over its unit.
__device__ inline u32 v_magnitude(float v) {
    const u32 bits = __float_as_uint(v);
    return bits < INFINITE ? bits : 0;
}

// The exponent of a unit, from the maximum of `v_magnitude`.
__device__ inline u32 v_exponent(u32 most) {
    const u32 exponent = (most + (1 << 20)) >> 23;
    return min(max(exponent, LEAST_EXPONENT), 254);
}

// The code of `v`, which is not negative; `offset` has 20 bits.
__device__ inline u32 encode_v(float v, u32 exponent, u32 offset) {
    const u32 bits = __float_as_uint(v), least_normal = (exponent - 30) << 23;
    const u32 above = bits - ((exponent - 31) << 23);
    // The sum's last bit is 2^-20 of a step.
    const u32 below = __float_as_uint(__fadd_rn(v, __uint_as_float(least_normal))) - least_normal;
    const u32 steps = bits >= least_normal ? above : below;
    // What is not finite is above all codes.
    return min(max((steps + offset) >> 20, min(bits, 1)), 255);
}

__device__ inline float decode_v(u32 code, u32 exponent) {
    const float normal = __uint_as_float((code << 20) + ((exponent - 31) << 23));
    const float below = __fmul_rn((float)(code & 7), __uint_as_float((exponent - 33) << 23));
    return code >= 8 ? normal : below;
}

// `floor((e + 1) / 2)`, of the exponent `e` of a stored `v`.
__device__ inline int half_exponent(float v) {
    return ((int)(__float_as_uint(v) >> 23) - 126) >> 1;
}

// The largest magnitude that `q` times a power of two can be: `127 * 2^121`.
static const u32 MOST = 0x7f7e0000;

// The bits of `2^127`: rounded up, such a number may be beyond f32.
static const u32 TOO_LARGE = 0x7f000000;

// `m`, or 0 where the new `v`, not stored yet, is not finite: no units could hold it.
__device__ inline float kept_m(float m, float v) {
    return __float_as_uint(v) < INFINITE ? m : 0.f;
}

// `m` in units of about `sqrt(v)`, `v` as it is stored; 0 if it is not finite, from `2^127` on, or where `v`
// is 0.
__device__ inline float relative_m(float m, float v) {
    const bool kept = (__float_as_uint(m) & 0x7fffffff) < TOO_LARGE && v > 0.f;
    const u32 scaled = __float_as_uint(__fmul_rn(kept ? m : 0.f, pow2f(-half_exponent(v))));
    return __uint_as_float((scaled & 0x80000000) | min(scaled & 0x7fffffff, MOST));
}

// The exponent `s` of a unit, from the bits of the largest magnitude of `relative_m`.
__device__ inline int m_exponent(u32 most) {
    const int above = (most & 0x7fffff) > 0x7e0000;
    return min(max((int)(most >> 23) - 127 - 6 + above, -126), 126);
}

// `q`, of a `relative_m`.
__device__ inline int encode_m(float relative, int exponent) {
    return __float2int_rn(__fmul_rn(relative, pow2f(-exponent)));
}

__device__ inline float decode_m(int q, int exponent, float v) {
    return __fmul_rn(__fmul_rn((float)q, pow2f(exponent)), pow2f(half_exponent(v)));
}

// The parameter and the remainder of a master.
__device__ inline void split(float master, bf16 &parameter, short &rest) {
    narrow(master, parameter);
    const int all = (int)(__float_as_uint(master) - ((u32)parameter.bits << 16));
    rest = master != master ? 0 : (short)min(all, 32767);
}

// The master, from the parameter, widened, and its remainder.
__device__ inline float join(float parameter, short rest) {
    return __uint_as_float(__float_as_uint(parameter) + (u32)(int)rest);
}

// f32 to bf16, without a bias in the mean; `offset` has 16 bits.
__device__ inline bf16 round_bf16(float x, u32 offset) {
    bf16 rounded;
    rounded.bits = x != x ? 0x7fc0 : (unsigned short)((__float_as_uint(x) + offset) >> 16);
    return rounded;
}

// The exponent `s` of a first moment that is 0 in a byte.
static const int M_BIAS = 126;
