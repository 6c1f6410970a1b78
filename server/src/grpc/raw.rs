//! Messages as they are sent. Those that ask for answers are decoded in turn with other clients' texts, not where their
//! bytes come in; until then a field is found by looking. Invariant: nothing here takes more memory than the message.

use bytes::{Buf, Bytes};
use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use vllm_proto::GenerateResponse;

/// Hands on what a client sent, and encodes what it is told.
pub struct Raw;

impl Codec for Raw {
    type Encode = GenerateResponse;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = GenerateResponse;
    type Error = Status;

    fn encode(&mut self, message: GenerateResponse, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        message.encode(out).expect("a buffer that grows");
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}

/// The fields at the top level of a message, as far as it can be read: their numbers and, but for numbers, bytes.
pub fn fields(mut message: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    fn varint(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for nth in 0..10 {
            let (&byte, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << (7 * nth);
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
    std::iter::from_fn(move || {
        let key = varint(&mut message)?;
        let length = match key & 7 {
            0 => varint(&mut message).map(|_| 0)?,
            1 => 8,
            2 => usize::try_from(varint(&mut message)?).ok()?,
            5 => 4,
            _ => return None,
        };
        let (field, rest) = message.split_at_checked(length)?;
        message = rest;
        Some((key >> 3, field))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_without_decoding_them() {
        let found = |message| fields(message).map(|(number, _)| number).collect::<Vec<_>>();
        // A text (1), a fixed number of 4 bytes (7) and of 8 (8), a number (20), and three empty items.
        let plain = b"\x0a\x03abc\x3d\0\0\0\x3f\x41\0\0\0\0\0\0\0\0\xa0\x01\xac\x02";
        let with = [plain.as_slice(), b"\x72\0\x72\0\x72\0"].concat();
        assert_eq!(found(plain), [1, 7, 8, 20]);
        assert_eq!(found(&with), [1, 7, 8, 20, 14, 14, 14]);
        assert_eq!(fields(plain).next(), Some((1, b"abc".as_slice())));
        // Cut off wherever, it is what it is so far.
        assert!((0..plain.len()).all(|end| found(plain).starts_with(&found(&plain[..end]))));
        // No field has another kind, or a length beyond the end.
        assert!(found(b"\x0b\x72\0").is_empty() && found(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f").is_empty());
    }
}
