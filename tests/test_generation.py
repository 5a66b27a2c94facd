"""The cache under `model.generate`: everything that people do with it keeps working."""

from typing import Any

import pytest
import torch
from oracle import chunked, held_bytes, left_pad, sharp_model, tokens
from transformers import DynamicCache, PreTrainedModel

import kvfold
from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan

# One plan of each kind: dense, packed by token, packed by block, evicting, both, with dense tokens, mixed over layers.
PLANS = [
    "full",
    "int8(k_axis=token, rotate=none)",
    "int4",
    "sink_window(sink=2, window=14)",
    "h2o(16)",
    "snapkv(24, window=8, heads=ada) | int4",
    "protect(sink=3, window=5) | int4",
    "hybrid(edge=1, edge_store=int8) | int4",
    "sieve(20)",
    "kvzip(20, sink=2)",
    "expected(24, refresh_every=3, sink=2)",
]
KEEPING = ["full", *(plan for plan in PLANS if Plan.parse(plan).keep is None and plan != "full")]
GREEDY = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model() -> PreTrainedModel:
    return sharp_model(num_hidden_layers=3)


def _cached(model: PreTrainedModel, plan: str, ids: torch.Tensor, **wanted: Any) -> torch.Tensor:
    return model.generate(ids, past_key_values=kvfold.cache(model, plan), **{**GREEDY, **wanted})


def _own(model: PreTrainedModel, ids: torch.Tensor, **wanted: Any) -> torch.Tensor:
    """What transformers gives with its own cache and attention."""
    kvfold.detach(model)
    return model.generate(ids, past_key_values=DynamicCache(), **{**GREEDY, **wanted})


def test_greedy_is_as_with_transformers_own_cache(model: PreTrainedModel) -> None:
    ids = tokens(2, 40)
    assert torch.equal(_cached(model, "full", ids), _own(model, ids))


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beam_search_is_as_with_transformers_own_cache(model: PreTrainedModel, num_beams: int) -> None:
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (40, 22)])
    wanted = {"num_beams": num_beams, "attention_mask": mask, "num_return_sequences": 2}
    assert torch.equal(_cached(model, "full", ids, **wanted), _own(model, ids, **wanted))


def test_sampling_is_as_with_transformers_own_cache(model: PreTrainedModel) -> None:
    ids = tokens(2, 40)
    torch.manual_seed(7)
    mine = _cached(model, "full", ids, do_sample=True, temperature=0.8, top_p=0.9, num_return_sequences=2)
    torch.manual_seed(7)
    assert torch.equal(mine, _own(model, ids, do_sample=True, temperature=0.8, top_p=0.9, num_return_sequences=2))


@pytest.mark.parametrize("plan", PLANS)
def test_every_way_to_decode_runs_under_every_plan(model: PreTrainedModel, plan: str) -> None:
    """Same input, same seed, same tokens; and beams as good as greedy by the model's own measure of what it chose."""
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (70, 33)])
    for wanted in ({}, {"do_sample": True}, {"num_beams": 3}):
        results = []
        for _ in range(2):
            torch.manual_seed(1)
            results.append(_cached(model, plan, ids, attention_mask=mask, **wanted))
        assert torch.equal(*results)
        assert results[0].shape == (2, 86)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.usefixtures("exact_products")
def test_beam_search_with_one_beam_by_hand(model: PreTrainedModel, plan: str) -> None:
    """Beams that never part are greedy search: repeating a sequence and reordering its copies changes nothing."""
    ids = tokens(1, 70)
    cache = kvfold.cache(model, plan)
    chunked(model, cache, ids, None, [70])
    cache.batch_repeat_interleave(3)
    alone = kvfold.cache(model, plan)
    chunked(model, alone, ids, None, [70])
    for step in range(20):
        new = tokens(1, 1, seed=step)
        with torch.no_grad():
            mine = model(new.expand(3, 1), past_key_values=cache).logits
            theirs = model(new, past_key_values=alone).logits
        torch.testing.assert_close(mine, theirs.expand_as(mine), atol=1e-4, rtol=1e-4)
        cache.reorder_cache(torch.tensor([[2, 2, 0], [1, 0, 2], [0, 0, 0]][step % 3]))


