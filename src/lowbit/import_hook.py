"""Tell transformers about lowbit as soon as both are there, and import neither for that.

`import lowbit` costs a millisecond, so it may not import transformers; and transformers asks its tables for
quantizers, so lowbit must be in them before a model is loaded. The tables are in one module of transformers:
where that is imported already, lowbit is entered at once, else right after it has run.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TABLES = "transformers.quantizers.auto"


def install() -> None:
    """Enter lowbit into transformers' tables, now or when they come to be."""
    if TABLES in sys.modules:
        _enter()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter() -> None:
    try:
        from lowbit.interop.transformers import register

        register()
    except (ImportError, AttributeError) as error:
        import warnings

        warnings.warn(
            f"lowbit: this transformers cannot load lowbit models ({error}); install 4.56 or later",
            stacklevel=2,
        )


class _Finder:
    """Finds the one module as the finders behind it do, and lends it a loader that calls `_enter`."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLES or self not in sys.meta_path:
            return None
        import importlib.util

        sys.meta_path.remove(self)  # once; and so that the call below does not come back here
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """The module's own loader, and a call after it."""

    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # as if it had never been lent
        self._loader.exec_module(module)
        _enter()
