"""Calibration: what the hooks collect, which inputs they see, and that runs can be split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from networks import PLAIN, random_unet
from torch import Tensor, nn

import wanda_fast
from wanda_fast import calibrate as calibration
from wanda_fast.calibrate import Batch, calibrate, collect_layers, noised_batches, timestep_schedule
from wanda_fast.checkpoint import load_pipeline
from wanda_fast.data import read_sample_sheet
from wanda_fast.errors import UserError
from wanda_fast.sampling import make_stepper, predict
from wanda_fast.stats import TIME_STRATEGIES, ActivationStats

TINY = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return random_unet(TINY)


@pytest.fixture(scope="module")
def scheduler() -> DDPMScheduler:
    return DDPMScheduler()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundled_stats() -> ActivationStats:
    """96 images: up to 64 different timesteps make a group each, and in groups of one the strategies agree."""
    loaded = load_pipeline(None)
    return calibrate(loaded.unet, loaded.scheduler, read_sample_sheet(), n=96, batch_size=32, dtype=torch.bfloat16)


def inputs_by_unfold(unet: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Σ x² per sample in float64, from the inputs that plain forward hooks saw."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in collect_layers(unet).items():

        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor, name: str = name) -> None:
            x = args[0].double()
            dims = (2, 3) if x.dim() == 4 else (1,) if x.dim() == 3 else ()
            seen.setdefault(name, []).append(x.square().sum(dims) if dims else x.square())

        handles.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        for batch in batches:
            predict(unet, batch.x, batch.t, batch.labels)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize(
    "config", ["plain", "classes", "two_layers_one_channel", "class_timestep", "resnet_resampling"]
)
def test_tables_hold_the_energy_of_every_layers_input(config: str, scheduler: DDPMScheduler) -> None:
    unet = random_unet(config)
    images = torch.randint(0, 256, (3, 16, 16, unet.config["in_channels"]), dtype=torch.uint8)
    stats = calibrate(unet, scheduler, images, n=5, batch_size=3)
    expected = inputs_by_unfold(unet, list(noised_batches(unet, scheduler, images, n=5, batch_size=3)))
    assert set(stats.tables) == set(collect_layers(unet)) == set(expected)
    for name, table in stats.tables.items():
        torch.testing.assert_close(
            table.double(), expected[name], rtol=2e-5, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not any(m._forward_pre_hooks for m in unet.modules())
    assert stats.positions["conv_in"] == 256 and stats.positions["time_embedding.linear_1"] == 1
    assert stats.positions["mid_block.attentions.0.to_k"] == 16


def test_layers_that_read_one_tensor_share_their_table(
    unet: nn.Module, scheduler: DDPMScheduler, images: Tensor
) -> None:
    tables = calibrate(unet, scheduler, images, n=4).tables
    shared = tables["mid_block.attentions.0.to_q"]
    assert shared is tables["mid_block.attentions.0.to_k"] is tables["mid_block.attentions.0.to_v"]
    assert shared is not tables["mid_block.attentions.0.to_out.0"]


def test_memory_reuse_and_changes_in_place_are_no_sharing() -> None:
    class Net(nn.Module):
        """b reads the same memory as a, with other content; c reads what b reads."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x: Tensor) -> None:
            x = x.clone()
            self.a(x)
            x.mul_(2)
            self.b(x)
            self.c(x)
            del x
            self.d(torch.full((2, 3), 5.0))

    net = Net()
    layers: Any = dict(net.named_children())
    with torch.no_grad(), calibration.Collector(layers, 2, torch.device("cpu")) as collector:
        with collector.record(torch.arange(2)):
            net(torch.ones(2, 3))
        net(torch.ones(2, 3))  # outside of record: not counted
    tables = collector.tables()
    assert [float(tables[n][0, 0]) for n in "abcd"] == [1, 4, 4, 25]
    assert tables["b"] is tables["c"]


