//! `fullbore bench report` and `schema`: result files in, a page out.

use std::fs;

use fullbore_bench::page;
use fullbore_bench::result::{BenchResult, SCHEMA};

use super::BenchCommandError;
use crate::args::ReportArgs;

/// Of those files that are results; the others are named, here and on the page.
pub fn report(args: &ReportArgs) -> Result<(), BenchCommandError> {
    let (mut results, mut unread) = (Vec::new(), Vec::new());
    for path in &args.results {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        match BenchResult::read(path) {
            Ok(result) => results.push((name, result)),
            Err(error) => {
                eprintln!("{error}");
                unread.push(error);
            }
        }
    }
    if results.is_empty() {
        return unread.into_iter().next().map_or(Ok(()), |error| Err(error.into()));
    }
    let unread: Vec<String> = unread.iter().map(|error| format!("{error}.")).collect();
    let is_markdown = args.output.extension().is_some_and(|extension| extension == "md");
    let text = if is_markdown { page::markdown(&results, &unread) } else { page::html(&results, &unread) };
    fs::write(&args.output, text).map_err(|source| BenchCommandError::Write { path: args.output.clone(), source })
}

pub fn schema() {
    print!("{SCHEMA}");
}
