//! Trace files: when real requests came and how long they were.
//!
//! Two forms, told apart by the first character. CSV with the columns `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`
//! (AzurePublicDataset) or `Timestamp`, `Request tokens`, `Response tokens` (BurstGPT), where a timestamp is seconds or
//! `2023-11-16 18:17:03.9799600`, perhaps with an offset from UTC; and JSON lines with `timestamp` in milliseconds,
//! `input_length`, `output_length` and perhaps `hash_ids` (Mooncake). A row without output tokens is a request that
//! failed (BurstGPT keeps those), and asks for nothing that could be measured: it is left out and counted. Invariant: a
//! row that does not fit its form is refused with file, row and field; nothing is passed over in silence.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use serde_json::Value;

use crate::workload::{PlannedRequest, Segment};

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}, row {row}: `{field}` {problem}", path.display())]
    Row { path: PathBuf, row: u32, field: &'static str, problem: String },
    #[error("{}: {problem}", path.display())]
    File { path: PathBuf, problem: String },
}

/// Names of the columns for time, prompt and output.
const HEADERS: [[&str; 3]; 2] =
    [["TIMESTAMP", "ContextTokens", "GeneratedTokens"], ["Timestamp", "Request tokens", "Response tokens"]];

/// Where a CSV file has them.
struct Columns {
    names: [&'static str; 3],
    at: [usize; 3],
    num_columns: usize,
}

/// Tokens of a prompt that share a hash id, as in Mooncake's traces (Qin et al. 2025).
const TOKENS_PER_HASH: u32 = 512;

/// What is wrong with one row.
type BadField = (&'static str, String);

/// What a file has of requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// In order of arrival; the first arrives at 0.
    pub requests: Vec<PlannedRequest>,
    /// Rows without output tokens that were passed over on the way.
    pub num_without_output: usize,
}

/// At most `limit` requests, of the first rows that have output tokens.
pub fn read(path: &Path, limit: usize) -> Result<Trace, TraceError> {
    let bytes = fs::read(path).map_err(|source| TraceError::Read { path: path.to_owned(), source })?;
    parse(path, &bytes, limit)
}

/// `read` of what is there; `path` is for sentences.
fn parse(path: &Path, bytes: &[u8], limit: usize) -> Result<Trace, TraceError> {
    let file = |problem: String| TraceError::File { path: path.to_owned(), problem };
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let row = 1 + before.iter().filter(|&&byte| byte == b'\n').count() as u32;
        let problem = format!("is not UTF-8 from its byte {} on", before.len() - line_start + 1);
        TraceError::Row { path: path.to_owned(), row, field: "row", problem }
    })?;
    // Spreadsheets and some editors begin a text with a byte order mark.
    let text = text.trim_start_matches('\u{feff}');
    let is_json = text.trim_start().starts_with('{');
    let mut lines = (1..).zip(text.lines());
    let columns = match is_json {
        true => None,
        false => Some(Columns::of(lines.next().map_or("", |(_, line)| line)).ok_or_else(|| {
            let [azure, burst_gpt] = HEADERS.map(|names| names.join(","));
            file(format!("has neither the header {azure}, nor {burst_gpt} among its columns, nor JSON lines"))
        })?),
    };
    let (mut rows, mut num_without_output) = (Vec::new(), 0);
    for (row, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        if rows.len() == limit {
            break;
        }
        let parsed = columns.as_ref().map_or_else(|| json_row(line), |columns| columns.row(line));
        let bad = |(field, problem)| TraceError::Row { path: path.to_owned(), row, field, problem };
        match parsed.map_err(bad)? {
            (_, PlannedRequest { output_tokens: 0, .. }) => num_without_output += 1,
            (time_s, request) => rows.push((time_s, PlannedRequest { row, ..request })),
        }
    }
    match (rows.len(), num_without_output) {
        (0, 0) => return Err(file("has no rows".to_owned())),
        (0, rows) => return Err(file(format!("has no row with output tokens, of {rows}"))),
        _ => {}
    }
    rows.sort_by(|left, right| left.0.total_cmp(&right.0));
    let first = rows[0].0;
    let at = |(time_s, request): (f64, PlannedRequest)| PlannedRequest {
        arrival: Duration::from_secs_f64(time_s - first),
        ..request
    };
    Ok(Trace { requests: rows.into_iter().map(at).collect(), num_without_output })
}

