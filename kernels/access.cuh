// Global memory in accesses of 16 bytes, whatever the alignment of a gradient.
//
// A chunk has a wide part, its first elements up to a multiple of 16, and up to 31 single elements behind it,
// at the end of a tensor. Neighbouring threads take neighbouring vectors of 16 bytes, so that a warp's access
// touches whole sectors of 32 bytes. If a thread needs more than 16 bytes of one tensor (8 f32 masters beside
// 8 bf16 parameters), two neighbours load halves for each other and exchange them.
#pragma once

#include "numerics.cuh"

// As many elements as 16 bytes hold.
template <typename T> struct alignas(16) Vector {
    static const int N = 16 / sizeof(T);
    T at[N];
};

// N neighbouring elements: one vector or more.
template <typename T, int N> struct Elements {
    static const int PARTS = N / Vector<T>::N;
    Vector<T> part[PARTS];
    __device__ T &operator[](int k) { return part[k / Vector<T>::N].at[k % Vector<T>::N]; }
};

// How many elements of a chunk, `start..start + len` of the `n` at `p`, are in its wide part.
template <typename T> __device__ inline int vector_part(const T *p, u64 start, int len, u64 n) {
    const u64 first = (u64)(p + start), end = (u64)(p + n), shift = first & 15;
    if (shift == 0) return len / 16 * 16;
    // A misaligned vector is made of two aligned ones, which must not reach beyond the tensor's end. (Up to
    // 15 bytes before its beginning are in the same allocation, which is aligned.)
    const u64 reach = (end & ~15ull) - (first - shift);
    const u64 most = reach < 32 ? 0 : (reach - 16) / sizeof(T);
    return (int)(most < len ? most : len) / 16 * 16;
}

// The 16 bytes from byte `shift` of two neighbouring vectors on; `shift` is below 16.
__device__ inline uint4 shifted(uint4 low, uint4 high, u32 shift) {
    u32 bits = 8 * (shift & 3);
    // Selects instead of indices, which would put the words into local memory.
    bool one = shift & 4, two = shift & 8;
    u32 a = one ? low.y : low.x, b = one ? low.z : low.y, c = one ? low.w : low.z;
    u32 d = one ? high.x : low.w, e = one ? high.y : high.x, f = one ? high.z : high.y;
    u32 g = one ? high.w : high.z;
    a = two ? c : a, b = two ? d : b, c = two ? e : c, d = two ? f : d, e = two ? g : e;
    return make_uint4(__funnelshift_r(a, b, bits), __funnelshift_r(b, c, bits), __funnelshift_r(c, d, bits),
                      __funnelshift_r(d, e, bits));
}

// Loads the vectors at elements `at`, `at + STRIDE`, ... of a chunk at `p`, all of them before the first is
// used; 0 beyond the wide part.
template <int STRIDE, int ROWS, typename T>
__device__ inline void load_rows(Vector<T> (&x)[ROWS], const T *p, int at, int wide) {
    const int STEP = STRIDE / Vector<T>::N;
    const u64 address = (u64)(p + at);
    const u32 shift = address & 15;
    const uint4 *low = (const uint4 *)(address - shift);
    const uint4 zero = {0, 0, 0, 0};
    uint4 words[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) words[r] = at + r * STRIDE < wide ? low[r * STEP] : zero;
    if (shift != 0) {
        uint4 high[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) high[r] = at + r * STRIDE < wide ? low[r * STEP + 1] : zero;
#pragma unroll
        for (int r = 0; r < ROWS; r++) words[r] = shifted(words[r], high[r], shift);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) *(uint4 *)&x[r] = words[r];
}

// By value: a choice between two places would put both into local memory.
template <typename T> __device__ inline Vector<T> select(bool first, Vector<T> a, Vector<T> b) {
    uint4 x = *(const uint4 *)&a, y = *(const uint4 *)&b;
    x.x = first ? x.x : y.x, x.y = first ? x.y : y.y, x.z = first ? x.z : y.z, x.w = first ? x.w : y.w;
    return *(const Vector<T> *)&x;
}

// The vector of the other thread of a pair, 2k and 2k + 1.
template <typename T> __device__ inline Vector<T> exchange(Vector<T> x) {
    uint4 words = *(const uint4 *)&x;
    words.x = __shfl_xor_sync(0xffffffff, words.x, 1);
    words.y = __shfl_xor_sync(0xffffffff, words.y, 1);
    words.z = __shfl_xor_sync(0xffffffff, words.z, 1);
    words.w = __shfl_xor_sync(0xffffffff, words.w, 1);
    return *(const Vector<T> *)&words;
}

// Loads a thread's elements `at..at + N`, `at + STRIDE..`, ... of a chunk at `p`. All threads of a warp
// come, with `at` a multiple of N as their numbers are.
//
// The 2 * PARTS vectors of a pair are numbered in order; the even thread loads the even ones, the odd one
// the odd ones, and then the even one gets the lower half.
template <int STRIDE, int N, int ROWS, typename T>
__device__ inline void load_elements(Elements<T, N> (&x)[ROWS], const T *p, int at, int wide) {
    const int PARTS = Elements<T, N>::PARTS, H = PARTS / 2;
    const bool odd = threadIdx.x & 1;
    Vector<T> rows[PARTS][ROWS];
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        int vector = PARTS == 1 ? 0 : odd ? 2 * i + 1 - PARTS : 2 * i;
        load_rows<STRIDE>(rows[i], p, at + vector * Vector<T>::N, wide);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (PARTS == 1) x[r].part[0] = rows[0][r];
#pragma unroll
        for (int j = 0; j < H; j++) {
            Vector<T> kept = select(odd, rows[H + j][r], rows[j][r]);
            Vector<T> other = exchange(select(odd, rows[j][r], rows[H + j][r]));
            x[r].part[2 * j] = select(odd, other, kept);
            x[r].part[2 * j + 1] = select(odd, kept, other);
        }
    }
}

// Stores a thread's elements at `at` of a chunk at `p`, which is 16-byte aligned, if they are in the wide
// part. All threads of a warp come.
template <typename T, int N>
__device__ inline void store_elements(T *p, int at, int wide, const Elements<T, N> &x) {
    const int PARTS = Elements<T, N>::PARTS, H = PARTS / 2;
    const bool odd = threadIdx.x & 1;
    Vector<T> out[PARTS];
    if (PARTS == 1) out[0] = x.part[0];
#pragma unroll
    for (int j = 0; j < H; j++) {
        Vector<T> kept = select(odd, x.part[2 * j + 1], x.part[2 * j]);
        Vector<T> other = exchange(select(odd, x.part[2 * j], x.part[2 * j + 1]));
        out[j] = select(odd, other, kept);
        out[H + j] = select(odd, kept, other);
    }
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        int vector = PARTS == 1 ? 0 : odd ? 2 * i + 1 - PARTS : 2 * i;
        if (at < wide) *(uint4 *)(p + at + vector * Vector<T>::N) = *(const uint4 *)&out[i];
    }
}

// One element of a gradient of any dtype; f64 holds every value of the others.
__device__ inline double load_one(const SrklGradient &g, u64 i) {
    switch (g.dtype) {
    case SRKL_F32: return ((const float *)g.address)[i];
    case SRKL_F64: return ((const double *)g.address)[i];
    case SRKL_BF16: return widen(((const bf16 *)g.address)[i]);
    default: return widen(((const f16 *)g.address)[i]);
    }
}
