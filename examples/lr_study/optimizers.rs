//! The optimizers that are compared, behind one interface.

use anyhow::Result;
use candle_core::{Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD, VarMap};
use candle_srkl::{
    Average as Kept, AverageFormat, Beta, Curvature, Measure, ParamsSrkl, Srkl, StateFormat,
    StepCurvature,
};
use clap::{Args, ValueEnum};

use crate::average::{Average, Share, swapped};
use crate::peers::{ParamsProdigy, ParamsScheduleFree, Prodigy, ScheduleFreeAdamW};
use crate::schedule::Schedule;

/// Warm-up's share of a training: of AdamW with a cosine, and of Schedule-Free AdamW. Its package has none by default but
/// recommends one, and several trainings in its paper have this one.
const WARM_UP: f64 = 0.1;
const WARM_UP_SCHEDULE_FREE: f64 = 0.05;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Rule {
    Sgd,
    Adamw,
    /// AdamW with warm-up and cosine
    AdamwCosine,
    /// AdamW, judged by exponential averages of the weights
    AdamwAveraged,
    /// AdamW, judged by polynomial averages of the weights
    AdamwPolynomial,
    Prodigy,
    /// Prodigy with cosine
    ProdigyCosine,
    /// Schedule-Free AdamW with warm-up, judged by its averages
    ScheduleFree,
    Muon,
    /// Muon with warm-up and cosine
    MuonCosine,
    /// Muon, judged by polynomial averages of the weights
    MuonPolynomial,
    Reference,
    Kinetic,
    BrakedAdam,
    /// Braked Adam, judged by averaged weights
    BrakedAdamAveraged,
    BrakedMuon,
    /// Braked Muon, judged by averaged weights
    BrakedMuonAveraged,
    Hessian,
}

/// What kinetic, braked Adam, braked Muon and plain Muon have instead of their presets' settings.
#[derive(Args, Clone, Copy, Debug)]
pub struct Variant {
    /// For kinetic, braked Adam and braked Muon: beta over lr, instead of the preset's. This and the next four need an
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
    /// For all but candle's optimizers and peers: moments in 8 bits each, and averages in bf16. It needs an --out of its own
    #[arg(long)]
    compact: bool,
}

impl Variant {
    pub fn is_any(&self) -> bool {
        let Self { gamma, every, first, decay, noise, compact } = self;
        gamma.or(*decay).or(*noise).is_some() || every.or(*first).is_some() || *compact
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
        if self.compact {
            params.state = StateFormat::Compact;
            params.average_format = AverageFormat::BF16;
        }
    }
}

impl Rule {
    pub fn name(self) -> &'static str {
        match self {
            Self::Sgd => "SGD",
            Self::Adamw => "AdamW",
            Self::AdamwCosine => "AdamW, cosine",
            Self::AdamwAveraged => "AdamW, averaged",
            Self::AdamwPolynomial => "AdamW, polynomial average",
            Self::Prodigy => "Prodigy",
            Self::ProdigyCosine => "Prodigy, cosine",
            Self::ScheduleFree => "Schedule-Free AdamW",
            Self::Muon => "Muon",
            Self::MuonCosine => "Muon, cosine",
            Self::MuonPolynomial => "Muon, polynomial average",
            Self::Reference => "reference",
            Self::Kinetic => "kinetic",
            Self::BrakedAdam => "braked Adam",
            Self::BrakedAdamAveraged => "braked Adam, averaged",
            Self::BrakedMuon => "braked Muon",
            Self::BrakedMuonAveraged => "braked Muon, averaged",
            Self::Hessian => "hessian",
        }
    }

    /// The preset's, candle's, or that of the authors' package. candle's SGD has none, and gets AdamW's.
    pub fn default_lr(self) -> f64 {
        match self {
            Self::Prodigy | Self::ProdigyCosine => ParamsProdigy::default().lr,
            Self::ScheduleFree => ParamsScheduleFree::default().lr,
            _ => self.preset().map_or(ParamsAdamW::default().lr, |preset| preset.lr),
        }
    }

    fn schedule(self) -> Schedule {
        match self {
            Self::AdamwCosine | Self::MuonCosine => Schedule { warm_up: WARM_UP, cosine: true },
            Self::ProdigyCosine => Schedule { warm_up: 0., cosine: true },
            Self::ScheduleFree => Schedule { warm_up: WARM_UP_SCHEDULE_FREE, cosine: false },
            _ => Schedule::CONSTANT,
        }
    }

    /// Of optimizers that keep none themselves.
    fn average(self) -> Option<Share> {
        match self {
            // As braked Adam's.
            Self::AdamwAveraged => Some(Share::Exponential(0.98)),
            Self::AdamwPolynomial => Some(Share::Polynomial(8.)),
            _ => None,
        }
    }

    /// Whether it trains as the rule without averages does, and only is judged by them.
    pub fn averages(self) -> bool {
        self.average().is_some() || self.preset().is_some_and(|preset| preset.average.is_some())
    }

    /// SRKL's settings but for the learning rate; `None` for the optimizers of others.
    fn preset(self) -> Option<ParamsSrkl> {
        // PyTorch's learning rate, and no decay, as the others have none.
        let muon = ParamsSrkl { weight_decay: 0., ..ParamsSrkl::muon(1e-3) };
        match self {
            Self::Sgd
            | Self::Adamw
            | Self::AdamwCosine
            | Self::AdamwAveraged
            | Self::AdamwPolynomial
            | Self::Prodigy
            | Self::ProdigyCosine
            | Self::ScheduleFree => None,
            Self::Muon | Self::MuonCosine => Some(muon),
            Self::MuonPolynomial => {
                Some(ParamsSrkl { average: Some(Kept::Polynomial(8.)), ..muon })
            }
            Self::Reference => Some(ParamsSrkl::reference()),
            Self::Kinetic => Some(ParamsSrkl::kinetic()),
            Self::BrakedAdam => Some(ParamsSrkl::braked_adam()),
            Self::BrakedAdamAveraged => Some(ParamsSrkl::braked_adam_averaged()),
            Self::BrakedMuon => Some(ParamsSrkl::braked_muon()),
            Self::BrakedMuonAveraged => Some(ParamsSrkl::braked_muon_averaged()),
            Self::Hessian => Some(ParamsSrkl::hessian()),
        }
    }
}

