//! The engine for parameters on the CPU, or on several devices: the host decides steps.

use std::ops::Range;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

use super::{Counters, Engine, Outcome, Perturbation, Progress, Remaining};
use crate::backend::cpu::CpuBackend;
use crate::backend::{
    Backend, BlockGradient, GradSums, GradientPair, Last, ShardSums, Step, SumScales, Tracked,
    masters,
};
use crate::block::{Block, Parameters};
use crate::estimate::{
    Averaging, ChangeSums, Estimate, Left, Measured, Probe, ProbeSums, StepSums,
};
use crate::exchange::Numbers;
use crate::numerics::{Pair, Sums};
use crate::params::{Curvature, NonFinite, ParamsSrkl, Scope, StepCurvature};
use crate::ranks::Ranks;
use crate::rule::{self, Decision, DirectionSums, Directions, Powers, StepScalars};

/// If steps need not wait for all blocks, these are taken in runs of about this many elements, so that a gradient is
/// still in the caches when it is read again.
const RUN: usize = 1 << 20;

/// The gradients of a run and the decisions about them.
type Prepared<'g> = (Vec<Option<BlockGradient<'g>>>, Vec<Option<Decision>>);

pub(crate) struct Host {
    /// Devices first, then the CPU.
    backends: Vec<Box<dyn Backend>>,
    on_cpu_alone: bool,
    tracked: Vec<Tracked>,
    counters: Counters,
    /// The gradients of the last step by block, if it waits for its measurement.
    first: Vec<Option<Tensor>>,
    /// If other ranks step other elements.
    ranks: Option<Box<Ranks>>,
    /// The sums of the last step, if ranks have exchanged them.
    step_sums: Option<Vec<StepSums>>,
    /// The size of the last perturbation.
    probe_size: f64,
}

impl Host {
    /// `devices` are those that some of the parameters are on; `ranks` step other elements of sharded parameters.
    pub fn new(
        devices: Vec<Box<dyn Backend>>,
        ranks: Option<Ranks>,
        all: &mut Parameters,
    ) -> Result<Self> {
        let on_cpu_alone = devices.is_empty();
        let mut backends = devices;
        backends.push(Box::new(CpuBackend::new(&mut all.blocks)?));
        Ok(Self {
            backends,
            on_cpu_alone,
            tracked: vec![Tracked::NEW; all.blocks.len()],
            counters: Counters::default(),
            first: vec![],
            ranks: ranks.map(Box::new),
            step_sums: None,
            probe_size: 0.,
        })
    }

    // -- The parts of a step --

    /// Splits the list of blocks into runs that are stepped one after the other; into one run if a decision needs the
    /// statistics of all blocks.
    fn runs(&self, all: &Parameters, measures: bool) -> Vec<Range<usize>> {
        // Products may fail, and nothing may have moved then.
        let may_fail = all.any(ParamsSrkl::is_muon);
        let whole =
            all.any(ParamsSrkl::waits_for_all) || may_fail || measures || !self.on_cpu_alone;
        let whole = whole || self.ranks.is_some();
        let every = 0..all.blocks.len();
        match whole || all.lengths(&every).total < RUN {
            true if every.is_empty() => vec![],
            true => vec![every],
            false => split(&all.blocks, every),
        }
    }

