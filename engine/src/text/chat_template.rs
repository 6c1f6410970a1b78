//! A model's chat template: messages to token ids.
//!
//! Invariants: what is written in a message never becomes a special token (SEC-5), and without such writing the ids are
//! those of the plain rendering; a template, which is part of a downloaded file, can neither run nor write without end
//! (SEC-4).
//!
//! A template may test and cut messages as it likes, so a message reaches it as it is, save for the spellings of
//! special tokens: those are stood in for by characters of a private plane until the rendering has been cut into tokens
//! and text. Fuel bounds a template's instructions and the bytes they make. Lists that hold themselves many times over
//! can still cost time that fuel does not see, so a template works on a thread of its own, with a deadline, and one
//! that outruns it is not run again before that work has ended.

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value as Json};

use super::tokenizer::{Special, Tokenizer};
use super::{TextError, python};
use crate::deadline::{Lost, with_deadline};
use crate::request::TokenId;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
    /// What else templates may find there: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
    pub extra: Map<String, Json>,
}

impl ChatMessage {
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> ChatMessage {
        ChatMessage { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

/// All that a template is given.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChatInput<'a> {
    pub messages: &'a [ChatMessage],
    pub add_generation_prompt: bool,
    /// Functions that may be called, as OpenAI writes them.
    pub tools: Option<&'a [Json]>,
    /// More variables of the template; what it has anyway is not theirs to change.
    pub variables: Option<&'a Map<String, Json>>,
}

/// A chat as a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    pub ids: Vec<TokenId>,
    /// What it says as text, its end included.
    pub text: String,
}

#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
    deadline: Duration,
    /// Renderings that outran the deadline and may still be at it.
    late: Mutex<Vec<mpsc::Receiver<Rendering>>>,
}

type Rendering = Result<String, TextError>;

const NAME: &str = "chat_template";
const THREAD: &str = "chat-template";
const MAX_SOURCE_BYTES: usize = 64 << 10;
/// The parser goes one level deeper with every `-` of a source; values may nest as deep as fuel allows. Only pages that
/// are used cost memory.
const STACK_BYTES: usize = 128 << 20;
const DEADLINE: Duration = Duration::from_secs(10);
/// Of macros that call each other.
const MAX_RECURSION: usize = 50;
/// One unit of fuel pays for an instruction, or for 64 bytes that are made or read.
const FUEL: u64 = 500_000;
const FUEL_PER_MESSAGE: u64 = 5_000;
/// Times that a template may go over all it is given.
const MAX_PASSES: usize = 16;
const MAX_OUTPUT_BYTES: usize = 1 << 20;

/// Roles that templates compare with, and so see as they are; none is a risk.
const KNOWN_ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

