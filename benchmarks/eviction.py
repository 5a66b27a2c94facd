"""Every keep policy against random eviction that pins the same tokens, at 50, 25 and 12.5 % of the context.

    OMP_WAIT_POLICY=passive python benchmarks/eviction.py --out docs/results/eviction

Measures KL against the full cache and perplexity (streamed, kvfold.lab.quality), needles and questions about an article
(kvfold.lab.retrieval). What has been measured is in OUT/measured.jsonl and is not measured again; OUT/table.md is written
after every plan. Numbers are bytes and probabilities, not times: other work on the machine only makes it slower.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kvfold
from kvfold.keep.base import Keep
from kvfold.lab.passages import Passages
from kvfold.lab.quality import Reference, reference_of, stream_quality
from kvfold.lab.retrieval import Reading, articles, ask, needles
from kvfold.plan import Plan

BUDGETS = ("50%", "25%", "12.5%")
POLICIES = {
    "window": "window({})",
    "sink_window": "sink_window(sink=4, window={})",
    "h2o": "h2o({})",
    "scissorhands": "scissorhands({})",
    "tova": "tova({})",
    "snapkv": "snapkv({})",
    "pyramidkv": "snapkv({}, window=8, layers=pyramid)",
    "adakv": "snapkv({}, heads=ada)",
    "expected": "expected({})",
    "expected, means only": "expected({}, covariance=false)",
    "kvzip": "kvzip({})",
    "keydiff": "keydiff({}, sink=4)",
    "lagkv": "lagkv({})",
    "sieve": "sieve({})",
    "l2norm": "l2norm({})",
    "l2norm, all layers": "l2norm({}, skip=0, sink=4)",
}
COLUMNS = (
    *("policy", "plan", "MiB", "KL", "perplexity", "needles found", "needles log p", "article found", "article log p"),
    "loses to random in",
)


def twin(keep: Keep, budget: str) -> str:
    """Random eviction that pins what a policy pins."""
    recent = "0" if keep.strict else str(keep.recent)
    return f"random({budget}, recent={recent}, sink={keep.sink})"


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = kvfold.load(options.model)
    model = model.float()
    passages = Passages.read(None, tokenizer, options.prefill + options.stream)
    ids = torch.tensor(passages.rows(options.prefill + options.stream, 1))
    found = [*needles(tokenizer, options.read, options.texts), *articles(tokenizer, options.read)]
    reference = reference_of(model, ids, options.prefill)
    setting = {"prefill": options.prefill, "stream": options.stream, "read": options.read, "texts": options.texts}
    path = options.out / "measured.jsonl"
    known = {record["plan"]: record for record in read(path) if record["setting"] == setting}
    wanted = {name: [text.format(budget) for budget in options.budgets] for name, text in chosen(options.only).items()}
    plans = ["full", *(plan for plans in wanted.values() for plan in plans)]
    plans += [twin_of(plan, budget) for plans in wanted.values() for plan, budget in zip(plans, options.budgets, strict=True)]
    for plan in dict.fromkeys(plans):
        if plan not in known:
            known[plan] = {"setting": setting} | measure(model, tokenizer, plan, ids, reference, found)
            with path.open("a") as file:
                file.write(json.dumps(known[plan]) + "\n")
            print(known[plan], flush=True)
        (options.out / "table.md").write_text(table(known, wanted, options))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/eviction"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--stream", type=int, default=512)
    parser.add_argument("--read", type=int, default=1536, help="tokens of the texts that questions are about")
    parser.add_argument("--texts", type=int, default=2, help="texts with needles")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--only", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    return parser.parse_args()


def chosen(names: list[str]) -> dict[str, str]:
    return {name: POLICIES[name] for name in names}


def twin_of(plan: str, budget: str) -> str:
    keep = Plan.parse(plan).keep
    assert keep is not None
    return twin(keep, budget)


def read(path: Path) -> list[dict[str, Any]]:
    """Records; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def measure(
    model: Any, tokenizer: Any, plan: str, ids: torch.Tensor, reference: Reference, readings: list[Reading]
) -> dict[str, Any]:
    quality = stream_quality(model, ids, plan, replace(reference, continuation=()))
    hidden = ask(model, tokenizer, plan, [r for r in readings if "needles" in r.name])
    asked = ask(model, tokenizer, plan, [r for r in readings if "needles" not in r.name])
    return {
        "plan": plan,
        "kv_bytes": quality.kv_bytes,
        "kl": quality.kl,
        "top1": quality.top1,
        "perplexity": quality.perplexity,
        "needle_exact": hidden.exact,
        "needle_log_prob": hidden.log_prob,
        "article_exact": asked.exact,
        "article_log_prob": asked.log_prob,
    }


def table(known: dict[str, Any], wanted: dict[str, list[str]], options: argparse.Namespace) -> str:
    """Markdown: a policy and its twin side by side, and where it loses."""
    lines = [
        f"{options.model}, float32. KL and perplexity: {options.prefill} tokens prefilled, {options.stream} streamed",
        f"by 32. Needles and article: {options.read} tokens read, then asked; *found* is the share of right answers by greedy",
        "decoding, *log p* the mean log-probability of the right answer. Numbers after the slash are those of random eviction",
        "that pins the same tokens. MiB counts everything, at the end of the stream.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --: |" * len(COLUMNS),
    ]
    rows = [("full", "full", None)]
    for at, budget in enumerate(options.budgets):
        rows += [(name, plans[at], budget) for name, plans in wanted.items()]
    for name, plan, budget in rows:
        mine = known.get(plan)
        theirs = known.get(twin_of(plan, budget)) if budget else mine
        if mine and theirs:
            lines.append(f"| {name} | `{plan}` | " + " | ".join(cells(mine, theirs, budget is not None)) + " |")
    return "\n".join(lines) + "\n"


def cells(mine: dict[str, Any], theirs: dict[str, Any], twins: bool) -> list[str]:
    formats = {"kl": ".4f", "perplexity": ".2f", "needle_exact": ".0%", "needle_log_prob": ".2f"}
    formats |= {"article_exact": ".0%", "article_log_prob": ".2f"}
    row = [f"{mine['kv_bytes'] / 2**20:.2f}" + (f" / {theirs['kv_bytes'] / 2**20:.2f}" if twins else "")]
    row += [f"{mine[key]:{f}}" + (f" / {theirs[key]:{f}}" if twins else "") for key, f in formats.items()]
    losses = {
        "KL": mine["kl"] > theirs["kl"],
        "needles": mine["needle_log_prob"] < theirs["needle_log_prob"],
        "article": mine["article_log_prob"] < theirs["article_log_prob"],
    }
    return [*row, ", ".join(name for name, loses in losses.items() if loses)]


if __name__ == "__main__":
    main()
