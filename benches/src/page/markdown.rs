//! The page's tables as Markdown, for a README or an issue.

use super::view::{Cell, DeviceTable, OF_RATIOS, Source, Table, View};

pub fn page(view: &View) -> String {
    let mut text = "# Fullbore benchmarks\n\nMedians of whole runs, and from the least to the most.\n".to_owned();
    if !view.ratios.rows.is_empty() {
        text += &format!("\n## Beside other engines\n\n{OF_RATIOS}\n\n{}", table(&view.ratios));
    }
    for DeviceTable { vendor, name, about, table: of } in &view.devices {
        text += &vendor.map_or(String::new(), |vendor| format!("\n## {}\n", escaped(vendor)));
        text += &format!("\n### {}\n\n{}\n\n{}", escaped(name), escaped(about), table(of));
    }
    if !view.diagnoses.rows.is_empty() {
        text += &format!("\n## What the doctor says\n\n{}", table(&view.diagnoses));
    }
    if !view.starts.rows.is_empty() {
        text += &format!("\n## Starts\n\n{}", table(&view.starts));
    }
    let items = |sentences: &[String]| sentences.iter().map(|one| format!("- {}\n", escaped(one))).collect::<String>();
    text += &format!("\n## What is missing\n\n{}", items(&view.missing));
    text += "\n## To repeat it\n";
    for Source { file, facts, .. } in &view.sources {
        let facts: String =
            facts.iter().map(|(name, value)| format!("- {name}: `{}`\n", value.replace('`', "'"))).collect();
        text += &format!("\n{}\n\n{facts}", escaped(file));
    }
    text
}

fn table(of: &Table) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let head = line(of.head.iter().map(|title| escaped(title)).collect());
    let rows: String = of.rows.iter().map(|cells| line(cells.iter().map(cell).collect())).collect();
    format!("{head}{}\n{rows}", "|---".repeat(of.head.len()) + "|")
}

fn cell(cell: &Cell) -> String {
    let spread = cell.spread.as_ref().map_or(String::new(), |spread| format!(" ({spread})"));
    escaped(&format!("{}{spread}", cell.text))
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace('<', "&lt;")
}
