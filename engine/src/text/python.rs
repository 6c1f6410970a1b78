//! What chat templates expect of Python: string and dict methods, `tojson` as Python writes it, `strftime_now`.
//!
//! Invariant: everything here is linear in what it is given and in what it gives, and pays for both with fuel before it
//! allocates.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

pub fn install(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(|state, value, method, args| match value.kind() {
        ValueKind::String => string_method(state, value.as_str().unwrap_or_default(), method, args),
        ValueKind::Map => map_method(state, value, method, args),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    });
    env.add_filter("tojson", to_json);
    // Templates ask so before they count what is there.
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    // A list may hold itself many times over, so that writing one needs fuel for every item.
    env.set_formatter(|output, state, value| {
        if matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
            write_json(state, value, None, 0, &mut String::new())?;
        }
        minijinja::escape_formatter(output, state, value)
    });
    env.add_function("strftime_now", |format: &str| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        strftime(now, format)
    });
}

/// The argument at `index` as text; `None` where it is absent or Python's `None`.
fn text_at(args: &[Value], index: usize) -> Result<Option<&str>, Error> {
    match args.get(index) {
        None => Ok(None),
        Some(value) if value.is_none() => Ok(None),
        Some(value) => match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => Err(Error::new(ErrorKind::InvalidOperation, format!("a string is needed, not {}", value.kind()))),
        },
    }
}

fn count_at(args: &[Value], index: usize) -> Option<usize> {
    args.get(index).and_then(Value::as_i64).and_then(|count| usize::try_from(count).ok())
}

fn required(args: &[Value], index: usize) -> Result<&str, Error> {
    text_at(args, index)?.ok_or_else(|| Error::from(ErrorKind::MissingArgument))
}

fn pay(state: &State, num_bytes: usize) -> Result<(), Error> {
    state.consume_fuel(num_bytes as u64 / 64)
}

fn string_method(state: &State, text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    pay(state, text.len())?;
    let strip_set = |c: char, set: Option<&str>| set.map_or(c.is_whitespace(), |set| set.contains(c));
    Ok(match method {
        "strip" | "lstrip" | "rstrip" => {
            let set = text_at(args, 0)?;
            pay(state, set.map_or(0, str::len).saturating_mul(text.len()))?;
            let drop = |c: char| strip_set(c, set);
            Value::from(match method {
                "strip" => text.trim_matches(drop),
                "lstrip" => text.trim_start_matches(drop),
                _ => text.trim_end_matches(drop),
            })
        }
        "split" | "rsplit" => split(state, text, method == "rsplit", text_at(args, 0)?, count_at(args, 1))?,
        "splitlines" => pieces(state, text.lines())?,
        "startswith" => any_of(args, |prefix| text.starts_with(prefix))?,
        "endswith" => any_of(args, |suffix| text.ends_with(suffix))?,
        "removeprefix" => Value::from(text.strip_prefix(required(args, 0)?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(required(args, 0)?).unwrap_or(text)),
        "upper" => Value::from(text.to_uppercase()),
        "lower" => Value::from(text.to_lowercase()),
        "title" => Value::from(title(text)),
        "capitalize" => Value::from(capitalized(text)),
        "replace" => replace(state, text, args)?,
        "find" => position(text, text.find(required(args, 0)?)),
        "rfind" => position(text, text.rfind(required(args, 0)?)),
        "count" => Value::from(text.matches(required(args, 0)?).count()),
        "join" => join(state, text, args)?,
        "isdigit" => Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())),
        "isalpha" => Value::from(!text.is_empty() && text.chars().all(char::is_alphabetic)),
        "isalnum" => Value::from(!text.is_empty() && text.chars().all(char::is_alphanumeric)),
        "isspace" => Value::from(!text.is_empty() && text.chars().all(char::is_whitespace)),
        "isupper" => Value::from(text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)),
        "islower" => Value::from(text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)),
        _ => return Err(Error::from(ErrorKind::UnknownMethod)),
    })
}

