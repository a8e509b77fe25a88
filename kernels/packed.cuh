// Stage 3, update, of blocks whose state is packed, or whose parameters are rounded at random: the same
// mathematics as in update.cuh, with other loads and stores.
//
// A warp takes a unit of 256 neighbours, a thread 8 of them. What is computed is in f32.
//
// Bytes a parameter with Adam: 16 for f32, 14 for bf16 with split masters and bf16 gradient: reads the
// gradient (4, 2), moments (2) and the parameter with what it lacks to its master (4), and writes all but the
// gradient. 4 more for an average of bf16.
//
// Contract: as in update.cuh. The codes of a block fill whole units.
#pragma once

#include "update.cuh"

// Elements of a thread.
static const int EIGHT = SRKL_UNIT / 32;

// The keys of the offsets of a block in this step.
struct Keys {
    u64 moments, averages, parameters;

    __device__ void set(u64 step, u64 place) {
        moments = offset_key(SRKL_MOMENTS, step, place);
        averages = offset_key(SRKL_AVERAGES, step, place);
        parameters = offset_key(SRKL_PARAMETERS, step, place);
    }
};

// 8 neighbours of a chunk of `len` elements at `p`. If they are WIDE all are in the wide part, and the whole
// warp comes; else one by one, and 0 behind the end.
template <bool WIDE, typename T>
__device__ inline void load_eight(T (&x)[EIGHT], const T *p, int at, int len) {
    if (WIDE) {
        Elements<T, EIGHT> row[1];
        load_elements<SRKL_LANES>(row, p, at, len);
#pragma unroll
        for (int e = 0; e < EIGHT; e++) x[e] = row[0][e];
    } else {
#pragma unroll
        for (int e = 0; e < EIGHT; e++) x[e] = at + e < len ? p[at + e] : T{};
    }
}

template <bool WIDE, typename T>
__device__ inline void store_eight(T *p, int at, int len, const T (&x)[EIGHT]) {
    if (WIDE) {
        Elements<T, EIGHT> row;
#pragma unroll
        for (int e = 0; e < EIGHT; e++) row[e] = x[e];
        store_elements(p, at, len, row);
    } else {
#pragma unroll
        for (int e = 0; e < EIGHT; e++)
            if (at + e < len) p[at + e] = x[e];
    }
}

// The 8 codes of a thread, in one access.
union Codes {
    uint2 words;
    unsigned char at[EIGHT];
};

__device__ inline u32 warp_max(u32 x) {
#pragma unroll
    for (int width = 16; width > 0; width /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, width));
    return x;
}

