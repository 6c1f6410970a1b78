//! A whole model on a device, held against what references computed for it: greedy ids until a reference has not
//! decided itself, the likelihood of a passage, and the same bits alone as in company.
//!
//! Goldens are made by `tests/golden/{llama_cpp,reference}.py`.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::backend::DeviceError;
use crate::engine::Engine;
use crate::request::{Event, Flow, Request, Sink, TokenId};

/// A reference whose two best logits are nearer than this has not decided.
pub const REFERENCE_GAP: f64 = 0.05;
/// The same for llama.cpp, which rounds activations to eight bits.
const LLAMA_CPP_GAP: f64 = 0.5;
const NLL_TOLERANCE: f64 = 0.005;
/// Decided tokens of a case at least, or there is too little to compare.
const MIN_COMPARED: usize = 10;

/// What references computed: `numpy` in float32, and llama.cpp.
#[derive(Clone, Debug, Deserialize)]
pub struct Golden {
    pub passage: Vec<u32>,
    /// Mean of its tokens but the first, in nats.
    pub passage_nll: f64,
    pub cases: Vec<GoldenCase>,
}

/// A prompt, and the greedy ids behind it, each with the gap between its logit and the next best.
#[derive(Clone, Debug, Deserialize)]
pub struct GoldenCase {
    pub text: String,
    pub prompt: Vec<u32>,
    pub reference: Vec<u32>,
    pub reference_gaps: Vec<f64>,
    pub llama_cpp: Vec<u32>,
    pub llama_cpp_gaps: Vec<f64>,
}

/// How much of a golden is followed beside its passage: its first cases, and so many tokens of each.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    pub num_cases: usize,
    pub max_tokens: u32,
}

impl Share {
    pub const WHOLE: Share = Share { num_cases: usize::MAX, max_tokens: 48 };
}

/// A device's own greedy answer to a case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Of the prompt.
    pub text: String,
    pub ids: Vec<u32>,
    pub logprobs: Vec<f32>,
    /// Between the two most likely tokens, in nats.
    pub gaps: Vec<f32>,
}

/// How a device followed a golden.
#[derive(Clone, Debug, Serialize)]
pub struct Followed {
    pub passage_nll: f64,
    pub wanted_nll: f64,
    pub answers: Vec<Answer>,
    /// Tokens that a reference had decided.
    pub num_compared: usize,
    /// Each a sentence; none where it followed.
    pub failures: Vec<String>,
}

impl Golden {
    /// Of JSON.
    pub fn read(text: &str) -> Result<Golden, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// Positions that the longest request takes.
    pub fn longest(&self, share: Share) -> u32 {
        let prompts = self.cases(share).iter().map(|case| &case.prompt).chain([&self.passage]);
        prompts.map(|prompt| prompt.len() as u32 + share.max_tokens).max().unwrap_or(0)
    }

    fn cases(&self, share: Share) -> &[GoldenCase] {
        &self.cases[..self.cases.len().min(share.num_cases)]
    }

    /// Runs cases at once, and the passage, on an engine that has nothing else to do.
    pub fn follow(&self, engine: &mut Engine, share: Share) -> Result<Followed, DeviceError> {
        let cases = self.cases(share);
        let request = Request { prompt: ids(&self.passage), prompt_logprobs: Some(0), ..Request::default() };
        let passage = Heard::default();
        engine.add(request, passage.sink());
        let heard: Vec<Heard> = cases.iter().map(|case| add(engine, &case.prompt, share, 0)).collect();
        while engine.step()? {}
        engine.check();
        let answers: Vec<Answer> = cases.iter().zip(&heard).map(|(case, heard)| heard.answer(&case.text)).collect();
        let passage_nll = passage.mean_nll();
        let mut failures = Vec::new();
        if (passage_nll - self.passage_nll).abs() >= NLL_TOLERANCE || passage_nll.is_nan() {
            failures
                .push(format!("the passage has a mean NLL of {passage_nll:.5}, the reference {:.5}", self.passage_nll));
        }
        let mut num_compared = 0;
        for (case, answer) in cases.iter().zip(&answers) {
            num_compared += case.compare(answer, share, &mut failures);
        }
        if num_compared <= MIN_COMPARED * cases.len().min(5) {
            failures.push(format!("only {num_compared} tokens were decided enough to compare"));
        }
        Ok(Followed { passage_nll, wanted_nll: self.passage_nll, answers, num_compared, failures })
    }

