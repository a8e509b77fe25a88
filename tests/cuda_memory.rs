//! What an optimizer allocates on a CUDA device. A test alone: the device's memory is counted, which all of a process share.
//!
//! Needs a CUDA device: `cargo test --release --features cuda`.
#![cfg(feature = "cuda")]

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Result, Var};
use candle_nn::Optimizer;
use candle_srkl::{MasterWeights, ParamsSrkl, Srkl, StateFormat};
use cudarc::driver::DriverError;
use cudarc::driver::sys::{self, CUmemPool_attribute};

/// The bytes that are allocated from the first device's pool.
fn used_of_pool() -> std::result::Result<u64, DriverError> {
    let (mut pool, mut bytes) = (std::ptr::null_mut(), 0u64);
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT;
    // SAFETY: both are given where to write one value of the type that is written.
    unsafe {
        sys::cuDeviceGetMemPool(&mut pool, 0).result()?;
        sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast()).result()?;
    }
    Ok(bytes)
}

/// The bytes a parameter that an optimizer allocates on the device, as docs/memory.md has them, and those of its tables: 8192
/// elements share 60.
#[test]
fn state_takes_what_the_docs_say() -> Result<()> {
    let device = Device::new_cuda(0)?;
    // candle and this crate allocate from the device's pool, which takes memory from the device in large blocks and keeps
    // some: what is free on the device does not change with each allocation.
    let allocated = || {
        device.synchronize()?;
        used_of_pool().w().map(|bytes| bytes as f64)
    };
    let compact = |params| ParamsSrkl { state: StateFormat::Compact, ..params };
    let split = |params| ParamsSrkl { master_weights: MasterWeights::Split, ..params };
    let adamw = ParamsSrkl::adamw(1e-3);
    let (n, codes) = (1_000_001, 1. + 1. / 256.);
    for (params, dtype, bytes) in [
        (adamw.clone(), DType::F32, 8.),
        (adamw.clone(), DType::BF16, 12.),
        (compact(adamw.clone()), DType::F32, 2. * codes),
        (split(compact(adamw.clone())), DType::BF16, 2. + 2. * codes),
        (compact(ParamsSrkl::kinetic()), DType::F32, codes),
    ] {
        let var = Var::zeros(n, dtype, &device)?;
        let before = allocated()?;
        let opt = Srkl::new(vec![var], params.clone())?;
        let kept = (allocated()? - before) / n as f64;
        let tables = 60. / 8192. + 0.01;
        assert!((bytes - 0.01..bytes + tables).contains(&kept), "{kept} not {bytes}: {params:?}");
        drop(opt);
    }
    Ok(())
}
