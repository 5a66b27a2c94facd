"""Everything about the GPU in one call of less than nine minutes: is it right, how fast, and how near to the memory's speed.

    python benchmarks/gpu.py [--out gpu.json] [--seconds 500] [--quick]

First correctness, against attention in float64 over the decoded tokens; nothing is timed when that fails. Then launch
configurations are tuned (and kept in the user's cache folder), and attention of one decoded token is measured on the shape of
Llama-3-8B: 32 query heads on 8 KV heads of 128. Calls are captured in a CUDA graph over as many copies of the cache as no level-2
cache holds; a time is the median of replays over the calls of a graph. Bytes are those of codes, scales and zero points, counted.
Sections that no longer fit into --seconds are left out and named. The table comes last; the JSON file has every number.

Without a GPU, TRITON_INTERPRET=1 KVFOLD_TRITON=interpret python benchmarks/gpu.py --smoke runs all of it on tiny shapes in Triton's
interpreter: its times mean nothing.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvfold.attention import dispatch
from kvfold.attention.reference import Query
from kvfold.blocks import Blocks
from kvfold.kernels.triton import Look, tuning
from kvfold.kernels.triton.launch import attend as launch
from kvfold.lab.roofline import Roofs, measure_roofs
from kvfold.lab.setting import machine, versions
from kvfold.plan import Plan
from kvfold.site import Site

PLANS = {"full": "full", "int8": "int8", "int4": "int4", "int2": "int2", "fp8": "fp8", "kivi2": "kivi(int2)"}
LEVEL_2_BYTES = 256 * 2**20  # more than any level-2 cache, so that codes come from memory
BOUND = 3e-3  # relative error of attention: half precision products, sums in float32
BOUND_BF16 = 1e-2  # where probabilities meet V in bfloat16


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    groups: int
    head_dim: int


class Session:
    """The state of a call: options, device, deadline and results."""

    def __init__(self, args: argparse.Namespace):
        self.smoke: bool = args.smoke
        self.device = torch.device("cpu" if args.smoke else "cuda")
        self.deadline = time.monotonic() + args.seconds
        self.shape = Shape(2, 2, 32) if args.smoke else Shape(8, 4, 128)
        self.results: dict[str, Any] = {"left_out": []}
        self.lines: list[str] = []

    def left(self, section: str, needed_s: float) -> bool:
        """Whether there is time for a section; otherwise it is noted as left out."""
        if time.monotonic() + needed_s < self.deadline:
            return True
        self.results["left_out"].append(section)
        return False

    def say(self, line: str) -> None:
        print(f"[{self.deadline - time.monotonic():4.0f} s left] {line}", flush=True)


def codec_of(plan: str, head_dim: int) -> Any:
    return Plan.parse(PLANS[plan]).store.codec(Site(head_dim, torch.bfloat16))


def filled(state: Session, plan: str, rows: int, tokens: int, head_dim: int) -> Blocks:
    """Blocks as if `tokens` had been appended to every row: a few hundred blocks are encoded, and each place gets a copy of one."""
    codec = codec_of(plan, head_dim)
    columns = -(-tokens // codec.block)
    sample = min(256, rows * columns)
    k, v = torch.randn(2, sample, codec.block, head_dim, device=state.device).bfloat16()
    chosen = torch.randint(0, sample, (rows * columns,), device=state.device)
    fields = {name: x[chosen] for name, x in dispatch.encode(codec, k, v).items()}
    table = torch.arange(rows * columns, device=state.device).view(columns, rows).T.contiguous()
    blocks = Blocks(codec, rows, state.device, contiguous=True, scored=False)
    blocks.restore(fields | {"table": table}, [0] * rows, [tokens] * rows)
    return blocks


def query(state: Session, rows: int, groups: int, head_dim: int, tokens: int, num_queries: int = 1) -> Query:
    q = torch.randn(rows, groups * num_queries, head_dim, device=state.device) * head_dim**-0.5
    return Query(q, torch.arange(tokens, tokens + num_queries, device=state.device), groups)


def field_bytes(blocks: Blocks) -> int:
    return sum(x.nbytes for x in blocks.pool.fields.values())


def milliseconds(state: Session, calls: list[Callable[[], object]], replays: int = 20) -> dict[str, float]:
    """p20, p50 and p80 of the time of a call, in a CUDA graph of all of them."""
    if state.smoke:
        start = time.perf_counter()
        calls[0]()
        spent = 1e3 * (time.perf_counter() - start)
        return {"p20": spent, "p50": spent, "p80": spent}
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    return {"p20": p20, "p50": p50, "p80": p80}


# -- correctness -------------------------------------------------------------------------------------------------------------


def exact(blocks: Blocks, asked: Query) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64 over what the codec decodes."""
    k, v, slots = blocks.dense()
    scores = asked.q.double() @ k.double().mT
    scores = scores.masked_fill((slots < 0)[:, None], -torch.inf)
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


