"""Everything about the GPU in one call of less than nine minutes: is it right, how fast, and how near to the memory's speed.

    PYTHONPATH=src python benchmarks/gpu.py [--out gpu.json] [--seconds 500] [--quick]

First correctness, against attention in float64 over the decoded tokens; nothing is timed when that fails. Then launch
configurations are tuned (and kept in the user's cache folder), and attention of one decoded token is measured on the shape of
Llama-3-8B: 32 query heads on 8 KV heads of 128. Calls are captured in a CUDA graph over so many copies of the cache that no
level-2 cache holds them; a time is the median of replays over the calls of a graph. Bytes are those of codes, scales and zero
points, counted. Sections that no longer fit into --seconds are left out and named. The table comes last; the JSON file has all.

It needs nothing but torch, Triton and transformers. --smoke runs all of it on tiny shapes; without a GPU in Triton's
interpreter (TRITON_INTERPRET=1 KVFOLD_TRITON=interpret): its times mean nothing.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import LEVEL_2_BYTES, PLANS, STEPS, Session, codec_of, correctness, field_bytes, filled, milliseconds, query
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvfold
from kvfold.attention import dispatch
from kvfold.attention.reference import Query
from kvfold.blocks import Blocks
from kvfold.kernels.triton import Look, tuning
from kvfold.kernels.triton.launch import attend as launch
from kvfold.lab.clock import Clock
from kvfold.lab.generate import generate, prefill
from kvfold.lab.measure import peak_memory
from kvfold.lab.roofline import Roofs, measure_roofs
from kvfold.models.step import describe

# -- tuning ------------------------------------------------------------------------------------------------------------------


def tune(state: Session) -> None:
    tokens, batch = (64, 1) if state.smoke else (32768, 2)
    candidates = tuning.CANDIDATES[:2] if state.smoke else tuning.CANDIDATES
    rows = batch * state.shape.kv_heads
    found = {}
    for plan in PLANS:
        if not state.on_gpu or not state.left(f"tuning {plan}", 40):
            continue
        blocks = filled(state, plan, rows, tokens, state.shape.head_dim)
        asked = query(state, rows, state.shape.groups, state.shape.head_dim, tokens)
        place = blocks.locate(state.shape.head_dim)
        assert place is not None
        look = Look(place.descriptor, asked.q, None, place.starts, place.lengths)

        def measured(config: tuning.Config, look: Look = look, asked: Any = asked) -> float:
            return milliseconds(state, [lambda: launch([look], asked.slots, asked.num_groups, None, config)] * 4, 10)["p50"]

        block_m = max(8, state.shape.groups)
        times = tuning.tune(place.descriptor, state.shape.head_dim, block_m, state.device, measured, candidates)
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
            if state.on_gpu:
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
    if importlib.util.find_spec("flash_attn") and state.on_gpu:
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


def flash_attention_calls(
    state: Session, batch: int, tokens: int, dense_bytes: int
) -> Callable[[], list[Callable[[], object]]]:
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
            alone = milliseconds(state, [lambda b=blocks, q=one: dispatch.attend([(b, q)])])["p50"]
            watched = milliseconds(state, [lambda b=blocks, q=one: attend_and_watch(b, q)])["p50"]
            part = milliseconds(state, [lambda b=blocks, q=many: dispatch.attend([(b, q)])], 5)["p50"]
            flops = 4 * shape.kv_heads * shape.groups * chunk * tokens * shape.head_dim
            row = {"plan": plan, "mass_ms": mass, "alone_ms": alone, "watched_ms": watched, "chunk_ms": part}
            rows.append(row | {"chunk_of_matmul": flops / part * 1e3 / roofs.matmul})
        state.say("masses and chunks")
    if state.left("encoding", 20):
        rows = state.results["encode"] = []
        num = 4 if state.smoke else 8192 // 64 * shape.kv_heads
        for plan in PLANS:
            if plan == "full":
                continue
            codec = codec_of(plan, shape.head_dim)
            k, v = torch.randn(2, num, codec.block, shape.head_dim, device=state.device).bfloat16()
            ms = milliseconds(state, [lambda c=codec, k=k, v=v: dispatch.encode(c, k, v)])["p50"]
            # The least that the prefill of as many tokens takes: 8.0e9 weights, 32 layers, at the measured matmul rate.
            prefill_ms = 2 * 8.0e9 * (num * codec.block / shape.kv_heads) / roofs.matmul * 1e3
            rows.append({"plan": plan, "ms": ms, "of_least_prefill": 32 * ms / prefill_ms})
        state.say("encoding")


def attend_and_watch(blocks: Blocks, asked: Query) -> torch.Tensor:
    """Attention, and what each token received of it, from the scores that it leaves."""
    scores = dispatch.room_for_scores([blocks], asked)
    assert scores is not None
    lse = dispatch.attend([(blocks, replace(asked, scores=scores))]).lse
    return dispatch.received(scores, lse, largest=False)


def whole_model(state: Session) -> None:
    """A model with random weights: a decode step, what ran it, its peak memory, and the counted bytes."""
    if not state.left("whole model", 90):
        return
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache

    small = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 200}
    large = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000}
    layers, tokens, new = (1, 70, 2) if state.smoke else (8, 16384, 24)
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

    def plain(attention: str, cache: Callable[[], Any]) -> Callable[[], Any]:
        """A cache of transformers under one of its own attention functions; kvfold's caches bring theirs."""

        def make() -> Any:
            model.set_attn_implementation(attention)
            return cache()

        return make

    makers: dict[str, Callable[[], Any]] = {"DynamicCache sdpa": plain("sdpa", lambda: DynamicCache(config=config))}
    if importlib.util.find_spec("flash_attn") and not state.smoke:
        makers["DynamicCache flash-attn 2"] = plain("flash_attention_2", lambda: DynamicCache(config=config))
    for backend in ("quanto", "hqq"):
        if importlib.util.find_spec({"quanto": "optimum"}.get(backend, backend)):
            made = plain("sdpa", lambda b=backend: QuantizedCache(b, config, nbits=4))
            makers[f"QuantizedCache {backend} int4"] = made
    makers |= {plan: (lambda p=plan: kvfold.cache(model, STEPS[p])) for plan in (["int4"] if state.smoke else STEPS)}
    for name, make in makers.items():
        if not state.left(f"whole model, {name}", 15):
            continue
        generate(model, ids[:, :200], make(), 2)
        with peak_memory(state.device) as peak:
            cache = make()
            done = generate(model, ids, cache, new, chunk=2048)
        row = {"cache": name, "step": describe(model), "ttft_ms": done.ttft_ms, "token_ms": statistics.median(done.token_ms)}
        rows.append(row | {"peak_bytes": peak.num_bytes, "counted_bytes": getattr(cache, "nbytes", None)})
        state.say(f"whole model, {name}: {row['token_ms']:.2f} ms a token ({row['step']})")
        del cache
    if state.on_gpu and state.left("whole model, StaticCache", 15):
        kvfold.detach(model)
        model.set_attn_implementation("sdpa")
        with peak_memory(state.device) as peak:
            cache = StaticCache(config=config, max_cache_len=tokens + new + 2)
            token_ms = captured_ms(model, cache, ids, new)
        row = {"cache": "StaticCache sdpa", "step": "cuda-graph", "ttft_ms": None, "token_ms": token_ms}
        rows.append(row | {"peak_bytes": peak.num_bytes, "counted_bytes": None})
        state.say(f"whole model, StaticCache: {token_ms:.2f} ms a token (cuda-graph)")


