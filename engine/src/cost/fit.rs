//! Prices out of measured steps: robust least squares with no negative price, offline and as steps go by.
//!
//! The online fit keeps the sums of each power of two of rows apart and forgets in each only as it learns there, so
//! that an hour of decoding does not take away what is known of prefill. Errors count relative to the step's time.
//! Invariant: nothing is allocated after creation, and every model that comes out is one that [`CostModel::new`] takes.

use crate::cost::{CostModel, NUM_KNOTS, Prices, StepShape};

/// Unknowns: a step of one row, the slopes between knots, and the four prices beside rows.
const N: usize = NUM_KNOTS + 4;
const LOGITS: usize = NUM_KNOTS;
/// Observations that a bucket remembers, about.
const MEMORY: f64 = 64.0;
/// Observations between two solutions.
const SOLVE_EVERY: u64 = 32;
/// Observations before a model counts as known.
const ENOUGH: u64 = 64;
/// Observations of a bucket before an odd one is told from an ordinary one.
const FAMILIAR: u32 = 16;
/// A model whose typical relative error is above this is not known, however much was seen.
const MAX_ERROR: f64 = 0.5;
/// Residuals beyond this many typical ones lose weight (Huber 1964).
const HUBER: f64 = 2.5;
/// Weight of "neighbouring slopes are alike" and of "logits cost nothing of their own", in observations: they decide
/// only what steps leave open.
const SMOOTHNESS: f64 = 0.02;
const ONLINE_SWEEPS: u32 = 60;
const OFFLINE_SWEEPS: u32 = 20_000;

/// A cost model that learns from steps.
#[derive(Clone, Debug)]
pub struct CostFit {
    model: CostModel,
    buckets: Box<[Bucket; NUM_KNOTS]>,
    num_observed: u64,
}

/// Sums over the steps whose rows are between two knots.
#[derive(Clone, Debug, Default)]
struct Bucket {
    sums: Sums,
    num_observed: u32,
    /// Typical relative error of a prediction.
    error: f64,
    mean_ns: f64,
}

/// Normal equations of weighted least squares.
#[derive(Clone, Debug)]
struct Sums {
    gram: [[f64; N]; N],
    moment: [f64; N],
}

impl CostFit {
    /// Starts from what is known, [`CostModel::UNKNOWN`] if nothing is.
    pub fn new(prior: CostModel) -> CostFit {
        let mut fit = CostFit { model: prior, buckets: Box::default(), num_observed: 0 };
        if prior.is_known() {
            fit.remember(&prior);
        }
        fit
    }

    /// The model of the last solution.
    pub fn model(&self) -> &CostModel {
        &self.model
    }

    pub fn num_observed(&self) -> u64 {
        self.num_observed
    }

    /// Typical relative error of predictions, over the steps that are remembered; 1 before any was seen. A kind that
    /// came once, before anything was known, says little.
    pub fn relative_error(&self) -> f64 {
        let weight = |bucket: &Bucket| f64::from(bucket.num_observed).min(MEMORY);
        let sum: f64 = self.buckets.iter().map(|bucket| bucket.error * weight(bucket)).sum();
        let count: f64 = self.buckets.iter().map(weight).sum();
        if count > 0.0 { sum / count } else { 1.0 }
    }

    /// Takes in a step that took `ns`. True where the model was solved anew: every `SOLVE_EVERY` steps.
    pub fn observe(&mut self, shape: &StepShape, ns: u64) -> bool {
        if shape.num_tokens == 0 || ns == 0 {
            return false;
        }
        let ns = ns as f64;
        let predicted = self.model.predict_ns(shape) as f64;
        let bucket = &mut self.buckets[bucket_of(shape)];
        // The prediction, so that noise does not bias; but a step far above it must not outweigh all others.
        let scale = predicted.max(0.8 * ns);
        let residual = (ns - predicted).abs() / scale;
        let familiar = bucket.num_observed >= FAMILIAR;
        let weight = if familiar { huber(residual, bucket.error) } else { 1.0 };
        bucket.sums.scale(1.0 - 1.0 / MEMORY);
        bucket.sums.add(&features(shape), ns, weight / (scale * scale));
        bucket.num_observed = bucket.num_observed.saturating_add(1);
        let pace = 1.0 / f64::from(bucket.num_observed.min(64));
        // An odd step says little of the typical error, and many odd ones are a drift.
        let told = if familiar { residual.min(4.0 * bucket.error.max(0.01)) } else { residual };
        bucket.error += (told - bucket.error) * pace;
        bucket.mean_ns += (ns - bucket.mean_ns) * pace;
        self.num_observed += 1;
        let due = self.num_observed.is_multiple_of(SOLVE_EVERY);
        if due {
            self.solve();
        }
        due
    }

