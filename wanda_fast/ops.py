"""The operations as `torch.library` ops under `wanda_fast::`, their checks, and the choice of backend.

Every operation has the plain PyTorch `reference`. Loading the compiled extension adds C++ for CPU tensors (`cpu`) and, where
it was built with a CUDA toolkit, CUDA kernels (`cuda`), each under its own dispatch key; Triton kernels (`triton`) are separate
ops named `<operation>_triton`, and nothing of Triton is imported before the first call of one.

`backend="auto"` takes the best implementation for the tensor's device and logs once, with the reason, when the one written
for it is missing. A named backend never falls back: it raises RuntimeError. The default is "auto", or the environment variable
WANDA_FAST_BACKEND, or the last `set_backend`. WANDA_FAST_NO_EXTENSION=1 leaves the compiled extension unloaded.

None of the operations is differentiable: results do not require gradients.

A new operation is one `_define(...)` below, a wrapper with its checks, and a function in `reference.py`; C++ and CUDA
register themselves when the extension is loaded, and `kernels/<triton module>.py` holds a launcher of the same name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanda_fast import conv_gram as conv_gram_module
from wanda_fast import reference
from wanda_fast.errors import UserError

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that stands for something else, such as a fake tensor
FLOAT_DTYPES = reference.FLOAT_DTYPES

_log = logging.getLogger("wanda_fast")
_library = torch.library.Library("wanda_fast", "DEF")


# ---- definitions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Op:
    name: str
    reference: Callable[..., Any]  # same results as the op: float32, no views of its inputs
    native: Callable[..., Any]  # the dispatcher's op: C++ or CUDA where registered, otherwise the reference
    triton: Callable[..., Any] | None
    homes: tuple[str, ...]  # backends that the project implements, best first; whether they are here is found out later


_OPS: dict[str, _Op] = {}


def _triton_impl(module: str, name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"wanda_fast.kernels.{module}"), name)(*args)

    return call


@functools.cache
def _launcher(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"wanda_fast.kernels.{name}"), name)


def _define(
    name: str,
    signature: str,
    reference_impl: Callable[..., Any],
    fake: Callable[..., Any],
    homes: tuple[str, ...],
    triton_module: str | None = None,
    triton_impl: Callable[..., Any] | None = None,
) -> None:
    """Define `wanda_fast::name` (and `name_triton`) with its fake and, for every device, the reference."""
    in_place = signature.endswith("-> ()")

    def without_result(function: Callable[..., Any]) -> Callable[..., Any]:
        if not in_place:
            return function

        def call(*args: Any) -> None:
            function(*args)

        return call

    overloads = []
    names = [(name, without_result(reference_impl))]
    if triton_module is not None:
        triton_impl = _triton_impl(triton_module, name)
    if triton_impl is not None:
        names.append((f"{name}_triton", without_result(triton_impl)))
    for op_name, implementation in names:
        _library.define(f"{op_name}{signature}", tags=(torch.Tag.needs_exact_strides,))
        _library.impl(op_name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"wanda_fast::{op_name}", fake, lib=_library)
        overloads.append(getattr(torch.ops.wanda_fast, op_name).default)
    triton = overloads[1] if triton_impl is not None else None
    _OPS[name] = _Op(name, without_result(reference_impl), overloads[0], triton, homes)


def _fake_channel_sq_norm(x: Tensor, rows: Tensor, out: Tensor) -> None:
    return None


def _reference_wanda_score(weight: Tensor, act_norm: Tensor) -> tuple[Tensor, Tensor]:
    row, col = reference.wanda_score(weight, act_norm)
    return row.float(), col.float()


def _fake_wanda_score(weight: Tensor, act_norm: Tensor) -> tuple[Tensor, Tensor]:
    return (
        weight.new_empty(weight.shape[0], dtype=torch.float32),
        weight.new_empty(act_norm.shape[0], dtype=torch.float32),
    )


def _reference_wanda_score_stats(weight: Tensor, sq: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    row, col = reference.wanda_score_stats(weight, sq, row_weight)
    return row.float(), col.float()


def _fake_wanda_score_stats(weight: Tensor, sq: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    return (
        weight.new_empty(weight.shape[0], dtype=torch.float32),
        weight.new_empty(sq.shape[1], dtype=torch.float32),
    )


def _fake_compact(
    tensors: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    result = []
    for t, rows, columns in zip(tensors, keep_out, keep_in, strict=True):
        shape = list(t.shape)
        if rows is not None:
            shape[0] = rows.shape[0]
        if columns is not None:
            shape[1] = columns.shape[0]
        wanted = reference.compact_dtype(t, dtype)
        result.append(torch.empty(shape, dtype=wanted, device=t.device, memory_format=reference.memory_format(t)))
    return result


_define(
    "channel_sq_norm",
    "(Tensor x, Tensor rows, Tensor(a!) out) -> ()",
    reference.channel_sq_norm,
    _fake_channel_sq_norm,
    homes=("cpu", "triton"),
    triton_module="channel_sq_norm",
)
_define(
    "wanda_score",
    "(Tensor weight, Tensor act_norm) -> (Tensor, Tensor)",
    _reference_wanda_score,
    _fake_wanda_score,
    homes=("cpu", "triton"),
    triton_module="wanda_score",
)
_define(
    "wanda_score_stats",
    "(Tensor weight, Tensor sq, Tensor row_weight) -> (Tensor, Tensor)",
    _reference_wanda_score_stats,
    _fake_wanda_score_stats,
    homes=("cpu", "triton"),
    triton_module="wanda_score",
)
_COMPACT = "(Tensor[] tensors, Tensor?[] keep_out, Tensor?[] keep_in, ScalarType? dtype=None) -> Tensor[]"
_define(
    "compact",
    _COMPACT,
    reference.compact,
    _fake_compact,
    homes=("cpu", "cuda"),
)
# The CUDA gather for eager calls, whose results may share an allocation.
_library.define(f"compact_shared{_COMPACT}")


def _conv_gram_torch(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return tuple(t.float() for t in conv_gram_module.conv_gram(x, y, *args))  # type: ignore[return-value]


def _conv_gram_cpu(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Products of matrices by the BLAS behind torch.mm; in 3 x 3 convolutions those of the C++ extension, which multiply no padding."""
    native = _has_kernel("conv_gram_sums", "CPU") and torch.float64 not in (x.dtype, y.dtype)
    sums = torch.ops.wanda_fast.conv_gram_sums.default if native else None
    return tuple(t.float() for t in conv_gram_module.conv_gram(x, y, *args, sums=sums))  # type: ignore[return-value, misc]


