//! What a start took, phase by phase. Invariant: the phases follow one another without gaps, so that they sum to the
//! whole; parts of a phase may run on several threads or beside each other.

use std::fmt;
use std::time::{Duration, Instant};

use fullbore_engine::backend::LoadTimes;

#[derive(Clone, Debug)]
pub struct StartTimes {
    begun: Instant,
    /// Of the last phase.
    ended: Instant,
    phases: Vec<(&'static str, Duration, String)>,
}

/// What a phase was spent on, in words; empty where that is not told.
pub struct Parts(String);

impl Parts {
    pub fn of(times: LoadTimes) -> Parts {
        let LoadTimes { read, pack, upload, pipelines, num_pipelines } = times;
        let rows = [("read", read), ("pack", pack), ("upload", upload)];
        let rows = rows.into_iter().filter(|(_, took)| !took.is_zero());
        let rows = rows.map(|(name, took)| format!("{name} {}", seconds(took)));
        let compiled = format!("{num_pipelines} pipelines {}", seconds(pipelines));
        let all: Vec<String> = rows.chain((num_pipelines > 0).then_some(compiled)).collect();
        Parts(all.join(", "))
    }

    pub fn tokenizer(took: Duration) -> Parts {
        Parts(format!("tokenizer {}", seconds(took)))
    }
}

/// Begins now.
impl Default for StartTimes {
    fn default() -> StartTimes {
        let now = Instant::now();
        StartTimes { begun: now, ended: now, phases: Vec::new() }
    }
}

impl StartTimes {
    /// The phase that began with the end of the one before it ends now.
    pub fn end(&mut self, phase: &'static str, parts: &Parts) {
        let now = Instant::now();
        self.phases.push((phase, now - self.ended, parts.0.clone()));
        self.ended = now;
    }

    /// What was done since the last phase is no part of this start.
    pub fn go_on(&mut self) {
        self.ended = Instant::now();
    }

    /// Two devices that were started in turns: each phase as long as on both.
    pub fn then(mut self, other: StartTimes) -> StartTimes {
        for (phase, took, parts) in other.phases {
            match self.phases.iter_mut().find(|(known, ..)| *known == phase) {
                Some((_, sum, all)) => {
                    *sum += took;
                    *all = [all.as_str(), &parts]
                        .into_iter()
                        .filter(|part| !part.is_empty())
                        .collect::<Vec<_>>()
                        .join("; ");
                }
                None => self.phases.push((phase, took, parts)),
            }
        }
        self.ended = self.ended.max(other.ended);
        self
    }

    /// Each by its name, in the order of their ends.
    pub fn phases(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        self.phases.iter().map(|&(phase, took, _)| (phase, took))
    }
}

impl fmt::Display for StartTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (phase, took, parts) in &self.phases {
            let line = format!("{phase:<10}{:>12}   {parts}", seconds(*took));
            writeln!(f, "{}", line.trim_end())?;
        }
        write!(f, "{:<10}{:>12}", "ready", seconds(self.ended - self.begun))
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_sum_to_the_whole_and_say_their_parts() {
        let mut times = StartTimes::default();
        let ms = Duration::from_millis;
        let loading =
            LoadTimes { read: ms(20), upload: ms(5), pipelines: ms(7), num_pipelines: 3, ..Default::default() };
        times.end("device", &Parts::of(LoadTimes::default()));
        times.end("weights", &Parts::of(loading));
        let sum: Duration = times.phases.iter().map(|(_, took, _)| *took).sum();
        assert_eq!(sum, times.ended - times.begun);
        let table = times.to_string();
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[0].starts_with("device") && lines[0].ends_with(" s"), "{table}");
        assert!(lines[1].ends_with("   read 0.020 s, upload 0.005 s, 3 pipelines 0.007 s"), "{table}");
        assert!(lines[2].starts_with("ready"), "{table}");
    }
}
