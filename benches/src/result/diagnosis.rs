//! What the doctor found, as a result file has it. Nothing here measures or predicts.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::table::number;

/// What limits a device, which change of flags was predicted to bring most, and what it brought.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// A cause as `/v1/limits` names it, or `text`: prompts are read more slowly than they are computed.
    pub limit: String,
    /// The same in a sentence.
    pub verdict: String,
    pub output_tokens_per_s: f64,
    /// By the prices that were measured.
    pub predicted_output_tokens_per_s: f64,
    /// Every change that was simulated.
    pub changes: Vec<Change>,
    /// `None` where no change brings enough to be worth it.
    pub advice: Option<Advice>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// What to say or do: flags, as a rule.
    pub change: String,
    /// Predicted output tokens a second with it, over those predicted without.
    pub predicted_gain: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Advice {
    pub change: String,
    pub predicted_gain: f64,
    /// Between the tokens of a request, p99: without it, and with it.
    pub predicted_itl_p99_ms: [f64; 2],
    /// Measured output tokens a second with it, over those measured without; `None` where it was not tried.
    pub measured_gain: Option<f64>,
    /// What would limit the device then.
    pub then: String,
}

impl Advice {
    /// How far the gain was from what was predicted, as a share of what was measured.
    pub fn error(&self) -> Option<f64> {
        self.measured_gain.map(|measured| self.predicted_gain / measured - 1.0)
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Diagnosis { verdict, output_tokens_per_s, predicted_output_tokens_per_s, changes, advice, .. } = self;
        let [rate, predicted] = [*output_tokens_per_s, *predicted_output_tokens_per_s].map(number);
        writeln!(f, "{rate} output tokens/s, and {predicted} predicted from the device's prices")?;
        writeln!(f, "what limits it: {verdict}")?;
        let Some(advice) = advice else {
            return match changes.iter().max_by(|a, b| a.predicted_gain.total_cmp(&b.predicted_gain)) {
                Some(best) => writeln!(
                    f,
                    "nothing to change: of {} changes that were simulated the best, {}, brings {} times as much",
                    changes.len(),
                    best.change,
                    number(best.predicted_gain)
                ),
                None => writeln!(f, "nothing to change: no flag is left that could help"),
            };
        };
        let [before, after] = advice.predicted_itl_p99_ms.map(number);
        write!(f, "what to change: {}, for {} times the output", advice.change, number(advice.predicted_gain))?;
        writeln!(f, " (gaps between tokens, p99: {after} ms instead of {before})")?;
        match (advice.measured_gain, advice.error()) {
            (Some(gain), Some(error)) => {
                let word = if error < 0.0 { "less" } else { "more" };
                let percent = error.abs() * 100.0;
                writeln!(f, "tried: {} times the output; predicted was {percent:.0} % {word}", number(gain))?;
            }
            _ => writeln!(f, "not tried")?,
        }
        writeln!(f, "what would limit it then: {}", advice.then)
    }
}
