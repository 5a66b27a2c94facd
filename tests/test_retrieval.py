"""Questions after a text: batched on copies of one cache as if each had been asked alone."""

import pytest
import torch
from oracle import sharp_model
from tiny import tiny_tokenizer

import kvfold
from kvfold.lab import retrieval
from kvfold.lab.retrieval import Reading, ask
from kvfold.lab.text import Article

READING = Reading(
    "letters",
    "abc def ghi jkl mno pqr stu vwx yz. " * 4,
    (("Which?", "def"), ("What comes first of all?", "a"), ("Who?", "stu v")),
)


@pytest.mark.parametrize("plan", ["full", "h2o(40)", "kvzip(40)", "random(50, recent=8, sink=2) | int8"])
def test_a_batch_of_questions_is_each_alone(plan: str) -> None:
    model, tokenizer = sharp_model(), tiny_tokenizer()
    together = ask(model, tokenizer, plan, [READING])
    alone = [ask(model, tokenizer, plan, [Reading("one", READING.text, (question,))]) for question in READING.questions]
    assert together.log_prob == pytest.approx(sum(a.log_prob for a in alone) / 3, rel=1e-3)
    assert together.exact == pytest.approx(sum(a.exact for a in alone) / 3)
    assert together.kv_bytes == alone[0].kv_bytes


def test_log_probabilities_are_the_models_own() -> None:
    model, tokenizer = sharp_model(), tiny_tokenizer()
    expected = []
    kvfold.detach(model)
    for question, answer in READING.questions:
        before = tokenizer(READING.text).input_ids + tokenizer(f"\n\nQuestion: {question}").input_ids
        ids = before + tokenizer(f" {answer}").input_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(log_probs[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
    assert ask(model, tokenizer, "full", [READING]).log_prob == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_needles_stand_at_their_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [Article(f"Article {n}", f"Sentence {n} of many words. " * (40 - n)) for n in range(3)]
    monkeypatch.setattr(retrieval, "wikipedia_articles", lambda: texts)
    readings = retrieval.needles(tiny_tokenizer(), 900, num_texts=2)
    assert [reading.name for reading in readings] == ["4 needles in Article 1", "4 needles in Article 2"]
    for reading in readings:
        assert all(question[:30] and answer in reading.text for question, answer in reading.questions)
        depths = [reading.text.index(answer) / len(reading.text) for _, answer in reading.questions]
        assert depths == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=0.1)
