//! A device that was lost, made anew by the thread that drives the engine.
//!
//! Whoever the device was working for is told at once; who only waits keeps waiting, and so does what is handed in
//! meanwhile. Invariant: attempts are counted over losses that follow one another, so that a device that is lost again
//! and again is given up like one that does not come back. While others of its fleet serve none is given up: nobody
//! waits for it, and whoever ends the process ends them too.

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::{ENDED, Worker, lock};
use crate::backend::DeviceError;
use crate::fleet::member::Member;

/// Attempts to make a device anew, before the engine ends where no other serves.
pub const MAX_ATTEMPTS: u32 = 6;
/// Before the second attempt, and doubled before each one after it: a driver that resets a GPU takes seconds.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Before the last attempt of [`MAX_ATTEMPTS`].
const LONGEST_ALONE: Duration = Duration::from_secs(4);
/// How often it is looked whether others serve still.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Doublings of it at most: 32 s.
const MAX_DOUBLINGS: u32 = 7;
/// A device that has served for so long has come back.
const PROVEN: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Attempts {
    num: u32,
    /// When the device was there again.
    recovered_at: Option<Instant>,
}

impl Attempts {
    /// The number of the next attempt, and the pause before it; `None` where there is none left. While `others_serve`
    /// there always is one.
    fn next(&mut self, now: Instant, others_serve: bool) -> Option<(u32, Duration)> {
        if self.recovered_at.take().is_some_and(|at| now.saturating_duration_since(at) >= PROVEN) {
            self.num = 0;
        }
        let before = self.num;
        self.num += 1;
        let doubled = |doublings: u32| FIRST_PAUSE * (1 << doublings.min(MAX_DOUBLINGS));
        let pause = before.checked_sub(1).map_or(Duration::ZERO, doubled);
        (before < MAX_ATTEMPTS || others_serve).then_some((self.num, pause))
    }
}

impl Worker {
    /// Tells those that the device was working for, and makes it anew. The error says why the engine has to end.
    pub(super) fn recover(&mut self, error: &DeviceError) -> Result<(), String> {
        if !matches!(error, DeviceError::Lost { .. }) || !self.engine.can_recover() {
            return Err(error.to_string());
        }
        tracing::error!(%error, "the device is made anew");
        let begun = Instant::now();
        lock(&self.shared.state).recovering = Some(format!("{error}; it is being made anew"));
        self.member.iter().for_each(Member::lost);
        let sentence = format!("{error}; it is being made anew, so try again shortly");
        self.engine.lose_device(&sentence);
        if self.member.is_some() {
            self.engine.lose_preempted(&sentence);
        }
        self.publish(begun);
        let mut last = error.to_string();
        let others_serve = |member: &Option<Member>| member.as_ref().is_some_and(Member::others_serve);
        while let Some((attempt, pause)) = self.attempts.next(Instant::now(), others_serve(&self.member)) {
            let now = format!("{error}; it is being made anew (attempt {attempt}, after {pause:?})");
            lock(&self.shared.state).recovering = Some(now);
            self.pause(pause, &others_serve)?;
            match self.engine.recover() {
                Ok(()) => {
                    self.attempts.recovered_at = Some(Instant::now());
                    tracing::info!(attempt, took_ms = begun.elapsed().as_secs_f64() * 1e3, "the device is there again");
                    self.publish(Instant::now());
                    lock(&self.shared.state).recovering = None;
                    self.member.iter().for_each(Member::recovered);
                    return Ok(());
                }
                Err(error) => {
                    tracing::warn!(attempt, %error, "the device could not be made anew");
                    last = error.to_string();
                }
            }
        }
        Err(format!(
            "{error}; {} attempts to make it anew did not bring it back for long, and the last one ended so: {last}; \
             see what its driver logs, and restart the server",
            self.attempts.num - 1
        ))
    }

    /// Takes requests in for so long, or until nobody else serves, where one alone would not wait so long; an error if
    /// the engine is to end.
    fn pause(&mut self, pause: Duration, others_serve: &impl Fn(&Option<Member>) -> bool) -> Result<(), String> {
        let until = Instant::now() + pause;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left.min(LOOK_INTERVAL)) {
                Ok(message) => {
                    if !self.take(message) {
                        return Err(ENDED.to_owned());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    let is_alone = pause > LONGEST_ALONE && !others_serve(&self.member);
                    if left <= LOOK_INTERVAL || is_alone {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(ENDED.to_owned()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pauses of as many attempts as are left, twelve at most.
    fn pauses(attempts: &mut Attempts, others_serve: bool) -> Vec<u64> {
        let now = Instant::now();
        let next = std::iter::from_fn(|| attempts.next(now, others_serve));
        next.map(|(_, pause)| pause.as_millis() as u64).take(12).collect()
    }

    #[test]
    fn pauses_double_and_attempts_end() {
        let mut attempts = Attempts::default();
        assert_eq!(pauses(&mut attempts, false), [0, 250, 500, 1000, 2000, 4000]);
        assert_eq!(attempts.next(Instant::now(), false), None);
    }

    #[test]
    fn a_device_is_not_given_up_while_others_serve() {
        let mut attempts = Attempts::default();
        let long = [8000, 16000, 32000, 32000, 32000, 32000];
        assert_eq!(pauses(&mut attempts, true), [&[0, 250, 500, 1000, 2000, 4000][..], &long].concat());
        // Once they do not, it has had its attempts.
        assert_eq!(attempts.next(Instant::now(), false), None);
    }

    #[test]
    fn a_device_that_is_lost_again_and_again_is_given_up_and_one_that_served_is_not() {
        let begun = Instant::now();
        let lose = |attempts: &mut Attempts, after: Duration| {
            let next = attempts.next(begun + after, false);
            attempts.recovered_at = next.map(|_| begun);
            next.map(|(number, _)| number)
        };
        let mut attempts = Attempts::default();
        let soon: Vec<Option<u32>> = (0..7).map(|_| lose(&mut attempts, PROVEN / 2)).collect();
        assert_eq!(soon, [Some(1), Some(2), Some(3), Some(4), Some(5), Some(6), None]);
        let mut attempts = Attempts::default();
        let late: Vec<Option<u32>> = (0..7).map(|_| lose(&mut attempts, PROVEN)).collect();
        assert_eq!(late, [Some(1); 7]);
    }
}
