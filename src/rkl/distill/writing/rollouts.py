"""Text that a model writes to be trained on: prompts of a batch, replies, a batch of both."""

import abc
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rkl.checks import warn
from rkl.distill.models.heads import inference
from rkl.distill.models.sharded import shares_weights
from rkl.distill.text.batches import DATA, SOURCES
from rkl.distill.text.chats import ChatTemplate
from rkl.distill.text.data import IGNORED, TokenDataset
from rkl.distill.writing.sampling import Sampling
from rkl.randomness import random_numbers


class Reply(NamedTuple):
    """The tokens of a reply, the one that ends it among them, and whether there is such a one."""

    tokens: list[int]
    ended: bool


class Writer(abc.ABC):
    """Replies to prompts, for :class:`rkl.distill.DistillTrainer`.

    To write one, give it

    - ``write``, which replies to prompts;
    - ``follow``, where it does not write with the student itself, but with a copy of it;
    - ``writes_together = True``, where all processes must write at once.
    """

    writes_together: bool = False

    def follow(self, model: nn.Module) -> None:  # noqa: B027
        """Take over the weights of the student as it is, before some batches are written."""

    @abc.abstractmethod
    def write(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Reply]:
        """One reply to each prompt; the same seed and prompts give the same replies.

        Args:
            prompts: The tokens of each.
            seed: Random seed, below 2⁶³.
        """


class ModelWriter(Writer):
    """Replies by transformers' own ``generate``: batched, padded on the left, with a cache.

    The model's train mode and the global random state are put back afterwards. Processes that
    share the weights of the model write at once: each runs it until the last reply of all of them
    has ended, so that it is gathered as often in each.

    Args:
        model: The model, as it is at the time of writing.
        sampling: How tokens are drawn.
        ends: The tokens that end a reply.
        context: Most tokens of a prompt and its reply together.
        around: A context manager to generate in, such as autocast.
        vocab: Only the tokens below this one are written, where models of other sizes read them.
        banned: Tokens that are never written.
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling,
        ends: Sequence[int],
        *,
        context: float = math.inf,
        around: Callable[[], AbstractContextManager] = nullcontext,
        vocab: int | None = None,
        banned: Collection[int] = (),
    ):
        self.model, self.sampling, self.ends = model, sampling, list(ends)
        self.context, self.around = context, around
        self._config = generation_config(sampling, self.ends)
        self._only = _Only(vocab, sorted(banned))

    @property
    def writes_together(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True if the processes share the model's weights, as they may do from some time on."""
        return shares_weights(self.model)

    def write(self, prompts, *, seed):
        check_room(prompts, self.sampling, self.context, "max_completion_length")
        with random_numbers(seed), inference(self.model), self.around():
            together = self.writes_together
            return replies_of(self.model, prompts, self._config, [self._only], together=together)


def generation_config(sampling: Sampling, ends: Sequence[int]) -> GenerationConfig:
    """The settings of transformers for this sampling; nothing else shapes the distribution."""
    settings: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": list(ends) or None,
        "pad_token_id": ends[0] if ends else 0,  # behind a reply its end again, cut off below
        "repetition_penalty": 1.0,
        "num_beams": 1,
        "use_cache": True,
    }
    if sampling.temperature == 0:
        return GenerationConfig(do_sample=False, **settings)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    drawn |= {"top_k": sampling.top_k, "min_p": sampling.min_p}
    return GenerationConfig(do_sample=True, **drawn, **settings)


def replies_of(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    *,
    together: bool = False,
) -> list[Reply]:
    """A reply of a model to each prompt, drawn from torch's global random state.

    Processes that share its weights write ``together``: each runs the model until the last reply
    of all of them has ended. A model that replies otherwise beside other prompts, as some with a
    recurrent state do, which read their padding, gets its prompts one by one.
    """
    how: dict[str, Any] = {"config": config, "processors": processors, "together": together}
    # Of processes that write together all must ask the model, or none.
    asks = together or len(prompts) > 1
    if not asks or _batches(model, together=together):
        return _replies_of_batch(model, prompts, **how)
    if together:
        raise NotImplementedError(
            f"model: a {type(model).__name__} must get its prompts one by one, for beside others "
            "it replies otherwise, and processes that share its weights must write at once. Give "
            "each process the whole model."
        )
    return [reply for prompt in prompts for reply in _replies_of_batch(model, [prompt], **how)]


