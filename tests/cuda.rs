//! The CUDA path has the bits of the CPU path: of parameters, masters, moments, averages, counters and telemetry.
//!
//! Needs a CUDA device: `cargo test --release --features cuda`.
//!
//! | claim | test |
//! |---|---|
//! | of every scope, policy, clipping and kind of masters | `the_same_bits_as_the_cpu` |
//! | of every direction and measured curvature | `the_same_bits_of_measured_curvature` |
//! | with parameters spread over devices, CPU and CUDA | `.._on_several_devices` |
//! | of the presets, small enough for checks of every access | `the_same_bits_of_small_presets`, `.._of_small_packed_presets` |
//! | wherever a gradient begins in 16 bytes | `the_same_bits_of_odd_sizes_misaligned` |
//! | after a checkpoint of another device | `checkpoints_go_from_device_to_device` |
//! | with parameters that are frozen, added, removed and copied | `checkpoints_of_living_optimizers_have_the_same_bits` |
//! | a gradient on the wrong device changes nothing | `wrong_devices_are_named_and_change_nothing` |
//! | memory that was replaced is noticed | `a_replaced_storage_is_noticed` |
//!
//! `bits.rs` compares both with what the crate computed before, `cuda_graphs.rs` has captures, `cuda_dropout.rs` dropout.
#![cfg(feature = "cuda")]

mod common;

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Var};
use candle_nn::Optimizer;
use candle_srkl::{
    Average, AverageFormat, Beta, Curvature, DEFAULT_GROUP, Direction, HutchinsonCurvature,
    MasterWeights, Measure, NonFinite, ParamsSrkl, Repeatable, Rounding, Scope, Srkl, StateFormat,
    StepCurvature,
};
use common::cuda::{model, state, step};
use common::training::{assert_same, train};
use common::*;
use rand::RngExt;

/// Sizes with every kind of tail, and few enough elements for a software device. (candle makes no
/// empty tensors on a device.)
const SMALL_SIZES: [usize; 11] = [
    1,
    3,
    9,
    127,
    LANES + 1,
    CHUNK / 2 - 1,
    CHUNK / 2 + 1,
    CHUNK - 1,
    CHUNK + 1,
    2 * CHUNK,
    2 * CHUNK + 3617,
];

/// So many parameters that there are names of two digits, which are in the second group.
fn sizes() -> Vec<usize> {
    [&SMALL_SIZES[..], &SMALL_SIZES[4..]].concat()
}

/// Random, or `SEED=N`; it is printed where the test fails.
fn seed() -> u64 {
    let seed = match std::env::var("SEED") {
        Ok(seed) => seed.parse().expect("SEED: a number"),
        Err(_) => rand::rng().random_range(0..1 << 40),
    };
    println!("SEED={seed}");
    seed
}

/// That a training leaves on each of these lists of devices what it leaves on the CPU.
fn assert_as_on_cpu(
    params: &ParamsSrkl,
    sizes: &[usize],
    seed: u64,
    places: &[&[&Device]],
) -> Result<()> {
    let cpu = train(params, sizes, seed, &[&Device::Cpu])?;
    for devices in places {
        let left = train(params, sizes, seed, devices)?;
        assert_same(&cpu, &left, &format!("{seed}, {devices:?}, {params:?}"));
    }
    Ok(())
}

fn settings(scope: Scope, max_grad_norm: Option<f64>, nonfinite: NonFinite) -> ParamsSrkl {
    ParamsSrkl {
        lr: 0.1,
        beta: Beta::Fixed(0.3),
        scope,
        weight_decay: 0.1,
        max_grad_norm,
        nonfinite,
        ..ParamsSrkl::reference()
    }
}

const SCOPES: [Scope; 3] = [Scope::Tensor, Scope::Global, Scope::Element];
const POLICIES: [NonFinite; 3] = [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate];

#[test]
fn the_same_bits_as_the_cpu() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let mut seed = seed();
    for (scope, nonfinite) in SCOPES.into_iter().flat_map(|s| POLICIES.map(|p| (s, p))) {
        for max_grad_norm in [None, Some(5.)] {
            for master_weights in [MasterWeights::Auto, MasterWeights::None] {
                let params =
                    ParamsSrkl { master_weights, ..settings(scope, max_grad_norm, nonfinite) };
                seed += 1;
                assert_as_on_cpu(&params, &sizes(), seed, &[&[&device]])?;
            }
        }
    }
    Ok(())
}

