//! A process that tries strangers' grammars first, so that what takes too long can be stopped.
//!
//! Nothing that can be counted in a source tells how long llguidance will make its parser: what follows from limits
//! of its own begins after that, and the first transitions of its lexer, the remainders of a `multipleOf` and whether
//! two patterns have a text in common are found without any. No thread can be killed, but a process can, and its
//! memory can be limited. Lines of JSON go through its pipes: the vocabulary, then a source at a time, and an
//! [`Outcome`] comes back for each, for the vocabulary too.
//!
//! Invariant: when [`Trials::try_source`] returns, no process works on the source any more. A process knows one
//! vocabulary, is started when it is needed and kept for the next source, and ends with the one that started it. While
//! one takes long, the next is started beside it, so that who comes after it has one.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::GrammarSource;
use super::build::{Builder, STACK_BYTES};
use super::compile::{GrammarError, lock};
use super::vocabulary::Vocabulary;
use crate::deadline::{BUG, Lost, with_deadline};

/// What comes of a source.
type Outcome = Result<(), GrammarError>;

/// For a process to be there and to know its vocabulary, on a busy machine.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Processes that wait for the next source at most, at some tens of MiB each.
const MAX_IDLE: usize = 2;
/// Of a thread that waits for a process.
const WAITER_STACK_BYTES: usize = 256 << 10;

/// A trial that takes longer may have to be stopped.
const PATIENCE: Duration = Duration::from_millis(200);

/// How processes are started.
pub struct Sandbox {
    command: Box<dyn Fn() -> Command + Send + Sync>,
}

/// Processes for one vocabulary.
pub(super) struct Trials {
    sandbox: Sandbox,
    vocabulary: Box<dyn Fn() -> Vocabulary + Send + Sync>,
    idle: Mutex<Vec<Process>>,
}

/// Killed when dropped.
struct Process {
    child: Child,
    /// None while a thread waits at it.
    pipes: Option<Pipes>,
}

struct Pipes {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Sandbox {
    /// `command` starts a process that calls [`serve`]; its pipes are set here.
    pub fn new(command: impl Fn() -> Command + Send + Sync + 'static) -> Sandbox {
        Sandbox { command: Box::new(command) }
    }
}

impl Trials {
    pub fn new(sandbox: Sandbox, vocabulary: impl Fn() -> Vocabulary + Send + Sync + 'static) -> Arc<Trials> {
        Arc::new(Trials { sandbox, vocabulary: Box::new(vocabulary), idle: Mutex::default() })
    }

    /// Builds a grammar and throws it away; after `deadline` that is stopped.
    pub fn try_source(self: &Arc<Trials>, source: &GrammarSource, deadline: Duration) -> Outcome {
        let mut process = self.idle().map_or_else(|| self.start(), Ok)?;
        let outcome = process.ask(line(source), deadline, || self.start_beside())?;
        self.keep(process);
        outcome
    }

    fn keep(&self, process: Process) {
        let mut idle = lock(&self.idle);
        if idle.len() < MAX_IDLE {
            idle.push(process);
        }
    }

    /// Where there is no other: one for whoever comes next.
    fn start_beside(self: &Arc<Trials>) {
        let trials = self.clone();
        let start = move || {
            if lock(&trials.idle).is_empty()
                && let Ok(process) = trials.start()
            {
                trials.keep(process);
            }
        };
        // Without a thread for that, whoever comes next starts one himself.
        let _ = thread::Builder::new().name("grammar-start".to_owned()).spawn(start);
    }

    /// A process that waits; those that have ended meanwhile are let go.
    fn idle(&self) -> Option<Process> {
        let mut idle = lock(&self.idle);
        idle.retain_mut(|process| matches!(process.child.try_wait(), Ok(None)));
        idle.pop()
    }

