"""Smaller, faster diffusion UNets without training: whole channels scored by S = |W| * ||X||_2, removed, repaired.

Public names are loaded when first used: importing the package costs nothing and touches no GPU.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "ActivationStats",
    "PruneResult",
    "PrunedDiTTransformer2DModel",
    "PrunedPixArtTransformer2DModel",
    "PrunedUNet2DConditionModel",
    "PrunedUNet2DModel",
    "PruningPlan",
    "UserError",
    "__version__",
    "calibrate",
    "evaluate",
    "load_pruned",
    "ops",
    "prune",
    "repair",
    "score",
]

# Public name -> (submodule, attribute); None is the submodule itself, which for all but `ops` can be called.
_LAZY: dict[str, tuple[str, str | None]] = {
    "ActivationStats": ("stats", "ActivationStats"),
    "PruneResult": ("pruning", "PruneResult"),
    # model_index.json of the free layout names this package, and diffusers looks here for the class and for its own base of it.
    "ModelMixin": ("pruned_unet", "ModelMixin"),
    "PrunedDiTTransformer2DModel": ("pruned_unet", "PrunedDiTTransformer2DModel"),
    "PrunedPixArtTransformer2DModel": ("pruned_unet", "PrunedPixArtTransformer2DModel"),
    "PrunedUNet2DConditionModel": ("pruned_unet", "PrunedUNet2DConditionModel"),
    "PrunedUNet2DModel": ("pruned_unet", "PrunedUNet2DModel"),
    "PruningPlan": ("plan", "PruningPlan"),
    "UserError": ("errors", "UserError"),
    "calibrate": ("calibrate", None),
    "evaluate": ("evaluation", "evaluate"),
    "load_pruned": ("checkpoint", "load_pruned"),
    "ops": ("ops", None),
    "prune": ("pruning", "prune"),
    "repair": ("repair", None),
    "score": ("score", None),
}

if TYPE_CHECKING:
    from wanda_fast import ops
    from wanda_fast.calibrate import calibrate
    from wanda_fast.checkpoint import load_pruned
    from wanda_fast.errors import UserError
    from wanda_fast.evaluation import evaluate
    from wanda_fast.plan import PruningPlan
    from wanda_fast.pruned_unet import (
        PrunedDiTTransformer2DModel,
        PrunedPixArtTransformer2DModel,
        PrunedUNet2DConditionModel,
        PrunedUNet2DModel,
    )
    from wanda_fast.pruning import PruneResult, prune
    from wanda_fast.repair import repair
    from wanda_fast.score import score
    from wanda_fast.stats import ActivationStats


def _bind_kernels() -> None:
    """Bind `wanda_fast.kernels` to the folder beside the package, in editable and uninstalled runs.

    An installed package holds the files itself. The folder has no __init__.py: a top-level package `kernels` would hide
    Hugging Face's whenever Python starts in the repository root.
    """
    here = Path(__file__).resolve().parent
    folder = here.parent / "kernels"
    name = f"{__name__}.kernels"
    if (here / "kernels").is_dir() or not folder.is_dir() or name in sys.modules:
        return
    from importlib.util import module_from_spec

    spec = ModuleSpec(name, loader=None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = module_from_spec(spec)
    globals()["kernels"] = sys.modules[name]


_bind_kernels()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    submodule, attribute = _LAZY[name]
    module = import_module(f"{__name__}.{submodule}")
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
