//! Steps of several ranks: what they must agree on, and the sums of their gradients.
//!
//! Sums follow a tree over micro-batches that is fixed by their number alone ([`tree`]), and one rank adds up each element
//! for all. So the bits depend neither on how micro-batches are distributed, as long as each rank has a power of two of
//! them, nor on the transport.

use std::fmt::Display;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Error, Result, Tensor, Var, bail};
use safetensors::View;

use crate::block::{Block, Parameters};
use crate::collective::Collective;
use crate::micro_batches::{sum_dtype, tree};

/// The largest message of a rank, in bytes, unless set.
pub(crate) const BUCKET_BYTES: usize = 4 << 20;

/// The ranks of an optimizer.
pub(crate) struct Ranks {
    /// (A mutex to share references between threads: there is one caller.)
    collective: Mutex<Box<dyn Collective>>,
    pub rank: usize,
    pub world_size: usize,
    pub bucket_bytes: usize,
}

/// What must be equal on all ranks: what it is called, and its value.
pub(crate) type Claim = (String, String);

pub(crate) fn claim(name: impl Into<String>, value: impl Display) -> Claim {
    (name.into(), value.to_string())
}

/// What a rank tells the others before they do something together.
#[derive(Default)]
pub(crate) struct Statement {
    pub claims: Vec<Claim>,
    /// What need not be equal.
    pub own: Vec<u8>,
}