// A chunk of packed state; P is the parameter's type.
template <typename P> struct PackedPart {
    const SrklBlock &block;
    const Keys &keys;
    u64 start;

    __device__ PackedPart(const SrklBlock &block, const Keys &keys, u64 start)
        : block(block), keys(keys), start(start) {}

    __device__ bool is_compact() const { return block.packs & SRKL_COMPACT; }
    // The unit of an element, among those that are stepped here, and among all of the parameter.
    __device__ u64 unit(int at) const { return (start + at) / SRKL_UNIT; }
    __device__ u64 unit_of_all(int at) const { return (block.first + start + at) / SRKL_UNIT; }
    __device__ Codes *codes(u64 address, int at) const { return (Codes *)(address + start + at); }
    __device__ u32 lane() const { return threadIdx.x % 32; }

    // Second and first moments; 1 for `v` if there is none.
    template <bool WIDE>
    __device__ void load_moments(float (&m)[EIGHT], float (&v)[EIGHT], int at, int len) const {
#pragma unroll
        for (int e = 0; e < EIGHT; e++) v[e] = 1.f;
        if (!is_compact()) {
            if (block.v != 0) load_eight<WIDE>(v, (const float *)block.v + start, at, len);
            load_eight<WIDE>(m, (const float *)block.m + start, at, len);
            return;
        }
        if (block.v != 0) {
            Codes code = *codes(block.v, at);
            const u32 exponent = exponents(block, block.v)[unit(at)] + LEAST_EXPONENT;
#pragma unroll
            for (int e = 0; e < EIGHT; e++) v[e] = decode_v(code.at[e], exponent);
        }
        Codes code = *codes(block.m, at);
        const int exponent = (int)exponents(block, block.m)[unit(at)] - M_BIAS;
#pragma unroll
        for (int e = 0; e < EIGHT; e++) m[e] = decode_m((signed char)code.at[e], exponent, v[e]);
    }

    // Both are used up.
    template <bool WIDE>
    __device__ void store_moments(float (&m)[EIGHT], float (&v)[EIGHT], int at, int len) const {
        if (!is_compact()) {
            if (block.v != 0) store_eight<WIDE>((float *)block.v + start, at, len, v);
            store_eight<WIDE>((float *)block.m + start, at, len, m);
            return;
        }
        if (!WIDE) {
#pragma unroll
            for (int e = 0; e < EIGHT; e++)
                if (at + e >= len) m[e] = v[e] = 0.f;
        }
        if (block.v != 0) {
            u32 most = 0;
#pragma unroll
            for (int e = 0; e < EIGHT; e++) most = max(most, v_magnitude(v[e]));
            const u32 exponent = v_exponent(warp_max(most));
            const u32 base = offset_base(keys.moments, unit_of_all(at));
            Codes code;
#pragma unroll
            for (int e = 0; e < EIGHT; e++) {
                const u32 c = encode_v(v[e], exponent, offset(base, lane() * EIGHT + e) >> 12);
                code.at[e] = c;
                m[e] = kept_m(m[e], v[e]);
                v[e] = decode_v(c, exponent);
            }
            *codes(block.v, at) = code;
            store_exponent(block.v, at, exponent - LEAST_EXPONENT);
        }
        u32 most = 0;
#pragma unroll
        for (int e = 0; e < EIGHT; e++) {
            m[e] = relative_m(m[e], v[e]);
            most = max(most, __float_as_uint(m[e]) & 0x7fffffff);
        }
        const int exponent = m_exponent(warp_max(most));
        Codes code;
#pragma unroll
        for (int e = 0; e < EIGHT; e++) code.at[e] = encode_m(m[e], exponent);
        *codes(block.m, at) = code;
        store_exponent(block.m, at, exponent + M_BIAS);
    }

    // Parameters, or their masters.
    template <bool WIDE>
    __device__ void load_parameters(float (&x)[EIGHT], int at, int len, bool reset_master) const {
        if (block.master != 0 && !(block.packs & SRKL_SPLIT) && !reset_master) {
            load_eight<WIDE>(x, (const float *)block.master + start, at, len);
            return;
        }
        P w[EIGHT];
        load_eight<WIDE>(w, (const P *)block.w + start, at, len);
#pragma unroll
        for (int e = 0; e < EIGHT; e++) x[e] = widen(w[e]);
        if (block.packs & SRKL_SPLIT && !reset_master) {
            bf16 rests[EIGHT];
            load_eight<WIDE>(rests, (const bf16 *)block.master + start, at, len);
#pragma unroll
            for (int e = 0; e < EIGHT; e++) x[e] = join(x[e], (short)rests[e].bits);
        }
    }

    // `x` becomes what the average follows: the master, or the parameter as stored; before it is rounded, if
    // that is at random. `stored` are the parameters as stored.
    template <bool WIDE>
    __device__ void store_parameters(float (&x)[EIGHT], P (&stored)[EIGHT], int at, int len,
                                     bool stochastic) const {
#pragma unroll
        for (int e = 0; e < EIGHT; e++) narrow(x[e], stored[e]);
        if (block.packs & SRKL_SPLIT) {
            bf16 rests[EIGHT];
#pragma unroll
            for (int e = 0; e < EIGHT; e++) {
                bf16 parameter;
                short rest;
                split(x[e], parameter, rest);
                rests[e].bits = rest;
            }
            store_eight<WIDE>((bf16 *)block.master + start, at, len, rests);
        } else if (block.master != 0) {
            store_eight<WIDE>((float *)block.master + start, at, len, x);
        } else if (stochastic) {
            const u32 base = offset_base(keys.parameters, unit_of_all(at));
#pragma unroll
            for (int e = 0; e < EIGHT; e++) round_to(x[e], offset(base, lane() * EIGHT + e) >> 16, stored[e]);
        } else {
#pragma unroll
            for (int e = 0; e < EIGHT; e++) x[e] = widen(stored[e]);
        }
        store_eight<WIDE>((P *)block.w + start, at, len, stored);
    }

    template <bool WIDE>
    __device__ void follow_average(const float (&x)[EIGHT], int at, int len, float weight) const {
        if (block.average == 0) return;
        float a[EIGHT];
        if (!(block.packs & SRKL_AVERAGE_BF16)) {
            float *average = (float *)block.average + start;
            load_eight<WIDE>(a, average, at, len);
#pragma unroll
            for (int e = 0; e < EIGHT; e++) a[e] = lerp(a[e], x[e], weight);
            store_eight<WIDE>(average, at, len, a);
            return;
        }
        bf16 *average = (bf16 *)block.average + start;
        bf16 kept[EIGHT];
        load_eight<WIDE>(kept, average, at, len);
        const u32 base = offset_base(keys.averages, unit_of_all(at));
#pragma unroll
        for (int e = 0; e < EIGHT; e++) {
            const float a = lerp(widen(kept[e]), x[e], weight);
            kept[e] = round_bf16(a, offset(base, lane() * EIGHT + e) >> 16);
        }
        store_eight<WIDE>(average, at, len, kept);
    }

  private:
    // The whole warp comes, and has read the one before.
    __device__ void store_exponent(u64 address, int at, u32 exponent) const {
        __syncwarp();
        if (lane() == 0) exponents(block, address)[unit(at)] = exponent;
    }

    __device__ static void round_to(float x, u32 offset, bf16 &out) {
        out = round_bf16(x, offset);
    }
    template <typename T> __device__ static void round_to(float, u32, T &) {} // not rounded at random
};

