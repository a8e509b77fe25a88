//! Steps by the sum of micro-batches: those of gradients that were summed by hand, in f32.

mod common;

use std::thread;

use candle_core::{DType, Result, Tensor, Var};
use candle_nn::Optimizer;
use candle_srkl::{ParamsSrkl, Reduction, Srkl, Threads};
use common::*;

const N: usize = 9_000;

/// The gradient of a micro-batch.
fn gradient(salt: u64, dtype: DType) -> Result<Tensor> {
    tensor(&noise(N, 1., salt), dtype)
}

/// In f32, and neighbours first.
fn sum_of(count: u64, first: u64, dtype: DType) -> Result<Tensor> {
    let g = |i| gradient(first + i, dtype)?.to_dtype(DType::F32);
    match count {
        1 => g(0),
        3 => (g(0)? + g(1)?)? + g(2)?,
        4 => (g(0)? + g(1)?)? + (g(2)? + g(3)?)?,
        _ => unreachable!(),
    }
}

fn build(params: &ParamsSrkl, dtype: DType, rank: Option<Threads>) -> Result<(Srkl, Var)> {
    let w = noisy_vars(&[N], 1., dtype)?.remove(0);
    let builder = Srkl::builder().default_group(params.clone());
    let builder = match rank {
        Some(rank) => builder.collective(rank),
        None => builder,
    };
    Ok((builder.build([("w".to_string(), w.clone())])?, w))
}

/// Whether steps measure before, after, or not.
fn settings() -> [ParamsSrkl; 4] {
    [
        ParamsSrkl::sgd(0.1),
        ParamsSrkl { max_grad_norm: Some(0.3), ..ParamsSrkl::adamw(0.1) },
        ParamsSrkl::braked_adam(),
        ParamsSrkl::hessian(),
    ]
}

/// Some steps by micro-batches, of which each of the ranks has `count`.
fn accumulated(
    params: &ParamsSrkl,
    dtype: DType,
    count: u64,
    rank: Option<Threads>,
) -> Result<Bits> {
    let (mut opt, w) = build(params, dtype, rank)?;
    opt.set_reduction(Reduction::Sum)?;
    opt.set_grad_scale(4.)?;
    for step in 0..3 {
        let first = 100 * step + count * opt.rank() as u64;
        let micro_batches = |first: u64| -> Result<Vec<_>> {
            let own = |i| Ok(grads([(&w, gradient(first + i, dtype)?)]));
            (0..count).map(own).collect()
        };
        for g in &micro_batches(first)? {
            opt.accumulate(g)?;
        }
        let (measures, probes) = (opt.measuring(), *params == ParamsSrkl::hessian());
        let again = micro_batches(first + 50)?;
        if measures && probes {
            let mut perturbed = opt.perturb_accumulated()?;
            again.iter().try_for_each(|g| perturbed.accumulate(g))?;
            perturbed.observe_accumulated()?;
        }
        opt.step_accumulated()?;
        if measures && !probes {
            assert_error(opt.set_reduction(Reduction::Mean), &["`observe`"]);
            again.iter().try_for_each(|g| opt.accumulate(g))?;
            opt.observe_accumulated()?;
        }
    }
    Ok((bits(&w)?, master_bits(&opt, "w")?))
}

/// The same by sums that are given.
fn summed(params: &ParamsSrkl, dtype: DType, count: u64) -> Result<Bits> {
    let (mut opt, w) = build(params, dtype, None)?;
    opt.set_grad_scale(4.)?;
    for step in 0..3 {
        let first = grads([(&w, sum_of(count, 100 * step, dtype)?)]);
        let again = grads([(&w, sum_of(count, 100 * step + 50, dtype)?)]);
        let (measures, probes) = (opt.measuring(), *params == ParamsSrkl::hessian());
        if measures && probes {
            opt.perturb(&first)?.observe(&again)?;
        }
        opt.step(&first)?;
        if measures && !probes {
            opt.observe(&again)?;
        }
    }
    Ok((bits(&w)?, master_bits(&opt, "w")?))
}

#[test]
fn the_bits_of_explicit_sums() -> Result<()> {
    for params in settings() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for count in [1, 3, 4] {
                let own = accumulated(&params, dtype, count, None)?;
                assert!(own == summed(&params, dtype, count)?, "{dtype:?} {count} {params:?}");
            }
        }
    }
    Ok(())
}