    fn solve(&mut self) {
        let mut sums = Sums::default();
        for bucket in self.buckets.iter().filter(|bucket| bucket.num_observed > 0) {
            sums.merge(&bucket.sums);
        }
        let typical_ns = self.buckets.iter().map(|bucket| bucket.mean_ns).fold(0.0, f64::max);
        sums.smooth(&self.model, typical_ns);
        let mut unknowns = unknowns_of(&self.model);
        sums.descend(&mut unknowns, ONLINE_SWEEPS);
        let known = self.model.known || (self.num_observed >= ENOUGH && self.relative_error() < MAX_ERROR);
        self.model = CostModel { known, ..model_of(&unknowns) };
    }

    /// Makes `prior` count as a few observations of each kind of step.
    fn remember(&mut self, prior: &CostModel) {
        for (knot, bucket) in self.buckets.iter_mut().enumerate() {
            for num_tokens in [1 << knot, (1 << knot) + (1 << knot) / 2] {
                for context in [0, 1024] {
                    let chunk = StepShape::default().with_slice(context, num_tokens, 0);
                    let last = StepShape::default().with_slice(context, num_tokens, 1);
                    for shape in [chunk, last, StepShape::decode(num_tokens, context + 1)] {
                        let ns = prior.predict_ns(&shape) as f64;
                        bucket.sums.add(&features(&shape), ns, 1.0 / (ns * ns).max(1.0));
                    }
                }
            }
        }
    }
}

/// The model of `samples`, shapes with nanoseconds, all of equal weight but for odd ones. Not known if there are fewer
/// than it has unknowns.
pub fn fit(samples: &[(StepShape, u64)]) -> CostModel {
    let usable = samples.iter().filter(|(shape, ns)| shape.num_tokens > 0 && *ns > 0);
    let rows: Vec<([f64; N], f64)> = usable.map(|(shape, ns)| (features(shape), *ns as f64)).collect();
    let typical_ns = rows.iter().map(|row| row.1).sum::<f64>() / rows.len().max(1) as f64;
    let mut unknowns = [0.0; N];
    let mut typical_error = f64::INFINITY;
    for round in 0..ROUNDS {
        let mut sums = Sums::default();
        let mut residuals = Vec::with_capacity(rows.len());
        for (row, ns) in &rows {
            let predicted: f64 = row.iter().zip(&unknowns).map(|(x, price)| x * price).sum();
            let scale = if round == 0 { *ns } else { predicted.max(0.8 * ns) };
            let residual = (ns - predicted).abs() / scale;
            residuals.push(residual);
            let weight = if round < 2 { 1.0 } else { huber(residual, typical_error) };
            sums.add(row, *ns, weight / (scale * scale));
        }
        residuals.sort_by(f64::total_cmp);
        typical_error = residuals.get(residuals.len() / 2).map_or(1.0, |median| median / MEDIAN_OF_NORMAL);
        sums.smooth(&model_of(&unknowns), typical_ns);
        sums.descend(&mut unknowns, OFFLINE_SWEEPS);
    }
    CostModel { known: rows.len() >= N, ..model_of(&unknowns) }
}

/// Rounds of reweighting in [`fit`].
const ROUNDS: u32 = 10;
/// The median of |x| of a standard normal x.
const MEDIAN_OF_NORMAL: f64 = 0.6745;

/// Weight of a residual where `typical` ones are ordinary.
fn huber(residual: f64, typical: f64) -> f64 {
    let bound = HUBER * typical.max(0.01);
    if residual <= bound { 1.0 } else { bound / residual }
}

fn bucket_of(shape: &StepShape) -> usize {
    (shape.num_tokens.ilog2() as usize).min(NUM_KNOTS - 1)
}

