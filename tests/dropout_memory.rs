//! The memory of dropout: its output, and no mask, neither until the backward pass nor in it.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_srkl::Dropout;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// One test, since the allocator counts all threads.
#[test]
fn no_mask_is_kept() -> Result<()> {
    let n = 3_000_001;
    let w = Var::zeros(n, DType::F32, &Device::Cpu)?;
    // Candle's threads have started after one.
    Dropout::new(0.1).forward(&w, true)?;
    let peak_of = |work: &dyn Fn() -> Result<Tensor>| -> Result<(usize, Tensor)> {
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let made = work()?;
        Ok((ALLOCATOR.peak_usage() - before, made))
    };
    let (forward, y) = peak_of(&|| Dropout::new(0.1).forward(&w, true))?;
    assert!(forward <= 4 * n + 100_000, "{forward} bytes");
    let loss = y.sum_all()?;
    // Candle's own of any operation: its gradient, the zeros it is added to, and the sum.
    let (without, _) = peak_of(&|| Ok(w.sum_all()?.backward()?.get(&w).unwrap().clone()))?;
    let (backward, _) = peak_of(&|| Ok(loss.backward()?.get(&w).unwrap().clone()))?;
    assert!(backward <= without + 2 * 4 * n + 100_000, "{backward} bytes, without {without}");
    Ok(())
}
