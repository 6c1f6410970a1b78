//! The page as HTML. Invariant: one file, nothing fetched, no script; every name in it is escaped.

use super::figures::Figure;
use super::plot::NUM_COLOURS;
use super::view::{Cell, DeviceTable, Head, OF_RATIOS, Source, Table, View};

const STYLE: &str = include_str!("page.css");

pub fn page(view: &View, figures: &[Figure]) -> String {
    let mut body = String::new();
    let number = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    body += "<header><h1>Fullbore <span>benchmarks</span></h1><p>";
    let [files, devices] =
        [(view.sources.len(), "result"), (view.devices.len(), "engine")].map(|(count, what)| number(count, what));
    body +=
        &format!("{files} of {devices}. Numbers are medians of whole runs; below each, from the least to the most.");
    body += "</p></header><main>";
    let heads: String = view.heads.iter().map(head).collect();
    body += &format!("<section class=\"heads\">{heads}</section>");
    if !view.ratios.rows.is_empty() {
        body += &section("Beside other engines", OF_RATIOS, &table(&view.ratios));
    }
    if !figures.is_empty() {
        let all: String = figures.iter().map(figure).collect();
        body += &section("At a glance", "", &format!("<div class=\"figures\">{all}</div>"));
    }
    let tables: String = view.devices.iter().map(device).collect();
    if !tables.is_empty() {
        body += &section("By vendor and device", "", &tables);
    }
    if !view.diagnoses.rows.is_empty() {
        let lead = "What holds each device back, the change of flags that should help most, and what it brought.";
        body += &section("What the doctor says", lead, &table(&view.diagnoses));
    }
    if !view.starts.rows.is_empty() {
        body += &section("Starts", "", &table(&view.starts));
    }
    let missing: String = view.missing.iter().map(|sentence| format!("<li>{}</li>", escaped(sentence))).collect();
    body += &section("What is missing", "", &format!("<ul>{missing}</ul>"));
    let sources: String = view.sources.iter().map(source).collect();
    body += &section("To repeat it", "Each result file, and how it came about.", &sources);
    let legend_colours: String = (0..NUM_COLOURS).map(|n| format!(".c{n}{{--own:var(--c{n})}}")).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>Fullbore benchmarks</title>\
         <style>\n{STYLE}{legend_colours}</style></head>\n<body>{body}</main></body></html>\n"
    )
}

fn section(title: &str, lead: &str, content: &str) -> String {
    let lead = if lead.is_empty() { String::new() } else { format!("<p class=\"lead\">{}</p>", escaped(lead)) };
    format!("<section><h2>{}</h2>{lead}{content}</section>\n", escaped(title))
}

fn head(head: &Head) -> String {
    let fact = |(number, what): &(String, String)| {
        let (value, unit) = number.split_once(' ').unwrap_or((number, ""));
        let (value, unit, what) = (escaped(value), escaped(unit), escaped(what));
        format!("<p><b>{value}</b> {unit}<small>{what}</small></p>")
    };
    let facts: String = head.facts.iter().map(fact).collect();
    format!("<article><h3>{}</h3>{facts}</article>", escaped(&head.name))
}

fn figure(figure: &Figure) -> String {
    let Figure { title, caption, legend, svg } = figure;
    let item =
        |(nth, name): (usize, &String)| format!("<li class=\"c{}\"><i></i>{}</li>", nth % NUM_COLOURS, escaped(name));
    let legend: String = legend.iter().enumerate().map(item).collect();
    let legend = if legend.is_empty() { legend } else { format!("<ul class=\"legend\">{legend}</ul>") };
    let (title, caption) = (escaped(title), escaped(caption));
    format!("<figure><h3>{title}</h3>{legend}{svg}<figcaption>{caption}</figcaption></figure>\n")
}

fn device(device: &DeviceTable) -> String {
    let (name, about) = (escaped(&device.name), escaped(&device.about));
    let vendor = device.vendor.map_or(String::new(), |vendor| format!("<h3>{}</h3>", escaped(vendor)));
    format!("{vendor}<h4>{name}</h4><p class=\"about\">{about}</p>{}", table(&device.table))
}

fn table(of: &Table) -> String {
    let head: String = of.head.iter().map(|title| format!("<th>{}</th>", escaped(title))).collect();
    let row = |cells: &Vec<Cell>| format!("<tr>{}</tr>", cells.iter().map(cell).collect::<String>());
    let rows: String = of.rows.iter().map(row).collect();
    format!("<div class=\"scroll\"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>")
}

fn cell(cell: &Cell) -> String {
    let class = if cell.is_number { " class=\"number\"" } else { "" };
    let spread = cell.spread.as_ref().map_or(String::new(), |spread| format!("<small>{}</small>", escaped(spread)));
    format!("<td{class}>{}{spread}</td>", escaped(&cell.text))
}

fn source(source: &Source) -> String {
    let fact = |(name, value): &(&str, String)| format!("<dt>{name}</dt><dd>{}</dd>", escaped(value));
    let facts: String = source.facts.iter().map(fact).collect();
    let doubts: String = source.invalid.iter().map(|reason| format!("<dd>{}</dd>", escaped(reason))).collect();
    let doubts = if doubts.is_empty() { doubts } else { format!("<dt>not valid</dt>{doubts}") };
    format!("<details><summary>{}</summary><dl>{facts}{doubts}</dl></details>", escaped(&source.file))
}

fn escaped(text: &str) -> String {
    super::plot::escaped(text).replace('\'', "&#39;")
}
