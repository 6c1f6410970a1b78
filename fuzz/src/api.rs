//! Requests as every endpoint reads them, and answers as every dialect streams them.

use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use fullbore::api::texts::{self, TextEndpoint};
use fullbore::api::{self, Answer, Delta, Endpoint, Event as Frame, Generation, Job, Jobs, ServedModel};
use fullbore::http::access::Client;
use fullbore::http::error::ApiError;
use fullbore::start::Plan;
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::fleet::Handed;
use fullbore_engine::request::{Event, FinishReason, Flow, Pooling, Sink, TokenId, TokenLogprobs, Usage};
use fullbore_engine::text::ChatTemplate;
use serde_json::{Value, json};

use super::{check_sentence, parts};

/// Of a model whose template says nothing of tools, and of families that write calls each in its own way.
const TEMPLATES: [(&str, &str); 9] = [
    ("generic", "{{ messages }}"),
    (
        "hermes",
        "{{ messages }}<tool_call>{% if thinks is defined %}{{ '<think>' if thinks else '</think>' }}{% endif %}",
    ),
    ("mistral", "{{ messages }}[TOOL_CALLS]"),
    ("llama3", "{{ messages }}<|python_tag|>"),
    ("gemma", "{{ messages }}<start_of_turn>"),
    ("qwen_coder", "{{ messages }}<tool_call><function=f><parameter=a></think>"),
    ("glm", "{{ messages }}<tool_call><arg_key>"),
    ("pythonic", "{{ messages }}[func_name1(a=b)]"),
    ("magistral", "{{ messages }}[TOOL_CALLS][ARGS][/THINK]"),
];

static MODELS: LazyLock<Vec<ServedModel>> = LazyLock::new(|| TEMPLATES.map(|(_, source)| served(source)).into());

fn served(template: &str) -> ServedModel {
    let template = ChatTemplate::new(template, "<s>", "<|im_end|>").expect("a template");
    let bundle =
        Bundle { chat_template: Some(Arc::new(template)), pooling: Some(Pooling::Last), ..Bundle::simulated() };
    let config = EngineConfig {
        max_num_seqs: 16,
        max_num_batched_tokens: 256,
        max_model_len: 1024,
        block_size: 16,
        num_blocks: 64,
        ..EngineConfig::default()
    };
    let backend = Box::new(SimBackend::new(SimOptions::default()));
    Plan::of("sim-model", bundle, backend, config, 0).load().expect("the simulator loads")
}

/// `FAMILY PATH`, the first line of an input; what is not known is the first of its kind.
fn line(line: &[u8]) -> (&'static ServedModel, String) {
    let line = String::from_utf8_lossy(line);
    let (family, path) = line.split_once(' ').unwrap_or_default();
    let index = TEMPLATES.iter().position(|(name, _)| *name == family).unwrap_or(0);
    (&MODELS[index], path.to_owned())
}

fn endpoint(path: &str) -> Endpoint {
    match path {
        "/v1/chat/completions" => Endpoint::Chat,
        "/v1/responses" => Endpoint::Responses,
        "/v1/messages" => Endpoint::Messages,
        "/v1/embeddings" => Endpoint::Embeddings,
        _ => Endpoint::Completions,
    }
}

/// A line that says of which model and endpoint, and a body.
pub fn request(data: &[u8]) {
    let [head, body] = parts(data);
    let (model, path) = line(head);
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return };
    let text = match path.as_str() {
        "/tokenize" => Some(TextEndpoint::Tokenize),
        "/detokenize" => Some(TextEndpoint::Detokenize),
        "/apply-template" => Some(TextEndpoint::ApplyTemplate),
        "/v1/messages/count_tokens" => Some(TextEndpoint::CountTokens),
        _ => None,
    };
    let read = match text {
        Some(text) => texts::answer(text, model, &body).map(drop),
        None => api::prepare(endpoint(&path), model, &Client::default(), &body)
            .and_then(|(_, jobs)| followed(model, jobs))
            .and_then(|jobs| Generation::open(model, jobs, Instant::now(), None, None).map(drop)),
    };
    if let Err(error) = read {
        check_error(&error);
    }
}

/// With the grammar that they follow, where they do.
fn followed(model: &ServedModel, mut jobs: Jobs) -> Result<Vec<Job>, ApiError> {
    if let Some(form) = jobs.form.take() {
        jobs.follow(&form.answer(model.grammars.compile_checked(&form.source, ()))?);
    }
    Ok(jobs.jobs)
}

/// The client's fault, or nobody's.
fn check_error(error: &ApiError) {
    assert!(error.status.is_client_error() || error.retry_after.is_some(), "{error:?}");
    check_sentence(&error.message);
}

