//! Dropout whose masks can be drawn again.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, ModuleT, Result, Shape, Tensor, bail,
};

use crate::backend::cpu::mask::Mask;
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
/// Each call draws a new mask, from the seed and the number that [`random`] gives. Inside of
/// [`with_seed`](random::with_seed) the same code draws the same masks again. A measurement of curvature, which
/// computes one loss twice, needs that. [`random`] shows how to make a training reproducible, with any optimizer.
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
    /// Drops an element with probability `drop_p`, in [0, 1). There is no default; 0.1 is usual. Any other number
    /// makes [`forward`](Self::forward) fail in training.
    #[must_use]
    pub fn new(drop_p: f32) -> Self {
        Self { drop_p }
    }

    /// Applies a new mask to `xs`, of f32, f64, bf16 or f16 and any layout, on the CPU or a CUDA device. Returns `xs`
    /// itself, and draws nothing, if not `train`, or if `p = 0`.
    ///
    /// # Errors
    ///
    /// In training: a probability outside of [0, 1), a tensor of another dtype or on another device, or a CUDA stream
    /// that is being captured, since each replay would repeat the one mask. A capture makes the backward pass fail
    /// too.
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
        let ys = crate::backend::cuda::dropout::apply(self, storage, layout)?;
        Ok((ys, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1(*self).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
