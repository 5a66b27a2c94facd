"""`kvfold generate`: text from one prompt, under any plan."""

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvfold.errors import FileError, KvfoldError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kvfold.kv_cache import KVCache
    from kvfold.lab.generate import Generation


def generate(
    model: Annotated[
        str, typer.Option(help="A short name (smollm2-135m), a hub id (owner/name), a folder or a .gguf file.")
    ] = "smollm2-135m",
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the prompt.")] = None,
    plan: Annotated[str, typer.Option(help="A plan, or the name of a strategy ('kvfold strategies' lists them).")] = "full",
    sink_size: Annotated[int | None, typer.Option(min=0, help="Sinks of the plan: first tokens that stay as they are.")] = None,
    window_size: Annotated[
        int | None, typer.Option(min=0, help="Window of the plan: last tokens that stay as they are.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 200,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    weights: Annotated[
        str, typer.Option(help="How weights are held: dense, int8, int4 or native (as in a .gguf file).")
    ] = "dense",
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token; more is more varied.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the choices when the temperature is above 0.")] = 0,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens that are read at once.")] = 512,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")] = True,
    profile: Annotated[
        str | None, typer.Option(help="Write a trace, a table of operators and FLOPs into outputs/PROFILE/.")
    ] = None,
) -> None:
    """Generate text under a plan; ends with a line of bytes and speed on stderr."""
    text = _prompt_text(prompt, prompt_file)
    if not math.isfinite(temperature):
        raise KvfoldError(f"--temperature {temperature}: give a finite number, 0 or more")
    folder = _profile_folder(profile)
    if folder is not None:
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "99"
        )  # read when torch is imported: its profiler reports its stages on stderr

    import kvfold
    from kvfold.catalog import resolve
    from kvfold.cli.sizes import with_sizes
    from kvfold.lab.generate import check_length
    from kvfold.lab.generate import generate as run

    resolved = with_sizes(resolve(plan), sink_size, window_size)
    loaded, tokenizer = kvfold.load(model, dtype=dtype, device=device, weights=weights)
    input_ids = _encode(tokenizer, text, chat).to(loaded.device)
    check_length(loaded, input_ids.shape[1], max_new_tokens)
    cache = kvfold.cache(loaded, resolved)
    stream = _Stream(tokenizer)
    ends = _end_tokens(loaded, tokenizer)

    def show(token: "torch.Tensor") -> None:
        if int(token) not in ends:
            stream.put(int(token))

    try:
        generation = run(
            loaded, input_ids, cache, max_new_tokens, chunk=chunk, temperature=temperature, seed=seed, eos=ends, on_token=show
        )
    finally:
        stream.end()
    print(_summary(loaded, cache, generation), file=sys.stderr)
    if folder is not None:
        from kvfold.lab import profile as profiling

        profiling.profile(loaded, lambda: kvfold.cache(loaded, resolved), input_ids, generation, cache, chunk, folder)
        print(f"profile in {folder}: trace.json, operators.csv, operators.txt, summary.json", file=sys.stderr)


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise KvfoldError("give either --prompt or --prompt-file")
    if prompt_file is None:
        assert prompt is not None
        text, name = prompt, "--prompt"
    else:
        from kvfold.lab.text import read_text

        text, name = read_text(prompt_file), str(prompt_file)
    if not text.strip():
        raise KvfoldError(f"{name} is empty: give the model something to go on from")
    return text


def _profile_folder(name: str | None) -> Path | None:
    """outputs/NAME, made and tried before anything is computed."""
    if name is None:
        return None
    if Path(name).is_absolute() or ".." in Path(name).parts or not name.strip():
        raise FileError(f"--profile '{name}': give a plain name, which becomes a folder in outputs/")
    from kvfold.files import make_folder

    return make_folder(Path("outputs") / name)


def _encode(tokenizer: Any, text: str, chat: bool) -> "torch.Tensor":
    """`[1, S] long`."""
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(text, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise ModelError("the model's tokenizer makes no token of this prompt")
    return ids


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    found = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return {end for end in found if end is not None}


class _Stream:
    """Prints text as its tokens come. A character whose bytes are spread over several tokens waits for the last of them."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []  # since the last line's start: decoding all of them again gets the spaces right
        self.printed = 0

    def put(self, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return
        self._print(text)
        if text.endswith("\n"):
            self.tokens, self.printed = [], 0

    def end(self) -> None:
        self._print(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        print(flush=True)

    def _print(self, text: str) -> None:
        print(text[self.printed :], end="", flush=True)
        self.printed = len(text)


def _summary(model: "PreTrainedModel", cache: "KVCache", generation: "Generation") -> str:
    """The end line."""
    from kvfold.lab.measure import num_full_elements
    from kvfold.models.step import describe as describe_step
    from kvfold.models.weights import describe as describe_weights

    num_seen = cache.get_seq_length()
    fp16_bytes = 2 * num_full_elements(cache, num_seen)
    speed = generation.tokens_per_s
    parts = [
        f"KV cache {cache.nbytes / 2**20:.2f} MiB for {num_seen} tokens, {cache.nbytes / fp16_bytes:.1%} of FP16's "
        f"{fp16_bytes / 2**20:.2f} MiB",
        f"first token after {generation.ttft_ms:.0f} ms",
        f"{speed:.1f} tokens/s" if speed is not None else "one token",
        f"plan {cache.plan}",
        f"kernel {cache.kernel}",
        f"step {describe_step(model)}",
        f"weights {describe_weights(model)}",
    ]
    return " | ".join(parts)
