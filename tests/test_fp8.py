"""8-bit floats: the error is half a bit of the mantissa."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import HEAD_DIMS, KINDS, floats, size, values

from kvfold.store.fp8 import Float8


@given(floats, HEAD_DIMS, st.sampled_from(KINDS), st.integers(0, 99))
@settings(max_examples=100)
def test_float8_errs_by_half_a_bit_of_its_mantissa(codec: Float8, head_dim: int, kind: str, seed: int) -> None:
    x = values(kind, 2, 5, head_dim, seed=seed)
    mantissa, smallest, largest = (3, 2.0**-9, 448.0) if codec.format == "e4m3" else (2, 2.0**-16, 57344.0)
    fields = codec.encode(x)
    scale = fields["scale"].float() if codec.scaled else torch.ones(())
    bound = torch.maximum(x.abs() * 2.0 ** -(mantissa + 1), scale * smallest / 2) * 1.0001
    error = (codec.decode(fields) - x).abs()
    if not codec.scaled:
        bound = torch.maximum(bound, (x.abs() - largest).clamp_min(0) * 1.0001)
    assert (error <= bound).all()


@given(floats, HEAD_DIMS, st.integers(1, 9))
def test_float8_takes_a_byte_a_number_and_two_a_token(codec: Float8, head_dim: int, num_tokens: int) -> None:
    assert size(codec.encode(values("normal", num_tokens, head_dim))) == num_tokens * (head_dim + 2 * codec.scaled)
