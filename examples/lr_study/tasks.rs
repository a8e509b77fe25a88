//! What is trained, for how long, and what counts as success.

use anyhow::Result;
use candle_core::Tensor;
use candle_nn::VarMap;
use clap::ValueEnum;

use crate::functions;
use crate::networks::{CharLm, Digits};

/// Learning rates half a decade apart.
pub const GRID: [f64; 15] =
    [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1., 3., 10., 30., 100., 300., 1000.];

/// Values below all count as 0.
const TINY: f64 = 1e-6;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Task {
    /// 64-256-10 perceptron on handwritten digits
    Digits,
    /// 5-layer perceptron on handwritten digits
    Deep,
    /// Character-level transformer on Shakespeare, 1 layer of 32
    CharLm,
    /// The same, 2 layers of 64
    CharLm64,
    /// The same, 4 layers of 128
    CharLm128,
    /// Rotated quadratic of 50 dimensions and condition 10,000
    Quadratic,
    /// Rosenbrock's function from (-1.2, 1)
    Rosenbrock,
    /// Logistic regression on separable classes
    Logistic,
}

/// A task under way: parameters, and what is to be made small by them.
pub trait Problem {
    fn varmap(&self) -> &VarMap;

    /// Goes on to the next batch, where there are batches.
    fn draw(&mut self) -> Result<()> {
        Ok(())
    }

    /// Of the present batch.
    fn loss(&self) -> Result<Tensor>;

    fn judge(&self) -> Result<Judged>;
}

/// How good the parameters are.
#[derive(Clone, Copy)]
pub struct Judged {
    /// Over a fixed set of data: a run that ends with a higher one than at its start has diverged.
    pub loss: f64,
    pub score: f64,
}

/// What a score is.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// A share, the higher the better.
    Accuracy,
    /// A cross entropy, the lower the better.
    Nats,
    /// The value of a function whose minimum (or infimum) is 0.
    Value,
}

pub enum Target {
    Score(f64),
    /// So much worse than AdamW's best score.
    BesideAdamW(f64),
}

/// How long and how densely a task is studied.
pub struct Plan {
    /// The budget of a run, in gradients.
    pub evaluations: usize,
    pub seeds: u64,
    pub half_decades: bool,
}

