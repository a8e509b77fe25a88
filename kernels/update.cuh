// Stage 3, update: moves the parameters of a chunk.
//
// Bytes a parameter: reads the gradient (4 for f32, 2 for bf16 and f16) and the parameter, or its
// master where it has one, and writes both. 12 for f32; 12 for bf16 with f32 master and bf16
// gradient: 2 + 4 read, 4 + 2 written.
//
// Contract: all SRKL_THREADS threads of a block call these together; `w` and `master` are 16-byte
// aligned, a gradient need not be, and none overlap.
#pragma once

#include "access.cuh"
#include "decide.cuh"

// `w <- keep * w - phi_c * g`
__device__ inline float descend(float w, float g, float phi_c, float keep) {
    return canonical(__fmaf_rn(g, -phi_c, __fmul_rn(keep, w)));
}
__device__ inline double descend(double w, double g, double phi_c, double keep) {
    return canonical(__fma_rn(g, -phi_c, __dmul_rn(keep, w)));
}

// The numbers of one block's update, and what each element makes of them.
template <typename C> struct Step {
    double c, weight_decay, lr, beta;
    C phi_c, keep;
    bool element;

    __device__ void coefficients(double phi, C &phi_c, C &keep) const {
        from_f64(__dmul_rn(phi, c), phi_c);
        from_f64(__dsub_rn(1., __dmul_rn(phi, weight_decay)), keep);
    }

    __device__ C operator()(C w, C g) const {
        if (!element) return descend(w, g, phi_c, keep);
        double d = __dmul_rn(c, (double)g);
        C phi_c, keep;
        coefficients(brake(lr, beta, __dmul_rn(d, d)), phi_c, keep);
        return descend(w, g, phi_c, keep);
    }
};

// The wide part of a chunk at `w`, `master` (or null) and `g`. P is the parameter's type, C its compute
// type, G the gradient's. All threads of a warp come to each exchange.
template <typename P, typename C, typename G>
__device__ inline void update_wide(P *w, C *master, const G *g, int wide, bool take, C phi_c, C keep) {
    // A thread takes as many neighbours as 16 bytes of the smallest type hold, and some such rows at a
    // time, so that their loads are under way together.
    const int N = 16 / (sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));
    const int BATCH = 32 / (N * sizeof(C)), STRIDE = SRKL_THREADS * N;
    for (int first = 0; first < wide; first += BATCH * STRIDE) {
        const int at = first + threadIdx.x * N;
        Elements<G, N> gs[BATCH];
        Elements<P, N> ws[BATCH];
        Elements<C, N> xs[BATCH];
        load_elements<STRIDE>(gs, g, at, wide);
        if (master != 0 && !take) {
            load_elements<STRIDE>(xs, master, at, wide);
        } else {
            load_elements<STRIDE>(ws, w, at, wide);
#pragma unroll
            for (int j = 0; j < BATCH; j++)
#pragma unroll
                for (int k = 0; k < N; k++) xs[j][k] = (C)widen(ws[j][k]);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
#pragma unroll
            for (int k = 0; k < N; k++) {
                xs[j][k] = descend(xs[j][k], (C)widen(gs[j][k]), phi_c, keep);
                narrow(xs[j][k], ws[j][k]);
            }
            if (master != 0) store_elements(master, at + j * STRIDE, wide, xs[j]);
            store_elements(w, at + j * STRIDE, wide, ws[j]);
        }
    }
}

// Elements `from..len` of a chunk one by one: the single ones behind the wide part; all of them where every
// element has its own brake, or the gradient's dtype is not one that `update_wide` is used for.
template <typename P, typename C>
__device__ inline void update_singles(P *w, C *master, const SrklGradient &g, u64 start, int from, int len,
                                      bool take, const Step<C> &step) {
    for (int at = from + threadIdx.x; at < len; at += SRKL_THREADS) {
        C gradient, x = master != 0 && !take ? master[at] : (C)widen(w[at]);
        from_f64(load_one(g, start + at), gradient);
        x = step(x, gradient);
        if (master != 0) master[at] = x;
        narrow(x, w[at]);
    }
}

// The update of elements `start..start + len` of a block, one chunk.
template <typename P, typename C>
__device__ inline void update(const SrklBlock &block, const SrklGradient &g, u64 start, int len, bool take,
                              const SrklDecision &decision, const SrklGroup &group, double schedule) {
    Step<C> step;
    step.c = decision.c;
    step.weight_decay = group.weight_decay;
    step.lr = __dmul_rn(schedule, group.lr);
    step.beta = group.beta;
    step.element = group.scope == SRKL_ELEMENT;
    step.coefficients(decision.phi, step.phi_c, step.keep);
    P *w = (P *)block.w + start;
    C *master = block.master != 0 ? (C *)block.master + start : 0;
    int wide = 0;
    if (g.dtype == block.dtype && !step.element) {
        const P *p = (const P *)g.address;
        wide = wide_part(p, start, len, block.n);
        update_wide(w, master, p + start, wide, take, step.phi_c, step.keep);
    } else if (g.dtype == SRKL_F32 && sizeof(P) == 2 && !step.element) {
        const C *p = (const C *)g.address;
        wide = wide_part(p, start, len, block.n);
        update_wide(w, master, p + start, wide, take, step.phi_c, step.keep);
    }
    update_singles(w, master, g, start, wide, len, take, step);
}

__device__ inline void update(const SrklBlock &block, const SrklGradient &g, u64 start, int len, bool take,
                              const SrklDecision &decision, const SrklGroup &group, double schedule) {
    switch (block.dtype) {
    case SRKL_F32: return update<float, float>(block, g, start, len, take, decision, group, schedule);
    case SRKL_F64: return update<double, double>(block, g, start, len, take, decision, group, schedule);
    case SRKL_BF16: return update<bf16, float>(block, g, start, len, take, decision, group, schedule);
    default: return update<f16, float>(block, g, start, len, take, decision, group, schedule);
    }
}
