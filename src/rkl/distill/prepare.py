"""The parts of a distillation: blocks of text, a tokenizer, a teacher and a student."""

import json
import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer_callback import PrinterCallback

from rkl import checks
from rkl.checks import warn
from rkl.distill.arguments import check_teacher_texts
from rkl.distill.config import DistillConfig
from rkl.distill.limits import (
    check_context,
    configured_context,
    context_of,
    default_length,
    is_address,
    is_cache,
    published_column,
    template_variables,
)
from rkl.distill.models import lora
from rkl.distill.models.heads import check_causal, why_not_apart
from rkl.distill.models.layers import without_layers
from rkl.distill.models.loading import (
    UNREADABLE,
    is_adapter,
    load_config,
    load_model,
    load_tokenizer,
    model_input,
)
from rkl.distill.models.sharded import shard
from rkl.distill.progress import journaled
from rkl.distill.settings import DistillSettings
from rkl.distill.teachers.cache import INDEX, CachedTeacher, cache_teacher
from rkl.distill.teachers.captures import Compression, read_compression
from rkl.distill.teachers.published import PublishedTeacher, read_published
from rkl.distill.teachers.server import ServerTeacher
from rkl.distill.teachers.teacher import ModelTeacher, Teacher
from rkl.distill.text.chats import ChatTemplate, choose_template
from rkl.distill.text.data import (
    IGNORED,
    SHORTEST_PASSAGE,
    TEACHER_IDS,
    NoTrainedTokensError,
    TokenDataset,
    holds_chats,
    show_example,
    spread,
    tokenize,
)
from rkl.distill.text.sources import Row, Rows, kind_of, read_rows
from rkl.distill.text.vocabulary import SAMPLE, check_splits_alike, share_vocabulary
from rkl.distill.trainer import DistillTrainer
from rkl.distill.writing.rollouts import check_prompts, ends_of
from rkl.runs import fingerprint
from rkl.runs.integrity import Input, files_of, values_of
from rkl.runs.progress import say

BLANK_LINE = r"\n[^\S\n]*\n\s*"
EXAMPLE = 600  # characters of the first block that are shown
LOSS_TOP_K = 64  # tokens asked for at each place of a text, where nothing else is said
LOGGED = 1000  # rows that a run logs, about
OF_GENERATION = (  # settings that the trainer has under the same names
    *("lmbda", "seq_kd", "max_completion_length", "sampling_temperature", "top_p", "top_k"),
    *("min_p", "num_generations", "steps_per_generation", "prompt_tokens"),
    *("guard", "guard_window", "log_completions", "student_server", "student_server_weights"),
)

OF_TEACHERS = (
    *("teacher_routing_column", "teachers_on_device", "teacher_model_kind"),
    *("teacher_update_rate", "teacher_sync_steps"),
)


