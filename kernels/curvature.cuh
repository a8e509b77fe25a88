// Sums over directions and over changes of gradients: for small steps, the trust clip, and measured
// curvature.
//
// Launch contract of srkl_sums:
//   grid     any number of CTAs, one a chunk at most
//   block    SRKL_THREADS threads
//   shared   static
//   table    as srkl_step has it. SRKL_SUM_DIRECTIONS and SRKL_SUM_MEASURING come between the launch that
//            decides and the one that updates; SRKL_SUM_MEASURING leaves `direction` in `step_sums`.
//            SRKL_SUM_STEP, SRKL_SUM_PROBE and SRKL_SUM_AVERAGE read the first gradients of the last step, or
//            of the next one, from `gradients`, the second ones from `again`, and SRKL_SUM_STEP also
//            `step_sums`. SRKL_SUM_AVERAGE follows SRKL_SUM_PROBE
//   order    launches that share a table follow each other on one stream
//
//            With SRKL_DECIDE the device itself uses the sums of all blocks. Without it the host reads
//            `pairs`, which are zero before the first launch, and sends `decisions`, `powers`, `estimates`
//            and the state before the launches that need them
//
// No CTA waits: the one that finishes a block's last chunk adds up the block, and the one that adds up the
// last block uses the sums of all (`finish`). Every access of a warp is to neighbouring elements.
//
// Bytes a parameter in f32: directions 8, 12 with momentum, 16 with Adam; curvature along the step 8; product
// with the Hessian 8, and 16 for its average.
//
// The formulas that use the sums are in rule.cuh.
#pragma once

#include "decide.cuh"
#include "update.cuh"

// The terms of both sums, of one element. P is the parameter's type, C its compute type.
template <typename P, typename C>
__device__ inline SrklPair terms(const SrklTable &table, u32 what, u64 b, const SrklBlock &block,
                                 const Part<P, C> &part, const BlockStep &block_step,
                                 const Coefficients<C> &k, u64 start, int at) {
    const u32 direction = block_step.group.direction;
    SrklPair pair = {0., 0.};
    if (what == SRKL_SUM_SQUARES || what == SRKL_SUM_PARAMETERS) {
        double w = (double)widen(part.w()[at]);
        pair.a = __dmul_rn(w, w);
        return pair;
    }
    const SrklGradient first = ((const SrklGradient *)table.gradients)[b];
    C g;
    from_f64(load_one(first, start + at), g);
    if (what == SRKL_SUM_DIRECTIONS || what == SRKL_SUM_MEASURING) {
        C d = g;
        if (direction == SRKL_MUON)
            from_f64(load_one(block.orthogonal, start + at), d);
        else if (direction == SRKL_LION)
            d = sign(k.moments.look_ahead(part.load_m(at), g));
        else if (direction != SRKL_GRADIENT)
            d = k.moments.first_moment(part.load_m(at), g);
        if (direction == SRKL_NESTEROV || direction == SRKL_NESTEROV_ADAM) d = k.moments.look_ahead(d, g);
        if (has_second_moment(direction)) {
            C v = k.moments.second_moment(part.load_v(at), g);
            if (direction == SRKL_AMSGRAD) v = k.moments.largest(part.v_max().load_one(at), v);
            d = div(d, k.moments.denom(v));
        }
        if (block_step.group.cautious) d = cautious(d, g);
        double a = (double)d, w = (double)widen(part.w()[at]);
        if (has_element_brakes(block_step.group)) {
            double q = part.q() ? (double)part.q().load_one(at) : 0.;
            double phi = element_phi(block_step, (double)g, q);
            a = __dmul_rn(a, phi);
        }
        pair.a = __dmul_rn(a, a);
        pair.b = __dmul_rn(w, w);
        return pair;
    }
    C g2;
    from_f64(load_one(((const SrklGradient *)table.again)[b], start + at), g2);
    double change = __dmul_rn(block_step.decision.grad_factor, __dsub_rn((double)g2, (double)g));
    double product = __ddiv_rn(change, ((const SrklState *)table.state)->probe_size);
    // Rounded to the type of `q`.
    C square;
    from_f64(__dmul_rn(product, product), square);
    pair.a = (double)square;
    // Not finite where the first gradient isn't.
    pair.b = __dmul_rn((double)g, (double)g);
    return pair;
}

