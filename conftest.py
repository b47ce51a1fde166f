"""Plain `pytest` skips benchmarks; `pytest --benchmark-only` runs nothing else.

`--benchmark-skip` in the settings would do the first and forbid the second: pytest-benchmark refuses the two flags together.
"""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    asked = any(getattr(option, f"benchmark_{name}", False) for name in ("only", "enable", "disable"))
    if hasattr(option, "benchmark_skip") and not asked:
        option.benchmark_skip = True