    /// Cases one by one, and then at once among others, `num_requests` in all: sentences on those whose tokens or
    /// log-probabilities are not the same to the bit.
    pub fn compare_company(
        &self,
        engine: &mut Engine,
        share: Share,
        num_requests: usize,
    ) -> Result<Vec<String>, DeviceError> {
        // A salt of its own each, so that nothing is taken from a cache.
        let mut salts = 1..;
        let mut salt = || salts.next().expect("there is always another");
        let cases = self.cases(share);
        let mut alone = Vec::with_capacity(cases.len());
        for case in cases {
            let heard = add(engine, &case.prompt, share, salt());
            while engine.step()? {}
            alone.push(heard.answer(&case.text));
        }
        let in_company: Vec<Heard> = cases.iter().map(|case| add(engine, &case.prompt, share, salt())).collect();
        for nth in cases.len()..num_requests {
            // Of all lengths.
            let len = 1 + nth * 7 % self.passage.len();
            add(engine, &self.passage[..len], share, salt());
        }
        while engine.step()? {}
        engine.check();
        let differs = alone.iter().zip(&in_company).filter_map(|(alone, heard)| {
            let answer = heard.answer(&alone.text);
            let bits = |answer: &Answer| answer.logprobs.iter().map(|logprob| logprob.to_bits()).collect::<Vec<u32>>();
            let same = answer.ids == alone.ids && bits(&answer) == bits(alone);
            (!same).then(|| format!("{:?} is answered otherwise among {num_requests} requests", alone.text))
        });
        Ok(differs.collect())
    }
}

impl GoldenCase {
    /// How many tokens a reference had decided, with a sentence for each reference that was not followed.
    fn compare(&self, answer: &Answer, share: Share, failures: &mut Vec<String>) -> usize {
        let references = [
            ("the reference", &self.reference, &self.reference_gaps, REFERENCE_GAP),
            ("llama.cpp", &self.llama_cpp, &self.llama_cpp_gaps, LLAMA_CPP_GAP),
        ];
        let mut num_compared = 0;
        for (name, wanted, gaps, least_gap) in references {
            let decided = gaps.iter().position(|gap| *gap < least_gap).unwrap_or(gaps.len());
            let decided = decided.min(wanted.len()).min(share.max_tokens as usize);
            let agree = answer.ids.iter().zip(wanted).take_while(|(actual, wanted)| actual == wanted).count();
            if agree < decided {
                let sentence =
                    format!("{:?}: token {agree} is not that of {name}, which had decided {decided}", self.text);
                failures.push(sentence);
            }
            num_compared += decided;
        }
        num_compared
    }
}

fn ids(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().map(|id| TokenId(*id)).collect()
}

fn add(engine: &mut Engine, prompt: &[u32], share: Share, cache_salt: u64) -> Heard {
    let heard = Heard::default();
    let max_tokens = share.max_tokens;
    let request = Request { prompt: ids(prompt), max_tokens, logprobs: Some(2), cache_salt, ..Request::default() };
    engine.add(request, heard.sink());
    heard
}

/// Events of a request.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<Event>>>);

impl Heard {
    fn sink(&self) -> Box<dyn Sink> {
        Box::new(self.clone())
    }

    fn answer(&self, text: &str) -> Answer {
        let mut answer = Answer { text: text.to_owned(), ..Answer::default() };
        for event in self.0.lock().expect("no sink panics").iter() {
            let Event::Token { id, logprobs } = event else { continue };
            let logprobs = logprobs.as_ref().expect("they were asked for");
            answer.ids.push(id.0);
            answer.logprobs.push(logprobs.logprob);
            let [(_, first), (_, second)] = logprobs.top[..] else { panic!("two were asked for") };
            answer.gaps.push(first - second);
        }
        answer
    }

    /// Of a prompt whose log-probabilities were asked for.
    fn mean_nll(&self) -> f64 {
        let events = self.0.lock().expect("no sink panics");
        let prompt = events.iter().find_map(|event| match event {
            Event::Prompt(logprobs) => Some(logprobs),
            _ => None,
        });
        let logprobs = prompt.map_or(&[][..], |logprobs| logprobs);
        -logprobs.iter().map(|entry| f64::from(entry.logprob)).sum::<f64>() / logprobs.len() as f64
    }
}

impl Sink for Heard {
    fn event(&mut self, event: Event) -> Flow {
        self.0.lock().expect("no sink panics").push(event);
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}
