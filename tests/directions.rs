//! Momentum and Adam, the trust clip and averaged weights against their formulas in f64, step by step;
//! and checkpoints of their state.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use approx::{abs_diff_eq, assert_abs_diff_eq};
use candle_core::{DType, Result, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use candle_srkl::{
    Average, Beta, Curvature, Direction, MasterWeights, Measure, NonFinite, ParamsSrkl, Scope,
    Srkl, StepCurvature,
};
use common::*;

const MOMENTUM: Direction = Direction::Momentum { mu: 0.9 };
const ADAM: Direction = Direction::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8 };
const DIRECTIONS: [Direction; 3] = [Direction::Gradient, MOMENTUM, ADAM];

/// A brake that is felt.
fn steep(direction: Direction) -> ParamsSrkl {
    ParamsSrkl { lr: 0.05, beta: Beta::Fixed(0.3), direction, ..ParamsSrkl::reference() }
}

// -- The formulas, in f64, with what rounding may add up to --

/// A number computed in f32 (or f64) is within `error` of `value`, which is exact.
#[derive(Clone, Copy, Default)]
struct Near {
    value: f64,
    error: f64,
}

/// What a block remembers, and the number of steps that moved it.
#[derive(Default)]
struct Memory {
    m: Vec<Near>,
    v: Vec<Near>,
    average: Vec<Near>,
    t: i32,
}

/// What a block must become, but for the last rounding, and the brake, where it is one number.
struct Expected {
    w: Vec<Near>,
    phi: Option<Near>,
}

/// `keep * old + (1 - keep) * new`, each operation and each coefficient rounded to `u`; `new` is at most
/// `roundings` of them off.
fn average(old: Near, new: f64, keep: f64, roundings: f64, u: f64) -> Near {
    let (kept, added) = (keep * old.value, (1. - keep) * new);
    let value = kept + added;
    let rounding = 2. * kept.abs() + (2. + roundings) * added.abs() + value.abs();
    Near { value, error: keep * old.error + u * rounding }
}

/// The direction of every element after gradient `g`, and the state that made it.
fn direction(of: Direction, memory: &mut Memory, g: &[f64], u: f64) -> Vec<Near> {
    memory.t += 1;
    memory.m.resize(g.len(), Near::default());
    memory.v.resize(g.len(), Near::default());
    let Memory { m, v, t, .. } = memory;
    // Divided by 1 - keep^t, a number rounded once.
    let corrected = |x: Near, keep: f64| {
        let value = x.value / (1. - keep.powi(*t));
        Near { value, error: x.error / (1. - keep.powi(*t)) + 2. * u * value.abs() }
    };
    let each = g.iter().zip(m).zip(v).map(|((&g, m), v)| match of {
        Direction::Gradient => Near { value: g, error: u * g.abs() },
        Direction::Momentum { mu } => {
            *m = average(*m, g, mu, 1., u);
            corrected(*m, mu)
        }
        Direction::Adam { beta1, beta2, eps } => {
            *m = average(*m, g, beta1, 1., u);
            *v = average(*v, g * g, beta2, 3., u);
            let (m, v) = (corrected(*m, beta1), corrected(*v, beta2));
            let root = v.value.sqrt();
            // The derivative of the root, as long as it tells.
            let of_root = if root > 0. { v.error / (2. * root) } else { v.error.sqrt() };
            let p = Near { value: root + eps, error: of_root + u * (2. * root + 2. * eps) };
            let d = m.value / p.value;
            Near { value: d, error: (m.error + d.abs() * p.error) / p.value + u * d.abs() }
        }
        other => panic!("not here: {other:?}"),
    });
    each.collect()
}

