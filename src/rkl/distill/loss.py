"""The loss of a distillation as one function, for a training loop of any kind."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn.functional import cross_entropy

from rkl.checks import floats, number
from rkl.distill.known import at_temperature
from rkl.distill.limits import read_divergence
from rkl.distill.text.data import IGNORED
from rkl.divergences import AKL, Divergence
from rkl.estimators import LinearHead, Sampled, TopK, exact

Logits = Float[Tensor, "..."]


def distill_loss(
    *,
    teacher: Logits | LinearHead | TopK | Sampled,
    student: Logits | LinearHead,
    divergence: Divergence = AKL(),
    labels: Integer[Tensor, "..."] | None = None,
    mask: Bool[Tensor, "..."] | Integer[Tensor, "..."] | None = None,
    shift: bool = True,
    temperature: float = 1.0,
    hard_label_weight: float = 0.0,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = IGNORED,
    chunk: int | None = None,
    compiled: bool | None = None,
) -> Float[Tensor, ""]:
    """Mean of D(teacher ‖ student) over the tokens trained on, differentiable in the student.

    It is the loss of ``DistillTrainer``, for a loop that is not a Trainer. Nothing is multiplied
    by the square of the temperature; multiply the divergence: ``4.0 * KL()``.

    Args:
        teacher: Its logits [..., vocab]; the :class:`rkl.LinearHead` that yields them, of hidden
            states [..., width]; or a :class:`rkl.TopK` or :class:`rkl.Sampled` [..., k]. Held
            constant.
        student: Its logits or head. Of a head, logits exist for a chunk of tokens at a time.
        divergence: Any divergence.
        labels: Tokens as transformers has them, ``ignore_index`` where one is not trained on.
        mask: Which tokens are trained on, as booleans or 0 and 1; with labels, both must agree to
            a token. Without either every position counts.
        shift: Whether labels and mask lie at their tokens, as in ``input_ids``: the logits at a
            position are then compared where the next token counts. False if they already lie
            at the position that predicts them.
        temperature: What the logits of both are divided by, > 0; of a head with a temperature
            of its own, in addition.
        hard_label_weight: Weight of the cross-entropy on the labels, at temperature 1, beside D.
        num_items_in_batch: Denominator, such as the tokens of all batches that are accumulated;
            by default the tokens that are trained on in this one.
        ignore_index: Label of a token that is not trained on.
        chunk: How many tokens' logits of a head may exist at one time; by default 256 MiB,
            or 1 GiB compiled on a GPU.
        compiled: Whether to compile the loss; by default, where there is work enough.

    Returns:
        The loss in nats per token; 0, with a gradient of 0, where no token is trained on.

    Raises:
        ValueError: Shapes do not fit, or a number is out of range; the message names the argument.
        TypeError: An argument is of the wrong kind.

    >>> from rkl import ReverseKL
    >>> teacher, student = torch.zeros(1, 3, 2), torch.tensor([9.0, 1.0]).log().expand(1, 3, 2)
    >>> labels = torch.tensor([[-100, 0, 1]])
    >>> distill_loss(teacher=teacher, student=student, divergence=ReverseKL(), labels=labels)
    tensor(0.3681)
    """
    number("temperature", temperature, above=0)
    number("hard_label_weight", hard_label_weight, at_least=0)
    divergence = read_divergence(divergence)
    if num_items_in_batch is not None and not isinstance(num_items_in_batch, Tensor):
        number("num_items_in_batch", num_items_in_batch, at_least=0)
    _check_pair(teacher, student)
    places = _places(student)
    predicting, targets = _predicting(places, labels, mask, shift, ignore_index, student)
    if not (count := int(predicting.sum())):
        parameters = [it[:0].sum() for it in _parameters(student)]
        return torch.stack(parameters).sum()  # 0, but not without a gradient
    if num_items_in_batch is not None and num_items_in_batch <= 0:
        raise ValueError(
            f"num_items_in_batch must be above 0, for {count} tokens of this batch are trained "
            f"on; got {int(num_items_in_batch)}."
        )
    # In half precision 1/count would be rounded, which weighs every token by another number.
    dtype = torch.promote_types(_parameters(student)[0].dtype, torch.float32)
    loss = weighted_loss(
        divergence,
        p=_flat(teacher),
        q=_flat(student),
        weight=predicting.to(dtype) / count,
        labels=targets,
        temperature=temperature,
        hard_label_weight=hard_label_weight,
        chunk=chunk,
        compiled=compiled,
    )
    return loss if num_items_in_batch is None else loss * (count / num_items_in_batch)


def weighted_loss(
    divergence: Divergence,
    *,
    p: Any,
    q: Any,
    weight: Float[Tensor, " tokens"],
    labels: Integer[Tensor, " tokens"] | None,
    temperature: float,
    hard_label_weight: float,
    chunk: int | None = None,
    compiled: bool | None = None,
) -> Float[Tensor, ""]:
    """Weighted sum over tokens of D at a temperature and of cross-entropy at temperature 1."""
    settings: dict[str, Any] = {"weight": weight, "chunk": chunk, "compiled": compiled}
    # Of logits that are divided already, exact cannot tell the temperature.
    apart = isinstance(q, Tensor) and hard_label_weight != 0 and temperature != 1
    if apart and labels is None:
        raise ValueError("labels must be given where hard_label_weight is not 0; got None.")
    if divergence.takes_labels or hard_label_weight:
        settings["labels"] = labels
    if not apart:
        settings["hard_label_weight"] = hard_label_weight
    soft = exact(
        divergence,
        p=at_temperature(p, temperature),
        q=at_temperature(q, temperature),
        **settings,
    )
    if labels is None or not apart:
        return soft
    counted = weight > 0  # the others may be NaN, whose gradient no mask makes 0
    entropy = cross_entropy(q[counted].to(soft.dtype), labels[counted], reduction="none")
    return soft + hard_label_weight * (weight[counted].to(soft.dtype) @ entropy)


def _check_pair(teacher: Any, student: Any) -> None:
    """Refuse what is no teacher or student, or does not fit, by the names that it has here."""
    kinds = {"teacher": (Tensor, LinearHead, TopK, Sampled), "student": (Tensor, LinearHead)}
    for name, known in (("teacher", teacher), ("student", student)):
        if not isinstance(known, kinds[name]):
            expected = ", ".join(it.__name__ for it in kinds[name][1:])
            raise TypeError(
                f"{name} must be a tensor of logits or a {expected}; got a {type(known).__name__}."
            )
        rows: Any = known[0] if isinstance(known, tuple) else known
        floats(name, rows)
        if rows.ndim < 2:
            raise ValueError(f"{name} must be [..., tokens, vocab]; got {list(rows.shape)}.")
    if (of_teacher := _places(teacher)) != (places := _places(student)):
        raise ValueError(
            f"teacher must have the rows and positions of student, {list(places)}; "
            f"got {list(of_teacher)}."
        )
    sizes = [
        len(it.weight) if isinstance(it, LinearHead) else it.shape[-1]
        for it in (teacher, student)
        if isinstance(it, LinearHead | Tensor)
    ]
    shared = isinstance(student, LinearHead) and student.group is not None  # as exact checks
    if len(sizes) == 2 and sizes[0] != sizes[1] and not shared:
        raise ValueError(
            f"teacher has a vocabulary of {sizes[0]} but student of {sizes[1]}; cut both to the "
            "tokens that they share, or pad the shorter one with logits of −inf."
        )


def _places(known: Any) -> torch.Size:
    """The shape without the last axis, which is that of atoms or of the width."""
    return (known[0] if isinstance(known, tuple) else known).shape[:-1]


def _parameters(known: Any) -> tuple[Tensor, ...]:
    if not isinstance(known, LinearHead):
        return (known,)
    return tuple(it for it in known[:3] if it is not None)


def _predicting(places, labels, mask, shift, ignore_index, student):
    """Positions whose next token is trained on, and that token; each [tokens]."""
    first = _parameters(student)[0]
    chosen = torch.ones(places, dtype=torch.bool, device=first.device)
    targets = None
    if shift and (labels is not None or mask is not None):
        chosen[..., -1] = False  # nothing follows the last position
    for name, tokens in (("labels", labels), ("mask", mask)):
        if tokens is None:
            continue
        _check_integers(name, tokens, booleans=name == "mask")
        if tokens.shape != places:
            raise ValueError(
                f"{name} must be {list(places)}, the rows and positions of student; "
                f"got {list(tokens.shape)}."
            )
        tokens = tokens.to(first.device, torch.int64)  # few operations take unsigned ones
        if shift:
            tokens = tokens.roll(-1, -1)
        chosen &= tokens != ignore_index if name == "labels" else _as_mask(tokens)
        if name == "labels":
            targets = tokens.masked_fill(tokens == ignore_index, 0).flatten()
    return chosen.flatten(), targets


def _as_mask(tokens: Tensor) -> Tensor:
    """Booleans of a mask of 0 and 1; other numbers, as labels have, are refused."""
    if len(wrong := tokens[(tokens != 0) & (tokens != 1)]):
        raise ValueError(
            f"mask must hold booleans or 0 and 1; got {int(wrong[0])}. Labels go into labels=."
        )
    return tokens == 1


def _check_integers(name: str, tokens: Any, *, booleans: bool) -> None:
    kind = "integers or booleans" if booleans else "integers"
    dtype = tokens.dtype if isinstance(tokens, Tensor) else None
    inexact = dtype is None or dtype.is_floating_point or dtype.is_complex
    if inexact or (dtype == torch.bool and not booleans):
        got = dtype or f"a {type(tokens).__name__}"
        raise TypeError(f"{name} must be a tensor of {kind}; got {got}.")


def _flat(known: Any) -> Any:
    """The same with one row for each token."""
    if isinstance(known, Tensor):
        return known.flatten(0, -2)
    if isinstance(known, LinearHead):
        return known._replace(hidden=known.hidden.flatten(0, -2))
    return type(known)(*(it if it is None else it.flatten(0, -2) for it in known))
