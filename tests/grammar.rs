//! Grammars: what compiles and what is refused in time, what a matcher lets through, and engines on the simulator whose
//! requests follow one. Needs nothing.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};
use std::{env, fs, io};

use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::bundle::Bundle;
use fullbore_engine::config::EngineConfig;
use fullbore_engine::engine::Engine;
use fullbore_engine::grammar::sandbox::{self, Sandbox};
use fullbore_engine::grammar::{Grammar, GrammarCompiler, GrammarError, GrammarSource, MAX_MATCHER_BYTES, Progress};
use fullbore_engine::request::{Event, FinishReason, Flow, Request, SamplingParams, Sink, TokenId, token_mask};
use fullbore_engine::text::{GgufVocab, Tokenizer};
use serde_json::{Value, json};

use crate::simulation::{VOCAB_SIZE, engine_on};

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Bundle::simulated().tokenizer);
static COMPILER: LazyLock<GrammarCompiler> =
    LazyLock::new(|| GrammarCompiler::new(TOKENIZER.clone(), vec![TokenId(2)], VOCAB_SIZE));

/// Whoever asks waits no longer, on a machine that has other things to do.
const IN_TIME: Duration = Duration::from_secs(6);

pub fn regex(regex: &str) -> Grammar {
    COMPILER.compile(&GrammarSource::Regex(regex.to_owned())).unwrap_or_else(|error| panic!("{regex}: {error}"))
}

/// For a model whose vocabulary has another size than its tokenizer's.
pub fn regex_for(regex: &str, vocab_size: u32) -> Grammar {
    let compiler = GrammarCompiler::new(TOKENIZER.clone(), vec![TokenId(2)], vocab_size);
    compiler.compile(&GrammarSource::Regex(regex.to_owned())).unwrap_or_else(|error| panic!("{regex}: {error}"))
}

fn compile(source: GrammarSource) -> Result<Grammar, GrammarError> {
    let begun = Instant::now();
    let compiled = COMPILER.compile(&source);
    assert!(begun.elapsed() < IN_TIME, "{:?} for {:.80?}", begun.elapsed(), source);
    compiled
}

fn schema(schema: Value) -> Result<Grammar, GrammarError> {
    compile(GrammarSource::JsonSchema(schema))
}

/// Says to a process of these tests that it is a sandbox's.
const IN_SANDBOX: &str = "FULLBORE_TEST_IN_SANDBOX";

/// The process of a sandbox where it is one, and else a sandbox whose server has gone.
#[test]
fn a_sandbox_ends_with_its_server() {
    let served = match env::var_os(IN_SANDBOX) {
        Some(_) => sandbox::serve(io::stdin().lock(), io::stdout()),
        None => sandbox::serve(io::empty(), io::sink()),
    };
    assert!(served.is_ok(), "{served:?}");
}

/// What runs these tests again, as a sandbox, behind `words` of a shell.
fn sandboxed(words: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{words}; exec \"$0\" \"$@\"")]).arg(env::current_exe().expect("a program"));
    command.args(["--exact", "grammar::a_sandbox_ends_with_its_server", "--nocapture"]).env(IN_SANDBOX, "");
    command
}

pub fn test_sandbox() -> Sandbox {
    Sandbox::new(|| sandboxed(":"))
}

/// Forms that llguidance makes no parser of in any time that is given, each for a reason of its own.
pub fn endless_forms() -> [GrammarSource; 4] {
    let alike = |index: usize| json!({"type": "string", "pattern": format!("[ab]*a[ab]{{{}}}c", 10 + index)});
    let unlike: serde_json::Map<String, Value> =
        (0..1500).map(|index| (format!("^[a-z]*{index}$"), json!({"type": "string"}))).collect();
    [
        // As many states as there are remainders.
        GrammarSource::JsonSchema(json!({"type": "integer", "multipleOf": 20_000_003})),
        // Whether any text is in all of them.
        GrammarSource::JsonSchema(json!({"allOf": (0..20).map(alike).collect::<Vec<_>>()})),
        // Whether any key is in two of them.
        GrammarSource::JsonSchema(json!({"type": "object", "patternProperties": unlike})),
        // What may come first, after any number that does not.
        GrammarSource::Regex("a?b?c?d?e?f?g?h?".repeat(15_000)),
    ]
}

