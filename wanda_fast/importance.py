"""Criteria: how important is every output channel (row) and every input channel (column) of a layer?

A criterion is one small class. It gives row and column scores per layer; `slot_scores` combines them over all layers
that write or read a slot. To add one:

    @register
    class MeanMagnitude(Criterion):
        name = "mean-magnitude"

        def layer(self, layer, weight, context):
            size = weight.abs().flatten(2).mean(2) if weight.ndim == 4 else weight.abs()
            return size.mean(1), size.mean(0)
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import ops
from .errors import UserError

if TYPE_CHECKING:
    from .slots import Slot, SlotMap
    from .stats import ActivationStats
    from .taylor import Noised

COMBINATIONS = ("both", "producers", "consumers")


@dataclass
class Context:
    """What a criterion may use beside the weight.

    Attributes:
        act_norm: layer -> [C_in] fp32 ‖X‖₂ of its inputs; empty unless the criterion has `needs_stats`.
        score_tables: layer -> (energies [G, C_in], weights [G]) fp32 where ‖X‖₂ is a weighted sum over timestep groups, for
            `ops.wanda_score_stats`, which sums on its way; other layers and strategies have `act_norm` alone.
        seed: for criteria that draw numbers.
        backend: backend of the operations.
        stats: the whole activation statistics, where there are any.
        identities: convolutions that only copy (shortcuts put in by the plan). No criterion is asked about them.
        noised: (samples [N], timesteps [N]) -> calibration images at these timesteps, with their noise; None unless the criterion
            has `needs_images`. See `wanda_fast.taylor.NoisedImages`.
        batches: number -> that many noised images as batches (x_t, t, labels or None); None unless `needs_images`.
        images: budget of noised images, `--calib_steps`.
        timesteps: [low, high) that count, `--target_steps`.
        alphas_cumprod: [T] of the noise schedule; None unless `needs_images`.
        prediction_type: what the network predicts, as the scheduler names it.
        batch_size: images per pass.
        thr: `--thr`, the threshold on L_t / L_max of "diff-pruning".
    """

    act_norm: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    backend: str | None = None
    score_tables: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    stats: ActivationStats | None = None
    identities: frozenset[str] = frozenset()
    noised: Callable[[Tensor, Tensor], Noised] | None = None
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor, Tensor | None]]] | None = None
    images: int = 1024
    timesteps: tuple[int, int] = (0, 1000)
    alphas_cumprod: Tensor | None = None
    prediction_type: str = "epsilon"
    batch_size: int = 32
    thr: float = 0.05


class Criterion:
    """Base class of criteria.

    Attributes:
        name: what `--pruner` calls it.
        needs_stats: whether `Context.act_norm` must be filled by a calibration.
        needs_means: whether that calibration must add up the activations too (`Context.stats.sums`).
        needs_images: whether `prepare` needs images (`Context.noised`, `Context.batches`).
        comparable: whether the scores of different layers have one unit. They are then averaged as they are; otherwise
            each layer's scores are first divided by their mean over the slot, so that every layer has the same say.
        draws_anew: whether the pruned network keeps nothing but its shape, see `draw_anew`.
        notes: what `prepare` has to say about its work (JSON); becomes `criterion` in pruning.json.
    """

    name: ClassVar[str] = ""
    needs_stats: ClassVar[bool] = False
    needs_means: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    draws_anew: ClassVar[bool] = False
    notes: Mapping[str, Any] = {}

    def prepare(self, unet: nn.Module, context: Context) -> None:
        """Called once before the first layer is scored, with the dense network; for gradients and the like.

        It must leave the network as it was. What it finds out is kept in `self`.
        """

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(row scores [C_out], column scores [C_in]) of one layer, higher is more important.

        Args:
            layer: qualified name.
            weight: [C_out, C_in] or [C_out, C_in, kh, kw].
            context: see `Context`.
        """
        raise NotImplementedError

    def slot(self, unet: nn.Module, slot: Slot, context: Context) -> Tensor | None:
        """Scores [width] of a whole slot, for criteria that cannot judge layer by layer; None leaves it to `layer`."""
        return None


CRITERIA: dict[str, type[Criterion]] = {}


