"""Answers read from a compressed cache, and the harness' model class: equal to the harness' own where nothing is compressed."""

from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

import kvfold
from kvfold.errors import KvfoldError
from kvfold.lab.eval.answering import Answerer
from kvfold.lab.eval.reference import Comparison, Reference

HELD_ELSEWHERE = ("int4 | share(start=0%)", "kivi(int4) | minicache(start=0%)", "int8 | tier(device=64, host)")
PLANS = ("full", "int4", "h2o(25%)", "window(16)", "snapkv(48) | int8")


def sharp_model(family: str = "llama", **changes: int) -> torch.nn.Module:
    """A tiny model whose attention is far from uniform, so that it matters what is in the cache."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(6 if "q_proj" in name or "k_proj" in name else 3)
    return model


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(3, 100, (200,), generator=torch.Generator().manual_seed(1)).tolist()


def collected(pieces: Iterator[tuple[int, torch.Tensor]], num: int) -> list[torch.Tensor]:
    found: list[list[torch.Tensor]] = [[] for _ in range(num)]
    for row, log_probs in pieces:
        found[row].append(log_probs)
    return [torch.cat(parts) for parts in found]


# -- answering ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_full_scores_as_the_model_does(family: str, tokens: list[int]) -> None:
    model = sharp_model(family)
    answers = [tokens[:40], tokens[5:8], tokens[30:31]]
    ours = collected(Answerer(model, "full", chunk=64, answer_chunk=16).log_probs(tokens, answers), 3)
    for answer, log_probs in zip(answers, ours, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokens + answer])).logits[0]
        torch.testing.assert_close(log_probs, logits.log_softmax(-1)[len(tokens) - 1 : -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("plan", PLANS)
def test_choices_read_as_a_batch_are_those_read_one_by_one(
    plan: str, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFOLD_CPU", "off")  # the kernels round a few queries and many in different ways
    model = sharp_model()
    answers = [tokens[:40], tokens[5:8], tokens[30:31], tokens[:70]]
    together = collected(Answerer(model, plan, 64, 16).log_probs(tokens, answers), 4)
    for answer, log_probs in zip(answers, together, strict=True):
        (alone,) = collected(Answerer(model, plan, 64, 16).log_probs(tokens, [answer]), 1)
        torch.testing.assert_close(log_probs, alone, atol=1e-4, rtol=0)


def test_an_answer_of_one_token_comes_from_the_compressed_cache(tokens: list[int]) -> None:
    """A context that fits one chunk would otherwise be answered from dense keys, whatever the plan."""
    model = sharp_model()
    (full,) = collected(Answerer(model, "full").log_probs(tokens, [tokens[:1]]), 1)
    (folded,) = collected(Answerer(model, "int2").log_probs(tokens, [tokens[:1]]), 1)
    cache = kvfold.cache(model, "int2")
    with torch.no_grad():
        model(torch.tensor([tokens[:-1]]), past_key_values=cache)
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0]
    assert (full - folded).abs().max() > 0.01
    torch.testing.assert_close(folded, logits.log_softmax(-1), atol=1e-4, rtol=0)


def test_a_context_is_read_once_for_all_that_asks_about_it(tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from kvfold.lab.eval import answering

    read: list[int] = []
    monkeypatch.setattr(answering, "prefill", lambda *a: read.append(a[2].shape[1]) or prefill(*a))
    from kvfold.lab.generate import prefill

    answerer = Answerer(sharp_model(), "int4")
    first = collected(answerer.log_probs(tokens, [tokens[:3]]), 1)
    answerer.generate([tokens], 5, do_sample=False)
    again = collected(answerer.log_probs(tokens, [tokens[:3]]), 1)
    assert read == [199]
    assert torch.equal(first[0], again[0])  # what came in between left no trace
    assert answerer.largest is not None
    assert answerer.largest.num_seen == 204


@pytest.mark.parametrize("plan", [*PLANS, *HELD_ELSEWHERE])
def test_a_copied_cache_goes_on_by_itself(plan: str, tokens: list[int]) -> None:
    model = sharp_model()
    cache, straight = kvfold.cache(model, plan), kvfold.cache(model, plan)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        for one in (cache, straight):
            model(ids[:, :150], past_key_values=one)
        copy = cache.copy()
        assert {t.data_ptr() for *_, t in copy.tensors() if t.numel()}.isdisjoint(t.data_ptr() for *_, t in cache.tensors())
        model(ids[:, 100:170], past_key_values=cache)  # the other one goes elsewhere
        ours = model(ids[:, 150:], past_key_values=copy).logits
        theirs = model(ids[:, 150:], past_key_values=straight).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert copy.get_seq_length() == straight.get_seq_length()


@pytest.mark.parametrize("plan", ["full", "int4", "window(16)"])
def test_generation_is_that_of_generate_over_the_same_cache(plan: str, tokens: list[int]) -> None:
    model = sharp_model()
    answerer = Answerer(model, plan, chunk=64)
    cache = kvfold.cache(model, plan)
    with torch.no_grad():
        for piece in torch.tensor([tokens[:-1]]).split(64, 1):
            model(piece, past_key_values=cache)
    expected = model.generate(torch.tensor([tokens]), past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert answerer.generate([tokens], 12, do_sample=False) == [expected[0, 200:].tolist()]
    both = answerer.generate([tokens, tokens[:50]], 12, do_sample=False)
    assert both[1] == answerer.generate([tokens[:50]], 12, do_sample=False)[0]


def test_comparison_is_that_of_the_definition() -> None:
    p, q = torch.randn(2, 9, 50).log_softmax(-1)
    reference = Reference()
    comparison = Comparison(reference)
    assert comparison.kl is None
    for block, other in zip(p.split(4), q.split(4), strict=True):
        reference.add(block)
        comparison.add(other)
    assert comparison.num_tokens == 9
    assert comparison.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert comparison.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    with pytest.raises(ValueError, match="other tokens"):
        Comparison(reference).add(q[:3])


# -- the harness' model class --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple:
    """The harness' own class, and ours with the plan `full`, on two equal models; both take 128 tokens."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs the extra 'eval'")
    from kvfold.lab.eval.harness import KvfoldLM

    tokenizer = tiny_tokenizer()
    theirs, ours = (sharp_model(max_position_embeddings=128) for _ in range(2))
    return (
        huggingface.HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1),
        KvfoldLM(ours, "full", tokenizer=tokenizer, chunk=16, answer_chunk=8, truncate=True),
    )


