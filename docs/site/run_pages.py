"""The files of a run: a small run of each kind is made, and what it left is listed."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from reference_pages import code, table
from safetensors import safe_open

from rkl import cli

KINDS = {
    "rkl distill": (
        "distill --teacher teacher --student student --data text.txt --max-steps 2 "
        "--max-length 16 --batch-size 2 --eval-blocks 2 --device cpu --no-compiled"
    ),
    "rkl fit --data": "fit --data rows.npy --steps 4 --flow coupling(transforms=2,hidden=(8,))",
    "rkl fit --target": "fit --target mog4() --steps 4 --divergence reverse-kl",
    "rkl estimate": "estimate draws.npz --family normal(loc=mu,scale=sigma) --losses kl",
}


def make_inputs(folder: Path) -> None:
    """Rows, draws, and two language models that have learnt nothing."""
    from rkl.distill import Shape, new_model, new_tokenizer

    random = np.random.default_rng(0)
    np.save(folder / "rows.npy", random.normal(size=(200, 2)))
    mu, sigma = random.normal(size=(4, 50)), np.exp(random.normal(size=(4, 50)) / 4)
    np.savez(folder / "draws.npz", mu=mu, sigma=sigma)
    text = "\n\n".join(f"Line {i}: {i} and {i + 1} are {2 * i + 1}." for i in range(300))
    (folder / "text.txt").write_text(text, "utf-8")
    tokenizer = new_tokenizer([text], 300)
    for seed, (name, layers) in enumerate({"teacher": 2, "student": 1}.items()):
        new_model(tokenizer, Shape(layers, 32), seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def contents(path: Path) -> str:
    """The keys of a record, the columns of a log, the number of tensors of a file of weights."""
    if path.suffix == ".json":
        record = json.loads(path.read_text("utf-8"))
        return ", ".join(map(code, record)) if isinstance(record, dict) else ""
    if path.suffix == ".jsonl":
        rows = map(json.loads, path.read_text("utf-8").splitlines())
        return "a line each: " + ", ".join(
            map(code, dict.fromkeys(key for row in rows for key in row))
        )
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as weights:
            return f"{len(list(weights.keys()))} tensors"
    return ""


def rows_of(run: Path) -> list[list[str]]:
    """A row for each file of a run, and one for all files of its checkpoints."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name[0] != ".")
    rows, saved = [], {}
    for path in files:
        name = path.relative_to(run).as_posix()
        if name.startswith("checkpoints/"):
            saved[code(path.name)] = None
        else:
            by_others = name.startswith("tokenizer") or name.endswith("config.json")
            rows.append([code(name), "" if by_others else contents(path)])
    return rows + ([[code("checkpoints/"), f"in each: {', '.join(saved)}"]] if saved else [])


def write_runs(folder: Path, write: Callable[[Path, str], None]) -> None:
    """Make a run of each kind, and write the page of their files."""
    parts = [
        "# Files of a run\n\nA run is a folder. Here are the files that a small run of each kind "
        "left, and what is in them; `rkl.load(RUN)` returns the model or the "
        "estimate, `--verify` compares every file with its digest. [Files](../docs/files.md) says "
        "what is compared when.\n"
    ]
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        log = io.StringIO()
        make_inputs(Path.cwd())
        for number, (title, words) in enumerate(KINDS.items()):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(log):
                status = cli.main([*words.split(), "--out", f"run{number}"])
            if status:
                raise RuntimeError(f"rkl {words} ended with {status}: {log.getvalue()}")
            rows = rows_of(Path(f"run{number}"))
            parts.append(f"## {title}\n\n{table(['file', 'holds'], rows)}\n")
    write(folder / "runs.md", "\n".join(parts))