def test_two_halves_equal_the_whole_bit_for_bit(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor) -> None:
    def run(part: tuple[int, int] | None = None) -> ActivationStats:
        return calibrate(unet, scheduler, images, n=24, batch_size=4, means=True, part=part)

    whole, merged = run(), run((12, 24)).merge(run((0, 12)))
    for field in ("tables", "sums"):
        one, two = getattr(whole, field), getattr(merged, field)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one), field
    assert torch.equal(whole.timesteps, merged.timesteps) and whole.info == merged.info


def test_means_are_sums_of_inputs(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor) -> None:
    stats = calibrate(unet, scheduler, images, n=6, batch_size=4, means=True)
    batches = noised_batches(unet, scheduler, images, n=6, batch_size=4)
    expected = sum(b.x.double().sum((0, 2, 3)) for b in batches)
    torch.testing.assert_close(stats.sums["conv_in"], expected, rtol=1e-5, atol=1e-3)
    assert not calibrate(unet, scheduler, images, n=2).sums


def test_schedule_covers_every_slice_once() -> None:
    t = timestep_schedule(50, 300, 800, torch.Generator().manual_seed(3))
    assert torch.equal(((t - 300) // 10).sort().values, torch.arange(50))
    assert not torch.equal(t, t.sort().values)
    assert timestep_schedule(500, 0, 10, torch.Generator().manual_seed(3)).unique().tolist() == list(range(10))
    assert timestep_schedule(3, 7, 8, torch.Generator()).tolist() == [7, 7, 7]


def test_inputs_do_not_depend_on_the_batch_size(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor) -> None:
    def run(batch_size: int, **more: Any) -> list[Tensor]:
        parts = list(noised_batches(unet, scheduler, images, n=9, batch_size=batch_size, seed=5, **more))
        return [torch.cat([getattr(b, f) for b in parts]) for f in ("x", "t", "indices")]

    assert all(torch.equal(a, b) for a, b in zip(run(9), run(2), strict=True))
    assert all(torch.equal(a[4:7], b) for a, b in zip(run(9), run(2, part=(4, 7)), strict=True))


def test_noising_is_that_of_the_scheduler(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor) -> None:
    """x_t = √ᾱ x₀ + √(1-ᾱ) ε: the ε solved for is standard normal, and the same for two sets of images."""

    def eps(of: Tensor) -> Tensor:
        (batch,) = noised_batches(unet, scheduler, of, n=40, target=(500, 1000))
        alpha = scheduler.alphas_cumprod[batch.t].view(-1, 1, 1, 1)
        clean = of[batch.indices % len(of)].permute(0, 3, 1, 2).float() / 127.5 - 1
        return (batch.x - alpha.sqrt() * clean) / (1 - alpha).sqrt()

    first = eps(images)
    torch.testing.assert_close(first, eps(255 - images[:2]), rtol=1e-4, atol=1e-4)
    assert abs(float(first.mean())) < 0.02 and abs(float(first.std()) - 1) < 0.02


def test_trajectory_visits_the_states_of_ddim(unet: nn.Module, scheduler: DDPMScheduler) -> None:
    stats = calibrate(unet, scheduler, None, n=16, mode="trajectory", trajectory_steps=4, batch_size=3)
    assert sorted(stats.timesteps.tolist()) == sorted([750, 500, 250, 0] * 4 if len(stats.timesteps) == 16 else [])
    # One trajectory replayed by hand, with the noise of the first state.
    batches = list(noised_batches(unet, scheduler, None, n=16, mode="trajectory", trajectory_steps=4, batch_size=16))
    states = {int(i): (x, int(t)) for b in batches for x, t, i in zip(b.x, b.t, b.indices, strict=True)}
    mine = sorted(((t, x) for i, (x, t) in states.items() if i % 8 == 0), key=lambda s: -s[0])
    stepper, x = make_stepper(scheduler, 4), mine[0][1][None]
    assert mine[0][0] == 750
    with torch.no_grad():
        for t in stepper.timesteps.tolist():
            for when, state in mine:
                if when == t:
                    torch.testing.assert_close(state[None], x, rtol=1e-3, atol=1e-3)
            x = stepper.step(predict(unet, x, torch.tensor([t])), t, x).prev_sample


def test_trajectory_states_are_those_the_hooks_saw(unet: nn.Module, scheduler: DDPMScheduler) -> None:
    """calibrate() sends its outputs back, a plain loop lets the generator run the network: both follow one
    trajectory.
    """
    how: dict[str, Any] = {"n": 20, "mode": "trajectory", "trajectory_steps": 5, "batch_size": 4}
    stats = calibrate(unet, scheduler, None, target_steps="0-700", **how)
    batches = list(noised_batches(unet, scheduler, None, target=(0, 700), **how))
    order = torch.cat([b.indices for b in batches])
    assert order.sort().values.tolist() == list(range(20))
    energy = torch.cat([b.x for b in batches]).square().sum((2, 3))[order.argsort()]
    torch.testing.assert_close(stats.tables["conv_in"], energy, rtol=1e-4, atol=1e-4)
    assert int(stats.timesteps.max()) < 700


def test_bins_hold_the_sum_of_their_samples(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor) -> None:
    how: dict[str, Any] = {"n": 80, "batch_size": 16, "target_steps": "late"}
    samples = calibrate(unet, scheduler, images, rows="sample", **how)
    bins = calibrate(unet, scheduler, images, rows="bin", **how)
    assert bins.info["rows"] == "bin" and len(bins.counts) == 32 and int(bins.counts.sum()) == 80
    for layer in ("conv_in", "mid_block.attentions.0.to_q", "time_embedding.linear_2"):
        torch.testing.assert_close(bins.tables[layer].sum(0), samples.tables[layer].sum(0), rtol=1e-4, atol=1e-4)
        one, two = (s.act_norm(layer, target_steps="late") for s in (samples, bins))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_rows_turn_into_bins_above_the_limit(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor) -> None:
    assert calibrate(unet, scheduler, images, n=2).info["rows"] == "sample"
    assert calibrate(unet, scheduler, images, n=2, table_bytes=1000).info["rows"] == "bin"


def test_autocast_stays_near_float32(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor) -> None:
    exact = calibrate(unet, scheduler, images, n=8)
    rough = calibrate(unet, scheduler, images, n=8, dtype=torch.bfloat16)
    assert rough.info["dtype"] == "bfloat16" and next(unet.parameters()).dtype == torch.float32
    for name in exact.tables:
        assert rough.tables[name].dtype == torch.float32
        error = (rough.act_norm(name) - exact.act_norm(name)).norm() / exact.act_norm(name).norm()
        assert error < 0.02, name


def test_a_callers_inference_mode_changes_nothing(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor) -> None:
    """Tensors of inference mode have no versions, by which the hooks know an input that two layers share."""
    expected = calibrate(unet, scheduler, images, n=4, batch_size=2)
    with torch.inference_mode():
        stats = calibrate(unet, scheduler, images.clone(), n=4, batch_size=2)
    assert all(torch.equal(table, expected.tables[name]) for name, table in stats.tables.items())
    assert not any(p.is_inference() for p in unet.parameters())
    q, k = "mid_block.attentions.0.to_q", "mid_block.attentions.0.to_k"
    assert stats.tables[q] is stats.tables[k]


@pytest.mark.parametrize("layer", ["mid_block.resnets.0.conv2", "conv_out"])
def test_nan_stops_with_the_first_layer_it_enters(layer: str, scheduler: DDPMScheduler, images: Tensor) -> None:
    unet = random_unet(TINY)
    unet.get_submodule(layer).register_forward_pre_hook(lambda m, args: (args[0] * float("nan"),))
    with pytest.raises(RuntimeError, match=f"enter layer {layer}") as caught:
        calibrate(unet, scheduler, images, n=2)
    assert isinstance(caught.value, UserError)


def test_the_network_is_left_as_it_was(scheduler: DDPMScheduler, images: Tensor) -> None:
    unet = random_unet(TINY).train()
    before = {n: (p.data_ptr(), p.stride(), p.clone()) for n, p in unet.named_parameters()}
    calibrate(unet, scheduler, images, n=2)
    assert unet.training
    for name, parameter in unet.named_parameters():
        assert parameter.stride() == before[name][1] and torch.equal(parameter, before[name][2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "walk"}, "mode 'walk'"),
        ({"rows": "all"}, "rows 'all'"),
        ({"n": 0}, "no part"),
        ({"batch_size": 0}, "at least 1"),
        ({"target_steps": "9-5"}, "empty"),
        ({"part": (0, 9)}, "no part of the 4"),
        ({"mode": "trajectory", "target_steps": "1-2"}, "none of the 50 DDIM steps"),
    ],
)
def test_bad_arguments(
    unet: nn.Module, scheduler: DDPMScheduler, images: Tensor, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(unet, scheduler, images, **{"n": 4, **arguments})


@pytest.mark.parametrize("steps", [(5, 5), (-5, 50), (0, 1001), (50, 5)], ids=str)
def test_a_range_of_timesteps_must_lie_in_the_schedule(
    steps: tuple[int, int], unet: nn.Module, scheduler: DDPMScheduler, images: Tensor
) -> None:
    with pytest.raises(UserError, match="is empty or outside the 1000 timesteps"):
        calibrate(unet, scheduler, images, n=2, target_steps=steps)
    with pytest.raises(UserError, match="is empty or outside the 1000 timesteps"):
        next(noised_batches(unet, scheduler, images, n=2, target=steps))


def test_images_must_fit(unet: nn.Module, scheduler: DDPMScheduler, images: Tensor) -> None:
    with pytest.raises(UserError, match=r"the network needs \(3, 8, 8\)"):
        calibrate(unet, scheduler, images[:, :4], n=2)
    with pytest.raises(UserError, match="at least one image"):
        calibrate(unet, scheduler, images[:0], n=2)
    floats = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    a, b = (calibrate(unet, scheduler, i, n=2).tables["conv_in"] for i in (images, floats))
    assert torch.equal(a, b)


def test_the_module_is_the_function() -> None:
    assert wanda_fast.calibrate is calibration
    with pytest.raises(UserError, match="rows 'x'"):
        wanda_fast.calibrate(None, None, None, rows="x")


def test_four_time_strategies_give_four_score_tables(bundled_stats: ActivationStats) -> None:
    """On the real model, in every layer whose input changes over time, and in the order of the channels too."""
    unet = load_pipeline(None).unet
    differing_orders = 0
    for name, layer in collect_layers(unet).items():
        weight = layer.weight.flatten(2).abs().sum(2) if layer.weight.dim() == 4 else layer.weight.abs()
        scores = [weight * bundled_stats.act_norm(name, time_strategy=s) for s in TIME_STRATEGIES]
        for i, one in enumerate(scores):
            for two in scores[:i]:
                assert not torch.allclose(one, two, rtol=1e-6, atol=0), name
        differing_orders += len({tuple(s.sum(1).argsort().tolist()) for s in scores}) > 1
    assert differing_orders > 50


def test_strategies_over_samples_and_targets_differ_too(bundled_stats: ActivationStats) -> None:
    layer = "mid_block.resnets.0.conv1"
    norms = [bundled_stats.act_norm(layer, activation_strategy=a) for a in ("mean", "max", "median")]
    norms += [bundled_stats.act_norm(layer, target_steps=t) for t in ("early", "late", "middle", "100-400")]
    assert all(not torch.allclose(a, b) for i, a in enumerate(norms) for b in norms[:i])


def test_a_true_l2_norm(bundled_stats: ActivationStats) -> None:
    """With one sample ‖X‖₂ is the vector norm of that sample's channel."""
    loaded = load_pipeline(None)
    images = read_sample_sheet()
    stats = calibrate(loaded.unet, loaded.scheduler, images, n=1)
    (batch,) = noised_batches(loaded.unet, loaded.scheduler, images, n=1)
    torch.testing.assert_close(stats.act_norm("conv_in"), batch.x[0].flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    hidden = F.conv2d(batch.x, loaded.unet.conv_in.weight, loaded.unet.conv_in.bias, padding=1)
    norm = loaded.unet.down_blocks[0].resnets[0].norm1
    expected = F.silu(F.group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps))[0].flatten(1).norm(dim=1)
    torch.testing.assert_close(stats.act_norm("down_blocks.0.resnets.0.conv1"), expected, rtol=1e-4, atol=1e-4)
