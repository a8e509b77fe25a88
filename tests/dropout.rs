//! Dropout and its seeds: against the documented formula written naively, on the CPU.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use approx::abs_diff_eq;
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_srkl::Dropout;
use candle_srkl::random::{current_seed, with_seed};
use half::{bf16, f16};
use proptest::prelude::*;

use common::*;

// -- The formula, from the documentation --

fn mix(x: u64) -> u64 {
    let mut x = x.wrapping_add(0x9e3779b97f4a7c15);
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d049bb133111eb);
    x ^= x >> 31;
    x
}

/// The 32 random bits of element `i`.
fn random(seed: u64, draw: u64, i: u64) -> u64 {
    let stream = 0x64726f706f757400; // "dropout\0"
    let word = mix(mix(mix(mix(seed) ^ draw) ^ stream) ^ (i / 2));
    (word >> (32 * (i % 2))) & 0xffff_ffff
}

/// Whether each of the first `n` elements is kept.
fn mask(seed: u64, draw: u64, p: f32, n: usize) -> Vec<bool> {
    let threshold = (p as f64 * 4294967296.).floor() as u64;
    (0..n as u64).map(|i| random(seed, draw, i) >= threshold).collect()
}

/// The bits of the output, by the arithmetic of the `half` crate.
fn naive(xs: &Tensor, kept: &[bool], p: f32) -> Result<Vec<u64>> {
    let scale = 1. / (1. - p as f64);
    let y = |x: f64| match xs.dtype() {
        DType::F64 if x.is_nan() => f64::NAN.to_bits(),
        DType::F64 => (x * scale).to_bits(),
        dtype => {
            let y = x as f32 * scale as f32;
            match dtype {
                DType::F32 if y.is_nan() => 0x7fc00000,
                DType::F32 => y.to_bits() as u64,
                DType::BF16 if y.is_nan() => 0x7fc0,
                DType::BF16 => bf16::from_f32(y).to_bits() as u64,
                _ if y.is_nan() => 0x7e00,
                _ => f16::from_f32(y).to_bits() as u64,
            }
        }
    };
    let each = values(xs)?.into_iter().zip(kept);
    Ok(each.map(|(x, &kept)| if kept { y(x) } else { 0 }).collect())
}

/// Which of 1 are kept of a call.
fn kept(dropout: &Dropout, n: usize) -> Result<Vec<bool>> {
    let y = dropout.forward(&Tensor::ones(n, DType::F32, &Device::Cpu)?, true)?;
    Ok(y.to_vec1::<f32>()?.into_iter().map(|y| y != 0.).collect())
}

fn assert_naive(xs: &Tensor, seed: u64, p: f32) -> Result<()> {
    let y = with_seed(seed, || Dropout::new(p).forward(xs, true))?;
    assert_eq!((y.dims(), y.dtype()), (xs.dims(), xs.dtype()));
    let expected = naive(xs, &mask(seed, 0, p, xs.elem_count()), p)?;
    assert!(bits(&y)? == expected, "{:?} {:?} {p} {seed}", xs.dtype(), xs.layout());
    Ok(())
}

// -- What is computed --

#[test]
fn every_size_and_dtype_as_the_formula_says() -> Result<()> {
    for dtype in FLOATS {
        for n in SIZES {
            // Subnormals of f16 too, what overflows, and a NaN of another sign and payload.
            let scale = if n % 2 == 0 { 1. } else { 1e-6 };
            let mut xs = noise(n, scale, n as u64);
            let nan = f64::from_bits(0xfffc_0000_0000_0001);
            for (i, x) in xs.iter_mut().enumerate() {
                *x = [*x, *x, *x, -0., nan, f64::INFINITY, 65504., -1e39][i % 31 % 8];
            }
            let xs = tensor(&xs, dtype)?;
            for p in [0.1, 0.5, 0.875, 1e-30, f32::from_bits(0x3f7f_ffff)] {
                assert_naive(&xs, n as u64, p)?;
            }
        }
    }
    Ok(())
}

