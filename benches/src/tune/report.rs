//! What tuning has found, for people: a line for each class of rows, and why something is kept.

use std::fmt;

use super::{ClassRows, Found, Ratio, TunedShape, TunedStep};

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Shape(shape) => shape.fmt(f),
            Found::Step(step) => step.fmt(f),
        }
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} x, give or take {:.3}", self.median, self.spread)
    }
}

/// `M   9 to 10 `.
fn write_rows(f: &mut fmt::Formatter<'_>, first_rows: u32, max_rows: Option<u32>) -> fmt::Result {
    let most = match max_rows {
        Some(most) if most == first_rows => String::new(),
        Some(most) => format!("to {most}"),
        None => "up".to_owned(),
    };
    write!(f, "  M {first_rows:>3} {most:<6}  ")
}

impl fmt::Display for TunedShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.shape)?;
        for class in &self.classes {
            let ClassRows { first_rows, max_rows, most } = class.rows;
            write_rows(f, first_rows, max_rows)?;
            let (kernel, fills) = (&class.line().kernel, if class.line().fills { ", filled" } else { "" });
            write!(f, "{:<24}{:>10.1} us at {most}", format!("{kernel}{fills}"), class.ns() / 1e3)?;
            if let Some(chosen) = &class.chosen {
                write!(f, ", instead of {:.1} by {}: {}", class.own_ns / 1e3, class.own.kernel, chosen.ratio)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for TunedStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_rows(f, self.first_rows, self.max_rows)?;
        let verdict = if self.is_kept { "kept" } else { "not faster beyond that: the device's own tables stay" };
        let (num_changed, rows) = (self.num_changed, self.rows);
        writeln!(f, "the products of a step of {rows} with {num_changed} tables changed: {}; {verdict}", self.ratio)
    }
}
