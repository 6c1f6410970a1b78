//! A batch as vLLM writes it: MessagePack of `[time, events, rank]`, each event a map with its type. Hashes are the low
//! half of ours: routers make their own of the tokens, and compare these with each other alone.

use std::time::{SystemTime, UNIX_EPOCH};

use fullbore_engine::memory::BlockHash;
use fullbore_engine::memory::kv_events::{KvEvent, StoredBlock};
use serde::Serialize;

#[derive(Serialize)]
#[serde(tag = "type")]
enum Told<'a> {
    /// Blocks that follow one another.
    BlockStored {
        block_hashes: Vec<u64>,
        parent_block_hash: Option<u64>,
        token_ids: Vec<u32>,
        block_size: u32,
        lora_id: Option<u32>,
        medium: &'static str,
        lora_name: Option<&'a str>,
        /// By block.
        #[serde(skip_serializing_if = "Option::is_none")]
        extra_keys: Option<Vec<Option<[&'a str; 1]>>>,
    },
    BlockRemoved {
        block_hashes: Vec<u64>,
        medium: &'static str,
    },
    AllBlocksCleared {},
}

/// The device's memory, of whatever kind; blocks in the host's are found by nobody else.
const MEDIUM: &str = "GPU";
/// Among those of one worker: there is one alone.
const RANK: u32 = 0;

pub fn encode(events: &[KvEvent], block_size: u32) -> Vec<u8> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let told = merged(events, block_size);
    rmp_serde::to_vec_named(&(since.as_secs_f64(), told, RANK)).expect("numbers and texts")
}

/// What follows one another in one event.
fn merged(events: &[KvEvent], block_size: u32) -> Vec<Told<'_>> {
    let mut told: Vec<Told> = Vec::new();
    for event in events {
        match (event, told.last_mut()) {
            (KvEvent::Removed(hash), Some(Told::BlockRemoved { block_hashes, .. })) => block_hashes.push(name(*hash)),
            (KvEvent::Removed(hash), _) => {
                told.push(Told::BlockRemoved { block_hashes: vec![name(*hash)], medium: MEDIUM });
            }
            (KvEvent::Cleared, _) => told.push(Told::AllBlocksCleared {}),
            (KvEvent::Stored(block), Some(Told::BlockStored { block_hashes, token_ids, extra_keys, .. }))
                if block.lineage.parent.is_some_and(|parent| block_hashes.last() == Some(&name(parent))) =>
            {
                block_hashes.push(name(block.hash));
                token_ids.extend(block.tokens.iter().map(|token| token.0));
                extra_keys.iter_mut().for_each(|keys| keys.push(None));
            }
            (KvEvent::Stored(block), _) => told.push(first(block, block_size)),
        }
    }
    told
}

fn first(block: &StoredBlock, block_size: u32) -> Told<'_> {
    Told::BlockStored {
        block_hashes: vec![name(block.hash)],
        parent_block_hash: block.lineage.parent.map(name),
        token_ids: block.tokens.iter().map(|token| token.0).collect(),
        block_size,
        lora_id: None,
        medium: MEDIUM,
        lora_name: None,
        extra_keys: block.lineage.salt.as_deref().map(|salt| vec![Some([salt])]),
    }
}

fn name(hash: BlockHash) -> u64 {
    hash.0 as u64
}

#[cfg(test)]
mod tests {
    use fullbore_engine::memory::kv_events::Lineage;
    use fullbore_engine::request::TokenId;
    use serde_json::{Value, json};

    use super::*;

    fn stored(hash: u128, parent: Option<u128>, salt: Option<&str>) -> KvEvent {
        let tokens = vec![TokenId(hash as u32), TokenId(0)].into();
        let lineage = Lineage { parent: parent.map(BlockHash), salt: salt.map(Into::into) };
        KvEvent::Stored(StoredBlock { hash: BlockHash(hash), lineage, tokens })
    }

    #[test]
    fn what_follows_one_another_is_one_event() {
        let removed = |hash| KvEvent::Removed(BlockHash(hash));
        let events = [
            KvEvent::Cleared,
            stored(1, None, Some("s")),
            // The upper half is not told.
            stored((9 << 64) | 2, Some(1), None),
            stored(3, Some(1), None),
            stored(u64::MAX.into(), None, None),
            removed(1),
            removed(3),
        ];
        let batch: Value = rmp_serde::from_slice(&encode(&events, 2)).expect("MessagePack");
        let block = |hashes: Value, parent: Value, tokens: Value| {
            json!({"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens,
                "block_size": 2, "lora_id": null, "medium": "GPU", "lora_name": null})
        };
        let mut salted = block(json!([1, 2]), Value::Null, json!([1, 0, 2, 0]));
        salted["extra_keys"] = json!([["s"], null]);
        let told = json!([
            {"type": "AllBlocksCleared"},
            salted,
            block(json!([3]), json!(1), json!([3, 0])),
            block(json!([u64::MAX]), Value::Null, json!([u32::MAX, 0])),
            {"type": "BlockRemoved", "block_hashes": [1, 3], "medium": "GPU"},
        ]);
        assert_eq!((&batch[1], &batch[2]), (&told, &json!(0)));
        assert!(batch[0].as_f64().is_some_and(|time| time > 1.7e9), "{}", batch[0]);
    }
}
