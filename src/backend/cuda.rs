//! The stages on a CUDA device: packs tables, launches the kernels of `kernels/srkl.cu`, and owns
//! every `unsafe` of this.
//!
//! The kernels' launch contract stands at the top of that file. What a step needs lives on the device:
//! the table of blocks, the list of work, settings, counters. A step compares the addresses of gradients
//! with those that the device has, copies them if they differ, and launches.
//!
//! # CUDA graphs
//!
//! In a capture nothing may be copied from memory that changes later. So the addresses of gradients go
//! through a page-locked buffer that is written once and kept, into a table that only captured steps
//! use, and the settings must be on the device already: those who set them launch a kernel that does it.

use std::sync::Arc;

use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, DType, Device, Layout, Result, Storage, Tensor, Var, bail};
use cudarc::driver::sys::{CUdevice_attribute, CUstreamCaptureStatus};
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig,
    PinnedHostSlice, PushKernelArg, ValidAsZeroBits, result,
};
use cudarc::nvrtc::Ptx;

use super::access::MASTER_SAMPLES;
use super::{Counters, Inputs, StepOptions};
use crate::block::{Block, Buffer, Last, State, storage_address};
use crate::cuda::abi;
use crate::estimate::{Counts, Estimate, Left, Probe, StepSums};
use crate::numerics::{CHUNK, LANES, Pair, STRIP, Sums};
use crate::params::{Curvature, Direction, Group, NonFinite, ParamsSrkl, Scope};
use crate::rule::{Corrections, Decision, Powers, StepScalars};

/// Machine code and PTX of `kernels/srkl.cu`, from `build.rs`.
pub(super) static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/srkl.fatbin"));

/// Blocks of threads for each multiprocessor, where a step is decided as a whole: as many as there is room for.
const CTAS_PER_SM: u32 = abi::SRKL_CTAS_PER_SM;

/// The same where each block is updated soon after its statistics. What lies between a chunk's two turns should
/// fit in L2: gradient and parameter of a chunk for each CTA, and of the rest of the chunk's block.
const CTAS_PER_SM_IN_L2: u32 = 2;

// The kernels' copies of our constants.
const _: () = assert!(abi::SRKL_CHUNK as usize == CHUNK);
const _: () = assert!(abi::SRKL_LANES as usize == LANES);
const _: () = assert!(abi::SRKL_STRIP as usize == STRIP);
const _: () = assert!(abi::SRKL_PROBES as usize == MASTER_SAMPLES);

macro_rules! device_repr {
    ($($t:ty),*) => {$(
        // SAFETY: bindgen made it from the struct that the kernels use, `repr(C)`, of plain numbers.
        unsafe impl DeviceRepr for $t {}
        // SAFETY: all of its fields are numbers.
        unsafe impl ValidAsZeroBits for $t {}
    )*};
}
device_repr!(
    abi::SrklBlock,
    abi::SrklGradient,
    abi::SrklGroup,
    abi::SrklScalars,
    abi::SrklChunk,
    abi::SrklSums,
    abi::SrklPair,
    abi::SrklPowers,
    abi::SrklStepSums,
    abi::SrklEstimate,
    abi::SrklStatistics,
    abi::SrklDecision,
    abi::SrklState,
    abi::SrklTable
);

/// Those blocks of an optimizer that are on one device.
pub(crate) struct Cuda {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// Their places in the optimizer's list.
    places: Vec<usize>,
    step: CudaFunction,
    step_elements: CudaFunction,
    step_measuring: CudaFunction,
    decide: CudaFunction,
    sums: CudaFunction,
    replace: CudaFunction,
    set: CudaFunction,
    multiprocessors: u32,
    /// What the device has: the blocks, the gradients and settings that were sent last.
    blocks: Vec<abi::SrklBlock>,
    gradients: Vec<abi::SrklGradient>,
    settings: Settings,
    memory: Memory,
    table: abi::SrklTable,
    captures: Captures,
    /// Gradients that are read by what follows: an update that the host decides, or a measurement.
    pending: Vec<Tensor>,
    /// Whether all blocks of the optimizer are here: then the device decides, and otherwise the host.
    decides: bool,
    /// What puts the parameters back that something stands in for.
    restores: Option<u32>,
    /// Masters are compared with their parameters in the launch that does statistics.
    has_masters: bool,
}

/// What the settings of an optimizer come to for its kernels.
#[derive(Clone, PartialEq)]
struct Settings {
    groups: Vec<abi::SrklGroup>,
    scalars: abi::SrklScalars,
}

/// What the table points to.
struct Memory {
    blocks: CudaSlice<abi::SrklBlock>,
    gradients: CudaSlice<abi::SrklGradient>,
    groups: CudaSlice<abi::SrklGroup>,
    scalars: CudaSlice<abi::SrklScalars>,
    chunks: CudaSlice<abi::SrklChunk>,
    chunk_sums: CudaSlice<abi::SrklSums>,
    chunks_done: CudaSlice<u32>,
    ready: CudaSlice<u32>,
    statistics: CudaSlice<abi::SrklStatistics>,
    decisions: CudaSlice<abi::SrklDecision>,
    powers: CudaSlice<abi::SrklPowers>,
    estimates: CudaSlice<abi::SrklEstimate>,
    again: CudaSlice<abi::SrklGradient>,
    chunk_pairs: CudaSlice<abi::SrklPair>,
    pairs: CudaSlice<abi::SrklPair>,
    step_sums: CudaSlice<abi::SrklStepSums>,
    /// Made for the first step that measures.
    strips: Option<CudaSlice<f64>>,
    told: CudaSlice<u32>,
    /// Room for all parameters as they were, where settings ask for it.
    _old: Option<CudaSlice<u8>>,
    skipped: CudaSlice<u64>,
    state: CudaSlice<abi::SrklState>,
}

/// What captured steps use.
struct Captures {
    /// Their table of gradients, which each replay fills anew.
    gradients: CudaSlice<abi::SrklGradient>,
    /// For the next capture; a step outside of one replaces it.
    spare: Option<Pinned>,
    /// What recorded copies read, for as long as somebody may replay them.
    recorded: Vec<Pinned>,
}

