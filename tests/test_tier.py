"""Blocks in several places are read bit for bit as they were written; budgets hold; damage is named, and the cache goes on."""

import gc
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from oracle import chunked, held_bytes, left_pad, sharp_model, tokens
from segment_cases import CPU, check_attention, query_of
from test_blocks import BlocksMachine

import kvfold
from kvfold.blocks import Blocks
from kvfold.errors import FileError, PlanError
from kvfold.layer_cache import LayerCache
from kvfold.plan import Plan
from kvfold.tier.pool import DEVICE, DISK, HOST, FullError, TieredPool
from kvfold.tier.shelf import DiskShelf
from kvfold.tier.stage import Stage

PAIRS = [
    ("int4", "tier(device=80, host)"),
    ("int4", "tier(device=64, host=128, disk)"),
    ("full", "tier(device=25%, disk)"),
    ("int8(k_axis=token)", "tier(device=260KiB, host=100KiB, disk)"),
    ("protect(sink=3, window=9) | kivi(int4)", "tier(device=64, disk)"),
    ("h2o(60%) | int8(k_axis=token)", "tier(device=64, host=64, disk)"),
    ("snapkv(200, window=8) | kivi(int4, residual=8)", "tier(device=64, host)"),
    ("sink_window(sink=4, window=250) | int4", "tier(device=64, host)"),
    ("quest(30%) | int4", "tier(device=64, host=64, disk)"),
    ("int8 | share(start=0%)", "tier(device=64, host)"),
]


def pools(cache: kvfold.KVCache) -> list[TieredPool]:
    held = [layer.body.pool for layer in cache.layers if isinstance(layer, LayerCache)]
    return [pool for pool in held if isinstance(pool, TieredPool)]


def with_tiers(base: str, tier: str) -> str:
    return tier if base == "full" else f"{base} | {tier}"


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return left_pad([tokens(1, n, seed=n)[0] for n in (420, 290)])


@pytest.mark.parametrize(("base", "tier"), PAIRS)
def test_a_tier_changes_nothing_but_where_tokens_are(base: str, tier: str) -> None:
    """Padded batches, chunks and single steps: the same logits as without, up to the order of sums."""
    ids, mask = batch()
    sizes = [300, 80, *[1] * 9, 31]
    model = sharp_model(num_hidden_layers=4)
    cache = kvfold.cache(model, with_tiers(base, tier))
    mine = chunked(model, cache, ids, mask, sizes)
    theirs = chunked(model, kvfold.cache(model, base), ids, mask, sizes)
    mine, theirs = mine[mask.bool()], theirs[mask.bool()]
    assert (mine - theirs).norm() <= 1e-3 * theirs.norm()
    assert all(bool((pool.where > DEVICE).any()) for pool in pools(cache)), "nothing has left the device"


@pytest.mark.parametrize(("base", "tier"), [pair for pair in PAIRS if "h2o" not in pair[0] and "snapkv" not in pair[0]])
def test_blocks_come_back_bit_for_bit(base: str, tier: str) -> None:
    """Of the first layer, whose keys and values hang on no attention."""
    ids, mask = batch()
    model = sharp_model()
    caches = [kvfold.cache(model, plan) for plan in (with_tiers(base, tier), base)]
    for cache in caches:
        chunked(model, cache, ids, mask, [300, 110, *[1] * 10])
    mine, theirs = (cache.layers[0].body.dense() for cache in caches)
    present = theirs[2] >= 0
    assert torch.equal(mine[2], theirs[2])
    assert torch.equal(mine[0][present], theirs[0][present])
    assert torch.equal(mine[1][present], theirs[1][present])


@pytest.mark.parametrize("unit", ["int8(rotate=none)", "dense"])
def test_beams_crops_and_resets(unit: str) -> None:
    model = sharp_model()
    outputs = []
    for tier in ("", " | tier(device=64, host=64, disk)"):
        cache = kvfold.cache(model, unit + tier)
        for _ in range(2):
            chunked(model, cache, tokens(2, 400), None, [330, 70])
            cache.batch_repeat_interleave(2)
            with torch.no_grad():
                logits = [model(tokens(4, 70, seed=1), past_key_values=cache).logits]
                cache.reorder_cache(torch.tensor([1, 1, 3, 0]))
                logits += [model(tokens(4, 1, seed=s), past_key_values=cache).logits for s in range(3)]
                cache.crop(-150)
                logits.append(model(tokens(4, 90, seed=2), past_key_values=cache).logits)
            assert cache.nbytes == held_bytes(cache, but=model)
            cache.reset()
            assert cache.nbytes == held_bytes(cache, but=model) == 0
        outputs.append(torch.cat(logits, 1))
    assert (outputs[0] - outputs[1]).norm() <= 1e-3 * outputs[0].norm()