#[test]
fn any_layout_goes_by_logical_elements() -> Result<()> {
    for dtype in FLOATS {
        let long = tensor(&noise(210_011, 1., 1), dtype)?;
        let matrix = long.narrow(0, 0, 210_000)?.reshape((300, 700))?;
        for xs in [
            // Misaligned, by every number of elements up to 8.
            (1..9).map(|at| long.narrow(0, at, 4099)).collect::<Result<Vec<_>>>()?,
            vec![
                long.narrow(0, 3, 200_001)?,
                matrix.t()?,
                matrix.narrow(1, 13, 101)?,
                matrix.narrow(0, 5, 1)?.broadcast_as((11, 700))?,
                long.narrow(0, 7, 1)?.squeeze(0)?,
                long.narrow(0, 7, 0)?,
            ],
        ]
        .concat()
        {
            assert_naive(&xs, 3, 0.3)?;
        }
    }
    Ok(())
}

/// The bits of an element that is just kept: an f32 has room for 24 of them.
#[test]
fn an_element_at_the_threshold_is_kept() -> Result<()> {
    let found = (0..10_000).filter(|i| random(1, 0, *i) & 0xff == 0);
    let mut count = 0;
    for i in found {
        let p = random(1, 0, i) as f32 / 2f32.powi(32);
        let next = f32::from_bits(p.to_bits() + 1);
        let kept = |p: f32| {
            Ok::<_, candle_core::Error>(
                with_seed(1, || kept(&Dropout::new(p), 10_000))?[i as usize],
            )
        };
        assert!(kept(p)? && !kept(next)?, "{i}");
        count += 1;
    }
    assert!(count > 20);
    Ok(())
}

proptest! {
    #[test]
    fn any_seed_size_and_probability(
        seed in any::<u64>(),
        n in 0usize..3000,
        from in 0usize..20,
        p in prop_oneof![0f32..1., (0u32..0x3f80_0000).prop_map(f32::from_bits)],
        dtype in prop::sample::select(FLOATS.to_vec()),
    ) {
        prop_assume!(p > 0.);
        let xs = tensor(&noise(n + from, 1., seed), dtype).unwrap();
        assert_naive(&xs.narrow(0, from, n).unwrap(), seed, p).unwrap();
    }
}

/// 64 elements of a mask as a word, the first one lowest.
fn word(kept: Vec<bool>) -> u64 {
    kept.into_iter().rev().fold(0, |word, kept| word << 1 | kept as u64)
}

/// A change of these is a change of bits, for the changelog. They were made from the formula in Python's integers.
#[test]
fn value_stability_of_masks() -> Result<()> {
    let words = |seed: u64, p: f32| -> Result<[u64; 3]> {
        let dropout = Dropout::new(p);
        let next = || kept(&dropout, 64).map(word);
        with_seed(seed, || Ok([next()?, next()?, next()?]))
    };
    assert_eq!(
        words(0, 0.5)?,
        [0x6ed4_3e9d_82e6_c01f, 0xb6f2_ab3d_3143_ce56, 0x41d2_6198_6dcb_bcc6]
    );
    assert_eq!(
        words(42, 0.1)?,
        [0x5dff_ffff_fefd_fbbf, 0xb77f_fff9_fffd_fbff, 0xfb7f_fdf7_fbf7_ff7e]
    );
    assert_eq!(
        words(u64::MAX, 0.9)?,
        [0x4042_0400_8840_4000, 0x0002_1006_0000_0140, 0x0000_0d10_010d_0020]
    );
    Ok(())
}

