//! The optimizers that are compared, behind one interface.

use anyhow::Result;
use candle_core::{Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD, VarMap};
use candle_srkl::{Beta, Curvature, Measure, ParamsSrkl, Srkl, StepCurvature};
use clap::{Args, ValueEnum};

/// How much AdamW's averaged weights keep of themselves in a step: as much as braked Adam's.
const AVERAGE: f64 = 0.98;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Rule {
    Sgd,
    Adamw,
    /// AdamW, judged by averaged weights
    AdamwAveraged,
    Reference,
    Kinetic,
    BrakedAdam,
    /// Braked Adam, judged by averaged weights
    BrakedAdamAveraged,
    Hessian,
}

/// What kinetic and braked Adam have instead of their presets' settings.
#[derive(Args, Clone, Copy, Debug)]
pub struct Variant {
    /// For kinetic and braked Adam: beta over lr, instead of the preset's. This and the next four need an
    /// --out of their own
    #[arg(long)]
    gamma: Option<f64>,
    /// For them: every how many steps curvature is measured
    #[arg(long)]
    every: Option<u64>,
    /// For them: how many steps from the first on measure it
    #[arg(long)]
    first: Option<u64>,
    /// For them: of the average of what is measured
    #[arg(long)]
    decay: Option<f64>,
    /// For them: how much of its variance brakes
    #[arg(long)]
    noise: Option<f64>,
}

impl Variant {
    pub fn is_any(&self) -> bool {
        let Self { gamma, every, first, decay, noise } = self;
        gamma.or(*decay).or(*noise).is_some() || every.or(*first).is_some()
    }

    fn apply(&self, params: &mut ParamsSrkl) {
        if let Curvature::Step(StepCurvature { decay, noise }) = &mut params.curvature {
            *decay = self.decay.unwrap_or(*decay);
            *noise = self.noise.unwrap_or(*noise);
            let Measure { every, first, .. } = &mut params.measure;
            *every = self.every.unwrap_or(*every);
            *first = self.first.unwrap_or(*first);
            params.beta = self.gamma.map_or(params.beta, Beta::Tied);
        }
    }
}

impl Rule {
    pub fn name(self) -> &'static str {
        match self {
            Self::Sgd => "SGD",
            Self::Adamw => "AdamW",
            Self::AdamwAveraged => "AdamW, averaged",
            Self::Reference => "reference",
            Self::Kinetic => "kinetic",
            Self::BrakedAdam => "braked Adam",
            Self::BrakedAdamAveraged => "braked Adam, averaged",
            Self::Hessian => "hessian",
        }
    }

    /// The preset's, or candle's. Its SGD has none, and gets AdamW's.
    pub fn default_lr(self) -> f64 {
        self.preset().map_or(ParamsAdamW::default().lr, |preset| preset.lr)
    }

    pub fn averages(self) -> bool {
        matches!(self, Self::AdamwAveraged | Self::BrakedAdamAveraged)
    }

    /// SRKL's settings but for the learning rate; `None` for candle's own optimizers.
    fn preset(self) -> Option<ParamsSrkl> {
        match self {
            Self::Sgd | Self::Adamw | Self::AdamwAveraged => None,
            Self::Reference => Some(ParamsSrkl::reference()),
            Self::Kinetic => Some(ParamsSrkl::kinetic()),
            Self::BrakedAdam => Some(ParamsSrkl::braked_adam()),
            Self::BrakedAdamAveraged => Some(ParamsSrkl::braked_adam_averaged()),
            Self::Hessian => Some(ParamsSrkl::hessian()),
        }
    }
}

pub enum AnyOptimizer {
    Sgd(SGD),
    AdamW(AdamW),
    AdamWAveraged(AdamW, Average),
    Srkl(Srkl),
}