/// Parameters on the CPU and on two devices (of candle; they may be one card), in one optimizer.
#[test]
fn the_same_bits_on_several_devices() -> Result<()> {
    let (a, b) = (Device::new_cuda(0)?, Device::new_cuda(0)?);
    let seed = seed();
    for (case, scope) in SCOPES.into_iter().enumerate() {
        for (max_grad_norm, nonfinite) in [
            (None, NonFinite::SkipStep),
            (Some(5.), NonFinite::SkipBlock),
            (None, NonFinite::Propagate),
        ] {
            let params = settings(scope, max_grad_norm, nonfinite);
            let places: [&[&Device]; 3] = [&[&Device::Cpu, &a], &[&a, &Device::Cpu, &b], &[&a, &b]];
            assert_as_on_cpu(&params, &sizes(), seed + case as u64, &places)?;
        }
    }
    Ok(())
}

/// Every direction, curvature and scope, each with every policy, with and without trust clip, clipping and
/// average.
fn measuring_settings() -> Vec<ParamsSrkl> {
    let step = Curvature::Step(StepCurvature { decay: 0.9, noise: 1.5 });
    let rows = Curvature::Hutchinson(HutchinsonCurvature { decay: 0.9 });
    let measure = Measure { every: 3, first: 2, delta: 1e-2, seed: 5 };
    let momentum = Direction::Momentum { mu: 0.9 };
    let adam = Direction::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
    let sgd = |nesterov| Direction::Sgd { momentum: 0.8, nesterov };
    let nesterov_adam = Direction::NesterovAdam { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
    let amsgrad = Direction::AmsGrad { beta1: 0.9, beta2: 0.9, eps: 1e-8 };
    let lion = Direction::Lion { beta1: 0.9, beta2: 0.95 };
    let cases = [
        (momentum, Curvature::GradSquare, Scope::Tensor),
        (adam, Curvature::GradSquare, Scope::Element),
        (Direction::Gradient, step, Scope::Global),
        (momentum, step, Scope::Tensor),
        (adam, step, Scope::Global),
        (Direction::Gradient, rows, Scope::Element),
        (momentum, rows, Scope::Mixed(0.625)),
        (adam, rows, Scope::Tensor),
        (momentum, rows, Scope::Global),
        (Direction::Gradient, Curvature::None, Scope::Tensor),
        (adam, Curvature::None, Scope::Global),
        (sgd(true), Curvature::None, Scope::Tensor),
        (sgd(false), step, Scope::Tensor),
        (sgd(true), step, Scope::Global),
        (sgd(true), Curvature::GradSquare, Scope::Element),
        (nesterov_adam, step, Scope::Global),
        (amsgrad, step, Scope::Tensor),
        (lion, step, Scope::Global),
        (nesterov_adam, Curvature::None, Scope::Tensor),
        (amsgrad, Curvature::None, Scope::Tensor),
        (lion, Curvature::None, Scope::Tensor),
        (lion, Curvature::GradSquare, Scope::Element),
        (adam, Curvature::None, Scope::Tensor),
    ];
    let mut all = vec![];
    for (case, (direction, curvature, scope)) in cases.into_iter().enumerate() {
        // Of Propagate without masters, clip or measurement nothing is asked before the step.
        for (variant, nonfinite) in POLICIES.into_iter().enumerate() {
            let masters = [MasterWeights::Auto, MasterWeights::None, MasterWeights::None];
            all.push(ParamsSrkl {
                lr: 0.5,
                direction,
                // Of the last case, which has no other reason for the kernel of rare settings, each.
                cautious: case == 22 || case > 14 && variant == 1,
                curvature,
                measure,
                scope,
                beta: Beta::Tied(0.5),
                trust: (case % 2 == variant % 2).then_some(0.05),
                weight_decay: 0.1,
                max_grad_norm: (variant == 1).then_some(5.),
                average: [Some(Average::Exponential(0.9)), None, Some(Average::Polynomial(3.))]
                    [variant],
                master_weights: masters[variant],
                nonfinite,
                repeatable: Repeatable::Assume,
                ..ParamsSrkl::reference()
            });
        }
    }
    all
}

#[test]
fn the_same_bits_of_measured_curvature() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let seed = seed();
    for (case, params) in measuring_settings().iter().enumerate() {
        assert_as_on_cpu(params, &sizes(), seed + 10 * case as u64, &[&[&device]])?;
    }
    Ok(())
}

