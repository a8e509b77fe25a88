//! What a step did, by parameter.

use candle_core::Result;

use crate::backend::Last;
use crate::optimizer::Srkl;
use crate::params::Direction;

/// What the last step did to one parameter: an entry of [`Srkl::telemetry`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct BlockTelemetry {
    /// The parameter's name.
    pub name: String,
    /// Its other names, where a [`VarMap`](candle_nn::VarMap) has several for one variable (tied weights). [`Srkl::master`] takes
    /// any of them.
    pub tied: Vec<String>,
    /// The name of its group.
    pub group: String,
    /// What its steps follow: the group's direction, but in a group of [`Direction::Muon`] that of Adam for what is not
    /// a matrix of a hidden layer.
    pub direction: Direction,
    /// The brake `phi`, from 0 to `s * lr`, after the trust clip (a NaN, if
    /// [`NonFinite::Propagate`](crate::NonFinite::Propagate) lets one pass). `None` if the last step did not move
    /// this parameter, and for [`Scope::Element`](crate::Scope::Element) and [`Scope::Mixed`](crate::Scope::Mixed),
    /// where every element has its own.
    pub phi: Option<f64>,
    /// The curvature `H` that `phi` was made from; with [`Curvature::GradSquare`], of the gradient as the rule used
    /// it (unscaled and clipped). An infinity after a measurement that was not finite. `None` as for `phi`, and if
    /// nothing has been measured yet.
    ///
    /// [`Curvature::GradSquare`]: crate::Curvature::GradSquare
    pub curvature: Option<f64>,
    /// Steps, taken and skipped, since the last measurement that entered the estimate of `H`. `None` before the
    /// first, and for curvature that is not measured.
    pub estimate_age: Option<u64>,
    /// `||g||_2`, the norm of the gradient of the last step: unscaled, before clipping. `None`, like the next two,
    /// unless [`Srkl::record_norms`] was on in that step and it moved this parameter.
    pub grad_norm: Option<f64>,
    /// `||D||_2`, the norm of the change that the last step made to the parameter, as stored in its dtype.
    pub step_norm: Option<f64>,
    /// `||w||_2`, the norm of the parameter as it is now.
    pub param_norm: Option<f64>,
    /// How often [`NonFinite::SkipBlock`](crate::NonFinite::SkipBlock) has skipped this parameter.
    pub skipped: u64,
}

impl Srkl {
    /// What the last step did, for each parameter in order. Costs nothing until asked. If norms were recorded and state is
    /// sharded, all ranks must call it.
    ///
    /// # Errors
    ///
    /// None on the CPU. (The numbers may live on a device, or on other ranks.)
    pub fn telemetry(&self) -> Result<Vec<BlockTelemetry>> {
        let own = || Ok((self.steps()? + self.skipped_steps()?, self.engine.outcomes(&self.all)?));
        let (now, outcomes) = match self.sharding_ranks() {
            Some(_) if self.records => self.agree_on("telemetry", own(), |_, _| Ok(vec![]))?,
            _ => own()?,
        };
        let param_norms = self.param_norms(&outcomes)?;
        let estimates = self.engine.estimates()?;
        let numbers = outcomes.into_iter().zip(param_norms).zip(estimates);
        let mut all = Vec::with_capacity(self.all.blocks.len());
        for (block, (((last, skipped), param_norm), estimate)) in
            self.all.blocks.iter().zip(numbers)
        {
            let group = &self.all.groups[block.group];
            let norms = last.and_then(|last| last.norms);
            let shared = last.filter(|_| !group.params.has_element_brakes());
            let telemetry = BlockTelemetry {
                name: block.name.clone(),
                tied: block.tied.clone(),
                group: group.name.clone(),
                direction: group.params.direction,
                curvature: shared.and_then(|last| last.curvature),
                phi: shared.map(|last| last.phi),
                estimate_age: estimate.age(now),
                grad_norm: norms.map(|[grad, _]| grad),
                step_norm: norms.map(|[_, step]| step),
                param_norm,
                skipped,
            };
            all.push((block.place, telemetry));
        }
        all.sort_by_key(|(place, _)| *place);
        Ok(all.into_iter().map(|(_, telemetry)| telemetry).collect())
    }

    /// Turns the norms of [`BlockTelemetry`] on or off, from the next step on. Default off. If state is sharded, all ranks must
    /// do so alike. (Those of parameters are
    /// computed when telemetry is asked for.)
    ///
    /// A step that records adds up two more sums in passes that it makes anyway. (If its settings need no sums over
    /// gradients, it reads these once more.) On a CUDA device its update goes element by element.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[3f32, -4.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    /// opt.record_norms(true);
    /// opt.backward_step_with(|| w.sqr()?.sum_all())?;
    /// let told = opt.telemetry()?.remove(0);
    /// assert_eq!(told.grad_norm, Some(10.));
    /// assert!(told.step_norm < Some(0.02) && told.param_norm < Some(5.));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn record_norms(&mut self, on: bool) {
        self.records = on;
    }

    /// For each block whose norms were recorded, the norm of the parameter as it is now.
    fn param_norms(&self, outcomes: &[(Option<Last>, u64)]) -> Result<Vec<Option<f64>>> {
        let recorded = |(last, _): &(Option<Last>, u64)| last.is_some_and(|l| l.norms.is_some());
        if !outcomes.iter().any(recorded) {
            return Ok(vec![None; outcomes.len()]);
        }
        let squares = self.done(self.engine.param_squares(&self.all))?.into_iter().zip(outcomes);
        Ok(squares.map(|(s, outcome)| Some(s?.sqrt()).filter(|_| recorded(outcome))).collect())
    }
}
