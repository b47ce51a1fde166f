"""Open and save diffusers folders: every check before heavy work, safetensors and JSON only, all or nothing on disk.

Opening. :func:`load_pipeline` reads a folder in any of these forms, or a hub id, or the bundled model:

- a ``DDPMPipeline`` folder (``model_index.json``) with the network in ``unet/`` or at the root,
- a bare ``UNet2DModel`` folder (``config.json`` and safetensors),
- a folder that this project wrote, in ``stock`` or ``free`` layout,
- the network of a text-to-image or transformer pipeline (``unet/`` or ``transformer/``), bare or inside its pipeline's
  folder. Only the network is read; saving copies the pipeline's other parts as they are.

Saving, ``stock`` layout. The network lies at the root and ``model_index.json`` names it. diffusers looks for a part of
a pipeline in the subfolder of its name and falls back to the root where there is none, so one copy of the weights
serves both ``UNet2DModel.from_pretrained(dir)`` and ``DDPMPipeline.from_pretrained(dir)``.

Saving, ``free`` layout. Widths differ per slot, which the constructor of ``UNet2DModel`` cannot express: it knows one
width per level. ``config.json`` therefore names ``PrunedUNet2DModel`` and holds the dense configuration and the pruning
record; ``model_index.json`` names ``wanda_fast``, so stock diffusers stops with that name. Its classes do not look at the
names: where ``UNet2DModel.from_pretrained`` reads the widths of the levels, ``config.json`` has a sentence (`SIGNPOST`), which the
constructor quotes and refuses. :func:`load_pruned` opens it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .inner_slots import INNER_CLASSES, base_class
from .sampling import check_schedule

ASSETS = Path(__file__).resolve().parent / "assets"
BUNDLED_NAME = "ddpm-cifar10-small"
BUNDLED_MODEL = ASSETS / BUNDLED_NAME
BUNDLED_SAMPLES = ASSETS / f"{BUNDLED_NAME}-samples.png"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORKS = ("UNet2DModel", *INNER_CLASSES)  # each also with "Pruned" before it: the free layout
PARTS = ("unet", "transformer")  # names of the network in a pipeline

# Entry that the stock constructor refuses by quoting it, before any weight is read. The dense value is in the pruning record.
_SIGNPOSTED = {"UNet2DModel": "block_out_channels", "UNet2DConditionModel": "block_out_channels", "DiTTransformer2DModel": "norm_type",
               "PixArtTransformer2DModel": "norm_type"}  # fmt: skip
SIGNPOST = "this folder is pruned in the free layout, where widths differ inside a level; open it with wanda_fast.load_pruned(folder)"

MOST_TIMESTEPS = 100_000  # of a noise schedule; a damaged file must not ask for terabytes
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What `from_pretrained` needs and nothing else: no pickles, no images, no other weight formats.
_HUB_FILES = [
    "README.md",
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "scheduler/*.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model*.safetensors*",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model*.safetensors*",
    "diffusion_pytorch_model*.safetensors*",
]
# Names of attention weights before diffusers 0.15; google/ddpm-cifar10-32 and its sisters still use them.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class Loaded:
    """An opened model.

    Attributes:
        unet: in eval mode, every parameter in the asked dtype on the asked device.
        scheduler: as the folder describes it.
        name: short name, fit for a folder name.
        source: "bundled", "folder" or "hub".
        config: constructor arguments of the network; for the free layout those of its dense ancestor.
        path: the folder that was read.
        layout: "stock" or "free".
        notes: plain sentences that the user should see (a default that was filled in).
    """

    unet: nn.Module
    scheduler: Any
    name: str
    source: str
    config: dict[str, Any]
    path: Path
    layout: str = "stock"
    notes: list[str] = field(default_factory=list)


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    conditioned: bool = False,
) -> Loaded:
    """Open a model: None or "bundled" for the bundled one, a folder, or a hub id such as ``google/ddpm-cifar10-32``.

    Args:
        conditioned: whether a text-to-image or transformer network will do, which works on latents and reads conditioning.

    Raises:
        UserError: no such folder, no UNet2DModel in it, pickled weights only, a truncated file, missing, unexpected,
            misshapen or non-finite tensors (the first is named), an unsupported class, or a hub that cannot be reached.
    """
    folder, source, name = _locate(model)
    unet_dir, scheduler_file, notes = _find_parts(folder)
    config_file = unet_dir / "config.json"
    raw = without_signpost(_read_json(config_file))
    class_name = raw.get("_class_name", "UNet2DModel")
    if str(class_name).removeprefix("Pruned") not in NETWORKS:
        raise UserError(f"{config_file}: holds a {class_name}; only {', '.join(NETWORKS)} are supported.")
    if not conditioned and class_name not in ("UNet2DModel", "PrunedUNet2DModel"):
        raise UserError(f"{config_file}: holds a {class_name}; only UNet2DModel is supported here.")
    files = _weight_files(unet_dir)
    scheduler = _load_scheduler(scheduler_file)
    base = class_name.removeprefix("Pruned")
    free = class_name != base
    shapes = _weight_shapes(files)
    _check_counts(raw, config_file, len(shapes))
    # First on the meta device: a config that asks for other shapes than the file holds takes no memory.
    for target in ("meta", "cpu"):
        if free:
            unet, config = _build_free(raw, config_file, base, target)
        else:
            config = {k: v for k, v in raw.items() if not k.startswith("_")}
            unet = _build_stock(config, config_file, base, target)
        if target == "meta":
            _check_shapes(unet, shapes, unet_dir)
            if _is_all_in_the_file(unet):
                unet.to_empty(device="cpu")
                break
    _fill(unet, _read_weights(files), unet_dir)
    nn.Module.to(
        unet, device=device, dtype=dtype
    )  # the override of diffusers warns about a choice that is not made here
    unet.eval()
    return Loaded(
        unet=unet,
        scheduler=scheduler,
        name=name,
        source=source,
        config=config,
        path=folder,
        layout="free" if free else "stock",
        notes=notes,
    )


def load_pruned(
    folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """Open a folder that this project wrote, in either layout, as a ``DDPMPipeline``.

    A pruned text-to-image or transformer network is opened as the pipeline it was part of, or by itself where the folder
    holds nothing else.

    Stock diffusers opens the ``stock`` layout by itself. It cannot open the ``free`` one: there the widths differ from
    slot to slot, while the constructor of ``UNet2DModel`` knows one width per level. This function builds the dense
    shape, cuts every tensor to the recorded widths and then reads the weights, strictly. (Importing
    ``wanda_fast.pruned_unet`` first makes ``DDPMPipeline.from_pretrained`` work too, since the class is known then.)

    Raises:
        UserError: as :func:`load_pipeline`.

    Example:
        >>> import tempfile, wanda_fast
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = wanda_fast.prune(pruner="magnitude", split="uniform", layout="free", repair="none", num_samples=0,
        ...                               batch_size=2, save_path=f"{folder}/small")
        ...     pipeline = wanda_fast.load_pruned(f"{folder}/small")
        >>> sum(p.numel() for p in pipeline.unet.parameters()) == result.report["pruned"]["params"]
        True
    """
    from diffusers import DDPMPipeline

    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder.")
    loaded = load_pipeline(folder, dtype=dtype, device=device, conditioned=True)
    if base_class(loaded.unet) in INNER_CLASSES:
        if not (Path(folder) / "model_index.json").is_file():
            return loaded.unet
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(folder).to(device, dtype)
    return DDPMPipeline(unet=loaded.unet, scheduler=loaded.scheduler)


# -------------------------------------------------------------------------------------------------------------- finding


def _locate(model: str | os.PathLike[str] | None) -> tuple[Path, str, str]:
    """Folder, source and short name of what the user asked for."""
    if model is None:
        return BUNDLED_MODEL, "bundled", BUNDLED_NAME
    text = os.fspath(model)
    path = Path(text).expanduser()
    if text == "bundled" and not path.exists():
        return BUNDLED_MODEL, "bundled", BUNDLED_NAME
    if path.is_dir():
        resolved = path.resolve()
        return path, "folder", (resolved.parent.name if resolved.name in PARTS else resolved.name) or "model"
    if path.is_file():
        if path.suffix in _PICKLE_SUFFIXES:
            raise UserError(_pickle_message(str(path)))
        raise UserError(f"{text}: is a file; give the folder with model_index.json or config.json.")
    if not _HUB_ID.fullmatch(text):
        raise UserError(f"{text}: no such folder, and not a hub id (owner/name) either.")
    return _download(text), "hub", text.split("/")[1]


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types when it is offline
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{hub_id}: no such folder here, and the hub did not deliver it ({type(error).__name__}: {reason[:160]}). "
            f"Without a network: "
            f"download the model elsewhere (model_index.json, scheduler, config.json, {WEIGHTS}) and give that folder."
        ) from error


def _pickle_message(where: str) -> str:
    return (
        f"{where}: only pickled weights, which can run arbitrary code when opened, so they are refused. Convert where "
        f"you trust the "
        "file: UNet2DModel.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)."
    )


def _find_parts(folder: Path) -> tuple[Path, Path | None, list[str]]:
    """(folder of the network, scheduler file or None, notes)."""
    index_file = folder / "model_index.json"
    notes: list[str] = []
    if index_file.is_file():
        index = _read_json(index_file)
        where = next((p for p in PARTS if isinstance(index.get(p), list)), "unet")
        part = index.get(where)
        if not isinstance(part, list) or len(part) != 2:
            raise UserError(
                f"{index_file}: this pipeline ({index.get('_class_name', 'unknown')}) has no unet; a UNet2DModel is "
                f"needed."
            )
        base = str(part[1]).removeprefix("Pruned")
        if base not in NETWORKS:
            raise UserError(f"{index_file}: the {where} is a {part[1]}; only {', '.join(NETWORKS)} are supported.")
        extra = sorted(
            k for k, v in index.items() if isinstance(v, list) and k not in (where, "scheduler") and v != [None, None]
        )
        if extra and base not in INNER_CLASSES:
            raise UserError(f"{index_file}: parts besides unet and scheduler are not supported: {', '.join(extra)}.")
        unet_dir = folder / where if (folder / where).is_dir() else folder
        if not (unet_dir / "config.json").is_file():
            raise UserError(f"{unet_dir}: has no config.json, so there is no UNet2DModel to open.")
        for candidate in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
            if candidate.is_file():
                return unet_dir, candidate, notes
        raise UserError(f"{folder}: the pipeline has no scheduler/scheduler_config.json.")
    for unet_dir in (folder, *(folder / p for p in PARTS)):
        if (unet_dir / "config.json").is_file():
            homes = [folder, folder.resolve().parent] if folder.resolve().name in PARTS else [folder]
            for home in homes:
                for candidate in (home / "scheduler" / "scheduler_config.json", home / "scheduler_config.json"):
                    if candidate.is_file():
                        return unet_dir, candidate, notes
            notes.append(
                "The folder has no scheduler: DDPMScheduler with its defaults (1000 steps, linear betas) is used."
            )
            return unet_dir, None, notes
    if any(p.suffix in _PICKLE_SUFFIXES for p in folder.iterdir() if p.is_file()):
        raise UserError(_pickle_message(str(folder)))
    raise UserError(f"{folder}: has neither model_index.json nor config.json, so there is no UNet2DModel to open.")


def _weight_files(unet_dir: Path) -> list[Path]:
    """The safetensors files of a network: one, or the shards that an index names."""
    single = unet_dir / WEIGHTS
    if single.is_file():
        return [single]
    index_file = unet_dir / f"{WEIGHTS}.index.json"
    if index_file.is_file():
        names = _read_json(index_file).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index_file}: has no weight_map.")
        if not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{index_file}: its weight_map names no files.")
        files = [unet_dir / str(n) for n in sorted(set(names.values()))]
        for file in files:
            if file.parent != unet_dir or not file.is_file():
                raise UserError(f"{file}: named by {index_file.name}, but not there.")
        return files
    variants = sorted(unet_dir.glob("diffusion_pytorch_model.*.safetensors"))
    if len(variants) == 1:
        return variants
    pickles = sorted(p.name for p in unet_dir.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise UserError(_pickle_message(str(unet_dir / pickles[0])))
    found = f" (found {', '.join(p.name for p in variants)}: keep one)" if variants else ""
    raise UserError(f"{unet_dir}: has no {WEIGHTS}{found}.")


# -------------------------------------------------------------------------------------------------------------- reading


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad text or JSON, or a number of thousands of digits
        raise UserError(f"{file}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: is not a JSON object.")
    return value


def _read_weights(files: list[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: truncated or not a safetensors file ({error}).") from error
    return weights


def stored_dtype(folder: Path) -> torch.dtype:
    """Floating-point type of the weights on disk in a folder that :func:`load_pipeline` has opened: that of most
    numbers.
    """
    from safetensors import safe_open

    count: dict[torch.dtype, int] = {}
    for file in _weight_files(_find_parts(folder)[0]):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point():
                    count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
    return max(count, key=lambda dtype: count[dtype], default=torch.float32)


def _empty_unet(config: Mapping[str, Any], device: str, base: str = "UNet2DModel") -> Any:
    """A stock or free network of this config; on the meta device it costs no memory."""
    from . import compact

    if "pruning" in config:
        dense = {k: v for k, v in config.items() if k != "pruning"}
        return compact.build_free(dense, config["pruning"], device=device, base=base)
    return compact.new_unet(config, device, base)


def _build_stock(config: Mapping[str, Any], config_file: Path, base: str, device: str) -> nn.Module:
    try:
        return _empty_unet(config, device, base)
    except Exception as error:  # any constructor error means that this config describes no network
        raise UserError(f"{config_file}: {_no_network(base, error)}") from error


def _no_network(class_name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return f"no {class_name} can be built from it ({type(error).__name__}: {reason[0] if reason else ''})."


def _build_free(raw: Mapping[str, Any], config_file: Path, base: str, device: str) -> tuple[nn.Module, dict[str, Any]]:
    config = {k: v for k, v in raw.items() if not k.startswith("_") and k != "pruning"}
    record = raw.get("pruning")
    if not isinstance(record, dict):
        raise UserError(f"{config_file}: a Pruned{base} needs the entry pruning.")
    try:
        return _empty_unet({**config, "pruning": record}, device, base), config
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error
    except Exception as error:  # the config describes no network
        raise UserError(f"{config_file}: {_no_network(f'Pruned{base}', error)}") from error


def _modern_names(weights: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
    """Rename the attention weights of old checkpoints (query → to_q, …) where the new name is one that the network
    has.
    """
    renamed = {}
    for name, tensor in weights.items():
        parts = name.rsplit(".", 2)
        if name not in wanted and len(parts) == 3 and parts[1] in _OLD_ATTENTION:
            candidate = f"{parts[0]}.{_OLD_ATTENTION[parts[1]]}.{parts[2]}"
            name = candidate if candidate in wanted else name
        renamed[name] = tensor
    return renamed


def _weight_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in safetensors files, from their headers alone."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                shapes.update({n: tuple(weights.get_slice(n).get_shape()) for n in weights.keys()})
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: truncated or not a safetensors file ({error}).") from error
    return shapes


# Entries of a config that repeat layers, and those that size a table which is worked out while the network is built.
_COUNTS = ("layers_per_block", "num_layers", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
_SIDES = ("sample_size", "patch_size", "interpolation_scale")


def _check_counts(config: Mapping[str, Any], config_file: Path, tensors: int) -> None:
    """Refuse, before a network is built even on the meta device, numbers that building it would take hours or all memory for."""

    def numbers(value: Any, depth: int = 0) -> Iterator[float]:
        if isinstance(value, (list, tuple)) and depth < 4:
            for part in value:
                yield from numbers(part, depth + 1)
        elif isinstance(value, (int, float)):
            yield abs(value)

    for keys, most in ((_COUNTS, tensors), (_SIDES, 8192)):
        for key in keys:
            if any(not n <= most for n in numbers(config.get(key))):
                raise UserError(f"{config_file}: {key} is {str(config[key])[:60]}, which fits no network of {tensors} tensors.")
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        if isinstance(config.get(key), (list, str)) and len(config[key]) > max(tensors, 64):
            raise UserError(f"{config_file}: {key} has {len(config[key])} entries, which fits no network of {tensors} tensors.")


def _is_all_in_the_file(unet: nn.Module) -> bool:
    """Whether a network without values needs its state dict alone: nothing that its constructor works out is left over."""
    named = set(unet.state_dict())
    stored = all(name in named for name, _ in [*unet.named_parameters(), *unet.named_buffers()])
    return stored and not any(isinstance(v, Tensor) for module in unet.modules() for v in vars(module).values())


def _check_shapes(unet: nn.Module, shapes: dict[str, tuple[int, ...]], where: Path) -> None:
    """Name the first tensor that is missing, too many, or of another shape."""
    own = unet.state_dict()
    weights = _modern_names(shapes, set(own))
    missing = [n for n in own if n not in weights]
    if missing:
        raise UserError(f"{where}: {len(missing)} of {len(own)} tensors are missing, the first is {missing[0]}.")
    unexpected = [n for n in weights if n not in own]
    if unexpected:
        raise UserError(
            f"{where}: {len(unexpected)} tensors do not belong to this network, the first is {unexpected[0]}."
        )
    for name, tensor in own.items():
        if weights[name] != tuple(tensor.shape):
            raise UserError(f"{where}: {name} has shape {list(weights[name])}, the config asks for {list(tensor.shape)}.")


def _fill(unet: nn.Module, weights: dict[str, Tensor], where: Path) -> None:
    """Strict `load_state_dict` after :func:`_check_shapes`, which names the first tensor with bad values."""
    own = unet.state_dict()
    weights = _modern_names(weights, set(own))
    for name, tensor in own.items():
        value = weights[name]
        if tensor.is_floating_point() != value.is_floating_point() or value.is_complex():
            raise UserError(f"{where}: {name} is of type {str(value.dtype)[6:]}, the network's is {str(tensor.dtype)[6:]}.")
        if value.is_floating_point() and not bool(torch.isfinite(value.float() if value.itemsize == 1 else value).all()):
            raise UserError(f"{where}: {name} holds NaN or Inf.")
    unet.load_state_dict(weights, strict=True)


def _load_scheduler(file: Path | None) -> Any:
    import diffusers

    if file is None:
        return diffusers.DDPMScheduler()
    config = _read_json(file)
    name = str(config.get("_class_name", "DDPMScheduler"))
    try:
        cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    except Exception:  # a class whose own dependencies are missing
        cls = None
    if cls is None or not hasattr(cls, "from_config"):
        raise UserError(f"{file}: unknown scheduler class {name[:80]}.")
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 1 <= steps <= MOST_TIMESTEPS:
        raise UserError(f"{file}: num_train_timesteps must be a whole number from 1 to {MOST_TIMESTEPS}, not {str(steps)[:60]}.")
    try:
        scheduler = cls.from_config({k: v for k, v in config.items() if k != "_name_or_path"})
    except Exception as error:  # as for the network: the config describes no scheduler
        raise UserError(f"{file}: {name} cannot be built from it ({type(error).__name__}: {error}).") from error
    check_schedule(scheduler, f"{file}: ")
    alphas = scheduler.alphas_cumprod
    if alphas.shape != (steps,) or not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise UserError(f"{file}: its betas make no noise schedule.")
    return scheduler


# --------------------------------------------------------------------------------------------------------------- saving


def save_folder(
    folder: str | os.PathLike[str],
    unet: nn.Module,
    scheduler: Any,
    *,
    dtype: torch.dtype | None = None,
    pipeline: Path | None = None,
) -> str:
    """Write ``config.json``, the weights, ``scheduler/`` and ``model_index.json`` into an existing folder.

    A text-to-image or transformer network is written without ``model_index.json``, or, with `pipeline`, into a copy of
    that pipeline's folder in the place of the dense one.

    Call it inside :func:`atomic_folder`; it does not protect against a kill by itself.

    Args:
        unet: a UNet2DModel (stock layout) or a PrunedUNet2DModel (free layout: its config has the entry ``pruning``).
        dtype: of the saved weights, None for that of the network.
        pipeline: folder of the pipeline that the dense network is part of, see `pipeline_folder`.

    Returns:
        The layout written, "stock" or "free".

    Raises:
        ValueError: the config does not describe the network, so that nothing could open the folder.
    """
    import diffusers
    from safetensors.torch import save_file

    target = Path(folder)
    version = diffusers.__version__
    config = public_config(unet)
    free, base = "pruning" in config, base_class(unet)
    part = ["wanda_fast", f"Pruned{base}"] if free else ["diffusers", base]
    inner = base in INNER_CLASSES
    index = _copy_parts(pipeline, target, part) if inner and pipeline is not None else None
    if index is not None:
        target = target / index
        target.mkdir()
    _check_config(unet, config)
    if free:
        key = _SIGNPOSTED[base]
        config = {**config, key: SIGNPOST, "pruning": {**config["pruning"], "dense": {key: config[key]}}}
    config = {"_class_name": part[1], "_diffusers_version": version, **config}
    _write_json(target / "config.json", config)
    state = {
        n: t.detach().to("cpu", dtype if t.is_floating_point() else None).contiguous().clone()
        for n, t in unet.state_dict().items()
    }
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    (target / WEIGHTS).chmod((target / "config.json").stat().st_mode)  # safetensors makes files for the owner alone
    if index is not None:  # the pipeline's own scheduler was copied with it
        return "free" if free else "stock"
    (target / "scheduler").mkdir(exist_ok=True)
    scheduler_config = {k: v for k, v in json.loads(scheduler.to_json_string()).items() if k != "_name_or_path"}
    _write_json(target / "scheduler" / "scheduler_config.json", scheduler_config)
    if inner:
        return "free" if free else "stock"
    _write_json(
        target / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": version,
            "scheduler": ["diffusers", type(scheduler).__name__],
            "unet": part,
        },
    )
    return "free" if free else "stock"


def pipeline_folder(folder: Path) -> Path | None:
    """The folder itself where it is a complete pipeline, every part of its index on disk and none of them pickled; else
    None.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        return None
    parts = [k for k, v in _read_json(index_file).items() if isinstance(v, list) and v and v != [None, None]]
    known = [p for p in parts if isinstance(p, str) and re.fullmatch(r"[A-Za-z0-9_]+", p)]
    whole = len(known) == len(parts) and all((folder / p).is_dir() for p in parts)
    pickled = whole and any(
        any(f.suffix in _PICKLE_SUFFIXES for f in (folder / p).iterdir()) and not any((folder / p).glob("*.safetensors"))
        for p in parts
    )
    return folder if whole and not pickled else None