/// By the same formula in Python's integers and doubles.
#[test]
fn value_stability_of_values() -> Result<()> {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    let xs = [1., -2.5, inf, -0., -7., nan, nan, -3., 0.1, 3e4, 6e-8, -1e-3, 5e4, -inf, 0.2, 0.3];
    let y = |dtype| bits(&with_seed(9, || Dropout::new(0.3).forward(&tensor(&xs, dtype)?, true))?);
    assert_eq!(
        y(DType::F32)?,
        [
            0x3fb6_db6e,
            0xc064_924a,
            0,
            0x8000_0000,
            0,
            0x7fc0_0000,
            0,
            0,
            0,
            0x4727_6925,
            0x33b8_11ed,
            0xbabb_3ee8,
            0x478b_8249,
            0xff80_0000,
            0x3e92_4925,
            0x3edb_6db8
        ]
    );
    assert_eq!(
        y(DType::F64)?,
        [
            0x3ff6_db6d_bd63_43ed,
            0xc00c_9249_2cbc_14e8,
            0,
            0x8000_0000_0000_0000,
            0,
            0x7ff8_0000_0000_0000,
            0,
            0,
            0,
            0x40e4_ed24_9843_c150,
            0x3e77_023d_afc6_f102,
            0xbf57_67dc_eae4_9fab,
            0x40f1_7049_298d_cbc3,
            0xfff0_0000_0000_0000,
            0x3fd2_4924_9782_9cbe,
            0x3fdb_6db6_e343_eb1c
        ]
    );
    assert_eq!(
        y(DType::BF16)?,
        [
            0x3fb7, 0xc065, 0, 0x8000, 0, 0x7fc0, 0, 0, 0, 0x4727, 0x33b8, 0xbabb, 0x478b, 0xff80,
            0x3e92, 0x3edc
        ]
    );
    assert_eq!(
        y(DType::F16)?,
        [
            0x3db7, 0xc325, 0, 0x8000, 0, 0x7e00, 0, 0, 0, 0x793b, 0x1, 0x95db, 0x7c00, 0xfc00,
            0x3492, 0x36dc
        ]
    );
    Ok(())
}

#[test]
fn the_gradient_goes_through_the_same_mask() -> Result<()> {
    for dtype in FLOATS {
        for n in [1, 2, CHUNK / 2 + 1, PIECE + 1] {
            let w = Var::from_tensor(&noisy_matrix((n, 3), 1., 5, dtype)?)?;
            let (p, seed) = (0.4, n as u64);
            let mask = mask(seed, 0, p, 3 * n);
            let gradient =
                |loss: Tensor| -> Result<Tensor> { Ok(loss.backward()?.get(&w).unwrap().clone()) };
            // Through a transposition, when other masks have been drawn.
            let factor = noisy_matrix((3, n), 1., 6, dtype)?;
            let loss = with_seed(seed, || {
                let y = Dropout::new(p).forward(&w, true)?;
                kept(&Dropout::new(p), 3)?;
                (y.t()? * &factor)?.sum_all()
            })?;
            assert_eq!(bits(&gradient(loss)?)?, naive(&factor.t()?, &mask, p)?);
            // Of a sum it is the mask, scaled.
            let y = with_seed(seed, || Dropout::new(p).forward(&w, true))?;
            let sum = gradient(y.sum_all()?)?;
            assert_eq!(bits(&sum)?, naive(&w.ones_like()?, &mask, p)?);
        }
    }
    Ok(())
}

// -- Chance --

#[test]
fn the_share_that_is_kept() -> Result<()> {
    let n = 1 << 20;
    for (seed, p) in [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99].into_iter().enumerate() {
        let count =
            with_seed(seed as u64, || kept(&Dropout::new(p), n))?.into_iter().filter(|k| *k);
        let (share, p) = (count.count() as f64 / n as f64, p as f64);
        let error = (p * (1. - p) / n as f64).sqrt();
        assert!(abs_diff_eq!(share, 1. - p, epsilon = 5. * error), "{p}: {share}");
    }
    Ok(())
}

/// The correlation of two lists of the same share.
fn correlation(a: &[bool], b: &[bool], p: f64) -> f64 {
    let centred = |kept: &bool| *kept as u64 as f64 - (1. - p);
    let sum: f64 = a.iter().zip(b).map(|(a, b)| centred(a) * centred(b)).sum();
    sum / (a.len().min(b.len()) as f64 * p * (1. - p))
}

/// Neighbours of every kind have nothing to do with each other: seeds, draws, elements.
#[test]
fn masks_are_independent() -> Result<()> {
    let n = 1 << 18;
    for p in [0.1, 0.5] {
        let dropout = Dropout::new(p);
        let masks = |seed| with_seed(seed, || (0..4).map(|_| kept(&dropout, n)).collect());
        let all: Vec<Vec<bool>> =
            [0, 1, 2, 1 << 32].into_iter().map(masks).collect::<Result<Vec<Vec<_>>>>()?.concat();
        let limit = 5. / (n as f64).sqrt();
        for (i, a) in all.iter().enumerate() {
            for b in &all[..i] {
                assert_ne!(a, b);
                let same = correlation(a, b, p as f64);
                assert!(abs_diff_eq!(same, 0., epsilon = limit), "{p} {i}: {same}");
            }
            for distance in [1, 2, 3, 64, 1024, 4096] {
                let same = correlation(&a[distance..], a, p as f64);
                assert!(
                    abs_diff_eq!(same, 0., epsilon = limit),
                    "{p} {i}, elements {distance} apart: {same}"
                );
            }
        }
    }
    Ok(())
}

