"""bench.py: refuses wrong results, its JSON and tables, and that README and committed results agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import channel_sq_norm, compact, harness, main, published, table, wanda_score

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
REQUIRED = {
    "op", "case", "dtype", "layout", "backend", "ms", "ms_p20", "ms_p80", "gbps", "copy_fraction", "peak_mib",
    "speedup_vs_reference", "speedup_vs_compile", "speedup_vs_published",
}  # fmt: skip


def tiny_case(**changes: Any) -> harness.Case:
    def make(generator: torch.Generator) -> tuple[torch.Tensor]:
        return (torch.rand(64, generator=generator) + 1,)

    fields: dict[str, Any] = {
        "op": "double", "case": "tiny", "dtype": "fp32", "layout": "contiguous", "bytes": 512, "make": make,
        "truth": lambda x: x.double() * 2, "candidates": {"reference": lambda x: x * 2, "ours": lambda x: x + x},
    }  # fmt: skip
    return harness.Case(**fields | changes)


def run_tiny(case: harness.Case) -> dict[str, dict[str, Any]]:
    rows = harness.run_case(case, CPU, 10.0, seed=0, quick=True, with_compile=False, budget_s=0.001)
    return {row["backend"]: row for row in rows}


def test_rows_hold_what_they_must() -> None:
    rows = run_tiny(tiny_case())
    for row in rows.values():
        assert row.keys() >= REQUIRED
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["copy_fraction"] == pytest.approx(row["gbps"] / 10)
    assert rows["ours"]["speedup_vs_reference"] == pytest.approx(rows["reference"]["ms"] / rows["ours"]["ms"])
    assert rows["ours"]["speedup_vs_compile"] is None and rows["reference"]["speedup_vs_reference"] is None


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x * 2.01, lambda x: torch.full_like(x, float("nan")), lambda x: x[:10] * 2, lambda x: (x * 2, x)],
    ids=["values", "nan", "shape", "count"],
)
def test_a_wrong_result_gets_no_time(wrong: Any) -> None:
    rows = run_tiny(tiny_case(candidates={"reference": lambda x: x * 2, "ours": wrong}))
    assert "wrong result" in rows["ours"]["error"] and "ms" not in rows["ours"]
    assert "ms" in rows["reference"]
    assert "wrong result" in table.text(list(rows.values()))


def test_where_plain_pytorch_overflows_nothing_is_timed() -> None:
    """Twice an infinite error would accept anything."""
    overflown = lambda x: (x * 60000).half() * 2  # noqa: E731
    rows = run_tiny(tiny_case(truth=lambda x: x.double() * 120000, candidates={"reference": overflown, "ours": overflown}))
    assert all("wrong result" in row["error"] and "ms" not in row for row in rows.values())


@pytest.mark.parametrize("rounding,right", [(0.0, False), (1e-2, True)])
def test_rounding_that_a_number_format_explains_is_accepted(rounding: float, right: bool) -> None:
    case = tiny_case(candidates={"reference": lambda x: x * 2, "published": lambda x: x * 2.001}, rounding={"published": rounding})
    assert ("ms" in run_tiny(case)["published"]) is right
    inputs = case.make(torch.Generator().manual_seed(0))
    assert harness.check(case, "published", case.candidates["published"], inputs, 0.0)[0] is right


def test_memory_of_a_cpu_run_is_not_measured() -> None:
    assert all(row["peak_mib"] is None for row in run_tiny(tiny_case()).values())


def test_exact_cases_accept_no_rounding() -> None:
    case = tiny_case(
        exact=True, truth=lambda x: x * 2, candidates={"reference": lambda x: x * 2, "ours": lambda x: x * 2 + 1e-6}
    )
    assert "error" in run_tiny(case)["ours"]
    case.candidates["ours"] = lambda x: (x * 2, x * 2)
    assert "error" in run_tiny(case)["ours"]


def test_a_changed_argument_is_fresh_for_each_check() -> None:
    """Without copies the second candidate would start from the first one's result."""

    def make(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(4, generator=generator), torch.zeros(4)

    def add(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.add_(x)

    case = tiny_case(
        make=make, truth=lambda x, out: out.double() + x, candidates={"reference": add, "ours": add}, mutates=(1,)
    )
    assert all("error" not in row for row in run_tiny(case).values())


@pytest.mark.parametrize("module", [channel_sq_norm, wanda_score, compact], ids=lambda m: m.OP)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", ["quick", "default", "full"])
def test_cases_are_described_once(module: Any, device: str, size: str) -> None:
    found = module.cases(torch.device(device), size)
    keys = [(c.case, c.dtype, c.layout) for c in found]
    assert found and len(set(keys)) == len(keys)
    assert all(
        c.op == module.OP and c.bytes > 0 and "reference" in c.candidates and "published" in c.candidates for c in found
    )


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 6, 3), (2, 3)])
def test_published_norm_is_the_square_root_of_ours(shape: tuple[int, ...]) -> None:
    from wanda_fast import reference

    x = torch.randn(shape)
    channels = shape[1] if len(shape) == 4 else shape[-1]
    ours = reference.channel_sq_norm(x, torch.arange(shape[0]), torch.zeros(shape[0], channels))
    torch.testing.assert_close(published.activation_norm(x), ours.sqrt())


