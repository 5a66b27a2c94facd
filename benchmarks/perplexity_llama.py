"""llama.cpp's part of perplexity.py: tokens come as JSON on stdin, nats go out as JSON. Needs llama-cpp-python and numpy."""

import json
import sys

import llama_cpp
import numpy as np


def nats(engine: llama_cpp.Llama, tokens: list[int]) -> float:
    engine.reset()
    engine.eval(tokens)
    logits = np.asarray(engine.scores[: len(tokens) - 1], dtype=np.float64)
    top = logits.max(1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return float((lse - logits[np.arange(len(tokens) - 1), tokens[1:]]).sum())


given = json.load(sys.stdin)
longest = max(map(len, given["texts"]))
engine = llama_cpp.Llama(given["model"], n_ctx=longest, n_threads=given["threads"], logits_all=True, verbose=False)
print(json.dumps({"version": llama_cpp.__version__, "nll": [nats(engine, tokens) for tokens in given["texts"]]}))
