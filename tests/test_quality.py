"""bench.py --quality from end to end on a tiny network, and the tables and pictures made from its results."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from networks import PLAIN, random_unet
from PIL import Image
from runs import one_thread as one_thread
from test_features import Colours, folder_of, pictures

import wanda_fast
from benchmarks import main as bench
from benchmarks import quality, quality_report, rivals, table
from wanda_fast import checkpoint, evaluation, features

TINY = {**PLAIN, "sample_size": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    with checkpoint.atomic_folder(folder / "tiny") as target:
        checkpoint.save_folder(target, random_unet(TINY), DDPMScheduler())
    folder_of(pictures(12, 8), folder / "real")
    return folder


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FEATURES", {**features.FEATURES, "colours": Colours})


def run(place: Path, *words: Any, out: str = "quality.json") -> int:
    return bench.main([
        "--quality", "--model", str(place / "tiny"), "--real", str(place / "real"), "--features", "colours", "--samples", "8", "--steps", "2",
        "--noise_images", "8", "--calib_steps", "16", "--calib_images", "8", "--repair_images", "16", "--speed_batch", "2",
        "--device", "cpu", "--out", str(place / out), "--cache", str(place / "cache"), "--strict", *map(str, words),
    ])  # fmt: skip


def rows(place: Path, out: str = "quality.json") -> list[dict[str, Any]]:
    return json.loads((place / out).read_text())["rows"]


@pytest.fixture(scope="module")
def first(place: Path) -> list[dict[str, Any]]:
    """The dense row and the first of the default recipe."""
    before = dict(features.FEATURES)
    features.FEATURES["colours"] = Colours
    try:
        assert run(place, "--max_rows", 2) == 0
    finally:
        features.FEATURES.clear()
        features.FEATURES.update(before)
    return rows(place)


def test_rows_hold_what_the_final_comparison_needs(place: Path, first: list[dict[str, Any]]) -> None:
    results = json.loads((place / "quality.json").read_text())
    assert set(results) == {"env", "protocol", "rows"} and results["protocol"]["features"]["features"] == "colours"
    assert results["protocol"]["spacing"] == "leading: 500, 0" and results["protocol"]["real"] == {"source": "real", "count": 12}
    dense, pruned = first
    wanted = {"model", "pruner", "repair", "plan", "macs", "params", "seed", "fd", "ssim", "noise_mse", "images_per_s", "prune_seconds"}
    for row in first:
        assert wanted <= set(row) and row["model"] == "tiny"
    assert dense["ssim"] == 1 and dense["noise_mse"] == 0 and dense["fd"] > 0 and dense["macs"] == dense["dense_macs"]
    assert 0 < pruned["ssim"] < 1 and pruned["noise_mse"] > 0 and pruned["macs"] <= 0.563 * dense["macs"]
    assert pruned["fd"] > 0 and pruned["fd_to_dense"] > 0 and pruned["prune_seconds"] > 0 and pruned["images_per_s"] > 0


def test_figures_are_those_of_the_library(place: Path, first: list[dict[str, Any]]) -> None:
    """`evaluate` of the kept folder against the dense one, by itself."""
    (kept,) = (place / "cache" / "pruned" / "tiny").iterdir() if len(list((place / "cache" / "pruned" / "tiny").iterdir())) == 1 else (
        place / "cache" / "pruned" / "tiny" / "wanda-diff-lstsq-stock-sensitivity-56.3pct-0",)  # fmt: skip
    found = wanda_fast.evaluate(kept, place / "tiny", real=place / "real", features="colours", n=8, steps=2, noise_images=8, batch_size=8,
        device="cpu", compiled=False)  # fmt: skip
    row = first[1]
    assert row["ssim"] == pytest.approx(found["ssim"], abs=1e-9) and row["fd"] == pytest.approx(found["fd"]["model"], rel=1e-9)
    assert first[0]["fd"] == pytest.approx(found["fd"]["reference"], rel=1e-9)
    assert row["noise_mse"] == pytest.approx(found["noise"]["all"]["mse"], rel=1e-6)


def test_a_stopped_run_goes_on(place: Path, first: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are there are not measured again, calibration is not repeated, and no time means no row."""
    assert run(place, "--budget_seconds", 0, "--resume", place / "quality.json", out="more.json") == 0
    assert rows(place, "more.json") == first
    calls: list[dict[str, Any]] = []
    prune = wanda_fast.prune

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return prune(*args, **options)

    given: dict[str, Any] = {}

    def rival(unet: Any, scheduler: Any, batches: Any, *, target_macs: int, importance: str, seed: int) -> Any:
        network = random_unet({**TINY, "block_out_channels": (16, 32, 32)})  # the real one is tested by itself
        given.update(target=target_macs, importance=importance, macs=evaluation.count_macs(network))
        return network, given["macs"]

    monkeypatch.setattr(rivals, "torch_pruning", rival)
    monkeypatch.setattr(wanda_fast, "prune", counted)
    monkeypatch.setattr(quality, "configurations", lambda: [
        quality.Config("dense", "none", "stock", "-", "100%"), quality.Config("wanda-diff"), quality.Config("wanda-diff", repair="none"),
        quality.Config("torch-pruning magnitude", "none", split="-"), quality.Config("not-there")])  # fmt: skip
    assert run(place, "--resume", place / "more.json", out="more.json") == 0
    found = rows(place, "more.json")
    assert found[:2] == first and [c["repair"] for c in calls] == ["none"] and calls[0]["load_stats"] is not None
    assert [r["pruner"] for r in found[2:]] == ["wanda-diff", "torch-pruning magnitude"]
    assert found[2]["macs"] <= 0.563 * found[2]["dense_macs"] and found[3]["macs"] == given["macs"] and found[3]["plan"] == "(16, 32, 32)"
    assert given["target"] == int(0.563 * found[3]["dense_macs"]) and given["importance"] == "magnitude"


