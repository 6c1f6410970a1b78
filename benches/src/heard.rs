//! What the clients of a played workload were told, all together: of one device, or of a fleet. It has no clock.

use std::time::Duration;

use fullbore_engine::request::Usage;

use crate::statistics::Histogram;

#[derive(Default)]
pub(crate) struct Heard {
    pub ttft: Histogram,
    pub itl: Histogram,
    pub total: Histogram,
    pub num_completed: u32,
    /// Of those that were completed, as the next two are.
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
    pub last_token: Duration,
}

impl Heard {
    /// A token came `now`, to a request that came at `arrival` and had its `last` one then.
    pub fn token(&mut self, now: Duration, arrival: Duration, last: &mut Option<Duration>) {
        match last.replace(now) {
            None => self.ttft.record(now - arrival),
            Some(last) => self.itl.record(now - last),
        }
        self.last_token = now;
    }

    /// It ended well, with so many tokens.
    pub fn finished(&mut self, now: Duration, arrival: Duration, usage: Usage, num_tokens: u32) {
        self.num_completed += 1;
        self.prompt_tokens += u64::from(usage.prompt_tokens);
        self.cached_tokens += u64::from(usage.cached_tokens);
        self.output_tokens += u64::from(num_tokens);
        self.total.record(now - arrival);
    }
}
