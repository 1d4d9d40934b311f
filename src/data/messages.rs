//! Conversations: which part of the rendered template is the assistant's.
//!
//! A template is a program, so the assistant's words cannot be found by looking for them. What can be done is to render
//! the conversation up to each assistant turn with the generation prompt (what the model will see) and including the
//! turn (what it should have made of it): the difference is learned. This needs each of these to be a prefix of the
//! whole, which is checked.

use nibble_models::chat::{ChatTemplate, Message};
use nibble_models::tokenizer::Tokenizer;

use super::IGNORE;

/// A conversation in tokens.
pub(super) struct Conversation {
    pub ids: Vec<u32>,
    pub labels: Vec<i64>,
    /// Whether a learned stretch starts before the assistant's own words.
    pub header_learned: bool,
}

/// Token ids and labels of a conversation; the error says what is wrong with the row.
///
/// The text is encoded in stretches between the boundaries, so that no token straddles one: the ids before an assistant
/// turn are those of the prompt that generation will start from. Of a turn, what the template puts behind the end
/// token (a line end, mostly) is not learned: generation stops at the end token.
pub(super) fn encode(
    messages: &[Message],
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<Conversation, String> {
    let render = |count: usize, prompt: bool| -> Result<String, String> {
        template.render(&messages[..count], prompt).map_err(|error| error.to_string())
    };
    let whole = render(messages.len(), false)?;
    let mut ids = Vec::new();
    let mut labels = Vec::new();
    let mut done = 0;
    let mut push = |text: &str, learned: bool| -> Result<(), String> {
        // Only the first stretch is the start of a text.
        let new = ids.last().map_or_else(|| tokenizer.encode(text, false), |&last| tokenizer.encode_after(last, text));
        let new = new.map_err(|error| error.to_string())?;
        let end = new.iter().rposition(|id| tokenizer.eos_ids().contains(id)).map_or(new.len(), |last| last + 1);
        labels.extend(new.iter().enumerate().map(|(i, &id)| if learned && i < end { i64::from(id) } else { IGNORE }));
        ids.extend(new);
        Ok(())
    };
    let (mut turns, mut header_learned) = (0, false);
    for (i, message) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
        let (before, after) = (render(i, true)?, render(i + 1, false)?);
        if !after.starts_with(&before) || !whole.starts_with(&after) || before.len() < done {
            return Err(format!(
                "the chat template does not write message {} ({}) as a continuation of its own prompt, so the \
                 assistant's part cannot be told apart; use {{\"prompt\",\"completion\"}} rows for this model",
                i + 1,
                message.role
            ));
        }
        push(&whole[done..before.len()], false)?;
        let own = &whole[before.len()..after.len()];
        // Templates may trim what is said, and put a space before it.
        header_learned |= !own.trim_start().starts_with(message.content.trim());
        push(own, true)?;
        done = after.len();
        turns += 1;
    }
    if turns == 0 {
        return Err("the conversation has no assistant turn, so there is nothing to learn".to_owned());
    }
    push(&whole[done..], false)?;
    Ok(Conversation { ids, labels, header_learned })
}
