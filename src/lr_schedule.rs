//! [`LrSchedule`]: a multiplier of the learning rate, by the number of the step.

use std::f64::consts::PI;
use std::str::{FromStr, SplitWhitespace};

use candle_core::{Result, bail};

use crate::params::{Above, check};

/// How deep schedules may be within others.
const MAX_DEPTH: usize = 64;

/// A schedule of the learning rate: the multiplier `s` of `phi` by the number of the step, for
/// [`Srkl::set_schedule`](crate::Srkl::set_schedule).
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_nn::Optimizer;
/// use candle_srkl::{LrSchedule, ParamsSrkl, Srkl};
///
/// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
/// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::adamw(1.))?;
/// // 9 steps of warm-up, then a cosine down to a hundredth over 90.
/// opt.set_schedule(Some(LrSchedule::warmup(9).then(9, LrSchedule::cosine(90, 0.01))))?;
/// assert_eq!(opt.learning_rate(), 0.1);
/// for _ in 0..99 {
///     opt.backward_step(&w.sqr()?.sum_all()?)?;
/// }
/// assert_eq!(opt.learning_rate(), 0.01);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// **How steps are counted.** The first step has number 0. A part "over `n` steps" has its first value at step 0 and its last
/// one at step `n`, the first step after it, as PyTorch's `LinearLR` and `CosineAnnealingLR`; where it ends it stays. So of a
/// training of `n` steps in all the last one, number `n - 1`, is one before the end of `cosine(n, floor)`.
///
/// | PyTorch | here |
/// |---|---|
/// | `LinearLR(start_factor=a, end_factor=b, total_iters=n)` | `Linear { from: a, to: b, steps: n }` |
/// | `ConstantLR(factor=a, total_iters=n)` | `constant().scaled(a).then(n, constant())` |
/// | `CosineAnnealingLR(T_max=n, eta_min=floor * lr)` | `cosine(n, floor)`, which does not rise again behind `n` |
/// | `StepLR(step_size=n, gamma=g)`, `ExponentialLR(gamma=g)` | `step(n, g)`, `step(1, g)` |
/// | `MultiStepLR(milestones=[a, b], gamma=g)` | `constant().then(a, constant().scaled(g)).then(b, constant().scaled(g * g))` |
/// | `OneCycleLR(max_lr, total_steps=n, pct_start=p)` | `one_cycle(p n - 1, n - p n, 1. / 25., 4e-6)` with `lr` as `max_lr` |
/// | `SequentialLR([a, b, c], milestones=[m, n])` | `a.then(m, b).then(n, c)` |
/// | `ChainedScheduler([a, b])` | `a.times(b)`, of those that multiply the rate: not of `OneCycleLR`, nor a cosine whose `eta_min` is not 0 |
/// | the warm-up of `transformers`' `get_cosine_schedule_with_warmup`, whose first step is 0 | `Linear { from: 0., to: 1., steps: n }` |
///
/// Plain data: compare it, clone it, keep it in a file (feature `serde`). Write schedules by the functions below; ranges are
/// checked when an optimizer takes them. Multipliers are computed on the host, with the cosine and the power of the
/// platform's mathematical library.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub enum LrSchedule {
    /// The same for all steps. Finite, 0 or above.
    Constant(f64),
    /// `from + (to - from) t / steps` at step `t`, and `to` from step `steps` on.
    Linear {
        /// The multiplier of step 0. Finite, 0 or above.
        from: f64,
        /// That of step `steps`, and of all behind it. Finite, 0 or above.
        to: f64,
        /// The number of steps from one to the other. With 0 it is `to` at once.
        steps: u64,
    },
    /// `to + (from - to) (1 + cos(pi t / steps)) / 2` at step `t`, and `to` from step `steps` on.
    Cosine {
        /// The multiplier of step 0. Finite, 0 or above.
        from: f64,
        /// That of step `steps`, and of all behind it. Finite, 0 or above.
        to: f64,
        /// The number of steps from one to the other. With 0 it is `to` at once.
        steps: u64,
    },
    /// `gamma^floor(t / every)` at step `t`.
    Step {
        /// The number of steps from one change to the next. 1 or above.
        every: u64,
        /// What each change multiplies by. From 0 to 1.
        gamma: f64,
    },
    /// Schedules one after the other, each with the step that is its number 0: see [`then`](Self::then). At least one; the
    /// first begins at 0, and each other one later than the one before it.
    Sequence(Vec<(u64, LrSchedule)>),
    /// The product of schedules: see [`times`](Self::times).
    Product(Vec<LrSchedule>),
}