/// Page-locked memory of the host, for one table of gradients.
struct Pinned {
    address: *mut abi::SrklGradient,
    _memory: PinnedHostSlice<abi::SrklGradient>,
}

// SAFETY: `address` points to `_memory`, which is `Send`.
unsafe impl Send for Pinned {}
// SAFETY: nothing is written through a shared reference.
unsafe impl Sync for Pinned {}

const NO_GRADIENT: abi::SrklGradient = abi::SrklGradient { address: 0, dtype: 0 };

const SETTINGS_IN_CAPTURE: &str = "the optimizer's settings have changed inside a capture, where a \
    replay would set them back each time: set the learning rate, gradient scale and parameters of groups \
    before it begins, or after it has ended";

/// The CUDA devices that blocks are on.
pub(crate) fn devices_of(blocks: &[Block], groups: &[Group]) -> Result<Vec<Cuda>> {
    let mut devices: Vec<&CudaDevice> = vec![];
    for block in blocks {
        if let Device::Cuda(device) = block.var.device()
            && !devices.iter().any(|known| block.is_on(known))
        {
            devices.push(device);
        }
    }
    devices.into_iter().map(|device| Cuda::new(device, blocks, groups)).collect()
}

impl Cuda {
    /// Prepares the steps of those of `blocks` that are on `device`.
    fn new(device: &CudaDevice, blocks: &[Block], groups: &[Group]) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let module = context.load_module(Ptx::from_binary(FATBIN.to_vec())).w()?;
        let attribute = |attribute| context.attribute(attribute).w();
        let multiprocessors =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let l2 = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize;