def test_a_failing_row_costs_the_others_nothing(place: Path, first: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def broken(self: Any, config: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr(quality.Bench, "measure", broken)
    words = quality.parser().parse_args([
        "--model", str(place / "tiny"), "--features", "none", "--samples", "8", "--steps", "2", "--noise_images", "4", "--device", "cpu",
        "--speed_batch", "2", "--out", str(place / "failed.json"), "--max_rows", "2"])  # fmt: skip
    assert quality.run(words) == 0 and len(rows(place, "failed.json")) == 1
    assert "FAILED: wanda-diff" in capsys.readouterr().out


def test_other_protocols_and_other_files_are_refused(place: Path, first: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "--samples", 9, "--max_rows", 1) == 2
    assert "another protocol (samples 8 there, 9 here)" in capsys.readouterr().err
    for other in ('{"rows": []}', '{"env": {}, "rows": [], "more": 1}', "[1]", "no JSON"):
        (place / "other.json").write_text(other)
        assert run(place, out="other.json") == 2
        error = capsys.readouterr().err
        assert "no results of this benchmark" in error and error.count("\n") == 1
    assert run(place, "--speed", out="nothing.json") == 2


def test_compiled_speed_is_added_to_main_rows(place: Path, first: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    (place / "speed.json").write_text((place / "quality.json").read_text())
    assert run(place, "--speed", out="speed.json") == 0
    dense, pruned = rows(place, "speed.json")
    assert pruned["images_per_s_compiled"] > 0 and pruned["images_per_s_compiled_dense"] > 0 and dense == first[0]
    assert {k: v for k, v in pruned.items() if k in first[1]} == first[1]


def test_rows_without_times_get_them_later(place: Path, first: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    assert run(place, "--shared", "--max_rows", 2, "--cache", str(place / "shared"), out="shared.json") == 0
    times = ("images_per_s", "images_per_s_dense", "prune_seconds")
    for row, alone in zip(rows(place, "shared.json"), first, strict=True):
        assert all(row[name] is None for name in times[: 2 if row["pruner"] == "dense" else 3])
        assert all(row[name] == alone[name] for name in ("fd", "ssim", "noise_mse", "plan"))
    assert run(place, "--speed", "--cache", str(place / "shared"), out="shared.json") == 0
    dense, pruned = rows(place, "shared.json")
    assert all(row[name] > 0 for row in (dense, pruned) for name in times[:2]) and pruned["images_per_s_compiled"] > 0
    assert pruned["prune_seconds"] > 0 and pruned["stages"]["calibrate"] > 0


def test_criteria_that_need_other_statistics_share_one_cache(place: Path, first: list[dict[str, Any]]) -> None:
    assert run(place, "--rows", "1,11", out="means.json") == 0
    assert [row["pruner"] for row in rows(place, "means.json")] == ["wanda-diff", "wanda-fluctuation"]


def test_compiled_sampling_gives_the_same_row(place: Path, first: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One network is compiled; the second of equal shapes is put into it."""
    built: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network, **options: built.append(network))
    assert run(place, "--compile", "--rows", "1,2", out="compiled.json") == 0
    one, two = rows(place, "compiled.json")
    assert len(built) == (1 if one["plan_sha256"] == two["plan_sha256"] or one["plan"] == two["plan"] else 2)
    assert one["sampled"] == two["sampled"] == "compiled" and first[1]["sampled"] == "eager"
    assert (one["ssim"], one["fd"]) == (first[1]["ssim"], first[1]["fd"]) and two["ssim"] != one["ssim"]


def test_a_checkpoint_is_measured_as_it_is(place: Path, first: list[dict[str, Any]]) -> None:
    (folder,) = (place / "cache" / "pruned" / "tiny").glob("wanda-diff-lstsq-stock-sensitivity-56.3pct-0")
    assert run(place, "--checkpoint", str(folder), "--named", "lstsq + 5 steps", out="checkpoint.json") == 0
    (row,) = rows(place, "checkpoint.json")
    assert row["repair"] == "lstsq + 5 steps" and row["prune_seconds"] is None
    assert all(row[name] == first[1][name] for name in ("pruner", "layout", "split", "budget", "seed"))
    assert all(row[name] == first[1][name] for name in ("ssim", "fd", "macs", "plan"))
    quality.merge([place / "quality.json", place / "checkpoint.json"], place / "merged.json")
    assert len(rows(place, "merged.json")) == 3
    assert "repair lstsq + 5 steps" in quality_report.markdown(json.loads((place / "merged.json").read_text()))


def test_what_a_checkpoint_is_called(tmp_path: Path) -> None:
    def named(**settings: Any) -> quality.Config:
        settings = {"pruner": "taylor", "layout": "free", "split": "sensitivity", "target_macs": None, "target_latency": None, **settings}
        report = {"settings": settings, "dense": {"macs": 2000}, "pruned": {"macs": 875}, "seed": 3}
        (tmp_path / "pruning.json").write_text(json.dumps(report), encoding="utf-8")
        return quality.of_checkpoint(tmp_path, "lstsq, experts 3")

    by_time = named(target_latency="0.66x")
    assert by_time == quality.Config("taylor", "lstsq, experts 3", "free", "latency", "43.8%", 3)
    assert quality_report._label(asdict(by_time)) == "taylor, 3 experts, free, widths by time"
    assert named(target_macs="44%").budget == "44%" and named(target_macs="3.4G", split="uniform").budget == "43.8%"


def test_order_of_rows() -> None:
    found = quality.configurations()
    assert len(set(found)) == len(found) and found[0].pruner == "dense"
    assert [asdict(c) for c in found[1:4]] == [asdict(quality.Config("wanda-diff", seed=s)) for s in range(3)]
    assert {c.pruner for c in found} == {"dense", "wanda-diff", *quality.RIVALS, *quality.TORCH_PRUNING}
    assert {c.budget for c in found if c.main} == set(quality.BUDGETS)
    assert all(quality.available(c) == "" for c in found)


def test_jpeg_pack(tmp_path: Path) -> None:
    blobs = []
    for image in pictures(3, 16).numpy():
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, format="JPEG")
        blobs.append(stream.getvalue())
    off = np.cumsum([0, *map(len, blobs)])
    np.savez(tmp_path / "pack.npz", blob=np.frombuffer(b"".join(blobs), np.uint8), off=off, y=np.zeros(3))
    expected = np.stack([np.asarray(Image.open(io.BytesIO(b))) for b in blobs])
    assert torch.equal(quality.read_images(str(tmp_path / "pack.npz")), torch.from_numpy(expected))


# ------------------------------------------------------------------------------------------------------ tables, pictures


def synthetic() -> dict[str, Any]:
    def row(pruner: str, seed: int, ssim: float, **more: Any) -> dict[str, Any]:
        return {
            "model": "tiny", **asdict(quality.Config(pruner, seed=seed)), "macs": 3.4e9, "params": 2e7, "plan": "(8, 16)", "fd": 20.0 + seed,
            "ssim": ssim, "noise_mse": 0.001, "images_per_s": 100.0, "prune_seconds": 30.0, **more,
        }  # fmt: skip

    return {
        "env": {"gpu": "a GPU", "torch": "2.11"},
        "protocol": {"samples": 5000, "steps": 50, "precision": "float16", "features": {"features": "colours"},
                     "real": {"count": 10000, "source": "cifar10-test"}},
        "rows": [
            row("dense", 0, 1.0, budget="100%", macs=6.05e9),
            row("wanda-diff", 0, 0.97, images_per_s_compiled=300.0, images_per_s_compiled_dense=200.0), row("wanda-diff", 1, 0.95),
            row("magnitude", 0, 0.9, budget="76%"), row("magnitude", 0, 0.5, repair="none"),
        ],
    }  # fmt: skip


def test_table_joins_seeds() -> None:
    text = quality_report.markdown(synthetic())
    assert "| wanda-diff | 3.4 G | 20 M | (8, 16) | 2 | 20.5 ± 0.7 | 0.960 ± 0.014 |" in text and "300, 1.50×" in text
    assert "| magnitude, repair none |" in text and "10,000 images of cifar10-test" in text and "colours features" in text
    lines = text.splitlines()
    assert next(i for i, x in enumerate(lines) if "| dense" in x) < next(i for i, x in enumerate(lines) if "| magnitude | " in x)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_readme_shows_few_rows() -> None:
    """The dense network, the default recipe, the best rival, chance, and the default recipe without repair; the file has the rest."""
    results = synthetic()
    first = results["rows"][1]
    more = [
        ("magnitude", 0.91, {}), ("taylor", 0.955, {}), ("random", 0.8, {}), ("wanda-diff", 0.5, {"repair": "none"}),
        ("wanda-diff", 0.94, {"layout": "free"}), ("reinit", 0.99, {"split": "uniform"}), ("magnitude", 0.99, {"budget": "76%"}),
    ]  # fmt: skip
    results["rows"] += [{**first, "pruner": pruner, "ssim": ssim, **changes} for pruner, ssim, changes in more]
    text = quality_report.brief([results])
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| tiny")]
    assert names == [f"tiny, {name}" for name in
        ("dense", "wanda-diff", "taylor (the best of 3 rivals)", "wanda-diff, free", "random", "wanda-diff, repair none")]  # fmt: skip
    assert "| network, criterion | MACs | parameters | seeds | FD | SSIM | noise MSE |" in text and "tiny: a GPU, torch 2.11; 5,000" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_columns_without_values_are_left_out() -> None:
    results = synthetic()
    for row in results["rows"]:
        row["fd"] = None
    text = quality_report.markdown(results)
    assert "| FD |" not in text and "| SSIM |" in text and len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_plot(tmp_path: Path) -> None:
    (path,) = quality_report.plot(synthetic(), tmp_path)
    assert path.name == "quality-tiny.png" and min(Image.open(path).size) > 300
    results = synthetic()
    results["rows"] = results["rows"][:3]
    assert quality_report.plot(results, tmp_path) == [], "one budget is no frontier"


def test_readme_shows_the_results() -> None:
    """README's tables and the long one are made from the results; without results there is no table."""
    readme = (quality.ROOT / "README.md").read_text(encoding="utf-8")
    if not quality_report._results():
        assert quality_report.BEGIN not in readme and not quality_report.FULL.exists()
    else:
        made = table.insert(readme, quality_report.content(), quality_report.BEGIN, quality_report.END)
        whole = quality_report.FULL.read_text(encoding="utf-8")
        assert readme == made and whole == quality_report.full(), "run: python -m benchmarks.quality_report"


def test_grids(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "BUDGETS", ("60%",))
    assert quality.main([
        "--grids", "--model", str(place / "tiny"), "--device", "cpu", "--steps", "2", "--calib_steps", "16", "--calib_images", "8",
        "--repair_images", "16", "--columns", "4", "--folder", str(tmp_path)]) == 0  # fmt: skip
    picture = Image.open(tmp_path / "grid-tiny.png")
    assert picture.height == (8 + 2) * 8 * 2 - 2 * 8 and picture.width > 4 * 8 * 8


def test_rows_by_number_and_files_put_together(tmp_path: Path) -> None:
    assert quality.numbers("4,0-2") == (4, 0, 1, 2)
    args = quality.parser().parse_args(["--rows", "0,2"])
    assert [str(c) for c in quality.chosen(args)] == [str(quality.configurations()[i]) for i in (0, 2)]
    head = {"env": {"torch": "x"}, "protocol": {"samples": 8}}

    def rows(*numbers: int) -> list[dict[str, Any]]:
        return [{"model": "m", **asdict(quality.configurations()[i]), "fd": float(i)} for i in numbers]

    for name, content in (("a", rows(2, 0)), ("b", rows(1, 2))):
        (tmp_path / name).write_text(json.dumps({**head, "rows": content}))
    quality.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert [row["fd"] for row in json.loads((tmp_path / "c").read_text())["rows"]] == [0.0, 1.0, 2.0]
    (tmp_path / "b").write_text(json.dumps({**head, "protocol": {"samples": 9}, "rows": []}))
    with pytest.raises(quality.Refused, match="another protocol"):
        quality.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
