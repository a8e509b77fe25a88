//! How much does the learning rate matter? Trains six small tasks (and two larger ones, where asked)
//! by each of thirteen optimizers at learning rates over seven decades, and counts those that do well.
//!
//! ```sh
//! cargo run --release --example lr_study
//! cargo run --release --example lr_study -- --help
//! ```

mod average;
#[path = "../digits/data.rs"]
#[allow(dead_code, reason = "only the digits example has a validation part")]
mod data;
mod functions;
#[path = "../digits/model.rs"]
mod mlp;
mod networks;
mod optimizers;
#[allow(dead_code, reason = "only a test reads Prodigy's estimate")]
mod peers;
mod plot;
#[path = "../digits/random.rs"]
#[allow(dead_code, reason = "each example has streams of its own")]
mod random;
mod results;
mod run;
mod schedule;
mod table;
mod tasks;
#[path = "../char_lm/text.rs"]
#[allow(dead_code, reason = "only the char_lm example writes text")]
mod text;
#[path = "../char_lm/model.rs"]
mod transformer;

use std::env;
use std::fs;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use optimizers::{Rule, Variant};
use results::Results;
use run::Job;
use table::{Study, Summary};
use tasks::{GRID, Task};

const THREADS: &str = "RAYON_NUM_THREADS";

/// Trains small tasks by several optimizers at learning rates from 1e-4 to 1e3, each run with the
/// same number of gradients.
///
/// Finished runs are kept in the folder of --out, and a later start goes on from there: delete it to
/// begin anew. On the same machine the same options give the same scores.
#[derive(Parser)]
struct Options {
    /// Which tasks, with commas between [default: all but char-lm64 and char-lm128, which --full has]
    #[arg(long, value_enum, value_delimiter = ',')]
    tasks: Vec<Task>,
    /// Which optimizers, with commas between [default: all]
    #[arg(long, value_enum, value_delimiter = ',', hide_default_value = true,
          default_values_t = Rule::value_variants().to_vec())]
    optimizers: Vec<Rule>,
    /// Only these learning rates, with commas between, beside each optimizer's default [default: the task's grid;
    /// the tables then have others too that all these seeds were run at before]
    #[arg(long, value_name = "LRS", value_delimiter = ',', value_parser = of_grid)]
    lr: Vec<f64>,
    /// Seeds for each learning rate [default: 1 to 3, as the task says]
    #[arg(long)]
    seeds: Option<NonZeroU64>,
    /// The first of them
    #[arg(long, value_name = "SEED", default_value = "0")]
    first_seed: u64,
    /// Longer runs, two larger transformers and 3 seeds everywhere: hours instead of minutes
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    variant: Variant,
    /// How many runs at a time, on a thread each
    #[arg(long, default_value = "2")]
    threads: NonZeroUsize,
    /// Folder for runs.csv, curves, table.md and the pictures [default: out/lr_study]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    // Runs are small: one thread each, for candle and for the optimizer, is the fastest. What candle
    // and rayon make of this does not change any result.
    if env::var_os(THREADS).is_none() {
        // SAFETY: there are no other threads yet that could read the environment.
        unsafe { env::set_var(THREADS, "1") };
    }
    let mut options = Options::parse();
    if options.tasks.is_empty() {
        options.tasks = Task::value_variants().to_vec();
        options.tasks.retain(|task| options.full || task.is_short());
    }
    options.tasks.sort();
    options.tasks.dedup();
    options.optimizers.sort();
    options.optimizers.dedup();
    options.lr.sort_by(f64::total_cmp);
    options.lr.dedup();
    if options.variant.is_any() && options.out.is_none() {
        bail!("settings that are not the presets' need a folder of their own: give --out");
    }
    let out = options.out.clone().unwrap_or_else(|| PathBuf::from("out/lr_study"));
    let results = Results::open(&out).context("--out")?;
    options.claim(&out)?;
    let results = run_all(&options, results)?;
    report(&options, &out, &results)
}

