mod data;
mod model;
mod random;
mod train;
use train::*;
fn main() -> anyhow::Result<()> {
    let dev = candle_core::Device::Cpu;
    let a: Vec<String> = std::env::args().collect();
    let (batch, te, fe, seed): (usize, usize, usize, u64) =
        (a[1].parse()?, a[2].parse()?, a[3].parse()?, a[4].parse()?);
    let s = Settings { beta: 0.1, batch, dtype: candle_core::DType::F32, seed };
    let d = data::Digits::load(seed, s.dtype, &dev)?;
    let (tr, va) = d.train.without_validation()?;
    for rule in [Rule::Srkl] {
        for lr in [0.1, 0.2, 0.3, 0.5, 1.0] {
            let bar = indicatif::ProgressBar::hidden();
            let mut t = Training::new(rule, lr, &s, &dev)?;
            let h = t.run(&tr, 0..te, &bar)?;
            let (acc, loss) = (t.model.accuracy(&va)?, t.model.loss(&va)?.to_scalar::<f32>()?);
            let mut t = Training::new(rule, lr, &s, &dev)?;
            let h2 = t.run(&d.train, 0..fe, &bar)?;
            print!(
                "{rule} lr {lr}: val acc {acc:.4} loss {loss:.4} time {:.2} | final train {:.2e} {:.2}s held-out {:.4}",
                h.seconds,
                h2.loss.last().unwrap(),
                h2.seconds,
                t.model.accuracy(&d.held_out)?
            );
            if false && let AnyOptimizer::Srkl(o) = &t.optimizer {
                print!(
                    " {:?}",
                    o.telemetry().iter().map(|t| t.phi.map(|p| p / lr)).collect::<Vec<_>>()
                );
            }
            println!();
        }
    }
    Ok(())
}
