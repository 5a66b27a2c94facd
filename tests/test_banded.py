"""Bands, their allocation, frames and calibration: each against an oracle or a bound."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

import kvfold
from kvfold.calibration import Calibration, load_calibration
from kvfold.errors import FileError, ModelError, PlanError
from kvfold.frame import Frame
from kvfold.lab.calibrate import calibrate, shifts
from kvfold.models.layer import calibration_path
from kvfold.store.allocation import allocate, even, outlier_bits
from kvfold.store.bands import Bands, distortion, normal_levels


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


bands = st.builds(
    lambda bits, outliers, exact: Bands(tuple(sorted(bits, reverse=True)), outliers, exact),
    st.sampled_from([16, 20, 64, 80]).flatmap(lambda d: st.lists(st.integers(0, 6), min_size=d, max_size=d)),
    st.integers(0, 9),
    st.booleans(),
)


@given(bands, st.sampled_from([1.0, 1e-3, 300.0]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_attention_on_codes_equals_attention_on_what_they_decode_to(codec: Bands, size: float, seed: int) -> None:
    x = size * (_normal(2, 3, 64, len(codec.bits), seed=seed) + 2 * _normal(1, 1, 1, len(codec.bits), seed=seed + 1))
    fields = codec.encode(x)
    decoded = codec.decode(fields).double()
    q, p = _normal(2, 1, 5, len(codec.bits), seed=seed), _normal(2, 3, 5, 64, seed=seed).abs()
    extent = float(decoded.abs().amax()) * len(codec.bits)
    torch.testing.assert_close(codec.dot(q, fields).double(), q.double() @ decoded.mT, rtol=1e-5, atol=1e-6 * extent)
    torch.testing.assert_close(codec.combine(p, fields).double(), p.double() @ decoded, rtol=1e-5, atol=1e-6 * 64 * extent)
    assert sum(f.nbytes for f in fields.values()) * 8 == 6 * _bits_of_a_block(codec)


def _bits_of_a_block(codec: Bands) -> int:
    return 64 * sum(codec.bits) + codec.num_coded * (24 if codec.exact_zeros else 16) + 32 * codec.outliers


def test_no_blocks_are_encoded_to_no_blocks() -> None:
    codec = Bands((3,) * 8 + (0,) * 8, 2)
    fields = codec.encode(torch.zeros(3, 0, 64, 16))
    assert codec.decode(fields).shape == (3, 0, 64, 16)


def test_levels_are_those_of_the_literature() -> None:
    """Max, Quantizing for minimum distortion (1960), table I."""
    published = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
    assert all(distortion(bits) == pytest.approx(error, rel=3e-3) for bits, error in published.items())
    assert normal_levels(2) == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=1e-3)


@pytest.mark.parametrize("bits", range(7))
def test_normal_channels_err_as_much_as_theory_says(bits: int) -> None:
    x = _normal(200, 64, 16) * torch.logspace(-2, 2, 16) + _normal(1, 1, 16, seed=1)
    codec = Bands((bits,) * 16, 0, exact_zeros=True)
    error = (codec.decode(codec.encode(x)) - x).square().mean((0, 1)) / x.var((0, 1))
    if bits == 0:
        assert (error >= 0.99).all()  # nothing is stored, not even the mean
    else:
        # Scales of 64 tokens are estimates, in steps of 9 %.
        assert error.mean() == pytest.approx(distortion(bits), rel=0.25)


def test_a_few_tokens_far_outside_are_mended() -> None:
    x = _normal(5, 64, 16)
    x[:, 7, 3], x[:, 20, 0] = 60.0, -45.0
    plain, mended = (Bands((3,) * 16, outliers) for outliers in (0, 4))
    errors = [(codec.decode(codec.encode(x)) - x)[:, [7, 20], [3, 0]].abs().amax() for codec in (plain, mended)]
    assert errors[0] > 20
    assert errors[1] < 0.05


def test_channels_are_ordered_and_bits_known() -> None:
    for wrong in ((1, 2), (7,), (2, -1)):
        with pytest.raises(ValueError, match="bits go from"):
            Bands(wrong)


# -- allocation --------------------------------------------------------------------------------------------------------------


def _losses(num_layers: int, head_dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    losses = (3 * _normal(2, num_layers, head_dim, seed=seed)).exp()
    return tuple(losses.sort(-1, descending=True).values.unbind())


@given(st.integers(0, 50), st.floats(0.3, 5.0))
@settings(max_examples=50, deadline=None)
def test_allocation_stays_within_its_bits_and_uses_them(seed: int, bits: float) -> None:
    k_loss, v_loss = _losses(4, 64, seed)
    chosen = allocate(k_loss, v_loss, bits, 4)
    blocks = sum(_bits_of_a_block(Bands(k, 4)) + _bits_of_a_block(Bands(v)) for k, v in chosen)
    mean = blocks / (4 * 2 * 64 * 64)
    assert mean <= bits + 1e-9
    assert mean >= min(bits, 6.0) - 0.05


def test_allocation_is_the_best_of_all_for_what_it_spends() -> None:
    k_loss, v_loss = _losses(1, 3, 0)
    outliers = outlier_bits(3, 1)
    ((k, v),) = allocate(k_loss, v_loss, 2.0 + outliers, 1)

    def loss(bits: tuple[int, ...]) -> float:
        return sum(float(x) * distortion(b) for x, b in zip([*k_loss[0], *v_loss[0]], bits, strict=True))

    def cost(bits: tuple[int, ...]) -> float:
        return sum(b + 0.25 * (b > 0) for b in bits)

    ours = (*k, *v)
    least = min(loss(bits) for bits in itertools.product(range(7), repeat=6) if cost(bits) <= cost(ours))
    assert loss(ours) == pytest.approx(least, rel=1e-6)


def test_too_few_bits_are_refused() -> None:
    with pytest.raises(PlanError, match="outliers alone take"):
        allocate(*_losses(2, 64, 0), 0.1, 64)
    with pytest.raises(PlanError, match="too few for a bit in each channel"):
        even(64, 1.0, 4)
    assert even(64, 2.5, 4) == (2, 2)
    assert even(64, 3.0, 4) == (3, 2)


# -- frames ------------------------------------------------------------------------------------------------------------------


def test_attention_does_not_change_in_a_frame() -> None:
    batch, heads, groups, head_dim = 2, 3, 2, 16
    frame = Frame.of(
        _normal(heads, head_dim),
        _normal(heads, head_dim, head_dim),
        _normal(heads, head_dim, seed=1),
        _normal(heads, head_dim, head_dim, seed=2),
    )
    k, v = _normal(batch, heads, 9, head_dim, seed=3), _normal(batch, heads, 9, head_dim, seed=4)
    q = _normal(batch * heads, groups * 4, head_dim, seed=5)
    expected = (q @ k.flatten(0, 1).mT).softmax(-1) @ v.flatten(0, 1)
    scores = frame.queries(q) @ frame.keys(k).flatten(0, 1).mT
    ours = frame.outputs(scores.softmax(-1) @ frame.values(v).flatten(0, 1))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


# -- calibration -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 100, (384,), generator=generator) for _ in range(3)]


@pytest.fixture
def calibrated(texts, monkeypatch, tmp_path):
    """A tiny model whose keys have channels that differ, and its calibration in a cache folder of its own."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    model = tiny_model("qwen2", seed=1)
    calibration = calibrate(model, texts)
    calibration.save(calibration_path(model))
    return model, calibration