/// One step of the rule with [`Curvature::GradSquare`] on a list of blocks, as the documentation of
/// `ParamsSrkl` has it. `None` for a block that does not move. The trust clip goes by the parameters
/// themselves, of norms `lengths`; all else by their masters, where there are any.
fn expect(
    params: &ParamsSrkl,
    schedule: f64,
    grad_scale: f64,
    blocks: &[(Vec<f64>, Option<Vec<f64>>)],
    lengths: &[f64],
    memory: &mut [Memory],
    u: f64,
) -> Vec<Option<Expected>> {
    let is_good = |g: &Vec<f64>| g.iter().all(|g| g.is_finite());
    let all_good = blocks.iter().all(|(_, g)| g.as_ref().is_none_or(is_good));
    if params.nonfinite == NonFinite::SkipStep && !all_good {
        return blocks.iter().map(|_| None).collect();
    }
    let good = |g: &Option<Vec<f64>>| g.clone().filter(is_good);
    let mut all: Vec<f64> = blocks.iter().filter_map(|(_, g)| good(g)).flatten().collect();
    all.iter_mut().for_each(|g| *g /= grad_scale);
    let clip = match params.max_grad_norm {
        Some(max) if norm(&all) > max => max / norm(&all),
        _ => 1.,
    };
    all.iter_mut().for_each(|g| *g *= clip);
    let brake = |h: f64| schedule * params.lr / (1. + params.beta_value() * h);
    let mut expected = vec![];
    for (((w, g), length), memory) in blocks.iter().zip(lengths).zip(memory) {
        let Some(g) = good(g) else {
            expected.push(None);
            continue;
        };
        let g: Vec<f64> = g.iter().map(|g| g / grad_scale * clip).collect();
        let d = direction(params.direction, memory, &g, u);
        let mut phi: Vec<f64> = match params.scope {
            Scope::Element => g.iter().map(|g| brake(g * g)).collect(),
            Scope::Global => vec![brake(curvature(&all)); g.len()],
            _ => vec![brake(curvature(&g)); g.len()],
        };
        let mut of_phi = 1e-12; // relative
        if let Some(tau) = params.trust {
            let longest = tau * length.max(0.01 * (w.len() as f64).sqrt());
            let sum = |of: fn(&Near) -> f64| {
                let each = phi.iter().zip(&d).map(|(phi, d)| phi * of(d));
                norm(&each.collect::<Vec<f64>>())
            };
            let (step, error) = (sum(|d| d.value), sum(|d| d.error));
            if step > longest {
                phi.iter_mut().for_each(|phi| *phi *= longest / step);
                of_phi += error / step;
            }
        }
        let moved = w.iter().zip(&phi).zip(&d).map(|((w, phi), d)| {
            let (decay, step) = (phi * params.weight_decay * w, phi * d.value);
            let rounding = 3. * w.abs() + 4. * step.abs();
            let error = phi * d.error + of_phi * (decay.abs() + step.abs()) + u * rounding;
            Near { value: w - decay - step, error }
        });
        let phi = phi.first().filter(|_| params.scope != Scope::Element);
        let phi = phi.map(|&value| Near { value, error: of_phi * value });
        expected.push(Some(Expected { w: moved.collect(), phi }));
    }
    expected
}

#[track_caller]
fn assert_near(got: f64, expected: Near, what: impl Fn() -> String) {
    let Near { value, error } = expected;
    let right = abs_diff_eq!(got, value, epsilon = 1.01 * error);
    assert!(right, "{}: {got}, not {value} +- {error}", what());
}

struct Case {
    dtype: DType,
    grad_dtype: DType,
    sizes: &'static [usize],
    /// Whether a gradient with a NaN is among the others.
    with_nan: bool,
    params: ParamsSrkl,
}

const AWKWARD: &[usize] = &[0, 1, 3, LANES + 1, CHUNK / 2 + 1, CHUNK + 1];