    /// Stages 1 and 2 of a run: its gradients, and the numbers of each block's step; `None` if the whole step is skipped.
    fn prepare<'g>(
        &mut self,
        all: &mut Parameters,
        run: Range<usize>,
        step: Step<'g>,
    ) -> Result<Option<Prepared<'g>>> {
        let asked = asked(all, step.records);
        let mut gradients = self.statistics(all, step, run.clone(), asked)?;
        let overwritten = self.sum_shards(all, asked, &mut gradients)?;
        let Some(mut decisions) = self.decide(all, run.clone(), &gradients, step.scalars) else {
            // If any group skips steps there is one run, of all blocks, so nothing has moved.
            self.tracked.iter_mut().for_each(|tracked| tracked.last = None);
            return Ok(None);
        };
        let is_muon = all.any(ParamsSrkl::is_muon);
        let needs_directions = step.measures || all.any(|params| params.trust.is_some());
        if is_muon || needs_directions {
            self.upload_decisions(all, &decisions)?;
        }
        if is_muon {
            self.orthogonalize(all, run.clone(), &gradients, &decisions)?;
        }
        if needs_directions {
            self.adjust(all, run, &gradients, &mut decisions, step)?;
        }
        let moved = all.blocks.iter_mut().zip(&decisions).zip(overwritten);
        for ((block, _), _) in moved.filter(|((_, moves), reset)| *reset && moves.is_some()) {
            masters::reset(block)?;
        }
        Ok(Some((gradients, decisions)))
    }

    /// Stage 1: the gradients of a run, with the sums that are `asked` for.
    fn statistics<'g>(
        &mut self,
        all: &Parameters,
        step: Step<'g>,
        run: Range<usize>,
        asked: GradSums,
    ) -> Result<Vec<Option<BlockGradient<'g>>>> {
        let mut gradients = vec![None; run.len()];
        for backend in &mut self.backends {
            backend.statistics(all, step, run.clone(), asked, &mut gradients)?;
        }
        for backend in &self.backends {
            backend.read_statistics(all, step, &mut gradients)?;
        }
        Ok(gradients)
    }

    /// Stage 1 of sharded blocks: adds up what all ranks have found. Returns whose parameters seem to have been overwritten.
    fn sum_shards(
        &mut self,
        all: &mut Parameters,
        asked: GradSums,
        gradients: &mut [Option<BlockGradient>],
    ) -> Result<Vec<bool>> {
        let Some(ranks) = &self.ranks else { return Ok(vec![]) };
        let mut found = vec![None; gradients.len()];
        for backend in &mut self.backends {
            backend.shard_sums(all, asked, gradients, &mut found)?;
        }
        let mut overwritten = vec![false; gradients.len()];
        let mut sums = vec![None; gradients.len()];
        for (place, found) in found.into_iter().enumerate() {
            let Some(ShardSums { of_chunks, overwritten: on_device }) = found else { continue };
            let block = &all.blocks[place];
            sums[place] = Some(of_chunks);
            overwritten[place] = on_device || block.on_cpu && masters::is_overwritten(block)?;
        }
        if asked != GradSums::None {
            ranks.gather_sums(&all.blocks, &mut sums)?;
        }
        for (found, sums) in gradients.iter_mut().zip(sums) {
            if let (Some(found), Some(sums)) = (found, sums) {
                found.sums = Sums::fold(&sums);
            }
        }
        match all.blocks.iter().any(|block| block.state.master.is_some()) {
            true => ranks.any(&overwritten),
            false => Ok(overwritten),
        }
    }

    /// Stage 2: the numbers of each block's step, `None` for a block that is not stepped; or `None`
    /// if the whole step is skipped.
    fn decide(
        &mut self,
        all: &Parameters,
        run: Range<usize>,
        gradients: &[Option<BlockGradient>],
        scalars: StepScalars,
    ) -> Option<Vec<Option<Decision>>> {
        let (blocks, tracked) = (&all.blocks[run.clone()], &self.tracked[run]);
        let total = if all.any(ParamsSrkl::uses_total) {
            let counts = |block, found: &BlockGradient| {
                let skips_block = all.of(block).nonfinite == NonFinite::SkipBlock;
                found.sums.curvature(1. / scalars.grad_scale).is_finite() || !skips_block
            };
            let in_total = blocks.iter().zip(gradients).map(|(block, found)| match found {
                Some(found) if counts(block, found) => found.sums,
                _ => Sums::ZERO,
            });
            Sums::fold(&in_total.collect::<Vec<_>>())
        } else {
            Sums::ZERO
        };
        self.counters.grad_norm =
            all.any(ParamsSrkl::uses_norm).then(|| total.norm(1. / scalars.grad_scale));

        let mut decisions = Vec::with_capacity(blocks.len());
        for ((block, tracked), found) in blocks.iter().zip(tracked).zip(gradients) {
            let params = all.of(block);
            let decision = found.map(|BlockGradient { sums, .. }| {
                rule::decide(params, scalars, &sums, &total, &tracked.estimate)
            });
            match decision {
                Some(decision) if !rule::may_step(&decision, params.nonfinite) => {
                    if params.nonfinite == NonFinite::SkipStep {
                        return None;
                    }
                    decisions.push(None);
                }
                decision => decisions.push(decision),
            }
        }
        Some(decisions)
    }

    /// Orthogonalises the momentum of matrices.
    fn orthogonalize(
        &mut self,
        all: &mut Parameters,
        run: Range<usize>,
        gradients: &[Option<BlockGradient>],
        decisions: &[Option<Decision>],
    ) -> Result<()> {
        for backend in &mut self.backends {
            backend.orthogonalize(all, &self.tracked, run.clone(), gradients, decisions)?;
        }
        Ok(())
    }

    /// Sends decisions to the devices, ahead of the stages that use them.
    fn upload_decisions(&mut self, all: &Parameters, decisions: &[Option<Decision>]) -> Result<()> {
        let tracked = &self.tracked;
        self.backends
            .iter_mut()
            .try_for_each(|backend| backend.upload_decisions(all, tracked, decisions))
    }

    /// The part of stage 2 that needs the directions of all blocks of a run.
    fn adjust(
        &mut self,
        all: &mut Parameters,
        run: Range<usize>,
        gradients: &[Option<BlockGradient>],
        decisions: &mut [Option<Decision>],
        step: Step,
    ) -> Result<()> {
        let Step { scalars, measures, .. } = step;
        let blocks = &all.blocks[run.clone()];
        let by_step = |block: &Block| all.of(block).measures_steps();
        let small = |block: &Block, decision: &Decision| {
            measures && by_step(block) && !rule::is_known(decision)
        };
        // A small step depends on the directions of all blocks.
        let any_small = blocks
            .iter()
            .zip(&*decisions)
            .any(|(block, decision)| decision.as_ref().is_some_and(|d| small(block, d)));
        let needs = |block: &Block| any_small && by_step(block) || all.of(block).trust.is_some();
        let every = blocks.iter().zip(gradients).zip(&*decisions);
        let given: Vec<_> = every
            .map(|((block, found), decision)| {
                let both = ((*found)?.gradient, (*decision)?);
                needs(block).then_some(both)
            })
            .collect();
        let mut sums = vec![None; blocks.len()];
        for backend in &mut self.backends {
            let tracked = &self.tracked;
            backend.directions(all, tracked, run.clone(), &given, measures, &mut sums)?;
        }
        let mut sums = self.read_sums(all, &given, sums)?;

        let blocks = &all.blocks[run.clone()];
        let every = blocks.iter().zip(&self.tracked[run.clone()]).zip(&*decisions);
        for (((block, tracked), decision), sums) in every.zip(&mut sums) {
            if let (Some(decision), Some(Pair { a, .. })) = (decision, sums) {
                let (params, matrix_scale) = (all.of(block), block.matrix_scale());
                *a *= SumScales::new(params, decision, &tracked.powers, matrix_scale).direction;
            }
        }
        let by_step = |block: &Block| all.of(block).measures_steps();
        let counted = |(block, sums): (&Block, &Option<Pair>)| sums.filter(|_| by_step(block));
        let moving: Vec<Option<Pair>> = blocks.iter().zip(&sums).map(counted).collect();
        let sizes = blocks.iter().zip(&moving).filter(|(_, sums)| sums.is_some());
        let total_n = sizes.map(|(block, _)| block.whole as u64).sum::<u64>() as f64;
        let total = direction_sums(fold(&moving));
        let places = run.zip(decisions).zip(sums);
        for ((place, decision), own) in places {
            if let (Some(decision), Some(own)) = (decision, own) {
                let block = &all.blocks[place];
                let (own, n) = (direction_sums(own), block.whole as f64);
                let directions = Directions { block: own, n, total, total_n };
                let still = self.tracked[place].estimate.still;
                rule::adjust(decision, all.of(block), scalars, &directions, still, measures);
            }
        }
        Ok(())
    }

    /// Stage 3. The CPU notes what it did to its blocks; of those on devices it is noted here.
    fn update(
        &mut self,
        all: &mut Parameters,
        run: Range<usize>,
        gradients: &[Option<BlockGradient>],
        decisions: &[Option<Decision>],
        step: Step,
    ) -> Result<()> {
        self.upload_decisions(all, decisions)?;
        for backend in &mut self.backends {
            let (all, tracked) = (&mut *all, &mut self.tracked);
            backend.update(all, tracked, run.clone(), gradients, decisions, step)?;
        }
        if !self.on_cpu_alone {
            let every = all.blocks[run.clone()].iter().zip(&mut self.tracked[run]);
            let every = every.zip(gradients).zip(decisions);
            for (((block, tracked), found), decision) in every.filter(|item| !item.0.0.0.on_cpu) {
                tracked.note(block, all.of(block), found.as_ref(), decision.as_ref(), step);
            }
        }
        Ok(())
    }

    /// Reads the sums of devices and ranks, for blocks that have an entry in `given`, and adds them up.
    fn read_sums<T>(
        &self,
        all: &Parameters,
        given: &[Option<T>],
        mut sums: Vec<Option<Vec<Pair>>>,
    ) -> Result<Vec<Option<Pair>>> {
        let wanted = |place: usize| given[place].is_some();
        self.backends.iter().try_for_each(|backend| backend.read_sums(&wanted, &mut sums))?;
        self.gather_sums(all, &mut sums)?;
        Ok(sums.into_iter().map(|sums| Some(Pair::fold(&sums?))).collect())
    }

    /// Backs up whole parameters of devices, which back up by themselves only what is stepped here.
    fn back_up(&self, all: &mut Parameters, wanted: impl Fn(usize) -> bool) -> Result<()> {
        if self.ranks.is_none() {
            return Ok(());
        }
        let on_devices = all.blocks.iter_mut().enumerate().filter(|(_, block)| !block.on_cpu);
        let mut wanted = on_devices.filter(|(place, _)| wanted(*place));
        wanted.try_for_each(|(_, block)| block.back_up_whole())
    }

    /// Completes sums over chunks by those of other ranks.
    fn gather_sums<T: Numbers>(&self, all: &Parameters, sums: &mut [Option<Vec<T>>]) -> Result<()> {
        self.ranks.as_ref().map_or(Ok(()), |ranks| ranks.gather_sums(&all.blocks, sums))
    }

    /// Completes parameters that `moved` by the elements that other ranks have stepped.
    fn gather_parameters(&self, all: &Parameters, moved: impl Fn(usize) -> bool) -> Result<()> {
        self.ranks.as_ref().map_or(Ok(()), |ranks| ranks.gather_parameters(&all.blocks, moved))
    }

    // -- The parts of a measurement --

    /// An error for a gradient that does not fit.
    fn check(&self, all: &Parameters, grads: &GradStore) -> Result<()> {
        self.backends.iter().try_for_each(|backend| backend.check(all, grads))
    }

    /// How blocks moved in a step that measured or recorded norms, wherever they are.
    fn step_sums(&self, all: &Parameters) -> Result<Vec<StepSums>> {
        if let Some(sums) = &self.step_sums {
            return Ok(sums.clone());
        }
        let scaled = |tracked: &Tracked, sums: &[StepSums]| {
            tracked.sum_scales.apply(StepSums::fold(if tracked.sums_up { sums } else { &[] }))
        };
        if self.on_cpu_alone && self.ranks.is_none() {
            return Ok(self.tracked.iter().map(|t| scaled(t, &t.step_sums)).collect());
        }
        let own = self.tracked.iter().map(|tracked| tracked.step_sums.clone());
        let mut sums: Vec<Vec<StepSums>> = own.collect();
        self.backends.iter().try_for_each(|backend| backend.read_step_sums(&mut sums))?;
        let summed_up = |(sums, tracked): (_, &Tracked)| tracked.sums_up.then_some(sums);
        let mut sums: Vec<_> = sums.into_iter().zip(&self.tracked).map(summed_up).collect();
        self.gather_sums(all, &mut sums)?;
        let sums = sums.into_iter().map(Option::unwrap_or_default);
        Ok(self.tracked.iter().zip(sums).map(|(t, sums)| scaled(t, &sums)).collect())
    }

    fn upload_estimates(&mut self) -> Result<()> {
        let tracked = &self.tracked;
        self.backends.iter_mut().try_for_each(|backend| backend.upload_estimates(tracked))
    }

    /// Counts a step.
    fn count(&mut self, skipped: bool) -> Outcome {
        *(if skipped { &mut self.counters.skipped_steps } else { &mut self.counters.steps }) += 1;
        Outcome::Counted
    }

    /// Steps, taken and skipped.
    fn now(&self) -> u64 {
        self.counters.steps + self.counters.skipped_steps
    }

    /// What a measurement did to each estimate, and whether there is one.
    fn remaining(&self, left: Vec<Option<Left>>) -> Vec<Remaining> {
        let known = self.tracked.iter().map(|tracked| tracked.estimate.is_known());
        left.into_iter().zip(known).collect()
    }
}

