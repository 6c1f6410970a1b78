//! The picture that `fullbore top` shows: a text of so many columns and rows. Invariant: a plain picture has no control
//! characters, and no picture is wider or higher than it may be. Its numbers are those of the page's live view.

use super::plot;
use super::recent::{Recent, newest_ms, shares};
use crate::api::live::{LiveEngine, LiveFrame};
use crate::http::metrics::Quantiles;

#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub columns: usize,
    pub rows: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// Bands are letters.
    Plain,
    /// Bands are colours of a terminal that has 256.
    Ansi,
}

/// A cause's words, its letter where there are no colours, and its colour.
const CAUSES: [(&str, &str, char, u8); 15] = [
    ("computing", "computing", '#', 37),
    ("host_schedule", "host: schedule", 's', 214),
    ("host_record", "host: record", 'r', 208),
    ("host_upload", "host: upload", 'u', 202),
    ("host_read_back", "host: read back", 'b', 166),
    ("neighbour", "neighbour", 'N', 130),
    ("kv_memory", "KV memory", 'M', 99),
    ("slots", "slots", 'S', 33),
    ("latency_target", "latency target", 'L', 169),
    ("step_budget", "step budget", 'B', 44),
    ("shared_prefix", "shared prefix", 'P', 106),
    ("grammar_memory", "grammar memory", 'G', 133),
    ("tenant_cap", "tenant caps", 'T', 62),
    ("device_lost", "device lost", 'X', 160),
    // What there was nothing to do for is on top, as the sky over the rest.
    ("no_requests", "no requests", '.', 240),
];
const USED: u8 = 208;
const CACHED: u8 = 130;
const FREE: u8 = 240;
/// Where lines of numbers begin: after the widest word.
const WORDS_WIDTH: usize = 54;
/// The verdict is of so long.
const WINDOW_MS: u64 = 60_000;
/// Rates are of so many, for a step may take longer than a second.
const NUM_RATE_FRAMES: usize = 5;
/// Lines of numbers of an engine that has little room: tokens, batch and queue.
const NUM_SHORT_NUMBERS: usize = 5;

pub fn picture(recent: &Recent, size: Size, paint: Paint) -> String {
    let columns = size.columns.max(40);
    let views = || recent.engines.iter().map(|engine| View { engine, causes: &recent.causes, columns, paint });
    let share_of_rows = size.rows / recent.engines.len().max(1);
    let mut lines: Vec<String> = views().flat_map(|view| view.lines(share_of_rows)).collect();
    if lines.len() > size.rows && recent.engines.len() > 1 {
        lines = views().flat_map(|view| view.short_lines()).collect();
    }
    lines.truncate(size.rows.max(1));
    lines.iter().map(|line| line.trim_end().to_owned() + "\n").collect()
}

struct View<'a> {
    engine: &'a LiveEngine,
    causes: &'a [String],
    columns: usize,
    paint: Paint,
}

