//! One CUDA device: the stages are launches of the kernels of `kernels/srkl.cu`.
//!
//! What a step needs lives on the device: the table of blocks (`table.rs`), the list of chunks, settings, counters. A
//! step compares the addresses of gradients with those that the device has, copies them if they differ, and launches
//! (`launch.rs`). Captures in CUDA graphs are in `capture.rs`.

use std::ops::Range;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, Device, Result, Tensor, bail};
use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr};

use self::capture::{Captures, SETTINGS_IN_CAPTURE, is_capturing};
use self::launch::{Kernels, StepKernel};
use self::orthogonal::Orthogonalizer;
use self::table::{Memory, NO_GRADIENT, NOTHING_HERE, Packed, Settings, Shared};
use self::table::{address_of, parameter_address};
use super::{Backend, BlockGradient, GradSums, GradientPair, ShardSums, Step, Tracked};
use crate::block::{Parameters, storage_address};
use crate::estimate::{Probe, StepSums};
use crate::numerics::{CHUNK, Pair, STRIP, Sums};
use crate::rule::{Decision, StepScalars};

// Made by bindgen from kernels/abi.h.
#[allow(dead_code, missing_docs, clippy::all)]
pub(crate) mod abi;
pub(crate) mod capture;
pub(crate) mod dropout;
pub(crate) mod launch;
mod orthogonal;
pub(crate) mod table;

/// Those blocks of an optimizer that are on one device.
pub(crate) struct CudaBackend {
    pub device: CudaDevice,
    stream: Arc<CudaStream>,
    kernels: Kernels,
    /// Their indices in the optimizer's list.
    places: Vec<usize>,
    /// The blocks, and the gradients and settings that were sent last: what the device has.
    blocks: Vec<abi::SrklBlock>,
    gradients: Vec<abi::SrklGradient>,
    pub settings: Settings,
    /// Before `memory`: its drop waits for replays.
    captures: Captures,
    pub memory: Memory,
    table: abi::SrklTable,
    /// Gradients that later launches read: an update that the host decides, or a measurement.
    pub live_gradients: Vec<Tensor>,
    /// If the device decides steps of sharded blocks.
    shared: Option<Shared>,
    /// Whether its blocks are sharded: sums are then read by chunk.
    sharded: bool,
    /// The sums of directions by chunk, if other ranks need them: an update that measures overwrites those on the device.
    directions: Vec<Pair>,
    /// Which kind of `srkl_replace` restores the parameters, while they are perturbed or replaced.
    restores: Option<u32>,
    /// If there are matrices to orthogonalise.
    orthogonalizer: Option<Orthogonalizer>,
    /// Whether any block's state is packed, or its parameter is rounded at random.
    packed: bool,
}

/// The address of a table of gradients on the device, as [`CudaBackend::resolve_gradients`] has found them.
#[derive(Clone, Copy)]
pub(crate) struct GradientTable(u64);

/// A backend for each CUDA device that has parameters.
pub(crate) fn devices_of(all: &mut Parameters) -> Result<Vec<CudaBackend>> {
    let mut devices: Vec<CudaDevice> = vec![];
    for block in &all.blocks {
        if let Device::Cuda(device) = block.var.device()
            && !devices.iter().any(|known| block.is_on(known))
        {
            devices.push(device.clone());
        }
    }
    devices.iter().map(|device| CudaBackend::new(device, all)).collect()
}

