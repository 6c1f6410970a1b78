//! Writes GGUF files for tests: metadata values with their types, tensors side by side. What a test puts in is not
//! checked.

/// A value of the metadata, encoded with its type.
pub fn typed(number: u32, value: &[u8]) -> Vec<u8> {
    [&number.to_le_bytes(), value].concat()
}

pub fn u32(value: u32) -> Vec<u8> {
    typed(4, &value.to_le_bytes())
}

pub fn f32(value: f32) -> Vec<u8> {
    typed(6, &value.to_le_bytes())
}

/// A length and as many bytes; not yet a value, which has a type before it.
pub fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// Elements of one type, each without it.
pub fn array(number: u32, elements: &[Vec<u8>]) -> Vec<u8> {
    let head = [number.to_le_bytes().as_slice(), &(elements.len() as u64).to_le_bytes()].concat();
    typed(9, &[head, elements.concat()].concat())
}

#[derive(Clone, Default)]
pub struct GgufFile {
    pub keys: Vec<(String, Vec<u8>)>,
    /// Name, dimensions (innermost first), format's number, bytes.
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufFile {
    pub fn bytes(&self) -> Vec<u8> {
        let counts = [self.tensors.len() as u64, self.keys.len() as u64].map(u64::to_le_bytes);
        let mut out = [b"GGUF".as_slice(), &3u32.to_le_bytes(), counts.as_flattened()].concat();
        for (name, value) in &self.keys {
            out.extend([text(name), value.clone()].concat());
        }
        let mut data = Vec::new();
        for (name, dims, format, bytes) in &self.tensors {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(format.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        [out, data].concat()
    }
}