/// What each unknown is multiplied with: 1, the rows of each segment between knots, and the counts that are priced.
fn features(shape: &StepShape) -> [f64; N] {
    let rows = f64::from(shape.num_tokens);
    let mut row = [0.0; N];
    row[0] = 1.0;
    for segment in 0..NUM_KNOTS - 1 {
        let begin = f64::from(1u32 << segment);
        let length = if segment + 2 == NUM_KNOTS { f64::INFINITY } else { begin };
        row[1 + segment] = (rows - begin).clamp(0.0, length);
    }
    row[LOGITS] = f64::from(u8::from(shape.num_logit_rows > 0));
    row[LOGITS + 1] = f64::from(shape.num_logit_rows);
    row[LOGITS + 2] = shape.attended_tokens as f64;
    row[LOGITS + 3] = shape.loaded_tokens as f64;
    row
}

fn model_of(unknowns: &[f64; N]) -> CostModel {
    let mut curve = [unknowns[0]; NUM_KNOTS];
    for knot in 1..NUM_KNOTS {
        curve[knot] = curve[knot - 1] + unknowns[knot] * f64::from(1u32 << (knot - 1));
    }
    let prices = Prices {
        ns_for_logits: unknowns[LOGITS],
        ns_per_logit_row: unknowns[LOGITS + 1],
        ns_per_attended_token: unknowns[LOGITS + 2],
        ns_per_loaded_token: unknowns[LOGITS + 3],
    };
    CostModel::new(curve, prices)
}

fn unknowns_of(model: &CostModel) -> [f64; N] {
    let mut unknowns = [0.0; N];
    unknowns[0] = model.curve[0];
    for knot in 1..NUM_KNOTS {
        unknowns[knot] = (model.curve[knot] - model.curve[knot - 1]) / f64::from(1u32 << (knot - 1));
    }
    let Prices { ns_for_logits, ns_per_logit_row, ns_per_attended_token, ns_per_loaded_token } = model.prices;
    unknowns[LOGITS..].copy_from_slice(&[ns_for_logits, ns_per_logit_row, ns_per_attended_token, ns_per_loaded_token]);
    unknowns
}

impl Default for Sums {
    fn default() -> Sums {
        Sums { gram: [[0.0; N]; N], moment: [0.0; N] }
    }
}

impl Sums {
    fn add(&mut self, row: &[f64; N], ns: f64, weight: f64) {
        for i in 0..N {
            let weighted = weight * row[i];
            // Most segments of a small step are empty.
            if weighted > 0.0 {
                for j in 0..N {
                    self.gram[i][j] += weighted * row[j];
                }
                self.moment[i] += weighted * ns;
            }
        }
    }

    fn scale(&mut self, by: f64) {
        self.gram.iter_mut().flatten().chain(&mut self.moment).for_each(|sum| *sum *= by);
    }

    fn merge(&mut self, other: &Sums) {
        for (sum, other) in self.gram.iter_mut().flatten().zip(other.gram.iter().flatten()) {
            *sum += other;
        }
        for (sum, other) in self.moment.iter_mut().zip(&other.moment) {
            *sum += other;
        }
    }

    /// Asks for slopes like those beside them, so that a segment that no step reached goes on as the one before it; and
    /// where every step had logits, their fixed part counts as the step's.
    fn smooth(&mut self, model: &CostModel, typical_ns: f64) {
        for segment in 1..NUM_KNOTS - 1 {
            let (left, right) = (segment, segment + 1);
            // A difference of slopes over the whole segment, relative to what a step there takes.
            let relative = f64::from(1u32 << segment) / model.curve[segment + 1].max(typical_ns).max(1.0);
            let weight = SMOOTHNESS * relative * relative;
            self.gram[left][left] += weight;
            self.gram[right][right] += weight;
            self.gram[left][right] -= weight;
            self.gram[right][left] -= weight;
        }
        self.gram[LOGITS][LOGITS] += SMOOTHNESS / (typical_ns * typical_ns).max(1.0);
    }