/// Six steps of blocks of all sizes. Each is checked by itself from what was stored before it, within the
/// roundings of its operations; what the blocks remember is followed from the start. Every block misses
/// some gradients; the schedule and the loss scale change.
fn check(case: &Case) -> Result<()> {
    let Case { dtype, grad_dtype, sizes, with_nan, params } = case;
    let what = format!("{dtype:?}, gradients of {grad_dtype:?}, {params:?}");
    let u = if *dtype == DType::F64 { 1e-15 } else { 2f64.powi(-24) };
    let vars = noisy_vars(sizes, 0.5, *dtype)?;
    let mut opt = Srkl::new(vars.clone(), params.clone())?;
    let stored_dtype = if opt.master("0")?.is_some() { DType::F32 } else { *dtype };
    let mut memory: Vec<Memory> = sizes.iter().map(|_| Memory::default()).collect();
    for step in 0..6 {
        let schedule = [0.5, 1., 1.5, 2., 1., 0.1][step];
        let grad_scale = [1., 3., 0.125, 1024., 1., 2.][step];
        opt.set_learning_rate(schedule * params.lr);
        opt.set_grad_scale(grad_scale)?;
        let mut store = grads([]);
        let mut blocks = vec![];
        for (i, (var, w)) in vars.iter().zip(stored(&vars, &opt)?).enumerate() {
            if (step + i) % 5 == 4 {
                blocks.push((w, None));
                continue;
            }
            // Some tensors steep, some flat.
            let scale = grad_scale * [0.1, 1., 10., 0.01][i % 4];
            let mut g = noise(w.len(), scale, 100 * (step + 1) as u64 + i as u64);
            if *with_nan && step == 2 && i == 3 {
                *g.last_mut().unwrap() = f64::NAN;
            }
            let grad = tensor(&g, *grad_dtype)?;
            let in_compute = if *dtype == DType::F64 { DType::F64 } else { DType::F32 };
            blocks.push((w, Some(values(&grad.to_dtype(in_compute)?)?)));
            store.insert(var, grad);
        }
        let before: Vec<_> = vars.iter().map(|var| bits(var)).collect::<Result<_>>()?;
        let lengths = vars.iter().map(|var| Ok(norm(&values(var)?)));
        let lengths: Vec<f64> = lengths.collect::<Result<_>>()?;
        let expected = expect(params, schedule, grad_scale, &blocks, &lengths, &mut memory, u);
        opt.step(&store)?;
        let after = stored(&vars, &opt)?;
        for (i, (expected, telemetry)) in expected.iter().zip(opt.telemetry()?).enumerate() {
            let block = || format!("step {step}, block {i}, {what}");
            let Some(expected) = expected else {
                assert_eq!(
                    (bits(&vars[i])?, telemetry.phi),
                    (before[i].clone(), None),
                    "{}",
                    block()
                );
                continue;
            };
            if let (Some(phi), Some(expected)) = (telemetry.phi, expected.phi) {
                assert_near(phi, expected, || format!("phi, {}", block()));
            } else {
                assert!(sizes[i] == 0 || params.scope == Scope::Element, "{}", block());
            }
            for (k, (&after, near)) in after[i].iter().zip(&expected.w).enumerate() {
                let error = near.error + half_ulp(near.value, stored_dtype);
                let near = Near { error, ..*near };
                assert_near(after, near, || format!("element {k}, {}", block()));
                if let Some(kind) = params.average {
                    let Memory { average, t, .. } = &mut memory[i];
                    average.resize(sizes[i], Near::default());
                    let old = average[k];
                    // a <- a + by (w - a)
                    let by = match kind {
                        Average::Exponential(c) => (1. - c) / (1. - c.powi(*t)),
                        Average::Polynomial(k) => (1. + k) / (*t as f64 + k),
                        other => panic!("not here: {other:?}"),
                    };
                    let value = old.value + by * (after - old.value);
                    // What is left of the old error; two roundings of the difference, one of the sum.
                    let rounding = 2. * (value - old.value).abs() + value.abs();
                    average[k] = Near { value, error: (1. - by) * old.error + u * rounding };
                }
            }
        }
        if params.average.is_some() {
            let at_step = format!("step {step}, {what}");
            check_averages(&vars, &mut opt, &memory, &at_step)?;
        }
    }
    let nan_steps = (*with_nan && params.nonfinite == NonFinite::SkipStep) as u64;
    assert_eq!((opt.steps()?, opt.skipped_steps()?), (6 - nan_steps, nan_steps), "{what}");
    Ok(())
}

/// The parameters are the averages as long as the guard lives, and then themselves again, bit for bit.
fn check_averages(vars: &[Var], opt: &mut Srkl, memory: &[Memory], what: &str) -> Result<()> {
    let before = all_bits(vars, opt)?;
    let guard = opt.swap_averaged()?;
    for (i, (var, memory)) in vars.iter().zip(memory).enumerate() {
        if memory.t == 0 {
            // It has not moved yet.
            assert_eq!(bits(var)?, before[i].0, "block {i}, {what}");
            continue;
        }
        for (k, (got, near)) in values(var)?.into_iter().zip(&memory.average).enumerate() {
            let near = Near { error: near.error + half_ulp(near.value, var.dtype()), ..*near };
            assert_near(got, near, || format!("average of element {k}, block {i}, {what}"));
        }
    }
    drop(guard);
    assert!(all_bits(vars, opt)? == before, "{what}");
    Ok(())
}