def test_a_calibration_leaves_the_model_as_it_was(texts) -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    calibrate(model, texts[:1])
    assert model.config._attn_implementation == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def _spread(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The covariance of `vectors [H, 5 * 64, D]` within 64 tokens, in the coordinates of a basis."""
    x = (vectors.double() @ basis.double()).unflatten(1, (5, 64))
    x = (x - x.mean(2, keepdim=True)).flatten(1, 2)
    return x.mT @ x / x.shape[1]


def test_coordinates_are_uncorrelated_and_ordered(calibrated, texts) -> None:
    """Those of values in the texts themselves, those of keys on average over the positions where texts may begin."""
    model, calibration = calibrated
    layers, heads, head_dim = calibration.k_origin.shape
    assert (layers, heads, head_dim) == (2, 2, 16)
    eye = torch.eye(head_dim, dtype=torch.float64).expand(heads, -1, -1)
    longest = model.config.max_position_embeddings
    assert calibration.positions.tolist() == [longest]
    k_spread, v_spread = torch.zeros_like(eye), torch.zeros_like(eye)
    starts = shifts(longest)
    assert starts[-1] == longest
    with torch.no_grad():
        for ids in texts:
            for start in starts:
                layer = model(
                    ids[None, : 4 + 64 * 5], position_ids=start + torch.arange(4 + 64 * 5)[None]
                ).past_key_values.layers[1]
                k_spread += _spread(layer.keys[0, :, 4:], calibration.k_basis[1])
            v_spread += _spread(layer.values[0, :, 4:], calibration.v_basis[1])
    torch.testing.assert_close(k_spread / len(texts) / len(starts), eye, rtol=0, atol=0.02)
    torch.testing.assert_close(v_spread / len(texts), eye, rtol=0, atol=0.02)
    for loss in (calibration.k_loss, calibration.v_loss):
        assert (loss.diff(dim=-1) <= 0).all()
        assert (loss > 0).all()


def _kl(model, ids, plan: str) -> float:
    cache, reference = kvfold.cache(model, plan), kvfold.cache(model, "full")
    kl = 0.0
    with torch.no_grad():
        for part in ids.split(32, dim=1):
            full = model(part, past_key_values=reference).logits.log_softmax(-1)
            ours = model(part, past_key_values=cache).logits.log_softmax(-1)
            kl += float((full.exp() * (full - ours)).sum())
    return kl / ids.shape[1]


def test_a_calibration_buys_quality_at_equal_bits(calibrated) -> None:
    model, _ = calibrated
    ids = torch.randint(3, 100, (1, 400), generator=torch.Generator().manual_seed(9))
    assert _kl(model, ids, "banded(2.5, calibrated=true)") < 0.5 * _kl(model, ids, "banded(2.5)")
    assert _kl(model, ids, "banded(6, calibrated=true)") < 0.02 * _kl(model, ids, "banded(2.5)")


def test_what_needs_a_calibration_says_so(calibrated, monkeypatch, tmp_path) -> None:
    model, calibration = calibrated
    with pytest.raises(PlanError, match="reindex=false"):
        kvfold.cache(model, "sink_window(sink=4, window=60) | banded(4, calibrated=true)")
    kvfold.cache(model, "sink_window(sink=4, window=60, reindex=false) | banded(4, calibrated=true)")
    for sharing in ("share(start=0%)", "minicache(start=0%)"):
        with pytest.raises(PlanError, match="coordinates of its own"):
            kvfold.cache(model, f"banded(4, calibrated=true) | {sharing}")
    path = calibration_path(model)
    read = load_calibration(path)
    assert all(torch.equal(getattr(read, name), getattr(calibration, name)) for name in vars(calibration))
    path.write_bytes(b"nothing")
    with pytest.raises(FileError, match="damaged"):
        kvfold.cache(model, "banded(4, calibrated=true)")
    path.unlink()
    with pytest.raises(ModelError, match="kvfold calibrate"):
        kvfold.cache(model, "banded(4, calibrated=true)")


def test_a_cache_in_a_frame_is_saved_and_goes_on(calibrated, tmp_path) -> None:
    model, _ = calibrated
    ids = torch.randint(3, 100, (1, 200), generator=torch.Generator().manual_seed(2))
    cache = kvfold.cache(model, "banded(3, calibrated=true)")
    with torch.no_grad():
        model(ids[:, :180], past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        read = kvfold.load_cache(tmp_path / "cache.safetensors", model)
        a, b = (model(ids[:, 180:], past_key_values=c).logits for c in (cache, read))
    torch.testing.assert_close(a, b)
    assert isinstance(load_calibration(calibration_path(model)), Calibration)
