//! Between a batch and `Op::Sample`: what is asked of each logit row, and what the rows that came back say.
//!
//! Invariant: reading needs the batch and the words alone. By the time that a step comes back its sequences may have
//! moved on or ended, so nothing here looks at their state; packing looks at requests, which never change.

use crate::batch::{Batch, PackedBatch, SequenceId, Slice};
use crate::model::Choices;
use crate::op::{CHOSEN_WORDS, MAX_TOP, NON_FINITE, NONE, SampleRow};
use crate::request::{FinishReason, MAX_LOGIT_BIASES, MAX_LOGPROBS, Request, TokenId, TokenLogprobs};
use crate::scheduler::Choice;
use crate::tensor::Tensor;

/// A lower one chooses the best token; dividing by it would leave no digits.
const LEAST_TEMPERATURE: f32 = 1e-5;

/// What a step brought for one slice.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceResult {
    pub choice: Choice,
    /// Of the chosen token.
    pub logprobs: Option<TokenLogprobs>,
    /// Of the prompt's tokens after the slice's rows.
    pub prompt_logprobs: Vec<TokenLogprobs>,
}

/// Fills the part of `packed` that says what is asked of each logit row. `request` finds that of a planned sequence,
/// `mask` the tokens that the grammar of a slice's sequence allows, where it has one.
pub fn pack<'a>(
    batch: &Batch,
    request: impl Fn(SequenceId) -> Option<&'a Request>,
    mask: impl Fn(usize) -> Option<&'a [u32]>,
    packed: &mut PackedBatch,
) {
    for (index, slice) in batch.slices.iter().enumerate() {
        let num_rows = slice.num_logit_rows();
        if num_rows == 0 {
            continue;
        }
        let Some(request) = request(slice.sequence) else {
            // Its client has left since it was planned.
            packed.sample_rows.extend((0..num_rows).map(|_| SampleRow::IDLE));
            continue;
        };
        for row in 0..num_rows {
            let asked = if row < slice.num_targets {
                target(slice, request.prompt[(slice.start + row + 1) as usize])
            } else if slice.sample && row + 1 == num_rows {
                choice(slice, request, mask(index), &mut packed.extras)
            } else {
                SampleRow::IDLE
            };
            packed.sample_rows.push(asked);
        }
    }
}

fn target(slice: &Slice, token: TokenId) -> SampleRow {
    assert!(slice.prompt_logprobs <= MAX_LOGPROBS, "{slice:?}");
    SampleRow { target: token.0, logprobs: slice.prompt_logprobs + 1, ..SampleRow::IDLE }
}

fn choice(slice: &Slice, request: &Request, mask: Option<&[u32]>, extras: &mut Vec<u32>) -> SampleRow {
    let params = &request.sampling;
    let mask = mask.or(params.mask(slice.end() - request.prompt.len() as u32));
    assert!(params.logit_bias.len() <= MAX_LOGIT_BIASES as usize && slice.logprobs.unwrap_or(0) <= MAX_LOGPROBS);
    let bias_at = extras.len() as u32;
    extras.extend(params.logit_bias.iter().flat_map(|(token, bias)| [token.0, bias.to_bits()]));
    let mask_at = mask.map_or(NONE, |_| extras.len() as u32);
    extras.extend(mask.into_iter().flatten());
    SampleRow {
        slot: slice.slot.0,
        position: slice.start + slice.num_tokens(),
        seed: [params.seed as u32, (params.seed >> 32) as u32],
        temperature: if params.temperature < LEAST_TEMPERATURE { 0.0 } else { params.temperature },
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        presence: params.presence_penalty,
        frequency: params.frequency_penalty,
        repetition: params.repetition_penalty,
        target: NONE,
        logprobs: slice.logprobs.map_or(0, |num_top| num_top + 1),
        bias_at,
        num_biases: params.logit_bias.len() as u32,
        mask_at,
    }
}

/// What must come back of a step: the choices of all rows, the likeliest tokens of the rows that asked for them, then
/// the hidden states of those that asked for these.
pub fn downloads(batch: &Batch, choices: Choices, downloads: &mut Vec<Tensor>) {
    downloads.push(choices.chosen);
    let mut first = 0;
    for slice in &batch.slices {
        for (row, num_rows) in rows_with_top(slice) {
            let offset = choices.top.offset + (first + row) * choices.top.cols;
            downloads.push(Tensor { offset, rows: num_rows, ..choices.top });
        }
        first += slice.num_logit_rows();
    }
    let mut first = 0;
    for slice in &batch.slices {
        let rows = slice.num_logit_rows();
        if slice.pooled {
            let offset = choices.hidden.offset + first * choices.hidden.cols;
            downloads.push(Tensor { offset, rows, ..choices.hidden });
        }
        first += rows;
    }
}

/// Runs of a slice's logit rows whose most likely tokens come back: a first one and how many.
fn rows_with_top(slice: &Slice) -> impl Iterator<Item = (u32, u32)> {
    let targets = (slice.num_targets > 0 && slice.prompt_logprobs > 0).then_some((0, slice.num_targets));
    let last = slice.logprobs.filter(|num_top| *num_top > 0).map(|_| (slice.num_logit_rows() - 1, 1));
    targets.into_iter().chain(last)
}

