//! Whom a request is served for, and what it may share. Invariant: a name is only ever compared, by its hash: equal
//! names are one tenant, and no name at all is one too. Whether a client may ask at all is for `http/access.rs` to say.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

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

fn hash(names: (Option<&str>, Option<&str>)) -> u64 {
    let mut hasher = DefaultHasher::new();
    names.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_unlike_kinds_are_unlike() {
        let hashes = [(None, None), (Some("x"), None), (None, Some("x")), (Some("x"), Some("x")), (Some(""), None)];
        let hashes = hashes.map(hash);
        for (index, one) in hashes.iter().enumerate() {
            assert!(!hashes[..index].contains(one), "{index}");
        }
    }
}
