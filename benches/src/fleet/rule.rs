//! By which rule a request finds its device: the router's, or one that others use, to hold it against.

use std::cmp::Reverse;
use std::str::FromStr;

use fullbore_engine::fleet::ReplicaId;
use fullbore_engine::fleet::holders::Holders;
use fullbore_engine::fleet::router::{Ask, Router};
use fullbore_engine::memory::{BlockChain, BlockEvent};

use crate::workload::PlannedRequest;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The router as it is.
    Router,
    /// To where the request itself is predicted to end first.
    EarliestFinish,
    /// The same where it is known beforehand how long each answer will be.
    Omniscient,
    RoundRobin,
    /// To where the fewest requests are.
    LeastRequests,
    /// To where the most of the prompt is cached; of equals, to where the fewest requests are.
    MostCached,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        let names = || Rule::ALL.map(Rule::name).join(", ");
        Rule::ALL.into_iter().find(|rule| rule.name() == text).ok_or_else(|| format!("{text} is none of {}", names()))
    }
}

impl Rule {
    pub const ALL: [Rule; 6] =
        [Rule::Router, Rule::EarliestFinish, Rule::Omniscient, Rule::RoundRobin, Rule::LeastRequests, Rule::MostCached];

    pub fn name(self) -> &'static str {
        match self {
            Rule::Router => "router",
            Rule::EarliestFinish => "earliest-finish",
            Rule::Omniscient => "omniscient",
            Rule::RoundRobin => "round-robin",
            Rule::LeastRequests => "least-requests",
            Rule::MostCached => "most-cached",
        }
    }
}

/// A rule and what it remembers.
pub struct Rules {
    rule: Rule,
    num_replicas: u16,
    turn: u16,
    holders: Holders,
}

impl Rules {
    pub fn new(rule: Rule, num_replicas: usize) -> Rules {
        let num_replicas = u16::try_from(num_replicas).expect("fewer than 65536 replicas");
        Rules { rule, num_replicas, turn: 0, holders: Holders::new(num_replicas) }
    }

    /// What the router is told of a request that has so many tokens: how long its answer may be, or will be.
    pub fn ask<'a>(&self, planned: &PlannedRequest, chain: &'a BlockChain, num_tokens: u32) -> Ask<'a> {
        let max_tokens = if self.rule == Rule::Omniscient { planned.output_tokens } else { u32::MAX };
        let prompt_tokens = planned.prompt_tokens + num_tokens;
        Ask { chain: chain.hashes(), prompt_tokens, max_tokens: max_tokens - num_tokens }
    }

    /// Where a request goes of what is open; `None` where that is the router's to say, or nothing is.
    pub fn choose(&mut self, router: &Router, chain: &BlockChain) -> Option<ReplicaId> {
        let round = (0..self.num_replicas).map(|offset| ReplicaId((self.turn + offset) % self.num_replicas));
        let mut all = round.filter(|&replica| router.is_open(replica));
        let chosen = match self.rule {
            Rule::Router | Rule::EarliestFinish | Rule::Omniscient => return None,
            Rule::RoundRobin => all.next()?,
            Rule::LeastRequests => all.min_by_key(|&replica| router.num_placed(replica))?,
            Rule::MostCached => {
                let mut depths = vec![0; usize::from(self.num_replicas)];
                self.holders.depths(chain.hashes(), |replica, depth| depths[usize::from(replica.0)] = depth);
                let key = |replica: &ReplicaId| (Reverse(depths[usize::from(replica.0)]), router.num_placed(*replica));
                all.min_by_key(key)?
            }
        };
        self.turn = (chosen.0 + 1) % self.num_replicas;
        Some(chosen)
    }

    pub fn tell(&mut self, replica: ReplicaId, event: BlockEvent) {
        if self.rule == Rule::MostCached {
            self.holders.tell(replica, event);
        }
    }

    /// A replica's device was lost, and all its blocks with it.
    pub fn forget(&mut self, replica: ReplicaId) {
        self.holders.forget(replica);
    }

    /// Whether what waits may be taken elsewhere.
    pub fn moves(&self) -> bool {
        matches!(self.rule, Rule::Router | Rule::EarliestFinish | Rule::Omniscient)
    }
}