impl CudaBackend {
    /// Prepares steps of the blocks that are on `device`, and makes room for the matrices of those that are
    /// orthogonalised.
    pub fn new(device: &CudaDevice, all: &mut Parameters) -> Result<Self> {
        let stream = device.cuda_stream();
        let orthogonalizer = Orthogonalizer::new(device, &stream, all)?;
        let context = stream.context();
        let l2 = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).w()?;
        let packed = Packed::new(device, &stream, all, l2 as usize)?;
        let settings = Settings::new(&all.groups, StepScalars { schedule: 1., grad_scale: 1. });
        let (blocks, places) = (packed.blocks.clone(), packed.places.clone());
        let count = blocks.len();
        let memory = Memory::new(device, packed, &settings)?;
        let captures = Captures::new(device, &stream, count)?;
        let live_count = blocks.iter().filter(|block| block.chunk_count > 0).count();
        let kernels = Kernels::load(&stream)?;
        // All of this must be there for any thread that steps, whatever its stream.
        stream.synchronize().w()?;
        Ok(Self {
            device: device.clone(),
            kernels,
            places,
            packed: all.blocks.iter().any(|b| b.is_on(device) && b.is_packed(all.of(b))),
            blocks,
            gradients: vec![NO_GRADIENT; count],
            settings,
            table: memory.table(&stream, live_count),
            memory,
            captures,
            live_gradients: vec![],
            sharded: all.blocks.iter().any(|block| block.sharded),
            shared: None,
            directions: vec![],
            restores: None,
            orthogonalizer,
            stream,
        })
    }

    /// Makes room for what ranks exchange whose devices decide steps of sharded blocks.
    pub fn share(&mut self, all: &Parameters, rank: usize) -> Result<()> {
        let Self { device, stream, places, blocks, table, .. } = self;
        let shared = Shared::new(device, stream, all, rank, (blocks, places), table)?;
        self.shared = Some(shared);
        let blocks = self.blocks.clone();
        self.upload(&blocks, |memory| &mut memory.blocks)?;
        // As in `new`.
        self.stream.synchronize().w()
    }

    /// What ranks exchange, if devices decide.
    pub fn shared(&self) -> Option<&Shared> {
        self.shared.as_ref()
    }

    /// Launches what uses the sums of all ranks, of the kind `what`.
    pub fn launch_gather(&self, gradients: GradientTable, what: u32, delta: f64) -> Result<()> {
        let table = self.table_for(0, gradients);
        // SAFETY: as for `launch_step`; `shared` keeps what its part of the table points to, and callers have exchanged it.
        unsafe { self.kernels.gather(&table, what, delta) }
    }

    /// Whether all of an optimizer's blocks are here.
    pub fn has_all(&self, all: &Parameters) -> bool {
        self.places.len() == all.blocks.len()
    }

    // -- Launches --

    /// The table of gradients that were uploaded last.
    pub fn own_gradients(&self) -> GradientTable {
        GradientTable(self.table.gradients)
    }

    /// The table for these stages, with the gradients at this address.
    fn table_for(&self, stages: u32, gradients: GradientTable) -> abi::SrklTable {
        abi::SrklTable { stages: stages as u64, gradients: gradients.0, ..self.table }
    }

    /// Launches those of stages 1 to 3 that are asked for. If it `sums_up`, the update leaves the sums over the step.
    /// `steps` were taken before, if the host decides.
    pub fn launch_step(
        &self,
        stages: u32,
        gradients: GradientTable,
        sums_up: bool,
        steps: u64,
    ) -> Result<()> {
        let is_usual = |group: &abi::SrklGroup| {
            let brakes = matches!(group.scope, abi::SRKL_TENSOR | abi::SRKL_GLOBAL);
            brakes && group.direction <= abi::SRKL_MUON && group.cautious == 0
        };
        let rare = !self.settings.groups.iter().all(is_usual);
        let kind = match (self.packed, sums_up, rare) {
            (true, false, false) => StepKernel::Packed,
            (true, ..) => StepKernel::PackedMeasuring,
            (false, true, _) => StepKernel::Measuring,
            (false, false, true) => StepKernel::Elements,
            (false, false, false) => StepKernel::Plain,
        };
        let table = abi::SrklTable { steps, ..self.table_for(stages, gradients) };
        // SAFETY:
        // 1. `new` has allocated what the table points to, in the sizes that abi.h gives, with zeros where
        //    the contract asks for them, and `memory` keeps it; cudarc frees memory in the order of the stream;
        // 2. the addresses in `gradients` are of contiguous tensors on this device of the parameter's size
        //    (`resolve_gradients`), which its callers keep, and none is of a parameter (`check_alias`);
        // 3. those in `blocks` are what candle has for the variables, as `check_addresses` has just seen, and
        //    of the state that `Block` keeps; both are memory of their own, which CUDA aligns to 256
        //    bytes, at offset 0 (`Block::new`);
        // 4. all launches go to the stream that candle's own work on these tensors goes to, and one follows
        //    the other there, as long as one thread steps: `Srkl` says so.
        unsafe { self.kernels.step(&table, kind) }
    }

    /// Launches stage 2 alone, if it needs no statistics.
    pub fn launch_decide(&self, gradients: GradientTable) -> Result<()> {
        // SAFETY: as for `launch_step`.
        unsafe { self.kernels.decide(&self.table_for(0, gradients)) }
    }

    /// Launches the sums of the kind `what`. If the device `decides`, it uses them itself.
    pub fn launch_sums(
        &self,
        gradients: GradientTable,
        what: u32,
        delta: f64,
        decides: bool,
    ) -> Result<()> {
        let table = self.table_for(if decides { abi::SRKL_DECIDE } else { 0 }, gradients);
        // SAFETY: as for `launch_step`. Those who call this launch what must come before it, with the gradients alive
        // and in the table.
        unsafe { self.kernels.sums(&table, what, delta) }
    }

    /// Orthogonalises the momentum of matrices whose gradients are in this table, by decisions that are on the device.
    pub fn launch_orthogonal(&self, all: &Parameters, gradients: GradientTable) -> Result<()> {
        let Some(orthogonalizer) = &self.orthogonalizer else { return Ok(()) };
        let table = self.table_for(0, gradients);
        // SAFETY: as for `launch_step`; the orthogonalizer keeps what its own table points to.
        unsafe { self.kernels.momentum(&table, orthogonalizer.table()) }?;
        orthogonalizer.run(all, &self.kernels, self.is_capturing()?)
    }

    /// Perturbs parameters or swaps in their averages, or restores them from their backups.
    pub fn launch_replace(&mut self, what: u32, seed: u64, draw: u64) -> Result<()> {
        // SAFETY: as for `launch_step`. Callers have settings for which `new` has allocated backups.
        unsafe { self.kernels.replace(&self.table, what, seed, draw) }?;
        self.restores = match what {
            abi::SRKL_PERTURB => Some(abi::SRKL_RESTORE_PERTURBED),
            abi::SRKL_SWAP => Some(abi::SRKL_RESTORE_SWAPPED),
            _ => None,
        };
        Ok(())
    }

    pub fn is_capturing(&self) -> Result<bool> {
        is_capturing(&self.stream)
    }

    /// Whether steps have been captured, or a capture is under way.
    pub fn is_captured(&self) -> Result<bool> {
        Ok(self.captures.any() || self.is_capturing()?)
    }

    /// An error for a step that a capture does not allow.
    pub fn refuse_in_capture(&self, measures: bool, settings: &Settings) -> Result<()> {
        if measures {
            bail!(
                "a step that measures the curvature can't be captured: capture one where `measuring()` is \
                 false, and take the others outside of the graph, after `request_measurement`"
            )
        }
        if *settings != self.settings {
            bail!("{SETTINGS_IN_CAPTURE}")
        }
        self.captures.refuse_another()
    }

    pub fn refuse_capture(&self, what: &str) -> Result<()> {
        if self.is_capturing()? {
            bail!("{what} can't be part of a capture: a replay would not know of it")
        }
        Ok(())
    }

    // -- What the device is sent --

    /// # Errors
    ///
    /// A variable whose memory is not where `new` found it.
    pub fn check_addresses(&self, all: &Parameters) -> Result<()> {
        self.places.iter().zip(&self.blocks).try_for_each(|(&place, entry)| {
            let block = &all.blocks[place];
            if parameter_address(block, &self.stream)? != entry.w {
                bail!(
                    "`{}`: its memory is not where it was when the optimizer was built: something has \
                     replaced it instead of writing to it; build a new optimizer",
                    block.name
                )
            }
            Ok(())
        })
    }

    /// The gradient of a block, checked; `None` where it has none, or is frozen.
    fn gradient_of<'g>(
        &self,
        all: &Parameters,
        place: usize,
        grads: &'g GradStore,
    ) -> Result<Option<&'g Tensor>> {
        let block = &all.blocks[place];
        let Some(gradient) = grads.get_id(block.id).filter(|_| all.of(block).lr != 0.) else {
            return Ok(None);
        };
        block.check_followed(gradient)?;
        block.check_alias(storage_address(&gradient.storage_and_layout().0), &all.storages)?;
        Ok(Some(gradient))
    }

    /// Finds and checks the gradient of every block. The tensors that are returned are those to keep alive: the
    /// gradients, or contiguous copies of them.
    pub fn resolve_gradients(
        &self,
        all: &Parameters,
        grads: &GradStore,
    ) -> Result<(Vec<abi::SrklGradient>, Vec<Tensor>)> {
        let mut alive = Vec::with_capacity(self.places.len());
        let mut gradients = Vec::with_capacity(self.places.len());
        self.check_addresses(all)?;
        for &place in &self.places {
            let block = &all.blocks[place];
            let Some(gradient) = self.gradient_of(all, place, grads)? else {
                gradients.push(NO_GRADIENT);
                continue;
            };
            let gradient = gradient.detach().contiguous()?;
            let (storage, layout) = gradient.storage_and_layout();
            let address = address_of(&storage, layout.start_offset(), &self.stream)?;
            drop(storage);
            let address = match block.n {
                0 if block.sharded => NOTHING_HERE,
                0 => 0,
                _ => address,
            };
            let dtype = table::dtype(gradient.dtype())? as u64;
            gradients.push(abi::SrklGradient { address, dtype });
            alive.push(gradient);
        }
        Ok((gradients, alive))
    }

    pub fn upload_gradients(&mut self, gradients: Vec<abi::SrklGradient>) -> Result<()> {
        if gradients != self.gradients {
            self.upload(&gradients, |memory| &mut memory.gradients)?;
            self.gradients = gradients;
        }
        self.captures.refill()
    }

    /// Sends first gradients, and the settings of their step. The tensors that are returned must be kept alive.
    pub fn upload_first(
        &mut self,
        all: &Parameters,
        grads: &GradStore,
        scalars: StepScalars,
    ) -> Result<Vec<Tensor>> {
        let (gradients, alive) = self.resolve_gradients(all, grads)?;
        self.upload_changed(Settings::new(&all.groups, scalars))?;
        self.upload_gradients(gradients)?;
        Ok(alive)
    }

    /// Sends second gradients. The tensors that are returned must be kept alive.
    pub fn upload_again(
        &mut self,
        all: &Parameters,
        grads: &GradStore,
        scalars: StepScalars,
    ) -> Result<Vec<Tensor>> {
        let (again, alive) = self.resolve_gradients(all, grads)?;
        self.upload_changed(Settings::new(&all.groups, scalars))?;
        self.upload(&again, |memory| &mut memory.again)?;
        Ok(alive)
    }

    /// Records a copy of gradients in a capture, and returns the address that they are copied to.
    pub fn record_gradients(&mut self, gradients: &[abi::SrklGradient]) -> Result<GradientTable> {
        self.captures.record(gradients).map(GradientTable)
    }

    /// Sends what differs from the settings that the device has.
    pub fn upload_changed(&mut self, settings: Settings) -> Result<()> {
        if settings.groups != self.settings.groups {
            self.upload(&settings.groups, |memory| &mut memory.groups)?;
        }
        if settings.scalars != self.settings.scalars {
            // SAFETY: `memory` keeps the place for scalars.
            unsafe { self.kernels.set(&self.table, &settings.scalars) }?;
        }
        self.settings = settings;
        Ok(())
    }

    /// By cudarc: candle's own copy would keep what it copies while candle's cache for graphs is on.
    pub fn upload<T: DeviceRepr>(
        &mut self,
        values: &[T],
        to: impl FnOnce(&mut Memory) -> &mut CudaSlice<T>,
    ) -> Result<()> {
        self.stream.memcpy_htod(values, to(&mut self.memory)).w()
    }

    /// Allocates the sums of strips, if a step measures.
    pub fn make_strips(&mut self, measures: bool) -> Result<()> {
        if measures && self.memory.strips.is_none() {
            let count = self.table.chunk_count as usize * (CHUNK / STRIP);
            let strips = self.device.alloc_zeros(count.max(1))?;
            self.table.strips = strips.device_ptr(&self.stream).0;
            self.memory.strips = Some(strips);
        }
        Ok(())
    }

    // -- What is read from the device: each call waits for it --

    /// Takes a decision back that a step is skipped, which only an update would.
    pub fn withdraw(&mut self) -> Result<()> {
        let state = abi::SrklState { found_inf: 0, ..self.state()? };
        self.upload(&[state], |memory| &mut memory.state)
    }

    /// The numbers of a block's chunks among those of all blocks.
    fn chunks(&self, i: usize) -> Range<usize> {
        let first = self.blocks[i].first_chunk as usize;
        first..first + self.blocks[i].chunk_count as usize
    }

    /// The sums of pairs: of each block, or if these are sharded of each chunk.
    fn pairs(&self) -> Result<Vec<Pair>> {
        let memory = &self.memory;
        let pairs = if self.sharded { &memory.chunk_pairs } else { &memory.pairs };
        Ok(self.device.clone_dtoh(pairs)?.into_iter().map(table::read_pair).collect())
    }

    /// Which of [`CudaBackend::pairs`] are those of a block.
    fn items(&self, i: usize) -> Range<usize> {
        if self.sharded { self.chunks(i) } else { i..i + 1 }
    }

    /// Launches the sums of the squares of all parameters.
    pub fn launch_param_squares(&self, all: &Parameters) -> Result<()> {
        self.refuse_capture("telemetry")?;
        self.check_addresses(all)?;
        self.launch_sums(self.own_gradients(), abi::SRKL_SUM_PARAMETERS, 0., false)
    }

    /// The sums of the last step's statistics, of each block.
    pub fn statistics(&self) -> Result<Vec<Sums>> {
        let Some(shared) = &self.shared else {
            let statistics = self.device.clone_dtoh(&self.memory.statistics)?;
            return Ok(statistics.into_iter().map(|found| table::sums(found.sums)).collect());
        };
        shared.read_statistics(self.blocks.len())
    }

    /// What the kernels count.
    pub fn state(&self) -> Result<abi::SrklState> {
        if self.is_capturing()? {
            bail!(
                "counters and telemetry can't be read while the device's stream is being captured"
            )
        }
        Ok(self.device.clone_dtoh(&self.memory.state)?[0])
    }
}

