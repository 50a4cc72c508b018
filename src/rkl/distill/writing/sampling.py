"""Sampling of the tokens of a reply, and the errors for contradictory settings."""

from dataclasses import dataclass
from typing import Any

from rkl.checks import number
from rkl.distill.limits import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    check_count,
    check_counts,
    check_one_of,
    check_temperature,
    check_within,
    is_address,
)


@dataclass(frozen=True)
class Sampling:
    """Sampling of tokens.

    Args:
        max_new_tokens: Longest reply, in tokens.
        temperature: What logits are divided by; 0 takes the likeliest token.
        top_p: Mass of the nucleus that tokens are drawn from.
        top_k: Number of likeliest tokens that tokens are drawn from; 0 for all.
        min_p: Smallest probability of a token that is drawn, as a share of the largest.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None

    def __post_init__(self):
        check_counts(self, "max_new_tokens")
        check_temperature(self, greedy=True)
        check_within(self, "top_p", high=1, ends="(]")
        check_count("top_k", self.top_k, at_least=0)
        if self.min_p is not None:
            check_within(self, "min_p", high=1, ends="[]")


def sampling_of(settings: Any) -> Sampling:
    """The sampling that the settings of a training describe."""
    return Sampling(
        settings.max_completion_length,
        settings.sampling_temperature,
        settings.top_p,
        settings.top_k,
        settings.min_p,
    )


def check_generation(settings: Any, batch_size: int, accumulation: int) -> None:
    """Refuse settings of the text that a training writes, by their names.

    Args:
        settings: Of a training.
        batch_size: Rows of a batch.
        accumulation: Batches of a step.
    """
    check_within(settings, "lmbda", high=1, ends="[]")
    check_within(settings, "sampling_temperature", ends="[)")
    if settings.sampling_temperature:
        low, high = MIN_TEMPERATURE, MAX_TEMPERATURE
        number("sampling_temperature", settings.sampling_temperature, at_least=low, at_most=high)
    names = "max_completion_length", "num_generations", "prompt_tokens", "steps_per_generation"
    check_counts(settings, *names, "guard_window")
    sampling_of(settings)
    for name in ("seq_kd", "log_completions"):
        if (value := getattr(settings, name)) not in (True, False):
            raise TypeError(f"{name} must be True or False; got {value!r}.")
    check_one_of(settings, "guard", "stop", "mix", "off")
    if (server := settings.student_server) is not None:
        if not settings.lmbda:
            raise ValueError(
                f"student_server needs lmbda above 0, so that it writes; got {server}."
            )
        if not is_address(server):
            raise ValueError(
                f"student_server must be an address such as http://host:8000/v1; got {server!r}."
            )
    if not (settings.lmbda or settings.seq_kd):
        return
    if batch_size % settings.num_generations:
        raise ValueError(
            f"num_generations must divide the {batch_size} rows of a batch; "
            f"got {settings.num_generations}."
        )
    if (settings.steps_per_generation or accumulation) % accumulation:
        raise ValueError(
            f"steps_per_generation must be a multiple of the {accumulation} batches of a step; "
            f"got {settings.steps_per_generation}."
        )
