"""The plan language: which tokens stay, how they are held.

    full
    int4
    sink_window(sink=4, window=1020)
    protect(sink=16, window=32) | int8
    h2o(25%) | kivi(int2)
    hybrid(edge=2, edge_store=int8) | int4
    layers(0-1+17=int8, 5=int2) | int4
    quest(25%) | int4 | tier(device=4096, host=16384, disk)
    protect(sink=16, window=32) | int8 | minicache(start=50%)

A plan reads from left to right as tokens flow: a keep policy or what is read of all tokens, what is protected from the
codec, exceptions for some layers, a codec, what layers share, where blocks live. Each part may be left out. Names and
arguments are those of the methods in the packages of the stages (kvfold.keep, kvfold.store …); their dataclass fields are
the grammar, so that a new method needs no line here.
"""

import re
import typing
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, TypeVar

from kvfold.budget import WHOLE, Budget, LayerSplit, Room
from kvfold.errors import PlanError
from kvfold.keep.base import Keep, Pins, Share
from kvfold.percent import Percent
from kvfold.read.base import Read
from kvfold.registry import STAGES, fields_of, methods, nearest
from kvfold.share.base import Sharing
from kvfold.store.base import Store
from kvfold.store.dense import Dense
from kvfold.tier.tier import Tier

_TOKEN = re.compile(r"\s*(?:([A-Za-z0-9_.%+-]+)|([()|=,]))")
_MAX_DEPTH = 8  # codecs take codecs, so that depth has no natural end, but Python's stack does


@dataclass(frozen=True)
class Call:
    """`name(argument, key=value)` as it was written."""

    name: str
    args: tuple[tuple[str | None, "str | Call"], ...] = ()

    def __str__(self) -> str:
        if not self.args:
            return self.name
        return f"{self.name}({', '.join(str(v) if k is None else f'{k}={v}' for k, v in self.args)})"


@dataclass(frozen=True)
class Protect:
    """Dense tokens beside a codec: the first `sink`, and at least the last `window`."""

    sink: int = 0
    window: int = 0


@dataclass(frozen=True)
class Hybrid:
    """Another codec for the first and the last `edge` layers, where errors cost most."""

    edge: int = 2
    edge_store: Store = field(default_factory=Dense)


@dataclass(frozen=True)
class Layers:
    """Other codecs for some layers: `layers(0-1+17=int8, 5=int2)`.

    Attributes:
        exceptions: first layer, last layer, codec; no layer is in two of them.
    """

    exceptions: tuple[tuple[int, int, Store], ...]

    @staticmethod
    def build(call: Call) -> "Layers":
        """Reads the call. PlanError when a layer is no number, or is named twice."""
        exceptions: list[tuple[int, int, Store]] = []
        for key, value in call.args:
            if key is None:
                raise PlanError(f"layers: '{value}' needs its layers, as in layers(0-1+17={value})")
            store = _store("layers", key, value)
            for span in key.split("+"):
                ends = span.split("-")
                if len(ends) > 2 or not all(WHOLE.fullmatch(end) for end in ends) or int(ends[0]) > int(ends[-1]):
                    raise PlanError(f"layers: '{key}' names no layers; write numbers and ranges, as in 0-1+17")
                first, last = int(ends[0]), int(ends[-1])
                if any(first <= b and a <= last for a, b, _ in exceptions):
                    raise PlanError(f"layers: '{span}' names a layer that has a codec already")
                exceptions.append((first, last, store))
        if not exceptions:
            raise PlanError("layers: which layers, and how? As in layers(0-1+17=int8)")
        return Layers(tuple(exceptions))

    def store(self, index: int, num_layers: int) -> Store | None:
        """The codec of a layer, if it has one of its own."""
        highest = max(last for _, last, _ in self.exceptions)
        if highest >= num_layers:
            raise PlanError(f"layers: there is no layer {highest}; this model's are 0 to {num_layers - 1}")
        return next((store for first, last, store in self.exceptions if first <= index <= last), None)