// The sums over elements `start..start + len` of a block, one chunk.
template <typename P, typename C>
__device__ inline SrklPair chunk_pair(const SrklTable &table, u32 what, u64 b, const SrklBlock &block,
                                      const BlockStep &block_step, u64 start, int len, Lanes &lanes) {
    const SrklGroup &group = block_step.group;
    const Coefficients<C> k(block_step);
    const Part<P, C> part(block, start);
    const int width = lane_count(len);
    for (int l = threadIdx.x; l < width; l += SRKL_THREADS) {
        double a = 0., b2 = 0.;
        for (int at = l; at < len; at += SRKL_LANES) {
            SrklPair pair = terms(table, what, b, block, part, block_step, k, start, at);
            if (what == SRKL_SUM_AVERAGE) {
                // `q <- decay q + (1 - decay) (H z)^2`
                double kept = __dmul_rn(group.decay, (double)part.q().load_one(at));
                C q;
                from_f64(__dadd_rn(kept, __dmul_rn(__dsub_rn(1., group.decay), pair.a)), q);
                part.q().store_one(at, q);
                pair.a = (double)q;
                pair.b = 0.;
            }
            a = __dadd_rn(a, pair.a);
            b2 = __dadd_rn(b2, pair.b);
        }
        lanes.sum2[l] = a;
        lanes.sum4[l] = b2;
    }
    return tree_pair(lanes, width);
}

// SRKL_SUM_STEP: the sums of `G^2`, with `G = c (again - first)`, and of `||G|| ||D||` over strips, over
// elements `start..start + len` of a block, one chunk. `strips` are the sums of `D^2` over the strips of the
// chunk.
template <typename C>
__device__ inline SrklPair chunk_change(const SrklTable &table, u64 b, double c, u64 start, int len,
                                        const double *strips, Lanes &lanes) {
    const SrklGradient first = ((const SrklGradient *)table.gradients)[b];
    const SrklGradient again = ((const SrklGradient *)table.again)[b];
    const int STRIPS = SRKL_CHUNK / SRKL_STRIP;
    for (int l = threadIdx.x; l < SRKL_LANES; l += SRKL_THREADS) lanes.sum2[l] = 0.;
    for (int l = threadIdx.x; l < STRIPS; l += SRKL_THREADS) lanes.sum4[l] = 0.;
    __syncthreads();
    for (int row = 0; row < len; row += SRKL_THREADS) {
        const int at = row + threadIdx.x;
        double square = 0.;
        if (at < len) {
            C g, g2;
            from_f64(load_one(first, start + at), g);
            from_f64(load_one(again, start + at), g2);
            const double change = __dmul_rn(c, __dsub_rn((double)g2, (double)g));
            square = __dmul_rn(change, change);
            double *lane = &lanes.sum2[at % SRKL_LANES];
            *lane = __dadd_rn(*lane, square);
        }
        const double sum = strip_sum(square);
        if (at < len && at % SRKL_STRIP == 0) {
            const int strip = at / SRKL_STRIP;
            lanes.sum4[strip] = __dmul_rn(__dsqrt_rn(sum), __dsqrt_rn(strips[strip]));
        }
    }
    SrklPair sums;
    sums.a = tree(lanes.sum2, SRKL_LANES);
    sums.b = tree(lanes.sum4, STRIPS);
    return sums;
}

// Whether a block takes part in these sums, provided that it has the second gradient that they may need.
__device__ inline bool takes_first_part(const SrklTable &table, u32 what, u64 b) {
    if (what == SRKL_SUM_PARAMETERS) return true;
    const SrklBlock &block = ((const SrklBlock *)table.blocks)[b];
    const SrklGroup &group = ((const SrklGroup *)table.groups)[block.group];
    const bool first = has_gradient(table, b);
    const SrklState *state = (const SrklState *)table.state;
    const bool moves = ((const SrklDecision *)table.decisions)[b].moves;
    const u32 curvature = group.curvature;
    switch (what) {
    case SRKL_SUM_STEP: return first && moves && !state->skipped && curvature == SRKL_STEP;
    case SRKL_SUM_SQUARES: return first;
    case SRKL_SUM_PROBE:
    case SRKL_SUM_AVERAGE: return first && curvature == SRKL_HUTCHINSON;
    default:
        return first && moves && (group.trust > 0. || (what == SRKL_SUM_MEASURING && curvature == SRKL_STEP));
    }
}

