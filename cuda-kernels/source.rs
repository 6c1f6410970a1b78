//! The kernels' text, put together from parts and constants.

use siphasher::sip::SipHasher13;

/// Kernels that are compiled together: `common.cu` and these parts, behind constants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Module {
    /// Names of files; the last has the kernels, and is the module's name with the constants.
    pub parts: &'static [&'static str],
    pub constants: Vec<(&'static str, u32)>,
}

macro_rules! texts {
    ($($name:literal),*) => {
        &[$(($name, include_str!(concat!($name, ".cu")))),*]
    };
}

/// Every file of kernels by its name.
pub const fn all_texts() -> &'static [(&'static str, &'static str)] {
    texts!(
        "add_norm",
        "attention",
        "attention_matrix",
        "attention_params",
        "common",
        "embed",
        "gated_act",
        "halves",
        "kv_head",
        "mat_mul",
        "mat_mul_fragments",
        "mat_mul_matrix",
        "mat_mul_params",
        "mat_mul_sum",
        "matrix",
        "mul_add",
        "mul_add_matrix",
        "reset_counts",
        "rms_norm",
        "rope_kv",
        "sample",
        "to_f16",
        "update_table",
        "weight"
    )
}

fn text_of(part: &str) -> &'static str {
    let found = all_texts().iter().find(|(name, _)| *name == part);
    found.unwrap_or_else(|| panic!("there is no {part}.cu")).1
}

impl Module {
    /// The file of the kernels, and the values of the constants: `mat_mul:0-1-0-4`.
    pub fn name(&self) -> String {
        let values: Vec<String> = self.constants.iter().map(|(_, value)| value.to_string()).collect();
        let separator = if values.is_empty() { "" } else { ":" };
        format!("{}{separator}{}", self.file(), values.join("-"))
    }

    fn file(&self) -> &'static str {
        self.parts.last().expect("a module has a part")
    }

    pub fn text(&self) -> String {
        let constants = self.constants.iter().map(|(name, value)| format!("#define {name} {value}\n"));
        let parts = ["common"].iter().chain(self.parts).map(|part| text_of(part).to_owned());
        constants.chain(parts).collect()
    }

    /// By which PTX and text are held together.
    pub fn text_hash(&self) -> u64 {
        SipHasher13::new().hash(self.text().as_bytes())
    }

    /// Threads of a block of one of the kernels, and its struct of parameters; `None` if there is no such kernel.
    pub fn kernel(&self, name: &str) -> Option<(u32, &'static str)> {
        text_of(self.file()).lines().find_map(|line| {
            let inside = line.strip_prefix("KERNEL(")?.split_once(')')?.0;
            let [threads, found, params] = inside.split(", ").collect::<Vec<_>>()[..] else { return None };
            (found == name).then(|| Some((threads.parse().ok()?, params)))?
        })
    }

    /// Fields of a struct of the module's text: type, as C++ has it, and name.
    pub fn fields(&self, name: &str) -> Option<Vec<(&'static str, &'static str)>> {
        let text = self.parts.iter().rev().map(|part| text_of(part));
        let begin = format!("struct {name} {{\n");
        let body = text.into_iter().find_map(|text| text.split_once(&begin)?.1.split_once("\n};"))?.0;
        let lines = body.lines().map(str::trim).filter(|line| !line.starts_with("//"));
        lines.map(|line| line.trim_end_matches(';').rsplit_once(' ')).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_and_their_parameters_are_read_off_the_text() {
        let module = Module { parts: &["weight", "mat_mul"], constants: vec![("FLOAT", 1), ("UNITS", 1)] };
        assert_eq!(module.name(), "mat_mul:1-1");
        assert!(module.text().starts_with("#define FLOAT 1\n#define UNITS 1\n"));
        assert_eq!(module.kernel("mat_mul_16"), Some((256, "MatMulParams")));
        assert_eq!(module.kernel("mat_mul_3"), None);
        let module = Module { parts: &["halves", "rms_norm"], constants: vec![] };
        let fields = [
            ("const f32*", "x"),
            ("const f32*", "weight"),
            ("f32*", "out"),
            ("u16*", "halves"),
            ("u32", "cols"),
            ("f32", "eps"),
        ];
        assert_eq!(module.fields("RmsNormParams"), Some(fields.to_vec()));
        assert_eq!((module.name().as_str(), module.fields("Nothing")), ("rms_norm", None));
    }
}