def correctness(state: Session) -> bool:
    """Relative errors against float64 of attention, its log-sum-exp, the masses and encoding."""
    rows = []
    dims = (32,) if state.smoke else (64, 80, 96, 128, 256)
    for plan in PLANS:
        for head_dim in dims:
            for groups, num_queries, tokens in ((1, 1, 64), (4, 1, 1000), (3, 40, 512)):
                if state.smoke and num_queries > 1:
                    continue
                blocks = filled(state, plan, 3, tokens, head_dim)
                asked = query(state, 3, groups, head_dim, tokens, num_queries)
                out, lse = exact(blocks, asked)
                got = dispatch.attend([(blocks, asked)])
                mass = dispatch.mass(blocks, asked, got.lse)
                error = float((got.out - out).norm() / out.norm())
                lse_error = float((got.lse - lse).abs().max())
                mass_error = float((mass.sum((1, 2)) / (groups * num_queries) - 1).abs().max())
                right = error < (BOUND_BF16 if plan == "full" else BOUND) and lse_error < 2e-2 and mass_error < 1e-2
                rows.append(
                    {
                        "plan": plan,
                        "head_dim": head_dim,
                        "groups": groups,
                        "queries": num_queries,
                        "error": error,
                        "lse_error": lse_error,
                        "mass_error": mass_error,
                        "right": right,
                    }
                )
    state.results["correctness"] = rows
    state.results["encoding"] = encoding_errors(state)
    wrong = [row for row in rows if not row["right"]]
    state.say(f"correctness: {len(rows) - len(wrong)} of {len(rows)} right, largest error {max(r['error'] for r in rows):.1e}")
    for row in wrong:
        print("  WRONG", row)
    return not wrong


def encoding_errors(state: Session) -> list[dict[str, Any]]:
    """What share of the bytes equals the codec's own."""
    rows = []
    for plan in ("int8", "int4", "int2", "kivi2"):
        codec = codec_of(plan, state.shape.head_dim)
        k, v = torch.randn(2, 4, codec.block, state.shape.head_dim, device=state.device)
        got, wanted = dispatch.encode(codec, k, v), codec.encode(k, v)
        rows.append({"plan": plan} | {name: float((got[name] == x).float().mean()) for name, x in wanted.items()})
    state.say("encoding, least share of equal entries: " + str(min(min(v for k, v in r.items() if k != "plan") for r in rows)))
    return rows


# -- tuning ------------------------------------------------------------------------------------------------------------------


def tune(state: Session) -> None:
    tokens, batch = (256, 1) if state.smoke else (32768, 2)
    rows = batch * state.shape.kv_heads
    found = {}
    for plan in PLANS:
        if state.smoke or not state.left(f"tuning {plan}", 40):
            continue
        blocks = filled(state, plan, rows, tokens, state.shape.head_dim)
        asked = query(state, rows, state.shape.groups, state.shape.head_dim, tokens)
        place = blocks.locate(state.shape.head_dim)
        assert place is not None
        look = Look(place.descriptor, asked.q, None, place.starts, place.lengths)

        def measured(config: tuning.Config, look: Look = look, asked: Query = asked) -> float:
            return milliseconds(state, [lambda: launch([look], asked.slots, asked.num_groups, None, config)] * 4, 10)["p50"]

        block_m = max(8, state.shape.groups)
        times = tuning.tune(place.descriptor, state.shape.head_dim, block_m, state.device, measured)
        found[plan] = {str(config): ms for config, ms in times.items()}
        state.say(f"tuned {plan}: {min(times, key=times.__getitem__)}")
    state.results["tuning"] = found