/// Reads the bytes of [`downloads`]: one result a slice.
pub fn read(batch: &Batch, bytes: &[u8], vocab_size: u32) -> impl Iterator<Item = SliceResult> {
    let words: &[Bytes] = bytemuck::cast_slice(bytes);
    let (chosen, top) = words.split_at((batch.num_logit_rows() * CHOSEN_WORDS) as usize);
    let mut rows = Rows { chosen: chosen.chunks_exact(CHOSEN_WORDS as usize), top, vocab_size };
    batch.slices.iter().map(move |slice| rows.slice(slice))
}

/// The hidden states that [`downloads`] brought, `dim` numbers a row: for each slice that asked, in order, its rows.
pub fn read_hidden(batch: &Batch, bytes: &[u8], dim: u32) -> impl Iterator<Item = Vec<f32>> {
    let num_words = move |slice: &Slice| (slice.num_logit_rows() * dim) as usize;
    let pooled = || batch.slices.iter().filter(|slice| slice.pooled);
    let words: &[Bytes] = bytemuck::cast_slice(bytes);
    let mut rest = &words[words.len() - pooled().map(num_words).sum::<usize>()..];
    pooled().map(move |slice| {
        let (mine, others) = rest.split_at(num_words(slice));
        rest = others;
        mine.iter().map(|word| f32::from_le_bytes(*word)).collect()
    })
}

/// A word as it came.
type Bytes = [u8; 4];

/// Rows that have come back and were not read yet.
struct Rows<'a> {
    chosen: std::slice::ChunksExact<'a, Bytes>,
    top: &'a [Bytes],
    vocab_size: u32,
}

impl Rows<'_> {
    fn slice(&mut self, slice: &Slice) -> SliceResult {
        let mut result = SliceResult { choice: Choice::None, logprobs: None, prompt_logprobs: Vec::new() };
        let num_rows = slice.num_logit_rows();
        for row in 0..num_rows {
            if row < slice.num_targets {
                let Some(entry) = self.next(Some(slice.prompt_logprobs)) else {
                    result.choice = broken_row();
                    continue;
                };
                result.prompt_logprobs.push(entry);
            } else if slice.sample && row + 1 == num_rows {
                match self.next(slice.logprobs) {
                    None => result.choice = broken_row(),
                    Some(entry) if result.choice == Choice::None => {
                        result.choice = Choice::Token(entry.id);
                        result.logprobs = slice.logprobs.map(|_| entry);
                    }
                    // A broken row of the prompt has failed it already.
                    Some(_) => {}
                }
            } else {
                self.chosen.next();
            }
        }
        result
    }

    /// The next row, whose `num_top` most likely tokens were asked; `None` if it was not finite.
    fn next(&mut self, num_top: Option<u32>) -> Option<TokenLogprobs> {
        let row = self.chosen.next().expect("a row for each that was asked");
        let num_top = num_top.unwrap_or(0);
        let mut top = Vec::new();
        if num_top > 0 {
            let (mine, rest) = self.top.split_at(2 * MAX_TOP as usize);
            let pairs = mine.chunks_exact(2).take(num_top.min(self.vocab_size) as usize);
            top.extend(pairs.map(|pair| (TokenId(u32::from_le_bytes(pair[0])), f32::from_le_bytes(pair[1]))));
            self.top = rest;
        }
        let id = u32::from_le_bytes(row[0]);
        let (logprob, rank) = (f32::from_le_bytes(row[1]), u32::from_le_bytes(row[2]));
        (id != NON_FINITE).then_some(TokenLogprobs { id: TokenId(id), logprob, rank, top })
    }
}

pub(crate) const NOT_FINITE: &str = "the model's output was not finite (NaN or infinity); this request was ended";

