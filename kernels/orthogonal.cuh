// What SRKL_MUON does besides products of matrices: the momentum of each matrix, divided by its Frobenius
// norm, and the sums between the products. cuBLAS makes these: src/backend/newton_schulz.rs has the
// iteration.
//
// Launch contract of srkl_momentum and srkl_normalize:
//   grid     any number of CTAs, one a chunk of a matrix at most
//   block    SRKL_THREADS threads
//   shared   static
//   table    as srkl_step has it, decided
//   matrices as abi.h describes them; `chunks_done` is zero before the first launch, and after each
//   order    srkl_momentum, srkl_normalize and then the products, on the stream of all
//
// Nothing of a block changes but its room. A matrix of a block that does not move gets zeros.
#pragma once

#include "decide.cuh"
#include "state.cuh"
#include "statistics.cuh"

// What an element of a room is computed in.
template <typename T> using Computed = decltype(widen(T()));

// The momentum that a step follows, of element `at` of a chunk that begins at element `start` of its block.
template <typename C>
__device__ inline C momentum(const Part<C, C> &part, const SrklGradient &g, const SrklGroup &group,
                             const Moments<C> &moments, u64 start, int at) {
    C gradient;
    from_f64(load_one(g, start + at), gradient);
    C m = moments.first_moment(part.load_m(at), gradient);
    return group.ahead ? moments.look_ahead(m, gradient) : m;
}

// Stores one number as the dtype of the room has it, and returns what was stored.
template <typename C> __device__ inline double store_rounded(const SrklGradient &room, u64 i, C x) {
    if (room.dtype == SRKL_BF16) {
        bf16 rounded;
        narrow((float)x, rounded);
        ((bf16 *)room.address)[i] = rounded;
        return widen(rounded);
    }
    ((C *)room.address)[i] = x;
    return x;
}

// Writes the momentum of elements `start..start + len` of a block to its room, and returns their sum of
// squares.
template <typename C>
__device__ inline SrklSums write_momentum(const SrklBlock &block, const SrklGradient &g,
                                          const BlockStep &block_step, bool moves, u64 start, int len,
                                          Lanes &lanes) {
    const Part<C, C> part(block, start);
    const Moments<C> moments(block_step.group, block_step.decision);
    SrklSums sums = {0., 0., 0};
    if (sizeof(C) == 8 && moves)
        sums.exponent = chunk_exponent(
            len, [&](int at) { return (double)momentum(part, g, block_step.group, moments, start, at); });
    const double scale = pow2(-(int)sums.exponent);
    const int width = lane_count(len);
    for (int l = threadIdx.x; l < width; l += SRKL_THREADS) lanes.sum2[l] = 0.;
    for (int at = threadIdx.x; at < len; at += SRKL_THREADS) {
        const C x = moves ? momentum(part, g, block_step.group, moments, start, at) : (C)0;
        const double stored = __dmul_rn(store_rounded(block.orthogonal, start + at, x), scale);
        double *lane = &lanes.sum2[at % SRKL_LANES];
        *lane = __dadd_rn(*lane, __dmul_rn(stored, stored));
    }
    sums.sum2 = tree(lanes.sum2, width);
    // `fold` takes sums of fourth powers of 0 for sums of nothing.
    sums.sum4 = sums.sum2;
    return sums;
}