impl Options {
    /// A folder is for one variant: its runs don't say of which they are.
    fn claim(&self, out: &Path) -> Result<()> {
        let (path, variant) = (out.join("variant.txt"), format!("{:?}\n", self.variant));
        match fs::read_to_string(&path) {
            Ok(other) if other != variant => {
                bail!("--out: {} has runs of other settings, {}", out.display(), other.trim())
            }
            Ok(_) => Ok(()),
            Err(_) => fs::write(&path, variant).with_context(|| path.display().to_string()),
        }
    }

    fn study(&self, task: Task) -> Study {
        let plan = task.plan(self.full);
        let seeds = self.seeds.map_or(plan.seeds, NonZeroU64::get);
        Study {
            task,
            full: self.full,
            rates: if self.lr.is_empty() { plan.grid() } else { self.lr.clone() },
            more_rates: self.lr.is_empty(),
            seeds: self.first_seed..self.first_seed + seeds,
        }
    }

    fn jobs(&self) -> Vec<Job> {
        let mut jobs = vec![];
        for &task in &self.tasks {
            let study = self.study(task);
            // Seed by seed, so that a time at which the machine is slow isn't all of one row.
            for seed in study.seeds.clone() {
                for &rule in &self.optimizers {
                    let mut rates = study.rates.clone();
                    if !rates.contains(&rule.default_lr()) {
                        rates.push(rule.default_lr());
                    }
                    jobs.extend(rates.into_iter().map(|lr| study.job(rule, lr, seed)));
                }
            }
        }
        jobs
    }
}

fn of_grid(text: &str) -> Result<f64> {
    let lr = text.parse()?;
    ensure!(GRID.contains(&lr), "expected one of {GRID:?}");
    Ok(lr)
}

/// Runs what is not among the results yet.
fn run_all(options: &Options, results: Results) -> Result<Results> {
    let jobs = options.jobs();
    let open: Vec<Job> = jobs.iter().copied().filter(|&job| results.find(job).is_none()).collect();
    let style = "[{bar:40}] {pos}/{len} runs, {elapsed}, {msg}";
    let bar = ProgressBar::new(jobs.len() as u64)
        .with_style(ProgressStyle::with_template(style)?.progress_chars("=> "))
        .with_position((jobs.len() - open.len()) as u64);
    let results = Mutex::new(results);
    let next = AtomicUsize::new(0);
    let worker = || -> Result<()> {
        while let Some(&job) = open.get(next.fetch_add(1, Ordering::Relaxed)) {
            bar.set_message(job.to_string());
            let (run, curve) = job.run(&options.variant).with_context(|| {
                // The other workers stop too.
                next.store(open.len(), Ordering::Relaxed);
                job.to_string()
            })?;
            let mut results = results.lock().map_err(|_| anyhow!("another thread panicked"))?;
            let drawn = job == options.study(job.task).drawn(job.rule);
            results.add(run, drawn.then_some(&curve))?;
            bar.inc(1);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..options.threads.get()).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(_) => Err(anyhow!("a run panicked")),
        })
    })?;
    bar.finish_with_message("done");
    results.into_inner().map_err(|_| anyhow!("a run panicked"))
}

fn report(options: &Options, out: &Path, results: &Results) -> Result<()> {
    let summaries = |&task: &Task| {
        let study = options.study(task);
        let summary = |&rule| Summary::new(results, &study, rule);
        let summaries = options.optimizers.iter().map(summary).collect();
        (study, summaries)
    };
    let studies: Vec<(Study, Vec<Summary>)> = options.tasks.iter().map(summaries).collect();
    let text = table::markdown(&studies)?;
    println!("{text}");
    let path = out.join("table.md");
    fs::write(&path, text).with_context(|| path.display().to_string())?;
    println!("wrote {}", path.display());
    for path in plot::draw(out, &studies, results)? {
        println!("wrote {}", path.display());
    }
    Ok(())
}
