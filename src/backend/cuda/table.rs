//! The kernels' view of an optimizer: the table, the memory that it points to, and conversions between our structs
//! and those of `abi.rs`.

use std::sync::Arc;

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{CudaDevice, DType, Device, Error, Result, Storage, Tensor, bail};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits};

use super::super::{Last, Tracked};
use super::abi;
use crate::block::{Block, Parameters};
use crate::compact;
use crate::estimate::{Counts, Estimate, Left, Probe, StepSums};
use crate::numerics::{CHUNK, LANES, Pair, STRIP, Sums};
use crate::params::{Average, Curvature, Direction, Group, NonFinite, ParamsSrkl, Rounding, Scope};
use crate::rule::{Corrections, Decision, Powers, StepScalars};
use crate::state::{Format, MASTER_SAMPLES, Slot, State};

// The kernels' copies of our constants.
const _: () = assert!(abi::SRKL_CHUNK as usize == CHUNK);
const _: () = assert!(abi::SRKL_LANES as usize == LANES);
const _: () = assert!(abi::SRKL_STRIP as usize == STRIP);
const _: () = assert!(abi::SRKL_MASTER_SAMPLES as usize == MASTER_SAMPLES);
const _: () = assert!(abi::SRKL_UNIT as usize == compact::UNIT);
const _: () = assert!(abi::SRKL_MOMENTS == compact::MOMENTS);
const _: () = assert!(abi::SRKL_PARAMETERS == compact::PARAMETERS);
const _: () = assert!(abi::SRKL_AVERAGES == compact::AVERAGES);

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
    abi::SrklMatrix,
    abi::SrklMatrices,
    abi::SrklTable
);

/// What is uploaded where there is no chunk.
const NO_CHUNK: abi::SrklChunk = abi::SrklChunk { start: 0, block: 0 };

pub(crate) const NO_GRADIENT: abi::SrklGradient = abi::SrklGradient { address: 0, dtype: 0 };

/// The address of a gradient of which nothing is stepped here: it is there, and never read.
pub(crate) const NOTHING_HERE: u64 = 16;

/// The settings of an optimizer, as its kernels read them.
#[derive(Clone, PartialEq)]
pub(crate) struct Settings {
    pub groups: Vec<abi::SrklGroup>,
    pub scalars: abi::SrklScalars,
}

/// The memory that the table points to.
pub(crate) struct Memory {
    pub blocks: CudaSlice<abi::SrklBlock>,
    pub gradients: CudaSlice<abi::SrklGradient>,
    pub groups: CudaSlice<abi::SrklGroup>,
    pub scalars: CudaSlice<abi::SrklScalars>,
    pub chunks: CudaSlice<abi::SrklChunk>,
    chunk_count: usize,
    pub chunk_sums: CudaSlice<abi::SrklSums>,
    pub chunks_done: CudaSlice<u32>,
    pub ready: CudaSlice<u32>,
    pub statistics: CudaSlice<abi::SrklStatistics>,
    pub decisions: CudaSlice<abi::SrklDecision>,
    pub powers: CudaSlice<abi::SrklPowers>,
    pub estimates: CudaSlice<abi::SrklEstimate>,
    pub again: CudaSlice<abi::SrklGradient>,
    pub chunk_pairs: CudaSlice<abi::SrklPair>,
    pub pairs: CudaSlice<abi::SrklPair>,
    pub step_sums: CudaSlice<abi::SrklStepSums>,
    /// Allocated for the first step that measures.
    pub strips: Option<CudaSlice<f64>>,
    pub remaining: CudaSlice<u32>,
    /// Backups of all parameters, if settings ask for them.
    pub _backup: Option<CudaSlice<u8>>,
    pub skipped: CudaSlice<u64>,
    pub state: CudaSlice<abi::SrklState>,
}

/// The blocks of one device, as entries of the table.
pub(crate) struct Packed {
    pub blocks: Vec<abi::SrklBlock>,
    pub chunks: Vec<abi::SrklChunk>,
    /// Their indices in the optimizer's list.
    pub places: Vec<usize>,
    /// Backups of all parameters, if settings ask for them.
    backup: Option<CudaSlice<u8>>,
}