/// Runs the stages of steps that the host decides. The gradients of a step are kept until [`Backend::release`].
impl Backend for CudaBackend {
    fn check(&self, all: &Parameters, grads: &GradStore) -> Result<()> {
        self.check_addresses(all)?;
        self.places.iter().try_for_each(|&place| self.gradient_of(all, place, grads).map(|_| ()))
    }

    fn refuse_capture(&self, what: &str) -> Result<()> {
        CudaBackend::refuse_capture(self, what)
    }

    fn statistics<'g>(
        &mut self,
        all: &Parameters,
        step: Step<'g>,
        _: Range<usize>,
        _: GradSums,
        _: &mut [Option<BlockGradient<'g>>],
    ) -> Result<()> {
        if self.is_capturing()? {
            bail!(
                "a step of parameters on several devices is decided on the host, which waits for them; \
                 it can't be captured in a CUDA graph"
            )
        }
        self.live_gradients = self.upload_first(all, step.grads, step.scalars)?;
        let record = if step.records { abi::SRKL_RECORD } else { 0 };
        self.launch_step(abi::SRKL_STATISTICS | record, self.own_gradients(), false, step.steps)
    }

    fn read_statistics<'g>(
        &self,
        all: &Parameters,
        step: Step<'g>,
        gradients: &mut [Option<BlockGradient<'g>>],
    ) -> Result<()> {
        let statistics = self.device.clone_dtoh(&self.memory.statistics)?;
        let found = self.places.iter().zip(&self.gradients).zip(statistics);
        for ((&place, _), statistics) in found.filter(|((_, gradient), _)| gradient.address != 0) {
            if let Some(gradient) = step.grads.get_id(all.blocks[place].id) {
                let sums = table::sums(statistics.sums);
                gradients[place] = Some(BlockGradient { gradient, sums, storage: 0, elements: 0 });
            }
        }
        Ok(())
    }

