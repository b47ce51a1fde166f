"""Several processes do the work of one, a lost one ends the run, and a killed run goes on where it was.

Each test starts one program that loads torch once and forks its processes: ranks that find each other through Gloo as a launcher
would have them, or one life of a run after the other.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import PLAIN, random_unet
from runs import ROOT, tree
from safetensors.torch import load_file

from wanda_fast import distributed, evaluation, resume, sampling
from wanda_fast.distributed import Ranks
from wanda_fast.errors import UserError
from wanda_fast.memory import PeakMemory, parse_bytes
from wanda_fast.pruning import prune
from wanda_fast.smaller_batches import in_smaller_batches

SMALL: dict[str, Any] = {**PLAIN, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}
OPTIONS: dict[str, Any] = {
    "ratio": 0.3, "align": 4, "min_width": 4, "calib_steps": 24, "repair_images": 40, "num_samples": 3, "num_inference_steps": 2,
    "batch_size": 8, "dataset": "self", "device": "cpu", "pruner": "wanda-diff",
}  # fmt: skip
# Forks `size` ranks, each of which prunes; prints the exit code of each.
RANKS = """
import json, os, sys, time
os.environ["OMP_NUM_THREADS"] = "1"
import torch
torch.set_num_threads(1)
import diffusers, wanda_fast.cli, wanda_fast.pruning, wanda_fast.sampling, wanda_fast.checkpoint, wanda_fast.evaluation
model, target, options, size, port, dies = json.loads(sys.argv[1])
words = ["prune", "--model", model, "--out", target] + [w for k, v in options.items() for w in (f"--{k}", str(v))]
children = []
for rank in range(size):
    pid = os.fork()
    if pid == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port), WANDA_FAST_TIMEOUT="120")
        if rank == dies:
            from wanda_fast import repair
            fit = repair._Run.fit
            def dying(self, stage, records, number):
                if number > 8:
                    os.kill(os.getpid(), 9)
                return fit(self, stage, records, number)
            repair._Run.fit = dying
        code = wanda_fast.cli.main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    children.append(pid)
print("codes", [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children], flush=True)
"""
# Prunes with --resume in forked lives: the first ones are killed after the given seconds, the last one may finish.
LIVES = """
import json, os, sys, time
os.environ["OMP_NUM_THREADS"] = "1"
import torch
torch.set_num_threads(1)
import diffusers, wanda_fast.pruning, wanda_fast.sampling, wanda_fast.checkpoint, wanda_fast.evaluation
model, target, options, shares, seed = json.loads(sys.argv[1])
import random
draw = random.Random(seed)
def life(folder, seconds):
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        wanda_fast.pruning.prune(model, save_path=folder, resume=True, **options)
        os._exit(0)
    if seconds is not None:
        while time.monotonic() - begin < seconds:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return time.monotonic() - begin, 0
            time.sleep(0.005)
        os.kill(pid, 9)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return time.monotonic() - begin, code
took, code = life(target + "-whole", None)
print("whole", round(took, 2), code, flush=True)
for low, high in shares:
    at = took * draw.uniform(low, high)
    code = life(target, at)[1]
    left = sorted(os.listdir(target + ".unfinished"))[-3:] if os.path.isdir(target + ".unfinished") else None
    print("code", code, "after", round(at, 2), "left", left, flush=True)
    if code == 0:  # a machine that became faster meanwhile
        break
else:
    print("last", *life(target, None), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    DDPMPipeline(unet=random_unet(SMALL), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


def run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True, timeout=280, env=env
    )
    print(done.stdout[-3000:], done.stderr[-3000:])
    return done


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.rglob("diffusion_pytorch_model.safetensors")))


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pruning.json").read_text())