impl Task {
    pub fn title(self) -> &'static str {
        match self {
            Self::Digits => "Digits, MLP 64-256-10",
            Self::Deep => "Digits, 5-layer MLP",
            Self::CharLm => "Character transformer",
            Self::CharLm64 => "Character transformer, 2 layers of 64",
            Self::CharLm128 => "Character transformer, 4 layers of 128",
            Self::Quadratic => "Rotated quadratic",
            Self::Rosenbrock => "Rosenbrock",
            Self::Logistic => "Separable logistic regression",
        }
    }

    pub fn score(self) -> &'static str {
        match self {
            Self::Digits | Self::Deep => "accuracy on held-out images",
            Self::CharLm | Self::CharLm64 | Self::CharLm128 => {
                "loss on held-out text, nats a character"
            }
            Self::Quadratic | Self::Rosenbrock => "final loss",
            Self::Logistic => "final training loss",
        }
    }

    pub fn kind(self) -> Kind {
        match self {
            Self::Digits | Self::Deep => Kind::Accuracy,
            Self::CharLm | Self::CharLm64 | Self::CharLm128 => Kind::Nats,
            Self::Quadratic | Self::Rosenbrock | Self::Logistic => Kind::Value,
        }
    }

    pub fn target(self) -> Target {
        match self {
            Self::Digits => Target::Score(0.97),
            Self::Deep => Target::Score(0.96),
            Self::CharLm | Self::CharLm64 | Self::CharLm128 => Target::BesideAdamW(0.08),
            Self::Quadratic => Target::Score(0.01),
            Self::Rosenbrock => Target::Score(0.002),
            Self::Logistic => Target::Score(0.01),
        }
    }

    /// Whether the short study has it, where no tasks are named: the others take long.
    pub fn is_short(self) -> bool {
        !matches!(self, Self::CharLm64 | Self::CharLm128)
    }

    /// Whether the full study has longer runs of it than the short one.
    pub fn grows(self) -> bool {
        !matches!(self, Self::CharLm | Self::CharLm64 | Self::CharLm128)
    }

    pub fn plan(self, full: bool) -> Plan {
        // (evaluations, seeds, half decades) of the short study and of the full one.
        let (short, full_study) = match self {
            Self::Digits => ((1000, 3, true), (3000, 3, true)),
            Self::Deep => ((1000, 3, true), (3000, 3, true)),
            Self::CharLm => ((500, 3, false), (500, 3, false)),
            Self::CharLm64 => ((1000, 3, false), (1000, 3, false)),
            Self::CharLm128 => ((500, 3, false), (500, 3, false)),
            Self::Quadratic => ((1000, 3, true), (3000, 3, true)),
            Self::Rosenbrock => ((2000, 1, true), (5000, 3, true)),
            Self::Logistic => ((500, 3, true), (2000, 3, true)),
        };
        let (evaluations, seeds, half_decades) = if full { full_study } else { short };
        Plan { evaluations, seeds, half_decades }
    }

    pub fn begin(self, seed: u64) -> Result<Box<dyn Problem>> {
        Ok(match self {
            Self::Digits => Box::new(Digits::shallow(seed)?),
            Self::Deep => Box::new(Digits::deep(seed)?),
            Self::CharLm => Box::new(CharLm::new(seed, 1, 32)?),
            Self::CharLm64 => Box::new(CharLm::new(seed, 2, 64)?),
            Self::CharLm128 => Box::new(CharLm::new(seed, 4, 128)?),
            Self::Quadratic => Box::new(functions::quadratic(seed)?),
            Self::Rosenbrock => Box::new(functions::rosenbrock()?),
            Self::Logistic => Box::new(functions::logistic(seed)?),
        })
    }
}

impl Kind {
    /// A number that is the lower, the better the score is.
    pub fn badness(self, score: f64) -> f64 {
        if self == Self::Accuracy { -score } else { score }
    }

    /// Whether a score is about as good as the best.
    pub fn is_near(self, score: f64, best: f64) -> bool {
        match self {
            Self::Accuracy => score >= best - 0.01,
            Self::Nats => score <= best + 0.02,
            Self::Value => score <= (10. * best).max(TINY),
        }
    }

    /// What [`Self::is_near`] means.
    pub fn near(self) -> &'static str {
        match self {
            Self::Accuracy => "1 percentage point",
            Self::Nats => "0.02 nats",
            Self::Value => "a factor of 10, or below 1e-6",
        }
    }

    /// A number whose differences say how much scores differ.
    pub fn scaled(self, score: f64) -> f64 {
        if self == Self::Value { score.max(TINY).log10() } else { score }
    }

    /// Of a standard deviation of [`Self::scaled`].
    pub fn format_spread(self, spread: f64) -> String {
        match self {
            Self::Accuracy => format!("{:.2}%", 100. * spread),
            Self::Nats => format!("{spread:.3}"),
            Self::Value => format!("x{:.1}", 10f64.powf(spread)),
        }
    }

    pub fn format_loss(self, loss: f64) -> String {
        match self {
            Self::Accuracy | Self::Nats => format!("{loss:.3}"),
            Self::Value => format!("{loss:.1e}"),
        }
    }

    pub fn format(self, score: f64) -> String {
        match self {
            Self::Accuracy => format!("{:.2}%", 100. * score),
            Self::Nats => format!("{score:.3}"),
            Self::Value => format!("{score:.1e}"),
        }
    }
}

impl Plan {
    pub fn grid(&self) -> Vec<f64> {
        GRID.iter().copied().step_by(if self.half_decades { 1 } else { 2 }).collect()
    }

    /// Between two learning rates of the grid, in decades.
    pub fn spacing(&self) -> f64 {
        if self.half_decades { 0.5 } else { 1. }
    }
}
