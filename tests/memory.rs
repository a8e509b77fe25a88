//! The memory of a step: that of parameters, gradients and state, and at most 1 MB; where it measures the
//! curvature along it, 4 MB.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{NonFinite, ParamsSrkl, Scope, Srkl};
use peak_alloc::PeakAlloc;

use common::*;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// One test, since the allocator counts all threads.
#[test]
fn a_step_allocates_little() -> Result<()> {
    let large = |dtype: DType| (dtype, vec![3_000_001, PIECE + 1, 1]);
    let lists =
        [large(DType::F32), large(DType::F64), large(DType::BF16), (DType::F32, vec![64; 10_000])];
    for (dtype, sizes) in lists {
        for strided in [false, true] {
            for params in settings() {
                let mut store = grads([]);
                let mut vars = vec![];
                for &n in &sizes {
                    let var = Var::zeros(n, dtype, &Device::Cpu)?;
                    // Every second element of a longer tensor.
                    let steps = if strided { 2 } else { 1 };
                    let grad = Tensor::ones((n, steps), dtype, &Device::Cpu)?;
                    store.insert(&var, grad.narrow(1, 0, 1)?.squeeze(1)?);
                    vars.push(var);
                }
                let mut opt = Srkl::new(vars, params.clone())?;
                let step = |opt: &mut Srkl| {
                    let measures = opt.measuring();
                    opt.step(&store)?;
                    if measures { opt.observe(&store) } else { Ok(()) }
                };
                // Its threads have started after a step.
                step(&mut opt)?;
                let before = ALLOCATOR.current_usage();
                ALLOCATOR.reset_peak_usage();
                let most = if opt.measuring() { 4_000_000 } else { 1_000_000 };
                step(&mut opt)?;
                let more = ALLOCATOR.peak_usage() - before;
                assert!(more <= most, "{more} bytes: {dtype:?}, {params:?}");
                step(&mut opt)?;
                let kept = ALLOCATOR.current_usage().saturating_sub(before);
                assert!(kept <= 100_000, "{kept} bytes kept: {dtype:?}, {params:?}");
            }
        }
    }
    products_alone()
}

/// With Muon a step allocates the products of one matrix at a time: two squares of the shorter side, and one matrix.
fn products_alone() -> Result<()> {
    let (rows, cols) = (300, 500);
    let mut store = grads([]);
    let mut vars = vec![];
    for i in 0..10 {
        let var = Var::zeros((rows, cols), DType::F32, &Device::Cpu)?;
        store.insert(&var, noisy_matrix((rows, cols), 1., i, DType::F32)?);
        vars.push(var);
    }
    let mut opt = Srkl::new(vars, ParamsSrkl::muon(0.1))?;
    opt.step(&store)?;
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    opt.step(&store)?;
    let (more, kept) =
        (ALLOCATOR.peak_usage() - before, ALLOCATOR.current_usage().saturating_sub(before));
    let products = 4 * (2 * rows * rows + rows * cols);
    assert!(more <= products + 1_000_000, "{more} bytes, of which products {products}");
    assert!(kept <= 100_000, "{kept} bytes kept");
    Ok(())
}

/// The reference rule in its variants, and steps that measure the curvature along them.
fn settings() -> Vec<ParamsSrkl> {
    let mut all = vec![ParamsSrkl::braked_adam(), ParamsSrkl::kinetic()];
    for scope in [Scope::Tensor, Scope::Global, Scope::Element] {
        for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock] {
            let max_grad_norm = Some(1.);
            all.push(ParamsSrkl { scope, nonfinite, max_grad_norm, ..ParamsSrkl::reference() });
        }
    }
    all
}
