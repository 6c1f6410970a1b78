//! Whether a challenger is faster than what is in its place, by times on a machine whose speed changes meanwhile: both
//! are run in every round, and what counts is the ratio of their times in a round, never a time.
//!
//! Invariant: pure; nothing here runs anything or looks at a clock.

use crate::statistics::{median, quantile};

/// Rounds that a choice rests on, at least.
pub const LEAST_ROUNDS: usize = 9;
/// A gain must be so many times what rounds differ by: of nine rounds of noise one in two hundred is.
const SPREADS: f64 = 1.5;
/// What must be gained to leave the device's own choice.
const LEAST_GAIN: f64 = 0.03;
/// Beyond this ratio a challenger is given up, once it has had so many rounds.
const HOPELESS: f64 = 1.15;
const EARLY_ROUNDS: usize = 3;

/// A challenger's time over the incumbent's in the same round: below 1 it is faster.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    pub median: f64,
    /// From the lower quartile of the rounds to the upper one.
    pub spread: f64,
}

impl Ratio {
    /// Of some rounds.
    pub fn of(ratios: &[f64]) -> Ratio {
        let mut ratios = ratios.to_vec();
        let mut at = |share| quantile(&mut ratios, share).expect("a round");
        Ratio { median: at(0.5), spread: at(0.75) - at(0.25) }
    }

    /// Whether it gains more than the rounds' differences could make up.
    pub fn is_faster(self) -> bool {
        self.median + SPREADS * self.spread < 1.0
    }

    /// Whether that is worth a change.
    pub fn is_worth_it(self) -> bool {
        self.is_faster() && self.median < 1.0 - LEAST_GAIN
    }
}

/// Some challengers and an incumbent, each with times at the same numbers of rows.
#[derive(Clone, Debug)]
pub struct Contest {
    /// By round, then by rows: nanoseconds.
    incumbent: Vec<Vec<f64>>,
    challengers: Vec<Challenger>,
}

#[derive(Clone, Debug, Default)]
struct Challenger {
    rounds: Vec<Vec<f64>>,
    ratios: Vec<f64>,
    is_given_up: bool,
}

impl Contest {
    pub fn new(num_challengers: usize) -> Contest {
        Contest { incumbent: Vec::new(), challengers: vec![Challenger::default(); num_challengers] }
    }

    /// The challengers that the next round is to have.
    pub fn open(&self) -> Vec<usize> {
        (0..self.challengers.len()).filter(|&index| !self.challengers[index].is_given_up).collect()
    }

    pub fn num_rounds(&self) -> usize {
        self.incumbent.len()
    }

    /// Nanoseconds by rows: the incumbent's, and those of each challenger that is open.
    pub fn add_round(&mut self, incumbent: Vec<f64>, challengers: Vec<(usize, Vec<f64>)>) {
        for (index, times) in challengers {
            let challenger = &mut self.challengers[index];
            let ratios = times.iter().zip(&incumbent).map(|(ns, of_incumbent)| ns / of_incumbent);
            challenger.ratios.push(ratios.sum::<f64>() / incumbent.len() as f64);
            challenger.rounds.push(times);
            let is_early = challenger.ratios.len() < EARLY_ROUNDS;
            challenger.is_given_up = !is_early && Ratio::of(&challenger.ratios).median > HOPELESS;
        }
        self.incumbent.push(incumbent);
    }

    /// The fastest of those that are worth a change, if there have been rounds enough to say so.
    pub fn winner(&self) -> Option<(usize, Ratio)> {
        let of = |challenger: &Challenger| Ratio::of(&challenger.ratios);
        let enough = |challenger: &&(usize, &Challenger)| challenger.1.ratios.len() >= LEAST_ROUNDS;
        let rated = self.challengers.iter().enumerate().filter(|challenger| enough(&challenger));
        let worthy = rated.map(|(index, challenger)| (index, of(challenger))).filter(|(_, ratio)| ratio.is_worth_it());
        worthy.min_by(|(_, a), (_, b)| a.median.total_cmp(&b.median))
    }