        let keeps = groups.iter().any(|group| group.params.keeps_parameters());
        let (mut places, mut entries, mut chunks) = (vec![], vec![], vec![]);
        let mut old_size = 0;
        for (place, block) in blocks.iter().enumerate() {
            if !block.is_on(device) {
                continue;
            }
            let chunk_count = block.n.div_ceil(CHUNK) as u64;
            // Of the gradient, which L2 must hold beside the parameter and what comes next.
            let bytes = block.n * block.dtype.size_in_bytes();
            let address = |buffer: &Option<Buffer>| match buffer {
                Some(Buffer::CudaF32(values)) => values.device_ptr(&stream).0,
                Some(Buffer::CudaF64(values)) => values.device_ptr(&stream).0,
                _ => 0,
            };
            let State { master, m, v, average, q } = &block.state;
            let old = old_size as u64;
            old_size += bytes.next_multiple_of(256);
            let (storage, layout) = block.var.storage_and_layout();
            entries.push(abi::SrklBlock {
                w: address_of(&storage, layout, &stream)?,
                master: address(master),
                m: address(m),
                v: address(v),
                average: address(average),
                q: address(q),
                old,
                n: block.n as u64,
                first_chunk: chunks.len() as u64,
                chunk_count,
                dtype: dtype(block.dtype)?,
                group: block.group as u32,
                from_end: (bytes > l2 / 4) as u32,
                place: place as u32,
            });
            let start = |chunk| chunk * CHUNK as u64;
            let number = places.len() as u64;
            chunks.extend(
                (0..chunk_count).map(|chunk| abi::SrklChunk { start: start(chunk), block: number }),
            );
            places.push(place);
        }
        let count = entries.len();
        let old: Option<CudaSlice<u8>> =
            keeps.then(|| device.alloc_zeros(old_size.max(1))).transpose()?;
        for entry in &mut entries {
            entry.old = old.as_ref().map_or(0, |old| old.device_ptr(&stream).0 + entry.old);
        }
        let scalars = StepScalars { schedule: 1., grad_scale: 1. };
        let settings = Settings::new(groups, scalars);
        let memory = Memory {
            blocks: device.clone_htod(&entries)?,
            gradients: device.clone_htod(&vec![NO_GRADIENT; count])?,
            groups: device.clone_htod(&settings.groups)?,
            scalars: device.clone_htod(&[settings.scalars])?,
            chunk_sums: device.alloc_zeros(chunks.len())?,
            chunks: device.clone_htod(&chunks)?,
            chunks_done: device.alloc_zeros(count)?,
            ready: device.alloc_zeros(count)?,
            statistics: device.alloc_zeros(count)?,
            decisions: device.alloc_zeros(count)?,
            powers: device.clone_htod(&vec![powers(&Powers::NONE); count])?,
            estimates: device.clone_htod(&vec![estimate(&Estimate::NONE); count])?,
            again: device.clone_htod(&vec![NO_GRADIENT; count])?,
            chunk_pairs: device.alloc_zeros(chunks.len())?,
            pairs: device.alloc_zeros(count)?,
            step_sums: device.alloc_zeros(count)?,
            strips: None,
            told: device.alloc_zeros(count)?,
            _old: old,
            skipped: device.alloc_zeros(count)?,
            state: device.alloc_zeros(1)?,
        };
        let captures = Captures {
            gradients: device.clone_htod(&vec![NO_GRADIENT; count])?,
            spare: Some(Pinned::new(&stream, count)?),
            recorded: vec![],
        };
        let has_masters = entries.iter().any(|entry| entry.master != 0);
        let live_count = entries.iter().filter(|entry| entry.chunk_count > 0).count();
        // Whatever thread steps, and so whatever its stream is, finds all of this there.
        stream.synchronize().w()?;
        Ok(Self {
            device: device.clone(),
            places,
            step: module.load_function("srkl_step").w()?,
            step_elements: module.load_function("srkl_step_elements").w()?,
            step_measuring: module.load_function("srkl_step_measuring").w()?,
            decide: module.load_function("srkl_decide").w()?,
            sums: module.load_function("srkl_sums").w()?,
            replace: module.load_function("srkl_replace").w()?,
            set: module.load_function("srkl_set").w()?,
            multiprocessors,
            blocks: entries,
            gradients: vec![NO_GRADIENT; count],
            settings,
            table: memory.table(&stream, live_count),
            memory,
            captures,
            pending: vec![],
            decides: count == blocks.len(),
            restores: None,
            has_masters,
            stream,
        })
    }

    /// One step, decided on the device: one launch, two where it needs no statistics, or three where it needs
    /// the directions; no synchronisation, nothing copied to the host. `measures` says whether
    /// [`Cuda::observe`] follows. Returns whether it was captured instead.
    ///
    /// # Errors
    ///
    /// Whatever can be wrong with a gradient, or with a capture; nothing is launched then.
    pub fn step(&mut self, inputs: &Inputs, options: StepOptions) -> Result<bool> {
        let StepOptions { measures, records } = options;
        let (gradients, alive) = self.find(inputs)?;
        let settings = Settings::new(inputs.groups, inputs.scalars);
        let capturing = self.is_capturing()?;
        let address = if capturing {
            if measures {
                bail!(
                    "a step that measures the curvature can't be captured: capture one where `measuring()` is \
                     false, and take the others outside of the graph, after `request_measurement`"
                )
            }
            if settings != self.settings {
                bail!("{SETTINGS_IN_CAPTURE}")
            }
            self.send_captured(&gradients)?
        } else {
            self.make_strips(measures)?;
            self.send(settings)?;
            self.send_gradients(gradients)?;
            self.table.gradients
        };
        let launch = |stages: u32| {
            let stages = stages | if records { abi::SRKL_RECORD } else { 0 };
            let table = abi::SrklTable { gradients: address, ..self.for_stages(stages) };
            self.launch(&table, (measures || records) && stages & abi::SRKL_UPDATE != 0)
        };
        let any = |holds: fn(&ParamsSrkl) -> bool| inputs.groups.iter().any(|g| holds(&g.params));
        // The gradients must live until the kernel is launched; then the stream's order protects them.
        if measures || any(|params| params.trust.is_some()) {
            launch(abi::SRKL_STATISTICS | abi::SRKL_DECIDE)?;
            let what = if measures { abi::SRKL_SUM_MEASURING } else { abi::SRKL_SUM_DIRECTIONS };
            self.launch_sums(address, what, 0.)?;
            launch(abi::SRKL_UPDATE | abi::SRKL_COUNT)?;
        } else if any(ParamsSrkl::uses_sums) || self.has_masters || records {
            let stages = abi::SRKL_STATISTICS | abi::SRKL_DECIDE | abi::SRKL_UPDATE;
            launch(stages | abi::SRKL_COUNT)?;
        } else {
            let table = abi::SrklTable { gradients: address, ..self.table };
            let mut launch_decide = self.stream.launch_builder(&self.decide);
            // SAFETY: as for `launch`; any grid is right.
            unsafe { launch_decide.arg(&table).launch(self.grid(1)) }.w()?;
            launch(abi::SRKL_UPDATE | abi::SRKL_COUNT)?;
        }
        self.pending = if measures { alive } else { vec![] };
        Ok(capturing)
    }

    // In what follows a device that decides goes on by itself, and [`Cuda::pairs`] tells the host the sums of one
    // that doesn't.

    /// The measurement of the last step, by second gradients.
    ///
    /// # Errors
    ///
    /// Whatever can be wrong with a gradient.
    pub fn observe(&mut self, again: &Inputs) -> Result<()> {
        self.refuse_capture("a measurement of curvature")?;
        let _alive = self.send_again(again)?;
        self.launch_sums(self.table.gradients, abi::SRKL_SUM_STEP, 0.)
    }

    /// Of each block what the last measurement has left of its estimate, and whether there is one. Waits for the
    /// device.
    pub fn left(&self) -> Result<Vec<(Option<Left>, bool)>> {
        let told = self.device.clone_dtoh(&self.memory.told)?;
        let left = |told: u32| {
            let is = |bit| (told & bit != 0).then_some(());
            let lost = is(abi::SRKL_LOST).map(|()| Left::Lost);
            let as_it_was = is(abi::SRKL_AS_IT_WAS).map(|()| Left::AsItWas);
            let known = is(abi::SRKL_KNOWN).map(|()| Left::Known);
            (lost.or(as_it_was).or(known), known.is_some())
        };
        Ok(told.into_iter().map(left).collect())
    }

    /// The sums of each block's last step, by its place, of one that measured or recorded norms. Waits for the
    /// device.
    pub fn step_sums(&self) -> Result<Vec<(usize, StepSums)>> {
        let sums = self.device.clone_dtoh(&self.memory.step_sums)?;
        let sums = sums.into_iter().map(|s: abi::SrklStepSums| StepSums {
            step: s.step,
            direction: s.direction,
            along: s.along,
        });
        Ok(self.places.iter().copied().zip(sums).collect())
    }

    /// The squares of each block's parameter as it is, by its place. Waits for the device.
    pub fn all_squares(&self, blocks: &[Block]) -> Result<Vec<(usize, f64)>> {
        self.refuse_capture("telemetry")?;
        self.check_addresses(blocks)?;
        self.launch_sums_of(&self.for_stages(0), abi::SRKL_SUM_PARAMETERS, 0.)?;
        Ok(self.pairs()?.into_iter().map(|(place, pair)| (place, pair.a)).collect())
    }

    /// The squares of the parameters that have a gradient, and with `delta` the size of a perturbation.
    ///
    /// # Errors
    ///
    /// Whatever can be wrong with a gradient.
    pub fn squares(&mut self, inputs: &Inputs, delta: f64) -> Result<()> {
        self.refuse_capture("a measurement of curvature")?;
        let (gradients, alive) = self.find(inputs)?;
        self.send(Settings::new(inputs.groups, inputs.scalars))?;
        self.send_gradients(gradients)?;
        self.pending = alive;
        self.launch_sums(self.table.gradients, abi::SRKL_SUM_SQUARES, delta)
    }

    /// Keeps the parameters and perturbs them, after [`Cuda::squares`].
    pub fn perturb(&mut self, seed: u64, draw: u64) -> Result<()> {
        self.launch_replace(abi::SRKL_PERTURB, seed, draw)
    }

    /// Keeps the parameters and puts their averages in their place.
    pub fn swap(&mut self, blocks: &[Block]) -> Result<()> {
        self.refuse_capture("`swap_averaged`")?;
        self.check_addresses(blocks)?;
        self.launch_replace(abi::SRKL_SWAP, 0, 0)
    }

    /// Puts back what was kept, if anything was.
    pub fn restore(&mut self, blocks: &[Block]) -> Result<()> {
        let Some(what) = self.restores else { return Ok(()) };
        self.check_addresses(blocks)?;
        self.launch_replace(what, 0, 0)
    }

    /// The product with the Hessian by the last perturbation, from the gradients before and at it.
    ///
    /// # Errors
    ///
    /// As [`Cuda::observe`].
    pub fn probe_sums(&mut self, first: &Inputs, again: &Inputs) -> Result<()> {
        self.refuse_capture("a measurement of curvature")?;
        let (gradients, alive) = self.find(first)?;
        self.send_gradients(gradients)?;
        self.pending = self.send_again(again)?;
        self.pending.extend(alive);
        self.launch_sums(self.table.gradients, abi::SRKL_SUM_PROBE, 0.)
    }

    /// Its average, after [`Cuda::probe_sums`].
    pub fn average_probe(&mut self) -> Result<()> {
        self.launch_sums(self.table.gradients, abi::SRKL_SUM_AVERAGE, 0.)?;
        self.pending.clear();
        Ok(())
    }

    /// The sums of each block, by its place. Waits for the device.
    pub fn pairs(&self) -> Result<Vec<(usize, Pair)>> {
        let pairs = self.device.clone_dtoh(&self.memory.pairs)?;
        let pair = |(&place, pair): (&usize, abi::SrklPair)| (place, Pair { a: pair.a, b: pair.b });
        Ok(self.places.iter().zip(pairs).map(pair).collect())
    }

    // -- What a device is told that doesn't decide --

    /// Stage 1 alone: launches the statistics, for a step that the host decides. Its gradients are kept until
    /// [`Cuda::forget`], which comes after [`Cuda::update`], or after [`Cuda::observe`] where that follows.
    ///
    /// # Errors
    ///
    /// As [`Cuda::step`]; and such a step cannot be captured.
    ///
    /// `records` says whether norms are recorded.
    pub fn statistics(&mut self, inputs: &Inputs, records: bool) -> Result<()> {
        if self.is_capturing()? {
            bail!(
                "a step of parameters on several devices is decided on the host, which waits for them; \
                 it can't be captured in a CUDA graph"
            )
        }
        let (gradients, alive) = self.find(inputs)?;
        self.send(Settings::new(inputs.groups, inputs.scalars))?;
        self.send_gradients(gradients)?;
        self.pending = alive;
        let record = if records { abi::SRKL_RECORD } else { 0 };
        self.launch(&self.for_stages(abi::SRKL_STATISTICS | record), false)
    }

    /// What [`Cuda::statistics`] found: the places of blocks that have a gradient, with their sums. Waits
    /// for the device.
    pub fn found(&self) -> Result<Vec<(usize, Sums)>> {
        let found = self.device.clone_dtoh(&self.memory.statistics)?;
        let with_place = self.places.iter().zip(&self.gradients).zip(found);
        let present = with_place.filter(|((_, gradient), _)| gradient.address != 0);
        Ok(present.map(|((&place, _), found)| (place, sums(found.sums))).collect())
    }

    /// Sends decisions of the host, about all blocks of the optimizer.
    pub fn send_decisions(
        &mut self,
        decisions: &[Option<Decision>],
        blocks: &[Block],
        groups: &[Group],
    ) -> Result<()> {
        let decision = |&place: &usize| match decisions[place] {
            Some(Decision { c, curvature, phi, .. }) => {
                let Block { group, powers, .. } = &blocks[place];
                let corrections = Corrections::new(&groups[*group].params, powers);
                abi::SrklDecision {
                    c,
                    curvature,
                    phi,
                    correction1: corrections.first,
                    correction2: corrections.second,
                    average: corrections.average,
                    powers: abi::SrklPowers::default(),
                    step: 1,
                    small: 0,
                }
            }
            None => abi::SrklDecision::default(),
        };
        let decisions: Vec<_> = self.places.iter().map(decision).collect();
        self.upload(&decisions, |memory| &mut memory.decisions)
    }

    /// The sums over directions, between a [`Cuda::send_decisions`] and another one.
    pub fn directions(&mut self, measures: bool) -> Result<()> {
        let what = if measures { abi::SRKL_SUM_MEASURING } else { abi::SRKL_SUM_DIRECTIONS };
        self.launch_sums(self.table.gradients, what, 0.)
    }

    /// Sends the size of a perturbation, and what the product with the Hessian comes to.
    pub fn send_probe(&mut self, size: f64, probe: Probe) -> Result<()> {
        let probe = match probe {
            Probe::Finite => abi::SRKL_FINITE,
            Probe::Infinite => abi::SRKL_INFINITE,
            Probe::Nothing => abi::SRKL_NOTHING,
        };
        let state = abi::SrklState { probe_size: size, probe, ..Default::default() };
        self.upload(&[state], |memory| &mut memory.state)
    }

    /// Sends the products of decays and the estimates of blocks.
    pub fn send_known(&mut self, blocks: &[Block]) -> Result<()> {
        self.refuse_capture("what is sent for a measurement, `swap_averaged` or `load`")?;
        let here = self.places.iter().map(|&place| &blocks[place]);
        let all_powers: Vec<_> = here.clone().map(|block| powers(&block.powers)).collect();
        let estimates: Vec<_> = here.map(|block| estimate(&block.estimate)).collect();
        self.upload(&all_powers, |memory| &mut memory.powers)?;
        self.upload(&estimates, |memory| &mut memory.estimates)
    }

    /// Stage 3 alone, by the decisions that were sent. The gradients are those of the last
    /// [`Cuda::statistics`], and still alive.
    ///
    /// If it measures or records, [`Cuda::step_sums`] tells how blocks have moved.
    pub fn update(&mut self, options: StepOptions) -> Result<()> {
        self.make_strips(options.measures)?;
        let sums_up = options.measures || options.records;
        self.launch(&self.for_stages(abi::SRKL_UPDATE), sums_up)
    }

    /// Sends settings ahead of the next step, so that a replay of a captured one finds them.
    ///
    /// # Errors
    ///
    /// In a capture, where a replay would set them back each time.
    pub fn set(&mut self, groups: &[Group], scalars: StepScalars) -> Result<()> {
        let settings = Settings::new(groups, scalars);
        if settings != self.settings && self.is_capturing()? {
            bail!("{SETTINGS_IN_CAPTURE}")
        }
        self.send(settings)
    }

    /// What the device has counted. Waits for it, as all that reads from it.
    pub fn counters(&self) -> Result<Counters> {
        let state = self.state()?;
        Ok(Counters {
            steps: state.steps,
            skipped_steps: state.skipped_steps,
            grad_norm: (state.has_norm != 0).then_some(state.grad_norm),
        })
    }

    /// For each block what the last step did, and how often it was skipped.
    pub fn outcomes(&self) -> Result<Vec<(Option<Last>, u64)>> {
        let state = self.state()?;
        let decisions = self.device.clone_dtoh(&self.memory.decisions)?;
        let skipped = self.device.clone_dtoh(&self.memory.skipped)?;
        let norms = match state.recorded != 0 {
            true => {
                let c = 1. / state.grad_scale;
                let statistics = self.device.clone_dtoh(&self.memory.statistics)?;
                let steps = self.step_sums()?.into_iter().map(|(_, sums)| sums.step.sqrt());
                let all = statistics.into_iter().zip(steps);
                all.map(|(s, step)| Some([sums(s.sums).norm(c), step])).collect()
            }
            false => vec![None; decisions.len()],
        };
        let last = |(d, norms): (abi::SrklDecision, _)| {
            let moved = d.step != 0 && state.skipped == 0;
            moved.then_some(Last { curvature: d.curvature, phi: d.phi, norms })
        };
        Ok(decisions.into_iter().zip(norms).map(last).zip(skipped).collect())
    }

    fn state(&self) -> Result<abi::SrklState> {
        if self.is_capturing()? {
            bail!(
                "counters and telemetry can't be read while the device's stream is being captured"
            )
        }
        Ok(self.device.clone_dtoh(&self.memory.state)?[0])
    }

    /// The products of decays of each block.
    pub fn powers(&self) -> Result<Vec<Powers>> {
        let powers = self.device.clone_dtoh(&self.memory.powers)?;
        let each =
            |p: abi::SrklPowers| Powers { first: p.first, second: p.second, average: p.average };
        Ok(powers.into_iter().map(each).collect())
    }

    /// What is known of the curvature of each block.
    pub fn estimates(&self) -> Result<Vec<Estimate>> {
        let estimates = self.device.clone_dtoh(&self.memory.estimates)?;
        let each = |e: abi::SrklEstimate| Estimate {
            mean: e.mean,
            own: e.own,
            power: e.power,
            variance: e.variance,
            entered: e.entered,
            curvature: e.curvature,
            last: e.last,
            lowest: e.lowest,
            highest: e.highest,
            in_average: e.in_average,
            infinite: e.infinite != 0,
            still: e.still,
            measured_at: e.measured_at,
            counts: Counts {
                taken: e.taken,
                nonfinite: e.nonfinite,
                unmoved: e.unmoved,
                uninformative: e.uninformative,
                missing: e.missing,
            },
        };
        Ok(estimates.into_iter().map(each).collect())
    }

    /// Sets the counters and estimates, as a checkpoint has them (the latter in `blocks`), and forgets the last
    /// step.
    pub fn set_counters(&mut self, steps: u64, skipped_steps: u64, blocks: &[Block]) -> Result<()> {
        let state = abi::SrklState { steps, skipped_steps, ..Default::default() };
        let none = vec![abi::SrklDecision::default(); self.places.len()];
        let skipped: Vec<u64> = blocks.iter().map(|block| block.skipped).collect();
        self.pending.clear();
        self.send_known(blocks)?;
        self.upload(&none, |memory| &mut memory.decisions)?;
        self.upload(&skipped, |memory| &mut memory.skipped)?;
        self.upload(&[state], |memory| &mut memory.state)
    }

    /// Whether it decides, because it has all blocks of the optimizer.
    pub fn decides(&self) -> bool {
        self.decides
    }

    /// Drops what waits for a measurement, or for being put back.
    pub fn forget(&mut self) {
        self.pending.clear();
        self.restores = None;
    }

    // -- What a step is made of --

    fn refuse_capture(&self, what: &str) -> Result<()> {
        if self.is_capturing()? {
            bail!("{what} can't be part of a capture: a replay would not know of it")
        }
        Ok(())
    }

    /// # Errors
    ///
    /// A variable whose memory is not where `new` found it.
    fn check_addresses(&self, blocks: &[Block]) -> Result<()> {
        self.places.iter().zip(&self.blocks).try_for_each(|(&place, entry)| {
            let block = &blocks[place];
            let (storage, layout) = block.var.storage_and_layout();
            if address_of(&storage, layout, &self.stream)? != entry.w {
                bail!(
                    "`{}`: its memory is not where it was when the optimizer was built: something has \
                     replaced it instead of writing to it; build a new optimizer",
                    block.name
                )
            }
            Ok(())
        })
    }

    /// Finds and checks the gradient of every block. The tensors that come along are what is read: the
    /// gradients, or contiguous copies of them.
    fn find(&self, inputs: &Inputs) -> Result<(Vec<abi::SrklGradient>, Vec<Tensor>)> {
        let mut alive = Vec::with_capacity(self.places.len());
        let mut gradients = Vec::with_capacity(self.places.len());
        self.check_addresses(inputs.blocks)?;
        for &place in &self.places {
            let block = &inputs.blocks[place];
            let frozen = inputs.groups[block.group].params.lr == 0.;
            let Some(gradient) = inputs.grads.get_id(block.id).filter(|_| !frozen) else {
                gradients.push(NO_GRADIENT);
                continue;
            };
            block.check_gradient(gradient)?;
            block
                .check_alias(storage_address(&gradient.storage_and_layout().0), inputs.storages)?;
            // Without its graph, which may live no longer than the step's caller wants.
            let gradient = gradient.detach().contiguous()?;
            let (storage, layout) = gradient.storage_and_layout();
            let address = address_of(&storage, layout, &self.stream)?;
            drop(storage);
            let address = if block.n == 0 { 0 } else { address };
            gradients.push(abi::SrklGradient { address, dtype: dtype(gradient.dtype())? as u64 });
            alive.push(gradient);
        }
        Ok((gradients, alive))
    }

    fn send_gradients(&mut self, gradients: Vec<abi::SrklGradient>) -> Result<()> {
        if gradients != self.gradients {
            self.upload(&gradients, |memory| &mut memory.gradients)?;
            self.gradients = gradients;
        }
        if self.captures.spare.is_none() {
            self.captures.spare = Some(Pinned::new(&self.stream, self.places.len())?);
        }
        Ok(())
    }

    /// Sends second gradients.
    fn send_again(&mut self, inputs: &Inputs) -> Result<Vec<Tensor>> {
        let (again, alive) = self.find(inputs)?;
        self.send(Settings::new(inputs.groups, inputs.scalars))?;
        self.upload(&again, |memory| &mut memory.again)?;
        Ok(alive)
    }

    /// Records a copy of `gradients`, and returns the address that they are copied to.
    fn send_captured(&mut self, gradients: &[abi::SrklGradient]) -> Result<u64> {
        let Some(pinned) = self.captures.spare.take() else {
            bail!(
                "two steps of one optimizer captured without one outside of a capture between them"
            )
        };
        let (to, _guard) = self.captures.gradients.device_ptr_mut(&self.stream);
        // SAFETY:
        // 1. `address` points to as many entries as there are blocks, as `gradients` has;
        // 2. nobody else reads or writes them now: the memory was in `spare`, which no copy has read from;
        // 3. it is initialised before it is read;
        // 4. the recorded copy, of the same length, may read it at any later time, and it stays as it is
        //    in `recorded` until this is dropped.
        unsafe {
            pinned.address.copy_from_nonoverlapping(gradients.as_ptr(), gradients.len());
            let source = std::slice::from_raw_parts(pinned.address, gradients.len());
            result::memcpy_htod_async(to, source, self.stream.cu_stream()).w()?;
        }
        self.captures.recorded.push(pinned);
        Ok(to)
    }

    /// Sends what differs from the settings that the device has.
    fn send(&mut self, settings: Settings) -> Result<()> {
        if settings.groups != self.settings.groups {
            self.upload(&settings.groups, |memory| &mut memory.groups)?;
            self.settings.groups = settings.groups;
        }
        if settings.scalars != self.settings.scalars {
            let config =
                LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
            let mut launch = self.stream.launch_builder(&self.set);
            launch.arg(&self.table).arg(&settings.scalars);
            // SAFETY: its two arguments are the table and the scalars by value, and it writes to the place
            // for scalars, which `memory` keeps, in the order of the stream.
            unsafe { launch.launch(config) }.w()?;
            self.settings.scalars = settings.scalars;
        }
        Ok(())
    }

    /// By cudarc alone: candle's own copy keeps what it has copied while its cache for graphs is on.
    fn upload<T: DeviceRepr>(
        &mut self,
        values: &[T],
        to: impl FnOnce(&mut Memory) -> &mut CudaSlice<T>,
    ) -> Result<()> {
        self.stream.memcpy_htod(values, to(&mut self.memory)).w()
    }

    /// Room for the sums of strips, if a step measures.
    fn make_strips(&mut self, measures: bool) -> Result<()> {
        if measures && self.memory.strips.is_none() {
            let count = self.table.chunk_count as usize * (CHUNK / STRIP);
            let strips = self.device.alloc_zeros(count.max(1))?;
            self.table.strips = strips.device_ptr(&self.stream).0;
            self.memory.strips = Some(strips);
        }
        Ok(())
    }

    fn for_stages(&self, stages: u32) -> abi::SrklTable {
        abi::SrklTable { stages: stages as u64, ..self.table }
    }

    /// If it `sums_up`, the update leaves how blocks move in `step_sums`.
    fn launch(&self, table: &abi::SrklTable, sums_up: bool) -> Result<()> {
        let whole = self.settings.scalars.whole != 0;
        let config = self.grid(if whole { CTAS_PER_SM } else { CTAS_PER_SM_IN_L2 });
        let own =
            |group: &abi::SrklGroup| matches!(group.scope, abi::SRKL_ELEMENT | abi::SRKL_MIXED);
        let elements = self.settings.groups.iter().any(own);
        let step = match (sums_up, elements) {
            (true, _) => &self.step_measuring,
            (false, true) => &self.step_elements,
            (false, false) => &self.step,
        };
        // SAFETY: the contract at the top of kernels/srkl.cu:
        // 1. grid and block are as it says, and the only argument is the table by value;
        // 2. `new` has allocated what the table points to, in the sizes that abi.h gives, with zeros where
        //    the contract asks for them, and `memory` keeps it;
        // 3. the addresses in `gradients` are of contiguous tensors on this device of the parameter's size
        //    (`find`), which its callers keep, and none is of a parameter (`check_alias`);
        // 4. those in `blocks` are what candle has for the variables, as `check_addresses` has just seen, and
        //    of the masters that `Block` keeps; both are memory of their own, which CUDA aligns to 256
        //    bytes, at offset 0 (`Block::new`);
        // 5. all launches go to the stream that candle's own work on these tensors goes to, and one follows
        //    the other there, as long as one thread steps: `Srkl` says so.
        unsafe { self.stream.launch_builder(step).arg(table).launch(config) }.w()?;
        Ok(())
    }

    /// `gradients` is where the first gradients are.
    fn launch_sums(&self, gradients: u64, what: u32, delta: f64) -> Result<()> {
        let stages = if self.decides { abi::SRKL_DECIDE } else { 0 };
        let table = abi::SrklTable { gradients, ..self.for_stages(stages) };
        self.launch_sums_of(&table, what, delta)
    }

    fn launch_sums_of(&self, table: &abi::SrklTable, what: u32, delta: f64) -> Result<()> {
        let mut launch = self.stream.launch_builder(&self.sums);
        launch.arg(table).arg(&what).arg(&delta);
        // SAFETY: the contract at the top of kernels/curvature.cuh, of which `launch` says what concerns the
        // table. Those who call this launch what must come before it, with the gradients alive and in the
        // table.
        unsafe { launch.launch(self.grid(CTAS_PER_SM)) }.w()?;
        Ok(())
    }

    fn launch_replace(&mut self, what: u32, seed: u64, draw: u64) -> Result<()> {
        let mut launch = self.stream.launch_builder(&self.replace);
        launch.arg(&self.table).arg(&what).arg(&seed).arg(&draw);
        // SAFETY: the contract at the top of kernels/replace.cuh, of which `launch` says what concerns the
        // table. Its callers come from settings that have asked for `old` in `new`.
        unsafe { launch.launch(self.grid(CTAS_PER_SM)) }.w()?;
        self.restores = match what {
            abi::SRKL_PERTURB => Some(abi::SRKL_RESTORE_PERTURBED),
            abi::SRKL_SWAP => Some(abi::SRKL_RESTORE_SWAPPED),
            _ => None,
        };
        Ok(())
    }

    fn grid(&self, blocks_per_sm: u32) -> LaunchConfig {
        let most = self.multiprocessors * blocks_per_sm;
        LaunchConfig {
            grid_dim: (self.table.chunk_count.clamp(1, most as u64) as u32, 1, 1),
            block_dim: (abi::SRKL_THREADS, 1, 1),
            shared_mem_bytes: 0,
        }
    }

    fn is_capturing(&self) -> Result<bool> {
        is_capturing(&self.stream)
    }
}

