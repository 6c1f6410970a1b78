//! What a step costs on a device: its shape in, nanoseconds out.
//!
//! Weights are read once a step, whatever the number of rows, so the price of rows is flat and then rises, with kinks
//! where kernels change: a curve with knots at powers of two. Logits and context are priced beside it. Invariant: every
//! price is finite and at least 0 and the curve never falls, so a step that grows never gets cheaper. Plain data of the
//! plan tower: no clock, no device; who measures is [`fit`], what is kept on disk is [`profile`], and what is known of
//! a model before its first step is [`products`].

use crate::op::ATTENTION_ROWS;

pub mod fit;
pub mod products;
pub mod profile;

pub use fit::CostFit;
pub use profile::DeviceProfile;

/// Of a step, all that its time depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Rows of the step.
    pub num_tokens: u32,
    /// Rows that go through the output layer.
    pub num_logit_rows: u32,
    pub num_sequences: u32,
    /// Positions that a row sees, itself included, summed over rows. Windows of a model are not taken off: a price
    /// that was measured on the model has them in it.
    pub attended_tokens: u64,
    /// Positions whose K and V are read: the up to `ATTENTION_ROWS` rows of an attention item read them once together.
    pub loaded_tokens: u64,
}

impl StepShape {
    /// A step in which each of `num_sequences` decodes one token and sees `context` positions.
    pub fn decode(num_sequences: u32, context: u32) -> StepShape {
        let seen = u64::from(num_sequences) * u64::from(context);
        StepShape {
            num_tokens: num_sequences,
            num_logit_rows: num_sequences,
            num_sequences,
            attended_tokens: seen,
            loaded_tokens: seen,
        }
    }

    /// This step with one more slice: `num_tokens` rows of a sequence from position `start` on.
    pub fn with_slice(self, start: u32, num_tokens: u32, num_logit_rows: u32) -> StepShape {
        let (begin, rows, item) = (u64::from(start), u64::from(num_tokens), u64::from(ATTENTION_ROWS));
        let (whole, rest) = (rows / item, rows % item);
        let last = if rest > 0 { begin + rows } else { 0 };
        StepShape {
            num_tokens: self.num_tokens + num_tokens,
            num_logit_rows: self.num_logit_rows + num_logit_rows,
            num_sequences: self.num_sequences + 1,
            attended_tokens: self.attended_tokens + rows * begin + rows * (rows + 1) / 2,
            loaded_tokens: self.loaded_tokens + whole * begin + item * whole * (whole + 1) / 2 + last,
        }
    }

    /// This step without a slice that it has.
    pub fn without_slice(self, start: u32, num_tokens: u32, num_logit_rows: u32) -> StepShape {
        let slice = StepShape::default().with_slice(start, num_tokens, num_logit_rows);
        StepShape {
            num_tokens: self.num_tokens - slice.num_tokens,
            num_logit_rows: self.num_logit_rows - slice.num_logit_rows,
            num_sequences: self.num_sequences - slice.num_sequences,
            attended_tokens: self.attended_tokens - slice.attended_tokens,
            loaded_tokens: self.loaded_tokens - slice.loaded_tokens,
        }
    }
}

/// Knots of the curve over rows: 1, 2, 4, .. 65536, the most rows that a step can be configured to have.
pub const NUM_KNOTS: usize = 17;
/// A batch is at the knee where its rate is this share of the best.
pub const KNEE_SHARE: f64 = 0.9;

/// The prices of a device. A scheduler holds one by value and is given a new one now and then.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostModel {
    /// Of a step with 2^k rows, without logits and without context; past the last knot the last slope goes on.
    curve: [f64; NUM_KNOTS],
    prices: Prices,
    known: bool,
}

/// What a step pays beside its rows, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prices {
    /// Once a step that has logit rows: the output matrix is read.
    pub ns_for_logits: f64,
    pub ns_per_logit_row: f64,
    pub ns_per_attended_token: f64,
    pub ns_per_loaded_token: f64,
}

impl CostModel {
    /// Every step is free: what is assumed where nothing was measured.
    pub const UNKNOWN: CostModel = CostModel {
        curve: [0.0; NUM_KNOTS],
        prices: Prices {
            ns_for_logits: 0.0,
            ns_per_logit_row: 0.0,
            ns_per_attended_token: 0.0,
            ns_per_loaded_token: 0.0,
        },
        known: false,
    };

    /// `curve` and `prices` as the fields of this type say.
    pub fn new(curve: [f64; NUM_KNOTS], prices: Prices) -> CostModel {
        let model = CostModel { curve, prices, known: true };
        model.check();
        model
    }

