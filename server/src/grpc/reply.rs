//! What comes to an answer, as the contract tells it. Invariant: the first message says how long the prompt is; each
//! choice has a last one, which says why it ended, or the stream ends with a status that is an error.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;

use fullbore_engine::request::{TokenId, TokenLogprobs};
use futures_util::{FutureExt, Stream, stream};
use tokio::sync::mpsc::{Sender, channel};
use tonic::Status;
use vllm_proto::candidate_token_info::TokenInfo;
use vllm_proto::finish_info::{FinishReason, StopReason};
use vllm_proto::{CandidateTokenInfo, FinishInfo, GenerateResponse, PromptInfo, SequenceOutput, TokenIds};

use super::request::Told;
use super::running::Run;
use super::status::status;
use crate::api::{Delta, Generation, Usage};
use crate::http::App;
use crate::http::error::ApiError;

/// Makes messages of one request's choices.
pub struct Reply {
    told: Told,
    /// The model's own, where they end a text.
    stop_ids: Vec<TokenId>,
    choices: Vec<Choice>,
    is_begun: bool,
}

#[derive(Clone, Default)]
struct Choice {
    num_tokens: u32,
    last: Option<TokenId>,
    is_ended: bool,
}

/// The messages of an answer, as they come.
pub type Replies = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

/// Messages that wait for the client to take them, at most.
const MAX_WAITING: usize = 8;

impl Reply {
    /// Of a model with these `stop_ids`.
    pub fn new(told: Told, stop_ids: &[TokenId], num_choices: usize) -> Reply {
        let stop_ids = if told.ignores_eos { Vec::new() } else { stop_ids.to_vec() };
        Reply { told, stop_ids, choices: vec![Choice::default(); num_choices], is_begun: false }
    }

    pub fn more(&mut self, delta: Delta, usage: Usage) -> GenerateResponse {
        let prompt_info = self.first_info(delta.prompt(), &delta.prompt_logprobs);
        let choice = &mut self.choices[delta.index];
        choice.num_tokens += delta.token_ids.len() as u32;
        choice.last = delta.token_ids.last().copied().or(choice.last);
        let finish_info = delta.finish_reason.map(|reason| match reason {
            "length" => self.finish_info(delta.index, FinishReason::Length, None, usage),
            _ => self.finish_info(delta.index, FinishReason::Stop, self.stop_reason(&delta), usage),
        });
        let logprobs = delta.entries.iter().filter_map(|entry| entry.logprobs.as_ref());
        let outputs = SequenceOutput {
            index: delta.index as u32,
            num_tokens: delta.token_ids.len() as u32,
            logprobs: logprobs.clone().map(|token| token.logprob).collect(),
            ranks: logprobs.clone().map(|token| token.rank).collect(),
            candidate_tokens: logprobs.map(candidates).collect(),
            token_ids: if self.told.token_ids { ids(&delta.token_ids) } else { Vec::new() },
            text: if self.told.text { delta.text } else { String::new() },
            finish_info,
            sampling_mask: Vec::<TokenIds>::new(),
        };
        GenerateResponse { prompt_info, outputs: Some(outputs) }
    }

    /// Ends all choices that go on; `prompt` is theirs, where nothing has come yet.
    fn abort(&mut self, prompt: &[TokenId], usage: Usage) -> Vec<GenerateResponse> {
        let going_on = (0..self.choices.len()).filter(|index| !self.choices[*index].is_ended).collect::<Vec<_>>();
        let mut ended = |index| {
            let prompt_info = self.first_info(prompt, &[]);
            let finish_info = Some(self.finish_info(index, FinishReason::Aborted, None, usage));
            let outputs = SequenceOutput { index: index as u32, finish_info, ..SequenceOutput::default() };
            GenerateResponse { prompt_info, outputs: Some(outputs) }
        };
        going_on.into_iter().map(&mut ended).collect()
    }

    /// What the first message says of the prompt.
    fn first_info(&mut self, prompt: &[TokenId], logprobs: &[TokenLogprobs]) -> Option<PromptInfo> {
        if std::mem::replace(&mut self.is_begun, true) {
            return None;
        }
        // Clients count one for each token, and pass over the first, which has none.
        let is_computed = logprobs.len() + 1 == prompt.len();
        let first = usize::from(self.told.prompt_logprobs && is_computed);
        Some(PromptInfo {
            num_prompt_tokens: prompt.len() as u32,
            token_ids: if self.told.prompt_token_ids { ids(prompt) } else { Vec::new() },
            logprobs: std::iter::repeat_n(0.0, first).chain(logprobs.iter().map(|token| token.logprob)).collect(),
            ranks: std::iter::repeat_n(0, first).chain(logprobs.iter().map(|token| token.rank)).collect(),
            candidate_tokens: std::iter::repeat_n(CandidateTokenInfo::default(), first)
                .chain(logprobs.iter().map(candidates))
                .collect(),
        })
    }

    fn stop_reason(&self, delta: &Delta) -> Option<StopReason> {
        let last = self.choices[delta.index].last;
        match (&delta.stop, last) {
            (Some(text), _) => Some(StopReason::StopString(text.clone())),
            (None, Some(id)) if self.stop_ids.contains(&id) => Some(StopReason::EosTokenId(id.0)),
            (None, Some(TokenId(id))) if self.told.stop_ids.contains(&id) => Some(StopReason::StopTokenId(id)),
            // What the text follows lets nothing more come.
            _ => None,
        }
    }