/// The sum is over the micro-batches of all ranks.
#[test]
fn the_bits_of_explicit_sums_over_ranks() -> Result<()> {
    for params in settings() {
        let run = |rank| accumulated(&params, DType::BF16, 2, Some(rank));
        let of_ranks: Vec<Bits> = thread::scope(|scope| {
            let ranks: Vec<_> =
                Threads::new(2).into_iter().map(|rank| scope.spawn(move || run(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect()
        });
        let expected = summed(&params, DType::BF16, 4)?;
        assert!(of_ranks.iter().all(|bits| *bits == expected), "{params:?}");
    }
    Ok(())
}

/// A closure over micro-batches too; and the mean is what it was.
#[test]
fn closures_over_micro_batches() -> Result<()> {
    for (reduction, expected) in
        [(Reduction::Sum, 10. - 0.25 * 12.), (Reduction::Mean, 10. - 0.25 * 4.)]
    {
        let w = var(&[10.], DType::F32)?;
        let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::sgd(0.25))?;
        assert_eq!(opt.reduction(), Reduction::Mean);
        opt.set_reduction(reduction)?;
        assert_eq!(opt.reduction(), reduction);
        let slopes = [1., 5., 6.];
        opt.backward_step_over(3, |i| (w.as_tensor() * slopes[i])?.sum_all())?;
        assert!((values(&w)?[0] - expected).abs() < 1e-5, "{reduction:?}: {:?}", values(&w)?);
    }
    Ok(())
}

/// Ranks that reduce differently are told.
#[test]
fn ranks_agree() {
    thread::scope(|scope| {
        for rank in Threads::new(2) {
            scope.spawn(|| {
                let (mut opt, w) = build(&ParamsSrkl::sgd(0.1), DType::F32, Some(rank)).unwrap();
                if opt.rank() == 1 {
                    opt.set_reduction(Reduction::Sum).unwrap();
                }
                let step = opt.step(&grads([(&w, w.ones_like().unwrap())]));
                assert_error(step, &["the reduction", "Mean", "Sum"]);
            });
        }
    });
}

/// A parameter without a gradient in some micro-batch counts as 0 there, of any dtype beside it.
#[test]
fn missing_gradients_count_as_zero() -> Result<()> {
    for (reduction, divisor) in [(Reduction::Mean, 3.), (Reduction::Sum, 1.)] {
        let (a, b) = (var(&[1., 2.], DType::F32)?, var(&[5.], DType::F32)?);
        let named = [("a".to_string(), a.clone()), ("b".to_string(), b.clone())];
        let mut opt = Srkl::builder().default_group(ParamsSrkl::sgd(0.5)).build(named)?;
        opt.set_reduction(reduction)?;
        opt.accumulate(&grads([(&a, tensor(&[3., 6.], DType::F32)?)]))?;
        opt.accumulate(&grads([(&b, tensor(&[12.], DType::BF16)?)]))?;
        let both = [(&a, tensor(&[0.375, 0.], DType::F64)?), (&b, tensor(&[3.], DType::F16)?)];
        opt.accumulate(&grads(both))?;
        opt.step_accumulated()?;
        let expected = |w: f64, sum: f64| w - 0.5 * sum / divisor;
        let found = [values(&a)?, values(&b)?].concat();
        let all = [expected(1., 3.375), expected(2., 6.), expected(5., 15.)];
        found.iter().zip(all).for_each(|(found, expected)| assert_close(*found, expected, 1e-6));
    }
    Ok(())
}

/// Sums belong to parameters, in whatever order a checkpoint brings these, and stay where it does not forget them.
#[test]
fn a_partial_load_keeps_sums_apart() -> Result<()> {
    let (a, b) = (var(&[1., 2.], DType::F32)?, var(&[5., 6.], DType::F32)?);
    let named = [("a".to_string(), a.clone()), ("b".to_string(), b.clone())];
    let build = |named| Srkl::builder().default_group(ParamsSrkl::sgd(1.)).build(named);
    let state = build(named.clone())?.state()?;
    let [first, second] = named;
    let mut opt = build([second, first])?;
    let add = |opt: &mut Srkl| {
        let both = [(&a, tensor(&[1., 1.], DType::F32)?), (&b, tensor(&[3., 3.], DType::F32)?)];
        opt.accumulate(&grads(both))
    };
    add(&mut opt)?;
    opt.load_state(&state)?;
    assert_eq!(opt.accumulated(), 0);
    add(&mut opt)?;
    let report = opt.load_state_matching(&state)?;
    assert_eq!((report.taken.len(), opt.accumulated()), (2, 1));
    opt.step_accumulated()?;
    assert_eq!((values(&a)?, values(&b)?), (vec![0., 1.], vec![2., 3.]));
    Ok(())
}
