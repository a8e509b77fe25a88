//! The gradients of ranks, added up.
//!
//! Sums follow a tree over micro-batches that is fixed by their number alone ([`tree`]), and one rank adds up each element for
//! all: that of its shard. So the bits depend neither on how micro-batches are distributed, as long as each rank has a power of
//! two of them, nor on the transport.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, bail};

use crate::block::{Block, Parameters};
use crate::collective::part;
use crate::exchange::{Segment, append, buckets};
use crate::micro_batches::{add, sum_dtype, tree};
use crate::numerics::{bf16_to_f32, f16_to_f32};
use crate::ranks::Ranks;

impl Ranks {
    /// The sums of all ranks' gradients, in [`sum_dtype`]; of sharded parameters those of the elements that are stepped here.
    /// `stated` has what each rank has, by [`given`].
    ///
    /// # Errors
    ///
    /// A transport or a device that fails. The training can't go on then, and all ranks are told if that is possible.
    pub fn sum(
        &self,
        blocks: &[Block],
        grads: &GradStore,
        stated: &[Vec<u8>],
    ) -> Result<GradStore> {
        let wires: Vec<Option<Wire>> =
            (0..).zip(blocks).map(|(i, block)| Wire::new(block, i, stated)).collect();
        self.or_abort(match self.by_device {
            true => self.sum_on_device(blocks, grads, &wires),
            false => self.sum_on_hosts(blocks, grads, &wires),
        })
    }

    fn sum_on_hosts(
        &self,
        blocks: &[Block],
        grads: &GradStore,
        wires: &[Option<Wire>],
    ) -> Result<GradStore> {
        let size = |block: usize| wires[block].as_ref().map(|wire| wire.sent.size_in_bytes());
        let mut sums: Vec<Option<Gathered>> = vec![];
        let mut done = GradStore::default();
        for (block, wire) in blocks.iter().zip(wires) {
            let sum = wire.as_ref().map(|wire| Gathered::new(block, wire.sum));
            sums.push(match sum {
                Some(sum) if sum.missing == 0 => {
                    done.insert_id(block.id, sum.finish(block)?);
                    None
                }
                sum => sum,
            });
        }
        let mut room = Room::default();
        for bucket in buckets(blocks, self.world_size, self.bucket_bytes, size) {
            let parts = |size: &dyn Fn(&Wire) -> DType| -> Vec<usize> {
                let bytes = |segment: &Segment| {
                    let wire = wires[segment.block].as_ref();
                    wire.map_or(0, |wire| size(wire).size_in_bytes()) * segment.range.len()
                };
                bucket.iter().map(|segments| segments.iter().map(bytes).sum()).collect()
            };
            let own = self.sum_segments(
                blocks,
                grads,
                wires,
                &bucket,
                &parts(&|wire| wire.sent),
                &mut room,
            )?;
            let mut deliver = |segments: &[Segment], mut bytes: &[u8]| -> Result<()> {
                for segment in segments {
                    let Some(sum) = &mut sums[segment.block] else { continue };
                    bytes = sum.put(&segment.range, bytes);
                    if sum.missing == 0
                        && let Some(sum) = sums[segment.block].take()
                    {
                        let block = &blocks[segment.block];
                        done.insert_id(block.id, sum.finish(block)?);
                    }
                }
                Ok(())
            };
            if self.sharded {
                deliver(&bucket[self.rank], &own)?;
                continue;
            }
            let parts = parts(&|wire| wire.sum);
            let mut whole = vec![0; parts.iter().sum()];
            whole[part(&parts, self.rank)].copy_from_slice(&own);
            drop(own);
            self.all_gather(&mut whole, &parts)?;
            for (rank, segments) in bucket.iter().enumerate() {
                deliver(segments, &whole[part(&parts, rank)])?;
            }
        }
        Ok(done)
    }

