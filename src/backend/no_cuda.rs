//! What stands in for `cuda.rs` in a build without feature `cuda`: no device, and no way to make one.

use candle_core::Result;

use super::{Counters, Inputs, StepOptions};
use crate::block::{Block, Last};
use crate::estimate::{Estimate, Left, Probe, StepSums};
use crate::numerics::{Pair, Sums};
use crate::params::Group;
use crate::rule::{Decision, Powers, StepScalars};

/// There is none.
pub(crate) enum Cuda {}

pub(crate) fn devices_of(_: &[Block], _: &[Group]) -> Result<Vec<Cuda>> {
    Ok(vec![])
}

impl Cuda {
    pub fn step(&mut self, _: &Inputs, _: StepOptions) -> Result<bool> {
        match *self {}
    }

    pub fn observe(&mut self, _: &Inputs) -> Result<()> {
        match *self {}
    }

    pub fn squares(&mut self, _: &Inputs, _: f64) -> Result<()> {
        match *self {}
    }

    pub fn all_squares(&self, _: &[Block]) -> Result<Vec<(usize, f64)>> {
        match *self {}
    }

    pub fn step_sums(&self) -> Result<Vec<(usize, StepSums)>> {
        match *self {}
    }

    pub fn left(&self) -> Result<Vec<(Option<Left>, bool)>> {
        match *self {}
    }

    pub fn perturb(&mut self, _: u64, _: u64) -> Result<()> {
        match *self {}
    }

    pub fn swap(&mut self, _: &[Block]) -> Result<()> {
        match *self {}
    }

    pub fn restore(&mut self, _: &[Block]) -> Result<()> {
        match *self {}
    }

    pub fn probe_sums(&mut self, _: &Inputs, _: &Inputs) -> Result<()> {
        match *self {}
    }

    pub fn average_probe(&mut self) -> Result<()> {
        match *self {}
    }

    pub fn pairs(&self) -> Result<Vec<(usize, Pair)>> {
        match *self {}
    }

    pub fn directions(&mut self, _: bool) -> Result<()> {
        match *self {}
    }

    pub fn send_probe(&mut self, _: f64, _: Probe) -> Result<()> {
        match *self {}
    }

    pub fn send_known(&mut self, _: &[Block]) -> Result<()> {
        match *self {}
    }

    pub fn forget(&mut self) {
        match *self {}
    }

    pub fn powers(&self) -> Result<Vec<Powers>> {
        match *self {}
    }

    pub fn estimates(&self) -> Result<Vec<Estimate>> {
        match *self {}
    }

    pub fn statistics(&mut self, _: &Inputs, _: bool) -> Result<()> {
        match *self {}
    }

    pub fn decides(&self) -> bool {
        match *self {}
    }

    pub fn found(&self) -> Result<Vec<(usize, Sums)>> {
        match *self {}
    }

    pub fn send_decisions(
        &mut self,
        _: &[Option<Decision>],
        _: &[Block],
        _: &[Group],
    ) -> Result<()> {
        match *self {}
    }

    pub fn update(&mut self, _: StepOptions) -> Result<()> {
        match *self {}
    }

    pub fn set(&mut self, _: &[Group], _: StepScalars) -> Result<()> {
        match *self {}
    }

    pub fn counters(&self) -> Result<Counters> {
        match *self {}
    }

    pub fn outcomes(&self) -> Result<Vec<(Option<Last>, u64)>> {
        match *self {}
    }

    pub fn set_counters(&mut self, _: u64, _: u64, _: &[Block]) -> Result<()> {
        match *self {}
    }
}
