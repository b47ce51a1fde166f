"""The analysis: its numbers against scipy's definitions, its picture by content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wanda_fast.analysis import analyse, heat_map, save_picture
from wanda_fast.stats import ActivationStats


def make(tables: dict[str, torch.Tensor], timesteps: torch.Tensor) -> ActivationStats:
    rows = len(timesteps)
    return ActivationStats(
        tables=tables,
        positions=dict.fromkeys(tables, 4),
        timesteps=timesteps,
        counts=torch.ones(rows, dtype=torch.int64),
        samples=torch.arange(rows),
        num_train_timesteps=1000,
        model={},
    )


@pytest.fixture
def stats() -> ActivationStats:
    rng = torch.Generator().manual_seed(0)
    heavy = torch.rand(50, 200, generator=rng) + 1
    heavy[:, 7] = 10_000  # one outlier
    return make({"down.conv1": heavy, "mid.to_q": torch.rand(50, 30, generator=rng)}, torch.linspace(0, 999, 50).long())


def test_moments_are_those_of_scipy(stats: ActivationStats) -> None:
    from scipy.stats import kurtosis, skew

    report = analyse(stats)
    values = {n: (stats.act_norm(n).double() / 2).numpy() for n in stats.tables}  # 4 positions
    for got, v in [(report["layers"][n], values[n]) for n in values] + [
        (report["global"], np.concatenate(list(values.values())))
    ]:
        assert got["channels"] == len(v) and got["min"] == v.min() and got["max"] == v.max()
        assert got["mean"] == pytest.approx(v.mean()) and got["deviation"] == pytest.approx(v.std())
        assert got["skewness"] == pytest.approx(skew(v)) and got["kurtosis"] == pytest.approx(kurtosis(v))
        for k in (2, 3):
            assert got[f"beyond_{k}_sigma"] == pytest.approx((abs(v - v.mean()) > k * v.std()).mean())
    assert report["layers"]["down.conv1"]["beyond_3_sigma"] == pytest.approx(1 / 200)
    assert json.loads(json.dumps(report)) == report


def test_alike_channels_have_no_outliers() -> None:
    report = analyse(make({"a": torch.full((3, 5), 2.0)}, torch.tensor([0, 5, 9])))
    assert report["global"]["deviation"] == pytest.approx(0, abs=1e-12)
    assert report["global"]["kurtosis"] == report["global"]["skewness"] == report["global"]["beyond_2_sigma"] == 0


def test_the_target_range_is_honoured(stats: ActivationStats) -> None:
    stats.tables["mid.to_q"][stats.timesteps >= 700] *= 100
    early, late = (analyse(stats, target_steps=t)["layers"]["mid.to_q"]["mean"] for t in ("early", "late"))
    assert early > 8 * late


def test_heat_map_shows_when_a_layer_is_strong() -> None:
    t = torch.arange(0, 1000, 10)
    quiet = torch.ones(100, 3)
    quiet[t >= 500] *= 16  # four times the norm
    edges, bands = heat_map(make({"rises": quiet, "steady": torch.ones(100, 3)}, t))
    assert edges[0] < 20 and edges[-1] > 970 and bands.shape == (2, 20)
    assert np.allclose(bands[1], 0)
    assert np.allclose(bands[0, :9], bands[0, 0]) and np.allclose(bands[0, 11:] - bands[0, 0], 2)  # log₂ 4


def test_picture_shows_every_layer_and_the_outliers(stats: ActivationStats, tmp_path: Path) -> None:
    file = tmp_path / "new" / "wanda_analysis.png"
    report = save_picture(stats, file, title="a model")
    assert report == analyse(stats)
    with Image.open(file) as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ((0x44, 0x77, 0xAA), (0xEE, 0x99, 0x66), (0xCC, 0x33, 0x11)):  # histogram, beyond 2σ, beyond 3σ
        assert (colours == colour).all(1).sum() > 50, colour


def test_text_of_the_picture(stats: ActivationStats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is named on an axis, and the axes say what they show."""
    from matplotlib.figure import Figure

    words: list[str] = []

    def keep(self: Figure, *args: object, **kwargs: object) -> None:
        for axes in self.axes:
            words.extend([axes.get_title(), axes.get_xlabel(), *(t.get_text() for t in axes.get_yticklabels())])

    monkeypatch.setattr(Figure, "savefig", keep)
    save_picture(stats, tmp_path / "x.png")
    assert words.count("down.conv1") == words.count("mid.to_q") == 2
    assert any("timestep" in w for w in words) and any("%" in w for w in words) and any("log scale" in w for w in words)


def test_odd_statistics_still_make_a_picture(tmp_path: Path) -> None:
    """One row, silent channels, and channels all alike."""
    save_picture(make({"a": torch.zeros(1, 4), "b": torch.ones(1, 2)}, torch.tensor([5])), tmp_path / "x.png")
    save_picture(make({"a": torch.zeros(3, 4)}, torch.tensor([5, 6, 7])), tmp_path / "y.png")
    assert (tmp_path / "x.png").stat().st_size > 1000 and (tmp_path / "y.png").stat().st_size > 1000
