//! The numerics contract: which bits a step gives, on every device.
//!
//! With one exception, [products of matrices](#products-of-matrices), the same inputs give the same bits of
//! parameters, master weights and state, whatever the number
//! of threads, the instruction set, the layout of a gradient in memory, or the way tensors are
//! packed into kernel launches. This page says how, once; the CPU path and the CUDA kernels cite it.
//!
//! # Elements
//!
//! * f32, bf16 and f16 parameters are stepped in f32, f64 parameters in f64: the *compute type* of
//!   the block. bf16 and f16 widen to it exactly; a gradient of another float dtype is rounded to
//!   it once, to nearest, ties to even. (So an f64 gradient beyond f32's range is an infinity to an
//!   f32 parameter.)
//! * Every operation is rounded once, in the order written in `src/rule.rs` (in `src/backend/cpu/` for the
//!   terms of sums, and here for norm and curvature); a fused multiply-add is used exactly where these files say
//!   `mul_add`. No reassociation, no approximate
//!   division, no flushing of subnormals.
//!   For an element, with `fma(a, b, c) = a b + c` rounded once, and `k` the gradient's factor:
//!
//!   ```text
//!   m <- fma(g, gain1 k, decay1 m)                    gain1 = 1 - decay1, or 1 for Direction::Sgd
//!   v <- fma(((1 - decay2) (k g)), k g, decay2 v)
//!   d  = g, or m, or fma(g, gain1 k, decay1 m) again with the new m (nesterov), or m / (sqrt(scale_v v) + eps)
//!   w <- fma(d, -step_size, decay_factor w)
//!   a <- fma(w - a, weight, a)
//!   ```
//! * A parameter is stored by rounding to nearest, ties to even; beyond the largest finite value it
//!   becomes an infinity. A NaN is stored as the one positive quiet pattern without payload:
//!   `7fc00000` (f32), `7ff8000000000000` (f64), `7fc0` (bf16), `7e00` (f16).
//! * What is one number for a block (norms, the curvature `H`, the brake `phi`) is computed in f64
//!   and rounded to the compute type once, before it is used on elements.
//!
//! # Sums
//!
//! A sum over a block has a shape that depends on its number of elements alone:
//!
//! 1. The block is cut into chunks of [`CHUNK`] = 8192 elements; the last may be shorter.
//! 2. A chunk has [`LANES`] = 1024 lanes. Lane `l` adds elements `l`, `l + 1024`, `l + 2048`, ... of
//!    the chunk in this order, in f64, starting from +0. For a sum of fourth powers each addition
//!    is `mul_add(q, q, lane)` with `q = g * g` in f64 (exact for a gradient of at most 24
//!    significant bits); for a sum of squares it is `lane + q`.
//! 3. The lanes are added as a tree: lane `l` takes lane `l + 512` for `l < 512`, then `l + 256` for
//!    `l < 256`, and so on down to one. (An absent element is +0 and adding it changes no bit, so a
//!    short chunk may start its tree at the first width that holds an element.)
//! 4. The chunk sums of a block, and the block sums of all blocks, are added by the same two rules:
//!    lanes of 1024 in order, without a limit on their length, then the tree. A block without a
//!    gradient counts as +0 in its place.
//!
//! f64 holds `g^4` for every f32, from the smallest subnormal (4e-180) to the largest finite value
//! (1e154), so a block of f32, bf16 or f16 needs no scaling: its exponent is 0. A chunk of an f64 block
//! is scaled by `2^-exponent` with `exponent = floor(log2(m))`, `m` its largest finite magnitude, but not
//! below -1022; its sums carry the exponent along. Before sums are added they are brought to the largest
//! exponent among those with a `sum4` other than 0, by powers of two (0 below 2^-1074).
//!
//! A sum over a strip of 32 neighbours (for curvature along a step) is their tree, by rule 3.
//!
//! Sums of products of parameters, directions and differences of gradients (for the trust clip and for
//! measured curvature) follow the same rules, in f64 without a scale; what is beyond f64 counts as not
//! finite.
//!
//! # Packed state
//!
//! A step computes with all of a number and then stores what the format keeps of it. Integer operations and exact powers of
//! two do that; there is no table and no division.
//!
//! **Compact moments.** 256 neighbouring elements of a parameter (by index; the last of them may be fewer) are a *unit* and
//! share two exponents. The second moment of an element is a code `c = e << 3 | f` of 8 bits, a float without a sign whose
//! exponent counts from the unit's `E`, at least 34, the exponent field of what comes after its largest `v`:
//!
//! ```text
//! v = f32 of bits (c << 20) + ((E - 31) << 23)      if e >= 1
//! v = f 2^(E - 160)                                 if e = 0
//! ```
//!
//! So `v` has 3 bits behind the point over 31 binades. An offset of 20 bits, evenly distributed between 0 and a step, is
//! added before the rest is cut off (where `e` is 0, of `v` rounded to nearest in units of `2^(E - 180)`). A `v` above 0 stays above 0. The first moment is an integer `q` from -127 to 127:
//!
//! ```text
//! m = q 2^(h + s)      h = floor((exponent of v + 1) / 2), s the unit's
//! ```
//!
//! with `v` as it is stored, or 1 where there is none. `q` is rounded to nearest, ties to even; `s` is the least with which
//! no `q` is above 127, from -126 to 126. What is not finite is not kept: such a `v` becomes the largest code of its unit, and the `m` beside it 0; such an
//! `m` (and one from `2^127` on) becomes 0, and none of them counts for the unit's exponents. `m 2^-h` is bounded by `127 * 2^121`.
//!
//! **Split masters.** A bf16 parameter `p` is its master rounded to nearest even, and `d` is what is missing: the bits of the
//! master are `(p << 16) + d`, with `d` of 16 bits. Half-way between two bf16 numbers `d` would be 32768 where the one nearer
//! to 0 is taken; there it is 32767, and the master comes back as its f32 neighbour (for 32,640 of all 2^32 patterns).
//!
//! **bf16 rounded at random**: the upper half of the bits of the f32 number, plus an offset of 16 bits.
//!
//! # Products of matrices
//!
//! The exception: [`Direction::Muon`](crate::Direction::Muon) orthogonalises matrices by candle's `matmul` (`gemm` on the
//! CPU, cuBLAS on CUDA devices), whose order of additions is theirs. So the parameters of its matrices, their masters and
//! averages, differ in their last digits between devices, between instruction sets of the CPU, and where matrices of
//! equal shape are multiplied in batches of another size; and so does what follows from them, as a curvature over all
//! parameters. What holds for them too: the same bits from run to run on the same devices, for any number of threads,
//! after a checkpoint, and whatever other optimizers do. Their momentum and the Frobenius norm that it is divided by
//! follow the rules above: the norm by the rules of sums, as if each matrix were a block, of numbers that are rounded to
//! the dtype of the products; the quotient in f64, rounded once.
//!
//! # Random numbers
//!
//! Word `k` of 64 random bits is `mix(mix(mix(mix(seed) ^ draw) ^ stream) ^ k)`, where `mix` adds
//! `9e3779b97f4a7c15` and applies the finalizer of SplitMix64 (Steele and others, 2014):
//! `x ^= x >> 30; x *= bf58476d1ce4e5b9; x ^= x >> 27; x *= 94d049bb133111eb; x ^= x >> 31`.
//!
//! * Random vectors: seed of the settings, number of the measurement as `draw`, the parameter's place as
//!   `stream`. Element `i` has the sign in bit `i % 64` of word `i / 64`.
//! * Offsets of packed state: seed `"moments\0"`, `"averages"` or `"rounding"` (of a parameter without a master) as 8 bytes, the
//!   first byte highest; as `draw` the steps taken before, as `stream` the parameter's place. The upper half of word `u` is
//!   the base of unit `u`; its element `i` has the upper bits of `base + i * 9e3779b1 (mod 2^32)`, which spread evenly over a unit.
//! * [`Dropout`](crate::Dropout): seed and draw of [`random`](crate::random), and the bytes `"dropout\0"`
//!   as `stream`, the first byte highest. Element `i` has the low half of word `i / 2` where `i` is even, the
//!   high half where it is odd.
//!
//! # Range
//!
//! An element's step is `phi * c` times its gradient, `c` the unscaling and clipping: one number,
//! rounded to the compute type. In f32 it loses bits below 1e-38 and is 0 below 1e-45. With the
//! reference rule this needs gradients above 1e20 or so, whose steps are shorter than 1e-20; H and phi
//! in telemetry, in f64, stay right.
//!
//! # How a GPU produces the same bits
//!
//! Lanes are element indices, not addresses, and 1024 lanes suit every 16-byte access. A CTA of
//! 128 threads owns a chunk and each thread keeps 8 lanes in registers, for all 8 rows of 1024: with
//! f32 a thread loads two groups of four neighbours per row, with bf16 or f16 one group of eight,
//! with f64 four groups of two. So a warp reads whole sectors in order, and the loads of several rows
//! are in flight together. At the end of a chunk the 1024
//! lanes meet in shared memory (8 KiB a sum) and the tree runs over lane numbers, the same for all
//! dtypes. A misaligned gradient is read as two neighbouring aligned vectors and shifted, which
//! moves no element to another lane. Chunk sums go to memory by chunk number and are added by rule
//! 4, so neither the number of multiprocessors nor the order in which chunks finish matters.

