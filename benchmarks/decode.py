"""Milliseconds a token of a whole model: kvfold's plans beside transformers' DynamicCache, at several lengths of context.

    python benchmarks/decode.py [--model FOLDER] [--contexts 512 4096 8000] [--plans full int8 int4] [--threads 2]

Each cache is filled by prefilling the same tokens; then steps of all caches take turns, so that what else the machine does
falls on all of them alike. A number is the median over the steps. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import kvfold
from kvfold.attention.dispatch import kernel_name
from kvfold.models.adapter import attach, detach

BASELINE = "DynamicCache, sdpa"
CHUNK = 512


def load(model: str | None) -> PreTrainedModel:
    if model is None:
        return kvfold.load("smollm2-135m")[0]
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()


def switch(model: PreTrainedModel, name: str) -> None:
    """The attention that a cache goes with."""
    if name == BASELINE:
        detach(model)
        if model.config._attn_implementation != "sdpa":
            model.set_attn_implementation("sdpa")
    else:
        attach(model)


@torch.no_grad()
def measure(model: PreTrainedModel, names: list[str], context: int, steps: int) -> list[dict[str, object]]:
    ids = torch.randint(0, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    caches, prefill = {}, {}
    for name in names:
        switch(model, name)
        cache = DynamicCache(config=model.config) if name == BASELINE else kvfold.cache(model, name)
        start = time.perf_counter()
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        prefill[name] = time.perf_counter() - start
        caches[name] = cache
    times: dict[str, list[float]] = {name: [] for name in names}
    token = torch.zeros(1, 1, dtype=torch.long)
    for step in range(steps + 3):
        for name, cache in caches.items():
            switch(model, name)
            start = time.perf_counter()
            model(token, past_key_values=cache, logits_to_keep=1)
            if step >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    rows = []
    for name, cache in caches.items():
        p20, p50, p80 = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
        rows.append(
            {
                "cache": name,
                "context": context,
                "ms_p20": p20,
                "ms_p50": p50,
                "ms_p80": p80,
                "prefill_tokens_per_s": context / prefill[name],
                "kv_bytes": cache.nbytes if name != BASELINE else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; the default model when left out")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 8000])
    parser.add_argument("--plans", nargs="+", default=["full", "int8", "int4"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-baseline", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model)
    names = [*([] if args.no_baseline else [BASELINE]), *args.plans]
    print(f"kernel {kernel_name()}, {args.threads} threads, torch {torch.__version__}, weights {model.dtype}")
    print(f"{'context':>7} {'cache':<20} {'ms p20':>8} {'p50':>8} {'p80':>8} {'prefill tok/s':>14} {'KV MB':>7}")
    records = []
    for context in args.contexts:
        for r in measure(model, names, context, args.steps):
            records.append(r)
            print(
                f"{r['context']:>7} {r['cache']:<20} {r['ms_p20']:>8.1f} {r['ms_p50']:>8.1f} {r['ms_p80']:>8.1f}"
                f" {r['prefill_tokens_per_s']:>14.0f} {r['kv_bytes'] / 1e6:>7.1f}",  # type: ignore[operator]
                flush=True,
            )
    print(json.dumps({"kernel": kernel_name(), "threads": args.threads, "torch": torch.__version__, "records": records}))


if __name__ == "__main__":
    main()