    fn shard_sums(
        &mut self,
        _: &mut Parameters,
        _: GradSums,
        gradients: &[Option<BlockGradient>],
        sums: &mut [Option<ShardSums>],
    ) -> Result<()> {
        let statistics = self.device.clone_dtoh(&self.memory.statistics)?;
        let chunk_sums = self.device.clone_dtoh(&self.memory.chunk_sums)?;
        for (i, (&place, found)) in self.places.iter().zip(statistics).enumerate() {
            let of_chunks = chunk_sums[self.chunks(i)].iter().map(|sums| table::sums(*sums));
            sums[place] = gradients[place].map(|_| ShardSums {
                of_chunks: of_chunks.collect(),
                overwritten: found.reset_master != 0,
            });
        }
        Ok(())
    }

    fn upload_decisions(
        &mut self,
        all: &Parameters,
        tracked: &[Tracked],
        decisions: &[Option<Decision>],
    ) -> Result<()> {
        let decision = |&place: &usize| match &decisions[place] {
            Some(decision) => {
                table::decision(decision, all.of(&all.blocks[place]), &tracked[place])
            }
            None => abi::SrklDecision::default(),
        };
        let decisions: Vec<_> = self.places.iter().map(decision).collect();
        self.upload(&decisions, |memory| &mut memory.decisions)
    }

