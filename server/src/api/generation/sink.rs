//! Where an engine's events of a choice go: to its client's channel, past what watches and charges. Invariant: nothing
//! here waits; the channel holds all events, and with the last goes the [`Observer`], so that how a sequence ended is
//! told by whoever is last. A stop string ends it here, however late its client reads it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use fullbore_engine::request::{Event, Flow, Sink};
use fullbore_engine::text::Scan;
use tokio::sync::mpsc::Sender;

use super::text::Text;
use crate::http::metrics::{End, Observer, ToldEnd};
use crate::http::rates::Meter;

pub struct ChannelSink {
    sender: Sender<Told>,
    /// Until the end.
    observer: Option<Box<Observer>>,
    /// Of the client's rate: what the prefix cache has is not computed, and costs nothing.
    meter: Option<Arc<Meter>>,
    num_prompt_tokens: u32,
    /// Where stop strings may end it, what its client will read.
    ahead: Option<Box<Text>>,
    told_end: ToldEnd,
}

/// What a client's side gets.
pub struct Told {
    pub event: Event,
    /// With the last event.
    pub observer: Option<Box<Observer>>,
}

impl ChannelSink {
    pub fn new(
        sender: Sender<Told>,
        observer: Observer,
        meter: Option<Arc<Meter>>,
        num_prompt_tokens: u32,
        ahead: Option<Text>,
    ) -> ChannelSink {
        let told_end = observer.told_end();
        let (observer, ahead) = (Some(Box::new(observer)), ahead.map(Box::new));
        ChannelSink { sender, observer, meter, num_prompt_tokens, ahead, told_end }
    }

    /// What its client will find once it has read so far: a stop string, or a bug, which is to end no engine.
    fn look_ahead(&mut self, event: &Event) -> Flow {
        let (Some(text), Event::Token { id, .. }) = (&mut self.ahead, event) else { return Flow::Continue };
        let scan = catch_unwind(AssertUnwindSafe(|| text.push(*id)));
        let (end, flow) = match scan {
            Ok(Scan { stopped: false, .. }) => return Flow::Continue,
            Ok(_) => (End::Stop, Flow::End),
            Err(_) => (End::Error, Flow::Stop),
        };
        // The client finds the same, or has left by then.
        let _ = self.told_end.set((end, text.num_tokens()));
        flow
    }
}

impl Sink for ChannelSink {
    fn event(&mut self, event: Event) -> Flow {
        if let Some(observer) = &mut self.observer {
            observer.event(&event);
        }
        if let Some(meter) = &self.meter {
            match event {
                Event::Started { cached_tokens } => {
                    meter.charge(self.num_prompt_tokens.saturating_sub(cached_tokens), Instant::now());
                }
                Event::Token { .. } => meter.charge(1, Instant::now()),
                Event::Prompt(_) | Event::Pooled(_) | Event::Finished { .. } => {}
            }
        }
        let flow = self.look_ahead(&event);
        let is_last = matches!(event, Event::Finished { .. });
        let observer = if is_last { self.observer.take() } else { None };
        match self.sender.try_send(Told { event, observer }) {
            Ok(()) => flow,
            Err(_) => Flow::Stop,
        }
    }

    fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use fullbore_engine::backend::sim::{SimBackend, SimOptions};
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::config::EngineConfig;
    use fullbore_engine::request::TokenId;
    use futures_util::FutureExt;
    use serde_json::{Value, json};

    use super::super::Generation;
    use super::super::text::BUG;
    use super::*;
    use crate::api::{Endpoint, prepare};
    use crate::http::accept::Limits;
    use crate::http::access::{Access, Client};
    use crate::http::{App, metrics};
    use crate::start::Plan;

    fn served() -> App {
        let backend = Box::new(SimBackend::new(SimOptions::default()));
        let config =
            EngineConfig { max_model_len: 1024, max_queued_tokens: 1024, num_blocks: 256, ..EngineConfig::default() };
        let plan = Plan::of("sim", Bundle::simulated(), backend, config, 0);
        let app = App::new(Limits::default(), Access::default(), None, None);
        app.set_models(vec![plan.load().expect("the simulator loads")]);
        app
    }

