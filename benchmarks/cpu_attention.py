"""Attention of one decoded token over the caches of a whole model: time, bytes and how much of the machine's read bandwidth.

    python benchmarks/cpu_attention.py [--contexts 512 2048 8192 32768] [--threads 2] [--plans int4 nf4 tq3 --reference]

The shape is SmolLM2-135M's by default: 30 layers, 9 query heads on 3 KV heads of 64. Every layer has memory of its own, so that
nothing is read from a cache that a model would not find it in. Variants take turns, repeat by repeat; a number is the median of
the repeats' medians over passes, which a machine that is also used by others disturbs less than means. With --reference every
plan also runs in plain torch, from the same blocks. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kvfold.attention.dispatch import attend, kernel_name
from kvfold.attention.reference import Query
from kvfold.blocks import Blocks
from kvfold.kernels import cpu
from kvfold.plan import Plan
from kvfold.segment import Run
from kvfold.site import Site

PLANS = {
    "full": "full",
    "int8": "int8",
    "int4": "int4",
    "int2": "int2",
    "fp8": "fp8",
    "nf4": "nf4",
    "tq4": "turboquant(4)",
    "tq3": "turboquant(3)",
    "tq2": "turboquant(2)",
    "kvquant3": "kvquant(3)",
    "gear4": "gear(int4)",
    "banded": "banded(2.5)",
}
DEFAULT = ["full", "int8", "int4", "int2", "fp8", "nf4", "tq4", "tq3", "tq2"]
CHUNK = 4096


def sdpa(args: argparse.Namespace, num_tokens: int) -> tuple[Callable[[], object], int]:
    """torch's attention over dense bfloat16 tensors, and the bytes that it reads."""
    shape = (1, args.kv_heads, num_tokens, args.head_dim)
    k = torch.randn(shape).bfloat16()
    v = torch.randn(shape).bfloat16()
    caches = [(k.clone(), v.clone()) for _ in range(args.layers)]
    q = torch.randn(1, args.kv_heads * args.groups, 1, args.head_dim).bfloat16()

    def run() -> None:
        for keys, values in caches:
            F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return run, args.layers * (k.nbytes + v.nbytes)


def kvfold(args: argparse.Namespace, num_tokens: int, plan: str) -> tuple[Callable[[], object], int]:
    """The same over blocks that hold the tokens as the plan says."""
    codec = Plan.parse(plan).store.codec(Site(args.head_dim, torch.bfloat16))
    rows = args.kv_heads
    caches = [Blocks(codec, rows, torch.device("cpu"), contiguous=True, scored=False) for _ in range(args.layers)]
    for start in range(0, num_tokens, CHUNK):
        count = min(CHUNK, num_tokens - start)
        k, v = torch.randn(2, rows, count, args.head_dim).bfloat16()
        slots = torch.arange(start, start + count, dtype=torch.int32).expand(rows, -1)
        for blocks in caches:
            blocks.append(Run(k, v, slots))
    q = torch.randn(rows, args.groups, args.head_dim) * args.head_dim**-0.5
    query = Query(q, torch.tensor([num_tokens]), args.groups)

    def run() -> None:
        for blocks in caches:
            attend([(blocks, query)])

    used = sum(x[: len(blocks.pool.table.unique())].nbytes for blocks in caches for x in blocks.pool.fields.values())
    return run, used


def on_reference(run: Callable[[], object]) -> Callable[[], object]:
    """The same, without compiled kernels."""

    def slowly() -> None:
        before = os.environ.get(cpu.VARIABLE, "")
        os.environ[cpu.VARIABLE] = "off"
        run()
        os.environ[cpu.VARIABLE] = before

    return slowly


def read_bandwidth(num_threads: int) -> float:
    """GB/s at which torch sums up memory that no cache holds."""
    torch.set_num_threads(num_threads)
    x = torch.ones(512 * 2**20 // 8, dtype=torch.int64)
    best = min(_timed(lambda: x.sum()) for _ in range(7))
    return x.nbytes / best / 1e9


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, num_tokens: int) -> Iterator[dict[str, object]]:
    variants = {"sdpa bf16": sdpa(args, num_tokens)} | {name: kvfold(args, num_tokens, PLANS[name]) for name in args.plans}
    if args.reference:
        variants |= {f"{name} ref": (on_reference(variants[name][0]), variants[name][1]) for name in args.plans}
    times: dict[str, list[float]] = {name: [] for name in variants}
    rounds = max(3, args.rounds * 2048 // num_tokens)
    for run, _ in variants.values():
        run()
    for _ in range(args.repeats):
        for name, (run, _) in variants.items():
            times[name].append(statistics.median(_timed(run) for _ in range(rounds)))
    base = statistics.median(times["sdpa bf16"])
    for name, (_, num_bytes) in variants.items():
        median = statistics.median(times[name])
        yield {
            "variant": name,
            "tokens": num_tokens,
            "ms": median * 1e3,
            "spread_ms": (max(times[name]) - min(times[name])) * 1e3,
            "mbytes": num_bytes / 1e6,
            "gb_per_s": num_bytes / median / 1e9,
            "times_as_fast_as_sdpa": base / median,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--plans", nargs="+", default=DEFAULT, choices=list(PLANS))
    parser.add_argument("--reference", action="store_true", help="also in plain torch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth(args.threads)
    print(f"kernel {kernel_name()}, {args.threads} threads, read bandwidth {bandwidth:.1f} GB/s, machine has {cpu.available()}")
    print(f"{'tokens':>7} {'variant':<12} {'ms':>9} {'spread':>8} {'MB':>8} {'GB/s':>6} {'of read':>8} {'x sdpa':>7}")
    records = []
    for num_tokens in args.contexts:
        for r in measure(args, num_tokens):
            records.append(r)
            print(
                f"{r['tokens']:>7} {r['variant']:<12} {r['ms']:>9.2f} {r['spread_ms']:>8.2f} {r['mbytes']:>8.1f}"
                f" {r['gb_per_s']:>6.1f} {r['gb_per_s'] / bandwidth:>7.0%} {r['times_as_fast_as_sdpa']:>7.2f}",
                flush=True,
            )
    setting = {"kernel": kernel_name(), "threads": args.threads, "torch": torch.__version__, "bandwidth_gb_per_s": bandwidth}
    print(json.dumps(setting | {"records": records}))


if __name__ == "__main__":
    main()