    fn orthogonalize(
        &mut self,
        all: &mut Parameters,
        _: &[Tracked],
        _: Range<usize>,
        _: &[Option<BlockGradient>],
        _: &[Option<Decision>],
    ) -> Result<()> {
        self.launch_orthogonal(all, self.own_gradients())
    }

    fn directions(
        &mut self,
        _: &mut Parameters,
        _: &[Tracked],
        _: Range<usize>,
        _: &[Option<(&Tensor, Decision)>],
        measures: bool,
        _: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        let what = if measures { abi::SRKL_SUM_MEASURING } else { abi::SRKL_SUM_DIRECTIONS };
        self.launch_sums(self.own_gradients(), what, 0., false)
    }

    fn update(
        &mut self,
        _: &mut Parameters,
        _: &mut [Tracked],
        _: Range<usize>,
        _: &[Option<BlockGradient>],
        _: &[Option<Decision>],
        step: Step,
    ) -> Result<()> {
        if self.sharded && step.measures {
            self.directions = self.pairs()?;
        }
        self.make_strips(step.measures)?;
        let sums_up = step.measures || step.records;
        self.launch_step(abi::SRKL_UPDATE, self.own_gradients(), sums_up, step.steps)
    }

    fn read_step_sums(&self, step_sums: &mut [Vec<StepSums>]) -> Result<()> {
        if self.sharded {
            let pairs = self.pairs()?;
            for (i, &place) in self.places.iter().enumerate() {
                let of_chunk = |chunk: usize| StepSums {
                    step: pairs[chunk].a,
                    direction: self.directions.get(chunk).map_or(0., |sums| sums.a),
                    along: pairs[chunk].b,
                };
                step_sums[place] = self.chunks(i).map(of_chunk).collect();
            }
            return Ok(());
        }
        let sums = self.device.clone_dtoh(&self.memory.step_sums)?;
        for (&place, sums) in self.places.iter().zip(sums) {
            step_sums[place] = vec![table::read_step_sums(sums)];
        }
        Ok(())
    }

