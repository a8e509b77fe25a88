//! The estimates of curvature against the exact Hessian of a small network: 3-4-2, tanh, 8 samples, f64.

mod common;

use approx::{abs_diff_eq, abs_diff_ne};
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{
    Beta, Curvature, Direction, HutchinsonCurvature, Measure, ParamsSrkl, Scope, Srkl,
    StepCurvature,
};
use common::*;

struct Network {
    vars: Vec<Var>,
    x: Tensor,
    y: Tensor,
}

impl Network {
    fn new() -> Result<Self> {
        let matrix = |rows, columns, salt| noisy_matrix((rows, columns), 1., salt, DType::F64);
        let vars = vec![
            Var::from_tensor(&matrix(4, 3, 1)?)?,
            var(&noise(4, 0.3, 2), DType::F64)?,
            Var::from_tensor(&matrix(2, 4, 3)?)?,
            var(&noise(2, 0.3, 4), DType::F64)?,
        ];
        Ok(Self { vars, x: matrix(8, 3, 5)?, y: matrix(8, 2, 6)? })
    }

    fn loss(&self) -> Result<Tensor> {
        let [w1, b1, w2, b2] = &self.vars[..] else { unreachable!() };
        let hidden = self.x.matmul(&w1.t()?)?.broadcast_add(b1)?.tanh()?;
        let out = hidden.matmul(&w2.t()?)?.broadcast_add(b2)?;
        (out - &self.y)?.sqr()?.sum_all()? / 8.
    }

    fn gradient(&self) -> Result<GradStore> {
        self.loss()?.backward()
    }

    /// The gradient as one vector.
    fn g(&self) -> Result<Vec<f64>> {
        as_vector(&self.gradient()?, &self.vars)
    }

    /// The parameters as one vector.
    fn w(&self) -> Result<Vec<f64>> {
        all_values(&self.vars)
    }

    fn set(&self, w: &[f64]) -> Result<()> {
        let mut rest = w;
        for var in &self.vars {
            let (own, others) = rest.split_at(var.elem_count());
            var.set(&tensor(own, DType::F64)?.reshape(var.shape())?)?;
            rest = others;
        }
        Ok(())
    }

    /// The gradient somewhere else.
    fn g_at(&self, w: &[f64]) -> Result<Vec<f64>> {
        let here = self.w()?;
        self.set(w)?;
        let g = self.g();
        self.set(&here)?;
        g
    }

    /// The Hessian at `w`, by central differences of the gradient.
    fn hessian(&self, w: &[f64]) -> Result<Matrix> {
        const STEP: f64 = 1e-5;
        let row = |i: usize| {
            let moved = |by: f64| {
                let mut w = w.to_vec();
                w[i] += by;
                self.g_at(&w)
            };
            let (up, down) = (moved(STEP)?, moved(-STEP)?);
            Ok(up.iter().zip(down).map(|(up, down)| (up - down) / (2. * STEP)).collect())
        };
        (0..w.len()).map(row).collect()
    }

    /// Where each tensor is in a vector of all.
    fn blocks(&self) -> [std::ops::Range<usize>; 4] {
        [0..12, 12..16, 16..24, 24..26]
    }
}

/// The gradients of `vars` as one vector.
fn as_vector(grads: &GradStore, vars: &[Var]) -> Result<Vec<f64>> {
    let each = vars.iter().map(|var| values(grads.get(var).unwrap()));
    Ok(each.collect::<Result<Vec<_>>>()?.concat())
}

/// What the other tests stand on.
#[test]
fn the_exact_hessian_is_symmetric_and_far_from_diagonal() -> Result<()> {
    let network = Network::new()?;
    let hessian = network.hessian(&network.w()?)?;
    let (mut all, mut apart, mut beside) = (0., 0., 0.);
    for (i, row) in hessian.iter().enumerate() {
        for (j, entry) in row.iter().enumerate() {
            all += entry.powi(2);
            apart += (entry - hessian[j][i]).powi(2);
            if i != j {
                beside += entry.powi(2);
            }
        }
    }
    assert!(apart.sqrt() < 1e-8 * all.sqrt(), "{}", apart.sqrt() / all.sqrt());
    assert!(beside > 0.3 * all, "{}", beside / all);
    Ok(())
}

// -- Hutchinson --

