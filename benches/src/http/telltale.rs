//! A simulated device whose tokens tell which step chose them, so that a client knows when each of its tokens was made.
//!
//! Invariant: step n gives every row the letter n modulo [`NUM_LETTERS`], at the time that is noted for it: when the
//! device hands the step's choices to the engine.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use fullbore_engine::backend::around::Around;
use fullbore_engine::backend::sim::SimBackend;
use fullbore_engine::backend::{Backend, DeviceError, Ticket};
use fullbore_engine::op::CHOSEN_WORDS;

/// One character a token, and none that JSON writes otherwise.
const LETTERS: &[u8] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
pub const NUM_LETTERS: usize = LETTERS.len();

pub struct Telltale {
    sim: SimBackend,
    /// Token ids of the letters.
    ids: Vec<u32>,
    steps: Steps,
}

/// The steps of a [`Telltale`]; clones share them.
#[derive(Clone, Default)]
pub struct Steps(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// When each was handed over.
    ended: Mutex<Vec<Instant>>,
    is_held: Mutex<bool>,
    released: Condvar,
}

impl Telltale {
    /// `id` is the token that a letter is in the simulated model's vocabulary.
    pub fn new(sim: SimBackend, id: impl Fn(u8) -> u32) -> Telltale {
        Telltale { sim, ids: LETTERS.iter().map(|letter| id(*letter)).collect(), steps: Steps::default() }
    }

    pub fn steps(&self) -> Steps {
        self.steps.clone()
    }
}

impl Steps {
    /// No step ends until this is released.
    pub fn hold(&self, is_held: bool) {
        *self.0.is_held.lock().unwrap_or_else(PoisonError::into_inner) = is_held;
        self.0.released.notify_all();
    }

    /// When all have ended so far.
    pub fn ended(&self) -> Vec<Instant> {
        self.0.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn pass(&self) {
        let is_held = self.0.is_held.lock().unwrap_or_else(PoisonError::into_inner);
        let released = self.0.released.wait_while(is_held, |is_held| *is_held);
        drop(released.unwrap_or_else(PoisonError::into_inner));
    }

    /// Notes the end of a step, and gives its number.
    fn end(&self) -> usize {
        let mut ended = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.push(Instant::now());
        ended.len() - 1
    }
}

/// When the token that was received as `letter` at `received` was made, given the steps' ends: by the last step before
/// that whose letter it is. One that came more than [`NUM_LETTERS`] steps late would look younger than it is.
pub fn made_at(ended: &[Instant], letter: u8, received: Instant) -> Option<Instant> {
    let letter = LETTERS.iter().position(|known| *known == letter)?;
    let last = ended.partition_point(|ended| *ended <= received).checked_sub(1)?;
    let age = (last + NUM_LETTERS - letter) % NUM_LETTERS;
    Some(ended[last.checked_sub(age)?])
}

impl Around for Telltale {
    fn inner(&self) -> &dyn Backend {
        &self.sim
    }

    fn inner_mut(&mut self) -> &mut dyn Backend {
        &mut self.sim
    }

    /// Rows are all that a step downloads where nobody asks for more.
    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        let before = out.len();
        let ran = self.sim.wait(ticket, out)?;
        self.steps.pass();
        let id = self.ids[self.steps.end() % NUM_LETTERS].to_le_bytes();
        for row in out[before..].chunks_exact_mut(4 * CHOSEN_WORDS as usize) {
            row[..id.len()].copy_from_slice(&id);
        }
        Ok(ran)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_letter_tells_its_step() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let ended: Vec<Instant> = (0..200).map(|step| at(10 * step)).collect();
        for (step, delay_ms) in [(0, 0), (3, 9), (61, 10), (62, 605), (150, 490)] {
            let letter = LETTERS[step % NUM_LETTERS];
            assert_eq!(made_at(&ended, letter, at(10 * step as u64 + delay_ms)), Some(at(10 * step as u64)), "{step}");
        }
        assert_eq!(made_at(&ended, b'5', at(20)), None, "step 5 has not ended by then");
        assert_eq!(made_at(&ended, b'"', at(100)), None);
    }
}