    /// The same from device to device, without waiting for one.
    fn sum_on_device(
        &self,
        blocks: &[Block],
        grads: &GradStore,
        wires: &[Option<Wire>],
    ) -> Result<GradStore> {
        let size = |block: usize| wires[block].as_ref().map(|wire| wire.sent.size_in_bytes());
        // Each sum, of as many elements as this rank needs.
        let room = |(block, wire): (&Block, &Option<Wire>)| {
            let Some(wire) = wire else { return Ok(None) };
            let len = if block.sharded { block.n } else { block.whole };
            nothing_or_zeros(len, wire.sum, block.var.device()).map(Some)
        };
        let sums: Vec<Option<Tensor>> =
            blocks.iter().zip(wires).map(room).collect::<Result<_>>()?;
        let mut in_order = Copies::default();
        for bucket in buckets(blocks, self.world_size, self.bucket_bytes, size) {
            let (mut send, mut receive, mut own) = (vec![], vec![], vec![]);
            for (rank, segments) in bucket.iter().enumerate() {
                for Segment { block, range } in segments {
                    let (Some(wire), Some(gradient)) =
                        (&wires[*block], grads.get_id(blocks[*block].id))
                    else {
                        continue;
                    };
                    let flat = in_order.get(*block, gradient, range.len(), |gradient| {
                        gradient.detach().contiguous()?.flatten_all()
                    })?;
                    let part = flat.narrow(0, range.start, range.len())?.to_dtype(wire.sent)?;
                    match rank == self.rank {
                        true => own.push(part),
                        false => send.push((rank, part)),
                    }
                }
            }
            let mut own = own.into_iter();
            let mut terms: Vec<Vec<Option<Tensor>>> = vec![];
            for Segment { block, range } in &bucket[self.rank] {
                let Some(wire) = &wires[*block] else { continue };
                let mut of_ranks = vec![];
                for (rank, added) in wire.added.iter().enumerate() {
                    of_ranks.push(match added {
                        None => None,
                        Some(_) if rank == self.rank => own.next(),
                        Some(_) => {
                            let device = blocks[*block].var.device();
                            let room = Tensor::zeros(range.len(), wire.sent, device)?;
                            receive.push((rank, room.clone()));
                            Some(room)
                        }
                    });
                }
                terms.push(of_ranks);
            }
            self.on_device(|devices| devices.send_and_receive(&send, &receive))?;
            for (Segment { block, range }, of_ranks) in bucket[self.rank].iter().zip(terms) {
                let (Some(wire), Some(sum)) = (&wires[*block], &sums[*block]) else { continue };
                let terms = of_ranks.into_iter().zip(&wire.added);
                let terms = terms.map(|(term, added)| match (term, added) {
                    (Some(term), Some(added)) => term.to_dtype(*added).map(Some),
                    _ => Ok(None),
                });
                if let Some(total) = tree(terms.collect::<Result<_>>()?, add)? {
                    let start = if blocks[*block].sharded { blocks[*block].first } else { 0 };
                    sum.slice_set(&total.to_dtype(wire.sum)?, 0, range.start - start)?;
                }
            }
            if !self.sharded {
                let of_block = |block: usize| match &sums[block] {
                    Some(sum) => Ok(sum.clone()),
                    None => bail!("there is no sum"),
                };
                self.broadcast_on_device(&bucket, of_block)?;
            }
        }
        let mut done = GradStore::default();
        for (block, sum) in blocks.iter().zip(sums) {
            if let Some(sum) = sum {
                let sum = if block.sharded { sum } else { sum.reshape(&block.shape)? };
                done.insert_id(block.id, sum);
            }
        }
        Ok(done)
    }

    /// The sums of those segments of a bucket that this rank adds up. `parts` are the bytes that are sent to each.
    fn sum_segments(
        &self,
        blocks: &[Block],
        grads: &GradStore,
        wires: &[Option<Wire>],
        bucket: &[Vec<Segment>],
        parts: &[usize],
        room: &mut Room,
    ) -> Result<Vec<u8>> {
        let Room { on_host, sent, received } = room;
        sent.clear();
        for Segment { block, range } in bucket.iter().flatten() {
            let Some(wire) = &wires[*block] else { continue };
            match grads.get_id(blocks[*block].id) {
                Some(gradient) => {
                    let gradient = match gradient.device().is_cpu() {
                        true => gradient.clone(),
                        false => on_host.get(*block, gradient, range.len(), |gradient| {
                            gradient.to_device(&Device::Cpu)
                        })?,
                    };
                    append(&gradient, range.clone(), wire.sent, sent)?;
                }
                None => sent.resize(sent.len() + range.len() * wire.sent.size_in_bytes(), 0),
            }
        }
        let own = parts[self.rank];
        received.resize(self.world_size * own, 0);
        self.all_to_all(sent, parts, received)?;

        let mut sums = vec![];
        let mut start = 0;
        for Segment { block, range } in &bucket[self.rank] {
            let Some(wire) = &wires[*block] else { continue };
            let len = range.len() * wire.sent.size_in_bytes();
            let of_rank = |(rank, added): (usize, &Option<DType>)| {
                Some(Values::of(&received[rank * own + start..][..len], wire.sent, (*added)?))
            };
            let each = wire.added.iter().enumerate().map(of_rank).collect();
            if let Some(total) = tree(each, |a, b| Ok(Values::add(a, b)))? {
                total.append(wire.sum, &mut sums);
            }
            start += len;
        }
        Ok(sums)
    }
}

