"""Perplexity of the full cache beside another engine's, on the same weights, text and tokens.

    python benchmarks/perplexity.py --llama /path/to/venv/bin/python --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The first tokens of some long Wikipedia articles, every token but the first given all before it. kvfold takes the file's weights
exactly, in float32, and streams the text by 32 through `full` and through `--plans`; transformers reads it in one pass;
llama.cpp, through llama-cpp-python in an environment of its own, rounds activations to 8 bits and holds the cache in 16.
The last line is JSON.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

import kvfold
from kvfold.lab.text import wikipedia_articles


def nll_dense(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Nats of all tokens but the first, in one pass of transformers alone."""
    with torch.no_grad():
        log_probs = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return -float(log_probs.gather(1, ids[0, 1:, None]).sum())


def nll_streamed(model: PreTrainedModel, ids: torch.Tensor, plan: str, chunk: int = 32) -> float:
    """The same through a cache of kvfold's."""
    cache, total = kvfold.cache(model, plan), 0.0
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, chunk):
            end = min(start + chunk, ids.shape[1] - 1)
            log_probs = model(ids[:, start:end], past_key_values=cache).logits[0].float().log_softmax(-1)
            total -= float(log_probs.gather(1, ids[0, start + 1 : end + 1, None]).sum())
    kvfold.detach(model)
    return total


def nll_llama(python: str, gguf: Path, texts: list[list[int]], threads: int) -> tuple[list[float], str]:
    worker = Path(__file__).with_name("perplexity_llama.py")
    given = json.dumps({"model": str(gguf), "threads": threads, "texts": texts})
    done = subprocess.run([python, str(worker)], input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"llama.cpp: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["nll"], f"llama.cpp ({answer['version']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama", help="a Python that has llama-cpp-python")
    parser.add_argument("--plans", nargs="*", default=["int8", "int4"])
    parser.add_argument("--articles", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = kvfold.load(str(options.gguf), dtype="float32")
    long = [a for a in wikipedia_articles() if len(a.text) > 6 * options.tokens][: options.articles]
    texts = [tokenizer(a.text, return_tensors="pt").input_ids[:, : options.tokens] for a in long]
    number = sum(ids.shape[1] - 1 for ids in texts)

    nats = {"transformers": sum(nll_dense(model, ids) for ids in texts)}
    for plan in ["full", *options.plans]:
        nats[f"kvfold {plan}"] = sum(nll_streamed(model, ids, plan) for ids in texts)
    if options.llama:
        each, name = nll_llama(options.llama, options.gguf, [ids[0].tolist() for ids in texts], options.threads)
        nats[name] = sum(each)
    perplexity = {name: math.exp(total / number) for name, total in nats.items()}
    ours = perplexity["kvfold full"]
    print(f"{len(texts)} articles ({', '.join(a.title for a in long)}), {number} predicted tokens\n")
    print("| engine | perplexity | to kvfold full |\n| :-- | --: | --: |")
    for name, value in perplexity.items():
        print(f"| {name} | {value:.4f} | {value / ours - 1:+.3%} |")
    print(json.dumps({"tokens": number, "perplexity": perplexity}))


if __name__ == "__main__":
    main()