def test_a_saved_cache_goes_on(tmp_path: Path) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "int4 | tier(device=64, host=64, disk)")
    chunked(model, cache, tokens(1, 400), None, [400])
    cache.save(tmp_path / "cache")
    loaded = kvfold.load_cache(tmp_path / "cache", model)
    following = tokens(1, 75, seed=1)
    mine, theirs = (chunked(model, c, following, None, [70, 1, 1, 1, 1, 1]) for c in (loaded, cache))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert [pool.where.bincount().tolist() for pool in pools(loaded)] == [
        pool.where.bincount().tolist() for pool in pools(cache)
    ]


# -- budgets and bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "host"), [(64, 64), (130, 200), (256, 64)])
def test_tokens_in_each_place(device: int, host: int) -> None:
    """Whole blocks of 64; what is dense counts for the device."""
    model = sharp_model()
    cache = kvfold.cache(model, f"int4(sink=4) | tier(device={device}, host={host}, disk)")
    for step in range(12):
        chunked(model, cache, tokens(1, 64, seed=step), None, [63, 1])
        for pool, layer in zip(pools(cache), cache.layers, strict=True):
            dense = 4 + layer.recent.width
            blocks = [int((pool.where == place).sum()) // 2 for place in (DEVICE, HOST, DISK)]
            assert dense + 64 * blocks[0] <= max(device, dense + 64)
            assert 64 * blocks[1] <= host
            total = layer.body.lengths[0] // 64
            assert blocks[0] == min(total, max(1, (device - dense) // 64))
            assert blocks[1] == min(total - blocks[0], host // 64)
            assert sum(blocks) == total


@pytest.mark.parametrize(
    ("base", "device", "host"),
    [("full", 150, 80), ("int4", 90, 30), ("fp8", 80, 40), ("h2o(75%) | int8(k_axis=token)", 90, 40)],
)
def test_a_device_budget_in_bytes_holds(base: str, device: int, host: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.tier.pool.STAGED_TOKENS", 128)  # else the buffers would be larger than this tiny cache
    model = sharp_model(num_hidden_layers=3)
    cache = kvfold.cache(model, with_tiers(base, f"tier(device={device}KiB, host={host}KiB, disk)"))
    for step in range(14):
        chunked(model, cache, tokens(1, 100, seed=step), None, [98, 1, 1])
        tiers = cache.memory().by_tier()
        assert tiers["device"] <= device * 1024
        assert tiers["host"] <= host * 1024
        assert sum(tiers.values()) == cache.nbytes + tiers["disk"]
        assert cache.nbytes == held_bytes(cache, but=model)
    assert tiers["disk"] > 0
    assert tiers["device"] > device * 512, "most of the budget should be used"


def test_bytes_on_disk_are_the_files() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "int4 | tier(device=64, disk)")
    chunked(model, cache, tokens(1, 600), None, [600])
    paths = [pool.shelves[DISK].path for pool in pools(cache)]
    assert cache.memory().by_tier()["disk"] == sum(path.stat().st_size for path in paths) > 0
    full = kvfold.cache(model, "int4")
    chunked(model, full, tokens(1, 600), None, [600])
    assert cache.memory().by_tier()["device"] < 0.6 * full.nbytes
    assert "on the disk" in str(cache.memory())
    folders = [path.parent for path in paths]
    del cache
    gc.collect()
    assert not any(folder.exists() for folder in folders), "files go with the cache"


def test_a_budget_of_too_few_bytes_says_how_many_it_takes() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "int4 | tier(device=2KiB, host)")
    with pytest.raises(PlanError, match=r"2KiB is too little for the device: it needs \d+KiB at least"):
        chunked(model, cache, tokens(1, 200), None, [200])


def test_full_tiers_are_an_error() -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "int4 | tier(device=128, host=128)")
    with pytest.raises(FullError, match="all tiers are full: they hold 192 tokens"):
        chunked(model, cache, tokens(1, 600), None, [600])
    cache.reset()
    chunked(model, cache, tokens(1, 100), None, [100])


# -- what goes wrong ---------------------------------------------------------------------------------------------------------


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _replace(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_damage, "checksum of block"),
        (lambda path: path.unlink(), "removed"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "ends before block"),
        (_replace, "another file"),
    ],
    ids=["flipped bit", "lost", "cut short", "replaced"],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_damaged_file_is_named_and_the_cache_can_be_used_again(harm, words: str, layer: int) -> None:
    model = sharp_model()
    cache = kvfold.cache(model, "int4 | tier(device=64, disk)")
    before = chunked(model, cache, tokens(1, 500), None, [499, 1])
    shelf = pools(cache)[layer].shelves[DISK]
    assert isinstance(shelf, DiskShelf)
    harm(shelf.path)
    with pytest.raises(FileError, match=words) as caught:
        chunked(model, cache, tokens(1, 3), None, [1, 1, 1])  # the first layer's blocks may have been fetched already
    assert str(shelf.path) in str(caught.value)
    assert "\n" not in str(caught.value)
    cache.reset()
    assert torch.equal(chunked(model, cache, tokens(1, 500), None, [499, 1]), before)


# -- what is fetched ---------------------------------------------------------------------------------------------------------


def _count(stage: Stage) -> list[int]:
    """How many blocks are fetched from now on, request by request."""
    fetched: list[int] = []
    prepared = stage._prepared

    def counted(pool, request):
        fetched.append(len(request.ids))
        return prepared(pool, request)

    stage._prepared = counted
    return fetched


def test_each_block_is_fetched_once_a_step_and_the_next_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.tier.pool.STAGED_TOKENS", 1024)
    model = sharp_model(num_hidden_layers=3)
    cache = kvfold.cache(model, "int4 | tier(device=64, host=64, disk)")
    chunked(model, cache, tokens(1, 2300), None, [2300])
    chunked(model, cache, tokens(1, 1), None, [1])
    stage = pools(cache)[0].stage
    fetched = _count(stage)
    steps = 4
    for seed in range(steps):
        chunked(model, cache, tokens(1, 1, seed=seed), None, [1])
    below = [int((pool.where > DEVICE).sum()) for pool in pools(cache)]
    assert below[0] > 2 * 16, "more than one part"
    assert sum(fetched) == steps * sum(below)
    known, request, _ = stage._ahead
    assert known() is pools(cache)[0]
    assert request.same(pools(cache)[0].first_request())


def test_a_read_stage_fetches_only_what_it_reads() -> None:
    model = sharp_model(num_hidden_layers=3)
    cache = kvfold.cache(model, "quest(10%, skip=0) | int4 | tier(device=64, disk)")
    chunked(model, cache, tokens(1, 2000), None, [2000])
    fetched = _count(pools(cache)[0].stage)
    chunked(model, cache, tokens(1, 1), None, [1])
    allowed = -(-2001 // 10) // 64 * 2 * 3  # of two KV heads and three layers
    assert 0 < sum(fetched) <= allowed


# -- against plain dictionaries ----------------------------------------------------------------------------------------------


class TieredMachine(BlocksMachine):
    """Blocks that move between places while everything else happens to them."""

    tier = "tier(device=64, host=64, disk)"

    @initialize(rows=st.integers(1, 3))
    def start(self, rows: int) -> None:
        super().start(rows)
        self.stage = Stage()
        tier = Plan.parse(self.tier).tier
        pool = partial(TieredPool, tier=tier, stage=self.stage, layer=0, num_layers=1)
        self.blocks = Blocks(self.codec, rows, CPU, contiguous=self.contiguous, scored=self.scored, pool=pool)

    @rule()
    def spill(self) -> None:
        pool = self.blocks.pool
        assert isinstance(pool, TieredPool)
        pool.spill([10**6] * self.rows)
        wanted: dict[int, int] = {}
        for (
            ids
        ) in pool.table.tolist():  # of each row the newest block on the device, the one before in memory; beams share blocks
            for age, block in enumerate(reversed([i for i in ids if i >= 0])):
                wanted[block] = min(wanted.get(block, DISK), (DEVICE, HOST, DISK)[min(age, 2)])
        assert not pool.fields or {i: int(pool.where[i]) for i in wanted} == wanted

    @precondition(lambda self: any(self.model))
    @rule()
    def attend(self) -> None:
        last = max(self.ends)
        check_attention([self.blocks], query_of(self.rows, 2, [last, last + 1]))

    @invariant()
    def owns_no_more_memory_than_it_needs(self) -> None:
        if not hasattr(self, "stage"):
            return
        pool = self.blocks.pool
        assert isinstance(pool, TieredPool)
        for place in (DEVICE, HOST, DISK):
            at = pool.at[pool.where == place]
            assert len(at.unique()) == len(at), "two blocks in one place"
            assert not set(at.tolist()) & set(pool.shelves[place]._free)
            assert len(at) + len(pool.shelves[place]._free) == pool.shelves[place].capacity


def _machine(name: str, **changes: object) -> type:
    case = type(name, (TieredMachine,), changes).TestCase
    case.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)
    return case


TestContiguousTokens = _machine("TieredContiguousTokens")
TestThinnedTokens = _machine("TieredThinnedTokens", contiguous=False)
TestThinnedBlocks = _machine("TieredThinnedBlocks", plan="int8(rotate=none)", contiguous=False, exact=False)
TestContiguousBlocks = _machine("TieredContiguousBlocks", plan="int8(rotate=none)", exact=False)
