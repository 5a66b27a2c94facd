"""`--sink-size` and `--window-size`: the sinks and the window of any plan, without rewriting it."""

from dataclasses import replace
from typing import Any

from kvfold.errors import PlanError
from kvfold.plan import Call, Plan, Protect
from kvfold.registry import fields_of, methods

# What a keep policy calls its window.
_WINDOW_NAMES = ("window", "recent")


def with_sizes(plan: Plan, sink: int | None, window: int | None) -> Plan:
    """The plan with other sizes; None leaves one as it is.

    A keep policy or a read stage gets them as its own arguments. A plan that only has a codec gets `protect(sink=, window=)`.
    PlanError when the plan has no place for a size, or when the sizes don't work.
    """
    for name, size in (("sink", sink), ("window", window)):
        if size is not None:
            plan = _with_size(plan, name, size)
    return plan


def _with_size(plan: Plan, name: str, size: int) -> Plan:
    calls = list(plan.calls)
    for i, call in enumerate(calls):
        if (cls := (methods("keep") | methods("read")).get(call.name)) and (argument := _argument(call.name, cls, name)):
            calls[i] = _with_argument(call, cls, argument, str(size))
            return _parsed(calls)
    if plan.store.name == "dense" and plan.protect is None:
        raise PlanError(f"--{name}-size: the plan '{plan}' has no {name}; try sink_window, or a codec such as int4")
    at = next((i for i, call in enumerate(calls) if call.name == "protect"), None)
    if at is None:
        # What the codec itself wants dense stays, unless it is this that changes.
        store = plan.store
        kept_sink = plan.keep.sink if plan.keep else store.sink
        at = next(i for i, call in enumerate(calls) if call.name in ("hybrid", "layers") or call.name in methods("store"))
        calls.insert(at, Call("protect", (("sink", str(kept_sink)), ("window", str(store.window)))))
    calls[at] = _with_argument(calls[at], Protect, name, str(size))
    return _parsed(calls)


def _argument(method: str, cls: type, name: str) -> str | None:
    """What a keep policy calls its sinks or its window; None when it has none."""
    fields = fields_of(cls)
    if name == "window" and method == "window":
        return "budget"
    candidates = _WINDOW_NAMES if name == "window" else (name,)
    return next((candidate for candidate in candidates if candidate in fields), None)


def _with_argument(call: Call, cls: type, name: str, value: str) -> Call:
    """The call with one argument set, where it stood if it was there already."""
    position = list(fields_of(cls)).index(name)
    args: list[tuple[str | None, Any]] = list(call.args)
    for i, (key, _) in enumerate(args):
        if key == name or (key is None and i == position):
            args[i] = (key, value)
            return replace(call, args=tuple(args))
    return replace(call, args=(*args, (name, value)))


def _parsed(calls: list[Call]) -> Plan:
    return Plan.parse(" | ".join(map(str, calls)))
