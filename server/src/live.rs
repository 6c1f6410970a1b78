//! What an engine was at lately: one frame a second, so that a live view opened late still sees the last minutes.
//!
//! Invariant: bounded, and made of what `/metrics` and `/v1/limits` say; a frame is the difference between two readings
//! of the counters. Nothing on the way of a request waits for it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fullbore_engine::engine::EngineStats;
use fullbore_engine::limits::{Cause, NUM_CAUSES};
use fullbore_engine::memory::BlockCounts;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::api::ServedModel;
use crate::http::App;
use crate::http::metrics::{BucketCounts, Quantiles};

/// Between two frames.
pub const PERIOD: Duration = Duration::from_secs(1);
/// Frames that are kept: five minutes.
const NUM_FRAMES: usize = 300;
/// Percentiles of a frame are of so many periods, so that a few requests a second make a line.
const NUM_QUANTILE_PERIODS: usize = 10;

/// One period.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// Its end in Unix milliseconds; later than that of any frame before.
    pub at_ms: u64,
    pub period: Duration,
    /// Device time that was charged meanwhile, by cause. A step's is charged when it has ended, so that a period within
    /// a long step has none and the next has more than its own length.
    pub device_ns: [u64; NUM_CAUSES],
    pub num_steps: u64,
    /// Rows of those steps.
    pub num_rows: u64,
    pub prefill_tokens: u64,
    pub generated_tokens: u64,
    /// Those by device.
    pub device_tokens: Vec<u64>,
    pub num_preemptions: u64,
    /// At its end.
    pub num_running: u32,
    pub num_waiting: u64,
    pub blocks: BlockCounts,
    /// Of the last [`NUM_QUANTILE_PERIODS`].
    pub first_token: Option<Quantiles>,
    pub next_token: Option<Quantiles>,
}

/// Counters as they stand.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    pub at_ms: u64,
    pub stats: EngineStats,
    /// Tokens generated, by device.
    pub device_tokens: Vec<u64>,
    pub num_waiting: u64,
    pub first_token: BucketCounts,
    pub next_token: BucketCounts,
}

#[derive(Default)]
pub struct History(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    frames: VecDeque<Frame>,
    /// The newest last.
    readings: VecDeque<Reading>,
}

impl History {
    /// Frames that ended after `after_ms`, the oldest first.
    pub fn after(&self, after_ms: u64) -> Vec<Frame> {
        self.lock().frames.iter().filter(|frame| frame.at_ms > after_ms).cloned().collect()
    }

    /// The first reading makes no frame; each later one does.
    pub fn push(&self, mut reading: Reading, period: Duration) {
        let mut kept = self.lock();
        if let Some(last) = kept.readings.back() {
            // The machine's clock may be set back.
            reading.at_ms = reading.at_ms.max(last.at_ms + 1);
            let oldest = kept.readings.front().expect("there is a last");
            let frame = Frame::between(last, &reading, oldest, period);
            kept.frames.push_back(frame);
        }
        kept.readings.push_back(reading);
        if kept.readings.len() > NUM_QUANTILE_PERIODS {
            kept.readings.pop_front();
        }
        if kept.frames.len() > NUM_FRAMES {
            kept.frames.pop_front();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Frame {
    fn between(last: &Reading, now: &Reading, oldest: &Reading, period: Duration) -> Frame {
        let of = |counter: fn(&EngineStats) -> u64| counter(&now.stats).saturating_sub(counter(&last.stats));
        let mut device_ns = [0; NUM_CAUSES];
        for cause in Cause::ALL {
            let charged = |reading: &Reading| reading.stats.limits.total.ns(cause);
            device_ns[cause as usize] = charged(now).saturating_sub(charged(last));
        }
        let before = last.device_tokens.iter().chain(std::iter::repeat(&0));
        let device_tokens = now.device_tokens.iter().zip(before).map(|(now, last)| now.saturating_sub(*last));
        let device_tokens: Vec<u64> = device_tokens.collect();
        Frame {
            at_ms: now.at_ms,
            period,
            device_ns,
            num_steps: of(|stats| stats.num_steps),
            num_rows: of(|stats| stats.limits.total.num_tokens),
            prefill_tokens: of(|stats| stats.prefill_tokens),
            generated_tokens: device_tokens.iter().sum(),
            device_tokens,
            num_preemptions: of(|stats| stats.num_preemptions),
            num_running: now.stats.num_running,
            num_waiting: now.num_waiting,
            blocks: now.stats.blocks,
            first_token: now.first_token.quantiles_since(&oldest.first_token),
            next_token: now.next_token.quantiles_since(&oldest.next_token),
        }
    }
}

impl Reading {
    fn take(model: &ServedModel) -> Reading {
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let [first_token, next_token] = model.metrics.latencies();
        let (stats, num_waiting) = (model.engine.stats(), model.engine.num_waiting());
        let device_tokens = model.engine.engines().iter().map(|engine| engine.stats().generated_tokens).collect();
        Reading { at_ms, stats, device_tokens, num_waiting, first_token, next_token }
    }
}

/// Reads once a period, from when there are models until `stop` says so.
pub async fn keep_history(app: Arc<App>, mut stop: watch::Receiver<bool>) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let period = last.elapsed();
        last = Instant::now();
        for model in app.models() {
            model.history.push(Reading::take(model), period);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(at_ms: u64, generated_tokens: u64) -> Reading {
        let stats = EngineStats { num_running: 3, ..EngineStats::default() };
        Reading { at_ms, stats, device_tokens: vec![generated_tokens, 7], ..Reading::default() }
    }

    #[test]
    fn a_frame_is_what_came_between_two_readings() {
        let history = History::default();
        for (at_ms, tokens) in [(1000, 50), (2000, 80), (3000, 80)] {
            history.push(reading(at_ms, tokens), PERIOD);
        }
        let frames = history.after(0);
        let tokens: Vec<_> = frames.iter().map(|frame| (frame.at_ms, frame.generated_tokens)).collect();
        assert_eq!(tokens, [(2000, 30), (3000, 0)]);
        assert_eq!(frames[0].num_running, 3);
        assert_eq!(history.after(2000).len(), 1);
        assert!(history.after(3000).is_empty());
    }

    #[test]
    fn old_frames_go_and_their_ends_stay_in_order() {
        let history = History::default();
        // A clock that is set back half way.
        for second in 0..2000_u64 {
            history.push(reading(if second < 1000 { second * 1000 } else { 5000 }, second), PERIOD);
        }
        let frames = history.after(0);
        assert_eq!(frames.len(), NUM_FRAMES);
        assert!(frames.windows(2).all(|pair| pair[0].at_ms < pair[1].at_ms));
        assert_eq!(frames.iter().map(|frame| frame.generated_tokens).sum::<u64>(), NUM_FRAMES as u64);
    }
}
