"""The roofs of a device, measured on that very device, and how near to them operations come.

Williams et al., Roofline: An Insightful Visual Performance Model (Communications of the ACM 52(4), 2009):

    attainable FLOP/s = min(matmul rate, bandwidth · FLOPs a byte)
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvfold.files import replacing
from kvfold.lab.clock import Clock


@dataclass(frozen=True)
class Roofs:
    """What a device can do, as measured.

    Attributes:
        read: bytes a second of a sum over memory that no cache holds.
        copy: bytes a second of a copy, those read and those written together.
        matmul: FLOPs a second of a square product in `dtype`.
        device: its name.
        threads: of torch, on a CPU.
    """

    read: float
    copy: float
    matmul: float
    dtype: str
    device: str
    threads: int

    @property
    def bandwidth(self) -> float:
        """The higher of both, against which shares are taken."""
        return max(self.read, self.copy)

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time for so many bytes and operations."""
        return max(num_bytes / self.bandwidth, flops / self.matmul)


@dataclass(frozen=True)
class Operation:
    """An operation, or all of a name, in a profile.

    Attributes:
        seconds: its own time, without operations inside it.
        num_bytes: of the tensors that it read and wrote.
        flops: 2 a multiply-add of matrix products and attention; 0 for the rest.
    """

    name: str
    calls: int
    seconds: float
    num_bytes: int
    flops: int

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.num_bytes if self.num_bytes else 0.0

    def share(self, roofs: Roofs) -> float | None:
        """How near to the roof: 1 is as fast as the device can. None for what moves nothing."""
        if not self.num_bytes or not self.seconds:
            return None
        return roofs.seconds(self.num_bytes, self.flops) / self.seconds


def best_seconds(run: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The median time of `run` on a device, after a first one that is not counted."""
    run()
    clock, times = Clock(device), []
    for _ in range(repeats):
        clock.start()
        run()
        clock.stop()
        times.append(clock.milliseconds() / 1e3)
    return statistics.median(times)


def measure_roofs(device: torch.device, dtype: torch.dtype, *, num_bytes: int | None = None, size: int | None = None) -> Roofs:
    """Measures bandwidths and the matmul rate, in about a second.

    Args:
        num_bytes: of the memory read; more than all caches hold (default 1 GiB on a GPU, 256 MiB elsewhere).
        size: of the square matrices (default 8192 on a GPU, 1024 elsewhere).
    """
    on_gpu = device.type == "cuda"
    num_bytes = num_bytes or (2**30 if on_gpu else 2**28)
    size = size or (8192 if on_gpu else 1024)
    read, copy = _bandwidths(num_bytes, device)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    matmul = 2 * size**3 / best_seconds(lambda: a @ b, device)
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    return Roofs(read, copy, matmul, str(dtype).removeprefix("torch."), name, torch.get_num_threads())


def _bandwidths(num_bytes: int, device: torch.device) -> tuple[float, float]:
    x = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    y = torch.empty_like(x)
    read = x.nbytes / best_seconds(x.sum, device)
    return read, 2 * x.nbytes / best_seconds(lambda: y.copy_(x), device)


def draw(roofs: Roofs, operations: Sequence[Operation], path: Path, title: str) -> None:
    """The roofline with a point for each operation that multiplies, sized by its time. FileError when it can't be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [x for x in operations if x.flops and x.seconds]
    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ridge = roofs.matmul / roofs.bandwidth
    intensities = [x.intensity for x in points] + [ridge]
    low, high = min(intensities) / 4, max(intensities) * 4
    axes.plot([low, ridge, high], [low * roofs.bandwidth / 1e9, roofs.matmul / 1e9, roofs.matmul / 1e9], "k-", linewidth=1.5)
    axes.annotate(
        f"{roofs.bandwidth / 1e9:.0f} GB/s", (low, low * roofs.bandwidth / 1e9), textcoords="offset points", xytext=(14, 0)
    )
    axes.annotate(
        f"{roofs.matmul / 1e9:.0f} GFLOP/s in {roofs.dtype}",
        (ridge, roofs.matmul / 1e9),
        xytext=(0, 6),
        textcoords="offset points",
    )
    total = sum(x.seconds for x in operations) or 1.0
    for point, marker in zip(points, "osD^vP*X<>" * (1 + len(points) // 10), strict=False):
        area = 30 + 400 * point.seconds / total
        label = f"{point.name} ({point.seconds / total:.0%} of the time)"
        axes.scatter(point.intensity, point.flops / point.seconds / 1e9, s=area, marker=marker, alpha=0.75, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s (higher is better)", title=title)
    axes.grid(True, which="both", color="#dddddd", linewidth=0.5)
    if points:
        axes.legend(fontsize=7, loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