impl Engine for Host {
    fn step(&mut self, all: &mut Parameters, step: Step) -> Result<Outcome> {
        let step = Step { steps: self.counters.steps, ..step };
        let Step { grads, measures, records, .. } = step;
        let runs = self.runs(all, measures);
        if runs.len() > 1 {
            // Errors in later runs must be found before the first one is updated.
            self.check(all, grads)?;
        }
        let mut first = vec![];
        let mut skipped = false;
        for run in runs {
            let Some((gradients, decisions)) = self.prepare(all, run.clone(), step)? else {
                skipped = true;
                break;
            };
            if measures {
                // There is one run, of all blocks.
                first = first_gradients(all, &gradients, &decisions);
            }
            self.update(all, run, &gradients, &decisions, step)?;
            if self.ranks.is_some() {
                // There is one run, of all blocks.
                self.gather_parameters(all, |place| decisions[place].is_some())?;
                if measures || records {
                    self.step_sums = None;
                    self.step_sums = Some(self.step_sums(all)?);
                }
            }
        }
        if measures {
            first.resize(all.blocks.len(), None);
        } else if !self.on_cpu_alone {
            self.release(all); // Devices keep a step's gradients.
        }
        self.first = first;
        Ok(self.count(skipped))
    }

    fn step_consuming(
        &mut self,
        all: &mut Parameters,
        mut grads: GradStore,
        scalars: StepScalars,
        records: bool,
    ) -> Result<Outcome> {
        let (measures, steps) = (false, self.counters.steps);
        if !self.on_cpu_alone || self.ranks.is_some() {
            return self.step(all, Step { grads: &grads, scalars, measures, records, steps });
        }
        let runs = self.runs(all, measures);
        if runs.len() > 1 {
            // Errors in later runs must be found before the first one is updated.
            self.check(all, &grads)?;
        }
        let mut skipped = false;
        for run in runs {
            let step = Step { grads: &grads, scalars, measures, records, steps };
            let Some((gradients, decisions)) = self.prepare(all, run.clone(), step)? else {
                skipped = true;
                break;
            };
            // What was found, without what it was found in.
            let without = |found: BlockGradient| (found.sums, found.storage, found.elements);
            let found: Vec<_> = gradients.into_iter().map(|found| found.map(without)).collect();
            for part in split(&all.blocks, run.clone()) {
                let own = part.start - run.start..part.end - run.start;
                let with = |(block, found): (&Block, &Option<_>)| {
                    let gradient = grads.get_id(block.id)?;
                    let (sums, storage, elements) = (*found)?;
                    Some(BlockGradient { gradient, sums, storage, elements })
                };
                let blocks = all.blocks[part.clone()].iter();
                let gradients: Vec<_> = blocks.zip(&found[own.clone()]).map(with).collect();
                let step = Step { grads: &grads, scalars, measures, records, steps };
                self.update(all, part.clone(), &gradients, &decisions[own], step)?;
                for block in &all.blocks[part] {
                    grads.remove(&block.var);
                }
            }
        }
        self.first = vec![];
        Ok(self.count(skipped))
    }