/// How the gradients of a parameter are sent and added up, if any rank has one.
struct Wire {
    sent: DType,
    sum: DType,
    /// In which dtype each rank's gradient is added up, if there is one. (Those of several dtypes are sent in the widest.)
    added: Vec<Option<DType>>,
}

impl Wire {
    fn new(block: &Block, i: usize, stated: &[Vec<u8>]) -> Option<Self> {
        let dtypes: Vec<_> = stated.iter().map(|given| dtype_of(given[i])).collect();
        let added = |dtype: &Option<DType>| dtype.map(|dtype| sum_dtype(block.dtype, dtype));
        let added: Vec<Option<DType>> = dtypes.iter().map(added).collect();
        let sum = added.iter().flatten().max_by_key(|dtype| dtype.size_in_bytes()).copied()?;
        let mut present = dtypes.into_iter().flatten();
        let first = present.next()?;
        let sent = if present.all(|dtype| dtype == first) { first } else { sum };
        Some(Self { sent, sum, added })
    }
}

/// A sum as it comes, segment by segment.
struct Gathered {
    /// The elements that it is of.
    span: Range<usize>,
    /// How many of them are missing.
    missing: usize,
    values: Values,
}

/// What is used again for the next bucket.
#[derive(Default)]
struct Room {
    on_host: Copies,
    sent: Vec<u8>,
    received: Vec<u8>,
}

/// The numbers of a sum.
enum Values {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl Values {
    /// Numbers of dtype `sent`, in that in which they are added.
    fn of(bytes: &[u8], sent: DType, added: DType) -> Self {
        fn numbers<T, const N: usize>(bytes: &[u8], of_bytes: impl Fn([u8; N]) -> T) -> Vec<T> {
            bytes.as_chunks().0.iter().map(|bytes| of_bytes(*bytes)).collect()
        }
        let values = match sent {
            DType::F64 => Self::F64(numbers(bytes, f64::from_le_bytes)),
            DType::BF16 => Self::F32(numbers(bytes, |b| bf16_to_f32(u16::from_le_bytes(b)))),
            DType::F16 => Self::F32(numbers(bytes, |b| f16_to_f32(u16::from_le_bytes(b)))),
            _ => Self::F32(numbers(bytes, f32::from_le_bytes)),
        };
        match (values, added) {
            (Self::F32(values), DType::F64) => {
                Self::F64(values.into_iter().map(f64::from).collect())
            }
            // A rank with narrower gradients than others.
            (Self::F64(values), DType::F32) => {
                Self::F32(values.into_iter().map(|x| x as f32).collect())
            }
            (values, _) => values,
        }
    }

    fn wide(self) -> Vec<f64> {
        match self {
            Self::F32(values) => values.into_iter().map(f64::from).collect(),
            Self::F64(values) => values,
        }
    }

    fn add(a: Self, b: Self) -> Self {
        match (a, b) {
            (Self::F32(mut a), Self::F32(b)) => {
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                Self::F32(a)
            }
            (a, b) => {
                let (mut a, b) = (a.wide(), b.wide());
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                Self::F64(a)
            }
        }
    }

    /// Appends their bytes, as numbers of dtype `sum`.
    fn append(self, sum: DType, bytes: &mut Vec<u8>) {
        fn append<T, const N: usize>(
            values: &[T],
            bytes: &mut Vec<u8>,
            to_bytes: impl Fn(&T) -> [u8; N],
        ) {
            let first = bytes.len();
            bytes.resize(first + values.len() * N, 0);
            let to = bytes[first..].as_chunks_mut().0;
            to.iter_mut().zip(values).for_each(|(to, x)| *to = to_bytes(x));
        }
        match (self, sum) {
            (Self::F32(values), DType::F32) => append(&values, bytes, |x| x.to_le_bytes()),
            (values, _) => append(&values.wide(), bytes, |x| x.to_le_bytes()),
        }
    }
}

impl Gathered {
    fn new(block: &Block, dtype: DType) -> Self {
        let span = if block.sharded { block.first..block.first + block.n } else { 0..block.whole };
        let values = match dtype {
            DType::F64 => Values::F64(vec![]),
            _ => Values::F32(vec![]),
        };
        Self { missing: span.len(), span, values }
    }

