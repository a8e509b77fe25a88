//! The stages over a list of blocks, on the CPU: which thread does what, under which locks.
//!
//! Large blocks are taken one after the other, each split over the threads; then the threads take small ones in
//! batches. With thousands of small tensors the time goes into cache misses: a gradient is found by way of a hash
//! table, a tensor, its layout and its storage. So a batch is taken step by step, one loop per pointer, whose misses
//! overlap, and what an update needs is prefetched some blocks ahead.

use std::ops::Range;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Result, Storage, Tensor};
use rayon::prelude::*;

use self::access::Samples;
use self::gradient::Gradient;
use self::pool::Pool;
use self::simd::{Simd, prefetch};
use self::statistics::{PIECE, Scratch};
use self::update::{BlockStep, Summed};
use super::{Backend, BlockGradient, GradSums, GradientPair, ShardSums, Step, Tracked};
use crate::block::{Block, Lengths, Parameters, storage_address};
use crate::numerics::{LANES, Pair, Sums};
use crate::params::{Direction, ParamsSrkl};
use crate::rule::{Corrections, Decision, Powers};
use crate::state::State;

pub(crate) mod access;
mod curvature;
pub(crate) mod gradient;
pub(crate) mod mask;
mod moments;
mod orthogonal;
mod pool;
mod replace;
mod row_step;
mod rows;
pub(crate) mod simd;
mod statistics;
mod update;

/// Small blocks are handed to threads in batches of about this many elements, ...
const BATCH_ELEMENTS: usize = 1 << 15;

/// ... and at most this many blocks.
const BATCH_BLOCKS: usize = 32;

/// Below this much work, in elements, a step takes less time than waking another thread.
const PARALLEL_WORK: usize = PIECE;

/// So many blocks ahead of an update their fields are prefetched, and ...
const FIELDS_AHEAD: usize = 8;

/// ... so many ahead the memory that these tell of.
const MEMORY_AHEAD: usize = 4;

/// The work that a block takes besides that of its elements, in elements.
const BLOCK_WORK: usize = 256;

/// The CPU. Ignores blocks on CUDA devices.
pub(crate) struct CpuBackend {
    simd: Simd,
    /// The threads of all optimizers, if there is enough work for them. Not those of rayon's global
    /// pool: candle computes there, holding locks of tensors that a step waits for.
    pool: Option<Arc<Pool>>,
}

impl CpuBackend {
    /// Makes room for the matrices of the blocks that are orthogonalised.
    pub fn new(blocks: &mut [Block]) -> Result<Self> {
        blocks.iter_mut().filter(|block| block.on_cpu).try_for_each(orthogonal::make_room)?;
        let on_cpu = blocks.iter().filter(|block| block.on_cpu);
        let work: usize = on_cpu.map(|block| block.n + BLOCK_WORK).sum();
        let pool = if work >= PARALLEL_WORK { Pool::shared()? } else { None };
        Ok(Self { simd: Simd::detect(), pool })
    }