/// Every setting that changes a step, over the directions.
fn settings() -> Vec<ParamsSrkl> {
    let of = |direction| {
        let plain = steep(direction);
        [
            plain.clone(),
            ParamsSrkl { beta: Beta::Fixed(0.), weight_decay: 0.4, ..plain.clone() },
            ParamsSrkl { beta: Beta::Tied(0.5), lr: 0.3, scope: Scope::Global, ..plain.clone() },
            ParamsSrkl { scope: Scope::Element, weight_decay: 0.4, ..plain.clone() },
            ParamsSrkl { scope: Scope::Global, max_grad_norm: Some(0.7), ..plain.clone() },
            ParamsSrkl {
                max_grad_norm: Some(1e9),
                average: Some(Average::Exponential(0.9)),
                ..plain.clone()
            },
            ParamsSrkl { trust: Some(0.01), weight_decay: 0.4, ..plain.clone() },
            ParamsSrkl {
                trust: Some(1e-3),
                scope: Scope::Element,
                max_grad_norm: Some(0.7),
                average: Some(Average::Exponential(0.)),
                ..plain.clone()
            },
            ParamsSrkl {
                trust: Some(0.02),
                scope: Scope::Global,
                weight_decay: 0.4,
                max_grad_norm: Some(0.7),
                average: Some(Average::Polynomial(8.)),
                ..plain
            },
        ]
    };
    DIRECTIONS.into_iter().flat_map(of).collect()
}

#[test]
fn every_setting_in_every_dtype() -> Result<()> {
    for dtype in FLOATS {
        for params in settings() {
            check(&Case { dtype, grad_dtype: dtype, sizes: AWKWARD, with_nan: false, params })?;
        }
    }
    Ok(())
}

#[test]
fn gradients_of_every_dtype_with_and_without_masters() -> Result<()> {
    for dtype in FLOATS {
        for grad_dtype in FLOATS {
            for direction in [MOMENTUM, ADAM] {
                for master_weights in [MasterWeights::Auto, MasterWeights::None] {
                    let params = ParamsSrkl {
                        master_weights,
                        average: Some(Average::Exponential(0.9)),
                        trust: Some(0.05),
                        ..steep(direction)
                    };
                    check(&Case { dtype, grad_dtype, sizes: AWKWARD, with_nan: false, params })?;
                }
            }
        }
    }
    Ok(())
}

/// Long enough for several threads.
#[test]
fn large_tensors() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        for direction in [MOMENTUM, ADAM] {
            let params = ParamsSrkl {
                trust: Some(0.01),
                max_grad_norm: Some(5.),
                average: Some(Average::Exponential(0.9)),
                ..steep(direction)
            };
            let sizes = &[LARGE, PIECE - 1, PIECE, PIECE + 1, 7];
            check(&Case { dtype, grad_dtype: dtype, sizes, with_nan: false, params })?;
        }
    }
    Ok(())
}

/// What is skipped is as if it had not come: neither parameters nor memory nor the count of steps.
#[test]
fn a_skipped_gradient_leaves_no_trace() -> Result<()> {
    for dtype in FLOATS {
        for nonfinite in [NonFinite::SkipStep, NonFinite::SkipBlock] {
            for params in settings() {
                let params = ParamsSrkl { nonfinite, ..params };
                check(&Case { dtype, grad_dtype: dtype, sizes: AWKWARD, with_nan: true, params })?;
            }
        }
    }
    Ok(())
}

