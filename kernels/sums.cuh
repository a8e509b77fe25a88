// Sums of one fixed shape: "Sums" in src/numerics.rs, rules 2 to 4.
//
// All threads of a CTA call these together. `lanes` is shared memory of the caller, free to be overwritten.
#pragma once

#include "numerics.cuh"

struct Lanes {
    double sum2[SRKL_LANES];
    double sum4[SRKL_LANES];
};

// How many lanes `count` elements reach: a power of two.
__device__ inline int lane_count(u64 count) {
    int width = 1;
    while (width < SRKL_LANES && width < count) width *= 2;
    return width;
}

// The sum of `width` lanes, a power of two, to all threads.
__device__ inline double tree(double *lanes, int width) {
    for (width /= 2; width > 0; width /= 2) {
        __syncthreads();
        for (int l = threadIdx.x; l < width; l += SRKL_THREADS)
            lanes[l] = __dadd_rn(lanes[l], lanes[l + width]);
    }
    __syncthreads();
    return lanes[0];
}

// The largest of a number from each thread, to all threads.
__device__ inline int block_max(int x) {
    __shared__ int max;
    __syncthreads();
    if (threadIdx.x == 0) max = x;
    __syncthreads();
    atomicMax(&max, x);
    __syncthreads();
    return max;
}

// The sum of `count` items, by rule 4; `item(i)` reads one.
template <typename Item> __device__ SrklSums fold(u64 count, Item item, Lanes &lanes) {
    const int NONE = -10000;
    if (count == 1) return item(0);
    int exponent = NONE;
    for (u64 i = thread_number(); i < count; i += SRKL_THREADS) {
        SrklSums x = item(i);
        if (x.sum4 != 0. && (int)x.exponent > exponent) exponent = (int)x.exponent;
    }
    exponent = block_max(exponent);
    SrklSums sums = {0., 0., 0};
    if (exponent == NONE) return sums;
    const int width = lane_count(count);
    for (int l = threadIdx.x; l < width; l += SRKL_THREADS) {
        double sum2 = 0., sum4 = 0.;
        for (u64 i = l; i < count; i += SRKL_LANES) {
            SrklSums x = item(i);
            // Positive only for sums of zero, which no scale changes.
            int down = (int)x.exponent - exponent;
            if (down > 0) down = 0;
            sum2 = __dadd_rn(sum2, __dmul_rn(x.sum2, pow2(2 * down)));
            sum4 = __dadd_rn(sum4, __dmul_rn(x.sum4, pow2(4 * down)));
        }
        lanes.sum2[l] = sum2;
        lanes.sum4[l] = sum4;
    }
    sums.sum2 = tree(lanes.sum2, width);
    sums.sum4 = tree(lanes.sum4, width);
    sums.exponent = exponent;
    return sums;
}

// Whether this thread's CTA is the last of `count` to arrive at a counter, which is then zero again. It sees
// what those before it wrote.
__device__ inline bool arrives_last(u32 *counter, u64 count) {
    __threadfence();
    bool last = atomicInc(counter, (u32)(count - 1)) == (u32)(count - 1);
    __threadfence();
    return last;
}

// Sums that another CTA may have written in this launch: bypasses L1.
__device__ inline SrklSums read_sums(const SrklSums *sums) {
    SrklSums x;
    x.sum2 = __ldcg(&sums->sum2);
    x.sum4 = __ldcg(&sums->sum4);
    x.exponent = __ldcg(&sums->exponent);
    return x;
}

// The sums over the lanes.
__device__ inline SrklPair tree_pair(Lanes &lanes, int width) {
    SrklPair sums;
    sums.a = tree(lanes.sum2, width);
    sums.b = tree(lanes.sum4, width);
    return sums;
}

// The sum over a strip, of which each thread of a warp has a term, to the first thread of the warp. All
// threads of the warp call it together.
__device__ inline double strip_sum(double term) {
#pragma unroll
    for (int width = SRKL_STRIP / 2; width > 0; width /= 2)
        term = __dadd_rn(term, __shfl_down_sync(0xffffffff, term, width));
    return term;
}

// The same where each thread has 8 neighbouring terms, and so 4 threads a strip: to the first of them.
__device__ inline double strip_sum(double (&terms)[8]) {
#pragma unroll
    for (int threads = 2; threads > 0; threads /= 2)
#pragma unroll
        for (int e = 0; e < 8; e++)
            terms[e] = __dadd_rn(terms[e], __shfl_down_sync(0xffffffff, terms[e], threads));
#pragma unroll
    for (int width = 4; width > 0; width /= 2)
#pragma unroll
        for (int e = 0; e < width; e++) terms[e] = __dadd_rn(terms[e], terms[e + width]);
    return terms[0];
}

// The sum of `count` pairs, by rule 4; `item(i)` reads one.
template <typename Item> __device__ SrklPair fold_pairs(u64 count, Item item, Lanes &lanes) {
    if (count == 1) return item(0);
    __syncthreads(); // The lanes may have been read just now.
    const int width = lane_count(count);
    for (int l = threadIdx.x; l < width; l += SRKL_THREADS) {
        double a = 0., b = 0.;
        for (u64 i = l; i < count; i += SRKL_LANES) {
            SrklPair x = item(i);
            a = __dadd_rn(a, x.a);
            b = __dadd_rn(b, x.b);
        }
        lanes.sum2[l] = a;
        lanes.sum4[l] = b;
    }
    return tree_pair(lanes, width);
}

__device__ inline SrklPair read_pair(const SrklPair *pair) {
    SrklPair x;
    x.a = __ldcg(&pair->a);
    x.b = __ldcg(&pair->b);
    return x;
}

// `||c g||_2`
__device__ inline double norm_of(const SrklSums &sums, double c) {
    return __dmul_rn(__dmul_rn(c, pow2((int)sums.exponent)), __dsqrt_rn(sums.sum2));
}

// `||(c g) * (c g)||_2`
__device__ inline double curvature_of(const SrklSums &sums, double c) {
    double unit = __dmul_rn(c, pow2((int)sums.exponent));
    return __dmul_rn(__dmul_rn(unit, unit), __dsqrt_rn(sums.sum4));
}
