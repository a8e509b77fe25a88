// Stage 3, update: moves the parameters of a chunk.
//
// Bytes a parameter: reads the gradient (4 for f32, 2 for bf16 and f16), the parameter, or its master where
// it has one, and its state, and writes all but the gradient. 12 for f32, 20 with momentum, 28 with Adam; 12,
// 20 and 28 for bf16 with f32 master and bf16 gradient: 2 + 4 read, 4 + 2 written. 8 more for an average.
//
// A step that measures, or records norms, goes element by element and sums up how it moves each.
//
// Contract: all SRKL_THREADS threads of a CTA call these together; `w`, `master` and state are 16-byte
// aligned, a gradient need not be, and none overlap.
#pragma once

#include "rule.cuh"
#include "state.cuh"
#include "sums.cuh"

// Loads a thread's parameters, or their masters, as C.
template <int STRIDE, int N, int ROWS, typename P, typename C>
__device__ inline void load_parameters(Elements<C, N> (&xs)[ROWS], const Part<P, C> &part, int at, int wide,
                                       bool reset_master) {
    if (part.master() && !reset_master) {
        part.master().template load<STRIDE>(xs, at, wide);
        return;
    }
    Elements<P, N> ws[ROWS];
    load_elements<STRIDE>(ws, part.w(), at, wide);
#pragma unroll
    for (int j = 0; j < ROWS; j++)
#pragma unroll
        for (int e = 0; e < N; e++) xs[j][e] = (C)widen(ws[j][e]);
}

// The wide part of a chunk; G is the gradient's type. All threads of a warp come to each exchange. If steps
// are CAUTIOUS, the mask may be asked for.
template <bool CAUTIOUS, u32 DIRECTION, typename P, typename C, typename G>
__device__ inline void update_vectors(const Part<P, C> &part, const G *g, int wide, bool reset_master,
                                      bool is_cautious, const Coefficients<C> &k) {
    // A thread takes N neighbours, as many as 16 bytes of the smaller type hold, in BATCH rows at a time, so
    // that their loads are in flight together.
    const int N = 16 / (sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));
    const int MOST = 32 / (N * sizeof(C)), BATCH = DIRECTION == SRKL_GRADIENT ? MOST : 1;
    const int STRIDE = SRKL_THREADS * N;
    // Registers don't suffice for all at once: if there is state, the parameter is loaded after it.
    const bool LATE = DIRECTION != SRKL_GRADIENT;
    const bool LARGEST = DIRECTION == SRKL_AMSGRAD;
    const bool SECOND = DIRECTION == SRKL_ADAM || DIRECTION == SRKL_NESTEROV_ADAM || LARGEST;
    const bool AHEAD = DIRECTION == SRKL_NESTEROV || DIRECTION == SRKL_NESTEROV_ADAM;
    for (int first = 0; first < wide; first += BATCH * STRIDE) {
        const int at = first + threadIdx.x * N;
        Elements<G, N> gs[BATCH];
        Elements<C, N> xs[BATCH], ds[BATCH], states[BATCH];
        load_elements<STRIDE>(gs, g, at, wide);
        if (DIRECTION != SRKL_GRADIENT) part.m().template load<STRIDE>(ds, at, wide);
        if (SECOND) part.v().template load<STRIDE>(states, at, wide);
        // There is room for it until the parameter is loaded.
        if (LARGEST) part.v_max().template load<STRIDE>(xs, at, wide);
        if (!LATE) load_parameters<STRIDE>(xs, part, at, wide, reset_master);
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
#pragma unroll
            for (int e = 0; e < N; e++) {
                C d = (C)widen(gs[j][e]);
                if (SECOND) states[j][e] = k.moments.second_moment(states[j][e], d);
                if (DIRECTION == SRKL_LION) states[j][e] = sign(k.moments.look_ahead(ds[j][e], d));
                ds[j][e] = DIRECTION == SRKL_GRADIENT ? d : k.moments.first_moment(ds[j][e], d);
            }
            if (DIRECTION != SRKL_GRADIENT) part.m().store(at + j * STRIDE, wide, ds[j]);
            if (DIRECTION == SRKL_LION) ds[j] = states[j];
            if (AHEAD) {
#pragma unroll
                for (int e = 0; e < N; e++) {
                    // The same bits; a number less to keep.
                    const C g = (C)widen(gs[j][e]);
                    ds[j][e] = DIRECTION == SRKL_NESTEROV ? k.moments.first_moment(ds[j][e], g)
                                                          : k.moments.look_ahead(ds[j][e], g);
                }
            }
            if (SECOND) {
                part.v().store(at + j * STRIDE, wide, states[j]);
                if (LARGEST) {
#pragma unroll
                    for (int e = 0; e < N; e++) states[j][e] = k.moments.largest(xs[j][e], states[j][e]);
                    part.v_max().store(at + j * STRIDE, wide, states[j]);
                }
#pragma unroll
                for (int e = 0; e < N; e++) ds[j][e] = div(ds[j][e], k.moments.denom(states[j][e]));
            }
        }
        if (CAUTIOUS && is_cautious) {
#pragma unroll
            for (int j = 0; j < BATCH; j++)
#pragma unroll
                for (int e = 0; e < N; e++) ds[j][e] = cautious(ds[j][e], (C)widen(gs[j][e]));
        }
        if (LATE) load_parameters<STRIDE>(xs, part, at, wide, reset_master);
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            Elements<P, N> ws;
#pragma unroll
            for (int e = 0; e < N; e++) {
                xs[j][e] = apply_step(xs[j][e], ds[j][e], k.step_size, k.decay_factor);
                narrow(xs[j][e], ws[e]);
                // The average follows the parameter as stored.
                if (!part.master()) xs[j][e] = (C)widen(ws[e]);
            }
            if (part.master()) part.master().store(at + j * STRIDE, wide, xs[j]);
            store_elements(part.w(), at + j * STRIDE, wide, ws);
        }
        if (part.average()) {
            part.average().template load<STRIDE>(states, at, wide);
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
#pragma unroll
                for (int e = 0; e < N; e++) states[j][e] = lerp(states[j][e], xs[j][e], k.average);
                part.average().store(at + j * STRIDE, wide, states[j]);
            }
        }
    }
}

