//! Rows of compact moments. What is done with an element, or a unit of one moment, is in [`compact`](crate::compact); here are the loops of
//! a step, over both moments at a time.
//!
//! Each loop goes over all units of a row: the largest number of a unit is known at the end of a chain of operations that wait for each
//! other, and while they do the processor is at work on the next unit.

use super::simd::{WIDTH, each, first};
use crate::compact::{self, LEAST_EXPONENT, Offsets, UNIT};
use crate::numerics::LANES;

/// Units of a row: more would not fit the first cache beside the next row, which is fetched meanwhile.
pub(crate) const UNITS: usize = 2;
const _: () = assert!(LANES.is_multiple_of(UNITS * UNIT));

/// The bases of the offsets of a row's units, the first of which has the number `unit` in the parameter.
#[inline(always)]
pub(crate) fn bases(key: u64, unit: u64) -> [u32; UNITS] {
    each(|u| compact::offset_base(key, unit + u as u64))
}

/// Codes of neighbouring elements of a moment, and the exponents of their units.
pub(crate) struct Compact<'a> {
    pub codes: &'a mut [u8],
    pub exponents: &'a mut [u8],
}

impl Compact<'_> {
    /// Splits off the first `len` elements.
    #[inline(always)]
    pub fn take(&mut self, len: usize) -> Self {
        let Self { codes, exponents } = self;
        Self { codes: first(codes, len), exponents: first(exponents, len.div_ceil(UNIT)) }
    }

    /// The codes and exponents of the units of elements `start..start + len`.
    #[inline(always)]
    pub fn units(&self, start: usize, len: usize) -> impl Iterator<Item = (&[u8], u8)> {
        let exponents = self.exponents[start / UNIT..].iter().copied();
        self.codes[start..start + len].chunks(UNIT).zip(exponents)
    }

    #[inline(always)]
    pub fn units_mut(&mut self) -> impl Iterator<Item = (&mut [u8], &mut u8)> {
        self.codes.chunks_mut(UNIT).zip(&mut *self.exponents)
    }
}

/// A row of a moment: as it is kept, and its numbers.
pub(crate) struct Moment<'r, 'a> {
    pub compact: &'r mut Compact<'a>,
    pub numbers: &'r mut [f32],
}

/// Encodes a row of both moments, the second ones rounded by offsets with these bases for each unit. The numbers of `m` are overwritten.
#[inline(always)]
pub(crate) fn encode(m: Moment, v: Moment, bases: [u32; UNITS]) {
    let (m_units, m_rest) = m.numbers.as_chunks_mut::<UNIT>();
    let (v_units, v_rest) = v.numbers.as_chunks::<UNIT>();
    let (m_codes, m_codes_rest) = m.compact.codes.as_chunks_mut::<UNIT>();
    let (v_codes, v_codes_rest) = v.compact.codes.as_chunks_mut::<UNIT>();
    let (m_exponents, v_exponents) = (&mut *m.compact.exponents, &mut *v.compact.exponents);

    let mut ranges = [Range::default(); UNITS];
    for ((range, m), v) in ranges.iter_mut().zip(&*m_units).zip(v_units) {
        *range = Range::of(m, v);
    }
    let mut most = [0; UNITS];
    let units = m_units.iter_mut().zip(v_units).zip(v_codes);
    for (u, ((m, v), codes)) in units.enumerate() {
        let plain = ranges[u].is_plain();
        let most_v = if plain { ranges[u].most_v } else { compact::largest_magnitude(v) };
        let exponent = compact::v_exponent(most_v);
        most[u] = if plain {
            encode_plain_v_and_scale_m(m, v, exponent, bases[u], codes)
        } else {
            encode_v_and_scale_m(m, v, exponent, bases[u], codes)
        };
        v_exponents[u] = (exponent - LEAST_EXPONENT) as u8;
    }
    for (u, (m, codes)) in m_units.iter().zip(m_codes).enumerate() {
        m_exponents[u] = compact::encode_relative(m, most[u], codes);
    }

    // The last unit of a parameter may end early.
    if !v_rest.is_empty() {
        let u = v_units.len();
        let mut kept = [0.; UNIT];
        let kept = &mut kept[..v_rest.len()];
        v_exponents[u] = compact::encode_v_unit(v_rest, Offsets::Random(bases[u]), v_codes_rest);
        compact::decode_v_unit(v_codes_rest, v_exponents[u], kept);
        m_rest.iter_mut().zip(v_rest).for_each(|(m, v)| *m = compact::kept_m(*m, *v));
        m_exponents[u] = compact::encode_m_unit(m_rest, Some(kept), m_codes_rest);
    }
}

