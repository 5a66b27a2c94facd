"""One token comes and one goes, in Triton, against the same in plain Python."""

import math
from types import ModuleType

import pytest
import torch
from test_triton import DEVICE

from kvfold.kernels import triton

pytestmark = pytest.mark.skipif(not triton.available(), reason="Triton is not installed: pip install 'kvfold[gpu]'")

ROWS = 3


@pytest.fixture(autouse=True)
def _kernels_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv(triton.VARIABLE, "interpret")


def _kernels() -> ModuleType:
    """Imported once Triton is known to be there."""
    from kvfold.kernels.triton import turnover

    return turnover


def _long(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_a_token_comes(head_dim: int, dtype: torch.dtype) -> None:
    run = [torch.randn(ROWS, 7, head_dim, device=DEVICE).to(dtype) for _ in range(2)]
    slots = torch.arange(7, device=DEVICE).int().expand(ROWS, -1).contiguous()
    score = torch.randn(ROWS, 20 + 7, device=DEVICE)
    before = [x.clone() for x in (*run, slots, score)]
    k, v = (torch.randn(ROWS, 1, head_dim, device=DEVICE).to(dtype) for _ in range(2))
    first = torch.randn(ROWS, 1, device=DEVICE)
    _kernels().come(k, v, _long(4), _long(99), (run[0], run[1], slots), (score, first))
    for old, new in zip(before, (k, v, torch.full((ROWS, 1), 99, device=DEVICE).int()), strict=False):
        old[:, 4:5] = new
    before[3][:, 24:25] = first
    assert all(torch.equal(a, b) for a, b in zip((*run, slots, score), before, strict=True))


def _place_that_goes(slots: list[int], rank: list[float] | None, first_recent: int) -> int:
    """Of those that rank lowest the oldest; recent ones only before what is pinned."""
    recent = torch.finfo(torch.float32).max

    def key(place: int) -> tuple[float, int, int]:
        r = 0.0 if rank is None else rank[place]
        r = max(r, recent) if rank is not None and slots[place] >= first_recent else r
        return (math.inf if slots[place] < 0 else r, slots[place], place)

    return min(range(len(slots)), key=key)


@pytest.mark.parametrize("goes", [0, 1])
@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("most_places", [4096, 32])
@pytest.mark.parametrize(("columns", "run_width", "moves"), [(3, 1, True), (1, 1, True), (2, 40, False), (0, 17, False)])
def test_a_token_goes(
    columns: int, run_width: int, moves: bool, most_places: int, ranked: bool, goes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one tile and in several; ranks that are equal, pinned tokens, recent ones, places without a token."""
    monkeypatch.setattr(_kernels(), "_MOST_PLACES", most_places)
    tokens, generator = 16, torch.Generator().manual_seed(10 * columns + goes)
    num_places = columns * tokens + run_width
    for seed in range(6):
        blocks = torch.randperm(ROWS * columns + 2, generator=generator)[: ROWS * columns].view(ROWS, columns)
        if columns > 1 and not moves:
            blocks[1, -1] = -1  # a row of fewer blocks
        slots = torch.stack([torch.randperm(500, generator=generator)[:num_places] for _ in range(ROWS)]).int()
        slots[torch.rand(ROWS, num_places, generator=generator) < 0.2] = -1
        slots[:, -1] = 501
        if moves and not goes:
            slots[:, 5] = -1
        of_blocks, of_run = slots.split([columns * tokens, run_width], 1)
        of_blocks.view(ROWS, columns, tokens)[blocks < 0] = -1
        pool = torch.full((ROWS * columns + 2, tokens if columns else 0), -7).int()
        for row, column in torch.nonzero(blocks >= 0).tolist():
            pool[blocks[row, column]] = of_blocks[row, column * tokens : (column + 1) * tokens]
        rank = torch.randint(0, 4, (ROWS, num_places), generator=generator).float()
        rank[torch.rand(ROWS, num_places, generator=generator) < 0.1] = torch.inf
        if seed == 5:
            rank.fill_(3.0)
        score, held = torch.randn(2, ROWS, num_places, generator=generator)
        wanted_slots, wanted_score, wanted_at = slots.tolist(), score.clone(), [-1] * ROWS
        for row in range(ROWS):
            target = _place_that_goes(wanted_slots[row], rank[row].tolist() if ranked else None, 350) if goes else None
            if moves:
                target = min(p for p, s in enumerate(wanted_slots[row]) if s < 0) if target is None else target
                if target < columns * tokens:
                    wanted_at[row] = int(blocks[row, target // tokens]) * tokens + target % tokens
                    wanted_slots[row][target] = 501
                    wanted_score[row, target] = score[row, -1]
                wanted_slots[row][-1] = -1
            elif target is not None:
                wanted_slots[row][target] = -1
        pool, of_run, blocks, rank, score, held = (x.contiguous().to(DEVICE) for x in (pool, of_run, blocks, rank, score, held))
        idle = pool.clone()
        given = (rank, _long(350)) if ranked else None
        address = _kernels().leave(blocks, pool, of_run, _long(goes), given, (held, score), moves=moves)
        assert (address.tolist() if address is not None else [-1] * ROWS) == wanted_at
        got = [
            [s for b in blocks[row].tolist() for s in (pool[b].tolist() if b >= 0 else [-1] * tokens)] + of_run[row].tolist()
            for row in range(ROWS)
        ]
        assert got == wanted_slots
        assert torch.equal(held.cpu(), wanted_score)
        unused = torch.ones(len(pool), dtype=torch.bool)
        unused[blocks[blocks >= 0].cpu()] = False
        assert torch.equal(pool.cpu()[unused], idle.cpu()[unused])


def test_without_a_choice_the_newest_takes_the_first_free_place() -> None:
    table, pool = _long(1, 0)[:, None], torch.arange(8, device=DEVICE).int().view(2, 4)
    pool[1, 2:] = -1
    run = torch.tensor([[50], [50]], device=DEVICE).int()
    address = _kernels().leave(table, pool, run, moves=True)
    assert address is not None
    assert address.tolist() == [6, -1], "the second row has no place: its token is gone"
    assert pool.tolist() == [[0, 1, 2, 3], [4, 5, 50, -1]]
    assert run.tolist() == [[-1], [-1]]


@pytest.mark.parametrize("num_fields", [1, 2, 4, 6])
def test_lines_change_places(num_fields: int) -> None:
    shapes = [
        (torch.bfloat16, 20),
        (torch.uint8, 64),
        (torch.float16, 1),
        (torch.float32, 3),
        (torch.uint8, 1),
        (torch.float32, 80),
    ]
    fields = []
    for dtype, width in shapes[:num_fields]:
        fields.append(tuple((100 * torch.randn(n, width)).to(dtype).to(DEVICE) for n in (9, ROWS)))
    before = [(held.clone(), new.clone()) for held, new in fields]
    address = _long(7, -1, 2)
    _kernels().exchange(fields, address)
    for (held, new), (old, fresh) in zip(fields, before, strict=True):
        for row, at in ((0, 7), (2, 2)):
            old[at], fresh[row] = fresh[row].clone(), old[at].clone()
        assert torch.equal(held, old)
        assert torch.equal(new, fresh)
    _kernels().exchange(fields, address)
    assert torch.equal(fields[0][1], before[0][1].index_copy(0, _long(0, 2), before[0][0][_long(7, 2)]))