template <bool ALL, typename P, typename C, typename G>
__device__ inline int update_vectors(const Part<P, C> &part, const SrklGradient &g, u64 start, int len, u64 n,
                                     bool reset_master, u32 direction, bool masks, const Coefficients<C> &k) {
    const G *p = (const G *)g.address;
    const int wide = vector_part(p, start, len, n);
    p += start;
    if (ALL && direction == SRKL_LION)
        update_vectors<ALL, SRKL_LION>(part, p, wide, reset_master, masks, k);
    else if (ALL && direction == SRKL_NESTEROV_ADAM)
        update_vectors<ALL, SRKL_NESTEROV_ADAM>(part, p, wide, reset_master, masks, k);
    else if (ALL && direction == SRKL_AMSGRAD)
        update_vectors<ALL, SRKL_AMSGRAD>(part, p, wide, reset_master, masks, k);
    else if (direction == SRKL_GRADIENT)
        update_vectors<false, SRKL_GRADIENT>(part, p, wide, reset_master, false, k);
    else if (direction == SRKL_MOMENTUM)
        update_vectors<ALL, SRKL_MOMENTUM>(part, p, wide, reset_master, masks, k);
    else if (direction == SRKL_NESTEROV)
        update_vectors<ALL, SRKL_NESTEROV>(part, p, wide, reset_master, masks, k);
    else
        update_vectors<ALL, SRKL_ADAM>(part, p, wide, reset_master, masks, k);
    return wide;
}

