//! A device's prices on disk: what `fullbore bench profile` measures and `fullbore simulate` reads, or a person writes.
//!
//! ```json
//! { "version": 1,
//!   "device": { "id": "vulkan:0", "name": "a GPU", "driver": "its driver" },
//!   "model": { "name": "a model", "kv_bytes_per_token": 23040 },
//!   "limits": { "max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 8192,
//!               "block_size": 32, "num_blocks": 4096, "num_host_blocks": 1024 },
//!   "host_ns_per_step": 40000, "ns_per_copied_megabyte": 60000,
//!   "cost": { "ns_at_rows": [[1, 4000000], [16, 4200000], [64, 9000000], [512, 60000000]],
//!             "ns_for_logits": 300000, "ns_per_logit_row": 9000,
//!             "ns_per_attended_token": 12, "ns_per_loaded_token": 30 } }
//! ```
//!
//! Invariant: a profile that was read is whole; what is wrong is refused by the name of its field, and an unknown field
//! is wrong. Nothing here measures.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::cost::{CostModel, NUM_KNOTS, Prices, StepShape, ns_on_lines};

/// Of the form of the file.
pub const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq)]
pub struct DeviceProfile {
    pub device: ProfiledDevice,
    pub model: ProfiledModel,
    pub limits: ProfiledLimits,
    /// What the host adds to each step while the device waits for it: schedule, record, publish.
    pub host_ns_per_step: u64,
    /// To copy KV to the host or back; 0 where that is not known, and then nothing is copied.
    pub ns_per_copied_megabyte: f64,
    pub cost: CostModel,
    /// What `cost` was fitted on; empty if a person wrote the file.
    pub points: Vec<MeasuredPoint>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProfiledDevice {
    /// As given to `--device`.
    pub id: String,
    pub name: String,
    pub driver: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProfiledModel {
    pub name: String,
    pub kv_bytes_per_token: u64,
}

/// Of the engine that measured; a simulation takes them where it is not told otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProfiledLimits {
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    pub max_model_len: u32,
    pub block_size: u32,
    pub num_blocks: u32,
    /// Blocks of the host's memory for preempted sequences.
    pub num_host_blocks: u32,
}

/// Steps of about one shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredPoint {
    pub num_tokens: u32,
    pub num_logit_rows: u32,
    pub num_sequences: u32,
    pub attended_tokens: u64,
    pub loaded_tokens: u64,
    pub num_steps: u32,
    pub median_ns: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: {problem}", path.display())]
    Bad { path: PathBuf, problem: BadProfile },
}

/// What is wrong in a profile.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadProfile {
    #[error("not JSON: {0}")]
    Syntax(String),
    #[error("`{field}` {problem}")]
    Field { field: String, problem: String },
}

impl MeasuredPoint {
    pub fn shape(&self) -> StepShape {
        let MeasuredPoint { num_tokens, num_logit_rows, num_sequences, attended_tokens, loaded_tokens, .. } = *self;
        StepShape { num_tokens, num_logit_rows, num_sequences, attended_tokens, loaded_tokens }
    }
}

impl DeviceProfile {
    pub fn open(path: &Path) -> Result<DeviceProfile, ProfileError> {
        let text = fs::read_to_string(path).map_err(|source| ProfileError::Read { path: path.to_owned(), source })?;
        Self::from_json(&text).map_err(|problem| ProfileError::Bad { path: path.to_owned(), problem })
    }

    pub fn from_json(text: &str) -> Result<DeviceProfile, BadProfile> {
        let value: Value = serde_json::from_str(text).map_err(|error| BadProfile::Syntax(error.to_string()))?;
        let mut root = Section::of(String::new(), value)?;
        let version: u32 = root.take("version")?;
        if version != VERSION {
            return Err(root.bad("version", format!("is {version}; this program reads {VERSION}")));
        }
        let mut device = root.section("device")?;
        let mut model = root.section("model")?;
        let mut limits = root.section("limits")?;
        let mut cost = root.section("cost")?;
        let profile = DeviceProfile {
            device: ProfiledDevice {
                id: device.take("id")?,
                name: device.take("name")?,
                driver: device.take_or_default("driver")?,
            },
            model: ProfiledModel {
                name: model.take("name")?,
                kv_bytes_per_token: model.at_least_one("kv_bytes_per_token")?,
            },
            limits: ProfiledLimits {
                max_num_seqs: limits.at_least_one("max_num_seqs")?,
                max_num_batched_tokens: limits.at_least_one("max_num_batched_tokens")?,
                max_model_len: limits.at_least_one("max_model_len")?,
                block_size: limits.at_least_one("block_size")?,
                num_blocks: limits.at_least_one("num_blocks")?,
                num_host_blocks: limits.take_or_default("num_host_blocks")?,
            },
            host_ns_per_step: root.take("host_ns_per_step")?,
            ns_per_copied_megabyte: root.price("ns_per_copied_megabyte")?,
            cost: cost.cost_model()?,
            points: root.take_or_default("points")?,
        };
        for section in [root, device, model, limits, cost] {
            section.end()?;
        }
        Ok(profile)
    }