    /// Nanoseconds at the last of the rows: the incumbent's, or a challenger's.
    pub fn ns(&self, challenger: Option<usize>) -> f64 {
        let rounds = challenger.map_or(&self.incumbent, |index| &self.challengers[index].rounds);
        let mut last: Vec<f64> = rounds.iter().filter_map(|times| times.last().copied()).collect();
        median(&mut last).expect("a round")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::SplitMix64;

    /// Times of a machine that is up to 1.6 times slower from one round to the next, each off by some share of itself.
    struct Machine {
        random: SplitMix64,
        noise: f64,
    }

    impl Machine {
        fn new(seed: u64, noise: f64) -> Machine {
            Machine { random: SplitMix64(seed), noise }
        }

        /// From 0 to 1.
        fn draw(&mut self) -> f64 {
            self.random.below(1 << 20) as f64 / f64::from(1 << 20)
        }

        /// About a normal deviate.
        fn deviate(&mut self) -> f64 {
            (0..12).map(|_| self.draw()).sum::<f64>() - 6.0
        }

        /// The contest of challengers that truly take so many times what the incumbent takes.
        fn contest(&mut self, truth: &[f64], num_rounds: usize) -> Contest {
            let mut contest = Contest::new(truth.len());
            for _ in 0..num_rounds {
                let speed = 1.0 + 0.6 * self.draw();
                let mut time = |truth: f64| {
                    let times = [100.0, 170.0].map(|ns| ns * truth * speed * (1.0 + self.noise * self.deviate()));
                    times.to_vec()
                };
                let incumbent = time(1.0);
                let challengers = contest.open().into_iter().map(|index| (index, time(truth[index]))).collect();
                contest.add_round(incumbent, challengers);
            }
            contest
        }
    }

    fn winner(contest: &Contest) -> Option<usize> {
        contest.winner().map(|(index, _)| index)
    }

    #[test]
    fn noise_alone_changes_next_to_nothing() {
        for noise in [0.02, 0.05, 0.1, 0.2] {
            let of_seed = |seed| Machine::new(seed, noise).contest(&[1.0, 1.02, 1.0, 1.1], LEAST_ROUNDS);
            let changed = (0..200).filter(|&seed| of_seed(seed).winner().is_some()).count();
            assert!(changed <= 6, "{changed} of 200 contests at a noise of {noise}");
        }
    }

    #[test]
    fn what_is_faster_wins_though_the_machine_changes_its_speed() {
        let of_seed = |seed| Machine::new(seed, 0.02).contest(&[0.95, 0.85, 1.0], LEAST_ROUNDS);
        let found = (0..200).filter(|&seed| winner(&of_seed(seed)) == Some(1)).count();
        assert!(found >= 195, "{found} of 200, with a gain of 15 % beside a noise of 2 %");
        let contest = Machine::new(1, 0.3).contest(&[0.85], 100);
        assert_eq!(contest.winner(), None, "a gain that rounds differ by more than");
    }

    #[test]
    fn what_is_hopeless_is_given_up_early_and_too_few_rounds_say_nothing() {
        let contest = Machine::new(1, 0.02).contest(&[2.0, 0.5], 4);
        assert_eq!((contest.open(), contest.num_rounds()), (vec![1], 4));
        assert_eq!(contest.challengers[0].rounds.len(), EARLY_ROUNDS);
        assert_eq!(contest.winner(), None, "four rounds");
        let contest = Machine::new(1, 0.0).contest(&[2.0, 0.5], LEAST_ROUNDS);
        assert_eq!(contest.winner().map(|(index, ratio)| (index, ratio.spread)), Some((1, 0.0)));
        assert!((contest.ns(Some(1)) / contest.ns(None) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_gain_must_be_beyond_its_spread_and_worth_a_change() {
        let ratio = |median, spread| Ratio { median, spread };
        assert!(ratio(0.9, 0.05).is_worth_it());
        assert!(!ratio(0.9, 0.07).is_faster());
        assert!(ratio(0.98, 0.01).is_faster() && !ratio(0.98, 0.01).is_worth_it());
        assert_eq!(Ratio::of(&[1.2, 0.8, 0.9, 1.0, 1.1]), ratio(1.0, 1.1 - 0.9));
    }
}
