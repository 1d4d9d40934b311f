//! `--show-batch`: what a run would learn from, for people to read before it starts.

use crate::{
    commands::print,
    data::{DataSpec, Example, Examples, preview},
    deal::Deal,
    default_task, hub, input,
    model::Model,
    settings::Settings,
    train::source,
};
use anyhow::{Context, Result};
use nibble_models::tokenizer::Tokenizer;
use std::{fmt::Write, io::IsTerminal};

/// Colours of what is learned and of what is only read.
const LEARNED: &str = "\x1b[32m";
const READ: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Whether text for standard output may be coloured: it goes to a terminal, and nobody asked for none (`NO_COLOR`).
pub fn coloured() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Prints the first `count` micro-batches of the run of `settings`. Nothing is trained or written, and no weights are read.
pub fn show_batches(settings: &Settings, count: usize) -> Result<()> {
    let settings =
        &Settings { data: settings.data.as_ref().map(|data| hub::data(data, false)).transpose()?, ..settings.clone() };
    let (tokenizer, vocab_size) = Model::tokenizer_without_weights(&source(settings))?;
    let unpacked = default_task::unpack().context("unpacking the embedded task")?;
    let embedded = || DataSpec::from(unpacked.path().join(default_task::TRAIN));
    let spec = settings.data.clone().unwrap_or_else(embedded);
    let options = settings.data_options(vocab_size);
    let Some(examples) = input::read("data", &spec, tokenizer.as_ref(), &options)? else { return Ok(()) };
    let deal = Deal::new(&examples, settings)?;
    if let Some(packing) = deal.packing(settings) {
        crate::note!("packing  {packing}");
    }
    print(&shown(&deal, &examples, tokenizer.as_ref(), count, coloured())?)
}

/// The first `count` micro-batches in words.
fn shown(
    deal: &Deal,
    examples: &Examples,
    tokenizer: Option<&Tokenizer>,
    count: usize,
    coloured: bool,
) -> Result<String> {
    let mut out = String::new();
    // Writing to a string cannot fail.
    for (number, chosen) in (0..count).map_while(|number| Some((number, deal.chosen(number)?))) {
        let chosen = chosen.into_iter().map(|index| examples.get(index)).collect::<Result<Vec<_>, _>>()?;
        let tokens: usize = chosen.iter().map(|example| example.ids.len()).sum();
        let learned: usize = chosen.iter().map(Example::unmasked).sum();
        let _ =
            writeln!(out, "micro-batch {}: {} examples, {tokens} tokens, {learned} learned", number + 1, chosen.len());
        for (place, example) in chosen.iter().enumerate() {
            let (tokens, learned) = (example.ids.len(), example.unmasked());
            let _ = writeln!(out, "example {}: {tokens} tokens, {learned} learned", place + 1);
            match tokenizer {
                Some(tokenizer) => out += &text(example, tokenizer, coloured)?,
                None => ids(example, &mut out),
            }
        }
    }
    Ok(out)
}

/// An example in its own words: coloured, or a line for each stretch.
fn text(example: &Example, tokenizer: &Tokenizer, coloured: bool) -> Result<String> {
    let mut out = String::new();
    for span in preview(example, tokenizer)? {
        if coloured {
            // What a data file holds does not command the terminal.
            let text = span.text.replace(|c: char| c.is_control() && c != '\n' && c != '\t', "\u{fffd}");
            let _ = write!(out, "{}{text}{PLAIN}", if span.learned { LEARNED } else { READ });
        } else {
            let _ = writeln!(out, "  {} {:?}", if span.learned { "learned" } else { "read   " }, span.text);
        }
    }
    Ok(out + if coloured { "\n" } else { "" })
}

/// An example of a model without a tokenizer.
fn ids(example: &Example, out: &mut String) {
    let _ = writeln!(out, "  ids     {:?}", example.ids);
    let _ = writeln!(out, "  learned {:?}", example.labels);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::IGNORE;
    use std::path::Path;

    #[test]
    fn learned_stretches_are_told_apart() {
        let tokenizer = Tokenizer::from_folder(Path::new("assets/default/model")).unwrap();
        let ids = tokenizer.encode("on the table\x1b", false).unwrap();
        let labels = ids.iter().enumerate().map(|(i, &id)| if i == 0 { IGNORE } else { i64::from(id) }).collect();
        let examples = Examples::of(&[Example { ids: ids.clone(), labels }]).unwrap();
        let settings = Settings { batch_size: 1, ..Settings::default() };
        let deal = Deal::new(&examples, &settings).unwrap();
        let first = tokenizer.decode(&ids[..1], false).unwrap();
        let rest = tokenizer.decode(&ids[1..], false).unwrap();
        let (tokens, learned) = (ids.len(), ids.len() - 1);
        let head = format!(
            "micro-batch 1: 1 examples, {tokens} tokens, {learned} learned\nexample 1: {tokens} tokens, {learned} learned\n"
        );
        let plain = shown(&deal, &examples, Some(&tokenizer), 1, false).unwrap();
        assert_eq!(plain, format!("{head}  read    {first:?}\n  learned {rest:?}\n"));
        let clean = rest.replace('\x1b', "\u{fffd}");
        let colour = shown(&deal, &examples, Some(&tokenizer), 1, true).unwrap();
        assert_eq!(colour, format!("{head}{READ}{first}{PLAIN}{LEARNED}{clean}{PLAIN}\n"));
        // A run has no more than its micro-batches.
        assert_eq!(shown(&deal, &examples, None, 5, true).unwrap().matches("micro-batch").count(), 1);
    }
}
