"""What tests of segments attend to: codecs, ragged runs and queries; and plain attention, which all are held against."""

import torch
from rounding import allowance

from kvfold.attention.reference import Query, merge
from kvfold.blocks import Blocks
from kvfold.plan import Plan
from kvfold.segment import Run
from kvfold.site import Site
from kvfold.store.base import KVCodec

HEAD_DIM = 16
CPU = torch.device("cpu")
CODECS = ["dense", "int8(k_axis=token, rotate=none)", "int4", "int2", "fp8", "kivi(int4, group=16)", "mixed(k=int8, v=fp8)"]


def codec_of(plan: str, head_dim: int = HEAD_DIM) -> KVCodec:
    return Plan.parse(plan).store.codec(Site(head_dim, torch.float32))


def run_of(counts: list[int], firsts: list[int], head_dim: int = HEAD_DIM, seed: int = 0, scored: bool = False) -> Run:
    """A ragged run; the vectors of a token follow from its row's seed and slot."""
    width = max(counts, default=0)
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(len(counts), width, head_dim, generator=generator)
    v = torch.randn(len(counts), width, head_dim, generator=generator)
    place = torch.arange(width)[None]
    slots = torch.where(place < torch.tensor(counts)[:, None], torch.tensor(firsts)[:, None] + place, -1).int()
    return Run(k, v, slots, slots.float() if scored else None)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, query: Query
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` of attention over dense vectors in double precision; the oracle of every segment."""
    scores = q.double() @ k.double().mT
    if query.softcap:
        scores = (scores / query.softcap).tanh() * query.softcap
    num_queries = len(query.slots)
    hidden = (slots[:, None] < 0) | (slots[:, None] > query.slots[:, None])
    if query.first_visible is not None:
        hidden = hidden | (slots[:, None] < query.first_visible[..., None])
    scores = scores.unflatten(1, (query.num_groups, num_queries)).masked_fill(hidden[:, None], -torch.inf).flatten(1, 2)
    lse = scores.logsumexp(-1)
    p = (scores - lse.clamp_min(-1e300)[..., None]).exp()
    return p @ v.double(), lse


def query_of(rows: int, num_groups: int, slots: list[int], head_dim: int = HEAD_DIM, softcap: float | None = None) -> Query:
    q = torch.randn(rows, num_groups * len(slots), head_dim, generator=torch.Generator().manual_seed(5))
    # Scores of the same size for every head dim, and large enough to prefer some tokens.
    return Query(q * 4 * head_dim**-0.5, torch.tensor(slots), num_groups, softcap=softcap)


def check_attention(parts: list[Run | Blocks], query: Query) -> None:
    """Merged attention over segments equals attention over the concatenation of what they hold."""
    dense = [part.dense() for part in parts]
    k, v, slots = (torch.cat([d[i] for d in dense], 1) for i in range(3))
    out, lse = plain_attention(query.q, k, v, slots, query)
    got = merge([part.attend(query) for part in parts])
    seen = lse > -torch.inf
    of_out, of_lse = (max(each) for each in zip(*(allowance(part, query) for part in parts), strict=True))
    torch.testing.assert_close(got.out[seen], out[seen].float(), atol=5e-5 + of_out, rtol=1e-4)
    assert (got.out[~seen] == 0).all()
    torch.testing.assert_close(got.lse, lse.float(), atol=2e-5 + of_lse, rtol=1e-5)
