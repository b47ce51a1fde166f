"""The damage estimate: second moments and gains against plain computations, and its ranking against real removals."""

from __future__ import annotations

import pytest
import torch
from networks import inputs_for, random_unet

from wanda_fast.compact import compact, cost_model
from wanda_fast.plan import build_plan, choose_channels, free_problem
from wanda_fast.sensitivity import LayerStudy, damage_table, image_weight, removal_error, study_layers
from wanda_fast.slots import find_slots


def batches_of(unet, n: int = 4, count: int = 2) -> list:
    found = []
    for i in range(count):
        given = inputs_for(unet, n, seed=i)
        found.append((given["sample"], given["timestep"], given.get("class_labels")))
    return found


def adds_noise(scale: float):
    """A forward hook that adds noise to a layer's output."""
    g = torch.Generator().manual_seed(0)
    return lambda _module, _args, out: out + scale * torch.randn(out.shape, generator=g)


def test_covariance_is_that_of_the_inputs() -> None:
    unet = random_unet("plain")
    seen = []
    layer = "down_blocks.1.resnets.0.conv1"
    handle = unet.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    studies, energy = study_layers(unet, batches_of(unet), [layer])
    handle.remove()
    rows = torch.cat([x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in seen]).double()
    torch.testing.assert_close(studies[layer].covariance, torch.cov(rows.T, correction=0), rtol=1e-4, atol=1e-7)
    assert energy > 0
    assert not unet.time_embedding.linear_1.bias.requires_grad


def test_gain_predicts_the_error_of_small_noise() -> None:
    """Noise of variance v at a layer's output makes an error of v · Σ gain at the network's output."""
    unet = random_unet("plain")
    for layer in ("mid_block.resnets.0.conv2", "up_blocks.2.resnets.0.conv1", "time_embedding.linear_2"):
        batches = batches_of(unet, 8, 6)
        studies, _ = study_layers(unet, batches, [layer])
        scale = 1e-3
        error, samples = 0.0, 0
        noisy = adds_noise(scale)
        for x, t, _ in batches:
            with torch.no_grad():
                clean = unet(x, t).sample
                module = unet.get_submodule(layer)
                handle = module.register_forward_hook(noisy)
                error += float((unet(x, t).sample - clean).double().square().sum())
                handle.remove()
            samples += len(x)
        predicted = scale**2 * float(studies[layer].gain.sum())
        assert predicted == pytest.approx(error / samples, rel=0.25), layer


@pytest.mark.parametrize("name", ["classes", "class_timestep"])
def test_layers_of_a_class_embedding_are_studied_too(name: str) -> None:
    """They see no image: what flows back to them starts at their own first layer."""
    unet = random_unet(name)
    layers = [n for n in ("class_embedding.linear_1", "class_embedding.linear_2") if name == "class_timestep"]
    layers += ["time_embedding.linear_2", "up_blocks.0.resnets.0.time_emb_proj"]
    studies, _ = study_layers(unet, batches_of(unet), layers)
    assert all(float(studies[n].gain.sum()) > 0 for n in layers)
    if name == "class_timestep":  # both embeddings are added up, so an error of either does the same
        torch.testing.assert_close(studies["class_embedding.linear_2"].gain, studies["time_embedding.linear_2"].gain)
    assert not any(p.requires_grad for p in unet.parameters())


def test_copied_channels_cost_nothing_to_remove() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(500, 3, generator=g, dtype=torch.float64)
    rows = torch.cat([base, base[:, :1]], dim=1)  # channel 3 is a copy of channel 0
    study = LayerStudy(torch.cov(rows.T, correction=0), torch.ones(5, dtype=torch.float64))
    weight = torch.randn(5, 4, 3, 3, generator=g)
    free = float(removal_error(study, weight, torch.tensor([3])).sum())
    dear = float(removal_error(study, weight, torch.tensor([1])).sum())
    everything = removal_error(study, weight, torch.arange(4))
    w = weight.double().flatten(2)
    exact = torch.einsum("oik,ij,ojk->o", w, study.covariance, w)
    torch.testing.assert_close(everything, exact)
    assert free < 1e-3 * dear


