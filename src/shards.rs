//! Which elements of which parameters each rank steps, or adds up the gradients of.

use std::ops::Range;

use crate::matrices::Matrices;
use crate::numerics::CHUNK;

/// What is distributed over ranks of a parameter.
pub(crate) struct Share {
    /// Its elements.
    pub n: usize,
    /// The bytes of them and of their state.
    pub bytes: usize,
    /// Whose owner orthogonalises them as a whole.
    pub matrices: Option<Matrices>,
}

/// The elements of each parameter, by rank.
///
/// Ranks have runs of whole chunks of about equal bytes, in the order of parameters; so shards cut no unit of packed state, and
/// no sum. Parameters of matrices go to the rank that has had the least to multiply, the most expensive first.
pub(crate) fn shards(shares: &[Share], world_size: usize) -> Vec<Vec<Range<usize>>> {
    let mut shards = vec![vec![0..0; world_size]; shares.len()];
    let mut matrices: Vec<_> = shares
        .iter()
        .enumerate()
        .filter_map(|(i, share)| Some((i, products(&share.matrices?))))
        .collect();
    matrices.sort_by_key(|(i, cost)| (std::cmp::Reverse(*cost), *i));
    let mut costs = vec![0; world_size];
    for (i, cost) in matrices {
        let owner = (0..world_size).min_by_key(|rank| (costs[*rank], *rank)).unwrap_or(0);
        shards[i][owner] = 0..shares[i].n;
        costs[owner] += cost;
    }

    let others = || shares.iter().zip(0..).filter(|(share, _)| share.matrices.is_none());
    let total: u128 = others().map(|(share, _)| share.bytes as u128).sum();
    let mut before: u128 = 0;
    for (share, i) in others() {
        let bytes = |elements: usize| (share.bytes as u128 * elements as u128) / share.n as u128;
        for start in (0..share.n).step_by(CHUNK) {
            let end = share.n.min(start + CHUNK);
            // Where the middle of the chunk is.
            let twice = 2 * before + bytes(start) + bytes(end);
            let rank = twice * world_size as u128 / (2 * total).max(1);
            let own = &mut shards[i][(rank as usize).min(world_size - 1)];
            *own = if Range::is_empty(own) { start..end } else { own.start..end };
        }
        before += share.bytes as u128;
    }
    // An empty shard lies between those beside it.
    for shards in &mut shards {
        let mut end = 0;
        for own in shards {
            if Range::is_empty(own) {
                *own = end..end;
            }
            end = own.end;
        }
    }
    shards
}

/// The multiplications of a step of the iteration, up to a factor.
fn products(matrices: &Matrices) -> u128 {
    let Matrices { count, rows, cols } = *matrices;
    let (short, long) = (rows.min(cols) as u128, rows.max(cols) as u128);
    count as u128 * (2 * short * short * long + short * short * short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every element has one owner; runs begin and end with chunks; no rank has more than its part and two chunks.
        #[test]
        fn every_element_has_one_owner(
            sizes in proptest::collection::vec(prop_oneof![
                Just(0usize), Just(1), Just(CHUNK - 1), Just(CHUNK), Just(CHUNK + 1), 0..100_000usize,
            ], 0..20),
            world_size in 1..9usize,
        ) {
            let share = |n: &usize| Share { n: *n, bytes: 16 * n, matrices: None };
            let shares: Vec<Share> = sizes.iter().map(share).collect();
            let of = shards(&shares, world_size);
            for (n, shards) in sizes.iter().zip(&of) {
                let mut end = 0;
                for own in shards {
                    prop_assert_eq!(own.start, end);
                    prop_assert!(own.is_empty() || own.start.is_multiple_of(CHUNK));
                    end = own.end;
                }
                prop_assert_eq!(end, *n);
            }
            let total: usize = sizes.iter().sum();
            for rank in 0..world_size {
                let own: usize = of.iter().map(|shards| shards[rank].len()).sum();
                prop_assert!(own <= total / world_size + CHUNK + 1, "{} of {}", own, total);
            }
        }
    }

    #[test]
    fn matrices_are_whole_and_balanced() {
        let share = |rows: usize, cols: usize| Share {
            n: rows * cols,
            bytes: 8 * rows * cols,
            matrices: Some(Matrices { count: 1, rows, cols }),
        };
        let shares = [share(512, 512), share(512, 512), share(2048, 512), share(512, 2048)];
        let of = shards(&shares, 2);
        for (share, shards) in shares.iter().zip(&of) {
            assert_eq!(shards.iter().filter(|own| **own == (0..share.n)).count(), 1);
        }
        for rank in 0..2 {
            let own = of.iter().map(|shards| shards[rank].len()).sum::<usize>();
            assert_eq!(own, 512 * 512 * 5);
        }
    }
}
