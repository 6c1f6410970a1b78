//! Whom a request is served for, and what it may share. Invariant: a name is only ever compared, by its hash: equal
//! names are one tenant, and no name at all is one too.

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
    /// `user` names the tenant; `priority` (lower is served earlier) and `cache_salt` are vLLM's.
    pub fn read(model: &ServedModel, fields: &Fields) -> Result<Tenancy, ApiError> {
        let user = fields.string("user")?;
        let priority = fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0);
        Ok(Tenancy {
            tenant: name_hash(user),
            share: user.and_then(|user| model.shares.get(user)).copied().unwrap_or_default(),
            priority: priority as i32,
            cache_salt: name_hash(fields.string("cache_salt")?),
        })
    }
}

fn name_hash(name: Option<&str>) -> u64 {
    let Some(name) = name else { return 0 };
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}
