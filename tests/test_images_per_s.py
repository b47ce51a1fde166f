"""bench.py --op images_per_s: its processes, checks and rows on tiny networks, the networks it measures on a GPU, and its table."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import images_per_s, main, speed_table, table
from benchmarks.images_per_s import DENSE, HALF, TINY, Group, Network, Turn, narrower

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
NARROW = narrower(TINY, (16, 32), 8)


def job(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "config": TINY, "batch": 2, "device": "cpu", "dtype": "fp32", "compile": False, "seed": 0, "lock": str(tmp_path / "lock"), "nice": 0,
        "threads": 0, **changes,
    }  # fmt: skip


def test_processes_measure_and_failures_become_reasons() -> None:
    broken = narrower(TINY, (16, 32), 7)  # 7 groups do not divide 16 channels
    group = Group("tiny", 2, {DENSE: TINY, HALF: NARROW, "broken": broken})
    saved: list[int] = []
    rows = images_per_s.measure([group], CPU, with_compile=False, seconds=0.02, workers=3, save=lambda rows: saved.append(len(rows)))
    assert saved == [3] and [row["network"] for row in rows] == [DENSE, HALF, "broken"]
    dense, half, wrong = rows
    for row in (dense, half):
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["rel_error"] < 1e-3
        assert row["images_per_s"] == pytest.approx(2 / (50 * row["ms"] / 1e3))
        assert row["images_per_s_dense"] == dense["images_per_s"]
    assert dense["times_as_fast"] is None and half["times_as_fast"] == pytest.approx(dense["ms"] / half["ms"])
    assert half["settings"]["widths"] == [16, 32] and 0.2 < half["settings"]["macs_share"] < 0.4
    assert "ms" not in wrong and "num_groups" in wrong["error"] and "num_groups" in table.text(rows)
    required = {"op", "case", "dtype", "layout", "backend", "gbps", "copy_fraction", "peak_mib", "speedup_vs_compile"}
    assert required <= half.keys() and len({table._key(row) for row in rows}) == 3


def test_what_the_limit_cuts_off_says_so() -> None:
    rows = images_per_s.measure([Group("tiny", 1, {DENSE: TINY})], CPU, limit_s=0.0)
    assert {row["mode"] for row in rows} == {"eager", "compiled"}
    assert all("ms" not in row and "limit of 0 s" in row["error"] for row in rows)


@torch.inference_mode()
def test_a_wrong_result_gets_no_time(tmp_path: Path) -> None:
    network = Network(job(tmp_path))
    assert "error" not in network.prepare("eager") and network.time(2)["ms"] > 0
    right = network.unet

    def last_image_wrong(x: torch.Tensor, t: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        out = right(x, t, return_dict=False)[0].clone()
        out[-1] *= 1.01
        return (out,)

    network.compiled = last_image_wrong
    found = network.prepare("compiled")
    assert "wrong result" in found["error"] and found["rel_error"] == pytest.approx(0.01, rel=0.05)
    with pytest.raises(AssertionError):
        network.time(1)


@torch.inference_mode()
def test_compiled_code_first_runs_when_its_turn_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is a stand-in that runs the traced graph; what it returns looks whether another process could have the lock."""
    lock = tmp_path / "lock"
    seen: list[bool] = []

    def is_free() -> bool:
        with open(lock, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        assert is_free()

        def run(*args: Any) -> Any:
            seen.append(is_free())
            return graph.forward(*args)

        return run

    look_up = torch._dynamo.lookup_backend
    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: compiler if name == "inductor" else look_up(name))
    network = Network(job(tmp_path, compile=True))
    assert seen and not any(seen) and is_free()
    assert network.about["graphs"] == 1 and network.about["compile_s"] > 0
    assert "error" not in network.prepare("compiled") and seen[-1]  # now the asking process is who holds it


