//! Which program this is.

pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// That it was built from, `-dirty` where what was compiled differed from it; none where that was no git checkout.
pub const COMMIT: Option<&str> = option_env!("FULLBORE_COMMIT");

/// `0.1.0 (0123456789ab)`.
pub const VERSION_AND_COMMIT: &str = match option_env!("FULLBORE_VERSION_AND_COMMIT") {
    Some(both) => both,
    None => VERSION,
};
