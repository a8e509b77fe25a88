//! Adapts a frozen network to another task by low-rank adapters (LoRA): by the presets at their defaults,
//! and by candle's AdamW. The network reads handwritten digits; the other task is to read them mirrored at
//! the diagonal.
//!
//! ```sh
//! cargo run --release --example lora
//! cargo run --release --example lora -- --help
//! ```

#[path = "../compare/mod.rs"]
#[allow(dead_code, reason = "each example has one kind of score")]
mod compare;
#[path = "../digits/data.rs"]
#[allow(dead_code, reason = "only the digits example has a validation part")]
mod data;
#[path = "../digits/random.rs"]
#[allow(dead_code, reason = "each example has streams of its own")]
mod random;

use std::collections::HashMap;

use anyhow::{Result, anyhow};
use candle_core::{DType, Device, Tensor};
use candle_nn::loss::cross_entropy;
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear, linear_no_bias};
use candle_srkl::{ParamsSrkl, Srkl};
use clap::Parser;
use rand::RngExt;
use rand::rngs::StdRng;

use compare::{Score, Task, accuracy, draw_weights};
use data::{CLASSES, Digits, PIXELS, Part};
use random::{Stream, rng};

const BATCH: usize = 32;
/// The widths of the layers' inputs, and of the last one's output.
const WIDTHS: [usize; 4] = [PIXELS, 128, 128, CLASSES];
const RANK: usize = 4;
const BASE_STEPS: usize = 300;
/// Of the base and of the split of the images, which all trainings share.
const BASE_SEED: u64 = 0;

/// Trains a network on handwritten digits, freezes it, and adapts it to mirrored ones by adapters of rank 4.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    options: compare::Options,
}

fn main() -> Result<()> {
    compare::one_thread_each();
    let options = Arguments::parse().options;
    let upright = Digits::load(BASE_SEED, DType::F32, &Device::Cpu)?;
    let mirrored = Digits { train: mirror(&upright.train)?, held_out: mirror(&upright.held_out)? };
    let frozen = train_base(&upright.train)?;
    let base = Network::new(tensors(&frozen), None)?;
    println!(
        "The frozen network reads {:.2}% of the held-out digits, and {:.2}% of them mirrored.\n",
        100. * base.accuracy(&upright.held_out)?,
        100. * base.accuracy(&mirrored.held_out)?,
    );
    compare::run(&options, Score::Accuracy, |seed| Training::new(&frozen, &mirrored, seed))
}

/// The weights of a network that has been trained on the images. They leave this function as plain tensors,
/// as those of a file are (`VarBuilder::from_mmaped_safetensors`): there are no variables any more that a
/// gradient could be computed for, or that an optimizer could be given.
fn train_base(images: &Part) -> Result<HashMap<String, Tensor>> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let network = Network::new(vb, None)?;
    draw_weights(&varmap, BASE_SEED, |_, inputs| (2. / inputs as f64).sqrt())?;
    let mut optimizer = Srkl::from_varmap(&varmap, ParamsSrkl::braked_adam())?;
    let mut rng = rng(BASE_SEED, Stream::Weights);
    for _ in 0..BASE_STEPS {
        let batch = draw(images, &mut rng)?;
        optimizer.backward_step_with(|| network.loss(&batch))?;
    }
    let vars = varmap.data().lock().map_err(|_| anyhow!("another thread panicked"))?;
    Ok(vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect())
}

fn tensors(frozen: &HashMap<String, Tensor>) -> VarBuilder<'static> {
    VarBuilder::from_tensors(frozen.clone(), DType::F32, &Device::Cpu)
}

/// A training of adapters.
struct Training<'a> {
    /// Of the adapters alone.
    adapters: VarMap,
    network: Network,
    images: &'a Digits,
    rng: StdRng,
    batch: Part,
}

impl<'a> Training<'a> {
    fn new(frozen: &HashMap<String, Tensor>, images: &'a Digits, seed: u64) -> Result<Self> {
        // The optimizer gets the variables of this map. The frozen weights are not among them.
        let adapters = VarMap::new();
        let vb = VarBuilder::from_varmap(&adapters, DType::F32, &Device::Cpu);
        let network = Network::new(tensors(frozen), Some(vb))?;
        // With B = 0 the network starts as the frozen one.
        let spread = |name: &str, inputs: usize| match name.contains("lora_b") {
            true => 0.,
            false => 1. / (inputs as f64).sqrt(),
        };
        draw_weights(&adapters, seed, spread)?;
        let batch = images.train.select(&[])?;
        Ok(Self { adapters, network, images, rng: rng(seed, Stream::Epoch(0)), batch })
    }
}

impl Task for Training<'_> {
    fn varmap(&self) -> &VarMap {
        &self.adapters
    }

    fn draw(&mut self) -> Result<()> {
        self.batch = draw(&self.images.train, &mut self.rng)?;
        Ok(())
    }

    fn loss(&self) -> Result<Tensor> {
        self.network.loss(&self.batch)
    }

    fn score(&self) -> Result<f64> {
        self.network.accuracy(&self.images.held_out)
    }
}

/// A perceptron, whose layers may have adapters.
struct Network {
    layers: Vec<Layer>,
}

/// `y = W x + b`, and `B A x` is added to it where there is an adapter.
struct Layer {
    linear: Linear,
    adapter: Option<[Linear; 2]>,
}

impl Network {
    fn new(weights: VarBuilder, adapters: Option<VarBuilder>) -> Result<Self> {
        let layer = |(i, widths): (usize, &[usize])| -> Result<Layer> {
            let (inputs, outputs) = (widths[0], widths[1]);
            let adapter = |vb: &VarBuilder| -> Result<[Linear; 2]> {
                let vb = vb.pp(format!("layer{i}"));
                let a = linear_no_bias(inputs, RANK, vb.pp("lora_a"))?;
                Ok([a, linear_no_bias(RANK, outputs, vb.pp("lora_b"))?])
            };
            Ok(Layer {
                linear: linear(inputs, outputs, weights.pp(format!("layer{i}")))?,
                adapter: adapters.as_ref().map(adapter).transpose()?,
            })
        };
        Ok(Self { layers: WIDTHS.windows(2).enumerate().map(layer).collect::<Result<_>>()? })
    }

    /// The scores of the classes.
    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let mut x = images.clone();
        for (i, Layer { linear, adapter }) in self.layers.iter().enumerate() {
            if i > 0 {
                x = x.relu()?;
            }
            let y = linear.forward(&x)?;
            x = match adapter {
                Some([a, b]) => (y + b.forward(&a.forward(&x)?)?)?,
                None => y,
            };
        }
        Ok(x)
    }

    fn loss(&self, part: &Part) -> Result<Tensor> {
        Ok(cross_entropy(&self.forward(&part.images)?, &part.classes)?)
    }

    fn accuracy(&self, part: &Part) -> Result<f64> {
        accuracy(&self.forward(&part.images)?, &part.classes)
    }
}

/// A random batch.
fn draw(part: &Part, rng: &mut StdRng) -> Result<Part> {
    let images = part.len()? as u32;
    let rows: Vec<u32> = (0..BATCH).map(|_| rng.random_range(0..images)).collect();
    part.select(&rows)
}

/// Each image with its rows as columns.
fn mirror(part: &Part) -> Result<Part> {
    let side = PIXELS.isqrt();
    let images = part.images.reshape(((), side, side))?.transpose(1, 2)?.flatten_from(1)?;
    Ok(Part { images, classes: part.classes.clone() })
}
