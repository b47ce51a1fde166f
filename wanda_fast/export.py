"""Export the network for programs that have neither wanda_fast nor diffusers: torch.export, AOTInductor, ONNX.

Inputs are `sample` [N, C, H, W] (floating point), `timestep` [N] int64 and, for class-conditional networks,
`class_labels` [N] int64; the output is what the network predicts, [N, C, H, W]. N is free. Every form is opened again and
compared with the network itself before the folder appears.

`torch.export.save` puts its example inputs into the file as a pickle. That entry is emptied: `torch.export.load` opens
the file as before, and nothing in it can run code.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, sampling
from .errors import UserError
from .experts import refuse_experts

FORMAT = "wanda_fast.export/1"
FORMS = ("pt2", "aoti", "onnx")
FILES = {"pt2": "unet.pt2", "aoti": "unet-aoti.pt2", "onnx": "unet.onnx"}
# Largest |exported - eager| that is let through, as a share of the largest |eager|.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
CHECKED_BATCHES = (1, 2, 5)
LARGEST_BATCH = 4096


class Network(nn.Module):
    """The network as a function of tensors alone, without diffusers' output classes."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(sample, timestep, return_dict=False)[0]


class LabelledNetwork(Network):
    """With class labels."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:  # type: ignore[override]
        return self.unet(sample, timestep, class_labels=class_labels, return_dict=False)[0]


def export(
    model: str | Path | None = None,
    *,
    save_path: str | Path,
    forms: Sequence[str] = ("pt2", "onnx"),
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    repeats: int = 5,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the forms asked for, the scheduler and `export.json` into a folder.

    Args:
        model: folder or hub id, dense or pruned, either layout; None for the bundled model.
        save_path: folder, written in one step at the end.
        forms: of `FORMS`: "pt2" (torch.export), "aoti" (compiled for this kind of machine), "onnx".
        device: where it is exported, checked and timed; the aoti form runs on that kind of device alone.
        dtype: of the weights and of `sample`: "fp32", "bf16" or "fp16"; ONNX is fp32 only.
        batch_size: images of a pass when speed is measured.
        repeats: timed passes of each form, in turns with the network itself.
        log: called with one line at a time.

    Returns:
        What `export.json` holds: sizes, differences from eager with the tolerance, seconds of a pass; and the `path` of the folder.

    Raises:
        UserError: a mistake in the arguments, a package that is missing, a target that cannot be written.
        RuntimeError: an exported form differs from the network by more than the tolerance; nothing is written.
    """
    from . import run_config
    from .pruning import _DTYPE_NAMES, DTYPES, check_device

    say = log or (lambda line: None)
    _check(forms, dtype, batch_size, repeats)
    name = _DTYPE_NAMES[dtype or "fp32"]
    place = check_device(device)
    checkpoint.check_target(save_path, overwrite, reads=[model])
    loaded = checkpoint.load_pipeline(model, dtype=DTYPES[name], device=place)
    unet: Any = loaded.unet.requires_grad_(False).eval()
    sampling.check_network(unet, loaded.scheduler)
    if "cross_attention_dim" in unet.config or not hasattr(unet, "up_blocks"):
        raise UserError(f"{loaded.name}: is a {type(unet).__name__}; only UNet2DModel can be exported")
    refuse_experts(unet, "the export")
    checkpoint.check_target(save_path, overwrite, need_bytes=len(forms) * 2 * checkpoint.saved_bytes(unet))
    labelled = getattr(unet, "class_embedding", None) is not None
    net = (LabelledNetwork if labelled else Network)(unet)
    nn.Module.to(net, memory_format=torch.channels_last)
    say(f"model: {loaded.name} ({loaded.source}, layout {loaded.layout}); {place}, {name}")
    report: dict[str, Any] = {
        "format": FORMAT, "model": loaded.name, "inputs": _describe(unet, name, labelled), "tolerance": TOLERANCES[name],
        "forms": {}, "timed_batch": batch_size, "device": _device(place),
        "versions": {"torch": torch.__version__},
    }  # fmt: skip
    path = Path(save_path)

    def instead(other: Path) -> None:
        nonlocal path
        path = other
        say(f"{save_path} was taken by something else meanwhile; the result is in {path}")

    with checkpoint.atomic_folder(save_path, overwrite, instead=instead) as folder:
        with _any_batch(unet):
            report["largest_batch"] = _largest_batch(net, unet, place)
            program = _program(net, unet, place, report["largest_batch"])
            for form in forms:
                begin = time.perf_counter()
                file = folder / FILES[form]
                _WRITERS[form](program, net, unet, place, file)
                took = time.perf_counter() - begin
                report["forms"][form] = {"file": file.name, "bytes": file.stat().st_size, "export_seconds": round(took, 2)}
                say(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, written in {took:.1f} s")
        for form in forms:
            run, where = _open(form, folder / FILES[form], place)
            entry = report["forms"][form]
            entry["runs_on"] = where
            entry["differences"] = _compare(run, net, unet, place, TOLERANCES[name], FILES[form])
            entry["seconds"], entry["eager_seconds"] = _race(run, net, unet, place, batch_size, repeats)
        (folder / "scheduler").mkdir()
        config = {k: v for k, v in json.loads(loaded.scheduler.to_json_string()).items() if k != "_name_or_path"}
        checkpoint._write_json(folder / "scheduler" / "scheduler_config.json", config)
        checkpoint._write_json(folder / "export.json", report)
        options = {"model": None if model is None else str(model), "formats": list(forms), "device": device, "dtype": dtype,
                   "batch_size": batch_size, "repeats": repeats}  # fmt: skip
        run_config.write(folder, "export", options)
    return {**report, "path": str(path)}


def _check(forms: Sequence[str], dtype: str | None, batch_size: int, repeats: int) -> None:
    from importlib.util import find_spec

    from .pruning import _DTYPE_NAMES

    if not forms or len(set(forms)) != len(forms):
        raise UserError(f"give each form once; known: {', '.join(FORMS)}")
    for form in forms:
        if form not in FORMS:
            raise UserError(f"unknown form {form!r}; known: {', '.join(FORMS)}")
    if dtype is not None and dtype not in _DTYPE_NAMES:
        raise UserError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPE_NAMES)}")
    if "onnx" in forms and _DTYPE_NAMES[dtype or "fp32"] != "fp32":
        raise UserError("ONNX is exported in fp32 only; leave out --dtype, or onnx from --formats")
    if batch_size < 1 or repeats < 1:
        raise UserError(f"the batch size ({batch_size}) and the repeats ({repeats}) must be at least 1")
    for package in ("onnx", "onnxscript", "onnxruntime") if "onnx" in forms else ():
        if find_spec(package) is None:
            raise UserError(f"ONNX needs the package {package}: pip install 'wanda-fast[export]'")


