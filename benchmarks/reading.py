"""Time and memory of reading: from a file of 20 MB to blocks of tokens, against the tokenizer.

    python benchmarks/reading.py --out benchmarks/figures/reading-20mb.csv
    python benchmarks/reading.py --turns --out benchmarks/figures/chat-turns.csv

The floor is the tokenizer's batch call on the same texts, all at once, with its defaults. Time is
CPU time of the process, without threads of the tokenizer; floor and contender take turns, and a
ratio is the median over repetitions of the contender's time over the mean of the floors right
before and right after it. Contenders begin with the file; nothing is read from the cache of
tokens. Memory is the peak of the resident set over what was resident after import, with the
tokenizer at hand, in a process of its own. The text is what Python's standard library is made of,
its paragraphs in rows, or all of it as one text. `--turns` measures chats of 5 to 40 turns, each
a question and an answer, under a template that renders every turn alike.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

for variable, value in (
    *(("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1")),
    *(("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")),
):
    os.environ[variable] = value

import quick  # noqa: E402
from linear_head import _peak_resident  # noqa: E402

from rkl.distill import load_tokenizer  # noqa: E402
from rkl.distill.models.scratch import new_tokenizer  # noqa: E402
from rkl.distill.text.data import tokenize  # noqa: E402
from rkl.distill.text.sources import read_rows  # noqa: E402

KINDS = "text", "txt", "completion", "messages"
GOAL, ROOM = 1.3, 300e6
TURNS = 5, 10, 20, 40
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIELDS = ("kind", "size", "repetition", "cpu_s", "floor", "ratio", "load")


def paragraphs(size):
    """At least ``size`` characters of the standard library, in paragraphs."""
    found, total, sources = [], 0, sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    while total < size:
        for source in sources:
            text = source.read_text(encoding="utf-8", errors="ignore")
            parts = [part for part in text.split("\n\n") if len(part) > 80]
            found += parts
            total += sum(map(len, parts))
            if total >= size:
                break
    return found


def write_world(folder, size):
    parts = paragraphs(size)
    tokenizer = new_tokenizer(parts[: len(parts) // 20], 8000)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    write_rows(folder / "text.jsonl", [{"text": it} for it in parts])
    (folder / "txt.txt").write_text("\n\n".join(parts), encoding="utf-8")
    halves = [{"prompt": it[:60], "completion": it[60:]} for it in parts]
    write_rows(folder / "completion.jsonl", halves)
    write_rows(folder / "messages.jsonl", [chat(it[:60], it[60:]) for it in parts])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chat(*said):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": it} for i, it in enumerate(said)]}


def file_of(folder, kind):
    return folder / ("txt.txt" if kind == "txt" else f"{kind}.jsonl")


def read(folder, kind, tokenizer):
    return tokenize(read_rows(file_of(folder, kind)), tokenizer, max_length=512)


def texts_of(rows, tokenizer):
    """What the tokenizer is given of rows, as text."""
    if "text" in rows[0]:
        return [row["text"] for row in rows]
    if "prompt" in rows[0]:
        return [row["prompt"] + row["completion"] for row in rows]
    return [tokenizer.apply_chat_template(it["messages"], tokenize=False) for it in rows]


def timed(work, *given, **how):
    start = time.process_time()
    work(*given, **how)
    return time.process_time() - start


def repetitions(folder, kind, count):
    tokenizer = load_tokenizer(folder)
    texts = texts_of(read_rows(file_of(folder, kind)), tokenizer)
    floors = [timed(tokenizer, texts) for _ in range(2)][1:]
    for i in range(count):
        ours = timed(read, folder, kind, tokenizer)
        floors.append(timed(tokenizer, texts))
        floor = (floors[-2] + floors[-1]) / 2
        row = (kind, sum(map(len, texts)), i, ours, floor, ours / floor, os.getloadavg()[0])
        yield dict(zip(FIELDS, row, strict=True))


def memory(folder, kind):
    tokenizer = load_tokenizer(folder)
    with _peak_resident() as peak:
        read(folder, kind, tokenizer)
    return peak.megabytes * 2**20


def memory_elsewhere(folder, kind):
    command = [sys.executable, __file__, "--memory", str(folder), kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def turns(folder, count):
    """Milliseconds of a chat, by its number of turns."""
    tokenizer, parts = load_tokenizer(folder), [it[:300] for it in paragraphs(10**6)]
    for i in range(-1, count):
        for length in TURNS:
            said = [parts[(7 * i + j) % len(parts)] for j in range(400 * 2)]
            rows = [chat(*said[k : k + 2 * length]) for k in range(0, len(said), 2 * length)]
            texts = texts_of(rows, tokenizer)
            floor = timed(tokenizer, texts) / len(rows)
            ours = timed(tokenize, rows, tokenizer, max_length=10**6) / len(rows)
            row = (f"{length} turns", len(texts[0]), i, ours, floor, ours / floor)
            if i >= 0:  # once to warm up
                yield dict(zip(FIELDS, (*row, os.getloadavg()[0]), strict=True))


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kind", action="append", choices=KINDS)
    options.add_argument("--size", type=float, default=20e6, help="characters")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--turns", action="store_true")
    options.add_argument("--out")
    options.add_argument("--memory", nargs=2)
    chosen = quick.parse(options, size=2e5, repeats=1)
    warnings.simplefilter("ignore")
    os.environ["XDG_CACHE_HOME"] = os.devnull  # no cache of tokens
    if chosen.memory:
        print(memory(Path(chosen.memory[0]), chosen.memory[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, 10**6 if chosen.turns else chosen.size)
        if chosen.turns:
            rows = list(turns(folder, chosen.repeats))
        for kind in () if chosen.turns else chosen.kind or KINDS:
            found = list(repetitions(folder, kind, chosen.repeats))
            found += [{"kind": f"{kind}, bytes", "cpu_s": memory_elsewhere(folder, kind)}]
            rows += found
            told = statistics.median(it["ratio"] for it in found[:-1])
            print(f"{kind:12}{told:.2f} of {GOAL}; {found[-1]['cpu_s'] / 1e6:.0f} MB", flush=True)
    for length in dict.fromkeys(it["kind"] for it in rows) if chosen.turns else ():
        found = [it["cpu_s"] for it in rows if it["kind"] == length]
        per_turn = 1000 * statistics.median(found) / int(length.split()[0])
        print(f"{length:10}{1000 * statistics.median(found):8.2f} ms; {per_turn:.3f} a turn")
    if chosen.out:
        with open(chosen.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
