//! Whom a request is served for, and what it may share. Invariant: a name is only ever compared, by its hash: equal
//! names are one tenant, and no name at all is one too; nobody can look for two names that have one hash. Whether a
//! client may ask at all is for `http/access.rs` to say.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock};

use fullbore_engine::request::Share;

use super::ServedModel;
use super::fields::Fields;
use crate::http::access::Client;
use crate::http::error::ApiError;

#[derive(Clone)]
pub struct Tenancy {
    pub tenant: u64,
    pub share: Share,
    pub priority: i32,
    pub cache_salt: u64,
    /// As the client wrote it.
    pub salt_name: Option<Arc<str>>,
}

impl Tenancy {
    /// The tenant is who has the API key, else `user`. `priority`, lower being earlier, and `cache_salt` are vLLM's.
    /// Who has a key shares prefixes with that key alone.
    pub fn read(
        model: &ServedModel,
        client: &Client,
        fields: &Fields,
        user: Option<&str>,
    ) -> Result<Tenancy, ApiError> {
        let priority = fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0);
        let salt = fields.string("cache_salt")?;
        let key = client.name.as_deref();
        let share = || key.or(user).and_then(|name| model.shares.get(name)).copied();
        Ok(Tenancy {
            tenant: hash((key, user.filter(|_| key.is_none()))),
            share: client.share.or_else(share).unwrap_or_default(),
            priority: priority as i32,
            cache_salt: hash((key, salt)),
            salt_name: salt.map(Arc::from),
        })
    }
}

/// `alice=4`, `batch=1:8`.
pub fn parse_share(text: &str) -> Result<(String, Share), String> {
    let expected =
        || format!("{text} is no NAME=WEIGHT[:MAX]: a weight from 1 to 1000, and at least 1 request at once");
    let (name, numbers) = text.rsplit_once('=').ok_or_else(expected)?;
    let (weight, most) = numbers.split_once(':').map_or((numbers, None), |(weight, most)| (weight, Some(most)));
    let weight = weight.parse().ok().filter(|weight| (1..=1000).contains(weight)).ok_or_else(expected)?;
    let max_num_seqs = match most {
        Some(most) => most.parse().ok().filter(|&most| most > 0).ok_or_else(expected)?,
        None => u32::MAX,
    };
    Ok((name.to_owned(), Share { weight, max_num_seqs }))
}

/// By a key that is drawn once, so that nobody can look elsewhere for a name that has another's hash.
fn hash(names: (Option<&str>, Option<&str>)) -> u64 {
    static KEYED: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    KEYED.hash_one(names)
}

#[cfg(test)]
mod tests {
    use std::hash::{DefaultHasher, Hash, Hasher};

    use super::*;

    #[test]
    fn hashes_are_of_this_process_alone() {
        let mut known = DefaultHasher::new();
        (Some("x"), None::<&str>).hash(&mut known);
        assert_ne!(hash((Some("x"), None)), known.finish());
        assert_eq!(hash((Some("x"), None)), hash((Some("x"), None)));
    }

    #[test]
    fn names_of_unlike_kinds_are_unlike() {
        let hashes = [(None, None), (Some("x"), None), (None, Some("x")), (Some("x"), Some("x")), (Some(""), None)];
        let hashes = hashes.map(hash);
        for (index, one) in hashes.iter().enumerate() {
            assert!(!hashes[..index].contains(one), "{index}");
        }
    }
}
