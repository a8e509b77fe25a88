//! The stages over a list of blocks, on the CPU: which thread does what, under which locks.
//!
//! Large blocks are taken one after the other, each split over the threads; then small ones are
//! handed to them in batches. With thousands of small tensors the time goes into cache misses: the
//! way to one gradient leads over a hash table, a tensor, its layout and its storage. So a batch is
//! taken step by step, one loop per pointer, whose misses overlap, and what an update needs is
//! prefetched.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use super::StepOptions;
use super::cpu::{self, Asked, PIECE, Scratch};
use super::gradient::Gradient;
use super::pool::Pool;
use super::simd::{Simd, prefetch};
use crate::block::{Block, Buffer, Last, storage_address};
use crate::numerics::{LANES, Sums};
use crate::params::Group;
use crate::rule::{self, Decision};

/// Small blocks are handed to threads in batches of about this many elements, ...
const BATCH_ELEMENTS: usize = 1 << 15;

/// ... and at most this many blocks.
const BATCH_BLOCKS: usize = 32;

/// What is known of the gradient of a block after its statistics.
#[derive(Clone, Copy)]
pub(crate) struct Found<'a> {
    pub gradient: &'a Tensor,
    pub sums: Sums,
    /// The addresses of its storage and of its first element, to prefetch.
    storage: usize,
    elements: usize,
}

impl<'a> Found<'a> {
    /// The gradient of a block that is on a device.
    pub fn on_device(block: &Block, grads: &'a GradStore, sums: Sums) -> Option<Self> {
        let gradient = grads.get_id(block.id)?;
        Some(Self { gradient, sums, storage: 0, elements: 0 })
    }
}

/// The CPU as a place for stages. Blocks on a CUDA device are passed over.
#[derive(Clone)]
pub(crate) struct Stages {
    pub simd: Simd,
    /// Threads, if they are worth it.
    pub pool: Option<Arc<Pool>>,
    /// Where the storages of all variables are, sorted: a gradient must not be one of them.
    pub storages: Arc<[usize]>,
    /// Of each group whether its gradients are ignored.
    pub frozen: Vec<bool>,
}

impl Stages {
    /// Stage 1 where sums are not needed: finds and checks the gradient of every block.
    pub fn check<'g>(
        &self,
        blocks: &[Block],
        grads: &'g GradStore,
    ) -> Result<Vec<Option<Found<'g>>>> {
        self.gradients(blocks, grads, |_, _, _| Sums::ZERO)
    }

    /// Stage 1: the gradient of every block with the sums that are asked for; `None` for a block that has
    /// no gradient.
    ///
    /// # Errors
    ///
    /// Whatever can be wrong with a gradient.
    pub fn statistics<'g>(
        &self,
        blocks: &[Block],
        grads: &'g GradStore,
        asked: Asked,
    ) -> Result<Vec<Option<Found<'g>>>> {
        self.gradients(blocks, grads, |block, g, scratch| {
            cpu::statistics(g, block.dtype == DType::F64, asked, self.simd, scratch)
        })
    }

    fn gradients<'g>(
        &self,
        blocks: &[Block],
        grads: &'g GradStore,
        read: impl Fn(&Block, &Gradient, &mut Scratch) -> Sums + Sync,
    ) -> Result<Vec<Option<Found<'g>>>> {
        let find = |scratch: &mut Scratch, (batch, found): (&[Block], &mut [Option<Found<'g>>])| {
            let tensor_of = |block: &Block| {
                let takes_part = block.on_cpu && !self.frozen[block.group];
                grads.get_id(block.id).filter(|_| takes_part)
            };
            let tensors: Vec<_> = batch.iter().map(tensor_of).collect();
            for (block, tensor) in batch.iter().zip(&tensors) {
                tensor.map_or(Ok(()), |tensor| block.check_gradient(tensor))?;
            }
            let locked = |tensor: &Option<&'g Tensor>| tensor.map(Tensor::storage_and_layout);
            let storages: Vec<_> = tensors.iter().map(locked).collect();
            for (i, (block, tensor)) in batch.iter().zip(&tensors).enumerate() {
                let (Some(gradient), Some((storage, layout))) = (tensor, &storages[i]) else {
                    continue;
                };
                let address = storage_address(storage);
                block.check_alias(address, &self.storages)?;
                let g = Gradient::new(storage, layout)?;
                let sums = read(block, &g, scratch);
                found[i] = Some(Found { gradient, sums, storage: address, elements: g.address() });
            }
            Ok(())
        };
        let size = batch_size(blocks);
        let mut found = vec![None; blocks.len()];
        let batches = blocks.chunks(size).zip(found.chunks_mut(size));
        self.spread(batches.map(|item| (has_large(item.0), item)).collect(), find)?;
        Ok(found)
    }

    /// Stage 3: moves every block that has a gradient and a decision. (Stage 2, `decide`, is a few operations per
    /// block.)
    pub fn update(
        &self,
        blocks: &mut [Block],
        gradients: &[Option<Found>],
        decisions: &[Option<Decision>],
        groups: &[Group],
        (StepOptions { measures, records }, grad_scale): (StepOptions, f64),
    ) -> Result<()> {
        let size = batch_size(blocks);
        let batches = blocks.chunks_mut(size).zip(gradients.chunks(size));
        let batches = batches.zip(decisions.chunks(size));
        let batches = batches.map(|item| (has_large(item.0.0), item)).collect();
        self.spread(batches, |scratch, ((blocks, gradients), decisions)| {
            if size > 1 {
                for (block, found) in blocks.iter().zip(gradients) {
                    prefetch_update(block, found.as_ref());
                }
            }
            for ((block, found), decision) in blocks.iter_mut().zip(gradients).zip(decisions) {
                block.small = decision.is_none_or(|d| d.small);
                block.grad_factor = decision.map_or(1., |d| d.c);
                block.last =
                    decision.map(|d| Last { curvature: d.curvature, phi: d.phi, norms: None });
                match (found, decision) {
                    (Some(Found { gradient, sums, .. }), Some(decision)) => {
                        let params = &groups[block.group].params;
                        if block.on_cpu {
                            let measures = measures && params.measures_steps() || records;
                            let numbers = (params, decision);
                            cpu::update(block, gradient, numbers, measures, self.simd, scratch)?;
                        }
                        if let Some(last) = block.last.as_mut().filter(|_| records) {
                            let step = block.step_sums.step.sqrt();
                            last.norms = Some([sums.norm(1. / grad_scale), step]);
                        }
                        block.powers = rule::next_powers(&block.powers, params);
                    }
                    (Some(_), None) => block.skipped += 1,
                    (None, _) => {}
                }
            }
            Ok(())
        })
    }

    /// What `work` makes of every block on the CPU that something is given for.
    pub fn each<T: Sync, R: Send>(
        &self,
        blocks: &mut [Block],
        given: &[Option<T>],
        work: impl Fn(&mut Scratch, &mut Block, &T) -> Result<R> + Sync,
    ) -> Result<Vec<Option<R>>> {
        let mut results: Vec<Option<R>> = blocks.iter().map(|_| None).collect();
        let items = blocks.iter_mut().zip(given).zip(&mut results);
        let items = items.filter_map(|((block, given), result)| {
            let given = given.as_ref().filter(|_| block.on_cpu)?;
            Some((block.n > PIECE, (block, given, result)))
        });
        self.spread(items.collect(), |scratch, (block, given, result)| {
            *result = Some(work(scratch, block, given)?);
            Ok(())
        })?;
        Ok(results)
    }

    /// Runs `work` on every item: on those with a large block in turn, then on the others over the
    /// threads where they are worth it.
    ///
    /// `work` holds a tensor's lock while it waits for the threads to split a large block, and a thread
    /// that waits takes up other work of its pool, which must not wait for a lock in its turn: hence one
    /// optimizer at a time is in the pool, and one large block is finished before the next one's lock is
    /// taken. Whoever reads the parameters meanwhile, or steps them by another optimizer, then waits for a
    /// lock that is always released.
    fn spread<T: Send>(
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
            // Each split has working memory of its own, so not too many of them.
            let least = (small.len() / (8 * threads)).max(1);
            let small = small.into_par_iter().with_min_len(least);
            small.try_for_each_init(Scratch::new, work)
        })
    }
}

