//! What ranks send each other besides gradients: sums over chunks, parameters, state; and how elements are cut into messages.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, Var, bail};

use crate::backend::cpu::gradient::append_elements;
use crate::block::Block;
#[cfg(feature = "cuda")]
use crate::collective::part;
use crate::estimate::StepSums;
use crate::micro_batches::{add, tree};
use crate::numerics::{CHUNK, Pair, Sums};
use crate::ranks::{Ranks, Statement, claim};

/// Sums that ranks exchange.
pub(crate) trait Numbers: Sized {
    type Values: AsRef<[f64]> + Default + AsMut<[f64]>;

    fn values(&self) -> Self::Values;
    fn of(values: Self::Values) -> Self;
}

impl Numbers for Sums {
    type Values = [f64; 3];

    fn values(&self) -> [f64; 3] {
        [self.sum2, self.sum4, self.exponent as f64]
    }
    fn of([sum2, sum4, exponent]: [f64; 3]) -> Self {
        Self { sum2, sum4, exponent: exponent as i32 }
    }
}

impl Numbers for Pair {
    type Values = [f64; 2];

    fn values(&self) -> [f64; 2] {
        [self.a, self.b]
    }
    fn of([a, b]: [f64; 2]) -> Self {
        Self { a, b }
    }
}

impl Numbers for StepSums {
    type Values = [f64; 3];

    fn values(&self) -> [f64; 3] {
        [self.step, self.direction, self.along]
    }
    fn of([step, direction, along]: [f64; 3]) -> Self {
        Self { step, direction, along }
    }
}

impl Ranks {
    /// Completes sums over the chunks of each block by those of other ranks. The same blocks have some on all ranks.
    ///
    /// # Errors
    ///
    /// A transport or a device that fails.
    pub fn gather_sums<T: Numbers>(
        &self,
        blocks: &[Block],
        sums: &mut [Option<Vec<T>>],
    ) -> Result<()> {
        let size = size_of::<T::Values>();
        let chunks = |block: &Block, rank: usize| block.shards[rank].len().div_ceil(CHUNK);
        let given = |rank: usize| {
            let some = blocks.iter().zip(&*sums).filter(|(_, sums)| sums.is_some());
            some.map(|(block, _)| chunks(block, rank)).sum::<usize>() * size
        };
        let parts: Vec<usize> = (0..self.world_size).map(given).collect();
        let mut whole = Vec::with_capacity(parts.iter().sum());
        whole.resize(parts[..self.rank].iter().sum(), 0);
        for sums in sums.iter().flatten().flatten() {
            whole.extend(sums.values().as_ref().iter().flat_map(|x| x.to_le_bytes()));
        }
        whole.resize(parts.iter().sum(), 0);
        self.all_gather(&mut whole, &parts)?;

        let mut rest = &whole[..];
        let mut of_ranks = vec![];
        for part in parts {
            let (own, after) = rest.split_at(part);
            of_ranks.push(own.chunks_exact(size));
            rest = after;
        }
        for (block, sums) in blocks.iter().zip(sums) {
            let Some(sums) = sums else { continue };
            sums.clear();
            for (rank, items) in of_ranks.iter_mut().enumerate() {
                sums.extend(items.take(chunks(block, rank)).map(|bytes| {
                    let mut values = T::Values::default();
                    for (x, bytes) in values.as_mut().iter_mut().zip(bytes.as_chunks().0) {
                        *x = f64::from_le_bytes(*bytes);
                    }
                    T::of(values)
                }));
            }
        }
        Ok(())
    }

