"""Layers with a sliding window of the model's own: transformers is the oracle, for outputs and for what is held."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import chunked, held_bytes, left_pad, sharp_model, tokens
from transformers import DynamicCache, PreTrainedModel

import kvfold
from kvfold import sliding_layer
from kvfold.kernels import cpu
from kvfold.persist import load_cache
from kvfold.sliding_layer import Ring, SlidingLayer

WINDOW = 16


@pytest.fixture(autouse=True)
def _windows_grow_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliding_layer, "GROWTH", 5)


@pytest.fixture(params=["on", "off"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the compiled kernels serve."""
    if request.param == "off":
        monkeypatch.setenv(cpu.VARIABLE, "off")
    elif not cpu.available():
        pytest.skip("needs the compiled kernels")
    return bool(request.param == "on")


def gemma(family: str = "gemma3_text") -> PreTrainedModel:
    return sharp_model(family, sliding_window=WINDOW)


def sliding(cache: kvfold.KVCache) -> SlidingLayer:
    (found,) = [layer for layer in cache.layers if isinstance(layer, SlidingLayer)][:1]
    return found


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("sizes", [[3, *[1] * 40], [40, *[1] * 20], [5, 1, 1, 9, *[1] * 30, 20, 1]], ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_tokens_one_by_one(family: str, sizes: list[int], compiled: bool) -> None:
    """While the window fills, when it is full, and after chunks."""
    model, ids = gemma(family), tokens(2, sum(sizes))
    theirs = DynamicCache(config=model.config)
    wanted = chunked(copy.deepcopy(model), theirs, ids, None, sizes)
    cache = kvfold.cache(model, "full")
    close(chunked(model, cache, ids, None, sizes), wanted)
    for mine, other in zip(cache.layers, theirs.layers, strict=True):
        if isinstance(mine, SlidingLayer):
            close(mine.keys, other.keys)
            close(mine.values, other.values)
            assert mine.cumulative_length == other.cumulative_length


def test_padding_is_hidden_from_the_window(compiled: bool) -> None:
    ids, mask = left_pad([tokens(1, n, seed=n)[0] for n in (30, 12, 24)])
    sizes = [10, *[1] * 20]
    model = gemma()
    theirs = chunked(copy.deepcopy(model), DynamicCache(config=model.config), ids, mask, sizes)
    mine = chunked(model, kvfold.cache(model, "full"), ids, mask, sizes)
    close(mine[mask.bool()], theirs[mask.bool()])


@settings(max_examples=25)
@given(st.lists(st.sampled_from([1, 1, 1, 1, 2, 7, "nbytes", "copy", "crop"]), min_size=3, max_size=40))
def test_whatever_happens_between_tokens(events: list[int | str]) -> None:
    model, ids = gemma(), tokens(1, 400)
    cache, theirs, at = kvfold.cache(model, "full"), DynamicCache(config=model.config), 6
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    close(chunked(model, cache, ids[:, :6], None, [6]), chunked(plain, theirs, ids[:, :6], None, [6]))
    for event in events:
        if event == "nbytes":
            storages = [x.untyped_storage() for _, _, x in cache.tensors()]
            assert cache.nbytes == sum({x.data_ptr(): x.nbytes() for x in storages}.values())
        elif event == "copy":
            cache = cache.copy()
        elif event == "crop":
            if at < WINDOW and at > 3:  # where transformers can
                cache.crop(-2)
                theirs.crop(-2)
                at -= 2
        elif isinstance(event, int):
            part = ids[:, at : at + event]
            with torch.no_grad():
                close(model(part, past_key_values=cache).logits, plain(part, past_key_values=theirs).logits)
            at += event
    assert cache.get_seq_length() == theirs.get_seq_length() == at


def test_a_file_goes_on_where_the_window_was(tmp_path: Path) -> None:
    model, ids = gemma(), tokens(1, 60)
    cache = kvfold.cache(model, "int8")
    chunked(model, cache, ids[:, :40], None, [20, *[1] * 20])
    cache.save(tmp_path / "cache")
    again = load_cache(tmp_path / "cache", model)
    assert torch.equal(sliding(again).keys, sliding(cache).keys)
    rest = ids[:, 40:]
    close(chunked(model, again, rest, None, [1] * 20), chunked(model, cache, rest, None, [1] * 20))


@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"num_return_sequences": 2, "num_beams": 2}], ids=str
)
def test_generation_is_transformers(more: dict[str, int]) -> None:
    """Beams that change places, and drafts that are taken back, over the end of a window."""
    model, ids = gemma(), tokens(1, 10).repeat(1, 2)
    given = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **more}
    theirs = copy.deepcopy(model).generate(ids, past_key_values=DynamicCache(config=model.config), **given)
    assert torch.equal(model.generate(ids, past_key_values=kvfold.cache(model, "full"), **given), theirs)


def test_no_token_copies_the_window(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = gemma(), tokens(1, 60)
    cache = kvfold.cache(model, "full")
    chunked(model, cache, ids[:, :30], None, [30])
    taken = {"step": 0, "attend_now": 0}
    for name in taken:
        method = getattr(Ring, name)

        def counted(self: Ring, *args: object, name: str = name, method: object = method) -> torch.Tensor:
            taken[name] += 1
            return method(self, *args)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(Ring, name, counted)
    with torch.no_grad():
        model(ids[:, 30:31], past_key_values=cache)
        memory = {name: x.data_ptr() for name, x in sliding(cache).tensors()}
        for i in range(31, 60):
            model(ids[:, i : i + 1], past_key_values=cache)
    assert {name: x.data_ptr() for name, x in sliding(cache).tensors()} == memory
    assert taken == ({"step": 30, "attend_now": 0} if compiled else {"step": 0, "attend_now": 30})


def test_memory_is_that_of_the_window() -> None:
    """Every token of the window, its slot, and nothing beside them; transformers' layers hold their last chunk as well."""
    model, ids = gemma(), tokens(2, 60)
    cache = kvfold.cache(model, "full")
    chunked(model, cache, ids, None, [50, *[1] * 10])
    config = model.config
    rows = 2 * config.num_key_value_heads
    held = sum(x.nbytes for _, x in sliding(cache).tensors())
    assert held == rows * WINDOW * (2 * config.head_dim * 4 + 4) + 16  # two numbers
    assert cache.nbytes == held_bytes(cache, but=model)


def test_a_reset_forgets(compiled: bool) -> None:
    model, ids = gemma(), tokens(1, 40)
    cache = kvfold.cache(model, "full")
    first = chunked(model, cache, ids, None, [20, *[1] * 20])
    cache.reset()
    assert cache.get_seq_length() == 0
    close(chunked(model, cache, ids, None, [20, *[1] * 20]), first)
