// One step of all parameters of a device: two launches, whatever their number.
//
// Launch contract of both kernels:
//   grid     any number of blocks of threads; they share the chunks, so one for each chunk at the
//            most, and enough to fill the device
//   block    THREADS = 128 threads
//   shared   static
//   table    device addresses as abi.h describes them; nothing overlaps, and every `w` and `master`
//            is 16-byte aligned. Gradients may be misaligned.
//   before the first step: `chunks_done`, `blocks_done`, `decisions` and the counters are zero;
//            each step leaves the former two at zero again
//   order    both on one stream, `statistics` first
//
// Deterministic: a sum's shape depends on element and chunk numbers alone. Which block of threads
// takes a chunk, or comes last, decides only who adds, not what is added in which order.
//
// Bytes a parameter, reference rule: `statistics` reads 4 (f32) or 2 (bf16) of the gradient;
// `update` reads gradient and parameter or master again and writes parameter and master: 12.
//
// Names and order are those of src/backend/cpu.rs.

#include "numerics.cuh"

#define THREADS 128
#define ROWS (SRKL_CHUNK / SRKL_LANES)

// -------------------------------------------------------------------------------------------------
// Sums

struct Lanes {
    double sum2[SRKL_LANES];
    double sum4[SRKL_LANES];
};

// The sum of all lanes, to all threads; the lanes are used up.
__device__ inline double tree(double *lanes) {
    for (int width = SRKL_LANES / 2; width > 0; width /= 2) {
        __syncthreads();
        for (int l = threadIdx.x; l < width; l += THREADS) lanes[l] = __dadd_rn(lanes[l], lanes[l + width]);
    }
    __syncthreads();
    return lanes[0];
}

// The largest of a number from each thread, to all threads.
__device__ inline int block_max(int x) {
    __shared__ int max;
    __syncthreads();
    if (threadIdx.x == 0) max = x;
    __syncthreads();
    atomicMax(&max, x);
    __syncthreads();
    return max;
}

// The sum of `count` items, by rule 4 of the contract; `item(i)` reads one.
template <typename Item> __device__ SrklSums fold(u64 count, Item item, Lanes &lanes) {
    const int NONE = -10000;
    if (count == 1) return item(0);
    int exponent = NONE;
    for (u64 i = threadIdx.x; i < count; i += THREADS) {
        SrklSums x = item(i);
        if (x.sum4 != 0. && (int)x.exponent > exponent) exponent = (int)x.exponent;
    }
    exponent = block_max(exponent);
    SrklSums sums = {0., 0., 0};
    if (exponent == NONE) return sums;
    for (int l = threadIdx.x; l < SRKL_LANES; l += THREADS) {
        double sum2 = 0., sum4 = 0.;
        for (u64 i = l; i < count; i += SRKL_LANES) {
            SrklSums x = item(i);
            int down = (int)x.exponent - exponent;
            if (down > 0) down = 0;
            sum2 = __dadd_rn(sum2, __dmul_rn(x.sum2, pow2(2 * down)));
            sum4 = __dadd_rn(sum4, __dmul_rn(x.sum4, pow2(4 * down)));
        }
        lanes.sum2[l] = sum2;
        lanes.sum4[l] = sum4;
    }
    sums.sum2 = tree(lanes.sum2);
    sums.sum4 = tree(lanes.sum4);
    sums.exponent = exponent;
    return sums;
}

// Sums that another block of threads has written in this launch: past L1.
__device__ inline SrklSums read_sums(const SrklSums *sums) {
    SrklSums x;
    x.sum2 = __ldcg(&sums->sum2);
    x.sum4 = __ldcg(&sums->sum4);
    x.exponent = __ldcg(&sums->exponent);
    return x;
}

// `||c g||_2`
__device__ inline double norm_of(const SrklSums &sums, double c) {
    return __dmul_rn(__dmul_rn(c, pow2((int)sums.exponent)), __dsqrt_rn(sums.sum2));
}

// `||(c g) * (c g)||_2`
__device__ inline double curvature_of(const SrklSums &sums, double c) {
    double unit = __dmul_rn(c, pow2((int)sums.exponent));
    return __dmul_rn(__dmul_rn(unit, unit), __dsqrt_rn(sums.sum4));
}

// -------------------------------------------------------------------------------------------------
// Stage 1: statistics

