// One step of all parameters of a device: one launch, whatever their number.
//
// Launch contract of srkl_step, srkl_step_elements, srkl_step_measuring, srkl_step_packed and
// srkl_step_packed_measuring:
//   grid     any number of CTAs, one a chunk at most
//   block    SRKL_THREADS threads
//   shared   static
//   table    device addresses as abi.h describes them. Nothing overlaps; every `w` and `master` is
//            16-byte aligned, gradients may be misaligned
//   before   the first step `chunks_done`, `ready`, `statistics`, `decisions`, `skipped` and the state are
//            zero. Each step leaves `chunks_done`, and what abi.h says, at zero again
//   order    launches that share a table follow each other on one stream
//
// Each chunk is processed twice, for its statistics and for its update, and two counters hand chunks to CTAs.
// A CTA first takes a chunk to update. Until that chunk's block is decided (if anything needs all blocks:
// until all are), it does the statistics of other chunks. So an update follows the statistics of the same
// chunk as soon as it can, about as many chunks later as there are CTAs, while the gradient is still in L2. A
// block too large for L2 is updated from its end, the part that is still there.
//
// It can't deadlock, even without a cooperative launch: a CTA waits for a decision only when the statistics
// of all chunks that it needs have been taken by running CTAs. These finish them without waiting, and the one
// that finishes the last one decides.
//
// Bytes a parameter that memory moves: 12 for f32 where the gradient is still in L2, 16 where not; 12 and 14
// for bf16 with masters.
//
// Deterministic: a sum's shape depends on element and chunk numbers alone. Which CTA takes a
// chunk, or comes last, decides only who adds, not what is added in which order.
//
// The stages are those that src/backend/mod.rs lists.

#include "curvature.cuh"
#include "dropout.cuh"
#include "gather.cuh"
#include "orthogonal.cuh"
#include "packed.cuh"
#include "replace.cuh"
#include "statistics.cuh"
#include "update.cuh"

#define NO_CHUNK (~0ull)
#define NO_BLOCK (~0ull)

// While a block is not decided, statistics of up to this many chunks behind it may be done: the work of some
// dozen microseconds, but little in L2. None if the block's updates will sweep L2.
#define AHEAD 128

// What the threads of a CTA share.
struct Work {
    SrklScalars scalars;
    u64 stage; // of the chunk that is worked on, or 0: all is done
    u64 chunk; // its number
    u64 start; // its first element
    u64 b;     // the number of its block
    SrklBlock block;
    SrklGradient gradient;
    BlockStep block_step;
    Keys keys;
    u64 pending;   // the chunk to update next, or NO_CHUNK
    u64 needs;     // statistics of chunks up to this number are worth doing meanwhile
    u64 pending_b; // its block
    bool reset_master;
    bool last;
};

// The flag that block `b` is decided: one of its own, or one for all.
__device__ inline u32 *ready_flag(const SrklTable &table, const Work &work, u64 b) {
    return &((u32 *)table.ready)[work.scalars.after_all ? 0 : b];
}

__device__ inline bool is_ready(const SrklTable &table, const Work &work, u64 b) {
    if (!(table.stages & SRKL_DECIDE)) return true;
    return *(volatile const u32 *)ready_flag(table, work, b) != 0;
}

__device__ inline void wait_until_ready(const SrklTable &table, const Work &work, u64 b) {
    while (!is_ready(table, work, b)) {
        // Polled every half microsecond, with short sleeps.
#pragma unroll 1
        for (int i = 0; i < 16; i++) __nanosleep(32);
    }
}

// Takes the next chunk to update, if there is one left.
__device__ inline void take_pending(const SrklTable &table, Work &work) {
    u64 chunk = atomicAdd(&((SrklState *)table.state)->next_update, 1ull);
    if (chunk >= table.chunk_count) return;
    const SrklChunk *chunks = (const SrklChunk *)table.chunks;
    work.needs = table.chunk_count;
    if (work.scalars.after_all) {
        chunk = table.chunk_count - 1 - chunk;
    } else {
        const SrklBlock &block = ((const SrklBlock *)table.blocks)[chunks[chunk].block];
        work.needs = block.first_chunk + block.chunk_count + (block.from_end ? 0 : AHEAD);
        if (block.from_end) chunk = 2 * block.first_chunk + block.chunk_count - 1 - chunk;
    }
    work.pending = chunk;
    work.pending_b = chunks[chunk].block;
}

