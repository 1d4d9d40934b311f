//! The fine-tuning task: turn a sentence of the small world into a record, its particulars in a fixed order.
//!
//! Training and held-out rows share no pair of person and thing, so a model cannot pass by remembering rows.

use super::world::{Dice, Event, Kind};

/// The Philox purposes of training and held-out rows.
const TRAIN: u32 = 0x7A5;
const HELD_OUT: u32 = 0x7A6;

/// A prompt and what the fine-tuned model should answer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Row {
    pub prompt: String,
    pub completion: String,
}

/// Whether events of this person and this thing are kept for evaluation (one pair in eight).
fn held_out(event: &Event) -> bool {
    (event.who + event.item).is_multiple_of(8)
}

/// `count` training rows of `seed`.
pub fn train_rows(seed: u64, count: u32) -> Vec<Row> {
    (0..count).map(|index| row(seed, TRAIN, index, false)).collect()
}

/// `count` held-out rows of `seed`.
pub fn eval_rows(seed: u64, count: u32) -> Vec<Row> {
    (0..count).map(|index| row(seed, HELD_OUT, index, true)).collect()
}

fn row(seed: u64, purpose: u32, index: u32, want_held_out: bool) -> Row {
    let dice = &mut Dice::new(seed, purpose, index);
    let event = loop {
        let event = Event::roll(dice);
        if held_out(&event) == want_held_out {
            break event;
        }
    };
    let mut prompt = event.tell(dice);
    if dice.one_in(3) {
        prompt.push_str(&distraction(&event, dice));
    }
    prompt.push('\n');
    Row { prompt, completion: record(&event) }
}

/// A second sentence that must not change the answer.
fn distraction(event: &Event, dice: &mut Dice) -> String {
    match dice.below(3) {
        0 => " It was a cold morning.".to_string(),
        1 => format!(" It was an old {}, but {} did not mind.", event.item(), event.who()),
        _ => format!(" {} stayed at home that day.", super::world::PEOPLE[dice.below(super::world::PEOPLE.len())]),
    }
}

/// The record of `event`: who, to whom (where something is given), colour, thing, place.
fn record(event: &Event) -> String {
    let receiver = match event.kind {
        Kind::Give => format!("\"{}\", ", event.other()),
        Kind::Move | Kind::Find | Kind::Lose => String::new(),
    };
    let (who, colour, item, place) = (event.who(), event.colour(), event.item(), event.place());
    format!("\"{who}\", {receiver}\"{colour}\", \"{item}\", \"{place}\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_same_seed_makes_the_same_rows() {
        assert_eq!(train_rows(3, 50), train_rows(3, 50));
        assert_ne!(train_rows(3, 50), train_rows(4, 50));
        assert_eq!(train_rows(3, 50)[..20], train_rows(3, 20));
    }

    #[test]
    fn held_out_rows_hold_pairs_that_training_never_shows() {
        let pairs = |rows: Vec<Row>| -> HashSet<(String, String)> {
            let fields = rows.iter().map(|row| fields(&row.completion));
            fields.map(|fields| (fields[0].clone(), fields[fields.len() - 2].clone())).collect()
        };
        let (train, eval) = (pairs(train_rows(1, 2000)), pairs(eval_rows(1, 200)));
        assert!(train.len() > 500 && eval.len() > 80);
        assert!(train.is_disjoint(&eval));
    }

    /// The fields of a record: a JSON array without its brackets.
    fn fields(completion: &str) -> Vec<String> {
        serde_json::from_str(&format!("[{completion}]")).unwrap()
    }

    #[test]
    fn every_field_is_a_word_of_the_prompt() {
        for row in train_rows(5, 500).iter().chain(&eval_rows(5, 200)) {
            let fields = fields(&row.completion);
            let words: HashSet<&str> = row.prompt.split(|c: char| !c.is_alphabetic()).collect();
            assert!(fields.len() == 4 || fields.len() == 5, "{row:?}");
            assert!(fields.iter().all(|field| words.contains(field.as_str())), "{row:?}");
            assert!(row.prompt.ends_with(".\n"));
        }
    }

    /// One prompt, one answer: the prompt alone decides the call.
    #[test]
    fn no_prompt_has_two_answers() {
        let mut answers = std::collections::HashMap::new();
        for row in train_rows(1, 4000) {
            let known = answers.entry(row.prompt).or_insert_with(|| row.completion.clone());
            assert_eq!(*known, row.completion);
        }
    }
}