def test_program_writes_compares_and_draws(tmp_path: Path) -> None:
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    arguments = ["--quick", "--device", "cpu", "--op", "wanda_score", "--no-compile"]
    done = subprocess.run(
        [sys.executable, "bench.py", *arguments, "--out", str(out), "--chart", str(picture)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["env"]["seed"] == 0 and result["env"]["copy_gbps"] > 0
    assert all(row.keys() >= REQUIRED for row in result["rows"])
    assert picture.stat().st_size > 1000
    assert "wanda_score" in table.comparison(result, result) and "+0.0%" in table.comparison(result, result)


@pytest.mark.parametrize(
    "arguments,text",
    [
        (["--device", "nonsense"], "no device"),
        (["--device", "meta"], "only cpu and cuda"),
        (["--out", "no/such/folder/x.json"], "folder does not exist"),
        (["--compare", "no_such_file.json"], "cannot read"),
        (["--compare", "pyproject.toml"], "cannot read"),
        (["--compare", "benchmarks/results/quality.json"], "not a file that --out wrote"),
        (["--chart", "no/such/folder/x.png"], "folder does not exist"),
        (["--out", "benchmarks"], "--out benchmarks: is a folder"),
        (["--chart", "picture"], "must end in one of"),
        (["--chart", "picture.xyz"], "must end in one of"),
        (["--seed", str(2**64)], "must fit 64 bits"),
        (["--op", "nothing"], "invalid choice"),
        (["--quick", "--full"], "not allowed"),
        (["--clock", "process", "--device", "meta"], "only cpu and cuda"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("ms", ["0.5", 0, None, True])
def test_earlier_results_with_no_times_are_refused_before_the_run(ms: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"op": "wanda_score", "case": "x", "dtype": "fp32", "layout": "contiguous", "backend": "cpu", "ms": ms}
    (tmp_path / "earlier.json").write_text(json.dumps({"env": {}, "rows": [row]}))
    with pytest.raises(SystemExit) as stop:
        main.main(["--compare", str(tmp_path / "earlier.json")])
    assert stop.value.code == 2 and f"a row has the time {ms!r}" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as stop:
        main.main(["--device", "cuda:2"])
    assert stop.value.code == 2 and "there are 2 GPUs" in capsys.readouterr().err


def test_committed_results_are_whole() -> None:
    seen = set()
    for file in table.RESULTS:
        result = json.loads(file.read_text())
        assert {"gpu", "driver", "torch", "triton", "python", "commit", "seed", "copy_gbps"} <= result["env"].keys()
        assert result["env"]["gpu"] == "NVIDIA H200"
        seen |= {row["op"] for row in result["rows"]}
        timed = [row for row in result["rows"] if "error" not in row]
        assert all(row.keys() >= REQUIRED for row in timed)
        # A baseline may be wrong, and then has no time; ours may not.
        assert {row["backend"] for row in result["rows"] if "error" in row} <= set(table.BASELINES)
        assert all("overhead" in row for row in timed if row["op"] == "calibration_step")
        assert "/" not in "".join(str(v) for v in result["env"].values())
    assert seen >= {"channel_sq_norm", "wanda_score", "compact", "conv_gram", "calibration_step", "whole_prune"}


def test_committed_cpu_results_are_whole_and_no_row_loses_to_plain_pytorch() -> None:
    result = json.loads((RESULTS / "cpu.json").read_text())
    assert result["env"]["device"] == "cpu" and {"cpu", "torch", "commit", "seed", "clock", "threads"} <= result["env"].keys()
    assert {row["op"] for row in result["rows"]} >= {"channel_sq_norm", "wanda_score", "compact", "conv_gram", "calibration_step"}
    assert all("error" not in row and row.keys() >= REQUIRED for row in result["rows"])
    ours = [row for row in result["rows"] if row["backend"] == "cpu" and row["op"] != "calibration_step"]
    assert ours and all(row["speedup_vs_reference"] > 1 for row in ours)


@pytest.mark.parametrize("name", ["wall", "process"])
def test_clocks_of_cpu_timings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_clock", harness._clock)
    harness.use_clock(name)
    assert harness._clock is harness.CLOCKS[name] and harness.clock() <= harness.clock()
    assert run_tiny(tiny_case())["ours"]["ms"] > 0


def test_readme_table_is_made_from_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    made = table.insert(readme, table.content())
    assert made == readme and table.FULL.read_text() == table.full(), "run: python -m benchmarks.table"
    shown = made.split(table.BEGIN)[1].split(table.END)[0]
    for (op, case, _), dtypes in table._BRIEF.items():
        assert all(shown.count(f"| `{op}` | {case} | {dtype} |") == 1 for dtype in dtypes), (op, case)
    assert {op for op, *_ in table._BRIEF} == set(table.KERNELS) and "CUDA graph" in shown and "eager, published" in shown
    assert sum(line.startswith("| `") for line in shown.splitlines()) <= 10, "README stays short"


def kernel(op: str, case: str, dtype: str, layout: str, backend: str, **more: Any) -> dict[str, Any]:
    timed = {"ms": 0.5, "copy_fraction": 0.9, "speedup_vs_reference": 2.0, "speedup_vs_compile": 0.5, "speedup_vs_published": None}
    return {"op": op, "case": case, "dtype": dtype, "layout": layout, "backend": backend, **timed, **more}


def test_readme_shows_few_rows_and_the_file_all() -> None:
    step = {"op": "calibration_step", "case": "net b8 graph", "dtype": "fp32", "layout": "contiguous", "ms": 5.0}
    rows = [
        kernel("compact", "sdxl 1280x2560x3x3, 30 % random", "fp32", "contiguous", "cuda"),
        kernel("compact", "sdxl 1280x2560x3x3, 30 % random", "fp32", "contiguous", "published"),
        kernel("compact", "sdxl 1280x2560x3x3, 30 % random", "fp32", "channels_last", "cuda"),
        kernel("channel_sq_norm", "large 64x64", "bf16", "nchw", "triton"), kernel("channel_sq_norm", "small", "bf16", "nchw", "triton"),
        {**step, "mode": "graph", "backend": "plain", "overhead": None}, {**step, "mode": "graph", "backend": "triton", "overhead": 0.045},
        {**step, "case": "net b8 eager", "mode": "eager", "backend": "published", "overhead": 0.7},
        {"op": "whole_prune", "case": "whole", "backend": "wanda_fast", "ms": 4500.0, "share": 1.0},
    ]  # fmt: skip
    env = {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "copy_gbps": 4000.0}
    lines = table.markdown([{"env": env, "rows": rows}], brief=True).splitlines()
    assert [line for line in lines if line.startswith("| `")] == [
        "| `channel_sq_norm` | large 64x64 | bf16 | 0.5000 | 0.90 | 0.50× | - |",
        "| `compact` | sdxl 1280x2560x3x3, 30 % random | fp32 | 0.5000 | 0.90 | 0.50× | - |",
    ]
    assert lines[-1] == "| net b8, fp32 | +4.5% | - | +70.0% |"
    whole = table.markdown([{"env": env, "rows": rows}], brief=False).splitlines()
    assert sum(line.startswith("| `") for line in whole) == 4 and "| whole | wanda_fast | 4.500 | 100.0% |" in whole


def test_insert_needs_its_markers() -> None:
    with pytest.raises(ValueError, match="must hold"):
        table.insert("no markers", "x")
    assert table.insert(f"a\n{table.BEGIN}\nold\n{table.END}\nb", "new") == f"a\n{table.BEGIN}\nnew\n{table.END}\nb"
