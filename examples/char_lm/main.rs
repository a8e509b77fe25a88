//! Trains a small transformer on seven plays by Shakespeare to predict the next character: what
//! there is to a training with SRKL, and it takes a few minutes on a laptop.
//!
//! ```sh
//! cargo run --release --example char_lm
//! cargo run --release --example char_lm -- --help
//! ```
//!
//! Where other programs keep the cores busy, `RAYON_NUM_THREADS=1` is faster.
//!
//! Several ranks train as one, with the same losses to the last bit: threads of one process, or with feature `mpi`
//! processes that `mpirun` starts, or processes that you start.
//!
//! ```sh
//! cargo run --release --example char_lm -- --accumulate 4 --ranks 2
//! cargo build --release --example char_lm --features mpi
//! mpirun -n 4 target/release/examples/char_lm --accumulate 4 --mpi --sharded
//! for rank in 0 1; do cargo run --release --example char_lm -- --accumulate 4 --world-size 2 --rank $rank & done; wait
//! ```

mod checkpoint;
mod curve;
mod draw;
mod model;
mod sample;
mod telemetry;
mod text;
mod train;

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use candle_srkl::{Collective, Tcp, Threads};
use clap::{Parser, ValueEnum, value_parser};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;

use curve::Point;
use text::Text;
use train::{Settings, Training};

/// Every so many steps the progress bar shows the loss: on a CUDA device this waits for it.
const SHOW_EVERY: u64 = 10;

/// Trains a character-level transformer on seven plays by Shakespeare.
///
/// The last tenth of the text is held out. Losses are in nats a character. On the CPU, the same
/// options give the same results.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    settings: Settings,
    /// Where to compute; cuda is the first CUDA device
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Train by so many threads, each with its share of the --accumulate batches of a step: the losses are the same
    #[arg(long, value_name = "RANKS", default_value = "1", value_parser = value_parser!(u64).range(1..))]
    ranks: u64,
    /// The same for the processes that mpirun has started
    #[cfg(feature = "mpi")]
    #[arg(long, conflicts_with = "ranks")]
    mpi: bool,
    /// This process is one of several, each started with another number from 0 on; with feature nccl and --device cuda
    /// their cards exchange by NCCL (CUDA_VISIBLE_DEVICES tells which card is whose)
    #[arg(long, value_name = "NUMBER", requires = "world_size", conflicts_with = "ranks")]
    #[cfg_attr(feature = "mpi", arg(conflicts_with = "mpi"))]
    rank: Option<usize>,
    /// How many these processes are
    #[arg(long, value_name = "PROCESSES", requires = "rank")]
    world_size: Option<usize>,
    /// Where the first of them listens
    #[arg(long, default_value = "127.0.0.1:29400")]
    address: String,
    /// Each rank keeps the state of a part of the parameters alone
    #[arg(long)]
    sharded: bool,
    /// Print the losses every so many steps
    #[arg(long, value_name = "STEPS", default_value = "500", value_parser = value_parser!(u64).range(1..))]
    report_every: u64,
    /// Folder for checkpoints, and curve.csv
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Save a checkpoint every so many steps, and remove the one before
    #[arg(long, value_name = "STEPS", default_value = "1000", value_parser = value_parser!(u64).range(1..), requires = "out")]
    save_every: u64,
    /// Go on from the last checkpoint in --out, as if there had been no interruption. The options of
    /// the training must be the same
    #[arg(long, requires = "out")]
    resume: bool,
    /// Folder for what the optimizer tells of its steps: telemetry.csv, telemetry.jsonl, a file for TensorBoard, and in the end
    /// the picture telemetry.svg
    #[arg(long, value_name = "FOLDER")]
    telemetry: Option<PathBuf>,
    /// How often it is asked
    #[arg(long, value_name = "STEPS", default_value = "10", value_parser = value_parser!(u64).range(1..), requires = "telemetry")]
    telemetry_every: u64,
    /// Instead of training, draw the curves of trainings with --out FOLDER/NAME/SEED beside each other,
    /// and print a table of their ends
    #[arg(long, value_name = "FOLDER", conflicts_with = "out")]
    draw: Option<PathBuf>,
    /// Characters to write in the end
    #[arg(long, value_name = "CHARACTERS", default_value = "500")]
    sample: usize,
    /// What they go on from
    #[arg(long, default_value = "HAMLET.\n")]
    prompt: String,
    /// Below 1, the likely is written more often than it should be
    #[arg(long, default_value = "0.8", value_parser = train::positive)]
    temperature: f64,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceKind {
    Cpu,
    Cuda,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(folder) = &options.draw {
        println!("wrote {}", draw::draw(folder)?.display());
        return Ok(());
    }
    #[cfg(feature = "mpi")]
    if options.mpi {
        return run(&options, Some(Box::new(candle_srkl::Mpi::new()?)), 0);
    }
    if let (Some(rank), Some(world_size)) = (options.rank, options.world_size) {
        let rank = Tcp::new(&options.address, rank, world_size).context("--rank, --address")?;
        return run(&options, Some(Box::new(rank)), 0);
    }
    if options.ranks == 1 {
        return run(&options, None, 0);
    }
    let options = &options;
    thread::scope(|scope| {
        let start = |rank: Threads| {
            // Threads that exchange by NCCL have a card each.
            let card = if cfg!(feature = "nccl") { rank.rank() } else { 0 };
            scope.spawn(move || run(options, Some(Box::new(rank)), card))
        };
        let ranks: Vec<_> = Threads::new(options.ranks as usize).into_iter().map(start).collect();
        // Where one has failed, the others say so too, and it alone has the reason.
        let ended = ranks.into_iter().map(|rank| match rank.join() {
            Ok(done) => done.map_err(|e| format!("{e:#}")),
            Err(_) => Err("has panicked".to_string()),
        });
        let failed: Vec<String> = ended
            .enumerate()
            .filter_map(|(rank, ended)| Some(format!("rank {rank}: {}", ended.err()?)))
            .collect();
        ensure!(failed.is_empty(), "{}", failed.join("\n"));
        Ok(())
    })
}