use std::array;
use std::hint::black_box;

/// Elements in a chunk: the unit of a sum, and of work.
pub const CHUNK: usize = 8192;

/// Lanes of a sum: element `i` of a chunk belongs to lane `i % LANES`.
pub const LANES: usize = 1024;

/// Elements in a strip: neighbours in a chunk that have a sum of their own.
pub const STRIP: usize = 32;

/// A compute type: f32, or f64 for f64 parameters.
pub(crate) trait Real: Copy + PartialOrd + Default + Send + Sync + 'static {
    /// Whether fourth powers can leave the range of f64, so that a chunk's sums need an exponent.
    const SCALED: bool;
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// `self * a + sum` in f64, with product and sum rounded. (Products of f32 numbers are exact there, so that one instruction does it.)
    fn add_product(self, a: Self, sum: f64) -> f64;
    fn mul(self, a: Self) -> Self;
    fn add(self, a: Self) -> Self;
    fn sub(self, a: Self) -> Self;
    fn div(self, a: Self) -> Self;
    fn sqrt(self) -> Self;
    fn neg(self) -> Self;
    /// The value itself, or the canonical NaN for any NaN.
    fn canonical(self) -> Self;
    /// The same if it is wanted.
    #[inline(always)]
    fn canonical_if(self, wanted: bool) -> Self {
        if wanted { self.canonical() } else { self }
    }
    fn is_nan(self) -> bool;
    fn is_finite(self) -> bool;
}