    fn observe(
        &mut self,
        all: &mut Parameters,
        again: &GradStore,
        scalars: StepScalars,
    ) -> Result<Vec<Remaining>> {
        let first = std::mem::take(&mut self.first);
        let observed = self.observe_by(all, &first, again, scalars);
        match &observed {
            Ok(_) => self.release(all),
            // They stay until the measurement has been taken: it can be tried again.
            Err(_) => self.first = first,
        }
        observed
    }

    fn perturb(&mut self, all: &mut Parameters, step: Step, by: Perturbation) -> Result<()> {
        let Perturbation { delta, seed, draw } = by;
        self.check(all, step.grads)?;
        self.release(all);
        let moves = |block: &Block| step.grads.get_id(block.id).is_some() && all.of(block).lr != 0.;
        let wanted: Vec<_> = all.blocks.iter().map(|block| moves(block).then_some(())).collect();
        let n: usize = all.blocks.iter().filter(|block| moves(block)).map(|b| b.whole).sum();
        let mut squares = vec![None; wanted.len()];
        for backend in &mut self.backends {
            backend.squares(all, step, &wanted, &mut squares)?;
        }
        let squares = self.read_sums(all, &wanted, squares)?;
        let size = rule::probe_size(delta, fold(&squares).a, n as f64);
        self.back_up(all, |place| wanted[place].is_some())?;
        // The CPU first: if it fails, no device has been perturbed.
        let perturbed = self.backends.iter_mut().rev().try_for_each(|backend| {
            backend.upload_probe(size, Probe::Finite)?;
            backend.perturb(all, &wanted, size, seed, draw)
        });
        let perturbed =
            perturbed.and_then(|()| self.gather_parameters(all, |place| wanted[place].is_some()));
        if let Err(e) = perturbed {
            let _ = self.restore(all);
            return Err(e);
        }
        self.probe_size = size;
        Ok(())
    }