// Sets `work` to a chunk.
__device__ inline void take(const SrklTable &table, Work &work, u64 stage, u64 chunk) {
    const SrklChunk part = ((const SrklChunk *)table.chunks)[chunk];
    work.stage = stage;
    work.chunk = chunk;
    work.start = part.start;
    // Mostly the block of the chunk before.
    if (part.block == work.b) return;
    work.b = part.block;
    work.block = ((const SrklBlock *)table.blocks)[part.block];
    work.gradient = ((const SrklGradient *)table.gradients)[part.block];
}

// Loads what an update needs besides its chunk.
template <bool ELEMENTS, bool PACKED>
__device__ inline void take_decision(const SrklTable &table, Work &work) {
    work.block_step.group = ((const SrklGroup *)table.groups)[work.block.group];
    work.block_step.matrix_scale = work.block.matrix_scale;
    if (ELEMENTS) work.block_step.row_curvature(((const SrklEstimate *)table.estimates)[work.b]);
    // May have been written in this launch: bypasses L1.
    const SrklDecision *decision = &((const SrklDecision *)table.decisions)[work.b];
    work.block_step.decision.grad_factor = __ldcg(&decision->grad_factor);
    work.block_step.decision.phi = __ldcg(&decision->phi);
    work.block_step.decision.scale_m = __ldcg(&decision->scale_m);
    work.block_step.decision.scale_v = __ldcg(&decision->scale_v);
    if (ELEMENTS) work.block_step.decision.ahead = __ldcg(&decision->ahead);
    work.block_step.decision.average = __ldcg(&decision->average);
    work.block_step.decision.moves = __ldcg(&decision->moves);
    work.reset_master = __ldcg(&((const SrklStatistics *)table.statistics)[work.b].reset_master);
    if (table.stages & SRKL_COUNT) {
        const bool found_inf = __ldcg(&((const SrklState *)table.state)->found_inf);
        if (found_inf) work.block_step.decision.moves = 0;
    }
    if (PACKED && is_packed(work.block, work.block_step.group)) {
        const bool counts = table.stages & SRKL_COUNT;
        work.keys.set(counts ? ((const SrklState *)table.state)->steps : table.steps, work.block.place);
    }
}

// Chooses what to do next, by one thread.
template <bool ELEMENTS, bool PACKED> __device__ inline void choose(const SrklTable &table, Work &work) {
    const bool updates = table.stages & SRKL_UPDATE;
    if (updates && work.pending == NO_CHUNK) take_pending(table, work);
    const bool has_pending = work.pending != NO_CHUNK;
    if (!has_pending || !is_ready(table, work, work.pending_b)) {
        const volatile u64 *next = &((const SrklState *)table.state)->next_statistics;
        if ((table.stages & SRKL_STATISTICS) && (!has_pending || *next < work.needs)) {
            const u64 chunk = atomicAdd(&((SrklState *)table.state)->next_statistics, 1ull);
            if (chunk < table.chunk_count) return take(table, work, SRKL_STATISTICS, chunk);
        }
        work.stage = 0;
        if (!has_pending) return;
        wait_until_ready(table, work, work.pending_b);
    }
    __threadfence();
    take(table, work, SRKL_UPDATE, work.pending);
    take_decision<ELEMENTS, PACKED>(table, work);
    work.pending = NO_CHUNK;
}

// Stage 2 if it needs all blocks: by the CTA that has finished the last one.
__device__ inline void decide_all(const SrklTable &table, const Work &work, Lanes &lanes) {
    const SrklScalars &scalars = work.scalars;
    const SrklStatistics *statistics = (const SrklStatistics *)table.statistics;
    const SrklSums total = total_sums(table, scalars, lanes);
    for (u64 b = thread_number(); b < table.block_count; b += SRKL_THREADS)
        decide_block(table, scalars, b, read_sums(&statistics[b].sums), total);
    if (threadIdx.x == 0)
        ((SrklState *)table.state)->grad_norm = norm_of(total, __ddiv_rn(1., scalars.grad_scale));
    __threadfence();
    __syncthreads();
}

