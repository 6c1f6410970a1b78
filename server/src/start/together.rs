//! Several models in one server: each its own engine, and its share of the memory of the device that it is on.
//!
//! Invariant: all are planned before one is loaded, and what does not fit together is refused then. What a model takes
//! in any case comes first: weights, what steps need, caches whose size was asked for. What is left is shared evenly by
//! the caches of the others.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use fullbore_engine::backend::DeviceInfo;
use fullbore_engine::memory::capacity::human_bytes;

use super::config::{Room, least_bytes};
use super::{Opened, Plan, StartError};
use crate::args::ServedArgs;

/// Memory that devices share: their own, or the host's, which is that of every device that tells how much it has.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Pool {
    Host,
    Device(String),
}

impl Pool {
    fn of(device: &DeviceInfo) -> Pool {
        if device.memory_bytes.is_some() { Pool::Host } else { Pool::Device(device.id.clone()) }
    }

    fn name(&self) -> &str {
        match self {
            Pool::Host => "this machine",
            Pool::Device(id) => id,
        }
    }
}

/// What a model takes of its pool in any case, and whether its cache has a share of the rest.
struct Claim {
    pool: Pool,
    bytes: u64,
    shares: bool,
}

/// Opens models and devices, and fits all engines into memory. One alone is planned as `plan` does it.
pub fn plan_all(models: &[ServedArgs]) -> Result<Vec<Plan>, StartError> {
    let is_alone = models.len() == 1;
    let of_model = |model: &str, error: StartError| error.of_model(model, is_alone);
    let mut opened = Vec::with_capacity(models.len());
    let mut names = HashSet::new();
    for ServedArgs { name, engine, pooling, .. } in models {
        let title = name.as_ref().unwrap_or(&engine.model.model);
        let mut next = Opened::open(engine, name.as_deref()).map_err(|error| of_model(title, error))?;
        next.bundle.pooling = pooling.or(next.bundle.pooling);
        if !names.insert(next.name.clone()) {
            return Err(StartError::TwoOfOneName(next.name));
        }
        opened.push(next);
    }
    let mut memory = HashMap::new();
    for model in &opened {
        let known = memory.entry(Pool::of(model.backend.info())).or_insert(None);
        *known = known.or_else(|| model.measured_bytes());
    }
    let claims = opened.iter().zip(models).map(|(model, args)| {
        let claim = claim(model, args.has_own_fraction, &memory);
        claim.map_err(|error| of_model(&model.name, error))
    });
    let claims = claims.collect::<Result<Vec<Claim>, _>>()?;
    let rooms: Vec<Room> = (0..models.len()).map(|index| room(index, models, &claims, &memory)).collect();
    let plan = |(model, room): (Opened, Room)| {
        let name = model.name.clone();
        model.plan(room).map_err(|error| of_model(&name, error))
    };
    let plans = opened.into_iter().zip(rooms).map(plan).collect::<Result<Vec<Plan>, _>>()?;
    check_together(&plans, &memory)?;
    Ok(plans)
}

fn claim(model: &Opened, has_own_fraction: bool, memory: &HashMap<Pool, Option<u64>>) -> Result<Claim, StartError> {
    let pool = Pool::of(model.backend.info());
    let least = least_bytes(&model.args, &model.bundle, model.weights)?;
    let own = model.args.memory_fraction.filter(|_| has_own_fraction).zip(memory[&pool]);
    let bytes = own.map_or(least, |(fraction, memory)| least.max((memory as f64 * fraction) as u64));
    let has_size = model.args.kv_blocks.is_some() || model.args.kv_memory.is_some();
    Ok(Claim { pool, bytes, shares: !has_size && !has_own_fraction })
}

fn room(index: usize, models: &[ServedArgs], claims: &[Claim], memory: &HashMap<Pool, Option<u64>>) -> Room {
    let own = &claims[index];
    let memory_bytes = memory[&own.pool];
    if models[index].has_own_fraction {
        return Room::alone(memory_bytes);
    }
    let others = claims.iter().enumerate().filter(|(other, claim)| *other != index && claim.pool == own.pool);
    let (others_bytes, num_sharing) =
        others.fold((0, 1), |(bytes, num), (_, claim)| (bytes + claim.bytes, num + u64::from(claim.shares)));
    Room { memory_bytes, others_bytes, num_sharing }
}

/// Those of each pool that has several, in the order of the first of each.
fn pools(plans: &[Plan]) -> Vec<(Pool, Vec<&Plan>)> {
    let mut pools: Vec<(Pool, Vec<&Plan>)> = Vec::new();
    for plan in plans {
        let pool = Pool::of(plan.backend.info());
        match pools.iter_mut().find(|(known, _)| *known == pool) {
            Some((_, members)) => members.push(plan),
            None => pools.push((pool, vec![plan])),
        }
    }
    pools.retain(|(_, members)| members.len() > 1);
    pools
}

fn total(plans: &[&Plan]) -> u64 {
    plans.iter().map(|plan| plan.memory.total()).sum()
}

