// One step of all parameters of a device: one launch, whatever their number.
//
// Launch contract of srkl_step:
//   grid     any number of blocks of threads; enough to fill the device, one an item at most
//   block    SRKL_THREADS threads
//   shared   static
//   table    device addresses as abi.h describes them. Nothing overlaps; every `w` and `master` is
//            16-byte aligned, gradients may be misaligned
//   before   the first step all counters, `statistics`, `decisions` and `skipped` are zero. Each step
//            leaves `chunks_done`, `blocks_done`, `ready` and the fields of SrklState that say so at
//            zero again
//   order    steps that share a table follow each other on one stream
//   items    of a run: a STATISTICS item of each of its chunks, later in the list an UPDATE item of each
//
// Work is a list of items, claimed in order by an atomic ticket. An update waits for the decisions about
// its run. That can't deadlock, without a cooperative launch: statistics wait for nothing; those of a run
// stand in the list before its updates, so when an update waits they have all been claimed, by blocks of
// threads that run and will finish them; whoever finishes the last one decides.
//
// The order of the list is for L2: updates soon follow the statistics of the same chunks, whose gradients
// are then still there. Bytes a parameter that memory moves: 12 for f32 where they are, 16 where not; for
// bf16 with masters 12 and 14.
//
// Deterministic: a sum's shape depends on element and chunk numbers alone. Which block of threads takes a
// chunk, or comes last, decides only who adds, not what is added in which order.
//
// Names and order of the stages are those of src/backend/cpu.rs.

#include "decide.cuh"
#include "statistics.cuh"
#include "update.cuh"

// What the threads of a block share of an item.
struct Work {
    SrklItem item;
    SrklBlock block;
    SrklGradient gradient;
    SrklDecision decision;
    SrklGroup group;
    SrklScalars scalars;
    u64 ticket;
    bool take_parameter;
    bool last;
};

// Whether this thread's block is the last of `count` to arrive at a counter, which is then zero again.
// What those before it wrote is seen by it.
__device__ inline bool arrives_last(u32 *counter, u64 count) {
    __threadfence();
    bool last = atomicInc(counter, (u32)(count - 1)) == (u32)(count - 1);
    __threadfence();
    return last;
}

// Whether every decision of a run is there.
__device__ inline void wait_for(const u32 *ready) {
    while (*(volatile const u32 *)ready == 0) {
#if __CUDA_ARCH__ >= 700
        __nanosleep(100);
#endif
    }
    __threadfence();
}

// Takes the next item, and loads what its stage needs of it, by one thread.
__device__ inline void claim(const SrklTable &table, Work &work) {
    work.ticket = atomicAdd(&((SrklState *)table.state)->ticket, 1ull);
    if (work.ticket >= table.item_count) return;
    const SrklItem item = ((const SrklItem *)table.items)[work.ticket];
    work.item = item;
    work.block = ((const SrklBlock *)table.blocks)[item.block];
    work.gradient = ((const SrklGradient *)table.gradients)[item.block];
    if (item.stage == SRKL_UPDATE) {
        work.group = ((const SrklGroup *)table.groups)[work.block.group];
        if (table.decide) wait_for(&((const u32 *)table.ready)[item.run]);
        // Written in this launch: past L1.
        const SrklDecision *decision = &((const SrklDecision *)table.decisions)[item.block];
        work.decision.c = __ldcg(&decision->c);
        work.decision.curvature = __ldcg(&decision->curvature);
        work.decision.phi = __ldcg(&decision->phi);
        work.decision.step = __ldcg(&decision->step);
        const SrklStatistics *found = &((const SrklStatistics *)table.statistics)[item.block];
        work.take_parameter = __ldcg(&found->take_parameter);
        const bool skip_step = __ldcg(&((const SrklState *)table.state)->refused);
        if (table.decide && item.start == 0 && work.gradient.address != 0 && !work.decision.step &&
            !skip_step)
            ((u64 *)table.skipped)[item.block]++;
        if (skip_step) work.decision.step = 0;
    }
}

