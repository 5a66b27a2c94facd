"""Prefill and decode, timed: what `kvfold generate` streams and `kvfold bench` measures."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvfold.errors import ModelError
from kvfold.lab.clock import Clock


@dataclass(frozen=True)
class Generation:
    """What was generated, and how long it took.

    Attributes:
        tokens: `[B, N] long`, the new tokens; a sequence that has ended repeats its end token.
        ttft_ms: time to first token: the prefill and the choice of the first token.
        token_ms: time of each further token, N - 1 of them.
    """

    tokens: torch.Tensor
    ttft_ms: float
    token_ms: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second while decoding, over all sequences; None when there was no decode step."""
        if not self.token_ms:
            return None
        return 1000 * self.tokens.shape[0] * len(self.token_ms) / sum(self.token_ms)


def check_length(model: PreTrainedModel, num_prompt: int, num_new: int = 0) -> None:
    """Raises ModelError when a prompt, or what is to follow it, is longer than the model takes.

    Positions given to RoPE grow with every token seen, also under plans that keep only some, so no plan lifts this limit.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        return
    if num_prompt > limit:
        raise ModelError(f"the prompt has {num_prompt} tokens and the model takes {limit}: shorten the prompt")
    if num_prompt + num_new > limit:
        raise ModelError(
            f"the prompt has {num_prompt} tokens and {num_new} are to follow, but the model takes {limit}: "
            f"ask for {limit - num_prompt} new tokens at most, or shorten the prompt"
        )


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: torch.Tensor,
    chunk: int = 512,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reads a prompt through the cache, `chunk` tokens at a time, so that memory is bounded by the cache's plan.

    Args:
        cache: empty, or with the turns before this one.
        input_ids: `[B, S] long`, S at least 1.
        attention_mask: `[B, seen + S]`, 0 for padding on the left, or None.

    Returns:
        The logits of the last position, `[B, V]`.
    """
    logits = None
    for ids in input_ids.split(chunk, dim=1):
        logits = _forward(model, cache, ids, attention_mask)
    if logits is None:
        raise ValueError("a prompt needs at least one token")
    return logits


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Cache,
    max_new_tokens: int,
    *,
    chunk: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    eos: Collection[int] = (),
    attention_mask: torch.Tensor | None = None,
    on_token: Callable[[torch.Tensor], None] | None = None,
) -> Generation:
    """Prefills `input_ids` in chunks and generates.

    After it the cache holds the prompt and all new tokens but the last.

    Args:
        input_ids: `[B, S] long`, padded on the left where `attention_mask [B, seen + S]` is 0.
        max_new_tokens: 1 or more.
        temperature: 0 takes the most probable token; otherwise logits are divided by it, and `seed` fixes the choice.
        eos: tokens that end a sequence; empty to always generate `max_new_tokens`.
        on_token: gets each step's tokens, `[B] long`, as they come; its own time is not measured.
    """
    choose = _Chooser(temperature, seed, input_ids.device)
    ends = torch.tensor(sorted(eos), dtype=torch.long, device=input_ids.device)
    tokens: list[torch.Tensor] = []
    times: list[float] = []
    clock = Clock(input_ids.device)
    while True:
        clock.start()
        if not tokens:
            logits = prefill(model, cache, input_ids, chunk, attention_mask)
        else:
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], 1)
            logits = _forward(model, cache, tokens[-1][:, None], attention_mask)
        token = choose(logits)
        if tokens:
            ended = torch.isin(tokens[-1], ends)
            token = torch.where(ended, tokens[-1], token)
        clock.stop()
        finished = bool(torch.isin(token, ends).all())
        times.append(clock.milliseconds())
        tokens.append(token)
        if on_token is not None:
            on_token(token)
        if finished or len(tokens) >= max_new_tokens:
            return Generation(torch.stack(tokens, 1), times[0], tuple(times[1:]))


def _forward(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The logits of the last of `ids [B, Q]`, `[B, V]`; only that position's are computed."""
    seen = cache.get_seq_length()
    inputs: dict[str, Any] = {}
    if attention_mask is not None:
        so_far = attention_mask[:, : seen + ids.shape[1]]
        inputs["attention_mask"] = so_far
        inputs["position_ids"] = (so_far.long().cumsum(1) - 1).clamp_min(0)[:, seen:]
    result = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
    logits: torch.Tensor = result.logits[:, -1]
    return logits


class _Chooser:
    """From logits `[B, V]` to tokens `[B]`."""

    def __init__(self, temperature: float, seed: int, device: torch.device):
        self.temperature = temperature
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        # In double, from the highest logit down: a temperature near 0 becomes greedy, not NaN.
        below = logits.double() - logits.double().amax(-1, keepdim=True)
        probabilities = (below / self.temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
