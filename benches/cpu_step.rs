//! Times one optimizer step on the CPU against candle's optimizers and a plain loop.
//!
//! ```sh
//! cargo bench --bench cpu_step                  # all lists, some minutes
//! cargo bench --bench cpu_step -- 16M           # those whose name has "16M" in it
//! RAYON_NUM_THREADS=1 cargo bench --bench cpu_step
//! ```
//!
//! Criterion measures; the table at the end sets the medians of one run in proportion. Its
//! bandwidth counts the bytes that a step cannot avoid moving:
//!
//! | step | bytes a parameter |
//! |---|---|
//! | reference rule, f32 | 12: read w and g, write w; 16 where g is read twice from memory |
//! | reference rule, bf16 with f32 master | 12: read g, read and write master, write w; 14 likewise |
//! | AdamW, f32, `Compact` | 16: read w, g and 2 of moments, write w and 2 |
//! | AdamW, bf16, `Compact` and `Split` | 14: read w, g, 2 of masters and 2 of moments, write all but g |
//! | braked Adam, f32, a step that doesn't measure | 28: read w, g, m, v, write w, m, v; 32 where g is read twice |
//! | kinetic, f32, likewise | 36: g; g, m, w for the trust clip; read w, g, m, write w, m |
//! | Muon, f32 | 44: read g, m, write X; read and write X for its norm; read g, m, X, w, write m, w; and what its products take |
//! | plain loop, f32 | 12: read, read, write |
//! | reading loop, f32 | 4 |
//!
//! "measuring" is a step that measures, with `observe`, but without the model's second backward pass.
//!
//! `benches/peers/torch_step.py` times PyTorch's fused optimizers on the same lists.

mod lists;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::Device;
use candle_core::backprop::GradStore;
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD};
use candle_srkl::{Measure, NonFinite, ParamsSrkl, Srkl};
use criterion::{BenchmarkId, Criterion};
use lists::{List, packed};
use rayon::prelude::*;

/// Seconds a step, by list and contender, one entry a sample.
type Times = RefCell<BTreeMap<(&'static str, &'static str), Vec<f64>>>;

struct Bench<'a> {
    criterion: &'a mut Criterion,
    times: &'a Times,
}

impl Bench<'_> {
    fn run(&mut self, list: &List, contender: &'static str, mut step: impl FnMut()) {
        let mut group = self.criterion.benchmark_group(list.name);
        group.sample_size(10);
        group.bench_function(BenchmarkId::from_parameter(contender), |bencher| {
            bencher.iter_custom(|iterations| {
                let start = Instant::now();
                for _ in 0..iterations {
                    step();
                }
                let elapsed = start.elapsed();
                let sample = elapsed.as_secs_f64() / iterations as f64;
                let mut times = self.times.borrow_mut();
                times.entry((list.name, contender)).or_default().push(sample);
                elapsed
            })
        });
        group.finish();
    }

    /// Reads and writes what a step of gradient descent must, with nothing else to do.
    fn plain_loop(&mut self, list: &List, contender: &'static str, threads: usize) {
        self.bare_loop(list, contender, threads, |w, g| {
            for (w, g) in w.iter_mut().zip(g) {
                *w -= 1e-3 * g;
            }
        });
    }

    /// Reads the gradients, as a second reading must.
    fn reading_loop(&mut self, list: &List) {
        self.bare_loop(list, READING_2, 2, |_, g| {
            black_box(g.iter().fold(true, |finite, g| finite & g.is_finite()));
        });
    }

    fn bare_loop(
        &mut self,
        list: &List,
        contender: &'static str,
        threads: usize,
        body: impl Fn(&mut [f32], &[f32]) + Sync,
    ) {
        const PIECE: usize = 1 << 17;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let lengths = list.shapes.iter().map(|shape| shape.iter().product());
        let mut pairs: Vec<(Vec<f32>, Vec<f32>)> =
            lengths.map(|n: usize| (vec![1f32; n], vec![1e-3f32; n])).collect();
        self.run(list, contender, || {
            pool.install(|| {
                pairs
                    .par_iter_mut()
                    .with_min_len(if list.shapes.len() > 1000 { 512 } else { 1 })
                    .for_each(|(w, g)| {
                        if w.len() <= PIECE {
                            body(w, g);
                        } else {
                            let pieces = w.par_chunks_mut(PIECE).zip(g.par_chunks(PIECE));
                            pieces.for_each(|(w, g)| body(w, g));
                        }
                    });
            });
            black_box(&mut pairs);
        });
    }
}

