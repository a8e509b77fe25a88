//! Steps by the gradients of several micro-batches.

use candle_core::backprop::GradStore;
use candle_core::{Error, Result, Tensor, bail};

use crate::measuring::Perturbed;
use crate::micro_batches::{Accumulated, Reduction, add, leaf, tree};
use crate::optimizer::{Reduced, Srkl};

impl Srkl {
    /// Adds the gradients of a micro-batch to those of the next [`step_accumulated`](Self::step_accumulated), which steps by
    /// their **mean**, or by their sum if [`set_reduction`](Self::set_reduction) says so.
    ///
    /// They are added up in f32 (f64 for f64 gradients and parameters), whatever their dtype, by a tree over the micro-batches
    /// whose shape depends on their number alone. With several ranks ([`SrklBuilder::collective`](crate::SrklBuilder::collective))
    /// the tree goes on over these, so that the same micro-batches give the same bits for any power of two of ranks. A
    /// parameter without a gradient in some micro-batch is left out there; it counts as 0 in the mean or sum.
    ///
    /// Memory: beside the gradients that are given one sum of all parameters in f32 for each 1 in the number of micro-batches
    /// so far, in binary: one for 1, 2, 4 or 8 of them, and three for 7.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(2f32, &Device::Cpu)?;
    /// let mut opt = Srkl::builder()
    ///     .default_group(ParamsSrkl::sgd(0.5))
    ///     .build([("w".to_string(), w.clone())])?;
    /// for x in [1., 3.] {
    ///     let loss = (w.as_tensor() * x)?;
    ///     opt.accumulate(&loss.backward()?)?;
    /// }
    /// opt.step_accumulated()?;
    /// assert_eq!(w.to_scalar::<f32>()?, 1.);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// A plain mean of losses or gradients of your own, given to [`step`](candle_nn::Optimizer::step), is right too; its bits
    /// depend on how the micro-batches are distributed over ranks.
    ///
    /// The gradients are copied, so that their memory may be used again. A checkpoint has nothing of them;
    /// [`load`](Self::load), [`load_state`](Self::load_state) and [`restore`](Self::restore) forget them, since they were computed at
    /// other parameters. Meanwhile the [gradient scale](Self::set_grad_scale) stays, which their losses have been multiplied by. A step in
    /// a capture of a CUDA stream is by one micro-batch.
    ///
    /// # Errors
    ///
    /// A gradient of another shape or device, or of a dtype that `step` would refuse. Nothing has changed then.
    pub fn accumulate(&mut self, grads: &GradStore) -> Result<()> {
        self.accumulated.push(leaf(&self.all.blocks, grads, true)?)
    }

    /// Whether steps go by the mean of the gradients of several micro-batches, which is so unless set, or by their sum:
    /// [`step_accumulated`](Self::step_accumulated), [`backward_step_over`](Self::backward_step_over), all measurements, and with several
    /// ranks every step. A setting: checkpoints do not have it, and all ranks must set it alike.
    ///
    /// With [`Reduction::Sum`] micro-batches of different sizes count by their samples: let each loss be the sum over its samples
    /// divided by the number of all of them, those of other micro-batches and ranks included.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Reduction, Srkl};
    ///
    /// let w = Var::new(2f32, &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::sgd(0.5))?;
    /// opt.set_reduction(Reduction::Sum)?;
    /// for x in [1., 2.] {
    ///     opt.accumulate(&(w.as_tensor() * x)?.backward()?)?;
    /// }
    /// opt.step_accumulated()?;
    /// assert_eq!(w.to_scalar::<f32>()?, 0.5);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A step that waits for its measurement, which needs the old one. That stays.
    pub fn set_reduction(&mut self, reduction: Reduction) -> Result<()> {
        self.refuse_pending()?;
        let old = std::mem::replace(&mut self.reduction, reduction);
        self.upload_settings().inspect_err(|_| self.reduction = old)
    }

    /// What [`set_reduction`](Self::set_reduction) has set.
    #[must_use]
    pub fn reduction(&self) -> Reduction {
        self.reduction
    }

    /// How many micro-batches have been [accumulated](Self::accumulate) since the last step of them.
    #[must_use]
    pub fn accumulated(&self) -> u64 {
        self.accumulated.count
    }

    /// Forgets what has been [accumulated](Self::accumulate).
    pub fn clear_accumulated(&mut self) {
        self.accumulated = Accumulated::default();
    }

