"""The plan language: what it reads, what it prints, and what it refuses."""

import contextlib
import typing
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvfold.budget import Budget, LayerSplit
from kvfold.catalog import STRATEGIES, resolve
from kvfold.errors import PlanError
from kvfold.keep.base import Share
from kvfold.percent import Percent
from kvfold.plan import Hybrid, Plan, Protect
from kvfold.registry import STAGES, fields_of, methods, register
from kvfold.store.base import Store

BUDGETS = st.sampled_from(["25%", "12.5%", "100%", "1024", "300", "64MiB", "1.5GiB", "900KiB"])
SHARES = st.sampled_from(["0", "16", "64", "50%", "0%", "12.5%"])
ODD = st.integers(0, 15).map(lambda n: str(2 * n + 1))


def _values(hint: Any) -> st.SearchStrategy[str]:
    """Texts of values that an argument of this type takes."""
    if hint is Budget:
        return BUDGETS
    if hint is Share:
        return SHARES
    if hint is LayerSplit:
        return st.sampled_from(["uniform", "pyramid", "pyramid(7.5)", "weights(3, 2, 0.5)"])
    if hint is Percent:
        return st.sampled_from(["1%", "12.5%", "50%", "100%"])
    if hint is bool:
        return st.sampled_from(["true", "false"])
    if hint is int:
        return ODD
    if hint is Store:
        return st.sampled_from(sorted(set(methods("store")) - {"mixed", "gear"})).flatmap(
            lambda n: _call(n, methods("store")[n])
        )
    assert typing.get_origin(hint) is Literal, f"no values for arguments of type {hint}"
    return st.sampled_from([str(choice) for choice in typing.get_args(hint)])


@st.composite
def _call(draw: st.DrawFn, name: str, cls: type) -> str:
    """A call with any of its arguments, the first few perhaps without their names."""
    hints = typing.get_type_hints(cls)
    fields = list(fields_of(cls))
    required = [f for f in fields if fields_of(cls)[f].default.__class__.__name__ == "_MISSING_TYPE"
                and fields_of(cls)[f].default_factory.__class__.__name__ == "_MISSING_TYPE"]  # fmt: skip
    positional = draw(st.integers(len(required), len(fields)))
    named = draw(st.lists(st.sampled_from(fields[positional:]), unique=True)) if fields[positional:] else []
    args = [draw(_values(hints[f])) for f in fields[:positional]]
    args += [f"{f}={draw(_values(hints[f]))}" for f in named]
    return f"{name}({', '.join(args)})" if args else name


@st.composite
def plans(draw: st.DrawFn) -> str:
    """The text of a plan with any of its stages, as `str(plan)` prints it."""
    stages = []
    first = draw(st.sampled_from(["", "keep", "read"]))
    if first == "keep":
        name = draw(st.sampled_from(sorted(methods("keep"))))
        stages.append(draw(_call(name, methods("keep")[name])))
    elif first == "read":  # their budgets are tokens
        name = draw(st.sampled_from(sorted(methods("read"))))
        stages.append(f"{name}({draw(st.sampled_from(['25%', '1024']))}, sink={draw(ODD)})")
    if not stages or draw(st.booleans()):
        if draw(st.booleans()):
            stages.append(draw(_call("protect", Protect)))
        by_layer = draw(st.sampled_from(["", "hybrid", "layers(0-1+4=int8, 3=fp8)"]))
        if by_layer:
            stages.append(by_layer if by_layer.startswith("layers") else draw(_call("hybrid", Hybrid)))
        name = draw(st.sampled_from(sorted(methods("store"))))
        stages.append(draw(_call(name, methods("store")[name])))
    # Bytes count for all layers alike: what treats layers differently is refused beside them, as other tests hold.
    text = " | ".join(stages)
    assume(not ("iB" in text and ("l2norm" in text or "hybrid" in text)))
    if not first and draw(st.booleans()):
        stages.append(draw(st.sampled_from(["minicache", "minicache(start=0%, keep=10%)", "minicache(25%, 5%, weight=50%)"])))
        return " | ".join(stages)
    if draw(st.booleans()):
        assume("kvzip" not in text)
        stages.append(draw(st.sampled_from(["share", "share(start=25%, every=3)"])))
    if draw(st.booleans()):
        room = st.one_of(st.just(""), BUDGETS.map(lambda text: f"={text}"))
        stages.append(f"tier(device={draw(BUDGETS)}, host{draw(room)}{draw(st.sampled_from(['', ', disk', ', disk=1GiB']))})")
    return " | ".join(stages)


@given(plans())
@settings(max_examples=200)
def test_a_plan_prints_as_it_was_read(text: str) -> None:
    plan = Plan.parse(text)
    assert str(plan) == text
    assert Plan.parse(str(plan)) == plan


