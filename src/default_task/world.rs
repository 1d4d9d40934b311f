//! The small world that both the base's text and the fine-tuning task speak about: its words, its events and the
//! sentences that tell an event. Every random choice is a Philox draw, so a seed fixes every byte.

use nibble_runtime::rng::{Philox, Stream};

pub const PEOPLE: [&str; 32] = [
    "Mia", "Omar", "Lena", "Tom", "Ada", "Ravi", "Nora", "Sam", "Ines", "Paul", "Yuki", "Karl", "Rosa", "Ivan",
    "Leila", "Finn", "Maya", "Hugo", "Zoe", "Greta", "Sofia", "Erik", "Anna", "Luis", "Emma", "Jack", "Otto", "Clara",
    "Ben", "Olga", "Peter", "Ruth",
];
pub const COLOURS: [&str; 10] =
    ["red", "blue", "green", "yellow", "white", "black", "orange", "purple", "brown", "pink"];
pub const ITEMS: [&str; 32] = [
    "kite", "lamp", "drum", "rope", "hat", "book", "cup", "ball", "coat", "key", "boat", "bell", "chair", "map",
    "ring", "scarf", "basket", "clock", "bowl", "ladder", "blanket", "bottle", "brush", "candle", "camera", "flute",
    "hammer", "letter", "mirror", "pencil", "radio", "wheel",
];
pub const PLACES: [&str; 16] = [
    "harbour", "market", "school", "garden", "station", "library", "bridge", "river", "forest", "kitchen", "museum",
    "beach", "farm", "tower", "park", "castle",
];
pub const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// A sequence of random choices: one Philox stream, read in order.
pub struct Dice {
    numbers: Philox,
    next: u64,
}

impl Dice {
    /// The choices of document `index` made for `purpose` under `seed`.
    pub fn new(seed: u64, purpose: u32, index: u32) -> Self {
        Dice { numbers: Philox::new(seed, Stream { purpose, step: index, layer: 0 }), next: 0 }
    }

    /// A uniform number below `n` (not 0).
    pub fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        self.numbers.below(self.next - 1, n as u32) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of `options` (not empty).
    pub fn pick<'a, T: ?Sized>(&mut self, options: &[&'a T]) -> &'a T {
        options[self.below(options.len())]
    }
}

/// What can happen in the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Move,
    Give,
    Find,
    Lose,
}

/// Something that happened: indices into the word lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub kind: Kind,
    pub who: usize,
    /// A second person, never `who`: the receiver of a gift, otherwise only for distraction.
    pub other: usize,
    pub colour: usize,
    pub item: usize,
    pub place: usize,
    pub day: usize,
}

impl Event {
    /// A uniform event.
    pub fn roll(dice: &mut Dice) -> Event {
        let kind = [Kind::Move, Kind::Give, Kind::Find, Kind::Lose][dice.below(4)];
        let who = dice.below(PEOPLE.len());
        let other = (who + 1 + dice.below(PEOPLE.len() - 1)) % PEOPLE.len();
        Event {
            kind,
            who,
            other,
            colour: dice.below(COLOURS.len()),
            item: dice.below(ITEMS.len()),
            place: dice.below(PLACES.len()),
            day: dice.below(DAYS.len()),
        }
    }

    pub fn who(&self) -> &'static str {
        PEOPLE[self.who]
    }

    pub fn other(&self) -> &'static str {
        PEOPLE[self.other]
    }

    pub fn colour(&self) -> &'static str {
        COLOURS[self.colour]
    }

    pub fn item(&self) -> &'static str {
        ITEMS[self.item]
    }

    pub fn place(&self) -> &'static str {
        PLACES[self.place]
    }

    pub fn day(&self) -> &'static str {
        DAYS[self.day]
    }

    /// One sentence that says everything about the event.
    pub fn tell(&self, dice: &mut Dice) -> String {
        let (who, other, item, place, day) = (self.who(), self.other(), self.item(), self.place(), self.day());
        let thing = format!("{} {} {item}", article(self.colour()), self.colour());
        let (verb, preposition) = match self.kind {
            Kind::Move => (dice.pick(&["took", "carried", "brought"]), "to"),
            Kind::Give => (dice.pick(&["gave", "handed"]), "at"),
            Kind::Find => (dice.pick(&["found", "saw"]), dice.pick(&["at", "near"])),
            Kind::Lose => (dice.pick(&["lost", "forgot"]), dice.pick(&["at", "near"])),
        };
        if self.kind == Kind::Give {
            return match dice.below(3) {
                0 => format!("On {day} {who} {verb} {other} {thing} {preposition} the {place}."),
                1 => format!("{who} {verb} {thing} to {other} {preposition} the {place} on {day}."),
                _ => format!("At the {place}, {who} {verb} {thing} to {other} on {day}."),
            };
        }
        match dice.below(3) {
            0 => format!("On {day} {who} {verb} {thing} {preposition} the {place}."),
            1 => format!("{who} {verb} {thing} {preposition} the {place} on {day}."),
            _ => format!("It was {day}, and {who} {verb} {thing} {preposition} the {place}."),
        }
    }
}

/// "a" or "an", as `word` wants it.
pub fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

/// `word` with its first letter in upper case (ASCII).
pub fn capital(word: &str) -> String {
    let mut word = word.to_string();
    word[..1].make_ascii_uppercase();
    word
}
