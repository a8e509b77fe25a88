// Ranks with sharded state: from the sums of all chunks, wherever they are stepped, to decisions.
//
// Launch contract of srkl_gather:
//   grid     any number of CTAs
//   block    SRKL_THREADS threads
//   shared   static
//   table    as srkl_step has it; all ranks have the same `all_sums`, `all_pairs` and `all_statistics`
//   before   what has made these: statistics, the update or the sums of the kind `what`
//   order    on the stream of all
//
// Each CTA adds up some blocks; the one that has added up the last one decides. Reads 24 or 16 bytes a chunk.
#pragma once

#include "curvature.cuh"

// Stores the statistics of a block, by one thread: its masters are reset if any rank has found them
// overwritten.
__device__ inline void store_statistics(const SrklTable &table, u64 b, const SrklSums &sums) {
    SrklStatistics found = {sums, 0};
    for (u64 rank = 0; rank < table.world_size; rank++)
        found.reset_master |=
            ((const SrklStatistics *)table.all_statistics)[rank * table.block_count + b].reset_master;
    // Where nothing is stepped here nobody would write it anew.
    if (((const SrklBlock *)table.blocks)[b].chunk_count == 0) found.reset_master = 0;
    ((SrklStatistics *)table.statistics)[b] = found;
}

// Stores the sums of pairs of a block where `finish`, a measurement or telemetry looks for them, by one
// thread.
__device__ inline void store_pair(const SrklTable &table, u32 what, u64 b, SrklPair sums,
                                  BlockStep &block_step) {
    const SrklBlock &block = ((const SrklBlock *)table.blocks)[b];
    SrklStepSums &step = ((SrklStepSums *)table.step_sums)[b];
    block_step.group = ((const SrklGroup *)table.groups)[block.group];
    block_step.decision = ((const SrklDecision *)table.decisions)[b];
    block_step.matrix_scale = block.matrix_scale;
    const double scale = direction_scale(block_step);
    if (what == SRKL_SUM_UPDATE) {
        step.step = sums.a;
        step.along = __dmul_rn(sums.b, __dmul_rn(scale, momentum_scale(block_step)));
        return;
    }
    if (what == SRKL_SUM_DIRECTIONS || what == SRKL_SUM_MEASURING)
        sums.a = __dmul_rn(sums.a, __dmul_rn(scale, scale));
    if (what == SRKL_SUM_MEASURING) step.direction = sums.a;
    ((SrklPair *)table.pairs)[b] = sums;
}

extern "C" __global__ void __launch_bounds__(SRKL_THREADS, 4)
    srkl_gather(const SrklTable table, const u32 what, const double delta) {
    __shared__ Lanes lanes;
    __shared__ BlockStep block_step;
    __shared__ bool last;
    const SrklScalars scalars = *(const SrklScalars *)table.scalars;
    const SrklSums *sums = (const SrklSums *)table.all_sums;
    const SrklPair *pairs = (const SrklPair *)table.all_pairs;
    SrklState *state = (SrklState *)table.state;
    for (u64 b = blockIdx.x; b < table.block_count; b += gridDim.x) {
        const SrklBlock &block = ((const SrklBlock *)table.blocks)[b];
        // Where the sums of its chunks are among those of all ranks.
        const u64 *place = (const u64 *)table.order + block.all_first;
        if (what == SRKL_STATISTICS_OF_ALL) {
            const SrklSums found = fold(
                block.all_count, [=](u64 i) { return read_sums(&sums[place[i]]); }, lanes);
            if (threadIdx.x == 0) store_statistics(table, b, found);
        } else {
            const SrklPair found = fold_pairs(
                block.all_count, [=](u64 i) { return read_pair(&pairs[place[i]]); }, lanes);
            if (threadIdx.x == 0) store_pair(table, what, b, found, block_step);
        }
        if (threadIdx.x == 0) last = arrives_last(&state->blocks_done, table.block_count);
        __syncthreads();
        if (last && what == SRKL_STATISTICS_OF_ALL) {
            SrklSums total = {0., 0., 0};
            if (scalars.total) total = total_sums(table, scalars, lanes);
            const SrklStatistics *statistics = (const SrklStatistics *)table.statistics;
            for (u64 each = thread_number(); each < table.block_count; each += SRKL_THREADS)
                decide_block(table, scalars, each, read_sums(&statistics[each].sums), total);
            if (threadIdx.x == 0 && scalars.total)
                state->grad_norm = norm_of(total, __ddiv_rn(1., scalars.grad_scale));
        } else if (last && what != SRKL_SUM_UPDATE && what != SRKL_SUM_PARAMETERS) {
            finish(table, what, delta, lanes);
        }
        __syncthreads();
    }
}