def _replies_of_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    config: GenerationConfig,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]],
    together: bool,
) -> list[Reply]:
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    pad, ends = config.pad_token_id, {*(config.eos_token_id or ())}
    ids = [[pad] * n + [*prompt] for n, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (longest - n) for n in padding]
    device = next(model.parameters()).device
    inputs, attended = torch.tensor([ids, mask], device=device)
    with _no_settings_of_its_own(model):
        written = cast(Any, model).generate(
            inputs=inputs,
            attention_mask=attended,
            generation_config=config,
            logits_processor=[_refuse_nan, *processors],
            synced_gpus=together,
        )
    return [_until_end(reply, ends) for reply in written[:, longest:].tolist()]


@contextmanager
def _no_settings_of_its_own(model: nn.Module) -> Iterator[None]:
    """Empties the model's own generation settings for a while.

    transformers takes from them whatever the settings of a call leave at None, such as min_p.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    entries = vars(own)  # changed in place: wrappers such as PEFT's hand on the same object
    kept = dict(entries)
    entries.clear()
    entries.update(vars(GenerationConfig()))
    try:
        yield
    finally:
        entries.clear()
        entries.update(kept)


_BATCHES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_BATCH_ROUNDING = 1 / 16  # of the largest logit; padding that is read adds more


def _batches(model: nn.Module, *, together: bool) -> bool:
    """True if a model replies to a prompt alone as beside others; asked once of each model."""
    if model not in _BATCHES:
        _BATCHES[model] = _batch_effect(model, together=together) <= 1
        if not _BATCHES[model] and not together:
            warn(
                f"{type(model).__name__} replies otherwise beside other prompts, as a model that "
                "reads its padding: it gets its prompts one by one, which takes longer."
            )
    return _BATCHES[model]


def _batch_effect(model: Any, *, together: bool) -> float:
    """Change of the logits of two tokens by other rows and padding, over the largest allowed.

    Of padding by one token or another, masked, hardly more than rounding is allowed; between a
    prompt padded beside another and alone, what half precision and other kernels may add.
    """
    pad = model.config.get_text_config(decoder=True).pad_token_id
    first, second, third = [token for token in range(4) if token != pad][:3]
    prompt, other = [first, second], [third, first, second, third, first]
    before = [[first] * 5, [third] * 5, other]
    masked = [[0] * 5 + [1] * 2] * 2 + [[1] * 7]
    rows = [[*tokens, *prompt] for tokens in before]
    alone = _forced_logits(model, [prompt], [[1] * 2], third, together=together)[0]
    padded = _forced_logits(model, rows, masked, third, together=together)
    if alone.isnan().any() or padded.isnan().any():
        return 0.0  # an error of the first reply
    finite = alone.isfinite().all(0)  # what a model never writes may have -inf
    alone, padded = alone[:, finite], padded[..., finite]
    across = min(64 * torch.finfo(_precision(model)).eps, _BATCH_ROUNDING)
    effects = (padded[0] - padded[1]) / across, (padded[0] - alone) / _BATCH_ROUNDING
    largest = alone.abs().max().clamp_min(torch.finfo(alone.dtype).tiny)
    return max(float(it.abs().max() / largest) for it in effects)


def _forced_logits(
    model: Any, rows: Sequence[list[int]], mask: Sequence[list[int]], token: int, *, together: bool
) -> Float[Tensor, "rows steps vocab"]:
    """Logits of the next token, and of the one behind a given next token."""
    device = next(model.parameters()).device
    inputs, attended = torch.tensor([rows, mask], device=device)
    config = GenerationConfig(
        max_new_tokens=2,
        do_sample=False,
        eos_token_id=rows[0][-1],  # another than the token, behind which it goes on
        pad_token_id=rows[0][-1],
        return_dict_in_generate=True,
        output_logits=True,
    )
    with _no_settings_of_its_own(model):
        written = model.generate(
            inputs=inputs,
            attention_mask=attended,
            generation_config=config,
            logits_processor=[lambda ids, logits: _certain(logits, token)],
            synced_gpus=together,
        )
    return torch.stack(written.logits, 1)


def _certain(logits: Float[Tensor, "rows vocab"], token: int) -> Float[Tensor, "rows vocab"]:
    """Logits that leave one token alone."""
    certain = torch.full_like(logits, -math.inf)
    certain[:, token] = 0.0
    return certain


def _precision(model: nn.Module) -> torch.dtype:
    """The precision that a model is run in."""
    weight = next(model.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _until_end(tokens: list[int], ends: set[int]) -> Reply:
    for place, token in enumerate(tokens):
        if token in ends:
            return Reply(tokens[: place + 1], True)
    return Reply(tokens, False)


@dataclass(frozen=True)
class _Only:
    """A processor of transformers' that leaves some tokens no probability."""

    vocab: int | None
    banned: Sequence[int]

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = logits.clone()
        if self.vocab is not None:
            logits[:, self.vocab :] = -math.inf
        logits[:, list(self.banned)] = -math.inf
        return logits