// The sums over elements `start..start + len` of a gradient of `n`, computed in C: one chunk. A
// thread has 8 lanes, in groups of as many neighbours as 16 bytes hold.
template <typename C, typename T>
__device__ SrklSums chunk_sums(const T *g, u64 start, int len, u64 n, bool norm, Lanes &lanes) {
    const int N = Vector<T>::N, GROUPS = SRKL_LANES / THREADS / N;
    const bool SCALED = sizeof(C) == 8;
    Vector<T> x[ROWS];
    int exponent = 0;
    if (SCALED) {
        int most = -1022;
        for (int group = 0; group < GROUPS; group++)
            for (int row = 0; row < ROWS; row++) {
                int l = (group * THREADS + threadIdx.x) * N, at = row * SRKL_LANES + l;
                if (at < len) {
                    Vector<T> x = load(g, start + at, n);
                    for (int k = 0; k < N; k++) {
                        double magnitude = fabs((double)widen(x.at[k]));
                        if (at + k < len && magnitude < __longlong_as_double(0x7ff0000000000000ll)) {
                            int e = scale_exponent(magnitude);
                            most = e > most ? e : most;
                        }
                    }
                }
            }
        exponent = block_max(most);
    }
    double scale = pow2(-exponent);
    for (int group = 0; group < GROUPS; group++) {
        int l = (group * THREADS + threadIdx.x) * N;
        // Independent loads first.
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            int at = row * SRKL_LANES + l;
            if (at < len) x[row] = load(g, start + at, n);
        }
        double sum2[N] = {}, sum4[N] = {};
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            int at = row * SRKL_LANES + l;
#pragma unroll
            for (int k = 0; k < N; k++) {
                if (at + k < len) {
                    C compute;
                    from_f64((double)widen(x[row].at[k]), compute);
                    double g = (double)compute;
                    if (SCALED) g = __dmul_rn(g, scale);
                    double q = __dmul_rn(g, g);
                    if (norm) sum2[k] = __dadd_rn(sum2[k], q);
                    sum4[k] = __fma_rn(q, q, sum4[k]);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < N; k++) {
            lanes.sum2[l + k] = sum2[k];
            lanes.sum4[l + k] = sum4[k];
        }
    }
    SrklSums sums;
    sums.sum2 = norm ? tree(lanes.sum2) : 0.;
    sums.sum4 = tree(lanes.sum4);
    sums.exponent = exponent;
    return sums;
}

template <typename C>
__device__ SrklSums chunk_sums(const SrklGradient &g, u64 start, int len, u64 n, bool norm, Lanes &lanes) {
    switch (g.dtype) {
    case SRKL_F32: return chunk_sums<C>((const float *)g.address, start, len, n, norm, lanes);
    case SRKL_F64: return chunk_sums<C>((const double *)g.address, start, len, n, norm, lanes);
    case SRKL_BF16: return chunk_sums<C>((const bf16 *)g.address, start, len, n, norm, lanes);
    default: return chunk_sums<C>((const f16 *)g.address, start, len, n, norm, lanes);
    }
}

// Whether one of up to SRKL_PROBES evenly spaced elements is not what its master rounds to.
template <typename P> __device__ bool overwritten(const P *w, const float *master, u64 n) {
    u64 count = n < SRKL_PROBES ? n : SRKL_PROBES;
    bool differs = false;
    if (threadIdx.x < count) {
        u64 i = count > 1 ? threadIdx.x * (n - 1) / (count - 1) : 0;
        P rounded;
        narrow(master[i], rounded);
        float value = widen(w[i]);
        bool both_nan = value != value && master[i] != master[i];
        differs = !same_bits(rounded, w[i]) && !both_nan;
    }
    return __syncthreads_or(differs);
}

// -------------------------------------------------------------------------------------------------
// Stage 2: decide

__device__ inline bool is_finite(double x) {
    return fabs(x) < __longlong_as_double(0x7ff0000000000000ll);
}

// `phi = lr / (1 + beta * H)`, with the schedule in `lr`.
__device__ inline double brake(double lr, double beta, double curvature) {
    return __ddiv_rn(lr, __dadd_rn(1., __dmul_rn(beta, curvature)));
}

