//! A request as a chat: its conversation turn by turn, or all of it in one message.

use serde_json::{Value, json};

use crate::workload::{AGENT, Lengths, PlannedRequest};

/// How the prompts of a workload are put into messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chat {
    /// All of it is one of the user's.
    Whole,
    /// A user and an assistant in turn, whose answers before the last are `output` tokens each.
    Turns { output: u32 },
    /// After the user's message an assistant that calls a tool with so many tokens, and what that brings, in turn.
    Tools { output: u32 },
}

impl Chat {
    /// Of generated requests; those of a trace say nothing of turns.
    pub fn of(lengths: Option<Lengths>) -> Chat {
        match lengths {
            Some(Lengths::Turns { output, .. }) if lengths == Some(AGENT) => Chat::Tools { output },
            Some(Lengths::Turns { output, .. }) => Chat::Turns { output },
            _ => Chat::Whole,
        }
    }

    /// The fields of a body that say what is asked; `ids` are the tokens of `request`, and `text` makes words of them.
    pub fn fields(self, request: &PlannedRequest, ids: &[u32], text: &dyn Fn(&[u32]) -> String) -> Value {
        let (output, has_tools) = match self {
            Chat::Whole => return json!({"messages": [{"role": "user", "content": text(ids)}]}),
            Chat::Turns { output } => (output, false),
            Chat::Tools { output } => (output, true),
        };
        let [system, before @ .., last] = &request.segments[..] else {
            return Chat::Whole.fields(request, ids, text);
        };
        let mut rest = ids;
        let mut take = |num_tokens: u32| {
            let (head, tail) = rest.split_at(rest.len().min(num_tokens as usize));
            rest = tail;
            text(head)
        };
        let asked = |turn: usize, text: String| match turn.checked_sub(1).filter(|_| has_tools) {
            Some(call) => json!({"role": "tool", "tool_call_id": format!("call-{call}"), "content": text}),
            None => json!({"role": "user", "content": text}),
        };
        let answered = |turn: usize, text: String| match has_tools {
            true => {
                let function = json!({"name": TOOL, "arguments": json!({ARGUMENT: text}).to_string()});
                let call = json!({"id": format!("call-{turn}"), "type": "function", "function": function});
                json!({"role": "assistant", "content": null, "tool_calls": [call]})
            }
            false => json!({"role": "assistant", "content": text}),
        };
        let mut messages = vec![json!({"role": "system", "content": take(system.num_tokens)})];
        for (turn, segment) in before.iter().enumerate() {
            messages.push(asked(turn, take(segment.num_tokens.saturating_sub(output))));
            messages.push(answered(turn, take(output.min(segment.num_tokens))));
        }
        messages.push(asked(before.len(), take(last.num_tokens)));
        let mut fields = json!({"messages": messages});
        if has_tools {
            let parameters = json!({"type": "object", "properties": {ARGUMENT: {"type": "string"}},
                "required": [ARGUMENT]});
            let function = json!({"name": TOOL, "description": "Finds what is known.", "parameters": parameters});
            fields["tools"] = json!([{"type": "function", "function": function}]);
        }
        fields
    }
}

const TOOL: &str = "search";
const ARGUMENT: &str = "query";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Arrivals, CHAT, SHAREGPT, generate};

    /// Roles of the second turn of the second conversation, and of how many tokens each message is.
    fn second_turn(lengths: Lengths) -> (Value, Vec<(String, usize)>) {
        let Lengths::Turns { turns, .. } = lengths else { panic!("they are turns") };
        let planned = generate(Arrivals::AtOnce, lengths, 2 * turns, 1);
        let request = &planned[3];
        let ids: Vec<u32> = request.request(1000, 1).prompt.iter().map(|id| id.0).collect();
        let words = |ids: &[u32]| ids.iter().map(|id| format!("{id} ")).collect::<String>();
        let fields = Chat::of(Some(lengths)).fields(request, &ids, &words);
        let length = |of: &Value| {
            let said = of["content"].as_str().or(of["tool_calls"][0]["function"]["arguments"].as_str());
            said.expect("it says something").split_whitespace().filter(|word| !word.starts_with('{')).count()
        };
        let message = |of: &Value| (of["role"].as_str().expect("a role").to_owned(), length(of));
        let messages = fields["messages"].as_array().expect("messages").iter().map(message).collect();
        (fields, messages)
    }

    #[test]
    fn turns_are_messages_of_the_lengths_that_were_planned() {
        let (fields, messages) = second_turn(CHAT);
        let expected = [("system", 150), ("user", 60), ("assistant", 180), ("user", 60)];
        assert_eq!(messages, expected.map(|(role, length)| (role.to_owned(), length)));
        assert!(fields.get("tools").is_none());
    }

    #[test]
    fn an_agent_calls_a_tool_and_is_told_what_it_brings() {
        let (fields, messages) = second_turn(AGENT);
        let roles: Vec<&str> = messages.iter().map(|(role, _)| role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"]);
        assert_eq!((messages[0].1, messages[1].1, messages[3].1), (2000, 400, 400));
        let call = &fields["messages"][2]["tool_calls"][0];
        assert_eq!(call["id"], fields["messages"][3]["tool_call_id"]);
        assert_eq!(call["function"]["name"], fields["tools"][0]["function"]["name"]);
        let arguments = call["function"]["arguments"].as_str().expect("a text");
        let arguments: Value = serde_json::from_str(arguments).expect("JSON");
        assert_eq!(arguments[ARGUMENT].as_str().expect("words").split_whitespace().count(), 60);
    }

    #[test]
    fn what_has_no_turns_is_one_message() {
        let request = &generate(Arrivals::AtOnce, SHAREGPT, 1, 1)[0];
        let fields = Chat::of(Some(SHAREGPT)).fields(request, &[1, 2], &|ids| format!("{ids:?}"));
        assert_eq!(fields, json!({"messages": [{"role": "user", "content": "[1, 2]"}]}));
        assert_eq!(Chat::of(None), Chat::Whole);
    }
}
