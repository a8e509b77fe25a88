//! Dropout on a CUDA device: launches the kernel of `kernels/dropout.cuh`.

use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, bail};
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
    PushKernelArg, ValidAsZeroBits,
};

use super::abi;
use super::capture::is_capturing;
use super::launch::module;
use crate::backend::cpu::mask::Mask;

/// The masked elements of a contiguous tensor.
///
/// # Errors
///
/// In a capture.
pub(crate) fn apply(mask: &Mask, xs: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let device = &xs.device;
    if is_capturing(&device.cuda_stream())? {
        bail!(
            "dropout can't be captured in a CUDA graph: each replay would repeat one mask; take such a step \
             outside of the graph, or one without dropout"
        )
    }
    let slice = match &xs.slice {
        CudaStorageSlice::F32(xs) => {
            CudaStorageSlice::F32(apply_to(mask, device, xs, layout, abi::SRKL_F32)?)
        }
        CudaStorageSlice::F64(xs) => {
            CudaStorageSlice::F64(apply_to(mask, device, xs, layout, abi::SRKL_F64)?)
        }
        CudaStorageSlice::BF16(xs) => {
            CudaStorageSlice::BF16(apply_to(mask, device, xs, layout, abi::SRKL_BF16)?)
        }
        CudaStorageSlice::F16(xs) => {
            CudaStorageSlice::F16(apply_to(mask, device, xs, layout, abi::SRKL_F16)?)
        }
        _ => bail!("dropout: expected a tensor of f32, f64, bf16 or f16"),
    };
    Ok(CudaStorage { slice, device: device.clone() })
}

fn apply_to<T: DeviceRepr + ValidAsZeroBits>(
    mask: &Mask,
    device: &CudaDevice,
    xs: &CudaSlice<T>,
    layout: &Layout,
    dtype: u32,
) -> Result<CudaSlice<T>> {
    let Some((from, to)) = layout.contiguous_offsets() else {
        bail!("dropout: expected a contiguous tensor")
    };
    let n = to - from;
    if n == 0 {
        // No memory of size 0 can be had, and candle copies what there is.
        return device.alloc_zeros(1);
    }
    // SAFETY: the kernel writes all of its elements.
    let mut ys = unsafe { device.alloc::<T>(n) }?;
    let stream = device.cuda_stream();
    let kernel = module(stream.context())?.load_function("srkl_dropout").w()?;
    {
        // With several streams these wait for events, and record their own where they are dropped.
        let (x, _read) = xs.device_ptr(&stream);
        let (y, _written) = ys.device_ptr_mut(&stream);
        let x = x + (from * size_of::<T>()) as u64;
        // SAFETY: of the contract at the top of kernels/dropout.cuh,
        // 1. `x` is where the `n` elements of the layout are, which candle keeps within its storage;
        // 2. `ys` is memory of its own, of `n` elements, which CUDA aligns to 256 bytes;
        // 3. `dtype` is T's: see `apply`.
        unsafe { launch(mask, &stream, &kernel, x, y, n as u64, 0, dtype) }?;
    }
    Ok(ys)
}

/// Masks `n` elements at `x` into `y`, from tile `first` on.
///
/// # Safety
///
/// The contract at the top of kernels/dropout.cuh holds for `x`, `y`, `n`, `first` and `dtype`, and both stay
/// allocated until the stream is through.
#[allow(clippy::too_many_arguments)]
unsafe fn launch(
    mask: &Mask,
    stream: &CudaStream,
    kernel: &CudaFunction,
    x: u64,
    y: u64,
    n: u64,
    first: u64,
    dtype: u32,
) -> Result<()> {
    let tiles = n.div_ceil(abi::SRKL_DROPOUT_TILE.into()) - first;
    let config = LaunchConfig {
        // More than there can be: the kernel takes the rest in turns.
        grid_dim: (tiles.clamp(1, 1 << 30) as u32, 1, 1),
        block_dim: (abi::SRKL_THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    let Mask { key, threshold, scale } = mask;
    let mut launch = stream.launch_builder(kernel);
    launch.arg(&x).arg(&y).arg(&n).arg(&first).arg(key).arg(scale).arg(threshold).arg(&dtype);
    // SAFETY: these are the kernel's arguments, by type and order, and its callers promise the rest.
    unsafe { launch.launch(config) }.w()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::mask::Apply;
    use crate::backend::cpu::simd::Simd;
    use candle_core::Device;

    /// Tiles that start past the 2^31st and the 2^32nd element, of a tensor of which only they exist: its
    /// addresses say that everything lies so much further ahead. Needs a CUDA device.
    #[test]
    fn elements_past_32_bits_have_their_own_bits() -> Result<()> {
        let device = Device::new_cuda(0)?;
        let cuda = device.as_cuda_device()?;
        let stream = cuda.cuda_stream();
        let kernel = module(stream.context())?.load_function("srkl_dropout").w()?;
        let mask = Mask::new(0.4, 1, 2);
        let values: Vec<f32> = (0..5001).map(|i| (i as f32 * 0.37).sin()).collect();
        let xs = cuda.clone_htod(&values)?;
        for start in [0, 1u64 << 31, 1 << 32, (1 << 32) + (1 << 31)] {
            let mut ys = cuda.clone_htod(&vec![0f32; values.len()])?;
            let tile = start / u64::from(abi::SRKL_DROPOUT_TILE);
            {
                let (x, _read) = xs.device_ptr(&stream);
                let (y, _written) = ys.device_ptr_mut(&stream);
                let (x, y) = (x.wrapping_sub(4 * start), y.wrapping_sub(4 * start));
                let n = start + values.len() as u64;
                // SAFETY: from tile `tile` on the addresses are those of `xs` and `ys`.
                unsafe { launch(&mask, &stream, &kernel, x, y, n, tile, abi::SRKL_F32) }?;
            }
            let mut expected = vec![0f32; values.len()];
            let start = start as usize;
            Simd::detect().run(Apply { mask, start, xs: &values, ys: &mut expected });
            assert!(cuda.clone_dtoh(&ys)? == expected, "{start}");
        }
        Ok(())
    }
}