    /// Completes the parameters that `moved` by the elements that other ranks have stepped.
    ///
    /// # Errors
    ///
    /// A transport or a device that fails.
    pub fn gather_parameters(&self, blocks: &[Block], moved: impl Fn(usize) -> bool) -> Result<()> {
        let size = |block: usize| moved(block).then(|| blocks[block].dtype.size_in_bytes());
        for bucket in buckets(blocks, self.world_size, self.bucket_bytes, size) {
            if self.by_device {
                let of_block = |block: usize| blocks[block].var.flatten_all();
                self.broadcast_on_device(&bucket, of_block)?;
                continue;
            }
            let bytes = |segments: &Vec<Segment>| {
                segments.iter().map(|s| s.range.len() * blocks[s.block].dtype.size_in_bytes()).sum()
            };
            let parts: Vec<usize> = bucket.iter().map(bytes).collect();
            let mut whole = Vec::with_capacity(parts.iter().sum());
            whole.resize(parts[..self.rank].iter().sum(), 0);
            for Segment { block, range } in &bucket[self.rank] {
                let Block { var, dtype, .. } = &blocks[*block];
                append(var, range.clone(), *dtype, &mut whole)?;
            }
            whole.resize(parts.iter().sum(), 0);
            self.all_gather(&mut whole, &parts)?;

            let mut rest = &whole[..];
            for (rank, segments) in bucket.iter().enumerate() {
                for Segment { block, range } in segments {
                    let Block { var, dtype, .. } = &blocks[*block];
                    let (own, after) = rest.split_at(range.len() * dtype.size_in_bytes());
                    rest = after;
                    if rank != self.rank {
                        let own = of_bytes(own, *dtype)?.to_device(var.device())?;
                        var.flatten_all()?.slice_set(&own, 0, range.start)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The sum of a tensor over all ranks, on the CPU, which is itself a sum of `count`.
    ///
    /// # Errors
    ///
    /// As [`Ranks::agree`].
    pub fn sum_of(&self, own: &Tensor, count: usize) -> Result<Tensor> {
        let shape = format!("{:?} {:?}", own.dtype(), own.dims());
        let claims = vec![
            claim("what is called", "mean_over_ranks"),
            claim("the number of micro-batches", count),
            claim("the tensor whose mean is taken", shape),
        ];
        let stated = to_bytes(own).map(|own| Statement { claims, own });
        let each = self.agree(stated)?;
        let tensor = |bytes: &Vec<u8>| of_bytes(bytes, own.dtype())?.reshape(own.shape()).map(Some);
        let sum = tree(each.iter().map(tensor).collect::<Result<_>>()?, add)?;
        sum.map_or_else(|| bail!("there is no rank"), Ok)
    }

    /// Replaces parameters by those of rank 0.
    ///
    /// # Errors
    ///
    /// A transport or a device that fails.
    pub fn broadcast_parameters(&self, vars: &[Var]) -> Result<()> {
        self.or_abort(vars.iter().try_for_each(|var| {
            let mut whole = match self.rank {
                0 => to_bytes(var)?,
                _ => vec![0; var.elem_count() * var.dtype().size_in_bytes()],
            };
            self.broadcast(0, &mut whole)?;
            if self.rank > 0 {
                let value = of_bytes(&whole, var.dtype())?.reshape(var.shape())?;
                var.set(&value.to_device(var.device())?)?;
            }
            Ok(())
        }))
    }

    /// Completes a flat tensor, of which each rank has a part: they lie one after the other, and `parts` has their numbers of
    /// elements.
    ///
    /// # Errors
    ///
    /// A transport or a device that fails.
    #[cfg(feature = "cuda")]
    pub fn gather_tensor(&self, whole: &Tensor, parts: &[usize]) -> Result<()> {
        let ranges = (0..parts.len()).map(|rank| part(parts, rank)).enumerate();
        let ranges = ranges.filter(|(_, range)| !range.is_empty());
        if self.by_device {
            let narrow = |(rank, range): (usize, Range<usize>)| {
                Ok((rank, whole.narrow(0, range.start, range.len())?))
            };
            let parts: Vec<_> = ranges.map(narrow).collect::<Result<_>>()?;
            return self.on_device(|devices| devices.broadcast(&parts));
        }
        let size = whole.dtype().size_in_bytes();
        let bytes_of = |range: &Range<usize>| range.start * size..range.end * size;
        let own = part(parts, self.rank);
        let mut bytes = vec![0; own.start * size];
        append(whole, own, whole.dtype(), &mut bytes)?;
        bytes.resize(parts.iter().sum::<usize>() * size, 0);
        let sizes: Vec<usize> = parts.iter().map(|part| part * size).collect();
        self.all_gather(&mut bytes, &sizes)?;
        for (_, range) in ranges.filter(|(rank, _)| *rank != self.rank) {
            let part = of_bytes(&bytes[bytes_of(&range)], whole.dtype())?;
            whole.slice_set(&part.to_device(whole.device())?, 0, range.start)?;
        }
        Ok(())
    }

    /// The masters of a sharded parameter, of which this rank has its `own`.
    ///
    /// # Errors
    ///
    /// A transport or a device that fails.
    pub fn gather_masters(&self, block: &Block, own: Vec<f32>) -> Result<Vec<f32>> {
        let mut whole = vec![];
        let own = own.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.each_shard(own, block.shards.iter().map(|shard| 4 * shard.len()), |bytes| {
            whole.extend(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        })?;
        Ok(whole)
    }

    /// Completes flat tensors by the segments that other ranks have.
    pub fn broadcast_on_device(
        &self,
        bucket: &[Vec<Segment>],
        of_block: impl Fn(usize) -> Result<Tensor>,
    ) -> Result<()> {
        let mut parts = vec![];
        for (rank, segments) in bucket.iter().enumerate() {
            for Segment { block, range } in segments {
                parts.push((rank, of_block(*block)?.narrow(0, range.start, range.len())?));
            }
        }
        self.on_device(|devices| devices.broadcast(&parts))
    }
}

/// Elements of a parameter that are sent together.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Segment {
    pub block: usize,
    pub range: Range<usize>,
}

/// The elements of the blocks that have a `size` in bytes, by what goes together and by rank: the shards side by side, so that
/// each rank has as much to do.
pub(crate) fn buckets(
    blocks: &[Block],
    world_size: usize,
    bucket_bytes: usize,
    size: impl Fn(usize) -> Option<usize>,
) -> Vec<Vec<Vec<Segment>>> {
    let most = bucket_bytes / world_size;
    let mut buckets: Vec<Vec<Vec<Segment>>> = vec![];
    for rank in 0..world_size {
        let (mut bucket, mut filled) = (0, 0);
        for (i, block) in blocks.iter().enumerate() {
            let Some(size) = size(i) else { continue };
            let Range { mut start, end } = block.shards[rank];
            while start < end {
                if filled > 0 && filled + size > most {
                    (bucket, filled) = (bucket + 1, 0);
                }
                let len = ((most - filled.min(most)) / size).clamp(1, end - start);
                if buckets.len() == bucket {
                    buckets.push(vec![vec![]; world_size]);
                }
                buckets[bucket][rank].push(Segment { block: i, range: start..start + len });
                (start, filled) = (start + len, filled + len * size);
            }
        }
    }
    buckets
}

/// Appends the bytes of some elements of a tensor, converted.
pub(crate) fn append(
    tensor: &Tensor,
    range: Range<usize>,
    dtype: DType,
    bytes: &mut Vec<u8>,
) -> Result<()> {
    if tensor.dtype() != dtype {
        let (start, len) = (range.start, range.len());
        let part = tensor.flatten_all()?.narrow(0, start, len)?.to_dtype(dtype)?;
        return append(&part, 0..len, dtype, bytes);
    }
    if !tensor.device().is_cpu() {
        let (start, len) = (range.start, range.len());
        // A copy to the host, as `copy`, is of all memory that a tensor is a part of.
        let part = tensor.flatten_all()?.narrow(0, start, len)?;
        return match len {
            0 => Ok(()),
            _ => append(&part.force_contiguous()?.to_device(&Device::Cpu)?, 0..len, dtype, bytes),
        };
    }
    let (storage, layout) = tensor.storage_and_layout();
    append_elements(&storage, layout, range, bytes)
}

/// The elements of a tensor, as bytes.
pub(crate) fn to_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    append(tensor, 0..tensor.elem_count(), tensor.dtype(), &mut bytes)?;
    Ok(bytes)
}

pub(crate) fn of_bytes(bytes: &[u8], dtype: DType) -> Result<Tensor> {
    let shape = [bytes.len() / dtype.size_in_bytes()];
    Tensor::from_raw_buffer(bytes, dtype, &shape, &Device::Cpu)
}
