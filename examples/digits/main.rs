//! Trains a multilayer perceptron on handwritten digits by braked Adam at its default learning rate,
//! beside candle's AdamW and SGD and the reference rule, which need a search for theirs.
//!
//! ```sh
//! cargo run --release --example digits
//! cargo run --release --example digits -- --help
//! ```

mod checkpoint;
mod data;
mod model;
mod plot;
mod random;
mod study;
mod table;
mod telemetry;
mod train;

use std::env;
use std::fs;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use candle_srkl::ParamsSrkl;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use study::{Run, Study};
use telemetry::Files;
use train::{Rule, Settings, Training};

/// Learning rates half a decade apart.
const GRID: [f64; 15] =
    [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1., 3., 10., 30., 100., 300., 1000.];

const THREADS: &str = "RAYON_NUM_THREADS";

/// Trains a multilayer perceptron on 8x8 handwritten digits by braked Adam at its default learning
/// rate, and beside it by candle's AdamW and SGD and by SRKL's reference rule, from the same weights, on
/// the same batches, for the same number of gradients.
///
/// Those others train at each of 15 learning rates from 1e-4 to 1e3, and are shown at the one of the best
/// accuracy on a validation part of the images. Braked Adam trains at all of them too, to show how little
/// they matter, but nothing is chosen for it. The final accuracy is that on images held out of all
/// this. On the CPU, the same options give the same results.
#[derive(Parser)]
struct Options {
    /// Which optimizer to train by [default: all]
    #[arg(long, value_enum)]
    optimizer: Option<Rule>,
    /// Learning rate, above 0 [default: the preset's for braked-adam, the best of 15 for others]
    #[arg(long, value_parser = positive, allow_negative_numbers = true, requires = "optimizer")]
    lr: Option<f64>,
    /// The reference rule's kinetic sensitivity, 0 or above; 0 is plain SGD [default: the preset's]
    #[arg(long, allow_negative_numbers = true)]
    beta: Option<f64>,
    /// Length of a training: as many gradients as so many passes over the training images take; with
    /// --resume, in all
    #[arg(long, default_value = "30")]
    epochs: usize,
    /// Images in a mini-batch
    #[arg(long, default_value = "32")]
    batch: NonZeroUsize,
    /// Type of the parameters and activations. With bf16, SRKL keeps f32 master weights; candle's
    /// SGD and AdamW have bf16 alone, AdamW for its moments too
    #[arg(long, default_value = "f32", value_parser = dtype())]
    dtype: DType,
    /// Seed of the split into parts, of the initial weights and of the order of batches
    #[arg(long, default_value = "0")]
    seed: u64,
    /// How many seeds, from --seed on: tables have means and standard deviations
    #[arg(long, default_value = "1")]
    seeds: NonZeroU64,
    /// Where to compute; cuda is the first CUDA device
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Folder for the pictures: loss.svg, brake.svg and accuracy.svg
    #[arg(long, value_name = "FOLDER", default_value = "out/digits")]
    out: PathBuf,
    /// Folder for what SRKL tells of its steps, a folder in it for each training: telemetry.csv, telemetry.jsonl and a file for
    /// TensorBoard
    #[arg(long, value_name = "FOLDER")]
    telemetry: Option<PathBuf>,
    /// How often it is asked
    #[arg(long, value_name = "STEPS", default_value = "10", requires = "telemetry")]
    telemetry_every: NonZeroU64,
    /// Folder to save the trained model and the optimizer's state in (braked-adam and reference only;
    /// of the first seed)
    #[arg(long, value_name = "FOLDER")]
    save: Option<PathBuf>,
    /// Folder of a saved training to go on with, up to --epochs, as if it had not been interrupted
    #[arg(long, value_name = "FOLDER",
          conflicts_with_all = ["optimizer", "lr", "beta", "batch", "dtype", "seed", "seeds"])]
    resume: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceKind {
    Cpu,
    Cuda,
}

