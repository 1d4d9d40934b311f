//! Text that appears while its tokens come: whole characters, and nothing of a stop string.

use crate::{Result, tokenizer::Tokenizer};

/// Tokens before a text that are decoded with it: what a tokenizer does to the first piece of a text (SentencePiece drops
/// its space) is not to happen in the middle of one.
const CONTEXT: usize = 8;

/// Tokens that one character may take: four bytes, and as many again in case two come in pieces.
const PENDING: usize = 8;

/// Decodes tokens one by one.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens shown last, then those of a character that is not complete.
    ids: Vec<u32>,
    /// How many of `ids` are shown.
    shown: usize,
    stops: Stops,
}

impl<'a> TextStream<'a> {
    /// The text that follows `prompt`, up to the first of the `stops`.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32], stops: &[String]) -> Self {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        TextStream { tokenizer, shown: ids.len(), ids, stops: Stops::new(stops) }
    }

    /// Takes a token; what can be shown now.
    ///
    /// # Errors
    /// The token is not of this tokenizer.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.ids.push(token);
        let before = self.tokenizer.decode(&self.ids[..self.shown], true)?;
        let now = self.tokenizer.decode(&self.ids, true)?;
        if now.ends_with('\u{FFFD}') && self.ids.len() - self.shown < PENDING {
            return Ok(String::new());
        }
        let new = match now.strip_prefix(&before) {
            Some(new) => new,
            // Bytes that were no character alone are part of one now.
            None => {
                let same = now.chars().zip(before.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
                let (_, rest): (_, &str) = now.split_at(same);
                rest
            }
        };
        let new = self.stops.push(new);
        self.ids.drain(..self.shown.min(self.ids.len().saturating_sub(CONTEXT)));
        self.shown = self.ids.len();
        Ok(new)
    }

    /// Whether a stop string has come: nothing that follows is shown.
    pub fn stopped(&self) -> bool {
        self.stops.stopped
    }

    /// What was held back because it could have become a stop string.
    pub fn finish(self) -> String {
        self.stops.finish()
    }
}

/// Cuts a text that comes in pieces before the stop string that is complete first (of several, the longest).
struct Stops {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop.
    held: String,
    stopped: bool,
}

impl Stops {
    fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Stops { stops, held: String::new(), stopped: false }
    }

    fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        let complete = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = complete.min() {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let may_begin = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let start = self.held.char_indices().map(|(at, _)| at).find(may_begin).unwrap_or(self.held.len());
        let rest = self.held.split_off(start);
        std::mem::replace(&mut self.held, rest)
    }

    fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text before the stop that ends first, looked at as a whole.
    fn cut<'a>(text: &'a str, stops: &[String]) -> &'a str {
        let ends = |end: usize| {
            stops.iter().filter(move |stop| text[..end].ends_with(stop.as_str())).map(move |s| end - s.len())
        };
        let boundaries = (0..=text.len()).filter(|&at| text.is_char_boundary(at));
        boundaries.filter_map(|end| ends(end).min()).next().map_or(text, |start| &text[..start])
    }

    proptest! {
        #[test]
        fn pieces_do_not_change_where_a_text_is_cut(
            pieces in prop::collection::vec("[abé]{0,4}", 0..8),
            stops in prop::collection::vec("[abé]{1,3}", 0..4),
        ) {
            let mut stream = Stops::new(&stops);
            let mut shown: String = pieces.iter().map(|piece| stream.push(piece)).collect();
            shown += &stream.finish();
            let text = pieces.concat();
            prop_assert_eq!(shown, cut(&text, &stops));
        }
    }

    #[test]
    fn what_cannot_be_a_stop_is_shown_at_once() {
        let mut stream = Stops::new(&["\nUser:".into()]);
        assert_eq!(stream.push("a\nU"), "a");
        assert_eq!(stream.push("x"), "\nUx");
        assert_eq!(stream.push("\nUser: no"), "");
        assert!(stream.stopped);
        assert_eq!(stream.push("more"), "");
    }
}