    /// Puts the first of `bytes` in their place, and returns the others.
    fn put<'b>(&mut self, range: &Range<usize>, bytes: &'b [u8]) -> &'b [u8] {
        fn put<T: Copy + Default, const N: usize>(
            values: &mut Vec<T>,
            (all, start, len): (usize, usize, usize),
            bytes: &[u8],
            of_bytes: impl Fn([u8; N]) -> T,
        ) -> usize {
            // Allocated when the first ones come.
            values.resize(all, T::default());
            let from = bytes[..len * N].as_chunks().0;
            values[start..].iter_mut().zip(from).for_each(|(x, bytes)| *x = of_bytes(*bytes));
            len * N
        }
        let place = (self.span.len(), range.start - self.span.start, range.len());
        self.missing -= range.len();
        let taken = match &mut self.values {
            Values::F32(values) => put(values, place, bytes, f32::from_le_bytes),
            Values::F64(values) => put(values, place, bytes, f64::from_le_bytes),
        };
        &bytes[taken..]
    }

    fn finish(self, block: &Block) -> Result<Tensor> {
        let (n, device) = (self.span.len(), block.var.device());
        let sum = match self.values {
            Values::F32(_) if n == 0 => nothing_or_zeros(0, DType::F32, device)?,
            Values::F64(_) if n == 0 => nothing_or_zeros(0, DType::F64, device)?,
            Values::F32(values) => Tensor::from_vec(values, n, &Device::Cpu)?.to_device(device)?,
            Values::F64(values) => Tensor::from_vec(values, n, &Device::Cpu)?.to_device(device)?,
        };
        if block.sharded { Ok(sum) } else { sum.reshape(&block.shape) }
    }
}

/// What was made of gradients, until all of their elements have been sent.
#[derive(Default)]
struct Copies(HashMap<usize, (Tensor, usize)>);

impl Copies {
    /// What `copy` makes of the gradient of a block, of which `len` elements are sent now.
    fn get(
        &mut self,
        block: usize,
        gradient: &Tensor,
        len: usize,
        copy: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (copy, left) = match self.0.remove(&block) {
            Some(copied) => copied,
            None => (copy(gradient)?, gradient.elem_count()),
        };
        if left > len {
            self.0.insert(block, (copy.clone(), left - len));
        }
        Ok(copy)
    }
}

/// Zeros, or nothing: a CUDA device can't allocate 0 bytes.
fn nothing_or_zeros(len: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::zeros(len.max(1), dtype, device)?.narrow(0, 0, len)
}

/// What a rank states of its gradients: a byte for each parameter. Those of frozen ones are not sent.
pub(crate) fn given(all: &Parameters, grads: &GradStore) -> Vec<u8> {
    let byte = |block: &Block| match grads.get_id(block.id).map(Tensor::dtype) {
        Some(_) if all.of(block).lr == 0. => FROZEN,
        dtype => BYTES.iter().find(|(_, of)| Some(*of) == dtype).map_or(NONE, |(byte, _)| *byte),
    };
    all.blocks.iter().map(byte).collect()
}

/// The bytes of gradients of these dtypes.
const BYTES: [(u8, DType); 4] =
    [(b'f', DType::F32), (b'd', DType::F64), (b'b', DType::BF16), (b'h', DType::F16)];

/// The byte of a parameter without a gradient.
const NONE: u8 = b'-';

/// The byte of a frozen parameter that has a gradient.
const FROZEN: u8 = b'z';

/// Whether a rank has a gradient of a frozen parameter, by its place.
pub(crate) fn has_frozen(stated: &[Vec<u8>], place: usize) -> bool {
    stated.iter().any(|given| given[place] == FROZEN)
}

fn dtype_of(given: u8) -> Option<DType> {
    BYTES.iter().find(|(byte, _)| *byte == given).map(|(_, dtype)| *dtype)
}
