"""`kvfold eval`: the same questions for every plan, resumed, scored and compared; and what it says of bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model_folder

from kvfold.cli.main import main
from kvfold.errors import FileError, KvfoldError
from kvfold.lab.eval import asking, data
from kvfold.lab.eval.items import ITEMS, SCORES, read_items
from kvfold.lab.eval.scores import Score, markdown, read_scores

pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from kvfold.lab.eval import local_tasks, tasks
from kvfold.lab.eval.evaluation import Evaluation, EvalUpdate
from kvfold.lab.eval.run import Outcome, run

ENDINGS = ["sat on the mat.", "ate the moon.", "of the.", "ran away from the very large dog."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture(autouse=True)
def small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local data without a network."""
    story = "It was the best of times, it was the worst of times, and number {} was the age of wisdom. "
    questions = [{"ctx_a": story.format(i) * (1 + i), "ctx_b": "", "activity_label": "Cat"} for i in range(4)]
    monkeypatch.setattr(data, "hellaswag", lambda: [{**q, "endings": ENDINGS, "label": "1"} for q in questions])
    monkeypatch.setattr(data, "wikipedia", lambda: [{"title": "", "page": story.format(i) * 2} for i in range(3)])
    monkeypatch.setattr(
        data,
        "gsm8k",
        lambda: [{"question": story.format(i) + f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)],
    )
    problem = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "one"}
    monkeypatch.setattr(data, "humaneval", lambda: [{**problem, "task_id": "0", "canonical_solution": "    return 1"}])


@pytest.fixture
def wanted(folder: Path, tmp_path: Path) -> Callable[..., Evaluation]:
    def make(**changes: Any) -> Evaluation:
        fields: dict[str, Any] = {
            "plans": {"int2": "int2", "window(16)": "window(16)"},
            "model": str(folder),
            "tasks": {"kvfold_hellaswag_local": 3, "kvfold_wikipedia_local": None, "kvfold_gsm8k_local": 2},
            "out": tmp_path / "out",
            "threads": 1,
            "chunk": 64,
        }
        return Evaluation(**(fields | changes))

    return make


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight shots of GSM8K are 3,000 characters, which are tokens here; and 256 new tokens are 249 too many."""
    config = local_tasks._harness_config

    def shortened(path: str) -> dict[str, Any]:
        found = config(path)
        if "gsm8k" in path:
            found["num_fewshot"] = 0
            found["generation_kwargs"] = {**found["generation_kwargs"], "max_gen_toks": 7}
        return found

    monkeypatch.setattr(local_tasks, "_harness_config", shortened)


def main_scores(outcome: Outcome) -> dict[tuple[str, str], Score]:
    return {(score.task, score.plan): score for score in outcome.scores if score.main}


def numbers(folder: Path) -> list[dict[str, Any]]:
    """What must not change between runs."""
    varying = ("seconds", "date", "git_commit")
    items = [json.loads(line) for line in (folder / ITEMS).read_text().splitlines()]
    return sorted(({k: v for k, v in i.items() if k not in varying} for i in items), key=json.dumps)


def test_plans_answer_the_same_questions(wanted: Callable[..., Evaluation]) -> None:
    updates: list[EvalUpdate] = []
    evaluation = wanted()
    outcome = run(evaluation, updates.append)
    scores = main_scores(outcome)
    assert set(scores) == {(task, plan) for task in evaluation.tasks for plan in ("full", "int2", "window(16)")}
    for (task, plan), score in scores.items():
        assert score.num_items == (evaluation.tasks[task] or 3)
        assert score.low <= score.score <= score.high
        assert score.num_answer_tokens > 0
        if plan == "full":
            assert (score.diff, score.kl, score.top1) == (None, 0.0, 1.0)
        else:
            assert score.diff == pytest.approx(score.score - scores[task, "full"].score)
            assert score.kl is not None
            assert score.kl_low is not None
            assert score.kl_high is not None
            assert score.kl > 0
            assert 0 <= score.kl_low <= score.kl <= score.kl_high
            assert score.kv_bytes < scores[task, "full"].kv_bytes
    assert scores["kvfold_gsm8k_local", "int2"].mcnemar_p == 1.0
    assert scores["kvfold_wikipedia_local", "int2"].interval == "bootstrap"
    assert scores["kvfold_wikipedia_local", "int2"].mcnemar_p is None
    assert len(updates) == 1 + 8 * 3
    assert updates[-1].share == pytest.approx(1.0)
    assert updates[-1].left_s == pytest.approx(0.0, abs=1e-6)


def test_scores_are_the_harness_own(wanted: Callable[..., Evaluation], folder: Path) -> None:
    """The harness' evaluator, over the same tasks and our model class, comes to the same scores."""
    import lm_eval
    from transformers import AutoTokenizer

    from kvfold.lab.eval.harness import KvfoldLM

    evaluation = wanted()
    ours = run(evaluation).scores
    lm = KvfoldLM(str(folder), "int2", chunk=64)
    making = local_tasks.Making(AutoTokenizer.from_pretrained(folder), (512,), 0)
    for name, limit in evaluation.tasks.items():
        found = {"tasks": {name: local_tasks.LOCAL_TASKS[name].make(making)}, "groups": {}, "group_map": {}}
        theirs = lm_eval.evaluate(lm, found, limit=limit, bootstrap_iters=0)["results"][name]
        for score in ours:
            if score.task == name and score.plan == "int2":
                assert score.score == pytest.approx(theirs[f"{score.metric},{score.filter}"], rel=1e-6)


