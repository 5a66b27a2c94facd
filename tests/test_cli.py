"""The command line: what `generate`, `strategies` and `info` print, and one line with status 2 for every bad input."""

import csv
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer

import kvfold
from kvfold.attention.dispatch import kernel_name
from kvfold.catalog import STRATEGIES
from kvfold.cli.main import main
from kvfold.cli.sizes import with_sizes
from kvfold.errors import PlanError
from kvfold.lab.generate import generate
from kvfold.lab.profile import count_flops
from kvfold.plan import Plan


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=256)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own to run in, and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("KVFOLD_DEBUG", raising=False)


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


class Kvfold:
    """Runs commands in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self.capfd = capfd

    def __call__(self, *arguments: str | Path) -> Result:
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        out, err = self.capfd.readouterr()
        return Result(int(end.value.code or 0), out, err)

    def refuses(self, *arguments: str | Path) -> str:
        """The one line of a command that fails with status 2."""
        result = self(*arguments)
        assert result.status == 2
        assert result.out == ""
        assert result.err.startswith("kvfold: ")
        assert result.err.count("\n") == 1
        return result.err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Kvfold:
    return Kvfold(capfd)


# -- generate -----------------------------------------------------------------------------------------------------------------


def test_generates_what_the_model_generates(run: Kvfold, model_folder: Path) -> None:
    result = run("generate", "--model", model_folder, "--dtype", "float32", "--prompt", "some words", "--max-new-tokens", "12")
    assert result.status == 0
    tokenizer = tiny_tokenizer()
    ids = tokenizer("some words", return_tensors="pt")
    expected = tiny_model(max_position_embeddings=256).generate(**ids, max_new_tokens=12, do_sample=False)[0, 10:]
    assert result.out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_the_end_line(run: Kvfold, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("word " * 40)
    result = run(
        *("generate", "--model", model_folder, "--prompt-file", "prompt.txt", "--plan", "window(50)"),
        *("--max-new-tokens", "20", "--chunk", "64", "--temperature", "1.5"),
    )
    assert result.status == 0
    end = result.err.splitlines()[-1]
    for word in ("for 219 tokens", "first token after", "tokens/s", "plan window(50)", f"kernel {kernel_name()}"):
        assert word in end


def test_sampling_follows_the_seed(run: Kvfold, model_folder: Path) -> None:
    def sample(seed: int) -> str:
        arguments = ("--prompt", "abc", "--temperature", "2", "--max-new-tokens", "30")
        return run("generate", "--model", model_folder, *arguments, "--seed", str(seed)).out

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_temperature_near_zero_is_greedy() -> None:
    model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    greedy = generate(model, ids, kvfold.cache(model, "full"), 10)
    for temperature in (1e-6, 1e-300):
        cold = generate(model, ids, kvfold.cache(model, "full"), 10, temperature=temperature)
        assert torch.equal(cold.tokens, greedy.tokens)


def test_stops_at_the_end_token() -> None:
    model, ids = tiny_model(), torch.tensor([[5, 6, 7], [9, 8, 7]])
    free = generate(model, ids, kvfold.cache(model, "full"), 20).tokens
    end = int(free[0, 4])
    stopped = generate(model, ids, kvfold.cache(model, "full"), 20, eos={end}).tokens
    for row, expected in zip(stopped.tolist(), free.tolist(), strict=True):
        stop = expected.index(end) if end in expected else len(row)
        assert row[:stop] == expected[: len(row)][:stop]
        assert set(row[stop:]) <= {end}


def test_the_chat_template_is_used_unless_told_not_to(run: Kvfold, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}>")
    arguments = ("generate", "--model", folder, "--prompt", "hello", "--max-new-tokens", "1")
    assert "for 8 tokens" in run(*arguments).err
    assert "for 5 tokens" in run(*arguments, "--no-chat").err


def test_a_profile(run: Kvfold, model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--prompt", "a" * 100, "--plan", "int4", "--max-new-tokens", "8", "--profile", "first")
    result = run("generate", "--model", model_folder, "--dtype", "float32", *arguments)
    assert result.status == 0
    folder = tmp_path / "outputs" / "first"
    assert sorted(p.name for p in folder.iterdir()) == ["operators.csv", "operators.txt", "summary.json", "trace.json"]
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    with (folder / "operators.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"aten::mm"} <= {row["operator"] for row in rows}
    times = [float(row["self_cpu_us"]) for row in rows]
    assert times == sorted(times, reverse=True)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["plan"] == "int4"
    assert summary["prompt_tokens"] == 100
    assert summary["new_tokens"] == 8
    assert summary["ttft_ms"] > 0
    by_formula = summary["flops"]["prefill"] + summary["profiled_steps"] * summary["flops"]["decode_token"]
    assert summary["profiled_flops"] == pytest.approx(by_formula, rel=0.25)


def test_flops_by_hand() -> None:
    model = tiny_model(num_hidden_layers=2)
    cache = kvfold.cache(model, "window(8)")
    ids = torch.randint(3, 99, (2, 20))
    generate(model, ids, cache, 1, chunk=16)
    flops = count_flops(model, cache, ids, chunk=16)
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 64)  # q and o, k and v, the three of the MLP; two layers
    head = 64 * 100
    pairs = 2 * 20 * 21 // 2
    assert flops.prefill == 2 * (2 * 20 * linear + 2 * 2 * head + 4 * 4 * 16 * pairs)
    assert flops.decode_token == 2 * (2 * (linear + head) + 4 * 4 * 16 * 2 * 8)


# -- sinks and windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "sink", "window", "expected"),
    [
        ("sink_window", 8, 100, "sink_window(sink=8, window=100)"),
        ("sink_window(4, 1020)", None, 64, "sink_window(4, 64)"),
        ("window(25%)", None, 64, "window(64)"),
        ("h2o(25%)", 4, 32, "h2o(25%, sink=4, recent=32)"),
        ("snapkv(1024) | int4", 2, 16, "snapkv(1024, sink=2, window=16) | int4"),
        ("protect(sink=16, window=32) | int8", 4, None, "protect(sink=4, window=32) | int8"),
        ("int4(sink=4)", None, 32, "protect(sink=4, window=32) | int4(sink=4)"),
        ("kivi(int2)", 8, None, "protect(sink=8, window=128) | kivi(int2)"),
        (
            "hybrid(edge=2, edge_store=int8) | int4",
            0,
            32,
            "protect(sink=0, window=32) | hybrid(edge=2, edge_store=int8) | int4",
        ),
        ("window(64) | int8", 4, None, "window(64) | protect(sink=4, window=0) | int8"),
        ("int4", None, None, "int4"),
    ],
)
def test_sizes(plan: str, sink: int | None, window: int | None, expected: str) -> None:
    assert str(with_sizes(Plan.parse(plan), sink, window)) == expected


@pytest.mark.parametrize(
    ("plan", "sink", "window", "message"),
    [
        ("full", 4, None, "has no sink"),
        ("full", None, 4, "has no window"),
        ("window(64)", 4, None, "has no sink"),
        ("window(64)", None, 0, "keeps nothing"),
        ("h2o(64)", None, 100, "exceed the budget"),
    ],
)
def test_sizes_that_have_no_place(plan: str, sink: int | None, window: int | None, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        with_sizes(Plan.parse(plan), sink, window)


def test_sizes_from_the_command_line(run: Kvfold, model_folder: Path) -> None:
    arguments = (
        "--prompt",
        "a" * 50,
        "--plan",
        "sink_window",
        "--sink-size",
        "2",
        "--window-size",
        "10",
        "--max-new-tokens",
        "1",
    )
    assert "plan sink_window(sink=2, window=10)" in run("generate", "--model", model_folder, *arguments).err


# -- the other commands -------------------------------------------------------------------------------------------------------


def test_strategies_as_json(run: Kvfold) -> None:
    result = run("strategies", "--json")
    assert result.status == 0
    rows = json.loads(result.out)
    assert [row["name"] for row in rows] == list(STRATEGIES)
    assert set(rows[0]) == {"name", "plan", "changes", "summary", "paper"}


@pytest.mark.parametrize("columns", [80, 160])
def test_strategies_as_a_table(run: Kvfold, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = run("strategies")
    assert result.status == 0
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in result.out
    for name in STRATEGIES:
        assert any(line.split()[:1] == [name] for line in lines)


def test_info(run: Kvfold, tmp_path: Path) -> None:
    result = run("info")
    assert result.status == 0
    for word in (kvfold.__version__, torch.__version__, kernel_name(), str(tmp_path / "cache"), "not made yet"):
        assert word in result.out


def test_version(run: Kvfold) -> None:
    said = f"kvfold {kvfold.__version__}\n"
    assert run("--version").out == said
    command = [sys.executable, "-m", "kvfold", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == said


def test_help_loads_no_torch() -> None:
    heavy = ("torch", "transformers", "pandas", "matplotlib")
    code = (
        "import sys\nfrom kvfold.cli.main import main\ntry:\n    main(['--help'])\n"
        f"except SystemExit:\n    sys.exit(any(name in sys.modules for name in {heavy}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# -- bad input ----------------------------------------------------------------------------------------------------------------


def test_usage_errors(run: Kvfold) -> None:
    assert "'generat'" in run.refuses("generat")
    assert "--plam" in run.refuses("generate", "--plam", "int4")
    assert "--max-new-tokens" in run.refuses("generate", "--prompt", "a", "--max-new-tokens", "many")
    assert "--max-new-tokens" in run.refuses("generate", "--prompt", "a", "--max-new-tokens", "0")
    assert "--chunk" in run.refuses("generate", "--prompt", "a", "--chunk", "0")
    assert "--temperature" in run.refuses("generate", "--prompt", "a", "--temperature", "nan")
    assert "--sink-size" in run.refuses("generate", "--prompt", "a", "--sink-size", "-1")
    assert "unexpected" in run.refuses("strategies", "extra")


def test_bad_prompts(run: Kvfold, tmp_path: Path) -> None:
    assert "either --prompt or --prompt-file" in run.refuses("generate")
    assert "either --prompt or --prompt-file" in run.refuses("generate", "--prompt", "a", "--prompt-file", "b")
    assert "--prompt is empty" in run.refuses("generate", "--prompt", "  ")
    assert "no such file" in run.refuses("generate", "--prompt-file", "missing.txt")
    assert "is a folder" in run.refuses("generate", "--prompt-file", tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in run.refuses("generate", "--prompt-file", "binary")


def test_bad_plans(run: Kvfold) -> None:
    def refused(plan: str) -> str:
        return run.refuses("generate", "--prompt", "a", "--plan", plan)

    assert "did you mean 'int4'" in refused("int44")
    assert "did you mean 'rotate'" in refused("int4(rotat=k)")
    assert "keeps nothing" in refused("window(0)")
    assert "keeps nothing" in refused("h2o(0%)")
    assert "an empty plan" in refused("")
    assert "has no sink" in run.refuses("generate", "--prompt", "a", "--sink-size", "4")


def test_bad_models(run: Kvfold, tmp_path: Path, model_folder: Path) -> None:
    def refused(model: str | Path, *more: str) -> str:
        return run.refuses("generate", "--prompt", "a", "--model", model, *more)

    assert "did you mean 'smollm2-135m'" in refused("smollm-135m")
    assert "the hub is not reached" in refused("nobody/nothing")
    assert "config.json" in refused(tmp_path)
    assert "float32" in refused(model_folder, "--dtype", "float31")
    assert "unknown device" in refused(model_folder, "--device", "gpu")
    if not torch.cuda.is_available():
        assert "use --device cpu" in refused(model_folder, "--device", "cuda")


def test_a_model_that_cannot_be_served(run: Kvfold, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "odd", head_dim=10, num_attention_heads=4)
    assert "head dim 10" in run.refuses("generate", "--prompt", "a", "--model", folder, "--plan", "int2")


@pytest.mark.parametrize("plan", ["full", "window(16)", "sink_window(sink=4, window=16)"])
def test_a_prompt_longer_than_the_model_takes(run: Kvfold, model_folder: Path, plan: str) -> None:
    arguments = ("generate", "--model", model_folder, "--plan", plan, "--prompt")
    assert "has 300 tokens and the model takes 256" in run.refuses(*arguments, "a" * 300)
    assert "6 new tokens at most" in run.refuses(*arguments, "a" * 250, "--max-new-tokens", "10")


def test_a_folder_that_cannot_be_written_to(run: Kvfold, tmp_path: Path, model_folder: Path) -> None:
    arguments = ("generate", "--model", model_folder, "--prompt", "a", "--max-new-tokens", "2", "--profile")
    (tmp_path / "outputs").write_text("in the way")
    assert "is a file, not a folder" in run.refuses(*arguments, "first")
    assert "plain name" in run.refuses(*arguments, "../first")
    (tmp_path / "outputs").unlink()
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "outputs").mkdir(mode=0o500)
        assert "no permission" in run.refuses(*arguments, "first")


def test_a_full_disk(run: Kvfold, tmp_path: Path, model_folder: Path) -> None:
    arguments = ("generate", "--model", model_folder, "--prompt", "a", "--max-new-tokens", "2", "--profile", "first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        result = run(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.status == 2
    assert "trace.json: the disk is full" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert list((tmp_path / "outputs" / "first").iterdir()) == []


def test_debug_shows_the_traceback(run: Kvfold, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, variable in ((["--debug"], ""), ([], "1")):
        monkeypatch.setenv("KVFOLD_DEBUG", variable)
        result = run(*arguments, "generate", "--prompt", "a", "--plan", "int44")
        assert result.status == 2
        assert "Traceback" in result.err
        assert result.err.splitlines()[-1].startswith("kvfold: unknown")


def test_an_interrupt(run: Kvfold, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvfold.cli.sizes.with_sizes", interrupted)
    result = run("generate", "--prompt", "a")
    assert (result.status, result.err) == (130, "kvfold: interrupted\n")


def test_the_reader_of_a_pipe_may_leave() -> None:
    command = f"{sys.executable} -c 'from kvfold.cli.main import main; main()' strategies --json | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[\n", "")