def register(criterion: type[Criterion]) -> type[Criterion]:
    """Class decorator: make a criterion known under its `name`.

    Raises:
        ValueError: the name is empty or taken.
    """
    if not criterion.name or criterion.name in CRITERIA:
        raise ValueError(f"a criterion needs a name of its own, got {criterion.name!r}")
    CRITERIA[criterion.name] = criterion
    return criterion


def get_criterion(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        UserError: unknown name; the text lists the known ones.
    """
    if name not in CRITERIA:
        raise UserError(f"unknown pruner {name!r}; known: {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]()


@register
class WandaDiff(Criterion):
    """S = |W| · ‖X‖₂ with activation norms over diffusion timesteps.

    Source: Wanda, Sun et al. 2023, arXiv:2306.11695, §3; here by rows and columns, for structured pruning.
    """

    name = "wanda-diff"
    needs_stats = True

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        table = context.score_tables.get(layer)
        if table is None and layer not in context.act_norm:
            raise UserError(f"the activation statistics have no layer {layer}: they belong to another model")
        values = context.act_norm[layer] if table is None else table[0]
        if values.shape[-1] != weight.shape[1]:
            raise UserError(
                f"the activation statistics of {layer} have {values.shape[-1]} channels, the layer reads "
                f"{weight.shape[1]}: they belong to another model"
            )
        values = values.to(weight.device)
        if table is None:
            return ops.wanda_score(weight, values, backend=context.backend)
        return ops.wanda_score_stats(weight, values, table[1].to(weight.device), backend=context.backend)


@register
class Taylor(Criterion):
    """S = |Σ w · ∂L/∂w| over a row or column: what first order says the loss changes when these weights become zero.

    L is the noise-prediction loss summed over all timesteps (the loss of v or x₀ where the network predicts these). This is the
    baseline "taylor" of Diff-Pruning's published code, torch-pruning's `TaylorImportance(multivariable=True)`: a signed sum per
    layer, then its absolute value, then the plain mean over all layers that write or read the channel. Weights alone count, biases
    and norms do not.

    Source: Molchanov et al. 2019, arXiv:1906.10771, equation 8 without the square; Fang et al. 2023, arXiv:2305.10924.
    """

    name = "taylor"
    needs_images = True
    comparable = True
    elementwise: ClassVar[bool] = False
    has_threshold: ClassVar[bool] = False

    def prepare(self, unet: nn.Module, context: Context) -> None:
        from .taylor import loss_gradients

        if context.noised is None:
            raise ValueError(f"the criterion {self.name} needs images")
        found = loss_gradients(
            unet, context.noised, images=context.images, timesteps=context.timesteps, batch_size=context.batch_size,
            thr=context.thr if self.has_threshold else None,
        )  # fmt: skip
        self.notes = found.summary()
        self.gradients = {  # an embedding is scored as the matrix that writes the slot, outputs first
            n: g.T if isinstance(unet.get_submodule(n), nn.Embedding) else g for n, g in found.gradients.items()
        }

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        change = weight.double() * self.gradients[layer].to(weight.device, torch.float64)
        if self.elementwise:
            change = change.abs()
        per_pair = change.flatten(2).sum(2) if change.ndim > 2 else change
        return per_pair.sum(1).abs(), per_pair.sum(0).abs()


@register
class DiffPruning(Taylor):
    """S = Σ |w · Σ_t ∂L_t/∂w| over a row or column, t over the timesteps with L_t / L_max > thr.

    The timesteps are added from clean to noisy, t = 0, 1, 2, …, until the loss has fallen to `--thr` of the largest loss so far:
    predicting the noise of a nearly clean image is hard, that of a nearly pure one is easy, and the easy timesteps' gradients
    are held to be noise. The absolute value is taken per weight, torch-pruning's `TaylorImportance(multivariable=False)`.

    Source: Diff-Pruning, Fang et al. 2023, arXiv:2305.10924, §4; its published code also adds the timestep that fell below the
    threshold, the paper's definition, followed here, does not.
    """

    name = "diff-pruning"
    elementwise = True
    has_threshold = True


@register
class Reinit(WandaDiff):
    """The plan of "wanda-diff", every weight drawn anew: what the smaller architecture alone is worth.

    Widths and kept channels are those of "wanda-diff" with the same options; after the cut `draw_anew` replaces the weights of all
    layers and norms by a fresh initialisation, so that which channels were kept no longer matters, only how many. With
    `--repair lstsq` the result is what the repair can do on its own: it fits every layer anew to the dense network's outputs, so
    trained weights are missing only where it does not reach.

    Source: the baseline "reinit" of Diff-Pruning's published code, Fang et al. 2023, arXiv:2305.10924 (there with random channels).
    """

    name = "reinit"
    draws_anew = True


def draw_anew(network: nn.Module, seed: int) -> None:
    """Give every layer and norm of a network a fresh initialisation, each module's own `reset_parameters`.

    The draws are made on the CPU and depend on the seed alone, not on the device or on what was drawn before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if callable(getattr(module, "reset_parameters", None)):
                fresh = nn.Module.to(copy.deepcopy(module), device="cpu", dtype=torch.float32)
                fresh.reset_parameters()  # type: ignore[operator]
                module.load_state_dict(fresh.state_dict())


@register
class WandaFluctuation(WandaDiff):
    """S = |W| · ‖X - mean X‖₂: a channel that is the same everywhere is worth nothing, since a bias can stand in for it.

    ‖X‖₂ as in "wanda-diff", times the square root of the share of the channel's energy that is not its mean; the mean is that
    over all samples, positions and timesteps of the calibration.

    Source: the fluctuation of FLAP, An et al. 2023, arXiv:2312.11983, there squared and with ‖W‖₂².
    """

    name = "wanda-fluctuation"
    needs_means = True

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        stats = context.stats
        if stats is None or layer not in stats.tables:  # an embedding, or statistics of another model, which is refused
            return super().layer(layer, weight, dataclasses.replace(context, score_tables={}))
        if layer not in stats.sums:
            raise UserError("these activation statistics hold no means; calibrate with the pruner wanda-fluctuation")
        mean = stats.sums[layer] / (int(stats.counts.sum()) * stats.positions[layer])
        energy = stats.tables[layer].double().sum(0) / (int(stats.counts.sum()) * stats.positions[layer])
        share = (1 - mean.square() / energy.clamp_min(1e-300)).clamp(0, 1)
        norm = (context.act_norm[layer].double() * share.sqrt()).float()
        return super().layer(layer, weight, dataclasses.replace(context, act_norm={layer: norm}, score_tables={}))


@register
class LeastSquaresResidual(Criterion):
    """What a least-squares refit of the readers cannot restore: the residual of the repair itself, weighed by what it does to the
    predicted noise.

    Channels are removed one at a time, the cheapest first, and the others take over after each; the score is the place in that
    order (see `wanda_fast.elimination`). An error at a layer's output counts by the squared Jacobian of the predicted noise, with
    the timesteps weighed as in `wanda_fast.sensitivity`. Consumers alone decide; a slot that none reads linearly
    (attention q and k) is scored by the energy its layers write, weighed alike.
    """

    name = "lstsq-residual"
    needs_images = True
    comparable = True
    _MOST_IMAGES = 256

    def prepare(self, unet: nn.Module, context: Context) -> None:
        from .elimination import output_energy, precision
        from .sensitivity import image_weight, study_layers

        if context.batches is None or context.alphas_cumprod is None:
            raise ValueError(f"the criterion {self.name} needs images")
        layers: dict[str, Any] = {n: m for n, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        studies, _ = study_layers(
            unet, context.batches(min(context.images, self._MOST_IMAGES)), layers,
            weight=image_weight(context.alphas_cumprod, prediction_type=context.prediction_type), seed=context.seed,
        )  # fmt: skip
        self.readers = {
            n: (precision(s.covariance), output_energy(layers[n].weight, s.gain)) for n, s in studies.items()
        }
        self.written = {}
        for n, s in studies.items():
            w = layers[n].weight.detach().double()
            w = w.flatten(2) if w.ndim == 4 else w[..., None]
            self.written[n] = s.gain.double() * torch.einsum("oik,ij,ojk->o", w, s.covariance.double(), w)

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if layer not in self.readers:  # an embedding: its readers decide
            return torch.zeros(weight.shape[0]), torch.zeros(weight.shape[1])
        inverse, energy = self.readers[layer]
        return self.written[layer], energy.diagonal() / inverse.diagonal()

    def slot(self, unet: nn.Module, slot: Slot, context: Context) -> Tensor | None:
        from .elimination import eliminate

        readers = [(n, o) for n, o in slot.consumers if n in self.readers and n not in context.identities]
        if not readers:
            return None
        parts = []
        for layer, offset in readers:
            here = slice(offset, offset + slot.width)
            parts.append(tuple(m[here, here] for m in self.readers[layer]))
        return eliminate(parts)[0].double() + 1  # type: ignore[arg-type]


@register
class Magnitude(Criterion):
    """Sum of |W| per row and column: Wanda with all norms equal to one."""

    name = "magnitude"

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        ones = torch.ones(weight.shape[1], device=weight.device)
        return ops.wanda_score(weight, ones, backend=context.backend)


@register
class Random(Criterion):
    """Uniform random scores, a function of the seed and the layer's name alone."""

    name = "random"

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        digest = hashlib.sha256(f"{context.seed}/{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.rand(weight.shape[0], generator=generator), torch.rand(weight.shape[1], generator=generator)


def slot_scores(
    unet: Any, slots: SlotMap, criterion: Criterion, context: Context, *, combine: str = "both"
) -> dict[str, Tensor]:
    """Importance of every channel of every slot, from all its producers and all its consumers.

    Each layer's scores are divided by their mean over the slot's channels, so that every layer has the same say.
    `combine="both"` averages the mean over the producers (rows) with the mean over the consumers (columns);
    "producers" and "consumers" use one side alone (a slot without that side, such as attention q/k, uses the other).
    Scores of a `comparable` criterion have one unit: they are averaged undivided over all layers of the sides asked for.
    `Criterion.prepare` must have run where the criterion has one.

    Returns:
        slot -> [width] float64 on the CPU, with mean 1 (0 for a slot whose scores are all zero).

    Raises:
        UserError: unknown `combine`.
        RuntimeError: a score is not finite; the text names the layer.
    """
    if combine not in COMBINATIONS:
        raise UserError(f"unknown combination {combine!r}; known: {', '.join(COMBINATIONS)}")
    cache: dict[str, tuple[Tensor, Tensor]] = {}

    def both(layer: str) -> tuple[Tensor, Tensor]:
        if layer not in cache:
            module = unet.get_submodule(layer)
            weight = module.weight.detach()
            if isinstance(module, nn.Embedding):  # [classes, C_out]: its columns are what it writes
                alone = dataclasses.replace(context, act_norm={layer: torch.ones(weight.shape[0])})
                pair = criterion.layer(layer, weight.T.contiguous(), alone)[0], torch.empty(0)
            else:
                pair = criterion.layer(layer, weight, context)
            for values in pair:
                if not torch.isfinite(values).all():
                    raise RuntimeError(f"{layer}: the {criterion.name} scores are not finite")
            cache[layer] = pair[0].double().cpu(), pair[1].double().cpu()
        return cache[layer]

    def side(layers: list[tuple[str, int]], which: int, width: int) -> list[Tensor]:
        parts = []
        for layer, offset in layers:
            if layer in context.identities:  # a copy prefers no channel
                parts.append(torch.full((width,), 0.0 if criterion.comparable else 1.0, dtype=torch.float64))
                continue
            values = both(layer)[which][offset : offset + width]
            mean = values.mean()
            if not criterion.comparable:
                values = values / mean if mean > 0 else torch.zeros(width, dtype=torch.float64)
            parts.append(values)
        return parts

    def average(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).mean(0)

    result = {}
    for name, slot in slots.slots.items():
        whole = criterion.slot(unet, slot, context)
        if whole is not None:
            if not torch.isfinite(whole).all():
                raise RuntimeError(f"{name}: the {criterion.name} scores are not finite")
            result[name] = whole.double().cpu() / (whole.double().mean().item() or 1.0)
            continue
        rows, columns = side(slot.producers, 0, slot.width), side(slot.consumers, 1, slot.width)
        if not columns or (combine == "producers" and rows):
            score = average(rows)
        elif not rows or combine == "consumers":
            score = average(columns)
        elif criterion.comparable:
            score = average([*rows, *columns])
        else:
            score = (average(rows) + average(columns)) / 2
        if criterion.comparable and score.mean() > 0:
            score = score / score.mean()
        result[name] = score
    return result
