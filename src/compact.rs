//! Compact state: both moments in 2 bytes, masters of bf16 in 2 bytes beside the parameter, averages in bf16.
//!
//! The formats are part of the contract in [`numerics`](crate::numerics): integer operations and exact powers of two, so that
//! every device has the same bits. `kernels/compact.cuh` has the same functions in the same order.

use half::bf16;

use crate::numerics::{Real, bf16_to_f32, canonical_to_bf16, random_key, random_word};

/// Neighbouring elements that share their exponents.
pub(crate) const UNIT: usize = 256;

/// The seeds of [`offset_key`]: of second moments, of parameters without masters, and of averages.
pub(crate) const MOMENTS: u64 = u64::from_be_bytes(*b"moments\0");
pub(crate) const PARAMETERS: u64 = u64::from_be_bytes(*b"rounding");
pub(crate) const AVERAGES: u64 = u64::from_be_bytes(*b"averages");

/// The key of the offsets of a parameter in a step.
pub(crate) fn offset_key(seed: u64, step: u64, place: u64) -> u64 {
    random_key(seed, step, place)
}

/// The base of the offsets of a unit.
#[inline(always)]
pub(crate) fn offset_base(key: u64, unit: u64) -> u32 {
    (random_word(key, unit) >> 32) as u32
}

/// 32 bits for element `i` of a unit.
#[inline(always)]
pub(crate) fn offset(base: u32, i: u32) -> u32 {
    base.wrapping_add(i.wrapping_mul(0x9e37_79b1))
}

/// The bits of infinity: those of finite numbers are below.
const INFINITE: u32 = 0x7f80_0000;

/// The least exponent field of a unit: what is then least is normal.
pub(crate) const LEAST_EXPONENT: u32 = 34;