#[test]
fn the_same_bits_of_measured_curvature_on_several_devices() -> Result<()> {
    let (a, b) = (Device::new_cuda(0)?, Device::new_cuda(0)?);
    let seed = seed();
    let sizes = [3, LANES + 1, 9, CHUNK + 1, 17, 1, CHUNK + 8, 31, 64, 2 * CHUNK + 1, 5, PIECE + 1];
    for (case, params) in measuring_settings().iter().enumerate() {
        let places: [&[&Device]; 3] = [&[&Device::Cpu, &a], &[&a, &Device::Cpu, &b], &[&a, &b]];
        let place = &places[(case / 3 + case) % 3..][..1];
        assert_as_on_cpu(params, &sizes, seed + 10 * case as u64, place)?;
    }
    Ok(())
}

/// The presets, with few elements: for checks of every access.
#[test]
fn the_same_bits_of_small_presets() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let seed = seed();
    for params in [ParamsSrkl::braked_adam(), ParamsSrkl::kinetic(), ParamsSrkl::hessian()] {
        let params = ParamsSrkl { average: Some(Average::Exponential(0.9)), ..params };
        let sizes = [3, LANES + 1, 9, CHUNK + 1, 17, 1, CHUNK + 8, 31, 64, 5];
        assert_as_on_cpu(&params, &sizes, seed, &[&[&device], &[&Device::Cpu, &device]])?;
    }
    Ok(())
}

/// The same with packed state.
#[test]
fn the_same_bits_of_small_packed_presets() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let presets = [ParamsSrkl::braked_adam(), ParamsSrkl::kinetic(), ParamsSrkl::hessian()];
    for (case, params) in presets.into_iter().enumerate() {
        let params = ParamsSrkl {
            state: StateFormat::Compact,
            master_weights: [MasterWeights::Split, MasterWeights::None][case % 2],
            rounding: Rounding::Stochastic,
            average: Some(Average::Polynomial(2.)),
            average_format: AverageFormat::BF16,
            ..params
        };
        let sizes = [4096, LANES + 1, 4097, CHUNK + 1, 17, 1, 4351, 4095, 5000, 5];
        assert_as_on_cpu(&params, &sizes, seed(), &[&[&device], &[&Device::Cpu, &device]])?;
    }
    Ok(())
}

/// Packed state of gradients of all magnitudes, among which some elements of a unit are below all its binades, and the squares of
/// some beyond f32.
#[test]
fn the_same_bits_of_packed_state_of_any_magnitude() -> Result<()> {
    let cuda = Device::new_cuda(0)?;
    let n = 5000;
    let gradient = |step: u64, scale: f64| -> Vec<f64> {
        let (sizes, signs) = (noise(n, 1., 7 + step), noise(n, 1., 70 + step));
        let of = |(i, (size, sign)): (usize, (f64, f64))| match i % 11 {
            0 => 0.,
            _ => sign * scale * 10f64.powf(4. * size),
        };
        sizes.into_iter().zip(signs).enumerate().map(of).collect()
    };
    for scale in [1., 1e-15, 1e-20, 1e15, 1e20] {
        let train = |device: &Device| -> Result<_> {
            let start = tensor(&noise(n, 1., 0), DType::BF16)?.to_device(device)?;
            let var = Var::from_tensor(&start)?;
            let params = ParamsSrkl {
                state: StateFormat::Compact,
                master_weights: MasterWeights::Split,
                nonfinite: NonFinite::Propagate,
                ..ParamsSrkl::adamw(1e-3)
            };
            let mut opt = Srkl::new(vec![var.clone()], params)?;
            for step in 0..4 {
                let g = tensor(&gradient(step, scale), DType::F32)?.to_device(device)?;
                opt.step(&grads([(&var, g)]))?;
            }
            Ok((bits(&var.to_device(&Device::Cpu)?)?, saved(&mut opt)?.1))
        };
        assert!(train(&Device::Cpu)? == train(&cuda)?, "{scale}");
    }
    Ok(())
}

