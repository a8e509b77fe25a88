// Replaces parameters by other values for a while, and restores them, bit for bit.
//
// Launch contract of srkl_replace:
//   grid     any number of CTAs, one a chunk at most
//   block    SRKL_THREADS threads
//   shared   none
//   table    as srkl_step has it. SRKL_PERTURB and SRKL_SWAP write `backup`; SRKL_RESTORE_PERTURBED and
//            SRKL_RESTORE_SWAPPED read it. SRKL_PERTURB comes after SRKL_SUM_SQUARES, and `gradients` stay
//            as they are until perturbed parameters are restored
//
// Bytes a parameter in f32: 12 to perturb, 16 to swap, 8 to restore.
#pragma once

#include "update.cuh"

template <typename P, typename C>
__device__ inline void replace(const SrklTable &table, u32 what, u64 seed, u64 draw, const SrklBlock &block,
                               u64 b, u64 start, int len) {
    const Part<P, C> part(block, start);
    P *backup = (P *)block.backup + start;
    const double size = ((const SrklState *)table.state)->probe_size;
    const bool stepped = ((const SrklPowers *)table.powers)[b].average != 1.;
    C by;
    from_f64(size, by);
    for (int at = threadIdx.x; at < len; at += SRKL_THREADS) {
        const u64 i = start + at;
        if (what == SRKL_RESTORE_PERTURBED || what == SRKL_RESTORE_SWAPPED) {
            part.w()[at] = backup[at];
            continue;
        }
        backup[at] = part.w()[at];
        if (what == SRKL_PERTURB) {
            // `w <- w + size * z`
            u64 bits = random_bits(seed, draw, block.place, (block.first + i) / 64);
            C w = (C)widen(part.w()[at]);
            narrow(canonical(add(w, bits >> (i % 64) & 1 ? -by : by)), part.w()[at]);
        } else if (block.average != 0 && stepped) {
            narrow(part.load_average(at), part.w()[at]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(SRKL_THREADS)
    srkl_replace(const SrklTable table, const u32 what, const u64 seed, const u64 draw) {
    for (u64 chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
        const SrklChunk part = ((const SrklChunk *)table.chunks)[chunk];
        const SrklBlock block = ((const SrklBlock *)table.blocks)[part.block];
        const u64 b = part.block, left = block.n - part.start;
        const bool perturbed = what == SRKL_PERTURB || what == SRKL_RESTORE_PERTURBED;
        if (perturbed && !has_gradient(table, b)) continue;
        const int len = left < SRKL_CHUNK ? (int)left : SRKL_CHUNK;
        switch (block.dtype) {
        case SRKL_F32: replace<float, float>(table, what, seed, draw, block, b, part.start, len); break;
        case SRKL_F64: replace<double, double>(table, what, seed, draw, block, b, part.start, len); break;
        case SRKL_BF16: replace<bf16, float>(table, what, seed, draw, block, b, part.start, len); break;
        default: replace<f16, float>(table, what, seed, draw, block, b, part.start, len); break;
        }
    }
}