impl Ranks {
    /// `None` for a single rank, which has nobody to talk to.
    pub fn new(collective: Box<dyn Collective>, bucket_bytes: usize) -> Result<Option<Self>> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        if rank >= world_size {
            bail!("`collective`: expected a rank below its `world_size` {world_size}, got {rank}")
        }
        let collective = Mutex::new(collective);
        let ranks = Self { collective, rank, world_size, bucket_bytes };
        Ok((world_size > 1).then_some(ranks))
    }

    fn collective(&mut self) -> &mut dyn Collective {
        &mut **self.collective.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells all ranks of this one's statement, or error. Returns what all have stated.
    ///
    /// # Errors
    ///
    /// The error of any rank, or the first claim that differs: the same on all.
    pub fn agree(&mut self, local: Result<Statement>) -> Result<Vec<Vec<u8>>> {
        let mut message = vec![];
        match &local {
            Ok(Statement { claims, own }) => {
                message.push(1);
                // Each claim is a line.
                let escaped = |text: &str| text.escape_debug().to_string();
                let line =
                    |(name, value): &Claim| format!("{}\t{}\n", escaped(name), escaped(value));
                let lines: String = claims.iter().map(line).collect();
                message.extend((lines.len() as u64).to_le_bytes());
                message.extend(lines.into_bytes());
                message.extend(own);
            }
            Err(e) => {
                message.push(0);
                message.extend(e.to_string().into_bytes());
            }
        }
        let told = self.collective().exchange(&message)?;
        let failed = told.iter().enumerate().find(|(_, message)| message.first() != Some(&1));
        if let Some((rank, message)) = failed {
            let message = String::from_utf8_lossy(message.get(1..).unwrap_or_default());
            return Err(Error::msg(format!("rank {rank}: {message}")));
        }
        let stated: Option<Vec<_>> = told.iter().map(|message| split(&message[1..])).collect();
        let Some(stated) = stated else {
            bail!("the ranks have different versions of candle-srkl")
        };
        let (first, _) = stated[0];
        for (rank, (claims, _)) in stated.iter().enumerate() {
            if claims != &first {
                let shown = difference(
                    &String::from_utf8_lossy(first),
                    &String::from_utf8_lossy(claims),
                    rank,
                );
                bail!("the ranks differ: {shown}")
            }
        }
        Ok(stated.into_iter().map(|(_, own)| own.to_vec()).collect())
    }

    /// `local`, if all ranks have one, and what all have stated of theirs.
    ///
    /// # Errors
    ///
    /// As [`Ranks::agree`].
    pub fn agree_on<T>(
        &mut self,
        local: Result<T>,
        statement: impl FnOnce(&T) -> Result<Statement>,
    ) -> Result<(T, Vec<Vec<u8>>)> {
        let statement = match &local {
            Ok(local) => statement(local),
            Err(e) => Err(Error::msg(e.to_string())),
        };
        let stated = self.agree(statement)?;
        Ok((local?, stated))
    }

    /// The sum of a tensor over all ranks, on the CPU, which is itself a sum of `count`.
    pub fn sum_of(&mut self, own: &Tensor, count: usize) -> Result<Tensor> {
        let shape = format!("{:?} {:?}", own.dtype(), own.dims());
        let claims = vec![
            claim("what is called", "mean_over_ranks"),
            claim("the number of micro-batches", count),
            claim("the tensor whose mean is taken", shape),
        ];
        let stated = to_bytes(own, own.dtype()).map(|own| Statement { claims, own });
        let each = self.agree(stated)?;
        let tensor = |bytes: &Vec<u8>| of_bytes(bytes, own.dtype())?.reshape(own.shape()).map(Some);
        let sum = tree(each.iter().map(tensor).collect::<Result<_>>()?)?;
        sum.map_or_else(|| bail!("there is no rank"), Ok)
    }

    /// Replaces parameters by those of rank 0.
    ///
    /// # Errors
    ///
    /// As [`Ranks::sum`].
    pub fn broadcast(&mut self, vars: &[Var]) -> Result<()> {
        let done = self.try_broadcast(vars);
        done.inspect_err(|e| self.collective().abort(&e.to_string()))
    }

    fn try_broadcast(&mut self, vars: &[Var]) -> Result<()> {
        for var in vars {
            let mut whole = match self.rank {
                0 => to_bytes(var, var.dtype())?,
                _ => vec![0; var.elem_count() * var.dtype().size_in_bytes()],
            };
            let size = self.bucket_bytes;
            for bucket in whole.chunks_mut(size) {
                let mut parts = vec![0; self.world_size];
                parts[0] = bucket.len();
                self.collective().all_gather(bucket, &parts)?;
            }
            if self.rank > 0 {
                let value = of_bytes(&whole, var.dtype())?.reshape(var.shape())?;
                var.set(&value.to_device(var.device())?)?;
            }
        }
        Ok(())
    }

    /// The sums of all ranks' gradients, in [`sum_dtype`]. `stated` has what each rank has, by [`given`].
    ///
    /// # Errors
    ///
    /// A transport or a device that fails. The training can't go on then, and all ranks are told if that is possible.
    pub fn sum(
        &mut self,
        blocks: &[Block],
        grads: &GradStore,
        stated: &[Vec<u8>],
    ) -> Result<GradStore> {
        let sum = self.try_sum(blocks, grads, stated);
        sum.inspect_err(|e| self.collective().abort(&e.to_string()))
    }

    fn try_sum(
        &mut self,
        blocks: &[Block],
        grads: &GradStore,
        stated: &[Vec<u8>],
    ) -> Result<GradStore> {
        let mut sums = GradStore::default();
        // The gradient at hand, in the order of its elements, and what is known of its sum.
        let (mut own, mut whole) = ((usize::MAX, None), vec![]);
        for bucket in buckets(blocks, stated, self.bucket_bytes) {
            let size = bucket.wire.size_in_bytes();
            let mut bytes = vec![];
            for Segment { block: i, range, .. } in &bucket.segments {
                if own.0 != *i {
                    let gradient = grads.get_id(blocks[*i].id);
                    own = (*i, gradient.map(Tensor::flatten_all).transpose()?);
                }
                match &own.1 {
                    Some(gradient) => {
                        let part = gradient.narrow(0, range.start, range.len())?;
                        bytes.extend(to_bytes(&part, bucket.wire)?);
                    }
                    None => bytes.resize(bytes.len() + range.len() * size, 0),
                }
            }
            let summed = self.sum_bucket(&bucket, &bytes)?;
            let mut rest = &summed[..];
            for Segment { block: i, range, .. } in &bucket.segments {
                let size = bucket.sum.size_in_bytes();
                let (first, after) = rest.split_at(range.len() * size);
                if range.start == 0 {
                    whole.reserve_exact(blocks[*i].n * size);
                }
                whole.extend(first);
                rest = after;
                let Block { n, id, var, .. } = &blocks[*i];
                if range.end == *n {
                    let sum = of_bytes(&std::mem::take(&mut whole), bucket.sum)?;
                    let sum = sum.reshape(var.shape())?.to_device(var.device())?;
                    sums.insert_id(*id, sum);
                }
            }
        }
        Ok(sums)
    }

    /// Each rank adds up one part of the bucket, for all.
    fn sum_bucket(&mut self, bucket: &Bucket, bytes: &[u8]) -> Result<Vec<u8>> {
        let (rank, world_size) = (self.rank, self.world_size);
        let (wire, sum) = (bucket.wire.size_in_bytes(), bucket.sum.size_in_bytes());
        let len: usize = bucket.segments.iter().map(|segment| segment.range.len()).sum();
        let part = |rank: usize| len * rank / world_size..len * (rank + 1) / world_size;
        let parts = |size| (0..world_size).map(|r| part(r).len() * size).collect::<Vec<_>>();
        let own = part(rank);
        let mut received = vec![0; world_size * own.len() * wire];
        self.collective().all_to_all(bytes, &parts(wire), &mut received)?;

        let mut whole = vec![0; len * sum];
        let mut start = 0;
        for Segment { range, added, .. } in &bucket.segments {
            let segment = start..start + range.len();
            start = segment.end;
            let (from, to) = (segment.start.max(own.start), segment.end.min(own.end));
            if from >= to {
                continue;
            }
            let of_rank = |(rank, added): (usize, &Option<DType>)| {
                let Some(added) = *added else { return Ok(None) };
                let first = (rank * own.len() + from - own.start) * wire;
                let received = &received[first..first + (to - from) * wire];
                of_bytes(received, bucket.wire)?.to_dtype(added).map(Some)
            };
            let each = added.iter().enumerate().map(of_rank).collect::<Result<_>>()?;
            if let Some(total) = tree(each)? {
                whole[from * sum..to * sum].copy_from_slice(&to_bytes(&total, bucket.sum)?);
            }
        }
        self.collective().all_gather(&mut whole, &parts(sum))?;
        Ok(whole)
    }
}