    /// The gradient of every block of a run, with the sums that `read` makes of it; `None` for a block that has no
    /// gradient, or is frozen.
    fn gradients<'g>(
        &self,
        all: &Parameters,
        grads: &'g GradStore,
        run: Range<usize>,
        read: impl Fn(&Block, &Gradient, &mut Scratch) -> Sums + Sync,
        gradients: &mut [Option<BlockGradient<'g>>],
    ) -> Result<()> {
        type Batch<'a, 'g> = (&'a [Block], &'a mut [Option<BlockGradient<'g>>]);
        let find = |scratch: &mut Scratch, (batch, gradients): Batch<'_, 'g>| {
            let tensor_of = |block: &Block| {
                let takes_part = block.on_cpu && all.of(block).lr != 0.;
                let tensor = grads.get_id(block.id).filter(|_| takes_part)?;
                prefetch_value(&**tensor);
                prefetch_slice(block.shape.dims());
                Some(tensor)
            };
            let tensors: Vec<_> = batch.iter().map(tensor_of).collect();
            for tensor in tensors.iter().flatten() {
                prefetch_slice(tensor.dims());
                prefetch_slice(tensor.stride());
            }
            for (block, tensor) in batch.iter().zip(&tensors) {
                tensor.map_or(Ok(()), |tensor| block.check_followed(tensor))?;
            }
            let locked = |tensor: &Option<&'g Tensor>| tensor.map(Tensor::storage_and_layout);
            let storages: Vec<_> = tensors.iter().map(locked).collect();
            for (i, (block, tensor)) in batch.iter().zip(&tensors).enumerate() {
                let (Some(gradient), Some((storage, layout))) = (tensor, &storages[i]) else {
                    continue;
                };
                let address = storage_address(storage);
                block.check_alias(address, &all.storages)?;
                let g = Gradient::new(storage, layout)?;
                let sums = read(block, &g, scratch);
                let (storage, elements) = (address, g.contiguous_address().unwrap_or(0));
                gradients[i] = Some(BlockGradient { gradient, sums, storage, elements });
            }
            Ok(())
        };
        let by = Batches::of(all, &run);
        let batches = all.blocks[run].chunks(by.size).zip(gradients.chunks_mut(by.size));
        let batches = batches.map(|item| (by.has_large(item.0), item));
        self.for_each_item(batches.collect(), find)
    }

    /// The results of `work` on every block on the CPU that has an entry in `given`.
    fn each<T: Sync, R: Send>(
        &self,
        blocks: &mut [Block],
        given: &[Option<T>],
        results: &mut [Option<R>],
        work: impl Fn(&mut Scratch, &mut Block, usize, &T) -> Result<R> + Sync,
    ) -> Result<()> {
        let items = blocks.iter_mut().zip(given).zip(results).enumerate();
        let items = items.filter_map(|(place, ((block, given), result))| {
            let given = given.as_ref().filter(|_| block.on_cpu)?;
            // Backups are of whole parameters, sharded or not.
            Some((block.whole > PIECE, (block, place, given, result)))
        });
        self.for_each_item(items.collect(), |scratch, (block, place, given, result)| {
            *result = Some(work(scratch, block, place, given)?);
            Ok(())
        })
    }

    /// The same for work without a result.
    fn each_block<T: Sync>(
        &self,
        blocks: &mut [Block],
        given: &[Option<T>],
        work: impl Fn(&mut Block, usize, &T) -> Result<()> + Sync,
    ) -> Result<()> {
        let mut results = vec![None; blocks.len()];
        self.each(blocks, given, &mut results, |_, block, place, given| work(block, place, given))
    }

    /// Runs `work` on every item: first on those with a large block, one after the other, then on the others, on
    /// several threads if there is a pool.
    ///
    /// `work` holds a tensor's lock while it waits for the threads that share a large block, and a waiting thread
    /// takes up other work of its pool. To exclude a deadlock, that work must not wait for a lock. So only one
    /// optimizer at a time is in the pool, and one large block is finished before the next one's lock is taken.
    /// Whoever reads the parameters meanwhile, or steps them with another optimizer, then waits for a lock that is
    /// always released.
    fn for_each_item<T: Send>(
        &self,
        items: Vec<(bool, T)>,
        work: impl Fn(&mut Scratch, T) -> Result<()> + Sync,
    ) -> Result<()> {
        let mut scratch = Scratch::new();
        let Some(turn) = self.pool.as_ref().and_then(|pool| pool.turn()) else {
            return items.into_iter().try_for_each(|(_, item)| work(&mut scratch, item));
        };
        let (large, small): (Vec<_>, Vec<_>) = items.into_iter().partition(|(large, _)| *large);
        turn.run(|threads| {
            large.into_iter().try_for_each(|(_, item)| work(&mut scratch, item))?;
            let work = |scratch: &mut Scratch, (_, item)| work(scratch, item);
            // Each split allocates working memory, so not too many of them.
            let least = (small.len() / (8 * threads)).max(1);
            let small = small.into_par_iter().with_min_len(least);
            small.try_for_each_init(Scratch::new, work)
        })
    }
}

impl Backend for CpuBackend {
    fn check(&self, all: &Parameters, grads: &GradStore) -> Result<()> {
        let every = 0..all.blocks.len();
        let mut gradients = vec![None; every.len()];
        self.gradients(all, grads, every, |_, _, _| Sums::ZERO, &mut gradients)
    }

    fn statistics<'g>(
        &mut self,
        all: &Parameters,
        step: Step<'g>,
        run: Range<usize>,
        asked: GradSums,
        gradients: &mut [Option<BlockGradient<'g>>],
    ) -> Result<()> {
        let read = |block: &Block, g: &Gradient, scratch: &mut Scratch| {
            let asked = if block.sharded { GradSums::None } else { asked };
            statistics::sums(g, block.dtype == DType::F64, asked, self.simd, scratch)
        };
        self.gradients(all, step.grads, run, read, gradients)
    }

    fn shard_sums(
        &mut self,
        all: &mut Parameters,
        asked: GradSums,
        gradients: &[Option<BlockGradient>],
        sums: &mut [Option<ShardSums>],
    ) -> Result<()> {
        self.each(&mut all.blocks, gradients, sums, |scratch, block, _, found| {
            let (storage, layout) = found.gradient.storage_and_layout();
            let (g, wide) = (Gradient::new(&storage, layout)?, block.dtype == DType::F64);
            let of_chunks = statistics::chunk_sums(&g, wide, asked, self.simd, scratch);
            Ok(ShardSums { of_chunks, overwritten: false })
        })
    }

    fn orthogonalize(
        &mut self,
        all: &mut Parameters,
        tracked: &[Tracked],
        run: Range<usize>,
        gradients: &[Option<BlockGradient>],
        decisions: &[Option<Decision>],
    ) -> Result<()> {
        let Parameters { blocks, groups, .. } = all;
        let (blocks, tracked) = (&mut blocks[run.clone()], &tracked[run]);
        let every = blocks.iter().zip(gradients).zip(decisions);
        let given: Vec<_> = every
            .map(|((block, found), decision)| {
                let both = ((*found)?.gradient, (*decision)?);
                block.orthogonal.as_ref().map(|_| both)
            })
            .collect();
        let mut done = vec![None; blocks.len()];
        self.each(blocks, &given, &mut done, |scratch, block, i, (gradient, decision)| {
            let (params, last) = (&groups[block.group].params, &mut LastCorrections::default());
            let step = block_step(params, decision, &tracked[i], block, last);
            orthogonal::write_momentum(block, gradient, step, self.simd, scratch)
        })?;
        // Not in our pool: candle's products have threads of their own.
        for (block, _) in blocks.iter().zip(done).filter(|(_, done)| done.is_some()) {
            if let Direction::Muon { steps, .. } = groups[block.group].params.direction {
                orthogonal::orthogonalize(block, steps, self.simd)?;
            }
        }
        Ok(())
    }

    fn directions(
        &mut self,
        all: &mut Parameters,
        tracked: &[Tracked],
        run: Range<usize>,
        given: &[Option<(&Tensor, Decision)>],
        _measures: bool,
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        let Parameters { blocks, groups, .. } = all;
        let tracked = &tracked[run.clone()];
        self.each(&mut blocks[run], given, sums, |scratch, block, i, (gradient, decision)| {
            let (params, last) = (&groups[block.group].params, &mut LastCorrections::default());
            let step = block_step(params, decision, &tracked[i], block, last);
            curvature::directions(block, gradient, step, self.simd, scratch)
        })
    }

    fn update(
        &mut self,
        all: &mut Parameters,
        tracked: &mut [Tracked],
        run: Range<usize>,
        gradients: &[Option<BlockGradient>],
        decisions: &[Option<Decision>],
        step: Step,
    ) -> Result<()> {
        let by = Batches::of(all, &run);
        let size = by.size;
        let Parameters { blocks, groups, .. } = all;
        let first = run.start;
        let (blocks, tracked) = (&mut blocks[run.clone()], &mut tracked[run]);
        let batches = blocks.chunks_mut(size).zip(tracked.chunks_mut(size));
        let batches = batches.zip(gradients.chunks(size)).zip(decisions.chunks(size));
        let batches = batches.zip((first..).step_by(size));
        let batches = batches.map(|item| (by.has_large(item.0.0.0.0), item)).collect();
        self.for_each_item(batches, |scratch, batch| {
            let ((((blocks, tracked), gradients), decisions), first) = batch;
            let mut corrections = LastCorrections::default();
            for i in 0..blocks.len() {
                if size > 1 {
                    prefetch_ahead(i, blocks, tracked, gradients);
                }
                let (block, tracked) = (&mut blocks[i], &mut tracked[i]);
                if !block.on_cpu {
                    continue;
                }
                let (found, decision) = (gradients[i].as_ref(), decisions[i].as_ref());
                let params = &groups[block.group].params;
                if let (Some(found), Some(decision)) = (found, decision) {
                    let keeps_strips = step.measures && params.measures_steps();
                    let sums_up = keeps_strips || step.records;
                    let numbers = block_step(params, decision, tracked, block, &mut corrections);
                    let (steps, place) = (step.steps, (first + i) as u64);
                    let numbers = BlockStep { sums_up, keeps_strips, steps, place, ..numbers };
                    let summed = update::update(block, found, &numbers, self.simd, scratch)?;
                    if sums_up || !tracked.step_sums.is_empty() {
                        let Summed { chunks, strips } = summed.unwrap_or_default();
                        (tracked.step_sums, tracked.strips) = (chunks, strips);
                    }
                }
                tracked.note(block, params, found, decision, step);
            }
            Ok(())
        })
    }

    fn change_of_gradient(
        &mut self,
        all: &mut Parameters,
        tracked: &[Tracked],
        _again: Step,
        given: &[Option<GradientPair>],
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        self.each(&mut all.blocks, given, sums, |scratch, block, place, pair| {
            let strips = &tracked[place].strips;
            curvature::change_of_gradient(block, strips, *pair, self.simd, scratch)
        })
    }

    fn squares(
        &mut self,
        all: &mut Parameters,
        _step: Step,
        wanted: &[Option<()>],
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        self.each(&mut all.blocks, wanted, sums, |scratch, block, _, ()| {
            curvature::squares(block, self.simd, scratch)
        })
    }

    fn perturb(
        &mut self,
        all: &mut Parameters,
        wanted: &[Option<()>],
        size: f64,
        seed: u64,
        draw: u64,
    ) -> Result<()> {
        self.each_block(&mut all.blocks, wanted, |block, place, ()| {
            replace::back_up(block)?;
            replace::perturb(block, place as u64, size, seed, draw)
        })
    }

    fn probe_sums(
        &mut self,
        all: &mut Parameters,
        _step: Step,
        _again: &GradStore,
        given: &[Option<(GradientPair, f64)>],
        size: f64,
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        self.each(&mut all.blocks, given, sums, |scratch, block, _, (pair, _)| {
            curvature::probe_sums(block, *pair, size, self.simd, scratch)
        })
    }

    fn average_probe(
        &mut self,
        all: &mut Parameters,
        given: &[Option<(GradientPair, f64)>],
        size: f64,
        sums: &mut [Option<Vec<Pair>>],
    ) -> Result<()> {
        self.each(&mut all.blocks, given, sums, |scratch, block, _, (pair, decay)| {
            curvature::average_probe(block, *pair, size, *decay, scratch)
        })
    }

    fn param_squares(&self, all: &Parameters, squares: &mut [Option<Vec<Pair>>]) -> Result<()> {
        let mut scratch = Scratch::new();
        for (block, sum) in all.blocks.iter().zip(squares).filter(|(b, _)| b.on_cpu) {
            *sum = Some(curvature::squares(block, self.simd, &mut scratch)?);
        }
        Ok(())
    }

    fn swap(&mut self, all: &mut Parameters, tracked: &[Tracked]) -> Result<()> {
        let averaged = |tracked: &Tracked| (tracked.powers.average != 1.).then_some(());
        let given: Vec<_> = tracked.iter().map(averaged).collect();
        self.each_block(&mut all.blocks, &given, |block, _, ()| {
            replace::back_up(block)?;
            replace::swap_average(block)
        })
    }

    fn restore(&mut self, all: &mut Parameters) -> Result<()> {
        // On threads that never wait for each other's locks: see `for_each_item`.
        let every = vec![Some(()); all.blocks.len()];
        self.each_block(&mut all.blocks, &every, |block, _, ()| replace::restore(block))
    }

    fn release(&mut self, all: &mut Parameters) {
        all.blocks.iter_mut().for_each(|block| block.backup.valid = false);
    }
}

/// The numbers of a block's step, which does not sum up.
fn block_step<'a>(
    params: &'a ParamsSrkl,
    decision: &'a Decision,
    tracked: &'a Tracked,
    block: &Block,
    last: &mut LastCorrections,
) -> BlockStep<'a> {
    let Tracked { powers, estimate, .. } = tracked;
    let corrections = last.of(block.group, params, powers);
    let (matrix_scale, samples) = (block.matrix_scale(), Samples::of(block));
    let (sums_up, keeps_strips) = (false, false);
    let (steps, place) = (0, 0);
    BlockStep {
        params,
        decision,
        corrections,
        estimate,
        sums_up,
        keeps_strips,
        matrix_scale,
        samples,
        steps,
        place,
    }
}