// Stage 1 of a chunk. The CTA that finishes the last chunk of a block adds up the block, and decides.
__device__ inline void run_statistics(const SrklTable &table, Work &work, int len, Lanes &lanes) {
    const SrklBlock &block = work.block;
    SrklSums *of_chunks = (SrklSums *)table.chunk_sums;
    SrklSums sums = {0., 0., 0};
    if (work.gradient.address != 0)
        sums = chunk_sums(work.gradient, block.dtype, work.start, len, block.n,
                          work.scalars.norm || (table.stages & SRKL_RECORD), lanes);
    if (threadIdx.x == 0) {
        of_chunks[work.chunk] = sums;
        work.last = arrives_last(&((u32 *)table.chunks_done)[work.b], block.chunk_count);
    }
    __syncthreads();
    if (!work.last) return;

    const SrklStatistics found = block_statistics(block, of_chunks, lanes);
    const bool decides = table.stages & SRKL_DECIDE;
    const SrklScalars &scalars = work.scalars;
    __syncthreads();
    if (threadIdx.x == 0) {
        ((SrklStatistics *)table.statistics)[work.b] = found;
        if (decides && !scalars.total) {
            const SrklSums none = {0., 0., 0};
            decide_block(table, scalars, work.b, found.sums, none);
        }
        // If updates wait for all blocks, the last one sets the flag.
        work.last = true;
        if (scalars.after_all)
            work.last = arrives_last(&((SrklState *)table.state)->blocks_done, table.live_count);
    }
    __syncthreads();
    if (!work.last || !decides) return;
    if (scalars.total) decide_all(table, work, lanes);
    if (threadIdx.x == 0) {
        __threadfence();
        atomicExch(ready_flag(table, work, work.b), 1);
    }
}

// Counts the step of block `b`: stores the products of decays after it, if it moved. Its decision may have
// been written in this launch: bypasses L1.
__device__ inline void count_block(const SrklTable &table, u64 b) {
    const SrklDecision *decision = &((const SrklDecision *)table.decisions)[b];
    SrklPowers *powers = &((SrklPowers *)table.powers)[b];
    if (!__ldcg(&decision->moves)) {
        if (has_gradient(table, b)) ((u64 *)table.skipped)[b]++;
        return;
    }
    powers->first = __ldcg(&decision->powers.first);
    powers->second = __ldcg(&decision->powers.second);
    powers->average = __ldcg(&decision->powers.average);
}

// The last CTA to leave counts the step and makes the table ready for the next one.
__device__ inline void leave(const SrklTable &table, Work &work) {
    SrklState *state = (SrklState *)table.state;
    if (threadIdx.x == 0) work.last = arrives_last(&state->ctas_left, gridDim.x);
    __syncthreads();
    if (!work.last) return;
    const u64 flags = work.scalars.after_all ? 1 : table.block_count;
    for (u64 b = thread_number(); b < flags; b += SRKL_THREADS) ((u32 *)table.ready)[b] = 0;
    if (table.stages & SRKL_COUNT)
        for (u64 b = thread_number(); b < table.block_count; b += SRKL_THREADS)
            if (!state->found_inf) count_block(table, b);
    __syncthreads();
    if (threadIdx.x == 0) {
        state->next_statistics = 0;
        state->next_update = 0;
        if (table.stages & SRKL_COUNT) {
            const bool skipped = state->found_inf;
            *(skipped ? &state->skipped_steps : &state->steps) += 1;
            state->skipped = skipped;
            state->found_inf = 0;
            state->has_norm = work.scalars.norm;
            state->recorded = (table.stages & SRKL_RECORD) != 0;
            state->grad_scale = work.scalars.grad_scale;
        }
    }
}

// Adds up what the update of a chunk has left in the lanes. The CTA that finishes the last chunk of a block
// adds up the block.
__device__ inline void add_up_step(const SrklTable &table, Work &work, Lanes &lanes) {
    const SrklBlock &block = work.block;
    SrklPair *of_chunks = (SrklPair *)table.chunk_pairs;
    SrklPair sums = tree_pair(lanes, SRKL_LANES);
    if (threadIdx.x == 0) {
        of_chunks[work.chunk] = sums;
        work.last = arrives_last(&((u32 *)table.chunks_done)[work.b], block.chunk_count);
    }
    __syncthreads();
    if (!work.last) return;
    const SrklPair *first = of_chunks + block.first_chunk;
    sums = fold_pairs(
        block.chunk_count, [=](u64 i) { return read_pair(&first[i]); }, lanes);
    if (threadIdx.x == 0) {
        SrklStepSums *step = &((SrklStepSums *)table.step_sums)[work.b];
        const double scale = __dmul_rn(direction_scale(work.block_step), momentum_scale(work.block_step));
        step->step = sums.a;
        // If the host decides, it scales sums too.
        step->along = table.stages & SRKL_COUNT ? __dmul_rn(sums.b, scale) : sums.b;
    }
}

