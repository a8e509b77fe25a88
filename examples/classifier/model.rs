//! A convolutional network for images of 8 by 8 pixels.

use anyhow::Result;
use candle_core::{D, DType, Device, ModuleT, Tensor};
use candle_nn::{
    BatchNorm, Conv2d, Conv2dConfig, Linear, Module, VarBuilder, VarMap, batch_norm,
    conv2d_no_bias, linear,
};
use candle_srkl::Dropout;

use crate::compare::draw_weights;
use crate::data::CLASSES;

const SIDE: usize = 8;

/// Of the images and of the layers.
const CHANNELS: [usize; 3] = [1, 16, 32];

/// Two layers, each of which halves the sides of the image, and a linear head.
pub struct Network {
    layers: Vec<(Conv2d, BatchNorm)>,
    dropout: Dropout,
    head: Linear,
}

impl Network {
    /// With its variables. Weights are normal of variance `2 / inputs` (He), by the seed.
    pub fn new(seed: u64) -> Result<(VarMap, Self)> {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let mut layers = vec![];
        for (i, channels) in CHANNELS.windows(2).enumerate() {
            let (inputs, outputs) = (channels[0], channels[1]);
            let config = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
            // Batch norm takes off any bias.
            let conv = conv2d_no_bias(inputs, outputs, 3, config, vb.pp(format!("conv{i}")))?;
            // Its running statistics are in `varmap` too, and an optimizer gets them. They never have a
            // gradient, so none changes them.
            let norm = batch_norm(outputs, 1e-5, vb.pp(format!("norm{i}")))?;
            layers.push((conv, norm));
        }
        let side = SIDE >> layers.len();
        let head = linear(CHANNELS[layers.len()] * side * side, CLASSES, vb.pp("head"))?;
        draw_weights(&varmap, seed, |_, inputs| (2. / inputs as f64).sqrt())?;
        Ok((varmap, Self { layers, dropout: Dropout::new(0.3), head }))
    }

    /// The scores of the classes.
    pub fn forward(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let mut x = images.reshape(((), 1, SIDE, SIDE))?;
        for (conv, norm) in &self.layers {
            let y = norm.forward_t(&conv.forward(&x)?, train)?.relu()?;
            x = max_pool(&y)?;
        }
        Ok(self.head.forward(&self.dropout.forward(&x.flatten_from(1)?, train)?)?)
    }
}

/// The highest of each 2 by 2 values. (The gradient of candle 0.11's `max_pool2d` is a quarter of the right one
/// where one value is the highest, and four times it where all four are, as on the background.)
fn max_pool(x: &Tensor) -> Result<Tensor> {
    let (images, channels, height, width) = x.dims4()?;
    let squares = x.reshape((images * channels, height / 2, 2, width / 2, 2))?.transpose(2, 3)?;
    let squares = squares.reshape((images, channels, height / 2, width / 2, 4))?;
    let highest = squares.argmax_keepdim(D::Minus1)?;
    Ok(squares.gather(&highest, D::Minus1)?.squeeze(D::Minus1)?)
}
