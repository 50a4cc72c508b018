"""A teacher's hidden states over a data set: computed once, kept on disk, read as rows are met."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rkl.distill.batches import Batch, PadRows, shifted
from rkl.distill.heads import Head, read_head
from rkl.distill.teachers import Teacher
from rkl.estimators import LinearHead
from rkl.runs import fingerprint, replacing_folder, save_tensors, write_json

FORMAT = 1  # of cache.json; raised when an older rkl could no longer read it
_ENTRIES = {"teacher", "data", "vocab", "shards", "scale", "softcap"}  # of cache.json
_DIGEST = 16  # bytes of the digest of a row
_SHARD = 2**28  # bytes of hidden states in a file


@runtime_checkable
class Rows(Protocol):
    """What has a length and gives its rows by number: a list, a map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class CachedTeacher(Teacher):
    """A teacher whose hidden states at the trained tokens of known rows are on disk.

    Rows are found by what is in them, so they may be shuffled, batched and padded in any way;
    a row with other tokens or other labels is refused. Files are mapped, not read as a whole.

    Args:
        path: The folder that :func:`cache_hidden_states` wrote.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.record = _read_record(self.path)
        self.vocab = self.record["vocab"]
        self._head = _opened(self.path / "head.safetensors", load_file)
        self._shards = [
            _opened(self.path / it, lambda file: safe_open(file, "pt"))
            for it in self.record["shards"]
        ]
        self._places = {
            key: (shard, *bounds)
            for shard, file in enumerate(self._shards)
            for key, bounds in _contents(file)
        }

    def __len__(self) -> int:
        return len(self._places)

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
        hidden = [weight.new_empty(0, weight.shape[-1])]
        keys = enumerate(row_keys(inputs, predicting))
        hidden += [self._read(row, key).to(device) for row, key in keys if key]
        scale, softcap = self.record["scale"], self.record["softcap"]
        bias = None if bias is None else bias[:vocab]
        return LinearHead(torch.cat(hidden), weight, bias, scale, softcap)

    def _read(self, row: int, key: bytes) -> Tensor:
        if key not in self._places:
            raise ValueError(
                f"row {row} of the batch is not among the {len(self)} rows in the cache "
                f"{self.path}: its tokens, or which of them are trained on, are others. "
                "Was it made from other data, or with another max_length?"
            )
        shard, start, stop = self._places[key]
        return self._shards[shard].get_slice("hidden")[start:stop]


def cache_hidden_states(
    model: nn.Module,
    rows: Rows,
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
    if not len(rows):
        raise ValueError("rows must hold at least one row to cache; got none.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, or None; got {max_length}.")
    head = read_head(model if device is None else model.to(device))
    if head.linear is None:
        raise ValueError(
            f"model: the logits of a {type(model).__name__} are no function of hidden states and "
            "an output embedding that could be kept."
        )
    record = {"teacher": model_fingerprint(model), "data": _data_fingerprint(rows, max_length)}
    path = Path(path)
    if path.exists():
        return _matching(path, record)
    with replacing_folder(path) as folder:
        shards: list[str] = []
        for shard in _shards(_observed(head, rows, batch_size, max_length, progress)):
            shards.append(f"rows-{len(shards):05}.safetensors")
            save_tensors(folder / shards[-1], shard)
        bias = {} if head.linear.bias is None else {"bias": head.linear.bias}
        save_tensors(folder / "head.safetensors", {"weight": head.linear.weight, **bias})
        about = {"model": type(model).__name__, "vocab": head.vocab, "shards": shards}
        about |= {"scale": head.scale, "softcap": head.softcap}
        write_json(folder / "cache.json", {"format": FORMAT, **record, **about})
    return CachedTeacher(path)


def model_fingerprint(model: nn.Module) -> str:
    """A digest of a model's weights and buffers, their names included."""
    state = model.state_dict()
    return fingerprint(name.encode() + _bytes(tensor) for name, tensor in sorted(state.items()))


def row_keys(inputs: Mapping[str, Any], predicting: Bool[Tensor, "rows steps"]) -> list[bytes]:
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
        digest = hashlib.blake2b(",".join(names).encode(), digest_size=_DIGEST)
        for column in columns:
            digest.update(_bytes(column[row, :end]))
        keys.append(digest.digest() if end else b"")
    return keys


def _is_like(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _batches(rows: Rows, batch_size: int, max_length: int | None) -> Iterator[Batch]:
    pad, total = PadRows(max_length=max_length), len(rows)
    for start in range(0, total, batch_size):
        yield shifted(pad([rows[row] for row in range(start, min(start + batch_size, total))]))


def _data_fingerprint(rows: Rows, max_length: int | None) -> str:
    batches = _batches(rows, 64, max_length)
    return fingerprint(key for batch in batches for key in row_keys(*batch[:2]))


def _observed(
    head: Head,
    rows: Rows,
    batch_size: int,
    max_length: int | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[bytes, Tensor]]:
    """The key and the hidden states of every row that is another than those before."""
    device, seen, done = next(head.model.parameters()).device, {b""}, 0
    for inputs, predicting, _ in _batches(rows, batch_size, max_length):
        keys = row_keys(inputs, predicting)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        known = head.observe(inputs, predicting.to(device))
        counts = predicting.sum(-1).tolist()
        for key, hidden in zip(keys, cast(LinearHead, known).hidden.split(counts), strict=True):
            if key not in seen:
                seen.add(key)
                yield key, hidden
        done += len(keys)
        if progress is not None:
            progress(done, len(rows))


def _shards(observed: Iterator[tuple[bytes, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Files' worth of rows: hidden states, where each row's begin and end, its key."""
    pairs, size = [], 0
    for key, hidden in observed:
        pairs.append((key, hidden))
        size += hidden.nbytes
        if size >= _SHARD:
            yield _shard(pairs)
            pairs, size = [], 0
    if pairs:
        yield _shard(pairs)


def _shard(pairs: list[tuple[bytes, Tensor]]) -> dict[str, Tensor]:
    ends = torch.tensor([0, *(len(hidden) for _, hidden in pairs)]).cumsum(0)
    keys = torch.frombuffer(bytearray(b"".join(key for key, _ in pairs)), dtype=torch.uint8)
    hidden = torch.cat([hidden for _, hidden in pairs])
    return {"hidden": hidden, "bounds": ends, "keys": keys.view(-1, _DIGEST)}


def _contents(shard: Any) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The key of every row in a file, and where its hidden states begin and end."""
    bounds, keys = shard.get_tensor("bounds").tolist(), shard.get_tensor("keys")
    for key, *ends in zip(keys, bounds[:-1], bounds[1:], strict=True):
        yield bytes(key.tolist()), tuple(ends)


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


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "cache.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"path: {path} is no cache: it has no cache.json.") from None
    except ValueError as error:
        raise ValueError(f"path: {path / 'cache.json'} is corrupt: {error}.") from None
    if not isinstance(record, dict) or "format" not in record:
        raise ValueError(f"path: {path / 'cache.json'} is corrupt: it has no format.")
    if record["format"] != FORMAT:
        raise ValueError(
            f"path: {path} has format {record.get('format')}; this rkl reads {FORMAT}."
        )
    if missing := _ENTRIES - record.keys():
        raise ValueError(f"path: {path / 'cache.json'} is corrupt: it has no {min(missing)}.")
    return record


def _opened(file: Path, read: Callable[[Path], Any]) -> Any:
    """What a file of tensors holds, or an error that names it."""
    try:
        return read(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"path: the cache has lost its {file}.") from None
    except SafetensorError as error:
        raise ValueError(f"path: {file} is corrupt: {error}.") from None