    fn change_of_gradient(
        &mut self,
        all: &mut Parameters,
        _: &[Tracked],
        again: Step,
        _: &[Option<GradientPair>],
        _: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        self.refuse_capture("a measurement of curvature")?;
        // The stream's order protects its memory from being reused before it is read.
        let _alive = self.upload_again(all, again.grads, again.scalars)?;
        self.launch_sums(self.own_gradients(), abi::SRKL_SUM_STEP, 0., false)
    }

    fn squares(
        &mut self,
        all: &mut Parameters,
        step: Step,
        _: &[Option<()>],
        _: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        self.refuse_capture("a measurement of curvature")?;
        self.live_gradients = self.upload_first(all, step.grads, step.scalars)?;
        self.launch_sums(self.own_gradients(), abi::SRKL_SUM_SQUARES, 0., false)
    }

    fn perturb(
        &mut self,
        _: &mut Parameters,
        _: &[Option<()>],
        _: f64,
        seed: u64,
        draw: u64,
    ) -> Result<()> {
        self.launch_replace(abi::SRKL_PERTURB, seed, draw)
    }

    fn probe_sums(
        &mut self,
        all: &mut Parameters,
        step: Step,
        again: &GradStore,
        _: &[Option<(GradientPair, f64)>],
        _: f64,
        _: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        self.refuse_capture("a measurement of curvature")?;
        let alive = self.upload_first(all, step.grads, step.scalars)?;
        self.live_gradients = self.upload_again(all, again, step.scalars)?;
        self.live_gradients.extend(alive);
        self.launch_sums(self.own_gradients(), abi::SRKL_SUM_PROBE, 0., false)
    }

