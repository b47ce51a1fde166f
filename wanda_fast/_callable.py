"""Modules that can be called like the one function they are named after: `wanda_fast.score(w, n)` and `wanda_fast.score.score`.

Importing a submodule binds its name in the package, so `wanda_fast.score` can only ever be the module; it is given a
`__call__` instead. Write `make_callable(__name__)` as the last line of such a module.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module whose call is a call of its function of the same name, looked up each time."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]](*args, **kwargs)


def make_callable(name: str) -> None:
    """Make the imported module `name` callable; it must define a function of its own last name."""
    module = sys.modules[name]
    function = vars(module)[name.rpartition(".")[2]]
    module.__class__ = CallableModule
    vars(module)["__signature__"] = inspect.signature(function)
