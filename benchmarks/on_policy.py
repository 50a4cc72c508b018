"""Which mixture of data and own text, under which divergence, and when does it collapse?

A small teacher and a smaller student learn the text of Python's own documentation; the student is
then distilled with three shares of its own text, under two divergences, at two learning rates,
each with some seeds. Prints the tables of docs/on-policy.md:

    python benchmarks/on_policy.py --seeds 3 --steps 100
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import quick
import torch

import rkl
from rkl.distill import CollapseError, DistillSettings, distill, load_model, load_tokenizer
from rkl.distill.data import tokenize
from rkl.distill.evaluate import evaluate
from rkl.distill.heads import inference
from rkl.distill.rollouts import ModelWriter, ends_of
from rkl.distill.sampling import Sampling
from rkl.distill.scratch import Schooling, Shape, new_model, new_tokenizer, school
from rkl.runs import Run
from rkl.stats import Mean, mean

PROMPT, REPLY, BLOCK = 8, 32, 64  # tokens
FIGURES = "truncated", "repetition", "student_entropy", "teacher_entropy", "acceptance"


def prepare(folder: Path, schooling: int | None) -> None:
    """Fill a folder with train.jsonl, held-out.jsonl, a teacher and a student."""
    rows = [part for name in sorted(topics) for part in topics[name].split("\n\n")]
    rows = [{"text": row} for row in rows if len(row) > 80]
    train = rows[: -len(rows) // 10]
    for name, part in (("train", train), ("held-out", rows[len(train) :])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = new_tokenizer((row["text"] for row in rows), 512)
    blocks = tokenize(train, tokenizer, max_length=BLOCK)
    for name, shape, steps in (("teacher", Shape(4, 128), 500), ("student", Shape(2, 64), 100)):
        model = new_model(tokenizer, shape, seed=0)
        run = Run.create(folder / name, "studies", {}, seed=0)
        with run:
            lessons = Schooling(schooling or steps)
            school(model, tokenizer, blocks, lessons, run, seed=0, device="cpu")


def own_text(student, teacher, tokenizer, prompts: list[list[int]]) -> Mean:
    """Reverse KL on what a student writes, in nats per token, with its error over replies."""
    writer = ModelWriter(student, Sampling(REPLY), ends_of(student, tokenizer))
    values = []
    for prompt, reply in zip(prompts, writer.write(prompts, seed=0), strict=True):
        ids = torch.tensor([prompt + reply.tokens])
        logits = []
        for model in (teacher, student):
            with inference(model):
                logits.append(model(ids).logits[0, len(prompt) - 1 : -1])
        divergences = {"rkl": rkl.ReverseKL()}
        values.append(rkl.per_token(divergences, p=logits[0], q=logits[1])["rkl"].mean())
    return mean(torch.stack(values))


def one_run(folder: Path, divergence: str, lmbda: float, rate: float, seed: int, steps: int):
    """What a run ends in: divergences on held-out text and on own text, figures, a collapse."""
    out = folder / f"{divergence}-{lmbda}-{rate}-{seed}"
    settings = DistillSettings(
        teacher=str(folder / "teacher"),
        student=str(folder / "student"),
        data=str(folder / "train.jsonl"),
        eval_data=str(folder / "held-out.jsonl"),
        eval_split="train",
        eval_blocks=32,
        eval_every=steps,
        divergence=divergence,
        lmbda=lmbda,
        learning_rate=rate,
        max_length=BLOCK,
        prompt_tokens=PROMPT,
        max_completion_length=REPLY,
        max_steps=steps,
        packing=False,
        compiled=False,
        seed=seed,
        device="cpu",
    )
    collapse = ""
    try:
        distill(settings, out)
    except CollapseError as error:
        collapse = f"{error.reason.partition('(')[2].partition(':')[0]}, step {error.step}"
    tokenizer = load_tokenizer(out)
    student, teacher = load_model(out), load_model(folder / "teacher")
    lines = (folder / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    held = tokenize([json.loads(it) for it in lines], tokenizer, max_length=BLOCK, packing=False)
    some = [held[place] for place in range(0, len(held), max(1, len(held) // 64))][:64]
    measured = evaluate(student, teacher, some, tokenizer=tokenizer)["divergences"]
    prompts = [row["input_ids"][:PROMPT].tolist() for row in some]
    own = own_text(student, teacher, tokenizer, prompts)
    rows = [row for row in Run.open(out).metrics if "truncated" in row][-20:]
    figures = {name: sum(row[name] for row in rows) / len(rows) for name in FIGURES if rows}
    found = {name: measured[name]["value"] for name in ("forward-kl", "reverse-kl")}
    return {**found, "own": float(own.value), **figures}, collapse


def main() -> None:
    """Run all, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--schooling", type=int, help="steps of teacher and student; by default 500, 100"
    )
    parser.add_argument("--folder", type=Path)
    asked = quick.parse(parser, seeds=1, steps=4, schooling=4)
    torch.set_num_threads(1)
    folder = asked.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "student" / "config.json").exists():
        prepare(folder, asked.schooling)
    kinds = ("kl", 1e-3), ("reverse-kl", 1e-3), ("reverse-kl", 3e-2)
    cells = [(divergence, lmbda, rate) for divergence, rate in kinds for lmbda in (0.0, 0.5, 1.0)]
    names = ["forward-kl", "reverse-kl", "own", *FIGURES]
    print(f"| divergence | rate | lmbda | {' | '.join(names)} | collapsed |")
    print("|" + "---|" * (len(names) + 4))
    for divergence, lmbda, rate in cells:
        results = [
            one_run(folder, divergence, lmbda, rate, seed, asked.steps)
            for seed in range(asked.seeds)
        ]
        words = []
        for name in names:
            values = [found[name] for found, _ in results if name in found]
            if not values:
                words.append("")
                continue
            told = mean(torch.tensor(values))
            error = f" ± {float(told.error):.3f}" if len(values) > 1 else ""
            words.append(f"{float(told.value):.3f}{error}")
        collapses = [collapse for _, collapse in results if collapse]
        fired = f"{len(collapses)} of {len(results)} {'; '.join(collapses)}"
        print(f"| {divergence} | {rate:g} | {lmbda} | {' | '.join(words)} | {fired} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
