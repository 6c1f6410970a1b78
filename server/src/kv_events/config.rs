//! `--kv-events-config`, in vLLM's words. Invariant: unless asked otherwise nobody but this machine is told anything.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::Deserialize;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KvEventsConfig {
    enable_kv_cache_events: bool,
    /// `zmq`, or `null` for none.
    publisher: String,
    /// Where subscribers connect: `tcp://HOST:PORT`, of which HOST is an address or `*`.
    pub endpoint: Endpoint,
    /// Where those connect who missed batches.
    pub replay_endpoint: Option<Endpoint>,
    /// Batches that are kept for them.
    pub buffer_steps: usize,
    /// Batches that may wait for a subscriber before it misses some.
    pub hwm: usize,
    /// Batches of engines that may wait to be written.
    pub max_queue_size: usize,
    /// Before each batch; llm-d wants `kv@ADDRESS@MODEL`.
    pub topic: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Endpoint(pub SocketAddr);

impl Default for KvEventsConfig {
    fn default() -> KvEventsConfig {
        KvEventsConfig {
            enable_kv_cache_events: true,
            publisher: "zmq".to_owned(),
            endpoint: Endpoint(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5557)),
            replay_endpoint: None,
            buffer_steps: 10_000,
            hwm: 10_000,
            max_queue_size: 1024,
            topic: String::new(),
        }
    }
}

impl KvEventsConfig {
    pub fn is_on(&self) -> bool {
        self.enable_kv_cache_events && self.publisher == "zmq"
    }
}

impl FromStr for KvEventsConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<KvEventsConfig, String> {
        let example = r#"write it as {"endpoint": "tcp://127.0.0.1:5557", "topic": "kv@10.0.0.7:8080@smollm2"}"#;
        let config: KvEventsConfig = serde_json::from_str(text).map_err(|error| format!("{error}; {example}"))?;
        match config.publisher.as_str() {
            "zmq" | "null" => Ok(config),
            other => Err(format!("there is no publisher {other}; it is zmq, or null for none")),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(text: String) -> Result<Endpoint, String> {
        let address = text.strip_prefix("tcp://").map(|rest| rest.replacen('*', "0.0.0.0", 1));
        let address = address.and_then(|address| address.parse().ok());
        let refuse = || format!("{text} is no endpoint to bind; write tcp://ADDRESS:PORT, or tcp://*:PORT for all");
        address.map(Endpoint).ok_or_else(refuse)
    }
}

impl Endpoint {
    /// Of the model that is served as number `nth`: the next port, as vLLM counts ranks.
    pub fn of_model(self, nth: u16) -> SocketAddr {
        let port = if self.0.port() == 0 { 0 } else { self.0.port().saturating_add(nth) };
        SocketAddr::new(self.0.ip(), port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllms_words_are_taken() {
        let text = r#"{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557",
            "replay_endpoint": "tcp://[::1]:5558", "buffer_steps": 7, "hwm": 8, "max_queue_size": 9, "topic": "kv@"}"#;
        let config: KvEventsConfig = text.parse().expect("a config");
        assert_eq!(config.endpoint.of_model(0), "0.0.0.0:5557".parse().expect("an address"));
        assert_eq!(config.endpoint.of_model(2), "0.0.0.0:5559".parse().expect("an address"));
        let replay = config.replay_endpoint.expect("an endpoint");
        assert_eq!(replay.of_model(0), "[::1]:5558".parse().expect("an address"));
        assert_eq!((config.buffer_steps, config.hwm, config.max_queue_size, config.topic.as_str()), (7, 8, 9, "kv@"));
        let own: KvEventsConfig = "{}".parse().expect("a config");
        assert!(own.is_on() && own.endpoint.0.ip().is_loopback());
        for off in [r#"{"enable_kv_cache_events": false}"#, r#"{"publisher": "null"}"#] {
            assert!(!off.parse::<KvEventsConfig>().expect("a config").is_on(), "{off}");
        }
    }

    #[test]
    fn what_cannot_be_bound_is_named() {
        let wrong = [
            (r#"{"endpoint": "ipc:///tmp/kv"}"#, "ipc:///tmp/kv"),
            (r#"{"endpoint": "tcp://host:5557"}"#, "tcp://ADDRESS:PORT"),
            (r#"{"publisher": "kafka"}"#, "kafka"),
            (r#"{"endpoints": "x"}"#, "endpoints"),
            ("zmq", "write it as"),
        ];
        for (text, part) in wrong {
            let sentence = text.parse::<KvEventsConfig>().expect_err("refused");
            assert!(sentence.contains(part), "{text}: {sentence}");
        }
    }
}
