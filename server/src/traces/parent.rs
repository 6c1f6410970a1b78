//! W3C Trace Context's `traceparent`: which trace a client is in. What is no such header counts as none.

use warp::http::HeaderMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    pub trace_id: u128,
    pub span_id: u64,
    /// Whether the client keeps this trace.
    pub is_sampled: bool,
}

impl TraceParent {
    pub fn of(headers: &HeaderMap) -> Option<TraceParent> {
        TraceParent::parse(headers.get("traceparent")?.to_str().ok()?)
    }

    /// `00-` trace id `-` span id `-` flags; later versions may have more behind that.
    fn parse(text: &str) -> Option<TraceParent> {
        let mut fields = text.trim().split('-');
        let version = hex(fields.next()?, 2)?;
        let trace_id = hex(fields.next()?, 32)?;
        let span_id = hex(fields.next()?, 16)? as u64;
        let flags = hex(fields.next()?, 2)?;
        let has_more = fields.next().is_some();
        let is_right = version != 0xff && trace_id != 0 && span_id != 0 && !(version == 0 && has_more);
        is_right.then_some(TraceParent { trace_id, span_id, is_sampled: flags & 1 == 1 })
    }
}

/// So many digits, in small letters.
fn hex(text: &str, num_digits: usize) -> Option<u128> {
    let is_hex = text.len() == num_digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_hex.then(|| u128::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_read_as_the_recommendation_has_it() {
        let ids = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
        let parent = TraceParent::parse(&format!("00-{ids}-01")).expect("its own example");
        assert_eq!(parent.trace_id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!((parent.span_id, parent.is_sampled), (0x00f0_67aa_0ba9_02b7, true));
        assert_eq!(TraceParent::parse(&format!("00-{ids}-00")).map(|parent| parent.is_sampled), Some(false));
        assert_eq!(TraceParent::parse(&format!("cc-{ids}-03-what-ever")), Some(parent));
        let zero = "00000000000000000000000000000000";
        for wrong in [
            String::new(),
            format!("ff-{ids}-01"),
            format!("00-{ids}-01-more"),
            format!("00-{ids}-1"),
            format!("00-{ids}"),
            format!("00-{}-01", ids.to_uppercase()),
            format!("00-{zero}-00f067aa0ba902b7-01"),
            format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{}-01", &zero[..16]),
            format!("00-+{}-01", &ids[1..]),
        ] {
            assert_eq!(TraceParent::parse(&wrong), None, "{wrong}");
        }
    }
}