/// A line and a body as those of a request, and what the model says to it, as [`feed`] reads that. Streamed, the answer
/// is what it is whole.
pub fn stream(data: &[u8]) {
    let [head, body, said] = parts(data);
    let (model, path) = line(head);
    let endpoint = endpoint(&path);
    let Ok(mut body) = serde_json::from_slice::<Value>(body) else { return };
    let mut open = |is_streamed: bool| {
        body.as_object_mut()?.insert("stream".to_owned(), json!(is_streamed));
        let (answer, jobs) = api::prepare(endpoint, model, &Client::default(), &body).ok()?;
        let jobs = followed(model, jobs).ok()?;
        let (generation, requests) = Generation::open(model, jobs, Instant::now(), None, None).ok()?;
        (requests.len() <= MAX_CHOICES).then_some((answer, generation, requests))
    };
    let (Some(streamed), Some(whole)) = (open(true), open(false)) else { return };
    let in_pieces = pieces(model, streamed, said);
    let (mut answer, mut generation, mut requests) = whole;
    feed(model, said, &mut requests, || {});
    let mut choices = vec![Delta::default(); requests.len()];
    choices.iter_mut().enumerate().for_each(|(index, choice)| choice.index = index);
    let mut gathered = choices.clone();
    let mut take = |delta: Delta| {
        choices[delta.index].append(delta.clone());
        answer.gather(model, delta, &mut gathered);
    };
    let error = drain(&mut generation, &mut take).err();
    assert_eq!(error.is_some(), in_pieces.is_none(), "{error:?}");
    let Some((frames, choices_in_pieces)) = in_pieces else { return };
    for (choice, in_pieces) in choices.iter().zip(&choices_in_pieces) {
        assert_eq!((&choice.text, &choice.reasoning), (&in_pieces.text, &in_pieces.reasoning));
        assert_eq!((&choice.token_ids, choice.finish_reason), (&in_pieces.token_ids, in_pieces.finish_reason));
        assert!(choice.finish_reason.is_some() && choice.stop == in_pieces.stop);
        let calls = |choice: &Delta| -> Vec<_> {
            let name = |begin: &Option<(String, String)>| begin.as_ref().map(|(_, name)| name.clone());
            choice.calls.iter().map(|call| (call.index, name(&call.begin), call.arguments.clone())).collect()
        };
        assert_eq!(calls(choice), calls(in_pieces));
    }
    let usage = generation.usage();
    let value = answer.whole(model, gathered, usage);
    if body.get("best_of").is_none() {
        assert_eq!(text_of_stream(endpoint, &frames), text_of_whole(endpoint, &value), "{value}");
    }
}

/// More of them are the same again.
const MAX_CHOICES: usize = 8;

/// The frames of a stream that is read as it comes, and its choices; `None` where it ends in an error.
fn pieces(
    model: &ServedModel,
    (mut answer, mut generation, mut requests): (Box<dyn Answer>, Generation, Vec<Handed>),
    said: &[u8],
) -> Option<(Vec<Value>, Vec<Delta>)> {
    let mut frames = answer.begin(&generation);
    let mut choices = vec![Delta::default(); requests.len()];
    let mut error = None;
    let mut read = || {
        let mut deltas = Vec::new();
        if let Err(found) = drain(&mut generation, &mut |delta| deltas.push(delta)) {
            error.get_or_insert(found);
        }
        let usage = generation.usage();
        for delta in deltas {
            choices[delta.index].append(delta.clone());
            frames.extend(answer.more(model, delta, usage));
        }
    };
    feed(model, said, &mut requests, &mut read);
    read();
    let usage = generation.usage();
    let failed = error.is_some();
    match error {
        Some(error) => frames.extend(answer.fail(&error, usage)),
        None => frames.extend(answer.end(usage)),
    }
    let values = frames.iter().filter_map(check_frame).collect();
    (!failed).then_some((values, choices))
}

/// All that has come; an error is the last.
fn drain(generation: &mut Generation, take: &mut dyn FnMut(Delta)) -> Result<(), ApiError> {
    let mut context = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(next)) = generation.poll_next(&mut context) {
        take(next?);
    }
    Ok(())
}

/// One event as a client cuts it out of the bytes: its data, unless it is the end.
fn check_frame(frame: &Frame) -> Option<Value> {
    let mut bytes = Vec::new();
    frame.write(&mut bytes);
    let text = std::str::from_utf8(&bytes).expect("UTF-8");
    let event = text.strip_suffix("\n\n").expect("an empty line ends it");
    assert!(!event.contains("\n\n") && !event.contains('\r'), "{event:?}");
    let (name, data) = match event.split_once('\n') {
        Some((name, data)) => (Some(name.strip_prefix("event: ").expect("a name")), data),
        None => (None, event),
    };
    let data = data.strip_prefix("data: ").expect("data");
    if data == "[DONE]" {
        return None;
    }
    let value: Value = serde_json::from_str(data).expect("JSON");
    assert!(name.is_none_or(|name| value["type"] == name), "{event}");
    Some(value)
}

