// Stage 2, decide: from the sums of a block, and where a group uses them those of all blocks, the
// numbers of its step. A few operations a block, in f64.
#pragma once

#include "sums.cuh"

__device__ inline bool is_finite(double x) {
    return fabs(x) < __longlong_as_double(0x7ff0000000000000ll);
}

// `phi = lr / (1 + beta * H)`, with the schedule in `lr`.
__device__ inline double brake(double lr, double beta, double curvature) {
    return __ddiv_rn(lr, __dadd_rn(1., __dmul_rn(beta, curvature)));
}

// `own` are a block's sums, `total` those over all blocks, where the group uses them. Returns
// whether everything that the block uses is finite.
__device__ inline bool decide(const SrklGroup &p, const SrklScalars &s, const SrklSums &own,
                              const SrklSums &total, SrklDecision &decision) {
    double c = __ddiv_rn(1., s.grad_scale);
    if (p.max_grad_norm > 0.) {
        double norm = norm_of(total, c);
        double clip = norm <= p.max_grad_norm ? 1. : __ddiv_rn(p.max_grad_norm, norm);
        c = __dmul_rn(c, clip);
    }
    double curvature = curvature_of(p.scope == SRKL_GLOBAL ? total : own, c);
    decision.c = c;
    decision.curvature = curvature;
    decision.phi = brake(__dmul_rn(s.schedule, p.lr), p.beta, curvature);
    return is_finite(own.sum4) && is_finite(curvature) && c > 0.;
}

// The sums over all blocks, to all threads of the block that calls it together.
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
            bool counts = gradients[b].address != 0 && (finite || !skips);
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
    const bool present = ((const SrklGradient *)table.gradients)[b].address != 0;
    SrklDecision decision;
    const bool may_step = decide(p, s, own, total, decision) || p.nonfinite == SRKL_PROPAGATE;
    decision.step = present && may_step;
    ((SrklDecision *)table.decisions)[b] = decision;
    if (present && !may_step && p.nonfinite == SRKL_SKIP_STEP)
        atomicOr(&((SrklState *)table.state)->refused, 1);
}
