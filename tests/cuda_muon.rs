//! Muon on CUDA devices.
//!
//! Its products are those of cuBLAS, and on the CPU of another library: parameters differ in their last digits, but
//! nothing else does. Needs a CUDA device: `cargo test --release --features cuda`.
#![cfg(feature = "cuda")]

mod common;

use approx::abs_diff_eq;
use candle_core::{DType, Device, Result, Var};
use candle_nn::Optimizer;
use candle_srkl::{
    Average, Beta, Curvature, DEFAULT_GROUP, Direction, Measure, NonFinite, ParamsSrkl, Repeatable,
    Srkl, StateFormat, StepCurvature,
};
use common::training::{Kind, Left, assert_same, dtype_of, train_shapes};
use common::*;
use half::{bf16, f16};

const MUON: Direction = Direction::Muon { mu: 0.9, nesterov: true, steps: 5, bf16: false };

/// Wide, tall, square and stacked ones; of one row, of one element more than a chunk; kernels of convolutions; vectors.
fn shapes() -> Vec<Vec<usize>> {
    let shapes: [&[usize]; 14] = [
        &[5, 9],
        &[9, 5],
        &[3, CHUNK / 3 + 1],
        &[5, 9],
        &[4],
        &[33, 31],
        &[8, 3, 3, 3],
        &[64, 40],
        &[40, 64],
        &[17],
        &[5, 9],
        &[1, 40],
        &[12, 2, 7],
        &[40, 64],
    ];
    shapes.map(<[usize]>::to_vec).to_vec()
}

/// By their index, the parameters that are orthogonalised.
fn is_matrix(i: usize) -> bool {
    let shape = &shapes()[i];
    shape.len() > 1 && shape[0] > 1
}

fn settings(curvature: Curvature, nonfinite: NonFinite) -> ParamsSrkl {
    ParamsSrkl {
        lr: 0.1,
        direction: MUON,
        curvature,
        measure: Measure { every: 3, first: 2, ..Measure::default() },
        beta: Beta::Tied(0.5),
        weight_decay: 0.1,
        average: Some(Average::Polynomial(3.)),
        nonfinite,
        repeatable: Repeatable::Assume,
        ..ParamsSrkl::braked_muon()
    }
}

const STEP: Curvature = Curvature::Step(StepCurvature { decay: 0.9, noise: 1.5 });

/// Numbers of `dtype` from their bits.
fn decoded(bits: &[u64], dtype: DType) -> Vec<f64> {
    let number = |bits: &u64| match dtype {
        DType::F64 => f64::from_bits(*bits),
        DType::F32 => f64::from(f32::from_bits(*bits as u32)),
        DType::BF16 => bf16::from_bits(*bits as u16).to_f64(),
        _ => f16::from_bits(*bits as u16).to_f64(),
    };
    bits.iter().map(number).collect()
}

/// The index of the parameter that a place is of.
fn parameter(left: &Left) -> Option<usize> {
    let name = match left.kind {
        Kind::Parameters => left.place.rsplit(' ').next()?,
        Kind::State => left.place.rsplit(' ').next()?.split('.').next()?,
        _ => return None,
    };
    name.parse().ok()
}

/// Whether it is a first moment, or a part of one.
fn is_moment(left: &Left) -> bool {
    left.place.rsplit(' ').next().and_then(|name| name.split('.').nth(1)) == Some("m")
}