class Stand:
    """Answers like a process whose network takes `gib` of a GPU that has 3."""

    free = 3

    def __init__(self, gib: int) -> None:
        self.gib, self.held = gib, 0

    def ask(self, name: str, *given: Any) -> dict[str, Any]:
        if name == "drop":
            Stand.free, self.held = Stand.free + self.held, 0
        elif name == "prepare":
            if self.gib > Stand.free:
                return {"error": images_per_s.OUT_OF_MEMORY}
            Stand.free, self.held = Stand.free - self.gib, self.gib
        return {"ms": 10.0 * self.gib} if name == "time" else {}


def test_networks_that_do_not_fit_together_are_timed_by_themselves() -> None:
    members: Any = {DENSE: Stand(3), HALF: Stand(2), "larger": Stand(4)}
    found = images_per_s.timed(members, "eager", 0.1)
    assert set(found[DENSE]["samples"]) == {30.0} and set(found[HALF]["samples"]) == {20.0}
    assert found["larger"] == {"error": images_per_s.OUT_OF_MEMORY} and Stand.free == 3


def test_a_turn_is_taken_once(tmp_path: Path) -> None:
    turn = Turn(tmp_path / "lock")
    turn.take()
    turn.take()
    turn.give()
    turn.leave()
    turn.take()
    other = Turn(tmp_path / "lock")
    other.take()
    assert other.waited < 5
    other.give()


@pytest.mark.parametrize(
    "change,want",
    [
        (lambda v: v, 0.0), (lambda v: v * torch.tensor([1.0, 1.5]).view(2, 1, 1, 1), 0.5), (lambda v: v[:1], float("inf")),
        (lambda v: v * float("nan"), float("inf")), (lambda v: -v, 2.0),
    ],
    ids=["same", "one image", "shape", "nan", "sign"],
)  # fmt: skip
def test_error_is_that_of_the_worst_image(change: Any, want: float) -> None:
    value = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert images_per_s.largest_error(change(value), value) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "networks,params,groups", [(images_per_s.CIFAR10_32, 35_746_307, 3), (images_per_s.PIXELS_256, 113_673_219, 2)], ids=["32px", "256px"]
)
def test_networks_of_the_gpu_have_the_sizes_they_claim(networks: dict[str, Any], params: int, groups: int) -> None:
    from wanda_fast.compact import new_unet
    from wanda_fast.evaluation import count_macs, count_params

    assert len(networks) == groups
    dense = new_unet(networks[DENSE])
    assert count_params(dense) == params
    share = count_macs(new_unet(networks[HALF])) / count_macs(dense)
    assert 0.45 < share <= 0.5


def test_networks_of_the_free_layout_have_the_sizes_they_claim() -> None:
    from wanda_fast.evaluation import count_macs

    shares = {"56": 0.563, "half": 0.5, "45": 0.45}
    networks = images_per_s.free_networks()
    assert len(networks) == 4
    for name, config in networks.items():
        found = count_macs(images_per_s.build(config)) / 6_053_953_536
        want = shares[name.split()[0]]
        assert want - 0.005 < found <= want, name
        step = 64 if "--align 64" in name else 16
        assert all(width % step == 0 for width in config["pruned_widths"].values())
    spans = images_per_s.level_widths(networks["56 % of the MACs, free layout"])
    assert spans == ["96-128", "176-192", "176", "176"]
    assert images_per_s.level_widths(TINY) == [32, 64]