/// Trains, as one of several ranks or alone; on this card, if on any.
fn run(options: &Options, rank: Option<Box<dyn Collective>>, card: usize) -> Result<()> {
    let ranks = rank.as_ref().map_or(1, |rank| rank.world_size());
    let Settings { accumulate, .. } = options.settings;
    ensure!(
        accumulate.is_multiple_of(ranks),
        "--accumulate {accumulate}: expected a multiple of the {ranks} ranks"
    );
    let device = match options.device {
        DeviceKind::Cpu => Device::Cpu,
        DeviceKind::Cuda => Device::new_cuda(card).context("--device cuda")?,
    };
    #[cfg(feature = "nccl")]
    let rank = match rank {
        Some(hosts) if device.is_cuda() => {
            Some(Box::new(candle_srkl::Nccl::new(hosts, &device)?) as Box<dyn Collective>)
        }
        rank => rank,
    };
    let text = Text::load()?;
    let prompt = text.encode(&options.prompt).context("--prompt")?;
    ensure!(!prompt.is_empty(), "--prompt: expected a character at least");
    let rank = rank.map(|rank| (rank, options.sharded));
    let mut training = Training::new(&options.settings, &text, &device, rank)?;
    let leads = training.optimizer.rank() == 0;
    if let Some(out) = &options.out {
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        if let Some(checkpoint) = checkpoint::last(out)? {
            let name = checkpoint.display();
            ensure!(options.resume, "there is {name} already: add --resume to go on from it");
            checkpoint::restore(&checkpoint, &mut training)?;
            if leads {
                println!("going on from {name}");
            }
        }
    }

    train(&mut training, options)?;
    if let Some(out) = options.out.as_ref().filter(|_| leads || options.sharded) {
        // The averaged weights, if there are any; those of the checkpoint never are.
        let path = out.join("model.safetensors");
        training.evaluate(|model| if leads { Ok(model.varmap.save(&path)?) } else { Ok(()) })?;
        if leads {
            println!("wrote {}", path.display());
        }
    }
    if !leads && !options.sharded {
        return Ok(());
    }

    let Settings { context, seed, .. } = options.settings;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tokens = prompt;
    training.evaluate(|model| {
        let (count, temperature) = (options.sample, options.temperature);
        sample::extend(&mut tokens, count, model, context, temperature, &mut rng, &device)
    })?;
    if leads {
        println!("\n{}", text.decode(&tokens));
    }
    Ok(())
}

