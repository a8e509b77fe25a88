//! The memory of `backward_step_with`: one graph at a time, so that a step that measures peaks as a plain one.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{ParamsSrkl, Srkl};
use common::*;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// A deep network of small weights and large activations. 1450 MB beside 778 MB before, of another model.
#[test]
fn a_measuring_step_peaks_as_a_plain_one() -> Result<()> {
    let (rows, width, depth) = (4096, 64, 12);
    let vars: Vec<Var> = (0..depth)
        .map(|i| Var::from_tensor(&noisy_matrix((width, width), 0.1, i, DType::F32)?))
        .collect::<Result<_>>()?;
    let x = Tensor::ones((rows, width), DType::F32, &Device::Cpu)?;
    let loss = || -> Result<Tensor> {
        let mut x = x.clone();
        for w in &vars {
            x = x.matmul(w)?.tanh()?;
        }
        x.sqr()?.mean_all()
    };
    let peak = |opt: &mut Srkl, by_hand: bool| -> Result<(usize, Tensor)> {
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let loss = if by_hand {
            let loss = loss()?;
            opt.backward_step(&loss)?;
            loss.detach()
        } else {
            opt.backward_step_with(loss)?
        };
        Ok((ALLOCATOR.peak_usage() - before, loss))
    };
    let mut plain = Srkl::new(vars.clone(), ParamsSrkl::reference())?;
    peak(&mut plain, true)?;
    let (expected, _) = peak(&mut plain, true)?;
    assert!(expected > 10_000_000, "{expected} bytes prove little");
    for params in [ParamsSrkl::reference(), ParamsSrkl::braked_adam(), ParamsSrkl::hessian()] {
        let mut opt = Srkl::new(vars.clone(), params.clone())?;
        for step in 0..12 {
            let measures = opt.measuring();
            let idle = ALLOCATOR.current_usage();
            let (peak, loss) = peak(&mut opt, false)?;
            let limit = expected + expected / 20;
            assert!(
                peak <= limit,
                "step {step}, measures: {measures}: {peak}, not {limit}, {params:?}"
            );
            // The loss that is returned holds no graph.
            let held = ALLOCATOR.current_usage().saturating_sub(idle);
            assert!(held < expected / 20, "{held} bytes held after step {step}, {params:?}");
            drop(loss);
        }
    }

    // A closure that panics in its second call leaves no gradients behind.
    let mut opt = Srkl::new(vars.clone(), ParamsSrkl::braked_adam())?;
    opt.backward_step_with(loss)?;
    let gradients = depth as usize * width * width * size_of::<f32>();
    // A first panic, whose backtrace keeps what it has read of this program.
    assert!(std::panic::catch_unwind(|| panic!("the first one")).is_err());
    let idle = ALLOCATOR.current_usage();
    let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut calls = 0;
        opt.backward_step_with(|| {
            calls += 1;
            assert!(calls < 2, "the second call");
            loss()
        })
    }));
    assert!(panics.is_err());
    let held = ALLOCATOR.current_usage().saturating_sub(idle);
    assert!(held < gradients / 2, "{held} bytes held of {gradients}");
    // And the training goes on.
    opt.backward_step_with(loss)?;
    Ok(())
}
