//! A client whose answers nobody waits for.

use fullbore_engine::request::{Event, Flow, Sink};

pub struct Nobody;

impl Sink for Nobody {
    fn event(&mut self, _: Event) -> Flow {
        Flow::Continue
    }

    fn is_closed(&self) -> bool {
        false
    }
}
