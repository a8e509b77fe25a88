//! Trains a small model of LLaMA's kind on seven plays by Shakespeare to predict the next character: by the
//! presets at their defaults, and by candle's AdamW.
//!
//! ```sh
//! cargo run --release --example llama
//! cargo run --release --example llama -- --help
//! ```

#[path = "../compare/mod.rs"]
#[allow(dead_code, reason = "each example has one kind of score")]
mod compare;
mod model;
#[path = "../char_lm/text.rs"]
#[allow(dead_code, reason = "only the char_lm example writes text")]
mod text;

use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_nn::VarMap;
use clap::Parser;
use rand::SeedableRng;
use rand::rngs::StdRng;

use compare::{Score, Task};
use model::Llama;
use text::{Text, batch, even_batch};

const BATCH: usize = 16;
const LENGTH: usize = 32;
/// Pieces of the held-out text to measure on.
const HELD_OUT: usize = 256;

/// Trains a small model of LLaMA's kind on seven plays by Shakespeare, and measures on the last tenth of the
/// text.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    options: compare::Options,
}

fn main() -> Result<()> {
    compare::one_thread_each();
    let options = Arguments::parse().options;
    let text = Text::load()?;
    compare::run(&options, Score::Nats, |seed| Training::new(&text, seed))
}

struct Training<'a> {
    varmap: VarMap,
    llama: Llama,
    text: &'a Text,
    rng: StdRng,
    /// Tokens, and those that follow each of them.
    batch: (Tensor, Tensor),
    held_out: (Tensor, Tensor),
}

impl<'a> Training<'a> {
    fn new(text: &'a Text, seed: u64) -> Result<Self> {
        let (varmap, llama) = Llama::new(text.alphabet.len(), LENGTH, seed)?;
        let held_out = even_batch(&text.validation, HELD_OUT, LENGTH, &Device::Cpu)?;
        let rng = StdRng::seed_from_u64(seed);
        Ok(Self { varmap, llama, text, rng, batch: held_out.clone(), held_out })
    }

    /// The mean cross entropy in nats a character.
    fn cross_entropy(&self, (tokens, next): &(Tensor, Tensor)) -> Result<Tensor> {
        let logits = self.llama.forward(tokens)?;
        Ok(candle_nn::loss::cross_entropy(&logits, &next.flatten_all()?)?)
    }
}

impl Task for Training<'_> {
    fn varmap(&self) -> &VarMap {
        &self.varmap
    }

    fn draw(&mut self) -> Result<()> {
        self.batch = batch(&self.text.train, BATCH, LENGTH, &mut self.rng, &Device::Cpu)?;
        Ok(())
    }

    fn loss(&self) -> Result<Tensor> {
        self.cross_entropy(&self.batch)
    }

    fn score(&self) -> Result<f64> {
        Ok(self.cross_entropy(&self.held_out)?.to_scalar::<f32>()?.into())
    }
}
