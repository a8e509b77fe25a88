//! Events of the crate `tracing`, with the target `candle_srkl`. None of them waits for a device.

use tracing::{Level, debug, enabled, info, warn};

use super::Metrics;
use crate::engine::Remaining;
use crate::optimizer::Srkl;

const TARGET: &str = "candle_srkl";

impl Metrics {
    /// An event of level info for each parameter, with the fields of [`COLUMNS`](super::COLUMNS); what is `None` is left out.
    /// Needs feature `tracing`.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let w = Var::new(&[3f32, -4.], &Device::Cpu)?;
    /// let mut opt = Srkl::new(vec![w.clone()], ParamsSrkl::braked_adam())?;
    /// opt.backward_step_with(|| w.sqr()?.sum_all())?;
    /// opt.metrics()?.emit();
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn emit(&self) {
        if !enabled!(target: TARGET, Level::INFO) {
            return;
        }
        for parameter in &self.parameters {
            info!(
                target: TARGET,
                step = self.step,
                name = parameter.name,
                group = parameter.group,
                phi = parameter.phi,
                curvature = parameter.curvature,
                estimate_age = parameter.estimate_age,
                grad_norm = parameter.grad_norm,
                step_norm = parameter.step_norm,
                param_norm = parameter.param_norm,
                skipped = parameter.skipped,
                learning_rate = self.learning_rate,
                skipped_steps = self.skipped_steps,
                "parameter"
            );
        }
    }
}

impl Srkl {
    /// How many steps were skipped, if the host knows.
    pub(crate) fn skipped_at_hand(&self) -> Option<u64> {
        self.engine.counters_at_hand().map(|counters| counters.skipped_steps)
    }

    /// A step was counted; before it, the host knew of so many that were skipped.
    pub(crate) fn emit_step(&self, skipped_before: Option<u64>) {
        let step = self.measure_state.step_calls;
        let skipped = self.skipped_at_hand();
        if skipped > skipped_before {
            warn!(target: TARGET, step, skipped_steps = skipped, "step skipped: a gradient is not finite");
        } else {
            let measures = self.measure_state.awaiting_observe;
            debug!(target: TARGET, step, multiplier = self.multiplier(), measures, "step");
        }
    }

    /// A measurement has entered the estimates, or has left them out.
    pub(crate) fn emit_measurement(&self, remaining: &[Remaining]) {
        // By random vectors it comes before its step.
        let step = self.measure_state.step_calls + self.probes() as u64;
        let estimates = remaining.iter().filter(|(_, known)| *known).count();
        debug!(target: TARGET, step, parameters = remaining.len(), estimates, "curvature measured");
    }
}