def request(kind: str, *arguments: object):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


def test_log_likelihoods_equal_the_harness_own(pair) -> None:
    choices = ("slept", "ate", "x", "went away for a long time")
    requests = [request("loglikelihood", "The cat sat on the mat and ", choice) for choice in choices]
    requests += [request("loglikelihood", "", ".a"), request("loglikelihood", "long " * 30, "a tail that is cut")]
    theirs, ours = (lm.loglikelihood(requests, disable_tqdm=True) for lm in pair)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_log_likelihoods_equal_the_harness_own(pair) -> None:
    requests = [request("loglikelihood_rolling", text) for text in ("It was the best of times, " * 12, "short")]
    theirs, ours = (lm.loglikelihood_rolling(requests) for lm in pair)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_generated_text_equals_the_harness_own(pair) -> None:
    options = [{"until": ["q"], "max_gen_toks": 30}, {"until": ["E", "x"], "max_gen_toks": 9}]
    requests = [request("generate_until", prompt, o) for o in options for prompt in ("The cat sat on the", "Once upon")]
    theirs, ours = (lm.generate_until(requests, disable_tqdm=True) for lm in pair)
    assert ours == theirs
    assert len(ours[0]) == 30
    pair[1].batch_size = 2
    assert pair[1].generate_until(requests) == ours
    pair[1].batch_size = 1


def test_greedy_answers_are_called_greedy(pair) -> None:
    _, lm = pair
    (text,) = lm.generate_until([request("generate_until", "The cat", {"until": [], "max_gen_toks": 6})])
    assert [greedy for _, greedy in lm.loglikelihood([request("loglikelihood", "The cat", text)], disable_tqdm=True)] == [True]


def test_sampling_is_the_same_with_the_same_seed(pair) -> None:
    _, lm = pair
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    requests = [request("generate_until", prompt, options) for prompt in ("The cat", "The cat", "A dog")]
    first, again = lm.generate_until(requests), lm.generate_until(requests)
    assert first == again
    assert first[0] != first[1]
    lm.seed = 1
    assert lm.generate_until(requests) != first
    lm.seed = 0


def test_what_is_too_long_is_said_not_cut(pair) -> None:
    from kvfold.lab.eval.harness import KvfoldLM

    lm = KvfoldLM(pair[1].model, "int4", tokenizer=pair[1].tokenizer)
    with pytest.raises(KvfoldError, match="has 150 tokens, and the model takes 128"):
        lm.loglikelihood([request("loglikelihood", "a" * 148, "bb")], disable_tqdm=True)
    with pytest.raises(KvfoldError, match="100 tokens, 30 are to follow"):
        lm.generate_until([request("generate_until", "a" * 100, {"max_gen_toks": 30})])
    with pytest.raises(KvfoldError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hello"}])