    /// One step by the mean (or [sum](Self::set_reduction)) of what has been [accumulated](Self::accumulate), which is forgotten then. If it measures
    /// ([`Srkl::measuring`]), accumulate the same micro-batches again at the new parameters and call
    /// [`observe_accumulated`](Self::observe_accumulated); or use
    /// [`backward_step_over`](Self::backward_step_over), which does all of this.
    ///
    /// # Errors
    ///
    /// Those of [`step`](candle_nn::Optimizer::step), and nothing accumulated. What has been accumulated stays.
    pub fn step_accumulated(&mut self) -> Result<()> {
        self.consume_accumulated("step_accumulated", Self::step_by)
    }

    /// [`Srkl::observe`] with the mean of what has been [accumulated](Self::accumulate): the same micro-batches as in the step.
    ///
    /// # Errors
    ///
    /// Those of [`Srkl::observe`], and another number of micro-batches than in the step. What has been accumulated stays.
    pub fn observe_accumulated(&mut self) -> Result<()> {
        self.consume_accumulated("observe_accumulated", Self::observe_by)
    }

    /// [`Srkl::perturb`] by the mean of what has been [accumulated](Self::accumulate), which stays for the step. Accumulate the
    /// same micro-batches again in what it returns, and call [`observe_accumulated`](Perturbed::observe_accumulated) of that.
    ///
    /// # Errors
    ///
    /// Those of [`Srkl::perturb`], and nothing accumulated.
    pub fn perturb_accumulated(&mut self) -> Result<Perturbed<'_>> {
        let (grads, count) = self.total_of("perturb_accumulated")?;
        self.perturb_by(Reduced::Sum(grads), count)
    }

    /// The mean of numbers of all ranks, for instance of the losses that [`backward_step_over`](Self::backward_step_over) has
    /// returned: of this rank's micro-batches `own`, of one shape and float dtype. The same on all, and whatever the number of
    /// ranks if each has a power of two of them.
    ///
    /// With several ranks all of them must call it, and it waits for a device that the numbers are on.
    ///
    /// # Errors
    ///
    /// No numbers, or others than on other ranks in number, shape or dtype.
    pub fn mean_over_ranks(&mut self, own: &[Tensor]) -> Result<Tensor> {
        let count = (own.len() * self.world_size()) as f64;
        let sum =
            tree(own.iter().map(|x| Some(x.detach())).collect(), add).and_then(|sum| match sum {
                Some(sum) => Ok(sum),
                None => bail!("`mean_over_ranks`: expected at least one tensor, got none"),
            });
        match (sum, &self.ranks) {
            (Ok(sum), None) => sum / count,
            (Ok(sum), Some(ranks)) => {
                ranks.sum_of(&sum, own.len())?.to_device(sum.device())? / count
            }
            (Err(e), _) => self.refuse(e),
        }
    }

    fn total_of(&mut self, call: &str) -> Result<(GradStore, u64)> {
        let Accumulated { count, .. } = self.accumulated;
        if count == 0 {
            return self.refuse(Error::msg(format!("`{call}`: nothing has been accumulated")));
        }
        Ok((self.accumulated.total()?, count))
    }

    /// Gives what has been accumulated to `take`; it stays if that fails before the step, or the measurement, is done.
    fn consume_accumulated(
        &mut self,
        call: &str,
        take: impl FnOnce(&mut Self, &GradStore, u64) -> Result<()>,
    ) -> Result<()> {
        let (grads, count) = self.total_of(call)?;
        // Gone before the scale follows the step.
        let accumulated = std::mem::take(&mut self.accumulated);
        let place = |opt: &Self| (opt.measure_state.step_calls, opt.measure_state.awaiting_observe);
        let before = place(self);
        let done = take(self, &grads, count);
        if done.is_err() && place(self) == before {
            self.accumulated = accumulated;
        }
        done
    }

    /// The sum of the gradients of `count` losses, and the losses.
    pub(crate) fn sum_gradients<E: From<candle_core::Error>>(
        &self,
        count: usize,
        mut backward: impl FnMut(usize) -> std::result::Result<(Tensor, GradStore), E>,
    ) -> std::result::Result<(Vec<Tensor>, GradStore), E> {
        if count == 1 {
            let (loss, grads) = backward(0)?;
            return Ok((vec![loss], grads));
        }
        let mut losses = vec![];
        let mut sum = Accumulated::default();
        for i in 0..count {
            let (loss, grads) = backward(i)?;
            losses.push(loss);
            sum.push(leaf(&self.all.blocks, &grads, false)?)?;
        }
        Ok((losses, sum.total()?))
    }
}
