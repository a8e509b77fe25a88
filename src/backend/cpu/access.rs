//! Access to the memory of parameters on the CPU, and conversions between their dtypes and the compute type.

use std::cell::Cell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};

use super::gradient::{Compute, Gradient};
use crate::block::Block;
use crate::compact;
use crate::numerics::{Real, bf16_to_f32, canonical_to_bf16, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::state::MASTER_SAMPLES;

/// A parameter's dtype, with conversions to and from its compute type.
pub(crate) trait Parameter: Copy + Default + Send + Sync {
    type Compute: Compute;
    fn widen(self) -> Self::Compute;
    /// Rounded to nearest even.
    fn narrow(x: Self::Compute) -> Self;
    /// The same, for numbers whose only NaN is the canonical one.
    #[inline(always)]
    fn narrow_canonical(x: Self::Compute) -> Self {
        Self::narrow(x)
    }
    fn same_bits(self, other: Self) -> bool;
    /// The bits of a bf16 number.
    fn bits(self) -> u16 {
        0
    }
    /// Rounds elements from `first` of a unit on at random, whose offsets have this base. Only bf16 is.
    #[inline(always)]
    fn round_part(w: &mut [Self], x: &[Self::Compute], _base: u32, _first: u32) {
        w.iter_mut().zip(x).for_each(|(w, x)| *w = Self::narrow(*x));
    }
}

macro_rules! impl_parameter {
    ($t:ty, $compute:ty, $widen:expr, $narrow:expr $(, $more:item)*) => {
        impl Parameter for $t {
            type Compute = $compute;
            #[inline(always)]
            fn widen(self) -> $compute {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(x: $compute) -> Self {
                $narrow(x)
            }
            #[inline(always)]
            fn same_bits(self, other: Self) -> bool {
                self.to_bits() == other.to_bits()
            }
            $($more)*
        }
    };
}
impl_parameter!(f32, f32, |x| x, |x| x);
impl_parameter!(f64, f64, |x| x, |x| x);
impl_parameter!(
    bf16,
    f32,
    |x: bf16| bf16_to_f32(x.to_bits()),
    |x| bf16::from_bits(f32_to_bf16(x)),
    #[inline(always)]
    fn narrow_canonical(x: f32) -> Self {
        bf16::from_bits(canonical_to_bf16(x))
    },
    #[inline(always)]
    fn bits(self) -> u16 {
        self.to_bits()
    },
    #[inline(always)]
    fn round_part(w: &mut [bf16], x: &[f32], base: u32, first: u32) {
        compact::round_part(w, x, base, first);
    }
);
impl_parameter!(f16, f32, |x: f16| f16_to_f32(x.to_bits()), |x| { f16::from_bits(f32_to_f16(x)) });

/// The elements of a parameter that are compared: evenly spaced, the first and the last among them.
#[derive(Clone, Copy)]
pub(crate) struct Samples {
    /// The elements of the parameter, and which of them are stepped here.
    whole: usize,
    first: usize,
    n: usize,
}

impl Samples {
    pub fn of(block: &Block) -> Self {
        let Block { whole, first, n, .. } = *block;
        Self { whole, first, n }
    }

    /// The numbers of those that are stepped here, and their indices among all that are.
    pub fn each(self) -> impl Iterator<Item = (usize, usize)> {
        let Self { whole, first, n } = self;
        let count = MASTER_SAMPLES.min(whole);
        let sample = move |k: usize| if count > 1 { k * (whole - 1) / (count - 1) } else { 0 };
        let own = move |k: usize| Some((k, sample(k).checked_sub(first).filter(|i| *i < n)?));
        (0..count).filter_map(own)
    }

    /// Whether a parameter is not what was noted of it: it seems to have been overwritten as a whole.
    pub fn differ<P: Parameter>(self, w: &[P], noted: &[i16]) -> bool {
        self.each().any(|(k, i)| w[i].bits() != noted[k] as u16)
    }

    /// Notes samples of a parameter; nothing if there is no room.
    pub fn note<P: Parameter>(self, w: &[P], noted: &mut [i16]) {
        if !noted.is_empty() {
            self.each().for_each(|(k, i)| noted[k] = w[i].bits() as i16);
        }
    }
}

/// Whether a parameter is what its master rounds to.
#[inline(always)]
pub(crate) fn agree<P: Parameter>(w: P, master: P::Compute) -> bool {
    // There are many NaNs, and a master rounds to only one of them.
    P::narrow(master).same_bits(w) || master.is_nan() && w.widen().is_nan()
}

/// # Errors
///
/// A storage that is not in CPU memory.
pub(crate) fn cpu_storage(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("expected a tensor on the CPU"),
    }
}

/// Runs `f` on the whole memory of a variable, of a view of one, whatever its layout, or of a tensor of our own. (A variable
/// is contiguous and starts at offset 0: candle makes it from a copy.)
pub(crate) fn with_storage_mut<F: FnOnce(&mut CpuStorage) -> Result<()>>(
    tensor: &Tensor,
    f: F,
) -> Result<()> {
    struct Op<F>(Cell<Option<F>>);
    impl<F: FnOnce(&mut CpuStorage) -> Result<()>> InplaceOp1 for Op<F> {
        fn name(&self) -> &'static str {
            "srkl-update"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
            self.0.take().map_or(Ok(()), |f| f(storage))
        }
    }
    tensor.inplace_op1(&Op(Cell::new(Some(f))))
}

/// The address of the first element that is stepped of a block on the CPU, for prefetching; 0 elsewhere.
pub(crate) fn first_element(block: &Block) -> Result<usize> {
    let (storage, _) = block.var.storage_and_layout();
    if block.on_cpu { Ok(Gradient::new(&storage, &block.layout)?.address()) } else { Ok(0) }
}
