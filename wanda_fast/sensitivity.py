"""How much does the predicted noise suffer when a slot gets narrower? The measure behind `--split sensitivity`.

Removing the channels R of a layer's input leaves, after the best linear compensation by the channels S that stay, the
part of them that S cannot predict: the conditional covariance Σ_R|S = Σ_RR - Σ_RS Σ_SS⁻¹ Σ_SR. Through the layer's
weight this is an error of Σ_k diag(W_k,R Σ_R|S W_k,Rᵀ) per output channel (kernel offsets k taken as independent). The
network turns an error of unit variance at output channel o into ‖J_o‖² at its own output, where J is the Jacobian;
one backward pass of random vectors v gives all of them at once, since E_v‖Jᵀv‖² = ‖J‖². So

    damage(layer, R) = Σ_o ‖J_o‖² [Σ_k W_k,R Σ_R|S W_k,Rᵀ]_oo / E‖ε‖²

is an estimate of the relative squared error of the predicted noise after a least-squares repair, from one pass over a
few images and without trying a single pruned network. Weights are not changed; gradients are those of activations.

Source: conditional covariance as in Optimal Brain Surgeon, Hassibi and Stork 1993; random probes, Hutchinson 1990.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .elimination import factor, mean_variance
from .inputs import forward, is_conditioned
from .plan import WidthProblem
from .slots import SlotMap

_RIDGE = 1e-4  # of the mean variance; keeps Σ_SS invertible where channels are copies of one another


@dataclass
class LayerStudy:
    """Second moments of one layer.

    Attributes:
        covariance: [C_in, C_in] float64 of its input over samples and positions.
        gain: [C_out] float64, Σ over positions of ‖J_o‖² per sample: output error energy per unit variance.
    """

    covariance: Tensor
    gain: Tensor


def image_weight(
    alphas_cumprod: Tensor, gamma: float = 1.0, *, least: float = 0.0, prediction_type: str = "epsilon"
) -> Callable[[Tensor], Tensor]:
    """Weight of an error of the network's output at timestep t for the sampled image: w(t) = min(1, γ · σ²), σ² = (1 - ᾱ) / ᾱ.

    An error of the predicted noise moves the predicted image by σ times as much. At clean timesteps that is next to
    nothing, so an error there must not count like one at the timesteps where the image is decided; at the noisiest ones
    later steps mend what went wrong, hence the limit. A network that predicts v = √ᾱ ε - √(1-ᾱ) x₀ or x₀ itself moves the image by
    √(1-ᾱ) or 1 times its error; its weights follow from the same limit: min(1, 1 / (γ σ²)) times 1 - ᾱ or 1.

    Args:
        alphas_cumprod: [T] of the scheduler.
        gamma: inverse noise-to-signal ratio at which the limit is reached.
        least: no weight is smaller.
        prediction_type: "epsilon", "v_prediction" or "sample".

    Returns:
        function t [N] int64 -> [N] float32, on the device of t.

    Raises:
        ValueError: an unknown prediction type.

    Source: the clipping is that of min-SNR weighting, Hang et al. 2023, arXiv:2303.09556.
    """
    signal = alphas_cumprod.detach().double().cpu()
    noise_to_signal = (1 - signal) / signal.clamp_min(1e-12)
    limit = (1 / (gamma * noise_to_signal).clamp_min(1e-12)).clamp_max(1.0)
    if prediction_type == "epsilon":
        table = (gamma * noise_to_signal).clamp_max(1.0)
    elif prediction_type == "v_prediction":
        table = limit * (1 - signal)
    elif prediction_type == "sample":
        table = limit
    else:
        raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")
    tables = {torch.device("cpu"): table.clamp_min(least).float()}

    def weight(t: Tensor) -> Tensor:
        if t.device not in tables:
            tables[t.device] = tables[torch.device("cpu")].to(t.device)
        return tables[t.device][t.long()]

    return weight


def study_layers(
    unet: Any,
    batches: Iterable[Any],
    layers: Iterable[str],
    *,
    weight: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> tuple[dict[str, LayerStudy], float]:
    """One forward and one backward pass over the batches.

    Args:
        batches: (x_t [N, C, H, W], t [N], class labels or None), on the network's device.
        layers: qualified names of Conv2d and Linear layers.
        weight: of an output error by timestep, see `image_weight`; None counts all alike.

    Returns:
        (studies by layer, E‖ε‖² per sample of the predicted noise).

    Raises:
        RuntimeError: an activation is not finite; the text names the layer.
    """
    names = list(layers)
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)
    gains: dict[str, Tensor] = {}
    samples, energy = 0, 0.0
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple, out: Tensor) -> None:
            if not torch.is_grad_enabled():  # a pass of the batches' own, along a trajectory
                return
            x = args[0].detach()
            rows = x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1]) if x.ndim == 4 else x.reshape(-1, x.shape[-1])
            rows = rows.float()
            if name not in shifts:  # near the mean, so that float32 products of what differs from it are exact enough
                shifts[name] = rows.mean(0)
            rows = rows - shifts[name]
            first = sums.get(name)
            sums[name] = rows.sum(0).double() + (0 if first is None else first)
            squares[name] = (rows.T @ rows).double() + (0 if first is None else squares[name])
            counts[name] += len(rows)

            def gradient(g: Tensor) -> None:
                others = (0, 2, 3) if g.ndim == 4 else tuple(range(g.ndim - 1))
                gains[name] = g.float().square().sum(dim=others).double() + gains.get(name, 0)

            out.register_hook(gradient)

        handles.append(module.register_forward_hook(hook))

    for name in names:
        watch(name, unet.get_submodule(name))
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.enable_grad():
            for x, t, labels in batches:
                probe_like = x.detach().requires_grad_(True)
                # Layers of the time and class embedding do not see x: let their graph start at the weights, which stay frozen
                # otherwise. (Conditioned networks are studied inside their blocks alone, where everything sees x.)
                starts = [] if is_conditioned(unet) else _embedding_starts(unet)
                frozen = [bool(start.requires_grad) for start in starts]
                for start in starts:
                    start.requires_grad_(True)
                noise = forward(unet, probe_like, t, labels)
                probe = torch.randn(noise.shape, generator=generator).to(noise)
                if weight is not None:
                    probe = probe * weight(t).sqrt().to(noise).view(-1, 1, 1, 1)
                torch.autograd.grad((noise * probe).sum(), [probe_like, *starts])
                for start, was in zip(starts, frozen):
                    start.requires_grad_(was)
                energy += float(noise.detach().double().square().sum())
                samples += len(x)
    finally:
        for handle in handles:
            handle.remove()
    studies = {}
    for name in names:
        mean = sums[name] / counts[name]
        covariance = squares[name] / counts[name] - torch.outer(mean, mean)
        if not bool(torch.isfinite(covariance).all()):
            raise RuntimeError(f"{name}: the activations are not finite")
        studies[name] = LayerStudy(covariance, gains[name] / samples)
    return studies, energy / samples


def _embedding_starts(unet: Any) -> list[Tensor]:
    """Biases of the first layers of the time embedding and of a class embedding that is made like it."""
    embeddings: tuple[Any, ...] = (unet.time_embedding, getattr(unet, "class_embedding", None))
    return [e.linear_1.bias for e in embeddings if hasattr(e, "linear_1")]


def removal_error(study: LayerStudy, weight: Tensor, removed: Tensor) -> Tensor:
    """Error energy per output channel, [C_out] float64, when input channels `removed` go and the others compensate."""
    c_in = study.covariance.shape[0]
    stay = torch.ones(c_in, dtype=torch.bool, device=study.covariance.device)
    stay[removed] = False
    kept = stay.nonzero().flatten()
    cov = study.covariance
    rest = cov[removed][:, removed]
    if len(kept):
        cross = cov[kept][:, removed]
        rest = rest - cross.T @ torch.cholesky_solve(cross, factor(cov[kept][:, kept], _RIDGE * mean_variance(cov)))
    w = weight.detach()[:, removed].double()
    w = w.flatten(2) if w.ndim == 4 else w[..., None]  # [C_out, removed, kernel offsets]
    return torch.einsum("oik,ij,ojk->o", w, rest, w).clamp_min(0)


def damage_table(
    unet: Any,
    slots: SlotMap,
    problem: WidthProblem,
    keep_for: Any,
    batches: Iterable[Any],
    *,
    weight: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Estimated relative squared error of the predicted noise for every option of every unit of a width problem.

    Args:
        keep_for: function of {slot: count} that returns {slot: kept indices}.
        batches, weight: see `study_layers`.

    Returns:
        unit -> damage per option, 0 for the whole width.
    """
    readers = {layer for s in slots.slots.values() for layer, _ in s.consumers}
    single = [a for a, (_, _, heads, _) in slots.attentions.items() if heads == 1]
    attention = {part for a in single for part in (f"{a}.to_q", f"{a}.to_k")}
    studies, energy = study_layers(unet, batches, [*sorted(readers), *sorted(attention - readers)], weight=weight, seed=seed)
    energy = energy or 1.0  # a network that predicts nothing but zeros has nothing to damage
    cache: dict[tuple[str, int], float] = {}

    def slot_damage(name: str, count: int, keep: Tensor) -> float:
        if (name, count) in cache:
            return cache[name, count]
        slot, total = slots.slots[name], 0.0
        gone = torch.ones(slot.width, dtype=torch.bool)
        gone[keep] = False
        removed = gone.nonzero().flatten()
        for layer, offset in slot.consumers:
            study = studies[layer]
            weight = unet.get_submodule(layer).weight
            error = removal_error(study, weight, (removed + offset).to(study.covariance.device))
            total += float((error * study.gain).sum()) / energy
        for a, (q, _, heads, _) in slots.attentions.items():
            if q == name and heads == 1:
                total += _logit_error(unet, a, studies, removed) / energy
        cache[name, count] = total
        return total

    result = {}
    for unit, options in problem.options.items():
        row = []
        for option in options:
            keeps: Mapping[str, Tensor] = keep_for(option)
            row.append(sum(slot_damage(n, c, keeps[n]) for n, c in option.items() if c < slots.slots[n].width))
        result[unit] = row
    return result


def _logit_error(unet: Any, attention: str, studies: Mapping[str, LayerStudy], removed: Tensor) -> float:
    """Error through the attention logits when q/k channels go, carried over with the gain of q.

    The logits lose Σ_r q_r k_r over the removed channels; an error of that energy is charged to q with the energy of k
    divided out, so that ‖J_q‖² can be used for it.
    """
    energies = []
    for part in ("to_q", "to_k"):
        layer = unet.get_submodule(f"{attention}.{part}")
        study = studies[f"{attention}.{part}"]
        w = layer.weight.detach().double()
        energies.append(torch.einsum("oi,ij,oj->o", w, study.covariance, w).cpu())
    gain = studies[f"{attention}.to_q"].gain.cpu()
    return float((energies[0] * gain)[removed].sum())