impl ChatTemplate {
    /// `bos` and `eos` are the spellings that templates know as `bos_token` and `eos_token`.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<ChatTemplate, TextError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TextError::Template(format!("its {} bytes are over {MAX_SOURCE_BYTES}", source.len())));
        }
        let source = source.to_string();
        let compiled = source.clone();
        let env = with_deadline(THREAD, STACK_BYTES, DEADLINE, move || compile(compiled))
            .map_err(|lost| sentence(&lost, DEADLINE))??;
        let (bos, eos) = (bos.to_string(), eos.to_string());
        Ok(ChatTemplate { env, source, bos, eos, deadline: DEADLINE, late: Mutex::default() })
    }

    /// The template as it is written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The ids of the whole prompt, a BOS token included where the template writes one.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<Vec<TokenId>, TextError> {
        let input = ChatInput { messages, add_generation_prompt, ..ChatInput::default() };
        Ok(self.encode_at_most(tokenizer, &input, usize::MAX)?.ids)
    }

    /// The same with all that there may be, refused where the prompt is more than `max_tokens` long: before it is
    /// rendered where its texts alone are, and without the rest once so many ids are there.
    pub fn encode_at_most(
        &self,
        tokenizer: &Tokenizer,
        input: &ChatInput,
        max_tokens: usize,
    ) -> Result<Prompt, TextError> {
        let num_bytes = input.messages.iter().map(|message| message.content.len()).sum();
        let least_tokens = tokenizer.least_tokens(num_bytes).max(input.messages.len());
        if least_tokens > max_tokens {
            return Err(TextError::TooLong { least_tokens });
        }
        let mut stand_ins = StandIns::new();
        let safe = Safe::new(input, &mut stand_ins, tokenizer);
        let rendered = self.render(safe)?;
        let text = stand_ins.restore(&rendered).into_owned();
        let least_tokens = tokenizer.least_tokens(text.len());
        if least_tokens > max_tokens {
            return Err(TextError::TooLong { least_tokens });
        }
        let restore = |text| stand_ins.restore(text);
        let ids = tokenizer.encode_restoring(&rendered, Special::Parse, max_tokens, restore);
        match ids.len() > max_tokens {
            true => Err(TextError::TooLong { least_tokens: ids.len() }),
            false => Ok(Prompt { ids, text }),
        }
    }

    fn render(&self, safe: Safe) -> Rendering {
        let Safe { num_bytes, num_messages, add_generation_prompt, .. } = safe;
        let fuel = FUEL + num_messages * FUEL_PER_MESSAGE + (num_bytes * MAX_PASSES / 64) as u64;
        let max_bytes = MAX_OUTPUT_BYTES + num_bytes * MAX_PASSES;
        if self.is_at_work() {
            return Err(TextError::TemplateTime { deadline: self.deadline });
        }
        let mut env = self.env.clone();
        env.set_fuel(Some(fuel));
        let (bos_token, eos_token) = (self.bos.clone(), self.eos.clone());
        let work = move || {
            let Safe { messages, tools, variables, .. } = safe;
            let documents = Value::from(());
            let own = minijinja::context! { messages, add_generation_prompt, bos_token, eos_token, tools, documents };
            let context = minijinja::context! { ..own, ..variables };
            let template = env.get_template(NAME).expect("`compile` added it");
            let mut output = Capped { bytes: Vec::new(), max_bytes };
            match template.render_captured_to(context, &mut output) {
                Ok(_) => Ok(String::from_utf8_lossy(&output.bytes).into_owned()),
                Err(error) => Err(reason(&error, fuel, max_bytes)),
            }
        };
        with_deadline(THREAD, STACK_BYTES, self.deadline, work).unwrap_or_else(|lost| {
            let sentence = sentence(&lost, self.deadline);
            if let Lost::Late(rendering) = lost {
                self.late().push(rendering);
            }
            Err(sentence)
        })
    }

    fn is_at_work(&self) -> bool {
        let mut late = self.late();
        late.retain(|rendering| matches!(rendering.try_recv(), Err(mpsc::TryRecvError::Empty)));
        !late.is_empty()
    }

    fn late(&self) -> MutexGuard<'_, Vec<mpsc::Receiver<Rendering>>> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn compile(source: String) -> Result<Environment<'static>, TextError> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the default delimiters"));
    env.set_recursion_limit(MAX_RECURSION);
    python::install(&mut env);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        let error = Error::new(ErrorKind::InvalidOperation, "raise_exception was called");
        Err(error.with_source(Refusal(message)))
    });
    env.add_template_owned(NAME, without_generation(&source))
        .map_err(|error| TextError::Template(error.to_string()))?;
    Ok(env)
}

/// Those who train models mark what the assistant said by a tag of their own, within which nothing else is meant.
fn without_generation(source: &str) -> String {
    let (mut plain, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(at) = rest.find("{%") {
        let end = rest[at..].find("%}").map_or(rest.len(), |end| at + end);
        let (before, tag) = (&rest[..at], &rest[at..end]);
        plain += before;
        match tag.trim_matches(|c: char| c.is_whitespace() || "{%-+".contains(c)) {
            word @ "generation" => plain += &tag.replacen(word, "if true", 1),
            word @ "endgeneration" => plain += &tag.replacen(word, "endif", 1),
            _ => plain += tag,
        }
        rest = &rest[end..];
    }
    plain + rest
}

fn sentence<T>(lost: &Lost<T>, deadline: Duration) -> TextError {
    match lost {
        Lost::Late(_) => TextError::TemplateTime { deadline },
        Lost::Failed(problem) | Lost::NotStarted(problem) => TextError::Template(problem.clone()),
    }
}

/// What a template is given, with stand-ins for all that must not be spelled.
struct Safe {
    messages: Value,
    tools: Value,
    variables: Value,
    add_generation_prompt: bool,
    num_messages: u64,
    /// Of all texts.
    num_bytes: usize,
}

impl Safe {
    fn new(input: &ChatInput, stand_ins: &mut StandIns, tokenizer: &Tokenizer) -> Safe {
        let ChatInput { messages, add_generation_prompt, tools, variables } = *input;
        let mut num_bytes = 0;
        let mut safe_fields = |fields: &Map<String, Json>, stand_ins: &mut StandIns| -> Map<String, Json> {
            let safe = |(name, json): (&String, &Json)| {
                num_bytes += name.len();
                (name.clone(), stand_ins.json(json, tokenizer, &mut num_bytes))
            };
            fields.iter().map(safe).collect()
        };
        let variables = variables.map(|variables| safe_fields(variables, stand_ins));
        let message = |ChatMessage { role, content, extra }: &ChatMessage| {
            let mut fields = Map::new();
            fields.insert("role".to_string(), Json::from(stand_ins.role(role, tokenizer)));
            fields.insert("content".to_string(), Json::from(stand_ins.replace(content, tokenizer)));
            fields.extend(safe_fields(extra, stand_ins));
            fields
        };
        let safe: Vec<Map<String, Json>> = messages.iter().map(message).collect();
        num_bytes += messages.iter().map(|message| message.role.len() + message.content.len()).sum::<usize>();
        let tools: Option<Vec<Json>> =
            tools.map(|tools| tools.iter().map(|tool| stand_ins.json(tool, tokenizer, &mut num_bytes)).collect());
        Safe {
            messages: safe.into_iter().map(Json::Object).map(template_value).collect(),
            tools: tools.map_or_else(|| Value::from(()), |tools| template_value(Json::Array(tools))),
            variables: template_value(Json::Object(variables.unwrap_or_default())),
            add_generation_prompt,
            num_messages: messages.len() as u64,
            num_bytes,
        }
    }
}

/// JSON as a template knows it, in the order that it is written in.
fn template_value(json: Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (_, Some(integer)) => Value::from(integer),
            _ => Value::from(number.as_f64().unwrap_or_default()),
        },
        Json::String(text) => Value::from(text),
        Json::Array(items) => items.into_iter().map(template_value).collect(),
        Json::Object(fields) => {
            Value::from_pairs(fields.into_iter().map(|(name, value)| (name, template_value(value))))
        }
    }
}

