"""`kvfold info`: what this machine and installation have."""

import platform
import sys
from pathlib import Path

# What speeds up products of small integers and of 16-bit floats.
_FLAGS = {
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}


def info() -> None:
    """Show versions, devices, the kernel in use and where files are kept."""
    import torch
    import transformers

    import kvfold
    from kvfold.attention.dispatch import kernel_name
    from kvfold.files import cache_folder
    from kvfold.kernels import cpu, triton

    rows = {
        "kvfold": kvfold.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu features": " ".join(cpu_features()) or "none known",
        "threads": str(torch.get_num_threads()),
        "cuda": _cuda(),
        "kernel": kernel_name(),
        "cpu kernels": ", ".join(cpu.available()) or "none: install where there is a C++ compiler, and attention gets faster",
        "cache folder": f"{cache_folder()} ({_size(cache_folder())})",
    }
    if torch.cuda.is_available():
        missing = "" if triton.available() else ": pip install 'kvfold[gpu]' brings Triton's"
        rows["gpu kernel"] = kernel_name(device="cuda") + missing
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def cpu_name() -> str:
    """The model of the CPU, as the system names it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets among `_FLAGS` that the CPU has; empty where /proc/cpuinfo does not say."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return sorted(_FLAGS & set(line.partition(":")[2].split()))
    return []


def _cpuinfo() -> list[str]:
    if sys.platform != "linux":
        return []
    return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "not made yet"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{size / 2**20:.0f} MiB"
