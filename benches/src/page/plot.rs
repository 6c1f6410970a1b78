//! Plots as SVG, drawn in the colours of the page around them: lines with their spread, and stacked bars.
//!
//! Invariant: nothing is drawn that was not measured: no smoothing, no line beyond the points; axes of lines begin at 0
//! unless they are logarithmic.

use crate::result::table::number;

/// Points of one target, in the order of their loads.
pub struct Series {
    pub name: String,
    pub points: Vec<Point>,
}

/// With the least and the most of the runs in y.
pub struct Point {
    pub x: f64,
    pub y: f64,
    pub y_min: f64,
    pub y_max: f64,
    /// What is told of it when it is pointed at.
    pub title: String,
}

/// A row of parts, one after the other.
pub struct Bar {
    pub label: String,
    /// Of the colour that its index in the legend has.
    pub parts: Vec<f64>,
    /// Written at its end.
    pub total: String,
}

/// Of the page's palette.
pub const NUM_COLOURS: usize = 8;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 330.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 46.0;

/// An axis: what it shows, and whether it is logarithmic to the base 2.
pub struct Axis<'a> {
    pub label: &'a str,
    pub is_log: bool,
}

/// From values to places.
struct Scale {
    min: f64,
    max: f64,
    is_log: bool,
    from: f64,
    to: f64,
}

impl Scale {
    fn new(values: impl Iterator<Item = f64>, is_log: bool, from: f64, to: f64) -> Scale {
        let values: Vec<f64> = values.filter(|value| value.is_finite() && (!is_log || *value > 0.0)).collect();
        let most = values.iter().copied().fold(f64::MIN, f64::max);
        let least = values.iter().copied().fold(f64::MAX, f64::min);
        let (min, max) = match (values.is_empty(), is_log) {
            (true, _) => (0.0, 1.0),
            (false, true) => (least / 1.15, most * 1.15),
            (false, false) => (0.0, if most > 0.0 { most * 1.06 } else { 1.0 }),
        };
        Scale { min, max, is_log, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let share = match self.is_log {
            true => (value / self.min).ln() / (self.max / self.min).ln(),
            false => (value - self.min) / (self.max - self.min),
        };
        self.from + share * (self.to - self.from)
    }

    /// Round values between the ends.
    fn ticks(&self) -> Vec<f64> {
        if self.is_log {
            let first = self.min.log2().ceil() as i32;
            let last = self.max.log2().floor() as i32;
            let step = ((last - first) / 8 + 1) as usize;
            return (first..=last).step_by(step).map(|power| 2f64.powi(power)).collect();
        }
        let rough = (self.max - self.min) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|times| times * power).find(|step| *step >= rough);
        let step = step.unwrap_or(rough);
        let first = (self.min / step).ceil() as i64;
        let last = (self.max / step + 1e-9).floor() as i64;
        (first..=last).map(|nth| nth as f64 * step).collect()
    }
}

pub fn lines(series: &[Series], x_axis: &Axis, y_axis: &Axis) -> String {
    let points = || series.iter().flat_map(|series| &series.points);
    let x = Scale::new(points().map(|point| point.x), x_axis.is_log, LEFT, WIDTH - RIGHT);
    let y = Scale::new(points().flat_map(|p| [p.y, p.y_max]), y_axis.is_log, HEIGHT - BOTTOM, TOP);
    let mut svg = open(WIDTH, HEIGHT, &format!("{} against {}", y_axis.label, x_axis.label));
    let (right, base) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for tick in y.ticks() {
        let at = y.place(tick);
        svg += &rule("grid", (LEFT, at), (right, at));
        svg += &text("tick end", LEFT - 8.0, at + 4.0, &number(tick));
    }
    for tick in x.ticks() {
        let at = x.place(tick);
        svg += &rule("grid", (at, TOP), (at, base));
        svg += &text("tick middle", at, base + 18.0, &number(tick));
    }
    svg += &text("axis end", right, HEIGHT - 8.0, x_axis.label);
    let middle = (TOP + base) / 2.0;
    svg += &format!(
        r#"<g transform="translate(14 {middle}) rotate(-90)">{}</g>"#,
        text("axis middle", 0.0, 0.0, y_axis.label)
    );
    for (nth, series) in series.iter().enumerate() {
        svg += &line(series, nth % NUM_COLOURS, &x, &y);
    }
    svg + "</svg>"
}