@dataclass(frozen=True)
class Text:
    """The text that is trained on, and the text held out.

    Attributes:
        rows: The rows trained on.
        blocks: The same as blocks of tokens.
        held_out: Blocks of other rows; None where there are none.
        origin: Where those come from, in words.
        rows_held_out: The rows of them.
        template: A fingerprint of the chat template, where the rows are chats.
        apart: True where rows that shared blocks got one each, for a model mixes them.
        teacher: The one in a column of the data, where it is meant.
    """

    rows: Rows
    blocks: TokenDataset
    held_out: TokenDataset | None
    origin: str
    rows_held_out: Sequence[Row] = ()
    template: str | None = None
    apart: bool = False
    teacher: PublishedTeacher | None = None

    def record(self) -> dict[str, Any]:
        """The entries for run.json."""
        return {
            "fingerprint": fingerprint(self.rows),
            "rows": len(self.rows),
            "blocks": len(self.blocks),
            "tokens": len(self.blocks.tokens),
            "trained_tokens": self.blocks.trained_tokens,
            "left_out": self.blocks.left_out,
            "chat_template": self.template,
            "held_out": {
                "origin": self.origin,
                "blocks": 0 if self.held_out is None else len(self.held_out),
            },
        }

    def inputs(self, settings: DistillSettings) -> dict[str, Input]:
        """The digests of the rows, of those held out, and of the tokens that they come to."""
        source = settings.data if settings.eval_data is None else settings.eval_data
        held, more = self.held_out, {"rows": len(self.rows)}
        blocks = [self.blocks] if held is None else [self.blocks, held]
        columns = "tokens", "trained", "bounds", "begins"
        parts = [getattr(block, name) for block in blocks for name in columns]
        parts = [it for it in parts if it is not None]
        found = {
            "data": values_of(settings.data, self.rows, **more),
            "tokens of data": values_of(None, parts, of="tokenizer, chat template, max_length"),
        }
        if self.rows_held_out:
            more = {"rows": len(self.rows_held_out)}
            found["held-out text"] = values_of(source, self.rows_held_out, **more)
        if self.teacher is not None:
            found["teacher"] = values_of(settings.data, self.teacher.contents())
        return found

    def beginning(self, count: int) -> "Text":
        """The same with no more than so many blocks, and so many held out."""
        held = None if self.held_out is None else _first(self.held_out, count)
        return replace(self, blocks=_first(self.blocks, count), held_out=held)

    @property
    def packs(self) -> bool:
        """True if some rows share a block."""
        return any(it is not None and it.begins is not None for it in (self.blocks, self.held_out))

    def unpacked(self) -> "Text":
        """The same with a block for each row."""
        held = None if self.held_out is None else self.held_out.unpacked()
        apart = self.apart or self.packs
        return replace(self, blocks=self.blocks.unpacked(), held_out=held, apart=apart)

    def first_block(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The beginning of the first block, what is not trained on in brackets."""
        example = show_example(self.blocks, tokenizer)
        return example if len(example) <= EXAMPLE else f"{example[:EXAMPLE]} ..."

    def observed(self, settings: DistillSettings) -> list[Dataset]:
        """All blocks that a run observes: those trained on, and of those held out some."""
        held_out = self.looked_at(settings.eval_blocks)
        return [self.blocks] if held_out is None else [self.blocks, held_out]

    def looked_at(self, count: int | None) -> Subset | None:
        """At most so many of the blocks held out, evenly spaced."""
        if self.held_out is None:
            return None
        places = range(len(self.held_out))
        return Subset(self.held_out, spread(places, count or len(places)))


def _first(blocks: TokenDataset, count: int) -> TokenDataset:
    bounds = blocks.bounds[: count + 1]
    end = int(bounds[-1])
    part: dict[str, Any] = {"tokens": blocks.tokens[:end], "trained": blocks.trained[:end]}
    part |= {"begins": None if blocks.begins is None else blocks.begins[:end]}
    part |= {"columns": {name: it[:count] for name, it in blocks.columns.items()}}
    return replace(blocks, bounds=bounds, **part)


@dataclass(frozen=True)
class Models:
    """A teacher, as a model or cached, a student, and the tokenizer of each.

    Attributes:
        teacher: None where there are several, or the student is its own.
        student: A model, or peft's wrapper of one.
        teacher_tokenizer: Where there are several teachers or none, the student's.
        tokenizer: The student's.
        teachers: Several by their names.
    """

    teacher: PreTrainedModel | Teacher | None
    student: Any
    teacher_tokenizer: PreTrainedTokenizerBase
    tokenizer: PreTrainedTokenizerBase
    teachers: Mapping[str, PreTrainedModel] = field(default_factory=dict)


def with_length(settings: DistillSettings) -> DistillSettings:
    """The settings with a length of blocks, which all models can read where none was chosen.

    A model whose configuration cannot be read is left out here: it is refused when it is loaded.
    """
    if settings.max_length is not None:
        return settings
    names = [str(settings.teacher) if settings.student is None else settings.student]
    if settings.teacher_alignment is None:  # or the teacher reads texts in tokens of its own
        names += settings.named_teachers.values()
    contexts = [it for name in names if (it := _context(name)) is not None]
    return replace(settings, max_length=default_length(contexts))


def _context(name: str) -> float | None:
    """The context of a model by its name, or the length of a cache's blocks; None if unknown."""
    if is_address(name) or published_column(name) is not None:
        return None
    try:
        if is_cache(name):
            return CachedTeacher(name).record["made"].get("max_length")
        return configured_context(
            _described(Path(name)) if name.endswith(".json") else load_config(name)
        )
    except (*UNREADABLE, ImportError):
        return None


def load(settings: DistillSettings) -> tuple[Text, Models]:
    """All that a run begins with, once it is seen that it goes together."""
    settings = with_length(settings)
    _check_extras(settings)
    tokenizers = _load_tokenizers(settings)
    template = choose_template(*tokenizers, settings.chat_template)
    student: Any = None
    if published_column(settings.teacher) is None:
        text = read_text(settings, tokenizers[1])
    else:
        student = _load_student(settings)
        text = _read_published_text(settings, tokenizers[1], _vocab(student))
    if text.template is not None and template:
        warn(template)
    if settings.cache_teacher or (settings.teacher is not None and is_cache(settings.teacher)):
        _refuse_teacher_prompts(text)
    teachers = {} if settings.teacher is not None else _load_teachers(settings)
    teacher: Any = text.teacher
    if settings.teacher is not None and teacher is None:
        teacher = _load_teacher(settings, tokenizers[0])
    student = student or _load_student(settings)
    models: dict[str, Any] = {f"teacher {name}": it for name, it in teachers.items()}
    if isinstance(teacher, PreTrainedModel):
        models["teacher"] = teacher
    models["student"] = student
    for name, model in models.items():
        check_causal(name, model)
    aligned = settings.teacher_alignment is not None  # the teacher then reads texts one by one
    text = _kept_apart(text, {"student": student} if aligned else models)
    if isinstance(teacher, Teacher):
        text = text.unpacked() if teacher.needs_rows_apart else text
        teacher.check_tokenizer(tokenizers[1])
        for blocks in text.observed(settings):
            teacher.check_rows(blocks, settings.max_length)
    shared = {"": teacher} if teacher is not None else teachers
    for name, one in ({} if aligned else shared).items():
        of_teacher = one.vocab if isinstance(one, Teacher) else _vocab(one)
        tokenizer = tokenizers[0] if not name else _tokenizer_of_teacher(settings, name)
        _check_shared(text, name, of_teacher, _vocab(student), (tokenizer, tokenizers[1]))
    for name, model in models.items():
        if name == "student" or not aligned:
            _check_fits(name, model, settings, text)
        if settings.writes:
            check_prompts(text.blocks, settings, context_of(model))
        if name != "student" or settings.teacher_model_kind is not None:
            written = settings.max_completion_length if settings.lmbda else 0
            check_teacher_texts(text.blocks, context_of(model), written)
            check_teacher_texts(text.held_out, context_of(model))
    if text.template is not None:
        _end_replies(student, tokenizers[1])
    if settings.lora_rank is not None:
        how = settings.lora_rank, settings.lora_targets
        student = lora.with_adapters(student, *how, seed=settings.seed)
    return text, Models(teacher, student, *tokenizers, teachers)


def _refuse_teacher_prompts(text: Text) -> None:
    held = () if text.held_out is None else (text.held_out,)
    if any(TEACHER_IDS in blocks.columns for blocks in (text.blocks, *held)):
        raise ValueError(
            "teacher_prompt and privileged_context need a teacher that reads them in the run: a "
            "cache holds what a teacher told of the student's prompts."
        )


def _load_teachers(settings: DistillSettings) -> dict[str, PreTrainedModel]:
    named = settings.named_teachers.items()
    return {name: load_model(path, dtype=settings.dtype) for name, path in named}


def _tokenizer_of_teacher(settings: DistillSettings, name: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(settings.named_teachers[name])


def _check_shared(
    text: Text,
    name: str,
    of_teacher: int,
    of_student: int,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
) -> None:
    """Refuse a teacher that does not share the student's tokens.

    Args:
        text: What is trained on.
        name: Of the teacher, where there are several: these must share all of the tokens.
        of_teacher: Size of its vocabulary.
        of_student: Size of the student's.
        tokenizers: Of both.
    """
    shared = share_vocabulary(of_teacher, of_student, *tokenizers)
    if name and shared.differing:
        raise ValueError(
            f"teachers: {name} must have the student's tokenizer where there are several. "
            f"{shared.told()}"
        )
    shared.check("data", text.blocks.tokens)
    if text.held_out is not None:
        shared.check("eval_data", text.held_out.tokens)
    for ids in text.blocks.columns.get(TEACHER_IDS, ()) if shared.differing else ():
        if ids is not None:
            shared.check("teacher_prompt", ids)
    told = check_splits_alike(text.blocks.sample(SAMPLE), *tokenizers)
    for words in (shared.told() if shared.differing else "", told):
        if words:
            warn(words)


def load_for_cache(
    settings: DistillSettings,
) -> tuple[Text, PreTrainedModel | Teacher, PreTrainedTokenizerBase]:
    """Load the text of a run with these settings, and the teacher to cache."""
    settings = with_length(settings)
    tokenizers = _load_tokenizers(settings)
    template = choose_template(*tokenizers, settings.chat_template)
    text = read_text(settings, tokenizers[1])
    if text.template is not None and template:
        warn(template)
    _refuse_teacher_prompts(text)
    teacher = _load_teacher(settings, tokenizers[0])
    if not isinstance(teacher, Teacher):
        check_causal("teacher", teacher)
        text = _kept_apart(text, {"teacher": teacher})
        _check_fits("teacher", teacher, settings, text)
    return text, teacher, tokenizers[1]


def _kept_apart(text: Text, models: Mapping[str, Any]) -> Text:
    """The text with a block for each row, where a model would mix rows of one block."""
    for name, model in models.items():
        if text.packs and (reason := why_not_apart(model)) is not None:
            warn(f"packing: rows get a block each, for the {name} mixes them: {reason}.")
            text = text.unpacked()
    return text


def _load_teacher(
    settings: DistillSettings, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | Teacher:
    """The model that a setting names, or what a cache or an address stands for."""
    named = str(settings.teacher)
    if is_cache(named):
        return CachedTeacher(named)
    if not is_address(named):
        return load_model(named, dtype=settings.dtype)
    reference = None
    if settings.teacher_reference is not None:
        device = checks.device(settings.device)
        model: Any = load_model(settings.teacher_reference, dtype=settings.dtype)
        reference = ModelTeacher(model.to(device))
    return ServerTeacher(
        named,
        tokenizer,
        top_k=settings.loss_top_k or LOSS_TOP_K,
        timeout=settings.teacher_timeout,
        reference=reference,
    )


def _check_extras(settings: DistillSettings) -> None:
    """Refuse what needs a package that is not installed."""
    if settings.lora_rank is not None:
        lora.check_installed()
    there = get_available_reporting_integrations() if settings.reporters else []
    for name in settings.reporters:
        if name not in there:
            raise ModuleNotFoundError(
                f"report_to: {name} needs a package that is not installed: pip install {name}"
            )


def inputs_of(
    settings: DistillSettings, text: Text, teacher: Teacher | None = None
) -> dict[str, Input]:
    """The digests of all that a run begins with, as its ``run.json`` keeps them.

    Args:
        settings: Which models.
        text: What is read from the data.
        teacher: What is asked in place of the model; of a cache, its files count.
    """
    found = text.inputs(settings)
    named = settings.named_teachers
    single = named.get("")
    place = getattr(teacher, "path", None) if single is None or teacher else Path(single)
    if place is not None and is_cache(place):
        found["teacher"] = files_of(
            place, {INDEX: place / INDEX}
        )  # with the digests of the others
    elif teacher is None:
        for name, model in named.items():
            if not is_address(model) and published_column(model) is None:
                found[f"teacher {name}".strip()] = model_input(model)
    if settings.student is not None:
        found["student"] = model_input(settings.student)
    elif teacher is not None:
        found["student"] = model_input(str(single))
    return found


def read_text(settings: DistillSettings, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Read the data, and hold some of it out if nothing else is given for that."""
    column = settings.routing_column
    rows = read_rows(settings.data, split=settings.split, column=column)
    _check_names(rows, settings)
    shape: Any = {"max_length": settings.max_length, "packing": settings.packing}
    shape |= {"train_on": settings.train_on, "column": column}
    shape |= {"chat_template_kwargs": template_variables(settings.chat_template_kwargs)}
    kind = kind_of(rows[0], rows.place(0))
    if settings.writes:
        shape["packing"] = False  # or a reply would follow the rows before its prompt
    if settings.eval_data is not None:
        held = read_rows(settings.eval_data, split=settings.eval_split, column=column)
        _check_names(held, settings)
        origin = settings.eval_data
        blocks = _tokens_of("eval_data", held, tokenizer, shape)
    else:
        train, held = _apart(rows, settings.held_out, settings.seed)
        blocks = _held_out_blocks(held, tokenizer, shape)
        rows, held = (rows, held.some([])) if blocks is None else (train, held)
        origin = _origin(settings, blocks, kind)
    template = fingerprint([str(tokenizer.chat_template)]) if holds_chats(rows) else None
    read = _tokens_of("data", rows, tokenizer, shape | {"prompts": settings.lmbda == 1})
    _tell_of_shared(rows, held)
    return Text(rows, read, blocks, origin, held, template)


def _tell_of_shared(rows: Rows, held: Rows) -> None:
    """A line if rows that are held out are trained on too, as those that data has twice."""
    keys = [_key_of(row) for row in held]
    known = {*keys}
    there = {key for row in rows if (key := _key_of(row)) in known} if known else set()
    if shared := sum(key in there for key in keys):
        say(
            f"{shared:,} OF {len(held):,} ROWS HELD OUT ARE TRAINED ON TOO: the held-out loss, "
            "which chooses the best student, is partly of text that it was trained on. Leave out "
            "rows that the data have twice, or give other --eval-data."
        )


def _key_of(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=repr)


def _origin(settings: DistillSettings, blocks: TokenDataset | None, kind: str) -> str:
    """The origin of the held-out blocks, in words."""
    if blocks is not None:
        return f"{settings.held_out:.0%} of {settings.data}"
    if settings.held_out:
        why = f"{settings.data} cannot be divided"
        if kind == "prompt":
            why = "prompts alone hold no text to compare on"
        say(
            f"NOTHING IS HELD OUT: {why}, so that the last student is kept, not the best. Give "
            "--eval-data, or --held-out 0 to say so."
        )
    return "nothing"


def _read_published_text(
    settings: DistillSettings, tokenizer: PreTrainedTokenizerBase, vocab: int
) -> Text:
    """Read data with a column of log-probabilities, which are the teacher."""
    shape: Any = {"max_length": settings.max_length, "train_on": settings.train_on}
    shape |= {"chat_template_kwargs": template_variables(settings.chat_template_kwargs)}
    how: Any = {"vocab": vocab, "column": published_column(settings.teacher)}
    if settings.teacher_compression is not None:
        how["compression"] = _read_compression(settings.teacher_compression)
    rows, teacher = read_published(settings.data, settings.split, tokenizer, shape, **how)
    everywhere = range(len(rows))
    if settings.eval_data is not None:
        try:
            held, other = read_published(
                settings.eval_data, settings.eval_split, tokenizer, shape, **how
            )
        except ValueError as error:
            raise ValueError(f"eval_data: {error}") from None
        blocks, trained = _published_blocks(held, other, range(len(held))), everywhere
        teacher.include(other)
        origin = settings.eval_data
    else:
        # Of places, for of texts a single one would be cut, and its log-probabilities not.
        places = Rows({"place": at} for at in everywhere)
        train, apart = _apart(places, settings.held_out, settings.seed)
        chosen = [it["place"] for it in apart]
        blocks, trained = _published_blocks(rows, teacher, chosen), everywhere
        if blocks is not None:
            trained = [it["place"] for it in train]
        held, origin = rows.some(chosen if blocks else []), _origin(settings, blocks, "text")
    read = _published_blocks(rows, teacher, trained)
    if read is None:
        raise NoTrainedTokensError(
            f"data: no row of {settings.data} that is not held out has a token to train on."
        )
    template = fingerprint([str(tokenizer.chat_template)]) if holds_chats(rows) else None
    _tell_of_shared(rows.some(trained), held)
    return Text(rows.some(trained), read, blocks, origin, held, template, teacher=teacher)


def _read_compression(path: str) -> Compression:
    if not Path(path).is_file():
        raise FileNotFoundError(f"teacher_compression: there is no file {path}.")
    try:
        return read_compression(path)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"teacher_compression: {path}: {error}") from None


def _published_blocks(
    rows: Rows, teacher: PublishedTeacher, chosen: Collection[int]
) -> TokenDataset | None:
    """The teacher's texts of these rows as blocks; None where there are none."""
    wanted = {*chosen}
    pairs = zip(teacher.numbers, teacher.rows, strict=True)
    texts = [(number, row) for number, row in pairs if number in wanted]
    if not texts:
        return None
    lost = sorted(wanted - {number for number, _ in texts})
    places = ", ".join(rows.place(number) for number in lost[:3])
    why = f"no token to train on has log-probabilities: {places}" if lost else ""
    if lost:
        warn(f"{len(lost):,} of {len(wanted):,} rows left out: {why}.")
    tokens = [torch.tensor(row["input_ids"], dtype=torch.int32) for _, row in texts]
    labels = torch.cat([torch.tensor(row["labels"]) for _, row in texts])
    return TokenDataset(
        kind_of(rows[0], rows.place(0)),
        torch.cat(tokens),
        labels != IGNORED,
        torch.tensor([0, *map(len, tokens)]).cumsum(0),
        rows=len(wanted),
        cut_tokens=0,
        left_out=len(lost),
        reasons=why,
    )


def _check_names(rows: Rows, settings: DistillSettings) -> None:
    """Refuse a row that names no teacher, and a teacher that no row names."""
    if (column := settings.routing_column) is None:
        return
    known = [*settings.named_teachers]
    for index, row in enumerate(rows):
        if row[column] not in known:
            raise ValueError(
                f"{rows.place(index)}: {column} must be one of {', '.join(known)}, the teachers; "
                f"got {row[column]!r}."
            )
    named = {row[column] for row in rows}
    for name in known:
        if name not in named and rows.source == settings.data:
            raise ValueError(
                f"teachers: no row of {rows.source} names {name} in {column}, so that it would "
                "teach nothing."
            )


def _tokens_of(
    name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, shape: dict[str, Any]
) -> TokenDataset:
    try:
        return tokenize(rows, tokenizer, **shape)
    except ValueError as error:
        told = str(error)
        raise ValueError(told if told.startswith(name) else f"{name}: {told}") from None


def _held_out_blocks(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, shape: dict[str, Any]
) -> TokenDataset | None:
    """The blocks of rows held out at random; None where these give nothing to evaluate on."""
    if not rows:
        return None
    try:
        return tokenize(rows, tokenizer, **shape)
    except NoTrainedTokensError:
        return None


def _apart(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """The rows to train on, and a random share of them held out; of a single text, its end."""
    if not share:
        return rows, rows.some([])
    if len(rows) == 1 and "text" in rows[0]:
        return _beginning_and_end(rows, share)
    count = round(share * len(rows)) or 1
    if count >= len(rows):
        return rows, rows.some([])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held = set(order[:count].tolist())
    return (
        rows.some(number for number in range(len(rows)) if number not in held),
        rows.some(sorted(held)),
    )


def _beginning_and_end(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """A text cut before its last share: at a blank line, else the end of a line, else a space.

    A cut that holds out more than twice the share, and more than half of the text, is none.
    """
    text = rows[0]["text"]
    wanted = round((1 - share) * len(text))
    largest = max(2 * share, 0.5) * len(text)
    for mark in (BLANK_LINE, r"\n\s*", r"\s+"):
        cuts = [cut for cut in re.finditer(mark, text) if cut.start() < wanted]
        if not cuts or len(text) - cuts[-1].end() > largest:
            continue
        begun, rest = text[: cuts[-1].start()], text[cuts[-1].end() :]
        shortest = 1 if mark == BLANK_LINE else SHORTEST_PASSAGE
        if min(len(begun.strip()), len(rest.strip())) >= shortest:
            parts = [{"text": begun + "\n"}], [{"text": rest}]
            first, second = (
                Rows(part, rows.source, rows.unit, rows.numbers[:1]) for part in parts
            )
            return first, second
    return rows, rows.some([])


def _load_tokenizers(
    settings: DistillSettings,
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The teacher's tokenizer and the student's, which is the teacher's if it has none."""
    first = next(iter(settings.named_teachers.values()), None)
    if (
        first is None
        or is_address(first)
        or is_cache(first)
        or published_column(first) is not None
    ):
        student = load_tokenizer(str(settings.student))
        return student, student
    teacher, path = load_tokenizer(first), Path(settings.student or "none.json")
    has_none = path.is_dir() and not any(path.glob("tokenizer*")) and not is_adapter(path)
    if path.suffix == ".json" or has_none:
        return teacher, teacher
    return teacher, load_tokenizer(path)


def _end_replies(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the student's replies end at the token with which the template ends a turn."""
    end, known = ChatTemplate(tokenizer).turn_end, ends_of(student, tokenizer)
    if end is None or end in known:
        return
    warn(
        f"The chat template ends what the assistant says with "
        f"{tokenizer.convert_ids_to_tokens(end)}, not with {tokenizer.eos_token}: the student's "
        "generation_config is told to stop there too."
    )
    settings = student.generation_config or GenerationConfig()
    settings.eos_token_id = [*known, end]
    settings._from_model_config = False  # which would have it made anew from the model's own
    student.generation_config = settings


def with_cached_teacher(
    settings: DistillSettings, folder: Path, text: Text, models: Models
) -> Models:
    """The same with what the teacher says of the text kept on the disk, and no model of it."""
    cached = cache_teacher(
        cast(Any, models.teacher),  # never None: settings refuse it
        ConcatDataset(text.observed(settings)),
        folder,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        device=checks.device(settings.device),
    )
    return replace(models, teacher=cached)


def shard_models(settings: DistillSettings, models: Models) -> None:
    """Share the student, and a teacher that is a model, among the processes, if that is asked."""
    if not settings.shard:
        return
    device = checks.device(settings.device)
    shard(models.student, device)
    if isinstance(models.teacher, PreTrainedModel):
        shard(models.teacher, device)


def _load_student(settings: DistillSettings) -> PreTrainedModel:
    source = str(settings.teacher) if settings.student is None else settings.student
    if not source.endswith(".json"):
        # Of its own, not out of the teacher in memory: the two must not share weights.
        student = load_model(source, dtype="float32", drop_layers=settings.drop_layers)
        if is_adapter(source):
            warn(
                f"student: {source} is an adapter; it is merged into its base, of which "
                f"{'all weights' if settings.lora_rank is None else 'new adapters'} are trained."
            )
        return student
    if not Path(source).is_file():
        raise FileNotFoundError(f"student: there is no file {source}.")
    torch.manual_seed(settings.seed)
    try:
        student = AutoModelForCausalLM.from_config(
            _described(Path(source)), dtype=torch.float32, trust_remote_code=False
        )
    except (OSError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"student: {source} describes no causal model: {reason}") from None
    return without_layers(student, settings.drop_layers) if settings.drop_layers else student


def save_student(settings: DistillSettings, folder: Path) -> None:
    """Write the student as a run begins with it, and its tokenizer."""
    tokenizers = _load_tokenizers(settings)
    choose_template(*tokenizers, settings.chat_template)
    _load_student(settings).save_pretrained(folder)
    tokenizers[1].save_pretrained(folder)


def save_merged(settings: DistillSettings, checkpoint: Path, folder: Path, *, chats: bool) -> None:
    """Write the student with its adapters merged, its tokenizer, and the adapters apart.

    Adapters of a student that no name loads (without some layers, or of random weights) are of
    use to nobody, and left out.

    Args:
        settings: Of the run.
        checkpoint: The folder with the adapters.
        folder: Where to write.
        chats: Whether the student was trained on chats, whose ends then end its replies.
    """
    _, tokenizer = tokenizers = _load_tokenizers(settings)
    choose_template(*tokenizers, settings.chat_template)
    student = _load_student(settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the run began
        if chats:
            _end_replies(student, tokenizer)
    lora.merged(student, checkpoint).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = str(settings.student)
    named = not source.endswith((".json", ".gguf")) and not source.startswith("package:")
    if named and settings.drop_layers is None:
        (folder / lora.ADAPTER).mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(checkpoint / name, folder / lora.ADAPTER / name)


def _described(path: Path) -> PretrainedConfig:
    """The configuration in a file, which a name on the Hub is never taken for."""
    described = json.loads(path.read_text(encoding="utf-8"))
    kind = described.get("model_type") if isinstance(described, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        code = " Code that lies beside it (auto_map) is never run." * ("auto_map" in described)
        raise ValueError(f"transformers knows no model_type {kind!r}.{code}")
    described.pop("auto_map", None)
    return CONFIG_MAPPING[kind].from_dict(described)


def _vocab(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _check_fits(name: str, model: PreTrainedModel, settings: DistillSettings, text: Text) -> None:
    config = model.config.get_text_config(decoder=True)
    if settings.max_length is not None:
        check_context(name, model, settings.max_length)
    largest = int(text.blocks.tokens.max())
    if largest >= config.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {config.vocab_size}, but the tokenizer gives token "
            f"{largest}; expected a model for this tokenizer."
        )


def make_trainer(
    settings: DistillSettings,
    folder: Path,
    text: Text,
    models: Models,
    *,
    processes: int = 1,
    **changes: Any,
) -> DistillTrainer:
    """The trainer that the settings describe; ``changes`` go to its DistillConfig."""
    total = settings.steps(len(text.blocks), processes)
    held_out = text.looked_at(settings.eval_blocks)
    tenth = max(1, total // 10)
    rate = settings.learning_rate_schedule
    warm = rate == "constant" and settings.warmup
    config: dict[str, Any] = {
        "max_steps": total,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if warm else rate,
        "schedule": settings.schedule,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_gradient,
        "temperature": settings.temperature,
        "hard_label_weight": settings.hard_label_weight,
        "router_aux_loss": settings.router_aux_loss,
        "max_length": settings.max_length,
        "compiled": settings.compiled,
        "allow_partial": settings.allow_partial,
        "teacher_alignment": settings.teacher_alignment,
        "loss_top_k": settings.loss_top_k if settings.teacher_alignment == "bytes" else None,
        **{name: it for name in OF_TEACHERS if (it := getattr(settings, name)) is not None},
        **{name: getattr(settings, name) for name in OF_GENERATION},
        "bf16": settings.dtype == "bfloat16",
        "activation_checkpointing": settings.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "seed": settings.seed,
        "save_steps": settings.save_every or tenth,
        "save_total_limit": settings.keep_checkpoints,
        "logging_steps": max(1, total // LOGGED),
        "logging_nan_inf_filter": False,
        **journaled(settings.device),
        "report_to": settings.reporters or "none",
    }
    if held_out is None:
        changes |= {"eval_on_start": False}
    else:
        config |= {"eval_strategy": "steps", "eval_steps": settings.eval_every or tenth}
        if settings.teacher_model_kind is None:  # the nearest to itself is the first
            config |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    trainer = DistillTrainer(
        models.student,
        DistillConfig(str(folder), **config | changes),
        teacher=models.teacher,
        teachers=models.teachers or None,
        token_weight=settings.weigh_tokens,
        divergence=settings.minimised,
        on_policy_divergence=settings.minimised_on_policy,
        teacher_processing_class=models.teacher_tokenizer,
        processing_class=models.tokenizer,
        train_dataset=text.blocks,
        eval_dataset=held_out,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