macro_rules! impl_real {
    ($t:ty, $scaled:expr) => {
        impl Real for $t {
            const SCALED: bool = $scaled;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                <$t>::mul_add(self, a, b)
            }
            #[inline(always)]
            fn add_product(self, a: Self, sum: f64) -> f64 {
                let (x, a) = (self.to_f64(), a.to_f64());
                if Self::SCALED { sum + x * a } else { x.mul_add(a, sum) }
            }
            #[inline(always)]
            fn mul(self, a: Self) -> Self {
                self * a
            }
            #[inline(always)]
            fn add(self, a: Self) -> Self {
                self + a
            }
            #[inline(always)]
            fn sub(self, a: Self) -> Self {
                self - a
            }
            #[inline(always)]
            fn div(self, a: Self) -> Self {
                self / a
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn neg(self) -> Self {
                -self
            }
            #[inline(always)]
            fn canonical(self) -> Self {
                if self.is_nan() { <$t>::NAN } else { self }
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                <$t>::is_nan(self)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
        }
    };
}
impl_real!(f32, false);
impl_real!(f64, true);

/// The sums of a chunk, a block or all blocks.
///
/// `sum g^2 = sum2 * 2^(2 exponent)` and `sum g^4 = sum4 * 2^(4 exponent)`. `sum2` is +0 where it
/// was not asked for. A NaN or an infinity among the elements makes `sum4` a NaN or an infinity,
/// and nothing else does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sums {
    pub sum2: f64,
    pub sum4: f64,
    pub exponent: i32,
}

impl Sums {
    pub const ZERO: Self = Self { sum2: 0., sum4: 0., exponent: 0 };

    /// `||c g||_2`
    pub fn norm(&self, c: f64) -> f64 {
        c * pow2(self.exponent) * self.sum2.sqrt()
    }

    /// `||(c g) * (c g)||_2`, the square root of the sum of fourth powers
    pub fn curvature(&self, c: f64) -> f64 {
        let unit = c * pow2(self.exponent);
        unit * unit * self.sum4.sqrt()
    }

    /// The sum of all `items`, by rule 4 of the contract.
    pub fn fold(items: &[Sums]) -> Sums {
        if let [only] = items {
            return *only;
        }
        let exponents = items.iter().filter(|s| s.sum4 != 0.).map(|s| s.exponent);
        let Some(exponent) = exponents.max() else {
            return Self::ZERO;
        };
        let width = items.len().clamp(MIN_LANES, LANES).next_power_of_two();
        let (mut sum2, mut sum4) = (vec![0.; width], vec![0.; width]);
        for row in items.chunks(LANES) {
            for ((lane2, lane4), item) in sum2.iter_mut().zip(&mut sum4).zip(row) {
                // Positive only for sums of zero, which no scale changes.
                let down = (item.exponent - exponent).min(0);
                *lane2 += item.sum2 * pow2(2 * down);
                *lane4 += item.sum4 * pow2(4 * down);
            }
        }
        Self { sum2: tree(&mut sum2), sum4: tree(&mut sum4), exponent }
    }
}