/// A NaN that is let through stays in the memory of its element, and nowhere else.
#[test]
fn a_nan_that_is_let_through_stays() -> Result<()> {
    for dtype in FLOATS {
        for direction in [MOMENTUM, ADAM] {
            let params = ParamsSrkl {
                nonfinite: NonFinite::Propagate,
                scope: Scope::Element,
                ..steep(direction)
            };
            let w = var(&noise(2000, 1., 1), dtype)?;
            let mut opt = Srkl::new(vec![w.clone()], params)?;
            let mut g = noise(2000, 0.1, 2);
            g[1234] = f64::NAN;
            opt.step(&grads([(&w, tensor(&g, dtype)?)]))?;
            opt.step(&grads([(&w, tensor(&noise(2000, 0.1, 3), dtype)?)]))?;
            for (i, w) in values(&w)?.into_iter().enumerate() {
                assert_eq!(w.is_nan(), i == 1234, "{dtype:?}, {direction:?}, element {i}");
            }
            assert_eq!(opt.skipped_steps()?, 0);
        }
    }
    Ok(())
}

/// Without a brake Adam is AdamW, its decay included.
#[test]
fn without_brake_adam_is_adamw() -> Result<()> {
    for weight_decay in [0., 0.1] {
        let (ours, theirs) = (
            var(&noise(LANES + 1, 1., 1), DType::F64)?,
            var(&noise(LANES + 1, 1., 1), DType::F64)?,
        );
        let (lr, beta1, beta2, eps) = (0.01, 0.9, 0.99, 1e-8);
        let params = ParamsSrkl {
            lr,
            direction: Direction::Adam { beta1, beta2, eps },
            beta: Beta::Fixed(0.),
            weight_decay,
            ..ParamsSrkl::reference()
        };
        let mut srkl = Srkl::new(vec![ours.clone()], params)?;
        let adamw = ParamsAdamW { lr, beta1, beta2, eps, weight_decay };
        let mut adamw = AdamW::new(vec![theirs.clone()], adamw)?;
        for salt in 2..52 {
            let g = tensor(&noise(LANES + 1, 0.1, salt), DType::F64)?;
            srkl.step(&grads([(&ours, g.clone())]))?;
            adamw.step(&grads([(&theirs, g)]))?;
        }
        for (a, b) in values(&ours)?.iter().zip(values(&theirs)?) {
            assert_abs_diff_eq!(*a, b, epsilon = 1e-13);
        }
    }
    Ok(())
}

/// Momentum of 0 is the gradient.
#[test]
fn without_memory_momentum_is_the_gradient() -> Result<()> {
    let run = |direction| -> Result<Vec<f64>> {
        let w = var(&noise(LANES + 1, 1., 1), DType::F64)?;
        let mut opt = Srkl::new(vec![w.clone()], steep(direction))?;
        for salt in 2..6 {
            opt.step(&grads([(&w, tensor(&noise(LANES + 1, 0.1, salt), DType::F64)?)]))?;
        }
        values(&w)
    };
    let (momentum, gradient) = (run(Direction::Momentum { mu: 0. })?, run(Direction::Gradient)?);
    for (a, b) in momentum.iter().zip(gradient) {
        assert_abs_diff_eq!(*a, b, epsilon = 1e-14);
    }
    Ok(())
}

/// The trust clip acts where a step is longer, and there alone: with numbers.
#[test]
fn the_trust_clip_in_numbers() -> Result<()> {
    // |w| = 5 and |phi d| = 0.5 * 26 = 13 if not clipped; and a zero parameter, by its floor.
    for (w, tau, step) in [
        ([3., 4.], 0.1, 0.5),
        ([3., 4.], 2.5, 12.5),
        ([3., 4.], 2.7, 13.),
        ([0., 0.], 0.1, 0.1 * 0.01 * 2f64.sqrt()),
    ] {
        let w = var(&w, DType::F64)?;
        let before = values(&w)?;
        let params = ParamsSrkl {
            lr: 0.5,
            beta: Beta::Fixed(0.),
            trust: Some(tau),
            ..ParamsSrkl::reference()
        };
        let mut opt = Srkl::new(vec![w.clone()], params)?;
        opt.step(&grads([(&w, tensor(&[10., 24.], DType::F64)?)]))?;
        for ((after, before), g) in values(&w)?.iter().zip(before).zip([10., 24.]) {
            let right = abs_diff_eq!(before - after, step * g / 26., epsilon = 1e-14);
            assert!(right, "tau {tau}");
        }
        assert_abs_diff_eq!(opt.telemetry()?[0].phi.unwrap(), step / 26., epsilon = 1e-14);
    }
    Ok(())
}