impl Columns {
    fn of(header: &str) -> Option<Columns> {
        let found: Vec<&str> = header.split(',').map(str::trim).collect();
        let columns = |names: [&'static str; 3]| {
            let [time, prompt, output] = names.map(|name| found.iter().position(|found| *found == name));
            Some(Columns { names, at: [time?, prompt?, output?], num_columns: found.len() })
        };
        HEADERS.into_iter().find_map(columns)
    }

    /// Seconds of any epoch, and the request.
    fn row(&self, line: &str) -> Result<(f64, PlannedRequest), BadField> {
        let Columns { names: [time, prompt, output], at, num_columns } = *self;
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        if fields.len() != num_columns {
            let missing = (0..3).find(|&nth| at[nth] >= fields.len()).unwrap_or(2);
            let problem = format!("does not fit: the row has {} fields, not {num_columns}", fields.len());
            return Err((self.names[missing], problem));
        }
        let [timestamp, prompt_tokens, output_tokens] = at.map(|at| fields[at]);
        let seconds = match timestamp.parse::<f64>() {
            Ok(seconds) => Some(seconds).filter(|seconds| (0.0..MAX_SECONDS).contains(seconds)),
            Err(_) => date_time(timestamp),
        };
        let wrong_time =
            || (time, format!("is {timestamp:?}; write seconds, or a time like 2023-11-16 18:17:03.9799600"));
        let count = |field, text: &str, least| match text.parse::<u32>() {
            Ok(count) if count >= least => Ok(count),
            _ => Err((field, format!("is {text:?}; it must be a number of tokens, at least {least}"))),
        };
        let output_tokens = count(output, output_tokens, 0)?;
        // What failed may not even have a prompt.
        let prompt_tokens = count(prompt, prompt_tokens, output_tokens.min(1))?;
        let request = PlannedRequest { prompt_tokens, output_tokens, ..PlannedRequest::default() };
        Ok((seconds.ok_or_else(wrong_time)?, request))
    }
}

/// Some 300,000 years: what a `Duration` surely takes.
const MAX_SECONDS: f64 = 1e13;

/// `2023-11-16 18:17:03.9799600`, also with a T, and with `Z` or `+02:00` behind it, as seconds since 1970.
fn date_time(text: &str) -> Option<f64> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let (time, offset_s) = match time.find(['+', '-', 'Z']) {
        Some(at) => (&time[..at], offset(&time[at..])?),
        None => (time, 0.0),
    };
    let numbers = |text: &str, separator| -> Option<Vec<f64>> {
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        text.split(separator).map(|part| part.parse().ok().filter(|_| digits(part))).collect()
    };
    let (date, time) = (numbers(date, '-')?, numbers(time, ':')?);
    let (&[year, month, day], &[hour, minute, second]) = (date.as_slice(), time.as_slice()) else { return None };
    let whole = [year, month, day, hour, minute].iter().all(|part| part.fract() == 0.0);
    let in_range = (1970.0..10_000.0).contains(&year)
        && (1.0..=12.0).contains(&month)
        && (1.0..=days_of_month(year, month)).contains(&day)
        && hour < 24.0
        && minute < 60.0
        && second < 61.0;
    if !whole || !in_range {
        return None;
    }
    // The year begins in March, so that a leap day is its last.
    let (year, month) = if month < 3.0 { (year - 1.0, month + 9.0) } else { (year, month - 3.0) };
    let leap_days = (year / 4.0).floor() - (year / 100.0).floor() + (year / 400.0).floor();
    let days = 365.0 * year + leap_days + ((153.0 * month + 2.0) / 5.0).floor() + day - 719_469.0;
    Some(days * 86_400.0 + hour * 3600.0 + minute * 60.0 + second - offset_s)
}

/// `Z`, `+02:00`, or `-0330`, in seconds before UTC.
fn offset(text: &str) -> Option<f64> {
    if text == "Z" {
        return Some(0.0);
    }
    let (sign, digits) = text.split_at_checked(1)?;
    let digits = digits.replacen(':', "", 1);
    let number =
        digits.parse::<u32>().ok().filter(|_| digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_digit()))?;
    let (hours, minutes) = (number / 100, number % 100);
    let seconds = f64::from(hours * 3600 + minutes * 60);
    (hours < 24 && minutes < 60).then_some(if sign == "-" { -seconds } else { seconds })
}

