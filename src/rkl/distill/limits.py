"""Checks of settings: counts, numbers within limits, a divergence, a cache, a context.

Neither torch nor transformers is loaded here, so that the help of a command is quick.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkl.checks import LARGEST_COUNT, LARGEST_SEED, choice, integer, number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rkl.divergences import Divergence

ABOUT = "cache.json"  # of a folder in which rkl cache keeps what a teacher told

COMPRESSED = "compressed_logprobs"  # column of a capture of DistillKit
IN_THE_DATA = "data:"  # before the column that a teacher is read from

ALIGNMENTS = "text", "bytes", "sorted"  # of a teacher with another tokenizer

TEMPLATE_ARGUMENTS = {  # of apply_chat_template
    *("tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"),
    *("return_assistant_tokens_mask", "conversation", "chat_template"),
}
MAX_LENGTH = 512  # tokens of a block, where none is chosen and the models can read as many
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4


def check_counts(settings: Any, *names: str, at_least: int = 1) -> None:
    """Refuse settings of these names that are no integers, or too small; None is let through."""
    for name in names:
        if (value := getattr(settings, name)) is not None:
            check_count(name, value, at_least)


def check_count(name: str, value: Any, at_least: int = 1) -> None:
    """Refuse what is no integer, or too small."""
    most = LARGEST_SEED if name == "seed" else LARGEST_COUNT
    integer(name, value, at_least=at_least, at_most=most)


def check_within(
    settings: Any, *names: str, low: float = 0.0, high: float = math.inf, ends: str = "()"
) -> None:
    """Refuse settings that are no numbers, or outside of low to high.

    Whether these count is said as intervals are written: by the brackets in ``ends``.
    """
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number; got {value!r}.")
        outside = {end for end, bracket in zip((low, high), ends, strict=True) if bracket in "()"}
        if not low <= value <= high or value in outside:
            words = f"{ends[0]}{low:g}, {high:g}{ends[1]}".replace("inf", "∞")
            raise ValueError(f"{name} must lie in {words}; got {value}.")


def check_temperature(settings: Any, *, greedy: bool = False) -> None:
    """Refuse a temperature at which logits overflow, or all atoms become equally likely.

    Args:
        settings: What has a ``temperature``.
        greedy: Whether 0, which takes the likeliest atom, is one.
    """
    check_within(settings, "temperature", ends="[)" if greedy else "()")
    if settings.temperature:
        low, high = MIN_TEMPERATURE, MAX_TEMPERATURE
        number("temperature", settings.temperature, at_least=low, at_most=high)


def check_one_of(settings: Any, name: str, *words: str) -> None:
    """Refuse a setting that is none of these words."""
    choice(name, getattr(settings, name), words)


def check_alignment(settings: Any) -> None:
    """Refuse settings that the alignment of a teacher with another tokenizer cannot have."""
    if (kind := settings.teacher_alignment) is None:
        return
    check_one_of(settings, "teacher_alignment", *ALIGNMENTS)
    if settings.teacher_model_kind is not None:
        raise ValueError(
            "teacher_alignment is for a teacher with another tokenizer; got "
            f"{kind!r} with teacher_model_kind={settings.teacher_model_kind!r}."
        )
    if kind == "text" and not settings.seq_kd:
        raise ValueError(
            "teacher_alignment='text' needs seq_kd, so that the teacher writes text; without it "
            "it would have no part in the training."
        )
    if kind != "sorted" and settings.temperature != 1:
        raise ValueError(
            f"temperature must be 1 with teacher_alignment={kind!r}, whose atoms another "
            f"temperature would need apart; got {settings.temperature}."
        )


def template_variables(value: Any) -> dict[str, Any]:
    """The variables in ``chat_template_kwargs``, which is an object or its JSON."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(
            'chat_template_kwargs must be an object such as {"enable_thinking": false}; '
            f"got {value!r}."
        )
    if clashing := sorted(TEMPLATE_ARGUMENTS & value.keys()):
        raise ValueError(
            f"chat_template_kwargs must not hold {clashing[0]}, which rkl sets for each row."
        )
    return dict(value)


def divergence_named(text: str, setting: str = "divergence") -> "Divergence":
    """The divergence that a setting means, or an error that names the setting."""
    from rkl.divergences import parse

    try:
        return parse(text)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{setting}: {error}") from None


def read_divergence(divergence: "Divergence | str") -> "Divergence":
    """A divergence, or the one that a text means."""
    from rkl.divergences import Divergence

    if isinstance(divergence, str):
        return divergence_named(divergence)
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence must be a Divergence or its text, such as 'akl(mu=0.5)'; "
            f"got {divergence!r}."
        )
    return divergence


def context_of(model: "PreTrainedModel") -> float:
    """Most tokens that a model can read, by its configuration; infinite if unstated."""
    return configured_context(model.config)


def configured_context(config: Any) -> float:
    """Most tokens that a model of this configuration can read; infinite if unstated."""
    of_text = config.get_text_config(decoder=True)
    return getattr(of_text, "max_position_embeddings", None) or math.inf


def default_length(contexts: Iterable[float]) -> int:
    """Longest block, in tokens, where none is chosen: as long as all models can read.

    >>> default_length([2048, 256]), default_length([2048, math.inf])
    (256, 512)
    """
    return int(min([MAX_LENGTH, *contexts]))


def check_context(name: str, model: "PreTrainedModel", max_length: int) -> None:
    """Refuse blocks longer than a model can read."""
    if max_length > (room := context_of(model)):
        raise ValueError(
            f"max_length must be at most {room}, the {name}'s context; got {max_length}."
        )


def is_address(name: str) -> bool:
    """True for the name of a teacher that is the address of a server."""
    return str(name).startswith(("http://", "https://"))


def published_column(name: str | None) -> str | None:
    """The column of the data that a teacher data:COLUMN is read from; None for other teachers."""
    text = str(name)  # a path too
    return text.removeprefix(IN_THE_DATA) if text.startswith(IN_THE_DATA) else None


def is_cache(name: str | os.PathLike) -> bool:
    """True for the name of a folder that holds a cache, finished or not."""
    text = os.fspath(name)
    return not text.startswith(("package:", "hub:", IN_THE_DATA)) and Path(text, ABOUT).is_file()