ALONE = ("full", "transformers")
"""Plans of one word: everything as it is, in kvfold's cache, or in transformers' own."""


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does."""

    keep: Keep | None
    store: Store
    sink: int
    window: int
    read: Read | None = None
    tier: Tier | None = None
    pins: Pins = ()

    @property
    def scored(self) -> bool:
        """Whether dense tokens carry a number."""
        return bool((self.keep and self.keep.scored) or (self.read and self.read.scored))


@dataclass(frozen=True)
class Plan:
    """A recipe for a cache. Make one with `Plan.parse`; `str(plan)` is the text it was made from, spaces aside."""

    calls: tuple[Call, ...]
    keep: Keep | None = None
    protect: Protect | None = None
    hybrid: Hybrid | None = None
    layers: Layers | None = None
    store: Store = field(default_factory=Dense)
    read: Read | None = None
    share: Sharing | None = None
    tier: Tier | None = None

    @staticmethod
    def parse(text: str) -> "Plan":
        """Reads and checks a plan. Raises PlanError, whose message names the nearest known word."""
        calls = _Reader(text).plan()
        if len(calls) == 1 and calls[0].name in ALONE and not calls[0].args:
            return Plan(calls)
        parts: dict[str, Any] = {}
        for call in calls:
            stage, value = _stage(call)
            if stage in parts:
                raise PlanError(f"'{text}' has two {stage} stages; a plan has at most one")
            if any(_ORDER.index(later) > _ORDER.index(stage) for later in parts):
                raise PlanError(f"'{call.name}' comes too late in '{text}': the order is {' | '.join(ORDER)}")
            parts[stage] = value
        if "hybrid" in parts and "layers" in parts:
            raise PlanError("'hybrid' and 'layers' both choose codecs by layer; name the layers in one of them")
        for name, example in (("protect", "protect"), ("hybrid", "hybrid"), ("layers", "layers(0=int8)")):
            if name in parts and "store" not in parts:
                raise PlanError(f"'{name}' needs a codec to its right, as in '{example} | int4'")
        plan = Plan(calls, **parts)
        plan._check_together()
        return plan

    def __str__(self) -> str:
        return " | ".join(map(str, self.calls))

    @property
    def leaves_to_transformers(self) -> bool:
        """Whether the model keeps its own cache and attention, to compare with."""
        return self.calls[0].name == "transformers"

    def _check_together(self) -> None:
        """Raises PlanError for stages that can't be in one plan."""
        if self.keep and self.read:
            raise PlanError(f"'{self.keep.name}' drops tokens and '{self.read.name}' reads a part of all: choose one of them")
        if (keep := self.keep) and keep.budget.unit == "tokens":
            sink = self._sink(self.store, keep, None)
            if keep.budget.value <= sink:
                raise PlanError(f"{keep.name}: a budget of {keep.budget} leaves nothing beside {sink} dense sinks")
        if (keep := self.keep) and keep.budget.unit == "bytes" and len(keep.layers.weights) > 1 and self.hybrid:
            raise PlanError(
                f"{keep.name}: layers={keep.layers} splits {keep.budget} by what a token costs, which hybrid changes"
            )
        if self.share and self.keep and self.keep.reconstructs:
            raise PlanError(
                f"'{self.keep.name}' has each layer read a chunk twice, which '{self.share.name}' can't: choose one"
            )
        if self.share and self.share.merges:
            name = self.share.name
            if self.keep:
                raise PlanError(
                    f"'{name}' needs the same tokens in both layers of a pair, and '{self.keep.name}' chooses by layer"
                )
            if self.read:
                raise PlanError(f"'{self.read.name}' can't choose among the merged blocks of '{name}': leave one of them out")
            if self.tier:
                raise PlanError(f"'{name}' merges blocks of two layers, which 'tier' can't move: leave one of them out")

    def layer(self, index: int, num_layers: int) -> LayerPlan:
        """What the layer `index` of `num_layers` attention layers does."""
        store = self.store
        if self.hybrid and index in self._edges(num_layers):
            store = self.hybrid.edge_store
        if self.layers:
            store = self.layers.store(index, num_layers) or store
        keep = self.keep if self.keep and index >= self.keep.skip else None
        if keep:
            keep.layers.over(num_layers)  # says so where there are too many weights
        read = self.read if self.read and index >= self.read.skip else None
        window = (self.protect or store).window
        return LayerPlan(keep, store, self._sink(store, keep, read), window, read, self.tier)

    def _sink(self, store: Store, keep: Keep | None, read: Read | None) -> int:
        """The first tokens that a layer holds dense for ever: what any stage wants, `protect` instead of the codec.

        A window is exactly that, whatever codec it has; every other policy pins what the codec wants to stay dense.
        """
        if keep and keep.strict and not self.protect:
            return keep.sink
        return max((self.protect or store).sink, keep.sink if keep else 0, read.sink if read else 0)

    def groups(self, num_layers: int) -> list[tuple[int, ...]]:
        """Layers that share one cache, the first of each group first. Those with a codec of their own stay alone."""
        own = self._edges(num_layers)
        if self.layers:
            own |= {i for i in range(num_layers) if self.layers.store(i, num_layers)}
        return self.share.groups(num_layers, own) if self.share else []

    def _edges(self, num_layers: int) -> set[int]:
        edge = self.hybrid.edge if self.hybrid else 0
        return {i for i in range(num_layers) if min(i, num_layers - 1 - i) < edge}