fn days_of_month(year: f64, month: f64) -> f64 {
    let is_leap = year % 4.0 == 0.0 && (year % 100.0 != 0.0 || year % 400.0 == 0.0);
    match month as u32 {
        2 if is_leap => 29.0,
        2 => 28.0,
        4 | 6 | 9 | 11 => 30.0,
        _ => 31.0,
    }
}

/// Seconds, and the request.
fn json_row(line: &str) -> Result<(f64, PlannedRequest), BadField> {
    let value: Value = serde_json::from_str(line).map_err(|error| ("row", format!("is not JSON: {error}")))?;
    let time_ms = value["timestamp"].as_f64().filter(|ms| (0.0..MAX_SECONDS * 1e3).contains(ms));
    let wrong_time = || ("timestamp", format!("is {}; it must be milliseconds", value["timestamp"]));
    let count = |field: &'static str, least| {
        let count = value[field].as_u64().and_then(|count| u32::try_from(count).ok()).filter(|&count| count >= least);
        count.ok_or_else(|| (field, format!("is {}; it must be a number of tokens, at least {least}", value[field])))
    };
    let output_tokens = count("output_length", 0)?;
    let prompt_tokens = count("input_length", output_tokens.min(1))?;
    let ids = value["hash_ids"].as_array().map_or(&[][..], Vec::as_slice);
    let hash_ids: Vec<u64> = ids.iter().map(Value::as_u64).collect::<Option<_>>().unwrap_or_default();
    let wanted = prompt_tokens.div_ceil(TOKENS_PER_HASH) as usize;
    if !value["hash_ids"].is_null() && hash_ids.len() != wanted {
        let problem = format!("must be {wanted} whole numbers for {prompt_tokens} tokens, {TOKENS_PER_HASH} to each");
        return Err(("hash_ids", problem));
    }
    let segments = hash_ids.into_iter().map(|id| Segment { id, num_tokens: TOKENS_PER_HASH }).collect();
    let request = PlannedRequest { prompt_tokens, output_tokens, segments, ..PlannedRequest::default() };
    Ok((time_ms.ok_or_else(wrong_time)? / 1e3, request))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<PlannedRequest>, String> {
        parsed_bytes(text.as_bytes())
    }

    fn parsed_bytes(bytes: &[u8]) -> Result<Vec<PlannedRequest>, String> {
        trace(bytes, usize::MAX).map(|trace| trace.requests)
    }

    fn trace(bytes: &[u8], limit: usize) -> Result<Trace, String> {
        parse(Path::new("a.trace"), bytes, limit).map_err(|error| error.to_string())
    }

    #[test]
    fn both_forms_are_read() {
        let csv = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-12-31 23:59:59.9799600,4808,10\r\n\r\n\
                   2024-01-01 00:00:01.2319600,3180,8\r\n";
        let rows = parsed(csv).expect("it is right");
        let gap = rows[1].arrival.as_secs_f64();
        assert!((gap - 1.252).abs() < 1e-5, "{gap}");
        assert_eq!((rows[0].row, rows[0].arrival, rows[0].prompt_tokens), (2, Duration::ZERO, 4808));
        assert_eq!((rows[1].row, rows[1].output_tokens), (4, 8));
        // As Azure has it since 2024.
        let csv = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n\
                   2024-05-10T02:00:01.009930+02:00,2399,6\n2024-05-09 20:30:02.009930-0330,76,15\n\
                   2024-05-10 00:00:03.009930Z,1,1\n";
        let arrivals: Vec<u64> =
            parsed(csv).expect("it is right").iter().map(|row| row.arrival.as_millis() as u64).collect();
        assert_eq!(arrivals, [0, 1000, 2000, 3000]);
        for wrong in ["+00:60", "+24:00", "+1", "x", "+00:00:00", "+-1:00"] {
            assert!(parsed(&csv.replace("Z", wrong)).is_err(), "{wrong}");
        }
        let seconds = "TIMESTAMP,ContextTokens,GeneratedTokens\n12.5,7,1\n10.25,9,2\n";
        let rows = parsed(seconds).expect("it is right");
        // In order of arrival.
        assert_eq!(rows.iter().map(|row| row.row).collect::<Vec<_>>(), [3, 2]);
        assert_eq!(rows[1].arrival, Duration::from_millis(2250));
        let json = "{\"timestamp\": 3000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [0, 14]}\n\
                    {\"timestamp\": 4500.0, \"input_length\": 9, \"output_length\": 1}\n";
        let rows = parsed(json).expect("it is right");
        let segments = [0, 14].map(|id| Segment { id, num_tokens: TOKENS_PER_HASH });
        assert_eq!((rows[0].segments.as_slice(), rows[0].prompt_tokens), (segments.as_slice(), 600));
        assert_eq!((rows[1].arrival, rows[1].segments.len()), (Duration::from_millis(1500), 0));
        let burst_gpt = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
                         5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1087,230,1317,API log\n";
        let rows = parsed(burst_gpt).expect("it is right");
        assert_eq!((rows[0].prompt_tokens, rows[0].output_tokens), (472, 18));
        assert_eq!((rows[1].arrival, rows[1].prompt_tokens), (Duration::from_millis(40_500), 1087));
        assert_eq!(trace(json.as_bytes(), 1).expect("it is right").requests.len(), 1);
    }

    #[test]
    fn rows_without_output_are_left_out_and_counted_in_every_form() {
        let burst_gpt = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
                         5,ChatGPT,472,0,472,Conversation log\n7,ChatGPT,0,0,0,API log\n\
                         9,ChatGPT,472,18,490,Conversation log\n11,ChatGPT,3,0,3,API log\n\
                         12,GPT-4,1087,230,1317,API log\n13,GPT-4,8,0,8,API log\n";
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n5,472,0\n7,0,0\n9,472,18\n11,3,0\n12,1087,230\n13,8,0\n";
        let row = |(ms, input, output): (u32, u32, u32)| {
            format!("{{\"timestamp\":{ms},\"input_length\":{input},\"output_length\":{output}}}\n")
        };
        let rows = [(5000, 472, 0), (7000, 0, 0), (9000, 472, 18), (11_000, 3, 0), (12_000, 1087, 230), (13_000, 8, 0)];
        let mooncake: String = rows.map(row).concat();
        for text in [burst_gpt, azure, &mooncake] {
            let Trace { requests, num_without_output } = trace(text.as_bytes(), usize::MAX).expect(text);
            let arrivals: Vec<_> = requests.iter().map(|of| (of.arrival.as_secs(), of.output_tokens)).collect();
            assert_eq!((arrivals, num_without_output), (vec![(0, 18), (3, 230)], 4), "{text}");
            // A limit is of requests, whatever failed before and between them.
            for (limit, failed) in [(1, 2), (2, 3)] {
                let Trace { requests, num_without_output } = trace(text.as_bytes(), limit).expect(text);
                assert_eq!((requests.len(), num_without_output), (limit, failed), "{text}");
            }
            let none = parsed(&text.replace("18", "0").replace("230", "0")).expect_err("no output");
            assert_eq!(none, "a.trace: has no row with output tokens, of 6", "{text}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_trace() {
        for text in [
            "TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n",
            "{\"timestamp\": 3000, \"input_length\": 2, \"output_length\": 3}\n",
            "\n {\"timestamp\": 3000, \"input_length\": 2, \"output_length\": 3}\n",
        ] {
            let marked = parsed(&format!("\u{feff}{text}")).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(Ok(marked), parsed(text), "{text}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_named_by_their_row() {
        let check = |bytes: &[u8], row, byte| {
            let sentence = parsed_bytes(bytes).expect_err("no text");
            let expected = format!("a.trace, row {row}: `row` is not UTF-8 from its byte {byte} on");
            assert_eq!(sentence, expected);
        };
        check(b"\xff\xfeT\0I\0", 1, 1);
        check(b"TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n4,5,\xe9\n", 3, 5);
        check(b"{\"timestamp\":1,\"input_length\":2,\"output_length\":3}\r\n{\"timest\xc3(", 2, 9);
    }

    /// Every day that there is has its place, and no other is taken.
    #[test]
    fn a_day_that_is_not_in_the_calendar_is_refused() {
        for (year, days_of_february) in [(1970, 28), (2000, 29), (2023, 28), (2024, 29), (2100, 28)] {
            let mut number = date_time(&format!("{year}-01-01 00:00:00")).expect("a day") / 86_400.0;
            let lengths = [31, days_of_february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            for (month, length) in (1..).zip(lengths) {
                let day = |day: u32| date_time(&format!("{year}-{month:02}-{day:02} 00:00:00"));
                for nth in 1..=length {
                    assert_eq!(day(nth), Some(number * 86_400.0), "{year}-{month}-{nth}");
                    number += 1.0;
                }
                assert_eq!([day(0), day(length + 1)], [None, None], "{year}-{month}");
            }
        }
    }

    #[test]
    fn days_are_counted_as_the_calendar_has_them() {
        let day = |text: &str| date_time(&format!("{text} 00:00:00")).expect("a day") / 86_400.0;
        assert_eq!(day("1970-01-01"), 0.0);
        assert_eq!(day("2000-03-01"), 11_017.0);
        assert_eq!(day("2024-03-01") - day("2024-02-28"), 2.0);
        assert_eq!(day("2023-03-01") - day("2023-02-28"), 1.0);
        assert_eq!(date_time("2023-11-16T18:17:03.5"), Some(day("2023-11-16") * 86_400.0 + 65_823.5));
    }

    #[test]
    fn a_bad_row_is_named_with_its_field() {
        let csv = |row: &str| parsed(&format!("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n{row}\n"));
        for (row, field) in [
            ("2,x,3", "ContextTokens"),
            ("2,0,3", "ContextTokens"),
            ("2,-4,3", "ContextTokens"),
            ("2,5000000000,3", "ContextTokens"),
            ("2,x,0", "ContextTokens"),
            ("2,5,-0.5", "GeneratedTokens"),
            ("2,5,1.5", "GeneratedTokens"),
            ("yesterday,5,1", "TIMESTAMP"),
            ("2023-13-01 00:00:00,5,1", "TIMESTAMP"),
            ("2023-02-31 00:00:00,5,1", "TIMESTAMP"),
            ("2023-11-16 25:00:00,5,1", "TIMESTAMP"),
            ("-1,5,1", "TIMESTAMP"),
            ("nan,5,1", "TIMESTAMP"),
            ("1e300,5,1", "TIMESTAMP"),
            ("2,5", "GeneratedTokens"),
            ("2,5,6,7", "GeneratedTokens"),
        ] {
            let sentence = csv(row).expect_err("it is wrong");
            assert!(sentence.starts_with(&format!("a.trace, row 3: `{field}`")), "{row}: {sentence}");
        }
        let json = |row: &str| parsed(&format!("{{\"timestamp\":1,\"input_length\":2,\"output_length\":3}}\n{row}\n"));
        for (row, field) in [
            ("{\"timestamp\":1,\"output_length\":3}", "input_length"),
            ("{\"timestamp\":\"now\",\"input_length\":2,\"output_length\":3}", "timestamp"),
            ("{\"timestamp\":1,\"input_length\":2,\"output_length\":\"3\"}", "output_length"),
            ("{\"timestamp\":1,\"input_length\":2}", "output_length"),
            ("{\"timestamp\":1,\"input_length\":0,\"output_length\":1}", "input_length"),
            ("{\"timestamp\":1,\"input_length\":600,\"output_length\":3,\"hash_ids\":[1]}", "hash_ids"),
            ("{\"timestamp\":1,\"input_length\":2,\"output_length\":3,\"hash_ids\":[-1]}", "hash_ids"),
            ("{\"timestamp\":1,\"input_length\":2,\"output_length\":3,\"hash_ids\":7}", "hash_ids"),
            ("{\"timestamp\":1", "row"),
        ] {
            let sentence = json(row).expect_err("it is wrong");
            assert!(sentence.starts_with(&format!("a.trace, row 2: `{field}`")), "{row}: {sentence}");
        }
        for wrong in ["", "a,b,c\n1,2,3\n", "TIMESTAMP,ContextTokens,GeneratedTokens\n"] {
            let sentence = parsed(wrong).expect_err("it is wrong");
            assert!(sentence.starts_with("a.trace: has n"), "{sentence}");
        }
        let missing = read(Path::new("no-such.csv"), 1).expect_err("not there").to_string();
        assert!(missing.contains("no-such.csv"), "{missing}");
    }
}