    fn generate(app: &App, stop: &Value) -> Generation {
        let model = &app.models()[0];
        let body = json!({"prompt": "x", "max_tokens": 50, "temperature": 0, "ignore_eos": true, "stop": stop});
        let (_, jobs) = prepare(Endpoint::Completions, model, &Client::default(), &body).expect("a request");
        Generation::submit(model, jobs, Instant::now(), None, None).expect("a place")
    }

    /// Its text, and how it ended.
    async fn read(mut generation: Generation) -> (String, Option<&'static str>, u32) {
        let (mut text, mut reason) = (String::new(), None);
        while let Some(delta) = generation.next().await {
            let delta = delta.expect("a piece");
            text += &delta.text;
            reason = delta.finish_reason;
        }
        (text, reason, generation.usage().completion_tokens)
    }

    /// A client that reads when the engine is done already, and finds a stop string.
    #[tokio::test]
    async fn what_the_client_was_told_is_what_is_counted() {
        let app = served();
        let first = generate(&app, &Value::Null);
        let num_prompt_tokens = first.prompt().len() as u64;
        let (whole, reason, num_tokens) = read(first).await;
        assert_eq!((reason, num_tokens), (Some("length"), 50));
        let stop: String = whole.chars().skip(5).take(2).collect();
        let slow = generate(&app, &json!(stop));
        // It has ended before anything of it is read.
        while app.models()[0].engine.stats().num_stopped < 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let (text, reason, num_tokens) = read(slow).await;
        assert_eq!((text.as_str(), reason), (&whole[..whole.find(&stop).expect("it is there")], Some("stop")));
        assert!(num_tokens < 50);
        let stats = app.models()[0].engine.stats();
        assert_eq!(stats.generated_tokens, 50 + u64::from(num_tokens), "tokens were made that nobody is shown");
        // To the engine too it is an answer that has ended, and no client that left.
        assert_eq!((stats.num_length, stats.num_stopped, stats.num_aborted), (1, 1, 0));
        assert_eq!(stats.prompt_tokens, 2 * num_prompt_tokens);
        for (reason, count) in [("length", 1.0), ("stop", 1.0), ("abort", 0.0)] {
            let label = format!("finished_reason=\"{reason}\"");
            assert_eq!(metrics::value(&app, "vllm:request_success_total", &label).await, Some(count), "{reason}");
        }
        let num_counted = metrics::value(&app, "vllm:request_generation_tokens_sum", "").await;
        assert_eq!(num_counted, Some(f64::from(50 + num_tokens)));
        app.models()[0].end();
    }

    /// The engine goes on with others; the client's side is where it is told, as any panic there.
    #[tokio::test]
    async fn a_panic_where_stop_strings_are_looked_for_ends_one_sequence() {
        let app = served();
        let model = &app.models()[0];
        let body = json!({"prompt": "x", "max_tokens": 50, "stop": "never"});
        let (_, jobs) = prepare(Endpoint::Completions, model, &Client::default(), &body).expect("a request");
        let opened = Generation::open(model, jobs.jobs, Instant::now(), None, None);
        let (mut generation, mut handed) = opened.expect("it fits");
        let mut tell = |id| handed[0].1.event(Event::Token { id, logprobs: None });
        assert_eq!(tell(TokenId(70)), Flow::Continue);
        assert_eq!(tell(BUG), Flow::Stop);
        drop(handed);
        assert!(generation.next().await.expect("a piece").is_ok());
        assert!(AssertUnwindSafe(generation.next()).catch_unwind().await.is_err());
        drop(generation);
        let ended = metrics::value(&app, "vllm:request_success_total", "finished_reason=\"error\"").await;
        assert_eq!(ended, Some(1.0));
        model.end();
    }

    /// Of a prompt that may not wait so often there are no copies.
    #[test]
    fn what_never_fits_is_refused_before_its_choices_are_made() {
        let app = served();
        let body = json!({"prompt": vec![50; 100], "n": 20, "max_tokens": 1});
        let refused = prepare(Endpoint::Completions, &app.models()[0], &Client::default(), &body).err();
        assert_eq!(refused.and_then(|error| error.code), Some("queue_too_small"));
        app.models()[0].end();
    }
}
