"""One module for each operation: checks, NumPy reference and kernel launch.

Dimension letters, here and in kernels_cu: L layers, B sequences, T tokens, S context length,
HQ query heads, H KV heads, G = HQ / H, D head size, N pages, P tokens a page, M pages a sequence at
most, E features of a token, V vocabulary.

`pykv.ops.norm` works without an import of its own: a module is imported when it is first asked for.
"""

from functools import cache as _cache
from importlib import import_module as _import_module
from pkgutil import iter_modules as _iter_modules
from types import ModuleType as _ModuleType


@_cache
def _names() -> frozenset[str]:
    return frozenset(module.name for module in _iter_modules(__path__))


def __getattr__(name: str) -> _ModuleType:
    if name in _names():
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_names()})
