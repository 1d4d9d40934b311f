//! Chat templates render as transformers renders them; `text_chat.json` holds its output.

use nibble_models::chat::{ChatTemplate, Message};
use proptest::prelude::*;
use serde_json::Value;

#[test]
fn renders_are_those_of_transformers() {
    let path = "tests/text_chat.json";
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut checked = 0;
    for entry in golden["templates"].as_array().unwrap() {
        let name = &entry["name"];
        let template = ChatTemplate::new(entry["source"].as_str().unwrap(), Some("<s>"), Some("</s>")).unwrap();
        for render in entry["renders"].as_array().unwrap() {
            let conversation = &golden["conversations"][render["conversation"].as_str().unwrap()];
            let messages: Vec<Message> = serde_json::from_value(conversation.clone()).unwrap();
            let text = template.render(&messages, render["add_generation_prompt"].as_bool().unwrap());
            let expected = render["text"].as_str().unwrap();
            match expected.strip_prefix('!') {
                Some(reason) => assert!(text.unwrap_err().to_string().contains(reason), "{name}"),
                None => assert_eq!(text.unwrap(), expected, "{name} {render}"),
            }
            checked += 1;
        }
    }
    assert_eq!(checked, 36);
}

fn render(source: &str) -> nibble_models::Result<String> {
    ChatTemplate::new(source, None, None)?.render(&[Message::new("user", "a")], false)
}

#[test]
fn today_is_formatted() {
    let year = render("{{ strftime_now('%Y') }}").unwrap();
    assert!(year.len() == 4 && year.parse::<u32>().unwrap() > 2024, "{year}");
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}").unwrap().split(' ').count(), 3);
    assert!(render("{{ strftime_now('%!') }}").unwrap_err().to_string().contains("strftime_now"));
}

#[test]
fn absent_tokens_print_nothing() {
    assert_eq!(render("[{{ bos_token }}{{ eos_token }}]{{ bos_token is defined }}").unwrap(), "[]False");
}

#[test]
fn one_line_end_of_the_source_is_dropped() {
    assert_eq!(render("a\n\n").unwrap(), "a\n");
}

#[test]
fn faults_are_errors() {
    for (source, expected) in [
        ("{% if %}", "syntax error"),
        ("{{ messages[0].content", "syntax error"),
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{{ no_such_function() }}", "no_such_function"),
        ("{{ messages | tojson(indent=1000000000) }}", "indent above 64"),
        // A template that would never end.
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}\
          {% endfor %}",
            "loop without end",
        ),
        // One that would take all memory.
        (
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "loop without end",
        ),
    ] {
        let error = render(source).unwrap_err().to_string();
        assert!(error.starts_with("chat template: ") && error.contains(expected), "{source}: {error}");
    }
}

proptest! {
    #[test]
    fn any_source_compiles_or_fails(source in "(\\{%-? ?|-?%\\}|\\{\\{|\\}\\}|generation|endgeneration| if true|[a-z'|é]){0,12}") {
        let _ = render(&source);
    }

    #[test]
    fn content_is_printed_as_it_is(content in "\\PC{0,40}") {
        let template = ChatTemplate::new("{{ messages[0].content }}|{{ messages[0].content | tojson }}", None, None).unwrap();
        let text = template.render(&[Message::new("user", content.clone())], true).unwrap();
        prop_assert_eq!(text.get(..=content.len()), Some(&*(content.clone() + "|")));
        let json: String = serde_json::from_str(&text[content.len() + 1..]).unwrap();
        prop_assert_eq!(json, content);
    }
}