// Whether a block takes part in these sums.
__device__ inline bool takes_part(const SrklTable &table, u32 what, u64 b) {
    if (!takes_first_part(table, what, b)) return false;
    const bool again = ((const SrklGradient *)table.again)[b].address != 0;
    switch (what) {
    case SRKL_SUM_STEP:
    case SRKL_SUM_PROBE: return again;
    case SRKL_SUM_AVERAGE: return again && ((const SrklState *)table.state)->probe == SRKL_FINITE;
    default: return true;
    }
}

// The sums over all blocks that `finish` uses. In shared memory, read again at each use: registers are few.
struct Totals {
    SrklPair sums;
    double n; // elements
    Measured step;
    u64 now; // steps taken and skipped
};

// Updates the estimate of block `b` by a measurement along a step. Returns what that did to it.
__device__ inline u32 finish_step(const SrklTable &table, u64 b, const volatile Totals &totals) {
    const SrklGroup &group = ((const SrklGroup *)table.groups)[((const SrklBlock *)table.blocks)[b].group];
    if (group.curvature != SRKL_STEP) return 0;
    SrklEstimate &estimate = ((SrklEstimate *)table.estimates)[b];
    Measured sums = {0., 0., 0., 0., 0.};
    const bool part = takes_part(table, SRKL_SUM_STEP, b);
    const bool missing = !part && takes_first_part(table, SRKL_SUM_STEP, b);
    estimate.missing += missing;
    if (group.scope == SRKL_GLOBAL) {
        sums.change = totals.sums.a;
        sums.step = totals.step.step;
        sums.direction = totals.step.direction;
        sums.bound = totals.sums.b;
        sums.metric = totals.step.metric;
    } else if (part) {
        const SrklStepSums &step = ((const SrklStepSums *)table.step_sums)[b];
        sums = measured(read_pair(&((const SrklPair *)table.pairs)[b]), step);
    } else if (missing) {
        return 0;
    }
    const SrklDecision &decision = ((const SrklDecision *)table.decisions)[b];
    const bool small = !decision.moves || decision.small;
    return observe_step(estimate, sums, group, small, totals.now);
}

// The same by a measurement with random vectors.
__device__ inline u32 finish_average(const SrklTable &table, u64 b, const volatile Totals &totals) {
    const SrklGroup &group = ((const SrklGroup *)table.groups)[((const SrklBlock *)table.blocks)[b].group];
    if (group.curvature != SRKL_HUTCHINSON || !(group.lr > 0.)) return 0;
    SrklEstimate &estimate = ((SrklEstimate *)table.estimates)[b];
    const bool first = takes_first_part(table, SRKL_SUM_AVERAGE, b);
    const bool both = first && ((const SrklGradient *)table.again)[b].address != 0;
    const bool global = group.scope == SRKL_GLOBAL;
    estimate.missing += first && !both;
    const u32 probe = ((const SrklState *)table.state)->probe;
    if (!global && !both) return 0;
    return observe_rows(estimate, probe, global ? totals.sums.a : estimate.row_sum_sq, totals.now);
}

// Adjusts the decision about block `b`, by the directions.
__device__ inline void finish_directions(const SrklTable &table, u32 what, u64 b,
                                         const volatile Totals &totals) {
    if (!takes_part(table, what, b)) return;
    const SrklBlock &block = ((const SrklBlock *)table.blocks)[b];
    const SrklPair total = {totals.sums.a, totals.sums.b};
    adjust(((SrklDecision *)table.decisions)[b], ((const SrklGroup *)table.groups)[block.group],
           *(const SrklScalars *)table.scalars, read_pair(&((const SrklPair *)table.pairs)[b]),
           (double)block.whole, total, totals.n, ((const SrklEstimate *)table.estimates)[b].still,
           what == SRKL_SUM_MEASURING);
}