impl Packed {
    /// `l2` is the size of the device's L2 cache, in bytes.
    pub fn new(
        device: &CudaDevice,
        stream: &Arc<CudaStream>,
        all: &Parameters,
        l2: usize,
    ) -> Result<Self> {
        let (mut places, mut blocks, mut chunks) = (vec![], vec![], vec![]);
        let mut backup_size = 0;
        for (place, block) in all.blocks.iter().enumerate().filter(|(_, b)| b.is_on(device)) {
            let chunk_count = block.n.div_ceil(CHUNK) as u64;
            // The size of a gradient of the same dtype. L2 must hold it beside the parameter and what comes next.
            let bytes = block.n * block.dtype.size_in_bytes();
            let address = |slot: &Option<Slot>| match slot {
                Some(slot) => address_of(slot.storage(), 0, stream),
                None => Ok(0),
            };
            let orthogonal = match &block.orthogonal {
                Some(room) => numbers(room, stream)?,
                None => NO_GRADIENT,
            };
            let state = &block.state;
            let backup = backup_size as u64;
            backup_size += bytes.next_multiple_of(256);
            blocks.push(abi::SrklBlock {
                w: parameter_address(block, stream)?,
                master: address(&state.master)?,
                m: address(&state.m)?,
                v: address(&state.v)?,
                v_max: address(&state.v_max)?,
                average: address(&state.average)?,
                q: address(&state.q)?,
                backup,
                n: block.n as u64,
                first: block.first as u64,
                whole: block.whole as u64,
                first_chunk: chunks.len() as u64,
                chunk_count,
                all_first: 0,
                all_count: 0,
                orthogonal,
                matrix_scale: block.matrix_scale(),
                dtype: dtype(block.dtype)?,
                group: block.group as u32,
                from_end: (bytes > l2 / 4) as u32,
                place: place as u32,
                packs: packs(state),
                pad: 0,
            });
            let start = |chunk| chunk * CHUNK as u64;
            let number = places.len() as u64;
            chunks.extend(
                (0..chunk_count).map(|chunk| abi::SrklChunk { start: start(chunk), block: number }),
            );
            places.push(place);
        }
        let keeps = all.any(ParamsSrkl::keeps_parameters);
        let backup: Option<CudaSlice<u8>> =
            keeps.then(|| device.alloc_zeros(backup_size.max(1))).transpose()?;
        for block in &mut blocks {
            block.backup =
                backup.as_ref().map_or(0, |backup| backup.device_ptr(stream).0 + block.backup);
        }
        Ok(Self { blocks, chunks, places, backup })
    }
}

impl Memory {
    pub fn new(device: &CudaDevice, packed: Packed, settings: &Settings) -> Result<Self> {
        let Packed { blocks, chunks, backup, .. } = packed;
        let (count, chunk_count) = (blocks.len(), chunks.len());
        Ok(Self {
            blocks: device.clone_htod(&blocks)?,
            gradients: device.clone_htod(&vec![NO_GRADIENT; count])?,
            groups: device.clone_htod(&settings.groups)?,
            scalars: device.clone_htod(&[settings.scalars])?,
            // There is something to allocate where no chunk is stepped.
            chunk_sums: device.alloc_zeros(chunks.len().max(1))?,
            chunk_count,
            chunks: device.clone_htod(if chunks.is_empty() { &[NO_CHUNK][..] } else { &chunks })?,
            chunks_done: device.alloc_zeros(count)?,
            ready: device.alloc_zeros(count)?,
            statistics: device.alloc_zeros(count)?,
            decisions: device.alloc_zeros(count)?,
            powers: device.clone_htod(&vec![powers(&Powers::NONE); count])?,
            estimates: device.clone_htod(&vec![estimate(&Estimate::NONE); count])?,
            again: device.clone_htod(&vec![NO_GRADIENT; count])?,
            chunk_pairs: device.alloc_zeros(chunk_count.max(1))?,
            pairs: device.alloc_zeros(count)?,
            step_sums: device.alloc_zeros(count)?,
            strips: None,
            remaining: device.alloc_zeros(count)?,
            _backup: backup,
            skipped: device.alloc_zeros(count)?,
            state: device.alloc_zeros(1)?,
        })
    }

    pub fn table(&self, stream: &CudaStream, live_count: usize) -> abi::SrklTable {
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
            remaining: self.remaining.device_ptr(stream).0,
            skipped: self.skipped.device_ptr(stream).0,
            state: self.state.device_ptr(stream).0,
            block_count: self.blocks.len() as u64,
            live_count: live_count as u64,
            chunk_count: self.chunk_count as u64,
            stages: 0,
            steps: 0,
            all_sums: 0,
            all_pairs: 0,
            all_statistics: 0,
            order: 0,
            world_size: 0,
        }
    }
}