fn map_method(state: &mut State, map: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match method {
        "items" => state.apply_filter("items", std::slice::from_ref(map)),
        "get" => {
            let key = args.first().ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            let found = map.get_item(key)?;
            Ok(if found.is_undefined() { args.get(1).cloned().unwrap_or_else(|| Value::from(())) } else { found })
        }
        "keys" => Ok(map.try_iter()?.collect()),
        "values" => map.try_iter()?.map(|key| map.get_item(&key)).collect(),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// For `startswith` and `endswith`, which take a string or a tuple of them.
fn any_of(args: &[Value], holds: impl Fn(&str) -> bool) -> Result<Value, Error> {
    let Some(wanted) = args.first().filter(|wanted| wanted.kind() == ValueKind::Seq) else {
        return Ok(Value::from(holds(required(args, 0)?)));
    };
    Ok(Value::from(wanted.try_iter()?.any(|one| one.as_str().is_some_and(&holds))))
}

fn pieces<'t>(state: &State, pieces: impl Iterator<Item = &'t str> + Clone) -> Result<Value, Error> {
    pay(state, pieces.clone().count().saturating_mul(32))?;
    Ok(pieces.map(Value::from).collect())
}

fn split(state: &State, text: &str, from_end: bool, by: Option<&str>, most: Option<usize>) -> Result<Value, Error> {
    let num = most.map_or(usize::MAX, |most| most.saturating_add(1));
    match by {
        Some("") => Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        Some(by) if from_end => {
            let found: Vec<&str> = text.rsplitn(num, by).collect();
            pieces(state, found.into_iter().rev())
        }
        Some(by) => pieces(state, text.splitn(num, by)),
        None if num == usize::MAX => pieces(state, text.split_whitespace()),
        None => Err(Error::new(ErrorKind::InvalidOperation, "split by white space takes no maxsplit here")),
    }
}

fn replace(state: &State, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (from, to) = (required(args, 0)?, required(args, 1)?);
    let most = count_at(args, 2).unwrap_or(usize::MAX);
    let num = text.matches(from).count().min(most);
    pay(state, num.saturating_mul(to.len()))?;
    Ok(Value::from(text.replacen(from, to, most)))
}

fn join(state: &State, between: &str, args: &[Value]) -> Result<Value, Error> {
    let list = args.first().ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    let mut joined = String::new();
    for (index, item) in list.try_iter()?.enumerate() {
        let item = item.as_str().map(str::to_string).unwrap_or_else(|| item.to_string());
        let between = if index == 0 { "" } else { between };
        pay(state, (between.len() + item.len()).saturating_mul(2).max(64))?;
        joined.push_str(between);
        joined.push_str(&item);
    }
    Ok(Value::from(joined))
}

/// Python counts characters.
fn position(text: &str, at: Option<usize>) -> Value {
    Value::from(at.map_or(-1, |at| text[..at].chars().count() as i64))
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.chain(chars.as_str().to_lowercase().chars()).collect()
}

fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        if in_word {
            titled.extend(c.to_lowercase());
        } else {
            titled.extend(c.to_uppercase());
        }
        in_word = c.is_alphabetic();
    }
    titled
}

/// As `json.dumps(value, ensure_ascii=False, indent=indent)` writes it: minijinja's own escapes for HTML.
fn to_json(state: &State, value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let mut out = String::new();
    write_json(state, value, indent.map(|indent| indent.min(16)), 0, &mut out)?;
    Ok(Value::from(out))
}

const MAX_JSON_DEPTH: usize = 64;

