"""One network, a set of weights for each range of timesteps: better images at the same multiply-accumulates per step.

A fit over all timesteps is a compromise: a layer's inputs at a noisy timestep and at a clean one are different data, and the weights that
repair the one are not those that repair the other. So each range of timesteps gets weights of its own (an *expert*), fitted on its range
alone, for the layers that gain by it: convolutions and norms on maps of at least half of the image's width, which do most of the work and
hold the smaller part of the parameters, and all linear layers (time projections, attention). The deep convolutions are shared. A step runs
one expert, so its cost is that of the pruned network; memory grows by what the experts do not share.

`add_experts` builds the structure: the network itself is the expert of the first range, every other expert is a twin whose shared layers
are the network's own modules and whose other layers are registered under `experts.<number>.<layer>`. So the state dict holds each tensor
once.

Source: expert denoisers, Balaji et al. 2022, arXiv:2211.01324, which are trained; these are fitted in closed form
(benchmarks/results/recipe-h200.md, "Experts").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

MOST = 16  # experts
_GROWTH = 1.5  # the i-th of n ranges begins at T · (i / n)^1.5: clean timesteps, where a network's tasks differ most, get shorter ones
_OWN_WIDTH = 0.5  # of the image: convolutions and norms on maps at least so wide are the experts' own


def parse_experts(value: int | str, total: int | None = None) -> tuple[int, ...]:
    """First timesteps of the second and later ranges: of a number of ranges, or as they are listed ("300,600").

    Args:
        value: 1 for one set of weights, which gives ().
        total: timesteps of the schedule; None where it is not known yet, and the value is only checked.

    Raises:
        UserError: it is neither, there are more than `MOST`, or a range would be empty.
    """
    text, steps = str(value), total or 10**9
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"experts is a number of ranges of timesteps, or where the later ones begin, such as 300,600; got {text!r}") from None
    if "," not in text and 1 <= numbers[0] <= MOST:
        starts = tuple(round(steps * (i / numbers[0]) ** _GROWTH) for i in range(1, numbers[0]))
    elif "," not in text:
        raise UserError(f"experts must be 1 to {MOST}, or list where the later ranges of timesteps begin (one alone: 0,500); got {text}")
    else:
        starts = tuple(n for n in numbers if n != 0)
    edges = (0, *starts, steps)
    if len(edges) - 1 > MOST or any(a >= b for a, b in pairwise(edges)):
        last = "the model's last timestep" if total is None else str(total - 1)
        raise UserError(f"experts: ranges of timesteps begin at rising numbers from 1 to {last}, at most {MOST} ranges; got {text!r}")
    return starts


def own_layers(unet: Any) -> list[str]:
    """Layers and norms that every expert has for itself (see above), in the order of `named_modules`.

    Args:
        unet: a UNet2DModel; it is not run, a copy on the meta device is.
    """
    from .sampling import image_shape, watch_shapes

    width = image_shape(unet)[2]
    own = set()

    def note(name: str, layer: nn.Module, out: Tensor) -> None:
        if isinstance(layer, nn.Linear) or out.ndim != 4 or out.shape[-1] >= _OWN_WIDTH * width:
            own.add(name)

    watch_shapes(unet, (nn.Conv2d, nn.Linear, nn.GroupNorm), note)
    return [name for name, _ in unet.named_modules() if name in own]


def read_record(record: Any) -> tuple[tuple[int, ...], list[str]]:
    """(starts of the later ranges, own layers) of the entry `experts` of a pruning record.

    Raises:
        UserError: the entry is damaged.
    """
    try:
        starts, layers = [int(s) for s in record["starts"]], [str(name) for name in record["layers"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"the pruning record's experts are damaged: {type(error).__name__}: {error}") from None
    if not 1 <= len(starts) < MOST or any(a >= b for a, b in pairwise((0, *starts))) or not layers or len(set(layers)) < len(layers):
        raise UserError("the pruning record's experts are damaged: they need rising timesteps and different layers")
    return tuple(starts), layers


def add_experts(network: Any, starts: Sequence[int], layers: Collection[str]) -> None:
    """Give the network an expert for each range that begins at one of `starts`, with copies of its present weights.

    Args:
        network: a PrunedUNet2DModel without experts.
        starts: rising timesteps of at least 1.
        layers: names of Conv2d, Linear and GroupNorm modules.

    Raises:
        UserError: a name is none of a layer.
    """
    modules = dict(network.named_modules())
    wrong = next((name for name in layers if not isinstance(modules.get(name), (nn.Conv2d, nn.Linear, nn.GroupNorm))), None)
    if wrong is not None:
        raise UserError(f"the pruning record's experts do not fit the configuration: there is no layer {wrong}")
    own = set(layers)
    twins, branches = [], []
    for _ in starts:
        twin, branch = copy.deepcopy(network), nn.Module()
        for name, module in modules.items():
            if name in own:
                _attach(branch, name, twin.get_submodule(name))
            elif not any(module.children()):
                parent, _, leaf = name.rpartition(".")
                twin.get_submodule(parent)._modules[leaf] = module
        twins.append(twin)
        branches.append(branch)
    network.experts = nn.ModuleList(branches)
    network.expert_starts, network.expert_twins = tuple(starts), twins  # a plain list: what the twins share is registered once
    network.register_to_config(pruning={**network.config["pruning"], "experts": {"starts": list(starts), "layers": list(layers)}})


def _attach(branch: nn.Module, name: str, module: nn.Module) -> None:
    """Register a module under a dotted name, with empty modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in branch._modules:
            branch.add_module(part, nn.Module())
        branch = branch._modules[part]  # type: ignore[assignment]
    branch.add_module(leaf, module)


