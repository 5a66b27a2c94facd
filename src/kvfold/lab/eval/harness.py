"""The model class `kvfold` of lm-evaluation-harness: every answer is read from the compressed cache.

The harness' own Hugging Face class scores context and answer in one dense pass, where compression would have no effect. Here
the context is read in chunks and compressed, then the answer is scored or generated from what was kept; text without a context
(rolling log-likelihoods) streams in small chunks. Tokenization, windows, stop sequences and truncation of generated text are
the harness' own, so that with the plan `full` the numbers equal those of its class.

    import lm_eval
    from kvfold.lab.eval.harness import KvfoldLM

    lm_eval.simple_evaluate(KvfoldLM("smollm2-135m", plan="int4"), tasks=["hellaswag"])
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  the registry looks up its own classes only while it is empty
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    _add_special_kwargs,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.errors import KvfoldError
from kvfold.lab.eval.answering import Answerer
from kvfold.models.load import load, source_of

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness calls a request of log-likelihood: its texts, the context's tokens, the answer's tokens."""

_WITHOUT_LIMIT = 2048
"""Tokens of a window where the model's configuration names no limit; the harness takes the same."""


@register_model("kvfold")
class KvfoldLM(TemplateLM):
    """A causal model whose cache is compressed by a plan.

    Args:
        pretrained: what `kvfold.load` takes, or a model that is loaded already, with its `tokenizer`.
        plan: a plan or the name of a strategy.
        batch_size: prompts that are generated from at once; see `Answerer.generate` for what more than 1 changes.
        chunk: tokens of a context that are read at a time.
        answer_chunk: tokens of an answer, or of text without a context, that are read at a time.
        max_length: tokens that the model takes; its configuration's limit when None.
        max_gen_toks: tokens to generate where a task names no number.
        truncate: cuts what is too long for the model from the left, as the harness does; otherwise that is an error.
        add_bos_token: whether prompts begin with the tokenizer's first token; None leaves it to the tokenizer.
        seed: of sampling, for tasks that sample.

    Raises:
        PlanError, ModelError, FileError: as `kvfold.load` and `kvfold.cache`.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | PreTrainedModel = "smollm2-135m",
        plan: str = "full",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        chunk: int = 512,
        answer_chunk: int = 32,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        truncate: bool = False,
        add_bos_token: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            self.model, self.tokenizer = load(pretrained, dtype=dtype, device=device or "cpu")
        elif tokenizer is None:
            raise ValueError("a loaded model needs its tokenizer")
        else:
            self.model, self.tokenizer = pretrained, tokenizer
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise KvfoldError(f"batch_size is a whole number, not {batch_size}")
        self.batch_size = int(batch_size)
        self.answerer = Answerer(self.model, plan, chunk, answer_chunk)
        self.max_length = max_length or self._model_limit()
        self.max_gen_toks, self.truncate = max_gen_toks, truncate
        self.add_bos_token, self.seed = add_bos_token, seed
        self.generated: list[list[int]] = []
        """The new tokens of each request of the last `generate_until`, stop sequences among them."""
        self.on_log_probs: Callable[[torch.Tensor], None] | None = None
        """Gets the distributions over each scored token, `[n, V] float32`, in an order that does not depend on the plan."""

    # -- what the harness asks a model for -------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eot_token_id(self) -> int:
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else int(token)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        options = _add_special_kwargs(add_special_tokens, self.add_bos_token)
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options["add_special_tokens"] = False
        tokens: list[int] = self.tokenizer.encode(string, **options)
        return tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer.chat_template is None:
            raise KvfoldError("this model's tokenizer has no chat template: leave out --chat-template")
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the scores."""
        return {"model_source": source_of(self.model), "plan": str(self.answerer.plan), "kernel": self.answerer.kernel}

    # -- log-likelihoods -------------------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: each window of `max_length` tokens streams through a cache of its own."""
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return sums

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        """Neighbouring requests with the same context, the choices of a question, share its cache and are read as one batch."""
        results = []
        for _key, group in itertools.groupby(map(self._fitted, requests), key=lambda pair: pair[0]):
            pairs = list(group)
            results += self._scored(pairs[0][0], [answer for _, answer in pairs])
        for (texts, _context, _answer), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _scored(self, context: list[int], answers: list[list[int]]) -> list[tuple[float, bool]]:
        """For each answer its log-likelihood, and whether it is the greedy one."""
        sums, greedy, done = [0.0] * len(answers), [True] * len(answers), [0] * len(answers)
        for row, log_probs in self.answerer.log_probs(context, answers):
            targets = torch.tensor(answers[row][done[row] : done[row] + len(log_probs)], device=log_probs.device)
            sums[row] += log_probs.gather(1, targets[:, None]).sum(dtype=torch.float64).item()
            greedy[row] &= bool((log_probs.argmax(-1) == targets).all())
            done[row] += len(log_probs)
            if self.on_log_probs:
                self.on_log_probs(log_probs)
        return list(zip(sums, greedy, strict=True))

    # -- generation ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each prompt, up to the first stop sequence, greedy unless the task samples."""
        texts: list[str] = []
        self.generated = []
        same_options = itertools.groupby(requests, key=lambda request: json.dumps(request.args[1], sort_keys=True, default=str))
        for _, group in same_options:
            rest = list(group)
            while rest:
                batch, rest = rest[: self.batch_size], rest[self.batch_size :]
                texts += self._generated([r.args[0] for r in batch], batch[0].args[1], occurrence=len(texts))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generated(self, prompts: list[str], options: dict[str, Any], occurrence: int) -> list[str]:
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
        max_new = options.pop("max_gen_toks")
        if not options.get("do_sample"):
            options.pop("temperature", None)
        contexts = [self.context_of(prompt, max_new) for prompt in prompts]
        width = max(map(len, contexts))
        torch.manual_seed(_seed(self.seed, prompts[0], occurrence))  # the same again after an interruption
        tokens = self.answerer.generate(
            contexts,
            max_new,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, width, len(contexts)),
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eot_token_id,
            **options,
        )
        self.generated += [_until_end(new, self.eot_token_id) for new in tokens]
        texts = [self.tokenizer.decode(new, skip_special_tokens=True) for new in tokens]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def score_after(self, prompt: str, max_new: int, answer: list[int]) -> None:
        """Reads an answer to a prompt of `generate_until` token by given token; `on_log_probs` sees its distributions."""
        self._scored(self.context_of(prompt, max_new), [answer])

    def context_of(self, prompt: str, max_new: int) -> list[int]:
        """The tokens of a prompt that `max_new` tokens are to follow."""
        tokens = self.tok_encode(prompt)
        limit = self.max_length - max_new
        if limit < 1:
            raise KvfoldError(f"{max_new} new tokens are more than the {self.max_length} tokens that the model takes")
        if len(tokens) > limit and not self.truncate:
            raise KvfoldError(self.too_long(len(tokens), max_new))
        return tokens[-limit:]

    # -- lengths ---------------------------------------------------------------------------------------------------------

    def lengths_of(self, request: Instance) -> tuple[int, int]:
        """Tokens that a request reads, and generates at most. KvfoldError when it is too long and not to be cut."""
        if request.request_type == "generate_until":
            max_new = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            return len(self.context_of(request.args[0], max_new)), max_new
        num_tokens = len(self.tok_encode("".join(request.args)))
        if request.request_type == "loglikelihood" and num_tokens > self.max_length and not self.truncate:
            raise KvfoldError(self.too_long(num_tokens, 0))
        return num_tokens, 0

    def too_long(self, num_tokens: int, max_new: int) -> str:
        what = f"{num_tokens} tokens" + (f", {max_new} are to follow" if max_new else "")
        return (
            f"a prompt has {what}, and the model takes {self.max_length}: choose shorter contexts, or add --truncate to cut "
            "prompts from the left"
        )

    def _fitted(self, pair: Pair) -> tuple[list[int], list[int]]:
        """Context and answer, cut from the left to what the model takes, as the harness cuts."""
        _, context, answer = pair
        excess = len(context) + len(answer) - (self.max_length + 1)
        if excess > 0:
            if not self.truncate:
                raise KvfoldError(self.too_long(len(context) + len(answer), 0))
            if excess >= len(context):
                raise KvfoldError(
                    f"an answer of {len(answer)} tokens is longer than the {self.max_length} that the model takes"
                )
        return context[max(0, excess) :], answer

    def _model_limit(self) -> int:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(limit or _WITHOUT_LIMIT)


def _until_end(tokens: list[int], end: int) -> list[int]:
    """Up to the end token, and with it: what follows in a batch is padding."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _seed(*parts: Any) -> int:
    """A seed that is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