@pytest.mark.parametrize("plan", PLANS)
def test_a_padded_batch_is_as_its_sequences_alone(model: PreTrainedModel, plan: str) -> None:
    rows = [tokens(1, n, seed=n)[0] for n in (70, 33, 51)]
    ids, mask = left_pad(rows)
    together = _cached(model, plan, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, -16:], _cached(model, plan, row[None])[0, -16:])


@pytest.mark.parametrize("plan", PLANS)
def test_turns_on_one_cache(model: PreTrainedModel, plan: str) -> None:
    """A second `generate` reads only what is new, and goes on as if the first had never stopped."""
    cache = kvfold.cache(model, plan)
    first = model.generate(tokens(1, 50), past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 65
    second = torch.cat([first, tokens(1, 9, seed=1)], 1)
    out = model.generate(second, past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 50 + 16 + 9 + 15
    by_hand = kvfold.cache(model, plan)
    chunked(model, by_hand, second, None, [50, *[1] * 15, 10])
    for t in range(75, 90):
        with torch.no_grad():
            logits = model(out[:, t : t + 1], past_key_values=by_hand).logits[0, -1]
        assert logits[out[0, t + 1]] >= logits.max() - 1e-4


@pytest.mark.parametrize("plan", ["full", "window(14)", "sink_window(sink=2, window=14)"])
def test_prefill_in_chunks_by_generate(model: PreTrainedModel, plan: str) -> None:
    ids = tokens(2, 64)
    assert torch.equal(_cached(model, plan, ids, prefill_chunk_size=24), _cached(model, plan, ids))


@pytest.mark.parametrize("plan", ["full", "protect(window=64) | int8"])
def test_prompt_lookup_gives_the_greedy_tokens(model: PreTrainedModel, plan: str) -> None:
    """Assisted decoding guesses tokens and crops those that were wrong."""
    ids = tokens(1, 12).repeat(1, 4)
    assert torch.equal(_cached(model, plan, ids, prompt_lookup_num_tokens=4), _cached(model, plan, ids))


def test_a_draft_model_gives_the_greedy_tokens(model: PreTrainedModel) -> None:
    ids = tokens(1, 40)
    draft = sharp_model(num_hidden_layers=1)
    assert torch.equal(_cached(model, "full", ids, assistant_model=draft), _cached(model, "full", ids))


# -- crop and reset ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, 5, 64, 70, 149])
@pytest.mark.parametrize("plan", [*KEEPING, "kivi(int8, residual=32)", "fp8"])
def test_cropped_tokens_leave_no_trace(model: PreTrainedModel, plan: str, removed: int) -> None:
    """What follows a crop depends on what is left alone, not on what was there."""
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (150, 150)])
    caches = []
    for seed in (1, 2):  # two caches that differ only in what is removed
        cache = kvfold.cache(model, plan)
        start = ids.clone()
        if plan in ("full", "fp8") or "k_axis=token" in plan:  # codes of a block depend on all of its tokens
            start[:, -removed:] = tokens(2, removed, seed=seed)
        chunked(model, cache, start, mask, [100, 50])
        cache.crop(-removed)
        assert cache.get_seq_length() == 150 - removed
        assert all(row == list(range(150 - removed)) for row in _layers(cache)[0].kept_slots())
        caches.append(cache)
    new = tokens(2, 40, seed=3)
    results = []
    for cache in caches:
        with torch.no_grad():
            results.append(
                torch.cat([model(new[:, :3], past_key_values=cache).logits, model(new[:, 3:], past_key_values=cache).logits], 1)
            )
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
    if plan in ("full", "fp8") or "k_axis=token" in plan:
        never = kvfold.cache(model, plan)
        sizes = [100, 50 - removed] if removed < 50 else [150 - removed]
        chunked(model, never, ids[:, :-removed], None, sizes)
        with torch.no_grad():
            theirs = model(new[:, :3], past_key_values=never).logits
        torch.testing.assert_close(results[0][:, :3], theirs, atol=1e-4, rtol=1e-4)


