"""The model card of a distilled student: what it was made of, what came out, how to use it."""

import json
from typing import Any

from rkl.runs import Run

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
tags: [distillation, rkl]
---
# {name}

A student that learned to imitate **{teacher}** by minimising the divergence `{divergence}`,
D(teacher ‖ student) per token, with rkl {version}. It began as **{student}**.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path})
tokenizer = AutoTokenizer.from_pretrained({path})
```

## What came out
{figures}

How it was measured against its teacher on other text is in `evaluation.json`, once
`rkl evaluate` has been run on this folder.

## What it was made of
- Data: {data}, {rows:,} rows in {blocks:,} blocks, {tokens:,} tokens; fingerprint `{fingerprint}`.
- Held out: {held_blocks:,} blocks, {origin}.

The settings:

| setting | value |
|---|---|
{settings}

Versions: {versions}.
"""


def model_card(run: Run) -> str:
    """The card of a finished run, as Markdown, out of what its ``run.json`` says."""
    record = run.record
    settings, data = record["settings"], record["data"]
    student = settings["student"] or settings["teacher"]
    without = f", without layers {settings['drop_layers']}" if settings["drop_layers"] else ""
    name = run.path.resolve().name
    return _CARD.format(
        base=_quoted(student),
        name=name,
        teacher=settings["teacher"],
        divergence=settings["divergence"],
        version=record["versions"].get("rkl", "unknown"),
        student=student + without,
        path=_quoted(name),
        figures=_figures(record["result"]),
        data=settings["data"],
        rows=data["rows"],
        blocks=data["blocks"],
        tokens=data["tokens"],
        fingerprint=data["fingerprint"],
        held_blocks=data["held_out"]["blocks"],
        origin=data["held_out"]["origin"],
        settings=_table({"seed": record["seed"]} | settings),
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    )


def _figures(result: dict[str, Any]) -> str:
    lines = [f"- {result['steps']:,} steps, {result['tokens']:,} tokens."]
    if result["held_out_loss"] is not None:
        lines.append(
            f"- Divergence on held-out text: {result['held_out_loss']:.4g} nats per token, the "
            f"smallest of all evaluations, at step {result['best_step']:,}, which is this model."
        )
    return "\n".join(lines)


def _table(settings: dict[str, Any]) -> str:
    """Settings as rows of a table, those apart that are not set; a bar would end the cell."""
    given = {name: value for name, value in settings.items() if value is not None}
    cells = {name: str(value).replace("|", "\\|") for name, value in given.items()}
    return "\n".join(f"| {name} | {value} |" for name, value in cells.items())


def _quoted(text: str) -> str:
    """A string of JSON, which is one of YAML and of Python too."""
    return json.dumps(text, ensure_ascii=False)