    fn start(&self) -> Result<Process, GrammarError> {
        let spawned =
            (self.sandbox.command)().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut child = spawned
            .map_err(|error| GrammarError::NotStarted(format!("no process could be started for it: {error}")))?;
        let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let mut process = Process { child, pipes: Some(Pipes { input, output: BufReader::new(output) }) };
        match process.ask(line(&(self.vocabulary)()), START_DEADLINE, || {}) {
            Ok(outcome) => outcome.map(|()| process),
            Err(_) => Err(GrammarError::NotStarted("the process for it did not begin".to_owned())),
        }
    }
}

impl Process {
    /// What it answers to a line, of which `late` is told when that has not come soon; after an error it is of no use
    /// any more.
    fn ask(&mut self, line: Vec<u8>, deadline: Duration, late: impl FnOnce()) -> Result<Outcome, GrammarError> {
        let mut pipes = self.pipes.take().expect("an error was the last");
        let exchange = move || {
            let outcome = pipes.exchange(&line);
            (pipes, outcome)
        };
        let answered = match with_deadline("grammar-wait", WAITER_STACK_BYTES, PATIENCE, exchange) {
            Err(Lost::Late(receiver)) => {
                late();
                receiver.recv_timeout(deadline.saturating_sub(PATIENCE)).map_err(|_| Lost::Late(receiver))
            }
            answered => answered,
        };
        match answered {
            Ok((pipes, Ok(outcome))) => {
                self.pipes = Some(pipes);
                Ok(outcome)
            }
            // It has ended by itself: nothing but memory is known to do that, a stack that is too deep included.
            Ok((_, Err(_))) => Err(GrammarError::TooMuchMemory),
            // Its thread sees the pipe's end when the process is killed.
            Err(Lost::Late(_)) => Err(GrammarError::TooSlow { deadline }),
            Err(Lost::Failed(problem) | Lost::NotStarted(problem)) => Err(GrammarError::NotStarted(problem)),
        }
    }
}

impl Pipes {
    fn exchange(&mut self, line: &[u8]) -> io::Result<Outcome> {
        self.input.write_all(line)?;
        self.input.flush()?;
        loop {
            let mut answer = String::new();
            if self.output.read_line(&mut answer)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // A program may have its own words on standard output, as a harness of tests has.
            if let Ok(outcome) = serde_json::from_str(&answer) {
                return Ok(outcome);
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already cannot be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process's side: tries what comes until nothing more does, and returns although it may be at the last, so that
/// the process must end then.
pub fn serve(input: impl Read, output: impl Write + Send + 'static) -> io::Result<()> {
    let mut lines = BufReader::new(input).lines();
    let Some(vocabulary) = lines.next().transpose()? else { return Ok(()) };
    let (sender, sources) = channel();
    let thread = thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
    thread.spawn(move || try_all(&vocabulary, &sources, output))?;
    for source in lines {
        if sender.send(source?).is_err() {
            // Nobody reads what it says.
            break;
        }
    }
    Ok(())
}

fn try_all(vocabulary: &str, sources: &Receiver<String>, mut output: impl Write) {
    let not_read = |error: serde_json::Error| GrammarError::Invalid(format!("it was not read: {error}"));
    let builder = serde_json::from_str(vocabulary).map_err(not_read).and_then(|known| Builder::new(&known));
    let mut tell = |outcome: &Outcome| {
        // On a line of its own, whatever stood there.
        output.write_all(&[b"\n", &line(outcome)[..]].concat()).and_then(|()| output.flush()).is_ok()
    };
    let told = tell(&builder.as_ref().map(|_| ()).map_err(GrammarError::clone));
    let Ok(builder) = builder else { return };
    if !told {
        return;
    }
    for source in sources {
        let source = serde_json::from_str(&source).map_err(not_read);
        let built = catch_unwind(AssertUnwindSafe(|| source.and_then(|source| builder.build(source))));
        let outcome = built.unwrap_or_else(|_| Err(GrammarError::Invalid(BUG.to_owned())));
        if !tell(&outcome.map(drop)) {
            return;
        }
    }
}

fn line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("text and numbers");
    line.push(b'\n');
    line
}