ORDER = ("keep", "protect", "hybrid", "layers", "store", "share", "tier")
_ORDER = ("keep", "read", *ORDER[1:])
_ROOMS = [name for name, hint in typing.get_type_hints(Tier).items() if hint is Room]
_PARTS: dict[str, type] = {"protect": Protect, "hybrid": Hybrid}

T = TypeVar("T")


def _stage(call: Call) -> tuple[str, Any]:
    if call.name == "layers":
        return call.name, Layers.build(call)
    if call.name in _PARTS:
        return call.name, _build(call, _PARTS[call.name])
    for stage in STAGES:
        if cls := methods(stage).get(call.name):
            return stage, _build(call, cls)
    if call.name in ALONE:
        raise PlanError(f"'{call.name}' keeps everything as it is: it stands alone, without arguments")
    known = [*ALONE, *_PARTS, "layers", *(name for stage in STAGES for name in methods(stage))]
    raise PlanError(f"unknown method '{call.name}'{nearest(call.name, known)} ('kvfold strategies' lists all)")


def _build(call: Call, cls: type[T]) -> T:
    """Turns the arguments of a call into the dataclass `cls`."""
    fields = fields_of(cls)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for position, (key, value) in enumerate(call.args):
        if key is None and hints.get(str(value)) is Room:  # the bare name of a place: all that is left
            key, value = str(value), _ALL
        if key is None:
            if position >= len(fields):
                raise PlanError(f"{call.name}: too many arguments; it takes {', '.join(fields) or 'none'}")
            key = list(fields)[position]
        if key not in fields:
            takes = f"it takes {', '.join(fields)}" if fields else "it takes none"
            raise PlanError(f"{call.name}: unknown argument '{key}'{nearest(key, fields)} ({takes})")
        if key in values:
            raise PlanError(f"{call.name}: '{key}' is given twice")
        values[key] = Room(used=True) if value is _ALL else _convert(call.name, key, value, hints[key])
    for name, f in fields.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise PlanError(f"{call.name}: '{name}' is missing, as in {call.name}({_EXAMPLE.get(hints[name], '…')})")
    built = cls(**values)
    if isinstance(built, (Keep, Read, Store, Sharing, Tier)):
        built.check()
    return built


_ALL = "all that is left"
_PARSED = (Budget, Share, Percent, Room)
_EXAMPLE: dict[Any, str] = {Budget: "25%"}