/// Encodes the second moments of a unit, and puts its first moments in units of what is kept of them. Returns the bits of the largest
/// magnitude of these.
#[inline(always)]
fn encode_v_and_scale_m(
    m: &mut [f32; UNIT],
    v: &[f32; UNIT],
    exponent: u32,
    base: u32,
    codes: &mut [u8; UNIT],
) -> u32 {
    let mut most = [0; WIDTH];
    let mut offsets: [u32; WIDTH] = each(|i| compact::offset(base, i as u32));
    let parts = m.as_chunks_mut::<WIDTH>().0.iter_mut().zip(v.as_chunks::<WIDTH>().0);
    for ((m, v), codes) in parts.zip(codes.as_chunks_mut::<WIDTH>().0) {
        let code: [u32; WIDTH] = each(|i| compact::encode_v(v[i], exponent, offsets[i] >> 12));
        offsets = each(|i| compact::offset(offsets[i], WIDTH as u32));
        let kept: [f32; WIDTH] = each(|i| compact::decode_v(code[i], exponent));
        *codes = each(|i| code[i] as u8);
        *m = each(|i| compact::relative_m(compact::kept_m(m[i], v[i]), kept[i]));
        most = each(|i| most[i].max(m[i].to_bits() & 0x7fff_ffff));
    }
    most.into_iter().fold(0, u32::max)
}

/// The bits of the least and the largest second moment of a unit, and of the largest magnitude of its first moments.
#[derive(Clone, Copy, Default)]
struct Range {
    least_v: u32,
    most_v: u32,
    most_m: u32,
}

impl Range {
    #[inline(always)]
    fn of(m: &[f32; UNIT], v: &[f32; UNIT]) -> Self {
        let [mut least_v, mut most_v, mut most_m] = [!0, 0, 0];
        for (m, v) in m.iter().zip(v) {
            least_v = v.to_bits().min(least_v);
            most_v = v.to_bits().max(most_v);
            most_m = (m.to_bits() & 0x7fff_ffff).max(most_m);
        }
        Self { least_v, most_v, most_m }
    }

    /// Whether the unit is plain, as most are: all second moments are normal numbers of the format, with codes from 8 on, the largest is
    /// finite also if it is rounded up, and all first moments are below `2^60`.
    #[inline(always)]
    fn is_plain(self) -> bool {
        let Self { least_v, most_v, most_m } = self;
        // Relative first moments are at most `2^61` times as large as these.
        most_v < 0x7f80_0000 - (1 << 20)
            && least_v >= (compact::v_exponent(most_v) - 30) << 23
            && most_m < (127 + 60) << 23
    }
}

