"""A teacher's hidden states over a data set: computed once, kept on disk, read as rows are met."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from rkl.distill.batches import Batch, PadRows, shifted
from rkl.distill.heads import read_head
from rkl.distill.limits import check_count
from rkl.distill.teachers import Teacher
from rkl.estimators import LinearHead
from rkl.runs import fingerprint, replacing_folder, save_tensors, write_json
from rkl.runs.integrity import difference, first_not_finite, measure, values_of

FORMAT = 1  # of cache.json; raised when an older rkl could no longer read it
_ENTRIES = {"teacher", "data", "vocab", "scale", "softcap", "rows"}  # of cache.json
_HEAD, _HIDDEN = "head.safetensors", "hidden.bin"


class CachedTeacher(Teacher):
    """A teacher whose hidden states at the trained tokens of known rows are on disk.

    Rows are found by what is in them, so they may be shuffled, batched and padded in any way;
    a row with other tokens or other labels is refused. Hidden states are mapped, not read as a
    whole.

    Args:
        path: The folder that :func:`cache_hidden_states` wrote.
    """

    reads_any_text = False

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.record, self._head, self._hidden = _opened(self.path)
        self.vocab = self.record["vocab"]

    def __len__(self) -> int:
        return len(self.record["rows"])

    def observe(
        self,
        inputs: Mapping[str, Any],
        predicting: Bool[Tensor, "rows steps"],
        *,
        vocab: int | None = None,
    ) -> LinearHead:
        """What the teacher said of these rows when they were cached."""
        device = predicting.device
        self._head = {name: tensor.to(device) for name, tensor in self._head.items()}
        weight, bias = self._head["weight"][:vocab], self._head.get("bias")
        keys = enumerate(row_keys(inputs, predicting))
        hidden = [self._hidden[self._place(row, key)] for row, key in keys if key]
        return LinearHead(
            torch.cat([self._hidden[:0], *hidden]).to(device),
            weight,
            None if bias is None else bias[:vocab],
            self.record["scale"],
            self.record["softcap"],
        )

    def _place(self, row: int, key: str) -> slice:
        if key not in self.record["rows"]:
            raise ValueError(
                f"row {row} of the batch is not among the {len(self)} rows in the cache "
                f"{self.path}: its tokens, or which of them are trained on, are others. "
                "Was it made from other data, or with another max_length?"
            )
        return slice(*self.record["rows"][key])


def cache_hidden_states(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]] | Dataset,
    path: str | os.PathLike,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CachedTeacher:
    """Run a teacher once over rows, and keep its hidden states wherever a token is trained on.

    A cache that is there already, of the same model and rows, is used as it is; another one is
    refused. The folder appears when all of it is on the disk.

    Args:
        model: The teacher, whose head must be a plain output embedding with scale and soft cap.
        rows: Rows with ``input_ids`` and ``labels``: all that will be trained and evaluated on.
        path: The folder to write.
        batch_size: Rows that are run at one time.
        max_length: Tokens that are kept of each row, as in the trainer; None keeps all.
        device: Where to run the model; by default, where it is.
        progress: Called with the number of rows that are done, and of all.
    """
    path, total = Path(path), len(cast(Sequence, rows))
    if not total:
        raise ValueError("rows must hold at least one row to cache; got none.")
    check_count("batch_size", batch_size)
    if max_length is not None:
        check_count("max_length", max_length, at_least=2)
    head = read_head(model if device is None else model.to(device))
    if head.linear is None:
        raise ValueError(
            f"model: the logits of a {type(model).__name__} are no function of hidden states and "
            "an output embedding that could be kept."
        )
    places = _places(rows, max_length)
    record = {"teacher": model_fingerprint(model), "data": fingerprint(places)}
    if path.exists():
        return _matching(path, record)
    weight, bias = head.linear.weight, head.linear.bias
    with replacing_folder(path) as folder:
        save_tensors(folder / _HEAD, {"weight": weight} | ({} if bias is None else {"bias": bias}))
        kept, done = _mapped(folder / _HIDDEN, places, weight, shared=True), 0
        for inputs, predicting, _ in _batches(rows, batch_size, max_length):
            moved = {name: value.to(weight.device) for name, value in inputs.items()}
            known = head.observe(moved, predicting.to(weight.device))
            hidden = cast(LinearHead, known).hidden.split(predicting.sum(-1).tolist())
            for key, states in zip(row_keys(inputs, predicting), hidden, strict=True):
                if key:
                    kept[slice(*places[key])] = states
            done += len(hidden)
            if progress is not None:
                progress(done, total)
        about = {"vocab": head.vocab, "scale": head.scale, "softcap": head.softcap}
        files = {"files": {name: measure(folder / name) for name in (_HEAD, _HIDDEN)}}
        kept = {"format": FORMAT} | record | about | files | {"rows": places}
        write_json(folder / "cache.json", kept | {"sha256": _sealed(kept)})
    return CachedTeacher(path)


def model_fingerprint(model: nn.Module) -> str:
    """A digest of a model's weights and buffers, their names included."""
    state = model.state_dict()
    return fingerprint(name.encode() + _bytes(tensor) for name, tensor in sorted(state.items()))