fn hutchinson(decay: f64, scope: Scope) -> ParamsSrkl {
    ParamsSrkl {
        lr: 10.,
        beta: Beta::Fixed(2.),
        curvature: Curvature::Hutchinson(HutchinsonCurvature { decay }),
        measure: Measure { every: 1, first: 1, delta: 1e-6, seed: 11 },
        scope,
        ..ParamsSrkl::reference()
    }
}

/// Measures once at the network's place, steps, and gives the random vector of the measurement.
fn probe(network: &Network, opt: &mut Srkl) -> Result<Vec<f64>> {
    let (before, grads) = (network.w()?, network.gradient()?);
    let perturbed = opt.perturb(&grads)?;
    let moved = minus(&network.w()?, &before);
    perturbed.observe(&network.gradient()?)?;
    assert_eq!(network.w()?, before);
    opt.step(&grads)?;
    let sign = |moved: &f64| {
        assert_close(moved.abs(), 1e-6 * rms(&before).max(0.01), 1e-8);
        moved.signum()
    };
    Ok(moved.iter().map(sign).collect())
}

/// A measurement is the product with its random vector: for each tensor, and over all.
#[test]
fn one_product_with_the_hessian() -> Result<()> {
    let network = Network::new()?;
    let hessian = network.hessian(&network.w()?)?;
    for scope in [Scope::Tensor, Scope::Global] {
        let mut opt = Srkl::new(network.vars.clone(), hutchinson(0., scope))?;
        opt.set_learning_rate(0.);
        for _ in 0..20 {
            let product = times(&hessian, &probe(&network, &mut opt)?);
            for (telemetry, place) in opt.telemetry()?.iter().zip(network.blocks()) {
                let exact = norm(if scope == Scope::Global { &product } else { &product[place] });
                assert_close(telemetry.curvature.unwrap(), exact, 1e-4);
            }
        }
    }
    Ok(())
}

/// The random vectors are of +-1 with mean 0, and no two of their elements go together. That makes the
/// expectation of `(H z)_i^2` the squared norm of row i.
#[test]
fn probes_are_unbiased() -> Result<()> {
    const N: usize = 4000;
    let network = Network::new()?;
    let mut opt = Srkl::new(network.vars.clone(), hutchinson(0., Scope::Global))?;
    opt.set_learning_rate(0.);
    let (mut sums, mut products) = ([0.; 26], [[0.; 26]; 26]);
    for _ in 0..N {
        let z = probe(&network, &mut opt)?;
        for i in 0..26 {
            sums[i] += z[i];
            for j in 0..i {
                products[i][j] += z[i] * z[j];
            }
        }
    }
    // 351 sums of N signs each, five standard deviations.
    let limit = 5. * (N as f64).sqrt();
    for (i, row) in products.iter().enumerate() {
        assert!(abs_diff_eq!(sums[i], 0., epsilon = limit), "{i}: {}", sums[i]);
        for (j, sum) in row[..i].iter().enumerate() {
            assert!(abs_diff_eq!(*sum, 0., epsilon = limit), "{i} and {j}: {sum}");
        }
    }
    Ok(())
}

/// The mean of many measurements is the squared norm of the rows, within 4 standard errors.
#[test]
fn block_norms_are_unbiased() -> Result<()> {
    const N: usize = 3000;
    let network = Network::new()?;
    let rows = row_norms(&network.hessian(&network.w()?)?);
    for scope in [Scope::Tensor, Scope::Global] {
        let mut opt = Srkl::new(network.vars.clone(), hutchinson(0., scope))?;
        opt.set_learning_rate(0.);
        let mut squares = vec![vec![]; 4];
        for _ in 0..N {
            measured_step(&mut opt, || network.gradient())?;
            for (telemetry, squares) in opt.telemetry()?.iter().zip(&mut squares) {
                squares.push(telemetry.curvature.unwrap().powi(2));
            }
        }
        for (squares, place) in squares.iter().zip(network.blocks()) {
            let exact = norm(if scope == Scope::Global { &rows } else { &rows[place] }).powi(2);
            let mean = squares.iter().sum::<f64>() / N as f64;
            let variance = squares.iter().map(|q| (q - mean).powi(2)).sum::<f64>() / N as f64;
            let error = (variance / N as f64).sqrt();
            assert!(
                abs_diff_eq!(mean, exact, epsilon = 4. * error),
                "{mean} +- {error}, not {exact}"
            );
            assert!(error < 0.05 * exact, "{error} of {exact} says little");
        }
    }
    Ok(())
}

