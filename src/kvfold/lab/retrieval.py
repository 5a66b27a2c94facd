"""Questions about a long text that has been compressed before they are asked: where perplexity says little.

A text is read through a plan's cache once; then all its questions are asked as a batch of copies of that cache, so that no
question could have told the plan what to keep. For each question there are two numbers: whether greedy decoding gives the
answer, and the log-probability of the answer, which moves also where a small model answers wrongly.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.lab.generate import prefill
from kvfold.lab.text import wikipedia_articles
from kvfold.models.adapter import cache as make_cache
from kvfold.plan import Plan

_CITIES = ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Quito", "Dublin", "Riga", "Perth", "Tunis", "Hanoi", "Turin", "Sofia")
_PER_BATCH = 4
"""Questions asked at once: each takes two copies of the cache."""

# Of the beginning of two articles; every answer stands there, and nowhere in its question.
_OF_ARTICLES: dict[str, tuple[tuple[str, str], ...]] = {
    "Abraham Lincoln": (
        ("In which town was Lincoln born?", "Hodgenville"),
        ("Who assassinated Lincoln?", "John Wilkes Booth"),
        ("Whom did Lincoln debate in 1858?", "Stephen A. Douglas"),
        ("Which fort was attacked on April 12, 1861?", "Fort Sumter"),
        ("Of what illness did Nancy Lincoln die?", "milk sickness"),
        ("From which town in England did Samuel Lincoln migrate?", "Norfolk"),
        ("In which year was Captain Lincoln killed?", "1786"),
        ("To which state did the family move in 1816?", "Indiana"),
    ),
}


@dataclass(frozen=True)
class Reading:
    """A text, and questions about it, up to where the answer begins, with their answers."""

    name: str
    text: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Answers:
    """How a plan answers.

    Attributes:
        exact: share of questions whose answer greedy decoding gives.
        log_prob: mean log-probability of the right answers, nats an answer.
        kv_bytes: of the caches after reading, the mean over texts.
    """

    exact: float
    log_prob: float
    kv_bytes: float


def articles(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[Reading]:
    """Beginnings of Wikipedia articles of `num_tokens` tokens, with those questions whose answers stand there."""
    texts = {article.title: article.text for article in wikipedia_articles()}
    readings = []
    for title, questions in _OF_ARTICLES.items():
        ids = tokenizer(texts[title], add_special_tokens=False, verbose=False).input_ids[:num_tokens]
        text = str(tokenizer.decode(ids))
        readings.append(Reading(title, text, tuple((f"{q}\nAnswer:", a) for q, a in questions if a in text)))
    return readings


def needles(tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_texts: int = 1, seed: int = 0) -> list[Reading]:
    """Numbers hidden in articles at an eighth, three, five and seven eighths of their depth.

    The needle in a haystack of Kamradt (github.com/gkamradt/LLMTest_NeedleInAHaystack), several in one text.
    """
    longest = sorted(wikipedia_articles(), key=lambda article: -len(article.text))
    readings = []
    for article in longest[1 : num_texts + 1]:
        rng = random.Random(f"{seed}, {article.title}")
        ids = tokenizer(article.text, add_special_tokens=False, verbose=False).input_ids[:num_tokens]
        sentences = str(tokenizer.decode(ids)).split(". ")
        hidden = [(city, str(rng.randint(1000, 9999))) for city in rng.sample(_CITIES, 4)]
        for i, (city, number) in reversed(list(enumerate(hidden))):
            sentences.insert(round((2 * i + 1) / 8 * len(sentences)), f"The secret number of {city} is {number}")
        questions = tuple(
            (f"What is the secret number of {city}?\nAnswer: The secret number of {city} is", number) for city, number in hidden
        )
        readings.append(Reading(f"{len(hidden)} needles in {article.title}", ". ".join(sentences), questions))
    return readings


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: str | Plan,
    readings: Sequence[Reading],
    max_new_tokens: int = 12,
    chunk: int = 512,
) -> Answers:
    """Reads each text under a plan and asks its questions. PlanError when the plan does not suit the model."""
    hits: list[bool] = []
    log_probs: list[float] = []
    sizes: list[int] = []
    for reading in readings:
        ids = tokenizer(reading.text, return_tensors="pt", verbose=False).input_ids.to(model.device)
        for start in range(0, len(reading.questions), _PER_BATCH):
            questions = reading.questions[start : start + _PER_BATCH]
            cache = make_cache(model, plan)
            prefill(model, cache, ids, chunk)
            sizes.append(cache.nbytes)
            cache.batch_repeat_interleave(2 * len(questions))
            batch = _Batch.of(tokenizer, questions, ids.shape[1], model.device)
            logits = model(**batch.inputs(), past_key_values=cache, use_cache=True).logits
            log_probs += batch.log_probs(logits)
            written = [logits[:, -1].argmax(-1)]
            for _ in range(max_new_tokens - 1):
                batch = batch.extended(written[-1])
                logits = model(**batch.inputs(), past_key_values=cache, use_cache=True).logits
                written.append(logits[:, -1].argmax(-1))
            texts = tokenizer.batch_decode(torch.stack(written, 1)[len(questions) :], skip_special_tokens=True)
            hits += [_gives(text, answer) for text, (_, answer) in zip(texts, questions, strict=True)]
    return Answers(sum(hits) / len(hits), sum(log_probs) / len(log_probs), sum(sizes) / len(sizes))


def _gives(text: str, answer: str) -> bool:
    """Whether the answer is in the first line of a text."""
    return answer.lower() in text.strip().partition("\n")[0].lower()


@dataclass(frozen=True)
class _Batch:
    """Questions with their answers, then the questions alone, padded on the left behind a text of `num_read` tokens.

    Attributes:
        ids: `[2n, Q] long`, the tokens that are new now.
        mask: `[2n, seen + Q]`.
        answers: token ids of each answer.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    answers: list[list[int]]

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerBase, questions: Sequence[tuple[str, str]], num_read: int, device: torch.device
    ) -> "_Batch":
        asked = [tokenizer(f"\n\nQuestion: {q}", add_special_tokens=False).input_ids for q, _ in questions]
        answers = [tokenizer(f" {answer}", add_special_tokens=False).input_ids for _, answer in questions]
        rows = [q + a for q, a in zip(asked, answers, strict=True)] + asked
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        new = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        return _Batch(ids, torch.cat([new.new_ones(len(rows), num_read), new], 1), answers)

    def inputs(self) -> dict[str, torch.Tensor]:
        positions = (self.mask.cumsum(1) - 1)[:, -self.ids.shape[1] :]
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": positions}

    def extended(self, tokens: torch.Tensor) -> "_Batch":
        """One more token a row."""
        return _Batch(tokens[:, None], torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1), self.answers)

    def log_probs(self, logits: torch.Tensor) -> list[float]:
        """Of each answer, from the rows that have it at their end."""
        sums = []
        for row, answer in enumerate(self.answers):
            before = logits[row, -len(answer) - 1 : -1].float().log_softmax(-1)
            sums.append(float(before.gather(1, torch.tensor(answer, device=logits.device)[:, None]).sum()))
        return sums