impl LrSchedule {
    /// 1 for all steps.
    #[must_use]
    pub fn constant() -> Self {
        Self::Constant(1.)
    }

    /// A linear warm-up over `steps` steps that begins above 0: `(t + 1) / (steps + 1)` at step `t`, and 1 from step `steps`
    /// on.
    ///
    /// A first step of 0, as some libraries have it, would move nothing. (PyTorch:
    /// `LinearLR(start_factor=1 / (n + 1), total_iters=n)`.)
    #[must_use]
    pub fn warmup(steps: u64) -> Self {
        Self::Linear { from: 1. / (steps as f64 + 1.), to: 1., steps }
    }

    /// Half a cosine from 1 to `floor` over `steps` steps.
    #[must_use]
    pub fn cosine(steps: u64, floor: f64) -> Self {
        Self::Cosine { from: 1., to: floor, steps }
    }

    /// A line from 1 to `floor` over `steps` steps.
    #[must_use]
    pub fn linear_decay(steps: u64, floor: f64) -> Self {
        Self::Linear { from: 1., to: floor, steps }
    }

    /// 1 for the first `every` steps, `gamma` for the next, then `gamma^2`, and so on.
    #[must_use]
    pub fn step(every: u64, gamma: f64) -> Self {
        Self::Step { every, gamma }
    }

    /// From `start` up to 1 over `rise` steps, and down to `end` over the next `fall`, each by half a cosine.
    ///
    /// PyTorch's `OneCycleLR` has 1/25 and 4e-6 by default, is at its peak one step before `pct_start * total_steps`, which need
    /// not be a whole number, and ends at step `total_steps - 1`: for 100 steps and 0.3 that is `one_cycle(29, 70, ..)`. It
    /// changes the momentum too, which this does not.
    #[must_use]
    pub fn one_cycle(rise: u64, fall: u64, start: f64, end: f64) -> Self {
        let up = Self::Cosine { from: start, to: 1., steps: rise };
        up.then(rise, Self::cosine(fall, end))
    }

    /// A [`warmup`](Self::warmup), then `stable` steps of 1, then a line down to `floor` over `decay` steps.
    ///
    /// For another decay: `LrSchedule::warmup(a).then(a + b, LrSchedule::cosine(c, floor))`.
    #[must_use]
    pub fn warmup_stable_decay(warmup: u64, stable: u64, decay: u64, floor: f64) -> Self {
        Self::warmup(warmup).then(warmup.saturating_add(stable), Self::linear_decay(decay, floor))
    }

    /// This one before step `at`, and from there on `next`, whose step 0 it is. What this one would have done from `at` on is
    /// left out, and `next` begins with its own value: it is not multiplied by the last one of this.
    ///
    /// ```
    /// use candle_srkl::LrSchedule;
    ///
    /// let schedule = LrSchedule::constant().then(10, LrSchedule::linear_decay(4, 0.));
    /// let factors: Vec<f64> = (9..16).map(|step| schedule.factor(step)).collect();
    /// assert_eq!(factors, [1., 1., 0.75, 0.5, 0.25, 0., 0.]);
    /// ```
    #[must_use]
    pub fn then(self, at: u64, next: Self) -> Self {
        let mut parts = match self {
            Self::Sequence(parts) => parts,
            first => vec![(0, first)],
        };
        parts.retain(|(start, _)| *start < at);
        parts.push((at, next));
        Self::Sequence(parts)
    }

