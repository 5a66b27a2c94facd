"""What plans cost in quality, and all of their bytes: the protocol of docs/log.md, for any plans, in one table.

    python benchmarks/quality.py --plans int4 int2 "h2o(25%) | int4" [--quick] [--out results/quality.jsonl]
    python benchmarks/quality.py --group gear kivi turboquant evict

Three Wikipedia articles, 2048 tokens of each prefilled and 2048 streamed by 32, in float32, against the full cache of the same
engine; --quick takes 1024 and 512 tokens of the first one. Bits an element count everything that a cache of all these tokens
holds for a model in bfloat16; a calibration belongs to the model as its weights do, and is not in them. Each measurement is
appended to --out as it ends, and what is there already, of the same code, is not measured again. The last line is JSON.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import kvfold
from kvfold.lab.measure import num_full_elements
from kvfold.lab.quality import reference_of, stream_quality
from kvfold.lab.setting import code_hash, machine, versions
from kvfold.lab.text import wikipedia_articles
from kvfold.layer_cache import LayerCache

ARTICLES = ("Abraham Lincoln", "American Revolutionary War", "Alkali metal")
CHUNK = 32

GROUPS = {
    "ladder": ["int8", "int4", "int2", "banded(4)", "banded(3.25)", "banded(2.25)"],
    "calibrated": [f"banded({bits}, calibrated=true)" for bits in ("3.75", "3", "2.25", "1.75", "1.5")],
    # A method beside plain quantization of as many bytes.
    "gear": ["int4", "gear(int4)", "int2", "gear(int2)"],
    "turboquant": ["int4", "turboquant(4)", "turboquant(3)", "int2", "turboquant(2)"],
    "kivi": [
        "kivi(int2)",
        "int2(k_axis=token, rotate=none, sink=0, k_group=32, v_group=32, scales=half, symmetric=none)",
        "int2",
    ],
    # 4, 8 and 16 times fewer bytes, by eviction alone and by quantizing what is left.
    "evict": [
        *("h2o(25%)", "snapkv(25%)", "int4", "h2o(90%) | int4"),
        *("h2o(12.5%)", "snapkv(12.5%)", "h2o(45%) | int4", "snapkv(45%) | int4", "h2o(80%) | int2"),
        *("h2o(6.25%)", "snapkv(6.25%)", "h2o(22%) | int4", "snapkv(22%) | int4", "h2o(40%) | int2"),
    ],
}


def counted_bits(model: PreTrainedModel, plan: str, num_tokens: int) -> float:
    """Bits an element of a cache that has seen `num_tokens`, everything counted: bytes don't depend on what tokens hold."""
    cache = kvfold.cache(model, plan)
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        assert isinstance(layer, LayerCache), "models with sliding windows have bytes of their own"
        shape = (1, layer.site.num_kv_heads, num_tokens, layer.site.head_dim)
        k, v = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
        q = torch.randn(1, config.num_attention_heads, *shape[2:], generator=generator).to(model.dtype)
        for start in range(0, num_tokens, 512):
            part = slice(start, start + 512)
            handle, _ = layer.update(k[:, :, part], v[:, :, part])
            layer.attend(handle, q[:, :, part], None, shape[-1] ** -0.5, None)
    return 8 * cache.nbytes / num_full_elements(cache, num_tokens)


def measure(
    model: PreTrainedModel, tokenizer: Any, plans: list[str], titles: Iterable[str], prefilled: int, streamed: int, out: Path
) -> dict[tuple[str, str], dict[str, Any]]:
    """KL, top-1 and perplexity by plan and article, from `out` where they are there, measured and appended where not."""
    key = {"prefilled": prefilled, "streamed": streamed, "code": code_hash()}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if out.exists():
        for line in out.read_text().splitlines():
            record = json.loads(line)
            if key.items() <= record.items():
                found[record["plan"], record["article"]] = record
    texts = {article.title: article.text for article in wikipedia_articles()}
    for title in titles:
        missing = [plan for plan in plans if (plan, title) not in found]
        if not missing:
            continue
        ids = tokenizer(texts[title], return_tensors="pt").input_ids[:, : prefilled + streamed]
        reference = reference_of(model, ids, prefilled, CHUNK)
        for plan in missing:
            quality = stream_quality(model, ids, plan, reference)
            result = {name: getattr(quality, name) for name in ("kl", "top1", "perplexity", "perplexity_full", "kernel")}
            record = key | {"plan": plan, "article": title} | result
            found[plan, title] = record
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{title}: {plan}: KL {quality.kl:.5f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--plans", nargs="+", default=[])
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/quality.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plans = list(dict.fromkeys([*args.plans, *(plan for group in args.group for plan in GROUPS[group])]))
    if not plans:
        parser.error("name plans, or a group of them")
    titles, prefilled, streamed = (ARTICLES[:1], 1024, 512) if args.quick else (ARTICLES, 2048, 2048)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kvfold.load(args.model, dtype="float32")
    for plan in plans:  # a typing error is to show now, not after an hour
        kvfold.cache(model, plan)
    found = measure(model, tokenizer, plans, titles, prefilled, streamed, args.out)
    in_bfloat16, _ = kvfold.load(args.model, dtype="bfloat16")
    print(f"\n| plan | bits | × smaller | KL, mean ({', '.join(titles)}) | top-1 | perplexity |\n|---|---|---|---|---|---|")
    for plan in plans:
        bits = counted_bits(in_bfloat16, plan, prefilled + streamed)
        records = [found[plan, title] for title in titles]
        kl, top1, perplexity = (sum(r[name] for r in records) / len(records) for name in ("kl", "top1", "perplexity"))
        each = ", ".join(f"{r['kl']:.4f}" for r in records)
        print(f"| `{plan}` | {bits:.2f} | {16 / bits:.2f} | {kl:.5f} ({each}) | {top1:.1%} | {perplexity:.3f} |", flush=True)
        for record in records:
            record["bits_per_element"] = bits
    setting = {"model": args.model, "threads": args.threads, "machine": machine("cpu"), "versions": versions()}
    print(json.dumps(setting | {"records": [found[plan, title] for plan in plans for title in titles]}))


if __name__ == "__main__":
    main()