def _copy_parts(pipeline: Path, target: Path, part: list[str]) -> str:
    """Copy a pipeline without its network and name the new network in its index; returns the network's folder name."""
    index = _read_json(pipeline / "model_index.json")
    where = next(p for p in PARTS if p in index)
    for name, value in index.items():
        if isinstance(value, list) and value and value != [None, None] and name != where:
            shutil.copytree(
                pipeline / name, target / name, ignore=shutil.ignore_patterns(*(f"*{end}" for end in _PICKLE_SUFFIXES))
            )
    _write_json(target / "model_index.json", {**index, where: part})
    return where


def weights_file(folder: Path) -> Path:
    """The weights that `save_folder` wrote into a folder."""
    return next(f for f in (folder / WEIGHTS, *(folder / p / WEIGHTS for p in PARTS)) if f.is_file())


def _check_config(unet: nn.Module, config: Mapping[str, Any]) -> None:
    """The config must rebuild exactly this network; `save_pretrained` would not notice that it does not."""
    twin = _empty_unet(config, "meta", base_class(unet))
    want = {n: tuple(t.shape) for n, t in twin.state_dict().items()}
    have = {n: tuple(t.shape) for n, t in unet.state_dict().items()}
    wrong = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
    if wrong:
        name = wrong[0]
        raise ValueError(f"the config does not describe the network: {name} {have.get(name)}, {want.get(name)}")