/// How the blocks of a run are handed to threads.
struct Batches {
    /// How many blocks one thread takes at a time: one, unless they are small.
    size: usize,
    /// Whether any block is split.
    any_large: bool,
}

impl Batches {
    fn of(all: &Parameters, run: &Range<usize>) -> Self {
        let Lengths { total, largest } = all.lengths(run);
        let size = (BATCH_ELEMENTS * run.len() / total.max(1)).clamp(1, BATCH_BLOCKS);
        Self { size, any_large: largest > PIECE }
    }

    /// Whether a batch has a block that is split.
    fn has_large(&self, batch: &[Block]) -> bool {
        self.any_large && batch.iter().any(|block| block.n > PIECE)
    }
}

/// The corrections of the block before, by its group and powers, which nearly always are the next one's too: their divisions would
/// be a part of the step of a small tensor.
#[derive(Default)]
struct LastCorrections(Option<(usize, Powers, Corrections)>);

impl LastCorrections {
    fn of(&mut self, group: usize, params: &ParamsSrkl, powers: &Powers) -> Corrections {
        match self.0 {
            Some((of, before, corrections)) if (of, before) == (group, *powers) => corrections,
            _ => self.0.insert((group, *powers, Corrections::new(params, powers))).2,
        }
    }
}

fn prefetch_value<T>(value: &T) {
    prefetch(std::ptr::from_ref(value).addr(), size_of::<T>());
}