// `own` are a block's sums, `total` those over all blocks, where the group uses them. Returns
// whether everything that the block uses is finite.
__device__ bool decide(const SrklGroup &p, const SrklScalars &s, const SrklSums &own, const SrklSums &total,
                       SrklDecision &decision) {
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

// The decisions of all blocks, by one block of threads.
__device__ void decide_all(const SrklTable &table, Lanes &lanes) {
    const SrklBlock *blocks = (const SrklBlock *)table.blocks;
    const SrklGradient *gradients = (const SrklGradient *)table.gradients;
    const SrklGroup *groups = (const SrklGroup *)table.groups;
    const SrklSums *block_sums = (const SrklSums *)table.block_sums;
    SrklDecision *decisions = (SrklDecision *)table.decisions;
    SrklState *state = (SrklState *)table.state;
    const SrklScalars scalars = *(const SrklScalars *)table.scalars;

    SrklSums total = {0., 0., 0};
    if (scalars.total) {
        total = fold(
            table.block_count,
            [=](u64 b) {
                SrklSums sums = read_sums(&block_sums[b]);
                bool finite = is_finite(curvature_of(sums, __ddiv_rn(1., scalars.grad_scale)));
                bool skips = groups[blocks[b].group].nonfinite == SRKL_SKIP_BLOCK;
                bool counts = gradients[b].address != 0 && (finite || !skips);
                SrklSums zero = {0., 0., 0};
                return counts ? sums : zero;
            },
            lanes);
    }
    bool skip_step = false;
    for (u64 b = threadIdx.x; b < table.block_count; b += THREADS) {
        const SrklGroup group = groups[blocks[b].group];
        SrklDecision &decision = decisions[b];
        bool present = gradients[b].address != 0;
        bool finite = decide(group, scalars, read_sums(&block_sums[b]), total, decision);
        bool may_step = finite || group.nonfinite == SRKL_PROPAGATE;
        decision.step = present && may_step;
        skip_step |= present && !may_step && group.nonfinite == SRKL_SKIP_STEP;
    }
    skip_step = __syncthreads_or(skip_step);
    for (u64 b = threadIdx.x; b < table.block_count; b += THREADS) {
        bool skipped = gradients[b].address != 0 && !decisions[b].step;
        if (skip_step)
            decisions[b].step = 0;
        else if (skipped)
            decisions[b].skipped++;
    }
    if (threadIdx.x == 0) {
        *(skip_step ? &state->skipped_steps : &state->steps) += 1;
        state->grad_norm = norm_of(total, __ddiv_rn(1., scalars.grad_scale));
    }
}

// Stages 1 and 2: whoever finishes the last chunk of a block adds its sums, and whoever finishes the
// last block decides.
extern "C" __global__ void __launch_bounds__(THREADS) srkl_statistics(const SrklTable table) {
    __shared__ Lanes lanes;
    __shared__ bool last;
    const u32 *chunk_block = (const u32 *)table.chunk_block;
    SrklSums *sums_of_chunks = (SrklSums *)table.chunk_sums;
    SrklSums *sums_of_blocks = (SrklSums *)table.block_sums;
    const bool norm = ((const SrklScalars *)table.scalars)->norm;

    for (u64 chunk = blockIdx.x; chunk < table.chunk_count; chunk += gridDim.x) {
        const u32 b = chunk_block[chunk];
        const SrklBlock block = ((const SrklBlock *)table.blocks)[b];
        const SrklGradient g = ((const SrklGradient *)table.gradients)[b];
        const u64 chunks = (block.n + SRKL_CHUNK - 1) / SRKL_CHUNK;
        const u64 start = (chunk - block.first_chunk) * SRKL_CHUNK;
        const int len = block.n - start < SRKL_CHUNK ? (int)(block.n - start) : SRKL_CHUNK;

        SrklSums sums = {0., 0., 0};
        if (g.address != 0)
            sums = block.dtype == SRKL_F64 ? chunk_sums<double>(g, start, len, block.n, norm, lanes)
                                           : chunk_sums<float>(g, start, len, block.n, norm, lanes);
        if (threadIdx.x == 0) {
            sums_of_chunks[chunk] = sums;
            __threadfence();
            last = atomicInc(&((u32 *)table.chunks_done)[b], (u32)(chunks - 1)) == chunks - 1;
            __threadfence();
        }
        __syncthreads();
        if (last) {
            const SrklSums *first = &sums_of_chunks[block.first_chunk];
            sums = fold(
                chunks, [=](u64 i) { return read_sums(&first[i]); }, lanes);
            bool take = false;
            if (block.master != 0) {
                const float *master = (const float *)block.master;
                take = block.dtype == SRKL_BF16 ? overwritten((const bf16 *)block.w, master, block.n)
                                                : overwritten((const f16 *)block.w, master, block.n);
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                sums_of_blocks[b] = sums;
                ((SrklDecision *)table.decisions)[b].take_parameter = take;
                __threadfence();
                u32 *blocks_done = &((SrklState *)table.state)->blocks_done;
                last = atomicInc(blocks_done, (u32)(table.live_count - 1)) == table.live_count - 1;
                __threadfence();
            }
            __syncthreads();
            if (last) decide_all(table, lanes);
        }
        __syncthreads();
    }
}

// -------------------------------------------------------------------------------------------------
// Stage 3: update

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

// Eight elements of any dtype.
template <typename T> struct Eight {
    Vector<T> part[sizeof(T) / 2];
    __device__ T &operator[](int k) { return part[k / Vector<T>::N].at[k % Vector<T>::N]; }
};
template <typename T> __device__ inline Eight<T> load8(const T *p, u64 i, u64 n) {
    Eight<T> x;
#pragma unroll
    for (int k = 0; k < (int)sizeof(T) / 2; k++) x.part[k] = load(p, i + k * Vector<T>::N, n);
    return x;
}
template <typename T> __device__ inline void store8(T *p, u64 i, u64 n, const Eight<T> &x) {
#pragma unroll
    for (int k = 0; k < (int)sizeof(T) / 2; k++) store(p, i + k * Vector<T>::N, n, x.part[k]);
}

// The update of one chunk; P is the parameter's type, C its compute type, G the gradient's.
template <typename P, typename C, typename G>
__device__ void update(const SrklBlock &block, const G *g, u64 start, int len, bool take,
                       const Step<C> &step) {
    P *w = (P *)block.w;
    C *master = (C *)block.master;
    for (int at = threadIdx.x * 8; at < len; at += THREADS * 8) {
        u64 i = start + at;
        Eight<G> gs = load8(g, i, block.n);
        Eight<P> ws;
        Eight<C> masters;
        if (master == 0 || take) ws = load8(w, i, block.n);
        if (master != 0 && !take) masters = load8(master, i, block.n);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            C gradient, before = master != 0 && !take ? masters[k] : (C)widen(ws[k]);
            from_f64((double)widen(gs[k]), gradient);
            C after = step(before, gradient);
            masters[k] = after;
            narrow(after, ws[k]);
        }
        if (master != 0) store8(master, i, block.n, masters);
        store8(w, i, block.n, ws);
    }
}

