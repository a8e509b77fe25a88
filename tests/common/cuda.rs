//! Models on CUDA devices, for the tests of these.

use candle_core::{Device, Result, Var};
use candle_nn::Optimizer;
use candle_srkl::{NonFinite, ParamsSrkl, Srkl};

use super::{FLOATS, bits, grads, noise, tensor};

/// A model on `device` and its optimizer.
pub fn model(device: &Device) -> Result<(Vec<Var>, Srkl)> {
    let mut vars = vec![];
    for (i, dtype) in FLOATS.into_iter().enumerate() {
        vars.push(Var::from_tensor(
            &tensor(&noise(9000, 1., i as u64), dtype)?.to_device(device)?,
        )?);
    }
    let params = ParamsSrkl {
        lr: 0.1,
        weight_decay: 0.1,
        nonfinite: NonFinite::SkipBlock,
        ..ParamsSrkl::reference()
    };
    let opt = Srkl::new(vars.clone(), params)?;
    Ok((vars, opt))
}

pub fn step(vars: &[Var], opt: &mut Srkl, step: u64) -> Result<()> {
    let mut store = grads([]);
    for (i, var) in vars.iter().enumerate() {
        let mut g = noise(9000, 0.1, 10 * step + i as u64);
        if i as u64 == step {
            g[17] = f64::NAN;
        }
        store.insert(var, tensor(&g, var.dtype())?.to_device(var.device())?);
    }
    opt.step(&store)
}

pub fn state(vars: &[Var], opt: &Srkl) -> Result<String> {
    let mut lines = vec![format!("{} {}", opt.steps()?, opt.skipped_steps()?)];
    for (i, (var, telemetry)) in vars.iter().zip(opt.telemetry()?).enumerate() {
        let bits = bits(&var.to_device(&Device::Cpu)?)?;
        let master = opt.master(&i.to_string())?;
        lines.push(format!("{} {bits:x?} {master:?}", telemetry.skipped));
    }
    Ok(lines.join("\n"))
}