@given(plans(), st.data())
def test_spaces_mean_nothing(text: str, data: st.DataObject) -> None:
    space = st.sampled_from(["", " ", "  ", "\t", "\n"])
    messy = "".join(f"{data.draw(space)}{c}{data.draw(space)}" if c in "(),=|" else c for c in text.replace(" ", ""))
    assert Plan.parse(messy) == Plan.parse(text)
    assert str(Plan.parse(messy)) == text


@given(plans())
def test_every_layer_of_a_plan_has_a_codec(text: str) -> None:
    plan = Plan.parse(text)
    for index in range(5):
        layer = plan.layer(index, 5)
        edge = plan.hybrid is not None and min(index, 4 - index) < plan.hybrid.edge
        own = plan.layers.store(index, 5) if plan.layers else None
        assert layer.store == (plan.hybrid.edge_store if edge and plan.hybrid else own or plan.store)
        assert layer.keep == (plan.keep if plan.keep and index >= plan.keep.skip else None)
        assert layer.tier == plan.tier
        assert layer.read == (plan.read if plan.read and index >= plan.read.skip else None)
        if plan.protect:
            assert layer.window == plan.protect.window
            assert layer.sink >= plan.protect.sink


NOISE = st.lists(
    st.sampled_from(
        [*"()|=,% .-+_", "int4", "h2o", "full", "protect", "25%", "0", "sink", "window", "mixed", "k", "1e9", "9" * 12, "KiB"]
    )
).map("".join)


@given(st.one_of(st.text(max_size=40), NOISE))
@settings(max_examples=400)
def test_garbage_raises_nothing_but_plan_errors(text: str) -> None:
    for read in (Plan.parse, resolve, Budget.parse, Share.parse, Percent.parse):
        with contextlib.suppress(PlanError):
            read(text)


