"""Gradients summed over timesteps, and the criteria that use them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from networks import random_unet
from runs import one_thread as one_thread
from torch import Tensor, nn

from wanda_fast.importance import Context, get_criterion, slot_scores
from wanda_fast.sampling import noise
from wanda_fast.slots import find_slots
from wanda_fast.taylor import Noised, NoisedImages, loss_gradients, timestep_grid

SCHEDULER = DDPMScheduler()


def pictures(n: int = 5, size: int = 16) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


def expected_gradients(unet: Any, images: Tensor, grid: list[int], each: int, seed: int = 0) -> dict[str, Tensor]:
    """Σ_t ∂L_t/∂w in float64 from one backward pass over the sum, with the noising of diffusers."""
    twin = nn.Module.to(copy.deepcopy(unet), torch.float64).requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for k, t in enumerate(grid):
        samples = list(range(k * each, (k + 1) * each))
        eps = noise((3, 16, 16), samples, seed, "calibration")
        clean = torch.stack([images[i % len(images)] for i in samples])
        steps = torch.full((each,), t)
        out = twin(SCHEDULER.add_noise(clean, eps, steps).double(), steps).sample
        total = total + (out - eps).square().mean()
    total.backward()
    return {n: m.weight.grad for n, m in twin.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def test_values_are_those_of_an_independent_computation() -> None:
    unet, images = random_unet("plain"), pictures()
    context = Context(noised=NoisedImages(unet, SCHEDULER, images), images=40, timesteps=(0, 1000), batch_size=3)
    grid, each = timestep_grid(40, 0, 1000)
    assert (len(grid), each) == (20, 2)
    expected = expected_gradients(unet, images, grid, each)
    for name in ("taylor", "diff-pruning"):
        criterion = get_criterion(name)
        context.thr = 0.0  # all timesteps
        criterion.prepare(unet, context)
        for layer, gradient in expected.items():
            torch.testing.assert_close(criterion.gradients[layer].double(), gradient, rtol=2e-3, atol=1e-6)
            weight = unet.get_submodule(layer).weight
            change = weight.double() * gradient
            change = change.abs() if name == "diff-pruning" else change
            sums = [torch.stack([part.sum() for part in change.unbind(dim)]).abs() for dim in (0, 1)]
            rows, columns = criterion.layer(layer, weight, context)
            torch.testing.assert_close(rows, sums[0], rtol=2e-3, atol=1e-5)
            torch.testing.assert_close(columns, sums[1], rtol=2e-3, atol=1e-5)


def test_scores_of_one_unit_are_averaged_over_all_layers_undivided() -> None:
    unet = random_unet("classes")
    slots, criterion = find_slots(unet), get_criterion("taylor")
    context = Context(noised=NoisedImages(unet, SCHEDULER, pictures()), images=16)
    criterion.prepare(unet, context)
    slot = slots.slots["conv_in"]
    parts = []
    for layers, which in ((slot.producers, 0), (slot.consumers, 1)):
        for layer, offset in layers:
            parts.append(criterion.layer(layer, unet.get_submodule(layer).weight, context)[which][offset : offset + slot.width])
    mean = torch.stack(parts).mean(0)
    scores = slot_scores(unet, slots, criterion, context)
    torch.testing.assert_close(scores["conv_in"], mean / mean.mean())
    # The embedding of the classes writes a slot too, outputs last in its table.
    table = unet.class_embedding.weight
    product = (table * criterion.gradients["class_embedding"].T).sum(0).abs()
    torch.testing.assert_close(criterion.layer("class_embedding", table.T, context)[0], product.double(), rtol=1e-4, atol=1e-9)
    # A layer that only copies has no say.
    copies = [n for n, _ in slot.consumers[1:]]
    context.identities = frozenset(copies)
    kept = [p for p, n in zip(parts, [*[n for n, _ in slot.producers], *[n for n, _ in slot.consumers]]) if n not in copies]
    mean = torch.stack(kept).sum(0)
    torch.testing.assert_close(slot_scores(unet, slots, criterion, context)["conv_in"], mean / mean.mean())


@pytest.mark.parametrize(
    "budget,low,high,count,each",
    [(1024, 0, 1000, 64, 16), (128_000, 0, 1000, 1000, 128), (256, 0, 1000, 16, 16), (8, 0, 1000, 8, 1), (100, 0, 1000, 16, 6),
     (1, 0, 1000, 1, 1), (64, 700, 703, 3, 21), (1024, 0, 300, 64, 16)],
)  # fmt: skip
def test_grid(budget: int, low: int, high: int, count: int, each: int) -> None:
    grid, images = timestep_grid(budget, low, high)
    assert (len(grid), images) == (count, each)
    assert grid[0] == low and grid == sorted(set(grid)) and grid[-1] < high and len(grid) * images <= budget


class Scripted(nn.Module):
    """Its loss at timestep t is script[t] · w², w = 1."""

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.script, self.passes = script, 0
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.layer.weight)

    def forward(self, x: Tensor, t: Tensor, class_labels: Any = None, return_dict: bool = True) -> tuple[Tensor]:
        self.passes += 1
        size = torch.tensor([self.script[int(i)] for i in t]).sqrt().view(-1, 1, 1, 1)
        return (self.layer((torch.ones_like(x) * size).unsqueeze(-1)).squeeze(-1),)


def no_noise(samples: Tensor, t: Tensor) -> Noised:
    zeros = torch.zeros(len(samples), 1, 2, 2)
    return Noised(zeros, t, None, zeros)


@pytest.mark.parametrize(
    "script,thr,included,stopped",
    [
        ([0.5, 1.0, 0.4, 0.06, 0.0499, 0.9], 0.05, 4, 4),  # the largest loss comes second
        ([0.5, 1.0, 0.4, 0.06, 0.0501, 0.9], 0.05, 6, None),
        ([0.5, 1.0, 0.4, 0.06, 0.0499, 0.9], None, 6, None),
        ([0.5, 0.02, 1.0, 0.4, 0.4, 0.4], 0.05, 1, 1),  # what comes later can no longer help
        ([1.0, 0.9, 0.0, 0.5, 0.5, 0.5], 0.0, 2, 2),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0.05, 1, 1),  # one timestep is always there
    ],
)
@pytest.mark.parametrize("batch_size", [8, 2], ids=["whole", "in parts"])
def test_threshold(script: list[float], thr: float | None, included: int, stopped: int | None, batch_size: int) -> None:
    network = Scripted(script)
    found = loss_gradients(network, no_noise, images=18, timesteps=(0, 6), batch_size=batch_size, thr=thr)
    assert found.timesteps == list(range(included)) and found.stopped_at == stopped
    assert found.losses == pytest.approx(script[:included])
    assert float(found.gradients["layer"]) == pytest.approx(2 * sum(script[:included]))
    assert found.summary()["timesteps"] == included


def test_the_batch_size_changes_nothing() -> None:
    unet, noised = random_unet("plain"), None
    noised = NoisedImages(unet, SCHEDULER, pictures())
    runs = [loss_gradients(unet, noised, images=48, batch_size=b, thr=0.05) for b in (1, 2, 32)]
    for other in runs[1:]:
        assert other.timesteps == runs[0].timesteps and other.stopped_at == runs[0].stopped_at
        assert other.losses == pytest.approx(runs[0].losses, rel=1e-5)
        torch.testing.assert_close(other.gradients["conv_in"], runs[0].gradients["conv_in"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("learns", [False, True])
def test_the_network_is_left_as_it_was(learns: bool) -> None:
    unet = random_unet("plain").train().requires_grad_(learns)
    gradient = torch.ones_like(unet.conv_in.weight)
    unet.conv_in.weight.grad = gradient
    weights = {n: p.detach().clone() for n, p in unet.named_parameters()}
    random_state = torch.get_rng_state()
    noised = NoisedImages(unet, SCHEDULER, pictures())
    with torch.no_grad():
        a, b = (loss_gradients(unet, noised, images=16, batch_size=4) for _ in range(2))
    assert all(torch.equal(a.gradients[n], b.gradients[n]) for n in a.gradients)  # no randomness of its own
    assert a.gradients["conv_in"].abs().sum() > 0 and a.gradients["time_embedding.linear_1"].abs().sum() > 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert unet.training and all(p.requires_grad == learns for p in unet.parameters())
    assert unet.conv_in.weight.grad is gradient and bool((gradient == 1).all())
    assert all(p.grad is None for n, p in unet.named_parameters() if n != "conv_in.weight")
    for n, p in unet.named_parameters():
        assert torch.equal(p, weights[n]) and p.is_contiguous()


def test_what_is_not_finite_names_the_layer() -> None:
    unet = random_unet("plain")
    noised = NoisedImages(unet, SCHEDULER, pictures())
    unet.mid_block.resnets[0].conv2.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"^mid_block\.resnets\.0\.conv2: NaN or Inf at timestep 0"):
        loss_gradients(unet, noised, images=16)
    assert not any(p.requires_grad for p in unet.parameters()) and not any(m._forward_hooks for m in unet.modules())

    class Root(Scripted):
        def forward(self, x: Tensor, t: Tensor, class_labels: Any = None, return_dict: bool = True) -> tuple[Tensor]:
            return (x + (self.layer.weight * 0).sqrt().sum() * 0,)

    with pytest.raises(RuntimeError, match=r"^layer: the gradient of the loss is not finite"):
        loss_gradients(Root([1.0]), no_noise, images=1, timesteps=(0, 1))


def test_noised_images_are_those_of_the_calibration() -> None:
    """x_t and noise of sample i depend on (seed, i) alone, and the labels too."""
    unet = random_unet("classes")
    noised = NoisedImages(unet, SCHEDULER, pictures(), seed=4)
    x, t, labels, eps = noised(torch.tensor([7, 2]), torch.tensor([10, 900]))
    again = noised(torch.tensor([2]), torch.tensor([900]))
    assert torch.equal(again.x[0], x[1]) and torch.equal(again.target[0], eps[1]) and again.labels[0] == labels[1]
    torch.testing.assert_close(x, SCHEDULER.add_noise(pictures()[[2, 2]], eps, t))
    assert not torch.equal(NoisedImages(unet, SCHEDULER, pictures(), seed=5)(torch.tensor([2]), torch.tensor([900])).x, again.x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_what_the_network_predicts(kind: str) -> None:
    unet, scheduler = random_unet("plain"), DDPMScheduler(prediction_type=kind)
    samples, t = torch.tensor([3, 1]), torch.tensor([400, 400])
    x, _, _, target = NoisedImages(unet, scheduler, pictures())(samples, t)
    eps = NoisedImages(unet, SCHEDULER, pictures())(samples, t).target
    clean = pictures()[samples]
    expected = {"epsilon": eps, "sample": clean, "v_prediction": scheduler.get_velocity(clean, eps, t)}[kind]
    torch.testing.assert_close(target, expected)

    def one(_samples: Tensor, _t: Tensor) -> Noised:
        return Noised(x, t, None, target)

    found = loss_gradients(unet, one, images=2, timesteps=(400, 401))
    loss = float((unet(x, t).sample - expected).square().mean())
    assert found.losses == pytest.approx([loss], rel=1e-4)


def test_a_criterion_that_needs_images_says_so() -> None:
    for name in ("taylor", "lstsq-residual"):
        with pytest.raises(ValueError, match=f"{name} needs images"):
            get_criterion(name).prepare(random_unet("plain"), Context())


def test_torch_pruning_has_the_same_scores() -> None:
    """Row and column scores of one layer against `TaylorImportance` of torch-pruning, which takes a dependency group."""
    import torch_pruning as tp
    from torch_pruning.pruner import function

    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3)
    F.conv2d(torch.randn(2, 6, 9, 9), conv.weight, conv.bias).square().mean().backward()
    for name, multivariable in (("taylor", True), ("diff-pruning", False)):
        criterion = get_criterion(name)
        criterion.gradients = {"layer": conv.weight.grad}
        ours = criterion.layer("layer", conv.weight.detach(), Context())
        for which, handler in enumerate((function.prune_conv_out_channels, function.prune_conv_in_channels)):
            idxs = list(range(conv.weight.shape[which]))
            dep = SimpleNamespace(target=SimpleNamespace(module=conv), handler=handler)

            class Item(tuple):
                root_idxs = idxs

            score = tp.importance.TaylorImportance(multivariable=multivariable, normalizer=None)([Item((dep, idxs))])
            torch.testing.assert_close(ours[which].float(), score, rtol=1e-4, atol=1e-7)
