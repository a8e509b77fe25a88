//! Dropout whose masks can be drawn again.

use std::sync::Mutex;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::utils::barrier_pool;
use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, ModuleT, Result, Shape, Tensor, bail,
};

use crate::backend::cpu::Parameter;
use crate::backend::simd::{Kernel, Simd};
use crate::numerics::{Real, random_key, random_word};
use crate::random;

/// Sets elements to zero with probability `p` while training, and scales the others by `1 / (1 - p)`, so that
/// the mean stays: `candle_nn::Dropout`, with masks that can be drawn again.
///
/// With `y` the output, `i` the number of an element in the order of the logical elements, and `r_i` 32 random
/// bits of the element ([`numerics`](crate::numerics)):
///
/// ```text
/// y_i = scale * x_i   if r_i >= floor(p * 2^32)
///       0             otherwise (+0, whatever x_i is)
/// scale = 1 / (1 - p)
/// ```
///
/// `scale` is computed in f64 and rounded to the compute type, which is f32 for f32, bf16 and f16, and f64 for
/// f64; the product is rounded once in it, then to the dtype. The CPU and CUDA devices give the same bits.
/// The gradient goes through the same mask, which is drawn again for it: none is kept in memory.
///
/// # Which mask
///
/// Each call draws a new one, by the seed and number that [`random`] gives. Inside of
/// [`with_seed`](random::with_seed) the same code draws the same masks again; that is what a measurement
/// of curvature needs, which computes one loss twice. See there for trainings that can be repeated, with any
/// optimizer.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_srkl::{Dropout, random::with_seed};
///
/// let x = Tensor::ones(1000, DType::F32, &Device::Cpu)?;
/// let dropout = Dropout::new(0.2);
/// let y = with_seed(0, || dropout.forward(&x, true))?.to_vec1::<f32>()?;
/// let kept = y.iter().filter(|&&y| y == 1.25).count();
/// let dropped = y.iter().filter(|&&y| y == 0.).count();
/// assert!((770..830).contains(&kept) && kept + dropped == 1000);
///
/// assert_eq!(with_seed(0, || dropout.forward(&x, true))?.to_vec1::<f32>()?, y);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Dropout {
    drop_p: f32,
}

impl Dropout {
    /// Drops an element with probability `drop_p`, in [0, 1). There is no default; 0.1 is usual. Of another
    /// number [`forward`](Self::forward) tells.
    pub fn new(drop_p: f32) -> Self {
        Self { drop_p }
    }

    /// Applies a new mask to `xs`, of f32, f64, bf16 or f16 and any layout, on the CPU or a CUDA device.
    /// Unless `train`, and with `p = 0`, it is `xs` itself, and nothing is drawn.
    ///
    /// # Errors
    ///
    /// In training: a probability outside of [0, 1), a tensor of another dtype or on another device, or
    /// a CUDA stream that is being captured, since each replay would repeat the one mask. The last one
    /// comes from the backward pass too.
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let p = self.drop_p;
        if !train {
            return Ok(xs.clone());
        }
        if !(0. ..1.).contains(&p) {
            bail!("dropout: expected a probability in [0, 1), got {p}")
        }
        match xs.device() {
            Device::Cpu => {}
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {}
            device => {
                let places =
                    if cfg!(feature = "cuda") { "the CPU or a CUDA device" } else { "the CPU" };
                bail!("dropout: expected a tensor on {places}, got one on {:?}", device.location())
            }
        }
        if !matches!(xs.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16) {
            bail!("dropout: expected a tensor of f32, f64, bf16 or f16, got {:?}", xs.dtype())
        }
        if p == 0. {
            return Ok(xs.clone());
        }
        let (seed, draw) = random::next_draw();
        xs.contiguous()?.apply_op1(Mask::new(p, seed, draw))
    }
}

impl ModuleT for Dropout {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.forward(xs, train)
    }
}

/// Separates dropout's random bits from those of random vectors, whose streams are small numbers.
const STREAM: u64 = u64::from_be_bytes(*b"dropout\0");

/// A mask and its scale: all that is needed to draw it again.
#[derive(Clone, Copy)]
pub(crate) struct Mask {
    /// Of the random words.
    pub key: u64,
    /// An element is dropped where its bits are below this.
    pub threshold: u32,
    pub scale: f64,
}

impl Mask {
    /// `p` is in [0, 1).
    pub fn new(p: f32, seed: u64, draw: u64) -> Self {
        let p = f64::from(p);
        Self {
            key: random_key(seed, draw, STREAM),
            // Rounded down, and below 2^32 for the f32 next to 1.
            threshold: (p * 2f64.powi(32)) as u32,
            scale: 1. / (1. - p),
        }
    }