def test_a_killed_run_goes_on_where_it_was(wanted: Callable[..., Evaluation], tmp_path: Path, monkeypatch) -> None:
    whole = run(wanted(out=tmp_path / "whole"))
    answered: list[tuple[str, int, str]] = []
    item = asking.Asking._item

    def counted(self, plan, question, *rest):
        if len(answered) == 7:
            raise KeyboardInterrupt
        answered.append((question.task.name, question.doc_id, plan))
        return item(self, plan, question, *rest)

    monkeypatch.setattr(asking.Asking, "_item", counted)
    with pytest.raises(KeyboardInterrupt):
        run(wanted())
    log = tmp_path / "out" / ITEMS
    assert len(read_items(log)) == 7
    assert read_scores(tmp_path / "out")  # what is there is scored
    log.write_text(log.read_text() + '{"task": "half a li')
    first, answered[:] = list(answered), []
    monkeypatch.setattr(
        asking.Asking, "_item", lambda self, *a: answered.append((a[1].task.name, a[1].doc_id, a[0])) or item(self, *a)
    )
    resumed = run(wanted())
    assert not set(first) & set(answered)
    assert len(first) + len(answered) == 8 * 3
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")
    assert [s.score for s in resumed.scores] == [s.score for s in whole.scores]
    answered.clear()
    run(wanted())
    assert answered == []


def test_a_folder_may_grow(wanted: Callable[..., Evaluation]) -> None:
    run(wanted(tasks={"kvfold_hellaswag_local": 2}, plans={"int2": "int2"}))
    outcome = run(wanted(tasks={"kvfold_wikipedia_local": 2}))
    assert {score.task for score in outcome.scores} == {"kvfold_hellaswag_local", "kvfold_wikipedia_local"}
    with pytest.raises(FileError, match="another setting \\(seed: 0, now 1\\)"):
        run(wanted(seed=1))
    again = run(wanted(tasks={"kvfold_wikipedia_local": 2}, seed=1, again=True))
    assert {score.task for score in again.scores} == {"kvfold_wikipedia_local"}


def test_batches_answer_the_same(wanted: Callable[..., Evaluation], tmp_path: Path) -> None:
    tasks = {"kvfold_gsm8k_local": 3, "kvfold_hellaswag_local": 2}
    one, three = (run(wanted(tasks=tasks, batch_size=n, out=tmp_path / str(n), plans={"int2": "int2"})) for n in (1, 3))
    assert [s.score for s in three.scores] == [s.score for s in one.scores]
    answers = [{i.key: i.answer for i in read_items(tmp_path / n / ITEMS)} for n in ("1", "3")]
    assert answers[0] == answers[1]


def test_a_plan_that_can_not_serve_is_left_out(wanted: Callable[..., Evaluation]) -> None:
    plans = {"tiny budget": "h2o(1KiB)", "int2": "int2"}
    outcome = run(wanted(plans=plans, tasks={"kvfold_hellaswag_local": 2}))
    assert list(outcome.failures) == ["tiny budget"]
    assert "is too little for this plan" in outcome.failures["tiny budget"]
    assert {score.plan for score in outcome.scores} == {"full", "int2"}


@pytest.mark.parametrize(("code", "score"), [("    return 1", 1.0), ("    return 2", 0.0)])
def test_code_is_judged_by_running_it(code: str, score: float, wanted: Callable[..., Evaluation], monkeypatch) -> None:
    monkeypatch.setattr(asking.Asking, "_generate", lambda self, lm, questions: {0: ([code], [[5, 6, 7]])})
    outcome = run(wanted(tasks={"kvfold_humaneval_local": None}, plans={"int2": "int2"}))
    assert {s.score for s in outcome.scores} == {score}
    assert {s.num_answer_tokens for s in outcome.scores} == {3}