// Whether a block counts in the sums over all.
__device__ inline bool counts(const SrklTable &table, u32 what, u64 b) {
    if (!takes_part(table, what, b)) return false;
    if (what != SRKL_SUM_DIRECTIONS && what != SRKL_SUM_MEASURING) return true;
    return ((const SrklGroup *)table.groups)[((const SrklBlock *)table.blocks)[b].group].curvature ==
           SRKL_STEP;
}

// Uses the sums of all blocks: called by the CTA that has added up the last one.
__device__ inline void finish(const SrklTable &table, u32 what, double delta, Lanes &lanes) {
    __shared__ Totals totals;
    SrklState *state = (SrklState *)table.state;
    const u64 count = table.block_count;
    if (what == SRKL_SUM_AVERAGE) {
        for (u64 b = thread_number(); b < count; b += SRKL_THREADS) {
            if (!takes_part(table, what, b)) continue;
            const u32 group = ((const SrklBlock *)table.blocks)[b].group;
            SrklEstimate &estimate = ((SrklEstimate *)table.estimates)[b];
            estimate.power = __dmul_rn(estimate.power, ((const SrklGroup *)table.groups)[group].decay);
            const double corrected = __dsub_rn(1., estimate.power);
            estimate.row_sum_sq = __ddiv_rn(read_pair(&((const SrklPair *)table.pairs)[b]).a, corrected);
        }
        __threadfence();
        __syncthreads();
    }
    const SrklPair sums = fold_pairs(
        count,
        [&](u64 b) {
            SrklPair own = {0., 0.};
            if (what == SRKL_SUM_AVERAGE) {
                const u32 group = ((const SrklBlock *)table.blocks)[b].group;
                const SrklGroup &params = ((const SrklGroup *)table.groups)[group];
                if (params.curvature == SRKL_HUTCHINSON && params.lr != 0.)
                    own.a = __ldcg(&((const SrklEstimate *)table.estimates)[b].row_sum_sq);
            } else if (counts(table, what, b))
                own = read_pair(&((const SrklPair *)table.pairs)[b]);
            return own;
        },
        lanes);
    if (threadIdx.x == 0) totals.sums = sums;
    // Numbers of elements, which are exact in any order, and the metric of a step.
    const SrklPair more = fold_pairs(
        count,
        [&](u64 b) {
            SrklPair own = {0., 0.};
            if (!counts(table, what, b)) return own;
            own.a = (double)((const SrklBlock *)table.blocks)[b].whole;
            if (what == SRKL_SUM_STEP) own.b = step_metric(((const SrklStepSums *)table.step_sums)[b]);
            return own;
        },
        lanes);
    if (threadIdx.x == 0) {
        totals.n = more.a;
        totals.step.metric = more.b;
        totals.now = state->steps + state->skipped_steps;
    }
    if (what == SRKL_SUM_STEP) {
        const SrklPair step = fold_pairs(
            count,
            [&](u64 b) {
                SrklPair own = {0., 0.};
                if (!counts(table, what, b)) return own;
                own.a = ((const SrklStepSums *)table.step_sums)[b].step;
                own.b = ((const SrklStepSums *)table.step_sums)[b].direction;
                return own;
            },
            lanes);
        if (threadIdx.x == 0) {
            totals.step.step = step.a;
            totals.step.direction = step.b;
        }
    }
    __syncthreads();
    if (what == SRKL_SUM_SQUARES) {
        if (threadIdx.x == 0) state->probe_size = probe_size(delta, totals.sums.a, totals.n);
        return;
    }
    if (what == SRKL_SUM_PROBE) {
        const u32 probe = !is_finite(totals.sums.b)  ? SRKL_NOTHING
                          : is_finite(totals.sums.a) ? SRKL_FINITE
                                                     : SRKL_INFINITE;
        if (threadIdx.x == 0) state->probe = probe;
        return;
    }
    for (u64 b = thread_number(); b < count; b += SRKL_THREADS) {
        u32 left = 0;
        if (what == SRKL_SUM_STEP)
            left = finish_step(table, b, totals);
        else if (what == SRKL_SUM_AVERAGE)
            left = finish_average(table, b, totals);
        else
            finish_directions(table, what, b, totals);
        if (what != SRKL_SUM_STEP && what != SRKL_SUM_AVERAGE) continue;
        const SrklEstimate &estimate = ((const SrklEstimate *)table.estimates)[b];
        const bool known = estimate.infinite || estimate.in_average > 0;
        ((u32 *)table.remaining)[b] = left | (known ? SRKL_KNOWN : 0);
    }
}

