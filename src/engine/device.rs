//! The engine for parameters that are all on one CUDA device, which decides and counts steps: the host does not wait.

use candle_core::Result;
use candle_core::backprop::GradStore;

use super::{Counters, Engine, Outcome, Perturbation, Progress, Remaining};
use crate::backend::cuda::table::{self, Settings};
use crate::backend::cuda::{CudaBackend, GradientTable, abi};
use crate::backend::{Backend, Last, Step};
use crate::block::{Block, Parameters};
use crate::estimate::Estimate;
use crate::params::ParamsSrkl;
use crate::ranks::Ranks;
use crate::rule::{Powers, StepScalars};

pub(crate) struct Device {
    cuda: CudaBackend,
    /// If other ranks step other elements.
    ranks: Option<Box<Ranks>>,
}

impl Device {
    /// `ranks` step other elements of sharded parameters.
    pub fn new(mut cuda: CudaBackend, ranks: Option<&Ranks>, all: &Parameters) -> Result<Self> {
        if let Some(ranks) = ranks {
            cuda.share(all, ranks.rank)?;
        }
        Ok(Self { cuda, ranks: ranks.cloned().map(Box::new) })
    }

    /// Launches the sums of the kind `what`, which the device itself uses.
    fn sum(&self, gradients: GradientTable, what: u32, delta: f64) -> Result<()> {
        self.cuda.launch_sums(gradients, what, delta, self.ranks.is_none())?;
        self.gather_pairs(gradients, what, delta)
    }

    /// Completes the sums of pairs that were launched last, and launches what uses them.
    fn gather_pairs(&self, gradients: GradientTable, what: u32, delta: f64) -> Result<()> {
        if let (Some(ranks), Some(shared)) = (&self.ranks, self.cuda.shared()) {
            ranks.gather_tensor(&shared.pairs, &times(&shared.chunks, table::PAIR))?;
            self.cuda.launch_gather(gradients, what, delta)?;
        }
        Ok(())
    }

    /// Completes the statistics that were launched last, and launches the decisions.
    fn gather_statistics(&self, all: &Parameters, gradients: GradientTable) -> Result<()> {
        if let (Some(ranks), Some(shared)) = (&self.ranks, self.cuda.shared()) {
            ranks.gather_tensor(&shared.sums, &times(&shared.chunks, table::SUMS))?;
            if all.blocks.iter().any(|block| block.state.master.is_some()) {
                let count = vec![all.blocks.len(); ranks.world_size];
                ranks.gather_tensor(&shared.statistics, &times(&count, table::STATISTICS))?;
            }
            self.cuda.launch_gather(gradients, abi::SRKL_STATISTICS_OF_ALL, 0.)?;
        }
        Ok(())
    }

    /// Completes parameters that `moved` by the elements that other ranks have stepped.
    fn gather_parameters(&self, all: &Parameters, moved: impl Fn(&Block) -> bool) -> Result<()> {
        let moved = |place: usize| moved(&all.blocks[place]);
        self.ranks.as_ref().map_or(Ok(()), |ranks| ranks.gather_parameters(&all.blocks, moved))
    }

    /// Backs up whole parameters, if kernels back up a part of them.
    fn back_up(&self, all: &mut Parameters, wanted: impl Fn(&Block) -> bool) -> Result<()> {
        if self.ranks.is_none() {
            return Ok(());
        }
        let mut wanted = all.blocks.iter_mut().filter(|block| wanted(block));
        wanted.try_for_each(Block::back_up_whole)
    }

    /// Restores parameters if what replaces them has failed.
    fn or_restore(&mut self, all: &mut Parameters, done: Result<()>) -> Result<()> {
        if done.is_err() && self.ranks.is_some() {
            let _ = self.restore(all);
        }
        done
    }

    /// What the last measurement did to the estimate of each block.
    fn remaining(&self) -> Result<Vec<Remaining>> {
        let remaining = self.cuda.device.clone_dtoh(&self.cuda.memory.remaining)?;
        Ok(remaining.into_iter().map(table::read_remaining).collect())
    }
}

