//! Random numbers that depend on the seed and on what they are for, and on nothing else.

use rand::SeedableRng;
use rand::rngs::StdRng;

/// What random numbers are for.
pub enum Stream {
    Split,
    Weights,
    /// The order of the training images in an epoch: a resumed training needs it without those of
    /// the epochs before.
    Epoch(usize),
}

pub fn rng(seed: u64, stream: Stream) -> StdRng {
    let number = match stream {
        Stream::Split => 0,
        Stream::Weights => 1,
        Stream::Epoch(epoch) => 2 + epoch as u64,
    };
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&number.to_le_bytes());
    StdRng::from_seed(key)
}