// Updates elements `from..len` of a chunk one by one: those behind the wide part; all of them if elements
// have their own brakes, if they are orthogonalised (the time goes into products), or if `update_vectors`
// does not handle the gradient's dtype.
//
// If it MEASURES, `from` is 0. It then adds the terms of `D^2` and `d m` to the lanes, of which a thread has
// the same ones in every row, and writes the sums of `D^2` over the chunk's strips to `strips`, unless that
// is 0.
template <bool ELEMENTS, bool ELEMENT, bool MEASURES, typename P, typename C>
__device__ inline void update_scalars(const Part<P, C> &part, const SrklGradient &g, u64 start, int from,
                                      int len, bool reset_master, const BlockStep &block_step,
                                      const Coefficients<C> &k, Lanes &lanes, double *strips) {
    const SrklGroup &group = block_step.group;
    // Whether all that settings may ask for comes here: srkl_step has fewer registers.
    const bool ALL = ELEMENTS || MEASURES;
    if (MEASURES)
        for (int l = threadIdx.x; l < SRKL_LANES; l += SRKL_THREADS) lanes.sum2[l] = lanes.sum4[l] = 0.;
#pragma unroll 1
    for (int first = from; first < len; first += SRKL_THREADS) {
        const int at = first + threadIdx.x;
        double square = 0.;
        if (at < len) {
            C gradient, step_size = k.step_size, decay_factor = k.decay_factor;
            from_f64(load_one(g, start + at), gradient);
            if (ELEMENT) {
                double q = part.q() ? (double)part.q().load_one(at) : 0.;
                double phi = element_phi(block_step, (double)gradient, q);
                step_coefficients(phi, block_step, step_size, decay_factor);
            }
            C d = gradient;
            if (group.direction != SRKL_GRADIENT) {
                const C old = part.m().load_one(at);
                d = part.m().store_one(at, k.moments.first_moment(old, gradient));
                // The same bits as by `look_ahead`; a number less to keep.
                if (group.direction == SRKL_NESTEROV) d = k.moments.first_moment(d, gradient);
                if (ALL && group.ahead && (MEASURES || group.direction != SRKL_MUON))
                    d = k.moments.look_ahead(d, gradient);
                if (ALL && group.direction == SRKL_LION) d = k.moments.look_ahead(old, gradient);
            }
            const C m = d;
            if (group.direction == SRKL_MUON) from_f64(load_one(part.block.orthogonal, start + at), d);
            if (ALL && group.direction == SRKL_LION) d = sign(d);
            if (group.direction == SRKL_ADAM || (ALL && has_second_moment(group.direction))) {
                C v = part.v().store_one(at, k.moments.second_moment(part.v().load_one(at), gradient));
                if (ALL && group.direction == SRKL_AMSGRAD)
                    v = part.v_max().store_one(at, k.moments.largest(part.v_max().load_one(at), v));
                d = div(d, k.moments.denom(v));
            }
            if (ALL && group.cautious) d = cautious(d, gradient);
            const C before = MEASURES ? (C)widen(part.w()[at]) : (C)0;
            C x = part.master() && !reset_master ? part.master().load_one(at) : (C)widen(part.w()[at]);
            x = apply_step(x, d, step_size, decay_factor);
            narrow(x, part.w()[at]);
            if (part.master()) part.master().store_one(at, x);
            if (part.average()) {
                C stored = part.master() ? x : (C)widen(part.w()[at]);
                part.average().store_one(at, lerp(part.average().load_one(at), stored, k.average));
            }
            if (MEASURES) {
                const int l = at % SRKL_LANES;
                const double step = __dsub_rn((double)(C)widen(part.w()[at]), (double)before);
                square = __dmul_rn(step, step);
                lanes.sum2[l] = __dadd_rn(lanes.sum2[l], square);
                lanes.sum4[l] = __dadd_rn(lanes.sum4[l], __dmul_rn((double)d, (double)m));
            }
        }
        if (MEASURES) {
            const double sum = strip_sum(square);
            if (strips != 0 && at < len && at % SRKL_STRIP == 0) strips[at / SRKL_STRIP] = sum;
        }
    }
}

// Updates elements `start..start + len` of a block, one chunk. ELEMENTS: whether elements may have their own
// brakes, whose double precision takes registers: blocks of such groups go element by element. If it
// MEASURES, it leaves the sums of `D^2` and `d m` in the lanes.
template <bool ELEMENTS, bool MEASURES, typename P, typename C>
__device__ __forceinline__ void update(const SrklBlock &block, const SrklGradient &g, u64 start, int len,
                                       bool reset_master, const BlockStep &block_step, Lanes &lanes,
                                       double *strips) {
    const Coefficients<C> k(block_step);
    const Part<P, C> part(block, start);
    const SrklGroup &group = block_step.group;
    // Read once: each of a CTA's reads counts.
    const u32 direction = group.direction;
    const bool masks = ELEMENTS && group.cautious;
    const bool one_by_one = direction == SRKL_MUON || (ELEMENTS && has_element_brakes(group));
    const bool vectors = !MEASURES && !one_by_one;
    int wide = 0;
    if (vectors && g.dtype == block.dtype)
        wide = update_vectors<ELEMENTS, P, C, P>(part, g, start, len, block.n, reset_master, direction, masks,
                                                 k);
    else if (vectors && g.dtype == SRKL_F32 && sizeof(P) == 2)
        wide = update_vectors<ELEMENTS, P, C, C>(part, g, start, len, block.n, reset_master, direction, masks,
                                                 k);
    if (ELEMENTS && has_element_brakes(group))
        update_scalars<ELEMENTS, true, MEASURES>(part, g, start, 0, len, reset_master, block_step, k, lanes,
                                                 strips);
    else
        update_scalars<ELEMENTS, false, MEASURES>(part, g, start, wide, len, reset_master, block_step, k,
                                                  lanes, strips);
}

template <bool ELEMENTS, bool MEASURES>
__device__ __forceinline__ void update(const SrklBlock &block, const SrklGradient &g, u64 start, int len,
                                       bool reset_master, const BlockStep &block_step, Lanes &lanes,
                                       double *strips) {
    switch (block.dtype) {
    case SRKL_F32:
        return update<ELEMENTS, MEASURES, float, float>(block, g, start, len, reset_master, block_step, lanes,
                                                        strips);
    case SRKL_F64:
        return update<ELEMENTS, MEASURES, double, double>(block, g, start, len, reset_master, block_step,
                                                          lanes, strips);
    case SRKL_BF16:
        return update<ELEMENTS, MEASURES, bf16, float>(block, g, start, len, reset_master, block_step, lanes,
                                                       strips);
    default:
        return update<ELEMENTS, MEASURES, f16, float>(block, g, start, len, reset_master, block_step, lanes,
                                                      strips);
    }
}
