// The formats of state, and their conversions to and from the compute type. A format has these functions, and
// there is one: f32 and f64, stored as they are computed with. (src/backend/cpu/rows.rs is the same on the
// CPU.)
#pragma once

#include "access.cuh"

// State of one kind, of the elements of a chunk that begins at element `start`.
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
    __device__ Exact<C> average() const { return {block.average, start}; }
    __device__ Exact<C> q() const { return {block.q, start}; }
};
