//! A chat at the terminal, line by line, with what was said before. Invariant: what is refused is not remembered; only
//! the end of input ends the chat.

use std::io::{self, BufRead, IsTerminal};

use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{Receiver, channel};

use super::{RunError, answer, write};
use crate::api::{Endpoint, ServedModel};
use crate::args::RunArgs;

const HELP: &str = "\
/clear          forget what was said
/system TEXT    begin each prompt with these words; without TEXT, with none
/help           this list
A line that ends with \\ goes on in the next. Ctrl-C stops an answer, Ctrl-D ends.";

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Say(&'a str),
    Clear,
    System(&'a str),
    Help,
    Unknown(&'a str),
    Nothing,
}

impl Line<'_> {
    fn parse(line: &str) -> Line<'_> {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match word {
            "" => Line::Nothing,
            "/clear" => Line::Clear,
            "/system" => Line::System(rest.trim()),
            "/help" | "/?" => Line::Help,
            word if word.starts_with('/') => Line::Unknown(word),
            _ => Line::Say(line),
        }
    }
}

struct Chat<'a> {
    model: &'a ServedModel,
    args: &'a RunArgs,
    system: String,
    messages: Vec<Value>,
    /// Somebody types, and sees prompts.
    is_typed: bool,
}

pub async fn chat(model: &ServedModel, args: &RunArgs) -> Result<(), RunError> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let is_typed = io::stdin().is_terminal();
    let mut lines = read_lines();
    let mut chat = Chat { model, args, system: String::new(), messages: Vec::new(), is_typed };
    chat.tell(&format!("{} on {}; /help tells more", model.name, model.engine.device().name));
    let mut unfinished = String::new();
    loop {
        if is_typed {
            write(if unfinished.is_empty() { "> " } else { "| " })?;
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            _ = interrupt.recv() => {
                unfinished.clear();
                chat.tell("\nCtrl-D ends");
                continue;
            }
        };
        let Some(line) = line.transpose()? else { break };
        match line.strip_suffix('\\') {
            Some(begin) => unfinished += &format!("{begin}\n"),
            None => chat.take(&(std::mem::take(&mut unfinished) + &line), &mut interrupt).await?,
        }
    }
    if is_typed {
        write("\n")?;
    }
    Ok(())
}

impl Chat<'_> {
    async fn take(&mut self, line: &str, interrupt: &mut Signal) -> Result<(), RunError> {
        match Line::parse(line) {
            Line::Nothing => {}
            Line::Clear => {
                self.messages.clear();
                self.tell("forgotten");
            }
            Line::System(text) => {
                text.clone_into(&mut self.system);
                self.tell(if text.is_empty() { "no system prompt" } else { "system prompt set" });
            }
            Line::Help => eprintln!("{HELP}"),
            Line::Unknown(word) => eprintln!("there is no {word}; /help lists what there is"),
            Line::Say(text) => return self.say(text, interrupt).await,
        }
        Ok(())
    }

    async fn say(&mut self, text: &str, interrupt: &mut Signal) -> Result<(), RunError> {
        self.messages.push(json!({"role": "user", "content": text}));
        let system = (!self.system.is_empty()).then(|| json!({"role": "system", "content": self.system}));
        let messages: Vec<&Value> = system.iter().chain(&self.messages).collect();
        let mut body = json!({"messages": messages, "temperature": self.args.temperature});
        if let Some(max_tokens) = self.args.max_tokens {
            body["max_tokens"] = json!(max_tokens);
        }
        match answer(self.model, Endpoint::Chat, &body, Some(interrupt)).await {
            Ok(said) => self.messages.push(json!({"role": "assistant", "content": said})),
            Err(RunError::Refused(reason)) => {
                self.messages.pop();
                eprintln!("{reason}");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// A word to whoever types.
    fn tell(&self, text: &str) {
        if self.is_typed {
            eprintln!("{text}");
        }
    }
}

/// Of standard input, until its end; read in a thread, for it cannot be waited for otherwise.
fn read_lines() -> Receiver<io::Result<String>> {
    let (sender, receiver) = channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let ended = line.is_err();
            if sender.blocking_send(line).is_err() || ended {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_begin_with_a_slash_are_commands() {
        let parsed = [" hello there ", "/clear", "/system Be brief. ", "/system", "/quit now", "", "a /clear"];
        let expected = [
            Line::Say("hello there"),
            Line::Clear,
            Line::System("Be brief."),
            Line::System(""),
            Line::Unknown("/quit"),
            Line::Nothing,
            Line::Say("a /clear"),
        ];
        assert_eq!(parsed.map(Line::parse), expected);
    }
}