fn has_large(batch: &[Block]) -> bool {
    batch.iter().any(|block| block.n > PIECE)
}

/// How many blocks one thread takes at a time: one, unless they are small.
fn batch_size(blocks: &[Block]) -> usize {
    let elements: usize = blocks.iter().map(|block| block.n).sum();
    (BATCH_ELEMENTS * blocks.len() / elements.max(1)).clamp(1, BATCH_BLOCKS)
}

/// Brings what the update of a small block needs first into the caches.
fn prefetch_update(block: &Block, found: Option<&Found>) {
    let n = block.n.min(LANES);
    let bytes = n * block.dtype.size_in_bytes();
    prefetch(block.storage, 1);
    prefetch(block.elements, bytes);
    if let Some(Buffer::F32(master)) = &block.state.master {
        prefetch(master.as_ptr().addr(), n * size_of::<f32>());
    }
    if let Some(found) = found {
        prefetch(found.storage, 1);
        prefetch(found.elements, bytes);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor, Var};
    use candle_nn::Optimizer;
    use proptest::prelude::*;

    use super::super::simd::Simd;
    use crate::{Beta, NonFinite, ParamsSrkl, Scope, Srkl};

    const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

    /// Two steps by the given gradient; the bits of parameter and master, as text.
    fn train(simd: Simd, params: &ParamsSrkl, w: &Tensor, g: &Tensor) -> Result<String> {
        let var = Var::from_tensor(w)?;
        let mut opt = Srkl::new(vec![var.clone()], params.clone())?;
        opt.simd = simd;
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
        /// On a processor without AVX2 both runs are the same and the test says nothing.
        #[test]
        fn vector_and_baseline_code_give_the_same_bits(
            (w, g) in prop_oneof![0..40usize, Just(1025), Just(8193)]
                .prop_flat_map(|n| (patterns(n), patterns(n))),
            scope in prop_oneof![
                2 => Just(Scope::Tensor), 1 => Just(Scope::Global), 1 => Just(Scope::Element)
            ],
            max_grad_norm in prop_oneof![Just(None), Just(Some(0.5))],
            nonfinite in prop_oneof![Just(NonFinite::SkipStep), Just(NonFinite::Propagate)],
        ) {
            let params = ParamsSrkl {
                lr: 0.3,
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
                    prop_assert_eq!(run(Simd::Baseline), run(Simd::detect()));
                }
            }
        }
    }
}
