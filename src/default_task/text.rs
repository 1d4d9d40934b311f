//! The text that the embedded base model is trained on: short scenes of the small world.
//!
//! A scene tells a few events and then speaks about them again: questions and answers, talk, notes and lists. What comes
//! later can be known from what came before, so a model that predicts it well has learnt to look names and attributes up
//! in its context. No scene holds JSON or a record of an event.

use super::world::{COLOURS, Dice, Event, ITEMS, Kind, article, capital};

/// The Philox purpose of scenes.
const PURPOSE: u32 = 0x5C1;

const WEATHER: [&str; 8] = [
    "It was a cold morning.",
    "The sun was warm.",
    "It had rained all night.",
    "The wind was strong.",
    "The sky was grey and still.",
    "Snow lay on the roofs.",
    "It was late in the evening.",
    "Nobody was in a hurry.",
];
const NUMBERS: [&str; 8] = ["two", "three", "four", "five", "six", "seven", "eight", "nine"];

/// Scene `index` of the text of `seed`.
pub fn scene(seed: u64, index: u32) -> String {
    let dice = &mut Dice::new(seed, PURPOSE, index);
    let mut events = vec![Event::roll(dice)];
    if dice.one_in(3) {
        let event = Event::roll(dice);
        let first = &events[0];
        // Two events with a name or a thing in common would make the questions ambiguous.
        let people = [first.who, first.other];
        if first.item != event.item && !people.contains(&event.who) && !people.contains(&event.other) {
            events.push(event);
        }
    }
    let mut story: Vec<String> = Vec::new();
    for event in &events {
        if dice.one_in(4) {
            story.push(dice.pick(&WEATHER).to_string());
        }
        story.push(event.tell(dice));
        if dice.one_in(3) {
            story.push(aside(event, dice));
        }
    }
    let mut paragraphs = vec![story.join(" ")];
    for _ in 0..2 + dice.below(3) {
        let event = &events[dice.below(events.len())];
        paragraphs.push(match dice.below(7) {
            0..3 => questions(event, dice),
            3 => talk(event, dice),
            4 | 5 => note(event, dice),
            _ => list(event, dice),
        });
    }
    paragraphs.join("\n")
}

/// A sentence that lingers on an event.
fn aside(event: &Event, dice: &mut Dice) -> String {
    let (who, item, colour) = (event.who(), event.item(), event.colour());
    match dice.below(5) {
        0 => format!("The {item} was not new, but it was still {colour}."),
        1 => format!("{who} liked the {colour} {item} very much."),
        2 => format!("{} had {} of them at home.", event.other(), dice.pick(&NUMBERS)),
        3 => format!("{} stayed at home that day.", event.other()),
        _ => format!("It was an old {item}, but {who} did not mind."),
    }
}

/// Two or three questions about an event, each with its answer.
fn questions(event: &Event, dice: &mut Dice) -> String {
    let (who, other, item, place, day) = (event.who(), event.other(), event.item(), event.place(), event.day());
    let (did, done) = match event.kind {
        Kind::Move => ("take", "took"),
        Kind::Give => ("give away", "gave away"),
        Kind::Find => ("find", "found"),
        Kind::Lose => ("lose", "lost"),
    };
    let mut lines = Vec::new();
    for _ in 0..2 + dice.below(3) {
        lines.push(match dice.below(6) {
            0 => format!("Who {done} the {item}? {who}."),
            1 => format!("What colour was the {item}? {}.", capital(event.colour())),
            2 => format!("Where was {who} with the {item}? At the {place}."),
            3 => format!("What did {who} {did}? The {item}."),
            4 if event.kind == Kind::Give => format!("Who has the {item} now? {other}."),
            4 => format!("Was the place the {place}? Yes, the {place}."),
            _ => format!("On which day did {who} {did} the {item}? On {day}."),
        });
    }
    lines.join(" ")
}

/// Two people talk about an event.
fn talk(event: &Event, dice: &mut Dice) -> String {
    let (who, item, colour, place, day) = (event.who(), event.item(), event.colour(), event.place(), event.day());
    let asks = event.other();
    match dice.below(4) {
        0 => format!("\"Where is the {item}?\" asked {asks}. \"At the {place},\" said {who}."),
        1 => format!("\"Is it the {colour} one?\" asked {asks}. \"Yes, the {colour} {item},\" said {who}."),
        2 => format!("{asks}: \"When did you see the {item}?\" {who}: \"On {day}, at the {place}.\""),
        _ => format!("\"{who}!\" called {asks}. \"The {item} is {colour}!\" \"Yes, it is {colour},\" said {who}."),
    }
}

/// Somebody writes words of an event down.
fn note(event: &Event, dice: &mut Dice) -> String {
    let (who, item, colour, place, day) = (event.who(), event.item(), event.colour(), event.place(), event.day());
    let mut words = vec![who, item, colour, place, day];
    let mut chosen = Vec::new();
    for _ in 0..2 + dice.below(3) {
        chosen.push(words.remove(dice.below(words.len())));
    }
    let quoted: Vec<String> = chosen.iter().map(|word| format!("\"{word}\"")).collect();
    match dice.below(3) {
        0 => format!("{who} wrote {} on a card. The card says: {}.", quoted.join(", "), quoted.join(", ")),
        1 => format!("The card about the {item} says \"{item}\", \"{colour}\" and \"{place}\"."),
        _ => format!("Words of {who} on that day: {{{}}}", quoted.join(", ")),
    }
}

/// A list of things, counted twice.
fn list(event: &Event, dice: &mut Dice) -> String {
    let mut things = vec![format!("{} {} {}", article(event.colour()), event.colour(), event.item())];
    for _ in 0..1 + dice.below(3) {
        let colour = dice.pick(&COLOURS);
        things.push(format!("{} {colour} {}", article(colour), dice.pick(&ITEMS)));
    }
    let things = things.join(", ");
    let who = event.who();
    match dice.below(2) {
        0 => format!("In the bag of {who}: {things}. {who} counted again: {things}."),
        _ => format!("{who} has {things}. Yes, {who} has {things}."),
    }
}