// All threads of a CTA call this with the same chunk.
__device__ inline SrklPair chunk_pair(const SrklTable &table, u32 what, u64 b, const SrklBlock &block,
                                      const BlockStep &block_step, u64 start, int len, Lanes &lanes) {
    switch (block.dtype) {
    case SRKL_F32: return chunk_pair<float, float>(table, what, b, block, block_step, start, len, lanes);
    case SRKL_F64: return chunk_pair<double, double>(table, what, b, block, block_step, start, len, lanes);
    case SRKL_BF16: return chunk_pair<bf16, float>(table, what, b, block, block_step, start, len, lanes);
    default: return chunk_pair<f16, float>(table, what, b, block, block_step, start, len, lanes);
    }
}

extern "C" __global__ void __launch_bounds__(SRKL_THREADS, 8)
    srkl_sums(const SrklTable table, const u32 what, const double delta) {
    __shared__ Lanes lanes;
    __shared__ BlockStep block_step;
    __shared__ SrklChunk part;
    __shared__ SrklBlock block;
    __shared__ bool takes, last;
    SrklPair *of_chunks = (SrklPair *)table.chunk_pairs, *pairs = (SrklPair *)table.pairs;
    for (u64 chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
        if (threadIdx.x == 0) {
            part = ((const SrklChunk *)table.chunks)[chunk];
            takes = takes_part(table, what, part.block);
            block = ((const SrklBlock *)table.blocks)[part.block];
            block_step.group = ((const SrklGroup *)table.groups)[block.group];
            block_step.row_curvature(((const SrklEstimate *)table.estimates)[part.block]);
            block_step.decision = ((const SrklDecision *)table.decisions)[part.block];
            block_step.matrix_scale = block.matrix_scale;
            // A product with the Hessian is unscaled, and not clipped.
            if (what == SRKL_SUM_PROBE || what == SRKL_SUM_AVERAGE)
                block_step.decision.grad_factor =
                    __ddiv_rn(1., ((const SrklScalars *)table.scalars)->grad_scale);
        }
        __syncthreads();
        const u64 left = block.n - part.start;
        const int len = left < SRKL_CHUNK ? (int)left : SRKL_CHUNK;
        SrklPair sums = {0., 0.};
        if (takes && what == SRKL_SUM_STEP) {
            const double *strips = (const double *)table.strips + chunk * (SRKL_CHUNK / SRKL_STRIP);
            const double c = block_step.decision.grad_factor;
            sums = block.dtype == SRKL_F64
                       ? chunk_change<double>(table, part.block, c, part.start, len, strips, lanes)
                       : chunk_change<float>(table, part.block, c, part.start, len, strips, lanes);
        } else if (takes) {
            sums = chunk_pair(table, what, part.block, block, block_step, part.start, len, lanes);
        }
        if (threadIdx.x == 0) {
            of_chunks[chunk] = sums;
            last = arrives_last(&((u32 *)table.chunks_done)[part.block], block.chunk_count);
        }
        __syncthreads();
        if (last) {
            const SrklPair *first = of_chunks + block.first_chunk;
            sums = fold_pairs(
                block.chunk_count, [=](u64 i) { return read_pair(&first[i]); }, lanes);
            __syncthreads();
            if (threadIdx.x == 0) {
                if (what == SRKL_SUM_DIRECTIONS || what == SRKL_SUM_MEASURING) {
                    const double scale = direction_scale(block_step);
                    // If the host decides, it scales sums too.
                    if (table.stages & SRKL_DECIDE) sums.a = __dmul_rn(sums.a, __dmul_rn(scale, scale));
                    if (what == SRKL_SUM_MEASURING)
                        ((SrklStepSums *)table.step_sums)[part.block].direction = sums.a;
                }
                pairs[part.block] = sums;
                last = arrives_last(&((SrklState *)table.state)->blocks_done, table.live_count);
            }
            __syncthreads();
            if (last && table.stages & SRKL_DECIDE) finish(table, what, delta, lanes);
        }
        __syncthreads();
    }
}
