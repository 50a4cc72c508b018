"""A teacher's distributions over a data set, on disk: computed once, read by any run.

A cache is a folder: ``cache.json`` says what it is of, shards in safetensors hold what was told,
and ``index.json``, written last, lists them with their digests and the rows in each. Shards are
only ever added, each whole or not at all, so that a killed process goes on to the same bytes.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from rkl.distill.known import Observed, logits_of
from rkl.distill.limits import ABOUT, check_count
from rkl.distill.models.heads import why_not_apart
from rkl.distill.teachers.teacher import ModelTeacher, Teacher
from rkl.distill.text.batches import Batch, PadRows, attended, shifted
from rkl.distill.text.data import TEACHER_IDS
from rkl.estimators import LinearHead, Sampled, TopK, draw
from rkl.runs import fingerprint, lock, save_tensors, write_json
from rkl.runs.files import append_jsonl, read_jsonl, sweep
from rkl.runs.integrity import difference, first_not_finite, measure, values_of

FORMAT = 2  # of cache.json and index.json; raised when an older rkl could no longer read them
SHARD = 2**28  # bytes after which a shard is closed, behind the batch that fills it
INDEX = "index.json"
_JOURNAL, _HEAD = "shards.jsonl", "head.safetensors"
_TOKENS = 256  # tokens whose logits exist at one time
_ENTRIES = {"keep", "stored", "teacher", "data", "tokenizer", "vocab", "scale", "softcap", "made"}

Rows: TypeAlias = Sequence[Mapping[str, Any]] | Dataset


class Keep(NamedTuple):
    """The form in which a cache keeps a teacher's distribution.

    Attributes:
        kind: Hidden states, from which nothing is lost; the likeliest atoms; or drawn atoms.
        count: Number of atoms.
    """

    kind: Literal["hidden", "top-k", "sampled"]
    count: int = 0

    def __str__(self) -> str:
        return f"{self.kind}={self.count}" if self.count else self.kind

    def bytes_per_token(self, width: int, stored: torch.dtype) -> int:
        """Bytes on the disk for each trained token."""
        return 8 * self.count if self.count else width * stored.itemsize


def parse_keep(text: str) -> Keep:
    """Parse "hidden", "top-k=64" or "sampled=50".

    >>> parse_keep("top-k=64")
    Keep(kind='top-k', count=64)
    """
    found = re.fullmatch(r"(hidden)|(top-k|sampled)=([1-9]\d{0,8})", str(text))
    if found is None:
        raise ValueError(f"keep must be hidden, top-k=64 or sampled=50, say; got {text!r}.")
    if found[1]:
        return Keep("hidden")
    return Keep(cast(Any, found[2]), int(found[3]))


class CachedTeacher(Teacher):
    """A teacher of which a folder keeps what it told of known rows.

    Rows are found by what is in them, so they may be shuffled, batched and padded in any way;
    a row with other tokens or other labels is refused. Shards are mapped, not read as a whole,
    and the digest of each is checked when it is opened.

    Args:
        path: The folder that :func:`cache_teacher` wrote.
    """

    reads_any_text = False

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.record, self._head = _opened(self.path)
        self.keep = parse_keep(self.record["keep"])
        self.vocab = self.record["vocab"]
        self.needs_rows_apart = bool(self.record["made"].get("apart", False))
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, shard in enumerate(self.record["shards"]):
            end = 0
            for key, count in shard["rows"]:
                self._places[key] = number, end, end + count
                end += count
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __str__(self) -> str:
        return f"a cache of {self.keep}, {len(self):,} rows, {self.vocab:,} logits, {self.path}"

    def observe(
        self,
        inputs: Mapping[str, Any],
        predicting: Bool[Tensor, "rows steps"],
        *,
        vocab: int | None = None,
    ) -> Observed:
        """The cached distributions of these rows."""
        device = predicting.device
        keys = enumerate(row_keys(inputs, predicting))
        parts = [self._row(row, key) for row, key in keys if key]
        told = {
            name: torch.cat([empty, *(it[name] for it in parts)]).to(device)
            for name, empty in self._nothing().items()
        }
        if self.keep.kind == "hidden":
            return self._hidden(told["hidden"], vocab)
        logp, index = told["logp"], told["index"].long()
        if vocab is not None and len(index) and int(index.max()) >= vocab:
            raise ValueError(
                f"teacher: {self.path} holds token {int(index.max())}, but teacher and student "
                f"share {vocab} tokens."
            )
        return TopK(logp, index) if self.keep.kind == "top-k" else Sampled(logp, index)

    def check_rows(self, rows: Any, max_length: int | None = None) -> None:
        """Refuse rows of which some are not in the cache."""
        total = missing = 0
        for inputs, predicting, _ in _batches(rows, 64, max_length):
            keys = [it for it in row_keys(inputs, predicting) if it]
            total, missing = total + len(keys), missing + len([*filter(self._lacks, keys)])
        if missing:
            how = ", ".join(f"{name}={value!r}" for name, value in self.record["made"].items())
            raise ValueError(
                f"data: {missing:,} of {total:,} blocks are not in the cache {self.path}. It was "
                f"made with {how or 'other rows'}: give the same, or make another one."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer with other tokens than the cache was made with."""
        told, now = self.record["tokenizer"], tokenizer_digest(tokenizer)
        if told is not None and told != now:
            raise ValueError(
                f"teacher: {self.path} was made with another tokenizer (digest {told[:12]}, the "
                f"student's has {now[:12]}). Teacher and student must share one."
            )

    def _lacks(self, key: str) -> bool:
        return key not in self._places

    def _row(self, row: int, key: str) -> dict[str, Tensor]:
        if self._lacks(key):
            raise ValueError(
                f"row {row} of the batch is not among the {len(self)} rows in the cache "
                f"{self.path}: its tokens, or which of them are trained on, are others. "
                "Was it made from other data, or with another max_length?"
            )
        number, start, end = self._places[key]
        return {name: it[start:end] for name, it in self._shard(number).items()}

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard, mapped; of a first time once its digest is checked."""
        if number not in self._shards:
            listed = self.record["shards"][number]
            file = self.path / listed["file"]
            expected = {name: listed[name] for name in ("sha256", "size")}
            if not file.is_file():
                raise FileNotFoundError(f"path: {self.path} has lost {file.name}.")
            if (now := measure(file)) != expected:
                raise ValueError(
                    f"path: {self.path}: {file.name} is damaged: its {difference(expected, now)}."
                )
            self._shards[number] = load_file(file)
        return self._shards[number]

    def _nothing(self) -> dict[str, Tensor]:
        if self.keep.kind == "hidden":
            width = self._head["weight"].shape[1]
            return {"hidden": torch.zeros(0, width, dtype=_dtype(self.record["stored"]))}
        count = self.keep.count
        if self.keep.kind == "top-k":
            count = min(count, self.vocab)
        return _tensors(TopK(torch.zeros(0, count), torch.zeros(0, count)))

    def _hidden(self, hidden: Tensor, vocab: int | None) -> LinearHead:
        self._head = {name: tensor.to(hidden.device) for name, tensor in self._head.items()}
        weight, bias = self._head["weight"][:vocab], self._head.get("bias")
        bias = None if bias is None else bias[:vocab]
        how = self.record["scale"], self.record["softcap"]
        return LinearHead(hidden.to(weight.dtype), weight, bias, *how)


def cache_teacher(
    teacher: nn.Module | Teacher,
    rows: Rows,
    path: str | os.PathLike,
    *,
    keep: str | Keep = "hidden",
    stored: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    made: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CachedTeacher:
    """Run a teacher once over rows, and keep what it tells wherever a token is trained on.

    A cache that is there already, of the same teacher and rows, is used as it is, and gone on
    with where it is not finished; another one is refused. A killed process leaves whole shards.

    Args:
        teacher: A model, or any other teacher.
        rows: Rows with ``input_ids`` and ``labels``: all that will be trained and evaluated on.
        path: The folder to write.
        keep: "hidden", of a teacher whose head is a plain output embedding; "top-k=64"; or
            "sampled=50", atoms drawn from it.
        stored: Precision of hidden states, "float32" or "bfloat16"; by default the one that they
            are computed in. Atoms are stored with 8 bytes each.
        batch_size: Rows that are run at one time. For the bits of the model run beside the
            student, that of the training.
        max_length: Tokens that are kept of each row, as in the trainer; None keeps all.
        tokenizer: What made the tokens; a student with another one is then refused.
        device: Where to run a model; by default, where it is.
        seed: Of drawn atoms.
        made: Settings of whoever made the rows, for messages.
        progress: Called with the number of rows that are done, and of all.

    Raises:
        ValueError: There is another cache, or the teacher does not tell what is to be kept.
        RunBusyError: Another process writes this cache.
    """
    check_count("batch_size", batch_size)
    check_count("seed", seed, at_least=0)
    if max_length is not None:
        check_count("max_length", max_length, at_least=2)
    if stored not in (None, "float32", "bfloat16"):
        raise ValueError(f"stored must be float32, bfloat16 or None; got {stored!r}.")
    if not len(cast(Sequence, rows)):
        raise ValueError("rows must hold at least one row to cache; got none.")
    if isinstance(teacher, nn.Module):
        teacher = ModelTeacher(teacher if device is None else teacher.to(device))
    elif not isinstance(teacher, Teacher):
        raise TypeError(f"teacher must be a model or a Teacher; got a {type(teacher).__name__}.")
    if not teacher.shares_tokens:
        raise ValueError(
            "teacher must have the student's tokens, which a cache is of; got a "
            f"{type(teacher).__name__}."
        )
    keep = keep if isinstance(keep, Keep) else parse_keep(keep)
    source = Source(teacher, rows, batch_size, max_length)
    about = source.about(keep, stored, tokenizer, seed, made or {})
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with _writing(path):
        if (path / INDEX).exists():
            _check_same(path, about)
            (path / _JOURNAL).unlink(missing_ok=True)
        else:
            _write(path, about, source, keep, seed, progress)
    return CachedTeacher(path)


def model_fingerprint(model: nn.Module) -> str:
    """A digest of a model's weights and buffers, their names included."""
    state = model.state_dict()
    return fingerprint(name.encode() + _bytes(tensor) for name, tensor in sorted(state.items()))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the tokens of a tokenizer and their numbers."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(tokens.encode()).hexdigest()


