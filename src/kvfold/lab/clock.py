"""Durations as a device sees them: by CUDA events on a GPU, where launches return before they are done."""

import time
from typing import Any

import torch


class Clock:
    """Times one stretch after the other on a device's current stream."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._start: Any = None
        self._end: Any = None

    def start(self) -> None:
        self._start = self._mark()

    def stop(self) -> None:
        self._end = self._mark()

    def milliseconds(self) -> float:
        """Between the last start and stop. On a GPU this waits until the device has come to the stop."""
        if not self.on_gpu:
            return 1e3 * float(self._end - self._start)
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