    fn finish_info(
        &mut self,
        index: usize,
        reason: FinishReason,
        stop_reason: Option<StopReason>,
        usage: Usage,
    ) -> FinishInfo {
        let choice = &mut self.choices[index];
        choice.is_ended = true;
        FinishInfo {
            num_output_tokens: choice.num_tokens,
            finish_reason: reason.into(),
            stop_reason,
            num_cached_tokens: Some(usage.cached_tokens),
            ..FinishInfo::default()
        }
    }
}

/// Has a task tell what comes, until the client leaves, or its call is ended because it takes nothing.
pub fn replies(app: Arc<App>, mut generation: Generation, reply: Reply, run: Run) -> Replies {
    let (sender, mut receiver) = channel(MAX_WAITING);
    tokio::spawn(async move {
        let telling = AssertUnwindSafe(tell(&mut generation, reply, run, &sender)).catch_unwind();
        let told = telling.await.unwrap_or_else(|_| {
            app.metrics.count_panic();
            generation.fail();
            Err(ApiError::bug())
        });
        // It ends now, whenever its client takes what is left to tell.
        drop(generation);
        let last: Vec<Result<_, Status>> = match told {
            Ok(ends) => ends.into_iter().map(Ok).collect(),
            Err(error) => {
                app.metrics.count_late_error(&error);
                vec![Err(status(&error))]
            }
        };
        for told in last {
            // One who has left is not told.
            let _ = sender.send(told).await;
        }
    });
    Box::pin(stream::poll_fn(move |context| receiver.poll_recv(context)))
}

/// Tells until the end, or until the client has left; of one that is aborted what is left to tell is the ends.
async fn tell(
    generation: &mut Generation,
    mut reply: Reply,
    mut run: Run,
    sender: &Sender<Result<GenerateResponse, Status>>,
) -> Result<Vec<GenerateResponse>, ApiError> {
    loop {
        // Nothing is taken before there is room for it, so that nothing is lost where it is aborted meanwhile.
        let next = async {
            let room = sender.reserve().await.ok()?;
            let delta = generation.next().await?;
            Some(delta.map(|delta| (room, delta)))
        };
        let next = tokio::select! {
            next = next => next.transpose()?,
            () = sender.closed() => None,
            _ = &mut run.aborted => return Ok(reply.abort(generation.prompt(), generation.usage())),
        };
        let Some((room, delta)) = next else { return Ok(Vec::new()) };
        room.send(Ok(reply.more(delta, generation.usage())));
    }
}

fn ids(tokens: &[TokenId]) -> Vec<u32> {
    tokens.iter().map(|id| id.0).collect()
}

/// The most likely tokens but for the one that was chosen, which is told anyway.
fn candidates(token: &TokenLogprobs) -> CandidateTokenInfo {
    let ranked = (1..).zip(&token.top).filter(|(_, (id, _))| *id != token.id);
    let tokens = ranked.map(|(rank, &(id, logprob))| TokenInfo { id: id.0, logprob, rank });
    CandidateTokenInfo { tokens: tokens.collect() }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::config::EngineConfig;
    use futures_util::StreamExt;
    use serde_json::json;
    use tokio::task::yield_now;
    use tokio::time::sleep;
    use vllm_proto::GenerateRequest;

    use super::super::running::Running;
    use super::*;
    use crate::api;
    use crate::http::accept::Limits;
    use crate::http::access::{Access, Client};
    use crate::http::metrics;
    use crate::start::Plan;

    #[tokio::test]
    async fn an_abort_is_heard_while_the_client_takes_nothing() {
        let backend = Box::new(SimBackend::new(SimOptions::default()));
        let plan = Plan::of("sim", Bundle::simulated(), backend, EngineConfig::default(), 0);
        let app = Arc::new(App::new(Limits::default(), Access::default(), None, None));
        app.set_models(vec![plan.load().expect("the simulator loads")]);
        let model = &app.models()[0];
        let body = json!({"prompt": "x", "max_tokens": 50, "ignore_eos": true});
        let jobs = api::prepare_tokens(model, "x", &Client::default(), &body).expect("a request");
        let generation = Generation::submit(model, jobs, Instant::now(), None, None).expect("a place");
        let running = Arc::new(Running::default());
        let reply = Reply::new(Told::of(&GenerateRequest::default()), &model.stop_ids, 1);
        let replies = replies(app.clone(), generation, reply, running.enter(None, "x"));
        // All is made, and as much of it as may waits for the client.
        while model.engine.stats().num_length < 1 {
            sleep(Duration::from_millis(1)).await;
        }
        for _ in 0..1000 {
            yield_now().await;
        }
        running.abort(None, "x".to_owned());
        // Its end is counted when what it held is let go.
        let mut num_looks = 0;
        while metrics::value(&app, "vllm:request_success_total", "finished_reason=\"length\"").await != Some(1.0) {
            num_looks += 1;
            assert!(num_looks < 10_000, "it goes on");
            sleep(Duration::from_millis(1)).await;
        }
        let told: Vec<GenerateResponse> = replies.map(|reply| reply.expect("no error")).collect().await;
        let ends = told.iter().filter_map(|reply| reply.outputs.as_ref()?.finish_info.as_ref());
        let ends: Vec<_> = ends.map(|end| (end.finish_reason(), end.num_output_tokens)).collect();
        assert_eq!((told.len(), ends), (MAX_WAITING + 1, vec![(FinishReason::Aborted, MAX_WAITING as u32)]));
        model.end();
    }
}
