// The formats of state, and their conversions to and from the compute type. (src/backend/cpu/rows.rs is the
// same on the CPU.)
#pragma once

#include "access.cuh"
#include "compact.cuh"

// State of one kind in f32 or f64, as it is computed with, of the elements of a chunk that begins at element
// `start`.
template <typename C> struct Exact {
    u64 address; // 16-byte aligned, or 0: there is none
    u64 start;

    __device__ explicit operator bool() const { return address != 0; }

    // A thread's elements `at..at + N`, `at + STRIDE..`, ... of the wide part; all threads of a warp call it
    // together.
    template <int STRIDE, int N, int ROWS>
    __device__ void load(Elements<C, N> (&x)[ROWS], int at, int wide) const {
        load_elements<STRIDE>(x, chunk(), at, wide);
    }
    template <int N> __device__ void store(int at, int wide, const Elements<C, N> &x) const {
        store_elements(chunk(), at, wide, x);
    }

    // One element.
    __device__ C load_one(int at) const { return chunk()[at]; }
    __device__ C store_one(int at, C x) const { return chunk()[at] = x; }

  private:
    __device__ C *chunk() const { return address != 0 ? (C *)address + start : 0; }
};

// Where the exponents of compact moments are.
__device__ inline unsigned char *exponents(const SrklBlock &block, u64 address) {
    return (unsigned char *)address + (block.n + SRKL_UNIT - 1) / SRKL_UNIT * SRKL_UNIT;
}

// Where the samples of the parameter are, of a split master.
__device__ inline short *samples(const SrklBlock &block) {
    return (short *)block.master + (block.n + 7) / 8 * 8;
}

// The element that is sample `k` of a parameter, among those that are stepped here; not below `block.n` if it
// is none of them.
__device__ inline u64 sample(u64 k, const SrklBlock &block) {
    const u64 whole = block.whole;
    const u64 count = whole < SRKL_MASTER_SAMPLES ? whole : SRKL_MASTER_SAMPLES;
    if (k >= count) return block.n;
    const u64 i = count > 1 ? k * (whole - 1) / (count - 1) : 0;
    return i < block.first ? block.n : i - block.first;
}

// A chunk of a parameter and its state. P is the parameter's type, C its compute type. (In srkl_step and
// srkl_sums the addresses stay in shared memory, where `block` is: registers are few.)
template <typename P, typename C> struct Part {
    const SrklBlock &block;
    u64 start;

    __device__ Part(const SrklBlock &block, u64 start) : block(block), start(start) {}
    __device__ P *w() const { return (P *)block.w + start; }
    __device__ Exact<C> master() const { return {block.master, start}; }
    __device__ Exact<C> m() const { return {block.m, start}; }
    __device__ Exact<C> v() const { return {block.v, start}; }
    __device__ Exact<C> v_max() const { return {block.v_max, start}; }
    __device__ Exact<C> average() const { return {block.average, start}; }
    __device__ Exact<C> q() const { return {block.q, start}; }

    // One element, in whatever format.
    __device__ C load_v(int at) const { return is_compact() ? (C)compact_v(at) : v().load_one(at); }
    __device__ C load_m(int at) const {
        if (!is_compact()) return m().load_one(at);
        const int q = (int)(signed char)codes(block.m)[start + at];
        return (C)decode_m(q, (int)exponent(block.m, at) - M_BIAS, block.v != 0 ? compact_v(at) : 1.f);
    }
    __device__ C load_average(int at) const {
        if (!(block.packs & SRKL_AVERAGE_BF16)) return average().load_one(at);
        return (C)widen(((const bf16 *)block.average)[start + at]);
    }

  private:
    __device__ bool is_compact() const { return block.packs & SRKL_COMPACT; }
    __device__ static const unsigned char *codes(u64 address) { return (const unsigned char *)address; }
    // The byte of the exponent of an element's unit.
    __device__ u32 exponent(u64 address, int at) const {
        return exponents(block, address)[(start + at) / SRKL_UNIT];
    }
    __device__ float compact_v(int at) const {
        return decode_v(codes(block.v)[start + at], exponent(block.v, at) + LEAST_EXPONENT);
    }
};