# -- speed -------------------------------------------------------------------------------------------------------------------


def copies_of(state: Session, num_bytes: int) -> int:
    return 1 if state.smoke else max(2, min(32, -(-LEVEL_2_BYTES // num_bytes)))


def decode(state: Session, roofs: Roofs) -> None:
    """Attention of one token: every plan and torch's own over dense bfloat16."""
    cells = [(1, 128)] if state.smoke else [(1, 1024), (1, 2048), (1, 4096), (1, 32768), (1, 131072), (16, 32768), (16, 131072)]
    rows = state.results["decode"] = []
    for batch, tokens in cells:
        if not state.left(f"decode at batch {batch}, {tokens} tokens", 15):
            continue
        for name, (calls, num_bytes) in variants(state, batch, tokens):
            try:
                ms = milliseconds(state, calls())
            except (RuntimeError, torch.OutOfMemoryError) as error:
                rows.append({"batch": batch, "tokens": tokens, "variant": name, "error": str(error).splitlines()[0]})
                continue
            rate = num_bytes / ms["p50"] / 1e6
            row = {"batch": batch, "tokens": tokens, "variant": name, "ms": ms, "bytes": num_bytes, "gb_per_s": rate}
            rows.append(row | {"of_copy": rate * 1e9 / roofs.copy})
            if not state.smoke:
                torch.cuda.empty_cache()
        state.say(f"decode, batch {batch}, {tokens} tokens")


def variants(state: Session, batch: int, tokens: int) -> Any:
    """Names with a way to make the calls and the bytes that one of them reads."""
    shape = state.shape
    dense_bytes = 4 * batch * shape.kv_heads * tokens * shape.head_dim

    def torch_calls(backend: SDPBackend) -> Callable[[], list[Callable[[], object]]]:
        def make() -> list[Callable[[], object]]:
            sizes = (batch, shape.kv_heads, tokens, shape.head_dim)
            q = torch.randn(batch, shape.kv_heads * shape.groups, 1, shape.head_dim, device=state.device).bfloat16()
            caches = [
                tuple(torch.randn(sizes, device=state.device, dtype=torch.bfloat16) for _ in "kv")
                for _ in range(copies_of(state, dense_bytes))
            ]

            def call(k: torch.Tensor, v: torch.Tensor) -> object:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

            return [lambda k=k, v=v: call(k, v) for k, v in caches]

        return make

    flash = SDPBackend.MATH if state.smoke else SDPBackend.FLASH_ATTENTION
    yield "sdpa-flash bf16", (torch_calls(flash), dense_bytes)
    if importlib.util.find_spec("flash_attn") and not state.smoke:
        yield "flash-attn bf16", (flash_attention_calls(state, batch, tokens, dense_bytes), dense_bytes)
    for plan in PLANS:
        first = filled(state, plan, batch * shape.kv_heads, tokens, shape.head_dim)
        num_bytes = field_bytes(first)

        def make(plan: str = plan, first: Blocks = first, num_bytes: int = num_bytes) -> list[Callable[[], object]]:
            rows = batch * shape.kv_heads
            more = range(copies_of(state, num_bytes) - 1)
            caches = [first, *(filled(state, plan, rows, tokens, shape.head_dim) for _ in more)]
            asked = query(state, rows, shape.groups, shape.head_dim, tokens)
            return [lambda blocks=blocks: dispatch.attend([(blocks, asked)]) for blocks in caches]

        yield plan, (make, num_bytes)
        del first


def flash_attention_calls(state: Session, batch: int, tokens: int, dense_bytes: int) -> Callable[[], list[Callable[[], object]]]:
    """FlashAttention's own kernel for decoding, which splits over the sequence."""

    def make() -> list[Callable[[], object]]:
        from flash_attn import flash_attn_with_kvcache

        shape = state.shape
        q = torch.randn(batch, 1, shape.kv_heads * shape.groups, shape.head_dim, device=state.device).bfloat16()
        sizes = (batch, tokens, shape.kv_heads, shape.head_dim)
        caches = [
            [torch.randn(sizes, device=state.device, dtype=torch.bfloat16) for _ in "kv"]
            for _ in range(copies_of(state, dense_bytes))
        ]
        return [lambda k=k, v=v: flash_attn_with_kvcache(q, k, v) for k, v in caches]

    return make


def rest(state: Session, roofs: Roofs) -> None:
    """Masses for keep policies, a chunk of a prompt, and encoding."""
    shape = state.shape
    tokens, chunk = (128, 8) if state.smoke else (32768, 512)
    if state.left("masses and chunks", 40):
        rows = state.results["other"] = []
        for plan in PLANS:
            blocks = filled(state, plan, shape.kv_heads, tokens, shape.head_dim)
            one = query(state, shape.kv_heads, shape.groups, shape.head_dim, tokens)
            many = query(state, shape.kv_heads, shape.groups, shape.head_dim, tokens, chunk)
            lse = dispatch.attend([(blocks, one)]).lse
            mass = milliseconds(state, [lambda b=blocks, q=one, s=lse: dispatch.mass(b, q, s)])["p50"]
            part = milliseconds(state, [lambda b=blocks, q=many: dispatch.attend([(b, q)])], 5)["p50"]
            flops = 4 * shape.kv_heads * shape.groups * chunk * tokens * shape.head_dim
            rows.append({"plan": plan, "mass_ms": mass, "chunk_ms": part, "chunk_of_matmul": flops / part * 1e3 / roofs.matmul})
        state.say("masses and chunks")
    if state.left("encoding", 20):
        rows = state.results["encode"] = []
        num = 4 if state.smoke else 8192 // 64 * shape.kv_heads
        for plan in ("int8", "int4", "int2", "kivi2", "fp8"):
            codec = codec_of(plan, shape.head_dim)
            k, v = torch.randn(2, num, codec.block, shape.head_dim, device=state.device).bfloat16()
            ms = milliseconds(state, [lambda c=codec, k=k, v=v: dispatch.encode(c, k, v)])["p50"]
            # The least that the prefill of as many tokens takes: 8.0e9 weights, 32 layers, at the measured matmul rate.
            prefill_ms = 2 * 8.0e9 * (num * codec.block / shape.kv_heads) / roofs.matmul * 1e3
            rows.append({"plan": plan, "ms": ms, "of_least_prefill": 32 * ms / prefill_ms})
        state.say("encoding")


def whole_model(state: Session) -> None:
    """Eager transformers with random weights: a decode step, its peak memory, and the counted bytes."""
    if not state.left("whole model", 90):
        return
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

    import kvfold
    from kvfold.lab.generate import generate

    small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 200}
    large = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000}
    layers, tokens, new = (2, 70, 3) if state.smoke else (8, 16384, 24)
    config = LlamaConfig(
        **(small if state.smoke else large),
        num_hidden_layers=layers,
        num_attention_heads=state.shape.kv_heads * state.shape.groups,
        num_key_value_heads=state.shape.kv_heads,
        head_dim=state.shape.head_dim,
        max_position_embeddings=2 * tokens,
    )
    with torch.device(state.device):
        model = LlamaForCausalLM(config).to(torch.float32 if state.smoke else torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=state.device)
    rows = state.results["model"] = []
    makers: dict[str, Callable[[], Any]] = {"DynamicCache": lambda: DynamicCache(config=config)}
    for backend in ("quanto", "hqq"):
        if importlib.util.find_spec({"quanto": "optimum"}.get(backend, backend)):
            makers[f"QuantizedCache {backend} int4"] = lambda b=backend: QuantizedCache(b, config, nbits=4)
    makers |= {plan: (lambda p=plan: kvfold.cache(model, PLANS[p])) for plan in ("full", "int8", "int4", "int2", "fp8")}
    for name, make in makers.items():
        if not state.left(f"whole model, {name}", 15):
            continue
        generate(model, ids[:, :200], make(), 3)
        if not state.smoke:
            torch.cuda.reset_peak_memory_stats()
        before = 0 if state.smoke else torch.cuda.memory_allocated()
        cache = make()
        done = generate(model, ids, cache, new, chunk=2048)
        peak = 0 if state.smoke else torch.cuda.max_memory_allocated() - before
        token_ms = statistics.median(done.token_ms)
        counted = getattr(cache, "nbytes", None)
        rows.append({"cache": name, "ttft_ms": done.ttft_ms, "token_ms": token_ms, "peak_bytes": peak, "counted_bytes": counted})
        state.say(f"whole model, {name}: {token_ms:.2f} ms a token")


# -- the table ---------------------------------------------------------------------------------------------------------------


def table(state: Session) -> None:
    rows = [row for row in state.results.get("decode", []) if "ms" in row]
    base = {(r["batch"], r["tokens"]): r["ms"]["p50"] for r in rows if r["variant"].startswith("sdpa")}
    print(f"\n{'batch':>5} {'tokens':>7} {'variant':<16} {'us':>9} {'p20-p80':>15} {'GB/s':>6} {'of copy':>8} {'x sdpa':>7}")
    for r in rows:
        ms = r["ms"]
        spread = f"{1e3 * ms['p20']:.1f}-{1e3 * ms['p80']:.1f}"
        faster = base.get((r["batch"], r["tokens"]), float("nan")) / ms["p50"]
        print(
            f"{r['batch']:>5} {r['tokens']:>7} {r['variant']:<16} {1e3 * ms['p50']:>9.1f} {spread:>15} {r['gb_per_s']:>6.0f} "
            f"{r['of_copy']:>8.0%} {faster:>7.2f}"
        )
    for r in state.results.get("other", []):
        print(f"{r['plan']:<8} masses {1e3 * r['mass_ms']:.1f} us, chunk {r['chunk_ms']:.2f} ms ({r['chunk_of_matmul']:.0%} of matmul)")
    for r in state.results.get("encode", []):
        print(f"{r['plan']:<8} encoding {r['ms']:.3f} ms a layer, {r['of_least_prefill']:.1%} of the least prefill")
    for r in state.results.get("model", []):
        counted = "" if r["counted_bytes"] is None else f", counted {r['counted_bytes'] / 2**20:.0f} MiB"
        print(f"{r['cache']:<26} {r['token_ms']:.2f} ms a token, peak {r['peak_bytes'] / 2**20:.0f} MiB{counted}")
    if state.results["left_out"]:
        print("left out for lack of time:", ", ".join(state.results["left_out"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--quick", action="store_true", help="correctness only")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes in the interpreter: times mean nothing")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("no GPU: --smoke runs tiny shapes in Triton's interpreter")
    torch.manual_seed(0)
    state = Session(args)
    state.results |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions() | triton_version()}
    state.results |= {"machine": machine(state.device.type), "kernel": dispatch.kernel_name(device=state.device.type)}
    state.say(f"{state.results['machine']}, kernel {state.results['kernel']}, {state.results['versions']}")
    right = correctness(state)
    if right and not args.quick:
        sizes = {"num_bytes": 2**20, "size": 64} if state.smoke else {}
        roofs = measure_roofs(state.device, torch.float32 if state.smoke else torch.bfloat16, **sizes)
        state.results["roofs"] = vars(roofs)
        state.say(f"read {roofs.read / 1e9:.0f} GB/s, copy {roofs.copy / 1e9:.0f} GB/s, matmul {roofs.matmul / 1e12:.0f} TFLOP/s")
        for section in (lambda: tune(state), lambda: decode(state, roofs), lambda: rest(state, roofs), lambda: whole_model(state)):
            section()
    table(state)
    args.out.write_text(json.dumps(state.results, indent=1) + "\n")
    print(args.out)
    if not right:
        raise SystemExit("some results are wrong: nothing was timed")


def triton_version() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__}


if __name__ == "__main__":
    main()