/// Row norms of elements, as their steps show them, after an average over many measurements at rest.
#[test]
fn row_norms_are_unbiased() -> Result<()> {
    const N: usize = 4000;
    let network = Network::new()?;
    let (w, g) = (network.w()?, network.g()?);
    let rows = row_norms(&network.hessian(&w)?);
    // Without a decay to speak of the average weighs all alike.
    let params = hutchinson(1. - 1e-9, Scope::Element);
    let mut opt = Srkl::new(network.vars.clone(), params.clone())?;
    opt.set_learning_rate(0.);
    for _ in 1..N {
        measured_step(&mut opt, || network.gradient())?;
    }
    opt.set_learning_rate(params.lr);
    measured_step(&mut opt, || network.gradient())?;
    for (i, step) in minus(&w, &network.w()?).into_iter().enumerate() {
        let r = (params.lr / (step / g[i]) - 1.) / params.beta_value();
        // (H z)_i^2 has at most sqrt(2) of its mean as its standard deviation; 4.5 standard errors.
        assert_close(r * r, rows[i] * rows[i], 4.5 * (2. / N as f64).sqrt());
    }
    Ok(())
}

/// Scopes of elements, and the bias-corrected average, as their formulas have it for the products that
/// were really measured.
#[test]
fn scopes_and_averages_of_hutchinson() -> Result<()> {
    let eighths = (0..=8).map(|eighths| Scope::Mixed(eighths as f64 / 8.));
    for scope in [Scope::Element, Scope::Tensor, Scope::Global].into_iter().chain(eighths) {
        for decay in [0., 0.6, 0.95] {
            let network = Network::new()?;
            let params = ParamsSrkl { lr: 0.5, ..hutchinson(decay, scope) };
            let (lr, beta) = (params.lr, params.beta_value());
            let mut opt = Srkl::new(network.vars.clone(), params)?;
            let mut q = [0.; 26];
            for t in 1..=4 {
                let (w, g) = (network.w()?, network.g()?);
                let hessian = network.hessian(&w)?;
                let product = times(&hessian, &probe(&network, &mut opt)?);
                let mut r = [0.; 26];
                for ((q, r), product) in q.iter_mut().zip(&mut r).zip(product) {
                    *q = decay * *q + (1. - decay) * product * product;
                    *r = (*q / (1. - decay.powi(t))).sqrt();
                }
                let after = network.w()?;
                let step = minus(&w, &after);
                for place in network.blocks() {
                    let of_block = norm(&r[place.clone()]);
                    for i in place {
                        let h = match scope {
                            Scope::Element => r[i],
                            Scope::Tensor => of_block,
                            Scope::Global => norm(&r),
                            Scope::Mixed(p) => r[i].powf(1. - p) * of_block.powf(p),
                            other => panic!("not here: {other:?}"),
                        };
                        let exact = lr / (1. + beta * h) * g[i];
                        // Beside the error of a difference of gradients, that of one of rounded numbers.
                        let relative = 1e-5 * (1. + norm(&r) / r[i]);
                        let rounding = 2. * f64::EPSILON * w[i].abs().max(after[i].abs());
                        let allowed = relative * exact.abs() + rounding;
                        assert!(
                            abs_diff_eq!(step[i], exact, epsilon = allowed),
                            "{scope:?}, decay {decay}: {}, not {exact}",
                            step[i]
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

// -- Along the step --

fn along(decay: f64, scope: Scope, direction: Direction) -> ParamsSrkl {
    ParamsSrkl {
        lr: 0.5,
        direction,
        beta: Beta::Tied(0.5),
        curvature: Curvature::Step(StepCurvature { decay, noise: 2. }),
        measure: Measure { every: 1, first: 1, ..Measure::default() },
        scope,
        ..ParamsSrkl::reference()
    }
}

const ADAM: Direction = Direction::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-4 };

/// The direction `d` after these gradients, one vector a step, and what it was made of.
fn direction(of: Direction, gradients: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
    let average = |decay: f64, term: fn(f64) -> f64| -> Vec<f64> {
        let mut average = vec![0.; 26];
        for g in gradients {
            average.iter_mut().zip(g).for_each(|(a, g)| *a = decay * *a + (1. - decay) * term(*g));
        }
        let correction = 1. - decay.powi(gradients.len() as i32);
        average.iter().map(|a| a / correction).collect()
    };
    match of {
        Direction::Gradient => {
            (gradients.last().unwrap().clone(), gradients.last().unwrap().clone())
        }
        Direction::Sgd { momentum, nesterov } => {
            let (mut d, mut b) = (vec![0.; 26], vec![0.; 26]);
            for g in gradients {
                b.iter_mut().zip(g).for_each(|(b, g)| *b = momentum * *b + g);
                let ahead = b.iter().zip(g).map(|(b, g)| momentum * b + g).collect();
                d = if nesterov { ahead } else { b.clone() };
            }
            (d.clone(), d)
        }
        Direction::Momentum { mu } => (average(mu, |g| g), average(mu, |g| g)),
        Direction::Adam { beta1, beta2, eps } => {
            let (m, v) = (average(beta1, |g| g), average(beta2, |g| g * g));
            (m.iter().zip(&v).map(|(m, v)| m / (v.sqrt() + eps)).collect(), m)
        }
        Direction::NesterovAdam { beta1, beta2, eps } => {
            let (m, v) = (average(beta1, |g| g), average(beta2, |g| g * g));
            let t = gradients.len() as i32;
            let later = beta1 * (1. - beta1.powi(t)) / (1. - beta1.powi(t + 1));
            let now = (1. - beta1) / (1. - beta1.powi(t));
            let last = gradients.last().unwrap();
            let n: Vec<f64> = m.iter().zip(last).map(|(m, g)| later * m + now * g).collect();
            (n.iter().zip(&v).map(|(n, v)| n / (v.sqrt() + eps)).collect(), n)
        }
        Direction::AmsGrad { beta1, beta2, eps } => {
            let (mut v, mut largest) = (vec![0.; 26], vec![0f64; 26]);
            for g in gradients {
                v.iter_mut().zip(g).for_each(|(v, g)| *v = beta2 * *v + (1. - beta2) * g * g);
                largest.iter_mut().zip(&v).for_each(|(largest, v)| *largest = largest.max(*v));
            }
            let (m, c) = (average(beta1, |g| g), 1. - beta2.powi(gradients.len() as i32));
            (m.iter().zip(&largest).map(|(m, u)| m / ((u / c).sqrt() + eps)).collect(), m)
        }
        Direction::Lion { beta1, beta2 } => {
            let (mut m, mut ahead) = (vec![0.; 26], vec![]);
            for g in gradients {
                ahead = m.iter().zip(g).map(|(m, g)| beta1 * m + (1. - beta1) * g).collect();
                m.iter_mut().zip(g).for_each(|(m, g)| *m = beta2 * *m + (1. - beta2) * g);
            }
            (ahead.iter().map(|x: &f64| x.signum()).collect(), ahead)
        }
        other => panic!("not here: {other:?}"),
    }
}

/// `sum ||G|| ||D|| / sum ||D||^2 <d, m> / ||d||^2` over these blocks, each of one strip. (Where `d = m`, the strips of
/// a block may stand for it.)
fn along_step(blocks: &[std::ops::Range<usize>], [change, step, d, m]: [&[f64]; 4]) -> f64 {
    let of = |place: &std::ops::Range<usize>| {
        assert!(place.len() <= STRIP);
        let [change, step, d, m] = [change, step, d, m].map(|x| &x[place.clone()]);
        // Without a direction, as where the cautious mask has left none, it has no part.
        let metric = if norm(d) > 0. { dot(step, step) * dot(d, m) / dot(d, d) } else { 0. };
        (norm(change) * norm(step), metric)
    };
    let (bounds, metrics): (Vec<f64>, Vec<f64>) = blocks.iter().map(of).unzip();
    bounds.iter().sum::<f64>() / metrics.iter().sum::<f64>()
}

/// The estimate is that of the mean Hessian along the step, here by Simpson's rule over the exact one.
#[test]
fn step_curvature_is_the_mean_hessian_along_the_step() -> Result<()> {
    let sgd = |nesterov| Direction::Sgd { momentum: 0.5, nesterov };
    let (beta1, beta2, eps) = (0.9, 0.99, 1e-4);
    let directions = [
        (Direction::Gradient, false),
        (Direction::Momentum { mu: 0.9 }, false),
        (ADAM, false),
        (sgd(false), false),
        (sgd(true), false),
        (Direction::NesterovAdam { beta1, beta2, eps }, false),
        (Direction::AmsGrad { beta1, beta2: 0.5, eps }, false),
        (Direction::Lion { beta1, beta2 }, false),
        (Direction::Lion { beta1: 0.5, beta2 }, true),
        (ADAM, true),
    ];
    for (direction, cautious) in directions {
        for scope in [Scope::Global, Scope::Tensor] {
            let network = Network::new()?;
            let params = ParamsSrkl { cautious, ..along(0., scope, direction) };
            let mut opt = Srkl::new(network.vars.clone(), params)?;
            let mut gradients = vec![];
            let (mut estimates, mut longest) = (vec![], 0f64);
            for _ in 0..8 {
                let w = network.w()?;
                gradients.push(network.g()?);
                measured_step(&mut opt, || network.gradient())?;
                // The step by the estimate of the one before.
                for (telemetry, exact) in opt.telemetry()?.iter().zip(&estimates) {
                    assert_close(telemetry.curvature.unwrap(), *exact, 0.01);
                }
                let step = minus(&network.w()?, &w);
                longest = longest.max(norm(&step) / norm(&w));
                let mut change = vec![0.; 26];
                for (at, weight) in [(0., 1.), (0.25, 4.), (0.5, 2.), (0.75, 4.), (1., 1.)] {
                    let on_the_way: Vec<f64> =
                        w.iter().zip(&step).map(|(w, d)| w + at * d).collect();
                    let product = times(&network.hessian(&on_the_way)?, &step);
                    change.iter_mut().zip(product).for_each(|(g, hd)| *g += weight / 12. * hd);
                }
                let (mut d, m) = self::direction(direction, &gradients);
                for (d, g) in d.iter_mut().zip(gradients.last().unwrap()).filter(|_| cautious) {
                    *d = if *d * g > 0. { *d } else { 0. };
                }
                let of = |blocks: &[std::ops::Range<usize>]| {
                    along_step(blocks, [&change, &step, &d, &m])
                };
                let exact = match scope {
                    Scope::Global => vec![of(&network.blocks()); 4],
                    _ => network.blocks().map(|block| of(&[block])).to_vec(),
                };
                // What can't be measured stays.
                let stays =
                    |(exact, i): (f64, usize)| if exact.is_nan() { estimates[i] } else { exact };
                estimates = exact.into_iter().zip(0..).map(stays).collect();
            }
            assert!(longest > 0.02, "steps of {longest} of the weights prove little");
        }
    }
    Ok(())
}

#[test]
fn step_curvature_of_blocks_of_any_size() -> Result<()> {
    // An empty one has none.
    let sizes = &SIZES[1..];
    for dtype in [DType::F32, DType::F64] {
        let vars = noisy_vars(sizes, 1., dtype)?;
        let before = vars.iter().map(|w| values(w)).collect::<Result<Vec<_>>>()?;
        let gradients = |salt: u64| -> Result<Vec<Tensor>> {
            let of = |(i, &n): (usize, &usize)| tensor(&noise(n, 1., salt + i as u64), dtype);
            sizes.iter().enumerate().map(of).collect()
        };
        let (first, second) = (gradients(100)?, gradients(200)?);
        let first_store = grads(vars.iter().zip(first.iter().cloned()));
        let params = along(0., Scope::Tensor, Direction::Gradient);
        let mut opt = Srkl::new(vars.clone(), params)?;
        opt.step(&first_store)?;
        let mut estimates = vec![];
        for (i, &n) in sizes.iter().enumerate() {
            let step = minus(&values(&vars[i])?, &before[i]);
            let g = values(&first[i])?;
            let change = minus(&values(&second[i])?, &g);
            let strips: Vec<_> =
                (0..n).step_by(STRIP).map(|start| start..n.min(start + STRIP)).collect();
            estimates.push(along_step(&strips, [&change, &step, &g, &g]));
        }
        opt.observe(&grads(vars.iter().zip(second)))?;
        opt.step(&first_store)?;
        for (telemetry, exact) in opt.telemetry()?.iter().zip(estimates) {
            assert_close(telemetry.curvature.unwrap(), exact, 1e-12);
        }
    }
    Ok(())
}

/// The curvature that the brake goes by after these measurements, none of which is a spike: weights fall by `decay`
/// into the past.
fn braking(measured: &[f64], decay: f64) -> f64 {
    let n = measured.len();
    let weights: Vec<f64> = (0..n).map(|k| decay.powi((n - 1 - k) as i32)).collect();
    let all: f64 = weights.iter().sum();
    let average = dot(measured, &weights) / all;
    let differences = measured.windows(2).zip(&weights[1..]);
    let variance: f64 = differences.map(|(x, w)| w * (x[1] - x[0]).powi(2) / 2.).sum();
    (average.powi(2) + 2. * decay * variance / all).sqrt()
}

/// A step by a gradient of 1, and, where it measures, the gradient after it on ground of curvature `h`.
fn step_on(h: f64, w: &Var, opt: &mut Srkl) -> Result<()> {
    let before = values(w)?[0];
    measured_step(opt, || {
        let g = 1. + h * (values(w)?[0] - before);
        Ok(grads([(w, tensor(&[g], DType::F64)?)]))
    })
}

/// While an estimate has fewer than 10 measurements a step is at most 10 times as long as the last measured one, also
/// where curvature has become a million times smaller; after that at once as long as the brake lets it.
#[test]
fn steps_grow_by_a_factor_at_first() -> Result<()> {
    for (steep, limited) in [(3, true), (9, true), (10, false), (14, false)] {
        let w = var(&[100.], DType::F64)?;
        let curvature = Curvature::Step(StepCurvature { decay: 0., noise: 0. });
        let params = along(0., Scope::Global, Direction::Gradient);
        let params = ParamsSrkl { curvature, lr: 1e9, beta: Beta::Tied(1.), ..params };
        let mut opt = Srkl::new(vec![w.clone()], params)?;
        for _ in 0..steep - 1 {
            step_on(1e3, &w, &mut opt)?;
        }
        step_on(1e-3, &w, &mut opt)?;
        let before = opt.telemetry()?[0].phi.unwrap();
        step_on(1e-3, &w, &mut opt)?;
        let phi = opt.telemetry()?[0].phi.unwrap();
        let expected = if limited { 10. * before } else { 1. / (1e-9 + 1e-3) };
        assert_close(phi, expected, 1e-6);
    }
    Ok(())
}

/// The worked number of `braking`, and of a spike.
#[test]
fn the_average_in_numbers() -> Result<()> {
    // (w - 1)^2 has a curvature of 2; the second gradient says what it should be.
    let w = var(&[3.], DType::F64)?;
    let mut opt = Srkl::new(vec![w.clone()], along(0.5, Scope::Global, Direction::Gradient))?;
    let mut told = vec![];
    for h in [2., 4., 2., 100., 2.] {
        step_on(h, &w, &mut opt)?;
        told.push(opt.measurements()?.curvature.unwrap());
    }
    // Weights 1, 1/2, 1/4, ... into the past: 2; (4 + 1) / 1.5 and a variance of 1/2 (2^2 / 2) / 1.5; and so on. 100
    // is above 6 times the average (2.57), and counts in full; then as 6 times that.
    let third: f64 = (2. + 2. + 0.5) / 1.75;
    let spike = 6. * third;
    let jump = (spike - 2.).powi(2) / 2.;
    let (all, differences) = (1.9375, [2. / 8., 2. / 4., jump / 2., jump]);
    let average = (2. + spike / 2. + 2. / 4. + 4. / 8. + 2. / 16.) / all;
    let variance = 0.5 * differences.iter().sum::<f64>() / all;
    let exact = [
        2.,
        ((5f64 / 1.5).powi(2) + 2. * 0.5 * 2. / 1.5).sqrt(),
        (third.powi(2) + 2. * 0.5 * (2. / 2. + 2.) / 1.75).sqrt(),
        100.,
        (average.powi(2) + 2. * variance).sqrt(),
    ];
    for (got, exact) in told.iter().zip(exact) {
        assert_close(*got, exact, 1e-12);
    }
    Ok(())
}

/// Each step has the same weight in the average but for its age, however many of them measure.
#[test]
fn a_measurement_weighs_by_the_steps_it_stands_for() -> Result<()> {
    let (every, first, decay) = (4, 3, 0.25);
    let w = var(&[3.], DType::F64)?;
    let params = ParamsSrkl {
        curvature: Curvature::Step(StepCurvature { decay, noise: 0.7 }),
        measure: Measure { every, first, ..Measure::default() },
        ..along(decay, Scope::Global, Direction::Gradient)
    };
    let mut opt = Srkl::new(vec![w.clone()], params)?;
    // The measurements, and what each leaves of those before.
    let (mut measured, mut left, mut before) = (vec![], vec![], 0);
    for t in 1..=17u64 {
        let h = 1. + (0.7 * t as f64).sin() / 2.;
        if t == 14 {
            opt.request_measurement();
        }
        let measuring = opt.measuring();
        step_on(h, &w, &mut opt)?;
        if !measuring {
            continue;
        }
        left.push(1. - (1. - decay) * f64::min(1., (t - before) as f64 / every as f64));
        measured.push(h);
        before = t;
        let weights: Vec<f64> = (0..left.len())
            .map(|k| (1. - left[k]) * left[k + 1..].iter().product::<f64>())
            .collect();
        let all: f64 = weights.iter().sum();
        let average = dot(&measured, &weights) / all;
        let squares = measured.windows(2).zip(&weights[1..]).zip(&left[1..]);
        let variance: f64 = squares.map(|((x, w), d)| d * w * (x[1] - x[0]).powi(2) / 2.).sum();
        let exact = (average.powi(2) + 0.7 * variance / all).sqrt();
        assert_close(opt.measurements()?.curvature.unwrap(), exact, 1e-12);
    }
    assert!(left.contains(&decay) && left.iter().any(|left| *left > 0.8), "{left:?}");
    Ok(())
}

/// However far apart measurements are meant to be: the first ones have equal weights.
#[test]
fn measurements_that_are_never_due_again() -> Result<()> {
    let nearest_1 = 1. - f64::EPSILON / 2.;
    for (every, decay) in [
        (1000, 0.99),
        (1025, 0.99),
        (1 << 30, 0.99),
        (1 << 53, 0.99),
        (u64::MAX, 0.99),
        (u64::MAX, 0.999_999),
        (20, 1. - 1e-15),
        (20, nearest_1),
        (u64::MAX, nearest_1),
    ] {
        let w = var(&[3.], DType::F64)?;
        let params = ParamsSrkl {
            curvature: Curvature::Step(StepCurvature { decay, noise: 0. }),
            measure: Measure { every, first: 3, ..Measure::default() },
            ..along(0., Scope::Global, Direction::Gradient)
        };
        let mut opt = Srkl::new(vec![w.clone()], params)?;
        for h in [1., 2., 3.] {
            step_on(h, &w, &mut opt)?;
        }
        assert_close(opt.measurements()?.curvature.unwrap(), 2., 1e-4);
        assert!(!opt.measuring(), "every {every}");
    }
    Ok(())
}

/// A decay of 0 remembers nothing, however far apart measurements are.
#[test]
fn no_memory() -> Result<()> {
    let curvature = StepCurvature { decay: 0., noise: 2. };
    let measure = Measure { every: 20, first: 5, ..Measure::default() };
    let hs = [1., 5., 3., 4., 2.];
    for (told, h) in without_brake(curvature, measure, 0.1, &hs)?.into_iter().zip(hs) {
        assert_close(told, h, 1e-12);
    }
    Ok(())
}

/// A variance that is beyond f64 does not brake where none should.
#[test]
fn no_noise() -> Result<()> {
    let curvature = StepCurvature { decay: 0.999_999, noise: 0. };
    let measure = Measure { every: 1, first: 1, ..Measure::default() };
    let hs = [[4e153; 20].as_slice(), &[2.39e154]].concat();
    let told = without_brake(curvature, measure, 1e-30, &hs)?;
    assert_close(told[20] / 1e153, (20. * 4. + 23.9) / 21., 1e-3);
    Ok(())
}

/// What is told of these curvatures, measured on steps of `lr`.
fn without_brake(
    curvature: StepCurvature,
    measure: Measure,
    lr: f64,
    hs: &[f64],
) -> Result<Vec<f64>> {
    let curvature = Curvature::Step(curvature);
    let w = var(&[100. * lr], DType::F64)?;
    let params = along(0., Scope::Global, Direction::Gradient);
    let params = ParamsSrkl { curvature, measure, lr, beta: Beta::Fixed(0.), ..params };
    let mut opt = Srkl::new(vec![w.clone()], params)?;
    let mut told = vec![];
    for &h in hs {
        step_on(h, &w, &mut opt)?;
        told.push(opt.measurements()?.curvature.unwrap());
    }
    Ok(told)
}

/// The brake uses the bias-corrected average of the estimates and their variance. A loss scale and weight decay change
/// the step but not what curvature is; clipping scales the gradients that it is made of.
#[test]
fn average_of_step_curvature() -> Result<()> {
    for direction in [Direction::Gradient, Direction::Momentum { mu: 0.9 }, ADAM] {
        for (grad_scale, max_grad_norm, weight_decay) in
            [(1., None, 0.), (1024., None, 0.), (3., None, 0.1), (1., Some(0.3), 0.1)]
        {
            let network = Network::new()?;
            let decay = 0.8;
            let params = ParamsSrkl {
                max_grad_norm,
                weight_decay,
                ..along(decay, Scope::Global, direction)
            };
            let mut opt = Srkl::new(network.vars.clone(), params)?;
            opt.set_grad_scale(grad_scale)?;
            let mut gradients = vec![];
            let mut measured: Vec<f64> = vec![];
            let mut reach = 0.;
            for t in 0..8 {
                let (w, g) = (network.w()?, network.g()?);
                let clip = max_grad_norm.map_or(1., |max| f64::min(1., max / norm(&g)));
                // What the direction is made of is clipped.
                gradients.push(g.iter().map(|g| clip * g).collect());
                measured_step(&mut opt, || (network.loss()? * grad_scale)?.backward())?;
                if t > 0 {
                    let exact = braking(&measured, decay);
                    for telemetry in opt.telemetry()? {
                        assert_close(telemetry.curvature.unwrap(), exact, 1e-12);
                        // Of few measurements it grows by a factor at most.
                        let phi = f64::min(1. / (1. / 0.5 + 0.5 * exact), 10. * reach);
                        assert_close(telemetry.phi.unwrap(), phi, 1e-12);
                    }
                }
                let (step, change) = (minus(&network.w()?, &w), minus(&network.g()?, &g));
                let change: Vec<f64> = change.iter().map(|x| clip * x).collect();
                let (d, m) = self::direction(direction, &gradients);
                reach = norm(&step) / norm(&d);
                measured.push(along_step(&network.blocks(), [&change, &step, &d, &m]));
            }
        }
    }
    Ok(())
}

/// `D` is the step as parameters of 16 bits took it, not as their masters did.
#[test]
fn step_curvature_of_rounded_parameters() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let matrix = symmetric(&[0.5, 1., 2., 4., 8., 16., 32., 64.], 1);
        let quadratic = Quadratic::new(matrix, &noise(8, 1., 2), &[5, 3], dtype)?;
        let params = along(0., Scope::Global, Direction::Gradient);
        let mut opt = Srkl::new(quadratic.vars.clone(), params)?;
        // As the optimizer is given it: rounded.
        let g = || as_vector(&quadratic.gradient()?, &quadratic.vars);
        let mut exact = None;
        let mut differs = false;
        for _ in 0..6 {
            let before = (quadratic.w()?, g()?, stored(&quadratic.vars, &opt)?.concat());
            quadratic.step(&mut opt)?;
            if let Some(exact) = exact {
                assert_close(opt.telemetry()?[0].curvature.unwrap(), exact, 1e-12);
            }
            let step = norm(&minus(&quadratic.w()?, &before.0));
            let of_masters = norm(&minus(&stored(&quadratic.vars, &opt)?.concat(), &before.2));
            differs |= abs_diff_ne!(step / of_masters, 1., epsilon = 1e-3);
            let (change, moved) = (minus(&g()?, &before.1), minus(&quadratic.w()?, &before.0));
            let bounds = quadratic
                .places()
                .into_iter()
                .map(|place| norm(&change[place.clone()]) * norm(&moved[place]));
            exact = Some(bounds.sum::<f64>() / (step * step));
        }
        assert!(differs, "{dtype:?}: rounding changed no step");
    }
    Ok(())
}