def _layers(cache: kvfold.KVCache) -> list[LayerCache]:
    return [layer for layer in cache.layers if isinstance(layer, LayerCache)]


def test_crop_counts_real_tokens_of_a_padded_batch(model: PreTrainedModel) -> None:
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (60, 35)])
    cache = kvfold.cache(model, "full")
    chunked(model, cache, ids, mask, [60])
    cache.crop(-10)
    assert _layers(cache)[0].kept_slots()[2] == list(range(25, 50))
    assert _layers(cache)[0].num_real == [50, 25]
    cache.crop(-40)
    assert _layers(cache)[0].num_real == [10, 0]


def test_crop_under_eviction_removes_what_is_there(model: PreTrainedModel) -> None:
    """What was evicted does not come back; what is left of the last tokens goes. The cache says that it is not exact."""
    cache = kvfold.cache(model, "h2o(24, recent=12)")
    assert not cache.is_croppable
    chunked(model, cache, tokens(1, 60), None, [60])
    cache.crop(-10)
    for row in _layers(cache)[0].kept_slots():
        assert max(row) < 50
        assert len(row) == 14
    with torch.no_grad():
        assert model(tokens(1, 3), past_key_values=cache).logits.isfinite().all()


def test_crop_to_nothing_and_go_on(model: PreTrainedModel) -> None:
    for plan in [*PLANS, "h2o(90) | int4"]:
        cache = kvfold.cache(model, plan)
        chunked(model, cache, tokens(1, 130), None, [130])
        cache.crop(-130)
        assert cache.get_seq_length() == 0
        fresh = kvfold.cache(model, plan)
        ids = tokens(1, 20, seed=4)
        torch.testing.assert_close(
            chunked(model, cache, ids, None, [20]), chunked(model, fresh, ids, None, [20]), atol=1e-4, rtol=1e-4
        )


def test_crop_is_told_in_negative_numbers(model: PreTrainedModel) -> None:
    cache = kvfold.cache(model, "full")
    cache.crop(-3)
    chunked(model, cache, tokens(1, 9), None, [9])
    cache.crop(0)
    assert cache.get_seq_length() == 9
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


@pytest.mark.parametrize("plan", PLANS)
def test_reset_forgets_everything(model: PreTrainedModel, plan: str) -> None:
    cache = kvfold.cache(model, plan)
    ids = tokens(2, 70)
    first = chunked(model, cache, ids, None, [70])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert held_bytes(list(cache.layers), but=model) == 0
    again = chunked(model, cache, ids[:1], None, [70])
    torch.testing.assert_close(again, first[:1], atol=1e-4, rtol=1e-4)


def test_a_batch_of_another_size_is_refused(model: PreTrainedModel) -> None:
    cache = kvfold.cache(model, "full")
    chunked(model, cache, tokens(2, 9), None, [9])
    with pytest.raises(ValueError, match="holds 2 sequences, the input has 3"):
        model(tokens(3, 1), past_key_values=cache)


def test_a_part_of_the_batch_goes_on_alone(model: PreTrainedModel) -> None:
    for plan in PLANS:
        ids = tokens(3, 70)
        cache = kvfold.cache(model, plan)
        chunked(model, cache, ids, None, [70])
        cache.batch_select_indices(torch.tensor([2, 0]))
        new = tokens(2, 3, seed=8)
        with torch.no_grad():
            mine = model(new, past_key_values=cache).logits
        alone = kvfold.cache(model, plan)
        theirs = chunked(model, alone, torch.cat([ids[[2, 0]], new], 1), None, [70, 3])[:, -3:]
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        assert cache.nbytes <= 1.3 * alone.nbytes, "the sequences that left took their memory with them"