def _convert(method: str, key: str, value: "str | Call", hint: Any) -> Any:
    where = f"{method}: {key}={value}"
    if hint is LayerSplit:
        call = value if isinstance(value, Call) else Call(value)
        try:
            return LayerSplit.parse(call.name, [str(argument) for _, argument in call.args])
        except PlanError as error:
            raise PlanError(f"{method}: {error}") from None
    if hint is Store:
        return _store(method, key, value)
    if isinstance(value, Call):
        raise PlanError(f"{where} can't have arguments of its own")
    if hint in _PARSED:
        try:
            return hint.parse(value)
        except PlanError as error:
            raise PlanError(f"{method}: {error}") from None
    if hint is bool:
        if value in ("true", "false"):
            return value == "true"
        raise PlanError(f"{where}: write true or false")
    if hint is int:
        if WHOLE.fullmatch(value):
            return int(value)
        raise PlanError(f"{where}: write a whole number, 0 or more, of nine digits at most")
    if typing.get_origin(hint) is Literal:
        for choice in typing.get_args(hint):
            if value == str(choice):
                return choice
        choices = [str(c) for c in typing.get_args(hint)]
        raise PlanError(f"{where}: write one of {', '.join(choices)}{nearest(value, choices)}")
    raise TypeError(f"the plan language has no values of type {hint}")


def _store(method: str, key: str, value: "str | Call") -> Store:
    """A codec that is an argument."""
    call = value if isinstance(value, Call) else Call(value)
    if call.name not in methods("store"):
        raise PlanError(f"{method}: {key}={value}: '{call.name}' is not a codec{nearest(call.name, methods('store'))}")
    built: Store = _build(call, methods("store")[call.name])
    return built


class _Reader:
    """A recursive descent parser: plan = call {'|' call}; call = name ['(' [arg {',' arg}] ')']; arg = [name '='] call."""

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[str] = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if not match:
                raise PlanError(f"'{text}': can't read '{text[at:].strip()[:12]}'")
            self.tokens.append(match[1] or match[2])
            at = match.end()
        self.at = 0

    def plan(self) -> tuple[Call, ...]:
        if not self.tokens:
            raise PlanError("an empty plan; write 'full' to keep everything as it is")
        calls = [self._call()]
        while self._take("|"):
            calls.append(self._call())
        if self.at < len(self.tokens):
            raise PlanError(f"'{self.text}': '{self.tokens[self.at]}' is not expected there; stages are joined by '|'")
        return tuple(calls)

    def _call(self, depth: int = 0) -> Call:
        name = self._word()
        if not self._take("("):
            return Call(name)
        if depth == _MAX_DEPTH:
            raise PlanError(f"'{name}(…': parentheses are nested more than {_MAX_DEPTH} deep")
        args: list[tuple[str | None, str | Call]] = []
        while not self._take(")"):
            if args and not self._take(","):
                raise PlanError(f"'{self.text}': a ',' or ')' is missing after '{args[-1][1]}'")
            word = self._call(depth + 1)
            if self._take("="):
                if word.args:
                    raise PlanError(f"'{self.text}': '{word}' can't be the name of an argument")
                value = self._call(depth + 1)
                args.append((word.name, value if value.args else value.name))
            else:
                if any(key for key, _ in args) and word.name not in _ROOMS:
                    raise PlanError(f"'{self.text}': '{word}' needs a name, as it comes after a named argument")
                args.append((None, word if word.args else word.name))
        return Call(name, tuple(args))

    def _word(self) -> str:
        if self.at == len(self.tokens) or self.tokens[self.at] in "()|=,":
            found = f"'{self.tokens[self.at]}'" if self.at < len(self.tokens) else "the end"
            raise PlanError(f"'{self.text}': a name or a value is expected, not {found}")
        self.at += 1
        return self.tokens[self.at - 1]

    def _take(self, mark: str) -> bool:
        if self.at < len(self.tokens) and self.tokens[self.at] == mark:
            self.at += 1
            return True
        return False
