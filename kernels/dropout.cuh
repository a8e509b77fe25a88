// Dropout: a mask drawn from a key, applied with a scale. No part of a step.
//
// Launch contract of srkl_dropout:
//   grid     any number of CTAs, one a tile of SRKL_DROPOUT_TILE elements at most
//   block    SRKL_THREADS threads
//   shared   none
//   x        `n` elements of `dtype`, contiguous, in one allocation; they may be misaligned
//   y        room for as many, 16-byte aligned; it doesn't overlap x
//   first    the tile to begin with: the elements before it are left alone
//
// Bytes an element in f32: 8, in accesses of 16. An element's bits depend on the key and on its number alone.
//
// The formula is that of src/backend/cpu/mask.rs.
#pragma once

#include "access.cuh"

// C is T's compute type.
template <typename T, typename C> __device__ inline T masked(T x, u32 bits, u32 threshold, C scale) {
    T y;
    narrow(bits >= threshold ? canonical(mul((C)widen(x), scale)) : (C)0, y);
    return y;
}

template <typename T, typename C>
__device__ inline void dropout(const T *x, T *y, u64 n, u64 first, u64 key, double scale_in_f64,
                               u32 threshold) {
    const int N = Vector<T>::N, STRIDE = SRKL_THREADS * N, ROWS = SRKL_DROPOUT_TILE / STRIDE;
    C scale;
    from_f64(scale_in_f64, scale);
    for (u64 tile = first + blockIdx.x; tile * SRKL_DROPOUT_TILE < n; tile += gridDim.x) {
        const u64 start = tile * SRKL_DROPOUT_TILE, left = n - start;
        const int len = left < SRKL_DROPOUT_TILE ? (int)left : SRKL_DROPOUT_TILE;
        const int wide = vector_part(x, start, len, n), at = threadIdx.x * N;
        Vector<T> xs[ROWS];
        load_rows<STRIDE>(xs, x + start, at, wide);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const u64 i = start + at + r * STRIDE;
#pragma unroll
            for (int e = 0; e < N; e += 2) {
                const u64 bits = random_word(key, (i + e) / 2);
                xs[r].at[e] = masked(xs[r].at[e], (u32)bits, threshold, scale);
                xs[r].at[e + 1] = masked(xs[r].at[e + 1], (u32)(bits >> 32), threshold, scale);
            }
            if (at + r * STRIDE < wide) *(uint4 *)(y + i) = *(const uint4 *)&xs[r];
        }
#pragma unroll 1
        for (int single = wide + threadIdx.x; single < len; single += SRKL_THREADS) {
            const u64 i = start + single;
            y[i] = masked(x[i], (u32)(random_word(key, i / 2) >> (i % 2 * 32)), threshold, scale);
        }
    }
}

extern "C" __global__ void __launch_bounds__(SRKL_THREADS)
    srkl_dropout(const void *x, void *y, const u64 n, const u64 first, const u64 key, const double scale,
                 const u32 threshold, const u32 dtype) {
    switch (dtype) {
    case SRKL_F32:
        dropout<float, float>((const float *)x, (float *)y, n, first, key, scale, threshold);
        break;
    case SRKL_F64:
        dropout<double, double>((const double *)x, (double *)y, n, first, key, scale, threshold);
        break;
    case SRKL_BF16: dropout<bf16, float>((const bf16 *)x, (bf16 *)y, n, first, key, scale, threshold); break;
    default: dropout<f16, float>((const f16 *)x, (f16 *)y, n, first, key, scale, threshold); break;
    }
}
