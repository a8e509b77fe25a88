//! The order in which a step works: the list of items that the kernels claim from.
//!
//! A run is a part of the list of blocks whose updates wait for the statistics of all of it. Runs are
//! short, so that a gradient is still in L2 when it is read again, by its update.

use std::ops::Range;

use super::abi;
use crate::numerics::CHUNK;

/// A run's gradients take at most this part of L2, unless it is a single block. The statistics of the next
/// run, and the parameters that are updated meanwhile, want their place there too.
const SHARE_OF_L2: u64 = 8;

/// The list of work on `blocks`, and how many runs it has: one, where everything is to be decided before
/// the first update.
pub(crate) fn order(blocks: &[abi::SrklBlock], whole: bool, l2: u64) -> (Vec<abi::SrklItem>, u64) {
    let runs = runs(blocks, whole, l2);
    (items(blocks, &runs, l2), runs.len() as u64)
}

fn runs(blocks: &[abi::SrklBlock], whole: bool, l2: u64) -> Vec<Range<usize>> {
    let (mut runs, mut start, mut bytes) = (vec![], 0, 0);
    for (i, block) in blocks.iter().enumerate() {
        let more = gradient_bytes(block);
        if i > start && !whole && bytes + more > l2 / SHARE_OF_L2 {
            runs.push(start..i);
            (start, bytes) = (i, 0);
        }
        bytes += more;
    }
    if start < blocks.len() {
        runs.push(start..blocks.len());
    }
    runs
}

/// The items of `runs`: the statistics of a run, those of the next one so that nobody waits long, then its
/// updates. A run too large for L2 is updated at once, before the next one takes its place there, last
/// chunk first: what was read last is still there.
fn items(blocks: &[abi::SrklBlock], runs: &[Range<usize>], l2: u64) -> Vec<abi::SrklItem> {
    let mut items = vec![];
    let is_large = |run: &Range<usize>| {
        blocks[run.clone()].iter().map(gradient_bytes).sum::<u64>() > l2 / SHARE_OF_L2
    };
    let mut behind = None;
    for (number, run) in runs.iter().enumerate() {
        stage(&mut items, blocks, number, run, abi::SRKL_STATISTICS);
        if let Some((number, run)) = behind.replace((number, run)) {
            stage(&mut items, blocks, number, run, abi::SRKL_UPDATE);
        }
        if is_large(run) || runs.get(number + 1).is_none_or(is_large) {
            behind = None;
            stage(&mut items, blocks, number, run, abi::SRKL_UPDATE);
        }
    }
    items
}

/// One stage of a run.
fn stage(
    items: &mut Vec<abi::SrklItem>,
    blocks: &[abi::SrklBlock],
    number: usize,
    run: &Range<usize>,
    stage: u32,
) {
    let from = items.len();
    let with_chunks = blocks[run.clone()].iter().filter(|block| block.chunk_count > 0).count();
    for place in run.clone() {
        let block = &blocks[place];
        items.extend((0..block.chunk_count).map(|chunk| abi::SrklItem {
            start: chunk * CHUNK as u64,
            chunk: block.first_chunk + chunk,
            block: place as u32,
            run: number as u32,
            stage,
            run_blocks: with_chunks as u32,
        }));
    }
    if stage == abi::SRKL_UPDATE {
        items[from..].reverse();
    }
}

/// The bytes of a block's gradient, if it has the block's dtype.
fn gradient_bytes(block: &abi::SrklBlock) -> u64 {
    block.n
        * match block.dtype {
            abi::SRKL_F64 => 8,
            abi::SRKL_F32 => 4,
            _ => 2,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(n: u64, first_chunk: u64) -> abi::SrklBlock {
        let chunk_count = n.div_ceil(CHUNK as u64);
        abi::SrklBlock { n, first_chunk, chunk_count, ..Default::default() }
    }

    /// What the kernels rely on, so that a wait ends: each chunk has its statistics, and behind those of
    /// its whole run its update.
    #[test]
    fn updates_stand_behind_the_statistics_of_their_run() {
        let sizes = [1, 0, 30_000, 8192, 100_000, 5, 0, 0, 50_000, 700_000, 8193, 1];
        let mut blocks: Vec<abi::SrklBlock> = vec![];
        for n in sizes {
            let first = blocks.iter().map(|block| block.chunk_count).sum();
            blocks.push(block(n, first));
        }
        let chunks: u64 = blocks.iter().map(|block| block.chunk_count).sum();
        for (whole, l2) in [(true, 1 << 20), (false, 1 << 20), (false, 1 << 10), (false, 1 << 30)] {
            let runs = runs(&blocks, whole, l2);
            assert!(!whole || runs.len() == 1);
            assert_eq!(runs.iter().flat_map(Clone::clone).count(), sizes.len());
            let items = items(&blocks, &runs, l2);
            assert_eq!(items.len() as u64, 2 * chunks);
            for (place, item) in items.iter().enumerate() {
                let range = &runs[item.run as usize];
                assert!(range.contains(&(item.block as usize)));
                let live = blocks[range.clone()].iter().filter(|block| block.n > 0).count();
                assert_eq!(item.run_blocks as usize, live);
                let block = &blocks[item.block as usize];
                assert_eq!(item.chunk, block.first_chunk + item.start / CHUNK as u64);
                if item.stage == abi::SRKL_UPDATE {
                    let waits_for =
                        items[place..].iter().filter(|i| i.stage == abi::SRKL_STATISTICS);
                    assert!(waits_for.clone().all(|i| i.run != item.run));
                }
            }
            for stage in [abi::SRKL_STATISTICS, abi::SRKL_UPDATE] {
                let of_stage = items.iter().filter(|item| item.stage == stage);
                let mut seen: Vec<u64> = of_stage.map(|item| item.chunk).collect();
                seen.sort_unstable();
                assert_eq!(seen, (0..chunks).collect::<Vec<_>>());
            }
        }
    }
}