fn line(series: &Series, colour: usize, x: &Scale, y: &Scale) -> String {
    let place = |point: &Point| format!("{:.1},{:.1}", x.place(point.x), y.place(point.y));
    let path: Vec<String> = series.points.iter().map(place).collect();
    let mut svg = format!(r#"<g class="c{colour}"><polyline points="{}"/>"#, path.join(" "));
    for point in &series.points {
        let (cx, cy) = (x.place(point.x), y.place(point.y));
        svg += &rule("spread", (cx, y.place(point.y_min)), (cx, y.place(point.y_max)));
        let title = escaped(&format!("{}: {}", series.name, point.title));
        svg += &format!(r#"<circle cx="{cx:.1}" cy="{cy:.1}" r="4"><title>{title}</title></circle>"#);
    }
    svg + "</g>"
}

const BAR_HEIGHT: f64 = 18.0;
const BAR_STEP: f64 = 44.0;
/// What is narrower is not seen.
const MIN_WIDTH: f64 = 0.05;

/// Each of its own length, or all of the same where they are shares of a whole.
pub fn bars(bars: &[Bar], legend: &[String], are_shares: bool) -> String {
    let sum = |bar: &Bar| bar.parts.iter().sum::<f64>();
    let longest = bars.iter().map(sum).fold(f64::MIN_POSITIVE, f64::max);
    let room = WIDTH - 120.0;
    let mut svg = open(WIDTH, bars.len() as f64 * BAR_STEP + 4.0, "bars");
    for (nth, bar) in bars.iter().enumerate() {
        let top = nth as f64 * BAR_STEP;
        svg += &text("label", 0.0, top + 13.0, &bar.label);
        let whole = if are_shares { sum(bar).max(f64::MIN_POSITIVE) } else { longest };
        let mut left = 0.0;
        for (index, part) in bar.parts.iter().enumerate() {
            let (width, y, colour) = (part / whole * room, top + 19.0, index % NUM_COLOURS);
            if width < MIN_WIDTH {
                continue;
            }
            let name = legend.get(index).map_or("", String::as_str);
            let share = part / sum(bar).max(f64::MIN_POSITIVE) * 100.0;
            let title = escaped(&format!("{name}: {} ({share:.1} %)", number(*part)));
            svg +=
                &format!(r#"<rect class="c{colour}" x="{left:.1}" y="{y}" width="{width:.1}" height="{BAR_HEIGHT}">"#);
            svg += &format!("<title>{title}</title></rect>");
            left += width;
        }
        svg += &text("tick", left + 8.0, top + 32.5, &bar.total);
    }
    svg + "</svg>"
}

fn text(class: &str, x: f64, y: f64, words: &str) -> String {
    format!(r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{}</text>"#, escaped(words))
}

fn rule(class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) -> String {
    format!(r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#)
}

fn open(width: f64, height: f64, what: &str) -> String {
    format!(r#"<svg viewBox="0 0 {width} {height}" role="img" aria-label="{}">"#, escaped(what))
}

pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_between_the_ends() {
        let ticks = |values: &[f64], is_log| Scale::new(values.iter().copied(), is_log, 0.0, 100.0).ticks();
        assert_eq!(ticks(&[3.0, 47.0], false), [0.0, 10.0, 20.0, 30.0, 40.0]);
        assert_eq!(ticks(&[0.002], false), [0.0, 0.0005, 0.001, 0.0015, 0.002]);
        assert_eq!(ticks(&[1.0, 16.0], true), [1.0, 2.0, 4.0, 8.0, 16.0]);
        assert!(ticks(&[1.0, 4096.0], true).len() < 9);
        assert!(!ticks(&[], false).is_empty() && !ticks(&[0.0], false).is_empty());
    }

    #[test]
    fn a_plot_holds_what_was_measured_and_escapes_names() {
        let point = |x, y| Point { x, y, y_min: y * 0.9, y_max: y * 1.1, title: format!("{x} and {y}") };
        let series = [Series { name: "<a>".to_owned(), points: vec![point(1.0, 10.0), point(2.0, 20.0)] }];
        let axis = |label, is_log| Axis { label, is_log };
        let svg = lines(&series, &axis("clients", true), &axis("tokens/s", false));
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("&lt;a&gt;: 1 and 10") && !svg.contains("<a>") && !svg.contains("NaN"), "{svg}");
        let rows = [Bar { label: "a".to_owned(), parts: vec![1.0, 0.0, 3.0], total: "4 s".to_owned() }];
        let svg = bars(&rows, &["x".to_owned(), "y".to_owned(), "z".to_owned()], true);
        assert_eq!(svg.matches("<rect").count(), 2, "parts of no size are not drawn");
        assert!(svg.contains("z: 3 (75.0 %)"), "{svg}");
    }
}
