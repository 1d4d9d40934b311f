//! Text: sampling, stop strings, conversations, and several adapters.

use crate::support::Place;
use std::{io::Write, process::Stdio};

/// What `chat` prints for these lines of standard input: answers and messages.
fn chat(place: &Place, args: &[&str], input: &str) -> (String, String) {
    let mut command = place.command(&[&["chat", "--model", "texts", "--max-tokens", "8"], args].concat());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{stderr}");
    assert!(!stdout.contains('\u{1b}') && !stderr.contains("\n> "), "no colour and no prompt: {stderr}");
    (stdout, stderr)
}

fn generate(place: &Place, args: &[&str]) -> String {
    place.ok(&[&["generate", "--model", "texts", "--prompt", "abc", "--max-tokens", "24"], args].concat()).stdout
}

#[test]
fn filters_and_penalty_reach_the_text() {
    let place = Place::new();
    place.model_with_text();
    let greedy = generate(&place, &[]);
    let hot = ["--temperature", "5", "--seed", "4"];
    assert_ne!(generate(&place, &hot), greedy);
    for narrow in [["--top-k", "1"], ["--top-p", "0.0001"], ["--min-p", "1"]] {
        assert_eq!(generate(&place, &[&hot[..], &narrow].concat()), greedy, "{narrow:?}");
    }
    assert_ne!(generate(&place, &["--repetition-penalty", "8"]), greedy);
    for (option, value) in [("--min-p", "1.5"), ("--repetition-penalty", "0"), ("--stop", ""), ("--temperature", "NaN")]
    {
        place.refuses(&["generate", "--model", "texts", "--prompt", "a", option, value], &[option]);
    }
}

#[test]
fn a_text_ends_before_its_stop_string() {
    let place = Place::new();
    place.model_with_text();
    let hot = ["--temperature", "3", "--seed", "4"];
    let text = generate(&place, &hot);
    let made: Vec<char> = text.trim_end_matches('\n').strip_prefix("abc").unwrap().chars().collect();
    assert!(made.len() > 6, "{text:?}");
    let stop: String = made[3..5].iter().collect();
    let expected = made.iter().collect::<String>();
    let expected = &expected[..expected.find(&stop).unwrap()];
    let stopped = generate(&place, &[&hot[..], &["--stop", "never in there", "--stop", &stop]].concat());
    assert_eq!(stopped, format!("abc{expected}\n"));
}

#[test]
fn a_conversation_is_kept_and_forgotten() {
    let place = Place::new();
    place.model_with_text();
    // One answer a line of input; nothing else on standard output.
    let (twice, _) = chat(&place, &[], "hello\nhello\n/quit\nhello\n");
    let answers: Vec<&str> = twice.lines().collect();
    assert_eq!(answers.len(), 2, "{twice:?}");
    let alone = place.ok(&["generate", "--model", "texts", "--max-tokens", "8", "--chat", "--prompt", "hello"]).stdout;
    assert_eq!(format!("{}\n", answers[0]), alone);
    assert_ne!(answers[0], answers[1], "the second answer knows the first");
    let (forgotten, _) = chat(&place, &[], "hello\n\n/reset\nhello");
    assert_eq!(forgotten, alone.repeat(2));
    let (told, _) = chat(&place, &["--system", "be brief"], "hello\n");
    assert_ne!(told, alone);
    let (nothing, said) = chat(&place, &[], "/help\n/adapter\n/adapter x\n");
    assert_eq!(nothing, "");
    for word in ["/help is no command", "adapters: none (in use: none)", "no adapter is named \"x\""] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(chat(&place, &[], "").0, "");
}