    fn apply<T: Parameter + Default>(&self, xs: &[T]) -> Vec<T> {
        let mut ys = vec![T::default(); xs.len()];
        let simd = Simd::detect();
        if xs.len() < PARALLEL {
            simd.run(Apply { mask: *self, start: 0, xs, ys: &mut ys });
            return ys;
        }
        // Candle's pool and not rayon's: it steals no work, so none that waits for the lock of `xs`, which is
        // held. The locks here are free: each piece is taken once. (They fail after a panic alone, which goes on.)
        let pieces: Vec<_> = ys.chunks_mut(PIECE).map(Mutex::new).collect();
        barrier_pool().execute_chunked(pieces.len(), |range| {
            for piece in range {
                let start = piece * PIECE;
                if let Ok(mut ys) = pieces[piece].lock() {
                    let xs = &xs[start..start + ys.len()];
                    simd.run(Apply { mask: *self, start, xs, ys: &mut ys });
                }
            }
        });
        drop(pieces);
        ys
    }
}

/// As many elements are worth several threads; candle's own operations have the same number.
const PARALLEL: usize = 64 * 1024;

/// Elements that a thread takes at once; even, so that a random word is of one piece.
const PIECE: usize = 16 * 1024;

/// The mask of elements `start..`, an even number.
pub(crate) struct Apply<'a, T> {
    pub mask: Mask,
    pub start: usize,
    pub xs: &'a [T],
    pub ys: &'a mut [T],
}

impl<T: Parameter> Kernel for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Mask { key, threshold, scale } = self.mask;
        let scale = T::Compute::from_f64(scale);
        let zero = T::narrow(T::Compute::default());
        let masked = |x: T, bits: u32| {
            let y = T::narrow(x.widen().mul(scale).canonical());
            if bits >= threshold { y } else { zero }
        };
        let (xs, last_x) = self.xs.as_chunks::<2>();
        let (ys, last_y) = self.ys.as_chunks_mut::<2>();
        let first = self.start as u64 / 2;
        for ((x, y), word) in xs.iter().zip(ys).zip(first..) {
            let bits = random_word(key, word);
            *y = [masked(x[0], bits as u32), masked(x[1], (bits >> 32) as u32)];
        }
        for (x, y) in last_x.iter().zip(last_y) {
            *y = masked(*x, random_word(key, first + xs.len() as u64) as u32);
        }
    }
}

impl CustomOp1 for Mask {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("dropout: expected a contiguous tensor")
        };
        let ys = match storage {
            CpuStorage::F32(xs) => CpuStorage::F32(self.apply(&xs[from..to])),
            CpuStorage::F64(xs) => CpuStorage::F64(self.apply(&xs[from..to])),
            CpuStorage::BF16(xs) => CpuStorage::BF16(self.apply(&xs[from..to])),
            CpuStorage::F16(xs) => CpuStorage::F16(self.apply(&xs[from..to])),
            _ => bail!("dropout: expected a tensor of f32, f64, bf16 or f16"),
        };
        Ok((ys, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let ys = crate::backend::cuda_dropout::apply(self, storage, layout)?;
        Ok((ys, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1(*self).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    /// The instruction sets give the same bits.
    #[test]
    fn simd_gives_the_bits_of_the_baseline() {
        fn check<T: Parameter + Default>(of: impl Fn(f64) -> T) {
            let xs: Vec<T> = (0..5001).map(|i| of((i as f64 * 0.37).sin() * 1e-5)).collect();
            let mask = Mask::new(0.3, 5, 6);
            for start in [0, 2, 1 << 33] {
                let run = |simd: Simd| {
                    let mut ys = vec![T::default(); xs.len()];
                    simd.run(Apply { mask, start, xs: &xs, ys: &mut ys });
                    ys
                };
                let (baseline, best) = (run(Simd::Baseline), run(Simd::detect()));
                assert!(baseline.iter().zip(&best).all(|(a, b)| a.same_bits(*b)));
            }
        }
        check(|x| x as f32);
        check(|x| x);
        check(bf16::from_f64);
        check(f16::from_f64);
    }

    /// Candle's gradients are contiguous, but for a few operations'.
    #[test]
    fn a_gradient_may_have_any_layout() -> Result<()> {
        let mask = Mask::new(0.5, 5, 6);
        let matrix = Tensor::arange(1f32, 70., &Device::Cpu)?.reshape((3, 23))?;
        for grad in [matrix.t()?, matrix.narrow(1, 3, 9)?] {
            let through = mask.bwd(&grad, &grad, &grad)?.unwrap();
            let expected = grad.contiguous()?.apply_op1(mask)?;
            assert_eq!(through.to_vec2::<f32>()?, expected.to_vec2::<f32>()?);
        }
        Ok(())
    }
}