    /// The product of both, step by step: for instance a warm-up of a schedule that goes on below it.
    ///
    /// ```
    /// use candle_srkl::LrSchedule;
    ///
    /// let schedule = LrSchedule::warmup(1).times(LrSchedule::step(2, 0.5));
    /// assert_eq!([0, 1, 2].map(|step| schedule.factor(step)), [0.5, 1., 0.5]);
    /// ```
    #[must_use]
    pub fn times(self, other: Self) -> Self {
        let mut factors = match self {
            Self::Product(factors) => factors,
            first => vec![first],
        };
        factors.push(other);
        Self::Product(factors)
    }

    /// This one times a number.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        match self {
            Self::Constant(constant) => Self::Constant(constant * factor),
            schedule => schedule.times(Self::Constant(factor)),
        }
    }

    /// The multiplier of step number `step`; the first step has number 0. Finite and 0 or above, if the settings are in
    /// range.
    #[must_use]
    pub fn factor(&self, step: u64) -> f64 {
        match self {
            Self::Constant(factor) => *factor,
            Self::Linear { from, to, steps } if step < *steps => {
                blend(*from, *to, step as f64 / *steps as f64)
            }
            Self::Cosine { from, to, steps } if step < *steps => {
                let turn = PI * (step as f64 / *steps as f64);
                blend(*from, *to, (1. - turn.cos()) / 2.)
            }
            Self::Linear { to, .. } | Self::Cosine { to, .. } => *to,
            Self::Step { every, gamma } => {
                let changes = step.checked_div(*every).unwrap_or(0);
                gamma.powf(changes as f64)
            }
            Self::Sequence(parts) => {
                let part = parts.iter().rev().find(|(start, _)| *start <= step);
                part.map_or(1., |(start, schedule)| schedule.factor(step - start))
            }
            Self::Product(factors) => factors.iter().map(|f| f.factor(step)).product(),
        }
    }

    /// At least the largest multiplier.
    fn bound(&self) -> f64 {
        match self {
            Self::Constant(factor) => *factor,
            Self::Linear { from, to, .. } | Self::Cosine { from, to, .. } => from.max(*to),
            Self::Step { .. } => 1.,
            Self::Sequence(parts) => parts.iter().map(|(_, part)| part.bound()).fold(0., f64::max),
            Self::Product(factors) => factors.iter().map(Self::bound).product(),
        }
    }

    /// The largest number that a learning rate `lr` may be multiplied to is finite.
    pub(crate) fn check_lr(&self, lr: f64) -> Result<()> {
        check("largest multiplier of the schedule, times `lr`", self.bound() * lr, Above::OrZero)
    }

    /// # Errors
    ///
    /// A setting out of range.
    pub(crate) fn validate(&self) -> Result<()> {
        self.validate_at(0).map_err(|e| e.context("the learning-rate schedule"))
    }

    fn validate_at(&self, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            bail!("expected at most {MAX_DEPTH} schedules within each other")
        }
        match self {
            Self::Constant(factor) => check("LrSchedule::Constant", *factor, Above::OrZero),
            Self::Linear { from, to, .. } => {
                check("from (LrSchedule::Linear)", *from, Above::OrZero)?;
                check("to (LrSchedule::Linear)", *to, Above::OrZero)
            }
            Self::Cosine { from, to, .. } => {
                check("from (LrSchedule::Cosine)", *from, Above::OrZero)?;
                check("to (LrSchedule::Cosine)", *to, Above::OrZero)
            }
            Self::Step { every: 0, .. } => {
                bail!("`every` (LrSchedule::Step): expected 1 or above, got 0")
            }
            Self::Step { gamma, .. } if !(0. ..=1.).contains(gamma) => {
                bail!("`gamma` (LrSchedule::Step): expected a number from 0 to 1, got {gamma}")
            }
            Self::Step { .. } => Ok(()),
            Self::Sequence(parts) => {
                let starts: Vec<u64> = parts.iter().map(|(start, _)| *start).collect();
                if starts.first() != Some(&0) || !starts.is_sorted_by(|a, b| a < b) {
                    bail!(
                        "`LrSchedule::Sequence`: expected schedules that begin at step 0 and then each later than the one before \
                         it, got them at {starts:?}"
                    )
                }
                parts.iter().try_for_each(|(_, part)| part.validate_at(depth + 1))
            }
            Self::Product(factors) => {
                factors.iter().try_for_each(|factor| factor.validate_at(depth + 1))?;
                check("largest multiplier of LrSchedule::Product", self.bound(), Above::OrZero)
            }
        }
    }

    /// Words with spaces between them, each schedule with the number of those in it before these. Numbers are the shortest
    /// decimals that read back exactly.
    fn to_text(&self) -> String {
        match self {
            Self::Constant(factor) => format!("constant {factor:?}"),
            Self::Linear { from, to, steps } => format!("linear {from:?} {to:?} {steps}"),
            Self::Cosine { from, to, steps } => format!("cosine {from:?} {to:?} {steps}"),
            Self::Step { every, gamma } => format!("step {every} {gamma:?}"),
            Self::Sequence(parts) => {
                let each = parts.iter().map(|(start, part)| format!(" {start} {}", part.to_text()));
                format!("sequence {}{}", parts.len(), each.collect::<String>())
            }
            Self::Product(factors) => {
                let each = factors.iter().map(|factor| format!(" {}", factor.to_text()));
                format!("product {}{}", factors.len(), each.collect::<String>())
            }
        }
    }

    /// Reads what [`to_text`](Self::to_text) wrote, up to its last word.
    fn read(words: &mut SplitWhitespace, depth: usize) -> Result<Self> {
        if depth > MAX_DEPTH {
            bail!("expected at most {MAX_DEPTH} schedules within each other")
        }
        let schedule = match words.next() {
            Some("constant") => Self::Constant(word(words)?),
            Some("linear") => {
                Self::Linear { from: word(words)?, to: word(words)?, steps: word(words)? }
            }
            Some("cosine") => {
                Self::Cosine { from: word(words)?, to: word(words)?, steps: word(words)? }
            }
            Some("step") => Self::Step { every: word(words)?, gamma: word(words)? },
            Some("sequence") => {
                let count: u64 = word(words)?;
                let part = |_| Ok((word(words)?, Self::read(words, depth + 1)?));
                Self::Sequence((0..count).map(part).collect::<Result<_>>()?)
            }
            Some("product") => {
                let count: u64 = word(words)?;
                let factor = |_| Self::read(words, depth + 1);
                Self::Product((0..count).map(factor).collect::<Result<_>>()?)
            }
            Some(other) => bail!("expected a kind of schedule, got {other:?}"),
            None => bail!("expected a kind of schedule behind the last word"),
        };
        Ok(schedule)
    }
}

