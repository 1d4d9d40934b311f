//! SmolLM2-135M-Instruct's tokenizer and chat template against the golden file.
//!
//! The GGUF file is not part of the repository; `NIBBLE_SMOLLM2` names it.

use std::path::Path;

use nibble_models::chat::{ChatTemplate, Message};
use nibble_models::files::gguf::GgufFile;
use nibble_models::tokenizer::Tokenizer;
use serde_json::Value;

const TEMPLATE: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
    {{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}\
    {% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn golden() -> Value {
    let path = "../tests/golden/smollm2-135m.json";
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn conversation() -> Vec<Message> {
    vec![Message::new("user", "Hi"), Message::new("assistant", "Hello!"), Message::new("user", "Bye")]
}

fn tokenizer() -> Option<Tokenizer> {
    let Some(path) = std::env::var_os("NIBBLE_SMOLLM2") else {
        println!("skipped: set NIBBLE_SMOLLM2 to SmolLM2-135M-Instruct.Q4_1.gguf");
        return None;
    };
    Some(Tokenizer::from_gguf(&GgufFile::open(Path::new(&path)).unwrap()).unwrap())
}

#[test]
fn chat_template_is_the_golden_one() {
    let template = ChatTemplate::new(TEMPLATE, Some("<|im_start|>"), Some("<|im_end|>")).unwrap();
    assert_eq!(template.render(&conversation(), true).unwrap(), golden()["chat_template"].as_str().unwrap());
}

fn ids_match(tokenizer: &Tokenizer) {
    let golden = golden();
    let mut checked = 0;
    for variant in ["fp32_from_gguf", "nf4dq_of_bf16_of_gguf"] {
        for case in golden[variant].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = |name: &str| -> Vec<u32> {
                case[name].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
            };
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids("ids"), "{text:?}");
            assert_eq!(tokenizer.encode_continuation(text).unwrap(), ids("ids"), "{text:?}");
            assert_eq!(tokenizer.decode(&ids("ids"), false).unwrap(), text);
            assert_eq!(tokenizer.decode(&ids("greedy"), true).unwrap(), case["greedy_text"].as_str().unwrap());
            checked += 1;
        }
    }
    assert_eq!(checked, 12);
}

#[test]
fn gguf_tokenizer_is_exact() {
    let Some(tokenizer) = tokenizer() else { return };
    assert_eq!((tokenizer.bos(), tokenizer.eos_ids(), tokenizer.pad()), (Some(1), &[2][..], Some(2)));
    assert_eq!((tokenizer.vocab_size(), tokenizer.add_bos(), tokenizer.add_eos()), (49152, false, false));
    assert_eq!(tokenizer.chat_template(), Some(TEMPLATE));
    assert_eq!(tokenizer.token_id("<|im_start|>"), Some(1));
    assert_eq!(tokenizer.id_to_token(2).as_deref(), Some("<|im_end|>"));
    ids_match(&tokenizer);
    // Digits one by one, as in the model's own tokenizer.json.
    assert_eq!(tokenizer.encode("2018", false).unwrap(), [34, 32, 33, 40]);
    let chat = tokenizer.chat().unwrap().unwrap();
    assert_eq!(chat.render(&conversation(), true).unwrap(), golden()["chat_template"].as_str().unwrap());
}

#[test]
fn saved_gguf_tokenizer_reads_back() {
    let Some(tokenizer) = tokenizer() else { return };
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save(dir.path()).unwrap();
    let back = Tokenizer::from_folder(dir.path()).unwrap();
    assert_eq!((back.bos(), back.eos_ids(), back.pad()), (Some(1), &[2][..], Some(2)));
    assert_eq!((back.vocab_size(), back.add_bos(), back.chat_template()), (49152, false, tokenizer.chat_template()));
    ids_match(&back);
}
