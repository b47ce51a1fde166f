"""The public names: listed, typed, and documented with examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
from runs import one_thread as one_thread

import wanda_fast

PUBLIC = ("ActivationStats", "PruningPlan", "calibrate", "evaluate", "load_pruned", "prune", "score")


def function_of(name: str) -> Any:
    """The object that carries the text: of a module that can be called its function."""
    found = getattr(wanda_fast, name)
    return vars(found)[name] if inspect.ismodule(found) else found


def examples() -> list[doctest.DocTest]:
    """Of every function and class that a module of the package defines."""
    parser = doctest.DocTestParser()
    found = []
    for info in pkgutil.iter_modules(wanda_fast.__path__, "wanda_fast."):
        if info.name.split(".")[-1].startswith("_"):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == info.name and isinstance(getattr(value, "__doc__", None), str):
                test = parser.get_doctest(value.__doc__, dict(vars(module)), f"{info.name}.{name}", module.__file__, 0)
                if test.examples:
                    found.append(test)
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("test", EXAMPLES, ids=[t.name.removeprefix("wanda_fast.") for t in EXAMPLES])
def test_examples_run(test: doctest.DocTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the printed values are those of a CPU
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert result.attempted > 0 and result.failed == 0, "".join(said)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_listed_typed_and_documented(name: str) -> None:
    assert name in wanda_fast.__all__
    found = function_of(name)
    assert any((t.docstring or "") == found.__doc__ for t in EXAMPLES), "no example"
    signature = inspect.signature(found)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
    if inspect.isfunction(found):
        assert signature.return_annotation is not inspect.Signature.empty


def test_every_listed_name_is_there() -> None:
    for name in wanda_fast.__all__:
        assert getattr(wanda_fast, name) is not None