NINES = "9" * 5000


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000,
        "int4(" * 5000,
        "mixed(k=" * 5000,
        f"window({NINES})",
        f"window({NINES}GiB)",
        f"h2o({NINES}%)",
        f"int4(sink={NINES})",
        f"h2o(64, recent={NINES})",
        "window(²)",
        "window(٣)",
        "int4(sink=99999999999999999999)",
    ],
    ids=lambda text: text[:24],
)
def test_monstrous_input_is_refused_too(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.parse(text)


@pytest.mark.parametrize("text", ["²", "²%", "9" * 5000, ".", "%", "1..5%", "-1", "1e3", "٣%"])
def test_what_is_no_budget_and_no_share(text: str) -> None:
    with pytest.raises(PlanError):
        Budget.parse(text)
    with pytest.raises(PlanError):
        Share.parse(text)
    with pytest.raises(PlanError):
        Percent.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int5", ["int5", "did you mean 'int"]),
        ("int4 | int8", ["two store stages"]),
        ("h2o(25%) | snapkv(25%)", ["two keep stages"]),
        ("int4 | h2o(25%)", ["too late", "keep | protect | hybrid | layers | store"]),
        ("hybrid | protect | int4", ["too late"]),
        ("protect(sink=4)", ["needs a codec", "protect | int4"]),
        ("hybrid(edge=2)", ["needs a codec"]),
        ("layers(0=int8)", ["needs a codec"]),
        ("layers(0=int8) | hybrid | int4", ["too late"]),
        ("hybrid | layers(0=int8) | int4", ["both choose codecs by layer"]),
        ("layers | int4", ["which layers"]),
        ("layers(int8) | int4", ["needs its layers", "layers(0-1+17=int8)"]),
        ("layers(one=int8) | int4", ["'one' names no layers"]),
        ("layers(3-1=int8) | int4", ["'3-1' names no layers"]),
        ("layers(0-4+2=int8) | int4", ["'2' names a layer that has a codec"]),
        ("layers(0=int9) | int4", ["not a codec", "did you mean 'int"]),
        ("full | int4", ["stands alone"]),
        ("full(1)", ["stands alone"]),
        ("h2o", ["'budget' is missing", "h2o(25%)"]),
        ("h2o(25%, recnt=4)", ["recnt", "did you mean 'recent'?", "it takes budget"]),
        ("h2o(25%, group=median)", ["mean, max"]),
        ("h2o(25%, budget=30%)", ["given twice"]),
        ("window(12, uniform, 13)", ["too many arguments", "it takes budget"]),
        ("int4(k_axis=chanel)", ["did you mean 'channel'?"]),
        ("int4(sink=-1)", ["whole number, 0 or more"]),
        ("sink_window(reindex=yes)", ["true or false"]),
        ("mixed(k=h2o)", ["not a codec"]),
        ("mixed(k=int9)", ["did you mean 'int"]),
        ("fp8(e4m3(1))", ["can't have arguments"]),
        ("window(0)", ["keeps nothing", "at least 1"]),
        ("window(0%)", ["keeps nothing"]),
        ("h2o(0MiB)", ["keeps nothing"]),
        ("h2o(101%)", ["more than the whole context", "100%"]),
        ("h2o(many)", ["not a budget", "25%", "64MiB"]),
        ("kvquant(3, outliers=1)", ["not a share", "1%"]),
        ("lowrank(0%)", ["holds nothing"]),
        ("lorc(50%, last=0%)", ["holds nothing"]),
        ("gear(int4, rank=0, outliers=0%)", ["repair nothing"]),
        ("gear(int4, rank=65)", ["more than the 64 tokens"]),
        ("turboquant(5)", ["2, 3, 4"]),
        ("h2o(4, sink=4)", ["leaves nothing beside 4 sinks"]),
        ("h2o(16, sink=8, recent=9)", ["exceed the budget"]),
        ("snapkv(16, window=32)", ["exceed the budget"]),
        ("snapkv(100, kernel=4)", ["odd"]),
        ("snapkv(100, window=0)", ["observes nothing"]),
        ("sink_window(sink=0)", ["window("]),
        ("window(8) | protect(sink=8) | int4", ["leaves nothing"]),
        ("int4 int8", ["'int8' is not expected there", "joined by '|'"]),
        ("int4 |", ["a name or a value is expected, not the end"]),
        ("int4(sink=4", ["',' or ')' is missing"]),
        ("h2o(recent=4, 25%)", ["needs a name"]),
        ("h2o(a(b)=4)", ["can't be the name"]),
        ("h2o(25%) | quest(25%) | int4", ["choose one of them", "h2o", "quest"]),
        ("quest(64MiB) | int4", ["how much is read", "25%"]),
        ("quest(25%, queries=0)", ["never reads a part"]),
        ("infllm(25%, representatives=65)", ["1 to 64"]),
        ("tier(device=64, host) | int4", ["too late"]),
        ("int4 | tier(device=64)", ["nothing below the device"]),
        ("int4 | tier(host)", ["'device' is missing"]),
        ("int4 | tier(device=64, host, host=9)", ["given twice"]),
        ("int4; drop table", ["can't read"]),
        ("", ["empty plan", "'full'"]),
        ("   ", ["empty plan"]),
    ],
)
def test_what_is_wrong_is_named(text: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(text)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_every_misspelt_method_is_led_back() -> None:
    for name in [*(name for stage in STAGES for name in methods(stage)), "protect", "hybrid"]:
        with pytest.raises(PlanError, match="did you mean"):
            Plan.parse(f"{name}x(1)")


def test_a_strategy_that_is_misspelt_is_led_back() -> None:
    with pytest.raises(PlanError, match="did you mean 'selective_int8'"):
        resolve("selective_int18")


def test_every_strategy_of_the_catalog_reads_and_prints() -> None:
    for strategy in STRATEGIES.values():
        assert str(Plan.parse(strategy.plan)) == strategy.plan
        assert all(resolve(name) == resolve(strategy.plan) for name in (strategy.name, *strategy.also))
        assert strategy.summary
    for stage in set(STAGES) - {"store"}:
        for name in methods(stage):
            assert any(s.plan.startswith(f"{name}(") or f"| {name}(" in s.plan for s in STRATEGIES.values()), name


def test_what_strategies_change() -> None:
    changes = {
        name: STRATEGIES[name].changes
        for name in (
            "full",
            "window",
            "int4",
            "h2o_int4",
            "hybrid",
            "selective_int8",
            "quest_int4",
            "minicache_int8",
            "retrieval",
        )
    }
    assert changes == {
        "full": "nothing",
        "window": "which tokens stay",
        "int4": "how tokens are held",
        "h2o_int4": "both",
        "hybrid": "how tokens are held",
        "selective_int8": "how tokens are held",
        "quest_int4": "what is read",
        "minicache_int8": "which layers hold tokens",
        "retrieval": "where tokens are",
    }


def test_layers_have_the_codecs_that_are_named_for_them() -> None:
    plan = Plan.parse("layers(0-1+4=int8, 3=fp8(e5m2)) | int4(sink=2)")
    names = [plan.layer(index, 6).store.name for index in range(6)]
    assert names == ["int8", "int8", "int4", "fp8", "int8", "int4"]
    assert [plan.layer(index, 6).sink for index in range(6)] == [4, 4, 2, 0, 4, 2]
    with pytest.raises(PlanError, match=r"no layer 4; this model's are 0 to 3"):
        plan.layer(0, 4)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'int4' is taken"):
        register("keep", "int4")(object)