def written(path: str | os.PathLike) -> list[Path]:
    """The files of a cache in a folder, by their names."""
    names = f"^({'|'.join(map(re.escape, (ABOUT, INDEX, _JOURNAL, _HEAD)))}|shard-\\d+\\.saf.*)$"
    return [it for it in sorted(Path(path).iterdir()) if re.match(names, it.name)]


def row_keys(inputs: Mapping[str, Any], predicting: Bool[Tensor, "rows steps"]) -> list[str]:
    """A digest of each row up to the last token it is trained on: what the teacher depends on.

    Padding on the right has no part in it, nor have positions that count from 0 on, which a row
    gets beside others whose positions begin anew. A row that is not trained on has the empty key.
    """
    shape = inputs["input_ids"].shape
    names = sorted(it for it in inputs if it != "attention_mask" and _is_like(inputs[it], shape))
    attended = inputs.get("attention_mask")
    attended = torch.ones(shape, dtype=torch.bool) if attended is None else attended.bool()
    columns = {"": predicting, " ": attended} | {name: inputs[name] for name in names}
    columns = {name: column.cpu() for name, column in columns.items()}
    keys = []
    for row, trained in enumerate(columns[""]):
        end = int(trained.nonzero().max()) + 1 if trained.any() else 0
        own = {name: column[row, :end] for name, column in columns.items()}
        if "position_ids" in own and torch.equal(own["position_ids"], torch.arange(end)):
            del own["position_ids"]
        named = ",".join(name for name in own if name.strip())
        digest = hashlib.blake2b(named.encode(), digest_size=16)
        for column in own.values():
            digest.update(_bytes(column))
        keys.append(digest.hexdigest() if end else "")
    return keys


