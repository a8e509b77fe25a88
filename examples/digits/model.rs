//! A multilayer perceptron.

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear};
use rand::RngExt;

use crate::data::{CLASSES, PIXELS, Part};
use crate::random::{Stream, rng};

/// The widths of the layers' inputs, and of the last one's output.
pub const WIDTHS: [usize; 3] = [PIXELS, 256, CLASSES];

pub struct Mlp {
    pub varmap: VarMap,
    layers: Vec<Linear>,
}

impl Mlp {
    /// With layers of these widths. Weights are uniform of variance `2 / inputs` (He), by the seed;
    /// biases are 0.
    pub fn new(widths: &[usize], seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let mut varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, dtype, device);
        let mut rng = rng(seed, Stream::Weights);
        let mut layers = vec![];
        for (i, width) in widths.windows(2).enumerate() {
            let (inputs, outputs) = (width[0], width[1]);
            let name = format!("layer{}", i + 1);
            layers.push(linear(inputs, outputs, vb.pp(&name))?);
            // candle's own initial values on the CPU can't be seeded.
            let bound = (6. / inputs as f32).sqrt();
            let weight = (0..inputs * outputs).map(|_| rng.random_range(-bound..bound)).collect();
            let weight = Tensor::from_vec::<_, f32>(weight, (outputs, inputs), device)?;
            varmap.set_one(format!("{name}.weight"), weight.to_dtype(dtype)?)?;
            let bias = Tensor::zeros(outputs, dtype, device)?;
            varmap.set_one(format!("{name}.bias"), bias)?;
        }
        Ok(Self { varmap, layers })
    }

    /// The mean cross entropy, in f32 whatever the model's dtype.
    pub fn loss(&self, part: &Part) -> candle_core::Result<Tensor> {
        let logits = self.logits(part)?.to_dtype(DType::F32)?;
        candle_nn::loss::cross_entropy(&logits, &part.classes)
    }

    /// The share of images that the model classifies right.
    pub fn accuracy(&self, part: &Part) -> Result<f64> {
        let right = self.logits(part)?.argmax(D::Minus1)?.eq(&part.classes)?;
        let right = right.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
        Ok(f64::from(right) / part.len()? as f64)
    }

    fn logits(&self, part: &Part) -> candle_core::Result<Tensor> {
        let mut x = part.images.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            if i > 0 {
                x = x.relu()?;
            }
            x = layer.forward(&x)?;
        }
        Ok(x)
    }
}
