"""`kvfold profile`: decode steps, operation by operation, against the measured roofs of the device."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvfold.lab.operations import DecodeProfile

_ROWS = 15


def profile(
    plan: Annotated[str, typer.Argument(help="A plan, or the name of a strategy ('kvfold strategies' lists them).")] = "int4",
    model: Annotated[
        str, typer.Option(help="A short name (smollm2-135m), a hub id (owner/name), a folder or a .gguf file.")
    ] = "smollm2-135m",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache before the steps that are profiled.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that are profiled.")] = 4,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens that are read at once.")] = 512,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file to read from; default: Wikipedia articles.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch, on a CPU.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the trace, the tables and the roofline.")] = Path("outputs/profile"),
) -> None:
    """Profile decode steps: a trace, a table with bytes, FLOPs and the share of the roof, and the roofline."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler reports its stages on stderr
    import torch

    import kvfold
    from kvfold.catalog import resolve
    from kvfold.files import make_folder
    from kvfold.lab.operations import profile_decode
    from kvfold.lab.passages import Passages

    make_folder(out)
    if threads is not None:
        torch.set_num_threads(threads)
    resolved = resolve(plan)
    loaded, tokenizer = kvfold.load(model, dtype=dtype, device=device)
    passages = Passages.read(text, tokenizer, context + 3 * steps + 1)
    passages.check((context,), 3 * steps + 1, loaded)
    ids = torch.tensor(passages.rows(context, 1), device=loaded.device)
    found = profile_decode(loaded, lambda: kvfold.cache(loaded, resolved), ids, steps, chunk, out)
    _print(found)
    files = "trace.json (Perfetto), operations.csv, roofline.png, profile.json"
    print(f"\n{out}: {files}{', nsight.txt' if loaded.device.type == 'cuda' else ''}")


def _print(found: "DecodeProfile") -> None:
    roofs = found.roofs
    print(
        f"{found.plan}, kernel {found.kernel}, {found.context} tokens, KV cache {found.kv_bytes / 2**20:.2f} MiB, "
        f"{found.step_ms:.2f} ms a step without the profiler (layers run by {found.step})"
    )
    print(
        f"{roofs.device}: read {roofs.read / 1e9:.1f} GB/s, copy {roofs.copy / 1e9:.1f} GB/s, "
        f"{roofs.matmul / 1e9:.0f} GFLOP/s in {roofs.dtype}"
        + (f", {roofs.threads} threads" if roofs.device == "CPU" else "")
        + (f", busy {found.utilisation} % of the time" if found.utilisation is not None else "")
    )
    total = sum(x.seconds for x in found.operations)
    print(
        f"\n{'operation':<40} {'calls':>6} {'ms/step':>8} {'time':>6} {'MB/step':>9} {'GFLOP/step':>10} {'GB/s':>7}"
        f" {'of roof':>8}"
    )
    for x in found.operations[:_ROWS]:
        share = x.share(roofs)
        print(
            f"{x.name[:40]:<40} {x.calls:>6} {1e3 * x.seconds / found.steps:>8.3f} {x.seconds / total:>6.1%} "
            f"{x.num_bytes / found.steps / 1e6:>9.2f} {x.flops / found.steps / 1e9:>10.3f} "
            f"{x.num_bytes / x.seconds / 1e9:>7.1f} {'–' if share is None else f'{share:.0%}':>8}"
        )