    /// A device that nobody has measured: the same for each row after the first.
    pub fn line(ns_at_one_row: f64, ns_per_row: f64, prices: Prices) -> CostModel {
        let curve = std::array::from_fn(|k| ns_at_one_row + ns_per_row * (f64::from(1u32 << k) - 1.0));
        CostModel::new(curve, prices)
    }

    /// Of a device that is `speed` times as fast in everything.
    pub fn faster(&self, speed: f64) -> CostModel {
        let Prices { ns_for_logits, ns_per_logit_row, ns_per_attended_token, ns_per_loaded_token } = self.prices;
        let prices = Prices {
            ns_for_logits: ns_for_logits / speed,
            ns_per_logit_row: ns_per_logit_row / speed,
            ns_per_attended_token: ns_per_attended_token / speed,
            ns_per_loaded_token: ns_per_loaded_token / speed,
        };
        let model = CostModel { curve: self.curve.map(|ns| ns / speed), prices, known: self.known };
        model.check();
        model
    }

    /// Whether enough was seen to rely on a prediction; what is read from a profile is known.
    pub fn is_known(&self) -> bool {
        self.known
    }

    pub fn curve(&self) -> &[f64; NUM_KNOTS] {
        &self.curve
    }

    pub fn prices(&self) -> &Prices {
        &self.prices
    }

    /// What a step of this shape takes on the device; an empty one takes nothing.
    pub fn predict_ns(&self, shape: &StepShape) -> u64 {
        if shape.num_tokens == 0 {
            return 0;
        }
        let prices = &self.prices;
        let for_logits = if shape.num_logit_rows > 0 { prices.ns_for_logits } else { 0.0 };
        let ns = self.ns_of_rows(shape.num_tokens)
            + for_logits
            + prices.ns_per_logit_row * f64::from(shape.num_logit_rows)
            + prices.ns_per_attended_token * shape.attended_tokens as f64
            + prices.ns_per_loaded_token * shape.loaded_tokens as f64;
        ns.round() as u64
    }

    /// The most rows of one sequence, from position `start` on, that can join `base` in a step of at most `budget_ns`.
    /// 0 where not even one can. Never falls as the budget rises. Where the chunk may end its prompt, `base` has its
    /// logit row already.
    pub fn max_prefill_tokens(&self, base: &StepShape, start: u32, budget_ns: u64) -> u32 {
        let fits = |num_tokens: u32| self.predict_ns(&base.with_slice(start, num_tokens, 0)) <= budget_ns;
        if !fits(1) {
            return 0;
        }
        let (mut fitting, mut beyond) = (1, MAX_ROWS.saturating_sub(base.num_tokens).max(1) + 1);
        while beyond - fitting > 1 {
            let middle = fitting + (beyond - fitting) / 2;
            if fits(middle) {
                fitting = middle;
            } else {
                beyond = middle;
            }
        }
        fitting
    }

    /// Tokens a nanosecond of `batch` sequences that decode with `context` positions each; infinite on a free device.
    pub fn decode_rate(&self, batch: u32, context: u32) -> f64 {
        f64::from(batch) / self.predict_ns(&StepShape::decode(batch, context)) as f64
    }

    /// B*: the smallest batch of decoding sequences whose rate is [`KNEE_SHARE`] of the best that up to `max_batch`
    /// reach. O(max_batch).
    pub fn knee(&self, max_batch: u32, context: u32) -> u32 {
        let best = (1..=max_batch).map(|batch| self.decode_rate(batch, context)).fold(0.0, f64::max);
        (1..max_batch).find(|&batch| self.decode_rate(batch, context) >= KNEE_SHARE * best).unwrap_or(max_batch)
    }

    fn ns_of_rows(&self, num_rows: u32) -> f64 {
        let knot = (num_rows.ilog2() as usize).min(NUM_KNOTS - 2);
        let (left, right) = (self.curve[knot], self.curve[knot + 1]);
        let length = f64::from(1u32 << knot);
        left + (right - left) * (f64::from(num_rows) - length) / length
    }

    fn check(&self) {
        let Prices { ns_for_logits, ns_per_logit_row, ns_per_attended_token, ns_per_loaded_token } = self.prices;
        for price in [ns_for_logits, ns_per_logit_row, ns_per_attended_token, ns_per_loaded_token, self.curve[0]] {
            assert!(price.is_finite() && price >= 0.0, "a price of {price} ns");
        }
        assert!(
            self.curve.is_sorted() && self.curve[NUM_KNOTS - 1].is_finite(),
            "a curve that falls: {:?}",
            self.curve
        );
    }
}

const MAX_ROWS: u32 = 1 << (NUM_KNOTS - 1);