def join(networks: Sequence[Any], starts: Sequence[int], layers: Collection[str]) -> Any:
    """One network with these as its experts: the first one, changed in place.

    Args:
        networks: equal but for the weights of `layers`, in the order of their ranges.
        starts: where the range of each but the first begins.
    """
    whole = networks[0]
    add_experts(whole, starts, layers)
    with torch.no_grad():
        for twin, source in zip(whole.expert_twins, networks[1:], strict=True):
            for name in layers:
                twin.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())
    return whole.requires_grad_(False).eval()


def count_experts(network: Any) -> int:
    """Sets of weights; 1 for a network without experts."""
    return len(getattr(network, "expert_starts", ())) + 1


def has_experts(network: Any) -> bool:
    """Whether the network has several sets of weights."""
    return count_experts(network) > 1


def refuse_experts(network: Any, what: str) -> None:
    """
    Raises:
        UserError: the network has experts, which `what` cannot work with.
    """
    if has_experts(network):
        count = count_experts(network)
        raise UserError(f"{what} works on networks with one set of weights; this one has {count} (--experts), one for each range of timesteps")


def dispatch(
    experts: Sequence[Callable[..., Any]], starts: Sequence[int], sample: Tensor, timestep: Any, class_labels: Tensor | None
) -> Tensor:
    """The output of the expert of each sample's timestep, [N, C, H, W].

    Args:
        experts: one for each range, to be called as a UNet2DModel.
        starts: where the ranges but the first begin.
        sample: [N, C, H, W].
        timestep: a number, or a tensor of one or N timesteps.
        class_labels: [N] or None.
    """
    t = timestep if isinstance(timestep, Tensor) else torch.tensor([timestep])

    def run(index: int, x: Tensor, at: Any, labels: Tensor | None) -> Tensor:
        return experts[index](x, at, class_labels=labels, return_dict=False)[0]

    if t.device.type == "meta":  # shapes alone, and all experts have the same
        return run(0, sample, timestep, class_labels)
    t = t.flatten()
    which = torch.bucketize(t, torch.tensor(starts, device=t.device), right=True)
    used: list[int] = which.unique().tolist()
    if len(used) == 1:
        return run(used[0], sample, timestep, class_labels)
    rows = [(which == index).nonzero().flatten() for index in used]
    outs = [
        run(index, sample[chosen], t[chosen], None if class_labels is None else class_labels[chosen])
        for index, chosen in zip(used, rows, strict=True)
    ]
    return torch.cat(outs)[torch.cat(rows).argsort()]