/// A contender, and the bytes a parameter that its step can't avoid moving, in f32: without and with second
/// readings of a gradient that is larger than the caches.
type Contender = (&'static str, usize, usize);

const CONTENDERS: [Contender; 16] = [
    (SRKL, 12, 16),
    (SRKL_SKIP_BLOCK, 12, 16),
    (BRAKED, 28, 32),
    (BRAKED_PROPAGATE, 28, 28),
    (BRAKED_COMPACT, 16, 20),
    (BRAKED_MEASURING, 28, 44),
    (KINETIC, 20, 36),
    (SGD_PROPAGATE, 12, 12),
    (ADAMW_PROPAGATE, 28, 28),
    (ADAMW_COMPACT, 16, 16),
    (MUON_PROPAGATE, 44, 44),
    (CANDLE_SGD, 12, 12),
    (CANDLE_ADAMW, 28, 28),
    (PLAIN_1, 12, 12),
    (PLAIN_2, 12, 12),
    (READING_2, 4, 4),
];

const SRKL: &str = "srkl reference";
const SRKL_SKIP_BLOCK: &str = "srkl reference, SkipBlock";
const BRAKED: &str = "srkl braked Adam";
const BRAKED_PROPAGATE: &str = "srkl braked Adam, Propagate";
const BRAKED_COMPACT: &str = "srkl braked Adam, Compact and Split";
const BRAKED_MEASURING: &str = "srkl braked Adam, measuring";
const KINETIC: &str = "srkl kinetic";
const SGD_PROPAGATE: &str = "srkl SGD, Propagate";
const ADAMW_PROPAGATE: &str = "srkl AdamW, Propagate";
const ADAMW_COMPACT: &str = "srkl AdamW, Compact and Split, Propagate";
const MUON_PROPAGATE: &str = "srkl Muon, Propagate";
const CANDLE_SGD: &str = "candle SGD";
const CANDLE_ADAMW: &str = "candle AdamW";
const PLAIN_1: &str = "plain loop, 1 thread";
const PLAIN_2: &str = "plain loop, 2 threads";
const READING_2: &str = "reading loop, 2 threads";

/// Measures once, at the first step, or at every step.
fn measured(params: ParamsSrkl, every: u64) -> ParamsSrkl {
    let measure = Measure { every, first: 1, ..Measure::default() };
    ParamsSrkl { measure, ..params }
}

fn main() -> anyhow::Result<()> {
    let times = Times::default();
    let mut criterion = Criterion::default()
        .without_plots()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let mut bench = Bench { criterion: &mut criterion, times: &times };
    for list in List::all() {
        let (vars, grads) = list.tensors(&Device::Cpu)?;
        // Second gradients, of a measurement.
        let mut others = GradStore::default();
        for var in &vars {
            others.insert(var, var.affine(0.1, 0.)?);
        }
        let mut srkl = Srkl::new(vars.clone(), ParamsSrkl::reference())?;
        bench.run(&list, SRKL, || srkl.step(&grads).unwrap());
        drop(srkl);
        let skip_block = ParamsSrkl { nonfinite: NonFinite::SkipBlock, ..ParamsSrkl::reference() };
        let mut srkl = Srkl::new(vars.clone(), skip_block)?;
        bench.run(&list, SRKL_SKIP_BLOCK, || srkl.step(&grads).unwrap());
        drop(srkl);
        for (contender, params) in [
            (BRAKED, ParamsSrkl::braked_adam()),
            (
                BRAKED_PROPAGATE,
                ParamsSrkl { nonfinite: NonFinite::Propagate, ..ParamsSrkl::braked_adam() },
            ),
            (BRAKED_COMPACT, packed(ParamsSrkl::braked_adam())),
            (KINETIC, ParamsSrkl::kinetic()),
        ] {
            let mut srkl = Srkl::new(vars.clone(), measured(params, u64::MAX))?;
            srkl.step(&grads)?;
            srkl.observe(&others)?;
            bench.run(&list, contender, || srkl.step(&grads).unwrap());
        }
        for (contender, params) in [
            (SGD_PROPAGATE, ParamsSrkl::sgd(1e-3)),
            (ADAMW_PROPAGATE, ParamsSrkl::adamw(1e-3)),
            (ADAMW_COMPACT, packed(ParamsSrkl::adamw(1e-3))),
        ] {
            let params = ParamsSrkl { nonfinite: NonFinite::Propagate, ..params };
            let mut srkl = Srkl::new(vars.clone(), params)?;
            bench.run(&list, contender, || srkl.step(&grads).unwrap());
        }
        // Seconds a step on the larger lists: its products are many times the work of a step of others.
        if list.name.contains("layers") {
            let params = ParamsSrkl { nonfinite: NonFinite::Propagate, ..ParamsSrkl::muon(1e-3) };
            let mut srkl = Srkl::new(vars.clone(), params)?;
            bench.run(&list, MUON_PROPAGATE, || srkl.step(&grads).unwrap());
        }
        let mut srkl = Srkl::new(vars.clone(), measured(ParamsSrkl::braked_adam(), 1))?;
        bench.run(&list, BRAKED_MEASURING, || {
            srkl.step(&grads).unwrap();
            srkl.observe(&others).unwrap();
        });
        drop(srkl);
        bench.plain_loop(&list, PLAIN_1, 1);
        bench.plain_loop(&list, PLAIN_2, 2);
        bench.reading_loop(&list);
        let mut sgd = SGD::new(vars.clone(), 1e-3)?;
        bench.run(&list, CANDLE_SGD, || sgd.step(&grads).unwrap());
        let mut adamw = AdamW::new(vars, ParamsAdamW::default())?;
        bench.run(&list, CANDLE_ADAMW, || adamw.step(&grads).unwrap());
    }
    criterion.final_summary();
    print_table(&times.borrow());
    Ok(())
}

fn print_table(times: &BTreeMap<(&'static str, &'static str), Vec<f64>>) {
    let median = |list: &List, contender| {
        let mut samples = times.get(&(list.name, contender))?.clone();
        samples.sort_by(f64::total_cmp);
        Some(samples[samples.len() / 2])
    };
    println!(
        "\n| list | step | ms | candle SGD / this | candle AdamW / this | bytes | GB/s \
         | GB/s with second readings |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for list in List::all() {
        for (contender, bytes, twice) in CONTENDERS {
            let Some(seconds) = median(&list, contender) else {
                continue;
            };
            let ratio = |peer| match median(&list, peer) {
                Some(peer) => format!("{:.1}", peer / seconds),
                None => "-".to_string(),
            };
            let bandwidth = |bytes: usize| (bytes * list.parameters()) as f64 / seconds / 1e9;
            println!(
                "| {} | {contender} | {:.3} | {} | {} | {bytes} | {:.1} | {:.1} |",
                list.name,
                seconds * 1e3,
                ratio(CANDLE_SGD),
                ratio(CANDLE_ADAMW),
                bandwidth(bytes),
                bandwidth(twice),
            );
        }
    }
}