/// A schedule, and where it is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scheduled {
    pub schedule: LrSchedule,
    /// The number of the next step.
    pub step: u64,
}

impl Scheduled {
    /// Of the next step.
    pub fn multiplier(&self) -> f64 {
        self.schedule.factor(self.step)
    }

    pub fn to_text(&self) -> String {
        format!("{} {}", self.step, self.schedule.to_text())
    }
}

impl FromStr for Scheduled {
    type Err = candle_core::Error;

    /// # Errors
    ///
    /// Anything but what [`Scheduled::to_text`] writes of a schedule whose settings are in range.
    fn from_str(text: &str) -> Result<Self> {
        let mut words = text.split_whitespace();
        let step = word(&mut words)?;
        let schedule = LrSchedule::read(&mut words, 0)?;
        if let Some(word) = words.next() {
            bail!("expected nothing behind the schedule, got {word:?}")
        }
        schedule.validate()?;
        Ok(Self { schedule, step })
    }
}

fn word<T: FromStr>(words: &mut SplitWhitespace) -> Result<T> {
    match words.next().map(|word| (word, word.parse())) {
        Some((_, Ok(number))) => Ok(number),
        Some((word, Err(_))) => bail!("expected a number, got {word:?}"),
        None => bail!("expected a number behind the last word"),
    }
}

/// From `from` where `x` is 0 to `to` where it is 1, exactly, and never beyond them.
fn blend(from: f64, to: f64, x: f64) -> f64 {
    (from * (1. - x) + to * x).max(from.min(to)).min(from.max(to))
}
