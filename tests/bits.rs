//! The guard of the contract: a step gives the bits that it always gave, on every device.
//!
//! `bits.txt` has a hash of what each training of a fixed suite leaves: parameters, state and telemetry. A change of
//! these bits is a change that a training notices: it belongs in CHANGELOG.md under **Bits**, and the file is then made
//! anew by
//!
//! ```sh
//! WRITE_BITS=1 cargo test --release --test bits
//! ```

mod common;

use candle_core::{Device, Result};
use candle_srkl::{
    Average, AverageFormat, Beta, Curvature, Direction, HutchinsonCurvature, MasterWeights,
    Measure, NonFinite, ParamsSrkl, Repeatable, Rounding, Scope, StateFormat, StepCurvature,
};
use common::training::{Kind, Left, STEPS, train};
use twox_hash::XxHash3_128;

/// Around lanes and chunks, and more than one chunk.
const SIZES: [usize; 14] = [3, 1025, 9, 8193, 17, 1, 8200, 31, 64, 16_385, 5, 4095, 127, 1024];

/// The same for packed state, whose units are of 256 elements, of parameters from 4096 elements on.
const PACKED_SIZES: [usize; 14] =
    [4096, 1025, 4097, 8193, 17, 4095, 12_345, 5000, 64, 16_385, 5, 8192, 4351, 9000];

/// Those of a case's parameters.
fn sizes(params: &ParamsSrkl) -> &'static [usize] {
    if params.state == StateFormat::Compact { &PACKED_SIZES } else { &SIZES }
}

/// The suite: a name for each, which is its line in the file.
fn suite() -> Vec<(String, ParamsSrkl)> {
    let step = Curvature::Step(StepCurvature { decay: 0.9, noise: 1.5 });
    let rows = Curvature::Hutchinson(HutchinsonCurvature { decay: 0.9 });
    let measure = Measure { every: 3, first: 2, delta: 1e-2, seed: 5 };
    let (gradient, momentum) = (Direction::Gradient, Direction::Momentum { mu: 0.9 });
    let adam = Direction::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
    let rules = [
        ("gradient, grad-square, tensor", gradient, Curvature::GradSquare, Scope::Tensor),
        ("gradient, grad-square, global", gradient, Curvature::GradSquare, Scope::Global),
        ("gradient, grad-square, element", gradient, Curvature::GradSquare, Scope::Element),
        ("momentum, grad-square, tensor", momentum, Curvature::GradSquare, Scope::Tensor),
        ("adam, grad-square, element", adam, Curvature::GradSquare, Scope::Element),
        ("gradient, step, global", gradient, step, Scope::Global),
        ("momentum, step, tensor", momentum, step, Scope::Tensor),
        ("adam, step, global", adam, step, Scope::Global),
        ("adam, step, tensor", adam, step, Scope::Tensor),
        ("gradient, hutchinson, element", gradient, rows, Scope::Element),
        ("momentum, hutchinson, mixed", momentum, rows, Scope::Mixed(0.625)),
        ("adam, hutchinson, tensor", adam, rows, Scope::Tensor),
        ("momentum, hutchinson, global", momentum, rows, Scope::Global),
    ];
    let policies = [
        ("skip-step", NonFinite::SkipStep, MasterWeights::Auto),
        ("skip-block", NonFinite::SkipBlock, MasterWeights::None),
        ("propagate", NonFinite::Propagate, MasterWeights::None),
        ("propagate with masters", NonFinite::Propagate, MasterWeights::Auto),
    ];
    let mut suite = vec![];
    for (case, (rule, direction, curvature, scope)) in rules.into_iter().enumerate() {
        for (variant, (policy, nonfinite, master_weights)) in policies.into_iter().enumerate() {
            let params = ParamsSrkl {
                lr: 0.5,
                direction,
                curvature,
                measure,
                scope,
                beta: if case % 3 == 0 { Beta::Fixed(0.3) } else { Beta::Tied(0.5) },
                trust: (case % 2 == variant % 2).then_some(0.05),
                weight_decay: 0.1,
                max_grad_norm: (variant == 1).then_some(5.),
                average: (variant % 2 == 0).then_some(Average::Exponential(0.9)),
                master_weights,
                nonfinite,
                repeatable: Repeatable::Assume,
                ..ParamsSrkl::reference()
            };
            suite.push((format!("{rule}, {policy}"), params));
        }
    }
    let presets = [
        ("reference()", ParamsSrkl::reference()),
        ("braked_adam()", ParamsSrkl::braked_adam()),
        ("braked_adam_averaged()", ParamsSrkl::braked_adam_averaged()),
        ("kinetic()", ParamsSrkl::kinetic()),
        ("hessian()", ParamsSrkl::hessian()),
    ];
    suite.extend(presets.map(|(name, params)| (name.to_string(), params)));
    for (every, decay, noise) in
        [(u64::MAX, 0.99, 0.), (5, 1. - f64::EPSILON / 2., 3.), (7, 0., 2.)]
    {
        let curvature = Curvature::Step(StepCurvature { decay, noise });
        let measure = Measure { every, first: 4, ..Measure::default() };
        let params = ParamsSrkl { curvature, measure, ..ParamsSrkl::braked_adam() };
        suite.push((format!("step, every {every}, decay {decay:?}, noise {noise}"), params));
    }
    suite.extend(packed(rules));
    suite
}