template <bool ELEMENTS, bool MEASURES, bool PACKED>
__device__ __forceinline__ void step(const SrklTable &table, Lanes &lanes, Work &work) {
    if (threadIdx.x == 0) {
        work.scalars = *(const SrklScalars *)table.scalars;
        work.pending = NO_CHUNK;
        work.b = NO_BLOCK;
    }
    for (;;) {
        if (threadIdx.x == 0) choose<ELEMENTS, PACKED>(table, work);
        __syncthreads();
        if (work.stage == 0) break;
        const u64 left = work.block.n - work.start;
        const int len = left < SRKL_CHUNK ? (int)left : SRKL_CHUNK;
        if (work.stage == SRKL_STATISTICS) {
            run_statistics(table, work, len, lanes);
        } else if (work.block_step.decision.moves) {
            double *strips = (double *)table.strips;
            if (strips != 0) strips += work.chunk * (SRKL_CHUNK / SRKL_STRIP);
            if (PACKED && is_packed(work.block, work.block_step.group))
                update_packed<MEASURES>(work.block, work.keys, work.gradient, work.start, len,
                                        work.reset_master, work.block_step, lanes, strips);
            else
                update<ELEMENTS, MEASURES>(work.block, work.gradient, work.start, len, work.reset_master,
                                           work.block_step, lanes, strips);
            if (MEASURES) add_up_step(table, work, lanes);
        }
        __syncthreads();
    }
    leave(table, work);
}

extern "C" __global__ void __launch_bounds__(SRKL_THREADS, SRKL_CTAS_PER_SM)
    srkl_step(const SrklTable table) {
    __shared__ Lanes lanes;
    __shared__ Work work;
    step<false, false, false>(table, lanes, work);
}

// The same for all directions, cautious ones, and settings where elements have their own brakes. Three CTAs
// less for each multiprocessor leave registers enough not to spill.
extern "C" __global__ void __launch_bounds__(SRKL_THREADS, SRKL_CTAS_PER_SM - 3)
    srkl_step_elements(const SrklTable table) {
    __shared__ Lanes lanes;
    __shared__ Work work;
    step<true, false, false>(table, lanes, work);
}

// The same for a step that measures the curvature along it, or records norms, with any brakes. One CTA less
// for each multiprocessor leaves registers enough not to spill.
extern "C" __global__ void __launch_bounds__(SRKL_THREADS, SRKL_CTAS_PER_SM - 1)
    srkl_step_measuring(const SrklTable table) {
    __shared__ Lanes lanes;
    __shared__ Work work;
    step<true, true, false>(table, lanes, work);
}

// srkl_step where some state is packed, or some parameters are rounded at random. Two CTAs less for each
// multiprocessor leave registers enough for 8 elements a thread.
extern "C" __global__ void __launch_bounds__(SRKL_THREADS, SRKL_CTAS_PER_SM - 2)
    srkl_step_packed(const SrklTable table) {
    __shared__ Lanes lanes;
    __shared__ Work work;
    step<false, false, true>(table, lanes, work);
}

// srkl_step_measuring likewise, and srkl_step_elements; of two CTAs less again.
extern "C" __global__ void __launch_bounds__(SRKL_THREADS, SRKL_CTAS_PER_SM - 4)
    srkl_step_packed_measuring(const SrklTable table) {
    __shared__ Lanes lanes;
    __shared__ Work work;
    step<true, true, true>(table, lanes, work);
}

// Stage 2 alone, where neither curvature nor policy needs statistics: a thread a block, any grid. It looks
// for overwritten masters.
extern "C" __global__ void __launch_bounds__(SRKL_THREADS) srkl_decide(const SrklTable table) {
    const SrklScalars scalars = *(const SrklScalars *)table.scalars;
    const SrklSums none = {0., 0., 0};
    const u64 first = (u64)blockIdx.x * SRKL_THREADS + threadIdx.x, stride = (u64)gridDim.x * SRKL_THREADS;
    for (u64 b = first; b < table.block_count; b += stride) {
        const SrklBlock &block = ((const SrklBlock *)table.blocks)[b];
        bool reset = false;
        for (u64 k = 0; block.master != 0 && k < SRKL_MASTER_SAMPLES; k++) reset |= overwritten(block, k);
        ((SrklStatistics *)table.statistics)[b].reset_master = reset;
        decide_block(table, scalars, b, none, none);
    }
}

// Writes the scalars: one thread. A launch, whose argument may change as soon as it returns; a copy would
// need memory that stays.
extern "C" __global__ void srkl_set(const SrklTable table, const SrklScalars scalars) {
    *(SrklScalars *)table.scalars = scalars;
}
