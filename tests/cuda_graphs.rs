//! Captures of steps in CUDA graphs.
//!
//! Needs a CUDA device: `cargo test --release --features cuda`. While one thread captures, the others may not make a
//! device: cudarc then synchronises the whole context, which the driver refuses, and ends the capture. So these tests
//! take turns.
#![cfg(feature = "cuda")]

mod common;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{
    Average, AverageFormat, Curvature, Dropout, GradScaler, LrSchedule, Measure, ParamsSrkl, Srkl,
    StateFormat, StepCurvature,
};
use common::cuda::{model, state, step};
use common::*;
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};

/// A test's turn to use the GPU.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

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
        // Large enough for compact state.
        let width = if params.state == StateFormat::Compact { 400 } else { 40 };
        let vars = vec![
            Var::from_tensor(&matrix(12, width, 1)?)?,
            Var::from_tensor(&matrix(1, width, 2)?)?,
            Var::from_tensor(&matrix(width, 3, 3)?)?,
        ];
        Ok(Self { opt: Srkl::new(vars.clone(), params)?, vars, x: matrix(16, 12, 4)? })
    }

    /// Forward, backward and step, of a loss that is scaled by 4.
    fn train(&mut self) -> Result<()> {
        self.train_over(1)
    }

    /// The same of several micro-batches.
    fn train_over(&mut self, count: usize) -> Result<()> {
        let Self { vars, x, opt } = self;
        opt.backward_step_over(count, |_| {
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
/// replays, and an eager step in the middle, of several micro-batches.
#[test]
fn a_replayed_step_gives_the_bits_of_an_eager_one() -> Result<()> {
    let _turn = turn();
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
        match step {
            4 => {
                eager.train_over(3)?;
                replayed.train_over(3)?;
            }
            _ => {
                eager.train()?;
                graph.launch().w()?;
            }
        }
        assert_eq!(eager.state()?, replayed.state()?, "step {step}");
    }
    assert_eq!(replayed.opt.steps()?, 7);
    Ok(())
}

/// What is frozen between replays stays where it is in them, and goes on when it is not; a schedule goes on by hand.
#[test]
fn replays_of_frozen_parameters_and_schedules() -> Result<()> {
    let _turn = turn();
    let device = capturable()?;
    let _cache = device.as_cuda_device()?.enable_cuda_graph_htod_cache();
    for params in [ParamsSrkl::adamw(0.1), ParamsSrkl::muon(0.1), ParamsSrkl::lion(0.1)] {
        let mut eager = Learner::with(params.clone(), &device)?;
        let mut replayed = Learner::with(params, &device)?;
        for learner in [&mut eager, &mut replayed] {
            learner.opt.set_schedule(Some(LrSchedule::linear_decay(12, 0.)))?;
            learner.train()?;
        }
        let (graph, captured) = capture(&device, || replayed.train())?;
        captured?;
        for step in 1..10 {
            replayed.opt.set_schedule_step(step)?;
            for learner in [&mut eager, &mut replayed] {
                match step {
                    3 => learner.opt.freeze(|name| name != "1")?,
                    6 => learner.opt.unfreeze(|name| name == "0")?,
                    8 => learner.opt.unfreeze(|_| true)?,
                    _ => {}
                }
            }
            let before = bits(&replayed.vars[2].to_device(&Device::Cpu)?)?;
            eager.train()?;
            graph.launch().w()?;
            assert_eq!(eager.state()?, replayed.state()?, "step {step}");
            let stays = bits(&replayed.vars[2].to_device(&Device::Cpu)?)? == before;
            assert_eq!(stays, (3..8).contains(&step), "step {step}");
        }
        // A list that a graph knows the addresses of stays as it is, and nothing is loaded inside a capture.
        let state = replayed.opt.state()?;
        assert_error(replayed.opt.remove_parameters(|_| true), &["captured in a CUDA graph"]);
        let (_, done) = capture(&device, || {
            let before = replayed.opt.frozen().len();
            assert_error(replayed.opt.load_state(&state), &["capture"]);
            assert_error(replayed.opt.load_state_matching(&state).map(|_| ()), &["capture"]);
            assert_error(replayed.opt.freeze(|_| true), &["capture"]);
            assert_eq!(replayed.opt.frozen().len(), before);
            Ok(())
        })?;
        done?;
        replayed.opt.set_schedule_step(10)?;
        eager.train()?;
        replayed.train()?;
        assert_eq!(eager.state()?, replayed.state()?);
    }
    Ok(())
}

/// A scale that follows the gradients, through steps that overflow: the loss is multiplied by a variable on the device.
#[test]
fn replays_with_a_scaler() -> Result<()> {
    let _turn = turn();
    let device = capturable()?;
    let _cache = device.as_cuda_device()?.enable_cuda_graph_htod_cache();
    let build = || -> Result<(Var, Var, Srkl)> {
        let w = Var::from_tensor(&tensor(&[1., -2., 3.], DType::F32)?.to_device(&device)?)?;
        let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::adamw(0.01))?;
        let scaler =
            GradScaler { init_scale: 2f64.powi(126), growth_interval: 3, ..Default::default() };
        opt.set_grad_scaler(Some(scaler))?;
        Ok((w, Var::new(opt.grad_scale() as f32, &device)?, opt))
    };
    // Its gradient overflows from a scale of about 2^125 on.
    let train = |(w, scale, opt): &mut (Var, Var, Srkl)| {
        opt.step(&(w.sqr()?.sum_all()? * scale.as_tensor())?.backward()?)
    };
    let follow = |(_, scale, opt): &mut (Var, Var, Srkl)| {
        opt.update_grad_scale()?;
        scale.set(&Tensor::new(opt.grad_scale() as f32, &device)?)?;
        Ok::<_, candle_core::Error>(opt.grad_scale())
    };
    let (mut eager, mut replayed) = (build()?, build()?);
    train(&mut eager)?;
    train(&mut replayed)?;
    assert_eq!(follow(&mut eager)?, follow(&mut replayed)?);
    let (graph, captured) = capture(&device, || train(&mut replayed))?;
    captured?;
    let mut scales = vec![];
    for _ in 0..12 {
        train(&mut eager)?;
        graph.launch().w()?;
        let scale = follow(&mut replayed)?;
        assert_eq!(follow(&mut eager)?, scale);
        scales.push(scale.log2());
        let bits = |w: &Var| bits(&w.to_device(&Device::Cpu)?);
        assert_eq!(bits(&eager.0)?, bits(&replayed.0)?);
    }
    let skipped = replayed.2.skipped_steps()?;
    assert!(skipped > 1 && replayed.2.steps()? > 5, "{skipped} {scales:?}");
    assert!(scales.windows(2).any(|s| s[0] < s[1]), "{scales:?}");
    Ok(())
}

/// Steps that measure are taken outside of the graph, the others replayed.
#[test]
fn measuring_steps_between_replays() -> Result<()> {
    let _turn = turn();
    let device = capturable()?;
    let _cache = device.as_cuda_device()?.enable_cuda_graph_htod_cache();
    let params = ParamsSrkl {
        curvature: Curvature::Step(StepCurvature { decay: 0.9, noise: 1.5 }),
        measure: Measure { every: 4, first: 2, ..Measure::default() },
        average: Some(Average::Exponential(0.9)),
        ..ParamsSrkl::braked_adam()
    };
    let muon = ParamsSrkl { direction: ParamsSrkl::braked_muon().direction, ..params.clone() };
    let packed = ParamsSrkl {
        state: StateFormat::Compact,
        average_format: AverageFormat::BF16,
        ..params.clone()
    };
    for params in [params.clone(), muon, packed, ParamsSrkl { trust: Some(0.01), ..params }] {
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
    let _turn = turn();
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
    let _turn = turn();
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

#[test]
fn dropout_in_a_capture_is_refused() -> Result<()> {
    let _turn = turn();
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