    /// Coordinate descent from `unknowns` on, each kept at 0 or above.
    fn descend(&self, unknowns: &mut [f64; N], max_sweeps: u32) {
        for _ in 0..max_sweeps {
            let mut moved: f64 = 0.0;
            for i in 0..N {
                let diagonal = self.gram[i][i];
                if diagonal <= 0.0 {
                    continue;
                }
                let product: f64 = self.gram[i].iter().zip(unknowns.iter()).map(|(a, price)| a * price).sum();
                let next = (unknowns[i] + (self.moment[i] - product) / diagonal).max(0.0);
                // Relative to all that this unknown explains.
                moved = moved.max((next - unknowns[i]).abs() * diagonal.sqrt());
                unknowns[i] = next;
            }
            if moved < 1e-7 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64 (Steele, Lea and Flood 2014).
    struct Random(u64);

    impl Random {
        fn below(&mut self, end: u32) -> u32 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % u64::from(end)) as u32
        }

        /// Between 1 - `share` and 1 + `share`.
        fn noise(&mut self, share: f64) -> f64 {
            1.0 + share * (f64::from(self.below(20_001)) / 10_000.0 - 1.0)
        }

        /// Decoding, prefill, and both, of up to 512 rows.
        fn shape(&mut self) -> StepShape {
            let decoding = StepShape::decode(self.below(33), 1 + self.below(2000));
            match self.below(3) {
                0 if decoding.num_tokens > 0 => decoding,
                kind => {
                    let base = if kind == 1 { decoding } else { StepShape::default() };
                    base.with_slice(32 * self.below(40), 1 + self.below(480), self.below(2))
                }
            }
        }
    }

    /// 20 ms up to 8 rows, then 1 ms a row, then 0.5 ms a row from 64 on.
    fn planted(scale: f64) -> CostModel {
        let at = |rows: f64| 20e6 + 1e6 * (rows.min(64.0) - 8.0).max(0.0) + 0.5e6 * (rows - 64.0).max(0.0);
        let prices = Prices {
            ns_for_logits: 4e6 * scale,
            ns_per_logit_row: 0.3e6 * scale,
            ns_per_attended_token: 500.0 * scale,
            ns_per_loaded_token: 900.0 * scale,
        };
        CostModel::new(std::array::from_fn(|k| scale * at(f64::from(1u32 << k))), prices)
    }

    fn samples(model: &CostModel, count: u32, noise: f64, random: &mut Random) -> Vec<(StepShape, u64)> {
        let sample = |_| {
            let shape = random.shape();
            (shape, (model.predict_ns(&shape) as f64 * random.noise(noise)) as u64)
        };
        (0..count).map(sample).collect()
    }

    /// Relative error of `model` over steps that it has not seen: 49 of 50 are below it.
    fn error(model: &CostModel, truth: &CostModel) -> f64 {
        let mut random = Random(99);
        let error = |_| {
            let shape = random.shape();
            let wanted = truth.predict_ns(&shape) as f64;
            (model.predict_ns(&shape) as f64 - wanted).abs() / wanted
        };
        let mut errors: Vec<f64> = (0..500).map(error).collect();
        errors.sort_by(f64::total_cmp);
        errors[490]
    }

    #[track_caller]
    fn assert_close(model: &CostModel, truth: &CostModel, within: f64) {
        let error = error(model, truth);
        assert!(error < within, "{error}");
    }

    fn observe_all(fit: &mut CostFit, samples: &[(StepShape, u64)]) {
        for (shape, ns) in samples {
            fit.observe(shape, *ns);
        }
    }

    #[test]
    fn a_planted_model_is_found_again() {
        let truth = planted(1.0);
        let exact = fit(&samples(&truth, 300, 0.0, &mut Random(1)));
        assert_close(&exact, &truth, 0.005);
        let noisy = fit(&samples(&truth, 600, 0.1, &mut Random(2)));
        assert_close(&noisy, &truth, 0.03);
        assert!(exact.is_known() && noisy.is_known());
    }

    #[test]
    fn odd_steps_hardly_matter() {
        let truth = planted(1.0);
        let mut random = Random(3);
        let mut seen = samples(&truth, 600, 0.05, &mut random);
        for (index, sample) in seen.iter_mut().enumerate().filter(|(index, _)| index % 20 == 7) {
            sample.1 *= if index % 3 == 0 { 8 } else { 3 };
        }
        let model = fit(&seen);
        assert_close(&model, &truth, 0.04);
        let mut online = CostFit::new(CostModel::UNKNOWN);
        (0..4).for_each(|_| observe_all(&mut online, &seen));
        assert_close(online.model(), &truth, 0.08);
    }