pub(super) fn is_capturing(stream: &CudaStream) -> Result<bool> {
    let status = stream.capture_status().w()?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if !self.captures.recorded.is_empty() {
            // A replay may still be reading them. If this fails the device has failed.
            let _ = self.stream.synchronize();
        }
    }
}

impl Memory {
    fn table(&self, stream: &CudaStream, live_count: usize) -> abi::SrklTable {
        abi::SrklTable {
            blocks: self.blocks.device_ptr(stream).0,
            gradients: self.gradients.device_ptr(stream).0,
            groups: self.groups.device_ptr(stream).0,
            scalars: self.scalars.device_ptr(stream).0,
            chunks: self.chunks.device_ptr(stream).0,
            chunk_sums: self.chunk_sums.device_ptr(stream).0,
            chunks_done: self.chunks_done.device_ptr(stream).0,
            ready: self.ready.device_ptr(stream).0,
            statistics: self.statistics.device_ptr(stream).0,
            decisions: self.decisions.device_ptr(stream).0,
            powers: self.powers.device_ptr(stream).0,
            estimates: self.estimates.device_ptr(stream).0,
            again: self.again.device_ptr(stream).0,
            chunk_pairs: self.chunk_pairs.device_ptr(stream).0,
            pairs: self.pairs.device_ptr(stream).0,
            step_sums: self.step_sums.device_ptr(stream).0,
            strips: 0,
            told: self.told.device_ptr(stream).0,
            skipped: self.skipped.device_ptr(stream).0,
            state: self.state.device_ptr(stream).0,
            block_count: self.blocks.len() as u64,
            live_count: live_count as u64,
            chunk_count: self.chunks.len() as u64,
            stages: 0,
        }
    }
}

