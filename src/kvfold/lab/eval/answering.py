"""Answers that are read from a compressed cache.

The context but its last token is read in chunks, and the plan is applied to it. Only then comes the last token, and after it
the answer, in small pieces. So the first token of an answer is already predicted from what the plan has kept. A layer attends
to a chunk before it compresses it: a context that is read to its end at once is answered from dense keys and values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvfold.kv_cache import KVCache
from kvfold.lab.generate import prefill
from kvfold.lab.measure import nbytes_in_16_bits, num_full_elements
from kvfold.models.adapter import cache as make_cache
from kvfold.plan import Plan


@dataclass(frozen=True)
class Held:
    """What a cache held while it answered.

    Attributes:
        num_seen: tokens that had been through it, of each sequence.
        kv_bytes: of one sequence, everything counted, dense tokens with 16 bits.
        fp16_bytes: K and V of those tokens in 16 bits, with nothing else.
    """

    num_seen: int
    kv_bytes: int
    fp16_bytes: int


class Answerer:
    """A model under a plan that scores and generates answers.

    The cache of the last context is kept, as the choices of a question and the passes over one item share it.

    Args:
        chunk: tokens of a context that are read at a time.
        answer_chunk: tokens of an answer that are read at a time.
    """

    def __init__(self, model: PreTrainedModel, plan: str | Plan, chunk: int = 512, answer_chunk: int = 32):
        self.model, self.chunk, self.answer_chunk = model, chunk, answer_chunk
        self.plan = make_cache(model, plan).plan
        self.largest: Held | None = None
        self.kernel = ""
        self._context: tuple[tuple[int, ...], KVCache] | None = None

    def forget(self) -> None:
        """Drops the last context's cache, and what was the largest."""
        self._context, self.largest = None, None

    @torch.inference_mode()
    def log_probs(self, context: Sequence[int], answers: Sequence[Sequence[int]]) -> Iterator[tuple[int, torch.Tensor]]:
        """The distributions over each token of each answer, given the context and the answer's tokens before it.

        Args:
            context: one token or more.
            answers: one or more, of one token or more each; they are read as one batch.

        Yields:
            The number of the answer, and `[n, V] float32` log-probabilities of its next n tokens, until all are there.
        """
        cache = self._after(context[:-1])
        if len(answers) > 1:
            cache.batch_repeat_interleave(len(answers))
        lengths = [len(answer) for answer in answers]
        width = max(lengths)
        rows = [[context[-1], *answer[:-1], *[0] * (width - len(answer))] for answer in answers]
        ids = torch.tensor(rows, device=self.model.device)
        real = torch.tensor(lengths, device=ids.device)[:, None] > torch.arange(width, device=ids.device)
        mask = torch.cat([real.new_ones(len(answers), len(context) - 1), real], 1).long()
        for start in range(0, width, self.answer_chunk):
            piece = ids[:, start : start + self.answer_chunk]
            seen = len(context) - 1 + start + piece.shape[1]
            padding = None if bool(real.all()) else mask[:, :seen]
            logits = self.model(input_ids=piece, past_key_values=cache, use_cache=True, attention_mask=padding).logits
            for row, length in enumerate(lengths):
                if length > start:
                    yield row, logits[row, : length - start].float().log_softmax(-1)
        if len(answers) == 1:
            self._weigh(cache, 1)

    @torch.inference_mode()
    def generate(self, contexts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """New tokens after each context, by the model's own `generate` over the compressed cache.

        Several contexts are one batch, padded on the left. Padding moves the borders of chunks, and with them what policies
        that learn from attention evict: batches of one are the exact measurement.

        Args:
            max_new_tokens: 1 or more.
            options: of `generate`, such as do_sample, temperature, top_p, stopping_criteria, pad_token_id.
        """
        width = max(map(len, contexts))
        device = self.model.device
        ids = torch.tensor([[0] * (width - len(c)) + list(c) for c in contexts], device=device)
        mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=device)
        if len(contexts) == 1:
            cache = self._after(contexts[0][:-1])
        else:
            cache = make_cache(self.model, self.plan)
            prefill(self.model, cache, ids[:, :-1], self.chunk, mask)
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=max_new_tokens, **options
        )
        self._weigh(cache, len(contexts))
        new: list[list[int]] = output[:, width:].tolist()
        return new

    def _after(self, tokens: Sequence[int]) -> KVCache:
        """A cache that has read the tokens, and that is the caller's."""
        if not tokens:
            return make_cache(self.model, self.plan)
        key = tuple(tokens)
        if self._context is None or self._context[0] != key:
            self._context = None  # gives its memory back before the next one grows
            cache = make_cache(self.model, self.plan)
            prefill(self.model, cache, torch.tensor([key], device=self.model.device), self.chunk)
            self._context = (key, cache)
            self._weigh(cache, 1)
        return self._context[1].copy()

    def _weigh(self, cache: KVCache, batch: int) -> None:
        num_seen = cache.get_seq_length()
        self.kernel = cache.kernel
        if self.largest is None or num_seen > self.largest.num_seen:
            self.largest = Held(num_seen, nbytes_in_16_bits(cache) // batch, 2 * num_full_elements(cache, num_seen))
