"""Replies of a student to prompts from held-out rows, sampled once per seed."""

import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rkl import checks
from rkl.checks import warn
from rkl.distill.limits import check_count, check_counts, context_of, template_variables
from rkl.distill.models.heads import inference
from rkl.distill.models.loading import OF_MODEL, load_model, load_tokenizer
from rkl.distill.progress import quiet
from rkl.distill.text.chats import ChatTemplate, NothingToTrainOnError, text_of
from rkl.distill.text.data import LeftOut, holds_chats, prompt_text
from rkl.distill.text.encoding import encode
from rkl.distill.text.sources import TOOLS, Row, Rows, kind_of, read_rows
from rkl.distill.writing.rollouts import (
    check_room,
    ends_with_turn,
    generation_config,
    replies_of,
)
from rkl.distill.writing.sampling import Sampling
from rkl.importing import names_in
from rkl.metrics.text import distinct_n, distinct_n_together, rouge_l, self_bleu, words
from rkl.randomness import random_numbers
from rkl.runs import REPLIES, Run, check_out_file, write_atomic
from rkl.stats import Mean, clustered_mean, mean

SHORTEST = 2  # tokens of a text that gives a prompt and something to go on with


class Prompt(NamedTuple):
    """A prompt as tokens and as text, and the reply that the data has."""

    tokens: list[int]
    text: str
    reference: str


@dataclass(frozen=True)
class Generation:
    """One reply: what it was drawn with, what it answers, what it says, how long it is."""

    seed: int
    prompt: str
    reference: str
    text: str
    tokens: int


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of ``rkl generate`` for a distilled student.

    Args:
        data: The text that gives the prompts: a file (.jsonl, .json, .csv, .parquet, .txt), a
            folder of datasets' save_to_disk, or the name of a data set on the Hub.
        split: Which split of --data is read, where it has several.
        prompts: Number of prompts, at most, spread evenly over the rows.
        prompt_tokens: Length of a prompt in tokens, where the rows are plain text.
        seeds: Replies to each prompt, drawn under --seed and the seeds that follow it.
        max_new_tokens: Longest reply, in tokens.
        temperature: What the logits are divided by; 0 takes the likeliest token.
        top_p: Probability mass of the likeliest tokens that a reply is drawn from, above 0.
        batch_size: Prompts run together, which decides the memory needed.
        out: The file of JSON lines to write; by default RUN/replies.jsonl.
        seed: Of the first reply to each prompt.
        device: Such as "cpu" or "cuda:1"; by default a GPU if there is one.
    """

    data: str
    split: str = "test"
    prompts: int = 16
    prompt_tokens: int = 32
    seeds: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 16
    out: str | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        check_counts(self, "prompts", "prompt_tokens", "seeds", "batch_size")
        checks.device(self.device)
        sampling_of(self)


@quiet()
def generate_run(
    path: str | os.PathLike, settings: GenerateSettings, *, overwrite: bool = False
) -> Path:
    """Let the student of a run reply to prompts out of some data.

    Args:
        path: The folder of the run.
        settings: What to reply to, and how.
        overwrite: Replaces a file of others at ``settings.out``.

    Returns:
        The file of JSON lines with the replies, each with its seed, prompt and reference.

    Raises:
        FileExistsError: There is such a file, or it is one of a run.
    """
    run = finished(path)
    out = Path(settings.out or Path(path, REPLIES))
    how: Any = {"inputs": {"data": settings.data}, "own": REPLIES}
    check_out_file(out, overwrite=overwrite, **how)
    rows = read_rows(settings.data, split=settings.split)
    tokenizer, student = load_tokenizer(run.path), load_model(run.path)
    prompts, left_out = choose_prompts(
        rows,
        tokenizer,
        student,
        settings,
        prompt_tokens=settings.prompt_tokens,
        chat_template_kwargs=template_variables(run.settings.get("chat_template_kwargs")),
    )
    if not prompts:
        raise ValueError(
            f"data has no prompt that can be replied to with max_new_tokens="
            f"{settings.max_new_tokens} in a context of {context_of(student)} tokens: {left_out}."
        )
    if left_out:
        warn(f"Some rows give no prompt: {left_out}.")
    cast(nn.Module, student).to(checks.device(settings.device))
    if settings.out is None:
        run.record_files([out.name])
    save(out, reply_to(prompts, student, tokenizer, settings, batch_size=settings.batch_size))
    if settings.out is None:
        run.measure_files([out.name])
    return out


def sampling_of(settings: Any) -> Sampling:
    """The sampling that a command's settings describe, or an error if it is contradictory."""
    return Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)


def choose_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    settings: Any,
    *,
    prompt_tokens: int = 32,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Prompt], str]:
    """The prompts that the settings of a verb want, and which rows give none, in words.

    A row that gives no prompt, or one that the model's context has no room for, is passed over
    for the next. Chats are rendered with ``chat_template_kwargs``, as the student was trained.
    """
    room, left_out = context_of(model) - settings.max_new_tokens, LeftOut(read_rows(rows))
    prompts = prompts_of(
        rows,
        tokenizer,
        count=settings.prompts,
        prompt_tokens=prompt_tokens,
        reply_tokens=settings.max_new_tokens,
        room=room,
        left_out=left_out,
        chat_template_kwargs=chat_template_kwargs,
    )
    return prompts, str(left_out)