@torch.no_grad()
def captured_ms(model: Any, cache: Any, ids: torch.Tensor, new: int) -> float:
    """The median time of a decode step of transformers' static cache in a CUDA graph: the fairest step of its own."""
    prefill(model, cache, ids, 2048)
    token, position = ids[:, -1:].clone(), torch.full((1, 1), ids.shape[1], device=ids.device)

    def step() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        position.add_(1)
        return logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    clock, times = Clock(ids.device), []
    for _ in range(new):
        clock.start()
        graph.replay()
        clock.stop()
        times.append(clock.milliseconds())
    return statistics.median(times)


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
        print(
            f"{r['plan']:<8} attention {1e3 * r['alone_ms']:.1f} us, and masses by its scores {1e3 * r['watched_ms']:.1f} us, "
            f"by keys again {1e3 * (r['alone_ms'] + r['mass_ms']):.1f} us; "
            f"chunk {r['chunk_ms']:.2f} ms ({r['chunk_of_matmul']:.0%} of the matmul rate)"
        )
    for r in state.results.get("encode", []):
        print(f"{r['plan']:<8} encoding {r['ms']:.3f} ms a layer, {r['of_least_prefill']:.1%} of the least prefill")
    for r in state.results.get("model", []):
        counted = "" if r["counted_bytes"] is None else f", counted {r['counted_bytes'] / 2**20:.0f} MiB"
        print(f"{r['cache']:<26} {r['token_ms']:.2f} ms a token, peak {r['peak_bytes'] / 2**20:.0f} MiB{counted}, {r['step']}")
    if state.results["left_out"]:
        print("left out for lack of time:", ", ".join(state.results["left_out"]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--quick", action="store_true", help="correctness only")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: times mean nothing")
    args = parser.parse_args(arguments)
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("no GPU: --smoke runs tiny shapes in Triton's interpreter")
    torch.manual_seed(0)
    state = Session(args)
    state.results |= setting(state)
    state.say(f"{state.results['device']}, kernel {state.results['kernel']}, {state.results['versions']}")
    right = correctness(state)
    if right and not args.quick:
        sizes = {"num_bytes": 2**20, "size": 64} if state.smoke else {}
        roofs = measure_roofs(state.device, torch.float32 if state.smoke else torch.bfloat16, **sizes)
        state.results["roofs"] = vars(roofs)
        state.say(
            f"read {roofs.read / 1e9:.0f} GB/s, copy {roofs.copy / 1e9:.0f} GB/s, matmul {roofs.matmul / 1e12:.0f} TFLOP/s"
        )
        for section in (
            lambda: tune(state),
            lambda: decode(state, roofs),
            lambda: rest(state, roofs),
            lambda: whole_model(state),
        ):
            section()
    table(state)
    args.out.write_text(json.dumps(state.results, indent=1) + "\n")
    print(args.out)
    if not right:
        raise SystemExit("some results are wrong: nothing was timed")


def setting(state: Session) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(state.device) if state.on_gpu else "interpreter",
        "kernel": dispatch.kernel_name(device=state.device.type),
        "versions": versions | {"kvfold": kvfold.__version__, "cuda": torch.version.cuda},
    }


if __name__ == "__main__":
    main()
