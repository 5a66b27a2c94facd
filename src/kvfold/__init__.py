"""kvfold: a compressed key-value cache for language models.

    model, tokenizer = kvfold.load("smollm2-135m")
    cache = kvfold.cache(model, "protect(sink=16, window=32) | int4")
    model.generate(**inputs, past_key_values=cache, max_new_tokens=200)
    print(cache.memory())

Importing kvfold is cheap and changes nothing in torch or transformers.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvfold.kv_cache import KVCache
    from kvfold.models.adapter import attach, cache, detach
    from kvfold.models.load import load
    from kvfold.persist import load_cache
    from kvfold.plan import Plan

__all__ = ["KVCache", "Plan", "attach", "cache", "detach", "load", "load_cache"]

_HOME = {
    "KVCache": "kvfold.kv_cache",
    "Plan": "kvfold.plan",
    "attach": "kvfold.models.adapter",
    "cache": "kvfold.models.adapter",
    "detach": "kvfold.models.adapter",
    "load": "kvfold.models.load",
    "load_cache": "kvfold.persist",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `import kvfold` alone does not load torch."""
    import importlib

    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kvfold' has no attribute '{name}'")