    /// The file's text, ending in a line break; `from_json` gives the profile back.
    pub fn to_json(&self) -> String {
        let DeviceProfile { device, model, limits, host_ns_per_step, ns_per_copied_megabyte, cost, points } = self;
        let curve = cost.curve().iter().enumerate();
        let ns_at_rows: Vec<Value> = curve.map(|(knot, ns)| json!([1u32 << knot, ns])).collect();
        let prices = cost.prices();
        let value = json!({
            "version": VERSION,
            "device": { "id": device.id, "name": device.name, "driver": device.driver },
            "model": { "name": model.name, "kv_bytes_per_token": model.kv_bytes_per_token },
            "limits": {
                "max_num_seqs": limits.max_num_seqs,
                "max_num_batched_tokens": limits.max_num_batched_tokens,
                "max_model_len": limits.max_model_len,
                "block_size": limits.block_size,
                "num_blocks": limits.num_blocks,
                "num_host_blocks": limits.num_host_blocks,
            },
            "host_ns_per_step": host_ns_per_step,
            "ns_per_copied_megabyte": ns_per_copied_megabyte,
            "cost": {
                "ns_at_rows": ns_at_rows,
                "ns_for_logits": prices.ns_for_logits,
                "ns_per_logit_row": prices.ns_per_logit_row,
                "ns_per_attended_token": prices.ns_per_attended_token,
                "ns_per_loaded_token": prices.ns_per_loaded_token,
            },
            "points": points,
        });
        format!("{value:#}\n")
    }
}

/// One object of the file; its fields are taken out, and what is left at the end is unknown.
struct Section {
    /// Names of the objects around it, each with a point.
    path: String,
    fields: Map<String, Value>,
}

impl Section {
    fn of(path: String, value: Value) -> Result<Section, BadProfile> {
        let field = path.trim_end_matches('.').to_owned();
        match value {
            Value::Object(fields) => Ok(Section { path, fields }),
            other => Err(BadProfile::Field { field, problem: format!("is {other}; it must be an object") }),
        }
    }

    fn bad(&self, name: &str, problem: impl Into<String>) -> BadProfile {
        BadProfile::Field { field: format!("{}{name}", self.path), problem: problem.into() }
    }

    fn section(&mut self, name: &str) -> Result<Section, BadProfile> {
        let value: Value = self.take(name)?;
        Section::of(format!("{}{name}.", self.path), value)
    }

    fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, BadProfile> {
        let value = self.fields.remove(name).ok_or_else(|| self.bad(name, "is missing"))?;
        serde_json::from_value(value).map_err(|error| self.bad(name, format!("does not fit: {error}")))
    }

    fn take_or_default<T: DeserializeOwned + Default>(&mut self, name: &str) -> Result<T, BadProfile> {
        if self.fields.contains_key(name) { self.take(name) } else { Ok(T::default()) }
    }

    fn at_least_one<T: DeserializeOwned + Default + PartialEq>(&mut self, name: &str) -> Result<T, BadProfile> {
        let value: T = self.take(name)?;
        if value == T::default() { Err(self.bad(name, "is 0; it must be at least 1")) } else { Ok(value) }
    }

    fn price(&mut self, name: &str) -> Result<f64, BadProfile> {
        let price: f64 = self.take_or_default(name)?;
        match price.is_finite() && price >= 0.0 {
            true => Ok(price),
            false => Err(self.bad(name, format!("is {price}; a price is at least 0"))),
        }
    }

    fn cost_model(&mut self) -> Result<CostModel, BadProfile> {
        let points: Vec<(u32, f64)> = self.take("ns_at_rows")?;
        let bad = |problem: String| Err(self.bad("ns_at_rows", problem));
        let ([(1, _), ..], true) = (points.as_slice(), points.len() >= 2) else {
            return bad("must begin with [1, nanoseconds] and have a second pair".to_owned());
        };
        for (index, &(rows, ns)) in points.iter().enumerate() {
            let before = index.checked_sub(1).map_or((0, 0.0), |index| points[index]);
            if !rows.is_power_of_two() || rows as usize >= 1 << NUM_KNOTS {
                return bad(format!("has {rows} rows in pair {index}; a power of two up to 65536 is needed"));
            }
            if rows <= before.0 {
                return bad(format!("has {rows} rows in pair {index} after {}; they must rise", before.0));
            }
            if !ns.is_finite() || ns < before.1 {
                return bad(format!(
                    "has {ns} ns in pair {index} after {} ns; a larger step is never cheaper",
                    before.1
                ));
            }
        }
        let prices = Prices {
            ns_for_logits: self.price("ns_for_logits")?,
            ns_per_logit_row: self.price("ns_per_logit_row")?,
            ns_per_attended_token: self.price("ns_per_attended_token")?,
            ns_per_loaded_token: self.price("ns_per_loaded_token")?,
        };
        Ok(CostModel::new(std::array::from_fn(|knot| ns_on_lines(&points, 1 << knot)), prices))
    }