/// What one alone takes is checked as it is loaded.
fn check_together(plans: &[Plan], memory: &HashMap<Pool, Option<u64>>) -> Result<(), StartError> {
    for (pool, members) in pools(plans) {
        let told = members.iter().filter_map(|plan| plan.backend.info().memory_bytes).min();
        let (needed, available) = (total(&members), memory[&pool].or(told));
        if let Some(available) = available.filter(|&available| available < needed) {
            let each = members.iter().map(|plan| format!("{} {}", plan.name, human_bytes(plan.memory.total())));
            let each = each.collect::<Vec<_>>().join(", ");
            return Err(StartError::TogetherBeyondMemory { device: pool.name().to_owned(), available, needed, each });
        }
    }
    Ok(())
}

/// Where memory will go, model by model, and what those of one device take together.
pub fn table(plans: &[Plan]) -> String {
    if let [plan] = plans {
        return plan.memory.to_string();
    }
    let mut text = String::new();
    for Plan { name, backend, memory, .. } in plans {
        let device = backend.info();
        writeln!(text, "{name} on {}, {}\n{memory}\n", device.id, device.name).expect("a string takes everything");
    }
    for (pool, members) in pools(plans) {
        let (sum, names) = (human_bytes(total(&members)), members.iter().map(|plan| plan.name.as_str()));
        let names = names.collect::<Vec<_>>().join(", ");
        writeln!(text, "{:<10}{sum:>12}   of {}: {names}", "together", pool.name()).expect("the same");
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use fullbore_engine::tensor::WeightFormat;

    use super::*;
    use crate::args::{EngineArgs, ModelArgs, Shape};

    const MIB: u64 = 1 << 20;

    fn model(name: &str, change: impl Fn(&mut EngineArgs)) -> ServedArgs {
        let shape = Some(Shape { model: "smollm2-135m".to_owned(), format: WeightFormat::Q4_0 });
        let model = ModelArgs { shape, ..ModelArgs::new("", "cpu") };
        let mut engine = EngineArgs { no_verify: true, no_tuning: true, ..EngineArgs::new(model) };
        change(&mut engine);
        ServedArgs { name: Some(name.to_owned()), engine, pooling: None, has_own_fraction: false }
    }

    fn sentence(models: &[ServedArgs]) -> String {
        plan_all(models).err().expect("refused").to_string()
    }

    #[test]
    fn caches_share_what_weights_and_sizes_that_were_asked_for_leave() {
        let half = |args: &mut EngineArgs| args.memory_fraction = Some(0.5);
        let small = |args: &mut EngineArgs| args.kv_memory = Some(64 * MIB);
        let plans = plan_all(&[model("a", half), model("b", small), model("c", half)]).expect("they fit");
        let kv: Vec<u64> = plans.iter().map(|plan| plan.memory.kv).collect();
        assert_eq!(kv[0], kv[2]);
        assert!(kv[1] > 63 * MIB && kv[1] <= 64 * MIB, "{} is not as many blocks as fit", kv[1]);
        let sum: u64 = plans.iter().map(|plan| plan.memory.total()).sum();
        let memory = plans[0].backend.info().memory_bytes.expect("the cpu says it");
        // What is free changes while this runs.
        assert!(sum.abs_diff(memory / 2) < memory / 20, "{sum} of {memory}");
        let text = table(&plans);
        let together = format!("{:<10}{:>12}   of this machine: a, b, c", "together", human_bytes(sum));
        assert!(
            text.starts_with("a on cpu, ") && text.contains("\n\nc on cpu, ") && text.ends_with(&together),
            "{text}"
        );
    }

    #[test]
    fn a_fraction_of_its_own_is_for_one_model() {
        let mut own = model("a", |args| args.memory_fraction = Some(0.25));
        own.has_own_fraction = true;
        let plans = plan_all(&[own, model("b", |_| {})]).expect("they fit");
        let memory = plans[0].backend.info().memory_bytes.expect("the cpu says it");
        assert!(plans[0].memory.total().abs_diff(memory / 4) < memory / 20, "{} of {memory}", plans[0].memory.total());
    }

    #[test]
    fn what_does_not_fit_together_is_refused_with_each() {
        let plan = super::super::plan(&model("a", |_| {}).engine, None).expect("one fits");
        let memory = plan.backend.info().memory_bytes.expect("the cpu says it");
        let most = |args: &mut EngineArgs| args.kv_memory = Some(memory / 10 * 6);
        let told = sentence(&[model("a", most), model("b", most)]);
        assert!(told.starts_with("this machine has ") && told.contains("(a ") && told.contains(", b "), "{told}");
        let whole = |args: &mut EngineArgs| args.memory_fraction = Some(1e-6);
        let told = sentence(&[model("a", whole), model("b", whole)]);
        assert!(told.starts_with("the model a: ") && told.contains("KV memory"), "{told}");
    }

    #[test]
    fn names_tell_models_apart() {
        assert!(sentence(&[model("a", |_| {}), model("a", |_| {})]).starts_with("two models are called a"));
    }
}