def _refuse_nan(ids: Tensor, logits: Tensor) -> Tensor:
    """A processor of transformers' that raises where the logits of the next token are NaN."""
    if bool((bad := logits.isnan().any(-1)).any()):
        raise FloatingPointError(
            f"model: its logits are NaN in {int(bad.sum()):,} of {len(bad):,} replies. Compute in "
            "float32, or take another checkpoint."
        )
    return logits


def check_room(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    context: float,
    name: str = "max_new_tokens",
) -> None:
    """Refuse prompts that are empty, or leave no room for a reply in a model's context.

    Args:
        prompts: The tokens of each.
        sampling: How long a reply may be.
        context: Most tokens of a prompt and its reply together.
        name: What messages call the length of a reply.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("prompts must hold at least one, and none of them may be empty.")
    longest = max(map(len, prompts))
    if longest + sampling.max_new_tokens > context:
        raise ValueError(
            f"{name}={sampling.max_new_tokens} behind a prompt of {longest} tokens passes "
            f"the model's context of {context}."
        )


def check_prompts(blocks: TokenDataset, settings: Any, context: float) -> None:
    """Refuse blocks whose prompts leave no room for a reply in a model's context."""
    longest = max(prompt_lengths(blocks, settings.prompt_tokens), default=0)
    if longest + settings.max_completion_length > context:
        raise ValueError(
            f"max_completion_length={settings.max_completion_length} behind the longest prompt of "
            f"{longest} tokens passes the model's context of {context}."
        )


