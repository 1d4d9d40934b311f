"""Writes golden.json and the two tokenizers beside this file: conversations as transformers tokenizes them, with its own
masks of the assistant's words, and rows of every other form, both as TRL's trainer prepares them. Needs transformers,
tokenizers, torch, trl and datasets. The templates are those of models/tests/text_chat.json; transformers finds the assistant's
words by {% generation %}, which each gets around what an assistant's turn prints."""

import json
import tempfile
from pathlib import Path

import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, __version__

here = Path(__file__).parent
source = json.loads((here / "../../../models/tests/text_chat.json").read_text())
templates = {entry["name"]: entry["source"] for entry in source["templates"]}
# The one-line form that models carry; the other ends its generation prompt with a second line end.
templates["CHATML"] = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
corpus = (here / "../../../assets/default/eval.jsonl").read_text().splitlines()

SPECIAL = {
    "CHATML": ["<|im_start|>", "<|im_end|>"],
    "LLAMA2": ["<s>", "</s>"],
    "LLAMA3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "MISTRAL": ["<s>", "</s>", "[INST]", "[/INST]"],
    "ZEPHYR": ["<s>", "</s>"],
}
BOS = {"LLAMA2": "<s>", "LLAMA3": "<|begin_of_text|>", "MISTRAL": "<s>", "ZEPHYR": "<s>"}
EOS = {"CHATML": "<|im_end|>", "LLAMA3": "<|eot_id|>"}
# What an assistant's turn prints, and where in it the assistant's own part begins and ends.
OWN = {
    "CHATML": (
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\\n' }}",
    ),
    "LLAMA2": (
        "{{ ' ' + content.strip() + ' ' + eos_token }}",
        "{% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}",
    ),
    "LLAMA3": (
        "{{ content }}",
        "{% if message['role'] == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ content }}{% endif %}",
    ),
    "MISTRAL": (
        "{{ message['content'] + eos_token}}",
        "{% generation %}{{ message['content'] + eos_token}}{% endgeneration %}",
    ),
    "ZEPHYR": (
        "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}",
        "{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '' }}",
    ),
}
ask = lambda text: {"role": "user", "content": text}
say = lambda text: {"role": "assistant", "content": text}
CONVERSATIONS = [
    [ask("Hi <there> & 'you'"), say("Hello!")],
    [ask("On Saturday Lena handed Greta a blue cup at the river."), say("Lena, Greta;  blue\ncup é🙂"), ask("And?"), say("No 12345.")],
    [{"role": "system", "content": "Be brief."}, ask("One\n\ntwo?"), say("1, 2"), ask(" Bye "), say("Bye")],
]
# Rows that are no conversations. Prompts end where a token ends: TRL tokenizes a prompt and its completion as one text.
TEXTS = [{"text": "On Saturday Lena handed Greta a blue cup."}, {"text": "No\n\n12345 é🙂"}]
COMPLETIONS = [
    {"prompt": "Who had the cup?\n", "completion": "Greta"},
    {"prompt": "Where was Lena?", "completion": " At the river."},
]


def prepared(rows, tokenizer, **settings):
    """Token ids and labels of rows as TRL's trainer has them before training."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(output_dir=folder, max_length=None, report_to="none", use_cpu=True, bf16=False, **settings)
        tokenizer.pad_token = tokenizer.eos_token
        made = trl.SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        return [(row["input_ids"], row.get("labels", row["input_ids"])) for row in made.train_dataset]


def special(text):
    return AddedToken(text, special=True, normalized=False)


def byte_level(tokens):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([special(token) for token in tokens])
    return tokenizer


def sentencepiece(tokens):
    """As transformers converts Llama 2: a space before the text, ▁ for spaces, bytes for what is unknown."""
    escaped = [("▁" + line.replace(" ", "▁")) for line in corpus]
    raw = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    raw.train_from_iterator([piece for line in escaped for piece in line.replace("▁", " ▁").split()], trainer)
    learned = json.loads(raw.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>"] + tokens + bytes_ + [p for p in sorted(learned["vocab"], key=learned["vocab"].get)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([special(token) for token in ["<unk>"] + tokens])
    return tokenizer


cases = []
everything = sorted({token for tokens in SPECIAL.values() for token in tokens})
for kind, make in [("byte_level", byte_level), ("sentencepiece", sentencepiece)]:
    tokenizer = make(everything)
    (here / f"{kind}.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
    for name in SPECIAL:
        bos, eos = BOS.get(name), EOS.get(name, "</s>")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
        plain, marked = OWN[name]
        assert plain in templates[name], name
        template = templates[name].replace(plain, marked)
        kept = [c for c in CONVERSATIONS if name != "MISTRAL" or c[0]["role"] != "system"]
        fast.chat_template = template
        by_trl = prepared([{"messages": messages} for messages in kept], fast, assistant_only_loss=True)
        for number, messages in enumerate(CONVERSATIONS):
            if name == "MISTRAL" and messages[0]["role"] == "system":
                continue
            # The marks change no text.
            texts = [fast.apply_chat_template(messages, chat_template=t, tokenize=False) for t in (templates[name], template)]
            assert texts[0] == texts[1], (name, texts)
            found = fast.apply_chat_template(
                messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids = fast.apply_chat_template(messages, chat_template=templates[name], tokenize=True, return_dict=False)
            assert ids == found["input_ids"]
            labels = [id if own else -100 for id, own in zip(ids, found["assistant_masks"])]
            assert (ids, labels) == by_trl[kept.index(messages)], (kind, name, number)
            prompt = fast.apply_chat_template(
                messages[:-1], chat_template=templates[name], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert ids[: len(prompt)] == prompt, (kind, name, number)
            cases.append(
                {
                    "tokenizer": kind, "template": name, "bos": bos, "eos": eos, "conversation": number,
                    "ids": ids, "learned": found["assistant_masks"],
                }
            )
rows = []
for kind in ["byte_level", "sentencepiece"]:
    fast = PreTrainedTokenizerFast(tokenizer_file=str(here / f"{kind}.json"), eos_token="</s>")
    for forms in [TEXTS, COMPLETIONS]:
        for row, (ids, labels) in zip(forms, prepared(forms, fast)):
            rows.append({"tokenizer": kind, "eos": "</s>", "row": row, "ids": ids, "labels": labels})
about = f"transformers {__version__}, trl {trl.__version__}; see make.py"
lines = ",\n".join(json.dumps(case) for case in cases)
conversations = json.dumps(CONVERSATIONS, ensure_ascii=False)
sources = json.dumps({name: templates[name] for name in SPECIAL})
head = f'{{"about": "{about}", "conversations": {conversations}, "templates": {sources}'
others = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
(here / "golden.json").write_text(f'{head}, "cases": [\n{lines}\n], "rows": [\n{others}\n]}}\n')
