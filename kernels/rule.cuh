// The mathematics of a step: a few operations a block, in f64, and those of an element in its compute type.
// The same functions, in the same order, as in src/rule.rs, which says why.
#pragma once

#include "params.cuh"
#include "sums.cuh"

// The curvature of a block that has not been measured.
static const double UNKNOWN = SRKL_UNKNOWN;

// The measured `H`, or UNKNOWN.
__device__ inline double estimated_curvature(const SrklEstimate &estimate) {
    if (estimate.infinite) return __longlong_as_double(0x7ff0000000000000ll);
    return estimate.in_average == 0 ? UNKNOWN : estimate.curvature;
}

// What a gradient is multiplied by, to unscale and clip it. A NaN norm makes it a NaN.
__device__ inline double grad_factor(const SrklGroup &p, const SrklScalars &s, const SrklSums &total) {
    const double c = __ddiv_rn(1., s.grad_scale);
    if (!(p.max_grad_norm > 0.)) return c;
    const double norm = norm_of(total, c);
    return __dmul_rn(c, norm <= p.max_grad_norm ? 1. : __ddiv_rn(p.max_grad_norm, norm));
}

// `phi = lr / (1 + beta * H)`, with the schedule in `lr`.
__device__ inline double brake(double lr, double beta, double curvature) {
    return __ddiv_rn(lr, __dadd_rn(1., __dmul_rn(beta, curvature)));
}

// The products of decays after one more step.
__device__ inline SrklPowers next_powers(const SrklPowers &powers, const SrklGroup &p) {
    SrklPowers next;
    next.first = __dmul_rn(powers.first, p.power1);
    next.second = __dmul_rn(powers.second, p.decay2);
    next.average = p.polynomial >= 0. ? __dadd_rn(powers.average, 1.) : __dmul_rn(powers.average, p.average);
    return next;
}

// The factor that corrects an average for its start at 0; 1 if there is no average.
__device__ inline double bias_correction(double power) {
    return power == 1. ? 1. : __ddiv_rn(1., __dsub_rn(1., power));
}

// How many measurements along steps an estimate has before `phi` may grow without limit, and how much longer
// a step may be than the last measured one until then.
static const u64 FEW = 10;
static const double GROWTH = 10.;

// A brake by curvature that was measured a few times only.
__device__ inline double limit_growth(double phi, const SrklGroup &p, const SrklEstimate &estimate) {
    const double most = __dmul_rn(GROWTH, estimate.reach);
    const bool few = p.curvature == SRKL_STEP && estimate.in_average < FEW;
    return few && most > 0. && phi > most ? most : phi;
}

// Decides a block's step. `own` are its sums, `total` those over all blocks, if the group uses them; `powers`
// are those after this step. Returns whether everything that the block uses is finite.
__device__ inline bool decide(const SrklGroup &p, const SrklScalars &s, const SrklSums &own,
                              const SrklSums &total, const SrklEstimate &estimate, const SrklPowers &powers,
                              SrklDecision &decision) {
    const double c = grad_factor(p, s, total);
    const double lr = __dmul_rn(s.schedule, p.lr);
    bool finite = is_finite(own.sum4) && c > 0.;
    double curvature, phi = 0.;
    if (p.curvature == SRKL_GRAD_SQUARE) {
        curvature = curvature_of(p.scope == SRKL_GLOBAL ? total : own, c);
        finite = finite && is_finite(curvature);
        phi = brake(lr, p.beta, curvature);
    } else if (p.curvature == SRKL_NO_CURVATURE) {
        curvature = UNKNOWN;
        phi = lr;
    } else {
        curvature = estimated_curvature(estimate);
        if (curvature != UNKNOWN && is_finite(curvature)) phi = brake(lr, p.beta, curvature);
        phi = limit_growth(phi, p, estimate);
    }
    if (has_element_brakes(p) && phi != 0.) phi = lr;
    decision.grad_factor = c;
    decision.curvature = curvature;
    decision.phi = phi;
    decision.small = 0;
    decision.powers = powers;
    const double next = __dmul_rn(powers.first, p.power1);
    decision.scale_m = bias_correction(p.ahead ? next : powers.first);
    const bool nesterov = p.direction == SRKL_NESTEROV_ADAM;
    decision.ahead = nesterov ? __ddiv_rn(__dsub_rn(1., next), __dsub_rn(1., powers.first)) : 1.;
    decision.scale_v = bias_correction(powers.second);
    // One division for both kinds of average.
    const bool polynomial = p.polynomial >= 0.;
    const double over = polynomial ? __dadd_rn(1., p.polynomial) : 1.;
    const double under =
        polynomial ? __dadd_rn(__dsub_rn(powers.average, 1.), p.polynomial) : __dsub_rn(1., powers.average);
    const double weight = __ddiv_rn(over, under);
    decision.average = polynomial        ? weight
                       : p.average == 1. ? 0.
                                         : __dmul_rn(__dsub_rn(1., p.average), weight);
    return finite;
}