#[test]
fn adapters_are_switched_in_place() {
    let place = Place::new();
    place.model_with_text();
    for (run, seed) in [("one", "1"), ("two", "2")] {
        place.train(run, &["--lr", "0.05", "--seed", seed, "--steps", "6"]);
    }
    let options = ["--adapter", "none", "--adapter", "a=one/adapter", "--adapter", "b=two/adapter"];
    // One process with all of them says what a process with each says.
    let each: Vec<String> = [&[][..], &["--adapter", "one/adapter"], &["--adapter", "two/adapter"]]
        .iter()
        .map(|options| generate(&place, options))
        .collect();
    assert!(each[0] != each[1] && each[1] != each[2], "{each:?}");
    assert_eq!(generate(&place, &options), format!("== none\n{}== a\n{}== b\n{}", each[0], each[1], each[2]));

    let (alone, _) = chat(&place, &["--adapter", "two/adapter"], "hello\n");
    let (base, _) = chat(&place, &[], "hello\n");
    let script = "hello\n/reset\n/adapter b\nhello\n/reset\n/adapter none\nhello\n/adapter\n";
    let (switched, said) = chat(&place, &options, script);
    assert_eq!(switched, [&base[..], &alone, &base].concat());
    assert!(said.contains("adapters: none, a, b (in use: none)"), "{said}");
    let line = said.lines().find(|line| line.contains("b, switched in")).unwrap();
    let ms: f64 = line.split_whitespace().rev().nth(1).unwrap().parse().unwrap();
    assert!(ms <= 10.0, "{line}");

    let eval = |options: &[&str]| {
        place.ok(&[&["eval", "--json", "--model", "texts", "--data", "ids.jsonl"], options].concat()).stdout
    };
    let lines = eval(&options);
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(|line| line["adapter"].as_str().unwrap()).collect::<Vec<_>>(), ["none", "a", "b"]);
    let alone: serde_json::Value = serde_json::from_str(&eval(&["--adapter", "two/adapter"])).unwrap();
    assert_eq!((&lines[2]["nll"], alone.get("adapter")), (&alone["nll"], None));
    assert!(lines[2]["nll"].as_f64() < lines[0]["nll"].as_f64());

    let generate = ["generate", "--model", "texts", "--prompt", "a"];
    let refuses = |options: &[&str], words: &[&str]| place.refuses(&[&generate, options].concat(), words);
    refuses(&["--adapter", "a=one/adapter", "--adapter", "a=two/adapter"], &["two adapters are named \"a\""]);
    refuses(&["--adapter", "=one/adapter"], &["NAME=DIR"]);
    refuses(&["--adapter", "none=one/adapter"], &["none"]);
}

/// A batch of prompts is answered as each alone, with its own adapter, in the order of the file.
#[test]
fn prompts_of_one_batch_have_their_own_adapters() {
    let place = Place::new();
    place.model_with_text();
    for (run, seed) in [("one", "1"), ("two", "2")] {
        place.train(run, &["--lr", "0.05", "--seed", seed, "--steps", "4"]);
    }
    // In f32: with 16 bits, on a GPU, two tokens can be as likely as each other to one kernel and not to another.
    let model = ["--model", "texts", "--dtype", "f32"];
    let adapters = [&model[..], &["--adapter", "one=one/adapter", "--adapter", "two=two/adapter"]].concat();
    let rows = [("abc", Some("two")), ("a longer one", None), ("abc", Some("none")), ("abc", Some("one"))];
    let line = |(prompt, adapter): &(&str, Option<&str>)| match adapter {
        Some(adapter) => format!("{{\"prompt\": \"{prompt}\", \"adapter\": \"{adapter}\"}}\n\n"),
        None => format!("{{\"prompt\": \"{prompt}\"}}\n"),
    };
    place.write("prompts.jsonl", rows.iter().map(line).collect::<String>());
    let batch = [&["generate", "--prompts", "prompts.jsonl", "--max-tokens", "12"], &adapters[..]].concat();
    let lines: Vec<serde_json::Value> =
        place.ok(&batch).stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), rows.len());
    for ((prompt, adapter), line) in rows.iter().zip(&lines) {
        let adapter = adapter.unwrap_or("one");
        let dir = format!("{adapter}={adapter}/adapter");
        let alone = ["--max-tokens", "12", "--prompt", prompt, "--adapter"];
        let dir = if adapter == "none" { "none" } else { &dir };
        let expected = place.ok(&[&["generate"], &model[..], &alone, &[dir]].concat()).stdout;
        let text = line["text"].as_str().unwrap();
        assert_eq!(format!("{prompt}{text}\n"), expected, "{adapter}");
        assert_eq!((line["prompt"].as_str(), line["adapter"].as_str()), (Some(*prompt), Some(adapter)));
    }
    assert!(lines[0]["text"] != lines[3]["text"]);
    place.write("bad.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"a\", \"adapter\": \"three\"}\n");
    let bad = [&["generate", "--prompts", "bad.jsonl"], &adapters[..]].concat();
    place.refuses(&bad, &["bad.jsonl", "line 2", "three"]);
    place.write("bad.jsonl", "{\"text\": \"a\"}\n");
    place.refuses(&bad, &["bad.jsonl", "line 1", "text"]);
}
