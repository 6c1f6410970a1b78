//! Seeded requests: lengths and token ids, all prompts distinct so that no prefix cache flatters a run.

use fullbore_engine::request::{Request, TokenId};

/// Requests of one size, as `fullbore bench offline` runs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    pub num_requests: u32,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    pub seed: u64,
}

impl Workload {
    /// The requests, greedy and without stop ids, so that each generates exactly `output_tokens`.
    pub fn requests(&self, vocab_size: u32) -> Vec<Request> {
        (0..self.num_requests)
            .map(|index| {
                let mut state = SplitMix64(self.seed ^ (u64::from(index) << 32));
                Request {
                    id: format!("bench-{index}"),
                    prompt: (0..self.prompt_tokens).map(|_| TokenId(state.below(vocab_size))).collect(),
                    max_tokens: self.output_tokens,
                    ..Request::default()
                }
            })
            .collect()
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): enough for token ids, and the same on every machine.
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A value in `0..bound`.
    pub fn below(&mut self, bound: u32) -> u32 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_is_a_function_of_its_seed() {
        let workload = Workload { num_requests: 3, prompt_tokens: 5, output_tokens: 2, seed: 1 };
        let prompts = |workload: Workload| -> Vec<_> { workload.requests(100).into_iter().map(|r| r.prompt).collect() };
        assert_eq!(prompts(workload), prompts(workload));
        assert_ne!(prompts(workload), prompts(Workload { seed: 2, ..workload }));
        assert_ne!(prompts(workload)[0], prompts(workload)[1]);
        assert!(prompts(workload).iter().flatten().all(|id| id.0 < 100));
    }
}