impl Pinned {
    fn new(stream: &CudaStream, len: usize) -> Result<Self> {
        // SAFETY: `Cuda::send_captured` writes all of it before it is read.
        let mut memory = unsafe { stream.context().alloc_pinned(len) }.w()?;
        Ok(Self { address: memory.as_mut_ptr().w()?, _memory: memory })
    }
}

impl Settings {
    fn new(groups: &[Group], scalars: StepScalars) -> Self {
        let any = |holds: fn(&ParamsSrkl) -> bool| groups.iter().any(|group| holds(&group.params));
        let (norm, total, whole) = (
            any(ParamsSrkl::uses_norm),
            any(ParamsSrkl::uses_total),
            any(ParamsSrkl::waits_for_all),
        );
        let scalars = abi::SrklScalars {
            schedule: scalars.schedule,
            grad_scale: scalars.grad_scale,
            norm: norm as u32,
            total: total as u32,
            whole: whole as u32,
            pad: 0,
        };
        Self { groups: groups.iter().map(group).collect(), scalars }
    }
}

fn group(group: &Group) -> abi::SrklGroup {
    let ParamsSrkl { lr, weight_decay, max_grad_norm, nonfinite, .. } = group.params;
    let (scope, shared) = match group.params.scope {
        Scope::Tensor => (abi::SRKL_TENSOR, 0),
        Scope::Global => (abi::SRKL_GLOBAL, 0),
        Scope::Element => (abi::SRKL_ELEMENT, 0),
        Scope::Mixed(p) => (abi::SRKL_MIXED, (8. * p) as u32),
    };
    let (direction, decay1, decay2, eps) = match group.params.direction {
        Direction::Gradient => (abi::SRKL_GRADIENT, 1., 1., 0.),
        Direction::Momentum { mu } => (abi::SRKL_MOMENTUM, mu, 1., 0.),
        Direction::Adam { beta1, beta2, eps } => (abi::SRKL_ADAM, beta1, beta2, eps),
    };
    let (curvature, every, decay, noise) = match group.params.curvature {
        Curvature::GradSquare => (abi::SRKL_GRAD_SQUARE, 1, 0., 0.),
        Curvature::Step { every, decay, noise, .. } => (abi::SRKL_STEP, every, decay, noise),
        Curvature::Hutchinson { every, decay, .. } => (abi::SRKL_HUTCHINSON, every, decay, 0.),
    };
    abi::SrklGroup {
        lr,
        beta: group.params.beta_value(),
        weight_decay,
        max_grad_norm: max_grad_norm.unwrap_or(0.),
        trust: group.params.trust.unwrap_or(0.),
        average: group.params.average.unwrap_or(1.),
        decay1,
        decay2,
        eps,
        decay,
        every: every as f64,
        noise,
        scope,
        shared,
        direction,
        curvature,
        nonfinite: match nonfinite {
            NonFinite::SkipStep => abi::SRKL_SKIP_STEP,
            NonFinite::SkipBlock => abi::SRKL_SKIP_BLOCK,
            NonFinite::Propagate => abi::SRKL_PROPAGATE,
        },
        pad: 0,
    }
}