/// An optimizer with its schedule and, where it keeps none itself, averages.
pub struct AnyOptimizer {
    method: Method,
    vars: Vec<Var>,
    lr: f64,
    schedule: Schedule,
    average: Option<Average>,
    /// How many gradients the training has, and how many of them are spent.
    budget: usize,
    spent: usize,
}

enum Method {
    Sgd(SGD),
    AdamW(AdamW),
    Prodigy(Prodigy),
    ScheduleFree(ScheduleFreeAdamW),
    Srkl(Box<Srkl>),
}

impl AnyOptimizer {
    /// For a training of `budget` gradients.
    pub fn new(
        rule: Rule,
        lr: f64,
        budget: usize,
        seed: u64,
        variant: &Variant,
        varmap: &VarMap,
    ) -> Result<Self> {
        let vars = varmap.all_vars();
        let method = match (rule, rule.preset()) {
            (_, Some(preset)) => {
                let mut params = ParamsSrkl { lr, ..preset };
                variant.apply(&mut params);
                params.measure.seed = seed;
                Method::Srkl(Box::new(Srkl::from_varmap(varmap, params)?))
            }
            (Rule::Sgd, None) => Method::Sgd(SGD::new(vars.clone(), lr)?),
            (Rule::Prodigy | Rule::ProdigyCosine, None) => {
                let params = ParamsProdigy { lr, ..ParamsProdigy::default() };
                Method::Prodigy(Prodigy::new(vars.clone(), params)?)
            }
            (Rule::ScheduleFree, None) => {
                let params = ParamsScheduleFree { lr, ..ParamsScheduleFree::default() };
                Method::ScheduleFree(ScheduleFreeAdamW::new(vars.clone(), params)?)
            }
            (_, None) => {
                // No decay, as the others have none.
                let params = ParamsAdamW { lr, weight_decay: 0., ..ParamsAdamW::default() };
                Method::AdamW(AdamW::new(vars.clone(), params)?)
            }
        };
        let (schedule, average) = (rule.schedule(), rule.average().map(Average::new));
        Ok(Self { method, vars, lr, schedule, average, budget, spent: 0 })
    }

    /// How many gradients the next step needs.
    pub fn next_cost(&self) -> usize {
        match &self.method {
            Method::Srkl(srkl) if srkl.measuring() => 2,
            _ => 1,
        }
    }

    /// One step; calls `loss` once for each gradient, and returns the first.
    pub fn step(
        &mut self,
        mut loss: impl FnMut() -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let lr = self.lr * self.schedule.factor(self.spent, self.budget);
        let loss = || {
            self.spent += 1;
            loss()
        };
        let loss = match &mut self.method {
            Method::Sgd(sgd) => step_once(sgd, lr, loss)?,
            Method::AdamW(adamw) => step_once(adamw, lr, loss)?,
            Method::Prodigy(prodigy) => step_once(prodigy, lr, loss)?,
            Method::ScheduleFree(schedule_free) => step_once(schedule_free, lr, loss)?,
            Method::Srkl(srkl) => {
                srkl.set_learning_rate(lr);
                srkl.backward_step_with(loss)?
            }
        };
        if let Some(average) = &mut self.average {
            average.update(&self.vars)?;
        }
        Ok(loss)
    }

    /// Calls `judge` while the parameters are those to judge the optimizer by: the averages, if it
    /// keeps any.
    pub fn judged<T>(&mut self, rule: Rule, judge: impl FnOnce() -> Result<T>) -> Result<T> {
        match (&mut self.method, &self.average) {
            (_, Some(average)) => swapped(&self.vars, average.averages(), judge),
            (Method::ScheduleFree(opt), _) => swapped(&self.vars, &opt.averages(), judge),
            (Method::Srkl(srkl), _) if rule.averages() => {
                let _averaged = srkl.swap_averaged()?;
                judge()
            }
            _ => judge(),
        }
    }

    /// The brake `phi` of the last step, the mean over tensors; `None` without a brake, and where
    /// every element has its own.
    pub fn brake(&self) -> Result<Option<f64>> {
        let Method::Srkl(srkl) = &self.method else { return Ok(None) };
        let phis: Vec<f64> = srkl.telemetry()?.into_iter().filter_map(|block| block.phi).collect();
        Ok((!phis.is_empty()).then(|| phis.iter().sum::<f64>() / phis.len() as f64))
    }
}

/// Returns the loss before the step.
fn step_once(
    opt: &mut impl Optimizer,
    lr: f64,
    loss: impl FnOnce() -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    opt.set_learning_rate(lr);
    let loss = loss()?;
    opt.backward_step(&loss)?;
    Ok(loss)
}
