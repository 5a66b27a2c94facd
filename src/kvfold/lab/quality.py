"""What a plan costs in quality, measured by streaming.

The first part of a text is prefilled, the rest follows in small chunks through the compressed cache, so that every token is
predicted from what the plan has kept of all tokens before it. Each prediction is compared with that of the full cache on the
same text. Perplexity alone can fool, as it sometimes improves by chance; KL divergence against the full cache can't.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from transformers import PreTrainedModel

from kvfold.files import explain
from kvfold.kv_cache import KVCache
from kvfold.lab.generate import prefill
from kvfold.lab.measure import nbytes_in_16_bits, num_full_elements
from kvfold.models.adapter import cache as make_cache
from kvfold.plan import Plan

_IN_MEMORY_BYTES = 512 * 2**20
"""A reference that is larger than this lives in a temporary file that is mapped into memory."""


@dataclass(frozen=True)
class Reference:
    """The predictions of the full cache, which plans are compared with. Made by `reference_of`.

    Attributes:
        log_probs: `[T - prefill_len, V] float32`, for every streamed token the log-probabilities of the token after it.
        perplexity: of the streamed tokens but the first, each given all before it.
        continuation: greedy tokens after the text.
        prefill_len: tokens that were prefilled, T - prefill_len were streamed.
        chunk: tokens streamed at a time.
    """

    log_probs: torch.Tensor
    perplexity: float
    continuation: tuple[int, ...]
    prefill_len: int
    chunk: int


@dataclass(frozen=True)
class Quality:
    """How a plan's predictions differ from the full cache's.

    Attributes:
        kl: mean of KL(full || plan) over the streamed tokens, in nats a token.
        top1: share of streamed tokens with the same most probable next token.
        perplexity: of the streamed tokens but the first, as in `Reference`.
        perplexity_full: the same of the full cache.
        continuation: greedy tokens after the text.
        kv_bytes: the cache's bytes after the last token of the text, dense tokens with 16 bits.
        bits_per_element: those bytes as bits for each number in K and V of all tokens seen, everything counted; dense tokens
            count in the type that the model runs in.
        kernel: what attended to the compressed segments.
    """

    kl: float
    top1: float
    perplexity: float
    perplexity_full: float
    continuation: tuple[int, ...]
    kv_bytes: int
    bits_per_element: float
    kernel: str


def reference_of(
    model: PreTrainedModel,
    ids: torch.Tensor,
    prefill_len: int,
    chunk: int = 32,
    num_new: int = 0,
    on_chunk: Callable[[float], None] | None = None,
) -> Reference:
    """Runs the full cache over a text.

    Args:
        model: in float32 where small differences matter; the noise of bfloat16 hides that of 8 bits.
        ids: `[1, T] long`, T greater than prefill_len + 1.
        prefill_len: tokens that are prefilled, 1 or more.
        chunk: tokens streamed at a time.
        num_new: length of the greedy continuation; 0 for none.
        on_chunk: called after each chunk with the share that is done, for progress bars.
    """
    if ids.shape[0] != 1 or not 1 <= prefill_len < ids.shape[1] - 1:
        raise ValueError(f"one text with more than {prefill_len + 1} tokens is expected, not {list(ids.shape)}")
    vocab_size = model.get_output_embeddings().weight.shape[0]
    log_probs = room((ids.shape[1] - prefill_len, vocab_size))
    done = 0

    def keep(chunk_log_probs: torch.Tensor) -> None:
        nonlocal done
        log_probs[done : done + len(chunk_log_probs)] = chunk_log_probs
        done += len(chunk_log_probs)
        if on_chunk:
            on_chunk(done / len(log_probs))

    run = _stream(model, ids, "full", prefill_len, chunk, num_new, keep)
    return Reference(log_probs, run.perplexity, run.continuation, prefill_len, chunk)


def stream_quality(
    model: PreTrainedModel,
    ids: torch.Tensor,
    plan: str | Plan,
    reference: Reference,
    on_chunk: Callable[[float], None] | None = None,
) -> Quality:
    """Runs a plan over a text, in the same way as the reference, and compares.

    Args:
        ids: `[1, T] long`, the text that the reference was made of.
        on_chunk: called after each chunk with the share that is done, for progress bars.

    Raises:
        PlanError: the plan can't be read, or does not suit this model.
    """
    num_streamed = len(reference.log_probs)
    if ids.shape[1] - reference.prefill_len != num_streamed:
        raise ValueError(f"the reference was made of {reference.prefill_len + num_streamed} tokens, not {ids.shape[1]}")
    done, kl, same = 0, 0.0, 0

    def compare(ours: torch.Tensor) -> None:
        nonlocal done, kl, same
        full = reference.log_probs[done : done + len(ours)].to(ours.device)
        kl += divergence(full, ours)
        same += int((ours.argmax(-1) == full.argmax(-1)).sum())
        done += len(ours)
        if on_chunk:
            on_chunk(done / num_streamed)

    run = _stream(model, ids, plan, reference.prefill_len, reference.chunk, len(reference.continuation), compare)
    return Quality(
        kl=kl / num_streamed,
        top1=same / num_streamed,
        perplexity=run.perplexity,
        perplexity_full=reference.perplexity,
        continuation=run.continuation,
        kv_bytes=run.kv_bytes,
        bits_per_element=8 * run.kv_bytes / run.num_elements,
        kernel=run.kernel,
    )


def divergence(full: torch.Tensor, ours: torch.Tensor) -> float:
    """The sum over rows of KL(full || ours), both `[N, V]` log-probabilities.

    Each term is p log(p/q) - p + q. The added parts cancel over the vocabulary, but with them no term is negative, and the sum
    is free of the rounding of the two softmaxes, which can be larger than what 8 bits cost.
    """
    p = full.exp()
    return max(0.0, float((p * (full - ours) - p + ours.exp()).sum(-1, dtype=torch.float64).sum()))


def room(shape: tuple[int, ...], beside_bytes: int = 0) -> torch.Tensor:
    """An uninitialized float32 tensor; a large one lives in a temporary file that nobody sees any more.

    Args:
        beside_bytes: of other tensors that count towards what is large.
    """
    size = math.prod(shape)
    if 4 * size + beside_bytes <= _IN_MEMORY_BYTES:
        return torch.empty(shape)
    with NamedTemporaryFile(prefix="kvfold-") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a disk that is too small says so now, not when a page is written
                os.posix_fallocate(file.fileno(), 0, 4 * size)
        except OSError as error:
            raise explain(error, Path(file.name)) from error
        return torch.from_file(file.name, shared=True, size=size).view(shape)


def rouge_l(candidate: str, target: str) -> float:
    """ROUGE-L: the F1 of the longest common subsequence of words (Lin 2004, aclanthology.org/W04-1013), from 0 to 1.

    Words are runs of letters and digits, without case. Two texts without words are equal: 1.
    """
    a, b = _words(candidate), _words(target)
    if not a or not b:
        return float(a == b)
    if not Counter(a) & Counter(b):
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            longest = diagonal + 1 if word == other else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], longest
    return 2 * row[-1] / (len(a) + len(b))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


# -- one pass ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    perplexity: float
    continuation: tuple[int, ...]
    kv_bytes: int
    num_elements: int
    kernel: str


@torch.inference_mode()
def _stream(
    model: PreTrainedModel,
    ids: torch.Tensor,
    plan: str | Plan,
    prefill_len: int,
    chunk: int,
    num_new: int,
    on_log_probs: Callable[[torch.Tensor], None],
) -> _Run:
    """Prefills and streams; `on_log_probs` gets each chunk's `[C, V] float32`."""
    cache = make_cache(model, plan)
    prefill(model, cache, ids[:, :prefill_len])
    nll, num_scored = 0.0, 0
    log_probs = ids.new_zeros(0, 0).float()
    for start in range(prefill_len, ids.shape[1], chunk):
        inputs = ids[:, start : start + chunk]
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[0]
        log_probs = logits.float().log_softmax(-1)
        targets = ids[0, start + 1 : start + 1 + inputs.shape[1]]
        nll -= log_probs[: len(targets)].gather(1, targets[:, None]).sum(dtype=torch.float64).item()
        num_scored += len(targets)
        on_log_probs(log_probs)
    kv_bytes, num_elements = nbytes_in_16_bits(cache), num_full_elements(cache, ids.shape[1])
    continuation = _continue(model, cache, int(log_probs[-1].argmax()), num_new)
    return _Run(math.exp(nll / num_scored), continuation, kv_bytes, num_elements, cache.kernel)


def _continue(model: PreTrainedModel, cache: KVCache, first: int, num_new: int) -> tuple[int, ...]:
    """The greedy continuation: `first` and what follows, `num_new` tokens in all, end tokens or not."""
    tokens = [first][:num_new]
    while len(tokens) < num_new:
        last = torch.tensor([[tokens[-1]]], device=model.device)
        tokens.append(int(prefill(model, cache, last).argmax(-1)))
    return tuple(tokens)