/// On the straight lines through `points` of rows and nanoseconds, of which there are two or more; before the first and
/// past the last the nearest line goes on.
fn ns_on_lines(points: &[(u32, f64)], rows: u32) -> f64 {
    let right = points.partition_point(|point| point.0 < rows).clamp(1, points.len() - 1);
    let ((left_rows, left_ns), (right_rows, right_ns)) = (points[right - 1], points[right]);
    let share = (f64::from(rows) - f64::from(left_rows)) / f64::from(right_rows - left_rows);
    left_ns + (right_ns - left_ns) * share
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRICES: Prices =
        Prices { ns_for_logits: 500.0, ns_per_logit_row: 20.0, ns_per_attended_token: 3.0, ns_per_loaded_token: 2.0 };

    /// 1000 up to 4 rows, then 100 a row.
    fn kinked() -> CostModel {
        let curve = std::array::from_fn(|k| 1000.0 + 100.0 * (f64::from(1u32 << k) - 4.0).max(0.0));
        CostModel::new(curve, PRICES)
    }

    #[test]
    fn slices_are_counted_as_attention_reads_them() {
        for (start, num_tokens) in [(0, 1), (0, 8), (5, 7), (100, 17), (31, 64)] {
            let shape = StepShape::default().with_slice(start, num_tokens, 0);
            let ends: Vec<u64> = (start..start + num_tokens).map(|position| u64::from(position) + 1).collect();
            assert_eq!(shape.attended_tokens, ends.iter().sum::<u64>());
            let items = ends.chunks(ATTENTION_ROWS as usize).map(|item| item[item.len() - 1]);
            assert_eq!(shape.loaded_tokens, items.sum::<u64>(), "{num_tokens} from {start}");
        }
        let decoding = StepShape::default().with_slice(40, 1, 1).with_slice(40, 1, 1);
        assert_eq!(decoding, StepShape::decode(2, 41));
        assert_eq!(decoding.with_slice(7, 30, 2).without_slice(7, 30, 2), decoding);
    }

    #[test]
    fn a_prediction_is_the_sum_of_its_prices() {
        let model = kinked();
        assert_eq!(model.predict_ns(&StepShape::default()), 0);
        let prefill = StepShape::default().with_slice(0, 12, 0);
        assert_eq!(model.predict_ns(&prefill), 1800 + 3 * 78 + 2 * (8 + 12));
        assert_eq!(model.predict_ns(&StepShape::decode(3, 10)), 1000 + 500 + 60 + 90 + 60);
        // Between knots the curve is straight, and past the last one it goes on.
        let rows = |num_tokens| StepShape { num_tokens, ..StepShape::default() };
        assert_eq!(model.predict_ns(&rows(6)), 1200);
        assert_eq!(model.predict_ns(&rows(200_000)), 1000 + 100 * 199_996);
        assert_eq!(CostModel::UNKNOWN.predict_ns(&StepShape::decode(3, 10)), 0);
    }

    #[test]
    fn a_step_that_grows_never_gets_cheaper() {
        let model = kinked();
        let mut last = 0;
        for num_tokens in 1..3000 {
            let ns = model.predict_ns(&StepShape::decode(2, 50).with_slice(64, num_tokens, 0));
            assert!(ns >= last, "{num_tokens}");
            last = ns;
        }
    }

    #[test]
    fn the_chunk_that_fits_is_the_largest() {
        let (model, base) = (kinked(), StepShape::decode(4, 100));
        let with = |num_tokens| model.predict_ns(&base.with_slice(32, num_tokens, 0));
        let mut last = 0;
        for budget in (0..200_000).step_by(997) {
            let num_tokens = model.max_prefill_tokens(&base, 32, budget);
            assert!(num_tokens >= last, "a larger budget of {budget} ns bought less");
            assert!(num_tokens == 0 || with(num_tokens) <= budget);
            assert!(with(num_tokens + 1) > budget);
            last = num_tokens;
        }
        assert_eq!(model.max_prefill_tokens(&base, 32, u64::MAX), MAX_ROWS - 4);
    }

    #[test]
    fn the_knee_is_where_more_sequences_bring_little() {
        // Flat to 64 rows, then proportional: the rate is best from 64 on.
        let curve = std::array::from_fn(|k| 1e6 * (f64::from(1u32 << k) / 64.0).max(1.0));
        let model = CostModel::new(curve, Prices::default());
        assert_eq!(model.knee(256, 1), (64.0 * KNEE_SHARE).ceil() as u32);
        assert_eq!(model.knee(16, 1), (16.0 * KNEE_SHARE).ceil() as u32);
        assert_eq!(model.knee(1, 1), 1);
        assert!(model.decode_rate(64, 1) > 1.9 * model.decode_rate(32, 1));
    }

    #[test]
    #[should_panic(expected = "falls")]
    fn a_falling_curve_is_a_bug() {
        CostModel::new(std::array::from_fn(|k| 100.0 - k as f64), Prices::default());
    }
}
