//! Whom a request is served for, and what it may share. Invariant: a name is only ever compared, by its hash: equal
//! names are one tenant, and no name at all is one too. A key is no proof of anything: whoever is let in is served.

use std::hash::{DefaultHasher, Hash, Hasher};

use fullbore_engine::request::Share;

use super::ServedModel;
use super::fields::Fields;
use crate::http::error::ApiError;

#[derive(Clone, Copy)]
pub struct Tenancy {
    pub tenant: u64,
    pub share: Share,
    pub priority: i32,
    pub cache_salt: u64,
}

impl Tenancy {
    /// The tenant is who has the API key, else `user`. `priority`, lower being earlier, and `cache_salt` are vLLM's.
    /// Who has a key shares prefixes with that key alone.
    pub fn read(model: &ServedModel, key: Option<&str>, fields: &Fields) -> Result<Tenancy, ApiError> {
        let user = fields.string("user")?;
        let priority = fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0);
        let salt = fields.string("cache_salt")?;
        let name = key.or(user);
        Ok(Tenancy {
            tenant: hash((key, user.filter(|_| key.is_none()))),
            share: name.and_then(|name| model.shares.get(name)).copied().unwrap_or_default(),
            priority: priority as i32,
            cache_salt: hash((key, salt)),
        })
    }
}

/// What follows `Bearer` in an Authorization header, if that is what it has.
pub fn bearer_key(authorization: &str) -> Option<&str> {
    let (scheme, key) = authorization.trim().split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

fn hash(names: (Option<&str>, Option<&str>)) -> u64 {
    let mut hasher = DefaultHasher::new();
    names.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_off_its_header() {
        let keys = ["Bearer secret", "bearer  secret ", "Bearer a b"].map(bearer_key);
        assert_eq!(keys, [Some("secret"), Some("secret"), Some("a b")]);
        assert_eq!(["Basic secret", "Bearer", "Bearer ", "", "secret"].map(bearer_key), [None; 5]);
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