/// What a template passes to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn reason(error: &Error, fuel: u64, max_bytes: usize) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(Refusal(message)) = inner.downcast_ref() {
            return TextError::Refused(message.clone());
        }
        match inner.downcast_ref().map(Error::kind) {
            Some(ErrorKind::OutOfFuel) => return TextError::TemplateFuel { fuel },
            Some(ErrorKind::WriteFailure) => return TextError::TemplateOutput { max_bytes },
            _ => cause = inner.source(),
        }
    }
    TextError::Template(error.to_string())
}

struct Capped {
    bytes: Vec<u8>,
    max_bytes: usize,
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.max_bytes {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Characters that stand in for what a message must not spell while the template works: a tag that nobody can guess,
/// then a number in two digits. Templates neither trim them nor change their case.
struct StandIns {
    tag: String,
    spellings: Vec<String>,
}

/// The digits: private characters of plane 15.
const DIGIT_BITS: u32 = 15;

fn digit(value: u64) -> char {
    let value = (value & ((1 << DIGIT_BITS) - 1)) as u32;
    char::from_u32(0xF_0000 + value).expect("plane 15 has these characters")
}

fn value_of(digit: char) -> Option<usize> {
    (digit as usize).checked_sub(0xF_0000)
}

impl StandIns {
    fn new() -> StandIns {
        let random = RandomState::new().hash_one(0);
        StandIns { tag: (0..4).map(|place| digit(random >> (place * DIGIT_BITS))).collect(), spellings: Vec::new() }
    }

    fn role(&mut self, role: &str, tokenizer: &Tokenizer) -> String {
        match role {
            "" => String::new(),
            role if KNOWN_ROLES.contains(&role) => role.to_string(),
            // A template may write it into the middle of a spelling.
            role if tokenizer.special.is_within_special(role) => self.stand_in(role),
            role => self.replace(role, tokenizer),
        }
    }

    /// JSON with all its texts replaced, in the order that it is written in; `num_bytes` counts them.
    fn json(&mut self, json: &Json, tokenizer: &Tokenizer, num_bytes: &mut usize) -> Json {
        match json {
            Json::String(text) => {
                *num_bytes += text.len();
                Json::from(self.replace(text, tokenizer))
            }
            Json::Array(items) => items.iter().map(|item| self.json(item, tokenizer, num_bytes)).collect(),
            Json::Object(fields) => {
                let safe = |(name, value): (&String, &Json)| {
                    *num_bytes += name.len();
                    (self.replace(name, tokenizer), self.json(value, tokenizer, num_bytes))
                };
                Json::Object(fields.iter().map(safe).collect())
            }
            plain => plain.clone(),
        }
    }

    fn replace(&mut self, text: &str, tokenizer: &Tokenizer) -> String {
        // Templates trim: what matters at the ends is what is there without white space.
        let core = text.trim();
        let start = text.len() - text.trim_start().len();
        let mut safe = text[..start].to_string();
        let mut done = 0;
        for range in tokenizer.special.hazards(core) {
            safe.push_str(&core[done..range.start]);
            safe.push_str(&self.stand_in(&core[range.clone()]));
            done = range.end;
        }
        safe.push_str(&core[done..]);
        safe.push_str(&text[start + core.len()..]);
        safe
    }

    fn stand_in(&mut self, spelling: &str) -> String {
        let number = self.spellings.len() as u64;
        assert!(number < 1 << (2 * DIGIT_BITS), "messages are far smaller than this many spellings");
        self.spellings.push(spelling.to_string());
        format!("{}{}{}", self.tag, digit(number >> DIGIT_BITS), digit(number))
    }

    fn restore<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut parts = text.split(self.tag.as_str());
        let first = parts.next().unwrap_or_default();
        if first.len() == text.len() {
            return Cow::Borrowed(text);
        }
        let mut restored = first.to_string();
        for part in parts {
            let mut chars = part.chars();
            let digits = chars.next().and_then(value_of).zip(chars.next().and_then(value_of));
            let spelling = digits.and_then(|(high, low)| self.spellings.get((high << DIGIT_BITS) + low));
            match spelling {
                Some(spelling) => {
                    restored.push_str(spelling);
                    restored.push_str(chars.as_str());
                }
                // The template has cut the stand-in; what is left of it means nothing.
                None => restored.push_str(part),
            }
        }
        Cow::Owned(restored)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Instant;

    use super::*;
    use crate::text::GgufVocab;

    fn tokenizer() -> Tokenizer {
        let vocab = GgufVocab { model: "gpt2".to_string(), tokens: vec!["a".to_string()], ..GgufVocab::default() };
        Tokenizer::from_vocab(vocab).expect("a vocabulary")
    }

    /// Two trees of 2^`depth` leaves, held in as many lists as they are deep: comparing them takes no fuel and, from a
    /// depth of 26 on, far longer than the deadline.
    fn trees(depth: &str) -> ChatTemplate {
        let source = format!(
            "{{% set a = namespace(x=1) %}}{{% set b = namespace(x=1) %}}{{% for i in range({depth}) %}}\
             {{% set a.x = [a.x, a.x] %}}{{% set b.x = [b.x, b.x] %}}{{% endfor %}}{{{{ a.x == b.x }}}}"
        );
        ChatTemplate { deadline: Duration::from_millis(50), ..ChatTemplate::new(&source, "", "").expect("a template") }
    }

    #[test]
    fn messages_that_can_only_be_too_long_are_not_rendered() {
        let template = ChatTemplate::new("{{ raise_exception('it is rendered') }}", "", "").expect("a template");
        let error = |num_messages: usize, content: &str| {
            let messages = vec![ChatMessage::new("user", content); num_messages];
            let input = ChatInput { messages: &messages, ..ChatInput::default() };
            template.encode_at_most(&tokenizer(), &input, 10).expect_err("it fails either way")
        };
        for (num_messages, content, least_tokens) in [(11, "", 11), (1, "aaaaaaaaaaa", 11), (2, "aaaaaa", 12)] {
            let found = error(num_messages, content);
            assert!(matches!(found, TextError::TooLong { least_tokens: least } if least == least_tokens), "{found}");
        }
        assert!(matches!(error(10, "a"), TextError::Refused(_)));
    }

    #[test]
    fn a_template_that_outruns_the_deadline_is_not_run_again() {
        let template = trees("26");
        for _ in 0..2 {
            let start = Instant::now();
            let error = template.encode(&tokenizer(), &[], false).expect_err("no time");
            assert!(matches!(error, TextError::TemplateTime { .. }), "{error}");
            assert!(start.elapsed() < Duration::from_secs(2));
        }
    }

    /// A message makes this one work too long; without one it is quick.
    #[test]
    fn a_template_is_used_again_once_its_late_work_has_ended() {
        let template = trees("22 if messages else 1");
        let message = ChatMessage::new("user", "x");
        let error = template.encode(&tokenizer(), &[message], false).expect_err("no time");
        assert!(matches!(error, TextError::TemplateTime { .. }), "{error}");
        let start = Instant::now();
        while let Err(error) = template.encode(&tokenizer(), &[], false) {
            assert!(matches!(error, TextError::TemplateTime { .. }), "{error}");
            assert!(start.elapsed() < Duration::from_secs(60), "it never ended");
            thread::sleep(Duration::from_millis(20));
        }
    }
}