def reply_to(
    prompts: Sequence[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Any,
    *,
    seeds: Sequence[int] | None = None,
    batch_size: int = 16,
) -> list[Generation]:
    """Replies of a model to prompts, once for each seed in a command's settings."""
    every = range(settings.seed, settings.seed + settings.seeds)
    return generate(
        model,
        tokenizer,
        prompts,
        seeds=every if seeds is None else seeds,
        sampling=sampling_of(settings),
        batch_size=batch_size,
    )


def finished(path: str | os.PathLike) -> Run:
    """The run in a folder that must hold its student."""
    run = Run.open(path)
    if not (run.path / "config.json").exists():
        names = "divergence", "on_policy_divergence", "token_weight"
        imported = names_in(*(run.settings.get(name) for name in names))
        own = "".join(f" --allow {it}" for it in imported)
        raise FileNotFoundError(
            f"path: {path} is not finished, and holds no student yet. Go on with: "
            f"rkl distill --out {shlex.quote(str(path))} --resume{own}"
        )
    run.check_files(*OF_MODEL)
    return run


def prompts_of(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 16,
    prompt_tokens: int = 32,
    reply_tokens: int = 64,
    room: float = math.inf,
    left_out: LeftOut | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Prompts from rows, spread evenly over them, each with what the data says next.

    A row with a prompt gives that prompt and its completion; a chat, all before the assistant's
    last turn, and that turn. Plain text is cut into windows: ``prompt_tokens`` to begin with and
    up to ``reply_tokens`` to go on; of a text shorter than that, half.

    Args:
        rows: What :func:`rkl.distill.text.sources.read_rows` gave.
        tokenizer: The student's.
        count: How many prompts at most.
        prompt_tokens: Length of a prompt taken from plain text.
        reply_tokens: Length of the reference taken from plain text.
        room: Longest prompt, in tokens; longer ones are passed over.
        left_out: Counts the rows passed over; without it the first of them is an error.
        chat_template_kwargs: What else the chat template is called with.
    """
    check_count("count", count)
    check_count("prompt_tokens", prompt_tokens)
    check_count("reply_tokens", reply_tokens)
    if not len(rows):
        raise ValueError("data has no rows.")
    rows = read_rows(rows)
    chosen: dict[int, Prompt] = {}
    if kind_of(rows[0], rows.place(0)) == "text":
        found = list(_windows(rows, tokenizer, prompt_tokens, prompt_tokens + reply_tokens))
        for index in _spread_first(len(found), count):
            prompt = _continued(found[index], tokenizer, prompt_tokens)
            if len(chosen) < count and len(prompt.tokens) <= room:
                chosen[index] = prompt
        if not found:
            raise ValueError(
                f"data has no text of {SHORTEST} tokens or more to begin a reply with."
            )
        if not chosen:
            raise ValueError(
                f"prompt_tokens={prompt_tokens} and a reply of {reply_tokens} tokens are more "
                "than the model's context."
            )
    else:
        variables = chat_template_kwargs or {}
        template = ChatTemplate(tokenizer, variables) if holds_chats(rows) else None
        for index in _spread_first(len(rows), count):
            if len(chosen) == count:
                break
            try:
                chosen[index] = _answered(rows, index, tokenizer, template, room)
            except ValueError as error:
                if left_out is None:
                    raise
                left_out.add(index, str(error).removeprefix(f"{rows.place(index)}: ").rstrip("."))
    return [chosen[index] for index in sorted(chosen)]


def _spread_first(items: int, count: int) -> list[int]:
    """The indices of so many items: first some evenly spaced, then all others in their order."""
    first = dict.fromkeys(index * items // count for index in range(min(count, items)))
    return list(range(items)) if count >= items else list(first | dict.fromkeys(range(items)))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    seeds: Iterable[int],
    sampling: Sampling | None = None,
    batch_size: int = 16,
) -> list[Generation]:
    """One reply to every prompt under every seed, seed by seed.

    Nothing but ``sampling`` shapes the distribution: what the model's own generation settings
    say of penalties and top-k does not apply. The global random state is put back afterwards.
    The same seed, prompts and batch size on the same machine give the same replies.

    Args:
        model: The student, in whatever mode; it is left in it.
        tokenizer: Its tokenizer.
        prompts: What to reply to.
        seeds: What the random numbers start from, one set of replies each.
        sampling: How tokens are drawn.
        batch_size: How many prompts are padded, on the left, and run together.
    """
    sampling = sampling or Sampling()
    check_room([prompt.tokens for prompt in prompts], sampling, context_of(model))
    config = generation_config(sampling, ends_with_turn(model, tokenizer))
    replies = []
    for seed in seeds:
        with random_numbers(seed), inference(model):
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                written = replies_of(model, [prompt.tokens for prompt in batch], config)
                for prompt, reply in zip(batch, written, strict=True):
                    ids = reply.tokens[: len(reply.tokens) - reply.ended]
                    text = str(tokenizer.decode(ids, skip_special_tokens=True))
                    replies.append(Generation(seed, prompt.text, prompt.reference, text, len(ids)))
    return replies


def save(path: str | os.PathLike, generations: Iterable[Generation]) -> None:
    """Write replies as JSON lines, atomically."""
    lines = (json.dumps(asdict(reply), ensure_ascii=False) for reply in generations)
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def measure(generations: Sequence[Generation]) -> dict[str, Mean]:
    """ROUGE-L, Distinct-n within and across replies, Self-BLEU and length, with errors.

    What a reply has by itself (ROUGE-L, Distinct-n within it, length in tokens) is averaged
    over replies; its error takes the prompts, not the seeds, as independent. What only a set of
    replies has (Distinct-n across them, Self-BLEU) is averaged over seeds, and one seed leaves
    its error unknown: nan. Replies of fewer than n words do not count in Distinct-n within, and
    those whose reference has no word, such as a tool call, not in ROUGE-L.
    """
    texts = [reply.text for reply in generations]
    references = [words(reply.reference) for reply in generations]
    wordless = torch.tensor([not reference for reference in references], dtype=torch.bool)
    overlap = rouge_l(texts, references).masked_fill(wordless, math.nan)
    lengths = torch.tensor([float(reply.tokens) for reply in generations])
    measured = {
        "rouge_l": _over_prompts(generations, overlap),
        "length": _over_prompts(generations, lengths),
    }
    by_seed: dict[int, list[str]] = {}
    for reply in generations:
        by_seed.setdefault(reply.seed, []).append(reply.text)
    for n in (1, 2, 3):
        measured[f"distinct_{n}"] = mean(_each(by_seed, lambda s, n=n: distinct_n_together(s, n)))
        measured[f"distinct_{n}_within"] = _over_prompts(generations, distinct_n(texts, n))
    if all(len(samples) > 1 for samples in by_seed.values()):
        measured["self_bleu"] = mean(_each(by_seed, lambda s: self_bleu(s).mean().item()))
    return measured


def _each(by_seed: dict[int, list[str]], measure_set: Callable[[list[str]], float]) -> Tensor:
    return torch.tensor([measure_set(samples) for samples in by_seed.values()])


def _over_prompts(generations: Sequence[Generation], values: Tensor) -> Mean:
    known = ~values.isnan()
    if not known.any():
        unknown = torch.tensor(float("nan"))
        return Mean(unknown, unknown)
    number: dict[str, int] = {}
    index = torch.tensor([number.setdefault(reply.prompt, len(number)) for reply in generations])
    zeros = torch.zeros(len(number), dtype=torch.float64)
    total = zeros.index_add(0, index[known], values[known].double())
    count = zeros.index_add(0, index[known], known[known].double())
    return clustered_mean(total[count > 0], count[count > 0])


def _windows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, prompt: int, size: int
) -> Iterator[list[int]]:
    for ids in encode(tokenizer, (row["text"] for row in rows)):
        for start in range(0, len(ids), size):
            window = list(ids[start : start + size])
            if len(window) > prompt or (not start and len(window) >= SHORTEST):
                yield window


def _continued(ids: list[int], tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> Prompt:
    at = prompt_tokens if len(ids) > prompt_tokens else len(ids) // 2
    begun, rest = (
        str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:at], ids[at:])
    )
    return Prompt(ids[:at], begun, rest)


def _answered(
    rows: Rows,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    room: float,
) -> Prompt:
    """The prompt of a row, or a ValueError that names the row and what is wrong with it."""
    row, place = rows[index], rows.place(index)
    if template is None:
        (ids,) = encode(tokenizer, [row["prompt"]], goes_on=True)
        prompt = Prompt(list(ids), row["prompt"], row.get("completion", ""))
    elif row.keys().isdisjoint({"completion", "messages"}):
        text = prompt_text(row, place, template)
        (ids,) = encode(tokenizer, [text], special=False)
        prompt = Prompt(list(ids), text, "")
    else:
        split = "prompt" in row
        messages = [*row["prompt"], *row["completion"]] if split else row["messages"]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or not turns[-1]:
            raise ValueError(
                f"{place}: a chat to reply to must have a turn before the assistant's last."
            )
        try:
            asked = template.prepare(messages[: turns[-1]], place)
        except NothingToTrainOnError as nothing:
            raise ValueError(f"{place}: {nothing.reason}.") from None
        text = template.render(asked, place, reply=True, tools=row.get(TOOLS))
        (ids,) = encode(tokenizer, [text], special=False)
        prompt = Prompt(list(ids), text, text_of(messages[turns[-1]].get("content"), place))
    if not prompt.tokens:
        raise ValueError(f"{place}: the prompt is empty.")
    if len(prompt.tokens) > room:
        raise ValueError(
            f"{place}: the prompt leaves no room for the reply in the model's context."
        )
    return prompt
