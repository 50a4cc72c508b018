"""The arguments of DistillTrainer: rows as tokens, and errors raised before training begins."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from rkl.checks import LARGEST_COUNT, warn
from rkl.distill.config import DistillConfig
from rkl.distill.limits import (
    template_variables,
)
from rkl.distill.models import zero3
from rkl.distill.models.lora import check_peft, is_adapted
from rkl.distill.models.sharded import FSDPModule, is_sharded, whole_by_mistake
from rkl.distill.teachers.teacher import Teacher, check_teacher
from rkl.distill.text.data import (
    IGNORED,
    TEACHER_IDS,
    TEACHER_LABELS,
    TokenDataset,
    spread,
    tokenize,
)
from rkl.distill.text.sources import in_rows, is_row
from rkl.divergences import Divergence

LOOKED_AT = 1000  # rows of a data set, of which the lengths say if rows are cut


def tokenized(
    name: str, dataset: Any, tokenizer: Any, args: DistillConfig, column: str | None
) -> Any:
    """Raw rows as tokens; a data set that has them is left as it is."""
    dataset = in_rows(dataset)
    if isinstance(dataset, Mapping) and not hasattr(dataset, "column_names"):
        parts = dataset.items()
        return {key: tokenized(name, it, tokenizer, args, column) for key, it in parts}
    first = _first_row(dataset)
    if not isinstance(first, Mapping) or "input_ids" in first or not is_row(first):
        return dataset
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"{name} holds rows of {', '.join(map(str, first))}, which processing_class=TOKENIZER "
            f"would tokenize; got processing_class={tokenizer!r}."
        )
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{name} must be tokenized where it has no length: map it with "
            "rkl.distill.tokenize, or give a list of rows."
        )
    try:
        rows: Any = dataset
        return tokenize(
            rows,
            tokenizer,
            max_length=args.max_length or LARGEST_COUNT,
            packing=False,
            prompts=name == "train_dataset" and args.lmbda == 1,
            chat_template_kwargs=template_variables(args.chat_template_kwargs),
            column=column,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def warn_of_cut(name: str, dataset: Any, max_length: int | None) -> None:
    """Warn of rows of tokens that are longer than what is kept of them."""
    if max_length is None:
        return
    if isinstance(dataset, dict):
        for it in dataset.values():
            warn_of_cut(name, it, max_length)
    elif isinstance(dataset, TokenDataset):
        _warn_of_long(name, dataset.bounds.diff().tolist(), max_length)
    elif isinstance(dataset, list):
        lengths = [len(row["input_ids"]) for row in dataset if "input_ids" in row]
        _warn_of_long(name, lengths, max_length)
    elif "input_ids" in (getattr(dataset, "column_names", None) or ()) and hasattr(
        dataset, "__len__"
    ):
        places = spread(range(len(dataset)), LOOKED_AT)
        lengths = [len(row) for row in dataset.select_columns("input_ids")[places]["input_ids"]]
        _warn_of_long(name, lengths, max_length, rows=len(dataset))


def _warn_of_long(
    name: str, lengths: Sequence[int], max_length: int, rows: int | None = None
) -> None:
    if lost := sum(max(0, length - max_length) for length in lengths):
        some = rows is not None and rows > len(lengths)
        of_some = f" of {len(lengths):,} rows looked at" if some else ""
        warn(
            f"{name}: {lost:,} of {sum(lengths):,} tokens{of_some} are cut off, the ends of rows "
            f"longer than {max_length}. max_length={None if some else max(lengths)} in "
            "DistillConfig keeps all."
        )


def _first_row(dataset: Any) -> Any:
    """The first row of what can be indexed, or read again from the beginning."""
    if isinstance(dataset, Dataset | Sequence) or hasattr(dataset, "column_names"):
        try:
            if isinstance(first := dataset[0], Mapping):  # streamed ones give a column for any key
                return first
        except (IndexError, KeyError, NotImplementedError, TypeError):
            pass  # empty, or an iterable one
    again = hasattr(dataset, "__iter__") and not hasattr(dataset, "__next__")
    return next(iter(dataset), None) if again else None


def check_sharded(model: Any, args: DistillConfig, teacher: Any, teachers: Any) -> None:
    """Refuse what models whose weights processes share cannot do yet."""
    for name, it in (teachers or {}).items():
        if is_sharded(it):
            raise NotImplementedError(
                f"teachers: {name} is sharded by fully_shard, so that all processes must run it "
                "at once, and rows of different teachers do not. Give one teacher, or whole ones."
            )
    if args.teacher_alignment is not None and (is_sharded(teacher) or is_sharded(model)):
        raise NotImplementedError(
            "teacher_alignment is not supported with models sharded by fully_shard; got "
            f"{args.teacher_alignment!r}."
        )
    _check_adapted(model)
    if not is_sharded(model):
        return
    if (name := whole_by_mistake(model)) is not None:
        raise ValueError(
            f"model: {name} is trained and no part of what fully_shard shares, so that processes "
            "would train it apart. Put adapters on before fully_shard."
        )
    if teacher == "base":
        raise NotImplementedError(
            "teacher='base' is not supported with a student sharded by fully_shard, whose "
            "adapters are gathered with their layers. Give the model itself as the teacher."
        )
    if args.teacher_model_kind is not None:
        raise NotImplementedError(
            "teacher_model_kind is not supported with a student sharded by fully_shard, whose "
            f"weights no process has alone; got {args.teacher_model_kind!r}."
        )


def check_zero3(model: Any, args: DistillConfig, teacher: Any, teachers: Any) -> None:
    """Refuse what weights shared by DeepSpeed's ZeRO-3 cannot do yet.

    Raises:
        NotImplementedError: Names the setting.
    """
    zero3.check_plugin(args.deepspeed_plugin)
    named: dict[str, Any] = {"teachers": teachers and [*teachers]}
    named |= {"teacher_model_kind": args.teacher_model_kind}
    named |= {"teacher_alignment": args.teacher_alignment}
    named |= {"teacher": "base" if teacher == "base" else None}
    adapted = getattr(model, "peft_config", None) is not None
    named |= {"model": "a PEFT student" if adapted else None}
    for name, it in (("model", model), ("teacher", teacher)):
        if is_sharded(it):
            named[name] = "one sharded by fully_shard"
    for name, value in named.items():
        if value:
            raise NotImplementedError(
                f"{name} is not supported with DeepSpeed's ZeRO-3; got {value!r}."
            )


def _check_adapted(model: Any) -> None:
    """Refuse adapters whose weights fully_shard does not share as it shares the model's."""
    if isinstance(model, FSDPModule) and is_adapted(model):
        raise ValueError(
            "model: fully_shard was called on PEFT's wrapper, which generate does not run. Call "
            "it on model.get_base_model()."
        )
    if is_sharded(model) and getattr(model, "_hf_peft_config_loaded", False):
        raise NotImplementedError(
            "model: adapters put on by add_adapter are not supported with a student sharded by "
            "fully_shard. Wrap the model with peft.get_peft_model."
        )


