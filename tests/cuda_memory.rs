//! What an optimizer allocates on a CUDA device. A test alone: the device's memory is counted, which all of a process share.
//!
//! Needs a CUDA device: `cargo test --release --features cuda`.
#![cfg(feature = "cuda")]

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Result, Var};
use candle_nn::Optimizer;
use candle_srkl::{MasterWeights, ParamsSrkl, Srkl, StateFormat};

/// The bytes a parameter that an optimizer allocates on the device, as docs/memory.md has them, and those of its tables: 8192
/// elements share 60.
#[test]
fn state_takes_what_the_docs_say() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let context = device.as_cuda_device()?.cuda_stream().context().clone();
    let free = || {
        device.synchronize()?;
        context.mem_get_info().w().map(|(free, _)| free as f64)
    };
    let compact = |params| ParamsSrkl { state: StateFormat::Compact, ..params };
    let split = |params| ParamsSrkl { master_weights: MasterWeights::Split, ..params };
    let adamw = ParamsSrkl::adamw(1e-3);
    let (n, codes) = (1_000_001, 1. + 1. / 256.);
    // The kernels are loaded once a device and optimizer; a small one shows what that takes.
    let small = Var::zeros(1, DType::F32, &device)?;
    let before = free()?;
    let opt = Srkl::new(vec![small], adamw.clone())?;
    let fixed = before - free()?;
    drop(opt);
    for (params, dtype, bytes) in [
        (adamw.clone(), DType::F32, 8.),
        (adamw.clone(), DType::BF16, 12.),
        (compact(adamw.clone()), DType::F32, 2. * codes),
        (split(compact(adamw.clone())), DType::BF16, 2. + 2. * codes),
        (compact(ParamsSrkl::kinetic()), DType::F32, codes),
    ] {
        let var = Var::zeros(n, dtype, &device)?;
        let before = free()?;
        let opt = Srkl::new(vec![var], params.clone())?;
        let kept = (before - free()? - fixed) / n as f64;
        let tables = 60. / 8192. + 0.01;
        assert!((bytes - 0.01..bytes + tables).contains(&kept), "{kept} not {bytes}: {params:?}");
        drop(opt);
    }
    Ok(())
}