// Stages 1 and 2 of a run whose blocks are all done: what needs all of them.
__device__ inline void finish_run(const SrklTable &table, const SrklScalars &scalars, u32 run, Lanes &lanes) {
    if (scalars.total) {
        const SrklStatistics *statistics = (const SrklStatistics *)table.statistics;
        const SrklSums total = total_sums(table, scalars, lanes);
        for (u64 b = threadIdx.x; b < table.block_count; b += SRKL_THREADS)
            decide_block(table, scalars, b, read_sums(&statistics[b].sums), total);
        if (threadIdx.x == 0)
            ((SrklState *)table.state)->grad_norm = norm_of(total, __ddiv_rn(1., scalars.grad_scale));
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(&((u32 *)table.ready)[run], 1);
}

// The statistics of a chunk. Who finishes the last chunk of a block adds up the block, and who finishes
// the last block of a run decides.
__device__ inline void run_statistics(const SrklTable &table, Work &work, int len, Lanes &lanes) {
    const SrklItem item = work.item;
    const SrklBlock block = work.block;
    SrklSums *of_chunks = (SrklSums *)table.chunk_sums;
    SrklSums sums = {0., 0., 0};
    if (work.gradient.address != 0)
        sums = chunk_sums(work.gradient, block.dtype, item.start, len, block.n, work.scalars.norm, lanes);
    if (threadIdx.x == 0) {
        of_chunks[item.chunk] = sums;
        work.last = arrives_last(&((u32 *)table.chunks_done)[item.block], block.chunk_count);
    }
    __syncthreads();
    if (!work.last) return;

    const SrklStatistics found = block_statistics(block, of_chunks, lanes);
    __syncthreads();
    if (threadIdx.x == 0) {
        ((SrklStatistics *)table.statistics)[item.block] = found;
        if (table.decide && !work.scalars.total) {
            const SrklSums none = {0., 0., 0};
            decide_block(table, work.scalars, item.block, found.sums, none);
        }
        work.last = arrives_last(&((u32 *)table.blocks_done)[item.run], item.run_blocks);
    }
    __syncthreads();
    if (work.last && table.decide) finish_run(table, work.scalars, item.run, lanes);
}

// The last block of threads to leave counts the step and makes the table ready for the next one.
__device__ inline void leave(const SrklTable &table, Work &work) {
    SrklState *state = (SrklState *)table.state;
    if (threadIdx.x == 0) work.last = arrives_last(&state->left, gridDim.x);
    __syncthreads();
    if (!work.last) return;
    for (u64 run = threadIdx.x; run < work.scalars.run_count; run += SRKL_THREADS)
        ((u32 *)table.ready)[run] = 0;
    if (threadIdx.x == 0) {
        state->ticket = 0;
        if (table.decide) {
            const bool skipped = state->refused;
            *(skipped ? &state->skipped_steps : &state->steps) += 1;
            state->skipped = skipped;
            state->refused = 0;
            state->has_norm = work.scalars.norm;
        }
    }
}

extern "C" __global__ void __launch_bounds__(SRKL_THREADS, SRKL_BLOCKS_PER_SM)
    srkl_step(const SrklTable table) {
    __shared__ Lanes lanes;
    __shared__ Work work;
    if (threadIdx.x == 0) work.scalars = *(const SrklScalars *)table.scalars;
    for (;;) {
        if (threadIdx.x == 0) claim(table, work);
        __syncthreads();
        if (work.ticket >= table.item_count) break;
        const u64 start = work.item.start, left = work.block.n - start;
        const int len = left < SRKL_CHUNK ? (int)left : SRKL_CHUNK;
        if (work.item.stage == SRKL_STATISTICS)
            run_statistics(table, work, len, lanes);
        else if (work.decision.step)
            update(work.block, work.gradient, start, len, work.take_parameter, work.decision, work.group,
                   work.scalars.schedule);
        __syncthreads();
    }
    leave(table, work);
}

// Writes the scalars: one thread. A launch, since its argument may change as soon as it returns, while a
// copy needs memory that stays.
extern "C" __global__ void srkl_set(const SrklTable table, const SrklScalars scalars) {
    *(SrklScalars *)table.scalars = scalars;
}
