//! What a server has told of its engines, kept for five minutes. Invariant: frames are in the order of their ends.

use crate::api::live::{Live, LiveEngine, LiveFrame};

/// The server keeps as long.
const KEPT_MS: u64 = 300_000;

#[derive(Default)]
pub struct Recent {
    pub causes: Vec<String>,
    pub engines: Vec<LiveEngine>,
}

impl Recent {
    /// Of the engine that lags behind most; 0 before the first.
    pub fn newest_ms(&self) -> u64 {
        self.engines.iter().map(|engine| newest_ms(&engine.frames)).min().unwrap_or(0)
    }

    /// Takes what is new; an engine that is not told of any more is forgotten.
    pub fn add(&mut self, live: Live) {
        let known = std::mem::take(&mut self.engines);
        self.causes = live.causes;
        self.engines = live.engines;
        for engine in &mut self.engines {
            let Some(before) = known.iter().find(|before| before.model == engine.model) else { continue };
            let newest = newest_ms(&before.frames);
            let new: Vec<_> = engine.frames.drain(..).filter(|frame| frame.at_ms > newest).collect();
            engine.frames = before.frames.iter().cloned().chain(new).collect();
            let oldest = newest_ms(&engine.frames).saturating_sub(KEPT_MS);
            engine.frames.retain(|frame| frame.at_ms >= oldest);
        }
    }
}

pub fn newest_ms(frames: &[LiveFrame]) -> u64 {
    frames.last().map_or(0, |frame| frame.at_ms)
}

/// Shares of the device's time by cause over these frames together; `None` where none was charged.
pub fn shares<'a>(frames: impl IntoIterator<Item = &'a LiveFrame>) -> Option<Vec<f64>> {
    let mut seconds: Vec<f64> = Vec::new();
    for frame in frames {
        seconds.resize(frame.device_s.len().max(seconds.len()), 0.0);
        seconds.iter_mut().zip(&frame.device_s).for_each(|(sum, of)| *sum += of);
    }
    let total: f64 = seconds.iter().sum();
    (total > 0.0).then(|| seconds.into_iter().map(|of| of / total).collect())
}