extern "C" __global__ void __launch_bounds__(SRKL_THREADS)
    srkl_momentum(const SrklTable table, const SrklMatrices matrices) {
    __shared__ Lanes lanes;
    __shared__ BlockStep block_step;
    __shared__ SrklMatrix matrix;
    __shared__ SrklBlock block;
    __shared__ SrklGradient gradient;
    __shared__ SrklChunk of_matrix;
    __shared__ bool moves, last;
    SrklSums *of_chunks = (SrklSums *)matrices.chunk_sums;
    for (u64 chunk = blockIdx.x; chunk < matrices.chunk_count; chunk += gridDim.x) {
        if (threadIdx.x == 0) {
            of_matrix = ((const SrklChunk *)matrices.chunks)[chunk];
            matrix = ((const SrklMatrix *)matrices.matrices)[of_matrix.block];
            block = ((const SrklBlock *)table.blocks)[matrix.block];
            gradient = ((const SrklGradient *)table.gradients)[matrix.block];
            block_step.group = ((const SrklGroup *)table.groups)[block.group];
            block_step.decision = ((const SrklDecision *)table.decisions)[matrix.block];
            const bool found_inf = ((const SrklState *)table.state)->found_inf;
            moves = has_gradient(table, matrix.block) && block_step.decision.moves && !found_inf;
        }
        __syncthreads();
        const u64 left = matrix.n - of_matrix.start, start = matrix.start + of_matrix.start;
        const int len = left < SRKL_CHUNK ? (int)left : SRKL_CHUNK;
        const SrklSums sums =
            block.dtype == SRKL_F64
                ? write_momentum<double>(block, gradient, block_step, moves, start, len, lanes)
                : write_momentum<float>(block, gradient, block_step, moves, start, len, lanes);
        if (threadIdx.x == 0) {
            of_chunks[chunk] = sums;
            last = arrives_last(&((u32 *)matrices.chunks_done)[of_matrix.block], matrix.chunk_count);
        }
        __syncthreads();
        if (last) {
            const SrklSums *all = of_chunks + matrix.first_chunk;
            const SrklSums total = fold(
                matrix.chunk_count, [=](u64 i) { return read_sums(&all[i]); }, lanes);
            if (threadIdx.x == 0) ((SrklSums *)matrices.sums)[of_matrix.block] = total;
        }
        __syncthreads();
    }
}

// `x <- x / norm` for element `i` of a room; 0 stays 0.
template <typename T> __device__ inline void divide(const SrklGradient &room, u64 i, double norm) {
    T *x = (T *)room.address + i;
    const double quotient = __ddiv_rn((double)widen(*x), norm);
    Computed<T> rounded;
    from_f64(quotient, rounded);
    if (norm != 0.) narrow(rounded, *x);
}

extern "C" __global__ void __launch_bounds__(SRKL_THREADS)
    srkl_normalize(const SrklTable table, const SrklMatrices matrices) {
    for (u64 chunk = blockIdx.x; chunk < matrices.chunk_count; chunk += gridDim.x) {
        const SrklChunk part = ((const SrklChunk *)matrices.chunks)[chunk];
        const SrklMatrix matrix = ((const SrklMatrix *)matrices.matrices)[part.block];
        const SrklGradient room = ((const SrklBlock *)table.blocks)[matrix.block].orthogonal;
        const double norm = norm_of(((const SrklSums *)matrices.sums)[part.block], 1.);
        const u64 left = matrix.n - part.start, start = matrix.start + part.start;
        const int len = left < SRKL_CHUNK ? (int)left : SRKL_CHUNK;
        for (int at = threadIdx.x; at < len; at += SRKL_THREADS) {
            switch (room.dtype) {
            case SRKL_F32: divide<float>(room, start + at, norm); break;
            case SRKL_F64: divide<double>(room, start + at, norm); break;
            default: divide<bf16>(room, start + at, norm); break;
            }
        }
    }
}

// `y <- a y + b x` for element `i`.
template <typename T>
__device__ inline void combine(const SrklGradient &y, const SrklGradient &x, double a, double b, u64 i) {
    Computed<T> a1, b1;
    from_f64(a, a1);
    from_f64(b, b1);
    T *to = (T *)y.address + i;
    const Computed<T> term = mul(a1, widen(*to));
    narrow(mul_add(widen(((const T *)x.address)[i]), b1, term), *to);
}

// The same for `n` elements, two tensors of one dtype that don't overlap: f32, f64 or bf16. Any grid.
extern "C" __global__ void __launch_bounds__(SRKL_THREADS)
    srkl_combine(const SrklGradient y, const SrklGradient x, const u64 n, const double a, const double b) {
    const u64 first = (u64)blockIdx.x * SRKL_THREADS + threadIdx.x, stride = (u64)gridDim.x * SRKL_THREADS;
    for (u64 i = first; i < n; i += stride) {
        switch (y.dtype) {
        case SRKL_F32: combine<float>(y, x, a, b, i); break;
        case SRKL_F64: combine<double>(y, x, a, b, i); break;
        default: combine<bf16>(y, x, a, b, i); break;
        }
    }
}