def test_tables_name_metrics_and_setting(wanted: Callable[..., Evaluation], tmp_path: Path) -> None:
    outcome = run(wanted(tasks={"kvfold_gsm8k_local": 1}))
    text = markdown(outcome.scores)
    assert "| kvfold_gsm8k_local | exact_match, strict-match ↑ | int2 | 1 |" in text
    assert "not the official ones" in text
    assert text == (tmp_path / "out" / "scores.md").read_text()
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 1 + len(outcome.scores)
    assert read_scores(tmp_path / "out") == outcome.scores


# -- the command line, and bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "kvfold_gsm8k_locl"], "unknown task 'kvfold_gsm8k_locl'; did you mean 'kvfold_gsm8k_local'?"),
        (["--plans", "int5"], "unknown"),
        (["--tasks", ""], "no tasks: name some"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--lengths", "many"], "write whole numbers"),
        (["--chat-template", "--again"], "kvfold_hellaswag_local: this model's tokenizer has no chat template"),
        (
            ["--tasks", "kvfold_long_local"],
            "kvfold_long_local: a prompt has 3000 tokens, 4 are to follow, and the model takes 2048",
        ),
        (["--model", "nothing-here"], "unknown model 'nothing-here'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    docs = [{"prompt": "a" * 3000, "answers": ["b"]}]
    long = local_tasks.LocalTask("kvfold_long_local", "", "", lambda _: local_tasks._recalled("kvfold_long_local", docs, 4))
    monkeypatch.setitem(local_tasks.LOCAL_TASKS, "kvfold_long_local", long)
    monkeypatch.setattr(tasks, "TaskManager", _FewTasks)
    kept = tmp_path / "out" / ITEMS
    options = [
        "--model",
        str(folder),
        "--out",
        str(kept.parent),
        "--threads",
        "1",
        "--tasks",
        "kvfold_hellaswag_local",
        "--limit",
        "1",
    ]
    with pytest.raises(SystemExit) as first:
        main(["eval", *options])
    assert first.value.code == 0
    before = kept.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *options, *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert kept.read_text() == before


class _FewTasks:
    """The harness' manager without the ten seconds that it takes to read 14,000 configurations."""

    all_tasks = ("gsm8k_cot", "wikitext")
    task_index = dict.fromkeys(all_tasks)

    def __init__(self, **_: Any) -> None:
        pass


def test_a_task_of_the_hub_needs_the_hub(wanted: Callable[..., Evaluation], monkeypatch) -> None:
    class NoHub:
        def dataset_info(self, *_: Any, **__: Any) -> None:
            raise OSError("no route to host")

    monkeypatch.setattr(tasks, "TaskManager", _FewTasks)
    monkeypatch.setattr(tasks, "HfApi", NoHub)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(KvfoldError, match="the hub is not reached: take kvfold_gsm8k_local"):
        run(wanted(tasks={"gsm8k_cot": 1}))


def test_list_shows_what_there_is(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "--list"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in local_tasks.LOCAL_TASKS)


def test_sets_have_names() -> None:
    assert tasks.wanted(["quick"]) == tasks.QUICK
    assert set(tasks.wanted(["local"])) == set(local_tasks.LOCAL_TASKS)
    assert set(tasks.QUICK) <= set(local_tasks.LOCAL_TASKS)
    assert len(tasks.wanted(["longbench_english"])) == 16
    assert all(name == task.name for name, task in local_tasks.LOCAL_TASKS.items())


def test_a_finished_table_is_printed(folder: Path, tmp_path: Path, capsys) -> None:
    options = ["--model", str(folder), "--out", str(tmp_path / "out"), "--threads", "1", "--plans", "int2; window(16)"]
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *options, "--tasks", "kvfold_hellaswag_local,kvfold_wikipedia_local", "--limit", "2"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "kvfold_wikipedia_local: word_perplexity ↓" in shown
    assert "window(16)" in shown
    assert (tmp_path / "out" / SCORES).exists()


def test_each_task_has_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(asking.time, "monotonic", lambda: clock[0])
    pace = asking._Pace()
    pace.add("slow", 2.0)
    pace.add("fast", 20.0)
    clock[0] = 10.0
    assert pace.after("slow", 1.0) == pytest.approx((10 / (10 + 10 + 200), 10 + 200)), "nothing is known of the other one"
    clock[0] = 20.0
    pace.after("slow", 1.0)
    clock[0] = 21.0
    assert pace.after("fast", 1.0) == pytest.approx((21 / (21 + 19), 19.0)), "known by now, and nothing slow is left"