def _conv_gram_triton(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return importlib.import_module("wanda_fast.kernels.conv_gram").conv_gram(x, y, *args)


def _reference_conv_gram(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return tuple(t.float() for t in reference.conv_gram(x, y, *args))  # type: ignore[return-value]


def _fake_conv_gram(
    x: Tensor, y: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    columns = x.shape[1] * kernel_size[0] * kernel_size[1] + 1
    shapes = ((columns, columns), (columns, y.shape[1]))
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)  # type: ignore[return-value]


def _fake_conv_gram_sums(x: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = x.shape[1]
    shapes = ((13, c, c), (12, c, c), (4, c, c), (9, c, y.shape[1] + 1))
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)  # type: ignore[return-value]


_define(
    "conv_gram",
    "(Tensor x, Tensor y, int[] kernel_size, int[] stride, int[] padding, Tensor? weight) -> (Tensor, Tensor)",
    _reference_conv_gram,
    _fake_conv_gram,
    # Triton's products of 16-bit halves take half the time of cuBLAS's in float32 (H200), and small ones go to cuBLAS from there.
    homes=("triton", "cuda", "cpu"),
    triton_impl=_conv_gram_triton,
)
# Part of `conv_gram` on the CPU.
_SUMS = "conv_gram_sums(Tensor x, Tensor y, Tensor? weight) -> (Tensor, Tensor, Tensor, Tensor)"
_library.define(_SUMS, tags=(torch.Tag.needs_exact_strides,))
_library.impl("conv_gram_sums", conv_gram_module.shift_sums, "CompositeExplicitAutograd")
torch.library.register_fake("wanda_fast::conv_gram_sums", _fake_conv_gram_sums, lib=_library)
# Needs no extension: a few large products, which the BLAS behind torch.mm does best.
_library.impl("conv_gram", _conv_gram_cpu, "CPU")
_library.impl("conv_gram", _conv_gram_torch, "CUDA")


# ---- the compiled extension ---------------------------------------------------------------------------------------


def _load_extension() -> str:
    """Load `wanda_fast._C`, which registers its kernels; returns "" or why there is none."""
    if os.environ.get("WANDA_FAST_NO_EXTENSION", "0") not in ("", "0"):
        return "the compiled extension is switched off by WANDA_FAST_NO_EXTENSION"
    # Beside this file and nowhere else: an editable install of another checkout must not lend its extension.
    spec = importlib.machinery.PathFinder.find_spec("wanda_fast._C", [os.path.dirname(os.path.abspath(__file__))])
    if spec is None or spec.origin is None:
        return "the compiled extension is missing (`pip install -v --no-build-isolation -e .` shows why it is not built)"
    try:
        torch.ops.load_library(spec.origin)
    except (OSError, RuntimeError) as error:
        return f"the compiled extension does not load: {str(error).splitlines()[0]}"
    return ""


_extension_error = _load_extension()


# ---- choice of backend --------------------------------------------------------------------------------------------

_current: str | None = None  # None: not asked for yet, the environment variable decides
_selected: dict[tuple[str, str | None, str], tuple[str, Callable[..., Any]]] = {}
_logged: set[str] = set()


def _check_backend_name(name: str, what: str = "backend") -> str:
    if name not in BACKENDS:
        raise UserError(f"{what}: {name!r} is not one of {', '.join(BACKENDS)}")
    return name


def _check_available(name: str, what: str = "") -> None:
    reason = "" if name == "auto" else available_backends()[name]
    if reason:
        raise RuntimeError(f"{what}backend {name!r} is not available: {reason}")


def get_backend() -> str:
    """Backend used where a call names none: the last `set_backend`, else WANDA_FAST_BACKEND, else "auto".

    Raises:
        ValueError: the environment variable names no backend.
        RuntimeError: it names one that cannot be used on this machine; the text says why.
    """
    global _current
    if _current is None:
        name = _check_backend_name(os.environ.get("WANDA_FAST_BACKEND") or "auto", "WANDA_FAST_BACKEND")
        _check_available(name, "WANDA_FAST_BACKEND: ")
        _current = name
    return _current


def set_backend(name: str) -> None:
    """Set the backend of all calls that name none.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot be used on this machine; the text says why.
    """
    global _current
    _check_backend_name(name)
    _check_available(name)
    _current = name
    _selected.clear()


def resolve_name(backend: str | None) -> str:
    """The backend that a call with this argument asks for."""
    return get_backend() if backend is None else _check_backend_name(backend)


def _triton_error(device_type: str | None) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if device_type is None:
        if interpreted or torch.cuda.is_available() or torch.xpu.is_available():
            return ""
        return "no GPU is visible (on the CPU Triton runs only with TRITON_INTERPRET=1)"
    if device_type == "cpu" and not interpreted:
        return "the tensor is on the CPU, where Triton runs only with TRITON_INTERPRET=1"
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"Triton has no {device_type} device"
    return ""


def _native_error(backend: str, device_type: str | None) -> str:
    if _extension_error:
        return _extension_error
    if backend == "cuda":
        if not _has_kernel("compact", "CUDA"):  # conv_gram's is written in Python and always there
            return "the compiled extension was built without CUDA"
        if device_type is None and not torch.cuda.is_available():
            return "no CUDA GPU is visible"
    if device_type not in (None, backend):
        return f"the tensor is on {device_type!r}"
    return ""


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"wanda_fast::{op}", key)


def _error(op: _Op, backend: str, device_type: str) -> str:
    """Why `op` cannot run on `backend` for tensors of this device; "" when it can."""
    if backend == "reference":
        return ""
    if backend not in op.homes:
        return f"{op.name} has no {backend} implementation, it has {', '.join(('reference', *op.homes))}"
    if backend == "triton":
        reason = _triton_error(device_type)
    else:
        registered = _has_kernel(op.name, backend.upper())
        # registered though there is no extension: written in Python
        reason = "" if registered and device_type in (None, backend) else _native_error(backend, device_type)
        if not reason and not registered:
            reason = f"the compiled extension has no {backend} kernel of {op.name}"
    return reason


def _select(name: str, backend: str | None, device_type: str) -> tuple[str, Callable[..., Any]]:
    """(backend, function) for an operation; decided once for each argument and device."""
    key = (name, backend, device_type)
    found = _selected.get(key)
    if found is None:
        found = _selected[key] = _decide(_OPS[name], resolve_name(backend), device_type)
    return found


def _decide(op: _Op, asked: str, device_type: str) -> tuple[str, Callable[..., Any]]:
    chosen = asked
    if asked == "auto":
        # Triton interpreted on the CPU is for tests: never chosen, only asked for.
        wanted = [b for b in op.homes if (b == "cpu") == (device_type == "cpu")]
        if device_type not in ("cpu", "cuda", "xpu"):
            wanted = []
        elif device_type == "xpu" or torch.version.hip is not None:
            wanted = [b for b in wanted if b != "cuda"]
        reasons = {b: _error(op, b, device_type) for b in wanted}
        chosen = next((b for b, reason in reasons.items() if not reason), "reference")
        for backend, reason in reasons.items():
            if backend == chosen:
                break
            if reason and reason not in _logged:
                _logged.add(reason)
                _log.warning("%s: %s is not used, %s is: %s", op.name, backend, chosen, reason)
    else:
        reason = _error(op, asked, device_type)
        if reason:
            raise RuntimeError(f"{op.name}: backend {asked!r} is not available: {reason}")
    if chosen == "reference":
        return chosen, op.reference
    if chosen == "triton":
        assert op.triton is not None
        return chosen, op.triton
    return chosen, op.native


def available_backends(device: torch.device | str | None = None) -> dict[str, str]:
    """Backend name -> "" where it can be used, else why not; for tensors of `device`, or anywhere on this machine."""
    device_type = None if device is None else torch.device(device).type
    return {
        "reference": "",
        "cpu": _native_error("cpu", device_type),
        "triton": _triton_error(device_type),
        "cuda": _native_error("cuda", device_type),
    }


def homes(operation: str) -> tuple[str, ...]:
    """Backends that an operation is written for beside the reference, best first; whether they are here is another question."""
    return _OPS[operation].homes


def describe_backends() -> str:
    """One line for a program's output: which backends are active, which are not and why."""
    states = available_backends()
    text = "backends: " + ", ".join(name for name, reason in states.items() if not reason)
    missing = [f"{name} ({reason})" for name, reason in states.items() if reason]
    if missing:
        text += "; not available: " + ", ".join(missing)
    if get_backend() != "auto":
        text += f"; chosen: {get_backend()}"
    return text


# ---- operations ---------------------------------------------------------------------------------------------------


def _shape(t: Tensor) -> str:
    return f"{t.dtype} of shape {list(t.shape)}"


def _check_device(t: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if t.device != other.device:
        raise ValueError(f"{name}: is on {t.device}, but {other_name} is on {other.device}")


def _check_rows(rows: Tensor, count: int) -> None:
    """Range check on the CPU; on a GPU it would wait for the device."""
    if rows.device.type == "cpu" and rows.numel():
        low, high = (int(v) for v in rows.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"rows: value {low if low < 0 else high} is outside [0, {count}), the rows of out")


def channel_sq_norm(x: Tensor, rows: Tensor, out: Tensor, *, backend: str | None = None) -> Tensor:
    """Add each sample's channel energy to its row: out[rows[n], c] += sum over positions of x[n, c, ...]^2.

    Args:
        x: [N, C, H, W] (contiguous, channels-last or strided), or [N, L, C] or [N, C] with the channel last; float32, float16,
            bfloat16 or float64. N may be 0.
        rows: [N] int64, 0 <= rows[n] < R. Rows may repeat; the sum is bitwise repeatable.
        out: [R, C] float32, contiguous, changed in place.
        backend: an explicit name never falls back.

    Returns:
        `out`.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a row is out of range. On a GPU rows are not checked, since that would
            wait for the device: the Triton kernel leaves rows outside [0, R) out, the reference stops in a device assertion.
        RuntimeError: the named backend is unavailable; the text says why.

    Source: Wanda, Sun et al. 2023, arXiv:2306.11695, section 3.
    """
    dim = x.dim()
    if not 2 <= dim <= 4:
        raise ValueError(f"x: must be [N, C, H, W], [N, L, C] or [N, C], not {_shape(x)}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x: must be float32, float16, bfloat16 or float64, not {_shape(x)}")
    if rows.dim() != 1 or rows.shape[0] != x.shape[0] or rows.dtype != torch.int64:
        raise ValueError(f"rows: must be int64 of shape [{x.shape[0]}], one entry per sample of x, not {_shape(rows)}")
    channels = x.shape[1] if dim == 4 else x.shape[-1]
    if out.dim() != 2 or out.shape[1] != channels or out.dtype != torch.float32 or not out.is_contiguous():
        strides = "" if out.is_contiguous() else f" and strides {list(out.stride())}"
        raise ValueError(f"out: must be contiguous float32 of shape [R, {channels}], x's channels, not {_shape(out)}{strides}")
    device = x.device
    if rows.device != device or out.device != device:
        _check_device(rows, "rows", x, "x")
        _check_device(out, "out", x, "x")

    if x.requires_grad:
        x = x.detach()
    if x.dtype == torch.float64 and device.type != "cpu" and resolve_name(backend) == "auto":
        backend = "reference"  # the kernels for GPUs take float32 and narrower
    chosen, function = _select("channel_sq_norm", backend, device.type)
    if chosen == "cpu":
        try:  # C++ checks the rows on its way, before it writes: asking here would cost as much as a small layer
            function(x, rows, out)
        except RuntimeError:
            _check_rows(rows, out.shape[0])
            raise
    else:
        if device.type == "cpu":
            _check_rows(rows, out.shape[0])
        if chosen == "triton" and type(x) is Tensor and not torch.compiler.is_compiling():
            # Hooks call this for every layer of a forward pass: going round the dispatcher saves a quarter of the host's time.
            _launcher("channel_sq_norm")(x, rows, out)
        else:
            function(x, rows, out)
    return out


def check_wanda_score(weight: Tensor, act_norm: Tensor, *, groups: int | None = None) -> None:
    """Raise ValueError unless `weight` and `act_norm` fit; without `groups` any number that divides both is right."""
    if weight.dim() < 2 or weight.dtype not in FLOAT_DTYPES:
        raise ValueError(f"weight: must be floating point [C_out, C_in / groups, ...], not {_shape(weight)}")
    if act_norm.dim() != 1 or act_norm.dtype not in FLOAT_DTYPES:
        raise ValueError(f"act_norm: must be floating point [C_in], not {_shape(act_norm)}")
    _check_channels(weight, act_norm.shape[0], "act_norm", groups)
    _check_device(act_norm, "act_norm", weight, "weight")


def _check_channels(weight: Tensor, channels: int, name: str, groups: int | None) -> None:
    rows, per_group = weight.shape[:2]
    if groups is not None:
        fits = channels == groups * per_group
    elif per_group == 0 or channels == 0:
        fits = per_group == channels
    else:
        fits = channels % per_group == 0 and rows % (channels // per_group) == 0
    if not fits:
        what = "groups" if groups is None else f"groups = {groups}"
        raise ValueError(f"{name}: {channels} channels do not fit a weight of shape {list(weight.shape)} with {what}")


def wanda_score(weight: Tensor, act_norm: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Row and column sums of S = |W| * ||X||_2: row[o] = sum_i,k |W[o, i, k]| n[i], col[i] = n[i] sum_o,k |W[o, i, k]|.

    Args:
        weight: [C_out, C_in / groups, ...], float32, float16, bfloat16 or float64. With groups, output channel o reads the
            slice of `act_norm` of its group; their number follows from the shapes.
        act_norm: [C_in], ||X||_2 of each input channel; used as float32.
        backend: an explicit name never falls back.

    Returns:
        ([C_out], [C_in]), both float32.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is unavailable; the text says why.

    Source: Wanda, Sun et al. 2023, arXiv:2306.11695, section 3.
    """
    check_wanda_score(weight, act_norm)
    if weight.dtype == torch.float64 and weight.device.type != "cpu" and resolve_name(backend) == "auto":
        backend = "reference"
    _, function = _select("wanda_score", backend, weight.device.type)
    return function(weight.detach(), act_norm.detach().to(torch.float32))


def wanda_score_stats(
    weight: Tensor, sq: Tensor, row_weight: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`wanda_score` straight from a table of energies: n[c] = sum_r row_weight[r] * sqrt(sq[r, c]).

    Args:
        weight: [C_out, C_in / groups, ...], as in `wanda_score`.
        sq: [R, C_in] float32, sums of squares per row (as `channel_sq_norm` writes them).
        row_weight: [R] float32, weight of each row; 1 / R each is the mean over timesteps.
        backend: an explicit name never falls back.

    Returns:
        ([C_out], [C_in]), both float32.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is unavailable; the text says why.
    """
    if weight.dim() < 2 or weight.dtype not in FLOAT_DTYPES:
        raise ValueError(f"weight: must be floating point [C_out, C_in / groups, ...], not {_shape(weight)}")
    if sq.dim() != 2 or sq.dtype != torch.float32:
        raise ValueError(f"sq: must be float32 [R, C_in], not {_shape(sq)}")
    if row_weight.dim() != 1 or row_weight.shape[0] != sq.shape[0] or row_weight.dtype != torch.float32:
        raise ValueError(f"row_weight: must be float32 of shape [{sq.shape[0]}], the rows of sq, not {_shape(row_weight)}")
    _check_channels(weight, sq.shape[1], "sq", None)
    _check_device(sq, "sq", weight, "weight")
    _check_device(row_weight, "row_weight", weight, "weight")
    if weight.dtype == torch.float64 and weight.device.type != "cpu" and resolve_name(backend) == "auto":
        backend = "reference"
    _, function = _select("wanda_score_stats", backend, weight.device.type)
    return function(weight.detach(), sq.detach(), row_weight.detach())


def _check_keep(keep: Tensor, t: Tensor, dim: int, name: str) -> None:
    if keep.dim() != 1 or keep.dtype != torch.int64:
        raise ValueError(f"{name}: must be 1-D int64, not {_shape(keep)}")
    if t.dim() <= dim:
        raise ValueError(f"{name}: must be None for a tensor of shape {list(t.shape)}")
    _check_device(keep, name, t, "its tensor")


def _check_keep_ranges(tensors: list[Tensor], keeps: list[Tensor | None], dim: int, name: str) -> None:
    for i, (t, keep) in enumerate(zip(tensors, keeps, strict=True)):
        if keep is not None and keep.numel() and keep.device.type == "cpu":
            low, high = (int(v) for v in keep.aminmax())
            if low < 0 or high >= t.shape[dim]:
                value = low if low < 0 else high
                raise ValueError(f"{name}[{i}]: index {value} is outside [0, {t.shape[dim]}) of a tensor {list(t.shape)}")


def compact(
    tensors: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """Gather kept rows and columns of many tensors at once: t.index_select(0, keep_out).index_select(1, keep_in).

    Args:
        tensors: any dtype, one device; at least one dimension each.
        keep_out: per tensor, indices into dimension 0 (1-D int64, on the tensor's device), or None to keep all.
        keep_in: the same for dimension 1; None for 1-D tensors.
        dtype: float32, float16, bfloat16 or float64: the results of tensors of these four dtypes are cast to it on the way, rounded
            to nearest even; other tensors keep theirs. None casts nothing.
        backend: an explicit name never falls back.

    Returns:
        New tensors (never views) of the same memory formats: channels-last stays, all else becomes contiguous. On a CUDA GPU
            small ones may lie side by side in one allocation, which is freed with the last of them.

    Raises:
        ValueError: lengths, shapes, dtypes or devices disagree, or an index is out of range (not checked on a GPU, where that
            would wait for the device).
        RuntimeError: the named backend is unavailable; the text says why.
    """
    tensors, keep_out, keep_in = list(tensors), list(keep_out), list(keep_in)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: must be float32, float16, bfloat16, float64 or None, not {dtype}")
    if tensors and tensors[0].is_cuda and _select("compact", backend, "cuda")[0] == "cuda":
        # C++ checks all of this at a fraction of the price, which for a network of small tensors is most of the time.
        try:
            with torch.no_grad():
                # Under a compiler or fake tensors results must not share memory; plain calls save 65 allocations out of 66.
                name = "compact_shared" if type(tensors[0]) in PLAIN and not torch.compiler.is_compiling() else "compact"
                return list(getattr(torch.ops.wanda_fast, name).default(tensors, keep_out, keep_in, dtype))
        except RuntimeError:
            _check_compact(tensors, keep_out, keep_in)
            raise
    tensors = [t.detach() for t in tensors]
    _check_compact(tensors, keep_out, keep_in)
    if not tensors:
        _select("compact", backend, "cpu") if backend in (None, "auto", "reference") else _check_backend_name(backend)
        return []
    _, function = _select("compact", backend, tensors[0].device.type)
    try:
        return list(function(tensors, keep_out, keep_in, dtype))
    except (RuntimeError, IndexError):
        _check_keep_ranges(tensors, keep_out, 0, "keep_out")
        _check_keep_ranges(tensors, keep_in, 1, "keep_in")
        raise


def _check_compact(tensors: list[Tensor], keep_out: list[Tensor | None], keep_in: list[Tensor | None]) -> None:
    if not len(tensors) == len(keep_out) == len(keep_in):
        lengths = f"{len(keep_out)} and {len(keep_in)}"
        raise ValueError(f"keep_out, keep_in: must have one entry per tensor, {len(tensors)}, not {lengths}")
    for i, t in enumerate(tensors):
        if t.dim() < 1:
            raise ValueError(f"tensors[{i}]: must have at least one dimension, not {_shape(t)}")
        _check_device(t, f"tensors[{i}]", tensors[0], "tensors[0]")
        rows, columns = keep_out[i], keep_in[i]
        if rows is not None:
            _check_keep(rows, t, 0, f"keep_out[{i}]")
        if columns is not None:
            _check_keep(columns, t, 1, f"keep_in[{i}]")


def conv_gram(
    x: Tensor,
    y: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    *,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normal equations of a convolution: XᵀX and XᵀY, X the unfolded patches of x and a column of ones at the end.

    The patches are never all in memory. For 3 x 3, stride 1, padding 1, most entries depend only on the difference of two taps:
    13 products over the map and a few over its border replace the 45 of the unfolded form.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (or float64); any strides. A Linear layer's input is [M, C, 1, 1].
        y: [N, C_out, H_out, W_out], the convolution's output size.
        kernel_size, stride, padding: of the convolution; no dilation, no groups, zeros outside the map.
        weight: [N] weight of each sample's rows, not negative; None for 1.
        backend: an explicit name never falls back.

    Returns:
        XᵀX [K + 1, K + 1] and XᵀY [K + 1, C_out] in float32, K = kh · kw · C. Columns go tap by tap, column
        (ky · kw + kx) · C + c: `wanda_fast.conv_gram.weight_rows` brings a weight into this order.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        RuntimeError: the named backend is unavailable; the text says why.
    """
    for name, t in (("x", x), ("y", y)):
        if t.dim() != 4 or t.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: must be floating point [N, C, H, W], not {_shape(t)}")
    kernel_size, stride, padding = tuple(kernel_size), tuple(stride), tuple(padding)  # type: ignore[assignment]
    for name, pair, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name}: must be two numbers of at least {least}, not {pair}")
    sizes = [
        conv_gram_module.output_size(x.shape[2 + i], kernel_size[i], stride[i], padding[i]) for i in range(2)
    ]
    if x.shape[0] != y.shape[0] or list(y.shape[2:]) != sizes:
        raise ValueError(f"y: must have {x.shape[0]} samples of {sizes[0]} x {sizes[1]} positions, not {_shape(y)}")
    _check_device(y, "y", x, "x")
    if weight is not None:
        if weight.shape != x.shape[:1]:
            raise ValueError(f"weight: must have shape [{x.shape[0]}], not {_shape(weight)}")
        _check_device(weight, "weight", x, "x")
    _, function = _select("conv_gram", backend, x.device.type)
    with torch.no_grad():
        return function(x.detach(), y.detach(), kernel_size, stride, padding, weight)
