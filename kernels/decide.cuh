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

// What corrects an average for having started at 0; 1 for one that there is not.
__device__ inline double correction(double power) {
    return power == 1. ? 1. : __ddiv_rn(1., __dsub_rn(1., power));
}

// The curvature of a block that has not been measured.
static const double UNKNOWN = -1.;

// `H` of what has been measured, or UNKNOWN.
__device__ inline double curvature_of(const SrklEstimate &estimate) {
    if (estimate.infinite) return __longlong_as_double(0x7ff0000000000000ll);
    return estimate.in_average == 0 ? UNKNOWN : estimate.curvature;
}

__device__ inline bool has_element_brakes(const SrklGroup &p) {
    return p.scope == SRKL_ELEMENT || p.scope == SRKL_MIXED;
}

// `own` are a block's sums, `total` those over all blocks, where the group uses them; `powers` are those
// after this step. Returns whether everything that the block uses is finite.
__device__ inline bool decide(const SrklGroup &p, const SrklScalars &s, const SrklSums &own,
                              const SrklSums &total, const SrklEstimate &estimate, const SrklPowers &powers,
                              SrklDecision &decision) {
    double c = __ddiv_rn(1., s.grad_scale);
    if (p.max_grad_norm > 0.) {
        double norm = norm_of(total, c);
        double clip = norm <= p.max_grad_norm ? 1. : __ddiv_rn(p.max_grad_norm, norm);
        c = __dmul_rn(c, clip);
    }
    const double lr = __dmul_rn(s.schedule, p.lr);
    bool finite = is_finite(own.sum4) && c > 0.;
    double curvature, phi = 0.;
    if (p.curvature == SRKL_GRAD_SQUARE) {
        curvature = curvature_of(p.scope == SRKL_GLOBAL ? total : own, c);
        finite = finite && is_finite(curvature);
        phi = brake(lr, p.beta, curvature);
    } else {
        curvature = curvature_of(estimate);
        if (curvature != UNKNOWN && is_finite(curvature)) phi = brake(lr, p.beta, curvature);
    }
    if (has_element_brakes(p) && phi != 0.) phi = lr;
    decision.c = c;
    decision.curvature = curvature;
    decision.phi = phi;
    decision.small = 0;
    decision.powers = powers;
    decision.correction1 = correction(powers.first);
    decision.correction2 = correction(powers.second);
    decision.average = p.average == 1. ? 0. : __dmul_rn(__dsub_rn(1., p.average), correction(powers.average));
    return finite;
}

// The products of decays after one more step.
__device__ inline SrklPowers next_powers(const SrklPowers &powers, const SrklGroup &p) {
    SrklPowers next;
    next.first = __dmul_rn(powers.first, p.decay1);
    next.second = __dmul_rn(powers.second, p.decay2);
    next.average = __dmul_rn(powers.average, p.average);
    return next;
}

// The smallest size of parameters that steps are compared with, and the length of a step that nothing is
// known for, beside that size; how often it is doubled at most.
static const double LEAST_RMS = 0.01, SMALL_STEP = 0.003;
static const u64 MOST_DOUBLINGS = 8;

// Decides again about a block of `n` elements, by the directions: `own` are its sums, `total` those of all
// blocks, of `total_n` elements, that move by SRKL_STEP. So many measurements in a row, `still`, have found
// that nothing had moved.
__device__ inline void adjust(SrklDecision &decision, const SrklGroup &p, const SrklScalars &s,
                              const SrklPair &own, double n, const SrklPair &total, double total_n, u64 still,
                              bool measures) {
    const bool known = decision.curvature >= 0. && is_finite(decision.curvature);
    if (p.curvature == SRKL_STEP && measures && !known) {
        double rms_w = __dsqrt_rn(__ddiv_rn(total.b, total_n));
        double rms_d = __dsqrt_rn(__ddiv_rn(total.a, total_n));
        double least = rms_w > LEAST_RMS ? rms_w : LEAST_RMS;
        double share = __dmul_rn(SMALL_STEP, pow2((int)(still < MOST_DOUBLINGS ? still : MOST_DOUBLINGS)));
        double by_direction = __ddiv_rn(__dmul_rn(share, least), rms_d);
        double by_decay = __ddiv_rn(share, p.weight_decay);
        double small = by_decay < by_direction ? by_decay : by_direction;
        double lr = __dmul_rn(s.schedule, p.lr);
        decision.small = small < lr;
        decision.phi = decision.small ? small : lr;
    }
    if (p.trust > 0.) {
        double length = __dsqrt_rn(own.a);
        if (!has_element_brakes(p)) length = __dmul_rn(decision.phi, length);
        double norm = __dsqrt_rn(own.b), least = __dmul_rn(LEAST_RMS, __dsqrt_rn(n));
        double most = __dmul_rn(p.trust, norm > least ? norm : least);
        if (length > most) decision.phi = __dmul_rn(decision.phi, __ddiv_rn(most, length));
    }
}

// Whether a block has a gradient, and its group is not frozen.
__device__ inline bool has_gradient(const SrklTable &table, u64 b) {
    const u32 group = ((const SrklBlock *)table.blocks)[b].group;
    return ((const SrklGradient *)table.gradients)[b].address != 0 &&
           ((const SrklGroup *)table.groups)[group].lr > 0.;
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
    const bool may_step = finite || p.nonfinite == SRKL_PROPAGATE;
    decision.step = present && may_step;
    ((SrklDecision *)table.decisions)[b] = decision;
    if (present && !may_step && p.nonfinite == SRKL_SKIP_STEP)
        atomicOr(&((SrklState *)table.state)->refused, 1);
}
