//! The estimate of a block's curvature. How a measurement enters it is in [`rule`](crate::rule).

use crate::numerics::fold;
use crate::params::Curvature;

/// The estimate of a block's curvature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    /// `Step`: the average of H, uncorrected. `Hutchinson`: H squared, corrected.
    pub mean: f64,
    /// `Hutchinson`: the sum of q over the block, corrected, whatever the scope.
    pub row_sum_sq: f64,
    /// The product of the average's decays: 1 before the first measurement.
    pub power: f64,
    /// `Step`: the average of half the squared differences of neighbouring measurements, uncorrected.
    pub variance: f64,
    /// `Step`: the last measurement, as it entered the average.
    pub entered: f64,
    /// `H` as the brake uses it.
    pub curvature: f64,
    /// `Step`: `||D|| / ||d||` of the last measured step: how many times its direction it was long.
    pub reach: f64,
    /// The last, the lowest and the highest `H` that was measured.
    pub last: f64,
    pub lowest: f64,
    pub highest: f64,
    /// How many measurements are in the average: with none there is no estimate.
    pub in_average: u64,
    /// Whether the last measurement was not finite.
    pub infinite: bool,
    /// `Step`: how many small steps in a row were too small to measure anything.
    pub still: u64,
    /// The number of steps, taken and skipped, at the last measurement.
    pub measured_at: u64,
    pub counts: Counts,
}

/// How measurements went: see [`Measurements`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub taken: u64,
    pub nonfinite: u64,
    pub unmoved: u64,
    pub uninformative: u64,
    pub missing: u64,
}

/// How measurements of curvature went: see [`Srkl::measurements`](crate::Srkl::measurements).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Measurements {
    /// How many entered the estimate.
    pub taken: u64,
    /// How many met a NaN or an infinity, and count as infinite curvature up to the next step that
    /// measures.
    pub nonfinite: u64,
    /// How many found the step too small, though it had a direction: it moved nothing, in the parameters' dtype, or,
    /// as the first one, changed no gradient. There is then no estimate, and the next step is a small one that
    /// measures.
    pub unmoved: u64,
    /// How many were ignored, because the step had no direction (it was skipped, or its gradients are 0), or with
    /// [`Curvature::Hutchinson`] because the first gradient is not finite.
    pub uninformative: u64,
    /// How many left this parameter out, because it had no second gradient.
    pub missing: u64,
    /// Steps, taken and skipped, since the last measurement that entered the estimate. `None` before the first.
    pub age: Option<u64>,
    /// The curvature `H` that the brake uses; an infinity after a measurement that was not finite, `None` without an
    /// estimate.
    pub curvature: Option<f64>,
    /// The last measured `H`. `None` before the first measurement, like the next two.
    pub last: Option<f64>,
    /// The lowest `H` measured so far.
    pub lowest: Option<f64>,
    /// The highest `H` measured so far.
    pub highest: Option<f64>,
}

/// Sums over the elements of a block or a chunk, left by a step that measures: of the change `D` of the parameter as
/// stored, the direction `d`, and the gradient or momentum `m` that `d` was made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct StepSums {
    /// `sum D^2`
    pub step: f64,
    /// `sum d^2`
    pub direction: f64,
    /// `sum d m`
    pub along: f64,
}

/// The sums of a measurement along a step, over a block or over several that share an `H`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Measured {
    /// `sum G^2`, with `G` the change of the gradient.
    pub change: f64,
    /// `sum D^2`
    pub step: f64,
    /// `sum d^2`
    pub direction: f64,
    /// The sum over strips of `||G|| ||D||`.
    pub bound: f64,
    /// The sum over blocks of `||D||^2 <d, m> / ||d||^2`, which is `<D, P D>`.
    pub metric: f64,
}

impl StepSums {
    /// The sums over all `items`, by rule 4 of the contract.
    pub fn fold(items: &[Self]) -> Self {
        let [step, direction, along] = fold(items.len(), |i| {
            let Self { step, direction, along } = items[i];
            [step, direction, along]
        });
        Self { step, direction, along }
    }
}

impl Measured {
    /// The sums over all `items`, by rule 4 of the contract.
    pub fn fold(items: &[Self]) -> Self {
        let [change, step, direction, bound, metric] = fold(items.len(), |i| {
            let Self { change, step, direction, bound, metric } = items[i];
            [change, step, direction, bound, metric]
        });
        Self { change, step, direction, bound, metric }
    }
}

/// How measurements along steps are averaged: `every` of [`Measure`](crate::params::Measure), and the fields of
/// [`StepCurvature`](crate::params::StepCurvature).
#[derive(Clone, Copy)]
pub(crate) struct Averaging {
    pub every: u64,
    pub decay: f64,
    pub noise: f64,
}

/// What a measurement did to an estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// It entered the average, or counts as infinite.
    Known,
    /// The step was too small: there is no estimate, and the next step measures.
    Lost,
    /// It was ignored: the estimate is as before.
    Unchanged,
}

/// Sums over a block of the change `G` of its gradient along a step `D`.
#[derive(Clone, Copy)]
pub(crate) struct ChangeSums {
    /// Of `G^2`.
    pub change_sq: f64,
    /// Of `||G|| ||D||` over strips.
    pub bound: f64,
}

/// Sums over all blocks of a measurement by a product with the Hessian.
#[derive(Clone, Copy)]
pub(crate) struct ProbeSums {
    /// Of `(H z)^2`.
    pub product_sq: f64,
    /// Of the first gradient's squares.
    pub gradient_sq: f64,
}

