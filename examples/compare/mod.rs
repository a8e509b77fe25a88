//! One task trained by the crate's presets and by candle's AdamW, each for the same number of gradients,
//! and a table of how they did.

mod table;
mod weights;

use std::env;
use std::num::NonZeroU64;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow};
use candle_core::{D, DType, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use candle_srkl::{ParamsSrkl, Srkl, random};
use clap::Args;
use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};

pub use weights::draw_weights;

/// The presets in the comparison, each at its defaults.
const PRESETS: &[Preset] = &[
    ("braked_adam", ParamsSrkl::braked_adam),
    ("braked_adam_averaged", ParamsSrkl::braked_adam_averaged),
    ("braked_muon", ParamsSrkl::braked_muon),
    ("braked_muon_averaged", ParamsSrkl::braked_muon_averaged),
];

type Preset = (&'static str, fn() -> ParamsSrkl);

const ADAMW: &str = "adamw";

/// AdamW is shown at its default of 1e-3, and at the best of these.
const ADAMW_RATES: [f64; 4] = [1e-3, 3e-3, 1e-2, 3e-2];

const THREADS: &str = "RAYON_NUM_THREADS";

#[derive(Args)]
pub struct Options {
    /// Seeds of each optimizer, from 0 on
    #[arg(long, default_value = "3")]
    seeds: NonZeroU64,
    /// Gradients of each training
    #[arg(long, default_value = "600")]
    budget: NonZeroU64,
    /// Which optimizers, with commas between [default: all]
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(names()),
          hide_default_value = true, default_values_t = names().map(String::from))]
    optimizers: Vec<String>,
}

fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name).chain([ADAMW])
}

/// A training under way.
pub trait Task {
    /// The parameters.
    fn varmap(&self) -> &VarMap;

    /// Goes on to the next batch. Not a part of `loss`: a step may compute the loss of a batch twice.
    fn draw(&mut self) -> Result<()>;

    /// Of the present batch.
    fn loss(&self) -> Result<Tensor>;

    /// Called once the parameters hold their averages, before `score`.
    fn averaged(&self) -> Result<()> {
        Ok(())
    }

    /// On held-out data.
    fn score(&self) -> Result<f64>;
}

/// What a score is.
#[derive(Clone, Copy)]
pub enum Score {
    /// A share, the higher the better.
    Accuracy,
    /// A cross entropy, the lower the better.
    Nats,
}

/// The share of rows whose highest score is that of the class.
pub fn accuracy(scores: &Tensor, classes: &Tensor) -> Result<f64> {
    let right = scores.argmax(D::Minus1)?.eq(classes)?;
    Ok(right.to_dtype(DType::F64)?.mean_all()?.to_scalar()?)
}

/// An optimizer at a learning rate.
struct Candidate {
    name: &'static str,
    lr: f64,
    /// `None` for AdamW.
    preset: Option<ParamsSrkl>,
}

/// What has come of a training.
struct Run {
    /// Which of the candidates trained.
    candidate: usize,
    /// NaN if a loss was not finite.
    score: f64,
    gradients: u64,
    seconds: f64,
}

enum AnyOptimizer {
    Srkl(Box<Srkl>),
    AdamW(AdamW),
}

/// One thread for each training, for candle and for the optimizer: on small tensors that is the fastest, and
/// changes no result. To call first of all.
pub fn one_thread_each() {
    if env::var_os(THREADS).is_none() {
        // SAFETY: there are no other threads yet that could read the environment.
        unsafe { env::set_var(THREADS, "1") };
    }
}

