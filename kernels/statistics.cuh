// Stage 1, statistics: the sums of a chunk, and of a block from those of its chunks.
//
// Reads a gradient once: 4 bytes a parameter for f32, 2 for bf16 and f16, 8 for f64 (twice where the
// block is of f64, which needs a scale first). Writes 24 bytes a chunk.
//
// Contract: all SRKL_THREADS threads of a CTA call these together; `lanes` is shared memory.
#pragma once

#include "state.cuh"
#include "sums.cuh"

// Rows of lanes in a chunk.
static const int CHUNK_ROWS = SRKL_CHUNK / SRKL_LANES;

// Adds the element `g`, computed in f64 and scaled, to its lane.
__device__ inline void add_element(double g, bool norm, double &sum2, double &sum4) {
    const double q = __dmul_rn(g, g);
    if (norm) sum2 = __dadd_rn(sum2, q);
    sum4 = __fma_rn(q, q, sum4);
}

// The lanes of the wide part of a chunk at `g`. A thread has 8 lanes, in groups of as many neighbours as
// 16 bytes hold.
template <typename T>
__device__ inline void vector_lanes(const T *g, int wide, int width, bool norm, double scale, Lanes &lanes) {
    const int N = Vector<T>::N;
    // Rows that are loaded together: registers hold two sums of each lane beside them.
    const int AT_ONCE = N == 8 ? 2 : 4;
    for (int l = threadIdx.x * N; l < width; l += SRKL_THREADS * N) {
        double sum2[N] = {}, sum4[N] = {};
        for (int row = 0; row < CHUNK_ROWS && row * SRKL_LANES < wide; row += AT_ONCE) {
            Vector<T> x[AT_ONCE];
            load_rows<SRKL_LANES>(x, g, row * SRKL_LANES + l, wide);
#pragma unroll
            for (int r = 0; r < AT_ONCE; r++)
#pragma unroll
                for (int k = 0; k < N; k++) {
                    double g = (double)widen(x[r].at[k]);
                    if (sizeof(T) == 8) g = __dmul_rn(g, scale);
                    add_element(g, norm, sum2[k], sum4[k]);
                }
        }
#pragma unroll
        for (int k = 0; k < N; k++) {
            lanes.sum2[l + k] = sum2[k];
            lanes.sum4[l + k] = sum4[k];
        }
    }
}

// For an f64 block, the exponent that brings the magnitudes of a chunk of `len` numbers to about 1;
// `number(at)` is one of them.
template <typename Number> __device__ inline int chunk_exponent(int len, Number number) {
    int most = -1022;
    for (int at = threadIdx.x; at < len; at += SRKL_THREADS) {
        double magnitude = fabs(number(at));
        int e = magnitude < __longlong_as_double(0x7ff0000000000000ll) ? scale_exponent(magnitude) : most;
        most = e > most ? e : most;
    }
    return block_max(most);
}

// The sums over elements `start..start + len` of a gradient of `n`, one chunk of a block of `dtype`.
__device__ inline SrklSums chunk_sums(const SrklGradient &g, u32 dtype, u64 start, int len, u64 n, bool norm,
                                      Lanes &lanes) {
    SrklSums sums = {0., 0., 0};
    const int width = lane_count(len);
    const bool f64 = dtype == SRKL_F64;
    if (f64) sums.exponent = chunk_exponent(len, [&](int at) { return load_one(g, start + at); });
    const double scale = pow2(-(int)sums.exponent);

    int wide = 0;
    if (g.dtype == SRKL_F32 && !f64) {
        const float *p = (const float *)g.address;
        wide = vector_part(p, start, len, n);
        vector_lanes(p + start, wide, width, norm, scale, lanes);
    } else if (g.dtype == SRKL_BF16 && !f64) {
        const bf16 *p = (const bf16 *)g.address;
        wide = vector_part(p, start, len, n);
        vector_lanes(p + start, wide, width, norm, scale, lanes);
    } else if (g.dtype == SRKL_F16 && !f64) {
        const f16 *p = (const f16 *)g.address;
        wide = vector_part(p, start, len, n);
        vector_lanes(p + start, wide, width, norm, scale, lanes);
    } else {
        const double *p = (const double *)g.address;
        if (g.dtype == SRKL_F64 && f64) wide = vector_part(p, start, len, n);
        vector_lanes(p + start, wide, width, norm, scale, lanes);
    }

    // The elements behind the wide part; all of them if the gradient is f64 and the block is not, or the
    // other way round. They come last in their lane, in order, from one thread.
    __syncthreads();
    for (int at = wide + threadIdx.x; at < len; at += SRKL_THREADS) {
        float rounded;
        double g1 = load_one(g, start + at);
        from_f64(g1, rounded);
        add_element(f64 ? __dmul_rn(g1, scale) : (double)rounded, norm, lanes.sum2[at % SRKL_LANES],
                    lanes.sum4[at % SRKL_LANES]);
    }
    if (norm) sums.sum2 = tree(lanes.sum2, width);
    sums.sum4 = tree(lanes.sum4, width);
    return sums;
}

// Whether element `i` of a parameter is not what its f32 master rounds to.
template <typename P> __device__ inline bool element_differs(const SrklBlock &block, u64 i) {
    const P w = ((const P *)block.w)[i];
    const float master = ((const float *)block.master)[i], value = widen(w);
    P rounded;
    narrow(master, rounded);
    const bool both_nan = value != value && master != master;
    return !same_bits(rounded, w) && !both_nan;
}

// Whether a parameter seems to have been overwritten as a whole, by sample `k` of up to SRKL_MASTER_SAMPLES.
__device__ inline bool overwritten(const SrklBlock &block, u64 k) {
    const u64 i = sample(k, block);
    if (block.master == 0 || i >= block.n) return false;
    if (block.packs & SRKL_SPLIT) return ((const bf16 *)block.w)[i].bits != (unsigned short)samples(block)[k];
    return block.dtype == SRKL_BF16 ? element_differs<bf16>(block, i) : element_differs<f16>(block, i);
}

// The statistics of a block, when the sums of all its chunks are there, to all threads.
__device__ SrklStatistics block_statistics(const SrklBlock &block, const SrklSums *of_chunks, Lanes &lanes) {
    const SrklSums *first = of_chunks + block.first_chunk;
    SrklStatistics found = {};
    found.sums = fold(
        block.chunk_count, [=](u64 i) { return read_sums(&first[i]); }, lanes);
    if (block.master != 0) found.reset_master = __syncthreads_or(overwritten(block, threadIdx.x));
    return found;
}