/// Averages are swapped out again when an evaluation panics, whatever bits the parameters have.
#[test]
fn averages_are_swapped_out_after_a_panic() -> Result<()> {
    for dtype in FLOATS {
        let w = var(&noise(LANES + 1, 1., 1), dtype)?;
        let params = ParamsSrkl { average: Some(Average::Exponential(0.9)), ..steep(MOMENTUM) };
        let mut opt = Srkl::new(vec![w.clone()], params)?;
        for salt in 2..5 {
            opt.step(&grads([(&w, tensor(&noise(LANES + 1, 1., salt), dtype)?)]))?;
        }
        // A NaN with a payload, somewhere.
        let mut raw = values(&w)?;
        raw[77] = f64::NAN;
        w.set(&(tensor(&raw, dtype)? * -1.)?)?;
        let before = (bits(&w)?, master_bits(&opt, "0")?);
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _guard = opt.swap_averaged().unwrap();
            assert_ne!(bits(&w).unwrap(), before.0);
            panic!("of the test")
        }));
        let message = panicked.unwrap_err();
        assert_eq!(message.downcast_ref::<&str>(), Some(&"of the test"));
        assert_eq!((bits(&w)?, master_bits(&opt, "0")?), before, "{dtype:?}");
    }
    Ok(())
}

// -- Checkpoints --

/// Step number `step` on a quadratic that differs from batch to batch; some gradients are missing, and one
/// step is asked to measure.
fn step(varmap: &VarMap, opt: &mut Srkl, step: u64) -> Result<()> {
    if step == 7 {
        opt.set_learning_rate(opt.learning_rate() / 3.);
        opt.set_grad_scale(4.)?;
    }
    if step == 16 {
        opt.request_measurement();
    }
    let grad_scale = opt.grad_scale();
    let data = varmap.data().lock().unwrap();
    measured_step(opt, || {
        let mut store = grads([]);
        for (salt, (name, shape)) in NAMES.iter().enumerate() {
            let var = &data[*name];
            if step % 5 == salt as u64 {
                continue;
            }
            let salt = 50 + 10 * step + salt as u64;
            let batch = noise(var.elem_count(), 0.3, salt);
            let g: Vec<f64> = values(var)?
                .iter()
                .zip(batch)
                .enumerate()
                .map(|(i, (w, x))| grad_scale * ((1 + i % 7) as f64 * w + x))
                .collect();
            store.insert(var, tensor(&g, var.dtype())?.reshape(*shape)?);
        }
        Ok(store)
    })
}

/// Everything that a checkpoint must bring back, but for what the last step did.
fn state(varmap: &VarMap, opt: &mut Srkl) -> Result<String> {
    let data = varmap.data().lock().unwrap();
    let mut lines = vec![format!(
        "{} {} {:x} {:x} {:?} {}",
        opt.steps()?,
        opt.skipped_steps()?,
        opt.learning_rate().to_bits(),
        opt.grad_scale().to_bits(),
        opt.measurements()?,
        opt.measuring(),
    )];
    for (name, _) in NAMES {
        let master = master_bits(opt, name)?;
        lines.push(format!("{name} {:x?} {master:x?}", bits(data[name].as_tensor())?));
    }
    if opt.params("default").unwrap().average.is_some() {
        let _averaged = opt.swap_averaged()?;
        for (name, _) in NAMES {
            lines.push(format!("average of {name} {:x?}", bits(data[name].as_tensor())?));
        }
    }
    Ok(lines.join("\n"))
}

