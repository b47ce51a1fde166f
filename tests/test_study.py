"""The activation study: moments and tails against scipy on kept activations, rankings and removed sets, the command."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import PLAIN, random_unet
from PIL import Image
from runs import one_thread as one_thread

import wanda_fast
from wanda_fast import study
from wanda_fast.calibrate import collect_layers
from wanda_fast.cli import analyze, main
from wanda_fast.cli.parser import Parser
from wanda_fast.errors import UserError
from wanda_fast.stats import ActivationStats

SMALL = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def studied(images):
    """(report, statistics, layer → every value that entered it in the second run)."""
    unet = random_unet(SMALL)
    kept: dict[str, list[torch.Tensor]] = {}
    original = study._Shapes.run

    def run(self, network, *args):
        hooks = [
            m.register_forward_pre_hook(lambda m, a, n=n: kept.setdefault(n, []).append(a[0].double().flatten()) or None)
            for n, m in collect_layers(network).items()
        ]
        original(self, network, *args)
        for hook in hooks:
            hook.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study._Shapes, "run", run)
        report, stats = study.study(unet, DDPMScheduler(), images, n=14, batch_size=4, seed=3, dataset="d", name="m")
    return report, stats, {n: torch.cat(v).numpy() for n, v in kept.items()}


def test_moments_and_tails_are_those_of_the_activations(studied):
    from scipy.stats import kurtosis, skew

    report, stats, kept = studied
    layers = report["activations"]["layers"]
    assert list(layers) == list(stats.tables) and len(layers) == len(kept)
    groups = [(layers[n], kept[n]) for n in layers] + [(report["activations"]["global"], np.concatenate(list(kept.values())))]
    for got, v in groups:
        assert got["values"] == len(v)
        assert got["mean"] == pytest.approx(v.mean(), abs=1e-5) and got["deviation"] == pytest.approx(v.std(), rel=1e-5)
        assert got["skewness"] == pytest.approx(skew(v), abs=1e-4) and got["kurtosis"] == pytest.approx(kurtosis(v), abs=1e-4)
        for k in (2, 3):
            assert got[f"beyond_{k}_sigma"] == pytest.approx((abs(v - v.mean()) > k * v.std()).mean(), abs=2 / len(v))


def test_the_histogram_is_a_density_of_standardised_values(studied):
    report, _, kept = studied
    part = report["histogram"]
    width = np.diff(part["edges"])
    assert (np.array(part["density"]) * width).sum() + part["outside"] == pytest.approx(1)
    # Queries, keys and values read one tensor, which is counted once.
    pooled = np.concatenate([(v - v.mean()) / v.std() for n, v in kept.items() if not n.endswith(("to_k", "to_v"))])
    want = np.histogram(pooled, part["edges"])[0] / len(pooled) / width
    assert np.allclose(part["density"], want, atol=1e-3)


def test_halves_share_no_image_and_make_the_statistics(images):
    first, second = study._halves(images, 9, 0)
    assert (first.n, second.n) == (5, 4) and first.seed != second.seed
    assert torch.equal(first.images, images[0::2]) and torch.equal(second.images, images[1::2])
    one, other = study._halves(images[:1], 8, 0)
    assert len(one.images) == len(other.images) == 1


def test_spearman_is_that_of_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 40), rng.integers(0, 9, 40)  # with ties
    assert study.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert study.spearman(a, a) == pytest.approx(1) and study.spearman(a, -a) == pytest.approx(-1)
    assert np.isnan(study.spearman(a, np.ones(40)))


def table_of(rows: torch.Tensor, timesteps: torch.Tensor) -> ActivationStats:
    n = len(rows)
    return ActivationStats({"a": rows}, {"a": 1}, timesteps, torch.ones(n, dtype=torch.int64), torch.arange(n), 1000, {})


def test_stability_sees_an_order_that_turns_round():
    t = torch.arange(0, 1000, 20)
    rising = torch.arange(1.0, 9.0).expand(50, 8).clone()
    steady = table_of(rising, t)
    same = study.stability(steady, [steady, steady])
    assert same["global"] == {"halves": pytest.approx(1), "timesteps": pytest.approx(1), "early_late": pytest.approx(1)}
    rising[t >= 500] = rising[t >= 500].flip(1)
    turned = study.stability(table_of(rising, t), [steady, table_of(rising.flip(1), t)])
    assert turned["global"]["early_late"] == pytest.approx(-1)
    assert np.allclose(turned["between_bands"], np.kron([[1, -1], [-1, 1]], np.ones((5, 5))))


def test_removed_sets_of_equal_and_opposite_rankings():
    up, units = torch.arange(10.0), 1
    scores = {"s": {"all": (up, units), "early": (up, units), "middle": (up, units), "late": (up.flip(0), units),
                    study.WEIGHT_ALONE: (up, units)}}  # fmt: skip
    found = study.removed_sets(scores, 0.3)
    assert found["channels_removed"] == 3 and found["slots"]["s"]["removed"] == 3
    assert found["slots"]["s"]["early_late"] == 0 and found["slots"]["s"]["weight_alone"] == 1
    assert found["rank_correlation"][1][3] == pytest.approx(-1) and found["overlap"][0][4] == 1
    with pytest.raises(UserError, match="no slot"):
        study.removed_sets(scores, 0.01)


def test_the_comparison_with_weights_alone_is_that_of_the_criteria(studied):
    """Norms all alike leave the ranking as it is."""
    report, stats, _ = studied
    flat = {n: torch.ones_like(t) for n, t in stats.tables.items()}
    even = ActivationStats(flat, stats.positions, stats.timesteps, stats.counts, stats.samples, 1000, {})
    overlap = study.removed_sets(study._scores(random_unet(SMALL), even, 0), 0.5)
    assert np.allclose(overlap["overlap"], 1)
    measured = report["removed"]
    assert measured["overlap"][0][-1] < 1 and measured["rankings"][-1] == study.WEIGHT_ALONE


@pytest.mark.parametrize(
    ("overlap", "share", "words"),
    [(0.95, 0.03, ["hardly changes", "not above the 5%"]), (0.7, 0.08, ["||X|| changes", "above the 5%"]), (0.4, 0.06, ["strongly"])],
)
def test_verdict_in_words(studied, overlap, share, words):
    report = json.loads(json.dumps(studied[0]))
    report["removed"]["overlap"][0][-1] = overlap
    report["activations"]["global"]["beyond_2_sigma"] = share
    found = study.verdict(report)
    for word in words:
        assert word in " ".join(found["lines"])
    assert found["above_rule_of_thumb"] is (share > 0.05)


def test_the_command_writes_figures_tables_and_statistics(tmp_path, capsys):
    DDPMPipeline(unet=random_unet(SMALL), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.effect_noise((9 + i, 12), 80).save(tmp_path / "images" / f"{i}.png")
    words = ["analyze", "--model_path", tmp_path / "model", "--dataset", tmp_path / "images", "--device", "cpu", "--num_samples",
             "10", "--batch_size", "5", "--save_path", tmp_path / "out", "--json", "--quiet"]  # fmt: skip
    assert main([str(w) for w in words]) == 0
    printed = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "activation_stats.safetensors", "activations.png", "analysis.json", "config.yaml", "layers.csv", "removed.png", "slots.csv",
        "stability.csv", "stability.png", "timesteps.csv", "timesteps.png",
    ]  # fmt: skip
    made = Parser("wanda-fast analyze", analyze.EXAMPLES)
    analyze.add_arguments(made)
    again = made.parse_args(["--config", str(out / "config.yaml"), "--save_path", str(out), "--json", "--quiet"])
    assert again == made.parse_args([str(w) for w in words[1:]])
    report = json.loads((out / "analysis.json").read_text())
    assert printed.pop("path") == str(out) and printed == report and str(tmp_path) not in json.dumps(report)
    assert report["samples"] == 10 and report["images"] == 3
    rows = list(csv.DictReader((out / "layers.csv").read_text().splitlines()))
    assert [r["layer"] for r in rows] == ["(all)", *report["activations"]["layers"]]
    for row in rows[1:]:
        assert float(row["deviation"]) == pytest.approx(report["activations"]["layers"][row["layer"]]["deviation"], rel=1e-5)
        assert float(row["norm_mean"]) == pytest.approx(report["channel_norms"]["layers"][row["layer"]]["mean"], rel=1e-5)
    assert len(list(csv.reader((out / "timesteps.csv").read_text().splitlines()))) == 1 + len(rows) - 1
    assert len((out / "slots.csv").read_text().splitlines()) == 1 + len(report["removed"]["slots"])
    for name in ("activations", "timesteps", "stability", "removed"):
        with Image.open(out / f"{name}.png") as picture:
            colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert picture.width > 1500 and len(np.unique(colours, axis=0)) > 20
    # The statistics are those of a calibration: pruning takes them.
    result = wanda_fast.prune(str(tmp_path / "model"), load_stats=str(out / "activation_stats.safetensors"), ratio=0.3,
                              split="uniform", dry_run=True, device="cpu")  # fmt: skip
    assert result.stats is not None and int(result.stats.counts.sum()) == 10


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--num_samples 7", "at least 8"),
        ("--ratio 0", "above 0"),
        ("--dataset no/such", "no such image folder"),
        ("--model no/such", "no such folder"),
        ("--device tpu9", "device 'tpu9'"),
    ],
)
def test_mistakes_are_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wanda-fast: error: ") and error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())