    #[test]
    fn learning_follows_a_drift() {
        let mut random = Random(4);
        let mut fit = CostFit::new(CostModel::UNKNOWN);
        observe_all(&mut fit, &samples(&planted(1.0), 1500, 0.05, &mut random));
        assert_close(fit.model(), &planted(1.0), 0.04);
        for scale in [1.8, 0.7] {
            observe_all(&mut fit, &samples(&planted(scale), 6000, 0.05, &mut random));
            assert_close(fit.model(), &planted(scale), 0.1);
            assert!(fit.relative_error() < 0.08, "{}", fit.relative_error());
        }
    }

    #[test]
    fn decoding_does_not_wipe_out_what_is_known_of_prefill() {
        let truth = planted(1.0);
        let mut random = Random(5);
        let mut fit = CostFit::new(CostModel::UNKNOWN);
        observe_all(&mut fit, &samples(&truth, 1500, 0.03, &mut random));
        for _ in 0..20_000 {
            let shape = StepShape::decode(8, 100 + random.below(50));
            fit.observe(&shape, (truth.predict_ns(&shape) as f64 * random.noise(0.03)) as u64);
        }
        let prefill = StepShape::default().with_slice(256, 400, 1);
        let (found, wanted) = (fit.model().predict_ns(&prefill) as f64, truth.predict_ns(&prefill) as f64);
        assert!((found - wanted).abs() < 0.08 * wanted, "{found} for {wanted}");
    }

    #[test]
    fn nothing_is_known_until_enough_was_seen() {
        let mut random = Random(6);
        let mut fit = CostFit::new(CostModel::UNKNOWN);
        assert_eq!(fit.relative_error(), 1.0);
        let seen = samples(&planted(1.0), 200, 0.05, &mut random);
        observe_all(&mut fit, &seen[..40]);
        assert!(!fit.model().is_known());
        observe_all(&mut fit, &seen[40..]);
        assert!(fit.model().is_known());
        assert!(!super::fit(&seen[..3]).is_known());
        assert!(!super::fit(&[]).is_known());
    }

    /// One prompt, then an answer: as a server's first request is.
    #[test]
    fn a_single_prompt_does_not_keep_decoding_unknown() {
        let mut fit = CostFit::new(CostModel::UNKNOWN);
        fit.observe(&StepShape::default().with_slice(0, 300, 1), 200_000_000);
        for position in 0..150 {
            fit.observe(&StepShape::decode(1, 301 + position), 24_000_000);
        }
        assert!(fit.model().is_known(), "{}", fit.relative_error());
    }

    #[test]
    fn noise_alone_makes_no_price_negative() {
        let mut random = Random(7);
        let mut fit = CostFit::new(CostModel::UNKNOWN);
        for _ in 0..5000 {
            // `CostModel::new` holds every solution to its invariant.
            fit.observe(&random.shape(), u64::from(1 + random.below(1_000_000)));
        }
        let wild: Vec<_> = (0..200).map(|_| (random.shape(), u64::from(1 + random.below(1_000_000)))).collect();
        super::fit(&wild);
    }

    #[test]
    fn a_step_larger_than_any_seen_goes_on_as_the_largest_did() {
        let line = CostModel::line(1e6, 1e4, Prices::default());
        let seen: Vec<_> = (1..70u32)
            .map(|num_tokens| StepShape { num_tokens, num_sequences: 1, ..StepShape::default() })
            .map(|shape| (shape, line.predict_ns(&shape)))
            .collect();
        let beyond = StepShape { num_tokens: 2048, ..StepShape::default() };
        let (found, wanted) = (fit(&seen).predict_ns(&beyond) as f64, line.predict_ns(&beyond) as f64);
        assert!((found - wanted).abs() < 0.05 * wanted, "{found} for {wanted}");
    }

    #[test]
    fn a_profile_is_a_start_that_steps_correct() {
        let mut random = Random(8);
        let mut fit = CostFit::new(planted(1.0));
        assert!(fit.model().is_known());
        observe_all(&mut fit, &samples(&planted(1.0), 320, 0.05, &mut random));
        assert_close(fit.model(), &planted(1.0), 0.04);
        observe_all(&mut fit, &samples(&planted(1.5), 6000, 0.05, &mut random));
        assert_close(fit.model(), &planted(1.5), 0.06);
    }
}
