"""The folder in which malformed inputs are tried: models, runs and files, sound and spoilt."""

import json
import shutil
from pathlib import Path

import numpy as np
import xarray as xr
from distill import material

from rkl.bayes.run import estimate
from rkl.bayes.settings import EstimateSettings
from rkl.distill import cache_teacher, distill, evaluate_run, load_model, load_tokenizer
from rkl.distill.evaluate import EvaluateSettings
from rkl.distill.text.data import tokenize
from rkl.distill.text.sources import read_rows
from rkl.runs import Run

PROMPTS = [{"prompt": "def", "completion": " a function"}] * 3
FILES = {
    "broken.jsonl": '{"text": "a"}\n{"text": \n',
    "numbers.jsonl": '{"text": "a"}\n3\n',
    "columns.jsonl": '{"body": "a"}\n',
    "mixed.jsonl": '{"text": "a"}\n{"prompt": "a", "completion": "b"}\n',
    "not-text.jsonl": '{"text": 3}\n',
    "null.jsonl": '{"text": null}\n',
    "halves.jsonl": '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
    "chat.jsonl": '{"messages": [{"role": "user", "content": "a"}]}\n',
    "no-role.jsonl": '{"messages": [{"content": "a"}]}\n',
    "no-messages.jsonl": '{"messages": []}\n',
    "tools.jsonl": '{"messages": [{"role": "user", "content": "a"}], "tools": [1]}\n',
    "deep.jsonl": '{"text": ' + "[" * 100_000 + "\n",
    "empty.jsonl": "",
    "blank.jsonl": "\n\n\n",
    "blank.txt": " \n\n",
    "rows.json": '[{"text": "a"}]',
    "table.csv": "text\na\n",
    "letter.txt": "x",
    "held.txt": "What no student of the manual has met before. " * 20,
    "no-mapping.yaml": "- a\n- b\n",
    "broken.yaml": "teacher: [",
    "object.yaml": "teacher: !!python/object/apply:os.getcwd []\n",
    "unknown.yaml": "learnin_rate: 1\n",
    "typed.yaml": "max_steps: many\n",
    "broken-config.json": "{",
    "no-model.json": '{"model_type": "unheard-of"}',
    "settings.yaml": "max_steps: 2\n",
    "prompts.jsonl": "".join(json.dumps(row) + "\n" for row in PROMPTS),
    "first.jsonl": '{"prompt": "p", "text": "first"}\n',
    "second.jsonl": '{"prompt": "p", "text": "second"}\n',
    "torn.jsonl": '{"step": 1}\n{"step": \n{"step": 3}\n',
}
RECORDS = {  # what run.json of a spoilt run holds
    "torn": '{"format": 1, "kind": "dist',
    "foreign": '{"name": "something else"}',
    "list": "[]",
    "later": '{"format": 99, "kind": "distill", "settings": {}, "seed": 0}',
    "worded": '{"format": "1", "kind": "distill", "settings": {}, "seed": 0}',
    "astray": '{"format": 1, "kind": "../distill", "settings": {}, "seed": 0}',
    "numbered": '{"format": 1, "kind": 3, "settings": {}, "seed": 0}',
    "unheard": '{"format": 1, "kind": "unheard_of", "settings": {}, "seed": 0}',
    "verbless": '{"format": 1, "kind": "report", "settings": {}, "seed": 0}',
    "unlisted": '{"format": 1, "kind": "distill", "settings": [], "seed": 0}',
}


def built(folder: Path) -> Path:
    """Fill a folder and return it."""
    material.write(folder)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "déjà"}\n'.encode("latin-1"))
    (folder / "garbage.gguf").write_bytes(b"no model")
    _spoil_models(folder)
    _make_runs(folder)
    _make_caches(folder)
    _make_posteriors(folder)
    _make_features(folder)
    return folder


def _spoil_models(folder: Path) -> None:
    other = material.model(1, 8, seed=3, vocab_size=7)
    other.save_pretrained(folder / "narrow")
    material.tokenizer().save_pretrained(folder / "narrow")
    shutil.copytree(folder / "student", folder / "torn-weights")
    weights = folder / "torn-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    shutil.copytree(folder / "student", folder / "torn-config")
    (folder / "torn-config" / "config.json").write_text("{")
    (folder / "nothing").mkdir()


