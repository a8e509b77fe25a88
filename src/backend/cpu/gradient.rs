//! Reads a gradient or a parameter, of any float dtype and layout, as rows of the compute type.

use std::ops::{Deref, DerefMut, Range};

use candle_core::{CpuStorage, Layout, Result, Storage, bail};
use half::{bf16, f16};

use super::simd::Stream;
use crate::numerics::{LANES, Real, bf16_to_f32, f16_to_f32};

/// A gradient, or a parameter, in CPU memory, in the order of its logical elements.
pub(crate) struct Gradient<'a> {
    values: Values<'a>,
    layout: &'a Layout,
    contiguous: bool,
}

/// The tensor's whole storage; the layout says where in it the elements are.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    BF16(&'a [bf16]),
    F16(&'a [f16]),
}

/// A buffer for one row in either compute type, allocated at its first use.
#[derive(Default)]
pub(crate) struct RowBuffer {
    narrow: Option<Box<Aligned<f32>>>,
    wide: Option<Box<Aligned<f64>>>,
}

/// A row, aligned to the lines of caches, so that no SIMD register is loaded from two of them.
#[repr(align(64))]
pub(crate) struct Aligned<T>([T; LANES]);

impl<T: Default + Copy> Default for Aligned<T> {
    fn default() -> Self {
        Self([T::default(); LANES])
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

/// A compute type, f32 or f64, with access to memory of that type.
pub(crate) trait Compute: Real {
    /// The values themselves, if they are of this type.
    fn borrow(values: Values<'_>) -> Option<&[Self]>;
    fn buffer(buffer: &mut RowBuffer) -> &mut [Self];
    /// State of this type.
    fn numbers_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

impl Compute for f32 {
    #[inline(always)]
    fn borrow(values: Values<'_>) -> Option<&[f32]> {
        match values {
            Values::F32(values) => Some(values),
            _ => None,
        }
    }
    #[inline(always)]
    fn buffer(buffer: &mut RowBuffer) -> &mut [f32] {
        buffer.narrow.get_or_insert_default()
    }
    fn numbers_mut(storage: &mut CpuStorage) -> Option<&mut [f32]> {
        match storage {
            CpuStorage::F32(values) => Some(values),
            _ => None,
        }
    }
}

impl Compute for f64 {
    #[inline(always)]
    fn borrow(values: Values<'_>) -> Option<&[f64]> {
        match values {
            Values::F64(values) => Some(values),
            _ => None,
        }
    }
    #[inline(always)]
    fn buffer(buffer: &mut RowBuffer) -> &mut [f64] {
        buffer.wide.get_or_insert_default()
    }
    fn numbers_mut(storage: &mut CpuStorage) -> Option<&mut [f64]> {
        match storage {
            CpuStorage::F64(values) => Some(values),
            _ => None,
        }
    }
}

impl<'a> Gradient<'a> {
    /// # Errors
    ///
    /// A storage that is not on the CPU, or whose dtype is none of f32, f64, bf16 and f16.
    pub fn new(storage: &'a Storage, layout: &'a Layout) -> Result<Self> {
        Self::of(storage, layout, layout.is_contiguous())
    }

    /// The same of a gradient that is known to be `contiguous`, or not to be.
    pub fn of(storage: &'a Storage, layout: &'a Layout, contiguous: bool) -> Result<Self> {
        let values = match storage {
            Storage::Cpu(CpuStorage::F32(values)) => Values::F32(values),
            Storage::Cpu(CpuStorage::F64(values)) => Values::F64(values),
            Storage::Cpu(CpuStorage::BF16(values)) => Values::BF16(values),
            Storage::Cpu(CpuStorage::F16(values)) => Values::F16(values),
            _ => bail!("expected a gradient of f32, f64, bf16 or f16 on the CPU"),
        };
        Ok(Self { values, layout, contiguous })
    }

    /// The address of the first element, if all are contiguous.
    pub fn contiguous_address(&self) -> Option<usize> {
        self.contiguous.then(|| self.address())
    }

    /// The address of the first element, for prefetching.
    pub fn address(&self) -> usize {
        let offset = self.layout.start_offset();
        match self.values {
            Values::F32(values) => values.as_ptr().wrapping_add(offset).addr(),
            Values::F64(values) => values.as_ptr().wrapping_add(offset).addr(),
            Values::BF16(values) => values.as_ptr().wrapping_add(offset).addr(),
            Values::F16(values) => values.as_ptr().wrapping_add(offset).addr(),
        }
    }

    /// Where its elements are in memory from `start` on, if it is contiguous.
    #[inline(always)]
    pub fn stream(&self, start: usize) -> Option<Stream> {
        let offset = self.layout.start_offset() + start;
        self.contiguous.then(|| match self.values {
            Values::F32(values) => Stream::of(values, offset),
            Values::F64(values) => Stream::of(values, offset),
            Values::BF16(values) => Stream::of(values, offset),
            Values::F16(values) => Stream::of(values, offset),
        })
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.layout.shape().elem_count()
    }

    /// Elements `start..start + len`, converted into `buffer` unless they can be borrowed; `len` is
    /// at most [`LANES`].
    #[inline(always)]
    pub fn row<'r, C: Compute>(
        &'r self,
        start: usize,
        len: usize,
        buffer: &'r mut RowBuffer,
    ) -> &'r [C] {
        let range = self.layout.start_offset() + start..self.layout.start_offset() + start + len;
        let row = &mut C::buffer(buffer)[..len];
        if self.contiguous {
            if let Some(values) = C::borrow(self.values) {
                return &values[range];
            }
            match self.values {
                Values::F32(values) => convert(row, &values[range], |x| x as f64),
                Values::F64(values) => convert(row, &values[range], |x| x),
                Values::BF16(values) => {
                    convert(row, &values[range], |x| bf16_to_f32(x.to_bits()) as f64)
                }
                Values::F16(values) => {
                    convert(row, &values[range], |x| f16_to_f32(x.to_bits()) as f64)
                }
            }
        } else {
            match self.values {
                Values::F32(values) => self.gather(row, start, |i| values[i] as f64),
                Values::F64(values) => self.gather(row, start, |i| values[i]),
                Values::BF16(values) => {
                    self.gather(row, start, |i| bf16_to_f32(values[i].to_bits()) as f64)
                }
                Values::F16(values) => {
                    self.gather(row, start, |i| f16_to_f32(values[i].to_bits()) as f64)
                }
            }
        }
        row
    }

    /// Fills `row` with the logical elements from `start` on.
    fn gather<C: Real>(&self, row: &mut [C], start: usize, value: impl Fn(usize) -> f64) {
        let mut row = row.iter_mut();
        each_place(self.layout, start, row.len(), |place| {
            if let Some(x) = row.next() {
                *x = C::from_f64(value(place));
            }
        });
    }
}

/// Calls `f` with the places in the storage of `len` logical elements from `start` on, by the strides of the layout.
fn each_place(layout: &Layout, start: usize, len: usize, mut f: impl FnMut(usize)) {
    let (dims, strides) = (layout.dims(), layout.stride());
    // The coordinates of `start`, last dimension fastest, and its place in the storage.
    let mut index = vec![0; dims.len()];
    let mut rest = start;
    for (index, dim) in index.iter_mut().zip(dims).rev() {
        (*index, rest) = (rest % dim, rest / dim);
    }
    let mut place = layout.start_offset();
    place += index.iter().zip(strides).map(|(index, stride)| index * stride).sum::<usize>();
    for _ in 0..len {
        f(place);
        for ((index, &dim), &stride) in index.iter_mut().zip(dims).zip(strides).rev() {
            *index += 1;
            place += stride;
            if *index < dim {
                break;
            }
            place -= dim * stride;
            *index = 0;
        }
    }
}

/// Appends the bytes of some logical elements of a tensor on the CPU, little-endian.
///
/// # Errors
///
/// A dtype that is none of f32, f64, bf16 and f16.
pub(crate) fn append_elements(
    storage: &Storage,
    layout: &Layout,
    range: Range<usize>,
    bytes: &mut Vec<u8>,
) -> Result<()> {
    fn append<T: Copy, const N: usize>(
        values: &[T],
        layout: &Layout,
        range: Range<usize>,
        bytes: &mut Vec<u8>,
        to_bytes: impl Fn(T) -> [u8; N],
    ) {
        let (first, offset) = (bytes.len(), layout.start_offset());
        bytes.resize(first + range.len() * N, 0);
        let mut to = bytes[first..].as_chunks_mut::<N>().0.iter_mut();
        if layout.is_contiguous() {
            let values = &values[offset + range.start..offset + range.end];
            to.zip(values).for_each(|(to, x)| *to = to_bytes(*x));
        } else {
            each_place(layout, range.start, range.len(), |place| {
                if let Some(to) = to.next() {
                    *to = to_bytes(values[place]);
                }
            });
        }
    }
    match storage {
        Storage::Cpu(CpuStorage::F32(x)) => append(x, layout, range, bytes, f32::to_le_bytes),
        Storage::Cpu(CpuStorage::F64(x)) => append(x, layout, range, bytes, f64::to_le_bytes),
        Storage::Cpu(CpuStorage::BF16(x)) => append(x, layout, range, bytes, bf16::to_le_bytes),
        Storage::Cpu(CpuStorage::F16(x)) => append(x, layout, range, bytes, f16::to_le_bytes),
        _ => bail!("expected a tensor of f32, f64, bf16 or f16 on the CPU"),
    }
    Ok(())
}

/// Converts by way of f64, which holds every value of the other types: one rounding.
#[inline(always)]
fn convert<T: Copy, C: Real>(row: &mut [C], values: &[T], widen: impl Fn(T) -> f64) {
    for (x, value) in row.iter_mut().zip(values) {
        *x = C::from_f64(widen(*value));
    }
}
