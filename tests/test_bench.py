"""`kvfold bench`: quality by streaming, measurements in fresh processes, results folders that survive interruptions."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from tiny import VOCAB_SIZE, tiny_model, tiny_model_folder

from kvfold.cli.main import main
from kvfold.errors import FileError, KvfoldError, PlanError
from kvfold.lab import bench as bench_module
from kvfold.lab import quality
from kvfold.lab.bench import Bench, named_plans, run
from kvfold.lab.quality import Reference, reference_of, rouge_l, stream_quality
from kvfold.lab.results import RAW, RECORDS, Cell, Journal, Measurement, Record, read_records, wrong_fields
from kvfold.lab.worker import Event, Job, Worker

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "times.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def wanted(folder: Path, text: Path, tmp_path: Path) -> Bench:
    return Bench(
        plans=named_plans(["full", "int4", "window(25%)"]),
        model=str(folder),
        contexts=(64, 160),
        batch_sizes=(1, 2),
        new_tokens=4,
        text=text,
        repeats=2,
        out=tmp_path / "out",
        seed=0,
        dtype="float32",
        device="cpu",
        threads=1,
    )


class SharedWorker:
    """One worker for all tests, as its imports take seconds. Counts jobs; stops as ctrl-C does when there have been enough."""

    def __init__(self, worker: Worker, stop_after: int):
        self.worker, self.stop_after = worker, stop_after
        self.jobs: list[Job] = []

    def __enter__(self) -> "SharedWorker":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def run(self, job: Job) -> Iterator[Event]:
        if len(self.jobs) == self.stop_after:
            raise KeyboardInterrupt
        self.jobs.append(job)
        return self.worker.run(job)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started


@pytest.fixture
def counting(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SharedWorker]:
    def make(stop_after: int = 10**6) -> SharedWorker:
        shared = SharedWorker(worker, stop_after)
        monkeypatch.setattr(bench_module, "Worker", lambda: shared)
        return shared

    make()
    return make


# -- quality -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharp_model() -> torch.nn.Module:
    """A tiny model whose attention is far from uniform, so that it matters what is in the cache."""
    model = tiny_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(6 if "q_proj" in name or "k_proj" in name else 3)
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (1, 300), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference(sharp_model, ids) -> Reference:
    return reference_of(sharp_model, ids, prefill_len=150, chunk=32, num_new=8)


def test_full_costs_nothing(sharp_model, ids, reference) -> None:
    result = stream_quality(sharp_model, ids, "full", reference)
    assert abs(result.kl) < 1e-6
    assert result.top1 == 1
    assert result.perplexity == pytest.approx(result.perplexity_full)
    assert result.continuation == reference.continuation
    assert len(result.continuation) == 8


def test_reference_is_the_model_itself(sharp_model, ids, reference) -> None:
    with torch.no_grad():
        log_probs = sharp_model(ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(reference.log_probs, log_probs[150:], atol=1e-4, rtol=0)
    nll = -log_probs[150:-1].gather(1, ids[0, 151:, None]).mean()
    assert reference.perplexity == pytest.approx(nll.exp().item(), rel=1e-4)


def test_fewer_bits_cost_more(sharp_model, ids, reference) -> None:
    kl = {plan: stream_quality(sharp_model, ids, plan, reference).kl for plan in ("int8", "int4", "int2")}
    assert 0 < kl["int8"] < kl["int4"] < kl["int2"]


def test_kl_is_that_of_the_definition(sharp_model, ids, reference) -> None:
    ours = reference_of(tiny_model(seed=1), ids, 150, 32)
    other = quality.divergence(reference.log_probs, ours.log_probs) / 150
    p, q = reference.log_probs.double(), ours.log_probs.double()
    assert other == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)


def test_large_reference_lives_in_a_file(sharp_model, ids, reference, monkeypatch) -> None:
    monkeypatch.setattr(quality, "_IN_MEMORY_BYTES", 0)
    assert torch.equal(reference_of(sharp_model, ids, 150, 32).log_probs, reference.log_probs)


def test_progress_ends_at_one(sharp_model, ids, reference) -> None:
    shares: list[float] = []
    stream_quality(sharp_model, ids, "int4", reference, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_reference_of_another_text_is_refused(sharp_model, ids, reference) -> None:
    with pytest.raises(ValueError, match="300 tokens, not 200"):
        stream_quality(sharp_model, ids[:, :200], "full", reference)


@pytest.mark.parametrize(
    ("candidate", "target", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        ("police killed the gunman", "police kill the gunman", 0.75),  # the example of the paper: 3 of 4 and 3 of 4
        ("the gunman police killed", "police killed the gunman", 0.5),  # order counts
        ("a b c d e", "a c e", 2 * 3 / 8),
        ("cat", "dog", 0.0),
        ("", "dog", 0.0),
        ("", "…", 1.0),
    ],
)
def test_rouge_l(candidate: str, target: str, expected: float) -> None:
    assert rouge_l(candidate, target) == pytest.approx(expected)
    assert rouge_l(target, candidate) == pytest.approx(expected)


# -- runs --------------------------------------------------------------------------------------------------------------------


def test_records_are_complete_and_typed(wanted: Bench, counting) -> None:
    outcome = run(wanted)
    assert not outcome.failures
    assert len(outcome.records) == 3 * 2 * 2
    assert {(r.strategy, r.context, r.batch) for r in outcome.records} == {
        (name, context, batch) for name in ("full", "int4", "window(25%)") for context in (64, 160) for batch in (1, 2)
    }
    for record in outcome.records:
        assert wrong_fields(record) == []
        empty = {f.name for f in fields(Record) if getattr(record, f.name) is None}
        assert empty <= {"git_commit"}
        assert record.kv_bytes_per_token == pytest.approx(record.kv_bytes / (record.batch * (record.context + 3)))
        assert record.ms_per_token_p20 <= record.ms_per_token_p50 <= record.ms_per_token_p80
        assert record.repeats == 2
        assert record.quality_prefill_len == record.context // 2
        assert record.seed == 0
        assert record.threads == 1
    full = [r for r in outcome.records if r.strategy == "full"]
    assert all(r.kl < 1e-6 and r.top1 == 1 and r.rouge_l_full == 1 for r in full)
    assert read_records(wanted.out) == outcome.records
    assert (wanted.out / "records.csv").read_text().count("\n") == 13
    assert "window(25%)" in (wanted.out / "records.md").read_text()


def test_an_interrupted_run_goes_on_and_repeats_nothing(wanted: Bench, counting) -> None:
    wanted = replace(wanted, contexts=(64,), batch_sizes=(1,))
    counting(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(wanted)
    assert len((wanted.out / RAW).read_text().splitlines()) == 4

    second = counting()
    outcome = run(wanted)
    timed = [job for job in second.jobs if job.kind == "timing"]
    assert len(timed) == 3 * 2 - 4
    assert len(second.jobs) == len(timed) + 1
    assert [r.repeats for r in outcome.records] == [2, 2, 2]

    third = counting()
    again = run(wanted)
    assert third.jobs == []
    assert again.records == outcome.records

    more = counting()
    run(replace(wanted, plans=named_plans(["full", "int8"])))
    assert {plan for job in more.jobs for plan in job.plans} == {"int8"}


def test_a_torn_line_is_measured_again(wanted: Bench, counting) -> None:
    wanted = replace(wanted, plans=named_plans(["full"]), contexts=(64,), batch_sizes=(1,))
    run(wanted)
    raw = wanted.out / RAW
    lines = raw.read_text().splitlines(keepends=True)
    raw.write_text("".join(lines[:-1]) + lines[-1][:40])
    worker = counting()
    outcome = run(wanted)
    assert [job.kind for job in worker.jobs] == ["quality"]
    assert outcome.records[0].kl == pytest.approx(0, abs=1e-6)
    assert len(raw.read_text().splitlines()) == 3


def test_a_damaged_line_in_the_middle_is_named(wanted: Bench, counting) -> None:
    wanted = replace(wanted, plans=named_plans(["full"]), contexts=(64,), batch_sizes=(1,))
    run(wanted)
    raw = wanted.out / RAW
    raw.write_text("{}\n" + raw.read_text())
    with pytest.raises(FileError, match="line 1, is damaged"):
        run(wanted)


def test_another_setting_is_refused_or_put_aside(wanted: Bench, counting) -> None:
    wanted = replace(wanted, plans=named_plans(["full"]), contexts=(64,), batch_sizes=(1,), repeats=1, quality=False)
    run(wanted)
    before = (wanted.out / RAW).read_bytes()
    with pytest.raises(FileError, match=r"new_tokens: 4, now 5.*--again"):
        run(replace(wanted, new_tokens=5))
    assert (wanted.out / RAW).read_bytes() == before
    outcome = run(replace(wanted, new_tokens=5, again=True))
    assert outcome.records[0].new_tokens == 5
    assert (wanted.out.with_name("out.1") / RAW).read_bytes() == before


def test_only_quality_or_only_timing(wanted: Bench, counting) -> None:
    wanted = replace(wanted, plans=named_plans(["int4"]), contexts=(64,), batch_sizes=(1,), repeats=1)
    timed = run(replace(wanted, quality=False, out=wanted.out / "timing")).records[0]
    assert (timed.kl, timed.repeats) == (None, 1)
    judged = run(replace(wanted, timing=False, out=wanted.out / "quality")).records[0]
    assert (judged.ttft_ms, judged.repeats) == (None, 0)
    assert judged.kv_bytes > 0
    assert judged.kl >= 0
    assert wrong_fields(timed) == wrong_fields(judged) == []


def test_a_strategy_that_fails_does_not_stop_the_others(wanted: Bench, counting) -> None:
    plans = {"full": "full", "tight": "window(2KiB) | int4"}
    outcome = run(replace(wanted, plans=plans, contexts=(64,), batch_sizes=(1,), repeats=1))
    assert [r.strategy for r in outcome.records] == ["full"]
    assert list(outcome.failures) == ["tight"]
    assert "too little" in outcome.failures["tight"]


def test_a_full_disk_loses_nothing(wanted: Bench, counting) -> None:
    wanted = replace(wanted, plans=named_plans(["full"]), contexts=(64,), batch_sizes=(1,))
    run(wanted)
    journal = Journal(wanted.out, _setting_in(wanted.out))
    before = journal.path.read_bytes()
    journal.path = Path("/dev/full")
    with pytest.raises(FileError, match="the disk is full"):
        journal.add(Measurement(Cell("timing", "int4", 64), {}, "", None))
    assert (wanted.out / RAW).read_bytes() == before


def _setting_in(folder: Path):
    from kvfold.lab.journal import SETTING
    from kvfold.lab.results import Setting

    return Setting(**json.loads((folder / SETTING).read_text()))


# -- the command -------------------------------------------------------------------------------------------------------------


def test_names_of_plans() -> None:
    demo = named_plans(["demo"])
    asked = "full window sink_window selective_int8 selective_int4 int8 int4 int2 fp8 hybrid h2o snapkv l2norm random"
    assert set(asked.split()) <= set(demo)
    assert set(demo) < set(named_plans(["all"]))
    assert named_plans(["int4", "h2o(25%)|int4"]) == {"int4": "int4", "h2o(25%) | int4": "h2o(25%) | int4"}
    with pytest.raises(PlanError, match="int4"):
        named_plans(["imt4"])


def _fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *map(str, arguments)])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_bad_input_is_one_line(folder: Path, text: Path, tmp_path: Path, counting, capsys) -> None:
    common = ("--model", folder, "--text", text, "--out", tmp_path / "out")
    assert "imt4" in _fails(capsys, "imt4", *common)
    assert "--contexts many" in _fails(capsys, "full", *common, "--contexts", "many")
    assert "--batch-sizes must be 1 or more" in _fails(capsys, "full", *common, "--contexts", "64", "--batch-sizes", "0")
    assert "--contexts must be 16 or more" in _fails(capsys, "full", *common, "--contexts", "2")
    assert "nothing to measure" in _fails(capsys, "full", *common, "--no-timing", "--no-quality")
    assert "context of 992 at most" in _fails(capsys, "full", *common, "--contexts", "1000")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    assert "10 tokens, too few" in _fails(capsys, "full", *common, "--text", short, "--contexts", "64")
    assert "missing.txt: no such file" in _fails(
        capsys, "full", *common, "--text", tmp_path / "missing.txt", "--contexts", "64"
    )
    assert "unknown model" in _fails(capsys, "full", *common, "--model", "nonsense", "--contexts", "64")
    blocked = tmp_path / "file"
    blocked.touch()
    assert "not a folder" in _fails(capsys, "full", *common, "--contexts", "64", "--out", blocked / "out")


def test_the_command_ends_with_a_table_and_files(folder: Path, text: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    where = ["--model", str(folder), "--text", str(text), "--out", str(out)]
    size = ["--contexts", "64", "--new-tokens", "4", "--threads", "1"]
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "full", "int4", *where, *size])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "timing 2/2" in printed
    assert "quality 2/2" in printed
    assert "report.html" in printed
    names = {path.name for path in out.iterdir()}
    assert {RAW, RECORDS, "setting.json", "records.csv", "records.md", "report.html", "quality-vs-bytes.png"} <= names
    assert all(asdict(r)["model"] == str(folder) for r in read_records(out))


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(KvfoldError, match="nothing to measure"):
        named_plans([])