    fn observe_probe(
        &mut self,
        all: &mut Parameters,
        step: Step,
        again: &GradStore,
    ) -> Result<Vec<Remaining>> {
        let size = self.probe_size;
        self.check(all, step.grads)?;
        self.check(all, again)?;
        let factor = 1. / step.scalars.grad_scale;
        let decays: Vec<_> = all.blocks.iter().map(|block| probe_decay(all.of(block))).collect();
        let first = |(block, decay): (&Block, &Option<f64>)| {
            step.grads.get_id(block.id).filter(|_| decay.is_some())
        };
        let first: Vec<_> = all.blocks.iter().zip(&decays).map(first).collect();
        let both = |((block, first), decay): ((&Block, &Option<_>), &Option<f64>)| {
            let (first, again) = ((*first)?, again.get_id(block.id)?);
            Some((GradientPair { first, again, factor }, (*decay)?))
        };
        let given: Vec<_> = all.blocks.iter().zip(&first).zip(&decays).map(both).collect();

        let mut squares = vec![None; given.len()];
        for backend in &mut self.backends {
            backend.probe_sums(all, step, again, &given, size, &mut squares)?;
        }
        let squares = self.read_sums(all, &given, squares)?;
        let Pair { a: product_sq, b: gradient_sq } = fold(&squares);
        let probe = Probe::of(ProbeSums { product_sq, gradient_sq });
        if probe == Probe::Finite {
            let mut sums = vec![None; given.len()];
            for backend in &mut self.backends {
                backend.upload_probe(size, probe)?;
                backend.average_probe(all, &given, size, &mut sums)?;
            }
            let sums = self.read_sums(all, &given, sums)?;
            for ((tracked, given), sum) in self.tracked.iter_mut().zip(&given).zip(sums) {
                if let (Some(Pair { a, .. }), Some((_, decay))) = (sum, given) {
                    let estimate = &mut tracked.estimate;
                    estimate.power *= decay;
                    estimate.row_sum_sq = a / (1. - estimate.power);
                }
            }
        }

        let now = self.now();
        let own = |(tracked, decay): (&Tracked, &Option<f64>)| {
            decay.map(|_| Pair { a: tracked.estimate.row_sum_sq, b: 0. })
        };
        let total = fold(&self.tracked.iter().zip(&decays).map(own).collect::<Vec<_>>()).a;
        let mut left = vec![None; given.len()];
        for (place, (block, tracked)) in all.blocks.iter().zip(&mut self.tracked).enumerate() {
            let estimate = &mut tracked.estimate;
            let is_missing = first[place].is_some() && given[place].is_none();
            estimate.counts.missing += is_missing as u64;
            let global = all.of(block).scope == Scope::Global;
            if decays[place].is_some() && (global || given[place].is_some()) {
                let squared = if global { total } else { estimate.row_sum_sq };
                left[place] = Some(rule::observe_rows(estimate, probe, squared, now));
            }
        }
        self.release(all);
        self.upload_estimates()?;
        Ok(self.remaining(left))
    }