/// Prefetches a slice that is not longer than a line.
fn prefetch_slice<T>(values: &[T]) {
    prefetch(values.as_ptr().addr(), 1);
}

/// Before the update of block `i` of a batch prefetches what those ahead of it read first; before the first one's also for
/// those nearer by.
fn prefetch_ahead(
    i: usize,
    blocks: &[Block],
    tracked: &[Tracked],
    gradients: &[Option<BlockGradient>],
) {
    let new = |ahead: usize| {
        let first = if i == 0 { 0 } else { i + ahead };
        first..(i + ahead + 1).min(blocks.len())
    };
    for at in new(FIELDS_AHEAD) {
        prefetch_value(&blocks[at]);
        prefetch_value(&tracked[at]);
    }
    for at in new(MEMORY_AHEAD) {
        prefetch_update(&blocks[at], gradients[at].as_ref());
    }
}

/// Prefetches the memory that the update of a small block reads first.
fn prefetch_update(block: &Block, found: Option<&BlockGradient>) {
    let n = block.n.min(LANES);
    let bytes = n * block.dtype.size_in_bytes();
    prefetch(block.storage, 1);
    prefetch(block.elements, bytes);
    let State { master, m, v, .. } = &block.state;
    for slot in [master, m, v].into_iter().flatten() {
        if let Storage::Cpu(CpuStorage::F32(numbers)) = slot.storage() {
            prefetch(numbers.as_ptr().addr(), n * size_of::<f32>());
        }
    }
    if let Some(found) = found {
        prefetch(found.storage, 1);
        if found.elements != 0 {
            prefetch(found.elements, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor, Var};
    use candle_nn::Optimizer;
    use proptest::prelude::*;

    use super::simd::{self, Simd};
    use crate::{Beta, Direction, MasterWeights, NonFinite, ParamsSrkl, Scope, Srkl, StateFormat};

    const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

    /// Two steps by the given gradient; the bits of parameter and master, as text.
    fn train(simd: Simd, params: &ParamsSrkl, w: &Tensor, g: &Tensor) -> Result<String> {
        let var = Var::from_tensor(w)?;
        simd::FORCED.set(Some(simd));
        let mut opt = Srkl::new(vec![var.clone()], params.clone())?;
        simd::FORCED.set(None);
        let mut grads = candle_core::backprop::GradStore::default();
        grads.insert(&var, g.clone());
        opt.step(&grads)?;
        opt.step(&grads)?;
        // f64 holds all four types.
        let bits = |t: &Tensor| -> Result<Vec<u64>> {
            Ok(t.to_dtype(DType::F64)?.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect())
        };
        let master = opt.master("0")?.map(|m| m.into_iter().map(f32::to_bits).collect::<Vec<_>>());
        Ok(format!("{:?} {master:?} {:?}", bits(var.as_tensor())?, opt.telemetry()?))
    }

    /// Ordinary numbers, finite ones of any magnitude, or some of any bit pattern among them.
    fn patterns(n: usize) -> impl Strategy<Value = Vec<f32>> {
        let any = any::<u32>().prop_map(f32::from_bits);
        let finite = any.clone().prop_map(|x| if x.is_finite() { x } else { 1. });
        prop_oneof![
            2 => proptest::collection::vec(-1f32..1., n),
            1 => proptest::collection::vec(finite, n),
            1 => proptest::collection::vec(prop_oneof![4 => -1f32..1., 1 => any], n),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// On a processor without AVX2 there is one run, and the test shows nothing.
        #[test]
        fn vector_and_baseline_code_give_the_same_bits(
            (w, g) in prop_oneof![0..40usize, Just(1025), Just(8193)]
                .prop_flat_map(|n| (patterns(n), patterns(n))),
            scope in prop_oneof![
                2 => Just(Scope::Tensor), 1 => Just(Scope::Global), 1 => Just(Scope::Element)
            ],
            max_grad_norm in prop_oneof![Just(None), Just(Some(0.5))],
            nonfinite in prop_oneof![Just(NonFinite::SkipStep), Just(NonFinite::Propagate)],
            direction in prop_oneof![
                Just(Direction::Gradient),
                Just(Direction::Momentum { mu: 0.9 }),
                Just(Direction::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8 }),
            ],
            packs in any::<bool>(),
        ) {
            let (state, master_weights) = match packs {
                true => (StateFormat::Compact, MasterWeights::Split),
                false => (StateFormat::F32, MasterWeights::Auto),
            };
            let params = ParamsSrkl {
                lr: 0.3,
                direction,
                state,
                master_weights,
                beta: Beta::Fixed(0.2),
                scope,
                weight_decay: 0.1,
                max_grad_norm,
                nonfinite,
                ..ParamsSrkl::reference()
            };
            for dtype in FLOATS {
                for grad_dtype in FLOATS {
                    let tensor = |x: &[f32], dtype| {
                        Tensor::from_slice(x, x.len(), &Device::Cpu).unwrap().to_dtype(dtype)
                    };
                    let (w, g) = (tensor(&w, dtype).unwrap(), tensor(&g, grad_dtype).unwrap());
                    let run = |simd| train(simd, &params, &w, &g).unwrap();
                    for simd in Simd::available() {
                        prop_assert_eq!(run(Simd::Baseline), run(simd), "{:?}", simd);
                    }
                }
            }
        }
    }
}
