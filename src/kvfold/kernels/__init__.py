"""Kernels that are compiled: attention over packed blocks, with the same results as kvfold.attention.reference.

Two families have the same functions (`supports`, `describe_blocks`, `attend`, `mass` …): kvfold.kernels.cpu in C++ and
kvfold.kernels.triton for GPUs.
"""

from types import ModuleType

from kvfold.kernels import cpu, triton


def serving(device: str) -> ModuleType | None:
    """The family that attends to tensors on a device (`cpu`, `cuda` …), or None for the reference."""
    if triton.chosen(device):
        return triton
    return cpu if device == "cpu" and cpu.chosen() else None


def name(device: str) -> str | None:
    """What it is called in reports: `cpu-avx512`, `triton` …"""
    if chosen := triton.chosen(device):
        return chosen
    return f"cpu-{cpu.chosen()}" if serving(device) else None