// Adds the term of `d m` of an element to its lane, which is this thread's.
__device__ inline void add_along(Lanes &lanes, int at, float d, float m) {
    double *lane = &lanes.sum4[at % SRKL_LANES];
    *lane = __dadd_rn(*lane, __dmul_rn((double)d, (double)m));
}

// Updates the units of elements `from..to` of a chunk. If it is WIDE, `g` is of type G, both are multiples of
// a unit, and all of it is in the wide part; else elements are loaded one by one, from gradients of any
// dtype.
//
// If it MEASURES, it adds to the lanes and writes `strips`, as `update_scalars`.
template <bool WIDE, bool ELEMENT, bool MEASURES, typename P, typename G>
__device__ inline void update_units(const PackedPart<P> &part, const SrklGradient &g, int from, int to,
                                    bool reset_master, const BlockStep &block_step,
                                    const Coefficients<float> &k, Lanes &lanes, double *strips) {
    const SrklBlock &block = part.block;
    const SrklGroup &group = block_step.group;
    const u32 direction = group.direction;
#pragma unroll 1
    for (int first = from; first < to; first += SRKL_LANES) {
        const int at = first + threadIdx.x * EIGHT;
        if (at / SRKL_UNIT * SRKL_UNIT >= to) continue;
        float d[EIGHT], x[EIGHT];
        if (WIDE) {
            G gs[EIGHT];
            load_eight<true>(gs, (const G *)g.address + part.start, at, to);
#pragma unroll
            for (int e = 0; e < EIGHT; e++) d[e] = widen(gs[e]);
        } else {
#pragma unroll
            for (int e = 0; e < EIGHT; e++)
                from_f64(at + e < to ? load_one(g, part.start + at + e) : 0., d[e]);
        }
        float phis[ELEMENT ? EIGHT : 1];
        if (ELEMENT) {
#pragma unroll
            for (int e = 0; e < EIGHT; e++) phis[e] = d[e];
        }
        if (direction != SRKL_GRADIENT) {
            float m[EIGHT], v[EIGHT];
            part.template load_moments<WIDE>(m, v, at, to);
            if (direction == SRKL_ADAM || (MEASURES && direction == SRKL_NESTEROV_ADAM)) {
#pragma unroll
                for (int e = 0; e < EIGHT; e++) {
                    const float g = d[e];
                    m[e] = k.moments.first_moment(m[e], g);
                    v[e] = k.moments.second_moment(v[e], g);
                    const bool ahead = MEASURES && direction == SRKL_NESTEROV_ADAM;
                    const float along = ahead ? k.moments.look_ahead(m[e], g) : m[e];
                    d[e] = div(along, k.moments.denom(v[e]));
                    if (MEASURES && group.cautious) d[e] = cautious(d[e], g);
                    if (MEASURES && at + e < to) add_along(lanes, at + e, d[e], along);
                }
            } else if (!WIDE && direction == SRKL_MUON) {
#pragma unroll
                for (int e = 0; e < EIGHT; e++) {
                    if (at + e >= to) continue;
                    const float g = d[e];
                    m[e] = k.moments.first_moment(m[e], g);
                    const float along = group.ahead ? k.moments.look_ahead(m[e], g) : m[e];
                    from_f64(load_one(block.orthogonal, part.start + at + e), d[e]);
                    if (MEASURES && group.cautious) d[e] = cautious(d[e], g);
                    if (MEASURES) add_along(lanes, at + e, d[e], along);
                }
            } else {
#pragma unroll
                for (int e = 0; e < EIGHT; e++) {
                    const float g = d[e], old = m[e];
                    m[e] = k.moments.first_moment(old, g);
                    // The same bits as by `look_ahead`, whose numbers srkl_step_packed does not load.
                    d[e] = direction == SRKL_NESTEROV ? k.moments.first_moment(m[e], g) : m[e];
                    if (MEASURES && direction == SRKL_LION) d[e] = k.moments.look_ahead(old, g);
                    const float along = d[e];
                    if (MEASURES && direction == SRKL_LION) d[e] = sign(d[e]);
                    if (MEASURES && group.cautious) d[e] = cautious(d[e], g);
                    if (MEASURES && at + e < to) add_along(lanes, at + e, d[e], along);
                }
            }
            part.template store_moments<WIDE>(m, v, at, to);
        } else if (MEASURES) {
#pragma unroll
            for (int e = 0; e < EIGHT; e++)
                if (at + e < to) add_along(lanes, at + e, d[e], d[e]);
        }
        P before[MEASURES ? EIGHT : 1], stored[EIGHT];
        if (MEASURES) {
#pragma unroll
            for (int e = 0; e < EIGHT; e++)
                before[e] = at + e < to ? ((const P *)block.w + part.start)[at + e] : P{};
        }
        part.template load_parameters<WIDE>(x, at, to, reset_master);
#pragma unroll
        for (int e = 0; e < EIGHT; e++) {
            float step_size = k.step_size, decay_factor = k.decay_factor;
            if (ELEMENT) {
                const bool has_q = block.q != 0 && at + e < to;
                const double q = has_q ? (double)((const float *)block.q + part.start)[at + e] : 0.;
                step_coefficients(element_phi(block_step, (double)phis[e], q), block_step, step_size,
                                  decay_factor);
            }
            x[e] = apply_step(x[e], d[e], step_size, decay_factor);
        }
        part.template store_parameters<WIDE>(x, stored, at, to, group.stochastic && block.dtype == SRKL_BF16);
        part.template follow_average<WIDE>(x, at, to, k.average);
        if (MEASURES) {
            double squares[EIGHT];
#pragma unroll
            for (int e = 0; e < EIGHT; e++) {
                const double step = __dsub_rn((double)widen(stored[e]), (double)widen(before[e]));
                squares[e] = at + e < to ? __dmul_rn(step, step) : 0.;
                double *lane = &lanes.sum2[(at + e) % SRKL_LANES];
                *lane = __dadd_rn(*lane, squares[e]);
            }
            const double sum = strip_sum(squares);
            if (strips != 0 && at < to && at % SRKL_STRIP == 0) strips[at / SRKL_STRIP] = sum;
        }
    }
}

