//! Prices of steps that nobody has run yet, out of what a model's products take alone.
//!
//! Attention, norms and the host are not in it: it is the floor that learning from steps starts from. Invariant: times
//! that fall as rows grow, which noise makes, are lifted to those before them.

use crate::cost::{CostModel, NUM_KNOTS, Prices, ns_on_lines};

/// Rows, and nanoseconds of one product: at least two pairs, of rising rows and finite times.
pub type ProductTimes = [(u32, f64)];

/// Of a step that computes each product of `layers` once, and of its logits, which `output` computes.
pub fn cost_of_products(layers: &[&ProductTimes], output: &ProductTimes) -> CostModel {
    let ns_of = |rows: u32| layers.iter().map(|times| ns_on_lines(times, rows).max(0.0)).sum::<f64>();
    let mut curve: [f64; NUM_KNOTS] = std::array::from_fn(|knot| ns_of(1 << knot));
    for knot in 1..NUM_KNOTS {
        curve[knot] = curve[knot].max(curve[knot - 1]);
    }
    let ((few, few_ns), (many, many_ns)) = (output[0], output[output.len() - 1]);
    let ns_per_logit_row = ((many_ns - few_ns) / f64::from(many - few)).max(0.0);
    let ns_for_logits = (few_ns - f64::from(few) * ns_per_logit_row).max(0.0);
    CostModel::new(curve, Prices { ns_for_logits, ns_per_logit_row, ..Prices::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::StepShape;

    #[test]
    fn a_step_takes_what_its_products_take() {
        let (one, two) = ([(1, 100.0), (8, 170.0), (64, 730.0)], [(1, 50.0), (64, 1310.0)]);
        let cost = cost_of_products(&[&one, &two, &two], &[(1, 30.0), (4, 60.0)]);
        let rows = |num_tokens| StepShape { num_tokens, ..StepShape::default() };
        assert!(cost.is_known());
        assert_eq!(cost.predict_ns(&rows(1)), 200);
        assert_eq!(cost.predict_ns(&rows(8)), 170 + 2 * (50 + 7 * 20));
        // Beyond what was measured the last line goes on.
        assert_eq!(cost.predict_ns(&rows(128)), 730 + 640 + 2 * (1310 + 64 * 20));
        let decode = StepShape { attended_tokens: 0, loaded_tokens: 0, ..StepShape::decode(1, 1) };
        assert_eq!(cost.predict_ns(&decode), 200 + 30);
    }

    #[test]
    fn noise_makes_no_curve_that_falls() {
        let cost = cost_of_products(&[&[(1, 100.0), (2, 90.0), (4, 10.0), (8, 200.0)]], &[(1, 50.0), (8, 40.0)]);
        assert_eq!(cost.curve()[..4], [100.0, 100.0, 100.0, 200.0]);
        assert_eq!((cost.prices().ns_for_logits, cost.prices().ns_per_logit_row), (50.0, 0.0));
    }
}