/// Trains what `begin` makes of a seed by every optimizer, and prints the table.
pub fn run<T: Task>(
    options: &Options,
    score: Score,
    begin: impl Fn(u64) -> Result<T> + Sync,
) -> Result<()> {
    let candidates = options.candidates();
    let of_candidate = |i| (0..options.seeds.get()).map(move |seed| (i, seed));
    let jobs: Vec<(usize, u64)> = (0..candidates.len()).flat_map(of_candidate).collect();
    let style = "[{bar:40}] {pos}/{len} trainings, {elapsed}";
    let bar = ProgressBar::new(jobs.len() as u64)
        .with_style(ProgressStyle::with_template(style)?.progress_chars("=> "));

    // Trainings are small: several at a time, on a thread each, are the fastest.
    let next = AtomicUsize::new(0);
    let runs = Mutex::new(vec![]);
    let worker = || -> Result<()> {
        while let Some(&(i, seed)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let run = train(begin(seed)?, i, &candidates[i], seed, options.budget.get())?;
            runs.lock().map_err(|_| anyhow!("another thread panicked"))?.push(run);
            bar.inc(1);
        }
        Ok(())
    };
    let threads = thread::available_parallelism()?.get();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(_) => Err(anyhow!("a training panicked")),
        })
    })?;
    bar.finish_and_clear();
    let runs = runs.into_inner().map_err(|_| anyhow!("a training panicked"))?;
    table::print(&candidates, &runs, score);
    Ok(())
}

impl Options {
    fn candidates(&self) -> Vec<Candidate> {
        let chosen = |name: &str| self.optimizers.iter().any(|chosen| chosen == name);
        let mut candidates = vec![];
        for &(name, preset) in PRESETS.iter().filter(|(name, _)| chosen(name)) {
            let preset = preset();
            candidates.push(Candidate { name, lr: preset.lr, preset: Some(preset) });
        }
        if chosen(ADAMW) {
            let candidate = |lr| Candidate { name: ADAMW, lr, preset: None };
            candidates.extend(ADAMW_RATES.map(candidate));
        }
        candidates
    }
}

/// Trains until the budget can't pay for another step, or a loss is not finite.
fn train<T: Task>(
    mut task: T,
    number: usize,
    candidate: &Candidate,
    seed: u64,
    budget: u64,
) -> Result<Run> {
    let mut optimizer = candidate.optimizer(task.varmap())?;
    let (mut gradients, mut step, mut finite) = (0, 0, true);
    let start = Instant::now();
    while finite && gradients + optimizer.next_cost() <= budget {
        gradients += optimizer.next_cost();
        task.draw()?;
        // Dropout draws by this seed, whichever the optimizer and the thread.
        let loss = random::with_seed(seed << 32 | step, || optimizer.step(|| task.loss()))?;
        finite = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?.is_finite();
        step += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    let score = if finite { optimizer.score(&task)? } else { f64::NAN };
    Ok(Run { candidate: number, score, gradients, seconds })
}

impl Candidate {
    fn optimizer(&self, varmap: &VarMap) -> Result<AnyOptimizer> {
        if let Some(preset) = &self.preset {
            return Ok(AnyOptimizer::Srkl(Box::new(Srkl::from_varmap(varmap, preset.clone())?)));
        }
        // No decay, as the presets have none.
        let params = ParamsAdamW { lr: self.lr, weight_decay: 0., ..ParamsAdamW::default() };
        Ok(AnyOptimizer::AdamW(AdamW::new(varmap.all_vars(), params)?))
    }
}

impl AnyOptimizer {
    /// How many gradients the next step takes.
    fn next_cost(&self) -> u64 {
        match self {
            Self::Srkl(srkl) if srkl.measuring() => 2,
            _ => 1,
        }
    }

    /// One step; returns the loss before it.
    fn step(&mut self, loss: impl Fn() -> Result<Tensor>) -> Result<Tensor> {
        match self {
            Self::Srkl(srkl) => srkl.backward_step_with(loss),
            Self::AdamW(adamw) => {
                let loss = loss()?;
                adamw.backward_step(&loss)?;
                Ok(loss)
            }
        }
    }

    /// Of averaged weights, if the preset keeps them.
    fn score(&mut self, task: &impl Task) -> Result<f64> {
        match self {
            Self::Srkl(srkl) if srkl.averages() => {
                let _averaged = srkl.swap_averaged()?;
                task.averaged()?;
                task.score()
            }
            _ => task.score(),
        }
    }
}
