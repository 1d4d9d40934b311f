"""Checks GGUF files of this program in llama.cpp: logits, and that it generates.

usage: check_llama_cpp.py MODEL_DIR ADAPTER_DIR      model with tokenizer, and an adapter for it (not a DoRA, no tables of its own)

Each type of `export-gguf` against this program on the same file, and `export-gguf --lora` beside the base against the adapter.
llama.cpp keeps keys and values in f16 and rounds activations for products with quantized weights, so that logits differ. The
program is target/release/train-llama, or what NIBBLE names. Exit code 1 if they differ by more than the printed tolerances.
Needs: llama-cpp-python safetensors numpy.
"""
import os
import pathlib
import subprocess
import sys
import tempfile

import llama_cpp
import numpy
from safetensors.numpy import load_file

PROGRAM = os.environ.get("NIBBLE", str(pathlib.Path(__file__).parent.parent / "target/release/train-llama"))
IDS = [1, 17, 30, 5, 42, 42, 7, 111, 99]
# Share of the largest logit.
TOLERANCE = {"f32": 5e-3, "f16": 5e-3, "bf16": 2e-2, "q8_0": 5e-2, "q6_k": 5e-2, "q5_0": 5e-2, "q4_k": 5e-2, "q4_0": 5e-2}


def run(*args):
    subprocess.run([PROGRAM, *args], check=True, stderr=subprocess.DEVNULL)


def ours(place, *args):
    out = os.path.join(place, "logits.safetensors")
    run("logits", *args, "--quant", "none", "--dtype", "f32", "--ids", ",".join(map(str, IDS)), "--out", out)
    return load_file(out)["logits"][0]


def theirs(path, **options):
    model = llama_cpp.Llama(path, logits_all=True, verbose=False, n_ctx=64, **options)
    model.eval(IDS)
    logits = numpy.array(model.scores[: len(IDS)])
    return logits, model("The ", max_tokens=5)["choices"][0]["text"]


def report(name, found, expected, share, text):
    worst, largest = abs(found - expected).max(), abs(expected).max()
    ok = worst <= share * largest
    print(f"{'ok  ' if ok else 'FAIL'} {name}: largest difference {worst:.2e} (at most {share * largest:.0e}), logits up to {largest:.1f}, writes {text!r}")
    return ok


def main(model, adapter):
    with tempfile.TemporaryDirectory() as place:
        results = []
        for kind, share in TOLERANCE.items():
            path = os.path.join(place, f"{kind}.gguf")
            run("export-gguf", "--model", model, "--adapter", adapter, "--type", kind, "--out", path)
            logits, text = theirs(path)
            results.append(report(kind, logits, ours(place, "--model", path), share, text))
        base, lora = os.path.join(place, "base.gguf"), os.path.join(place, "lora.gguf")
        run("export-gguf", "--model", model, "--type", "f32", "--out", base)
        run("export-gguf", "--model", model, "--adapter", adapter, "--lora", "--type", "f32", "--out", lora)
        logits, text = theirs(base, lora_path=lora)
        results.append(report("lora beside the base", logits, ours(place, "--model", model, "--adapter", adapter), 5e-3, text))
        return all(results)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(0 if main(*sys.argv[1:]) else 1)