    fn swap(&mut self, all: &mut Parameters) -> Result<()> {
        self.release(all);
        self.upload_estimates()?;
        let averages: Vec<bool> = self.tracked.iter().map(|t| t.powers.average != 1.).collect();
        self.back_up(all, |place| averages[place])?;
        let tracked = &self.tracked;
        let swapped =
            self.backends.iter_mut().rev().try_for_each(|backend| backend.swap(all, tracked));
        let swapped = swapped.and_then(|()| self.gather_parameters(all, |place| averages[place]));
        if let Err(e) = swapped {
            let _ = self.restore(all);
            return Err(e);
        }
        Ok(())
    }

    fn restore(&mut self, all: &mut Parameters) -> Result<()> {
        let mut restored = Ok(());
        for backend in &mut self.backends {
            restored = restored.and(backend.restore(all));
        }
        for block in all.blocks.iter_mut().filter(|block| !block.on_cpu) {
            restored = restored.and(block.restore_whole());
        }
        restored
    }

    fn release(&mut self, all: &mut Parameters) {
        self.first = vec![];
        self.backends.iter_mut().for_each(|backend| backend.release(all));
    }

    fn upload_settings(&mut self, all: &Parameters, scalars: StepScalars) -> Result<()> {
        self.backends.iter_mut().try_for_each(|backend| backend.upload_settings(all, scalars))
    }

