"""kvfold, and transformers' own DynamicCache for comparison: `weights/plan`, as in `native/int4`."""

import sys
import time

import torch
from protocol import Answer, prompt, serve
from transformers import DynamicCache

import kvfold
from kvfold.attention.dispatch import kernel_name
from kvfold.models.adapter import detach

CHUNK = 512


def main(model_name: str, form: str, threads: int, answers: int) -> None:
    torch.set_num_threads(threads)
    weights, plan = form.split("/")
    model, _ = kvfold.load(model_name, dtype=torch.bfloat16, weights=weights)
    if plan == "DynamicCache":
        detach(model)

    @torch.no_grad()
    def run(context: int, num_tokens: int) -> Answer:
        cache = DynamicCache(config=model.config) if plan == "DynamicCache" else kvfold.cache(model, plan)
        ids = torch.tensor([prompt(context, model.config.vocab_size)])
        start = time.perf_counter()
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        prefill = time.perf_counter() - start
        times = []
        for token in prompt(num_tokens, model.config.vocab_size):
            start = time.perf_counter()
            model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1)
            times.append((time.perf_counter() - start) * 1e3)
        return {"prefill_s": prefill, "ms": times}

    serve({"version": kvfold.__version__, "weights": weights, "kernel": kernel_name()}, run, answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