def _describe(unet: Any, dtype: str, labelled: bool) -> dict[str, str]:
    shape = ", ".join(map(str, sampling.image_shape(unet)))
    found = {"sample": f"{dtype} [N, {shape}]", "timestep": "int64 [N]"}
    return {**found, "class_labels": "int64 [N]"} if labelled else found


def _inputs(unet: Any, n: int, place: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    own = next(unet.parameters()).dtype
    x = sampling.noise(sampling.image_shape(unet), range(n), seed, "image").to(place, own)
    total = int(unet.config.get("num_train_timesteps") or 1000)
    t = torch.tensor([int((i + 0.5) / n * total) for i in range(n)], device=place)
    labels = sampling.class_labels(unet, range(n), seed, place)
    return (x, t) if labels is None else (x, t, labels)


# --------------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def _any_batch(unet: nn.Module) -> Iterator[None]:
    """diffusers' upsampling asks whether the batch is under 64, which would limit an exported network to such batches.

    Within this block it does not ask. What it does for larger batches goes round faults of old versions of torch; the one
    that is left (more than 2³¹ elements) lies beyond `_largest_batch`.
    """
    from diffusers.models.upsampling import Upsample2D

    def forward(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        size: dict[str, Any] = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
        hidden_states = F.interpolate(hidden_states, **size, mode="nearest")
        if not self.use_conv:
            return hidden_states
        return self.conv(hidden_states) if self.name == "conv" else self.Conv2d_0(hidden_states)

    changed = [m for m in unet.modules() if isinstance(m, Upsample2D) and m.norm is None and m.interpolate and not m.use_conv_transpose]
    for module in changed:
        module.forward = types.MethodType(forward, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _largest_batch(net: nn.Module, unet: Any, place: torch.device) -> int:
    """Images whose largest upsampled tensor stays under 2³¹ elements, at most 4096."""
    from diffusers.models.upsampling import Upsample2D

    most = 1

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal most
        most = max(most, 4 * args[0].numel(), out.numel())

    hooks = [m.register_forward_hook(look) for m in unet.modules() if isinstance(m, Upsample2D)]
    try:
        with torch.no_grad():
            net(*_inputs(unet, 1, place))
    finally:
        for hook in hooks:
            hook.remove()
    return max(2, min(LARGEST_BATCH, (2**31 - 1) // most))


def _program(net: nn.Module, unet: Any, place: torch.device, largest: int) -> Any:
    from torch.export import Dim
    from torch.export import export as trace

    args = _inputs(unet, 3, place)
    batch = Dim("batch", min=1, max=largest)
    shapes = {name: {0: batch} for name in ("sample", "timestep", "class_labels")[: len(args)]}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trace(net, args, dynamic_shapes=shapes)


def _write_pt2(program: Any, net: nn.Module, unet: Any, place: torch.device, file: Path) -> None:
    raw = file.with_name("raw.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about channels-last weights, which it saves all the same
        torch.export.save(program, raw)
    drop_pickles(raw, file)
    raw.unlink()


def drop_pickles(source: Path, target: Path) -> None:
    """Copy a torch.export file with its example inputs, a pickle, emptied; nothing else in it may be a pickle.

    Raises:
        RuntimeError: another entry is one (a version of torch that writes its files differently).
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            data = old.read(info)
            if "/sample_inputs/" in info.filename:
                data = b""
            elif not info.filename.rsplit("/", 1)[-1].startswith("weight_") and data[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
                raise RuntimeError(f"torch {torch.__version__} pickles {info.filename} in its exports; use the form aoti")
            new.writestr(info.filename, data)


def _write_aoti(program: Any, net: nn.Module, unet: Any, place: torch.device, file: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(file))


def _write_onnx(program: Any, net: nn.Module, unet: Any, place: torch.device, file: Path) -> None:
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    inputs = [n for n in ("sample", "timestep", "class_labels") if n in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=["prediction"], verbose=False)
    made.save(str(file))


_WRITERS: dict[str, Callable[..., None]] = {"pt2": _write_pt2, "aoti": _write_aoti, "onnx": _write_onnx}


# --------------------------------------------------------------------------------------------------- opening, comparing


def _open(form: str, file: Path, place: torch.device) -> tuple[Callable[..., Tensor], str]:
    """The exported form as a function of tensors, and where it runs."""
    if form == "pt2":
        return torch.export.load(file).module(), place.type
    if form == "aoti":
        from torch._inductor import aoti_load_package

        return aoti_load_package(str(file)), place.type
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    usable = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(file), options, providers=usable if place.type == "cuda" else usable[-1:])
    names = [i.name for i in session.get_inputs()]

    def run(*args: Tensor) -> Tensor:
        feed = {name: value.cpu().numpy() for name, value in zip(names, args, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run, session.get_providers()[0]


def _compare(run: Any, net: nn.Module, unet: Any, place: torch.device, tolerance: float, what: str) -> dict[str, float]:
    """Largest difference per batch size, as a share of the largest output; raises beyond the tolerance."""
    found = {}
    for n in CHECKED_BATCHES:
        args = _inputs(unet, n, place, seed=n)
        with torch.no_grad():
            expected, got = net(*args).float().cpu(), run(*args).float().cpu()
        difference = float((got - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:
            raise RuntimeError(f"{what}: differs from the network by {difference:.2g} of its largest output for {n} images; "
                               f"{tolerance:g} is let through")  # fmt: skip
        found[str(n)] = float(f"{difference:.3g}")
    return found


def _race(run: Any, net: nn.Module, unet: Any, place: torch.device, batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a pass of the exported form and of the network itself, in turns."""
    args = _inputs(unet, batch, place)
    args = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])

    def seconds(f: Any) -> float:
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        begin = time.perf_counter()
        f(*args)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - begin

    with torch.no_grad():
        for f in (run, net):
            seconds(f)
        pairs = [(seconds(run), seconds(net)) for _ in range(repeats)]
    one, two = (statistics.median(p[k] for p in pairs) for k in (0, 1))
    return float(f"{one:.4g}"), float(f"{two:.4g}")


def _device(place: torch.device) -> str:
    from .pruning import _device_name

    return _device_name(place)


def uses_pickle(file: str | os.PathLike[str]) -> list[str]:
    """Entries of a zip file that torch could only read by unpickling."""
    with zipfile.ZipFile(file) as archive:
        return [
            info.filename
            for info in archive.infolist()
            if info.filename.endswith((".pt", ".pkl", ".pth")) and archive.read(info)
        ]  # fmt: skip