def prompt_lengths(blocks: TokenDataset, prompt_tokens: int) -> list[int]:
    """The length of the prompt of each block, as :func:`prompts_in` takes it, in tokens."""
    trained, begin, end = blocks.trained, blocks.bounds[:-1], blocks.bounds[1:]
    starts = (trained & ~trained.roll(1)).nonzero()[:, 0]  # the first of a block is not trained on
    last = torch.searchsorted(starts, end) - 1
    start = starts[last.clamp_min(0)] if len(starts) else end
    start = start.where((last >= 0) & (start >= begin), end)
    own = start - begin
    beginning = (end - begin).div(2, rounding_mode="floor").clamp(1, prompt_tokens)
    return own.where(own > 1, beginning).tolist()


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The tokens that end a reply, as the model says, or else the tokenizer."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config else None
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def ends_with_turn(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The same, and the token with which the chat template ends a turn."""
    ends = ends_of(model, tokenizer)
    if tokenizer.chat_template and (end := ChatTemplate(tokenizer).turn_end) not in (None, *ends):
        ends.append(end)
    return ends


def common_ends(models: Mapping[str, tuple[Any, Any]]) -> list[int]:
    """The tokens that end a reply of any of some models; a warning where these are not the same.

    A student that never learnt the teacher's end, as a base model beside a chat model, would
    write on without end.

    Args:
        models: Each with its tokenizer, or None, by the name that messages call it.
    """
    ends = {
        name: ends_of(model, tokenizer) if tokenizer is None else ends_with_turn(model, tokenizer)
        for name, (model, tokenizer) in models.items()
    }
    union = list(dict.fromkeys(token for tokens in ends.values() for token in tokens))
    if not union:
        raise ValueError(
            "model: neither its generation_config nor a tokenizer names a token that ends a text, "
            "so that replies would never end: set generation_config.eos_token_id."
        )
    if any({*tokens} != {*union} for tokens in ends.values()):
        tokenizer = next((it for _, it in models.values() if it is not None), None)
        told = "; ".join(
            f"the {name}'s end with {_spelt(tokens, tokenizer)}" for name, tokens in ends.items()
        )
        warn(f"Replies end with different tokens: {told}. Writing stops at any of them.")
    return union


def _spelt(tokens: Sequence[int], tokenizer: Any) -> str:
    if not tokens:
        return "none"
    if tokenizer is None:
        return " or ".join(map(str, tokens))
    return " or ".join(map(str, tokenizer.convert_ids_to_tokens(list(tokens))))


def seed_of(*numbers: int) -> int:
    """A seed that depends on all of some counts, such as those of a run, a step and a process.

    >>> seed_of(0, 1, 2) == seed_of(0, 2, 1)
    False
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def prompts_in(batch: Mapping[str, Any], prompt_tokens: int) -> list[list[int]]:
    """The prompt of each row of a batch: all before the last stretch of tokens trained on.

    A row that is trained on from its second token on has no prompt of its own, as plain text: its
    beginning is taken, ``prompt_tokens`` of it and at most one half. A row without a token that
    is trained on is a prompt as a whole.
    """
    if batch.get("attention_mask") is None:
        raise ValueError(
            "train_dataset: rows that share a block have no prompt each; where lmbda is above 0, "
            "or with seq_kd, every row must have a block of its own (packing=False)."
        )
    prompts = []
    columns = (batch[name].tolist() for name in ("input_ids", "labels", "attention_mask"))
    for ids, labels, attended in zip(*columns, strict=True):
        length = sum(attended)
        if not all(attended[:length]):
            raise ValueError("data_collator must pad rows on the right; got padding before text.")
        start = stop = max((i + 1 for i in range(length) if labels[i] != IGNORED), default=length)
        while start > 1 and stop and labels[start - 1] != IGNORED:
            start -= 1
        if start <= 1:
            start = max(1, min(prompt_tokens, stop // 2))
        prompts.append(ids[:start])
    return prompts


def batch_with(
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    source: int,
    *,
    pad: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Prompts and replies as a batch, padded on the right, of which the replies are trained on.

    Args:
        prompts: The tokens of each.
        replies: The reply to each.
        source: Who wrote the replies.
        pad: The token behind the end of a row, which is not attended to.
        device: Where to put the batch.
    """
    rows = []
    for prompt, reply in zip(prompts, replies, strict=True):
        before, after = len(prompt), len(reply.tokens)
        ids = torch.tensor([*prompt, *reply.tokens], device=device)
        mine = torch.arange(before + after, device=device) >= before
        rows.append((ids, torch.ones_like(ids), ids.where(mine, IGNORED), source * mine.long()))
    filling = {"input_ids": pad, "attention_mask": 0, "labels": IGNORED, SOURCES: DATA}
    columns = zip(*rows, strict=True)
    return {
        name: pad_sequence(list(column), batch_first=True, padding_value=value)
        for (name, value), column in zip(filling.items(), columns, strict=True)
    }