/// Gradients that go together, of at most a given number of bytes: the end of one parameter, the next ones, and the beginning
/// of another.
#[derive(Debug, PartialEq)]
struct Bucket {
    /// The dtypes that are sent, and added up.
    wire: DType,
    sum: DType,
    segments: Vec<Segment>,
}

#[derive(Debug, PartialEq)]
struct Segment {
    block: usize,
    /// Of its elements.
    range: Range<usize>,
    /// In which dtype each rank's gradient of it is added up, if there is one. (Those of several dtypes are sent in the widest.)
    added: Vec<Option<DType>>,
}

/// The buckets of all parameters that any rank has a gradient of.
fn buckets(blocks: &[Block], stated: &[Vec<u8>], bucket_bytes: usize) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = vec![];
    let mut filled = 0;
    for (i, block) in blocks.iter().enumerate() {
        let dtypes: Vec<_> = stated.iter().map(|given| dtype_of(given[i])).collect();
        let added = |dtype: &Option<DType>| dtype.map(|dtype| sum_dtype(block.dtype, dtype));
        let added: Vec<Option<DType>> = dtypes.iter().map(added).collect();
        let widest = added.iter().flatten().max_by_key(|dtype| dtype.size_in_bytes());
        let (Some(first), Some(sum)) = (dtypes.iter().flatten().next(), widest.copied()) else {
            continue;
        };
        let same = dtypes.iter().flatten().all(|dtype| dtype == first);
        let wire = if same { *first } else { sum };
        let most = (bucket_bytes / wire.size_in_bytes()).max(1);
        let mut start = 0;
        loop {
            if buckets.last().is_none_or(|last| (last.wire, last.sum) != (wire, sum))
                || filled >= most
            {
                buckets.push(Bucket { wire, sum, segments: vec![] });
                filled = 0;
            }
            let range = start..block.n.min(start + most - filled);
            filled += range.len();
            start = range.end;
            if let Some(bucket) = buckets.last_mut() {
                bucket.segments.push(Segment { block: i, range, added: added.clone() });
            }
            if start == block.n {
                break;
            }
        }
    }
    buckets
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

/// The elements of a tensor, converted, as bytes.
fn to_bytes(tensor: &Tensor, dtype: DType) -> Result<Vec<u8>> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(dtype)?;
    Ok(tensor.data().into_owned())
}

fn of_bytes(bytes: &[u8], dtype: DType) -> Result<Tensor> {
    let shape = [bytes.len() / dtype.size_in_bytes()];
    Tensor::from_raw_buffer(bytes, dtype, &shape, &Device::Cpu)
}

/// The claims of a statement, and the rest.
fn split(message: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = message.split_first_chunk()?;
    rest.split_at_checked(u64::from_le_bytes(*len) as usize)
}

/// Shows the first claim that differs.
fn difference(first: &str, other: &str, rank: usize) -> String {
    let (mut first, mut other) = (first.lines(), other.lines());
    loop {
        let (a, b) = (first.next(), other.next());
        if a == b && a.is_some() {
            continue;
        }
        let parts = |line: Option<&str>| {
            let (name, value) = line?.split_once('\t')?;
            Some((name.to_string(), value.to_string()))
        };
        return match (parts(a), parts(b)) {
            (Some((name, a)), Some((other, b))) if name == other => {
                format!("{name} is {a} on rank 0, and {b} on rank {rank}")
            }
            (a, b) => {
                let named = |claim: Option<(String, String)>| {
                    claim.map_or("nothing".to_string(), |(name, value)| format!("{name}, {value},"))
                };
                format!("rank 0 has {}, where rank {rank} has {}", named(a), named(b))
            }
        };
    }
}
