//! Trains a small convolutional network, with batch norm, dropout and max pooling, on handwritten
//! digits: by the presets at their defaults, and by candle's AdamW.
//!
//! ```sh
//! cargo run --release --example classifier
//! cargo run --release --example classifier -- --help
//! ```

#[path = "../compare/mod.rs"]
#[allow(dead_code, reason = "each example has one kind of score")]
mod compare;
#[path = "../digits/data.rs"]
#[allow(dead_code, reason = "only the digits example has a validation part")]
mod data;
mod model;
#[path = "../digits/random.rs"]
#[allow(dead_code, reason = "each example has streams of its own")]
mod random;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use clap::Parser;
use rand::RngExt;
use rand::rngs::StdRng;

use compare::{Score, Task, accuracy};
use data::{Digits, Part};
use model::Network;
use random::{Stream, rng};

const BATCH: usize = 32;

/// Trains a convolutional network on 8x8 handwritten digits, and measures on images held out of that.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    options: compare::Options,
}

fn main() -> Result<()> {
    compare::one_thread_each();
    let options = Arguments::parse().options;
    compare::run(&options, Score::Accuracy, Training::new)
}

struct Training {
    varmap: VarMap,
    network: Network,
    digits: Digits,
    rng: StdRng,
    batch: Part,
}

impl Training {
    fn new(seed: u64) -> Result<Self> {
        let (varmap, network) = Network::new(seed)?;
        let digits = Digits::load(seed, DType::F32, &Device::Cpu)?;
        let batch = digits.train.select(&[])?;
        Ok(Self { varmap, network, digits, rng: rng(seed, Stream::Epoch(0)), batch })
    }
}

impl Task for Training {
    fn varmap(&self) -> &VarMap {
        &self.varmap
    }

    fn draw(&mut self) -> Result<()> {
        let images = self.digits.train.len()? as u32;
        let rows: Vec<u32> = (0..BATCH).map(|_| self.rng.random_range(0..images)).collect();
        self.batch = self.digits.train.select(&rows)?;
        Ok(())
    }

    /// A step that measures calls this twice with one batch, and the first step three times. In training
    /// mode batch norm normalizes by the statistics of the batch itself. It only writes the running ones,
    /// so the loss is the same function of the parameters each time, as it must be: for that there is
    /// nothing to do. (Dropout has to be `candle_srkl::Dropout`.)
    ///
    /// But each call moves the running statistics. Those of a batch that is measured count twice, the
    /// second time at the parameters after the step: a little more of one batch in 20, which does no
    /// harm here. Where it does, compute the statistics anew when the training is over, as `averaged` does.
    fn loss(&self) -> Result<Tensor> {
        let logits = self.network.forward(&self.batch.images, true)?;
        Ok(candle_nn::loss::cross_entropy(&logits, &self.batch.classes)?)
    }

    /// The running statistics are those of the training weights, and averaged weights make other
    /// activations: statistics of these are computed anew, from the training images in training mode. A
    /// training that goes on afterwards has to keep the old ones, and to put them back.
    fn averaged(&self) -> Result<()> {
        let rows: Vec<u32> = (0..self.digits.train.len()? as u32).collect();
        for rows in rows.chunks(BATCH) {
            self.network.forward(&self.digits.train.select(rows)?.images, true)?;
        }
        Ok(())
    }

    fn score(&self) -> Result<f64> {
        let Part { images, classes } = &self.digits.held_out;
        accuracy(&self.network.forward(images, false)?, classes)
    }
}
