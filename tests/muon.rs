//! Muon: matrices orthogonalised by the Newton-Schulz iteration, beside parameters that take Adam.
//!
//! `tests/golden/make_muon.py` made the values in `tests/golden/muon.json` with PyTorch in float64.

mod common;

use approx::{abs_diff_eq, assert_abs_diff_eq};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, VarMap};
use candle_srkl::{
    Average, Beta, Curvature, Direction, Measure, NonFinite, ParamsSrkl, Scope, Srkl,
    StepCurvature, hidden_matrices,
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
    for a in 0..rank {
        for b in 0..rank {
            let x = between(&u[a], &v[b]);
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
    assert_ne!(train(&[&[18, 5]], 1)?, apart);
    Ok(())
}
