//! Steps of several ranks: what they must agree on.

use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Error, Result, bail};

use crate::collective::{Collective, OnDevice};

/// The largest message of a rank, in bytes, unless set.
pub(crate) const BUCKET_BYTES: usize = 4 << 20;

/// The ranks of an optimizer.
#[derive(Clone)]
pub(crate) struct Ranks {
    /// (A mutex to share references between threads: there is one caller.)
    collective: Arc<Mutex<Box<dyn Collective>>>,
    pub rank: usize,
    pub world_size: usize,
    pub bucket_bytes: usize,
    /// Whether each keeps the state of its shard alone.
    pub sharded: bool,
    /// Whether gradients and parameters go from device to device.
    pub by_device: bool,
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
    pub fn new(
        collective: Box<dyn Collective>,
        bucket_bytes: usize,
        sharded: bool,
    ) -> Result<Option<Self>> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        if rank >= world_size {
            bail!("`collective`: expected a rank below its `world_size` {world_size}, got {rank}")
        }
        let collective = Arc::new(Mutex::new(collective));
        let by_device = false;
        let ranks = Self { collective, rank, world_size, bucket_bytes, sharded, by_device };
        Ok((world_size > 1).then_some(ranks))
    }

    fn collective(&self) -> MutexGuard<'_, Box<dyn Collective>> {
        self.collective.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn all_to_all(&self, from: &[u8], parts: &[usize], to: &mut [u8]) -> Result<()> {
        self.collective().all_to_all(from, parts, to)
    }

    pub fn all_gather(&self, whole: &mut [u8], parts: &[usize]) -> Result<()> {
        self.collective().all_gather(whole, parts)
    }

    /// Runs `f` with what moves tensors from device to device.
    ///
    /// # Errors
    ///
    /// Those of `f`, and a transport that does not.
    pub fn on_device<T>(&self, f: impl FnOnce(&mut dyn OnDevice) -> Result<T>) -> Result<T> {
        match self.collective().on_device() {
            Some(devices) => f(devices),
            None => bail!("the ranks' transport does not go from device to device"),
        }
    }

    /// For what can't be undone: all ranks are told of an error, if that is possible.
    pub fn or_abort<T>(&self, done: Result<T>) -> Result<T> {
        done.inspect_err(|e| self.collective().abort(&e.to_string()))
    }

    /// Whether each of these holds on any rank.
    ///
    /// # Errors
    ///
    /// A transport that fails.
    pub fn any(&self, holds: &[bool]) -> Result<Vec<bool>> {
        let own: Vec<u8> = holds.iter().map(|holds| *holds as u8).collect();
        let told = self.collective().exchange(&own)?;
        let any = |i: usize| told.iter().any(|told| told.get(i) == Some(&1));
        Ok((0..holds.len()).map(any).collect())
    }

    /// Sends all ranks what `owner` has in `bytes`.
    ///
    /// # Errors
    ///
    /// A transport that fails.
    pub fn broadcast(&self, owner: usize, bytes: &mut [u8]) -> Result<()> {
        for bucket in bytes.chunks_mut(self.bucket_bytes) {
            let mut parts = vec![0; self.world_size];
            parts[owner] = bucket.len();
            self.all_gather(bucket, &parts)?;
        }
        Ok(())
    }

    /// Gives `take` what each rank has, one after the other: its `own` bytes, so many as `sizes` has for it.
    ///
    /// # Errors
    ///
    /// A transport that fails.
    pub fn each_shard(
        &self,
        own: Vec<u8>,
        sizes: impl Iterator<Item = usize>,
        mut take: impl FnMut(Vec<u8>),
    ) -> Result<()> {
        let mut own = Some(own);
        for (rank, size) in sizes.enumerate() {
            let own = if rank == self.rank { own.take() } else { None };
            let mut bytes = own.unwrap_or_else(|| vec![0; size]);
            self.broadcast(rank, &mut bytes)?;
            take(bytes);
        }
        Ok(())
    }

    /// Tells all ranks of this one's statement, or error. Returns what all have stated.
    ///
    /// # Errors
    ///
    /// The error of any rank, or the first claim that differs: the same on all.
    pub fn agree(&self, local: Result<Statement>) -> Result<Vec<Vec<u8>>> {
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
        &self,
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
