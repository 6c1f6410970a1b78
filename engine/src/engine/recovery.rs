//! After the device was lost: who is told, who keeps waiting, and everything again on the device made anew.
//!
//! Invariant: between [`Engine::lose_device`] and an [`Engine::recover`] that succeeds nothing points at the device,
//! and no step is planned. What it costs on the device is known as before: it is the same one.

use std::sync::Arc;

use super::Engine;
use super::step::{InFlight, Step};
use crate::backend::LoadError;
use crate::batch::SequenceId;
use crate::model::{Checkpoint, Model};
use crate::request::FinishReason;

impl Engine {
    /// Keeps what the model was loaded from, so that it can be loaded again.
    pub fn set_checkpoint(&mut self, checkpoint: impl Into<Arc<Checkpoint>>) {
        self.checkpoint = Some(checkpoint.into());
    }

    /// Whether the engine can go on after a loss.
    pub fn can_recover(&self) -> bool {
        self.checkpoint.is_some()
    }

    /// The device is gone, and all K and V with it: fails the requests that it was at with `sentence`. Those that only
    /// wait keep their places.
    pub fn lose_device(&mut self, sentence: &str) {
        while let Some(InFlight { step, .. }) = self.in_flight.pop_front() {
            self.drop_step(step);
        }
        self.drop_moves();
        self.is_device_lost = true;
        self.limits.lost(self.since_start(self.backend.now()));
        self.stats.num_device_losses += 1;
        for (id, usage) in self.scheduler.lose_device(&mut self.cache) {
            self.finish(id, FinishReason::DeviceLost(sentence.to_owned()), usage);
        }
        self.update_counts();
        self.update_sums();
    }

    /// After a loss: fails with `sentence` those that had begun and wait again too, where they can go on elsewhere.
    pub fn lose_preempted(&mut self, sentence: &str) {
        let begun = self.scheduler.queue().iter().filter(|sequence| sequence.cached_tokens.is_some());
        let ids: Vec<SequenceId> = begun.map(|sequence| sequence.id).collect();
        for id in ids {
            let usage = self.scheduler.abort(&mut self.cache, id).expect("it waits");
            self.finish(id, FinishReason::DeviceLost(sentence.to_owned()), usage);
        }
        self.update_counts();
        self.update_sums();
    }

    /// Opens the device anew and loads the model onto it. After an error it may be tried again.
    pub fn recover(&mut self) -> Result<(), LoadError> {
        assert!(self.is_device_lost, "the device is there");
        let checkpoint = self.checkpoint.clone().expect("only what was kept can be loaded again");
        self.backend.reopen()?;
        let (config, limits) = (self.model.config.clone(), self.config.state_limits());
        self.model = Model::load(config, limits, &checkpoint, self.backend.as_mut(), &mut |_| {})?;
        self.recording = self.model.recording();
        self.enable_swap()?;
        self.warm_up()?;
        self.is_device_lost = false;
        self.turn_from_step();
        self.update_sums();
        Ok(())
    }

    /// A step that was submitted will not be completed.
    pub(super) fn drop_step(&mut self, step: Step) {
        if let Some(neighbours) = &self.neighbours {
            neighbours.ended(step.company);
        }
        self.spare.push(step);
    }
}
