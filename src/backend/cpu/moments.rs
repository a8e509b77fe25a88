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

    let mut of_v = [0; UNITS];
    for (exponent, v) in of_v.iter_mut().zip(v_units) {
        *exponent = compact::v_exponent(compact::largest_magnitude(v));
    }
    let mut most = [0; UNITS];
    let units = m_units.iter_mut().zip(v_units).zip(v_codes);
    for (u, ((m, v), codes)) in units.enumerate() {
        v_exponents[u] = (of_v[u] - LEAST_EXPONENT) as u8;
        most[u] = encode_v_and_scale_m(m, v, of_v[u], bases[u], codes);
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