    fn end(self) -> Result<(), BadProfile> {
        match self.fields.keys().next() {
            None => Ok(()),
            Some(name) => Err(self.bad(name, "is no field of a profile; remove it or correct its name")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BY_HAND: &str = r#"{
        "version": 1,
        "device": { "id": "vulkan:0", "name": "a GPU" },
        "model": { "name": "a model", "kv_bytes_per_token": 23040 },
        "limits": { "max_num_seqs": 64, "max_num_batched_tokens": 512, "max_model_len": 8192,
                    "block_size": 32, "num_blocks": 4096 },
        "host_ns_per_step": 40000,
        "cost": { "ns_at_rows": [[1, 4000], [16, 4150], [64, 8950]], "ns_per_logit_row": 9 }
    }"#;

    fn refusal(change: impl FnOnce(&mut Value)) -> String {
        let mut value: Value = serde_json::from_str(BY_HAND).expect("it is JSON");
        change(&mut value);
        DeviceProfile::from_json(&value.to_string()).expect_err("it is wrong").to_string()
    }

    #[test]
    fn what_a_person_writes_is_read() {
        let profile = DeviceProfile::from_json(BY_HAND).expect("it is right");
        let rows = |num_tokens| profile.cost.predict_ns(&StepShape { num_tokens, ..StepShape::default() });
        assert_eq!([1, 6, 16, 64, 100].map(rows), [4000, 4050, 4150, 8950, 12550]);
        assert_eq!(profile.cost.predict_ns(&StepShape::decode(1, 500)), 4009);
        assert!(profile.cost.is_known() && profile.points.is_empty());
    }

    #[test]
    fn a_profile_comes_back_as_it_was_written() {
        let mut profile = DeviceProfile::from_json(BY_HAND).expect("it is right");
        profile.points.push(MeasuredPoint {
            num_tokens: 8,
            num_logit_rows: 8,
            num_sequences: 8,
            attended_tokens: 800,
            loaded_tokens: 800,
            num_steps: 5,
            median_ns: 4100,
        });
        assert_eq!(DeviceProfile::from_json(&profile.to_json()), Ok(profile));
    }

    #[test]
    fn what_is_wrong_is_named() {
        type Change = fn(&mut Value);
        let changes: [(&str, Change); 14] = [
            ("`version` is 2", |value| value["version"] = json!(2)),
            ("`device` is missing", |value| drop(value.as_object_mut().map(|fields| fields.remove("device")))),
            ("`device` is 3", |value| value["device"] = json!(3)),
            ("`device.name` does not fit", |value| value["device"]["name"] = json!(7)),
            ("`limits.block_size` is 0", |value| value["limits"]["block_size"] = json!(0)),
            ("`limits.num_blocks` does not fit", |value| value["limits"]["num_blocks"] = json!(-1)),
            ("`host_ns_per_step` does not fit", |value| value["host_ns_per_step"] = json!("fast")),
            ("`cost.ns_per_logit_row` is -1", |value| value["cost"]["ns_per_logit_row"] = json!(-1.0)),
            ("`cost.ns_per_token` is no field", |value| value["cost"]["ns_per_token"] = json!(1.0)),
            ("`cost.ns_at_rows` must begin", |value| value["cost"]["ns_at_rows"] = json!([[1, 5]])),
            ("`cost.ns_at_rows` has 12 rows", |value| value["cost"]["ns_at_rows"][1] = json!([12, 4100])),
            ("`cost.ns_at_rows` has 1 rows in pair 1", |value| value["cost"]["ns_at_rows"][1] = json!([1, 4100])),
            ("`cost.ns_at_rows` has 10 ns in pair 2", |value| value["cost"]["ns_at_rows"][2] = json!([64, 10])),
            ("`points` does not fit", |value| value["points"] = json!([{ "num_tokens": 1 }])),
        ];
        for (beginning, change) in changes {
            let sentence = refusal(change);
            assert!(sentence.starts_with(beginning), "{sentence}");
        }
        let sentence = DeviceProfile::from_json("{").expect_err("not JSON").to_string();
        assert!(sentence.starts_with("not JSON"), "{sentence}");
    }

    #[test]
    fn the_example_of_this_file_is_a_profile() {
        let lines = include_str!("profile.rs").lines().skip_while(|line| !line.ends_with("```json")).skip(1);
        let example: String = lines.take_while(|line| !line.ends_with("```")).map(|line| &line[3..]).collect();
        DeviceProfile::from_json(&example).expect("it is right");
    }
}
