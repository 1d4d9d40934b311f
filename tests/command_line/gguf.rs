//! A GGUF file of a very small Llama with a byte-level tokenizer, for tests.

const HIDDEN: usize = 32;
const FEED_FORWARD: usize = 64;
const VOCAB: usize = 6;

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn strings(items: &[&str]) -> Vec<u8> {
    let count = (items.len() as u64).to_le_bytes();
    [&8u32.to_le_bytes()[..], &count, &items.iter().flat_map(|item| string(item)).collect::<Vec<_>>()].concat()
}

/// One layer of two heads; another architecture's name makes it a file that the program does not run.
pub fn tiny(architecture: &str) -> Vec<u8> {
    let u32s = |value: u32| (4u32, value.to_le_bytes().to_vec());
    let f32s = |value: f32| (6u32, value.to_le_bytes().to_vec());
    let token_types = [3u32, 1, 1, 1, 1, 1].iter().flat_map(|kind| kind.to_le_bytes()).collect::<Vec<_>>();
    let keys = [
        ("general.architecture", (8, string(architecture))),
        ("llama.context_length", u32s(64)),
        ("llama.embedding_length", u32s(HIDDEN as u32)),
        ("llama.feed_forward_length", u32s(FEED_FORWARD as u32)),
        ("llama.block_count", u32s(1)),
        ("llama.attention.head_count", u32s(2)),
        ("llama.attention.head_count_kv", u32s(2)),
        ("llama.rope.freq_base", f32s(10_000.0)),
        ("llama.attention.layer_norm_rms_epsilon", f32s(1e-5)),
        ("tokenizer.ggml.model", (8, string("gpt2"))),
        ("tokenizer.ggml.pre", (8, string("gpt-2"))),
        ("tokenizer.ggml.tokens", (9, strings(&["<|end|>", "a", "b", "Ġ", "Ċ", "ab"]))),
        (
            "tokenizer.ggml.token_type",
            (9, [&5u32.to_le_bytes()[..], &(VOCAB as u64).to_le_bytes(), &token_types].concat()),
        ),
        ("tokenizer.ggml.merges", (9, strings(&["a b"]))),
        ("tokenizer.ggml.eos_token_id", u32s(0)),
    ];
    let (d, f) = (HIDDEN, FEED_FORWARD);
    let tensors: [(&str, &[usize]); 12] = [
        ("token_embd.weight", &[VOCAB, d]),
        ("output_norm.weight", &[d]),
        ("output.weight", &[VOCAB, d]),
        ("blk.0.attn_norm.weight", &[d]),
        ("blk.0.attn_q.weight", &[d, d]),
        ("blk.0.attn_k.weight", &[d, d]),
        ("blk.0.attn_v.weight", &[d, d]),
        ("blk.0.attn_output.weight", &[d, d]),
        ("blk.0.ffn_norm.weight", &[d]),
        ("blk.0.ffn_gate.weight", &[f, d]),
        ("blk.0.ffn_up.weight", &[f, d]),
        ("blk.0.ffn_down.weight", &[d, f]),
    ];
    let counts = [tensors.len() as u64, keys.len() as u64].map(u64::to_le_bytes).concat();
    let mut file = [&b"GGUF"[..], &3u32.to_le_bytes(), &counts].concat();
    for (key, (kind, value)) in keys {
        file.extend([string(key), kind.to_le_bytes().to_vec(), value].concat());
    }
    let mut data: Vec<u8> = Vec::new();
    for (name, shape) in tensors {
        file.extend(string(name));
        file.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&dim| file.extend((dim as u64).to_le_bytes()));
        file.extend(0u32.to_le_bytes()); // F32
        file.extend((data.len() as u64).to_le_bytes());
        let count = shape.iter().product::<usize>();
        // Norms are constant; the others pseudo-random values, spread around zero.
        let value = |i: usize| match shape.len() {
            1 => 3.0,
            _ => ((i + data.len()) as u32).wrapping_mul(2_654_435_761) as f32 / u32::MAX as f32 - 0.5,
        };
        let values: Vec<u8> = (0..count).flat_map(|i| (0.3 * value(i)).to_le_bytes()).collect();
        data.extend(values);
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    [file, data].concat()
}
