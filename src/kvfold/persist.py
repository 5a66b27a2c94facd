"""A compressed cache in a file, and back: `cache.save(path)`, `load_cache(path, model)`.

The file is a safetensors file. Its metadata hold a header in JSON (the plan, the model's fingerprint, the lengths) and a
SHA-256 over the header and all tensors; nothing is built before everything has been checked. Codes are written as they are,
neither decoded nor rounded again.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

import kvfold
from kvfold import layer_state
from kvfold.errors import FileError, PlanError
from kvfold.files import explain, replacing
from kvfold.kv_cache import KVCache
from kvfold.layer_cache import LayerCache
from kvfold.models import adapter
from kvfold.modes import in_normal_mode
from kvfold.plan import Plan

FORMAT = "kvfold-cache"
VERSION = 1


def save(cache: KVCache, path: str | Path) -> None:
    """Writes a cache to a file, in place of what was there. Idle memory is left out.

    FileError when it can't be written; what was at `path` is then still there. PlanError for transformers' own cache.
    """
    if cache.plan.leaves_to_transformers:
        raise PlanError("transformers' own cache has no file of kvfold's: make the cache with the plan 'full' to save it")
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        held, numbers = layer_state.state(layer) if isinstance(layer, LayerCache) else _sliding_state(layer)
        layers.append(numbers)
        tensors |= {
            f"{index}.{name}": x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in held.items()
        }
    header = json.dumps(
        {
            "kvfold": kvfold.__version__,
            "plan": str(cache.plan),
            "pins": cache.pins,
            "meaning": _meaning(cache.plan),
            "fingerprint": cache.fingerprint,
            "dtype": _dtype_of(cache),
            "layers": layers,
        }
    )
    metadata = {"format": FORMAT, "version": str(VERSION), "header": header, "sha256": _digest(header, tensors)}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # it wraps what the system says about a full disk
            raise FileError(f"can't write {path}: {error}; is the disk full?") from error


@in_normal_mode
def load_cache(path: str | Path, model: PreTrainedModel) -> KVCache:
    """Reads a cache that goes on where the saved one was; attaches kvfold's attention to the model.

    FileError when the file is missing, damaged, no cache of kvfold's, of another format version, or of another model.
    """
    path = Path(path)
    header, tensors = _read(path)
    plan = _plan(path, header)
    _check_model(path, header, model)
    cache = adapter.cache(model, plan, [range(start, end) for start, end in header.get("pins", ())])
    for index, (layer, numbers) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        prefix = f"{index}."
        held = {name[len(prefix) :]: x.to(model.device) for name, x in tensors.items() if name.startswith(prefix)}
        if isinstance(layer, LayerCache):
            layer_state.restore(layer, held, numbers, model.dtype, model.device)
        else:
            _restore_sliding(layer, held, numbers)
    return cache


# -- reading and checking ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file that is whole."""
    try:
        with path.open("rb") as file:  # safetensors' own errors don't tell a missing file from a forbidden one
            file.read(1)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            # Copies: what safetensors returns are views of the whole file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileError(f"{path} is not a safetensors file, or was cut short ({error}): save the cache again") from error
    except FileError:
        raise
    except OSError as error:
        raise explain(error, path, "read") from error
    if _digest(metadata["header"], tensors) != metadata["sha256"]:
        raise FileError(f"{path} is damaged: its checksum does not fit its content; save the cache again")
    return json.loads(metadata["header"]), tensors


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT or not {"version", "header", "sha256"} <= set(metadata):
        raise FileError(f"{path} is a safetensors file, but no cache that kvfold saved")
    if metadata["version"] != str(VERSION):
        raise FileError(
            f"{path} is in version {metadata['version']} of the format, and kvfold {kvfold.__version__} reads version "
            f"{VERSION}: load it with the kvfold that saved it"
        )


def _plan(path: Path, header: Mapping[str, Any]) -> Plan:
    try:
        plan = Plan.parse(header["plan"])
    except PlanError as error:
        raise FileError(f"{path} has a plan that kvfold {kvfold.__version__} can't read: {error}") from error
    if _meaning(plan) != header["meaning"]:
        raise FileError(
            f"{path} was saved by kvfold {header['kvfold']}, where the plan '{plan}' had other defaults: "
            "load it with that version"
        )
    return plan


def _check_model(path: Path, header: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Names the first thing in which the file's model differs from this one."""
    saved, present = header["fingerprint"], adapter.fingerprint(model)
    for key in sorted(saved.keys() | present.keys(), key=lambda key: key == "weights"):
        if key == "weights" and header["dtype"] not in (None, _name(model.dtype)):
            raise FileError(
                f"{path} was saved with a model in {header['dtype']}, and this one is in {_name(model.dtype)}: "
                "load the model in the first"
            )
        if saved.get(key) == present.get(key):
            continue
        if key == "weights":
            raise FileError(
                f"{path} belongs to a model of the same shape with other weights: load the model that it was saved with"
            )
        raise FileError(f"{path} belongs to another model: {key} is {saved.get(key)} there and {present.get(key)} here")


def _meaning(plan: Plan) -> str:
    """The plan with every default written out, so that a later change of a default can't change what a file means."""
    later = [stage for stage in (plan.layers, plan.read, plan.share, plan.tier) if stage]
    return repr((plan.keep, plan.protect, plan.hybrid, plan.store, *later))


def _digest(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dtype_of(cache: KVCache) -> str | None:
    """The model's type, which an empty cache does not know."""
    dtypes = [layer.dtype for layer in cache.layers if layer.is_initialized]
    return _name(dtypes[0]) if dtypes else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- layers with a sliding window of their own, as transformers holds them -----------------------------------------------------


def _sliding_state(layer: DynamicSlidingWindowLayer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    numbers = {"num_seen": layer.cumulative_length}
    if not layer.is_initialized:
        return {}, numbers
    last = slice(-layer.sliding_window + 1, None)  # while drafts are recorded it holds more
    return {"k": layer.keys[:, :, last], "v": layer.values[:, :, last]}, numbers


def _restore_sliding(layer: DynamicSlidingWindowLayer, held: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    if not held:
        return
    layer.lazy_initialization(held["k"], held["v"])
    layer.keys, layer.values, layer.cumulative_length = held["k"], held["v"], numbers["num_seen"]
