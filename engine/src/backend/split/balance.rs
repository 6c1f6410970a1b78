//! Which stage gets how many layers: as many as it has memory for, and so that the slowest stage is as fast as can be.
//!
//! Invariant: plain numbers in, plain numbers out.

use std::ops::Range;
use std::time::Duration;

/// What a stage could take on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Layers that it has memory for.
    pub max_layers: u32,
    /// What one layer takes of a step there.
    pub per_layer: Duration,
    /// What else it does in a step: in the last stage, the output layer.
    pub beside: Duration,
}

impl Candidate {
    /// With so many layers.
    pub fn step(&self, num_layers: u32) -> Duration {
        self.beside + self.per_layer * num_layers
    }
}

/// The layers of each stage, at least one; `None` where there is too little memory, or fewer layers than stages.
///
/// Layers are alike, so that giving each to the stage that would then be done first leaves the least of what the
/// slowest stage takes.
pub fn balance(stages: &[Candidate], num_layers: u32) -> Option<Vec<Range<u32>>> {
    let mut counts = vec![1u32; stages.len()];
    if stages.iter().any(|stage| stage.max_layers == 0) || num_layers < stages.len() as u32 {
        return None;
    }
    for _ in stages.len() as u32..num_layers {
        let has_room = |&(index, stage): &(usize, &Candidate)| counts[index] < stage.max_layers;
        let next = stages.iter().enumerate().filter(has_room);
        let (index, _) = next.min_by_key(|(index, stage)| stage.step(counts[*index] + 1))?;
        counts[index] += 1;
    }
    let ends = counts.iter().scan(0, |end, count| {
        *end += count;
        Some(*end - count..*end)
    });
    Some(ends.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(max_layers: u32, per_layer_ms: u64, beside_ms: u64) -> Candidate {
        let [per_layer, beside] = [per_layer_ms, beside_ms].map(Duration::from_millis);
        Candidate { max_layers, per_layer, beside }
    }

    #[test]
    fn the_slowest_stage_is_as_fast_as_any_division_allows() {
        let stages = [stage(12, 3, 0), stage(30, 5, 4), stage(9, 1, 2)];
        for num_layers in 3..=51 {
            let found = balance(&stages, num_layers).expect("there is room");
            let slowest = |counts: [u32; 3]| (0..3).map(|index| stages[index].step(counts[index])).max();
            let counts: [u32; 3] = std::array::from_fn(|index| found[index].end - found[index].start);
            let all = (1..=12).flat_map(|a| (1..=30).map(move |b| (a, b))).filter_map(|(a, b)| {
                let c = num_layers.checked_sub(a + b).filter(|c| (1..=9).contains(c))?;
                Some(slowest([a, b, c]))
            });
            assert_eq!(Some(slowest(counts)), all.min(), "{num_layers} layers: {found:?}");
            assert!(found[0].start == 0 && found[0].end == found[1].start && found[1].end == found[2].start);
            assert_eq!(found[2].end, num_layers);
        }
        assert_eq!(balance(&stages, 52), None);
    }

    #[test]
    fn what_cannot_be_divided_is_not() {
        assert_eq!(balance(&[stage(8, 1, 0), stage(0, 1, 0)], 4), None);
        assert_eq!(balance(&[stage(8, 1, 0), stage(8, 1, 0)], 1), None);
        assert_eq!(balance(&[stage(8, 1, 0), stage(8, 1, 0)], 5), Some(vec![0..3, 3..5]));
    }
}
