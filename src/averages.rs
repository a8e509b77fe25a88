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
    /// Whether there are averages to swap in: whether any group has [`ParamsSrkl::average`](crate::ParamsSrkl::average).
    #[must_use]
    pub fn averages(&self) -> bool {
        self.all.any(|params| params.average.is_some())
    }

    /// Replaces the parameters by their averages ([`ParamsSrkl::average`](crate::ParamsSrkl::average)), rounded to
    /// their dtype, until the guard is dropped. A parameter that has not been stepped yet stays as it is.
    ///
    /// If state is sharded, all ranks must call it.
    ///
    /// Numbers that a model computes besides its parameters are not averaged: the running statistics of batch norm stay
    /// those of the training weights, and should be computed anew for the averages, by some batches in training mode.
    /// (They are variables of the model, but have no gradient: [`Srkl::untrained`] lists them.)
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
        let ready = self.ready_to_swap();
        match self.sharding_ranks() {
            Some(_) => self.agree_on("swap_averaged", ready, |(), _| Ok(vec![]))?,
            None => ready?,
        }
        let swapped = self.engine.swap(&mut self.all);
        match self.sharding_ranks() {
            Some(ranks) => ranks.or_abort(swapped)?,
            None => swapped?,
        }
        Ok(Averaged { opt: self })
    }

    fn ready_to_swap(&self) -> Result<()> {
        if !self.averages() {
            bail!("`swap_averaged`: no group has an average; set `average` in its settings")
        }
        self.refuse_pending()
    }
}
