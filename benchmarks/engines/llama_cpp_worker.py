"""llama.cpp, through llama-cpp-python's own bindings of its C interface."""

import sys
import time

import llama_cpp
from protocol import Answer, prompt, serve

BATCH = 512


def main(model: str, kv: str, longest: int, threads: int, answers: int) -> None:
    kind = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}[kv]
    engine = llama_cpp.Llama(
        model,
        n_ctx=longest,
        n_batch=BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=kind,
        type_v=kind,
        flash_attn=True,  # what quantized values need, and the faster one for f16
        verbose=False,
    )
    vocabulary = engine.n_vocab()

    def decode(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if status := llama_cpp.llama_decode(engine.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode returned {status}")
        llama_cpp.llama_synchronize(engine.ctx)

    def run(context: int, num_tokens: int) -> Answer:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(engine.ctx), True)
        tokens = prompt(context, vocabulary)
        start = time.perf_counter()
        for at in range(0, context, BATCH):
            decode(tokens[at : at + BATCH])
        prefill = time.perf_counter() - start
        times = []
        for token in prompt(num_tokens, vocabulary):
            start = time.perf_counter()
            decode([token])
            times.append((time.perf_counter() - start) * 1e3)
        return {"prefill_s": prefill, "ms": times}

    serve({"version": llama_cpp.__version__, "weights": "as in the file"}, run, answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