pub(crate) fn broken_row() -> Choice {
    Choice::Failed(FinishReason::Error(NOT_FINITE.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{InputToken, Logits, SlotId};
    use crate::request::SamplingParams;
    use crate::tensor::BufferId;

    /// A prefill chunk with prompt logprobs that chooses, a chunk that has nothing, a decode with two top logprobs.
    fn batch() -> Batch {
        let slice = |id: u64, start, tokens, logits, sample| Slice {
            sequence: SequenceId(id),
            slot: SlotId(7 - id as u32),
            start,
            tokens,
            logits,
            sample,
            logprobs: None,
            num_targets: 0,
            prompt_logprobs: 0,
            pooled: false,
        };
        let slices = vec![
            Slice { logprobs: Some(2), ..slice(0, 9, 0..1, Logits::Last, true) },
            slice(1, 0, 1..4, Logits::None, false),
            Slice { num_targets: 2, prompt_logprobs: 1, ..slice(2, 0, 4..7, Logits::All, true) },
        ];
        Batch { slices, input: vec![InputToken::Id(TokenId(0)); 7], ..Batch::default() }
    }

    fn request(id: SequenceId) -> Request {
        let sampling = SamplingParams {
            temperature: if id.0 == 0 { 0.5 } else { 1e-7 },
            seed: (3 << 32) + 4,
            logit_bias: if id.0 == 0 { Vec::new() } else { vec![(TokenId(5), -1.0)] },
            allowed_tokens: (id.0 == 2).then(|| [8, 9].into()),
            ..SamplingParams::default()
        };
        Request { prompt: vec![TokenId(40), TokenId(41), TokenId(42)], sampling, ..Request::default() }
    }

    #[test]
    fn every_logit_row_says_what_is_asked_of_it() {
        let requests = [0, 1, 2].map(|id| request(SequenceId(id)));
        let mut packed = PackedBatch::default();
        pack(&batch(), |id| Some(&requests[id.0 as usize]), |_| None, &mut packed);
        let [decode, first, second, last] = packed.sample_rows[..] else { panic!("{packed:?}") };
        assert_eq!((decode.slot, decode.position, decode.seed, decode.logprobs), (7, 10, [4, 3], 3));
        assert_eq!((decode.temperature, decode.num_biases, decode.mask_at), (0.5, 0, NONE));
        assert_eq!([first, second].map(|row| (row.slot, row.target, row.logprobs)), [(NONE, 41, 2), (NONE, 42, 2)]);
        assert_eq!((last.slot, last.position, last.target, last.logprobs), (5, 3, NONE, 0));
        assert_eq!((last.temperature, last.bias_at, last.num_biases, last.mask_at), (0.0, 0, 1, 2));
        assert_eq!(packed.extras, [5, (-1.0f32).to_bits(), 8, 9]);
    }

    #[test]
    fn only_rows_that_asked_bring_their_likeliest_tokens() {
        let tensor = |cols| Tensor::u32(BufferId(0), 4, cols);
        let mut wanted = Vec::new();
        let mut batch = batch();
        batch.slices[2].pooled = true;
        let choices = Choices { chosen: tensor(CHOSEN_WORDS), top: tensor(2 * MAX_TOP), hidden: tensor(8) };
        downloads(&batch, choices, &mut wanted);
        let places: Vec<_> = wanted.iter().map(|tensor| (tensor.offset, tensor.rows)).collect();
        assert_eq!(places, [(0, 4), (0, 1), (2 * MAX_TOP, 2), (8, 3)]);
    }

    #[test]
    fn hidden_states_come_last() {
        let mut batch = batch();
        (batch.slices[0].pooled, batch.slices[2].pooled) = (true, true);
        let numbers: Vec<f32> = (0..8).map(|number| number as f32).collect();
        let mut bytes = words([60, 41, 42, 61]);
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        let hidden: Vec<Vec<f32>> = read_hidden(&batch, &bytes, 2).collect();
        assert_eq!(hidden, [&numbers[..2], &numbers[2..]]);
        assert_eq!(read(&batch, &bytes, 1000).next().expect("a slice").choice, Choice::Token(TokenId(60)));
    }

    /// The words of four rows with these ids, and those of the three that have most likely tokens.
    fn words(ids: [u32; 4]) -> Vec<u8> {
        let chosen = ids.into_iter().flat_map(|id| [id, (-0.5f32).to_bits(), 3, 0]);
        let top = (0..3).flat_map(|row| (0..MAX_TOP).flat_map(move |nth| [100 * row + nth, (-1.0f32).to_bits()]));
        chosen.chain(top).flat_map(u32::to_le_bytes).collect()
    }

    #[test]
    fn rows_are_read_back_in_the_order_of_the_batch() {
        let (batch, words) = (batch(), words([60, 41, 42, 61]));
        let results: Vec<SliceResult> = read(&batch, &words, 1000).collect();
        let entry = |id, top: &[u32]| TokenLogprobs {
            id: TokenId(id),
            logprob: -0.5,
            rank: 3,
            top: top.iter().map(|id| (TokenId(*id), -1.0)).collect(),
        };
        assert_eq!(results[0].choice, Choice::Token(TokenId(60)));
        assert_eq!(results[0].logprobs, Some(entry(60, &[0, 1])));
        assert_eq!(results[1], SliceResult { choice: Choice::None, logprobs: None, prompt_logprobs: Vec::new() });
        assert_eq!((&results[2].choice, &results[2].logprobs), (&Choice::Token(TokenId(61)), &None));
        assert_eq!(results[2].prompt_logprobs, [entry(41, &[100]), entry(42, &[200])]);
    }

    #[test]
    fn a_broken_row_fails_its_own_request() {
        for broken in [[NON_FINITE, 41, 42, 61], [60, NON_FINITE, 42, 61], [60, 41, NON_FINITE, 61]] {
            let batch = batch();
            let words = words(broken);
            let failed =
                read(&batch, &words, 1000).map(|result| matches!(result.choice, Choice::Failed(_))).collect::<Vec<_>>();
            assert_eq!(failed, [broken[0] == NON_FINITE, false, broken[0] != NON_FINITE]);
        }
    }
}