// Whether the group's policy lets a block be stepped; `finite`: whether everything that it uses is finite.
__device__ inline bool may_step(bool finite, const SrklGroup &p) {
    return finite || p.nonfinite == SRKL_PROPAGATE;
}

// Whether there is a finite estimate, where curvature is measured.
__device__ inline bool is_known(const SrklDecision &decision) {
    return decision.curvature >= 0. && is_finite(decision.curvature);
}

// The least RMS of parameters that the length of a step is compared with; the length of a small step,
// relative to that RMS; and how often it is doubled at most.
static const double LEAST_RMS = 0.01, SMALL_STEP = 0.003;
static const u64 MOST_DOUBLINGS = 8;

// Adjusts the decision about a block of `n` elements, by the directions. `own` are its sums, `total` those of
// all blocks, of `total_n` elements, that move by SRKL_STEP. `still` small steps in a row have moved nothing.
__device__ inline void adjust(SrklDecision &decision, const SrklGroup &p, const SrklScalars &s,
                              const SrklPair &own, double n, const SrklPair &total, double total_n, u64 still,
                              bool measures) {
    const bool known = is_known(decision);
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

// The numbers by which moments, and from them the direction, are computed.
template <typename C> struct Moments {
    C decay1, gain1_factor, ahead_decay, ahead_gain_factor, decay2, one_minus_decay2, grad_factor, scale_v,
        eps;

    __device__ Moments(const SrklGroup &p, const SrklDecision &decision) {
        from_f64(p.decay1, decay1);
        from_f64(__dmul_rn(p.gain1, decision.grad_factor), gain1_factor);
        from_f64(p.ahead_decay, ahead_decay);
        const double gain = __dmul_rn(p.ahead_gain, decision.ahead);
        from_f64(__dmul_rn(gain, decision.grad_factor), ahead_gain_factor);
        from_f64(p.decay2, decay2);
        from_f64(__dsub_rn(1., p.decay2), one_minus_decay2);
        from_f64(decision.grad_factor, grad_factor);
        from_f64(decision.scale_v, scale_v);
        from_f64(p.eps, eps);
    }

    // `m <- mu m + (1 - mu) grad_factor g`; of SRKL_SGD `m <- mu m + grad_factor g`
    __device__ C first_moment(C m, C g) const { return canonical(mul_add(g, gain1_factor, mul(decay1, m))); }

    // `mu m + grad_factor g`, or for Muon and SRKL_NESTEROV_ADAM `mu m + (1 - mu) grad_factor g`, with the
    // new `m`; of SRKL_LION `beta1 m + (1 - beta1) grad_factor g`, with the old one.
    __device__ C look_ahead(C m, C g) const {
        return canonical(mul_add(g, ahead_gain_factor, mul(ahead_decay, m)));
    }

    // `v <- beta2 v + (1 - beta2) (grad_factor g)^2`
    __device__ C second_moment(C v, C g) const {
        g = mul(grad_factor, g);
        return canonical(mul_add(mul(one_minus_decay2, g), g, mul(decay2, v)));
    }

    // `u <- max(u, v)`
    __device__ C largest(C v_max, C v) const { return v > v_max ? v : v_max; }

    // `P = sqrt(v / (1 - beta2^t)) + eps`
    __device__ C denom(C v) const { return add(root(mul(scale_v, v)), eps); }
};

// -1, 0 or 1; a NaN stays one.
template <typename C> __device__ inline C sign(C x) {
    return x > 0 ? (C)1 : x < 0 ? (C)-1 : x;
}

// `d`, or 0 where it is against the gradient; a NaN stays one.
template <typename C> __device__ inline C cautious(C d, C g) {
    return (d > 0 && g <= 0) || (d < 0 && g >= 0) ? (C)0 : d;
}

// What an update needs besides its chunk.
struct BlockStep {
    SrklDecision decision;
    SrklGroup group;
    double matrix_scale;
    double row_scale; // `1 / (1 - decay^k)` of q
    double shared;    // `R^p` of SRKL_MIXED

    __device__ void row_curvature(const SrklEstimate &estimate) {
        if (!has_element_brakes(group)) return;
        row_scale = bias_correction(estimate.power);
        shared = eighths(__dsqrt_rn(estimate.row_sum_sq), group.shared);
    }
};

// The brake of an element with gradient `g`: by the curvature `(grad_factor g)^2`, or `r^(1 - p) * R^p` with
// `r = sqrt(row_scale * q)`.
__device__ inline double element_phi(const BlockStep &block_step, double g, double q) {
    double curvature;
    if (block_step.decision.phi == 0.) return 0.;
    if (block_step.group.curvature == SRKL_GRAD_SQUARE) {
        double d = __dmul_rn(block_step.decision.grad_factor, g);
        curvature = __dmul_rn(d, d);
    } else {
        double r = __dsqrt_rn(__dmul_rn(block_step.row_scale, q));
        curvature = __dmul_rn(eighths(r, 8 - block_step.group.shared), block_step.shared);
    }
    return brake(block_step.decision.phi, block_step.group.beta, curvature);
}

// What the gradient or momentum is multiplied by: a gradient by the factor that unscales and clips it, a
// momentum by its bias correction.
__device__ inline double momentum_scale(const BlockStep &block_step) {
    const SrklDecision &decision = block_step.decision;
    return block_step.group.direction == SRKL_GRADIENT ? decision.grad_factor : decision.scale_m;
}

// What the result of the moments is multiplied by to give the direction: the same, but for an orthogonal
// matrix, whose scale is `matrix_scale`.
__device__ inline double direction_scale(const BlockStep &block_step) {
    return block_step.group.direction == SRKL_MUON ? block_step.matrix_scale : momentum_scale(block_step);
}

// `step_size` and `decay_factor` of `apply_step`: `phi * scale` and `1 - phi * weight_decay`.
template <typename C>
__device__ inline void step_coefficients(double phi, const BlockStep &block_step, C &step_size,
                                         C &decay_factor) {
    from_f64(__dmul_rn(phi, direction_scale(block_step)), step_size);
    from_f64(__dsub_rn(1., __dmul_rn(phi, block_step.group.weight_decay)), decay_factor);
}

// The numbers of one block's update.
template <typename C> struct Coefficients {
    Moments<C> moments;
    C step_size, decay_factor, average;

    __device__ Coefficients(const BlockStep &block_step) : moments(block_step.group, block_step.decision) {
        step_coefficients(block_step.decision.phi, block_step, step_size, decay_factor);
        from_f64(block_step.decision.average, average);
    }
};

// `w <- decay_factor * w - step_size * d`
template <typename C> __device__ inline C apply_step(C w, C d, C step_size, C decay_factor) {
    return canonical(mul_add(d, -step_size, mul(decay_factor, w)));
}

// `a <- a + weight * (w - a)`
template <typename C> __device__ inline C lerp(C a, C w, C weight) {
    return canonical(mul_add(sub(w, a), weight, a));
}

// The size of a perturbation by random vectors, from the sum of `w^2` over all `n` elements.
__device__ inline double probe_size(double delta, double squares, double n) {
    const double rms = __dsqrt_rn(__ddiv_rn(squares, n));
    return __dmul_rn(delta, rms > LEAST_RMS ? rms : LEAST_RMS);
}

// The sums of a measurement along a step: `Measured` in src/estimate.rs.
struct Measured {
    double change, step, direction, bound, metric;
};

// `<D, P D>` of a block.
__device__ inline double step_metric(const SrklStepSums &sums) {
    return sums.direction == 0. ? 0. : __dmul_rn(sums.step, __ddiv_rn(sums.along, sums.direction));
}

// The sums of a measurement of a block. `change` has those of `G^2`, and of `||G|| ||D||` over strips.
__device__ inline Measured measured(const SrklPair &change, const SrklStepSums &sums) {
    Measured measured = {change.a, sums.step, sums.direction, change.b, step_metric(sums)};
    return measured;
}

// A measurement along a step above this many times the average enters the average as that multiple.
static const double BOUND = 6.;

// The least share of its full weight with which a measurement enters the average.
static const double LEAST_SHARE = 1. / 1024.;

// 2^-53: 1 less this is still below 1.
static const double LEAST_GAIN = 0x1p-53;

// How many steps a measurement after `now` steps stands for.
__device__ inline double steps_since(const SrklEstimate &estimate, u64 now) {
    if (estimate.in_average == 0 || now <= estimate.measured_at) return 1.;
    return (double)(now - estimate.measured_at);
}

// The decay of the average at a measurement that stands for this many steps.
__device__ inline double decay_after(const SrklGroup &group, double steps) {
    if (steps >= group.every || group.decay == 0.) return group.decay;
    const double ratio = __ddiv_rn(steps, group.every);
    const double share = ratio < LEAST_SHARE ? LEAST_SHARE : ratio;
    const double gain = __dmul_rn(__dsub_rn(1., group.decay), share);
    return __dsub_rn(1., gain < LEAST_GAIN ? LEAST_GAIN : gain);
}

// The average of H along steps, corrected for having started at 0.
__device__ inline double average_of(const SrklEstimate &estimate) {
    return __ddiv_rn(estimate.mean, __dsub_rn(1., estimate.power));
}

// `sqrt(average^2 + noise * variance)`
__device__ inline double noisy_average_of(const SrklEstimate &estimate, double noise) {
    const double average = average_of(estimate);
    const double variance = __ddiv_rn(estimate.variance, __dsub_rn(1., estimate.power));
    const double spread = noise == 0. ? 0. : __dmul_rn(noise, variance);
    return __dsqrt_rn(__dadd_rn(__dmul_rn(average, average), spread));
}

// Records a measurement, and when it was made.
__device__ inline void record(SrklEstimate &estimate, double curvature, u64 now) {
    estimate.last = curvature;
    if (curvature < estimate.lowest) estimate.lowest = curvature;
    if (curvature > estimate.highest) estimate.highest = curvature;
    estimate.in_average++;
    estimate.infinite = 0;
    estimate.still = 0;
    estimate.measured_at = now;
    estimate.taken++;
}

// A measurement enters as at most BOUND times the average; the brake uses a larger one in full up to the
// next.
__device__ inline void enter_average(SrklEstimate &estimate, double curvature, double decay, double noise) {
    const double average = estimate.in_average > 0 ? average_of(estimate) : 0.;
    const bool too_large = average > 0. && curvature > __dmul_rn(BOUND, average);
    const double entering = too_large ? __dmul_rn(BOUND, average) : curvature;
    if (estimate.in_average == 1 && curvature > 0. && average > __dmul_rn(BOUND, curvature)) {
        estimate.entered = __dmul_rn(BOUND, curvature);
        estimate.mean = __dmul_rn(__dsub_rn(1., estimate.power), estimate.entered);
    }
    const double difference = estimate.in_average > 0 ? __dsub_rn(entering, estimate.entered) : 0.;
    const double half_square = __dmul_rn(__dmul_rn(0.5, difference), difference);
    const double gain = __dsub_rn(1., decay);
    estimate.mean = __dadd_rn(__dmul_rn(decay, estimate.mean), __dmul_rn(gain, entering));
    estimate.variance = __dmul_rn(decay, __dadd_rn(estimate.variance, __dmul_rn(gain, half_square)));
    estimate.power = __dmul_rn(estimate.power, decay);
    estimate.entered = entering;
    estimate.curvature = too_large ? curvature : noisy_average_of(estimate, noise);
}

// Updates the estimate by a measurement along a step. Returns what that did to it: SRKL_LOST, SRKL_UNCHANGED
// or 0.
__device__ inline u32 observe_step(SrklEstimate &estimate, const Measured &sums, const SrklGroup &group,
                                   bool small, u64 now) {
    const double change = sums.change, curvature = __ddiv_rn(sums.bound, sums.metric);
    const bool finite = is_finite(change) && is_finite(sums.step) && is_finite(sums.direction) &&
                        is_finite(sums.bound) && is_finite(sums.metric);
    if (sums.direction == 0.) {
        estimate.uninformative++;
        return SRKL_UNCHANGED;
    }
    if (finite && (sums.step == 0. || (change == 0. && estimate.in_average == 0 && small))) {
        estimate.mean = 0.;
        estimate.row_sum_sq = 0.;
        estimate.power = 1.;
        estimate.variance = 0.;
        estimate.entered = 0.;
        estimate.curvature = 0.;
        estimate.reach = 0.;
        estimate.in_average = 0;
        estimate.infinite = 0;
        estimate.still += small;
        estimate.unmoved++;
        return SRKL_LOST;
    }
    if (finite && is_finite(curvature)) {
        enter_average(estimate, curvature, decay_after(group, steps_since(estimate, now)), group.noise);
        estimate.reach = __dsqrt_rn(__ddiv_rn(sums.step, sums.direction));
        record(estimate, curvature, now);
    } else {
        estimate.infinite = 1;
        estimate.nonfinite++;
    }
    return 0;
}

// Updates the estimate by a measurement with random vectors. Returns what that did to it: SRKL_UNCHANGED or
// 0.
__device__ inline u32 observe_rows(SrklEstimate &estimate, u32 probe, double squared, u64 now) {
    if (probe == SRKL_NOTHING) {
        estimate.uninformative++;
        return SRKL_UNCHANGED;
    }
    if (probe == SRKL_INFINITE || !is_finite(squared)) {
        estimate.infinite = 1;
        estimate.nonfinite++;
    } else {
        estimate.mean = squared;
        estimate.curvature = __dsqrt_rn(squared);
        record(estimate, estimate.curvature, now);
    }
    return 0;
}
