//! From a row of logits to a token, on the host, for rows that are not greedy or ask for log-probabilities.
//!
//! Filters apply in this order: temperature, top-k, top-p, min-p; a token must pass all, and top-p and min-p look at
//! the distribution after temperature and top-k. A draw depends on (seed, position) alone. A pure function; no state.

use crate::request::{SamplingParams, TokenId, TokenLogprobs};

/// The token chosen for `position` from one row of logits, or `None` for a row with a NaN or an infinity.
pub fn sample(logits: &[f32], params: &SamplingParams, position: u32) -> Option<TokenId> {
    let best = arg_max(logits)?;
    if params.temperature <= 0.0 {
        return Some(best);
    }
    let inverse = 1.0 / f64::from(params.temperature);
    let max = f64::from(logits[best.0 as usize]);
    let weigh = |(id, &logit): (usize, &f32)| (id as u32, ((f64::from(logit) - max) * inverse).exp());
    let mut candidates: Vec<(u32, f64)> = logits.iter().enumerate().map(weigh).collect();
    let heavier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, heavier);
        candidates.truncate(top_k);
    }
    if params.top_p < 1.0 {
        candidates.sort_unstable_by(heavier);
        let mut left = f64::from(params.top_p) * candidates.iter().map(|&(_, weight)| weight).sum::<f64>();
        let mut num_kept = 0;
        while left > 0.0 && num_kept < candidates.len() {
            left -= candidates[num_kept].1;
            num_kept += 1;
        }
        candidates.truncate(num_kept.max(1));
    }
    // The heaviest has weight 1.
    candidates.retain(|&(_, weight)| weight >= f64::from(params.min_p));
    // Order must not depend on how the selection above happened to leave it.
    candidates.sort_unstable_by_key(|&(id, _)| id);
    let total: f64 = candidates.iter().map(|&(_, weight)| weight).sum();
    let mut left = uniform(params.seed, position) * total;
    for &(id, weight) in &candidates {
        left -= weight;
        if left < 0.0 {
            return Some(TokenId(id));
        }
    }
    // Rounding may leave a remainder past the last candidate.
    candidates.last().map(|&(id, _)| TokenId(id))
}

/// The log-probability and rank of `token`, and the `num_top` most likely tokens, lowest id first among equals; `None`
/// for a row with a NaN or an infinity.
pub fn logprobs(logits: &[f32], token: TokenId, num_top: u32) -> Option<TokenLogprobs> {
    arg_max(logits)?;
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    let chosen = logits[token.0 as usize];
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let num_top = (num_top as usize).min(order.len());
    if num_top < order.len() {
        order.select_nth_unstable_by(num_top, likelier);
    }
    order.truncate(num_top);
    order.sort_unstable_by(likelier);
    Some(TokenLogprobs {
        id: token,
        logprob: logprob(chosen),
        rank: 1 + logits.iter().filter(|&&logit| logit > chosen).count() as u32,
        top: order.into_iter().map(|id| (TokenId(id), logprob(logits[id as usize]))).collect(),
    })
}

/// The largest, lowest id first; `None` if any logit is not finite.
fn arg_max(logits: &[f32]) -> Option<TokenId> {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if !logit.is_finite() {
            return None;
        }
        if *logit > logits[best] {
            best = id;
        }
    }
    Some(TokenId(best as u32))
}

/// A number in [0, 1) that depends on (seed, position) alone: SplitMix64's output function over both.
fn uniform(seed: u64, position: u32) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed).wrapping_add(u64::from(position).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, -1.0, 0.0];

    fn counts(params: SamplingParams) -> [u32; 5] {
        let mut counts = [0; 5];
        for position in 0..20_000 {
            counts[sample(&LOGITS, &params, position).expect("finite").0 as usize] += 1;
        }
        counts
    }

    /// Pearson's statistic of `counts` against weights, and the number of cells.
    fn chi_squared(counts: [u32; 5], weights: [f64; 5]) -> f64 {
        let total: f64 = weights.iter().sum();
        let expected = weights.map(|weight| weight / total * 20_000.0);
        let cells = counts.iter().zip(expected).filter(|(_, expected)| *expected > 0.0);
        cells.map(|(&count, expected)| (f64::from(count) - expected).powi(2) / expected).sum()
    }

    #[test]
    fn draws_follow_the_distribution() {
        for temperature in [0.5f32, 1.0, 2.0] {
            let params = SamplingParams { temperature, seed: 9, ..SamplingParams::default() };
            let weights = LOGITS.map(|logit| (f64::from(logit) / f64::from(temperature)).exp());
            // The 99.9 % quantile with four degrees of freedom is 18.5.
            assert!(chi_squared(counts(params), weights) < 18.5);
        }
    }

    #[test]
    fn filters_cut_what_they_say() {
        let with = |params: SamplingParams| counts(SamplingParams { temperature: 1.0, seed: 3, ..params });
        let default = SamplingParams::default();
        let cut = with(SamplingParams { top_k: 2, ..default.clone() });
        assert_eq!((cut[0], cut[3], cut[4]), (0, 0, 0));
        assert!(chi_squared(cut, [0.0, 3f64.exp(), 2f64.exp(), 0.0, 0.0]) < 13.8);
        // Probabilities are about .636 .234 .086 .032 .012: 0.7 is reached with the second.
        assert_eq!(with(SamplingParams { top_p: 0.7, ..default.clone() })[0], 0);
        assert!(with(SamplingParams { top_p: 0.9, ..default.clone() })[0] > 0);
        // exp(-1) = .37 and exp(-2) = .14 of the largest.
        let cut = with(SamplingParams { min_p: 0.2, ..default });
        assert!(cut[2] > 0 && cut[0] == 0);
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let params =
            |seed| SamplingParams { temperature: 1.5, top_p: 0.95, top_k: 4, seed, ..SamplingParams::default() };
        let draws = |seed| (0..64).map(|position| sample(&LOGITS, &params(seed), position)).collect::<Vec<_>>();
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn ties_and_broken_rows() {
        let greedy = SamplingParams::default();
        assert_eq!(sample(&[0.0, 2.0, 2.0], &greedy, 0), Some(TokenId(1)));
        assert_eq!(sample(&[0.0, f32::NAN, 2.0], &greedy, 0), None);
        assert_eq!(sample(&[0.0, f32::INFINITY, 2.0], &greedy, 0), None);
    }

    #[test]
    fn logprobs_sum_to_one_and_rank() {
        let all = logprobs(&LOGITS, TokenId(2), 5).expect("finite");
        assert_eq!(all.rank, 2);
        let sum: f32 = all.top.iter().map(|(_, logprob)| logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(all.top.iter().map(|(id, _)| id.0).collect::<Vec<_>>(), [1, 2, 0, 4, 3]);
        assert_eq!(logprobs(&LOGITS, TokenId(2), 0).expect("finite").top, []);
        assert_eq!(logprobs(&[0.0, f32::NAN], TokenId(0), 1), None);
    }
}
