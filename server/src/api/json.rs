//! JSON of clients as values, which take many times what they take as text. Invariant: a text is looked through once
//! before any value is made, and refused where they would take more than there is room for, or nest too deep.

use serde_json::Value;

/// Lists and objects within each other; a schema of the deepest that is taken has room in a tool.
const MAX_LEVELS: usize = 64;
/// Of memory: 1.4 million numbers, or a third as many short messages.
const MAX_BYTES: usize = 96 << 20;
/// What a value takes in a list, about; what it takes more where it has a name; and what a list or an object takes
/// beside what is in it.
const VALUE_BYTES: usize = 72;
const NAME_BYTES: usize = 96;
const LIST_BYTES: usize = 3 * VALUE_BYTES;

/// What values may still take.
pub struct JsonRoom(usize);

/// Why a text has no values, as what it is.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    #[error("not JSON: {0}")]
    Syntax(#[from] serde_json::Error),
    #[error("JSON of more than {MAX_LEVELS} levels")]
    Levels,
    #[error("JSON whose values are too many: they would take more than {MAX_BYTES} bytes of memory")]
    Values,
}

impl Default for JsonRoom {
    fn default() -> JsonRoom {
        JsonRoom(MAX_BYTES)
    }
}

impl JsonRoom {
    /// The values of a text, which are taken from what is left.
    pub fn parse(&mut self, text: &[u8]) -> Result<Value, JsonError> {
        let (levels, num_bytes) = measure(text);
        if levels > MAX_LEVELS {
            return Err(JsonError::Levels);
        }
        self.0 = self.0.checked_sub(num_bytes).ok_or(JsonError::Values)?;
        Ok(serde_json::from_slice(text)?)
    }
}

/// How deep values nest, and what they take beside their texts, by what stands outside of texts.
fn measure(text: &[u8]) -> (usize, usize) {
    let (mut level, mut levels, mut num_bytes) = (0usize, 0, VALUE_BYTES);
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => skip_text(&mut bytes),
            b'[' | b'{' => {
                level += 1;
                levels = levels.max(level);
                num_bytes += VALUE_BYTES + LIST_BYTES;
            }
            b']' | b'}' => level = level.saturating_sub(1),
            b',' => num_bytes += VALUE_BYTES,
            b':' => num_bytes += NAME_BYTES,
            _ => {}
        }
    }
    (levels, num_bytes)
}

fn skip_text(bytes: &mut std::slice::Iter<u8>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            b'\\' => drop(bytes.next()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What values take, by the room that their lists have, and for objects the least that they can.
    fn taken(value: &Value) -> usize {
        let inside = match value {
            Value::Array(items) => {
                let spare = items.capacity() - items.len();
                items.iter().map(taken).sum::<usize>() + spare * size_of::<Value>()
            }
            Value::Object(fields) => fields.values().map(|value| taken(value) + size_of::<(u64, String)>()).sum(),
            _ => 0,
        };
        size_of::<Value>() + inside
    }

    #[test]
    fn what_is_measured_is_no_less_than_what_values_take() {
        let lists = ["[]", "[0]", "[0,1,2,3,4]", r#"["a,b",[[]],{}]"#, r#"{"":0,"a":[1],"b":{"c":null}}"#, r#""\"[,""#];
        for text in lists {
            let (levels, num_bytes) = measure(text.as_bytes());
            let value = JsonRoom::default().parse(text.as_bytes()).expect("JSON");
            assert!(taken(&value) <= num_bytes, "{text}: {} of {num_bytes}", taken(&value));
            assert_eq!(JsonRoom(num_bytes).parse(text.as_bytes()).ok(), Some(value), "{text}");
            assert!(matches!(JsonRoom(num_bytes - 1).parse(text.as_bytes()), Err(JsonError::Values)), "{text}");
            assert!(levels <= 3, "{text}");
        }
        // What stands in texts is none of it.
        assert_eq!(measure(br#"["[{:,\\", "\"[["]"#), measure(br#"["a","b"]"#));
    }

    #[test]
    fn room_is_used_up() {
        let mut room = JsonRoom(1000);
        assert!((0..2).all(|_| room.parse(b"[0,0]").is_ok()));
        assert!(matches!(room.parse(b"[0,0]"), Err(JsonError::Values)));
    }
}