/// Two sums over a chunk, a block or all blocks, where f64 suffices without a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pair {
    pub a: f64,
    pub b: f64,
}

impl Pair {
    pub const ZERO: Self = Self { a: 0., b: 0. };

    /// The sum of all `items`, by rule 4 of the contract.
    pub fn fold(items: &[Pair]) -> Pair {
        let [a, b] = fold(items.len(), |i| [items[i].a, items[i].b]);
        Self { a, b }
    }
}

/// The sums of `count` items of `N` numbers each, by rule 4 of the contract.
pub(crate) fn fold<const N: usize>(count: usize, item: impl Fn(usize) -> [f64; N]) -> [f64; N] {
    match count {
        0 => return [0.; N],
        1 => return item(0),
        _ => {}
    }
    let width = count.clamp(MIN_LANES, LANES).next_power_of_two();
    let mut lanes = [(); N].map(|()| vec![0.; width]);
    for i in 0..count {
        for (lanes, x) in lanes.iter_mut().zip(item(i)) {
            lanes[i % LANES] += x;
        }
    }
    lanes.map(|mut lanes| tree(&mut lanes))
}

/// The `word`-th 64 random bits of a stream, for instance of one parameter in one measurement.
pub(crate) fn random_bits(seed: u64, draw: u64, stream: u64, word: u64) -> u64 {
    random_word(random_key(seed, draw, stream), word)
}

/// What [`random_bits`] makes of all but the word, once for all words.
pub(crate) fn random_key(seed: u64, draw: u64, stream: u64) -> u64 {
    mix(mix(mix(seed) ^ draw) ^ stream)
}

/// The `word`-th 64 random bits by a key.
#[inline(always)]
pub(crate) fn random_word(key: u64, word: u64) -> u64 {
    mix(key ^ word)
}

/// The finalizer of SplitMix64 (Steele and others, 2014).
#[inline(always)]
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `x^(k / 8)` by square roots, for `k` from 0 to 8.
#[inline(always)]
pub(crate) fn eighths(x: f64, k: u32) -> f64 {
    let half = x.sqrt();
    let quarter = half.sqrt();
    let eighth = quarter.sqrt();
    let mut power = if k >= 8 { x } else { 1. };
    for (bit, root) in [(4, half), (2, quarter), (1, eighth)] {
        power = if k & bit != 0 { power * root } else { power };
    }
    power
}

const _: () = assert!(STRIP == 32, "`strip_sum` is written out");

/// The sum of the terms of a strip, by rule 3 of the contract. (Written out, it is computed in registers.)
#[inline(always)]
pub(crate) fn strip_sum(terms: [f64; STRIP]) -> f64 {
    let sums: [f64; 16] = array::from_fn(|i| terms[i] + terms[i + 16]);
    let sums: [f64; 8] = array::from_fn(|i| sums[i] + sums[i + 8]);
    let sums: [f64; 4] = array::from_fn(|i| sums[i] + sums[i + 4]);
    (sums[0] + sums[2]) + (sums[1] + sums[3])
}

/// The sums of strips, of which the last may be shorter.
#[inline(always)]
pub(crate) fn strip_sums(sums: &mut [f64], terms: &[f64]) {
    let (strips, rest) = terms.as_chunks::<STRIP>();
    for (sum, strip) in sums.iter_mut().zip(strips) {
        // Else the compiler takes eight strips at a time, by gathers, which is several times slower.
        *sum = black_box(strip_sum(*strip));
    }
    if let (Some(sum), false) = (sums.get_mut(strips.len()), rest.is_empty()) {
        let mut terms = [0.; STRIP];
        terms[..rest.len()].copy_from_slice(rest);
        *sum = strip_sum(terms);
    }
}

/// The smallest number of lanes that [`tree`] takes: those of two AVX2 registers.
pub(crate) const MIN_LANES: usize = 8;