// Updates elements `start..start + len` of a block, one chunk.
template <bool MEASURES, typename P>
__device__ __forceinline__ void update_packed(const SrklBlock &block, const Keys &keys, const SrklGradient &g,
                                              u64 start, int len, bool reset_master,
                                              const BlockStep &block_step, Lanes &lanes, double *strips) {
    const Coefficients<float> k(block_step);
    const PackedPart<P> part(block, keys, start);
    if (MEASURES) {
        for (int l = threadIdx.x; l < SRKL_LANES; l += SRKL_THREADS) lanes.sum2[l] = lanes.sum4[l] = 0.;
        __syncthreads();
    }
    const bool vectors = !MEASURES && block_step.group.direction != SRKL_MUON;
    int wide = 0;
    if (vectors && g.dtype == block.dtype) {
        wide = vector_part((const P *)g.address, start, len, block.n) / SRKL_UNIT * SRKL_UNIT;
        update_units<true, false, false, P, P>(part, g, 0, wide, reset_master, block_step, k, lanes, strips);
    } else if (vectors && g.dtype == SRKL_F32 && sizeof(P) == 2) {
        wide = vector_part((const float *)g.address, start, len, block.n) / SRKL_UNIT * SRKL_UNIT;
        update_units<true, false, false, P, float>(part, g, 0, wide, reset_master, block_step, k, lanes,
                                                   strips);
    }
    if (MEASURES && has_element_brakes(block_step.group))
        update_units<false, true, true, P, P>(part, g, 0, len, reset_master, block_step, k, lanes, strips);
    else
        update_units<false, false, MEASURES, P, P>(part, g, wide, len, reset_master, block_step, k, lanes,
                                                   strips);
    if (!(block.packs & SRKL_SPLIT)) return;
    __syncthreads();
    const u64 k_sample = threadIdx.x, i = sample(k_sample, block);
    const bool here = i < block.n && i >= start && i < start + len;
    if (here) samples(block)[k_sample] = ((const bf16 *)block.w)[i].bits;
}

template <bool MEASURES>
__device__ __forceinline__ void update_packed(const SrklBlock &block, const Keys &keys, const SrklGradient &g,
                                              u64 start, int len, bool reset_master,
                                              const BlockStep &block_step, Lanes &lanes, double *strips) {
    switch (block.dtype) {
    case SRKL_F32:
        return update_packed<MEASURES, float>(block, keys, g, start, len, reset_master, block_step, lanes,
                                              strips);
    case SRKL_BF16:
        return update_packed<MEASURES, bf16>(block, keys, g, start, len, reset_master, block_step, lanes,
                                             strips);
    default:
        return update_packed<MEASURES, f16>(block, keys, g, start, len, reset_master, block_step, lanes,
                                            strips);
    }
}

// Whether a block takes these updates.
__device__ inline bool is_packed(const SrklBlock &block, const SrklGroup &group) {
    const bool rounds = group.stochastic && block.dtype == SRKL_BF16 && block.master == 0;
    return block.packs != 0 || rounds;
}