@pytest.mark.parametrize("more", [{}, {"layout": "free", "experts": 2}], ids=["stock", "experts"])
def test_two_processes_do_the_work_of_one(more: dict[str, Any], model: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, **more}
    done = run(RANKS, str(model), str(tmp_path / "two"), options, 2, free_port(), None)
    assert "codes [0, 0]" in done.stdout
    assert done.stdout.count("written to") == 1  # one of them speaks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prune(model, save_path=tmp_path / "one", **options)
    finally:
        torch.set_num_threads(threads)
    one, two = report(tmp_path / "one"), report(tmp_path / "two")
    assert two["processes"] == 2 and two["plan"] == one["plan"]
    stats = [load_file(tmp_path / name / "activation_stats.safetensors") for name in ("one", "two")]
    assert stats[0].keys() == stats[1].keys() and all(torch.equal(stats[0][k], stats[1][k]) for k in stats[0])
    for (name, a), b in zip(weights(tmp_path / "one").items(), weights(tmp_path / "two").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    for grid in ("before_pruning.png",):
        assert (tmp_path / "one" / "vis" / grid).read_bytes() == (tmp_path / "two" / "vis" / grid).read_bytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
def test_two_gpus_do_the_work_of_one(tmp_path: Path) -> None:
    """Sums on the GPUs travel by NCCL. The batches of the repair differ, so the weights do in their rounding."""
    how = ["-m", "wanda_fast", "prune", "--target_macs", "70%", "--pruner", "wanda-diff", "--device", "cuda", "--batch_size", "16",
           "--calib_steps", "64", "--repair_images", "256", "--num_samples", "4", "--num_inference_steps", "4", "--quiet",
           "--save_path"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    launch = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
    for name, launcher in launch.items():
        words = [sys.executable, *launcher, *how, str(tmp_path / name)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (report(tmp_path / name) for name in launch)
    assert (one["processes"], two["processes"]) == (1, 2) and two["plan"] == one["plan"]
    for key, table in load_file(tmp_path / "one" / "activation_stats.safetensors").items():
        other = load_file(tmp_path / "two" / "activation_stats.safetensors")[key]
        torch.testing.assert_close(other, table, rtol=1e-5, atol=1e-6, msg=key)
    assert two["quality"]["noise_mse"] == pytest.approx(one["quality"]["noise_mse"], rel=0.02)
    images = []
    for name in launch:
        pipeline = DDPMPipeline.from_pretrained(tmp_path / name)
        images.append(sampling.sample(pipeline.unet, pipeline.scheduler, 4, steps=4, device="cpu"))
    assert evaluation.ssim(*images) > 0.99


def test_a_lost_process_ends_the_run(model: Path, tmp_path: Path) -> None:
    done = run(RANKS, str(model), str(tmp_path / "out"), {**OPTIONS, "split": "uniform"}, 3, free_port(), 1)
    assert "codes [1, -9, 1]" in done.stdout
    for rank in (0, 2):
        assert f"rank {rank}: another process of this run has ended or does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() and tree(tmp_path) == []


def test_a_run_killed_three_times_ends_as_if_it_had_not_been(model: Path, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    target = tmp_path / "out"
    done = run(LIVES, str(model), str(target), OPTIONS, [(0.05, 0.45), (0.05, 0.3), (0.05, 0.2)], seed)
    assert done.stdout.count("code -9") >= 2 and done.returncode == 0, seed
    whole = tmp_path / "out-whole"
    assert report(target)["plan"] == report(whole)["plan"], seed
    a, b = weights(target), weights(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), seed
    assert not list(tmp_path.glob("*.unfinished")), seed


# ---------------------------------------------------------------------------------------------------- without processes


def test_shares_cover_everything_once() -> None:
    for n in (1, 7, 24, 100):
        for size in (1, 2, 3, 5):
            for unit in (1, 8):
                cuts = [Ranks(r, size).part(n, unit) for r in range(size)]
                assert [i for a, b in cuts for i in range(a, b)] == list(range(n))
                assert all(a % unit == 0 for a, b in cuts if a < b)


def test_a_process_on_its_own_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.joined() as alone:
        assert alone == Ranks() and alone.share({"a": 1}) == {"a": 1} and alone.all(False) is False


def test_one_of_several_processes_does_not_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it halves the batch; together the others would wait for sums that never come."""
    tried: list[int] = []

    def work(size: int) -> int:
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("too much")
        return size

    assert in_smaller_batches(work, 8, what="the work", say=lambda line: None) == 2 and tried == [8, 4, 2]
    monkeypatch.setattr(distributed, "_current", Ranks(0, 2))
    with pytest.raises(torch.OutOfMemoryError):
        in_smaller_batches(work, 8, what="the work")
    assert tried == [8, 4, 2, 8]


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is set but RANK is not"), distributed.joined():
        pass


@pytest.mark.parametrize(
    "name, value", [("WANDA_FAST_TIMEOUT", v) for v in ("inf", "nan", "0", "-3", "1e12", "soon")] + [("RANK", "2"), ("WORLD_SIZE", "-2")]
)
def test_a_malformed_launch_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for given in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", name: value}.items():
        monkeypatch.setenv(*given)
    with pytest.raises(UserError, match="the launcher's environment is malformed"), distributed.joined():
        pass


def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from wanda_fast.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fid", "--save-stats", "nowhere", "x.npz"]) == 2
    assert "fid runs in one process" in capsys.readouterr().err


def test_an_unfinished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    resume.Unfinished(tmp_path / "out", {"ratio": 0.3, "seed": 0})
    with pytest.raises(UserError, match=r"ratio = 0\.3, not 0\.5"):
        resume.Unfinished(tmp_path / "out", {"ratio": 0.5, "seed": 0})
    again = resume.Unfinished(tmp_path / "out", {"ratio": 0.3, "seed": 0})
    assert again.found
    (again.folder / "settings.json").write_text("{")
    with pytest.raises(UserError, match="not the settings of an unfinished run"):
        resume.Unfinished(tmp_path / "out", {"ratio": 0.3, "seed": 0})
    (tmp_path / "other.unfinished").mkdir()
    (tmp_path / "other.unfinished" / "photo.png").write_bytes(b"")
    with pytest.raises(UserError, match="is not an unfinished run"):
        resume.Unfinished(tmp_path / "other", {})


def test_a_process_that_does_not_see_the_shared_folder_says_so(tmp_path: Path) -> None:
    """As on a second machine with disks of its own: it would have redone layers while the others waited for its sums."""
    with pytest.raises(UserError, match="a folder that they share"):
        resume.Unfinished(tmp_path / "out", {"seed": 0}, write=False)
    resume.Unfinished(tmp_path / "out", {"seed": 0})
    assert resume.Unfinished(tmp_path / "out", {"seed": 0}, write=False).found


def test_damaged_state_is_told(model: Path, tmp_path: Path) -> None:
    key_holder = tmp_path / "out"
    options = {**OPTIONS, "num_samples": 0, "repair_images": 8, "calib_steps": 8, "split": "uniform"}
    with pytest.raises(UserError, match="resume needs a folder"):
        prune(model, resume=True, **options)
    kept: list[Path] = []

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.RepairState, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(model, save_path=key_holder, resume=True, **options)
    kept = sorted((tmp_path / "out.unfinished").glob("calibration-*"))
    assert kept and (tmp_path / "out.unfinished" / "plan.json").is_file()
    kept[0].write_bytes(kept[0].read_bytes()[:200])
    with pytest.raises(UserError, match="Remove the file"):
        prune(model, save_path=key_holder, resume=True, **options)
    kept[0].unlink()
    (tmp_path / "out.unfinished" / "repair.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not the state of this repair"):
        prune(model, save_path=key_holder, resume=True, **options)


def test_tables_over_the_limit_become_bins_and_say_so(model: Path) -> None:
    lines: list[str] = []
    options = {**OPTIONS, "num_samples": 0, "repair": "none", "dry_run": True}
    result = prune(model, stats_memory="10K", log=lines.append, **options)
    assert result.stats is not None and result.stats.info["rows"] == "bin"
    assert any("timestep bins" in line and "--stats_memory" in line for line in lines)
    with pytest.raises(UserError, match="activation strategy median needs the statistics of every sample"):
        prune(model, stats_memory="10K", activation_strategy="median", **options)


def test_offload_changes_nothing(model: Path) -> None:
    options = {**OPTIONS, "num_samples": 0, "split": "uniform"}
    plain, away = prune(model, **options), prune(model, offload=True, **options)
    a, b = plain.pipeline.unet.state_dict(), away.pipeline.unet.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert plain.report["peak_bytes"]["repair"]["device"] is None  # no GPU here


def test_sizes_are_read() -> None:
    assert parse_bytes("1.5 GiB") == 3 << 29 and parse_bytes(4096) == 4096 and parse_bytes("2k") == 2048
    for text in ("", "0", "-1M", "much", "1e99", "9" * 40):
        with pytest.raises(UserError, match="is not a size such as"):
            parse_bytes(text)


def test_the_peak_of_a_stage_is_its_own() -> None:
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    block = mmap.mmap(-1, 64 << 20)  # new pages; an allocator may hand out those that it has kept
    for first in range(0, len(block), mmap.PAGESIZE):
        block[first] = 1
    high = peak.stop()["host"]
    block.close()
    peak.start()
    low = peak.stop()["host"]
    if high is None or low is None:
        pytest.skip("this kernel does not set its high-water mark back")
    assert high - low > 32 << 20


assert signal.SIGKILL == 9  # what the programs above send
