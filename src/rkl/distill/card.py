"""The model card of a distilled student: what it was made of, what came out, how to use it."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkl.runs import Run
from rkl.text import markdown, markdown_code

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags: [distillation, rkl]
---
# {name}

A student that learned to imitate **{teacher}** by minimising the divergence {divergence},
D(teacher ‖ student) per token, with rkl {rkl}. It began as **{student}**.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path})
tokenizer = AutoTokenizer.from_pretrained({path})
```

## What came out
- {steps:,} steps, {tokens:,} tokens.{best}

How it was measured against its teacher on other text is in `evaluation.json`, once
`rkl evaluate` has been run on this folder.

## What it was made of
- Data: {data}, {rows:,} rows in {blocks:,} blocks; fingerprint {fingerprint}.
- Held out: {held}.
- Settings: {settings}.
- Versions: {versions}.
"""
_BEST = """
- Divergence on held-out text: {value}, the smallest of all
  evaluations, at step {best_step:,}, which is this model."""
_DIVERGED = """
- **The run ended early:** {diverged} This is the model of step {best_step:,}."""


def held_out_loss(result: Mapping[str, Any]) -> str:
    """The divergence on held-out text of the student that was kept, in words."""
    loss, infinite = result["held_out_loss"], result.get("held_out_infinite_tokens")
    if not infinite:
        return f"{loss:.4g} nats per token on held-out text"
    elsewhere = result.get("held_out_finite_loss")
    rest = "which are all" if elsewhere is None else f"{elsewhere:.4g} nats per token elsewhere"
    return f"infinite at {infinite:,.0f} held-out tokens, {rest}"


def model_card(run: Run) -> str:
    """The card of a finished run, as Markdown, out of what its ``run.json`` says."""
    record = run.record
    settings, data, result = dict(record["settings"]), record["data"], record["result"]
    origin = str(data["held_out"]["origin"])
    for key in ("teacher", "teacher_compression", "student", "data", "eval_data"):
        if os.path.isabs(path := settings.get(key) or ""):  # a card is read elsewhere
            settings[key] = Path(path).name
            origin = origin.replace(path, settings[key])
    teacher = settings["teacher"]
    if several := settings.get("teachers"):
        names = [text.partition("=")[::2] for text in several]
        settings["teachers"] = [f"{name}={Path(path).name}" for name, path in names]
        teacher = " and ".join(Path(path).name for _, path in names)
    if kind := settings.get("teacher_model_kind"):
        teacher = f"itself ({kind})"
    student = settings["student"] or settings["teacher"]
    without = f", without layers {settings['drop_layers']}" if settings["drop_layers"] else ""
    name = run.path.resolve().name
    given = {"seed": record["seed"]} | {key: it for key, it in settings.items() if it is not None}
    return _CARD.format(
        base=_quoted(student),  # a string of JSON is one of YAML too
        path=_quoted(name),  # and of Python
        name=markdown(name),
        student=markdown(student + without),
        best=_outcome(result),
        held=f"{data['held_out']['blocks']:,} blocks, {markdown(origin)}",
        settings=", ".join(f"{key} {markdown(value)}" for key, value in given.items()),
        versions=", ".join(f"{key} {markdown(it)}" for key, it in record["versions"].items()),
        rkl=markdown(record["versions"].get("rkl", "unknown")),
        divergence=markdown_code(settings["divergence"]),
        fingerprint=markdown_code(data["fingerprint"]),
        teacher=markdown(teacher),
        data=markdown(settings["data"]),
        **{key: data[key] for key in ("rows", "blocks")},
        **{key: result[key] for key in ("steps", "tokens")},
    )


def _outcome(result: Mapping[str, Any]) -> str:
    """The rule by which the model was chosen, and a warning if the run diverged."""
    words = ""
    if result["held_out_loss"] is not None:
        words = _BEST.format(value=held_out_loss(result), **result)
    if result.get("diverged"):
        words += _DIVERGED.format(**result)
    return words


def _quoted(value: str) -> str:
    """A string of JSON that opens no tag and ends no block of code."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[<>&`\x7f-\x9f\u2028\u2029]", lambda it: f"\\u{ord(it[0]):04x}", text)