/// What ranks with sharded state exchange: the sums and statistics of all of them, each rank's one after the other. They are
/// tensors of f64, which the transport moves.
pub(crate) struct Shared {
    pub sums: Tensor,
    pub pairs: Tensor,
    pub statistics: Tensor,
    /// How many chunks each rank has.
    pub chunks: Vec<usize>,
    rank: usize,
    _order: CudaSlice<u64>,
}

impl Shared {
    /// Makes room, and has the kernels write to this rank's part of it.
    pub fn new(
        device: &CudaDevice,
        stream: &CudaStream,
        all: &Parameters,
        rank: usize,
        (blocks, places): (&mut [abi::SrklBlock], &[usize]),
        table: &mut abi::SrklTable,
    ) -> Result<Self> {
        let world_size = all.blocks.first().map_or(0, |block| block.shards.len());
        let of = |block: &Block, rank: usize| block.shards[rank].len().div_ceil(CHUNK);
        let of_rank = |rank| places.iter().map(|place| of(&all.blocks[*place], rank)).sum();
        let chunks: Vec<usize> = (0..world_size).map(of_rank).collect();
        let mut next: Vec<u64> =
            (0..world_size).map(|rank| chunks[..rank].iter().sum::<usize>() as u64).collect();
        let before = next.get(rank).copied().unwrap_or(0);
        let mut order = vec![];
        for (entry, place) in blocks.iter_mut().zip(places) {
            entry.all_first = order.len() as u64;
            for (rank, next) in next.iter_mut().enumerate() {
                let count = of(&all.blocks[*place], rank) as u64;
                order.extend(*next..*next + count);
                *next += count;
            }
            entry.all_count = order.len() as u64 - entry.all_first;
        }
        let total = chunks.iter().sum::<usize>();
        let numbers_of =
            |count: usize| Tensor::zeros(count.max(1), DType::F64, &Device::Cuda(device.clone()));
        let address = |tensor: &Tensor| Ok::<_, Error>(numbers(tensor, stream)?.address);
        let statistics = world_size * blocks.len();
        let shared = Self {
            sums: numbers_of(total * SUMS)?,
            pairs: numbers_of(total * PAIR)?,
            statistics: numbers_of(statistics * STATISTICS)?,
            chunks,
            rank,
            _order: device.clone_htod(if order.is_empty() { &[0][..] } else { &order })?,
        };
        table.all_sums = address(&shared.sums)?;
        table.all_pairs = address(&shared.pairs)?;
        table.all_statistics = address(&shared.statistics)?;
        table.order = shared._order.device_ptr(stream).0;
        table.world_size = world_size as u64;
        let own = |all: u64, before: u64, numbers: usize| all + before * 8 * numbers as u64;
        table.chunk_sums = own(table.all_sums, before, SUMS);
        table.chunk_pairs = own(table.all_pairs, before, PAIR);
        let before = (rank * blocks.len()) as u64;
        table.statistics = own(table.all_statistics, before, STATISTICS);
        Ok(shared)
    }

    /// The sums of this rank's statistics, which are those of all ranks when it has decided, of `count` blocks.
    pub fn read_statistics(&self, count: usize) -> Result<Vec<Sums>> {
        let own = self.statistics.narrow(0, self.rank * count * STATISTICS, count * STATISTICS)?;
        let numbers: Vec<f64> = own.to_vec1()?;
        let sums = |[sum2, sum4, exponent, _]: &[f64; STATISTICS]| Sums {
            sum2: *sum2,
            sum4: *sum4,
            exponent: exponent.to_bits() as i32,
        };
        Ok(numbers.as_chunks().0.iter().map(sums).collect())
    }
}

/// The numbers of 8 bytes in what is shared.
pub(crate) const SUMS: usize = size_of::<abi::SrklSums>() / 8;
pub(crate) const PAIR: usize = size_of::<abi::SrklPair>() / 8;
pub(crate) const STATISTICS: usize = size_of::<abi::SrklStatistics>() / 8;

