"""Codes in bytes, and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.store.pack import pack, unpack


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 9), st.sampled_from([16, 64, 80, 96, 128, 256]), st.integers(0, 99))
def test_unpack_undoes_pack(bits: int, num_tokens: int, head_dim: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (num_tokens, head_dim), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack(codes, bits)
    assert packed.shape == (num_tokens, head_dim * bits // 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


def test_codes_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill whole bytes"):
        pack(torch.zeros(3, 6, dtype=torch.uint8), 2)
