//! Muon: matrices orthogonalised by the Newton-Schulz iteration, beside parameters that take Adam.
//!
//! `tests/golden/make_muon.py` made the values in `tests/golden/muon.json` with PyTorch in float64.

mod common;

use approx::{abs_diff_eq, assert_abs_diff_eq};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, VarMap};
use candle_srkl::{
    Direction, Measure, NonFinite, ParamsSrkl, Scope, Srkl, StateFormat, hidden_matrices,
};
use common::*;
use serde_json::Value;

fn muon(mu: f64, nesterov: bool, steps: u32) -> Direction {
    Direction::Muon { mu, nesterov, steps, bf16: false }
}

/// Muon alone: no decay.
fn plain(lr: f64) -> ParamsSrkl {
    ParamsSrkl { weight_decay: 0., ..ParamsSrkl::muon(lr) }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn zeros(shape: impl Into<candle_core::Shape>, dtype: DType) -> Result<Var> {
    Var::zeros(shape, dtype, &Device::Cpu)
}

fn is_muon(direction: Direction) -> bool {
    matches!(direction, Direction::Muon { .. })
}

/// `0.2 sqrt(max(rows, cols))`
fn scale(rows: usize, cols: usize) -> f64 {
    0.2 * (rows.max(cols) as f64).sqrt()
}

// -- Against PyTorch --

/// PyTorch's values after each step.
#[test]
fn pytorchs_values() -> Result<()> {
    let golden: Value = serde_json::from_str(include_str!("golden/muon.json")).unwrap();
    let shapes = [("wide", (3, 7)), ("tall", (6, 2)), ("square", (4, 4))];
    let cases = [
        ("default", ParamsSrkl::muon(0.02)),
        ("plain", ParamsSrkl { direction: muon(0.95, false, 5), ..plain(0.02) }),
        (
            "other",
            ParamsSrkl {
                direction: muon(0.8, true, 3),
                weight_decay: 0.3,
                ..ParamsSrkl::muon(0.02)
            },
        ),
    ];
    for (case, params) in cases {
        let steps = golden["cases"][case].as_array().unwrap();
        assert_eq!(steps.len(), 8, "{case}");
        for dtype in FLOATS {
            let matrix = |numbers: &Value, shape, dtype| {
                tensor(&self::numbers(numbers), dtype)?.reshape::<(usize, usize)>(shape)
            };
            let var =
                |(name, shape)| Var::from_tensor(&matrix(&golden["start"][name], shape, dtype)?);
            let vars = shapes.iter().copied().map(var).collect::<Result<Vec<Var>>>()?;
            let mut opt = Srkl::new(vars.clone(), params.clone())?;
            for (step, expected) in steps.iter().enumerate() {
                let mut store = grads([]);
                for ((name, shape), var) in shapes.iter().zip(&vars) {
                    if step != 2 || *name != "tall" {
                        let g = &golden["gradients"][step][name];
                        store.insert(var, matrix(g, *shape, DType::F64)?);
                    }
                }
                opt.step(&store)?;
                for ((name, _), var) in shapes.iter().zip(&vars) {
                    for (got, exact) in values(var)?.into_iter().zip(numbers(&expected[name])) {
                        let computed = if dtype == DType::F64 { 1e-13 } else { 3e-6 };
                        let stored = half_ulp(exact, dtype);
                        assert!(
                            abs_diff_eq!(got, exact, epsilon = computed + stored),
                            "{case} {dtype:?} step {step}, {name}: {got}, not {exact}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

// -- The orthogonal matrix --

/// A matrix with orthonormal columns, by Gram and Schmidt (twice, for the last digits).
fn orthonormal(rows: usize, cols: usize, salt: u64) -> Vec<Vec<f64>> {
    let mut columns: Vec<Vec<f64>> = vec![];
    for i in 0..cols {
        let mut column = noise(rows, 1., 1000 * salt + i as u64);
        for _ in 0..2 {
            for other in &columns {
                let along = dot(&column, other);
                column.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
            }
            let length = norm(&column);
            column.iter_mut().for_each(|x| *x /= length);
        }
        columns.push(column);
    }
    columns
}

/// What the iteration makes of a singular value.
fn iterated(s: f64, steps: u32) -> f64 {
    (0..steps).fold(s, |s, _| 3.4445 * s - 4.7750 * s.powi(3) + 2.0315 * s.powi(5))
}

/// One step from 0 by the gradient `U S V^T`, and what it makes of the singular values: `U^T O V`, whose elements
/// off the diagonal are returned apart, the largest of them.
fn step_by(
    (rows, cols): (usize, usize),
    singular: &[f64],
    dtype: DType,
    params: &ParamsSrkl,
) -> Result<(Vec<f64>, f64)> {
    let rank = singular.len();
    let (u, v) = (orthonormal(rows, rank, 1), orthonormal(cols, rank, 2));
    let at = |i: usize, j: usize| (0..rank).map(|k| u[k][i] * singular[k] * v[k][j]).sum::<f64>();
    let g: Vec<f64> = (0..rows * cols).map(|k| at(k / cols, k % cols)).collect();
    let w = zeros((rows, cols), dtype)?;
    // A single row or column too.
    let builder = Srkl::builder().default_group(params.clone()).matrices(|_, _| 1);
    let mut opt = builder.build([("w".to_string(), w.clone())])?;
    opt.step(&grads([(&w, tensor(&g, dtype)?.reshape((rows, cols))?)]))?;
    let o: Vec<f64> = values(&w)?.iter().map(|w| -w / (params.lr * scale(rows, cols))).collect();
    assert!(o.iter().all(|x| x.is_finite()), "{rows} x {cols}: {singular:?}");
    let row = |i: usize| &o[i * cols..(i + 1) * cols];
    let between = |a: &[f64], b: &[f64]| (0..rows).map(|i| a[i] * dot(row(i), b)).sum::<f64>();
    let (mut diagonal, mut off) = (vec![], 0f64);
    for (a, u) in u.iter().enumerate() {
        for (b, v) in v.iter().enumerate() {
            let x = between(u, v);
            if a == b { diagonal.push(x) } else { off = off.max(x.abs()) }
        }
    }
    // What is left without the space that they span.
    let left = |(at, o): (usize, &f64)| {
        let at = (at / cols, at % cols);
        o - (0..rank).map(|k| u[k][at.0] * diagonal[k] * v[k][at.1]).sum::<f64>()
    };
    let outside: Vec<f64> = o.iter().enumerate().map(left).collect();
    Ok((diagonal, off.max(norm(&outside))))
}

/// The singular values are what the iteration makes of each by itself, between 0.65 and 1.25, and the singular vectors
/// those of the gradient.
#[test]
fn singular_values_become_equal_and_vectors_stay() -> Result<()> {
    let falling = |rank: usize| (0..rank).map(|i| 0.7f64.powi(i as i32)).collect::<Vec<f64>>();
    for (shape, singular) in [
        ((8, 8), falling(8)),
        ((5, 40), falling(5)),
        ((40, 5), falling(5)),
        ((33, 31), falling(9)),
        ((64, 64), vec![1.; 64]),
        ((1, 17), vec![3.]),
        ((17, 1), vec![3.]),
        ((1, 1), vec![-2.]),
        ((3, 4097), falling(3)),
        ((300, 257), vec![5., 4., 3., 2., 1.]),
    ] {
        for dtype in [DType::F32, DType::F64] {
            let (got, rest) = step_by(shape, &singular, dtype, &plain(1.))?;
            let length = norm(&singular);
            let within = if dtype == DType::F64 { 1e-12 } else { 2e-5 };
            for (got, s) in got.iter().zip(&singular) {
                let expected = iterated(s / length, 5);
                assert_abs_diff_eq!(*got, expected, epsilon = within);
                assert!((0.65..=1.25).contains(&got.abs()), "{shape:?} {s}: {got}");
            }
            assert!(rest < 5. * within, "{shape:?} {dtype:?}: {rest} off the diagonal");
        }
    }
    Ok(())
}

/// Matrices of any size come out the same as their multiples, without an infinity on the way, and what is 0 stays 0.
#[test]
fn tiny_huge_and_zero_matrices() -> Result<()> {
    let singular = [1., 0.5, 0.2];
    for (dtype, powers) in
        [(DType::F32, [-120, -60, 0, 60, 124].as_slice()), (DType::F64, &[-1000, -600, 600, 1000])]
    {
        let (expected, _) = step_by((6, 9), &singular, dtype, &plain(1.))?;
        for power in powers {
            let scaled = singular.map(|s| s * 2f64.powi(*power));
            let (got, rest) = step_by((6, 9), &scaled, dtype, &plain(1.))?;
            for (got, expected) in got.iter().zip(&expected) {
                assert_abs_diff_eq!(got, expected, epsilon = 1e-4);
            }
            assert!(rest < 1e-4, "{dtype:?} 2^{power}: {rest}");
        }
        let w = zeros((6, 9), dtype)?;
        let mut opt = Srkl::new(vec![w.clone()], plain(1.))?;
        opt.step(&grads([(&w, w.zeros_like()?)]))?;
        assert_eq!(values(&w)?, vec![0.; 54], "{dtype:?}");
    }
    Ok(())
}

// -- Which parameter is what --

/// The parameters of the direction of Muon, by name.
fn muons(opt: &Srkl) -> Result<Vec<String>> {
    let all = opt.telemetry()?.into_iter();
    Ok(all.filter(|t| is_muon(t.direction)).map(|t| t.name).collect())
}

#[test]
fn hidden_matrices_take_muon_and_all_else_adam() -> Result<()> {
    let shapes: [(&str, &[usize]); 18] = [
        ("model.embed_tokens.weight", &[50, 8]),
        ("model.layers.0.self_attn.q_proj.weight", &[8, 8]),
        ("model.layers.0.mlp.down_proj.weight", &[8, 32]),
        ("model.layers.0.input_layernorm.weight", &[8]),
        ("lm_head.weight", &[50, 8]),
        ("transformer.wte.weight", &[50, 8]),
        ("transformer.wpe.weight", &[16, 8]),
        ("transformer.h.0.attn.c_attn.weight", &[24, 8]),
        ("transformer.h.0.attn.c_attn.bias", &[24]),
        ("bert.embeddings.word_embeddings.weight", &[50, 8]),
        ("bert.encoder.layer.0.attention.output.dense.weight", &[8, 8]),
        ("patch_embed.proj.weight", &[8, 3, 4, 4]),
        ("features.0.weight", &[8, 3, 3, 3]),
        ("output.weight", &[50, 8]),
        ("sa.heads.0.key.weight", &[4, 8]),
        ("lora_b.weight", &[8, 4]),
        ("gate", &[1, 8]),
        ("ln1.weight", &[16, 8]),
    ];
    let counts: Vec<usize> = shapes
        .iter()
        .map(|(name, shape)| Ok(hidden_matrices(name, &zeros(*shape, DType::F32)?)))
        .collect::<Result<_>>()?;
    assert_eq!(counts, [0, 1, 1, 0, 0, 0, 0, 3, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1]);

    let varmap = VarMap::new();
    for (name, shape) in shapes {
        let var = zeros(shape, DType::F32)?;
        varmap.data().lock().unwrap().insert(name.to_string(), var);
    }
    let opt = Srkl::from_varmap(&varmap, ParamsSrkl::braked_muon_averaged())?;
    let mut expected: Vec<&str> =
        shapes.iter().zip(&counts).filter(|(_, n)| **n > 0).map(|((name, _), _)| *name).collect();
    expected.sort_unstable();
    assert_eq!(muons(&opt)?, expected);
    assert!(opt.telemetry()?.iter().all(|t| t.group == "default"));
    // Without names by shape.
    let vars = shapes.map(|(_, shape)| zeros(shape, DType::F32).unwrap());
    let opt = Srkl::new(vars.to_vec(), ParamsSrkl::muon(0.1))?;
    assert_eq!(muons(&opt)?.len(), shapes.iter().filter(|(_, s)| s.len() > 1 && s[0] > 1).count());
    Ok(())
}

/// A predicate decides, also about a weight that is several matrices, and about one of several names.
#[test]
fn a_predicate_overrides_the_rule() -> Result<()> {
    let build = |count: fn(&str, &Var) -> usize, shape: &[usize]| {
        let named = [("w.weight".to_string(), zeros(shape, DType::F32)?)];
        Srkl::builder().default_group(plain(0.1)).matrices(count).build(named)
    };
    assert_eq!(muons(&build(|_, _| 0, &[8, 8])?)?.len(), 0);
    assert_eq!(muons(&build(|_, _| 2, &[8, 8])?)?.len(), 1);
    for (shape, count, said) in [
        (&[8][..], 1usize, "got shape [8]"),
        (&[], 1, "got shape []"),
        (&[0, 4], 1, "got shape [0, 4]"),
        (&[8, 4], 3, "can't be split into 3"),
    ] {
        let count: fn(&str, &Var) -> usize = if count == 1 { |_, _| 1 } else { |_, _| 3 };
        let error = build(count, shape).unwrap_err().to_string();
        assert!(error.contains("`w.weight`") && error.contains(said), "{error}");
        assert!(error.contains("the Adam part of group `default`"), "{error}");
    }
    // A weight that is embedding and head: the embedding's name is enough.
    let varmap = VarMap::new();
    let shared = zeros((8, 8), DType::F32)?;
    for name in ["embed.weight", "proj.weight"] {
        varmap.data().lock().unwrap().insert(name.to_string(), shared.clone());
    }
    let opt = Srkl::from_varmap(&varmap, ParamsSrkl::braked_muon())?;
    assert_eq!(muons(&opt)?.len(), 0);
    Ok(())
}

/// A weight of several matrices is stepped as these are by themselves, and a convolution's kernel as out x rest.
#[test]
fn a_stacked_weight_is_its_matrices() -> Result<()> {
    let train = |shapes: &[&[usize]], count: usize| -> Result<Vec<f64>> {
        let vars: Vec<Var> = shapes.iter().map(|s| zeros(*s, DType::F32)).collect::<Result<_>>()?;
        let named = vars.iter().enumerate().map(|(i, v)| (format!("{i}.weight"), v.clone()));
        let mut opt =
            Srkl::builder().default_group(plain(0.1)).matrices(|_, _| count).build(named)?;
        let n: usize = vars.iter().map(|v| v.elem_count()).sum();
        for step in 0..4 {
            let (all, mut at) = (noise(n, 0.1, step), 0);
            let mut store = grads([]);
            for var in &vars {
                let g = &all[at..at + var.elem_count()];
                at += g.len();
                store.insert(var, tensor(g, DType::F32)?.reshape(var.shape())?);
            }
            opt.step(&store)?;
        }
        all_values(&vars)
    };
    let apart = train(&[&[6, 5], &[6, 5], &[6, 5]], 1)?;
    assert!(norm(&apart) > 0.5);
    assert_eq!(train(&[&[18, 5]], 3)?, apart);
    assert_eq!(train(&[&[3, 6, 5]], 3)?, apart);
    assert_eq!(train(&[&[6, 5, 1], &[6, 1, 5], &[6, 5]], 1)?, apart);
    // Of one filter one row.
    assert_eq!(train(&[&[1, 6, 5]], 1)?, train(&[&[1, 30]], 1)?);
    assert_ne!(train(&[&[18, 5]], 1)?, apart);
    Ok(())
}

// -- The curvature along a step --

/// `h_i w_i^2 / 2` of every element, whose gradient is known.
fn quadratic(vars: &[Var], h: &[f64]) -> Result<Tensor> {
    let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for (var, h) in vars.iter().zip(h) {
        sum = (sum + (var.sqr()?.sum_all()? * (h / 2.))?)?;
    }
    Ok(sum)
}

/// `sum_s ||G_s|| ||D_s|| / sum_b ||D_b||^2 <d_b, m_b> / ||d_b||^2` over a matrix and a vector together, from what the steps
/// did and momenta that are computed here.
#[test]
fn one_curvature_of_matrices_and_the_rest() -> Result<()> {
    for (nesterov, scope) in [(true, Scope::Global), (false, Scope::Global), (true, Scope::Tensor)]
    {
        let (rows, cols) = (7, 9);
        let h = [3., 0.5];
        let vars = [
            Var::from_tensor(&noisy_matrix((rows, cols), 1., 1, DType::F64)?)?,
            var(&noise(11, 1., 2), DType::F64)?,
        ];
        let mu = 0.9;
        let params = ParamsSrkl {
            direction: muon(mu, nesterov, 5),
            scope,
            measure: Measure { every: 1, ..Measure::default() },
            ..ParamsSrkl::braked_muon()
        };
        let mut opt = Srkl::new(vars.to_vec(), params)?;
        let mut m = [vec![0.; rows * cols], vec![0.; 11]];
        let mut v = vec![0.; 11];
        for t in 1..5 {
            let before = [values(&vars[0])?, values(&vars[1])?];
            opt.backward_step_with(|| quadratic(&vars, &h))?;
            let (mut bounds, mut metrics) = ([0.; 2], [0.; 2]);
            for b in 0..2 {
                let (beta, adam) = (if b == 0 { mu } else { 0.9 }, b == 1);
                let g: Vec<f64> = before[b].iter().map(|w| h[b] * w).collect();
                m[b].iter_mut().zip(&g).for_each(|(m, g)| *m = beta * *m + (1. - beta) * g);
                let looks_ahead = nesterov && !adam;
                let ahead = m[b].iter().zip(&g).map(|(m, g)| match looks_ahead {
                    true => beta * m + (1. - beta) * g,
                    false => *m,
                });
                let weight = 1. - f64::powi(beta, if looks_ahead { t + 1 } else { t });
                let ahead: Vec<f64> = ahead.map(|m| m / weight).collect();
                let step = minus(&values(&vars[b])?, &before[b]);
                // Of a matrix the step is a multiple of the direction.
                let d: Vec<f64> = if adam {
                    v.iter_mut().zip(&g).for_each(|(v, g)| *v = 0.999 * *v + 0.001 * g * g);
                    let scale = 1. - 0.999f64.powi(t);
                    ahead.iter().zip(&v).map(|(m, v)| m / ((v / scale).sqrt() + 1e-8)).collect()
                } else {
                    let phi = opt.telemetry()?[0].phi.unwrap();
                    step.iter().map(|x| -x / phi).collect()
                };
                metrics[b] = dot(&step, &step) * dot(&d, &ahead) / dot(&d, &d);
                let strips = step.chunks(STRIP).map(|s| h[b] * dot(s, s));
                bounds[b] = strips.sum();
            }
            // With `Scope::Tensor` it is told of the last parameter.
            let (bound, metric) = match scope {
                Scope::Global => (bounds[0] + bounds[1], metrics[0] + metrics[1]),
                _ => (bounds[1], metrics[1]),
            };
            let (got, expected) = (opt.measurements()?.last.unwrap(), bound / metric);
            assert!(
                abs_diff_eq!(got, expected, epsilon = 1e-9 * expected),
                "{got}, not {expected}"
            );
        }
    }
    Ok(())
}

/// On quadratics, whatever the learning rate: bounded, and lower in the end than at the beginning. At a minimum the brake
/// stops Muon, whose steps else stay as long as they are.
#[test]
fn the_brake_holds_on_quadratics() -> Result<()> {
    let train = |params: ParamsSrkl| -> Result<(f64, f64)> {
        let vars = [
            Var::from_tensor(&noisy_matrix((6, 10), 1., 1, DType::F64)?)?,
            Var::from_tensor(&noisy_matrix((10, 6), 1., 2, DType::F64)?)?,
            var(&noise(9, 1., 3), DType::F64)?,
        ];
        let loss = || quadratic(&vars, &[20., 1., 3.]);
        let first = loss()?.to_scalar::<f64>()?;
        let mut opt = Srkl::new(vars.to_vec(), params)?;
        for _ in 0..400 {
            opt.backward_step_with(loss)?;
        }
        Ok((first, loss()?.to_scalar::<f64>()?))
    };
    for preset in [ParamsSrkl::braked_muon(), ParamsSrkl::braked_muon_averaged()] {
        for lr in [1e-4, 1e-2, 1., 10., 1e3, 1e6] {
            let (first, last) = train(ParamsSrkl { lr, ..preset.clone() })?;
            assert!(last < first, "lr {lr}: from {first} to {last}");
            if lr >= 1. {
                assert!(last < 1e-3 * first, "lr {lr}: from {first} to {last}");
            }
        }
    }
    let (_, plain) = train(plain(0.1))?;
    assert!(plain > 1e-2, "{plain}: without a brake it should not settle");
    Ok(())
}

// -- What a step may meet --

/// The parameters and the state of a training of matrices and vectors, by given gradients, saved and resumed after two
/// steps, with gradients that are missing, and not finite.
fn train(params: &ParamsSrkl, steps: u64, resume: bool) -> Result<(Vec<Bits>, State)> {
    let shapes: [&[usize]; 5] = [&[40, 24], &[24, 40], &[40, 24], &[31], &[260, 300]];
    let mut vars = vec![];
    for (i, shape) in shapes.iter().enumerate() {
        let n = shape.iter().product();
        let value = tensor(&noise(n, 1., i as u64), FLOATS[i % 4])?.reshape(*shape)?;
        vars.push(Var::from_tensor(&value)?);
    }
    let build = || {
        let named = vars.iter().enumerate().map(|(i, var)| (i.to_string(), var.clone()));
        Srkl::builder()
            .default_group(params.clone())
            .group("other", ParamsSrkl { weight_decay: 0.2, ..params.clone() }, |name, _| {
                name == "1"
            })
            .build(named)
    };
    let mut opt = build()?;
    let folder = tempfile::tempdir()?;
    for step in 0..steps {
        if resume && step == 2 {
            opt.save(folder.path().join("state"))?;
            opt = build()?;
            opt.load(folder.path().join("state"))?;
        }
        let gradients = |again: bool| -> Result<_> {
            let mut store = grads([]);
            for (i, var) in vars.iter().enumerate() {
                let salt = 100 * step + i as u64 + 1000 * again as u64;
                let mut g = noise(var.elem_count(), 0.1, salt);
                if step == 1 && i == 1 && !again {
                    g[7] = f64::NAN;
                }
                if step != 3 || i != 0 {
                    // Strided, as a transposed weight's gradient is.
                    let (rows, cols) = var.dims2().unwrap_or((1, var.elem_count()));
                    let g = tensor(&g, DType::F32)?.reshape((cols, rows))?.t()?;
                    let g = if var.rank() == 1 { g.squeeze(0)? } else { g };
                    store.insert(var, g);
                }
            }
            Ok(store)
        };
        let measures = opt.measuring();
        opt.step(&gradients(false)?)?;
        if measures {
            opt.observe(&gradients(true)?)?;
        }
    }
    let bits = all_bits(&vars, &opt)?;
    Ok((bits, saved(&mut opt)?.1.into_iter().collect()))
}

type State = Vec<(String, Vec<u8>)>;

fn policies() -> impl Iterator<Item = ParamsSrkl> {
    [NonFinite::SkipStep, NonFinite::SkipBlock].into_iter().flat_map(|nonfinite| {
        [ParamsSrkl::braked_muon_averaged(), ParamsSrkl::muon(0.01)].map(|params| ParamsSrkl {
            nonfinite,
            trust: (params.average.is_none()).then_some(0.02),
            max_grad_norm: Some(3.),
            ..params
        })
    })
}

/// A resumed training has the bits of one that was not interrupted.
#[test]
fn resumed_with_the_same_bits() -> Result<()> {
    for params in policies() {
        let whole = train(&params, 6, false)?;
        assert!(train(&params, 6, true)? == whole, "{params:?}");
        assert!(whole.1.iter().any(|(name, _)| name == "4.m"));
        assert!(!whole.1.iter().any(|(name, _)| name == "4.v"), "Muon has one moment");
        assert!(whole.1.iter().any(|(name, _)| name == "3.v"), "Adam has two");
    }
    Ok(())
}

/// What is not finite changes nothing: with one policy no parameter and no moment, with the other none of this one.
#[test]
fn policies_hold() -> Result<()> {
    for params in policies() {
        let (before, after) = (train(&params, 1, false)?, train(&params, 2, false)?);
        for (i, (before, after)) in before.0.iter().zip(&after.0).enumerate() {
            let stays = params.nonfinite == NonFinite::SkipStep || i == 1;
            assert_eq!(before == after, stays, "{i}: {params:?}");
        }
        for ((name, before), (_, after)) in before.1.iter().zip(&after.1) {
            let stays = params.nonfinite == NonFinite::SkipStep || name.starts_with('1');
            assert_eq!(before == after, stays, "{name}: {params:?}");
        }
    }
    Ok(())
}

/// A gradient that does not fit is an error, and changes nothing.
#[test]
fn a_failed_step_changes_nothing() -> Result<()> {
    let vars = noisy_vars(&[60, 9], 1., DType::F32)?;
    let matrix = Var::from_tensor(&noisy_matrix((6, 10), 1., 1, DType::F32)?)?;
    let all = [matrix.clone(), vars[1].clone()];
    let mut opt = Srkl::new(all.to_vec(), ParamsSrkl::muon(0.1))?;
    let good = grads([(&all[0], all[0].ones_like()?), (&all[1], all[1].ones_like()?)]);
    opt.step(&good)?;
    let before = (all_bits(&all, &opt)?, saved(&mut opt)?);
    let bad = grads([(&all[0], all[0].ones_like()?), (&all[1], vars[0].ones_like()?)]);
    assert!(opt.step(&bad).unwrap_err().to_string().contains("`1`"));
    assert!((all_bits(&all, &opt)?, saved(&mut opt)?) == before);
    Ok(())
}

/// The trust clip shortens the step of a matrix to `tau` times its norm.
#[test]
fn the_trust_clip_goes_by_the_orthogonal_step() -> Result<()> {
    let w = Var::from_tensor(&noisy_matrix((12, 20), 1., 1, DType::F64)?)?;
    let before = values(&w)?;
    let params = ParamsSrkl { trust: Some(0.01), ..plain(100.) };
    let mut opt = Srkl::new(vec![w.clone()], params)?;
    opt.step(&grads([(&w, noisy_matrix((12, 20), 1e-3, 2, DType::F64)?)]))?;
    let step = norm(&minus(&values(&w)?, &before));
    assert_abs_diff_eq!(step, 0.01 * norm(&before), epsilon = 1e-12);
    Ok(())
}

// -- Settings --

#[test]
fn settings_are_those_of_the_whole_group() -> Result<()> {
    let vars = [zeros((4, 6), DType::F32)?, zeros(5, DType::F32)?];
    let mut opt = Srkl::new(vars.to_vec(), plain(0.1))?;
    let ones = || grads(vars.iter().map(|var| (var, var.ones_like().unwrap())));
    opt.step(&ones())?;
    opt.set_params("default", plain(0.3))?;
    opt.step(&ones())?;
    let told = opt.telemetry()?;
    assert!(told.iter().all(|t| t.phi == Some(0.3) && t.group == "default"), "{told:?}");
    assert_eq!(opt.params("default"), Some(&plain(0.3)));
    let message = |result: Result<()>| result.expect_err("an error").to_string();
    let adam = ParamsSrkl { direction: ParamsSrkl::adamw(0.1).direction, ..plain(0.1) };
    let error = message(opt.set_params("default", adam));
    assert!(error.contains("without the state `v`"), "{error}");
    let bf16 = Direction::Muon { mu: 0.95, nesterov: true, steps: 5, bf16: false };
    let error = message(opt.set_params("default", ParamsSrkl { direction: bf16, ..plain(0.1) }));
    assert!(error.contains("`bf16`"), "{error}");
    // Fewer steps are another matrix, from the next step on.
    let few = Direction::Muon { mu: 0.95, nesterov: true, steps: 1, bf16: true };
    let step = |opt: &mut Srkl| -> Result<Vec<f64>> {
        let before = values(&vars[0])?;
        opt.step(&ones())?;
        Ok(minus(&values(&vars[0])?, &before))
    };
    let five = step(&mut opt)?;
    opt.set_params("default", ParamsSrkl { direction: few, ..plain(0.3) })?;
    // A matrix of ones has one singular value, which is 1 of its norm: 3.4445 - 4.7750 + 2.0315, and so on.
    assert_abs_diff_eq!(
        norm(&step(&mut opt)?) / norm(&five),
        iterated(1., 1) / iterated(1., 5),
        epsilon = 1e-4
    );
    for (direction, scope, said) in [
        (muon(1., true, 5), Scope::Tensor, "`mu`"),
        (muon(0.9, true, 0), Scope::Tensor, "`steps`"),
        (muon(0.9, true, 5), Scope::Element, "`scope`"),
    ] {
        let params = ParamsSrkl { direction, scope, ..ParamsSrkl::reference() };
        let error = params.validate().unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    Ok(())
}

/// Compact momentum is followed: a training moves matrices where that of f32 moves them, within a tenth.
#[test]
fn compact_momentum_is_followed() -> Result<()> {
    let shape = (64, 100);
    let train = |params: ParamsSrkl| -> Result<[Vec<f64>; 2]> {
        let w = Var::from_tensor(&noisy_matrix(shape, 1., 1, DType::F32)?)?;
        let start = values(&w)?;
        let mut opt = Srkl::new(vec![w.clone()], params)?;
        let mut first = vec![];
        for step in 0..20 {
            let (signal, noise) = (
                noisy_matrix(shape, 1., 2, DType::F32)?,
                noisy_matrix(shape, 1., 10 + step, DType::F32)?,
            );
            opt.step(&grads([(&w, (signal + noise)?)]))?;
            if step == 0 {
                first = minus(&values(&w)?, &start);
            }
        }
        Ok([first, minus(&values(&w)?, &start)])
    };
    let params = ParamsSrkl::muon(0.01);
    let compact = ParamsSrkl { state: StateFormat::Compact, ..params.clone() };
    let ([first, exact], [first_again, packed]) = (train(params)?, train(compact)?);
    assert_eq!(first, first_again, "the first step is of the gradient alone");
    assert_ne!(exact, packed);
    let error = norm(&minus(&packed, &exact)) / norm(&exact);
    assert!(error < 0.1, "{error}");
    Ok(())
}

// -- Threads --

/// Prints what a training leaves, for the next test.
#[test]
#[ignore = "run by `any_number_of_threads`"]
fn a_training() -> Result<()> {
    for params in policies() {
        let left = format!("{:?}", train(&params, 5, false)?);
        println!(
            "left {:x}",
            left.bytes().fold(0u64, |hash, b| (hash ^ b as u64).wrapping_mul(0x100_0000_01b3))
        );
    }
    Ok(())
}

/// The products' threads are those of candle, which asks the environment: a process for each number of them.
#[test]
fn any_number_of_threads() -> Result<()> {
    let run = |threads: &str| -> Result<Vec<String>> {
        let output = std::process::Command::new(std::env::current_exe()?)
            .args(["--exact", "a_training", "--ignored", "--nocapture"])
            .env("RAYON_NUM_THREADS", threads)
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let left: Vec<String> =
            text.lines().filter(|line| line.starts_with("left")).map(String::from).collect();
        assert_eq!(left.len(), policies().count(), "{text}");
        Ok(left)
    };
    let one = run("1")?;
    for threads in ["2", "3", "8"] {
        assert_eq!(run(threads)?, one, "{threads} threads");
    }
    Ok(())
}