// -- Which mask --

/// Two layers of two models, twice: what `backward_step_with` does.
#[test]
fn the_same_code_draws_the_same_masks_again() -> Result<()> {
    let (a, b) = (Dropout::new(0.5), Dropout::new(0.5));
    let run = || -> Result<Vec<u64>> {
        [&a, &b, &a, &b.clone()].into_iter().map(|d| Ok(word(kept(d, 64)?))).collect()
    };
    let first = with_seed(8, run)?;
    assert_eq!(with_seed(8, run)?, first);
    let expected: Vec<u64> = (0..4).map(|draw| word(mask(8, draw, 0.5, 64))).collect();
    assert_eq!(first, expected);
    let other = with_seed(9, run)?;
    assert!(first.iter().all(|mask| !other.contains(mask)));
    Ok(())
}

#[test]
fn nested_seeds_have_their_own_numbers() -> Result<()> {
    let dropout = Dropout::new(0.5);
    let next = || word(kept(&dropout, 64).unwrap());
    let nth = |seed, draw| word(mask(seed, draw, 0.5, 64));
    assert_eq!(current_seed(), None);
    with_seed(1, || {
        assert_eq!((current_seed(), next()), (Some(1), nth(1, 0)));
        with_seed(2, || {
            assert_eq!((current_seed(), next()), (Some(2), nth(2, 0)));
            with_seed(1, || assert_eq!((current_seed(), next()), (Some(1), nth(1, 0))));
            assert_eq!((current_seed(), next()), (Some(2), nth(2, 1)));
        });
        assert_eq!((current_seed(), next()), (Some(1), nth(1, 1)));
        // An error is a value like another.
        let failed: Result<()> = with_seed(3, || Err(candle_core::Error::msg("no batch")));
        assert!(failed.is_err());
        assert_eq!((current_seed(), next()), (Some(1), nth(1, 2)));
    });
    assert_eq!(current_seed(), None);
    Ok(())
}

#[test]
fn a_panic_inside_restores_the_seed() {
    let dropout = Dropout::new(0.5);
    let next = || word(kept(&dropout, 64).unwrap());
    with_seed(1, || {
        next();
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            with_seed(2, || {
                next();
                std::panic::resume_unwind(Box::new("a loss that panics"))
            })
        }));
        assert!(panicked.is_err());
        assert_eq!((current_seed(), next()), (Some(1), word(mask(1, 1, 0.5, 64))));
    });
    let panicked = catch_unwind(|| with_seed(2, || std::panic::resume_unwind(Box::new(""))));
    assert!(panicked.is_err() && current_seed().is_none());
}

/// Two trainings at once, draw by draw.
#[test]
fn threads_do_not_disturb_each_other() {
    let barrier = std::sync::Barrier::new(2);
    let train = |seed: u64, masks: &mut Vec<u64>| {
        let dropout = Dropout::new(0.5);
        with_seed(seed, || {
            for _ in 0..100 {
                barrier.wait();
                masks.push(word(kept(&dropout, 64).unwrap()));
            }
        })
    };
    let (mut here, mut there) = (vec![], vec![]);
    std::thread::scope(|scope| {
        scope.spawn(|| train(1, &mut here));
        train(2, &mut there);
    });
    let expected = |seed| (0..100).map(|draw| word(mask(seed, draw, 0.5, 64))).collect::<Vec<_>>();
    assert!(here == expected(1) && there == expected(2));
    // A thread that is started inside is not inside.
    with_seed(1, || {
        std::thread::scope(|scope| {
            assert_eq!(scope.spawn(current_seed).join().unwrap(), None);
        })
    });
}

