//! What `auto` makes of several GPUs: all of the model on each, or one model over all of them.
//!
//! Invariant: devices that can serve the model alone do so; what is predicted of them was measured on each.

use std::time::Duration;

use fullbore_engine::engine::probe;

use super::config::{Room, engine_config};
use super::{Opened, StartError, split};

/// Those of `opened` that have the model alone and serve it as long as the best of them, with what is predicted of
/// them; all, where none has room for the model.
pub(super) fn choose(opened: Vec<Opened>) -> Result<Vec<Opened>, StartError> {
    let mut lengths = Vec::with_capacity(opened.len());
    for device in &opened {
        lengths.push(if split::fits(device)? { longest(device) } else { 0 });
    }
    let most = lengths.iter().copied().max().unwrap_or(0);
    if most == 0 {
        return Ok(opened);
    }
    let mut kept = Vec::with_capacity(opened.len());
    for (device, length) in opened.into_iter().zip(lengths) {
        if length == most {
            kept.push(device);
            continue;
        }
        let device = &device.seat.title;
        let has = if length == 0 { "no memory for the model".to_owned() } else { format!("memory for {length}") };
        tracing::info!(
            device,
            "auto leaves this GPU out: others have memory for requests of {most} tokens, it has {has}"
        );
    }
    if kept.len() > 1 {
        let rates = kept.iter_mut().map(rate).collect::<Result<Vec<f64>, StartError>>()?;
        kept[0].choice = Some(told_replicas(&kept, &rates));
    }
    Ok(kept)
}

/// Tokens that a request may have, if the device is served alone; 0 where there is no plan.
fn longest(device: &Opened) -> u32 {
    let room = Room::alone(device.measured_bytes());
    let max_buffer_bytes = device.backend.info().max_buffer_bytes;
    let config = engine_config(&device.args, &device.bundle, device.weights, room, max_buffer_bytes);
    config.map_or(0, |config| config.max_model_len)
}

/// Predicted tokens a second of [`probe::NUM_ROWS`] answers, from what a layer takes.
fn rate(device: &mut Opened) -> Result<f64, StartError> {
    let step = split::whole_step(device)?;
    Ok(f64::from(probe::NUM_ROWS) / step.max(Duration::from_nanos(1)).as_secs_f64())
}

fn told_replicas(kept: &[Opened], rates: &[f64]) -> String {
    let each = rates.iter().map(|rate| format!("{rate:.0}")).collect::<Vec<_>>().join(" + ");
    let (devices, rows, sum) = (titles(kept), probe::NUM_ROWS, rates.iter().sum::<f64>());
    format!(
        "auto has all of the model on each of {devices}, for each has memory for it; predicted for {rows} answers on \
         each, from what a layer takes there: {each} = {sum:.0} tokens/s"
    )
}

/// Of a model that no device has room for; what is predicted of its stages is in their table.
pub(super) fn told_split(opened: &[Opened]) -> String {
    let devices = titles(opened);
    format!("auto divides the model over {devices}, for none of them has memory for all of it")
}

fn titles(opened: &[Opened]) -> String {
    let titles: Vec<&str> = opened.iter().map(|device| device.seat.title.as_str()).collect();
    match titles.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, first)) => format!("{} and {last}", first.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::least_bytes;
    use super::super::split::tests::{MIB, opened};
    use super::*;

    fn titles_of(opened: &[Opened]) -> Vec<&str> {
        opened.iter().map(|device| device.seat.title.as_str()).collect()
    }

    /// What the model takes with no KV.
    fn needed() -> u64 {
        let one = opened("a", 1);
        least_bytes(&one.args, &one.bundle, one.weights).expect("a plan")
    }

    #[test]
    fn each_device_with_room_for_the_model_has_all_of_it_and_their_rates_add_up() {
        let room = needed() + 4096 * MIB;
        let kept = choose(vec![opened("a", room), opened("b", room), opened("c", needed() / 2)]).expect("two fit");
        assert_eq!(titles_of(&kept), ["a", "b"]);
        assert!(!split::is_wanted(&kept, false).expect("a plan"));
        let told = kept[0].choice.as_deref().expect("there is a choice");
        assert!(told.starts_with("auto has all of the model on each of a and b, "), "{told}");
        let (_, predicted) = told.rsplit_once(": ").expect("numbers");
        let numbers: Vec<f64> = predicted.split(' ').filter_map(|word| word.parse().ok()).collect();
        let [first, second, sum] = numbers[..] else { panic!("{told}") };
        assert!(first > 0.0 && second > 0.0 && (first + second - sum).abs() <= 1.5, "{told}");
        assert_eq!(kept[1].choice, None);
    }

    #[test]
    fn a_device_that_would_make_all_requests_shorter_is_left_out() {
        let (room, little) = (needed() + 4096 * MIB, needed() + 8 * MIB);
        let (long, short) = (longest(&opened("a", room)), longest(&opened("b", little)));
        assert!(0 < short && short < long, "{short} and {long}");
        let kept = choose(vec![opened("b", little), opened("a", room)]).expect("both fit");
        assert_eq!(titles_of(&kept), ["a"]);
        assert_eq!(kept[0].choice, None, "one is no choice");
        assert_eq!(titles_of(&choose(vec![opened("b", little)]).expect("it fits")), ["b"]);
    }

    #[test]
    fn all_devices_share_a_model_that_none_has_room_for() {
        let kept = choose(vec![opened("a", needed() - 1), opened("b", needed() - 1)]).expect("a plan");
        assert_eq!(titles_of(&kept), ["a", "b"]);
        assert!(split::is_wanted(&kept, false).expect("a plan"));
        let told = told_split(&kept);
        assert!(told.starts_with("auto divides the model over a and b, for none"), "{told}");
    }
}
