//! libFuzzer around [`fullbore_fuzz::grammar`].
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(init: let_llguidance_panic(), |data: &[u8]| fullbore_fuzz::grammar(data));

/// libFuzzer ends at every panic. Those of llguidance and of what it is made of stay on the thread that compiles, and
/// are refusals of the grammar; only one of ours is a finding.
fn let_llguidance_panic() {
    let end = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let file = panic.location().map_or("", |location| location.file());
        if !["/llguidance-", "/derivre-", "/toktrie", "/regex-"].iter().any(|library| file.contains(library)) {
            end(panic);
        }
    }));
}
