//! Parameters that are frozen for a while.

use candle_core::{Result, bail};

use crate::block::Block;
use crate::optimizer::Srkl;
use crate::ranks::claim;

impl Srkl {
    /// Freezes the parameters for which `which` is true of any of their names, from the next step on: they do not move, decay or
    /// count in sums over all parameters, and their gradients are not looked at. Their state stays, and takes its memory, for
    /// [`unfreeze`](Self::unfreeze). (To be rid of it: [`remove_parameters`](Self::remove_parameters).)
    ///
    /// A group of [`lr`](crate::ParamsSrkl::lr) 0 is frozen too, without a call. A checkpoint has what is frozen, and
    /// [`load`](Self::load) takes it from there. Estimates of curvature stay, but for those of
    /// [`Scope::Global`](crate::Scope::Global), which are one of all.
    ///
    /// Candle computes gradients of frozen parameters all the same, unless the model detaches them.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_nn::Optimizer;
    /// use candle_srkl::{ParamsSrkl, Srkl};
    ///
    /// let (body, head) = (Var::new(1f32, &Device::Cpu)?, Var::new(1f32, &Device::Cpu)?);
    /// let mut opt = Srkl::builder()
    ///     .default_group(ParamsSrkl::adamw(0.1))
    ///     .build([("body.w".to_string(), body.clone()), ("head.w".to_string(), head.clone())])?;
    /// let loss = || (body.sqr()? + head.sqr()?);
    ///
    /// opt.freeze(|name| name.starts_with("body."))?;
    /// opt.backward_step(&loss()?)?;
    /// assert_eq!(body.to_scalar::<f32>()?, 1.);
    /// assert!(head.to_scalar::<f32>()? < 1.);
    ///
    /// opt.unfreeze(|_| true)?;
    /// opt.backward_step(&loss()?)?;
    /// assert!(body.to_scalar::<f32>()? < 1.);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// If there are several ranks, all must call it, for the same parameters.
    ///
    /// # Errors
    ///
    /// `which` is true for none of the parameters; a step that waits for its measurement; a learning rate that `step` would refuse; a
    /// capture of a CUDA stream. Nothing has changed then.
    pub fn freeze(&mut self, which: impl Fn(&str) -> bool) -> Result<()> {
        let chosen = self.named_by("freeze", which);
        self.set_frozen("freeze", chosen, true)
    }

    /// Steps the parameters again for which `which` is true of any of their names: they go on with the state that they had when
    /// they were [frozen](Self::freeze). Without effect on others. One without an estimate of the curvature that its group measures
    /// makes the next step measure.
    ///
    /// # Errors
    ///
    /// As [`freeze`](Self::freeze).
    pub fn unfreeze(&mut self, which: impl Fn(&str) -> bool) -> Result<()> {
        let chosen = self.named_by("unfreeze", which);
        self.set_frozen("unfreeze", chosen, false)
    }

    /// [`freeze`](Self::freeze) for the parameters that a group has now. (Those that are [added](Self::add_parameters) later are
    /// not frozen.)
    ///
    /// # Errors
    ///
    /// As [`freeze`](Self::freeze); no group of that name, or one without parameters.
    pub fn freeze_group(&mut self, group: &str) -> Result<()> {
        let chosen = self.of_group("freeze_group", group);
        self.set_frozen("freeze_group", chosen, true)
    }

    /// [`unfreeze`](Self::unfreeze) for the parameters of a group.
    ///
    /// # Errors
    ///
    /// As [`freeze_group`](Self::freeze_group).
    pub fn unfreeze_group(&mut self, group: &str) -> Result<()> {
        let chosen = self.of_group("unfreeze_group", group);
        self.set_frozen("unfreeze_group", chosen, false)
    }

    /// The names of the parameters that are [frozen](Self::freeze), in the order in which they were given. (Those of groups of
    /// `lr` 0 are not among them.)
    #[must_use]
    pub fn frozen(&self) -> Vec<&str> {
        let frozen = self.all.blocks.iter().filter(|block| self.all.is_frozen(block));
        let mut frozen: Vec<&Block> = frozen.collect();
        frozen.sort_by_key(|block| block.place);
        frozen.into_iter().map(|block| block.name.as_str()).collect()
    }

    /// For each block, in order, whether any of its names is chosen.
    pub(crate) fn named_by(&self, call: &str, which: impl Fn(&str) -> bool) -> Result<Vec<bool>> {
        let chosen = |b: &Block| which(&b.name) || b.tied.iter().any(|tied| which(tied));
        let chosen: Vec<bool> = self.all.blocks.iter().map(chosen).collect();
        match chosen.contains(&true) {
            true => Ok(chosen),
            false => bail!(
                "`{call}`: none of the {} parameters has a name that was asked for",
                self.all.blocks.len()
            ),
        }
    }

    /// For each block, in order, whether it is in this group.
    fn of_group(&self, call: &str, group: &str) -> Result<Vec<bool>> {
        if self.params(group).is_none() {
            bail!("`{call}`: no parameter group `{group}`")
        }
        let is_in = |block: &Block| self.all.groups[block.group].name == group;
        let chosen: Vec<bool> = self.all.blocks.iter().map(is_in).collect();
        match chosen.contains(&true) {
            true => Ok(chosen),
            false => bail!("`{call}`: group `{group}` has no parameters"),
        }
    }

    fn set_frozen(&mut self, call: &str, chosen: Result<Vec<bool>>, frozen: bool) -> Result<()> {
        let ready = chosen.and_then(|chosen| {
            self.scalars()?;
            self.refuse_pending()?;
            self.engine.refuse_capture(&format!("`{call}`"))?;
            Ok(chosen)
        });
        let claims = |chosen: &Vec<bool>, blocks: &[Block]| {
            let names = blocks.iter().zip(chosen).filter(|(_, chosen)| **chosen);
            let names: Vec<&str> = names.map(|(block, _)| block.name.as_str()).collect();
            Ok(vec![claim("the parameters", names.join(", "))])
        };
        let chosen = self.agree_on(call, ready, claims)?;
        let changed =
            |(block, chosen): (&Block, &bool)| *chosen && self.all.is_frozen(block) != frozen;
        let changed: Vec<bool> = self.all.blocks.iter().zip(&chosen).map(changed).collect();
        // While frozen, a parameter without a direction passes for one that there is nothing to measure of.
        let measured = self.measure_schedule.is_some() && !frozen;
        let estimates = if measured { self.done(self.engine.estimates())? } else { vec![] };
        let before: Vec<usize> = self.all.blocks.iter().map(|block| block.group).collect();
        let places = chosen.iter().enumerate().filter(|(_, chosen)| **chosen);
        places.for_each(|(place, _)| self.all.set_frozen(place, frozen));
        let sent = self.upload_settings().inspect_err(|_| {
            self.all.blocks.iter_mut().zip(before).for_each(|(block, group)| block.group = group);
        });
        self.done(sent)?;
        self.note_stepped(&changed, estimates);
        Ok(())
    }
}
