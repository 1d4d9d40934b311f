"""Times QLoRA steps of Unsloth and of this program on one GPU, one after the other: the same checkpoint, adapter and tokens.

usage: beside_unsloth.py [--layers N] [--folder DIR] [--steps N] [--rows NAME,...]

Makes a Llama of random weights in the 8B shape (or with fewer layers), an adapter whose A and B are random, and random tokens, and
trains each row of ROWS on its one batch. Prints tok/s (median), GPU memory in use by the driver, and loss and gradient norm, which
must differ by no more than 16-bit arithmetic makes them: exit code 1 if they do. For rows without options it also prints what the
first step is in f32.
The program is target/release/train-llama, or what NIBBLE names.
Needs: a GPU, 20 GB in --folder [default: /dev/shm/nibble-peers], torch transformers peft bitsandbytes unsloth.
"""
import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

# name: sequences, tokens of each, Unsloth's checkpointing, options of this program
ROWS = {
    "speed": (4, 2048, False, []),
    "one": (1, 2048, False, []),
    "one-30GiB": (1, 2048, False, ["--memory-budget", "30GiB"]),
    "8GiB": (4, 2048, True, ["--memory-budget", "8GiB"]),
    "6GiB": (4, 2048, True, ["--memory-budget", "6GiB", "--embedding-bits", "8"]),
    "one-small": (1, 2048, True, ["--recompute"]),
    "long": (1, 32768, True, ["--memory-budget", "12GiB"]),
}
RANK, LR, VOCAB = 16, 2e-4, 128256
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Relative differences of a loss, and of a gradient norm, that 16-bit arithmetic makes.
LOSS, NORM = 2e-3, 5e-3
WARM = 2
PROGRAM = os.environ.get("NIBBLE", str(pathlib.Path(__file__).resolve().parent.parent / "target/release/train-llama"))


def make(folder, layers):
    """The checkpoint, the adapter, and the batches of every row."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rope_theta=500000.0, rms_norm_eps=1e-5, max_position_embeddings=131072,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model", max_shard_size="4GB")
    # Unsloth wants a tokenizer; nothing is ever written in it.
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "model")
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    adapted.save_pretrained(folder / "adapter")
    for name, (sequences, tokens, *_) in ROWS.items():
        ids = torch.randint(3, VOCAB, (sequences, tokens)).tolist()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))


def theirs(folder, checkpointing, names, steps):
    """Unsloth's steps: a line of JSON for each row. One process is either with checkpointing or without."""
    import unsloth  # first: it changes the others
    import bitsandbytes
    import torch
    from safetensors.torch import load_file

    longest = max(ROWS[name][1] for name in names)
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder / "model"), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", target_modules=TARGETS, max_seq_length=longest,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )
    model.train()
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    start = load_file(folder / "adapter/adapter_model.safetensors")
    assert trained.keys() == start.keys(), "the adapter has other tensors than Unsloth's"
    for name in names:
        sequences, tokens, *_ = ROWS[name]
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(start[key])
        optimizer = bitsandbytes.optim.PagedAdamW32bit(trained.values(), lr=LR, weight_decay=0.0)
        ids = torch.tensor([json.loads(line)["input_ids"] for line in open(folder / f"{name}.jsonl")], device="cuda")
        torch.cuda.empty_cache()
        free, done = [torch.cuda.mem_get_info()[0]], threading.Event()

        def poll():
            while not done.wait(0.005):
                free[0] = min(free[0], torch.cuda.mem_get_info()[0])

        watch = threading.Thread(target=poll)
        watch.start()
        seconds, losses, norms = [], [], []
        for step in range(count(name, steps)):
            torch.cuda.synchronize()
            clock = time.perf_counter()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            if step < WARM:
                norms.append(torch.stack([p.grad.float().norm() for p in trained.values()]).norm().item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - clock)
            losses.append(loss.item())
        done.set()
        watch.join()
        del optimizer, loss
        driver = torch.cuda.mem_get_info()[1] - free[0]
        print("ROW " + json.dumps([name, sequences * tokens / median(seconds[WARM:]), driver, losses, norms]), flush=True)