/// Large tensors are shared out over candle's threads, from several threads at once.
#[test]
fn large_tensors_from_several_threads() {
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                let xs = tensor(&noise(LARGE, 1., seed), DType::F32).unwrap();
                (0..5).for_each(|_| assert_naive(&xs, seed, 0.2).unwrap());
            });
        }
    });
}

/// Without a seed no mask comes again, in any thread.
#[test]
fn without_a_seed_each_draw_is_new() -> Result<()> {
    let draw = || {
        let dropout = Dropout::new(0.5);
        (0..200).map(|_| word(kept(&dropout, 64).unwrap())).collect::<Vec<_>>()
    };
    let mut masks = draw();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(draw)).collect();
        threads.into_iter().for_each(|thread| masks.extend(thread.join().unwrap()));
    });
    masks.extend(draw());
    masks.sort();
    masks.dedup();
    assert_eq!(masks.len(), 1000);
    Ok(())
}

// -- What leaves alone, and what is refused --

#[test]
fn evaluation_and_zero_change_and_draw_nothing() -> Result<()> {
    let xs = tensor(&noise(100, 1., 1), DType::F32)?;
    with_seed(4, || {
        for (dropout, train) in [(Dropout::new(0.5), false), (Dropout::new(0.), true)] {
            let y = dropout.forward(&xs, train)?;
            assert_eq!((y.id(), bits(&y)?), (xs.id(), bits(&xs)?));
            assert_eq!(dropout.forward_t(&xs, train)?.id(), xs.id());
        }
        // Neither did those that are refused.
        assert!(Dropout::new(1.).forward(&xs, true).is_err());
        assert!(Dropout::new(0.5).forward(&xs.to_dtype(DType::U32)?, true).is_err());
        assert_eq!(kept(&Dropout::new(0.5), 64)?, mask(4, 0, 0.5, 64));
        Ok(())
    })
}

/// As the module of candle's trait.
#[test]
fn forward_t_is_forward() -> Result<()> {
    let xs = Tensor::ones(1000, DType::F32, &Device::Cpu)?;
    let module: &dyn ModuleT = &Dropout::new(0.5);
    let y = with_seed(1, || module.forward_t(&xs, true))?;
    assert_eq!(bits(&y)?, bits(&with_seed(1, || Dropout::new(0.5).forward(&xs, true))?)?);
    Ok(())
}

#[test]
fn what_is_no_probability_is_named() -> Result<()> {
    let xs = Tensor::ones(3, DType::F32, &Device::Cpu)?;
    for (p, told) in [(1., "1"), (-0.1, "-0.1"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        assert_error(Dropout::new(p).forward(&xs, true), &["dropout", "[0, 1)", told]);
        // As candle does it: in evaluation nobody asks.
        Dropout::new(p).forward(&xs, false)?;
    }
    Ok(())
}

#[test]
fn other_dtypes_are_named() -> Result<()> {
    for dtype in [DType::U8, DType::U32, DType::I64, DType::F8E4M3] {
        let xs = Tensor::zeros(3, dtype, &Device::Cpu)?;
        for p in [0., 0.5] {
            let name = format!("{dtype:?}");
            assert_error(Dropout::new(p).forward(&xs, true), &["f32, f64, bf16 or f16", &name]);
        }
    }
    Ok(())
}

/// A training with candle's own optimizer repeats itself, step by step wrapped, and is another one with
/// other seeds.
#[test]
fn a_training_repeats_itself() -> Result<()> {
    use candle_nn::{AdamW, Optimizer};
    let train = |seed: u64| -> Result<Vec<u64>> {
        let w = Var::from_tensor(&noisy_matrix((8, 8), 1., 1, DType::F32)?)?;
        let x = noisy_matrix((8, 8), 1., 2, DType::F32)?;
        let mut opt = AdamW::new_lr(vec![w.clone()], 0.01)?;
        let dropout = Dropout::new(0.3);
        for step in 0..5 {
            with_seed(seed + step, || {
                let hidden = dropout.forward(&x, true)?.matmul(&w)?.tanh()?;
                opt.backward_step(&dropout.forward(&hidden, true)?.sqr()?.sum_all()?)
            })?;
        }
        bits(&w)
    };
    assert_eq!(train(0)?, train(0)?);
    assert_ne!(train(0)?, train(100)?);
    Ok(())
}