def public_config(unet: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a diffusers network, without private keys such as ``_name_or_path`` (it leaks a local
    path).
    """
    config: Mapping[str, Any] = unet.config  # type: ignore[assignment]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}


def without_signpost(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the free layout as it was before `save_folder` put the signpost up; any other as it is."""
    record = config.get("pruning")
    if not isinstance(record, dict) or not isinstance(dense := record.get("dense"), dict):
        return dict(config)
    values = {key: value for key, value in dense.items() if key in _SIGNPOSTED.values()}
    return {**config, **values, "pruning": {k: v for k, v in record.items() if k != "dense"}}


def saved_bytes(unet: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes that :func:`save_folder` needs, with a margin of 1 MiB for the small files."""
    size = sum(
        t.numel() * (dtype.itemsize if dtype is not None and t.is_floating_point() else t.element_size())
        for t in unet.state_dict().values()
    )
    return size + (1 << 20)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- all or nothing


def check_target(
    target: str | os.PathLike[str], overwrite: bool = False, *, need_bytes: int = 0, reads: Iterable[Any] = ()
) -> Path:
    """Refuse, before any work, a target that could not be written at the end. Leaves nothing on disk.

    Args:
        reads: what the run reads (models, images, data folders): paths are looked at, names and other objects are not.

    Returns:
        The target with symbolic links resolved.

    Raises:
        UserError: a file is in the way, the folder is not empty and `overwrite` is off, the place is not writable, or has less
            than `need_bytes` free. With `overwrite` also: the folder contains the current or the home folder, or something
            that the run reads.
    """
    path = Path(os.path.realpath(Path(target).expanduser()))
    if path.exists() and not path.is_dir():
        raise UserError(f"{target}: exists and is not a folder.")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise UserError(
                f"{target}: exists and is not empty; choose another folder or allow overwriting (--overwrite)."
            )
        for precious in (Path.cwd(), Path.home()):
            if precious == path or path in precious.parents:
                raise UserError(f"{target}: refusing to overwrite a folder that contains {precious}.")
        for source in reads:
            if isinstance(source, (str, os.PathLike)) and (given := Path(source).expanduser()).exists():
                real = Path(os.path.realpath(given))
                if real == path or path in real.parents:
                    raise UserError(f"{target}: refusing to overwrite what this run reads ({source}); choose another folder.")
    if path.is_dir() and os.path.ismount(path):
        raise UserError(f"{target}: is a mount point, which cannot be replaced in one step; choose a folder inside it.")
    place = path.parent
    while not place.exists():
        place = place.parent
    try:
        # os.access says yes to root and on some network mounts where writing then fails, so write.
        # Named like an unfinished folder, so that one left by a kill is cleaned up like one.
        probe = tempfile.mkdtemp(prefix=_prefix(path), suffix=".partial", dir=place)
        with contextlib.suppress(FileNotFoundError):  # another run for this target may have just cleaned up
            os.rmdir(probe)
    except OSError as error:
        raise UserError(f"{target}: cannot write into {place} ({error.strerror}).") from error
    free = shutil.disk_usage(place).free
    if free < need_bytes:
        raise UserError(
            f"{target}: needs about {need_bytes / 2**20:.0f} MiB, but {place} has {free / 2**20:.0f} MiB free."
        )
    return path


def check_file(target: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Refuse, before any work, a file that could not be written at the end. Leaves nothing on disk.

    Raises:
        UserError: a folder is in the way, the file exists and `overwrite` is off, or the place cannot be written to.
    """
    path = Path(target).expanduser()
    if path.is_dir():
        raise UserError(f"{target}: is a folder, not a file")
    if path.exists() and not overwrite:
        raise UserError(f"{target}: exists already; choose another place or allow overwriting (--overwrite)")
    place = path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{target}: {place} is not a folder")
    try:  # as for folders: write, since os.access says yes to root
        tempfile.TemporaryFile(prefix=_prefix(path), suffix=".partial", dir=place).close()
    except OSError as error:
        raise UserError(f"{target}: cannot write into {place} ({error.strerror})") from None
    return path


@contextlib.contextmanager
def atomic_folder(
    target: str | os.PathLike[str], overwrite: bool = False, *, need_bytes: int = 0, instead: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Give an empty folder beside `target` to fill; when the block ends it becomes `target` in one step.

    With `instead`, work that took long is not lost where something else has taken the target meanwhile: the folder gets the first free
    name of `target`-2, -3, …, and `instead` is called with it. Without, that is an error. Neither touches what is there.

    A kill at any moment leaves the old state or the complete new folder. An exception (Ctrl-C included) removes the
    unfinished folder; a kill leaves it under a dot-name, and the next run for the same target removes it (a lock shows
    that its owner is gone). An old folder is swapped with ``renameat2(RENAME_EXCHANGE)``. Where the system or the
    filesystem lacks that call, two renames follow each other, and a kill between them leaves the old folder under a
    dot-name that the next run puts back.

    Raises:
        UserError: as :func:`check_target`, or the disk filled up while writing.
    """
    if instead is None:
        path = check_target(target, overwrite, need_bytes=need_bytes)
    else:
        path = Path(os.path.realpath(Path(target).expanduser()))
    made = _make_parents(path.parent)
    try:
        _recover(path)
        with _locked_temp(path) as temp:
            try:
                yield temp
                _sync(temp)
                if overwrite:
                    _commit(temp, path)
                elif not _claim(temp, path):
                    if instead is None:
                        raise UserError(f"{target}: appeared meanwhile and is not empty; choose another folder or allow overwriting "
                                        "(--overwrite).")  # fmt: skip
                    names = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
                    other = next(name for name in names if not os.path.lexists(name) and _claim(temp, name))
                    given = Path(target).expanduser()
                    instead(given.with_name(other.name) if os.path.realpath(given.parent) == str(path.parent) else other)
            finally:
                # After an exchange the temp name holds the old folder, so one removal serves success and failure.
                shutil.rmtree(temp, ignore_errors=True)
    except BaseException as error:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if _is_disk_error(error):
            raise UserError(f"{target}: writing failed ({_os_reason(error)}); nothing was left behind.") from error
        raise


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary name beside `target` to write to; when the block ends that file becomes `target` in one step.

    Raises:
        UserError: a folder is in the way, the file exists and `overwrite` is off, or the place cannot be written to.
    """
    path = check_file(target, overwrite)
    made: list[Path] = []
    temp = path.with_name(f".{path.stem}.wanda_fast-{os.getpid()}{path.suffix}")
    try:
        made = _make_parents(path.parent)
        yield temp
        os.replace(temp, path)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if _is_disk_error(error):
            raise UserError(f"{target}: writing failed ({_os_reason(error)}); nothing was left behind.") from error
        raise


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; return those made, outermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    missing.reverse()
    for folder in missing:
        folder.mkdir(exist_ok=True)
    return missing


def _prefix(path: Path) -> str:
    return f".{path.name}.wanda_fast-"


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds an exclusive lock on `folder` until closed or until the process dies; None where it
    is taken.
    """
    try:
        import fcntl
    except ImportError:  # Windows has neither flock nor directory descriptors
        return None
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == os.stat(folder).st_ino:  # still there, not removed before the lock was held
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


@contextlib.contextmanager
def _locked_temp(path: Path) -> Iterator[Path]:
    for _ in range(100):
        temp = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".partial", dir=path.parent))
        fd = _lock(temp)
        if fd is not None or sys.platform == "win32":
            break
        shutil.rmtree(temp, ignore_errors=True)
    else:
        raise OSError(errno.ENOLCK, "cannot lock a folder", str(path.parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        temp.chmod(0o777 & ~mask)  # mkdtemp gives 0700, which is right for secrets and wrong for a result
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if fd is not None:
            os.close(fd)


def _recover(path: Path) -> None:
    """Clean up after killed runs for the same target: put an old folder back if the target is missing, drop unfinished
    ones.
    """
    leftovers = sorted(p for p in path.parent.iterdir() if p.name.startswith(_prefix(path)) and p.is_dir())
    for leftover in leftovers:
        fd = _lock(leftover)
        if fd is None:
            continue
        try:
            if leftover.suffix == ".old" and not path.exists():
                leftover.rename(path)
            else:
                shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(fd)


def _sync(folder: Path) -> None:
    """Flush every file and folder below, so that the rename cannot reach the disk before the content."""
    for root, _, files in os.walk(folder):
        for name in [*files, "."]:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some filesystems do not sync folders
                    raise
            finally:
                os.close(fd)


def _commit(temp: Path, path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        if not _exchange(temp, path):
            old = Path(f"{temp.with_suffix('')}.old")
            try:
                path.rename(old)
                temp.rename(path)
            except BaseException:
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temp, path)  # replaces an empty folder too
    _sync_name(path)


def _claim(temp: Path, path: Path) -> bool:
    """Give `temp` a name that is free or that of an empty folder; False where something is there."""
    try:
        os.rename(temp, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and not os.path.lexists(path):
            raise
        return False
    _sync_name(path)
    return True


def _sync_name(path: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or filesystem cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), ctypes.c_uint(rename_exchange)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


def _is_disk_error(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRORS
    # safetensors reports the system's error as text: "... (os error 28)"
    return type(error).__name__ == "SafetensorError" and any(f"os error {c})" in str(error) for c in _DISK_ERRORS)


def _os_reason(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
