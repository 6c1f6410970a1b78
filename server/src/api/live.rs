//! `/v1/live`: what engines are at and were at in the last minutes, frame by frame, for the page and `fullbore top`.
//! Invariant: numbers are those of `/metrics` and `/v1/limits`; who asks again gets only what is new.

use std::sync::Arc;

use fullbore_engine::backend::DeviceInfo;
use fullbore_engine::limits::Cause;
use serde::{Deserialize, Serialize};

use super::ServedModel;
use crate::http::metrics::Quantiles;
use crate::live::{Frame, PERIOD};

#[derive(Debug, Default, Deserialize)]
pub struct LiveQuery {
    /// Only frames that ended later than this, in Unix milliseconds: the `at_ms` of the last that the client has.
    #[serde(default)]
    after: u64,
    /// Of this one alone.
    pub model: Option<String>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Live {
    /// `live`.
    pub object: String,
    /// About what a frame lasts.
    pub period_s: f64,
    /// What device time is charged to, in the order of each frame's `device_s`.
    pub causes: Vec<String>,
    pub engines: Vec<LiveEngine>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LiveEngine {
    pub model: String,
    /// All of them in one line.
    pub device: LiveDevice,
    /// In the order of each frame's `device_tokens`.
    #[serde(default)]
    pub devices: Vec<LiveDevice>,
    pub max_num_seqs: u32,
    pub max_model_len: u32,
    /// The cause that the verdict names, and the verdict of the last minute.
    pub limit: String,
    pub verdict: String,
    /// The oldest first.
    pub frames: Vec<LiveFrame>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LiveDevice {
    pub id: String,
    pub name: String,
}

/// See [`Frame`].
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LiveFrame {
    pub at_ms: u64,
    pub period_s: f64,
    pub device_s: Vec<f64>,
    pub steps: u64,
    pub rows: u64,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    #[serde(default)]
    pub device_tokens: Vec<u64>,
    pub preemptions: u64,
    pub running: u32,
    pub waiting: u64,
    pub blocks: LiveBlocks,
    pub ttft_ms: Option<Quantiles>,
    pub itl_ms: Option<Quantiles>,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct LiveBlocks {
    pub used: u32,
    pub cached: u32,
    pub free: u32,
}

pub fn report(models: &[Arc<ServedModel>], query: &LiveQuery) -> Live {
    Live {
        object: "live".to_owned(),
        period_s: PERIOD.as_secs_f64(),
        causes: Cause::ALL.map(|cause| cause.name().to_owned()).to_vec(),
        engines: models.iter().map(|model| engine(model, query.after)).collect(),
    }
}

fn engine(model: &ServedModel, after_ms: u64) -> LiveEngine {
    let stats = model.engine.stats();
    let verdict = model.engine.verdict(&stats);
    let (device, config) = (model.engine.device(), model.engine.config());
    LiveEngine {
        model: model.name.clone(),
        device: device.into(),
        devices: model.engine.engines().iter().map(|engine| engine.device().clone().into()).collect(),
        max_num_seqs: config.max_num_seqs,
        max_model_len: config.max_model_len,
        limit: verdict.cause.name().to_owned(),
        verdict: verdict.sentence,
        frames: model.history.after(after_ms).iter().map(LiveFrame::from).collect(),
    }
}

impl From<DeviceInfo> for LiveDevice {
    fn from(DeviceInfo { id, name, .. }: DeviceInfo) -> LiveDevice {
        LiveDevice { id, name }
    }
}

impl From<&Frame> for LiveFrame {
    fn from(frame: &Frame) -> LiveFrame {
        let blocks = frame.blocks;
        LiveFrame {
            at_ms: frame.at_ms,
            period_s: frame.period.as_secs_f64(),
            device_s: frame.device_ns.iter().map(|&ns| ns as f64 / 1e9).collect(),
            steps: frame.num_steps,
            rows: frame.num_rows,
            prompt_tokens: frame.prefill_tokens,
            generated_tokens: frame.generated_tokens,
            device_tokens: frame.device_tokens.clone(),
            preemptions: frame.num_preemptions,
            running: frame.num_running,
            waiting: frame.num_waiting,
            blocks: LiveBlocks { used: blocks.referenced, cached: blocks.cached, free: blocks.free },
            ttft_ms: frame.first_token,
            itl_ms: frame.next_token,
        }
    }
}
