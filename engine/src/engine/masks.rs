//! Masks of rows that follow a grammar: what each allows next is known once its last token is.
//!
//! A step with such rows is two recordings. The first is the forward pass, submitted as early as any other; the masks
//! are computed while the device is at it, and come with the second, which chooses. Invariant: a mask belongs to the
//! token that comes after all that the row's matcher has taken; where there is no mask that is sure to be right, the
//! row's sequence fails, whatever is chosen for it.

use std::sync::Arc;

use rayon::prelude::*;
use rustc_hash::FxHashMap;

use super::step::{Step, Submitted, record_choices};
use super::{Client, Engine};
use crate::backend::DeviceError;
use crate::batch::{Batch, SequenceId};
use crate::grammar::{Matcher, Progress};
use crate::limits::Phase;
use crate::request::{FinishReason, Request, TokenId};
use crate::scheduler::Choice;

/// Of a step's rows that follow a grammar.
#[derive(Debug, Default)]
pub(super) struct Masks {
    rows: Vec<MaskedRow>,
    /// (rows, words of a mask)
    words: Vec<u32>,
}

#[derive(Debug)]
struct MaskedRow {
    /// In the batch.
    slice: usize,
    sequence: SequenceId,
    /// `None` before the mask is computed, and where the sequence has ended.
    computed: Option<Result<(), FinishReason>>,
}

impl Masks {
    /// Finds the rows of `batch` that need one.
    pub fn find(&mut self, batch: &Batch, clients: &FxHashMap<SequenceId, Client>) {
        let rows = batch.slices.iter().enumerate().filter(|(_, slice)| slice.sample);
        let follows = |id: SequenceId| clients.get(&id).is_some_and(|client| client.matcher.is_some());
        self.rows.clear();
        self.rows.extend(rows.filter(|(_, slice)| follows(slice.sequence)).map(|(index, slice)| MaskedRow {
            slice: index,
            sequence: slice.sequence,
            computed: None,
        }));
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The mask of a slice; `None` where it follows no grammar, or fails in any case.
    pub fn of_slice(&self, slice: usize) -> Option<&[u32]> {
        let row = self.rows.iter().position(|row| row.slice == slice)?;
        let num_words = self.words.len() / self.rows.len();
        let is_right = matches!(self.rows[row].computed, Some(Ok(())));
        is_right.then(|| &self.words[row * num_words..][..num_words])
    }

    /// Computes the masks of all rows, several at a time. Here and below `grammar_bytes` is the sum of the clients'.
    fn compute(
        &mut self,
        clients: &mut FxHashMap<SequenceId, Client>,
        batch: &Batch,
        vocab_size: u32,
        grammar_bytes: &mut u64,
    ) {
        let num_words = vocab_size.div_ceil(32) as usize;
        self.words.clear();
        self.words.resize(self.rows.len() * num_words, 0);
        let pairs = self.rows.iter_mut().zip(self.words.chunks_exact_mut(num_words));
        let work = pairs.filter_map(|(row, mask)| {
            let client = clients.get_mut(&row.sequence)?;
            let num_bytes = client.grammar_bytes();
            let matcher = client.matcher.take_if(|matcher| !matcher.is_ended())?;
            *grammar_bytes -= num_bytes;
            let num_generated = batch.slices[row.slice].end() - client.request.prompt.len() as u32;
            Some(Work { row, mask, matcher, request: client.request.clone(), num_generated })
        });
        let mut work: Vec<Work> = work.collect();
        match work.as_mut_slice() {
            [one] => one.compute(),
            several => several.par_iter_mut().for_each(Work::compute),
        }
        for Work { row, matcher, .. } in work {
            let client = clients.get_mut(&row.sequence).expect("it was there");
            client.matcher = Some(matcher);
            *grammar_bytes += client.grammar_bytes();
        }
    }

    /// Has the matchers take what the step chose; `choices` has one entry a slice.
    pub fn follow(&self, clients: &mut FxHashMap<SequenceId, Client>, choices: &mut [Choice], grammar_bytes: &mut u64) {
        for row in &self.rows {
            let choice = &mut choices[row.slice];
            let Choice::Token(token) = *choice else { continue };
            // A sequence that has ended is told nothing of what was chosen for it.
            let Some(client) = clients.get_mut(&row.sequence) else { continue };
            *grammar_bytes -= client.grammar_bytes();
            if let Some(matcher) = &mut client.matcher {
                *choice = row.follow(matcher, token);
            }
            *grammar_bytes += client.grammar_bytes();
        }
    }
}

impl MaskedRow {
    /// What the choice of `token` is for it.
    fn follow(&self, matcher: &mut Matcher, token: TokenId) -> Choice {
        match &self.computed {
            Some(Ok(())) => match matcher.advance(token) {
                Ok(Progress::Goes) => Choice::Token(token),
                Ok(Progress::Ended) => Choice::Last(token),
                Err(sentence) => Choice::Failed(FinishReason::Error(sentence)),
            },
            Some(Err(reason)) => Choice::Failed(reason.clone()),
            None => Choice::Failed(FinishReason::Error(BEHIND_THE_END.to_owned())),
        }
    }
}

/// The mask of one row, to be computed by any thread.
struct Work<'a> {
    row: &'a mut MaskedRow,
    mask: &'a mut [u32],
    matcher: Matcher,
    request: Arc<Request>,
    num_generated: u32,
}