    fn average_probe(
        &mut self,
        _: &mut Parameters,
        _: &[Option<(GradientPair, f64)>],
        _: f64,
        _: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        self.launch_sums(self.own_gradients(), abi::SRKL_SUM_AVERAGE, 0., false)?;
        self.live_gradients.clear();
        Ok(())
    }

    fn read_sums(
        &self,
        wanted: &dyn Fn(usize) -> bool,
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        let pairs = self.pairs()?;
        for (i, &place) in self.places.iter().enumerate().filter(|(_, place)| wanted(**place)) {
            sums[place] = Some(pairs[self.items(i)].to_vec());
        }
        Ok(())
    }

    fn param_squares(&self, all: &Parameters, squares: &mut [Option<Vec<Pair>>]) -> Result<()> {
        self.launch_param_squares(all)?;
        let pairs = self.pairs()?;
        for (i, &place) in self.places.iter().enumerate() {
            squares[place] = Some(pairs[self.items(i)].to_vec());
        }
        Ok(())
    }

    fn swap(&mut self, all: &mut Parameters, _: &[Tracked]) -> Result<()> {
        self.refuse_capture("`swap_averaged`")?;
        self.check_addresses(all)?;
        self.launch_replace(abi::SRKL_SWAP, 0, 0)
    }

    fn restore(&mut self, all: &mut Parameters) -> Result<()> {
        let Some(what) = self.restores else { return Ok(()) };
        self.check_addresses(all)?;
        self.launch_replace(what, 0, 0)
    }

    fn release(&mut self, _: &mut Parameters) {
        self.live_gradients.clear();
        self.restores = None;
    }

    /// # Errors
    ///
    /// In a capture, where a replay would set them back each time.
    fn upload_settings(&mut self, all: &Parameters, scalars: StepScalars) -> Result<()> {
        let settings = Settings::new(&all.groups, scalars);
        let group = |place: &usize| all.blocks[*place].group as u32;
        let groups: Vec<u32> = self.places.iter().map(group).collect();
        // Frozen parameters are in other groups.
        let moved = !self.blocks.iter().map(|block| block.group).eq(groups.iter().copied());
        if (moved || settings != self.settings) && self.is_capturing()? {
            bail!("{SETTINGS_IN_CAPTURE}")
        }
        self.upload_changed(settings)?;
        if moved {
            self.blocks.iter_mut().zip(groups).for_each(|(block, group)| block.group = group);
            let blocks = self.blocks.clone();
            self.upload(&blocks, |memory| &mut memory.blocks)?;
        }
        Ok(())
    }

