//! When curvature is measured, and where an optimizer is between a step and its measurement.

use candle_core::{Result, bail};

use crate::params::{Curvature, Measure, ParamsSrkl};

/// When an optimizer measures, from the settings of its groups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MeasureSchedule {
    pub every: u64,
    pub first: u64,
    /// For Hutchinson: delta and seed.
    pub probe: Option<(f64, u64)>,
}

impl MeasureSchedule {
    pub fn of(params: &ParamsSrkl) -> Option<Self> {
        let Measure { every, first, delta, seed } = params.measure;
        match params.curvature {
            Curvature::None | Curvature::GradSquare => None,
            Curvature::Step(_) => Some(Self { every, first, probe: None }),
            Curvature::Hutchinson(_) => Some(Self { every, first, probe: Some((delta, seed)) }),
        }
    }

    /// Whether parameters of these settings are stepped, and measured.
    pub fn measures(params: &ParamsSrkl) -> bool {
        params.lr > 0. && Self::of(params).is_some()
    }

    /// # Errors
    ///
    /// Two groups that measure, but not alike.
    pub fn of_all<'a>(groups: impl Iterator<Item = &'a ParamsSrkl>) -> Result<Option<Self>> {
        let mut schedules = groups.filter_map(Self::of);
        let Some(schedule) = schedules.next() else { return Ok(None) };
        match schedules.find(|other| *other != schedule) {
            None => Ok(Some(schedule)),
            Some(_) => bail!(
                "`curvature`, `measure`: groups that measure must agree in the kind, `every`, `first`, `delta` \
                 and `seed`"
            ),
        }
    }
}

/// Where an optimizer is between a step and its measurement.
#[derive(Default)]
pub(crate) struct MeasureState {
    /// Steps so far, skipped ones included: their number decides when to measure.
    pub step_calls: u64,
    /// How many of them measured, or were due to.
    pub asked: u64,
    /// Hutchinson measurements made: each has its own random vectors.
    pub probe_count: u64,
    /// Whether the next step measures whatever its number, because `request_measurement` was called.
    pub requested: bool,
    /// Whether it does because a parameter has no estimate.
    pub blind: bool,
    /// Hutchinson: whether the measurement of the next step has been taken.
    pub measured: bool,
    /// Step: whether the last step waits for `observe`.
    pub awaiting_observe: bool,
    /// Whether a closure has been found to be repeatable.
    pub checked: bool,
}