class Source:
    """The rows to cache, each once, and the teacher that tells of them."""

    def __init__(self, teacher: Teacher, rows: Any, batch_size: int, max_length: int | None):
        self.teacher, self.batch_size, self.max_length = teacher, batch_size, max_length
        self.counts: dict[str, int] = {}
        chosen, at, shared = [], 0, False
        for inputs, predicting, _ in _batches(rows, 64, max_length):
            counts = predicting.sum(-1).tolist()
            shared = shared or _shares_blocks(inputs)
            for key, count in zip(row_keys(inputs, predicting), counts, strict=True):
                if key and key not in self.counts:
                    self.counts[key] = count
                    chosen.append(at)
                at += 1
        model = teacher.model if shared else None
        if model is not None and (reason := why_not_apart(model)) is not None:
            raise ValueError(
                "rows must have a block each for this teacher, which mixes those of one: "
                f"{reason}. tokenize(..., packing=False), or unpacked() of its result, gives such "
                "rows."
            )
        self.rows: Any = Subset(rows, chosen)
        self.tokens = sum(self.counts.values())

    @property
    def head_bytes(self) -> int:
        """Size of the output embedding that is kept beside hidden states."""
        linear: Any = getattr(getattr(self.teacher, "head", None), "linear", None)
        if linear is None:
            return 0
        return linear.weight.nbytes + (0 if linear.bias is None else linear.bias.nbytes)

    def observe(self, batch: Batch) -> Observed:
        """The teacher's distributions for a batch."""
        model: Any = self.teacher.model
        device = batch.predicting.device if model is None else next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        with torch.no_grad():
            return self.teacher.observe(inputs, batch.predicting.to(device))

    def batches(self) -> Iterator[Batch]:
        """The rows, batch after batch."""
        return _batches(self.rows, self.batch_size, self.max_length)

    def about(
        self,
        keep: Keep,
        stored: str | None,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
        made: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The contents of cache.json: equal for equal teacher, rows and settings."""
        head: Any = getattr(self.teacher, "head", None)
        linear = getattr(head, "linear", None)
        model = self.teacher.model
        if keep.kind == "hidden" and linear is None:
            named = type(self.teacher if model is None else model).__name__
            raise ValueError(
                f"model: the logits of a {named} are no function of hidden states and an output "
                "embedding that could be kept. Take keep='top-k=64'."
            )
        dtype = None if linear is None else str(linear.weight.dtype).removeprefix("torch.")
        return {
            "format": FORMAT,
            "keep": str(keep),
            "stored": (stored or dtype) if keep.kind == "hidden" else None,
            "teacher": str(self.teacher) if model is None else model_fingerprint(model),
            "data": fingerprint(self.counts),
            "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
            "vocab": self.teacher.vocab,
            "scale": head.scale if keep.kind == "hidden" else 1.0,
            "softcap": head.softcap if keep.kind == "hidden" else None,
            "batch_size": self.batch_size,
            "seed": seed if keep.kind == "sampled" else None,
            "rows": len(self.counts),
            "tokens": self.tokens,
            "made": dict(made),
        }


def _write(
    path: Path,
    about: dict[str, Any],
    source: Source,
    keep: Keep,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Add the shards that are missing, and then the index."""
    sweep(path)
    if (path / ABOUT).exists():
        _check_same(path, about)
    elif any(it.name != lock.LOCK for it in path.iterdir()):
        raise FileExistsError(f"path: {path} holds other files than a cache; choose another.")
    else:
        write_json(path / ABOUT, about)
    if keep.kind == "hidden" and not (path / _HEAD).exists():
        linear: Any = cast(Any, source.teacher).head.linear
        bias = {} if linear.bias is None else {"bias": linear.bias}
        save_tensors(path / _HEAD, {"weight": linear.weight} | bias)
    shards = _whole(path)
    done = sum(len(it["rows"]) for it in shards)
    keys, waiting, size = [*source.counts], [], 0
    first, start = done // source.batch_size, done  # shards end where batches do
    for number, batch in enumerate(source.batches()):
        if number < first or done == len(keys):
            continue
        generator = torch.Generator().manual_seed(_seed(seed, number))
        waiting.append(stored_tensors(source.observe(batch), keep, about["stored"], generator))
        size += sum(it.nbytes for it in waiting[-1].values())
        end = min((number + 1) * source.batch_size, len(keys))
        if size >= SHARD or end == len(keys):
            shards.append(_shard(path, len(shards), waiting, keys[start:end], source.counts))
            waiting, size, start = [], 0, end
        if progress is not None:
            progress(end, len(keys))
    _write_index(path, about, shards)
    (path / _JOURNAL).unlink(missing_ok=True)


def _shard(
    path: Path,
    number: int,
    waiting: list[dict[str, Tensor]],
    keys: list[str],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """Write one shard and the line of the journal that says it is whole."""
    file = path / f"shard-{number:05}.safetensors"
    save_tensors(file, {name: torch.cat([it[name] for it in waiting]) for name in waiting[0]})
    rows = [[key, counts[key]] for key in keys]
    shard = {"file": file.name, **measure(file, remembered=False), "rows": rows}
    append_jsonl(path / _JOURNAL, shard)
    return shard


def _whole(path: Path) -> list[dict[str, Any]]:
    """The shards that the journal lists and that are there, undamaged, from the first on."""
    journal, whole = path / _JOURNAL, []
    listed: list[Any] = read_jsonl(journal) if journal.exists() else []
    for shard in listed:
        file = path / shard["file"]
        if not file.is_file() or measure(file) != {it: shard[it] for it in ("sha256", "size")}:
            raise ValueError(
                f"path: {path}: {file.name} is lost or damaged, and what follows it too; remove "
                "the folder and begin again, or say --overwrite."
            )
        whole.append(shard)
    return whole


def _write_index(path: Path, about: Mapping[str, Any], shards: list[dict[str, Any]]) -> None:
    head = {"head": measure(path / _HEAD)} if (path / _HEAD).exists() else {}
    record = {**about, **head, "shards": shards}
    write_json(path / INDEX, record | {"sha256": _sealed(record)})


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """The lock on the folder, unless it lies in a run that this process writes already."""
    if lock.writer_of(path / INDEX) is not None:
        yield
        return
    writer = lock.acquire(path, lambda names: None)
    try:
        yield
    finally:
        if writer is not None:
            writer.release()


def stored_tensors(
    told: Observed, keep: Keep, stored: str | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors to store for a teacher's distributions."""
    if keep.kind == "hidden":
        return {"hidden": cast(LinearHead, told).hidden.to(_dtype(stored)).cpu()}
    if isinstance(told, TopK):
        if keep.kind == "sampled" or told.index.shape[-1] < keep.count:
            raise ValueError(
                f"keep: {keep} of a teacher that gives its {told.index.shape[-1]} likeliest atoms."
            )
        values, order = told.logp.topk(keep.count)
        return _tensors(TopK(values, told.index.gather(-1, order)))
    parts = []
    for part in _parts(told):
        logits = logits_of(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()
        if keep.kind == "top-k":
            parts.append(TopK(*logits.log_softmax(-1).topk(min(keep.count, logits.shape[-1]))))
        else:
            parts.append(draw(logits, keep.count, generator=generator))
    return _tensors(TopK(*(torch.cat([it[at] for it in parts]) for at in (0, 1))))


def _parts(told: Any) -> Iterator[Any]:
    """The same, some tokens at a time."""
    tokens = len(told.hidden if isinstance(told, LinearHead) else told)
    for start in range(0, max(tokens, 1), _TOKENS):
        rows = slice(start, start + _TOKENS)
        is_head = isinstance(told, LinearHead)
        yield told._replace(hidden=told.hidden[rows]) if is_head else told[rows]


def _tensors(top: TopK) -> dict[str, Tensor]:
    return {"logp": top.logp.float().cpu(), "index": top.index.int().cpu()}


def _seed(seed: int, batch: int) -> int:
    """Seed of the draws of one batch; of 32 bits, for torch's generator takes no more."""
    digest = hashlib.blake2b(f"{seed} {batch}".encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "big")


def _dtype(name: str | None) -> torch.dtype:
    return getattr(torch, str(name))


def _shares_blocks(inputs: Mapping[str, Any]) -> bool:
    positions = inputs.get("position_ids")
    if positions is None:
        return False
    return bool(((positions[:, 1:] == 0) & attended(inputs)[:, 1:]).any())


def _is_like(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _batches(rows: Any, batch_size: int, max_length: int | None) -> Iterator[Batch]:
    pad, total = PadRows(max_length=max_length), len(rows)
    for start in range(0, total, batch_size):
        batch = pad([rows[row] for row in range(start, min(start + batch_size, total))])
        if TEACHER_IDS in batch:
            raise ValueError(
                f"rows: a cache is of the student's own prompts, and they have {TEACHER_IDS}."
            )
        yield shifted(batch)


def _check_same(path: Path, about: Mapping[str, Any]) -> None:
    """Refuse a cache that is there and is not the one wanted."""
    there = _read(path / ABOUT)
    names = [it for it in about if it not in ("made", "tokenizer")]
    for name in names:
        if there.get(name) != about[name]:
            raise ValueError(
                f"path: {path} is the cache of another {name} ({there.get(name)} there, "
                f"{about[name]} here). Remove it or choose another folder."
            )


def _sealed(record: Mapping[str, Any]) -> str:
    entries = {name: value for name, value in record.items() if name != "sha256"}
    return values_of(None, [entries])["sha256"]


def _check_record(record: Mapping[str, Any], head: Mapping[str, Tensor]) -> None:
    """Refuse an index.json that does not belong to this head, or was not written so."""
    vocab, scale, softcap = (record[it] for it in ("vocab", "scale", "softcap"))
    weight, bias = head.get("weight"), head.get("bias")
    if type(vocab) is not int or vocab < 1:
        raise ValueError(f"index.json: vocab must be a number of tokens; got {vocab!r}")
    if weight is not None and (weight.ndim != 2 or vocab != len(weight)):
        has = f"{_HEAD} is {list(weight.shape)}"
        raise ValueError(
            f"index.json: vocab must be the number of rows of the head; got {vocab!r}, and {has}"
        )
    if bias is not None and list(bias.shape) != [vocab]:
        raise ValueError(f"{_HEAD}: bias must be [{vocab}]; got {list(bias.shape)}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value)) and not (name == "softcap" and value is None):
            raise ValueError(f"index.json: {name} must be a finite number; got {value!r}")
    if _sealed(record) != record["sha256"]:
        raise ValueError(
            f"index.json was changed: its sha256 is {_sealed(record)}, and was {record['sha256']}"
        )
    keys = [row for shard in record["shards"] for row in shard["rows"]]
    if fingerprint(dict(keys)) != record["data"]:
        raise ValueError("index.json: its rows, or their order, are not those that data names")


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_bytes())
        if record["format"] != FORMAT:
            raise ValueError(f"it has format {record['format']}; this rkl reads {FORMAT}")
        return record
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"path: {file.parent} cannot be read: {error}.") from None


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the head in a folder, or an error that names it."""
    if not (path / ABOUT).is_file():
        raise FileNotFoundError(f"path: {path} is no cache: it has no {ABOUT}.")
    if _is_old(path):
        raise ValueError(
            f"path: {path} is a cache of rkl 0.1, which this rkl does not read. Make it anew: "
            f"rkl cache --teacher T --data D --out NEW"
        )
    _read(path / ABOUT)
    if not (path / INDEX).is_file():
        raise ValueError(
            f"path: {path} is not finished. Go on with the command that began it, and --resume."
        )
    try:
        record = json.loads((path / INDEX).read_bytes())
        if missing := (_ENTRIES | {"shards", "sha256"}) - record.keys():
            raise ValueError(f"index.json has no {min(missing)}")
        head: dict[str, Tensor] = {}
        if "head" in record:
            if (now := measure(path / _HEAD)) != record["head"]:
                raise ValueError(f"{_HEAD} is damaged: its {difference(record['head'], now)}")
            head = load_file(path / _HEAD)
        _check_record(record, head)
        if (bad := first_not_finite(head.items())) is not None:
            raise ValueError(f"{_HEAD} holds numbers that are NaN or infinite, in {bad}")
        return record, head
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"path: {path} cannot be read: {error}.") from None


def _is_old(path: Path) -> bool:
    try:
        return json.loads((path / ABOUT).read_bytes()).get("format") == 1
    except (OSError, ValueError, AttributeError):
        return False
