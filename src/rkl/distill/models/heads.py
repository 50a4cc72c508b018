"""The head of a language model, from hidden states to logits: read from it and checked on it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear

from rkl.checks import warn
from rkl.distill.known import Known, logits_of
from rkl.distill.models.lora import without_wrapper
from rkl.distill.models.sharded import is_sharded, whole
from rkl.distill.models.zero3 import is_part
from rkl.estimators import LinearHead

# What a configuration may call a factor of the logits, and the power in which it enters.
_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
_SOFTCAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap"
_CAUSAL = "expected a causal language model"
_STRETCH = 100.0  # logits at which no soft cap in use can hide


@dataclass(frozen=True, eq=False)
class Head:
    """The head of a model: everything between its hidden states and its logits.

    Attributes:
        model: The model, as the caller knows it.
        vocab: How many logits it gives a token.
        linear: Its output embedding; None if only the model itself can say its logits.
        scale: What multiplies the logits.
        softcap: The bound that tanh keeps them in, where they have one.
    """

    model: nn.Module
    vocab: int
    linear: nn.Linear | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def inner(self) -> nn.Module:
        """The module whose output is the model's; of a sharded one not PEFT's wrapper.

        FSDP gathers, for the backward, the weights of the module that gave the output.
        """
        return without_wrapper(self.model) if is_sharded(self.model) else self.model

    @contextmanager
    def tap(self, measure: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
        """While this lasts, ``measure`` gets what each forward of the model gives its head.

        That is the hidden states [rows, positions, width], and the head itself is then run on
        no position; or it is the logits, without a head. What ``measure`` gives is appended to
        the list.
        """
        measured: list[Tensor] = []
        if self.linear is None:

            def of_logits(module, inputs, output):
                measured.append(measure(output.logits))

            with self.inner.register_forward_hook(of_logits, prepend=True):
                yield measured
        elif is_part(self.linear.weight):
            with _within(self.linear, measure, measured):
                yield measured
        else:

            def before(module, inputs):
                measured.append(measure(inputs[0]))
                return (inputs[0][:, :0], *inputs[1:])

            with self.linear.register_forward_pre_hook(before):
                yield measured

    def at(
        self,
        states: Float[Tensor, "rows positions width"],
        predicting: Bool[Tensor, "rows steps"],
        *,
        vocab: int | None = None,
    ) -> Known:
        """The distribution of each predicted token, as ``exact`` takes it.

        The product with the head runs in the precision in which the model would run it.

        Args:
            states: What :meth:`tap` received.
            predicting: Where the next token is one to compare; of all positions but the last.
            vocab: How many atoms to keep: the tokens that two padded vocabularies share.
        """
        if states.shape[1] != predicting.shape[1] + 1:
            raise ValueError(
                f"{type(self.model).__name__} gave its head {states.shape[1]} positions for a row "
                f"of {predicting.shape[1] + 1} tokens, so that labels cannot be told apart."
            )
        states = states[:, :-1][predicting]
        atoms = slice(None if vocab == self.vocab else vocab)
        if self.linear is None:
            return states[:, atoms]
        kind, dtype = states.device.type, states.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        weight, bias = whole(self.linear.weight), self.linear.bias
        bias = None if bias is None else whole(bias)
        if atoms.stop is not None:
            weight, bias = weight[atoms], None if bias is None else bias[atoms]
        bias = None if bias is None else bias.to(dtype)
        return LinearHead(states.to(dtype), weight.to(dtype), bias, self.scale, self.softcap)

    def observe(
        self,
        inputs: Mapping[str, Any],
        predicting: Bool[Tensor, "rows steps"],
        *,
        vocab: int | None = None,
    ) -> Known:
        """Run the model, in evaluation mode and without gradients, and say what it predicts."""
        with inference(self.model), self.tap(lambda states: states) as received:
            self.model(**{**inputs, "use_cache": False})
            return self.at(received.pop(), predicting, vocab=vocab)


@contextmanager
def _within(
    head: nn.Linear, measure: Callable[[Tensor], Tensor], measured: list[Tensor]
) -> Iterator[None]:
    """The same, with what is measured as an output of the head.

    DeepSpeed gathers its weights before their backward for what is an output, and for no other.
    """
    states: list[Tensor] = []

    def before(module, inputs):
        states.append(inputs[0])
        return (inputs[0][:, :0], *inputs[1:])

    def within(module, inputs, output):
        return output, measure(states.pop())

    def after(module, inputs, output):
        measured.append(output[1])
        return output[0]

    with (
        head.register_forward_pre_hook(before),
        head.register_forward_hook(within, prepend=True),
        head.register_forward_hook(after),
    ):
        yield


_NAN = "its logits are NaN, as weights that are NaN or too large make them"


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for a while; every module then has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def read_head(model: nn.Module, name: str = "model") -> Head:
    """The head of a model: its output embedding with what its configuration says of the logits.

    No table of architectures is kept. What was read is compared with the model's own logits on
    two tokens, one of them stretched so far that no scale or soft cap can go unnoticed; if they
    differ, a warning names the model and the reason, and full logits are used.

    Args:
        model: A causal language model.
        name: What a message calls it.
    """
    if not isinstance(model, nn.Module) or getattr(model, "get_output_embeddings", None) is None:
        raise TypeError(
            f"{name} must be a causal language model of transformers; got a "
            f"{type(model).__name__}."
        )
    _check_kind(name, model)
    causal: Any = model  # a PreTrainedModel, or a PeftModel around one
    embedding = causal.get_output_embeddings()
    config = causal.config.get_text_config(decoder=True)
    if isinstance(embedding, nn.Linear) and type(embedding).forward is nn.Linear.forward:
        head = Head(model, config.vocab_size, embedding, _scale(config), _softcap(config))
        vocab, reason = _compared(name, head, embedding)
        if reason is None:
            return head
    else:
        with inference(model):
            logits = _check_logits(name, model, model(**_two_rows(model)))
        vocab = logits.shape[-1]
        kind = f"{type(embedding).__module__}.{type(embedding).__qualname__}"
        reason = f"its output embedding is no plain linear layer; got a {kind}"
        reason = _NAN if bool(logits.isnan().any()) else reason
    instead = "Nothing can be computed with it."
    if reason != _NAN:
        instead = (
            "Its full logits will be computed instead, which takes more memory and gives the same "
            "loss."
        )
    warn(f"{type(model).__name__}: {reason}. {instead}")
    return Head(model, vocab)


def check_causal(name: str, model: Any) -> None:
    """Refuse, by its argument's name, a model that does not predict each token from those before.

    Such as one without a head, an encoder and decoder, or a masked model, whose logits at one
    token change with the next.
    """
    _check_kind(name, model)
    with inference(model):
        _check_logits(name, model, model(**_two_rows(model)))


def why_not_apart(model: Any) -> str | None:
    """Reason why rows that share a block would see one another; None where they do not.

    Without an attention mask and a cache, models of transformers keep texts apart whose
    positions begin anew. Some do not, such as those with a recurrent state. So two short rows are
    run as one block: the second must not change with the first, and be what it is alone.
    """
    pad = model.config.get_text_config(decoder=True).pad_token_id
    first, second, third = [token for token in range(4) if token != pad][:3]
    device = next(model.parameters()).device
    before = [[first, second, third, first], [second, second, first, third]]
    after = [second, third, first, second, first]
    blocks = torch.tensor([[*row, *after] for row in before], device=device)
    places = torch.tensor([[*range(4), *range(5)]] * 2, device=device)
    try:
        with inference(model):
            how: dict[str, Any] = {"use_cache": False}
            packed = model(input_ids=blocks, position_ids=places, **how).logits[:, 4:].float()
            row = {"input_ids": blocks[:1, 4:], "position_ids": places[:1, 4:]}
            own = model(**row, **how).logits[0].float()
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"it cannot be run on positions that begin anew ({str(error).splitlines()[0]})"
    eps = torch.finfo(next(model.parameters()).dtype).eps
    rounding, largest = eps**0.5 / 4, float(own.abs().max())
    across = float((packed[0] - packed[1]).abs().max()) / largest
    if not across <= min(64 * eps, rounding):  # what is masked adds nothing, in any precision
        return f"the second of two rows changes with the first, by {across:.2g} of its logits"
    if not (alone := float((packed[0] - own).abs().max()) / largest) <= rounding:
        return f"the second of two rows is not what it is alone, by {alone:.2g} of its logits"
    return None


def _check_kind(name: str, model: Any) -> None:
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"{name} is an encoder and decoder, a {kind}; {_CAUSAL}.")
    if kind.endswith("ForMaskedLM"):
        raise TypeError(f"{name} predicts masked tokens, as a {kind} does; {_CAUSAL}.")


def _check_logits(name: str, model: Any, output: Any) -> Tensor:
    """The logits of two rows that differ in their second token, once they are causal."""
    kind, logits = type(model).__name__, getattr(output, "logits", None)
    if logits is None or logits.ndim != 3:
        raise TypeError(
            f"{name} gives no logits for tokens: a {kind} has no such head; {_CAUSAL}, as "
            "AutoModelForCausalLM or rkl.distill.load_model give one."
        )
    first, other = logits[:, 0]
    if (first - other).abs().max() > 64 * torch.finfo(logits.dtype).eps * first.abs().max():
        raise TypeError(
            f"{name} sees the tokens that it is to predict: a {kind} reads in both directions, as "
            f"masked models do; {_CAUSAL}."
        )
    return logits


def _scale(config) -> float:
    scale = 1.0
    for name, power in _SCALES.items():
        scale *= (getattr(config, name, None) or 1.0) ** power
    return scale


def _softcap(config) -> float | None:
    caps = (getattr(config, name, None) for name in _SOFTCAPS)
    return next((float(cap) for cap in caps if cap), None)


def _two_rows(model: Any) -> dict[str, Tensor]:
    pad = model.config.get_text_config(decoder=True).pad_token_id
    # New weights embed the padding token as 0, and from there a head can give no logits but 0.
    first, second, third = [token for token in range(4) if token != pad][:3]
    device = next(model.parameters()).device
    tokens = torch.tensor([[first, second], [first, third]], device=device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _compared(name: str, head: Head, embedding: nn.Linear) -> tuple[int, str | None]:
    """The number of the model's logits, and why they are not those that the head tells."""
    hidden = []
    with inference(head.model):
        with embedding.register_forward_pre_hook(_stretching(hidden)):
            output = head.model(**_two_rows(head.model))
        logits = _check_logits(name, head.model, output)
        if len(hidden) != 1:
            reason = f"its output embedding was called {len(hidden)} times, not once"
            return logits.shape[-1], reason
        states = torch.cat([hidden[0][:1], hidden[0][:1, :1]], 1)  # of the last nothing is asked
        told = logits_of(head.at(states, states.new_ones(1, 2, dtype=torch.bool)))
    return logits.shape[-1], _difference(logits[0], told)


def _stretching(seen: list[Tensor]) -> Callable[[nn.Module, tuple], tuple]:
    """A hook that stretches the second token's hidden state, and shows what the head then gets."""

    def stretch(module, inputs):
        hidden, *rest = inputs
        largest = linear(hidden, module.weight, module.bias).abs().amax(-1, keepdim=True)
        factor = torch.ones_like(largest)
        factor[:, 1:] = _STRETCH / largest[:, 1:].clamp_min(torch.finfo(largest.dtype).tiny)
        seen.append(hidden * factor)
        return seen[-1], *rest

    return stretch


def _difference(logits: Tensor, told: Tensor) -> str | None:
    if logits.shape != told.shape:
        return f"it gives {logits.shape[-1]} logits, but its output embedding {told.shape[-1]}"
    if logits.isnan().any():
        return _NAN
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(told.dtype).eps)
    difference = (logits - told).abs().amax(-1) / logits.abs().amax(-1)
    if (difference <= eps**0.5 / 4).all():  # a few roundings, in any precision; false for NaN
        return None
    return (
        f"its logits differ by up to {difference.max():.2g} of the largest from those of its "
        "output embedding, scale and soft cap"
    )