fn powers(powers: &Powers) -> abi::SrklPowers {
    let Powers { first, second, average } = *powers;
    abi::SrklPowers { first, second, average }
}

fn estimate(estimate: &Estimate) -> abi::SrklEstimate {
    let Counts { taken, nonfinite, unmoved, uninformative, missing } = estimate.counts;
    abi::SrklEstimate {
        mean: estimate.mean,
        own: estimate.own,
        power: estimate.power,
        variance: estimate.variance,
        entered: estimate.entered,
        curvature: estimate.curvature,
        last: estimate.last,
        lowest: estimate.lowest,
        highest: estimate.highest,
        in_average: estimate.in_average,
        infinite: estimate.infinite as u64,
        still: estimate.still,
        measured_at: estimate.measured_at,
        taken,
        nonfinite,
        unmoved,
        uninformative,
        missing,
    }
}

fn sums(s: abi::SrklSums) -> Sums {
    Sums { sum2: s.sum2, sum4: s.sum4, exponent: s.exponent as i32 }
}

fn dtype(dtype: DType) -> Result<u32> {
    Ok(match dtype {
        DType::F32 => abi::SRKL_F32,
        DType::F64 => abi::SRKL_F64,
        DType::BF16 => abi::SRKL_BF16,
        DType::F16 => abi::SRKL_F16,
        dtype => bail!("expected f32, f64, bf16 or f16, got {dtype:?}"),
    })
}