/// The sum of a power of two of lanes, at least [`MIN_LANES`], by rule 3 of the contract; `lanes` is
/// used up.
#[inline(always)]
pub(crate) fn tree(lanes: &mut [f64]) -> f64 {
    let (mut lanes, rest) = lanes.as_chunks_mut::<MIN_LANES>();
    debug_assert!(lanes.len().is_power_of_two() && rest.is_empty());
    while lanes.len() > 1 {
        let (low, high) = lanes.split_at_mut(lanes.len() / 2);
        for (low, high) in low.iter_mut().zip(high) {
            for (low, high) in low.iter_mut().zip(high) {
                *low += *high;
            }
        }
        lanes = low;
    }
    let [a, b, c, d, e, f, g, h] = lanes[0];
    let [a, b, c, d] = [a + e, b + f, c + g, d + h];
    let [a, b] = [a + c, b + d];
    a + b
}

/// `2^e`, rounded to zero below the subnormals; `e <= 1023`.
pub(crate) fn pow2(e: i32) -> f64 {
    debug_assert!(e <= 1023);
    match e {
        -1022.. => f64::from_bits(((e + 1023) as u64) << 52),
        -1074..-1022 => f64::from_bits(1 << (e + 1074)),
        _ => 0.,
    }
}

/// The exponent that scales a chunk whose largest finite magnitude is `max`: `floor(log2(max))`,
/// but not below -1022.
#[inline(always)]
pub(crate) fn scale_exponent(max: f64) -> i32 {
    ((max.to_bits() >> 52) as i32 & 0x7ff).max(1) - 1023
}

// The conversions are integer operations on whole words, without branches on the value, so that
// they vectorize; those of `half` are scalar for bf16.

/// bf16 to f32, exactly.
#[inline(always)]
pub(crate) fn bf16_to_f32(x: u16) -> f32 {
    f32::from_bits((x as u32) << 16)
}

/// f32 to bf16: to nearest, ties to even, one NaN.
#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> u16 {
    if x.is_nan() { 0x7fc0 } else { canonical_to_bf16(x) }
}

/// The same, for numbers whose only NaN is the canonical one: it comes out right without being looked for.
#[inline(always)]
pub(crate) fn canonical_to_bf16(x: f32) -> u16 {
    debug_assert!(!x.is_nan() || x.to_bits() == f32::NAN.to_bits());
    let bits = x.to_bits();
    let odd = (bits >> 16) & 1;
    (bits.wrapping_add(0x7fff + odd) >> 16) as u16
}

/// f16 to f32, exactly.
#[inline(always)]
pub(crate) fn f16_to_f32(x: u16) -> f32 {
    const EXPONENT: u32 = 0x7c00 << 13;
    let sign = ((x & 0x8000) as u32) << 16;
    let magnitude = ((x & 0x7fff) as u32) << 13;
    let exponent = magnitude & EXPONENT;
    // Rebias from 15 to 127; infinities and NaN go to the top of the range, and a subnormal is read
    // as 2^-14 * 1.fraction, from which 2^-14 is taken off.
    let normal = magnitude + ((127 - 15) << 23);
    let special = magnitude + ((255 - 31) << 23);
    let subnormal = f32::from_bits(normal + (1 << 23)) - f32::from_bits((127 - 14) << 23);
    let bits = if exponent == EXPONENT {
        special
    } else if exponent == 0 {
        subnormal.to_bits()
    } else {
        normal
    };
    f32::from_bits(sign | bits)
}

