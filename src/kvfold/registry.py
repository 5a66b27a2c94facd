"""The methods that plans can name. A method registers itself where it is written, and then it is in every command."""

import dataclasses
import difflib
import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, TypeVar

Stage = Literal["keep", "read", "store", "share", "tier"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)
T = TypeVar("T", bound=type)

_METHODS: dict[Stage, dict[str, type]] = {stage: {} for stage in STAGES}


def register(stage: Stage, name: str) -> Callable[[T], T]:
    """Class decorator: makes a method of a stage known to plans under `name`. A name is taken once."""

    def add(cls: T) -> T:
        for methods in _METHODS.values():
            if name in methods:
                raise ValueError(f"the name '{name}' is taken by {methods[name].__qualname__}")
        cls.name = name  # type: ignore[attr-defined]
        _METHODS[stage][name] = cls
        return cls

    return add


@cache
def _import_all() -> None:
    """Every module of the stage packages is a method: importing them is what registers it."""
    for stage in STAGES:
        package = importlib.import_module(f"kvfold.{stage}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def methods(stage: Stage) -> dict[str, type]:
    """Name to class, for every method of a stage."""
    _import_all()
    return dict(_METHODS[stage])


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known word is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def fields_of(cls: Any) -> dict[str, Any]:
    """The arguments of a method: name to dataclass field."""
    return {field.name: field for field in dataclasses.fields(cls)}