/// The device address of a tensor's first element.
fn address_of(storage: &Storage, layout: &Layout, stream: &CudaStream) -> Result<u64> {
    let Storage::Cuda(storage) = storage else { bail!("expected a tensor on a CUDA device") };
    let (address, size) = match &storage.slice {
        CudaStorageSlice::F32(slice) => (slice.device_ptr(stream).0, 4),
        CudaStorageSlice::F64(slice) => (slice.device_ptr(stream).0, 8),
        CudaStorageSlice::BF16(slice) => (slice.device_ptr(stream).0, 2),
        CudaStorageSlice::F16(slice) => (slice.device_ptr(stream).0, 2),
        _ => bail!("expected f32, f64, bf16 or f16"),
    };
    Ok(address + (layout.start_offset() * size) as u64)
}

/// The values of a variable of 16 bits, as f32 on its device.
pub(crate) fn new_master(var: &Var) -> Result<CudaSlice<f32>> {
    let values = var.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    upload_master(var, &values)
}

pub(crate) fn upload_master(var: &Var, values: &[f32]) -> Result<CudaSlice<f32>> {
    var.device().as_cuda_device()?.clone_htod(if values.is_empty() { &[0.][..] } else { values })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::backprop::GradStore;
    use candle_core::{Device, Var};
    use candle_nn::Optimizer;

    use crate::{MasterWeights, ParamsSrkl, Srkl};

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
                    let mut opt = Srkl::new(vec![var.clone()], params)?;
                    let mut grads = GradStore::default();
                    grads.insert(&var, g);
                    opt.step(&grads)?;
                    opt.cuda[0].shift(start)?;
                    let inputs = Inputs {
                        blocks: &opt.blocks,
                        storages: &[],
                        groups: &opt.groups,
                        grads: &grads,
                        scalars: StepScalars { schedule: 1., grad_scale: 1. },
                    };
                    opt.cuda[0].launch_shifted(&inputs, start)?;
                    var.to_dtype(DType::F32)?.to_vec1()
                };
                assert_eq!(step(0)?, step(start)?, "{dtype:?} {start}");
            }
        }
        Ok(())
    }

    impl Cuda {
        /// Moves the only block's beginning `by` elements back, and its only chunk as many ahead.
        fn shift(&mut self, by: u64) -> Result<()> {
            let block = &self.blocks[0];
            let size = if block.dtype == abi::SRKL_F32 { 4 } else { 2 };
            let w = block.w.wrapping_sub(size * by);
            let moved = abi::SrklBlock { w, n: block.n + by, ..*block };
            self.device.memcpy_htod(&[moved], &mut self.memory.blocks)?;
            let chunk = abi::SrklChunk { start: by, block: 0 };
            self.device.memcpy_htod(&[chunk], &mut self.memory.chunks)
        }

        /// A step whose gradient is shifted likewise.
        fn launch_shifted(&mut self, inputs: &Inputs, by: u64) -> Result<()> {
            let (mut gradients, _alive) = self.find(inputs)?;
            let size = inputs.blocks[0].dtype.size_in_bytes() as u64;
            gradients[0].address = gradients[0].address.wrapping_sub(size * by);
            self.send(Settings::new(inputs.groups, inputs.scalars))?;
            self.send_gradients(gradients)?;
            let all = abi::SRKL_STATISTICS | abi::SRKL_DECIDE | abi::SRKL_UPDATE;
            self.launch(&self.for_stages(all | abi::SRKL_COUNT), false)
        }
    }
}