/// Without a brake all that depends on products are the parameters of matrices, and these differ in last digits.
#[test]
fn as_on_the_cpu_but_for_the_last_digits_of_matrices() -> Result<()> {
    let device = Device::new_cuda(0)?;
    for (seed, nonfinite) in [(0, NonFinite::SkipStep), (1, NonFinite::SkipBlock)] {
        for (max_grad_norm, state) in
            [(None, StateFormat::F32), (Some(5.), StateFormat::F32), (None, StateFormat::Compact)]
        {
            let plain = settings(Curvature::None, nonfinite);
            let params = ParamsSrkl { max_grad_norm, state, ..plain };
            let cpu = train_shapes(&params, &shapes(), seed, &[&Device::Cpu])?;
            let cuda = train_shapes(&params, &shapes(), seed, &[&device])?;
            assert_eq!(cpu.len(), cuda.len());
            let (mut near, mut same) = (0, 0);
            for (a, b) in cpu.iter().zip(&cuda) {
                assert_eq!((a.kind, &a.place), (b.kind, &b.place));
                let of = parameter(a);
                let of_matrix = of.is_some_and(is_matrix);
                match (a.kind, of) {
                    (Kind::Parameters, Some(i)) if of_matrix => {
                        let dtype = dtype_of(i, seed);
                        let numbers = decoded(&a.bits, dtype).into_iter();
                        for (x, y) in numbers.zip(decoded(&b.bits, dtype)) {
                            let within = if dtype == DType::F64 { 1e-12 } else { 1e-5 };
                            let epsilon = within + 2. * half_ulp(x, dtype) * 1.01;
                            assert!(abs_diff_eq!(x, y, epsilon = epsilon), "{}: {x}, {y}", a.place);
                        }
                        near += 1;
                    }
                    (Kind::State, Some(i)) if of_matrix && !is_moment(a) => {
                        let dtype = dtype_of(i, seed);
                        let (width, dtype) =
                            if dtype == DType::F64 { (8, dtype) } else { (4, DType::F32) };
                        let within = if dtype == DType::F64 { 1e-12 } else { 1e-5 };
                        let numbers = |left: &Left| {
                            let words = left.bits.chunks(width).map(|bytes| {
                                bytes.iter().rev().fold(0, |word, byte| word << 8 | byte)
                            });
                            decoded(&words.collect::<Vec<u64>>(), dtype)
                        };
                        for (x, y) in numbers(a).into_iter().zip(numbers(b)) {
                            assert!(abs_diff_eq!(x, y, epsilon = within), "{}: {x}, {y}", a.place);
                        }
                        near += 1;
                    }
                    (Kind::Parameters | Kind::State, Some(_)) => {
                        assert_eq!(a.bits, b.bits, "{}", a.place);
                        same += 1;
                    }
                    _ => {}
                }
            }
            assert!(near > 100 && same > 100, "{near} {same}");
        }
    }
    Ok(())
}

/// A training leaves the same bits each time, with every policy, trust clip and curvature, wherever its parameters are.
#[test]
fn the_same_bits_each_time() -> Result<()> {
    let (a, b) = (Device::new_cuda(0)?, Device::new_cuda(0)?);
    let policies = [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate];
    let places: [&[&Device]; 3] = [&[&a], &[&a, &b], &[&Device::Cpu, &a]];
    for (seed, (nonfinite, devices)) in policies.into_iter().zip(places).enumerate() {
        for curvature in [STEP, Curvature::GradSquare, Curvature::None] {
            let trust = (seed != 1).then_some(0.05);
            let params = ParamsSrkl { trust, ..settings(curvature, nonfinite) };
            let run = || train_shapes(&params, &shapes(), seed as u64, devices);
            assert_same(&run()?, &run()?, &format!("{params:?}"));
        }
    }
    Ok(())
}

/// A training of matrices and a vector by their own gradients, on `device`; parameters, and the curvature of each step.
fn measured(params: &ParamsSrkl, devices: &[&Device]) -> Result<(Vec<f64>, Vec<f64>)> {
    let shapes: [&[usize]; 4] = [&[12, 20], &[20, 12], &[12, 20], &[15]];
    let mut vars = vec![];
    for (i, shape) in shapes.iter().enumerate() {
        let n = shape.iter().product();
        let value = tensor(&noise(n, 1., i as u64), DType::F32)?.reshape(*shape)?;
        vars.push(Var::from_tensor(&value.to_device(devices[i % devices.len()])?)?);
    }
    let mut opt = Srkl::new(vars.clone(), params.clone())?;
    let mut curvatures = vec![];
    // Few: each step multiplies what the products differ by.
    for _ in 0..3 {
        opt.backward_step_with(|| {
            // A minimum at 0, steeper in later parameters.
            let mut loss = vars[0].sqr()?.sum_all()?.to_device(&Device::Cpu)?;
            for (i, var) in vars.iter().enumerate().skip(1) {
                let term = (var.sqr()?.sum_all()? * (1. + i as f64))?;
                loss = (loss + term.to_device(&Device::Cpu)?)?;
            }
            Ok::<_, candle_core::Error>(loss)
        })?;
        curvatures.push(opt.telemetry()?[0].curvature.unwrap_or(-1.));
    }
    let on_cpu: Vec<Var> = vars
        .iter()
        .map(|var| Var::from_tensor(&var.to_device(&Device::Cpu)?))
        .collect::<Result<_>>()?;
    Ok((all_values(&on_cpu)?, curvatures))
}

