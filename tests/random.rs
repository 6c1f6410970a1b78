//! Seeded numbers for tests: those that devices are verified with.

pub use fullbore_engine::verify::random::Random;