def test_large_means_and_few_rows_leave_a_usable_covariance() -> None:
    """Float32 products of inputs around 300 would be off by more than the spread of 1."""
    unet = random_unet("plain")
    layer = "down_blocks.0.resnets.0.conv2"
    handle = unet.get_submodule(layer).register_forward_pre_hook(lambda _, args: (args[0] + 300.0,))
    studies, _ = study_layers(unet, batches_of(unet), [layer])
    handle.remove()
    plain, _ = study_layers(unet, batches_of(unet), [layer])
    torch.testing.assert_close(studies[layer].covariance, plain[layer].covariance, rtol=1e-3, atol=1e-4 * float(plain[layer].covariance.max()))
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    off = rows.T @ rows / 3 - 1e-3 * torch.eye(40)  # of rank 3 and, by rounding, not even positive
    removed = removal_error(LayerStudy(off.double(), torch.ones(2, dtype=torch.float64)), torch.randn(2, 40), torch.arange(20))
    assert bool(torch.isfinite(removed).all())
    with pytest.raises(RuntimeError, match="not finite"):
        removal_error(LayerStudy(off.double() * float("nan"), torch.ones(2, dtype=torch.float64)), torch.randn(2, 40), torch.arange(20))


def test_damage_grows_as_widths_shrink_and_ranks_real_removals() -> None:
    unet = random_unet("plain")
    slots = find_slots(unet)
    problem = free_problem(slots, cost_model(unet, slots), "free", 4, 4)
    scores = {n: torch.rand(s.width, generator=torch.Generator().manual_seed(1)) for n, s in slots.slots.items()}
    batches = batches_of(unet)
    table = damage_table(
        unet, slots, problem, lambda widths: choose_channels(slots, widths, scores, "free", "free"), batches
    )
    measured, estimated = [], []
    for unit, row in table.items():
        assert row[-1] == 0.0 and all(a >= b - 1e-9 for a, b in zip(row, row[1:])), unit
        plan = build_plan(slots, problem.options[unit][0], scores, unet.config, layout="free", norm_policy="free")
        pruned = compact(unet, plan)
        with torch.no_grad():
            error = sum(float((pruned(x, t).sample - unet(x, t).sample).square().sum()) for x, t, _ in batches)
        measured.append(error)
        estimated.append(row[0])
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (measured, estimated)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.5


def test_image_weight_grows_with_the_noise_and_is_clipped() -> None:
    alphas = torch.linspace(0.9999, 0.001, 1000)
    weight = image_weight(alphas)(torch.arange(1000))
    assert weight[0] < 1e-3 and weight[-1] == 1.0
    assert bool((weight.diff() >= 0).all())


def test_image_weight_moves_the_image_alike_whatever_the_network_predicts() -> None:
    alphas = torch.linspace(0.9999, 0.001, 1000)
    t = torch.arange(1000)
    sigma2 = (1 - alphas) / alphas
    moves = {"epsilon": sigma2, "v_prediction": 1 - alphas, "sample": torch.ones(1000)}  # squared, of x0 per unit of error
    for gamma in (1.0, 0.1):
        per_image = {kind: image_weight(alphas, gamma, prediction_type=kind)(t) / move for kind, move in moves.items()}
        scale = {kind: v / v[0] for kind, v in per_image.items()}
        torch.testing.assert_close(scale["epsilon"], scale["v_prediction"], rtol=1e-4, atol=0)
        torch.testing.assert_close(scale["epsilon"], scale["sample"], rtol=1e-4, atol=0)
    assert image_weight(alphas, least=0.1)(t).min() == 0.1
    with pytest.raises(ValueError, match="'velocity'"):
        image_weight(alphas, prediction_type="velocity")


def test_a_network_that_predicts_zeros_has_no_damage() -> None:
    unet = random_unet("plain")
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    slots = find_slots(unet)
    problem = free_problem(slots, cost_model(unet, slots), "free", 16, 8)

    def first(widths: dict[str, int]) -> dict[str, torch.Tensor]:
        return {n: torch.arange(c) for n, c in widths.items()}

    table = damage_table(unet, slots, problem, first, batches_of(unet))
    assert all(value == 0 for row in table.values() for value in row)
