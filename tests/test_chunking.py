"""What a codec holds does not depend on how the prompt was cut, nor on the type that it came in."""

import pytest
import torch
from sites import site
from vectors import values

from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan
from kvfold.registry import methods

NAMES = sorted(methods("store"))


def _filled(plan: str, sizes: list[int]) -> LayerCache:
    """A layer that has read the same random keys and values, in chunks of these sizes."""
    where = site(64, num_kv_heads=2)
    layer = LayerCache(where, Plan.parse(plan).layer(0, 1))
    k, v, q = (values("normal", 2, 2, sum(sizes), 64, seed=seed) for seed in (1, 2, 3))
    start = 0
    for size in sizes:
        chunk = slice(start, start + size)
        handle, _ = layer.update(k[:, :, chunk], v[:, :, chunk])
        layer.attend(handle, q[:, :, chunk], None, 0.125, None)
        start += size
    return layer


@pytest.mark.parametrize("sizes", [[300, 299], [1, 63, 64, 65, 400, 1, 1, 4]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_do_not_depend_on_chunks(name: str, sizes: list[int]) -> None:
    whole, cut = _filled(name, [599]), _filled(name, sizes)
    assert cut.kept_slots() == whole.kept_slots()
    assert cut.recent.width == whole.recent.width
    if not whole.body.width:
        return
    for mine, theirs in zip(cut.body.dense(), whole.body.dense(), strict=True):
        present = whole.body.slots() >= 0
        torch.testing.assert_close(mine[present], theirs[present], atol=1e-5, rtol=1e-5)
    assert cut.body.pool.fields.keys() == whole.body.pool.fields.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_types_are_encoded_as_what_they_are(name: str, dtype: torch.dtype) -> None:
    codec = methods("store")[name]().codec(site(64, dtype))
    k, v = (values("normal", 2, codec.block, 64, seed=seed).to(dtype) for seed in (1, 2))
    for mine, theirs in zip(codec.decode(codec.encode(k, v)), codec.decode(codec.encode(k.float(), v.float())), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_enough_for_codecs_that_take_tokens(name: str) -> None:
    codec = methods("store")[name]().codec(site(96))
    if codec.unit == "block":
        return
    k, v = values("normal", 1, 1, 96, seed=1), values("normal", 1, 1, 96, seed=2)
    fields = codec.encode(k, v)
    assert all(x.shape[:2] == (1, 1) for x in fields.values())
    assert codec.decode(fields)[0].shape == (1, 1, 96)