def _make_runs(folder: Path) -> None:
    for name, text in RECORDS.items():
        (folder / f"run-{name}").mkdir()
        (folder / f"run-{name}" / "run.json").write_text(text)
    Run.create(folder / "begun", "distill", {"teacher": str(folder / "teacher")}, seed=0)
    Run.create(folder / "other", "demos.distill", {}, seed=0)
    distill(material.settings(folder, max_steps=1, eval_blocks=1), folder / "run")
    settings = EvaluateSettings(
        str(folder / "held.txt"), max_length=16, max_blocks=2, prompts=0, device="cpu"
    )
    evaluate_run(folder / "run", settings)
    shutil.copytree(folder / "run", folder / "torn-evaluation")
    (folder / "torn-evaluation" / "evaluation.json").write_text('{"perplexity": ')
    shutil.copytree(folder / "run", folder / "torn-metrics")
    (folder / "torn-metrics" / "metrics.jsonl").write_text('{"step": \n{"step": 2}\n')


def _make_caches(folder: Path) -> None:
    rows = tokenize(
        read_rows(folder / "rows.jsonl")[:2], load_tokenizer(folder / "teacher"), max_length=16
    )
    cache_teacher(load_model(folder / "teacher"), rows, folder / "cache")
    for name, file, content in (
        ("torn-cache", "cache.json", b'{"format": 1, "teach'),
        ("later-cache", "cache.json", b'{"format": 99}'),
        ("list-cache", "cache.json", b"[]"),
        ("old-cache", "cache.json", b'{"format": 1}'),
        ("hollow-cache", "index.json", b'{"format": 2}'),
        ("torn-head", "head.safetensors", b"torn"),
        ("torn-hidden", "shard-00000.safetensors", b"torn"),
    ):
        shutil.copytree(folder / "cache", folder / name)
        (folder / name / file).write_bytes(content)
    shutil.copytree(folder / "cache", folder / "lost-hidden")
    (folder / "lost-hidden" / "shard-00000.safetensors").unlink()
    shutil.copytree(folder / "cache", folder / "unfinished-cache")
    (folder / "unfinished-cache" / "index.json").unlink()


def _make_posteriors(folder: Path) -> None:
    generator = np.random.default_rng(0)
    mu, sigma = generator.normal(size=(2, 40)), np.exp(generator.normal(size=(2, 40)))
    for name, variables in (
        ("posterior", {"mu": mu, "sigma": sigma}),
        ("nan", {"mu": np.where(mu == mu.max(), np.nan, mu), "sigma": sigma}),
        ("zero", {"mu": mu, "sigma": np.where(sigma == sigma.min(), 0, sigma)}),
        ("three", {"mu": mu[:1, :3], "sigma": sigma[:1, :3]}),
    ):
        arrays = {key: (("chain", "draw"), x) for key, x in variables.items()}
        path = folder / f"{name}.nc"
        xr.Dataset(arrays).to_netcdf(path, engine="h5netcdf", group="posterior")
    flat = xr.Dataset({"temperature": (("lat", "lon"), mu)})
    flat.to_netcdf(folder / "flat.nc", engine="h5netcdf")
    (folder / "torn.nc").write_bytes((folder / "posterior.nc").read_bytes()[:1000])
    (folder / "foreign.nc").write_text("no NetCDF")
    (folder / "empty.nc").touch()
    (folder / "torn.npy").write_bytes(b"\x93NUMPY")
    _make_estimates(folder)


def _make_estimates(folder: Path) -> None:
    settings = EstimateSettings(folder / "posterior.nc", "normal(loc=mu, scale=sigma)")
    estimate(settings, folder / "estimated")
    shutil.copytree(folder / "estimated", folder / "estimated-too")
    shutil.copytree(folder / "estimated", folder / "unestimated")
    (folder / "unestimated" / "estimate.json").unlink()
    shutil.copytree(folder / "estimated", folder / "torn-estimate")
    (folder / "torn-estimate" / "estimate.json").write_text('{"estimate": ')


def _make_features(folder: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "real": draw.normal(size=(60, 4)),
        "fake": draw.normal(size=(50, 4)),
        "narrow": draw.normal(size=(50, 3)),
        "vector": np.ones(9),
        "nan": np.full((60, 4), np.nan),
        "complex": np.ones((60, 4), complex),
        "objects": np.array([{}, []], dtype=object),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
