//! What an engine says of itself: plain counts, and for forecasts who begins and ends and what it does now.

use super::{Client, Engine};
use crate::cost::StepShape;
use crate::forecast::Load;
use crate::limits::Phase;
use crate::request::{Event, Flow};

impl Engine {
    /// What runs now and how fast, for a forecast of what comes next. O(running sequences).
    pub fn load(&self) -> Load {
        let begun = self.scheduler.begun();
        let counts = self.cache.counts();
        let block_size = u64::from(self.config.block_size);
        let free_tokens = u64::from(counts.total - counts.referenced) * block_size;
        let step_ns = (self.stats.last_step_ms * 1e6) as u64;
        Load {
            num_running: self.scheduler.num_running(),
            free_slots: self.config.max_num_seqs - self.scheduler.num_running(),
            free_tokens: free_tokens.saturating_sub(begun.num_tokens),
            begun_tokens: begun.num_tokens,
            service_ns: self.meter.service_ns(self.now_ns()),
            computed_share: self.meter.computed_share(),
            num_in_flight: self.in_flight.len() as u32,
            pace: self.meter.pace(self.scheduler.pace(&begun.decodes, step_ns)),
            idle_pace: self.cost().is_known().then(|| self.scheduler.pace(&StepShape::default(), step_ns)),
        }
    }

    /// Tells those that got their first slot in the step that was submitted last.
    pub(super) fn tell_started(&mut self) {
        if self.in_flight.back().is_none_or(|newest| newest.step.trace.admitted.is_empty()) {
            return;
        }
        self.turn_to(Phase::ReadBack);
        let now_ns = self.now_ns();
        let newest = self.in_flight.back_mut().expect("a step was submitted");
        let admitted = std::mem::take(&mut newest.step.trace.admitted);
        for &(id, cached_tokens) in &admitted {
            let Some(client) = self.clients.get_mut(&id).filter(|client| client.started_ns.is_none()) else { continue };
            client.started_ns = Some(now_ns);
            self.stats.grammar_bytes += client.grammar_bytes();
            let num_tokens = client.request.prompt.len() + client.request.generated.len();
            self.meter.started(now_ns, num_tokens as u32, cached_tokens);
            if client.sink.event(Event::Started { cached_tokens }) == Flow::Stop {
                self.abort(id);
            }
        }
        self.in_flight.back_mut().expect("a step was submitted").step.trace.admitted = admitted;
        self.turn_to(Phase::Schedule);
    }

    /// `client` is gone; whether its sequence ever began, it knows.
    pub(super) fn count_end(&mut self, client: &Client) {
        self.stats.grammar_bytes -= client.grammar_bytes();
        if let Some(started_ns) = client.started_ns {
            self.meter.ended(started_ns, self.now_ns());
        }
    }

    pub(super) fn update_counts(&mut self) {
        self.stats.num_running = self.scheduler.num_running();
        self.stats.num_waiting = self.scheduler.queue().len() as u32;
        self.stats.num_swapped_blocks = self.scheduler.num_swapped_blocks();
        self.stats.num_preempted = self.scheduler.queue().num_preempted();
        self.stats.blocks = self.cache.counts();
    }

    /// What takes O(rows), or sums over a minute: once a step.
    pub(super) fn update_sums(&mut self) {
        self.stats.unused_kv_slots = self.scheduler.unused_kv_slots();
        self.stats.limits = self.limits.snapshot();
    }

    fn now_ns(&self) -> u64 {
        (self.backend.now() - self.created_at).as_nanos() as u64
    }
}
