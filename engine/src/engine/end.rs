//! How sequences leave an engine: at their end, with their client, or for another engine.
//!
//! Invariant: whoever leaves has left its blocks, and is counted once; servers log requests, and this only
//! where somebody looks for what a device did of one.

use std::time::Instant;

use super::{Client, Engine};
use crate::batch::SequenceId;
use crate::request::{Event, FinishReason, Usage};
use crate::sampling;

impl Engine {
    /// Ends a sequence in any phase; its blocks are free at once.
    pub fn abort(&mut self, id: SequenceId) {
        let Some(client) = self.clients.remove(&id) else { return };
        let usage = self.scheduler.abort(&mut self.cache, id).unwrap_or_default();
        self.count_end(&client);
        let (count, word) = match client.sink.has_moved() {
            true => (&mut self.stats.num_moved, "moved"),
            false => (&mut self.stats.num_aborted, "aborted"),
        };
        *count += 1;
        log_end(&client, word, usage, self.backend.now());
    }

    /// Ends a running sequence as a stop id does; its blocks are free at once.
    pub(super) fn stop(&mut self, id: SequenceId) {
        let usage = self.scheduler.abort(&mut self.cache, id).expect("what has just sampled a token is there");
        self.finish(id, FinishReason::Stop, usage);
    }

    /// Tells every client that the engine has ended, and why.
    pub fn fail_all(&mut self, sentence: &str) {
        self.drop_moves();
        let ids: Vec<SequenceId> = self.clients.keys().copied().collect();
        for id in ids {
            let usage = self.scheduler.abort(&mut self.cache, id).unwrap_or_default();
            self.finish(id, FinishReason::Error(sentence.to_owned()), usage);
        }
        self.update_counts();
        self.update_sums();
    }

    pub(super) fn finish(&mut self, id: SequenceId, reason: FinishReason, usage: Usage) {
        let Some(mut client) = self.clients.remove(&id) else { return };
        self.count_end(&client);
        client.sink.event(Event::Finished { reason: reason.clone(), usage });
        if client.sink.has_moved() {
            self.stats.num_moved += 1;
            return log_end(&client, "moved", usage, self.device_free_at);
        }
        self.stats.prompt_tokens += u64::from(usage.prompt_tokens);
        self.stats.cached_tokens += u64::from(usage.cached_tokens);
        let (count, word) = match &reason {
            FinishReason::Stop => (&mut self.stats.num_stopped, "stop"),
            FinishReason::Length => (&mut self.stats.num_length, "length"),
            FinishReason::Error(sentence)
            | FinishReason::Contradiction(sentence)
            | FinishReason::DeviceLost(sentence) => (&mut self.stats.num_failed, sentence.as_str()),
        };
        *count += 1;
        self.stats.num_not_finite += u64::from(word == sampling::NOT_FINITE);
        log_end(&client, word, usage, self.device_free_at);
    }
}

fn log_end(client: &Client, reason: &str, usage: Usage, now: Instant) {
    let since = |at: Instant| (at - client.arrived).as_secs_f64() * 1e3;
    tracing::debug!(
        id = client.request.id,
        reason,
        prompt_tokens = usage.prompt_tokens,
        cached_tokens = usage.cached_tokens,
        completion_tokens = usage.completion_tokens,
        ttft_ms = client.first_token.map(since),
        total_ms = since(now),
        "request ended"
    );
}