def test_a_network_of_the_free_layout_is_measured() -> None:
    from wanda_fast.evaluation import count_macs
    from wanda_fast.slots import find_slots

    slots = find_slots(images_per_s.build(TINY)).slots
    thin = {**TINY, "pruned_widths": {name: slot.width // 2 if slot.levels else slot.width for name, slot in slots.items()}}
    (free,) = images_per_s.measure([Group("tiny", 2, {DENSE: thin})], CPU, with_compile=False, seconds=0.02, workers=1)
    assert free["settings"]["layout"] == "free" and free["settings"]["widths"] == ["16", "32"] and free["ms"] > 0
    assert free["settings"]["macs"] < 0.5 * count_macs(images_per_s.build(TINY))


def test_groups_in_order_of_weight() -> None:
    groups = images_per_s.cases(torch.device("cuda"), "full", 0)
    assert [(g.batch, g.networks[DENSE]["sample_size"]) for g in groups] == [(256, 32), (256, 256), (1, 32), (16, 32), (16, 256), (1, 256)]
    assert all(next(iter(g.networks)) == DENSE for g in groups)
    assert [g.batch for g in images_per_s.cases(torch.device("cuda"), "quick", 0)] == [256]


def test_plan_takes_half() -> None:
    found = images_per_s.plan(TINY, device=CPU, images=4, batch_size=4)
    assert all(new <= old for new, old in zip(found["block_out_channels"], TINY["block_out_channels"], strict=True))
    assert sum(found["block_out_channels"]) < sum(TINY["block_out_channels"])


def test_it_runs_only_when_named_and_may_save_and_be_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(main, "run", lambda ops, device, size, **given: asked.append((ops, given)) or {"env": {}, "rows": []})
    assert main.main(["--device", "cpu", "--quick"]) == 0
    assert "images_per_s" not in asked[0][0] and "whole_prune" in asked[0][0]
    assert main.main(["--device", "cpu", "--op", "images_per_s", "--limit", "9"]) == 0
    assert asked[1][0] == ["images_per_s"] and asked[1][1]["limit_s"] == 9


def test_rows_are_saved_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(device: Any, size: str, seed: int, *, with_compile: bool, limit_s: float, save: Any) -> list[dict[str, Any]]:
        assert with_compile is False and limit_s == 5.0
        save([{"n": 1}])
        return [{"n": 1}, {"n": 2}]

    monkeypatch.setattr(images_per_s, "rows", rows)
    monkeypatch.setattr(main, "copy_bandwidth", lambda device: 1.0)
    saved: list[Any] = []
    main.run(["images_per_s"], CPU, "quick", seed=0, with_compile=False, limit_s=5.0, save=lambda found: saved.append(found["rows"]))
    assert saved == [[{"n": 1}], [{"n": 1}, {"n": 2}]]


def row(network: str, batch: int, mode: str, **more: Any) -> dict[str, Any]:
    about = {"op": "images_per_s", "model": "net", "dtype": "bf16", "settings": {"widths": [8, 16], "macs": 2_000_000_000}}
    return {**about, "network": network, "batch_size": batch, "mode": mode, **more}


def test_table_has_a_line_per_network_and_batch() -> None:
    env = {"gpu": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}
    rows = [
        row(DENSE, 1, "eager", images_per_s=1.0, times_as_fast=None), row(HALF, 1, "eager", images_per_s=1.5, times_as_fast=1.5),
        row(DENSE, 256, "eager", images_per_s=1234.0, times_as_fast=None), row(DENSE, 256, "compiled", error="out of memory"),
    ]  # fmt: skip
    lines = speed_table.markdown({"env": env, "rows": rows}).splitlines()
    assert lines[2] == "| architecture, widths per level | MACs | batch | eager | compiled |"
    assert lines[4:7] == [
        "| net, (8, 16) | 2.00 G | 256 | 1,234.0 | - |",
        "| net, (8, 16) | 2.00 G | 1 | 1.00 | - |",
        "| net, (8, 16) | 2.00 G | 1 | 1.50 (1.50×) | - |",
    ]
    assert lines[-1] == "No time: net b256 dense compiled: out of memory."


def test_readme_has_the_table_where_there_are_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (speed_table.BEGIN in readme) == speed_table.RESULT.is_file()
    if speed_table.RESULT.is_file():
        result = json.loads(speed_table.RESULT.read_text(encoding="utf-8"))
        made = table.insert(readme, speed_table.content(result), speed_table.BEGIN, speed_table.END)
        assert made == readme and speed_table.FULL.read_text() == speed_table.full(result), "run: python -m benchmarks.speed_table"
