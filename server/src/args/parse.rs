//! Words of the command line into values: each refuses what it does not know with what there is.

use fullbore_engine::backend::wgpu as adapters;
use fullbore_engine::format::quantize::TARGETS;
use fullbore_engine::model::shape_names;
use fullbore_engine::request::Pooling;
use fullbore_engine::tensor::{KvType, WeightFormat};

use super::{Rows, Shape};

pub(super) fn parse_shape(text: &str) -> Result<Shape, String> {
    let (model, format) = text.split_once(':').unwrap_or((text, WeightFormat::Q4_0.name()));
    if !shape_names().contains(&model) {
        return Err(format!("{model} is no shape; there are {}", shape_names().join(", ")));
    }
    let formats = || WeightFormat::ALL.map(WeightFormat::name).join(", ");
    let format = WeightFormat::from_name(format)
        .ok_or_else(|| format!("{format} is no format of weights; there are {}", formats()))?;
    Ok(Shape { model: model.to_owned(), format })
}

pub(super) fn parse_pooling(text: &str) -> Result<Pooling, String> {
    match text {
        "last" => Ok(Pooling::Last),
        "mean" => Ok(Pooling::Mean),
        _ => Err("it is last or mean".to_owned()),
    }
}

pub(super) fn parse_tier(text: &str) -> Result<adapters::Tier, String> {
    let known = adapters::Tier::ALL.map(adapters::Tier::name);
    adapters::Tier::ALL.into_iter().find(|tier| tier.name() == text).ok_or(format!("it is one of {}", known.join(", ")))
}

pub(super) fn parse_arithmetic(text: &str) -> Result<adapters::ArithmeticChoice, String> {
    let known = adapters::ArithmeticChoice::ALL.map(adapters::ArithmeticChoice::name);
    let found = adapters::ArithmeticChoice::ALL.into_iter().find(|choice| choice.name() == text);
    found.ok_or(format!("it is one of {}", known.join(", ")))
}

pub(super) fn parse_quantize(text: &str) -> Result<WeightFormat, String> {
    let found = TARGETS.into_iter().find(|format| format.name() == text);
    found.ok_or_else(|| {
        format!("weights cannot be packed to {text}; there are {}", TARGETS.map(WeightFormat::name).join(", "))
    })
}

pub(super) fn parse_kv_type(text: &str) -> Result<KvType, String> {
    let found = KvType::ALL.into_iter().find(|kv_type| kv_type.name() == text);
    found.ok_or_else(|| {
        format!("{text} is no type of a KV cache; there are {}", KvType::ALL.map(KvType::name).join(", "))
    })
}

pub(super) fn parse_format(text: &str) -> Result<WeightFormat, String> {
    let found = WeightFormat::ALL.into_iter().find(|format| format.name() == text);
    found.ok_or_else(|| {
        format!("{text} is no format of weights; there are {}", WeightFormat::ALL.map(WeightFormat::name).join(", "))
    })
}

/// `1,2,4`, `1..80`.
pub(super) fn parse_rows(text: &str) -> Result<Rows, String> {
    let expected = || format!("{text} is no list of rows; write 1,2,4 or 1..80, each from 1 to {MAX_ROWS}");
    let mut rows = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once("..").unwrap_or((part, part));
        let bound = |text: &str| text.trim().parse().ok().filter(|rows| (1..=MAX_ROWS).contains(rows));
        rows.extend(bound(first).ok_or_else(expected)?..=bound(last).ok_or_else(expected)?);
    }
    rows.sort_unstable();
    rows.dedup();
    if rows.is_empty() { Err(expected()) } else { Ok(Rows(rows)) }
}

/// Of one op that is measured.
const MAX_ROWS: u32 = 4096;

/// `4096`, `512KiB`, `256MiB`, `1.5GiB`; KB, MB and GB are powers of ten.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_alphabetic() || letter == ' ');
    let unit = match text[digits.len()..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kib" | "k" => 1024.0,
        "mib" | "m" => 1024.0 * 1024.0,
        "gib" | "g" => 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        unit => return Err(format!("{unit} is no unit of memory; write a size as 256MiB or 4GiB")),
    };
    match digits.parse::<f64>() {
        Ok(value) if value >= 0.0 && value * unit < u64::MAX as f64 => Ok((value * unit) as u64),
        _ => Err(format!("{text} is not a size; write it as 256MiB or 4GiB")),
    }
}

pub(super) fn parse_fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err(format!("{text} is no share of the memory; write it as 0.9")),
    }
}

pub(super) fn parse_speedup(text: &str) -> Result<f64, String> {
    let speedup = text.parse().ok().filter(|&speedup: &f64| speedup.is_finite() && speedup > 0.0);
    speedup.ok_or_else(|| format!("{text} is no speed; write a number above 0"))
}

pub(super) fn parse_microseconds(text: &str) -> Result<f64, String> {
    let time = text.parse().ok().filter(|time: &f64| (0.0..=1e9).contains(time));
    time.ok_or_else(|| format!("{text} are no microseconds; write a number from 0 to 1e9"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("0"), Ok(0));
        assert_eq!(parse_bytes("256MiB"), Ok(256 << 20));
        assert_eq!(parse_bytes("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("2GB"), Ok(2_000_000_000));
        for wrong in ["", "MiB", "-1MiB", "1TiBB", "nan", "inf", "1e30GiB"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_fraction_is_above_nothing_and_at_most_all() {
        assert_eq!((parse_fraction("0.9"), parse_fraction("1")), (Ok(0.9), Ok(1.0)));
        for wrong in ["0", "1.01", "-0.5", "nan", "90%", ""] {
            assert!(parse_fraction(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn types_of_the_kv_cache_are_read_by_name() {
        assert_eq!(KvType::ALL.map(|kv_type| parse_kv_type(kv_type.name())), KvType::ALL.map(Ok));
        assert_eq!(parse_kv_type("q5_0"), Err("q5_0 is no type of a KV cache; there are f16, q8_0, q4_0".to_owned()));
    }

    #[test]
    fn rows_are_a_list_of_numbers_and_ranges() {
        assert_eq!(parse_rows("4,1..3,2"), Ok(Rows(vec![1, 2, 3, 4])));
        for wrong in ["", "0", "3..2", "1,,2", "1..5000", "x"] {
            assert!(parse_rows(wrong).is_err_and(|sentence| sentence.contains("1..80")), "{wrong}");
        }
        assert!(parse_format("q4").is_err_and(|sentence| sentence.contains("iq4_xs")));
    }
}