/// Odd sizes, and gradients that begin at every place in 16 bytes.
#[test]
fn the_same_bits_of_odd_sizes_misaligned() -> Result<()> {
    let cuda = Device::new_cuda(0)?;
    let train = |device: &Device| -> Result<Vec<Vec<u64>>> {
        let mut vars = vec![];
        let mut store = grads([]);
        for (i, n) in [4097, CHUNK + 1, 20_001, 30_007, PIECE + 1, 99_999].into_iter().enumerate() {
            for dtype in [DType::F32, DType::BF16] {
                let value = tensor(&noise(n, 0.5, i as u64), dtype)?.to_device(device)?;
                let var = Var::from_tensor(&value)?;
                let g = tensor(&noise(n + 9, 0.3, 100 + i as u64), dtype)?.to_device(device)?;
                store.insert(&var, g.narrow(0, i + 1, n)?);
                vars.push(var);
            }
        }
        let params = ParamsSrkl { lr: 0.1, ..ParamsSrkl::reference() };
        let mut opt = Srkl::new(vars.clone(), params)?;
        opt.step(&store)?;
        vars.iter().map(|var| bits(&var.to_device(&Device::Cpu)?)).collect()
    };
    assert!(train(&Device::Cpu)? == train(&cuda)?);
    Ok(())
}

/// Two steps on one device, a checkpoint, and two on the other: as four on one.
#[test]
fn checkpoints_go_from_device_to_device() -> Result<()> {
    let cuda = Device::new_cuda(0)?;
    let (vars, mut opt) = model(&Device::Cpu)?;
    for i in 0..4 {
        step(&vars, &mut opt, i)?;
    }
    let expected = state(&vars, &opt)?;
    for (from, to) in [(&Device::Cpu, &cuda), (&cuda, &Device::Cpu), (&cuda, &cuda)] {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("state");
        let (vars, mut opt) = model(from)?;
        for i in 0..2 {
            step(&vars, &mut opt, i)?;
        }
        opt.save(&path)?;
        let (resumed, mut resumed_opt) = model(to)?;
        for (resumed, var) in resumed.iter().zip(&vars) {
            resumed.set(&var.to_device(to)?)?;
        }
        resumed_opt.load(&path)?;
        for i in 2..4 {
            step(&resumed, &mut resumed_opt, i)?;
        }
        assert!(state(&resumed, &resumed_opt)? == expected, "from {from:?} to {to:?}");
    }
    Ok(())
}

#[test]
fn wrong_devices_are_named_and_change_nothing() -> Result<()> {
    let cuda = Device::new_cuda(0)?;
    let message = |result: Result<()>| result.expect_err("an error").to_string();
    let (vars, mut opt) = model(&cuda)?;
    let before = state(&vars, &opt)?;
    let mut store = grads([]);
    for var in &vars {
        store.insert(var, var.ones_like()?);
    }
    store.insert(&vars[3], vars[3].ones_like()?.to_device(&Device::Cpu)?);
    let error = message(opt.step(&store));
    assert!(error.contains("`3`") && error.contains("Cuda") && error.contains("Cpu"), "{error}");
    store.insert(&vars[3], vars[2].as_detached_tensor());
    let error = message(opt.step(&store));
    assert!(error.contains("`3`") && error.contains("shares its memory"), "{error}");
    assert_eq!(state(&vars, &opt)?, before);
    Ok(())
}

/// An operation that puts another storage in the place of a variable's.
struct Replace;

impl InplaceOp1 for Replace {
    fn name(&self) -> &'static str {
        "replace"
    }
    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        Ok(())
    }
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        *storage = storage.try_clone(layout)?;
        Ok(())
    }
}

#[test]
fn a_replaced_storage_is_noticed() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let (vars, mut opt) = model(&device)?;
    step(&vars, &mut opt, 9)?;
    vars[1].inplace_op1(&Replace)?;
    let error = step(&vars, &mut opt, 10).expect_err("a replaced storage").to_string();
    assert!(error.contains("`1`") && error.contains("replaced"), "{error}");
    Ok(())
}