/// Whether the grammar takes `text`, byte by byte, and may end behind it.
fn takes(grammar: &Grammar, text: &str) -> bool {
    let mut matcher = grammar.matcher();
    let mut mask = vec![0; VOCAB_SIZE.div_ceil(32) as usize];
    for byte in text.bytes() {
        let token = 4 + u32::from(byte);
        if matcher.is_ended() || matcher.mask(&mut mask).is_err() || mask[token as usize / 32] >> (token % 32) & 1 == 0
        {
            return false;
        }
        matcher.advance(TokenId(token)).expect("a token of the mask");
    }
    matcher.is_ended() || matcher.mask(&mut mask).is_ok() && mask[0] >> 2 & 1 == 1
}

#[test]
fn grammars_take_what_they_say_and_nothing_else() {
    let person = json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let person = schema(person).expect("a schema");
    let cases = [
        (&person, r#"{"name": "Ada", "age": 36}"#, true),
        (&person, "{\n  \"name\": \"Ada\",\n  \"age\": 36\n}", true),
        (&person, r#"{"name": "Augusta", "age": 36}"#, false),
        (&person, r#"{"name": "Ada"}"#, false),
        (&person, r#"{"name": "Ada", "age": -1}"#, false),
        (&person, r#"{"name": "Ada", "age": 36, "x": 1}"#, false),
        (&person, r#"{"name": "Ada", "age": 36"#, false),
        (&regex("[0-9]{3}-(ab|cd)"), "123-cd", true),
        (&regex("[0-9]{3}-(ab|cd)"), "123-ce", false),
        (&regex("é+"), "éé", true),
        (&regex("a*"), "", true),
    ];
    for (grammar, text, wanted) in cases {
        assert_eq!(takes(grammar, text), wanted, "{text}");
    }
    let lark = "start: greeting \" \" name\ngreeting: \"Hello\" | \"Bye\"\nname: /[A-Z][a-z]+/\n";
    let lark = compile(GrammarSource::Lark(lark.to_owned())).expect("a grammar");
    assert!(takes(&lark, "Bye Ada") && !takes(&lark, "Bye ada") && !takes(&lark, "Hello"));
    // A schema may hold itself: this is a tree.
    let tree = json!({
        "$ref": "#/$defs/node",
        "$defs": {"node": {
            "type": "object",
            "properties": {"left": {"$ref": "#/$defs/node"}, "value": {"type": "integer"}},
            "required": ["value"],
            "additionalProperties": false,
        }},
    });
    let tree = schema(tree).expect("a schema");
    assert!(takes(&tree, r#"{"left":{"left":{"value":1},"value":2},"value":3}"#));
    assert!(!takes(&tree, r#"{"left":{"left":1}}"#));
}

#[test]
fn white_space_in_json_has_an_end() {
    let object = schema(json!({"type": "object"})).expect("a schema");
    let with_space = |count: usize| format!("{{{}\"a\":1}}", " ".repeat(count));
    assert!(takes(&object, &with_space(20)) && !takes(&object, &with_space(40)));
    // Whatever the schema says of it.
    let loose = schema(json!({"type": "object", "x-guidance": {"whitespace_pattern": " *"}})).expect("a schema");
    assert!(!takes(&loose, &with_space(40)));
}

#[test]
fn what_cannot_be_compiled_is_refused_with_a_sentence() {
    let refused =
        |source: GrammarSource| compile(source.clone()).map(|_| format!("{source:.200?}")).expect_err("a bad one");
    let cases = [
        (GrammarSource::Regex("a(".to_owned()), "regex"),
        (GrammarSource::Regex("(?=a)b".to_owned()), "look"),
        (GrammarSource::Lark("start: missing".to_owned()), "missing"),
        (GrammarSource::Lark(String::new()), ""),
        (GrammarSource::JsonSchema(json!({"type": "no such type"})), "no such type"),
        (GrammarSource::JsonSchema(json!({"type": "object", "unevaluatedProperties": false})), "unevaluatedProperties"),
        (GrammarSource::JsonSchema(json!({"$ref": "http://127.0.0.1/schema.json"})), ""),
        (GrammarSource::JsonSchema(json!({"$ref": "#"})), ""),
        (GrammarSource::JsonSchema(json!({"type": "string", "pattern": "("})), ""),
        (GrammarSource::JsonSchema(json!({"enum": []})), ""),
        (GrammarSource::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 1})), ""),
    ];
    for (source, named) in cases {
        let error = refused(source.clone());
        let GrammarError::Invalid(sentence) = &error else { panic!("{source:?}: {error:?}") };
        assert!(sentence.contains(named) && !sentence.is_empty(), "{source:?}: {sentence}");
        assert!(!sentence.contains("<state>") && !sentence.contains("panic"), "{source:?}: {sentence}");
    }
}

#[test]
fn schemas_are_bounded_in_bytes_and_levels() {
    let nested = |levels: usize| (2..levels).fold(json!({"type": "null"}), |inner, _| json!({"items": inner}));
    let array = |levels: usize| json!({"type": "array", "items": nested(levels)});
    assert!(schema(array(32)).is_ok());
    assert_eq!(schema(array(33)).err(), Some(GrammarError::TooDeep { depth: 33, max_depth: 32 }));
    let described = |num_bytes: usize| json!({"type": "null", "description": "x".repeat(num_bytes)});
    assert!(schema(described(60_000)).is_ok());
    let error = schema(described(64 << 10)).expect_err("too large");
    assert!(matches!(error, GrammarError::TooLarge { max_bytes: 65_536, .. }), "{error:?}");
}

/// The shapes that have taken servers down.
#[test]
fn grammars_that_are_made_to_hurt_are_refused_in_time() {
    let nested = |count: usize, open: &str, close: &str| format!("{}a{}", open.repeat(count), close.repeat(count));
    let mut deep = json!({"type": "integer"});
    for _ in 0..100 {
        deep = json!({"type": "array", "items": deep});
    }
    let sources = [
        GrammarSource::Regex(nested(60_000, "(", ")")),
        GrammarSource::Regex(nested(60_000, "(?:", ")*")),
        GrammarSource::Regex("(".repeat(60_000)),
        GrammarSource::Regex("[".repeat(60_000)),
        GrammarSource::Regex(format!("a{}", "?".repeat(60_000))),
        GrammarSource::Lark(format!("start: {}", nested(60_000, "(", ")"))),
        GrammarSource::Lark(format!("start: {}\"a\"", "~".repeat(60_000))),
        GrammarSource::Lark(format!("start: {}", nested(60_000, "%lark { start: ", "}"))),
        GrammarSource::Lark("start: start start | start".to_owned()),
        GrammarSource::JsonSchema(deep),
        GrammarSource::JsonSchema(json!({"enum": (0..60_000).collect::<Vec<_>>()})),
        GrammarSource::JsonSchema(json!({"type": "string", "pattern": "(a*)*(b*)*".repeat(30_000)})),
    ];
    let taken: Vec<String> = sources
        .iter()
        .filter(|source| compile((*source).clone()).is_ok())
        .map(|source| format!("{source:?}").chars().take(80).collect())
        .collect();
    assert_eq!(taken, [""; 0]);
}

/// What is large, or wild for engines that go back: each is refused in time, or followed.
#[test]
fn large_grammars_end_in_time_either_way() {
    let properties: serde_json::Map<String, Value> =
        (0..1000).map(|index| (format!("property{index}"), json!({"type": ["string", "null"]}))).collect();
    let sources = [
        GrammarSource::Regex("(a+)+$|(a|a)*b".to_owned()),
        GrammarSource::Regex("((a{1,1000}){1,1000}){1,1000}".to_owned()),
        GrammarSource::Regex("a".repeat(60_000)),
        GrammarSource::Regex(format!("({})", "(a|aa)+".repeat(30_000))),
        GrammarSource::Regex("(a|b)".repeat(10_000)),
        GrammarSource::Regex(".{0,100000}x".to_owned()),
        GrammarSource::JsonSchema(json!({"type": "object", "properties": properties})),
        GrammarSource::JsonSchema(json!({"type": "array", "minItems": 100_000, "items": {"type": "integer"}})),
        GrammarSource::JsonSchema(json!({"type": "string", "maxLength": 10_000_000})),
        GrammarSource::Lark(format!("start: {}", "\"a\" \"b\" ".repeat(10_000))),
    ];
    for source in sources {
        let Ok(grammar) = compile(source.clone()) else { continue };
        // On a stack like the engine's.
        let mut matcher = grammar.matcher();
        let mut mask = vec![0; VOCAB_SIZE.div_ceil(32) as usize];
        let begun = Instant::now();
        for _ in 0..8 {
            if matcher.is_ended() || matcher.mask(&mut mask).is_err() {
                break;
            }
            let token = mask
                .iter()
                .enumerate()
                .rev()
                .find_map(|(word, bits)| (*bits != 0).then(|| word as u32 * 32 + 31 - bits.leading_zeros()));
            let advanced = matcher.advance(TokenId(token.expect("a mask allows a token")));
            if advanced != Ok(Progress::Goes) {
                break;
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?} for {:.80?}", begun.elapsed(), source);
    }
}

/// The class of them: each is refused when its time is over, and nothing goes on.
#[test]
fn forms_that_never_end_are_stopped() {
    let pids = env::temp_dir().join(format!("fullbore-sandboxes-{}", std::process::id()));
    let command = format!("echo $$ >> '{}'", pids.display());
    let sandbox = Sandbox::new(move || sandboxed(&command));
    let compiler = GrammarCompiler::new(TOKENIZER.clone(), vec![TokenId(2)], VOCAB_SIZE).with_sandbox(sandbox);
    let held = Arc::new(());
    std::thread::scope(|scope| {
        for form in endless_forms() {
            let (compiler, held) = (&compiler, held.clone());
            scope.spawn(move || {
                let error = compiler.compile_checked(&form.clone().check().expect("a small one"), held).err();
                assert!(matches!(error, Some(GrammarError::TooSlow { .. })), "{error:?} for {form:.80?}");
            });
        }
    });
    assert_eq!(Arc::strong_count(&held), 1, "nothing works on any of them");
    // A process that waits for the next form sleeps, as does one that was started beside them.
    let settle = |what: &str, is_right: fn(&[char]) -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let told = fs::read_to_string(&pids).expect("sandboxes tell who they are");
            let state = |pid: &str| {
                let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat")).ok()?;
                stat.rsplit(") ").next().and_then(|rest| rest.chars().next())
            };
            let states: Vec<char> = told.lines().filter_map(state).collect();
            if is_right(&states) {
                break;
            }
            assert!(Instant::now() < deadline, "{what}: {states:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    settle("no form goes on", |states| states.len() <= 2 && states.iter().all(|state| *state == 'S'));
    for form in ["[a-c]{3}", "[a-c]{4}"] {
        assert!(compiler.compile(&GrammarSource::Regex(form.to_owned())).is_ok());
    }
    assert!(matches!(compiler.compile(&GrammarSource::Regex("a(".to_owned())), Err(GrammarError::Invalid(_))));
    settle("it waits for the next", |states| (1..=2).contains(&states.len()));
    drop(compiler);
    settle("all end with who started them", |states| states.is_empty());
    fs::remove_file(pids).expect("it was there");
}

#[test]
fn forms_that_take_too_much_memory_are_refused_and_take_nobody_with_them() {
    // In KiB, of which the stack of a compilation is 256 MiB.
    let sandbox = Sandbox::new(|| sandboxed("ulimit -c 0; ulimit -d 300000"));
    let compiler = GrammarCompiler::new(TOKENIZER.clone(), vec![TokenId(2)], VOCAB_SIZE).with_sandbox(sandbox);
    let classes = GrammarSource::Regex(r"\w{1,3}\d\p{L}\P{N}".repeat(12_000));
    assert_eq!(compiler.compile(&classes).err(), Some(GrammarError::TooMuchMemory));
    assert!(compiler.compile(&GrammarSource::Regex("[a-c]{3}".to_owned())).is_ok());
}

#[test]
fn one_grammar_is_compiled_once_however_many_ask() {
    // Some milliseconds' worth.
    let source = GrammarSource::Regex("(ab|cd){1,200}[x-z]{0,300}once".to_owned());
    let compiler = GrammarCompiler::new(TOKENIZER.clone(), vec![TokenId(2)], VOCAB_SIZE);
    let timed = || {
        let begun = Instant::now();
        compiler.compile(&source).expect("a grammar");
        begun.elapsed()
    };
    let first = timed();
    let again = (0..8).map(|_| timed()).min().expect("eight");
    assert!(again < first / 4, "first {first:?}, then {again:?}");
}

/// What a client was told.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    reason: Option<FinishReason>,
}

impl Answer {
    /// Without the token that ends it.
    fn text(&self) -> String {
        TOKENIZER.decode(&self.tokens)
    }
}

struct Client(Arc<Mutex<Answer>>);

impl Sink for Client {
    fn event(&mut self, event: Event) -> Flow {
        let mut answer = self.0.lock().expect("nobody panics");
        match event {
            Event::Token { id, .. } => answer.tokens.push(id),
            Event::Finished { reason, .. } => answer.reason = Some(reason),
            Event::Started { .. } | Event::Prompt(_) | Event::Pooled(_) => {}
        }
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}

fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_model_len: 128,
        num_blocks: 64,
        max_logit_rows: 8,
        ..EngineConfig::default()
    }
}

fn run(engine: &mut Engine, requests: &[Request]) -> Vec<Answer> {
    let answers: Vec<Arc<Mutex<Answer>>> = requests.iter().map(|_| Arc::default()).collect();
    for (request, answer) in requests.iter().zip(&answers) {
        engine.add(request.clone(), Box::new(Client(answer.clone())));
    }
    while engine.step().expect("the simulator is never lost") {
        engine.check();
    }
    answers.iter().map(|answer| answer.lock().expect("nobody panics").clone()).collect()
}

fn request(index: u32, grammar: Option<Grammar>) -> Request {
    let sampling = SamplingParams { temperature: 1.0, seed: u64::from(index), ..SamplingParams::default() };
    let stop_ids = vec![TokenId(2)];
    Request { prompt: vec![TokenId(300 + index)], max_tokens: 60, stop_ids, sampling, grammar, ..Request::default() }
}

#[test]
fn texts_follow_their_grammars_and_end_with_them() {
    let object = json!({
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": false,
    });
    let object = schema(object).expect("a schema");
    let (word, date) = (regex("[a-c]{2,20}"), regex("20[0-9]{2}-[01][0-9]"));
    let mut engine = engine_on(SimBackend::new(SimOptions::default()), config());
    let grammars = [&object, &word, &date];
    let requests: Vec<Request> =
        (0..30).map(|index| request(index, Some(grammars[index as usize % 3].clone()))).collect();
    let answers = run(&mut engine, &requests);
    let mut reasons: HashMap<bool, u32> = HashMap::new();
    for (index, answer) in answers.iter().enumerate() {
        let (text, reason) = (answer.text(), answer.reason.clone().expect("an end"));
        if reason == FinishReason::Stop {
            assert!(takes(grammars[index % 3], &text), "{text:?}");
        } else {
            assert_eq!((reason.clone(), answer.tokens.len()), (FinishReason::Length, 60), "{text:?}");
        }
        *reasons.entry(reason == FinishReason::Stop).or_default() += 1;
    }
    assert!(reasons[&true] >= 20, "{reasons:?}");
    // Where nothing may follow, no token is spent to say so.
    assert!(answers[2..].iter().step_by(3).all(|date| date.tokens.len() == 7), "{answers:?}");
    let mut texts: Vec<String> = answers.iter().map(Answer::text).collect();
    texts.sort_unstable();
    texts.dedup();
    assert!(texts.len() > 20, "{texts:?}");
}

#[test]
fn a_grammar_without_a_token_to_go_on_ends_its_request_alone() {
    let (tokens, token_types) = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("1", 1), ("2", 1)]
        .map(|(token, kind)| (token.to_owned(), kind))
        .into_iter()
        .unzip();
    let vocab = GgufVocab {
        model: "llama".to_owned(),
        scores: vec![0.0; 5],
        unk: Some(0),
        token_types,
        tokens,
        ..GgufVocab::default()
    };
    let digits = Arc::new(Tokenizer::from_vocab(vocab).expect("a vocabulary"));
    let compiler = GrammarCompiler::new(digits, vec![TokenId(2)], VOCAB_SIZE);
    let compile = |regex: &str| compiler.compile(&GrammarSource::Regex(regex.to_owned()));
    let error = compile("[a-z]+").expect_err("no first token");
    assert!(error.to_string().contains("no token"), "{error}");
    let later = compile("12[a-z]").expect("two tokens can come");
    let (bystander, follower) = (request(0, None), request(1, Some(later)));
    let mut engine = engine_on(SimBackend::new(SimOptions::default()), config());
    let answers = run(&mut engine, &[bystander.clone(), follower]);
    let alone = run(&mut engine_on(SimBackend::new(SimOptions::default()), config()), &[bystander]);
    assert_eq!(answers[0], alone[0]);
    let Some(FinishReason::Error(sentence)) = &answers[1].reason else { panic!("{answers:?}") };
    assert!(sentence.contains("grammar"), "{sentence}");
    assert_eq!(answers[1].tokens, [3, 4].map(TokenId), "nothing was chosen without the grammar");
}

#[test]
fn a_least_length_keeps_ends_away_and_a_grammar_comes_first() {
    let all = || (0..VOCAB_SIZE).map(TokenId);
    let early = token_mask(all().filter(|token| token.0 != 2), VOCAB_SIZE);
    let with_least = |grammar: &str, min_tokens| {
        let plain = request(3, Some(regex(grammar)));
        let sampling = SamplingParams { min_tokens, early_tokens: Some(early.clone()), ..plain.sampling };
        Request { sampling, ..plain }
    };
    let requests = [with_least("a*", 0), with_least("a*", 20), with_least("a{0,5}", 20)];
    let answers = run(&mut engine_on(SimBackend::new(SimOptions::default()), config()), &requests);
    assert!(answers[1].text().len() >= 20 && answers[0].text().len() < 20, "{answers:?}");
    assert!(answers[2].text().len() == 5 && answers[2].reason == Some(FinishReason::Stop), "{answers:?}");
}

#[test]
fn a_form_and_allowed_tokens_that_exclude_each_other_end_the_request() {
    let of_letters = |grammar: &str, letters: &str| {
        let plain = request(3, Some(regex(grammar)));
        let allowed = token_mask(letters.bytes().map(|letter| TokenId(4 + u32::from(letter))), VOCAB_SIZE);
        Request { sampling: SamplingParams { allowed_tokens: Some(allowed), ..plain.sampling }, ..plain }
    };
    // At once, behind three letters, and never.
    let cases = [("[a-c]{3}x", "yz"), ("[a-c]{3}x", "ab"), ("[a-c]{3}x", "ax")];
    let requests = cases.map(|(grammar, letters)| of_letters(grammar, letters));
    let answers = run(&mut engine_on(SimBackend::new(SimOptions::default()), config()), &requests);
    for (answer, num_tokens) in answers[..2].iter().zip([0, 3]) {
        let Some(FinishReason::Contradiction(sentence)) = &answer.reason else { panic!("{answers:?}") };
        assert!(sentence.contains("grammar") && sentence.contains("allowed_token_ids"), "{sentence}");
        assert!(answer.tokens.len() == num_tokens && !answer.text().contains('c'), "{answer:?}");
    }
    assert_eq!((answers[2].text().as_str(), &answers[2].reason), ("aaax", &Some(FinishReason::Stop)));
}

#[test]
fn who_waits_has_no_states_and_those_of_who_runs_are_bounded() {
    let form = regex("[a-c]{2,20}");
    let num_bytes = form.num_bytes() as u64;
    // Two of them leave room for one more.
    let config = EngineConfig { max_grammar_bytes: 3 * num_bytes + num_bytes / 2, ..config() };
    let mut engine = engine_on(SimBackend::new(SimOptions::default()), config);
    let answers: Vec<Arc<Mutex<Answer>>> = (0..132).map(|_| Arc::default()).collect();
    for (index, answer) in answers.iter().enumerate() {
        let form = (index < 128).then(|| form.clone());
        engine.add(request(index as u32, form), Box::new(Client(answer.clone())));
    }
    let is_done = |answer: &Arc<Mutex<Answer>>| answer.lock().expect("nobody panics").reason.is_some();
    let (mut most, mut num_forms_before) = (0, None);
    while engine.step().expect("the simulator is never lost") {
        engine.check();
        most = most.max(engine.stats().grammar_bytes);
        let has_free = !answers[128..].iter().all(is_done);
        assert!(engine.stats().num_running <= 3 + if has_free { 4 } else { 0 }, "{:?}", engine.stats());
        if !has_free {
            num_forms_before.get_or_insert_with(|| answers[..128].iter().filter(|answer| is_done(answer)).count());
        }
    }
    // Of the 128 that came before them, more than are passed over for a prefix.
    assert!(num_forms_before.is_some_and(|count| count < 20), "those without a form waited: {num_forms_before:?}");
    // Three at a time, and they grow.
    assert!((2 * num_bytes..=9 * num_bytes).contains(&most), "{most} bytes, and one takes {num_bytes}");
    for answer in &answers[..128] {
        let answer = answer.lock().expect("nobody panics");
        assert!(answer.reason == Some(FinishReason::Stop) && takes(&form, &answer.text()), "{answer:?}");
    }
    assert_eq!(engine.stats().grammar_bytes, 0);
}

#[test]
fn states_that_grow_without_end_end_their_request() {
    // Which of the last letters were an a: as many states as there are texts of 40 letters.
    let mut matcher = regex("[ab]*a[ab]{40}c").matcher();
    let mut mask = vec![0; VOCAB_SIZE.div_ceil(32) as usize];
    let mut state = 1u64;
    let ended = (0..20_000).find_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let letter = if state >> 63 == 0 { b'a' } else { b'b' };
        let followed = matcher.mask(&mut mask).and_then(|()| matcher.advance(TokenId(4 + u32::from(letter))));
        assert!(matcher.num_bytes() <= MAX_MATCHER_BYTES);
        followed.err()
    });
    let sentence = ended.expect("it has an end");
    assert!(sentence.contains("cannot be followed further"), "{sentence}");
    assert_eq!((matcher.mask(&mut mask), matcher.num_bytes()), (Err(sentence), 0), "for good");
}
