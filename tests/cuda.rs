//! The CUDA path: the bits of the CPU path, for parameters, masters, counters and telemetry.
//!
//! Needs a CUDA device: `cargo test --release --features cuda`.
#![cfg(feature = "cuda")]

mod common;

use std::collections::BTreeMap;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::random::with_seed;
use candle_srkl::{
    Beta, Curvature, Direction, Dropout, MasterWeights, NonFinite, ParamsSrkl, Repeatable, Scope,
    Srkl,
};
use common::training::{assert_same, train};
use common::*;
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use rand::RngExt;

/// Sizes with every kind of tail, and few enough elements for a software device. (candle makes no
/// empty tensors on a device.)
const SIZES: [usize; 11] = [1, 3, 9, 127, 1025, 4095, 4097, 8191, 8193, 16384, 20_001];

/// So many parameters that there are names of two digits, which are in the second group.
fn sizes() -> Vec<usize> {
    [&SIZES[..], &SIZES[4..]].concat()
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

/// Fresh random input every time; the seed is printed when it fails.
#[test]
fn the_same_bits_as_the_cpu() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let seed = seed();
    let mut case = 0;
    for scope in [Scope::Tensor, Scope::Global, Scope::Element] {
        for max_grad_norm in [None, Some(5.)] {
            for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate] {
                for master_weights in [MasterWeights::Auto, MasterWeights::None] {
                    let params =
                        ParamsSrkl { master_weights, ..settings(scope, max_grad_norm, nonfinite) };
                    case += 1;
                    assert_as_on_cpu(&params, &sizes(), seed + case, &[&[&device]])?;
                }
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
    for (case, scope) in [Scope::Tensor, Scope::Global, Scope::Element].into_iter().enumerate() {
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
    let step = Curvature::Step { every: 3, first: 2, decay: 0.9, noise: 1.5 };
    let rows = Curvature::Hutchinson { every: 3, first: 2, decay: 0.9, delta: 1e-2, seed: 5 };
    let momentum = Direction::Momentum { mu: 0.9 };
    let adam = Direction::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
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
    ];
    // Of Propagate without masters, clip or measurement nothing is asked before the step.
    let policies = [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate];
    let mut all = vec![];
    for (case, (direction, curvature, scope)) in cases.into_iter().enumerate() {
        for (variant, nonfinite) in policies.into_iter().enumerate() {
            let masters = [MasterWeights::Auto, MasterWeights::None, MasterWeights::None];
            all.push(ParamsSrkl {
                lr: 0.5,
                direction,
                curvature,
                scope,
                beta: Beta::Tied(0.5),
                trust: (case % 2 == variant % 2).then_some(0.05),
                weight_decay: 0.1,
                max_grad_norm: (variant == 1).then_some(5.),
                average: (variant != 1).then_some(0.9),
                master_weights: masters[variant],
                nonfinite,
                repeatable: Repeatable::Assume,
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
    let sizes = [3, 1025, 9, 8193, 17, 1, 8200, 31, 64, 16_385, 5, 65_537];
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
        let params = ParamsSrkl { average: Some(0.9), ..params };
        let sizes = [3, 1025, 9, 8193, 17, 1, 8200, 31, 64, 5];
        assert_as_on_cpu(&params, &sizes, seed, &[&[&device], &[&Device::Cpu, &device]])?;
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
        for (i, n) in [4097, 8193, 20_001, 30_007, 65_537, 99_999].into_iter().enumerate() {
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

/// A model on `device` and its optimizer.
fn model(device: &Device) -> Result<(Vec<Var>, Srkl)> {
    let mut vars = vec![];
    for (i, dtype) in FLOATS.into_iter().enumerate() {
        vars.push(Var::from_tensor(
            &tensor(&noise(9000, 1., i as u64), dtype)?.to_device(device)?,
        )?);
    }
    let params = ParamsSrkl {
        lr: 0.1,
        weight_decay: 0.1,
        nonfinite: NonFinite::SkipBlock,
        ..ParamsSrkl::reference()
    };
    let opt = Srkl::new(vars.clone(), params)?;
    Ok((vars, opt))
}

fn step(vars: &[Var], opt: &mut Srkl, step: u64) -> Result<()> {
    let mut store = grads([]);
    for (i, var) in vars.iter().enumerate() {
        let mut g = noise(9000, 0.1, 10 * step + i as u64);
        if i as u64 == step {
            g[17] = f64::NAN;
        }
        store.insert(var, tensor(&g, var.dtype())?.to_device(var.device())?);
    }
    opt.step(&store)
}

fn state(vars: &[Var], opt: &Srkl) -> Result<String> {
    let mut lines = vec![format!("{} {}", opt.steps()?, opt.skipped_steps()?)];
    for (i, (var, telemetry)) in vars.iter().zip(opt.telemetry()?).enumerate() {
        let bits = bits(&var.to_device(&Device::Cpu)?)?;
        let master = opt.master(&i.to_string())?;
        lines.push(format!("{} {bits:x?} {master:?}", telemetry.skipped));
    }
    Ok(lines.join("\n"))
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

// -- CUDA graphs --

/// A device whose work can be captured: with a stream of its own, and no events, which candle would wait
/// for.
fn capturable() -> Result<Device> {
    let device = Device::new_cuda_with_stream(0)?;
    // SAFETY: all work of these tests on the device goes to its one stream.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}

/// Runs `work` in a capture.
fn capture(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<(CudaGraph, Result<()>)> {
    let stream = device.as_cuda_device()?.cuda_stream();
    stream.synchronize().w()?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    let outcome = work();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).w()?.expect("a graph");
    Ok((graph, outcome))
}

/// How many nodes of each kind a graph has.
fn nodes(graph: &CudaGraph) -> BTreeMap<String, usize> {
    let mut count = 0;
    let mut kinds = BTreeMap::new();
    // SAFETY: the graph is alive; the first call gives the number of nodes, for which the second has room,
    // and every one of them is asked for its kind.
    unsafe {
        let ask = |at, count: &mut usize| sys::cuGraphGetNodes(graph.cu_graph(), at, count);
        assert_eq!(ask(std::ptr::null_mut(), &mut count), sys::CUresult::CUDA_SUCCESS);
        let mut list = vec![std::ptr::null_mut(); count];
        assert_eq!(ask(list.as_mut_ptr(), &mut count), sys::CUresult::CUDA_SUCCESS);
        for node in list {
            let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            assert_eq!(sys::cuGraphNodeGetType(node, &mut kind), sys::CUresult::CUDA_SUCCESS);
            *kinds.entry(format!("{kind:?}")).or_default() += 1;
        }
    }
    kinds
}

/// A network, what it learns, and its optimizer.
struct Learner {
    vars: Vec<Var>,
    x: Tensor,
    opt: Srkl,
}

impl Learner {
    fn new(device: &Device) -> Result<Self> {
        let params = ParamsSrkl {
            lr: 0.1,
            weight_decay: 0.01,
            max_grad_norm: Some(0.5),
            ..ParamsSrkl::reference()
        };
        Self::with(params, device)
    }

    fn with(params: ParamsSrkl, device: &Device) -> Result<Self> {
        let matrix = |rows: usize, columns: usize, salt| {
            tensor(&noise(rows * columns, 0.3, salt), DType::F32)?
                .reshape((rows, columns))?
                .to_device(device)
        };
        let vars = vec![
            Var::from_tensor(&matrix(12, 40, 1)?)?,
            Var::from_tensor(&matrix(1, 40, 2)?)?,
            Var::from_tensor(&matrix(40, 3, 3)?)?,
        ];
        Ok(Self { opt: Srkl::new(vars.clone(), params)?, vars, x: matrix(16, 12, 4)? })
    }

    /// Forward, backward and step, of a loss that is scaled by 4.
    fn train(&mut self) -> Result<()> {
        let Self { vars, x, opt } = self;
        opt.backward_step_with(|| {
            let h = x.matmul(&vars[0])?.broadcast_add(&vars[1])?.tanh()?;
            h.matmul(&vars[2])?.sqr()?.mean_all()? * 4.
        })?;
        Ok(())
    }

    fn state(&self) -> Result<String> {
        state(&self.vars, &self.opt)
    }
}

/// A whole training step, captured once and replayed, with another learning rate and gradient scale between
/// replays, and an eager step in the middle.
#[test]
fn a_replayed_step_gives_the_bits_of_an_eager_one() -> Result<()> {
    let device = capturable()?;
    let _cache = device.as_cuda_device()?.enable_cuda_graph_htod_cache();
    let (mut eager, mut replayed) = (Learner::new(&device)?, Learner::new(&device)?);
    eager.train()?;
    replayed.train()?;
    let before = replayed.state()?;
    let (graph, captured) = capture(&device, || replayed.train())?;
    captured?;
    assert_eq!(replayed.state()?, before, "a capture runs nothing");
    for step in 0..6 {
        for learner in [&mut eager, &mut replayed] {
            if step == 2 {
                learner.opt.set_learning_rate(0.03);
            }
            if step == 3 {
                learner.opt.set_grad_scale(4.)?;
            }
        }
        eager.train()?;
        match step {
            4 => replayed.train()?,
            _ => graph.launch().w()?,
        }
        assert_eq!(eager.state()?, replayed.state()?, "step {step}");
    }
    assert_eq!(replayed.opt.steps()?, 7);
    Ok(())
}

/// Steps that measure are taken outside of the graph, the others replayed.
#[test]
fn measuring_steps_between_replays() -> Result<()> {
    let device = capturable()?;
    let _cache = device.as_cuda_device()?.enable_cuda_graph_htod_cache();
    let curvature = Curvature::Step { every: 4, first: 2, decay: 0.9, noise: 1.5 };
    let params = ParamsSrkl { curvature, average: Some(0.9), ..ParamsSrkl::braked_adam() };
    for params in [params.clone(), ParamsSrkl { trust: Some(0.01), ..params }] {
        let records = params.trust.is_none();
        let mut eager = Learner::with(params.clone(), &device)?;
        let mut replayed = Learner::with(params, &device)?;
        eager.opt.record_norms(records);
        replayed.opt.record_norms(records);
        for _ in 0..2 {
            eager.train()?;
            replayed.train()?;
        }
        let (graph, captured) = capture(&device, || replayed.train())?;
        captured?;
        for step in 2..10 {
            if step % 4 == 0 {
                replayed.opt.request_measurement();
                replayed.train()?;
            } else {
                graph.launch().w()?;
            }
            eager.train()?;
            assert_eq!(eager.state()?, replayed.state()?, "step {step}");
            let told = replayed.opt.telemetry()?;
            assert_eq!(eager.opt.telemetry()?, told, "step {step}");
            assert_eq!(told[0].step_norm.is_some(), records);
        }
        assert_eq!(eager.opt.measurements()?.taken, 4);
        let grads = grads(replayed.vars.iter().map(|var| (var, var.ones_like().unwrap())));
        let (_, refused) = capture(&device, || {
            replayed.opt.request_measurement();
            replayed.opt.step(&grads)
        })?;
        let error = refused.expect_err("a measurement in a capture").to_string();
        assert!(error.contains("can't be captured"), "{error}");
    }
    Ok(())
}

#[test]
fn what_a_capture_cannot_have_is_named() -> Result<()> {
    let device = capturable()?;
    let (vars, mut opt) = model(&device)?;
    step(&vars, &mut opt, 9)?;
    let grads = grads(vars.iter().map(|var| (var, var.ones_like().unwrap())));
    let before = state(&vars, &opt)?;
    let expect = |result: Result<()>, text: &str| {
        let error = result.expect_err(text).to_string();
        assert!(error.contains(text), "{error}");
    };
    capture(&device, || {
        expect(opt.steps().map(|_| ()), "being captured");
        opt.set_learning_rate(0.01);
        expect(opt.step(&grads), "settings have changed inside a capture");
        opt.set_learning_rate(0.1);
        opt.step(&grads)?;
        expect(opt.step(&grads), "without one outside");
        Ok(())
    })?
    .1?;
    assert_eq!(state(&vars, &opt)?, before);

    let on_cpu = var(&[1.], DType::F32)?;
    let mut mixed = Srkl::new(vec![vars[0].clone(), on_cpu], ParamsSrkl::reference())?;
    capture(&device, || {
        expect(mixed.step(&grads), "several devices");
        Ok(())
    })?
    .1
}

/// One launch and one copy, whatever the number of tensors; nothing is allocated, waited for or copied back.
#[test]
fn a_step_is_one_launch() -> Result<()> {
    let device = capturable()?;
    for count in [1, 10, 3000, 100_000] {
        let mut vars = vec![];
        let mut store = grads([]);
        for _ in 0..count {
            let var = Var::from_tensor(&Tensor::ones(3, DType::F32, &device)?)?;
            store.insert(&var, var.ones_like()?);
            vars.push(var);
        }
        let mut opt = Srkl::new(vars, ParamsSrkl::reference())?;
        opt.step(&store)?;
        let (graph, captured) = capture(&device, || opt.step(&store))?;
        captured?;
        let expected = [("CU_GRAPH_NODE_TYPE_KERNEL", 1), ("CU_GRAPH_NODE_TYPE_MEMCPY", 1)];
        assert_eq!(nodes(&graph), expected.map(|(k, n)| (k.to_string(), n)).into(), "{count}");
    }
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

// -- Dropout --

/// Values of every kind, rounded to `dtype`.
fn awkward_values(n: usize, dtype: DType, salt: u64) -> Result<Tensor> {
    let mut xs = noise(n, 1., salt);
    let nan = f64::from_bits(0xfffc_0000_0000_0001);
    for (i, x) in xs.iter_mut().enumerate() {
        *x = [*x, *x, *x * 1e-6, *x * 1e-40, -0., nan, -f64::INFINITY, 65504.][i % 37 % 8];
    }
    tensor(&xs, dtype)
}

/// The outputs of two calls on a tensor made by `view`, and the gradients through them.
fn dropped(
    xs: &Tensor,
    device: &Device,
    p: f32,
    view: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Vec<u64>>> {
    let w = Var::from_tensor(&xs.to_device(device)?)?;
    let dropout = Dropout::new(p);
    with_seed(xs.elem_count() as u64, || {
        let y = view(&w)?;
        // Sums of rows are candle's own.
        let differentiates = y.elem_count() > 0 && !y.stride().contains(&0);
        let ys = [dropout.forward(&y, true)?, dropout.forward(&y, true)?];
        let mut all = vec![];
        for y in ys {
            all.push(bits(&y.to_device(&Device::Cpu)?)?);
            if differentiates {
                // Each element of the gradient has a factor of its own.
                let factor = tensor(&noise(y.elem_count(), 1., 7), y.dtype())?.to_device(device)?;
                let loss = (y.flatten_all()? * &factor)?.sum_all()?;
                let gradient = loss.backward()?.get(&w).unwrap().to_device(&Device::Cpu)?;
                all.push(bits(&gradient)?);
            }
        }
        Ok(all)
    })
}

#[test]
fn dropout_gives_the_bits_of_the_cpu() -> Result<()> {
    let cuda = Device::new_cuda(0)?;
    for dtype in FLOATS {
        for (i, n) in
            [1, 2, 3, 9, 31, 33, 127, 2047, 2048, 2049, 4097, 20_001].into_iter().enumerate()
        {
            let p = [0.1, 0.5, 0.9][i % 3];
            let at = i % 9;
            let xs = awkward_values(n + at, dtype, i as u64)?;
            // Misaligned, and not.
            for at in [0, at] {
                let on = |device: &Device| dropped(&xs, device, p, |w| w.narrow(0, at, n));
                assert!(on(&Device::Cpu)? == on(&cuda)?, "{dtype:?} {n} at {at}");
            }
        }
    }
    Ok(())
}

/// Element 408 of this seed has the bits 7cd79700.
#[test]
fn dropout_keeps_an_element_at_the_threshold() -> Result<()> {
    let p = 0x7cd7_9700u32 as f32 / 2f32.powi(32);
    let next = f32::from_bits(p.to_bits() + 1);
    for device in [Device::Cpu, Device::new_cuda(0)?] {
        let xs = Tensor::ones(4097, DType::F32, &device)?;
        for (p, kept) in [(p, true), (next, false)] {
            let y = with_seed(4097, || Dropout::new(p).forward(&xs, true))?;
            assert_eq!(y.to_vec1::<f32>()?[408] != 0., kept);
        }
    }
    Ok(())
}

#[test]
fn dropout_of_any_layout_gives_the_bits_of_the_cpu() -> Result<()> {
    let cuda = Device::new_cuda(0)?;
    let views: [fn(&Tensor) -> Result<Tensor>; 5] = [
        |w| w.t(),
        |w| w.narrow(1, 3, 11),
        |w| w.narrow(0, 2, 3)?.t(),
        |w| w.narrow(0, 1, 1)?.broadcast_as((5, 70)),
        |w| w.narrow(0, 3, 0),
    ];
    for dtype in FLOATS {
        let xs = awkward_values(2100, dtype, 3)?.reshape((30, 70))?;
        for (i, view) in views.iter().enumerate() {
            let on = |device: &Device| dropped(&xs, device, 0.3, view);
            assert!(on(&Device::Cpu)? == on(&cuda)?, "{dtype:?} view {i}");
        }
    }
    Ok(())
}

/// The kernel is loaded once, whichever of a GPU's devices comes first and whoever drops it.
#[test]
fn dropout_on_several_devices_and_threads() -> Result<()> {
    let xs = awkward_values(5000, DType::F32, 1)?;
    let expected = dropped(&xs, &Device::Cpu, 0.5, |w| Ok(w.clone()))?;
    for _ in 0..3 {
        std::thread::scope(|scope| {
            for own_stream in [false, true, false] {
                let (xs, expected) = (&xs, &expected);
                scope.spawn(move || {
                    let device = match own_stream {
                        false => Device::new_cuda(0).unwrap(),
                        true => Device::new_cuda_with_stream(0).unwrap(),
                    };
                    let found = dropped(xs, &device, 0.5, |w| Ok(w.clone())).unwrap();
                    assert!(found == *expected);
                });
            }
        });
    }
    Ok(())
}

#[test]
fn dropout_in_a_capture_is_refused() -> Result<()> {
    let device = capturable()?;
    let _cache = device.as_cuda_device()?.enable_cuda_graph_htod_cache();
    let w = Var::from_tensor(&Tensor::ones(100, DType::F32, &device)?)?;
    let dropout = Dropout::new(0.5);
    let loss = dropout.forward(&w, true)?.sum_all()?;
    loss.backward()?;
    let before = bits(&w.to_device(&Device::Cpu)?)?;
    let refused = |result: Result<()>| {
        assert_error(result, &["dropout", "capture", "repeat one mask"]);
    };
    let (_, outcome) = capture(&device, || {
        refused(dropout.forward(&w, true).map(|_| ()));
        // Where there is nothing to draw there is nothing to refuse.
        dropout.forward(&w, false)?;
        Dropout::new(0.).forward(&w, true)?;
        Ok(())
    })?;
    outcome?;
    let (_, outcome) = capture(&device, || {
        refused(loss.backward().map(|_| ()));
        Ok(())
    })?;
    outcome?;
    assert_eq!(bits(&w.to_device(&Device::Cpu)?)?, before);
    // Afterwards it goes on.
    let kept = dropout.forward(&w, true)?.sum_all()?.to_scalar::<f32>()?;
    assert!((40. ..160.).contains(&kept));
    Ok(())
}
