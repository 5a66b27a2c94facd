"""vLLM's CPU build. It shows no single tokens here: a token's time is the difference of a long and a short request."""

import os
import sys
import time

from protocol import Answer, prompt, serve


def main(model: str, kv: str, longest: int, threads: int, answers: int) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    engine = vllm.LLM(
        model,
        dtype="bfloat16",
        max_model_len=longest,
        kv_cache_dtype="auto" if kv == "bf16" else kv,
        enable_prefix_caching=False,
        max_num_seqs=1,
    )
    vocabulary = engine.get_tokenizer().vocab_size

    def seconds(context: int, num_tokens: int) -> float:
        sampling = vllm.SamplingParams(max_tokens=num_tokens, min_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        engine.generate({"prompt_token_ids": prompt(context, vocabulary)}, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def run(context: int, num_tokens: int) -> Answer:
        short = seconds(context, 1)
        return {"prefill_s": short, "ms": [(seconds(context, 1 + num_tokens) - short) / num_tokens * 1e3]}

    serve({"version": vllm.__version__, "weights": "bfloat16"}, run, answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