template <typename P, typename C>
__device__ void update(const SrklBlock &block, const SrklGradient &g, u64 start, int len,
                       const SrklDecision &decision, const SrklGroup &group, double schedule) {
    Step<C> step;
    step.c = decision.c;
    step.weight_decay = group.weight_decay;
    step.lr = __dmul_rn(schedule, group.lr);
    step.beta = group.beta;
    step.element = group.scope == SRKL_ELEMENT;
    step.coefficients(decision.phi, step.phi_c, step.keep);
    bool take = decision.take_parameter;
    switch (g.dtype) {
    case SRKL_F32: return update<P>(block, (const float *)g.address, start, len, take, step);
    case SRKL_F64: return update<P>(block, (const double *)g.address, start, len, take, step);
    case SRKL_BF16: return update<P>(block, (const bf16 *)g.address, start, len, take, step);
    default: return update<P>(block, (const f16 *)g.address, start, len, take, step);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) srkl_update(const SrklTable table) {
    for (u64 turn = blockIdx.x; turn < table.chunk_count; turn += gridDim.x) {
        // Last chunks first: their gradients are still in L2.
        const u64 chunk = table.chunk_count - 1 - turn;
        const u32 b = ((const u32 *)table.chunk_block)[chunk];
        const SrklDecision decision = ((const SrklDecision *)table.decisions)[b];
        if (!decision.step) continue;
        const SrklBlock block = ((const SrklBlock *)table.blocks)[b];
        const SrklGradient g = ((const SrklGradient *)table.gradients)[b];
        const SrklGroup group = ((const SrklGroup *)table.groups)[block.group];
        const double schedule = ((const SrklScalars *)table.scalars)->schedule;
        const u64 start = (chunk - block.first_chunk) * SRKL_CHUNK;
        const int len = block.n - start < SRKL_CHUNK ? (int)(block.n - start) : SRKL_CHUNK;
        switch (block.dtype) {
        case SRKL_F32: update<float, float>(block, g, start, len, decision, group, schedule); break;
        case SRKL_F64: update<double, double>(block, g, start, len, decision, group, schedule); break;
        case SRKL_BF16: update<bf16, float>(block, g, start, len, decision, group, schedule); break;
        default: update<f16, float>(block, g, start, len, decision, group, schedule); break;
        }
    }
}