fn main() -> Result<()> {
    // Trainings are small: several at a time, on a thread each, are the fastest. What candle and rayon
    // make of this does not change any result.
    if env::var_os(THREADS).is_none() {
        // SAFETY: there are no other threads yet that could read the environment.
        unsafe { env::set_var(THREADS, "1") };
    }
    let options = Options::parse();
    options.check()?;
    for folder in [Some(&options.out), options.save.as_ref()].into_iter().flatten() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }

    let mut runs = options.run()?;
    let rules = Rule::value_variants().iter();
    let has_run = |rule: &&Rule| runs.iter().any(|run| run.training.settings.rule == **rule);
    let studies: Vec<Study> =
        rules.filter(has_run).map(|&rule| Study::new(rule, &runs)).collect::<Result<_>>()?;
    table::print(&studies);
    for path in plot::draw(&options.out, &studies)? {
        println!("wrote {}", path.display());
    }
    if let Some(folder) = &options.save {
        let lr = studies[0].shown().lr;
        if let Some(run) = runs.iter_mut().find(|run| run.training.settings.lr == lr) {
            checkpoint::save(folder, &mut run.training)?;
        }
    }
    Ok(())
}

impl Options {
    /// What clap can't express.
    fn check(&self) -> Result<()> {
        let only = self.optimizer;
        ensure!(
            self.beta.is_none() || only == Some(Rule::Reference),
            "--beta is the reference rule's: add --optimizer reference"
        );
        let can_save =
            self.resume.is_some() || matches!(only, Some(Rule::BrakedAdam | Rule::Reference));
        ensure!(
            self.save.is_none() || can_save,
            "--save is for SRKL: add --optimizer braked-adam, or reference"
        );
        Ok(())
    }

    fn run(&self) -> Result<Vec<Run>> {
        // On a device one training at a time.
        let (device, threads) = match self.device {
            DeviceKind::Cpu => (Device::Cpu, thread::available_parallelism()?.get()),
            DeviceKind::Cuda => (Device::new_cuda(0).context("--device cuda")?, 1),
        };
        let watched = |mut training: Training| -> Result<Training> {
            if let Some(folder) = &self.telemetry {
                training.telemetry = Files::open(folder, self.telemetry_every, &mut training)?;
            }
            Ok(training)
        };
        if let Some(folder) = &self.resume {
            let training = watched(checkpoint::load(folder, &device)?)?;
            return Ok(vec![Run::new(training, self.epochs, &device)?]);
        }
        let settings = self.settings();
        let style = "[{bar:40}] {pos}/{len} trainings, {elapsed}";
        let bar = ProgressBar::new(settings.len() as u64)
            .with_style(ProgressStyle::with_template(style)?.progress_chars("=> "));
        let runs = study::in_parallel(&settings, threads, |settings| {
            let training = watched(Training::new(settings.clone(), &device)?)?;
            let run = Run::new(training, self.epochs, &device)?;
            bar.inc(1);
            Ok(run)
        });
        bar.finish();
        runs
    }

    /// Of every training.
    fn settings(&self) -> Vec<Settings> {
        let beta = self.beta.unwrap_or(ParamsSrkl::reference().beta_value());
        let mut settings = vec![];
        for &rule in Rule::value_variants() {
            if self.optimizer.is_some_and(|only| only != rule) {
                continue;
            }
            for lr in self.rates(rule) {
                for seed in self.seed..self.seed + self.seeds.get() {
                    let Self { batch, dtype, .. } = *self;
                    settings.push(Settings { rule, lr, beta, batch, dtype, seed });
                }
            }
        }
        settings
    }

    /// The learning rates to try.
    fn rates(&self, rule: Rule) -> Vec<f64> {
        match (self.lr, rule.default_lr()) {
            (Some(lr), _) => vec![lr],
            (None, None) => GRID.to_vec(),
            (None, Some(default)) if self.optimizer == Some(rule) => vec![default],
            (None, Some(default)) => {
                let others = GRID.into_iter().filter(|&lr| lr != default);
                others.chain([default]).collect()
            }
        }
    }
}

fn positive(text: &str) -> Result<f64> {
    let number: f64 = text.parse()?;
    ensure!(number > 0. && number.is_finite(), "expected a finite number above 0");
    Ok(number)
}

fn dtype() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(["f32", "bf16"]).try_map(|name| DType::from_str(&name))
}
