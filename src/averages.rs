//! Averaged weights in the place of the parameters, for evaluation.

use candle_core::{Result, bail};

use crate::optimizer::Srkl;

/// The parameters hold their averages while this lives: see [`Srkl::swap_averaged`]. Dropping it restores the
/// training weights, bit for bit.
#[derive(Debug)]
#[must_use = "dropping it puts the training weights back"]
pub struct Averaged<'a> {
    opt: &'a mut Srkl,
}

impl Drop for Averaged<'_> {
    fn drop(&mut self) {
        // Can fail only if the device has failed.
        let _ = self.opt.engine.restore(&mut self.opt.all);
    }
}

impl Srkl {
    /// Replaces the parameters by their averages ([`ParamsSrkl::average`](crate::ParamsSrkl::average)), rounded to
    /// their dtype, until the guard is dropped. A parameter that has not been stepped yet stays as it is.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_srkl::{Average, ParamsSrkl, Srkl};
    /// # use candle_nn::Optimizer;
    /// let w = Var::new(&[1f32, -2., 3.], &Device::Cpu)?;
    /// let params = ParamsSrkl { average: Some(Average::Exponential(0.98)), ..ParamsSrkl::braked_adam() };
    /// let mut opt = Srkl::new(vec![w.clone()], params)?;
    /// opt.backward_step_with(|| w.sqr()?.sum_all())?;
    /// {
    ///     let _averaged = opt.swap_averaged()?;
    ///     let validation = w.sqr()?.sum_all()?;
    /// }
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// No group with an average, or a step that waits for its measurement.
    pub fn swap_averaged(&mut self) -> Result<Averaged<'_>> {
        if !self.all.groups.iter().any(|group| group.params.average.is_some()) {
            bail!("`swap_averaged`: no group has an average; set `average` in its settings")
        }
        self.refuse_pending()?;
        self.engine.swap(&mut self.all)?;
        Ok(Averaged { opt: self })
    }
}
