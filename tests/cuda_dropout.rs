//! Dropout on CUDA devices: the bits of the CPU.
//!
//! Needs a CUDA device: `cargo test --release --features cuda`. (In captures: `cuda_graphs.rs`.)
#![cfg(feature = "cuda")]

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_srkl::Dropout;
use candle_srkl::random::with_seed;
use common::*;

/// Values of every kind, rounded to `dtype`.
fn awkward_values(n: usize, dtype: DType, salt: u64) -> Result<Tensor> {
    let mut xs = noise(n, 1., salt);
    let nan = f64::from_bits(0xfffc_0000_0000_0001);
    for (i, x) in xs.iter_mut().enumerate() {
        *x = [*x, *x, *x * 1e-6, *x * 1e-40, -0., nan, -f64::INFINITY, 65504.][i % 37 % 8];
    }
    tensor(&xs, dtype)
}

/// The outputs of two calls on a tensor made by `view`, and the gradients through them.
fn dropped(
    xs: &Tensor,
    device: &Device,
    p: f32,
    view: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Vec<u64>>> {
    let w = Var::from_tensor(&xs.to_device(device)?)?;
    let dropout = Dropout::new(p);
    with_seed(xs.elem_count() as u64, || {
        let y = view(&w)?;
        // Sums of rows are candle's own.
        let differentiates = y.elem_count() > 0 && !y.stride().contains(&0);
        let ys = [dropout.forward(&y, true)?, dropout.forward(&y, true)?];
        let mut all = vec![];
        for y in ys {
            all.push(bits(&y.to_device(&Device::Cpu)?)?);
            if differentiates {
                // Each element of the gradient has a factor of its own.
                let factor = tensor(&noise(y.elem_count(), 1., 7), y.dtype())?.to_device(device)?;
                let loss = (y.flatten_all()? * &factor)?.sum_all()?;
                let gradient = loss.backward()?.get(&w).unwrap().to_device(&Device::Cpu)?;
                all.push(bits(&gradient)?);
            }
        }
        Ok(all)
    })
}

#[test]
fn dropout_gives_the_bits_of_the_cpu() -> Result<()> {
    let cuda = Device::new_cuda(0)?;
    for dtype in FLOATS {
        for (i, n) in
            [1, 2, 3, 9, 31, 33, 127, 2047, 2048, 2049, 4097, 20_001].into_iter().enumerate()
        {
            let p = [0.1, 0.5, 0.9][i % 3];
            let at = i % 9;
            let xs = awkward_values(n + at, dtype, i as u64)?;
            // Misaligned, and not.
            for at in [0, at] {
                let on = |device: &Device| dropped(&xs, device, p, |w| w.narrow(0, at, n));
                assert!(on(&Device::Cpu)? == on(&cuda)?, "{dtype:?} {n} at {at}");
            }
        }
    }
    Ok(())
}

/// Element 408 of this seed has the bits 7cd79700.
#[test]
fn dropout_keeps_an_element_at_the_threshold() -> Result<()> {
    let p = 0x7cd7_9700u32 as f32 / 2f32.powi(32);
    let next = f32::from_bits(p.to_bits() + 1);
    for device in [Device::Cpu, Device::new_cuda(0)?] {
        let xs = Tensor::ones(4097, DType::F32, &device)?;
        for (p, kept) in [(p, true), (next, false)] {
            let y = with_seed(4097, || Dropout::new(p).forward(&xs, true))?;
            assert_eq!(y.to_vec1::<f32>()?[408] != 0., kept);
        }
    }
    Ok(())
}

#[test]
fn dropout_of_any_layout_gives_the_bits_of_the_cpu() -> Result<()> {
    let cuda = Device::new_cuda(0)?;
    let views: [fn(&Tensor) -> Result<Tensor>; 5] = [
        |w| w.t(),
        |w| w.narrow(1, 3, 11),
        |w| w.narrow(0, 2, 3)?.t(),
        |w| w.narrow(0, 1, 1)?.broadcast_as((5, 70)),
        |w| w.narrow(0, 3, 0),
    ];
    for dtype in FLOATS {
        let xs = awkward_values(2100, dtype, 3)?.reshape((30, 70))?;
        for (i, view) in views.iter().enumerate() {
            let on = |device: &Device| dropped(&xs, device, 0.3, view);
            assert!(on(&Device::Cpu)? == on(&cuda)?, "{dtype:?} view {i}");
        }
    }
    Ok(())
}

/// The kernel is loaded once, whichever of a GPU's devices comes first and whoever drops it.
#[test]
fn dropout_on_several_devices_and_threads() -> Result<()> {
    let xs = awkward_values(5000, DType::F32, 1)?;
    let expected = dropped(&xs, &Device::Cpu, 0.5, |w| Ok(w.clone()))?;
    for _ in 0..3 {
        std::thread::scope(|scope| {
            for own_stream in [false, true, false] {
                let (xs, expected) = (&xs, &expected);
                scope.spawn(move || {
                    let device = match own_stream {
                        false => Device::new_cuda(0).unwrap(),
                        true => Device::new_cuda_with_stream(0).unwrap(),
                    };
                    let found = dropped(xs, &device, 0.5, |w| Ok(w.clone())).unwrap();
                    assert!(found == *expected);
                });
            }
        });
    }
    Ok(())
}