#[test]
fn resumed_runs_have_the_bits_of_uninterrupted_ones() -> Result<()> {
    let average = Some(Average::Exponential(0.9));
    let tensors = Curvature::Step(StepCurvature { decay: 0.8, noise: 2. });
    let measure = Measure { every: 3, first: 2, ..Measure::default() };
    let settings = [
        ParamsSrkl { average, ..steep(MOMENTUM) },
        ParamsSrkl { scope: Scope::Element, ..steep(ADAM) },
        ParamsSrkl { average: Some(Average::Polynomial(8.)), ..steep(ADAM) },
        ParamsSrkl { average, ..ParamsSrkl::braked_adam() },
        ParamsSrkl { average, weight_decay: 0.1, ..ParamsSrkl::kinetic() },
        ParamsSrkl { curvature: tensors, measure, scope: Scope::Tensor, ..ParamsSrkl::kinetic() },
        ParamsSrkl { average, ..ParamsSrkl::hessian() },
        ParamsSrkl { scope: Scope::Element, ..ParamsSrkl::hessian() },
        ParamsSrkl { scope: Scope::Global, direction: ADAM, ..ParamsSrkl::hessian() },
    ];
    const STEPS: u64 = 24;
    for dtype in FLOATS {
        for params in &settings {
            let what = format!("{dtype:?}, {params:?}");
            let folder = tempfile::tempdir()?;
            let file = |kind: &str, step: u64| folder.path().join(format!("{kind}{step}"));
            let varmap = model(dtype)?;
            let mut opt = Srkl::from_varmap(&varmap, params.clone())?;
            let mut states = vec![];
            for i in 0..STEPS {
                varmap.save(file("model", i))?;
                opt.save(file("state", i))?;
                states.push(state(&varmap, &mut opt)?);
                step(&varmap, &mut opt, i)?;
            }
            let end = (state(&varmap, &mut opt)?, opt.telemetry()?);
            for start in [0, 1, 5, 10, 11, 17] {
                let mut resumed = model(dtype)?;
                resumed.load(file("model", start))?;
                let mut resumed_opt = Srkl::from_varmap(&resumed, params.clone())?;
                resumed_opt.load(file("state", start))?;
                assert!(state(&resumed, &mut resumed_opt)? == states[start as usize], "{what}");
                for i in start..STEPS {
                    step(&resumed, &mut resumed_opt, i)?;
                }
                let resumed_end = (state(&resumed, &mut resumed_opt)?, resumed_opt.telemetry()?);
                assert!(resumed_end == end, "{what}: resumed at step {start}");

                // The file matters: without it, the same parameters go elsewhere.
                if start == 17 {
                    let mut cold = model(dtype)?;
                    cold.load(file("model", start))?;
                    let mut cold_opt = Srkl::from_varmap(&cold, params.clone())?;
                    for i in start..STEPS {
                        step(&cold, &mut cold_opt, i)?;
                    }
                    let all = |varmap: &VarMap| -> Result<Vec<Vec<u64>>> {
                        let data = varmap.data().lock().unwrap();
                        NAMES.iter().map(|(name, _)| bits(data[*name].as_tensor())).collect()
                    };
                    assert!(all(&cold)? != all(&varmap)?, "{what}");
                }
            }
        }
    }
    Ok(())
}

/// A file without the tensors that these settings keep, or with more, is refused and changes nothing.
#[test]
fn checkpoints_of_other_settings() -> Result<()> {
    let settings = [
        ParamsSrkl::reference(),
        steep(MOMENTUM),
        steep(ADAM),
        ParamsSrkl { average: Some(Average::Exponential(0.9)), ..steep(MOMENTUM) },
        ParamsSrkl::hessian(),
    ];
    let folder = tempfile::tempdir()?;
    for (i, saved) in settings.iter().enumerate() {
        let varmap = model(DType::F32)?;
        let mut opt = Srkl::from_varmap(&varmap, saved.clone())?;
        step(&varmap, &mut opt, 0)?;
        let path = folder.path().join(format!("{i}"));
        opt.save(&path)?;
        opt.load(&path)?;
        for (j, other) in settings.iter().enumerate() {
            let mut opt = Srkl::from_varmap(&varmap, other.clone())?;
            step(&varmap, &mut opt, 1)?;
            let before = state(&varmap, &mut opt)?;
            match opt.load(&path) {
                Ok(()) => assert_eq!(i, j, "settings {j} took a file of settings {i}"),
                Err(e) => {
                    assert_ne!(i, j, "{e}");
                    assert!(e.to_string().contains(path.to_str().unwrap()), "{e}");
                    assert!(state(&varmap, &mut opt)? == before, "settings {j}, file {i}");
                }
            }
        }
    }
    Ok(())
}