def row_keys(inputs: Mapping[str, Any], predicting: Bool[Tensor, "rows steps"]) -> list[str]:
    """A digest of each row up to the last token it is trained on: what the teacher depends on.

    Padding on the right has no part in it; a row that is not trained on has the empty key.
    """
    shape = inputs["input_ids"].shape
    names = sorted(it for it in inputs if it != "attention_mask" and _is_like(inputs[it], shape))
    attended = inputs.get("attention_mask")
    attended = torch.ones(shape, dtype=torch.bool) if attended is None else attended.bool()
    columns = [predicting, attended, *(inputs[name] for name in names)]
    columns = [column.cpu() for column in columns]
    keys = []
    for row, trained in enumerate(columns[0]):
        end = int(trained.nonzero().max()) + 1 if trained.any() else 0
        digest = hashlib.blake2b(",".join(names).encode(), digest_size=16)
        for column in columns:
            digest.update(_bytes(column[row, :end]))
        keys.append(digest.hexdigest() if end else "")
    return keys


def _is_like(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _batches(rows: Any, batch_size: int, max_length: int | None) -> Iterator[Batch]:
    pad, total = PadRows(max_length=max_length), len(rows)
    for start in range(0, total, batch_size):
        yield shifted(pad([rows[row] for row in range(start, min(start + batch_size, total))]))


def _places(rows: Any, max_length: int | None) -> dict[str, tuple[int, int]]:
    """Where the hidden states of each row begin and end; those of the same row are kept once."""
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for inputs, predicting, _ in _batches(rows, 64, max_length):
        counts = predicting.sum(-1).tolist()
        for key, count in zip(row_keys(inputs, predicting), counts, strict=True):
            if key and key not in places:
                places[key] = end, end + count
                end += count
    return places


def _mapped(
    file: Path, places: Mapping[str, Sequence[int]], weight: Tensor, *, shared: bool
) -> Float[Tensor, "tokens width"]:
    """The hidden states in a file, as wide and precise as the head; shared, it is written."""
    tokens, width = max((stop for _, stop in places.values()), default=0), weight.shape[-1]
    flat = torch.from_file(str(file), shared, tokens * width, dtype=weight.dtype)
    return flat.view(tokens, width)


def _matching(path: Path, record: Mapping[str, str]) -> CachedTeacher:
    """The cache that is there, if it is the one wanted."""
    cached = CachedTeacher(path)
    for name, digest in record.items():
        if cached.record[name] != digest:
            raise ValueError(
                f"path: {path} is the cache of another {name} ({cached.record[name]} there, "
                f"{digest} here). Remove it or choose another folder."
            )
    return cached


def _sealed(record: Mapping[str, Any]) -> str:
    """The digest of what cache.json says."""
    said = {name: value for name, value in record.items() if name != "sha256"}
    return values_of(None, [said])["sha256"]


def _check_record(record: Mapping[str, Any], head: Mapping[str, Tensor]) -> None:
    """Refuse a cache.json that does not belong to this head, or was not written so."""
    vocab, scale, softcap, rows = (record[it] for it in ("vocab", "scale", "softcap", "rows"))
    weight, bias = head["weight"], head.get("bias")
    if type(vocab) is not int or weight.ndim != 2 or vocab != len(weight):
        has = f"{_HEAD} is {list(weight.shape)}"
        raise ValueError(
            f"cache.json: vocab must be the number of rows of the head; got {vocab!r}, and {has}"
        )
    if bias is not None and list(bias.shape) != [vocab]:
        raise ValueError(f"{_HEAD}: bias must be [{vocab}]; got {list(bias.shape)}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value)) and not (name == "softcap" and value is None):
            raise ValueError(f"cache.json: {name} must be a finite number; got {value!r}")
    if not isinstance(rows, dict):
        raise ValueError(f"cache.json: rows must map digests to places; got {rows!r:.60}")
    end = 0
    for key, place in rows.items():
        pair = isinstance(place, list) and [type(it) for it in place] == [int, int]
        if not pair or place[0] != end or place[1] <= end:
            raise ValueError(
                f"cache.json: row {key} lies at {place!r}; expected [{end}, more], behind the row "
                "before it"
            )
        end = place[1]
    if fingerprint(rows) != record["data"]:
        raise ValueError("cache.json: its rows, or their order, are not those that data names")
    if "sha256" in record and _sealed(record) != record["sha256"]:
        raise ValueError(
            f"cache.json was changed: its sha256 is {_sealed(record)}, and was {record['sha256']}"
        )


def _check_size(file: Path, rows: Mapping[str, Sequence[int]], weight: Tensor) -> None:
    tokens = max((stop for _, stop in rows.values()), default=0)
    expected, size = tokens * weight.shape[-1] * weight.element_size(), file.stat().st_size
    if size != expected:
        raise ValueError(f"{file.name} has {size:,} bytes; expected {expected:,}")


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The record, the head and the hidden states in a folder, or an error that names it."""
    if not (path / "cache.json").is_file():
        raise FileNotFoundError(f"path: {path} is no cache: it has no cache.json.")
    try:
        record = json.loads((path / "cache.json").read_bytes())
        if record["format"] != FORMAT:
            raise ValueError(f"it has format {record['format']}; this rkl reads {FORMAT}")
        if missing := _ENTRIES - record.keys():
            raise ValueError(f"cache.json has no {min(missing)}")
        head = load_file(path / _HEAD)
        _check_record(record, head)
        _check_size(path / _HIDDEN, record["rows"], head["weight"])
        for name in (_HEAD, _HIDDEN) if "files" in record else ():
            if (found := measure(path / name)) != (kept := record["files"][name]):
                raise ValueError(f"{name} is damaged: its {difference(kept, found)}")
        if (bad := first_not_finite(head.items())) is not None:
            raise ValueError(f"{_HEAD} holds numbers that are NaN or infinite, in {bad}")
        return record, head, _mapped(path / _HIDDEN, record["rows"], head["weight"], shared=False)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"path: {path} cannot be read: {error}.") from None