impl Engine for Device {
    /// One launch; two if it needs no statistics; three if it needs the directions; with matrices those of their
    /// products besides. No synchronisation, and nothing is copied to the host.
    ///
    /// With sharded state statistics, sums and updates are launches of their own, each with an exchange behind it, which waits if
    /// it goes by way of the hosts.
    fn step(&mut self, all: &mut Parameters, step: Step) -> Result<Outcome> {
        let Step { grads, scalars, measures, records, .. } = step;
        let cuda = &mut self.cuda;
        // `alive` must live until the last kernel is launched; then the stream's order protects its memory.
        let (gradients, alive) = cuda.resolve_gradients(all, grads)?;
        let settings = Settings::new(&all.groups, scalars);
        let captured = cuda.is_capturing()?;
        let gradients = if captured {
            cuda.refuse_in_capture(measures, &settings)?;
            cuda.record_gradients(&gradients)?
        } else {
            cuda.make_strips(measures)?;
            cuda.upload_changed(settings)?;
            cuda.upload_gradients(gradients)?;
            cuda.own_gradients()
        };
        let launch = |stages: u32| {
            let stages = stages | if records { abi::SRKL_RECORD } else { 0 };
            let sums_up = (measures || records) && stages & abi::SRKL_UPDATE != 0;
            self.cuda.launch_step(stages, gradients, sums_up, 0)
        };
        let is_muon = all.any(ParamsSrkl::is_muon);
        let needs_directions = measures || all.any(|params| params.trust.is_some());
        if is_muon || needs_directions || self.ranks.is_some() {
            match self.ranks {
                Some(_) => {
                    launch(abi::SRKL_STATISTICS)?;
                    self.gather_statistics(all, gradients)?;
                }
                None => launch(abi::SRKL_STATISTICS | abi::SRKL_DECIDE)?,
            }
            if is_muon && let Err(e) = self.cuda.launch_orthogonal(all, gradients) {
                // For want of memory: as if the step had not begun.
                if !captured {
                    self.cuda.withdraw()?;
                }
                return Err(e);
            }
            if needs_directions {
                let what =
                    if measures { abi::SRKL_SUM_MEASURING } else { abi::SRKL_SUM_DIRECTIONS };
                self.sum(gradients, what, 0.)?;
            }
            launch(abi::SRKL_UPDATE | abi::SRKL_COUNT)?;
        } else if all.any(ParamsSrkl::uses_sums) || records {
            let stages = abi::SRKL_STATISTICS | abi::SRKL_DECIDE | abi::SRKL_UPDATE;
            launch(stages | abi::SRKL_COUNT)?;
        } else {
            self.cuda.launch_decide(gradients)?;
            launch(abi::SRKL_UPDATE | abi::SRKL_COUNT)?;
        }
        if measures || records {
            self.gather_pairs(gradients, abi::SRKL_SUM_UPDATE, 0.)?;
        }
        self.gather_parameters(all, |block| grads.get_id(block.id).is_some())?;
        self.cuda.live_gradients = if measures { alive } else { vec![] };
        Ok(if captured { Outcome::Captured } else { Outcome::Counted })
    }

    fn observe(
        &mut self,
        all: &mut Parameters,
        again: &GradStore,
        scalars: StepScalars,
    ) -> Result<Vec<Remaining>> {
        self.cuda.refuse_capture("a measurement of curvature")?;
        let _alive = self.cuda.upload_again(all, again, scalars)?;
        self.sum(self.cuda.own_gradients(), abi::SRKL_SUM_STEP, 0.)?;
        self.release(all);
        self.remaining()
    }

    fn perturb(&mut self, all: &mut Parameters, step: Step, by: Perturbation) -> Result<()> {
        let Perturbation { delta, seed, draw } = by;
        self.cuda.refuse_capture("a measurement of curvature")?;
        let alive = self.cuda.upload_first(all, step.grads, step.scalars)?;
        self.release(all);
        self.cuda.live_gradients = alive;
        self.sum(self.cuda.own_gradients(), abi::SRKL_SUM_SQUARES, delta)?;
        let perturbed = |block: &Block| step.grads.get_id(block.id).is_some();
        self.back_up(all, perturbed)?;
        let done = self.cuda.launch_replace(abi::SRKL_PERTURB, seed, draw);
        let done = done.and_then(|()| self.gather_parameters(all, perturbed));
        self.or_restore(all, done)
    }

    fn observe_probe(
        &mut self,
        all: &mut Parameters,
        step: Step,
        again: &GradStore,
    ) -> Result<Vec<Remaining>> {
        self.cuda.refuse_capture("a measurement of curvature")?;
        let alive = self.cuda.upload_first(all, step.grads, step.scalars)?;
        self.cuda.live_gradients = self.cuda.upload_again(all, again, step.scalars)?;
        self.cuda.live_gradients.extend(alive);
        self.sum(self.cuda.own_gradients(), abi::SRKL_SUM_PROBE, 0.)?;
        self.sum(self.cuda.own_gradients(), abi::SRKL_SUM_AVERAGE, 0.)?;
        self.release(all);
        self.remaining()
    }

    fn swap(&mut self, all: &mut Parameters) -> Result<()> {
        self.release(all);
        let averaged = |block: &Block| block.state.average.is_some();
        self.back_up(all, averaged)?;
        let done = self.cuda.swap(all, &[]);
        let done = done.and_then(|()| self.gather_parameters(all, averaged));
        self.or_restore(all, done)
    }

    fn restore(&mut self, all: &mut Parameters) -> Result<()> {
        let restored = self.cuda.restore(all);
        let mut whole = all.blocks.iter_mut().filter(|block| block.sharded);
        restored.and(whole.try_for_each(Block::restore_whole))
    }

