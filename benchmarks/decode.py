"""Milliseconds a token of a whole model: kvfold's plans beside transformers' DynamicCache, by form of the weights and context.

    python benchmarks/decode.py [--model NAME] [--weights dense int8 native] [--contexts 512 4096 8000]
                                [--plans full int8 int4] [--threads 2] [--shape gemma3-270m]

The DynamicCache runs in a model of its own that kvfold has not touched, on the same weights. Each cache is filled by prefilling
the same tokens; then steps of all caches take turns, so that what else the machine does falls on all of them alike. A number is
the median over the steps. The last line is JSON. With --shape the weights are random, in the shape of a model that is not at
hand.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

import kvfold
from kvfold.attention.dispatch import kernel_name
from kvfold.models import step
from kvfold.models.load import DEFAULT_MODEL
from kvfold.models.weights import describe

BASELINE = "DynamicCache"
SHAPES = {
    # google/gemma-3-270m: every sixth layer attends to everything, the others to their last 512 tokens
    "gemma3-270m": {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
    }
}
CHUNK = 512
WARM_UP = 3
COLUMNS = ("least ms", "p20", "p50", "p80", "prefill/s", "KV MB")


@torch.no_grad()
def measure(models: dict[str, PreTrainedModel], context: int, steps: int) -> list[dict[str, object]]:
    """Rows of one context; `models` has the model that each cache runs in."""
    vocab_size = next(iter(models.values())).config.vocab_size
    ids = torch.randint(0, vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    caches, prefill = {}, {}
    for name, model in models.items():
        cache = DynamicCache(config=model.config) if name == BASELINE else kvfold.cache(model, name)
        start = time.perf_counter()
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        prefill[name] = time.perf_counter() - start
        caches[name] = cache
    times: dict[str, list[float]] = {name: [] for name in models}
    token = torch.zeros(1, 1, dtype=torch.long)
    for turn in range(steps + WARM_UP):
        for name, cache in caches.items():
            start = time.perf_counter()
            models[name](token, past_key_values=cache, logits_to_keep=1)
            if turn >= WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e3)
    rows = []
    for name, cache in caches.items():
        p20, p50, p80 = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
        rows.append(
            {
                "cache": name,
                "context": context,
                "ms_least": min(times[name]),
                "ms_p20": p20,
                "ms_p50": p50,
                "ms_p80": p80,
                "prefill_tokens_per_s": context / prefill[name],
                "kv_bytes": cache.nbytes if name != BASELINE else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers),
            }
        )
    return rows


def random_model(shape: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPES[shape])).bfloat16().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="what kvfold.load takes")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--weights", nargs="+", default=["dense", "int8", "native"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 8000])
    parser.add_argument("--plans", nargs="+", default=["full", "int8", "int4"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-baseline", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"kernel {kernel_name()}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'weights':>8} {'context':>7} {'cache':<14}" + "".join(f"{title:>10}" for title in COLUMNS))
    records = []
    for weights in args.weights if not args.shape else ["random"]:

        def make(weights: str = weights) -> PreTrainedModel:
            return random_model(args.shape) if args.shape else kvfold.load(args.model, weights=weights)[0]

        model = make()
        kvfold.attach(model)
        models = {BASELINE: make()} if not args.no_baseline else {}
        models |= dict.fromkeys(args.plans, model)
        for context in args.contexts:
            for r in measure(models, context, args.steps):
                form = {"weights": weights, "weight_bytes": describe(model), "step": step.describe(models[str(r["cache"])])}
                records.append({**form, **r})
                times = "".join(f"{r[name]:>10.1f}" for name in ("ms_least", "ms_p20", "ms_p50", "ms_p80"))
                rest = f"{r['prefill_tokens_per_s']:>10.0f}{r['kv_bytes'] / 1e6:>10.1f}"
                print(f"{weights:>8} {r['context']:>7} {r['cache']:<14}{times}{rest}", flush=True)
    print(json.dumps({"kernel": kernel_name(), "threads": args.threads, "torch": torch.__version__, "records": records}))


if __name__ == "__main__":
    main()