impl Work<'_> {
    /// Leaves of the grammar's mask what the request's own allows too. A least length keeps no text from ending where
    /// its grammar has it end.
    fn narrow(&mut self) -> Result<(), FinishReason> {
        let sampling = &self.request.sampling;
        let may_come = narrow(self.mask, sampling.mask(self.num_generated))
            || narrow(self.mask, sampling.allowed_tokens.as_deref());
        may_come.then_some(()).ok_or_else(|| FinishReason::Contradiction(DISJOINT.to_owned()))
    }

    fn compute(&mut self) {
        let computed = self.matcher.mask(self.mask).map_err(FinishReason::Error);
        self.row.computed = Some(computed.and_then(|()| self.narrow()));
    }
}

const BEHIND_THE_END: &str = "a token was chosen behind the end of this request's grammar";
const DISJOINT: &str = "the grammar of this request allows no token here that its allowed_token_ids have; \
                        change one of them";

/// Leaves of a mask what `own` allows too, unless nothing would be left; whether something is.
fn narrow(mask: &mut [u32], own: Option<&[u32]>) -> bool {
    let Some(own) = own else { return true };
    let meets = mask.iter().zip(own).any(|(word, own)| word & own != 0);
    if meets {
        mask.iter_mut().zip(own).for_each(|(word, own)| *word &= own);
    }
    meets
}

impl Client {
    /// What its matcher takes since it has begun, or will with its first mask.
    pub(super) fn grammar_bytes(&self) -> u64 {
        let begun = self.matcher.as_ref().filter(|_| self.started_ns.is_some());
        begun.map_or(0, |matcher| matcher.num_bytes() as u64)
    }
}

impl Engine {
    /// Where the oldest step in flight waits for masks: computes them, and has the device choose. All steps before it
    /// have been completed.
    pub(super) fn submit_choices(&mut self) -> Result<(), DeviceError> {
        if self.in_flight.front().is_none_or(|oldest| oldest.choices.is_some()) {
            return Ok(());
        }
        self.turn_to(Phase::Record);
        let oldest = self.in_flight.front_mut().expect("it is there");
        let Step { batch, masks, .. } = &mut oldest.step;
        masks.compute(&mut self.clients, batch, self.model.config.vocab_size, &mut self.stats.grammar_bytes);
        let request = |id: SequenceId| self.clients.get(&id).map(|client| &*client.request);
        record_choices(batch, masks, request, &self.model, &mut self.packed, &mut self.recording);
        self.turn_to(Phase::Upload);
        let ticket = self.backend.submit(&self.recording)?;
        let submitted = Submitted { ticket, at: self.backend.now() };
        self.in_flight.front_mut().expect("it is there").choices = Some(submitted);
        self.limits.submitted();
        Ok(())
    }
}
