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

/// The rest of a message is none that is read here; who decodes it may read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unread;

/// The fields at the top level of a message: their numbers and, but for numbers, bytes. Ends with the first that cannot
/// be read; groups, of which the contract has none, are among those.
pub fn fields(mut message: &[u8]) -> impl Iterator<Item = Result<(u64, &[u8]), Unread>> {
    std::iter::from_fn(move || {
        let read = (!message.is_empty()).then(|| field(&mut message).ok_or(Unread))?;
        if read.is_err() {
            message = &[];
        }
        Some(read)
    })
}

/// The message without the fields of these numbers at its top level, as far as it can be read.
pub fn without(message: Bytes, numbers: &[u64]) -> Bytes {
    if !fields(&message).map_while(Result::ok).any(|(number, _)| numbers.contains(&number)) {
        return message;
    }
    let (mut kept, mut rest) = (Vec::with_capacity(message.len()), &message[..]);
    while !rest.is_empty() {
        let before = rest;
        let Some((number, _)) = field(&mut rest) else {
            kept.extend_from_slice(before);
            break;
        };
        if !numbers.contains(&number) {
            kept.extend_from_slice(&before[..before.len() - rest.len()]);
        }
    }
    kept.into()
}

/// Takes the first field off a message.
fn field<'a>(message: &mut &'a [u8]) -> Option<(u64, &'a [u8])> {
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
    let key = varint(message)?;
    let length = match key & 7 {
        0 => varint(message).map(|_| 0)?,
        1 => 8,
        2 => usize::try_from(varint(message)?).ok()?,
        5 => 4,
        _ => return None,
    };
    let (field, rest) = message.split_at_checked(length)?;
    *message = rest;
    Some((key >> 3, field))
}

#[cfg(test)]
mod tests {
    use vllm_proto::GenerateRequest;

    use super::*;

    #[test]
    fn fields_are_found_without_decoding_them() {
        let found = |message| fields(message).map_while(Result::ok).map(|(number, _)| number).collect::<Vec<_>>();
        let is_read = |message| fields(message).all(|field| field.is_ok());
        // A text (1), a fixed number of 4 bytes (7) and of 8 (8), a number (20), and three empty items.
        let plain = b"\x0a\x03abc\x3d\0\0\0\x3f\x41\0\0\0\0\0\0\0\0\xa0\x01\xac\x02";
        let with = [plain.as_slice(), b"\x72\0\x72\0\x72\0"].concat();
        assert_eq!(found(plain), [1, 7, 8, 20]);
        assert_eq!(found(&with), [1, 7, 8, 20, 14, 14, 14]);
        assert_eq!(fields(plain).next(), Some(Ok((1, b"abc".as_slice()))));
        assert!(is_read(&with) && is_read(b""));
        // Cut off wherever, it is what it is so far, and read to its end only between fields.
        assert!((0..plain.len()).all(|end| found(plain).starts_with(&found(&plain[..end]))));
        let ends = [5, 10, 19];
        assert!((1..plain.len()).all(|end| is_read(&plain[..end]) == ends.contains(&end)));
    }

    #[test]
    fn what_is_taken_out_leaves_the_rest_as_it_was() {
        let plain = b"\x0a\x03abc\x3d\0\0\0\x3f\xa0\x01\xac\x02";
        let with = [&plain[..5], b"\x8a\x01\x02\x1a\0", &plain[5..], b"\x8a\x01\0"].concat();
        assert_eq!(without(with.into(), &[17, 18]), &plain[..]);
        let whole = Bytes::from_static(plain);
        assert_eq!(without(whole.clone(), &[17]).as_ptr(), whole.as_ptr(), "no copy where there is nothing to take");
        // What cannot be read stays for who refuses it.
        assert_eq!(without(Bytes::from_static(b"\x8a\x01\0\x0b\x72"), &[17]), &b"\x0b\x72"[..]);
    }

    /// What is hidden from this, and not from who decodes it, must not look like the end.
    #[test]
    fn what_is_not_read_to_its_end_is_said_to_be_so() {
        let unknown_group = b"\xfb\x01\xfc\x01";
        let hidden = [unknown_group.as_slice(), b"\x72\0"].concat();
        assert_eq!(GenerateRequest::decode(hidden.as_slice()).map(|message| message.media.len()), Ok(1));
        let beyond = b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f";
        for message in [&hidden[..], &hidden[2..], b"\x0b\x72\0", b"\x0e", b"\x0f", beyond, &[0xff; 11]] {
            assert_eq!(fields(message).collect::<Vec<_>>(), [Err(Unread)], "{message:x?}");
        }
    }
}
