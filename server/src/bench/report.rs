//! `fullbore bench report` and `schema`: result files in, a page out.

use std::fs;

use fullbore_bench::page;
use fullbore_bench::result::{BenchResult, SCHEMA};

use super::BenchCommandError;
use crate::args::ReportArgs;

pub fn report(args: &ReportArgs) -> Result<(), BenchCommandError> {
    let named = args.results.iter().map(|path| {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok((name, BenchResult::read(path)?))
    });
    let results = named.collect::<Result<Vec<_>, BenchCommandError>>()?;
    let is_markdown = args.output.extension().is_some_and(|extension| extension == "md");
    let text = if is_markdown { page::markdown(&results) } else { page::html(&results) };
    fs::write(&args.output, text).map_err(|source| BenchCommandError::Write { path: args.output.clone(), source })
}

pub fn schema() {
    print!("{SCHEMA}");
}
