"""Is memory really freed? The resident set of a process that has read a long prompt, under several plans.

    python benchmarks/resident_set.py [--model NAME] [--weights native] [--context 8000] [--plans full int8 int4]

Each plan has a process of its own. `before` is the resident set with the model loaded and warm, `after` with the prompt in the
cache, both after free memory was given back to the system. What `after` grows by should be the bytes that the cache counts. The
last line is JSON.
"""

import argparse
import json
import subprocess
import sys

import psutil
import torch

import kvfold
from kvfold.lab.generate import prefill
from kvfold.lab.measure import give_back_free_memory
from kvfold.models.load import DEFAULT_MODEL

WARM_UP = 600


def resident() -> int:
    give_back_free_memory()
    return psutil.Process().memory_info().rss


def measure(name: str, weights: str, plan: str, context: int) -> dict[str, object]:
    torch.set_num_threads(1)
    model, _ = kvfold.load(name, weights=weights)
    ids = torch.randint(0, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    prefill(model, kvfold.cache(model, plan), ids[:, :WARM_UP])
    before = resident()
    cache = kvfold.cache(model, plan)
    prefill(model, cache, ids)
    return {"plan": plan, "before": before, "after": resident(), "kv_bytes": cache.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="what kvfold.load takes")
    parser.add_argument("--weights", default="native")
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--plans", nargs="+", default=["full", "int8", "int4"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.model, args.weights, args.one, args.context)))
        return
    print(f"{'plan':<8} {'before MB':>10} {'after MB':>10} {'grown MB':>10} {'KV MB':>8}")
    records = []
    for plan in args.plans:
        command = [sys.executable, __file__, "--model", args.model, "--weights", args.weights, "--context", str(args.context)]
        done = subprocess.run([*command, "--one", plan], check=True, capture_output=True, text=True)
        r = json.loads(done.stdout.splitlines()[-1])
        records.append(r)
        grown = r["after"] - r["before"]
        print(
            f"{plan:<8} {r['before'] / 1e6:>10.1f} {r['after'] / 1e6:>10.1f} {grown / 1e6:>10.1f} {r['kv_bytes'] / 1e6:>8.1f}",
            flush=True,
        )
    print(json.dumps({"context": args.context, "weights": args.weights, "records": records}))


if __name__ == "__main__":
    main()