impl Settings {
    pub fn new(groups: &[Group], scalars: StepScalars) -> Self {
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
            after_all: whole as u32,
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
    // The decay of the first moment, the weight of a gradient in it, and the decay that its bias correction goes by.
    let (direction, [decay1, gain1, power1], decay2, eps) = match group.params.direction {
        Direction::Gradient => (abi::SRKL_GRADIENT, [0., 1., 1.], 1., 0.),
        Direction::Sgd { momentum, nesterov: false } => {
            (abi::SRKL_MOMENTUM, [momentum, 1., 1.], 1., 0.)
        }
        Direction::Sgd { momentum, nesterov: true } => {
            (abi::SRKL_NESTEROV, [momentum, 1., 1.], 1., 0.)
        }
        Direction::Momentum { mu } => (abi::SRKL_MOMENTUM, [mu, 1. - mu, mu], 1., 0.),
        Direction::Muon { mu, .. } => (abi::SRKL_MUON, [mu, 1. - mu, mu], 1., 0.),
        Direction::Adam { beta1, beta2, eps } => {
            (abi::SRKL_ADAM, [beta1, 1. - beta1, beta1], beta2, eps)
        }
        Direction::NesterovAdam { beta1, beta2, eps } => {
            (abi::SRKL_NESTEROV_ADAM, [beta1, 1. - beta1, beta1], beta2, eps)
        }
        Direction::AmsGrad { beta1, beta2, eps } => {
            (abi::SRKL_AMSGRAD, [beta1, 1. - beta1, beta1], beta2, eps)
        }
        Direction::Lion { beta2, .. } => (abi::SRKL_LION, [beta2, 1. - beta2, 1.], 1., 0.),
    };
    let (ahead_decay, ahead_gain) = match group.params.direction {
        Direction::Lion { beta1, .. } => (beta1, 1. - beta1),
        _ => (decay1, gain1),
    };
    let (curvature, decay, noise) = match group.params.curvature {
        Curvature::None => (abi::SRKL_NO_CURVATURE, 0., 0.),
        Curvature::GradSquare => (abi::SRKL_GRAD_SQUARE, 0., 0.),
        Curvature::Step(step) => (abi::SRKL_STEP, step.decay, step.noise),
        Curvature::Hutchinson(rows) => (abi::SRKL_HUTCHINSON, rows.decay, 0.),
    };
    abi::SrklGroup {
        lr,
        beta: group.params.beta_value(),
        weight_decay,
        max_grad_norm: max_grad_norm.unwrap_or(0.),
        trust: group.params.trust.unwrap_or(0.),
        average: match group.params.average {
            Some(Average::Exponential(c)) => c,
            _ => 1.,
        },
        polynomial: match group.params.average {
            Some(Average::Polynomial(k)) => k,
            _ => -1.,
        },
        decay1,
        gain1,
        power1,
        ahead_decay,
        ahead_gain,
        decay2,
        eps,
        decay,
        every: group.params.measure.every as f64,
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
        ahead: matches!(
            group.params.direction,
            Direction::Muon { nesterov: true, .. } | Direction::NesterovAdam { .. }
        ) as u32,
        stochastic: (group.params.rounding == Rounding::Stochastic) as u32,
        cautious: group.params.cautious as u32,
    }
}

pub(crate) fn powers(powers: &Powers) -> abi::SrklPowers {
    let Powers { first, second, average } = *powers;
    abi::SrklPowers { first, second, average }
}

pub(crate) fn estimate(estimate: &Estimate) -> abi::SrklEstimate {
    let Counts { taken, nonfinite, unmoved, uninformative, missing } = estimate.counts;
    abi::SrklEstimate {
        mean: estimate.mean,
        row_sum_sq: estimate.row_sum_sq,
        power: estimate.power,
        variance: estimate.variance,
        entered: estimate.entered,
        curvature: estimate.curvature,
        reach: estimate.reach,
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

pub(crate) fn read_powers(p: abi::SrklPowers) -> Powers {
    Powers { first: p.first, second: p.second, average: p.average }
}

pub(crate) fn read_step_sums(s: abi::SrklStepSums) -> StepSums {
    StepSums { step: s.step, direction: s.direction, along: s.along }
}

pub(crate) fn read_pair(pair: abi::SrklPair) -> Pair {
    Pair { a: pair.a, b: pair.b }
}

/// What a measurement did to a block's estimate (`None` if it left the block out), and whether there is an estimate.
pub(crate) fn read_remaining(remaining: u32) -> (Option<Left>, bool) {
    let is = |bit| (remaining & bit != 0).then_some(());
    let lost = is(abi::SRKL_LOST).map(|()| Left::Lost);
    let unchanged = is(abi::SRKL_UNCHANGED).map(|()| Left::Unchanged);
    let known = is(abi::SRKL_KNOWN).map(|()| Left::Known);
    (lost.or(unchanged).or(known), known.is_some())
}

/// What the last step did to a block, if it moved it; the norms are those that were recorded.
pub(crate) fn read_decision(
    d: abi::SrklDecision,
    skipped: bool,
    norms: Option<[f64; 2]>,
) -> Option<Last> {
    let moved = d.moves != 0 && !skipped;
    let curvature = (d.curvature != UNKNOWN).then_some(d.curvature);
    moved.then_some(Last { curvature, phi: d.phi, norms })
}

/// The curvature of a block that has not been measured, as kernels/rule.cuh has it.
const UNKNOWN: f64 = abi::SRKL_UNKNOWN as f64;

/// A decision of the host, with the bias corrections that the update needs.
pub(crate) fn decision(
    decision: &Decision,
    params: &ParamsSrkl,
    tracked: &Tracked,
) -> abi::SrklDecision {
    let Decision { grad_factor, curvature, has_curvature, phi, .. } = *decision;
    let corrections = Corrections::new(params, &tracked.powers);
    abi::SrklDecision {
        grad_factor,
        curvature: if has_curvature { curvature } else { UNKNOWN },
        phi,
        scale_m: corrections.scale_m,
        scale_v: corrections.scale_v,
        ahead: corrections.ahead,
        average: corrections.average,
        powers: abi::SrklPowers::default(),
        moves: 1,
        small: 0,
    }
}

pub(crate) fn probe(probe: Probe) -> u32 {
    match probe {
        Probe::Finite => abi::SRKL_FINITE,
        Probe::Infinite => abi::SRKL_INFINITE,
        Probe::Nothing => abi::SRKL_NOTHING,
    }
}

pub(crate) fn read_estimate(e: abi::SrklEstimate) -> Estimate {
    Estimate {
        mean: e.mean,
        row_sum_sq: e.row_sum_sq,
        power: e.power,
        variance: e.variance,
        entered: e.entered,
        curvature: e.curvature,
        reach: e.reach,
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
    }
}

pub(crate) fn sums(s: abi::SrklSums) -> Sums {
    Sums { sum2: s.sum2, sum4: s.sum4, exponent: s.exponent as i32 }
}

pub(crate) fn dtype(dtype: DType) -> Result<u32> {
    Ok(match dtype {
        DType::F32 => abi::SRKL_F32,
        DType::F64 => abi::SRKL_F64,
        DType::BF16 => abi::SRKL_BF16,
        DType::F16 => abi::SRKL_F16,
        dtype => bail!("expected f32, f64, bf16 or f16, got {dtype:?}"),
    })
}

/// What of a block's state is packed.
fn packs(state: &State) -> u32 {
    let flag = |(_, slot): (_, &Slot)| match slot.format() {
        Format::F32 | Format::F64 => 0,
        Format::Compact => abi::SRKL_COMPACT,
        Format::Split => abi::SRKL_SPLIT,
        Format::BF16 => abi::SRKL_AVERAGE_BF16,
    };
    state.named().map(flag).fold(0, |flags, flag| flags | flag)
}

/// Where the elements of a contiguous tensor are.
pub(crate) fn numbers(tensor: &Tensor, stream: &CudaStream) -> Result<abi::SrklGradient> {
    let (storage, layout) = tensor.storage_and_layout();
    let address = address_of(&storage, layout.start_offset(), stream)?;
    Ok(abi::SrklGradient { address, dtype: dtype(tensor.dtype())? as u64 })
}

/// The device address of the first element of a block that is stepped here.
pub(crate) fn parameter_address(block: &Block, stream: &CudaStream) -> Result<u64> {
    address_of(&block.var.storage_and_layout().0, block.layout.start_offset(), stream)
}

/// The device address of element `offset` of a storage.
pub(crate) fn address_of(storage: &Storage, offset: usize, stream: &CudaStream) -> Result<u64> {
    let Storage::Cuda(storage) = storage else { bail!("expected a tensor on a CUDA device") };
    let (address, size) = match &storage.slice {
        CudaStorageSlice::F32(slice) => (slice.device_ptr(stream).0, 4),
        CudaStorageSlice::F64(slice) => (slice.device_ptr(stream).0, 8),
        CudaStorageSlice::BF16(slice) => (slice.device_ptr(stream).0, 2),
        CudaStorageSlice::F16(slice) => (slice.device_ptr(stream).0, 2),
        CudaStorageSlice::I16(slice) => (slice.device_ptr(stream).0, 2),
        CudaStorageSlice::U8(slice) => (slice.device_ptr(stream).0, 1),
        _ => bail!("expected f32, f64, bf16 or f16, or packed state"),
    };
    Ok(address + (offset * size) as u64)
}
