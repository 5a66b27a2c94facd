"""Which launch configuration a kernel takes: measured ones are kept in the user's cache folder, by device and shape.

Nothing is tuned behind a user's back: `tune` is called by benchmarks/gpu.py. Without it, `DEFAULT` is used, which was chosen
from what the compiler makes of the kernels (registers, shared memory, instructions a block), not from a measurement.
"""

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvfold.files import cache_folder, make_folder, replacing

if TYPE_CHECKING:
    from kvfold.kernels.triton import Descriptor
    from kvfold.kernels.triton.layout import Side


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        num_warps: of a program.
        num_stages: blocks in flight between memory and registers.
        programs_per_processor: programs that splits are cut for.
        least_blocks: the shortest span of blocks worth a program of its own.
    """

    num_warps: int = 4
    num_stages: int = 3
    programs_per_processor: int = 4
    least_blocks: int = 4


DEFAULT = Config()
UNPIPELINED = Config(num_stages=1)
"""For Blackwell (compute capability 10): Triton 3.9 fails to compile the loops with loads ahead ("Op used before defined")."""
INTERPRETED = Config(1, 1, 2, 1)
CANDIDATES = (
    *(Config(4, stages, programs) for stages in (1, 2, 3, 4) for programs in (2, 4)),
    *(Config(8, stages, programs) for stages in (3, 4) for programs in (2, 4)),
)


def choose(segment: "Descriptor", head_dim: int, block_m: int, device: torch.device) -> Config:
    """The configuration that was measured for this shape on this device, or `DEFAULT`."""
    if device.type != "cuda":
        return INTERPRETED
    return _chosen(segment.k_side, segment.v_side, segment.table is not None, head_dim, block_m, device)


@functools.cache
def _chosen(k: "Side", v: "Side", paged: bool, head_dim: int, block_m: int, device: torch.device) -> Config:
    return _measured(_path(device)).get(_key(k, v, paged, head_dim, block_m), default(device))


def launch(segment: "Descriptor", head_dim: int, block_m: int, config: Config, run: Callable[[Config], object]) -> None:
    """Calls `run(config)`; with fewer blocks in flight where a device's shared memory does not hold as many.

    What worked is kept for the next call. OutOfResources when not even one block fits.
    """
    from triton.runtime.errors import OutOfResources

    asked = segment.k_side, segment.v_side, segment.table is not None, head_dim, block_m, config
    config = _fitting.get(asked, config)
    while True:
        try:
            run(config)
            break
        except OutOfResources:
            if config.num_stages == 1:
                raise
            config = replace(config, num_stages=config.num_stages - 1)
    _fitting[asked] = config


_fitting: dict[tuple[Any, ...], Config] = {}


def default(device: torch.device) -> Config:
    """What is used where nothing was measured."""
    from kvfold.kernels.triton import capability

    return UNPIPELINED if capability(device)[0] == 10 else DEFAULT


def _key(k: "Side", v: "Side", paged: bool, head_dim: int, block_m: int) -> str:
    """What a configuration depends on, besides the device."""
    return f"{k} {v} paged={paged} head_dim={head_dim} block_m={block_m}"


def tune(
    segment: "Descriptor",
    head_dim: int,
    block_m: int,
    device: torch.device,
    milliseconds: Callable[[Config], float],
    candidates: Iterable[Config] = CANDIDATES,
) -> dict[Config, float]:
    """Measures all candidates with `milliseconds`, keeps the fastest on disk, and returns all times.

    A candidate that can't be compiled for the device, or launched on it, counts as infinitely slow. RuntimeError if none can.
    """
    from triton.errors import TritonError

    times: dict[Config, float] = {}
    why: Exception | None = None
    for config in candidates:
        try:
            times[config] = milliseconds(config)
        except (TritonError, RuntimeError) as error:
            times[config], why = float("inf"), error
    if all(ms == float("inf") for ms in times.values()):
        raise RuntimeError(f"no launch configuration works on this device: {why}") from why
    path = _path(device)
    name = _key(segment.k_side, segment.v_side, segment.table is not None, head_dim, block_m)
    kept = _measured(path) | {name: min(times, key=times.__getitem__)}
    make_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({name: asdict(config) for name, config in kept.items()}, indent=1))
    _chosen.cache_clear()
    return times


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 in the interpreter, so that splits are tried."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have of a multiprocessor's shared memory; as Hopper in the interpreter."""
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _path(device: torch.device) -> Path:
    """One file a model of device and version of Triton."""
    import triton

    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return cache_folder() / "triton" / f"{name}-triton-{triton.__version__}.json"


def _measured(path: Path) -> dict[str, Config]:
    try:
        found = json.loads(path.read_text())
        return {name: Config(**config) for name, config in found.items()}
    except (OSError, ValueError, TypeError):  # not there yet, or of another version: what it says can be measured again
        return {}