/// f32 to f16: to nearest, ties to even, one NaN; from 65520 on an infinity.
#[inline(always)]
pub(crate) fn f32_to_f16(x: f32) -> u16 {
    const INFINITY: u32 = 0x7c00;
    const FIRST_INFINITE: u32 = 0x477f_f000; // 65520
    const FIRST_NORMAL: u32 = (127 - 14) << 23; // 2^-14
    let sign = (x.to_bits() >> 16) as u16 & 0x8000;
    let magnitude = x.to_bits() & 0x7fff_ffff;
    // Rebias from 127 to 15 and round away 13 bits.
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + odd) >> 13;
    // In [0.5, 1) an f32 has the spacing of f16's subnormals, so adding 0.5 rounds to it.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let bits = if magnitude >= FIRST_INFINITE {
        INFINITY
    } else if magnitude < FIRST_NORMAL {
        subnormal
    } else {
        normal
    };
    if x.is_nan() { 0x7e00 } else { sign | bits as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use proptest::prelude::*;

    /// Both sides of a narrowing may be NaN, but ours must be the canonical one.
    fn check_narrowing(x: f32) {
        if x.is_nan() {
            assert_eq!(f32_to_bf16(x), 0x7fc0, "{:08x}", x.to_bits());
            assert_eq!(f32_to_f16(x), 0x7e00, "{:08x}", x.to_bits());
        } else {
            assert_eq!(f32_to_bf16(x), bf16::from_f32(x).to_bits(), "{:08x}", x.to_bits());
            assert_eq!(f32_to_f16(x), f16::from_f32(x).to_bits(), "{:08x}", x.to_bits());
        }
    }

    #[test]
    fn a_strip_is_summed_as_by_the_tree() {
        let mut terms: [f64; STRIP] = std::array::from_fn(|i| (i as f64 * 1.7).sin().exp());
        let (sum, in_order) = (strip_sum(terms), terms.iter().sum::<f64>());
        assert_eq!(sum.to_bits(), tree(&mut terms).to_bits());
        assert_ne!(sum, in_order);
    }

    #[test]
    fn every_half_widens_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert_eq!(bf16_to_f32(bits).is_nan(), b.is_nan(), "{bits:04x}");
            assert_eq!(f16_to_f32(bits).is_nan(), h.is_nan(), "{bits:04x}");
            if !b.is_nan() {
                assert_eq!(bf16_to_f32(bits).to_bits(), b.to_f32().to_bits(), "{bits:04x}");
                assert_eq!(f32_to_bf16(bf16_to_f32(bits)), bits);
            }
            if !h.is_nan() {
                assert_eq!(f16_to_f32(bits).to_bits(), h.to_f32().to_bits(), "{bits:04x}");
                assert_eq!(f32_to_f16(f16_to_f32(bits)), bits);
            }
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even_at_every_exponent() {
        // Every sign and exponent, with the fractions around every kind of tie.
        let fractions = [0u32, 1, 0xfff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x2fff, 0x3000, 0x3001];
        let ties = [0x7fffu32, 0x8000, 0x8001, 0x1_7fff, 0x1_8000, 0x1_8001, 0x7f_7fff, 0x7f_ffff];
        for exponent in 0..=0x1ffu32 {
            for fraction in fractions.iter().chain(&ties) {
                check_narrowing(f32::from_bits(exponent << 23 | fraction));
            }
        }
    }

    proptest! {
        #[test]
        fn narrowing_agrees_with_the_half_crate(bits in any::<u32>()) {
            check_narrowing(f32::from_bits(bits));
        }

        #[test]
        fn pow2_is_exact(e in -1100..1024i32) {
            prop_assert_eq!(pow2(e), 2f64.powi(e / 2) * 2f64.powi(e - e / 2));
        }

        #[test]
        fn a_scaled_magnitude_is_below_two(bits in 0..0x7ff0_0000_0000_0000u64) {
            let max = f64::from_bits(bits);
            let scaled = max * pow2(-scale_exponent(max));
            prop_assert!(scaled < 2. && (scaled >= 1. || max < f64::MIN_POSITIVE));
        }
    }

    #[test]
    fn sums_of_different_exponents_meet_at_the_largest() {
        let a = Sums { sum2: 1., sum4: 1., exponent: 3 };
        let b = Sums { sum2: 4., sum4: 16., exponent: 2 };
        let zero = Sums { exponent: 900, ..Sums::ZERO };
        // 1 * 2^6 + 4 * 2^4 = 2 * 2^6 and 1 * 2^12 + 16 * 2^8 = 2 * 2^12
        assert_eq!(Sums::fold(&[a, zero, b]), Sums { sum2: 2., sum4: 2., exponent: 3 });
        assert_eq!(Sums::fold(&[]), Sums::ZERO);
        let far = Sums { sum2: 1., sum4: 1., exponent: -1022 };
        assert_eq!(Sums::fold(&[a, far]), a);
    }

    /// The shape of the sum, written out naively.
    #[test]
    fn fold_has_the_shape_of_the_contract() {
        let items: Vec<Sums> =
            (0..3000).map(|i| Sums { sum2: 0., sum4: 1. / (i as f64 + 1.), exponent: 0 }).collect();
        // Lanes in order, then the tree.
        let mut lanes = [0f64; LANES];
        for (i, item) in items.iter().enumerate() {
            lanes[i % LANES] += item.sum4;
        }
        for width in [512, 256, 128, 64, 32, 16, 8, 4, 2, 1] {
            for l in 0..width {
                lanes[l] += lanes[l + width];
            }
        }
        assert_eq!(Sums::fold(&items).sum4.to_bits(), lanes[0].to_bits());
    }
}
