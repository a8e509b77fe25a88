//! Trains a multilayer perceptron on handwritten digits by SRKL's reference rule, and compares it
//! with candle's SGD and AdamW, each at the learning rate that suits it best.
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
mod table;
mod train;

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use candle_srkl::ParamsSrkl;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use checkpoint::Checkpoint;
use data::Digits;
use plot::Line;
use train::{Curve, GRID, Outcome, Rule, Settings, TUNING_EPOCHS, Training};

/// Trains a multilayer perceptron on 8x8 handwritten digits by SRKL's reference rule, and by
/// candle's SGD and AdamW on the same batches from the same weights.
///
/// Each optimizer trains at its own learning rate: of a grid of half decades, the one of the best
/// accuracy on a validation part of the training images, after a short training on the rest. The
/// final accuracy is that on images held out of all this. On the CPU, the same options give the
/// same results.
#[derive(Parser)]
struct Options {
    /// Which optimizer to train by
    #[arg(long, value_enum, default_value = "all")]
    optimizer: Choice,
    /// Learning rate, above 0 [default: tuned, from 0.001 to 10]
    #[arg(long, value_parser = positive, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// SRKL's kinetic sensitivity, 0 or above; 0 is plain SGD [default: 0.1]
    #[arg(long, allow_negative_numbers = true)]
    beta: Option<f64>,
    /// Length of the training, in passes over the training images; with --resume, in all
    #[arg(long, default_value = "50")]
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
    /// Where to compute; cuda is the first CUDA device
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Folder for the pictures, loss.svg and (of SRKL) brake.svg
    #[arg(long, value_name = "FOLDER", default_value = "out/digits")]
    out: PathBuf,
    /// Folder to save the trained model and the optimizer's state in (SRKL only)
    #[arg(long, value_name = "FOLDER")]
    save: Option<PathBuf>,
    /// Folder of a saved training to go on with, up to --epochs, as if it had not been interrupted:
    /// with its own lr, beta, batch, dtype and seed (SRKL only)
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["lr", "beta", "batch", "dtype", "seed"])]
    resume: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
    All,
    Srkl,
    Sgd,
    Adamw,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceKind {
    Cpu,
    Cuda,
}

fn main() -> Result<()> {
    let options = Options::parse();
    options.check()?;
    let device = match options.device {
        DeviceKind::Cpu => Device::Cpu,
        DeviceKind::Cuda => Device::new_cuda(0).context("--device cuda")?,
    };
    for folder in [Some(&options.out), options.save.as_ref()].into_iter().flatten() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let resumed = options.resume.as_deref().map(Checkpoint::read).transpose()?;
    let done = resumed.as_ref().map_or(0, |checkpoint| checkpoint.epochs);
    let epochs = done..options.epochs;
    ensure!(!epochs.is_empty(), "--epochs: expected more than {done}, got {}", epochs.end);
    let settings = match &resumed {
        Some(checkpoint) => checkpoint.settings.clone(),
        None => options.settings(),
    };
    let digits = Digits::load(settings.seed, settings.dtype, &device)?;

    let rules = options.optimizer.rules();
    let given = options.lr.or(resumed.as_ref().map(|checkpoint| checkpoint.lr));
    let rates = match given {
        Some(lr) => vec![lr; rules.len()],
        None => tune(rules, &settings, &digits)?,
    };

    let mut outcomes = vec![];
    for (&rule, lr) in rules.iter().zip(rates) {
        let mut training = Training::new(rule, lr, &settings, &device)?;
        if let Some(checkpoint) = &resumed {
            checkpoint.restore(&mut training)?;
        }
        let bar = progress(format!("train {rule}"), epochs.len())?;
        let history = training.run(&digits.train, epochs.clone(), &bar)?;
        bar.finish();
        if let Some(folder) = &options.save {
            checkpoint::save(folder, &mut training, epochs.end, lr)?;
        }
        let accuracy = training.model.accuracy(&digits.held_out)?;
        outcomes.push(Outcome { rule, lr, accuracy, history });
    }
    table::print_outcomes(&outcomes, given.is_none());
    draw(&options.out, &outcomes)
}

impl Options {
    /// What clap can't express.
    fn check(&self) -> Result<()> {
        let only = self.optimizer;
        ensure!(
            self.lr.is_none() || only != Choice::All,
            "--lr: the optimizers need different learning rates; choose one by --optimizer"
        );
        for (option, given) in [
            ("--beta", self.beta.is_some() && only != Choice::All),
            ("--save", self.save.is_some()),
            ("--resume", self.resume.is_some()),
        ] {
            ensure!(!given || only == Choice::Srkl, "{option} is for SRKL: add --optimizer srkl");
        }
        Ok(())
    }

    fn settings(&self) -> Settings {
        let beta = self.beta.unwrap_or(ParamsSrkl::reference().beta_value());
        Settings { beta, batch: self.batch, dtype: self.dtype, seed: self.seed }
    }
}

impl Choice {
    fn rules(self) -> &'static [Rule] {
        match self {
            Self::All => &[Rule::Srkl, Rule::Sgd, Rule::AdamW],
            Self::Srkl => &[Rule::Srkl],
            Self::Sgd => &[Rule::Sgd],
            Self::Adamw => &[Rule::AdamW],
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

fn progress(what: String, epochs: usize) -> Result<ProgressBar> {
    let style = "{prefix:12} [{bar:40}] {pos}/{len} epochs, {elapsed}, {msg}";
    let bar = ProgressBar::new(epochs as u64).with_prefix(what);
    Ok(bar.with_style(ProgressStyle::with_template(style)?.progress_chars("=> ")))
}

/// The best learning rate of each rule.
fn tune(rules: &[Rule], settings: &Settings, digits: &Digits) -> Result<Vec<f64>> {
    let mut trials = vec![];
    for &rule in rules {
        let bar = progress(format!("tune {rule}"), GRID.len() * TUNING_EPOCHS)?;
        trials.push((rule, train::tune(rule, settings, &digits.train, &bar)?));
        bar.finish();
    }
    table::print_trials(&trials);
    let best = trials.iter().map(|(rule, trials)| {
        let best = train::best(trials);
        Ok(best.with_context(|| format!("{rule} diverged at every learning rate"))?.lr)
    });
    best.collect()
}

fn draw(folder: &Path, outcomes: &[Outcome]) -> Result<()> {
    let path = folder.join("loss.svg");
    let line = |outcome: &Outcome| Line {
        label: format!("{}, lr {:?}", outcome.rule, outcome.lr),
        curve: outcome.history.loss.clone(),
        // SGD's is often so close that it covers SRKL's.
        width: if matches!(outcome.rule, Rule::Srkl) { 5 } else { 2 },
    };
    plot::loss(&path, &outcomes.iter().map(line).collect::<Vec<_>>())?;
    println!("wrote {}", path.display());

    let brakes = outcomes.iter().flat_map(|outcome| &outcome.history.brake);
    let line = |(label, curve): (&String, &Curve)| Line {
        label: label.clone(),
        curve: curve.clone(),
        width: 2,
    };
    let lines: Vec<Line> = brakes.map(line).collect();
    if !lines.is_empty() {
        let path = folder.join("brake.svg");
        plot::brake(&path, &lines)?;
        println!("wrote {}", path.display());
    }
    Ok(())
}