    fn release(&mut self, all: &mut Parameters) {
        self.cuda.release(all);
        all.blocks.iter_mut().for_each(|block| block.backup.valid = false);
    }

    fn upload_settings(&mut self, all: &Parameters, scalars: StepScalars) -> Result<()> {
        self.cuda.upload_settings(all, scalars)
    }

    fn set_progress(&mut self, all: &mut Parameters, progress: Progress) -> Result<()> {
        let Progress { steps, skipped_steps, blocks } = progress;
        let state = abi::SrklState { steps, skipped_steps, ..Default::default() };
        let none = vec![abi::SrklDecision::default(); blocks.len()];
        let powers: Vec<_> = blocks.iter().map(|(powers, ..)| table::powers(powers)).collect();
        let estimates: Vec<_> = blocks.iter().map(|(_, e, _)| table::estimate(e)).collect();
        let skipped: Vec<u64> = blocks.iter().map(|(.., skipped)| *skipped).collect();
        self.release(all);
        let cuda = &mut self.cuda;
        cuda.refuse_capture("what is sent for a measurement, `swap_averaged` or `load`")?;
        cuda.upload(&powers, |memory| &mut memory.powers)?;
        cuda.upload(&estimates, |memory| &mut memory.estimates)?;
        cuda.upload(&none, |memory| &mut memory.decisions)?;
        cuda.upload(&skipped, |memory| &mut memory.skipped)?;
        cuda.upload(&[state], |memory| &mut memory.state)
    }

    fn check_ready(&self, all: &Parameters, step: Step, by_device: bool) -> Result<bool> {
        let captured = self.cuda.is_capturing()?;
        if captured {
            if !by_device {
                self.cuda.refuse_capture("a step of several ranks that go by way of the host")?;
            }
            self.cuda
                .refuse_in_capture(step.measures, &Settings::new(&all.groups, step.scalars))?;
        }
        self.cuda.check_addresses(all)?;
        Ok(captured)
    }

    fn refuse_capture(&self, what: &str) -> Result<()> {
        self.cuda.refuse_capture(what)
    }

    fn is_captured(&self) -> Result<bool> {
        self.cuda.is_captured()
    }

    fn may_reorder(&self) -> bool {
        // The table on the device is in the order of blocks.
        false
    }

    fn counters(&self) -> Result<Counters> {
        let state = self.cuda.state()?;
        Ok(Counters {
            steps: state.steps,
            skipped_steps: state.skipped_steps,
            grad_norm: (state.has_norm != 0).then_some(state.grad_norm),
        })
    }

    fn counters_at_hand(&self) -> Option<Counters> {
        None
    }

    fn powers(&self) -> Result<Vec<Powers>> {
        let powers = self.cuda.device.clone_dtoh(&self.cuda.memory.powers)?;
        Ok(powers.into_iter().map(table::read_powers).collect())
    }

    fn estimates(&self) -> Result<Vec<Estimate>> {
        let estimates = self.cuda.device.clone_dtoh(&self.cuda.memory.estimates)?;
        Ok(estimates.into_iter().map(table::read_estimate).collect())
    }

    fn outcomes(&self, _: &Parameters) -> Result<Vec<(Option<Last>, u64)>> {
        let state = self.cuda.state()?;
        let (device, memory) = (&self.cuda.device, &self.cuda.memory);
        let decisions = device.clone_dtoh(&memory.decisions)?;
        let skipped = device.clone_dtoh(&memory.skipped)?;
        let norms = match state.recorded != 0 {
            true => {
                let c = 1. / state.grad_scale;
                let statistics = self.cuda.statistics()?;
                let moved = device.clone_dtoh(&memory.step_sums)?.into_iter();
                let moved = moved.map(|sums| table::read_step_sums(sums).step.sqrt());
                let grads = statistics.into_iter().map(|sums| sums.norm(c));
                grads.zip(moved).map(|(grad, moved)| Some([grad, moved])).collect()
            }
            false => vec![None; decisions.len()],
        };
        let all = decisions.into_iter().zip(norms);
        let last = all.map(|(d, norms)| table::read_decision(d, state.skipped != 0, norms));
        Ok(last.zip(skipped).collect())
    }

    fn param_squares(&self, all: &Parameters) -> Result<Vec<Option<f64>>> {
        let gradients = self.cuda.own_gradients();
        self.cuda.launch_param_squares(all)?;
        self.gather_pairs(gradients, abi::SRKL_SUM_PARAMETERS, 0.)?;
        let pairs = self.cuda.device.clone_dtoh(&self.cuda.memory.pairs)?;
        Ok(pairs.into_iter().map(|pair| Some(table::read_pair(pair).a)).collect())
    }
}

/// So many numbers for each of these counts.
fn times(counts: &[usize], numbers: usize) -> Vec<usize> {
    counts.iter().map(|count| count * numbers).collect()
}