fn write_json(
    state: &State,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    if depth > MAX_JSON_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson of something nested too deeply"));
    }
    pay(state, 64 + value.as_str().map_or(0, str::len).saturating_mul(2))?;
    let break_line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut is_empty = true;
            for item in value.try_iter()? {
                out.push_str(if is_empty { "" } else { comma });
                is_empty = false;
                break_line(out, depth + 1);
                write_json(state, &item, indent, depth + 1, out)?;
            }
            if !is_empty {
                break_line(out, depth);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            let mut is_empty = true;
            for key in value.try_iter()? {
                out.push_str(if is_empty { "" } else { comma });
                is_empty = false;
                break_line(out, depth + 1);
                out.push_str(&serde_json::Value::from(key.to_string()).to_string());
                out.push_str(": ");
                write_json(state, &value.get_item(&key)?, indent, depth + 1, out)?;
            }
            if !is_empty {
                break_line(out, depth);
            }
            out.push('}');
        }
        _ => out.push_str(&serde_json::Value::from(value.to_string()).to_string()),
    }
    Ok(())
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Year, month and day (both from 1) of a day since 1970-01-01, in the Gregorian calendar.
fn civil_date(days: u64) -> (u64, usize, u64) {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // 400 years have 146097 days.
    let mut year = 1970 + days / 146_097 * 400;
    let mut day = days % 146_097;
    loop {
        let length = 365 + u64::from(is_leap(year));
        if day < length {
            break;
        }
        day -= length;
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    (year, month + 1, day + 1)
}

/// Python's `strftime` in UTC; what it does not know it leaves as it stands.
fn strftime(seconds: u64, format: &str) -> String {
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil_date(days);
    let (weekday, month_name) = (DAYS[((days + 4) % 7) as usize], MONTHS[month - 1]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out.push_str(&match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.to_string(),
            Some('b' | 'h') => month_name[..3].to_string(),
            Some('A') => weekday.to_string(),
            Some('a') => weekday[..3].to_string(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_string(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_string(),
            Some('z') => "+0000".to_string(),
            Some('%') => "%".to_string(),
            Some(other) => format!("%{other}"),
            None => "%".to_string(),
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(expression: &str) -> String {
        let mut env = Environment::new();
        install(&mut env);
        env.set_fuel(Some(100_000));
        env.render_str(&format!("{{{{ {expression} }}}}"), ()).unwrap_or_else(|error| format!("{error:#}"))
    }

    #[test]
    fn strings_have_pythons_methods() {
        let cases = [
            ("'  a b '.strip() ~ '|'", "a b|"),
            ("'xxaxx'.strip('x')", "a"),
            ("'  a'.lstrip() ~ 'a  '.rstrip() ~ '|'", "aa|"),
            ("'a,b,c'.split(',')[-1]", "c"),
            ("'a,b,c'.split(',', 1)[1]", "b,c"),
            ("'a,b,c'.rsplit(',', 1)[0]", "a,b"),
            ("' a  b '.split()|length", "2"),
            ("'a\\nb'.splitlines()|length", "2"),
            ("'abc'.startswith('ab')", "True"),
            ("'abc'.startswith(('x', 'a'))", "True"),
            ("'abc'.endswith('ab')", "False"),
            ("'hello wORLD'.title()", "Hello World"),
            ("'hELLO'.capitalize()", "Hello"),
            ("'abab'.replace('a', 'x')", "xbxb"),
            ("'abab'.replace('a', 'x', 1)", "xbab"),
            ("'äb'.find('b')", "1"),
            ("'ab'.find('c')", "-1"),
            ("', '.join(['a', 'b'])", "a, b"),
            ("'ab'.removeprefix('a')", "b"),
            ("{'k': 1}.get('k')", "1"),
            ("{'k': 1}.get('x', 2)", "2"),
            ("{'k': 1}.keys()|join", "k"),
            ("{'k': 1}.values()|join", "1"),
            ("{'k': 1}.items()|first|join('-')", "k-1"),
        ];
        for (expression, expected) in cases {
            assert_eq!(eval(expression), expected, "{expression}");
        }
    }

    #[test]
    fn json_is_as_python_writes_it() {
        assert_eq!(eval("{'a': [1, 'ä<\"', none, true]}|tojson"), r#"{"a": [1, "ä<\"", null, true]}"#);
        assert_eq!(eval("{'a': [1]}|tojson(indent=2)"), "{\n  \"a\": [\n    1\n  ]\n}");
        assert_eq!(eval("[]|tojson(indent=2)"), "[]");
    }

    #[test]
    fn dates_are_the_calendars() {
        assert_eq!(strftime(0, "%Y-%m-%d %A"), "1970-01-01 Thursday");
        assert_eq!(strftime(951_782_400, "%d %b %Y"), "29 Feb 2000");
        assert_eq!(strftime(1_735_689_599, "%F %T %p"), "2024-12-31 23:59:59 PM");
        assert_eq!(strftime(4_107_542_400, "%d %B %y"), "01 March 00");
    }

    #[test]
    fn blow_ups_run_out_of_fuel() {
        for expression in ["('a' * 60000).replace('a', 'b' * 60000)", "('b' * 60000).join(range(10000))"] {
            assert!(eval(expression).contains("out of fuel"), "{expression}");
        }
    }
}