/// `2^e`, for `e` from -126 to 127.
#[inline(always)]
fn pow2f(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

/// What a `v` counts for in the maximum over its unit.
#[inline(always)]
pub(crate) fn v_magnitude(v: f32) -> u32 {
    let bits = v.to_bits();
    if bits < INFINITE { bits } else { 0 }
}

/// The exponent of a unit, from the maximum of [`v_magnitude`]. The next number above is in its range: if the largest could
/// not be rounded up it would never rise beyond a power of two.
#[inline(always)]
pub(crate) fn v_exponent(most: u32) -> u32 {
    ((most + (1 << 20)) >> 23).clamp(LEAST_EXPONENT, 254)
}

/// The code of `v`, which is not negative; `offset` has 20 bits.
#[inline(always)]
pub(crate) fn encode_v(v: f32, exponent: u32, offset: u32) -> u32 {
    let bits = v.to_bits();
    let least_normal = (exponent - 30) << 23;
    let above = bits.wrapping_sub((exponent - 31) << 23);
    // The sum's last bit is 2^-20 of a step.
    let below = (v + f32::from_bits(least_normal)).to_bits().wrapping_sub(least_normal);
    let steps = if bits >= least_normal { above } else { below };
    // What is not finite is above all codes.
    (steps.wrapping_add(offset) >> 20).max(bits.min(1)).min(255)
}

#[inline(always)]
pub(crate) fn decode_v(code: u32, exponent: u32) -> f32 {
    let normal = f32::from_bits((code << 20).wrapping_add((exponent - 31) << 23));
    let below = (code & 7) as f32 * f32::from_bits((exponent - 33) << 23);
    if code >= 8 { normal } else { below }
}

/// `floor((e + 1) / 2)`, of the exponent `e` of a stored `v`.
#[inline(always)]
fn half_exponent(v: f32) -> i32 {
    ((v.to_bits() >> 23) as i32 - 126) >> 1
}

/// The largest magnitude that `q` times a power of two can be: `127 * 2^121`.
const MOST: u32 = 0x7f7e_0000;

/// The bits of `2^127`: rounded up, such a number may be beyond f32.
const TOO_LARGE: u32 = 0x7f00_0000;

/// `m`, or 0 where the new `v`, not stored yet, is not finite: no units could hold it.
#[inline(always)]
pub(crate) fn kept_m(m: f32, v: f32) -> f32 {
    if v.to_bits() < INFINITE { m } else { 0. }
}

/// `m` in units of about `sqrt(v)`, `v` as it is stored; 0 if it is not finite, from `2^127` on, or where `v` is 0.
#[inline(always)]
pub(crate) fn relative_m(m: f32, v: f32) -> f32 {
    let kept = m.to_bits() & 0x7fff_ffff < TOO_LARGE && v > 0.;
    let scaled = (if kept { m } else { 0. } * pow2f(-half_exponent(v))).to_bits();
    let magnitude = (scaled & 0x7fff_ffff).min(MOST);
    f32::from_bits(scaled & 0x8000_0000 | magnitude)
}

/// The exponent `s` of a unit, from the bits of the largest magnitude of [`relative_m`]: the least for which that is at
/// most `127 * 2^s`, between -126 and 126.
#[inline(always)]
pub(crate) fn m_exponent(most: u32) -> i32 {
    let above = most & 0x7f_ffff > 0x7e_0000;
    ((most >> 23) as i32 - 127 - 6 + above as i32).clamp(-126, 126)
}

/// `q`, of a [`relative_m`].
#[inline(always)]
pub(crate) fn encode_m(relative: f32, exponent: i32) -> i32 {
    // 1.5 * 2^23: the sum is rounded to a whole number, ties to even, which its last bits hold. The product is exact, or so small
    // that `q` is 0: rounding it first, as the kernels do, changes nothing.
    const ROUND: f32 = 12_582_912.;
    relative.mul_add(pow2f(-exponent), ROUND).to_bits() as i32 - ROUND.to_bits() as i32
}

#[inline(always)]
pub(crate) fn decode_m(q: i32, exponent: i32, v: f32) -> f32 {
    q as f32 * pow2f(exponent) * pow2f(half_exponent(v))
}

/// The parameter and the remainder of a master. A NaN comes back as the canonical one.
#[inline(always)]
pub(crate) fn split(master: f32) -> (u16, i16) {
    let master = master.canonical();
    let parameter = canonical_to_bf16(master);
    (parameter, remainder(master, parameter))
}

/// The master, from the parameter and its remainder.
#[inline(always)]
pub(crate) fn join(parameter: u16, rest: i16) -> f32 {
    f32::from_bits(bf16_to_f32(parameter).to_bits().wrapping_add(rest as u32))
}

/// f32 to bf16, without a bias in the mean; `offset` has 16 bits. A NaN becomes the canonical one.
#[inline(always)]
pub(crate) fn round_bf16(x: f32, offset: u32) -> u16 {
    let rounded = (x.to_bits().wrapping_add(offset) >> 16) as u16;
    if x.is_nan() { 0x7fc0 } else { rounded }
}

/// How second moments are rounded.
#[derive(Clone, Copy)]
pub(crate) enum Offsets {
    /// By the offsets of a unit with this base.
    Random(u32),
    /// To nearest: for conversions between formats, which no average follows.
    Nearest,
}

/// The remainder in a [`split`], of a master whose only NaN is the canonical one, from the parameter.
#[inline(always)]
pub(crate) fn remainder(master: f32, parameter: u16) -> i16 {
    let rest = master.to_bits().wrapping_sub(u32::from(parameter) << 16) as i32;
    // Below `-2^15` it never is; with both ends one instruction does it.
    rest.clamp(i16::MIN.into(), i16::MAX.into()) as i16
}

/// The maximum of [`v_magnitude`]. One for each place in a vector: a single one, of numbers among which it chooses, is not
/// vectorized.
#[inline(always)]
pub(crate) fn largest_magnitude(v: &[f32]) -> u32 {
    const PLACES: usize = 16;
    let mut most = [0; PLACES];
    let (vectors, rest) = v.as_chunks::<PLACES>();
    for v in vectors {
        most.iter_mut().zip(v).for_each(|(most, v)| *most = v_magnitude(*v).max(*most));
    }
    most.iter_mut().zip(rest).for_each(|(most, v)| *most = v_magnitude(*v).max(*most));
    most.into_iter().fold(0, u32::max)
}

/// Encodes the second moments of a unit, and returns the byte of its exponent.
#[inline(always)]
pub(crate) fn encode_v_unit(v: &[f32], offsets: Offsets, codes: &mut [u8]) -> u8 {
    let exponent = v_exponent(largest_magnitude(v));
    // Of one loop each: a choice within would not be vectorized.
    match offsets {
        Offsets::Random(base) => {
            for (i, (code, v)) in codes.iter_mut().zip(v).enumerate() {
                *code = encode_v(*v, exponent, offset(base, i as u32) >> 12) as u8;
            }
        }
        Offsets::Nearest => {
            for (code, v) in codes.iter_mut().zip(v) {
                *code = encode_v(*v, exponent, 1 << 19) as u8;
            }
        }
    }
    (exponent - LEAST_EXPONENT) as u8
}

#[inline(always)]
pub(crate) fn decode_v_unit(codes: &[u8], exponent: u8, v: &mut [f32]) {
    let exponent = u32::from(exponent) + LEAST_EXPONENT;
    v.iter_mut().zip(codes).for_each(|(v, code)| *v = decode_v((*code).into(), exponent));
}

/// The exponent `s` of a first moment that is 0 in a byte.
const M_BIAS: i32 = 126;

/// The largest bytes of exponents.
pub(crate) const MOST_V_EXPONENT: u8 = 254 - LEAST_EXPONENT as u8;
pub(crate) const MOST_M_EXPONENT: u8 = 121 + M_BIAS as u8;

/// Encodes the first moments of a unit, and returns the byte of its exponent. `v` are the second moments as they are
/// kept.
#[inline(always)]
pub(crate) fn encode_m_unit(m: &[f32], v: Option<&[f32]>, codes: &mut [u8]) -> u8 {
    let mut relative = [0f32; UNIT];
    let relative = &mut relative[..m.len()];
    match v {
        Some(v) => {
            relative.iter_mut().zip(m).zip(v).for_each(|((r, m), v)| *r = relative_m(*m, *v))
        }
        None => relative.iter_mut().zip(m).for_each(|(r, m)| *r = relative_m(*m, 1.)),
    }
    let most = relative.iter().fold(0, |most, r| (r.to_bits() & 0x7fff_ffff).max(most));
    encode_relative(relative, most, codes)
}

/// The same of [`relative_m`], of which `most` are the bits of the largest magnitude.
#[inline(always)]
pub(crate) fn encode_relative(relative: &[f32], most: u32, codes: &mut [u8]) -> u8 {
    let exponent = m_exponent(most);
    for (code, r) in codes.iter_mut().zip(relative) {
        *code = encode_m(*r, exponent) as i8 as u8;
    }
    (exponent + M_BIAS) as u8
}

#[inline(always)]
pub(crate) fn decode_m_unit(codes: &[u8], exponent: u8, v: Option<&[f32]>, m: &mut [f32]) {
    let exponent = i32::from(exponent) - M_BIAS;
    let decode = |code: u8, v| decode_m((code as i8).into(), exponent, v);
    match v {
        Some(v) => m.iter_mut().zip(codes).zip(v).for_each(|((m, code), v)| *m = decode(*code, *v)),
        None => m.iter_mut().zip(codes).for_each(|(m, code)| *m = decode(*code, 1.)),
    }
}

/// Unit `u` of a second moment, if there is one.
#[inline(always)]
pub(crate) fn unit_of(v: Option<&[f32]>, u: usize) -> Option<&[f32]> {
    v.map(|v| &v[u * UNIT..v.len().min((u + 1) * UNIT)])
}

/// Rounds a row of numbers at random, from unit `unit` of a block on.
#[inline(always)]
pub(crate) fn round_row(to: &mut [bf16], from: &[f32], key: u64, unit: u64) {
    let units = to.chunks_mut(UNIT).zip(from.chunks(UNIT));
    for (u, (to, from)) in (unit..).zip(units) {
        round_part(to, from, offset_base(key, u), 0);
    }
}

/// Rounds elements from `first` of a unit on at random, whose offsets have this base.
#[inline(always)]
pub(crate) fn round_part(to: &mut [bf16], from: &[f32], base: u32, first: u32) {
    for (i, (to, x)) in to.iter_mut().zip(from).enumerate() {
        *to = bf16::from_bits(round_bf16(*x, offset(base, first + i as u32) >> 16));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use rayon::prelude::*;
    use serde::Deserialize;

    use super::*;
    use crate::numerics::f32_to_bf16;

    #[derive(Deserialize)]
    struct Golden {
        base: u32,
        v: Vec<u32>,
        m: Vec<u32>,
        v_exponent: u8,
        v_codes: Vec<u8>,
        kept_v: Vec<u32>,
        m_exponent: i32,
        m_codes: Vec<i8>,
        kept_m: Vec<u32>,
    }

    fn floats(bits: &[u32]) -> Vec<f32> {
        bits.iter().map(|bits| f32::from_bits(*bits)).collect()
    }

    fn bits(floats: &[f32]) -> Vec<u32> {
        floats.iter().map(|x| x.to_bits()).collect()
    }

    /// Against the formulas, written down in Python.
    #[test]
    fn units_of_moments_are_the_golden_ones() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/compact.json");
        let units: Vec<Golden> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for (i, unit) in units.iter().enumerate() {
            let (v, mut m) = (floats(&unit.v), floats(&unit.m));
            m.iter_mut().zip(&v).for_each(|(m, v)| *m = kept_m(*m, *v));
            let mut codes = vec![0; v.len()];
            let exponent = encode_v_unit(&v, Offsets::Random(unit.base), &mut codes);
            assert_eq!(exponent, unit.v_exponent - LEAST_EXPONENT as u8, "unit {i}");
            assert_eq!(codes, unit.v_codes, "unit {i}");
            let mut kept = vec![0.; v.len()];
            decode_v_unit(&codes, exponent, &mut kept);
            assert_eq!(bits(&kept), unit.kept_v, "unit {i}");

            let exponent = encode_m_unit(&m, Some(&kept), &mut codes);
            assert_eq!(i32::from(exponent) - M_BIAS, unit.m_exponent, "unit {i}");
            let expected: Vec<u8> = unit.m_codes.iter().map(|q| *q as u8).collect();
            assert_eq!(codes, expected, "unit {i}");
            let mut decoded = vec![0.; v.len()];
            decode_m_unit(&codes, exponent, Some(&kept), &mut decoded);
            assert_eq!(bits(&decoded), unit.kept_m, "unit {i}");
        }
        assert_eq!(units.len(), 13);
    }

    /// Memory of zeros is state of zeros.
    #[test]
    fn zeros_are_zero() {
        let (mut v, mut m) = ([1.; UNIT], [1.; UNIT]);
        decode_v_unit(&[0; UNIT], 0, &mut v);
        decode_m_unit(&[0; UNIT], 0, Some(&v), &mut m);
        assert_eq!((bits(&v), bits(&m)), (vec![0; UNIT], vec![0; UNIT]));
        assert_eq!(encode_v_unit(&v, Offsets::Random(!0), &mut [9; UNIT]), 0);
        assert_eq!(encode_m_unit(&m, Some(&v), &mut [9; UNIT]), 0);
    }

    #[test]
    fn every_code_of_v_encodes_to_itself() {
        for exponent in LEAST_EXPONENT..255 {
            let mut before = -1.;
            for code in 0..256 {
                let v = decode_v(code, exponent);
                assert!(v > before && v.is_finite(), "{code} {exponent}");
                before = v;
                for offset in [0, 1, 1 << 19, (1 << 20) - 1] {
                    assert_eq!(encode_v(v, exponent, offset), code, "{exponent} {offset}");
                }
            }
        }
    }

    /// All values of a unit encode to themselves, where it keeps its largest one.
    #[test]
    fn every_code_of_m_encodes_to_itself() {
        for (v_exponent, m_exponent) in
            [(127, 126), (127, 120), (200, 100), (100, 200), (34, 126), (254, 126)]
        {
            let (v, codes): (Vec<f32>, Vec<u8>) = (0..255u8)
                .map(|i| (decode_v((i % 31 + 1).into(), v_exponent), (i as i8 as i16 - 127) as u8))
                .unzip();
            let mut m = vec![0.; v.len()];
            decode_m_unit(&codes, m_exponent, Some(&v), &mut m);
            let mut again = vec![0; v.len()];
            assert_eq!(encode_m_unit(&m, Some(&v), &mut again), m_exponent, "{v_exponent}");
            assert_eq!(again, codes);
        }
    }

    /// What the contract promises, for all patterns: the parameter is the master rounded to nearest even, and the
    /// master comes back but for ties whose even neighbour is nearer to 0.
    #[test]
    fn all_masters_split() {
        let of_parameter = |high: u32| {
            let mut changed = 0;
            for low in 0..=0xffff {
                let master = f32::from_bits(high << 16 | low);
                let (parameter, rest) = split(master);
                assert_eq!(parameter, f32_to_bf16(master), "{:08x}", master.to_bits());
                let back = join(parameter, rest);
                if master.is_nan() {
                    assert_eq!((parameter, rest), (0x7fc0, 0));
                } else if back.to_bits() != master.to_bits() {
                    assert_eq!((low, high & 1), (0x8000, 0));
                    assert_eq!(back.to_bits(), master.to_bits() - 1);
                    assert_eq!(f32_to_bf16(back), parameter);
                    changed += 1;
                }
            }
            changed
        };
        let changed: u32 = (0..=0xffffu32).into_par_iter().map(of_parameter).sum();
        assert_eq!(changed, 32_640);
    }

    proptest! {
        /// Of all 2^16 offsets as many round up as the part that is cut off has of a whole: the mean is exact.
        #[test]
        fn random_rounding_to_bf16_is_unbiased(x in any::<u32>().prop_map(f32::from_bits)) {
            let low = x.to_bits() & 0xffff;
            if x.is_nan() {
                prop_assert_eq!(round_bf16(x, low), 0x7fc0);
            } else {
                let down = (x.to_bits() >> 16) as u16;
                let up = (0..=0xffff).filter(|offset| round_bf16(x, *offset) != down).count();
                prop_assert_eq!(up, low as usize);
                prop_assert!((0..=0xffff).all(|offset| round_bf16(x, offset) - down <= 1));
            }
        }

        /// The same of second moments, and within a step.
        #[test]
        fn random_rounding_of_v_is_unbiased(
            exponent in LEAST_EXPONENT..255,
            below in 0..40u32,
            fraction in 0..0x70_0000u32,
        ) {
            let field = exponent.saturating_sub(below);
            let v = f32::from_bits(field << 23 | fraction);
            let mean = (0..1u32 << 8)
                .map(|i| f64::from(decode_v(encode_v(v, exponent, i << 12 | 0x800), exponent)))
                .sum::<f64>() / 256.;
            let step = f64::from(decode_v(1, exponent));
            let v = f64::from(v);
            // The 256 offsets leave an eighth of a step's 2^-8, and v above 0 is at least a step.
            prop_assert!(v < step || (mean - v).abs() <= v.max(8. * step) / 8. / 256., "{mean} {v}");
            prop_assert!(v == 0. || v >= step || mean == step, "{mean} {v}");
        }

        /// What is finite is kept to half a step of the unit, and the largest of a unit with more than 6 bits.
        #[test]
        fn first_moments_are_kept_to_half_a_step(
            numbers in proptest::collection::vec((-3f32..3., 0u32..256), 1..UNIT),
            exponent in LEAST_EXPONENT..200,
        ) {
            let v: Vec<f32> = numbers.iter().map(|(_, code)| decode_v(*code, exponent)).collect();
            let m: Vec<f32> = numbers.iter().zip(&v).map(|((u, _), v)| u * v.sqrt()).collect();
            let (mut codes, mut kept) = (vec![0; m.len()], vec![0.; m.len()]);
            let s = encode_m_unit(&m, Some(&v), &mut codes);
            decode_m_unit(&codes, s, Some(&v), &mut kept);
            let step = 2f64.powi(i32::from(s) - M_BIAS);
            let unit_of = |v: f32| 2f64.powi(half_exponent(v));
            for ((m, v), kept) in m.iter().zip(&v).zip(&kept) {
                let error = (f64::from(*m) - f64::from(*kept)).abs() / unit_of(*v);
                prop_assert!(error <= step / 2. || *v == 0.);
            }
            let largest = codes.iter().map(|code| (*code as i8).unsigned_abs()).max().unwrap();
            prop_assert!(largest >= 63 || m.iter().all(|m| *m == 0.));
        }

        /// Whatever the bits of the moments, what is kept is finite, and others in the unit are as without them.
        #[test]
        fn what_is_not_finite_is_not_kept(
            any in proptest::collection::vec(any::<u32>(), 1..UNIT),
            place in 0..UNIT,
        ) {
            let (mut v, mut m) = (vec![0.; any.len()], floats(&any));
            v.iter_mut().zip(&m).for_each(|(v, m)| *v = m.abs());
            let units = |v: &[f32], m: &[f32]| {
                let (mut codes, mut kept_v) = (vec![0; v.len()], vec![0.; v.len()]);
                let exponent = encode_v_unit(v, Offsets::Random(3), &mut codes);
                assert!(exponent <= MOST_V_EXPONENT);
                decode_v_unit(&codes, exponent, &mut kept_v);
                let mut kept_m = kept_v.clone();
                let exponent = encode_m_unit(m, Some(&kept_v), &mut codes);
                assert!(exponent <= MOST_M_EXPONENT);
                decode_m_unit(&codes, exponent, Some(&kept_v), &mut kept_m);
                (kept_v, kept_m)
            };
            let (kept_v, kept_m) = units(&v, &m);
            for (i, (v, m)) in kept_v.iter().zip(&kept_m).enumerate() {
                prop_assert!(v.is_finite() && m.is_finite(), "{i}: {v} {m}");
            }
            let place = place % v.len();
            (v[place], m[place]) = (0., 0.);
            let without = units(&v, &m);
            (v[place], m[place]) = (f32::NAN, f32::NEG_INFINITY);
            let mut with = units(&v, &m);
            (with.0[place], with.1[place]) = (0., 0.);
            prop_assert_eq!(bits(&with.0), bits(&without.0));
            prop_assert_eq!(bits(&with.1), bits(&without.1));
        }
    }

    /// How a stream of gradients changes in time and over elements.
    type Stream = fn(rng: &mut StdRng, step: usize, g: &mut [f32]);

    fn normal(rng: &mut StdRng) -> f32 {
        (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.
    }

    /// Gradients whose size is 10 to the power of -1 to 1 by element.
    fn plain(rng: &mut StdRng, _: usize, g: &mut [f32]) {
        for (i, g) in g.iter_mut().enumerate() {
            *g = normal(rng) * 10f32.powf((i % 64) as f32 / 32. - 1.);
        }
    }

    /// One element in 64 is 1000 times as large.
    fn outliers(rng: &mut StdRng, step: usize, g: &mut [f32]) {
        plain(rng, step, g);
        g.iter_mut().step_by(64).for_each(|g| *g *= 1000.);
    }

    /// Rows of 64 that have a gradient in one step of 20.
    fn sparse(rng: &mut StdRng, step: usize, g: &mut [f32]) {
        plain(rng, step, g);
        g.chunks_mut(64).for_each(|row| {
            if !rng.random_bool(0.05) {
                row.fill(0.);
            }
        });
    }

    /// To a fortieth in 4000 steps. (Where gradients fall faster than `v` forgets, nothing corrects what rounding adds to it.)
    fn falling(rng: &mut StdRng, step: usize, g: &mut [f32]) {
        plain(rng, step, g);
        g.iter_mut().for_each(|g| *g *= 0.9991f32.powi(step as i32));
    }

    fn rising(rng: &mut StdRng, step: usize, g: &mut [f32]) {
        plain(rng, step, g);
        g.iter_mut().for_each(|g| *g *= 1.002f32.powi(step as i32));
    }

    /// One step in 100 is 100 times as large.
    fn spikes(rng: &mut StdRng, step: usize, g: &mut [f32]) {
        plain(rng, step, g);
        if rng.random_bool(0.01) {
            g.iter_mut().for_each(|g| *g *= 100.);
        }
    }

    const STREAMS: [(&str, Stream); 6] = [
        ("plain", plain),
        ("outliers", outliers),
        ("sparse", sparse),
        ("falling", falling),
        ("rising", rising),
        ("spikes", spikes),
    ];

    /// What a stream came to.
    struct Outcome {
        /// The mean over elements of the compact `v` over the f32 one, in the mean over the second half of all steps.
        v_ratio: f64,
        /// The RMS of the difference of the updates over that of the f32 one, likewise.
        update_error: f64,
        largest_update: f32,
    }

    /// Adam's state along a stream, in f32 and compact.
    fn follow(stream: Stream, random: bool) -> Outcome {
        const BETA1: f32 = 0.9;
        const BETA2: f32 = 0.999;
        let (n, steps) = (1024, 4000);
        let mut rng = StdRng::seed_from_u64(7);
        let mut g = vec![0f32; n];
        let [mut m, mut v, mut kept_m, mut kept_v] = [(); 4].map(|()| vec![0f32; n]);
        let mut codes = vec![0; UNIT];
        let mut outcome = Outcome { v_ratio: 0., update_error: 0., largest_update: 0. };
        let (mut error, mut size, mut ratios) = (0., 0., vec![]);
        for step in 0..steps {
            stream(&mut rng, step, &mut g);
            let next_m = |m: &f32, g: &f32| g.mul_add(1. - BETA1, BETA1 * m);
            let next_v = |v: &f32, g: &f32| ((1. - BETA2) * g).mul_add(*g, BETA2 * v);
            let t = step as i32 + 1;
            let (c1, c2) = (1. - BETA1.powi(t), 1. - BETA2.powi(t));
            let update = |m: f32, v: f32| (m / c1) / ((v / c2).sqrt() + 1e-8);
            for (i, g) in g.iter().enumerate() {
                (m[i], v[i]) = (next_m(&m[i], g), next_v(&v[i], g));
                (kept_m[i], kept_v[i]) = (next_m(&kept_m[i], g), next_v(&kept_v[i], g));
                let (exact, ours) = (update(m[i], v[i]), update(kept_m[i], kept_v[i]));
                outcome.largest_update = outcome.largest_update.max(ours.abs());
                if step >= steps / 2 {
                    error += f64::from(ours - exact).powi(2);
                    size += f64::from(exact).powi(2);
                }
            }
            let key = offset_key(MOMENTS, step as u64, 0);
            for (u, (m, v)) in kept_m.chunks_mut(UNIT).zip(kept_v.chunks_mut(UNIT)).enumerate() {
                let offsets = if random {
                    Offsets::Random(offset_base(key, u as u64))
                } else {
                    Offsets::Nearest
                };
                let exponent = encode_v_unit(v, offsets, &mut codes);
                decode_v_unit(&codes, exponent, v);
                let exponent = encode_m_unit(m, Some(v), &mut codes);
                decode_m_unit(&codes, exponent, Some(v), m);
            }
            if step >= steps / 2 && step % 20 == 0 {
                let ratio = kept_v.iter().zip(&v).map(|(kept, v)| f64::from(kept / v));
                ratios.push(ratio.sum::<f64>() / n as f64);
            }
        }
        outcome.v_ratio = ratios.iter().sum::<f64>() / ratios.len() as f64;
        outcome.update_error = (error / size).sqrt();
        outcome
    }

    /// The long average of v is right within 2%, and the update to 20% of its RMS; rounded to nearest it is not.
    #[test]
    fn streams_are_followed() {
        let follow = |(name, stream): &(&'static str, Stream)| {
            let [random, nearest] = [true, false].map(|random| follow(*stream, random));
            (*name, random, nearest)
        };
        let outcomes: Vec<_> = STREAMS.par_iter().map(follow).collect();
        for (name, random, nearest) in &outcomes {
            println!(
                "{name}: v {:.4} (nearest {:.3}), update {:.3} (nearest {:.3}), largest {:.2}",
                random.v_ratio,
                nearest.v_ratio,
                random.update_error,
                nearest.update_error,
                random.largest_update
            );
        }
        for (name, random, nearest) in &outcomes {
            assert!((nearest.v_ratio - 1.).abs() > 0.3, "{name}: {}", nearest.v_ratio);
            assert!((random.v_ratio - 1.).abs() < 0.02, "{name}: {}", random.v_ratio);
            assert!(random.update_error < 0.2, "{name}: {}", random.update_error);
            assert!(random.largest_update < 4., "{name}: {}", random.largest_update);
        }
    }
}
