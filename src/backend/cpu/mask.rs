//! The mask of dropout: random bits that can be drawn again.

use std::sync::Mutex;

use candle_core::utils::barrier_pool;

use super::access::Parameter;
use super::simd::{Kernel, Simd};
use crate::numerics::{Real, random_key, random_word};

/// Separates dropout's random bits from those of random vectors, whose streams are small numbers.
const STREAM: u64 = u64::from_be_bytes(*b"dropout\0");

/// A mask and its scale: all that is needed to draw it again.
#[derive(Clone, Copy)]
pub(crate) struct Mask {
    /// The key of the random words.
    pub key: u64,
    /// An element is dropped where its bits are below this.
    pub threshold: u32,
    pub scale: f64,
}

impl Mask {
    /// `p` is in [0, 1).
    pub fn new(p: f32, seed: u64, draw: u64) -> Self {
        let p = f64::from(p);
        Self {
            key: random_key(seed, draw, STREAM),
            // Rounded down, and below 2^32 for the f32 next to 1.
            threshold: (p * 2f64.powi(32)) as u32,
            scale: 1. / (1. - p),
        }
    }

    pub fn apply<T: Parameter + Default>(&self, xs: &[T]) -> Vec<T> {
        let mut ys = vec![T::default(); xs.len()];
        let simd = Simd::detect();
        if xs.len() < PARALLEL {
            simd.run(Apply { mask: *self, start: 0, xs, ys: &mut ys });
            return ys;
        }
        // Candle's pool, not rayon's: it steals no work, so the threads can't take up work that waits for the lock of
        // `xs`, which is held here. The locks of pieces are always free: each piece is taken once. (They fail only
        // after a panic, which propagates.)
        let pieces: Vec<_> = ys.chunks_mut(PIECE).map(Mutex::new).collect();
        barrier_pool().execute_chunked(pieces.len(), |range| {
            for piece in range {
                let start = piece * PIECE;
                if let Ok(mut ys) = pieces[piece].lock() {
                    let xs = &xs[start..start + ys.len()];
                    simd.run(Apply { mask: *self, start, xs, ys: &mut ys });
                }
            }
        });
        drop(pieces);
        ys
    }
}

/// From this many elements on, several threads are used, as in candle's own operations.
const PARALLEL: usize = 64 * 1024;

/// Elements that a thread takes at once; even, so that no random word is split between pieces.
const PIECE: usize = 16 * 1024;

/// Applies the mask to elements from `start` on, an even number.
pub(crate) struct Apply<'a, T> {
    pub mask: Mask,
    pub start: usize,
    pub xs: &'a [T],
    pub ys: &'a mut [T],
}

impl<T: Parameter> Kernel for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Mask { key, threshold, scale } = self.mask;
        let scale = T::Compute::from_f64(scale);
        let zero = T::narrow(T::Compute::default());
        let masked = |x: T, bits: u32| {
            let y = T::narrow(x.widen().mul(scale).canonical());
            if bits >= threshold { y } else { zero }
        };
        let (xs, last_x) = self.xs.as_chunks::<2>();
        let (ys, last_y) = self.ys.as_chunks_mut::<2>();
        let first = self.start as u64 / 2;
        for ((x, y), word) in xs.iter().zip(ys).zip(first..) {
            let bits = random_word(key, word);
            *y = [masked(x[0], bits as u32), masked(x[1], (bits >> 32) as u32)];
        }
        for (x, y) in last_x.iter().zip(last_y) {
            *y = masked(*x, random_word(key, first + xs.len() as u64) as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// The instruction sets give the same bits.
    #[test]
    fn simd_gives_the_bits_of_the_baseline() {
        fn check<T: Parameter + Default>(of: impl Fn(f64) -> T) {
            let xs: Vec<T> = (0..5001).map(|i| of((i as f64 * 0.37).sin() * 1e-5)).collect();
            let mask = Mask::new(0.3, 5, 6);
            for start in [0, 2, 1 << 33] {
                let run = |simd: Simd| {
                    let mut ys = vec![T::default(); xs.len()];
                    simd.run(Apply { mask, start, xs: &xs, ys: &mut ys });
                    ys
                };
                let baseline = run(Simd::Baseline);
                for simd in Simd::available() {
                    assert!(
                        baseline.iter().zip(run(simd)).all(|(a, b)| a.same_bits(b)),
                        "{simd:?}"
                    );
                }
            }
        }
        check(|x| x as f32);
        check(|x| x);
        check(bf16::from_f64);
        check(f16::from_f64);
    }
}
