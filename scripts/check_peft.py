"""Checks this program against transformers, peft and bitsandbytes, in f32 on a CPU.

usage: check_peft.py adapter MODEL_DIR ADAPTER_DIR...    adapters loaded by peft: logits as `train-llama logits --quant none`
       check_peft.py merged MODEL_DIR ADAPTER_DIR...     `train-llama merge` in f32 against peft's merge_and_unload
       check_peft.py combined MODEL_DIR ADAPTER_DIR...   `merge --combine ties` and linear against peft's functions on the deltas
       check_peft.py quantized DIR...                    folders of `train-llama quantize` loaded by transformers: logits as ours
       check_peft.py folder DIR...                       Hugging Face folders: logits as ours, with --quant none
       check_peft.py golden MODEL_DIR OUT_DIR            makes tests/golden/peft_interop: adapters and logits of peft

The program is target/release/train-llama, or what NIBBLE names. Exit code 1 if logits differ by more than printed tolerances.
Needs: torch transformers peft bitsandbytes safetensors.
"""
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

PROGRAM = os.environ.get("NIBBLE", str(pathlib.Path(__file__).parent.parent / "target/release/train-llama"))
IDS = [1, 17, 300, 5, 42, 42, 7, 211, 99, 450, 3, 128, 256, 64, 32, 16]


def ours(*args):
    """Logits [T, vocab] that this program gives for IDS."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "logits.safetensors")
        ids = ",".join(map(str, IDS))
        subprocess.run([PROGRAM, "logits", *args, "--dtype", "f32", "--ids", ids, "--out", out], check=True, stderr=subprocess.DEVNULL)
        return load_file(out)["logits"][0]


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].float()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def report(name, found, expected, tolerance):
    worst = (found - expected).abs().max().item()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    ok = worst <= tolerance
    print(f"{'ok  ' if ok else 'FAIL'} {name}: largest difference {worst:.2e} (at most {tolerance:.0e}), "
          f"logits up to {expected.abs().max().item():.1f}, same best token {100 * same:.0f} %")
    return ok


def adapter(model, *folders):
    base = theirs(load(model))
    results = []
    for folder in folders:
        expected = theirs(PeftModel.from_pretrained(load(model), folder))
        effect = (expected - base).abs().max().item()
        results.append(report(f"{folder} (moves logits by up to {effect:.2f})", ours("--model", model, "--quant", "none", "--adapter", folder), expected, 1e-4))
    return results


def merged(model, *folders):
    base = theirs(load(model))
    results = []
    for folder in folders:
        expected = theirs(PeftModel.from_pretrained(load(model), folder).merge_and_unload())
        with tempfile.TemporaryDirectory() as place:
            out = os.path.join(place, "merged")
            subprocess.run([PROGRAM, "merge", "--model", model, "--adapter", folder, "--dtype", "f32", "--out", out], check=True, stderr=subprocess.DEVNULL)
            found = theirs(load(out))
        effect = (expected - base).abs().max().item()
        results.append(report(f"{folder} merged (moves logits by up to {effect:.2f})", found, expected, 1e-4))
    return results


def combined(model, *folders):
    from peft.utils.merge_utils import task_arithmetic, ties
    weights = torch.tensor([1.0, 0.5, -0.25, 2.0][: len(folders)])
    deltas = []
    for folder in folders:
        peft = PeftModel.from_pretrained(load(model), folder).base_model
        modules = [(name, module) for name, module in peft.model.named_modules() if hasattr(module, "get_delta_weight")]
        deltas.append({name: module.get_delta_weight("default").detach() for name, module in modules})
    results = []
    for rule, combine in (("linear", lambda tasks: task_arithmetic(tasks, weights)), ("ties", lambda tasks: ties(tasks, weights, 0.3))):
        with tempfile.TemporaryDirectory() as place:
            out = os.path.join(place, "merged")
            parts = [part for folder, weight in zip(folders, weights) for part in ("--adapter", f"{folder}:{weight}")]
            subprocess.run([PROGRAM, "merge", "--model", model, *parts, "--combine", rule, "--density", "0.3", "--dtype", "f32", "--max-shard", "200KiB", "--out", out], check=True, stderr=subprocess.DEVNULL)
            found = dict(load(out).named_parameters())
        worst, largest = 0.0, 0.0
        for name, base in load(model).named_parameters():
            module = name.removesuffix(".weight")
            tasks = [of.get(module) for of in deltas]
            expected = base + combine(tasks) if tasks[0] is not None else base
            worst = max(worst, (found[name] - expected).abs().max().item())
            largest = max(largest, (expected - base).abs().max().item())
        ok = worst <= 1e-6
        print(f"{'ok  ' if ok else 'FAIL'} {rule}, in shards: weights differ by at most {worst:.2e} (at most 1e-06), changes up to {largest:.2e}")
        results.append(ok)
    return results


def dequantized(model):
    """bitsandbytes' own dequantized values in f32 linears: its products on a CPU may round to bf16."""
    import bitsandbytes
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, dense)
    return torch.nn.Module.float(model)  # transformers refuses it for what was quantized


