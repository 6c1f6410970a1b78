//! Several models in one server, and several devices of one: each its own engine, and its share of the memory of the
//! device that it is on.
//!
//! Invariant: all are planned before one is loaded, and what does not fit together is refused then. What a model takes
//! in any case comes first: weights, what steps need, caches whose size was asked for. What is left is shared evenly by
//! the caches of the others.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use fullbore_engine::backend::DeviceInfo;
use fullbore_engine::memory::capacity::human_bytes;

use super::config::{Room, least_bytes};
use super::{Opened, Plan, Seat, StartError};
use super::{auto, split};
use crate::args::{DeviceArgs, EngineArgs, ServedArgs};
use crate::devices::asked::{Asked, asked, asked_by_auto, check_apart};
use crate::devices::file::Listed;

/// Memory that devices share: their own, or the host's, which is that of every device that tells how much it has and is
/// on no bus.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Pool {
    Host,
    Device(String),
}

impl Pool {
    pub fn of(device: &DeviceInfo) -> Pool {
        match device.memory_bytes.is_some() && device.pci_bus_id.is_none() {
            true => Pool::Host,
            false => Pool::Device(device.id.clone()),
        }
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
    has_own_fraction: bool,
}

/// Opens models and devices, and fits all engines into memory: a plan for each device of each model, those of a model
/// behind one another. One alone is planned as `plan` does it.
pub fn plan_all(models: &[ServedArgs]) -> Result<Vec<Plan>, StartError> {
    let is_alone = models.len() == 1;
    let (mut opened, mut names) = (Vec::with_capacity(models.len()), HashSet::new());
    for args in models {
        let title = args.name.as_ref().unwrap_or(&args.engine.model.model);
        let replicas = open_replicas(args).map_err(|error| error.of_model(title, is_alone))?;
        if replicas.iter().any(|replica| !replica.stages.is_empty()) && !is_alone {
            return Err(StartError::SplitBesideOthers(replicas[0].name.clone()));
        }
        if !names.insert(replicas[0].name.clone()) {
            return Err(StartError::TwoOfOneName(replicas[0].name.clone()));
        }
        opened.extend(replicas.into_iter().map(|replica| {
            let has_own_fraction = args.has_own_fraction || replica.has_own_fraction;
            (replica, has_own_fraction)
        }));
    }
    let of_model = |model: &str, error: StartError| error.of_model(model, is_alone);
    let is_one = opened.len() == names.len();
    let mut memory = HashMap::new();
    for (replica, _) in &opened {
        let known = memory.entry(Pool::of(replica.backend.info())).or_insert(None);
        // What the last one that was opened leaves, for on some devices each takes memory of its own.
        *known = known.iter().copied().chain(replica.measured_bytes()).min();
    }
    let (mut replicas, mut claims) = (Vec::new(), Vec::new());
    for (replica, has_own_fraction) in opened {
        let claim = tolerate(claim(&replica, has_own_fraction, &memory), &replica.seat, is_one);
        if let Some(claim) = claim.map_err(|error| of_model(&replica.name, error))? {
            claims.push(claim);
            replicas.push(replica);
        }
    }
    let mut plans = Vec::with_capacity(replicas.len());
    for (index, replica) in replicas.into_iter().enumerate() {
        let (name, seat) = (replica.name.clone(), replica.seat.clone());
        let plan = tolerate(replica.plan(room(index, &claims, &memory)), &seat, is_one);
        plans.extend(plan.map_err(|error| of_model(&name, error))?);
    }
    if let Some(model) = names.into_iter().find(|name| plans.iter().all(|plan| plan.name != *name)) {
        return Err(StartError::NoDevice { model });
    }
    check_together(&plans, &memory)?;
    Ok(plans)
}

/// What `plan_all` gave, a list for each model.
pub fn by_model(plans: Vec<Plan>) -> Vec<Vec<Plan>> {
    let mut models: Vec<Vec<Plan>> = Vec::new();
    for plan in plans {
        match models.last_mut().filter(|model| model[0].name == plan.name) {
            Some(model) => model.push(plan),
            None => models.push(vec![plan]),
        }
    }
    models
}

/// A model on each of its devices, at least one.
fn open_replicas(args: &ServedArgs) -> Result<Vec<Opened>, StartError> {
    let device = &args.engine.model.device;
    if device.name != "auto" {
        let opened = open_each(args, asked(device)?)?;
        return divide_if_wanted(opened, device.split);
    }
    let mut opened = open_each(args, asked_by_auto(device))?;
    if opened.len() > 1 && !device.split {
        opened = auto::choose(opened)?;
    }
    // What `auto` chose may be too small.
    let fitting: Vec<bool> = opened.iter().map(split::fits).collect::<Result<_, StartError>>()?;
    if !fitting.contains(&true) {
        let all = asked(&DeviceArgs { name: "all".to_owned(), ..device.clone() })?;
        if all.len() > opened.len() {
            drop(std::mem::take(&mut opened));
            opened = open_each(args, all)?;
        }
    }
    let why = auto::told_split(&opened);
    let mut replicas = divide_if_wanted(opened, device.split)?;
    let first = &mut replicas[0];
    if !first.stages.is_empty() && !device.split {
        first.choice = Some(why);
    }
    first.choice.iter().for_each(|choice| tracing::info!("{choice}"));
    Ok(replicas)
}

fn divide_if_wanted(opened: Vec<Opened>, is_asked: bool) -> Result<Vec<Opened>, StartError> {
    match split::is_wanted(&opened, is_asked)? {
        true => Ok(vec![split::join(opened)?]),
        false => Ok(opened),
    }
}

/// A model on each of these devices, at least one; those that can be done without may be missing.
fn open_each(args: &ServedArgs, devices: Vec<Asked>) -> Result<Vec<Opened>, StartError> {
    let ServedArgs { name, engine, pooling, .. } = args;
    let is_one = devices.len() == 1;
    let mut opened: Vec<(Asked, Opened)> = Vec::with_capacity(devices.len());
    for mut device in devices {
        let bundle = opened.first().map(|(_, first)| &first.bundle);
        let mut result = Opened::open(engine, &device, bundle, name.as_deref());
        if let (Err(error), Some(other_way)) = (&result, device.other_way()) {
            tracing::warn!(device = device.title, other_way = other_way.title, "trying the other way to it: {error}");
            device = other_way;
            result = Opened::open(engine, &device, bundle, name.as_deref());
        }
        let seat = Seat { title: device.title.clone(), cores: None, is_optional: device.is_optional };
        let Some(mut next) = tolerate(result, &seat, is_one)? else { continue };
        next.bundle.pooling = pooling.or(next.bundle.pooling);
        next.has_own_fraction = device.listed.as_ref().is_some_and(Listed::has_own_fraction);
        opened.push((device, next));
    }
    let infos = opened.iter().map(|(asked, opened)| (asked, opened.backend.info()));
    check_apart(&infos.clone().collect::<Vec<_>>())?;
    let mut simulators = infos.clone().filter(|(_, info)| info.id == "sim");
    if let Some((asked, _)) = simulators.next().filter(|_| infos.clone().any(|(_, info)| info.id != "sim")) {
        return Err(StartError::Simulated { device: asked.title.clone() });
    }
    let opened: Vec<Opened> = opened.into_iter().map(|(_, opened)| opened).collect();
    if opened.is_empty() {
        return Err(StartError::NoDevice { model: engine.model.model.clone() });
    }
    Ok(opened)
}

/// A model over all of its devices together.
pub(super) fn open_divided(args: &EngineArgs, served_name: Option<&str>) -> Result<Opened, StartError> {
    let served = ServedArgs { name: served_name.map(str::to_owned), ..ServedArgs::new(args.clone()) };
    let [divided] = <[Opened; 1]>::try_from(open_replicas(&served)?).unwrap_or_else(|_| panic!("one engine"));
    Ok(divided)
}

/// What failed on a device that others go on without is `None`, and told as a warning.
pub(super) fn tolerate<T>(result: Result<T, StartError>, seat: &Seat, is_one: bool) -> Result<Option<T>, StartError> {
    match result.map_err(|error| error.on_device(&seat.title, is_one)) {
        Ok(value) => Ok(Some(value)),
        Err(error) if seat.is_optional && !is_one => {
            tracing::warn!("going on without a device: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn claim(model: &Opened, has_own_fraction: bool, memory: &HashMap<Pool, Option<u64>>) -> Result<Claim, StartError> {
    let pool = Pool::of(model.backend.info());
    let least = least_bytes(&model.args, &model.bundle, model.weights)?;
    let own = model.args.memory_fraction.filter(|_| has_own_fraction).zip(memory[&pool]);
    let bytes = own.map_or(least, |(fraction, memory)| least.max((memory as f64 * fraction) as u64));
    let has_size = model.args.kv_blocks.is_some() || model.args.kv_memory.is_some();
    Ok(Claim { pool, bytes, shares: !has_size && !has_own_fraction, has_own_fraction })
}

fn room(index: usize, claims: &[Claim], memory: &HashMap<Pool, Option<u64>>) -> Room {
    let own = &claims[index];
    let memory_bytes = memory[&own.pool];
    if own.has_own_fraction {
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
            let each =
                members.iter().map(|plan| format!("{} {}", title(plan, plans), human_bytes(plan.memory.total())));
            let each = each.collect::<Vec<_>>().join(", ");
            return Err(StartError::TogetherBeyondMemory { device: pool.name().to_owned(), available, needed, each });
        }
    }
    Ok(())
}

/// Its model, and its device where the model has several.
fn title(plan: &Plan, plans: &[Plan]) -> String {
    match plans.iter().filter(|other| other.name == plan.name).count() {
        1 => plan.name.clone(),
        _ => format!("{} on {}", plan.name, plan.seat.title),
    }
}

/// Where memory will go, model by model, and what those of one device take together.
pub fn table(plans: &[Plan]) -> String {
    let chosen: String =
        plans.iter().filter_map(|plan| plan.choice.as_ref()).map(|choice| choice.clone() + "\n\n").collect();
    if let [plan] = plans {
        return match plan.stages.is_empty() {
            true => chosen + &plan.memory.to_string(),
            false => chosen + &split::table(&plan.stages),
        };
    }
    let mut text = chosen;
    for Plan { name, seat, backend, memory, .. } in plans {
        let (title, device) = (&seat.title, &backend.info().name);
        writeln!(text, "{name} on {title}, {device}\n{memory}\n").expect("a string takes everything");
    }
    for (pool, members) in pools(plans) {
        let (sum, names) = (human_bytes(total(&members)), members.iter().map(|plan| title(plan, plans)));
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
