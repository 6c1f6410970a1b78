//! The preprocessor: one pass over lines, no expressions beyond a comparison.
//!
//! Invariant: the output depends on the kernel's name and its constants alone; an unknown name is an error with file
//! and line, never empty text.

use crate::{Constants, FILES};

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {message}")]
pub struct ComposeError {
    pub file: String,
    pub line: usize,
    pub message: String,
}

/// The text of `kernel` (its file name without `.wgsl`) under `constants`.
pub fn compose(kernel: &str, constants: &Constants) -> Result<String, ComposeError> {
    let mut composer = Composer { constants: constants.clone(), out: String::new() };
    composer.file(&format!("{kernel}.wgsl"), &Place { file: kernel, line: 0 })?;
    Ok(composer.out)
}

struct Composer {
    constants: Constants,
    out: String,
}

#[derive(Clone, Copy)]
struct Place<'a> {
    file: &'a str,
    line: usize,
}

impl Place<'_> {
    fn error(&self, message: String) -> ComposeError {
        ComposeError { file: self.file.to_owned(), line: self.line, message }
    }
}

/// A line of a file and its number.
type Line<'a> = (usize, &'a str);

impl Composer {
    fn file(&mut self, name: &str, from: &Place) -> Result<(), ComposeError> {
        let found = FILES.iter().find(|(file, _)| *file == name);
        let (file, text) = found.ok_or_else(|| from.error(format!("there is no file {name}")))?;
        let lines: Vec<Line> = text.lines().enumerate().map(|(index, line)| (index + 1, line)).collect();
        self.lines(file, &lines)
    }

    fn lines(&mut self, file: &'static str, lines: &[Line<'static>]) -> Result<(), ComposeError> {
        let mut index = 0;
        while index < lines.len() {
            let (line, text) = lines[index];
            let place = Place { file, line };
            index += 1;
            let words: Vec<&'static str> = text.split_whitespace().collect();
            match words[..] {
                ["#include", name] => self.file(name.trim_matches('"'), &place)?,
                ["#if", ref condition @ ..] => {
                    let end = block_end(&lines[index..], "#if", "#endif", &place)? + index;
                    let otherwise = own_else(&lines[index..end]).map_or(end, |found| found + index);
                    match self.holds(condition, &place)? {
                        true => self.lines(file, &lines[index..otherwise])?,
                        false => self.lines(file, &lines[(otherwise + 1).min(end)..end])?,
                    }
                    index = end + 1;
                }
                ["#for", name, count] => {
                    let end = block_end(&lines[index..], "#for", "#endfor", &place)? + index;
                    for value in 0..self.value(count, &place)? {
                        self.constants.push((name, value));
                        self.lines(file, &lines[index..end])?;
                        self.constants.pop();
                    }
                    index = end + 1;
                }
                [word, ..] if word.starts_with('#') => return Err(place.error(format!("{text} is no directive"))),
                _ => self.substitute(text, &place)?,
            }
        }
        Ok(())
    }

    fn holds(&self, condition: &[&str], place: &Place) -> Result<bool, ComposeError> {
        let value = |word: &str| self.value(word, place);
        Ok(match *condition {
            [name] => match name.strip_prefix('!') {
                Some(name) => value(name)? == 0,
                None => value(name)? != 0,
            },
            [left, "==", right] => value(left)? == value(right)?,
            [left, ">", right] => value(left)? > value(right)?,
            [left, "<", right] => value(left)? < value(right)?,
            _ => return Err(place.error(format!("{} is no condition", condition.join(" ")))),
        })
    }

    fn value(&self, word: &str, place: &Place) -> Result<u32, ComposeError> {
        let constant = self.constants.iter().rev().find(|(name, _)| *name == word).map(|(_, value)| *value);
        let value = constant.or_else(|| word.parse().ok());
        value.ok_or_else(|| place.error(format!("{word} has no value here")))
    }

    fn substitute(&mut self, text: &str, place: &Place) -> Result<(), ComposeError> {
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("{{") {
            let (name, after) = after.split_once("}}").ok_or_else(|| place.error("{{ without }}".to_owned()))?;
            let value = self.value(name, place)?;
            self.out.push_str(before);
            self.out.push_str(&value.to_string());
            rest = after;
        }
        self.out.push_str(rest);
        self.out.push('\n');
        Ok(())
    }
}

fn first_word<'a>(line: &Line<'a>) -> &'a str {
    line.1.split_whitespace().next().unwrap_or("")
}

/// Index of the `end` that closes a block opened just before `lines`.
fn block_end(lines: &[Line], begin: &str, end: &str, place: &Place) -> Result<usize, ComposeError> {
    let mut depth = 0;
    for (index, line) in lines.iter().enumerate() {
        match first_word(line) {
            word if word == begin => depth += 1,
            word if word == end && depth == 0 => return Ok(index),
            word if word == end => depth -= 1,
            _ => {}
        }
    }
    Err(place.error(format!("{begin} without {end}")))
}

/// Index of the `#else` that belongs to the `#if` around `lines`.
fn own_else(lines: &[Line]) -> Option<usize> {
    let mut depth = 0;
    lines.iter().position(|line| {
        match first_word(line) {
            "#if" => depth += 1,
            "#endif" => depth -= 1,
            _ => {}
        }
        depth == 0 && first_word(line) == "#else"
    })
}
