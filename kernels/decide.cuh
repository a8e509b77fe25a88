// Stage 2, decide: from the sums of a block, and those of all blocks if a group uses them, the
// numbers of its step. A few operations a block, in f64.
#pragma once

#include "rule.cuh"

// Whether a block has a gradient, and its group is not frozen.
__device__ inline bool has_gradient(const SrklTable &table, u64 b) {
    const u32 group = ((const SrklBlock *)table.blocks)[b].group;
    return ((const SrklGradient *)table.gradients)[b].address != 0 &&
           ((const SrklGroup *)table.groups)[group].lr > 0.;
}

// The sums over all blocks, to all threads of the CTA that calls it together.
__device__ inline SrklSums total_sums(const SrklTable &table, const SrklScalars &s, Lanes &lanes) {
    const SrklBlock *blocks = (const SrklBlock *)table.blocks;
    const SrklGradient *gradients = (const SrklGradient *)table.gradients;
    const SrklGroup *groups = (const SrklGroup *)table.groups;
    const SrklStatistics *statistics = (const SrklStatistics *)table.statistics;
    const double c = __ddiv_rn(1., s.grad_scale);
    return fold(
        table.block_count,
        [=](u64 b) {
            SrklSums sums = read_sums(&statistics[b].sums);
            bool finite = is_finite(curvature_of(sums, c));
            bool skips = groups[blocks[b].group].nonfinite == SRKL_SKIP_BLOCK;
            bool present = gradients[b].address != 0 && groups[blocks[b].group].lr > 0.;
            bool counts = present && (finite || !skips);
            SrklSums zero = {0., 0., 0};
            return counts ? sums : zero;
        },
        lanes);
}

// Decides about block `b`, by one thread.
__device__ inline void decide_block(const SrklTable &table, const SrklScalars &s, u64 b, const SrklSums &own,
                                    const SrklSums &total) {
    const u32 group = ((const SrklBlock *)table.blocks)[b].group;
    const SrklGroup p = ((const SrklGroup *)table.groups)[group];
    const bool present = ((const SrklGradient *)table.gradients)[b].address != 0 && p.lr > 0.;
    const SrklPowers powers = next_powers(((const SrklPowers *)table.powers)[b], p);
    const SrklEstimate &estimate = ((const SrklEstimate *)table.estimates)[b];
    SrklDecision decision;
    const bool finite = decide(p, s, own, total, estimate, powers, decision);
    const bool moves = may_step(finite, p);
    decision.moves = present && moves;
    ((SrklDecision *)table.decisions)[b] = decision;
    if (present && !moves && p.nonfinite == SRKL_SKIP_STEP)
        atomicOr(&((SrklState *)table.state)->found_inf, 1);
}