/// The same rules, and one more, with packed state.
fn packed<const N: usize>(
    rules: [(&str, Direction, Curvature, Scope); N],
) -> Vec<(String, ParamsSrkl)> {
    let nesterov = Direction::Sgd { momentum: 0.9, nesterov: true };
    let more = ("nesterov, none, tensor", nesterov, Curvature::None, Scope::Tensor);
    let policies = [NonFinite::SkipStep, NonFinite::SkipBlock, NonFinite::Propagate];
    let packed = |(case, (rule, direction, curvature, scope)): (usize, (&str, _, _, _))| {
        // Each with each, over the rules.
        let masters = [MasterWeights::Split, MasterWeights::None][case % 2];
        let averages = [AverageFormat::BF16, AverageFormat::F32][case / 2 % 2];
        let nonfinite = policies[case % 3];
        let params = ParamsSrkl {
            lr: 0.5,
            direction,
            curvature,
            measure: Measure { every: 3, first: 2, delta: 1e-2, seed: 5 },
            scope,
            beta: Beta::Tied(0.5),
            trust: (case % 4 == 1).then_some(0.05),
            weight_decay: 0.1,
            average: (case % 5 != 4).then_some(Average::Polynomial(2.)),
            average_format: averages,
            state: StateFormat::Compact,
            master_weights: masters,
            rounding: Rounding::Stochastic,
            nonfinite,
            repeatable: Repeatable::Assume,
            ..ParamsSrkl::reference()
        };
        (format!("{rule}, packed, {masters:?}, {averages:?}, {nonfinite:?}"), params)
    };
    rules.into_iter().chain([more]).enumerate().map(packed).collect()
}

/// A line of the file.
fn line(name: &str, left: &[Left]) -> String {
    let hash = |kind: Kind| {
        let mut hasher = XxHash3_128::new();
        let mut empty = true;
        for left in left.iter().filter(|left| left.kind == kind) {
            hasher.write(left.place.as_bytes());
            left.bits.iter().for_each(|bits| hasher.write(&bits.to_le_bytes()));
            empty = false;
        }
        if empty { "none".to_string() } else { format!("{:032x}", hasher.finish_128()) }
    };
    let [parameters, state, telemetry] = [Kind::Parameters, Kind::State, Kind::Telemetry].map(hash);
    format!("{name}: parameters {parameters}, state {state}, telemetry {telemetry}")
}

/// Trains the suite, each case on the next of these lists of devices, and compares with the file, or makes it anew.
fn check(devices: &[&[&Device]], may_write: bool) -> Result<()> {
    let expected: Vec<&str> = include_str!("bits.txt").lines().collect();
    let suite = suite();
    let mut wrong = vec![];
    let mut lines = vec![];
    for (case, (name, params)) in suite.iter().enumerate() {
        let devices = devices[case % devices.len()];
        let line = line(name, &train(params, sizes(params), 1 + case as u64, devices)?);
        if expected.get(case) != Some(&line.as_str()) {
            wrong.push(format!("  {line}\nnot {}", expected.get(case).unwrap_or(&"in the file")));
        }
        lines.push(line);
    }
    if may_write && std::env::var_os("WRITE_BITS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bits.txt");
        std::fs::write(path, lines.join("\n") + "\n")?;
        return Ok(());
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), suite.len(), wrong.join("\n"));
    assert_eq!(expected.len(), suite.len());
    Ok(())
}

#[test]
fn of_the_cpu() -> Result<()> {
    check(&[&[&Device::Cpu]], true)
}

#[cfg(feature = "cuda")]
#[test]
fn of_a_cuda_device() -> Result<()> {
    check(&[&[&Device::new_cuda(0)?]], false)
}

/// Parameters on the CPU and on two devices (of candle; they may be one card), in one optimizer.
#[cfg(feature = "cuda")]
#[test]
fn of_several_devices() -> Result<()> {
    let (a, b) = (Device::new_cuda(0)?, Device::new_cuda(0)?);
    check(&[&[&Device::Cpu, &a], &[&a, &Device::Cpu, &b], &[&a, &b]], false)
}

/// Else the suite would prove little.
#[test]
fn the_suite_moves_and_measures() -> Result<()> {
    for (case, (name, params)) in suite().iter().enumerate() {
        let left = train(params, sizes(params), 1 + case as u64, &[&Device::Cpu])?;
        let counters = |what: &str| {
            let place = format!("step {}, {what}", STEPS - 1);
            left.iter().find(|left| left.place == place).expect("in what is left").bits.clone()
        };
        assert!(counters("counters")[0] > 2, "{name}: {:?}", counters("counters"));
        let measured = !matches!(params.curvature, Curvature::GradSquare | Curvature::None);
        let taken = counters("measurements")[0];
        assert_eq!(taken > 0, measured, "{name}: {taken} measurements");
    }
    Ok(())
}