def ours(folder, name, timed, options, warm=WARM):
    """This program's steps, in the same form."""
    sequences, tokens, *_ = ROWS[name]
    command = [
        PROGRAM, "bench-step", "--model", folder / "model", "--adapter-init", folder / "adapter", "--data", folder / f"{name}.jsonl",
        "--no-shuffle", "--batch-size", str(sequences), "--seq-len", str(tokens), "--lr", str(LR), "--max-grad-norm", "0",
        "--dropout", "0", "--warm", str(warm), "--timed", str(timed), "--json", *options,
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        sys.exit(f"{name}: {ran.stderr}")
    found = json.loads(ran.stdout)
    said = re.findall(r"^step .* loss (\S+)  gradient norm (\S+)", ran.stderr, re.MULTILINE)
    losses, norms = ([float(number) for number in numbers] for numbers in zip(*said))
    ready = re.search(r"^ready .*", ran.stderr, re.MULTILINE)
    dense = found["dequantized_layers"]
    print(f"{name}: kept {found['activations']}, {dense} layers dequantized, {ready and ready.group()}", file=sys.stderr)
    return name, found["tok_s"], found["driver"], losses, norms[: warm or 1]


def count(name, steps):
    """Steps of a row: long ones take seconds each."""
    sequences, tokens, *_ = ROWS[name]
    return steps if sequences * tokens <= 8192 else max(steps // 2, WARM + 1)


def median(values):
    return sorted(values)[len(values) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=pathlib.Path, default="/dev/shm/nibble-peers")
    parser.add_argument("--steps", type=int, default=10, help=f"of a row, {WARM} of them untimed; of long ones half as many")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS), help=" ".join(ROWS))
    parser.add_argument("--part", choices=["all", "make", "checkpointing", "no-checkpointing"], default="all", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder
    if args.part == "make":
        return make(folder, args.layers)
    if args.part != "all":
        checkpointing = args.part == "checkpointing"
        return theirs(folder, checkpointing, [name for name in args.rows if ROWS[name][2] == checkpointing], args.steps)

    # Each part in a process of its own: what it held is gone before the next begins.
    def part(name):
        options = ["--layers", str(args.layers), "--folder", folder, "--steps", str(args.steps), "--rows", ",".join(args.rows)]
        command = [sys.executable, __file__, "--part", name, *options]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return [json.loads(line[4:]) for line in ran.stdout.splitlines() if line.startswith("ROW ")]

    if not (folder / "made").exists():
        folder.mkdir(parents=True, exist_ok=True)
        part("make")
        (folder / "made").touch()
    peers = {}
    for checkpointing in sorted({ROWS[name][2] for name in args.rows}):
        peers |= {row[0]: row for row in part("checkpointing" if checkpointing else "no-checkpointing")}
    print("| row | Unsloth: tok/s | GiB | ours: tok/s | GiB | ratio | loss, first and last: theirs, ours | norm |")
    print("|---|---|---|---|---|---|---|---|")
    agree, exact = True, []
    for name in args.rows:
        *_, options = ROWS[name]
        _, their_speed, their_memory, *their = peers[name]
        _, speed, memory, *mine = ours(folder, name, count(name, args.steps) - WARM, options)
        losses, norms = zip(their, mine)
        apart = [max(abs(a - b) / abs(a) for a, b in zip(*pair)) for pair in (losses, norms)]
        agree &= apart[0] <= LOSS and apart[1] <= NORM
        ends = [" → ".join(f"{theirs[at]:.4f} {ours[at]:.4f}" for at in (0, -1)) for theirs, ours in (losses, norms)]
        print(
            f"| {name} | {their_speed:,.0f} | {their_memory / 2**30:.1f} | {speed:,.0f} | {memory / 2**30:.1f} | {speed / their_speed:.3f} "
            f"| {ends[0]} ({apart[0]:.1e} apart) | {ends[1]} ({apart[1]:.1e}) |",
            flush=True,
        )
        if not options:
            *_, [loss], [norm] = ours(folder, name, 1, ["--dtype", "f32", "--recompute"], warm=0)
            exact.append(f"{name}, first step in f32: loss {loss:.4f}, norm {norm:.4f}")
    print("\n".join(exact))
    print(f"losses within {LOSS:.0e} and norms within {NORM:.0e} of Unsloth's: {'yes' if agree else 'NO'}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