    fn set_progress(&mut self, all: &mut Parameters, progress: Progress) -> Result<()> {
        let Progress { steps, skipped_steps, blocks } = progress;
        self.release(all);
        self.counters = Counters { steps, skipped_steps, grad_norm: None };
        let tracked =
            |(powers, estimate, skipped)| Tracked { powers, estimate, skipped, ..Tracked::NEW };
        self.tracked = blocks.into_iter().map(tracked).collect();
        self.upload_estimates()
    }

    fn refuse_capture(&self, what: &str) -> Result<()> {
        self.backends.iter().try_for_each(|backend| backend.refuse_capture(what))
    }

    fn may_reorder(&self) -> bool {
        // The tables of devices are in the order of blocks.
        self.on_cpu_alone
    }

    fn counters(&self) -> Result<Counters> {
        Ok(self.counters)
    }

    fn counters_at_hand(&self) -> Option<Counters> {
        Some(self.counters)
    }

    fn powers(&self) -> Result<Vec<Powers>> {
        Ok(self.tracked.iter().map(|tracked| tracked.powers).collect())
    }

    fn estimates(&self) -> Result<Vec<Estimate>> {
        Ok(self.tracked.iter().map(|tracked| tracked.estimate).collect())
    }

    fn outcomes(&self, all: &Parameters) -> Result<Vec<(Option<Last>, u64)>> {
        let recorded = |t: &Tracked| t.last.is_some_and(|last| last.norms.is_some());
        let step_sums = match self.tracked.iter().any(recorded) {
            // The sums of steps on devices are still there.
            true => self.step_sums(all)?,
            false => vec![StepSums::default(); self.tracked.len()],
        };
        let outcome = |(t, sums): (&Tracked, StepSums)| {
            let mut last = t.last;
            if let Some(Last { norms: Some([_, step]), .. }) = &mut last {
                *step = sums.step.sqrt();
            }
            (last, t.skipped)
        };
        Ok(self.tracked.iter().zip(step_sums).map(outcome).collect())
    }

    fn param_squares(&self, all: &Parameters) -> Result<Vec<Option<f64>>> {
        let mut squares = vec![None; all.blocks.len()];
        for backend in &self.backends {
            backend.param_squares(all, &mut squares)?;
        }
        self.gather_sums(all, &mut squares)?;
        Ok(squares.into_iter().map(|squares| Some(Pair::fold(&squares?).a)).collect())
    }
}