def quantized(*folders):
    results = []
    for folder in folders:
        # Loaded twice: on a CPU, bitsandbytes may rearrange the weights in the first forward pass.
        model, dense = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for _ in range(2))
        layers = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
        assert layers == 7 * model.config.num_hidden_layers, f"{layers} layers are in 4 bits"
        found = ours("--model", folder, "--quant", "none")  # as it is
        report(f"{folder} as transformers runs it, {model.dtype}", found, theirs(model), float("inf"))
        results.append(report(f"{folder}, values of bitsandbytes in f32", found, theirs(dequantized(dense)), 1e-3))
    return results


def folder(*folders):
    return [report(path, ours("--model", path, "--quant", "none"), theirs(load(path)), 1e-3) for path in folders]


# Name, and what differs from peft's defaults.
GOLDEN = {
    "dora": dict(r=2, lora_alpha=6, use_dora=True, target_modules=r"^(?!.*mlp).*layers\.[01]\..*_proj$|.*2\.mlp\.down_proj", rank_pattern={r"layers\.1\..*": 3}, alpha_pattern={"[qk]_proj": 5}),
    "rslora": dict(r=3, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "o_proj", "down_proj"]),
    "patterns": dict(r=2, lora_alpha=4, target_modules=r".*\.(k_proj|gate_proj)", rank_pattern={"gate_proj": 5}, alpha_pattern={"gate_proj": 20}),
}


def golden(model, out):
    tensors = {"ids": torch.tensor([IDS])}
    for name, settings in GOLDEN.items():
        torch.manual_seed(7)
        peft = get_peft_model(load(model), LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, value in peft.named_parameters():
            if "lora_B" in key:  # zero at first
                torch.nn.init.normal_(value, std=0.1)
        peft.save_pretrained(os.path.join(out, name))
        os.remove(os.path.join(out, name, "README.md"))
        tensors[f"logits.{name}"] = theirs(peft)[None].contiguous()
    save_file(tensors, os.path.join(out, "golden.safetensors"))
    tied(os.path.join(out, "tied"))
    return []


def loftq(weight, rank, iterations):
    """peft's loftq_init, which runs on a GPU alone, with its own decomposition and the nearest values of NF4."""
    from bitsandbytes.functional import get_4bit_type
    from peft.utils.loftq_utils import _low_rank_decomposition
    code = get_4bit_type("nf4", device="cpu")
    target = weight.clone()
    for _ in range(iterations):
        blocks = target.reshape(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True)
        nearest = ((blocks / scales)[..., None] - code).abs().argmin(-1)
        quantized = (code[nearest] * scales).reshape(target.shape)
        parts = _low_rank_decomposition(weight - quantized, rank)
        target = weight - parts["L"] @ parts["R"]
    return parts["R"].contiguous(), parts["L"].contiguous()


# Names of adapters of a tied model, and what they save whole.
TIED = {"embedding": ["embed_tokens"], "head": ["lm_head"], "both": ["embed_tokens", "lm_head"], "tokens": ["embed_tokens"]}


def tied(out):
    """A tiny tied model; adapters with tables of their own and their logits; and what peft's initialisations make of its weights."""
    torch.manual_seed(11)
    shape = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    base = os.path.join(out, "model")
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, initializer_range=0.3)).save_pretrained(base)
    ids = torch.tensor([[1, 17, 39, 5, 8, 8]])
    tensors = {"ids": ids}
    for name, whole in TIED.items():
        torch.manual_seed(12)
        model = load(base)
        if name == "tokens":
            model.resize_token_embeddings(43)
        settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=list(whole), ensure_weight_tying=name == "tokens")
        model = get_peft_model(model, settings)
        for _, value in model.named_parameters():
            if value.requires_grad:
                torch.nn.init.normal_(value, std=0.3)
        model.save_pretrained(os.path.join(out, name))
        os.remove(os.path.join(out, name, "README.md"))
        with torch.no_grad():
            tensors[f"logits.{name}"] = model.eval()(ids + (3 if name == "tokens" else 0) * (ids == 39)).logits.float().contiguous()
    targets = ["v_proj", "down_proj"]
    for init in ("pissa", "olora"):
        config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=targets, init_lora_weights=init)
        for name, value in get_peft_model(load(base), config).named_parameters():
            if ".lora_" in name:
                tensors[f"{init}.{name.replace('base_model.model.', '').replace('.default.weight', '')}"] = value.detach().contiguous()
    for name, value in load(base).named_parameters():
        if any(target in name for target in targets):
            name = name.removesuffix(".weight")
            tensors[f"loftq.{name}.lora_A"], tensors[f"loftq.{name}.lora_B"] = loftq(value.detach(), rank=3, iterations=2)
    save_file(tensors, os.path.join(out, "golden.safetensors"))


if __name__ == "__main__":
    command = {f.__name__: f for f in (adapter, merged, combined, quantized, folder, golden)}.get(sys.argv[1] if len(sys.argv) > 2 else "")
    if command is None:
        sys.exit(__doc__)
    sys.exit(0 if all(command(*sys.argv[2:])) else 1)