/// A training in which parameters are frozen, added and removed, with a snapshot, a state that is loaded in part, and a copy on
/// `other`. Returns what is left after each of these.
fn living(
    params: &ParamsSrkl,
    device: &Device,
    other: &Device,
) -> Result<Vec<(Vec<Vec<u64>>, Contents)>> {
    let sizes = [CHUNK + 1, 7, 5000, 300];
    let vars: Vec<Var> = noisy_vars(&sizes, 1., DType::BF16)?
        .iter()
        .map(|var| Var::from_tensor(&var.to_device(device)?))
        .collect::<Result<_>>()?;
    let name = |i: usize| format!("w{i}");
    let named = |range: Range<usize>| -> Vec<(String, Var)> {
        range.map(|i| (name(i), vars[i].clone())).collect()
    };
    let step = |vars: &[Var], opt: &mut Srkl, step: u64| -> Result<()> {
        let gradients = |salt: u64| {
            let mut store = grads([]);
            for (i, var) in vars.iter().enumerate() {
                let g = noise(var.elem_count(), 0.1, 1000 * salt + 10 * step + i as u64);
                store.insert(var, tensor(&g, DType::F32)?.to_device(var.device())?);
            }
            Ok::<_, candle_core::Error>(store)
        };
        let (first, again) = (gradients(1)?, gradients(2)?);
        if opt.measuring() && matches!(params.curvature, Curvature::Hutchinson(_)) {
            opt.perturb(&first)?.observe(&again)?;
            return opt.step(&first);
        }
        let measures = opt.measuring();
        opt.step(&first)?;
        if measures { opt.observe(&again) } else { Ok(()) }
    };
    let mut left = vec![];
    let mut note = |vars: &[Var], opt: &mut Srkl| -> Result<()> {
        let values = vars.iter().map(|var| bits(&var.to_device(&Device::Cpu)?));
        left.push((values.collect::<Result<_>>()?, saved(opt)?));
        Ok(())
    };
    let mut opt = Srkl::builder().default_group(params.clone()).build(named(0..3))?;
    (0..3).try_for_each(|i| step(&vars[..3], &mut opt, i))?;
    opt.freeze(|name| name == "w0")?;
    (3..5).try_for_each(|i| step(&vars[..3], &mut opt, i))?;
    note(&vars[..3], &mut opt)?;
    opt.add_parameters(DEFAULT_GROUP, named(3..4))?;
    (5..7).try_for_each(|i| step(&vars, &mut opt, i))?;
    note(&vars, &mut opt)?;
    let snapshot = opt.snapshot()?;
    opt.unfreeze(|_| true)?;
    (7..9).try_for_each(|i| step(&vars, &mut opt, i))?;
    note(&vars, &mut opt)?;
    opt.restore(&snapshot)?;
    opt.unfreeze(|name| name == "w0")?;
    opt.remove_parameters(|name| name == "w1")?;
    let rest = [vars[0].clone(), vars[2].clone(), vars[3].clone()];
    (9..11).try_for_each(|i| step(&rest, &mut opt, i))?;
    note(&rest, &mut opt)?;

    let copies: Vec<Var> = rest
        .iter()
        .map(|var| Var::zeros(var.shape(), var.dtype(), other))
        .collect::<Result<_>>()?;
    let to = [0, 2, 3].into_iter().map(name).zip(copies.iter().cloned());
    let mut copy = opt.copy_to(to)?;
    copy.freeze(|name| name == "w3")?;
    (11..13).try_for_each(|i| step(&copies, &mut copy, i))?;
    note(&copies, &mut copy)?;
    // The state of the copy, of which another optimizer has a part; its parameters have the values.
    let state = copy.state()?;
    for (var, copy) in rest.iter().zip(&copies) {
        var.set(&copy.to_device(device)?)?;
    }
    let mut part = Srkl::builder().default_group(params.clone()).build(named(2..4))?;
    let report = part.load_state_matching(&state)?;
    assert_eq!(report.taken, ["w2", "w3"]);
    step(&rest[1..], &mut part, 13)?;
    note(&rest[1..], &mut part)?;
    Ok(left)
}

/// Frozen, grown and copied from device to device with the bits of the CPU.
#[test]
fn checkpoints_of_living_optimizers_have_the_same_bits() -> Result<()> {
    let cuda = Device::new_cuda(0)?;
    let step = ParamsSrkl { scope: Scope::Tensor, ..ParamsSrkl::braked_adam() };
    let packed = ParamsSrkl {
        state: StateFormat::Compact,
        master_weights: MasterWeights::Split,
        average: Some(Average::Exponential(0.9)),
        average_format: AverageFormat::BF16,
        ..ParamsSrkl::braked_adam()
    };
    let rows = ParamsSrkl { scope: Scope::Global, ..ParamsSrkl::hessian() };
    let lion = ParamsSrkl { cautious: true, ..ParamsSrkl::lion(0.01) };
    for params in [step, packed, rows, lion, ParamsSrkl::reference()] {
        let expected = living(&params, &Device::Cpu, &Device::Cpu)?;
        for (device, other) in [(&cuda, &cuda), (&cuda, &Device::Cpu), (&Device::Cpu, &cuda)] {
            let found = living(&params, device, other)?;
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(found.0 == expected.0, "{i}: parameters, {params:?}");
                assert_eq!(found.1.0, expected.1.0, "{i}: {params:?}");
                assert!(found.1.1 == expected.1.1, "{i}: state, {params:?}");
            }
        }
    }
    Ok(())
}
