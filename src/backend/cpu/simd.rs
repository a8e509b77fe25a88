//! One source, three instantiations: a kernel is plain safe Rust, compiled for the target's baseline, for AVX2 + FMA,
//! and for AVX-512. The processor's features decide at run time which one runs.
//!
//! All give the same bits: vectorization reorders nothing in our loops, and `mul_add` is rounded
//! once in hardware and in the C library alike.

/// A loop over slices. `run` and all it calls must be `#[inline(always)]`, or it is compiled for
/// the baseline only.
pub(crate) trait Kernel {
    type Output;
    fn run(self) -> Self::Output;
}

#[cfg(test)]
thread_local! {
    /// What [`Simd::detect`] gives in this thread, whatever the processor has.
    pub(crate) static FORCED: std::cell::Cell<Option<Simd>> = const { std::cell::Cell::new(None) };
}

/// The instruction set that kernels run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Simd {
    /// What the compiler may assume of every processor of the target.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2Fma(Avx2Fma),
    /// Of its parts F, BW, DQ and VL, which all processors have that have any but F.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

/// Proof that this processor has AVX2 and FMA: only [`Simd::available`] makes one.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx2Fma(());

/// Proof that this processor has AVX-512, AVX2 and FMA: only [`Simd::available`] makes one.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512(());

impl Simd {
    /// The best of this processor.
    pub fn detect() -> Self {
        #[cfg(test)]
        if let Some(forced) = FORCED.get() {
            return forced;
        }
        Self::available().pop().unwrap_or(Self::Baseline)
    }

    /// All that this processor can run, the best last.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut available = vec![Self::Baseline];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            available.push(Self::Avx2Fma(Avx2Fma(())));
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                available.push(Self::Avx512(Avx512(())));
            }
        }
        available
    }

    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Baseline => kernel.run(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Fma(Avx2Fma(())) => {
                // SAFETY: an `Avx2Fma` exists only where `available` has seen both features.
                unsafe { run_avx2_fma(kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(Avx512(())) => {
                // SAFETY: an `Avx512` exists only where `available` has seen all of these features.
                unsafe { run_avx512(kernel) }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2_fma<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// So many elements are taken at a time where a loop goes over many arrays: see [`each`].
pub(crate) const WIDTH: usize = 16;

/// The array of these values. The compiler keeps arrays of [`WIDTH`] in registers and makes vector code of what is done with them,
/// also where it would not of a loop over slices.
#[inline(always)]
pub(crate) fn each<T: Copy + Default, const N: usize>(value: impl Fn(usize) -> T) -> [T; N] {
    let mut values = [T::default(); N];
    for (i, x) in values.iter_mut().enumerate() {
        *x = value(i);
    }
    values
}

/// The first `N`.
#[inline(always)]
pub(crate) fn load<T: Copy + Default, const N: usize>(values: &[T]) -> [T; N] {
    let values = &values[..N];
    each(|i| values[i])
}

/// Splits off the first `len`.
#[inline(always)]
pub(crate) fn first<'a, T>(numbers: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    numbers.split_off_mut(..len).unwrap_or_default()
}

/// Bytes of a line of the caches. Loops over elements, [`WIDTH`] at a time, ask for so many of them at once: see [`Stream::prefetch`].
pub(crate) const LINE: usize = 64;
const _: () = assert!(LINE.is_multiple_of(WIDTH));

/// Asks for the memory at an address, which need not be valid, to be brought into the caches.
#[inline(always)]
pub(crate) fn prefetch(address: usize, bytes: usize) {
    for line in 0..bytes.div_ceil(LINE) {
        prefetch_line(address + LINE * line);
    }
}

#[inline(always)]
fn prefetch_line(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint: it reads no value and never faults. SSE is part of x86_64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address)) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// So many elements ahead memory is asked for.
pub(crate) const AHEAD: usize = 512;

/// Where an array goes on in memory.
#[derive(Clone, Copy)]
pub(crate) struct Stream {
    address: usize,
    size: usize,
}

impl Stream {
    /// In place of one.
    pub const NONE: Self = Self { address: 0, size: 0 };

    /// From element `start` on, which may be beyond its end.
    #[inline(always)]
    pub fn of<T>(array: &[T], start: usize) -> Self {
        let size = size_of::<T>();
        Self { address: array.as_ptr().addr() + start * size, size }
    }

    /// Asks for [`LINE`] elements from `i` on: as many lines as an element has bytes.
    #[inline(always)]
    pub fn prefetch(&self, i: usize) {
        let address = self.address + i * self.size;
        let line = |line| prefetch_line(address + LINE * line);
        // Rather than a loop of so few turns.
        line(0);
        if self.size >= 2 {
            line(1);
        }
        if self.size >= 4 {
            line(2);
            line(3);
        }
        if self.size >= 8 {
            (4..8).for_each(line);
        }
    }
}