/// Trains up to the last step, and says how it goes.
fn train(training: &mut Training, options: &Options) -> Result<()> {
    let steps = options.settings.steps;
    let style = "[{bar:40}] {pos}/{len} steps, {elapsed}, {eta} left, {msg}";
    let style = ProgressStyle::with_template(style)?.progress_chars("=> ");
    let leads = training.optimizer.rank() == 0;
    let bar = if leads { ProgressBar::new(steps) } else { ProgressBar::hidden() };
    let bar = bar.with_style(style).with_position(training.step);
    let path = options.out.as_ref().map(|out| out.join("curve.csv"));
    let read = |path: &PathBuf| curve::read(path, training.step);
    let mut points = path.as_ref().map_or(Ok(vec![]), read)?;
    let mut seconds = points.last().map_or(0., |point| point.seconds);
    let mut losses = vec![];
    let mut telemetry = None;
    if let Some(folder) = &options.telemetry {
        training.optimizer.record_norms(true);
        if leads {
            telemetry = Some(telemetry::Files::open(folder, training.step + 1)?);
        }
    }
    if leads {
        println!("{:>7}  {:>13}  {:>13}  {:>9}", "step", "training loss", "held-out loss", "phi");
    }
    while training.step < steps {
        let start = Instant::now();
        let loss = training.step()?;
        seconds += start.elapsed().as_secs_f64();
        let step = training.step;
        bar.inc(1);
        if step.is_multiple_of(SHOW_EVERY) {
            bar.set_message(format!("loss {:.3}", loss.to_scalar::<f32>()?));
        }
        if options.telemetry.is_some() && step.is_multiple_of(options.telemetry_every) {
            match &mut telemetry {
                Some(files) => files.write(&training.optimizer, loss.to_scalar::<f32>()?.into())?,
                // Each has norms of its part to give.
                None if options.sharded => drop(training.optimizer.metrics()?),
                None => {}
            }
        }
        losses.push(loss);
        // The parameters are the same on all; but averages are sharded.
        if (leads || options.sharded)
            && (step.is_multiple_of(options.report_every) || step == steps)
        {
            let loss = Tensor::stack(&losses, 0)?.mean_all()?.to_scalar::<f32>()?;
            losses.clear();
            let held_out = training.held_out()?;
            if let Some(path) = path.as_ref().filter(|_| leads) {
                let (gradients, loss) = (training.gradients()?, loss.into());
                points.push(Point { step, gradients, seconds, loss, held_out });
                curve::write(path, &points)?;
            }
            let phi = training.phi()?.map_or("-".into(), |phi| format!("{phi:.2e}"));
            if leads {
                bar.suspend(|| println!("{step:>7}  {loss:>13.4}  {held_out:>13.4}  {phi:>9}"));
            }
            ensure!(held_out.is_finite(), "the training has diverged");
        }
        if let Some(out) = &options.out
            && (step.is_multiple_of(options.save_every) || step == steps)
        {
            checkpoint::save(out, training)?;
        }
    }
    bar.finish_and_clear();
    if let Some(folder) = options.telemetry.as_ref().filter(|_| leads) {
        println!("wrote {}", telemetry::draw(folder)?.display());
    }
    if leads {
        println!("{steps} steps took {} gradients and {seconds:.1} s", training.gradients()?);
    }
    Ok(())
}