    fn upload_estimates(&mut self, tracked: &[Tracked]) -> Result<()> {
        self.refuse_capture("what is sent for a measurement, `swap_averaged` or `load`")?;
        let here = self.places.iter().map(|&place| &tracked[place]);
        let powers: Vec<_> = here.clone().map(|t| table::powers(&t.powers)).collect();
        let estimates: Vec<_> = here.map(|t| table::estimate(&t.estimate)).collect();
        self.upload(&powers, |memory| &mut memory.powers)?;
        self.upload(&estimates, |memory| &mut memory.estimates)
    }

    fn upload_probe(&mut self, size: f64, probe: Probe) -> Result<()> {
        let probe = table::probe(probe);
        let state = abi::SrklState { probe_size: size, probe, ..Default::default() };
        self.upload(&[state], |memory| &mut memory.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Var};

    use crate::block::Block;
    use crate::params::Group;
    use crate::{MasterWeights, ParamsSrkl};

    /// A chunk that starts past the 2^31st and the 2^32nd element, of a tensor of which no more than that chunk
    /// exists: its table says that everything lies so much further ahead. Needs a CUDA device.
    #[test]
    fn elements_past_32_bits_are_stepped() -> Result<()> {
        let device = Device::new_cuda(0)?;
        for dtype in [DType::F32, DType::BF16] {
            for start in [1u64 << 31, 1 << 32, (1 << 32) + (1 << 31)] {
                let values: Vec<f32> = (0..5001).map(|i| (i as f32 * 0.37).sin()).collect();
                let tensor = |x: &[f32]| Tensor::new(x, &device)?.to_dtype(dtype);
                let step = |start: u64| -> Result<Vec<f32>> {
                    let var = Var::from_tensor(&tensor(&values)?)?;
                    let g = tensor(&values)?.affine(0.5, 0.1)?;
                    // No masters: a step looks at some of all elements of theirs.
                    let master_weights = MasterWeights::None;
                    let params = ParamsSrkl { lr: 0.1, master_weights, ..ParamsSrkl::reference() };
                    let all = 0..var.elem_count();
                    let block = Block::new("w".to_string(), var.clone(), 0, &params, all)?;
                    let groups = vec![Group::new("all".to_string(), params)];
                    let mut all = Parameters::new(groups, vec![block]);
                    let mut cuda = CudaBackend::new(device.as_cuda_device()?, &mut all)?;
                    let mut grads = GradStore::default();
                    grads.insert(&var, g);
                    cuda.launch_shifted(&all, &grads, 0)?;
                    cuda.shift(start)?;
                    cuda.launch_shifted(&all, &grads, start)?;
                    var.to_dtype(DType::F32)?.to_vec1()
                };
                assert_eq!(step(0)?, step(start)?, "{dtype:?} {start}");
            }
        }
        Ok(())
    }

    impl CudaBackend {
        /// Moves the only block's beginning `by` elements back, and its only chunk as many ahead.
        fn shift(&mut self, by: u64) -> Result<()> {
            let block = &self.blocks[0];
            let size = if block.dtype == abi::SRKL_F32 { 4 } else { 2 };
            let w = block.w.wrapping_sub(size * by);
            let moved = abi::SrklBlock { w, n: block.n + by, whole: block.n + by, ..*block };
            self.device.memcpy_htod(&[moved], &mut self.memory.blocks)?;
            let chunk = abi::SrklChunk { start: by, block: 0 };
            self.device.memcpy_htod(&[chunk], &mut self.memory.chunks)
        }

        /// A step whose gradient is shifted likewise.
        fn launch_shifted(&mut self, all: &Parameters, grads: &GradStore, by: u64) -> Result<()> {
            let (mut gradients, _alive) = self.resolve_gradients(all, grads)?;
            let size = all.blocks[0].dtype.size_in_bytes() as u64;
            gradients[0].address = gradients[0].address.wrapping_sub(size * by);
            let scalars = StepScalars { schedule: 1., grad_scale: 1. };
            self.upload_changed(Settings::new(&all.groups, scalars))?;
            self.upload_gradients(gradients)?;
            let stages = abi::SRKL_STATISTICS | abi::SRKL_DECIDE | abi::SRKL_UPDATE;
            self.launch_step(stages | abi::SRKL_COUNT, self.own_gradients(), false, 0)
        }
    }
}