impl AnyOptimizer {
    pub fn new(rule: Rule, lr: f64, seed: u64, variant: &Variant, varmap: &VarMap) -> Result<Self> {
        if let Some(preset) = rule.preset() {
            let mut params = ParamsSrkl { lr, ..preset };
            variant.apply(&mut params);
            params.measure.seed = seed;
            return Ok(Self::Srkl(Srkl::from_varmap(varmap, params)?));
        }
        let vars = varmap.all_vars();
        if rule == Rule::Sgd {
            return Ok(Self::Sgd(SGD::new(vars, lr)?));
        }
        // No decay, as the others have none.
        let params = ParamsAdamW { lr, weight_decay: 0., ..ParamsAdamW::default() };
        let adamw = AdamW::new(vars.clone(), params)?;
        Ok(match rule.averages() {
            true => Self::AdamWAveraged(adamw, Average::new(vars)),
            false => Self::AdamW(adamw),
        })
    }

    /// How many gradients the next step needs.
    pub fn next_cost(&self) -> usize {
        match self {
            Self::Srkl(srkl) if srkl.measuring() => 2,
            _ => 1,
        }
    }

    /// One step; calls `loss` once for each gradient, and returns the first.
    pub fn step(
        &mut self,
        mut loss: impl FnMut() -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        if let Self::Srkl(srkl) = self {
            return srkl.backward_step_with(loss);
        }
        let loss = loss()?;
        match self {
            Self::Sgd(sgd) => sgd.backward_step(&loss)?,
            Self::AdamW(adamw) => adamw.backward_step(&loss)?,
            Self::AdamWAveraged(adamw, average) => {
                adamw.backward_step(&loss)?;
                average.update()?;
            }
            Self::Srkl(_) => unreachable!("stepped above"),
        }
        Ok(loss)
    }

    /// Calls `judge` while the parameters are those to judge the optimizer by: the averages, if it
    /// keeps any.
    pub fn judged<T>(&mut self, rule: Rule, judge: impl FnOnce() -> Result<T>) -> Result<T> {
        match self {
            Self::AdamWAveraged(_, average) => average.swapped(judge),
            Self::Srkl(srkl) if rule.averages() => {
                let _averaged = srkl.swap_averaged()?;
                judge()
            }
            _ => judge(),
        }
    }

    /// The brake `phi` of the last step, the mean over tensors; `None` without a brake, and where
    /// every element has its own.
    pub fn brake(&self) -> Result<Option<f64>> {
        let Self::Srkl(srkl) = self else { return Ok(None) };
        let phis: Vec<f64> = srkl.telemetry()?.into_iter().filter_map(|block| block.phi).collect();
        Ok((!phis.is_empty()).then(|| phis.iter().sum::<f64>() / phis.len() as f64))
    }
}

/// Averaged weights by hand, for optimizers that don't keep any.
pub struct Average {
    vars: Vec<Var>,
    averages: Vec<Tensor>,
    steps: i32,
}

impl Average {
    fn new(vars: Vec<Var>) -> Self {
        Self { vars, averages: vec![], steps: 0 }
    }

    /// `a <- a + (1 - c) / (1 - c^t) * (w - a)`: the first average is the weights themselves.
    fn update(&mut self) -> candle_core::Result<()> {
        self.steps += 1;
        if self.averages.is_empty() {
            self.averages = copies(&self.vars)?;
            return Ok(());
        }
        let share = (1. - AVERAGE) / (1. - AVERAGE.powi(self.steps));
        for (average, var) in self.averages.iter_mut().zip(&self.vars) {
            *average = (&*average + ((var.as_tensor() - &*average)? * share)?)?;
        }
        Ok(())
    }

    fn swapped<T>(&self, judge: impl FnOnce() -> Result<T>) -> Result<T> {
        let weights = copies(&self.vars)?;
        set(&self.vars, &self.averages)?;
        let judged = judge();
        set(&self.vars, &weights)?;
        judged
    }
}

fn copies(vars: &[Var]) -> candle_core::Result<Vec<Tensor>> {
    vars.iter().map(|var| var.as_tensor().detach().copy()).collect()
}

fn set(vars: &[Var], values: &[Tensor]) -> candle_core::Result<()> {
    vars.iter().zip(values).try_for_each(|(var, value)| var.set(value))
}