/// One curvature for matrices and vectors, measured on a device, on several, and on the CPU alike.
#[test]
fn measured_curvature_is_that_of_the_cpu() -> Result<()> {
    let (a, b) = (Device::new_cuda(0)?, Device::new_cuda(0)?);
    let params = ParamsSrkl {
        direction: MUON,
        measure: Measure { every: 2, ..Measure::default() },
        ..ParamsSrkl::braked_muon()
    };
    let (w, h) = measured(&params, &[&Device::Cpu])?;
    assert!(h[1..].iter().all(|h| *h > 0.), "{h:?}");
    let places: [&[&Device]; 3] = [&[&a], &[&a, &b], &[&Device::Cpu, &a]];
    for devices in places {
        let (w2, h2) = measured(&params, devices)?;
        for (x, y) in w.iter().chain(&h).zip(w2.iter().chain(&h2)) {
            assert!(abs_diff_eq!(x, y, epsilon = 1e-5 * x.abs().max(1.)), "{devices:?}: {x} {y}");
        }
    }
    Ok(())
}

/// Products in bf16 are off by a percent or so, and the direction is that of the f32 ones.
#[test]
fn products_in_bf16() -> Result<()> {
    let device = Device::new_cuda(0)?;
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let step = |bf16: bool| -> Result<Vec<f64>> {
            let mut vars = vec![];
            let mut store = grads([]);
            for (i, (rows, cols)) in [(24, 40), (40, 24), (24, 40)].into_iter().enumerate() {
                let g = noisy_matrix((rows, cols), 0.1, i as u64, dtype)?.to_device(&device)?;
                let var = Var::from_tensor(&g.zeros_like()?)?;
                store.insert(&var, g);
                vars.push(var);
            }
            let direction = Direction::Muon { mu: 0.95, nesterov: true, steps: 5, bf16 };
            let params = ParamsSrkl { direction, ..ParamsSrkl::muon(1.) };
            Srkl::new(vars.clone(), params)?.step(&store)?;
            let vars = vars.iter().map(|v| Var::from_tensor(&v.to_device(&Device::Cpu)?));
            all_values(&vars.collect::<Result<Vec<_>>>()?)
        };
        let (exact, rounded) = (step(false)?, step(true)?);
        let off = norm(&minus(&exact, &rounded)) / norm(&exact);
        assert!(0.001 < off && off < 0.03, "{dtype:?}: {off}");
    }
    Ok(())
}

/// Matrices that were frozen while others were added, or were copied while frozen, are orthogonalised when they go on.
#[test]
fn small_matrices_thaw_after_growing() -> Result<()> {
    for bf16 in [false, true] {
        let direction = Direction::Muon { mu: 0.95, nesterov: true, steps: 5, bf16 };
        let params = ParamsSrkl { direction, ..ParamsSrkl::muon(0.1) };
        let run = |device: &Device, way: usize| -> Result<Vec<f64>> {
            let var = |salt| {
                let matrix = noisy_matrix((12, 20), 1., salt, DType::F32)?;
                Var::from_tensor(&matrix.to_device(device)?)
            };
            let vars = [var(0)?, var(1)?];
            let list = ["body.w", "body.u"].map(String::from).into_iter().zip(vars.clone());
            let mut opt = Srkl::builder().default_group(params.clone()).build(list.take(1))?;
            let step = |opt: &mut Srkl, vars: &[Var], step: u64| {
                let mut store = grads([]);
                for (i, var) in vars.iter().enumerate() {
                    let g = noisy_matrix((12, 20), 0.1, 10 * step + i as u64 + 5, DType::F32)?;
                    store.insert(var, g.to_device(device)?);
                }
                opt.step(&store)
            };
            step(&mut opt, &vars[..1], 0)?;
            opt.freeze(|name| name == "body.w")?;
            let mut trained = vars[0].clone();
            match way {
                0 => {
                    opt.add_parameters(DEFAULT_GROUP, [("body.u".to_string(), vars[1].clone())])?
                }
                1 => {
                    trained = var(7)?;
                    opt = opt.copy_to([("body.w".to_string(), trained.clone())])?;
                }
                _ => {}
            }
            opt.unfreeze(|_| true)?;
            step(&mut opt, &[trained.clone()], 1)?;
            values(&trained.to_device(&Device::Cpu)?)
        };
        let cuda = Device::new_cuda(0)?;
        // Of a matrix that was always alone, and frozen for no time. What is not orthogonalised is off by more than half.
        let expected = run(&Device::Cpu, 2)?;
        let start = noise(12 * 20, 1., 0);
        let minus =
            |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a - b).collect() };
        let length = norm(&minus(&expected, &start));
        for way in 0..3 {
            let off = norm(&minus(&run(&cuda, way)?, &expected)) / length;
            assert!(off < if bf16 { 0.1 } else { 1e-4 }, "bf16: {bf16}, {way}: {off}");
        }
    }
    Ok(())
}