/// Whether a product with the Hessian is finite.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Probe {
    Finite,
    /// A NaN or an infinity in the second gradient.
    Infinite,
    /// A NaN or an infinity in the first gradient: the measurement is ignored.
    Nothing,
}

impl Probe {
    /// From the sums of [`probe_sums`](crate::backend::Backend::probe_sums) over all blocks.
    pub fn of(total: ProbeSums) -> Self {
        match (total.gradient_sq.is_finite(), total.product_sq.is_finite()) {
            (false, _) => Self::Nothing,
            (true, false) => Self::Infinite,
            (true, true) => Self::Finite,
        }
    }
}

impl Estimate {
    pub const NONE: Self = Self {
        mean: 0.,
        row_sum_sq: 0.,
        power: 1.,
        variance: 0.,
        entered: 0.,
        curvature: 0.,
        reach: 0.,
        last: 0.,
        lowest: f64::INFINITY,
        highest: 0.,
        in_average: 0,
        infinite: false,
        still: 0,
        measured_at: 0,
        counts: Counts { taken: 0, nonfinite: 0, unmoved: 0, uninformative: 0, missing: 0 },
    };

    /// Whether there is an estimate, finite or infinite.
    pub fn is_known(&self) -> bool {
        self.infinite || self.in_average > 0
    }

    /// `H`; `None` without an estimate.
    pub fn curvature(&self) -> Option<f64> {
        match self.infinite {
            true => Some(f64::INFINITY),
            false => (self.in_average > 0).then_some(self.curvature),
        }
    }

    /// The public view of the estimate, after `now` steps.
    pub fn measurements(&self, now: u64) -> Measurements {
        let Counts { taken, nonfinite, unmoved, uninformative, missing } = self.counts;
        let told = |x| (taken > 0).then_some(x);
        Measurements {
            taken,
            nonfinite,
            unmoved,
            uninformative,
            missing,
            age: self.age(now),
            curvature: self.curvature(),
            last: told(self.last),
            lowest: told(self.lowest),
            highest: told(self.highest),
        }
    }

    /// Steps since the last measurement that entered it.
    pub fn age(&self, now: u64) -> Option<u64> {
        (self.counts.taken > 0).then(|| now.saturating_sub(self.measured_at))
    }

    /// Whether it can come from a checkpoint.
    pub fn is_valid(&self, curvature: Curvature) -> bool {
        let Self { mean, row_sum_sq, power, in_average, .. } = *self;
        let Self { variance, entered, curvature: h, reach, last, lowest, highest, .. } = *self;
        // The estimate may be made of other blocks' rows alone.
        let by_others = matches!(curvature, Curvature::Hutchinson(_)) && row_sum_sq == 0.;
        [mean, row_sum_sq, variance, entered, h, reach, last, lowest, highest]
            .iter()
            .all(|number| *number >= 0.)
            && (0. ..=1.).contains(&power)
            && (power < 1. || in_average == 0 || by_others)
    }

    /// The text that a checkpoint saves.
    pub fn to_text(self) -> String {
        let Self { mean, row_sum_sq, power, variance, entered, curvature, last, .. } = self;
        let Self { lowest, highest, reach, .. } = self;
        let Counts { taken, nonfinite, unmoved, uninformative, missing } = self.counts;
        let (in_average, infinite, still) = (self.in_average, self.infinite as u8, self.still);
        format!(
            "{mean:?} {row_sum_sq:?} {power:?} {variance:?} {entered:?} {curvature:?} {last:?} {lowest:?} {highest:?} \
             {in_average} {infinite} {still} {} {taken} {nonfinite} {unmoved} {uninformative} {missing} {reach:?}",
            self.measured_at
        )
    }

    /// `reach` is not in older files: 0.
    pub fn from_numbers(numbers: [f64; 18], reach: f64) -> Self {
        let [
            mean,
            row_sum_sq,
            power,
            variance,
            entered,
            curvature,
            last,
            lowest,
            highest,
            counts @ ..,
        ] = numbers;
        let [in_average, infinite, still, measured_at, counts @ ..] = counts.map(|n| n as u64);
        let [taken, nonfinite, unmoved, uninformative, missing] = counts;
        Self {
            mean,
            row_sum_sq,
            power,
            variance,
            entered,
            curvature,
            reach,
            last,
            lowest,
            highest,
            in_average,
            infinite: infinite != 0,
            still,
            measured_at,
            counts: Counts { taken, nonfinite, unmoved, uninformative, missing },
        }
    }

    /// From a checkpoint of version 1, whose curvature along steps was measured by another formula, and is dropped.
    pub fn from_version_1(numbers: [f64; 7], curvature: Curvature) -> Self {
        let [mean, row_sum_sq, power, infinite, counts @ ..] = numbers;
        let [taken, nonfinite, uninformative] = counts.map(|count| count as u64);
        if !matches!(curvature, Curvature::Hutchinson(_)) {
            return Self::NONE;
        }
        let last = mean.sqrt();
        let range = if taken > 0 { (last, last) } else { (f64::INFINITY, 0.) };
        Self {
            mean,
            row_sum_sq,
            power,
            curvature: last,
            last,
            lowest: range.0,
            highest: range.1,
            in_average: taken,
            infinite: infinite != 0.,
            counts: Counts { taken, nonfinite, uninformative, ..Self::NONE.counts },
            ..Self::NONE
        }
    }
}