/// Plays the engine. A byte is the token of that byte, but for those that no UTF-8 has: 0xFF makes the next byte a
/// token id, 0xFE turns to the next choice, 0xFD to 0xFA end the choice: by a stop, its length, an error, a lost
/// device.
fn feed(model: &ServedModel, said: &[u8], requests: &mut Vec<Handed>, mut after_each: impl FnMut()) {
    let mut left: Vec<u32> = requests.iter().map(|(request, _)| request.max_tokens).collect();
    let mut ended = vec![false; requests.len()];
    for (index, (request, sink)) in requests.iter_mut().enumerate() {
        ended[index] |= sink.event(Event::Started { cached_tokens: request.prompt.len() as u32 / 2 }) == Flow::Stop;
        let entry = |num_top: u32| move |id: &TokenId| logprobs(*id, num_top);
        if let Some(num_top) = request.prompt_logprobs {
            ended[index] |=
                sink.event(Event::Prompt(request.prompt[1..].iter().map(entry(num_top)).collect())) == Flow::Stop;
        }
        if request.pooling.is_some() {
            ended[index] |= sink.event(Event::Pooled(vec![0.5; model.shape.dim as usize])) == Flow::Stop;
        }
    }
    after_each();
    let finish =
        |sink: &mut dyn Sink, reason: FinishReason| sink.event(Event::Finished { reason, usage: Usage::default() });
    let (mut current, mut bytes) = (0, said.iter());
    while let Some(&byte) = bytes.next() {
        let (request, sink) = &mut requests[current];
        let reason = match byte {
            0xfa => Some(FinishReason::DeviceLost("the device was lost".to_owned())),
            0xfb => Some(FinishReason::Error("this request alone failed".to_owned())),
            0xfc => Some(FinishReason::Length),
            0xfd => Some(FinishReason::Stop),
            _ => None,
        };
        match (byte, reason) {
            (0xfe, _) => current = (current + 1) % requests.len(),
            _ if ended[current] => {}
            (_, Some(reason)) => {
                ended[current] = true;
                finish(sink.as_mut(), reason);
            }
            _ if left[current] == 0 => {}
            (byte, None) => {
                let id = match byte {
                    0xff => u32::from(bytes.next().copied().unwrap_or_default()),
                    byte => FIRST_BYTE + u32::from(byte),
                };
                left[current] -= 1;
                let logprobs = request.logprobs.map(|num_top| logprobs(TokenId(id), num_top));
                let flow = sink.event(Event::Token { id: TokenId(id), logprobs });
                ended[current] = flow == Flow::Stop;
                if flow == Flow::End {
                    ended[current] = true;
                    finish(sink.as_mut(), FinishReason::Stop);
                }
            }
        }
        after_each();
    }
    for ((_, sink), _) in requests.iter_mut().zip(ended).filter(|(_, ended)| !ended) {
        finish(sink.as_mut(), FinishReason::Length);
        after_each();
    }
}

/// Byte 0 in the simulated vocabulary.
const FIRST_BYTE: u32 = 4;

fn logprobs(id: TokenId, num_top: u32) -> TokenLogprobs {
    let top = (0..num_top).map(|nth| (TokenId((id.0 + nth) % 256), -1.0 - nth as f32)).collect();
    TokenLogprobs { id, logprob: -1.0, rank: 1, top }
}

/// What the first choice says, put together from its events.
fn text_of_stream(endpoint: Endpoint, frames: &[Value]) -> String {
    let first = |frame: &&Value| frame["choices"][0]["index"] == 0;
    let text = |frame: &Value| -> Option<String> {
        let text = match endpoint {
            Endpoint::Chat => Some(frame).filter(first)?["choices"][0]["delta"]["content"].as_str(),
            Endpoint::Completions => Some(frame).filter(first)?["choices"][0]["text"].as_str(),
            Endpoint::Responses if frame["type"] == "response.output_text.delta" => frame["delta"].as_str(),
            Endpoint::Messages => frame["delta"]["text"].as_str(),
            _ => None,
        };
        text.map(str::to_owned)
    };
    frames.iter().filter_map(text).collect()
}

fn text_of_whole(endpoint: Endpoint, value: &Value) -> String {
    let texts = |parts: &Value| -> String {
        parts.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str()).collect()
    };
    match endpoint {
        Endpoint::Chat => value["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned(),
        Endpoint::Completions => value["choices"][0]["text"].as_str().unwrap_or_default().to_owned(),
        Endpoint::Responses => {
            let items = value["output"].as_array().into_iter().flatten();
            items.filter(|item| item["type"] == "message").map(|item| texts(&item["content"])).collect()
        }
        Endpoint::Messages => texts(&value["content"]),
        Endpoint::Embeddings => String::new(),
    }
}