def check_arguments(
    model: Any,
    args: Any,
    teacher: Any,
    teachers: Any,
    divergence: Any,
    settings: Mapping[str, Any],
    of_teacher: Any = None,
) -> None:
    """Refuse what a trainer cannot be made of.

    Args:
        model: The student.
        args: Its settings.
        teacher: A teacher.
        teachers: Or several.
        divergence: What is minimised.
        settings: Those of transformers.Trainer.
        of_teacher: The teacher's tokenizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be the student, a model; got {model!r}. rkl.distill.load_model gives one."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        check_peft()
    if not isinstance(args, DistillConfig):
        raise TypeError(f"args must be a DistillConfig; got a {type(args).__name__}.")
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence must be a Divergence such as AKL(); got {divergence!r}. "
            "rkl.parse makes one from a string."
        )
    if args.teacher_model_kind is not None:
        if teacher is not None or teachers is not None:
            raise ValueError(
                f"teacher must be left out where teacher_model_kind is {args.teacher_model_kind}: "
                "the student is its own."
            )
    elif args.teacher_alignment is not None:
        _check_aligned(args.teacher_alignment, teacher, teachers, of_teacher, settings)
    elif teachers is None:
        check_teacher(teacher)
    elif teacher is not None:
        raise ValueError("teacher and teachers exclude one another; got both.")
    elif not isinstance(teachers, Mapping) or not teachers:
        raise TypeError(f"teachers must map names to one teacher at least; got {teachers!r}.")
    several = teachers or {}
    for name, one in several.items():
        check_teacher(one)
        if isinstance(one, Teacher) and not one.shares_tokens and len(several) > 1:
            raise ValueError(
                f"teachers: {name} has another tokenizer than the student, and must be the only "
                "one."
            )
    needed = {
        "teacher_routing_column": ("teachers", teachers is not None),
        "teachers_on_device": ("teachers", teachers is not None),
        "teacher_update_rate": ("teacher_model_kind='ema'", args.teacher_model_kind == "ema"),
        "teacher_sync_steps": ("teacher_model_kind='ema'", args.teacher_model_kind == "ema"),
    }
    for name, (what, used) in needed.items():
        value = getattr(args, name)
        if not used and value != getattr(DistillConfig, name):
            raise ValueError(f"{name} goes with {what}, and has no effect; got {value!r}.")
    if settings.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func must be left out: the divergence is the loss.")
    if settings.get("model_init") is not None:
        raise ValueError("model_init must be left out; pass the student as model.")


def _check_aligned(
    kind: str, teacher: Any, teachers: Any, of_teacher: Any, settings: Mapping[str, Any]
) -> None:
    """Refuse what cannot be aligned: no model, or tokenizers that are not at hand."""
    if teachers is not None or not isinstance(teacher, nn.Module):
        got = "teachers" if teachers is not None else f"{teacher!r:.80}"
        raise TypeError(
            f"teacher must be one model with teacher_alignment={kind!r}; got {got}. An "
            "AlignedTeacher is given without it."
        )
    given = {"teacher_processing_class": of_teacher}
    given["processing_class"] = settings.get("processing_class")
    for name, tokenizer in given.items():
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"{name} must be a tokenizer with teacher_alignment={kind!r}; got {tokenizer!r}."
            )


def check_teacher_texts(dataset: Any, context: float, written: int = 0) -> None:
    """Refuse texts that the teacher is to read and are longer than its context.

    Args:
        dataset: The blocks; other kinds of data sets are checked batch by batch.
        context: Most tokens that the teacher can read.
        written: Tokens of a reply behind each prompt; 0 where none is written.
    """
    if not isinstance(dataset, TokenDataset):
        return
    columns = (dataset.columns.get(name, ()) for name in (TEACHER_IDS, TEACHER_LABELS))
    for ids, labels in zip(*columns, strict=True):
        if ids is not None:
            prompt = len(ids) - int((labels != IGNORED).sum())
            check_teacher_length(max(len(ids), prompt + written), context)


def check_teacher_length(length: int, context: float) -> None:
    """Refuse a text longer than the teacher's context."""
    if length > context:
        raise ValueError(
            f"teacher_prompt: with the completion behind it the text that the teacher reads has "
            f"{length} tokens, more than its context of {context}."
        )


def check_on_policy(divergence: Any, args: DistillConfig) -> None:
    """Refuse a divergence for own text where no text is the student's."""
    if divergence is None:
        return
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"on_policy_divergence must be a Divergence such as ReverseKL(); got {divergence!r}."
        )
    if not args.lmbda:
        raise ValueError(
            "on_policy_divergence needs lmbda above 0, so that there is text of the student's; "
            f"got {divergence} with lmbda={args.lmbda}."
        )