/// [`encode_v_and_scale_m`] of a plain unit: codes are parts of the bits of their numbers, and there are no exceptions to look for.
#[inline(always)]
fn encode_plain_v_and_scale_m(
    m: &mut [f32; UNIT],
    v: &[f32; UNIT],
    exponent: u32,
    base: u32,
    codes: &mut [u8; UNIT],
) -> u32 {
    // The upper bits of what has the code 0.
    let zero = ((exponent - 31) << 3) as u8;
    let mut most = 0;
    // One loop over numbers: over arrays of `WIDTH` of them, of so few operations, the compiler would gather these one by one.
    for (i, ((m, v), code)) in m.iter_mut().zip(v).zip(codes).enumerate() {
        // The upper bits are those of what is kept.
        let bits = v.to_bits() + (compact::offset(base, i as u32) >> 12);
        *code = ((bits >> 20) as u8).wrapping_sub(zero);
        // As `relative_m`: times `2^-h` with `h = half_exponent(kept)`, which is half of kept's exponent field, less 63.
        *m *= f32::from_bits((190 << 23) - (bits >> 1 & 0x7f80_0000));
        most = (m.to_bits() & 0x7fff_ffff).max(most);
    }
    most
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::numerics::Real;

    /// The exponents and codes of both moments, of units by themselves.
    fn unit_by_unit(m: &[f32], v: &[f32], bases: [u32; UNITS]) -> [Vec<u8>; 4] {
        let n = v.len();
        let mut kept = vec![0.; n];
        let [mut m_codes, mut v_codes] = [vec![0; n], vec![0; n]];
        let [mut m_exponents, mut v_exponents] = [vec![], vec![]];
        for (u, base) in bases.into_iter().take(n.div_ceil(UNIT)).enumerate() {
            let unit = u * UNIT..n.min((u + 1) * UNIT);
            let (v, kept) = (&v[unit.clone()], &mut kept[unit.clone()]);
            let exponent =
                compact::encode_v_unit(v, Offsets::Random(base), &mut v_codes[unit.clone()]);
            v_exponents.push(exponent);
            compact::decode_v_unit(&v_codes[unit.clone()], exponent, kept);
            let m: Vec<f32> =
                m[unit.clone()].iter().zip(v).map(|(m, v)| compact::kept_m(*m, *v)).collect();
            m_exponents.push(compact::encode_m_unit(&m, Some(kept), &mut m_codes[unit]));
        }
        [m_codes, m_exponents, v_codes, v_exponents]
    }

    fn row(m: &[f32], v: &[f32], bases: [u32; UNITS]) -> [Vec<u8>; 4] {
        let (n, units) = (v.len(), v.len().div_ceil(UNIT));
        let [mut m_codes, mut v_codes] = [vec![0; n], vec![0; n]];
        let [mut m_exponents, mut v_exponents] = [vec![0; units], vec![0; units]];
        let mut m_compact = Compact { codes: &mut m_codes, exponents: &mut m_exponents };
        let mut v_compact = Compact { codes: &mut v_codes, exponents: &mut v_exponents };
        let (mut m, mut v) = (m.to_vec(), v.to_vec());
        encode(
            Moment { compact: &mut m_compact, numbers: &mut m },
            Moment { compact: &mut v_compact, numbers: &mut v },
            bases,
        );
        [m_codes, m_exponents, v_codes, v_exponents]
    }

    fn any_bits() -> impl Strategy<Value = u32> {
        let infinities = prop_oneof![Just(0x7f80_0000), Just(0xff80_0000u32)];
        let nans = prop_oneof![0x7f80_0001..0x8000_0000u32, 0xff80_0001..=!0u32];
        prop_oneof![any::<u32>(), infinities, nans]
    }

    /// Second moments whose exponent fields are at most `spread` below that of the largest.
    fn second_moments(largest: u32, spread: u32) -> impl Strategy<Value = Vec<f32>> {
        let bits = move |(below, mantissa): (u32, u32)| {
            f32::from_bits((largest - below.min(largest)) << 23 | mantissa)
        };
        let unit = proptest::collection::vec((0..=spread, 0u32..1 << 23), UNITS * UNIT);
        unit.prop_map(move |numbers| numbers.into_iter().map(bits).collect())
    }

    proptest! {
        /// Plain units and others, to where either begins: 30 below the largest, near the ends of f32.
        #[test]
        fn a_row_is_encoded_as_its_units_are(
            v in (prop_oneof![0u32..40, 100..140u32, 240u32..255], 25u32..34)
                .prop_flat_map(|(largest, spread)| second_moments(largest, spread)),
            m in proptest::collection::vec((-1f32..1., 0u32..40), UNITS * UNIT),
            m_exponent in prop_oneof![Just(0), 50..70i32, 110..127i32],
            bases in any::<[u32; UNITS]>(),
            others in proptest::collection::vec((0..UNITS * UNIT, any::<bool>(), any_bits()), 0..3),
            n in prop_oneof![Just(UNITS * UNIT), 1..UNITS * UNIT],
        ) {
            let mut v = v;
            let mut m: Vec<f32> = m.into_iter().map(|(m, below)| m * 2f32.powi(m_exponent - below as i32)).collect();
            // Anything at some places, in one moment or the other. No `v` is negative, but for NaNs.
            for (i, of_v, bits) in others {
                let x = f32::from_bits(bits);
                if of_v { v[i] = if x.is_nan() { x } else { x.abs() } } else { m[i] = x }
            }
            let canonical = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| x.canonical()).collect() };
            let encoded = row(&m[..n], &v[..n], bases);
            prop_assert_eq!(&encoded, &row(&canonical(&m[..n]), &canonical(&v[..n]), bases));
            prop_assert_eq!(&encoded, &unit_by_unit(&m[..n], &v[..n], bases));
        }
    }

    /// Where a unit begins to be plain, and ends: both ways give the same, and they are told apart where they must be.
    #[test]
    fn plain_units_end_where_they_must() {
        let least =
            |largest: f32| f32::from_bits((compact::v_exponent(largest.to_bits()) - 30) << 23);
        let below = |x: f32| f32::from_bits(x.to_bits() - 1);
        let most = f32::from_bits(0x7f80_0000 - (1 << 20));
        let large = 2f32.powi(60);
        for (largest, smallest, m, plain) in [
            (1., least(1.), 1., true),
            (1., below(least(1.)), 1., false),
            (1., 0., 1., false),
            (below(most), 1., 1e9, false),
            (below(most), least(below(most)), 1e9, true),
            (most, least(below(most)), 1e9, false),
            (f32::INFINITY, 1e9, 1e9, false),
            (f32::NAN, 1e9, 1e9, false),
            (1e-37, least(1e-37), 1e-19, true),
            (1e-37, below(least(1e-37)), 1e-19, false),
            (1., 1., below(large), true),
            (1., 1., -large, false),
            (1., 1., f32::NAN, false),
            (1., 1., f32::NEG_INFINITY, false),
        ] {
            let (mut ms, mut vs) = ([m / 3.; UNIT * UNITS], [largest; UNIT * UNITS]);
            (ms[UNIT - 1], vs[UNIT - 1]) = (m, smallest);
            let range = Range::of(ms.first_chunk().unwrap(), vs.first_chunk().unwrap());
            assert_eq!(range.is_plain(), plain, "{largest:e} {smallest:e} {m:e}");
            let bases = [!0, 0x1234_5678];
            assert_eq!(
                row(&ms, &vs, bases),
                unit_by_unit(&ms, &vs, bases),
                "{largest:e} {smallest:e} {m:e}"
            );
        }
    }
}