impl Host {
    /// Measures the curvature along a step whose gradients were `first`.
    fn observe_by<'f>(
        &mut self,
        all: &mut Parameters,
        first: &'f [Option<Tensor>],
        again: &'f GradStore,
        scalars: StepScalars,
    ) -> Result<Vec<Remaining>> {
        self.check(all, again)?;
        let every = all.blocks.iter().zip(first).zip(&self.tracked);
        let both = |((block, first), tracked): ((&Block, &'f Option<Tensor>), &Tracked)| {
            let (first, again) = (first.as_ref()?, again.get_id(block.id)?);
            Some(GradientPair { first, again, factor: tracked.grad_factor })
        };
        let given: Vec<_> = every.map(both).collect();
        let step = Step { grads: again, scalars, measures: true, records: false, steps: 0 };
        let mut changes = vec![None; given.len()];
        for backend in &mut self.backends {
            backend.change_of_gradient(all, &self.tracked, step, &given, &mut changes)?;
        }
        let changes = self.read_sums(all, &given, changes)?;
        let step_sums = self.step_sums(all)?;
        let measured = |(step_sums, change): (&StepSums, &Option<Pair>)| match change {
            Some(Pair { a: change_sq, b: bound }) => {
                let change = ChangeSums { change_sq: *change_sq, bound: *bound };
                rule::measured(change, step_sums)
            }
            None => Measured::default(),
        };
        let measured: Vec<Measured> = step_sums.iter().zip(&changes).map(measured).collect();
        let total = Measured::fold(&measured);

        let now = self.now();
        let mut left = vec![None; given.len()];
        for (place, (block, tracked)) in all.blocks.iter().zip(&mut self.tracked).enumerate() {
            let params = all.of(block);
            tracked.strips = vec![];
            let Curvature::Step(curvature) = params.curvature else { continue };
            let is_missing = first[place].is_some() && given[place].is_none();
            tracked.estimate.counts.missing += is_missing as u64;
            let own = if is_missing { None } else { Some(&measured[place]) };
            let measured = if params.scope == Scope::Global { Some(&total) } else { own };
            let StepCurvature { decay, noise } = curvature;
            let averaging = Averaging { every: params.measure.every, decay, noise };
            let (estimate, small) = (&mut tracked.estimate, tracked.small);
            left[place] = measured
                .map(|measured| rule::observe_step(estimate, measured, averaging, small, now));
        }
        Ok(self.remaining(left))
    }
}

/// Splits neighbouring blocks into runs.
fn split(blocks: &[Block], range: Range<usize>) -> Vec<Range<usize>> {
    let (mut runs, mut start, mut elements) = (vec![], range.start, 0);
    for i in range.clone() {
        elements += blocks[i].n;
        if i + 1 == range.end || elements >= RUN {
            runs.push(start..i + 1);
            (start, elements) = (i + 1, 0);
        }
    }
    runs
}

/// The sums over gradients that a step needs.
fn asked(all: &Parameters, records: bool) -> GradSums {
    if !(all.any(ParamsSrkl::uses_sums) || records) {
        GradSums::None
    } else if all.any(ParamsSrkl::uses_norm) || records {
        GradSums::Sum2AndSum4
    } else if all.any(ParamsSrkl::uses_sum4) {
        GradSums::Sum4
    } else {
        GradSums::FiniteOnly
    }
}

/// The decay of the average of squared row norms, if the block has one and is not frozen.
fn probe_decay(params: &ParamsSrkl) -> Option<f64> {
    match params.curvature {
        Curvature::Hutchinson(curvature) if params.lr != 0. => Some(curvature.decay),
        _ => None,
    }
}

/// The gradients that a measurement along the step will need.
fn first_gradients(
    all: &Parameters,
    gradients: &[Option<BlockGradient>],
    decisions: &[Option<Decision>],
) -> Vec<Option<Tensor>> {
    let every = all.blocks.iter().zip(gradients).zip(decisions);
    every
        .map(|((block, found), decision)| {
            let moves = all.of(block).measures_steps() && decision.is_some();
            found.filter(|_| moves).map(|found| found.gradient.detach())
        })
        .collect()
}

fn direction_sums(sums: Pair) -> DirectionSums {
    DirectionSums { direction_sq: sums.a, parameter_sq: sums.b }
}

/// The total over all blocks, in order.
fn fold(sums: &[Option<Pair>]) -> Pair {
    Pair::fold(&sums.iter().map(|sums| sums.unwrap_or(Pair::ZERO)).collect::<Vec<_>>())
}