impl View<'_> {
    fn heading(&self) -> Vec<String> {
        let engine = self.engine;
        let title = cut(&format!("{} on {}", engine.model, engine.device.name), self.columns);
        let mut lines = vec![self.bold(&title)];
        lines.extend(wrap(&engine.verdict, self.columns));
        lines
    }

    /// Where several engines would not find room: without what is drawn over time.
    fn short_lines(&self) -> Vec<String> {
        let mut lines = self.heading();
        lines.extend(self.legend());
        lines.extend(self.numbers().into_iter().take(NUM_SHORT_NUMBERS));
        lines.push(String::new());
        lines
    }

    fn lines(&self, rows: usize) -> Vec<String> {
        let mut lines = self.heading();
        lines.push(String::new());
        let numbers = self.numbers();
        let legend = self.legend();
        let rest = lines.len() + legend.len() + numbers.len() + 3;
        let height = rows.saturating_sub(rest).clamp(3, 12);
        lines.extend(self.device_time(height));
        lines.extend(legend);
        lines.push(String::new());
        lines.extend(numbers);
        lines
    }

    /// In columns of time: as many as there are, or as there is room for.
    fn slices(&self, columns: usize) -> Vec<&[LiveFrame]> {
        let frames = &self.engine.frames;
        let per_slice = frames.len().div_ceil(columns.max(1)).max(1);
        frames.rchunks(per_slice).rev().collect()
    }

    fn device_time(&self, height: usize) -> Vec<String> {
        let slices = self.slices(self.columns);
        let order: Vec<Option<usize>> =
            CAUSES.iter().map(|(name, ..)| self.causes.iter().position(|cause| cause == name)).collect();
        let in_order =
            |by_cause: Vec<f64>| order.iter().map(|at| at.map_or(0.0, |at| by_cause[at])).collect::<Vec<_>>();
        // A step's time is charged when it has ended: what has none is like what follows, or else like what was before.
        let mut columns: Vec<Option<Vec<f64>>> = slices.iter().map(|slice| shares(*slice).map(in_order)).collect();
        for at in (1..columns.len()).rev() {
            if columns[at - 1].is_none() {
                columns[at - 1] = columns[at].clone();
            }
        }
        for at in 1..columns.len() {
            if columns[at].is_none() {
                columns[at] = columns[at - 1].clone();
            }
        }
        let seconds = self.engine.frames.iter().map(|frame| frame.period_s).sum::<f64>();
        let heading = format!("device time, last {seconds:.0} s");
        let cells = plot::bands(&columns, height);
        let rows = cells.iter().map(|row| row.iter().map(|cell| self.cell(*cell)).collect::<String>());
        std::iter::once(self.bold(&cut(&heading, self.columns))).chain(rows).collect()
    }

    fn cell(&self, cause: Option<usize>) -> String {
        let Some(cause) = cause else { return " ".to_owned() };
        let (_, _, letter, colour) = CAUSES[cause];
        match self.paint {
            Paint::Plain => letter.to_string(),
            Paint::Ansi => coloured(colour, "█"),
        }
    }

    /// Of the last minute, what there was of it.
    fn legend(&self) -> Vec<String> {
        let frames = &self.engine.frames;
        let oldest = newest_ms(frames).saturating_sub(WINDOW_MS);
        let by_cause = shares(frames.iter().filter(|frame| frame.at_ms > oldest)).unwrap_or_default();
        let mut lines = vec![(String::new(), 0)];
        for (name, words, letter, colour) in CAUSES {
            let at = self.causes.iter().position(|cause| cause == name);
            let share = at.and_then(|at| by_cause.get(at)).copied().unwrap_or(0.0);
            if share < 0.0005 {
                continue;
            }
            let text = format!(" {words} {:.1} %", share * 100.0);
            let width = text.chars().count() + 3;
            let mark = if self.paint == Paint::Ansi { coloured(colour, "■") } else { letter.to_string() };
            let last = lines.last_mut().expect("there is one");
            if last.1 + width > self.columns {
                lines.push((String::new(), 0));
            }
            let last = lines.last_mut().expect("there is one");
            last.0 += &format!("{mark}{text}  ");
            last.1 += width;
        }
        lines.into_iter().map(|(line, _)| line).collect()
    }

    fn numbers(&self) -> Vec<String> {
        let Some(last) = self.engine.frames.last() else { return vec!["no second has passed yet".to_owned()] };
        let lately = &self.engine.frames[self.engine.frames.len().saturating_sub(NUM_RATE_FRAMES)..];
        let rows = |frame: &LiveFrame| frame.rows as f64 / frame.steps.max(1) as f64;
        let line = |name: &str, words: String, number: &dyn Fn(&LiveFrame) -> f64| self.line(name, &words, number);
        let rate = |name: &str, tokens: fn(&LiveFrame) -> u64| {
            let words = format!("{} tokens a second", count(per_second(lately, tokens)));
            self.line(name, &words, &|frame| per_second(std::slice::from_ref(frame), tokens))
        };
        let rate_of_device = |index: usize| {
            let tokens = move |frame: &LiveFrame| frame.device_tokens.get(index).copied().unwrap_or(0);
            let words = format!("{} tokens a second", count(per_second(lately, tokens)));
            let name = format!("  {}", self.engine.devices[index].id);
            self.line(&name, &words, &|frame| per_second(std::slice::from_ref(frame), tokens))
        };
        let devices = if self.engine.devices.len() > 1 { 0..self.engine.devices.len() } else { 0..0 };
        let latency = |name: &str, of: fn(&LiveFrame) -> Option<Quantiles>| {
            let number = move |frame: &LiveFrame| of(frame).map_or(0.0, |quantiles| quantiles.p50);
            self.line(name, &quantiles(of(last)), &number)
        };
        vec![
            rate("generated", |frame| frame.generated_tokens),
            rate("prompts", |frame| frame.prompt_tokens),
            line("running", format!("{} of {}", last.running, self.engine.max_num_seqs), &|frame| frame.running.into()),
            line("rows", format!("{} a step", count(rows(last))), &rows),
            line("waiting", format!("{}", last.waiting), &|frame| frame.waiting as f64),
            latency("to first token", |frame| frame.ttft_ms),
            latency("between tokens", |frame| frame.itl_ms),
            self.blocks(last),
        ]
        .into_iter()
        .chain(devices.map(rate_of_device))
        .collect()
    }

    fn line(&self, name: &str, words: &str, number: &dyn Fn(&LiveFrame) -> f64) -> String {
        let slices = self.slices(self.columns.saturating_sub(WORDS_WIDTH));
        let mean = |slice: &&[LiveFrame]| Some(slice.iter().map(number).sum::<f64>() / slice.len() as f64);
        let plotted = plot::line(&slices.iter().map(mean).collect::<Vec<_>>());
        let words = format!("{name:<15}{words}");
        format!("{:<WORDS_WIDTH$}{}", cut(&words, WORDS_WIDTH - 1), self.colour(USED, &plotted))
    }

    fn blocks(&self, last: &LiveFrame) -> String {
        let blocks = last.blocks;
        let words = format!("{} used, {} cached, {} free", blocks.used, blocks.cached, blocks.free);
        let words = format!("{:<15}{words}", "KV blocks");
        let parts = [blocks.used, blocks.cached, blocks.free].map(f64::from);
        let widths = plot::bar(&parts, self.columns.saturating_sub(WORDS_WIDTH).min(40));
        let painted = |(width, (letter, colour)): (&usize, (char, u8))| match self.paint {
            Paint::Plain => letter.to_string().repeat(*width),
            Paint::Ansi => coloured(colour, &"█".repeat(*width)),
        };
        let bar: String = widths.iter().zip([('#', USED), ('c', CACHED), ('.', FREE)]).map(painted).collect();
        format!("{:<WORDS_WIDTH$}{bar}", cut(&words, WORDS_WIDTH - 1))
    }

    fn bold(&self, text: &str) -> String {
        if self.paint == Paint::Ansi { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn colour(&self, colour: u8, text: &str) -> String {
        if self.paint == Paint::Ansi { coloured(colour, text) } else { text.to_owned() }
    }
}

fn coloured(colour: u8, text: &str) -> String {
    format!("\x1b[38;5;{colour}m{text}\x1b[0m")
}

fn quantiles(quantiles: Option<Quantiles>) -> String {
    match quantiles {
        Some(Quantiles { p50, p95, p99 }) => format!("p50 {}  p95 {}  p99 {}", time(p50), time(p95), time(p99)),
        None => "-".to_owned(),
    }
}

/// Over these frames together.
fn per_second(frames: &[LiveFrame], tokens: impl Fn(&LiveFrame) -> u64) -> f64 {
    let seconds: f64 = frames.iter().map(|frame| frame.period_s).sum();
    let total: u64 = frames.iter().map(tokens).sum();
    if seconds > 0.0 { total as f64 / seconds } else { 0.0 }
}

fn time(ms: f64) -> String {
    if ms < 1000.0 { format!("{} ms", count(ms)) } else { format!("{:.1} s", ms / 1e3) }
}

fn count(number: f64) -> String {
    if number < 10.0 { format!("{number:.1}") } else { format!("{number:.0}") }
}

fn cut(text: &str, columns: usize) -> String {
    text.chars().filter(|letter| !letter.is_control()).take(columns).collect()
}

/// Breaks between words; longer words are cut.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace().map(|word| cut(word, columns)) {
        let last = lines.last_mut().expect("there is one");
        if !last.is_empty() && last.chars().count() + 1 + word.chars().count() > columns {
            lines.push(word);
        } else {
            let space = if last.is_empty() { "" } else { " " };
            last.push_str(space);
            last.push_str(&word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::live::{Live, LiveBlocks, LiveDevice};

    fn frame(second: u64, device_s: [f64; 2]) -> LiveFrame {
        LiveFrame {
            at_ms: second * 1000,
            period_s: 1.0,
            device_s: device_s.to_vec(),
            steps: 10,
            rows: 45,
            prompt_tokens: 0,
            generated_tokens: 40,
            device_tokens: vec![40],
            preemptions: 0,
            running: 4,
            waiting: second,
            blocks: LiveBlocks { used: 10, cached: 20, free: 30 },
            ttft_ms: None,
            itl_ms: Some(Quantiles { p50: 12.0, p95: 140.0, p99: 2000.0 }),
        }
    }

    fn recent(model: &str, frames: Vec<LiveFrame>) -> Recent {
        let engine = LiveEngine {
            model: model.to_owned(),
            device: LiveDevice { id: "sim".to_owned(), name: "a device".to_owned() },
            devices: vec![LiveDevice { id: "sim".to_owned(), name: "a device".to_owned() }],
            max_num_seqs: 8,
            max_model_len: 1024,
            limit: "computing".to_owned(),
            verdict: "the device: it computes".to_owned(),
            frames,
        };
        let causes = vec!["computing".to_owned(), "no_requests".to_owned()];
        let mut recent = Recent::default();
        recent.add(Live { object: "live".to_owned(), period_s: 1.0, causes, engines: vec![engine] });
        recent
    }

    #[test]
    fn a_plain_picture_is_text() {
        // The second frame is within a step, which the third is charged for.
        let frames = vec![frame(1, [0.0, 1.0]), frame(2, [0.0, 0.0]), frame(3, [1.5, 0.5])];
        let text = picture(&recent("small", frames), Size { columns: 70, rows: 18 }, Paint::Plain);
        let expected = "\
small on a device
the device: it computes

device time, last 3 s
...
.##
.##
# computing 50.0 %  . no requests 50.0 %

generated      40 tokens a second                     ███
prompts        0.0 tokens a second
running        4 of 8                                 ███
rows           4.5 a step                             ███
waiting        3                                      ▃▅█
to first token -
between tokens p50 12 ms  p95 140 ms  p99 2.0 s       ███
KV blocks      10 used, 20 cached, 30 free            ###ccccc........
";
        assert_eq!(text, expected);
    }

    #[test]
    fn each_of_several_devices_has_its_rate() {
        let mut recent = recent("small", vec![LiveFrame { device_tokens: vec![10, 30], ..frame(1, [1.0, 0.0]) }]);
        let device = |id: &str| LiveDevice { id: id.to_owned(), name: "one".to_owned() };
        recent.engines[0].devices = vec![device("vulkan:0"), device("cpu")];
        let text = picture(&recent, Size { columns: 70, rows: 30 }, Paint::Plain);
        let rates: Vec<&str> = text.lines().filter(|line| line.starts_with("  ")).map(|line| &line[..33]).collect();
        assert_eq!(rates, ["  vulkan:0     10 tokens a second", "  cpu          30 tokens a second"]);
    }

    #[test]
    fn several_engines_share_the_rows_or_are_told_in_short() {
        let mut both = recent("small", vec![frame(1, [0.5, 0.5])]);
        both.engines.extend(recent("large", vec![frame(1, [1.0, 0.0])]).engines);
        let size = |rows| Size { columns: 70, rows };
        let long = picture(&both, size(60), Paint::Plain);
        assert_eq!(long.matches("device time, last 1 s").count(), 2, "{long}");
        let short = picture(&both, size(24), Paint::Plain);
        assert!(!short.contains("device time") && short.lines().count() <= 24, "{short}");
        for words in ["small on a device\n", "large on a device\n"] {
            let part = &short[short.find(words).expect("both are there")..];
            assert!(part.contains("4 of 8") && part.contains("40 tokens a second"), "{short}");
        }
    }

    #[test]
    fn no_picture_is_too_large_or_writes_to_the_terminal_what_a_server_says() {
        let frames: Vec<LiveFrame> = (1..400).map(|second| frame(second, [0.3, 0.7])).collect();
        let recent = recent("evil\x1b]0;title\x07 model with a name that is longer than the terminal is wide", frames);
        for (columns, rows) in [(40, 10), (80, 24), (300, 100)] {
            let text = picture(&recent, Size { columns, rows }, Paint::Plain);
            assert!(text.lines().count() <= rows, "{text}");
            for line in text.lines() {
                assert!(line.chars().count() <= columns && !line.contains(char::is_control), "{columns}: {line:?}");
            }
        }
    }

    #[test]
    fn what_was_told_before_is_kept() {
        let mut known = recent("small", vec![frame(1, [1.0, 0.0]), frame(2, [1.0, 0.0])]);
        let again = recent("small", vec![frame(2, [1.0, 0.0]), frame(303, [1.0, 0.0])]);
        assert_eq!(known.newest_ms(), 2000);
        let Recent { causes, engines } = again;
        known.add(Live { object: "live".to_owned(), period_s: 1.0, causes, engines });
        let ends: Vec<u64> = known.engines[0].frames.iter().map(|frame| frame.at_ms).collect();
        assert_eq!(ends, [303_000], "five minutes are kept");
    }
}
