"""images_per_s: images per second of dense against pruned networks: eager, compiled, and both replayed from a CUDA graph.

    python bench.py --op images_per_s --full --out speed.json        some four minutes on a GPU, most of it compiling
    python -m benchmarks.images_per_s --plan 256px                   choose widths at half of the MACs, on random weights

images/s = batch / (50 · median seconds of a forward pass): DDIM of 50 steps; the sampler's arithmetic between the passes is not in it. On a GPU
bf16, on a CPU fp32; weights and images channels-last, inference mode, fixed shapes.

Networks. Speed asks nothing of the weights, so they are random (seeded); the widths are those of real plans, split "sensitivity",
norm policy "free", stock layout and alignment 16 where nothing else is said:

- the architecture of google/ddpm-cifar10-32: (128, 112, 176, 80) at half of the MACs and (128, 160, 96, 64) at 56 % of them, both chosen on a
  trained network with 64 images (random weights lead to the first as well), before the split kept widths multiples of the number of norm
  groups, which the second are anyway; at batch 256 also what `--align 64` takes at half of the MACs, and
  networks of the free layout, whose widths are in free_widths.json;
- the 256-pixel architecture (google/ddpm-celebahq-256, ddpm-church-256, ddpm-bedroom-256): (112, 80, 64, 96, 128, 144) at half of the
  MACs, chosen as `--plan` did then on random weights, with four images and the study's second moments summed in float64. A
  trained network will want others.

Processes. Compiling takes a minute or two per network and batch, and tracing cannot be read from a cache. So each (network, batch) has a
process of its own that compiles once and stays; they compile side by side and are then timed one after the other, dense
and pruned in turns. A lock keeps every other process off the GPU meanwhile: also the first run of what was compiled, which
measures variants of its kernels, has the GPU for itself. `compiled graph` is the same compiled code in a CUDA graph, which is
what mode="reduce-overhead" makes of it; a second compilation by that name would give the same kernels again.

Before it is timed each mode is compared with eager passes over small pieces of the batch; see TOLERANCES. Where a batch does not fit, or
the time is up (`--limit`), the row holds the reason and no time.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import log, percentiles

OP = "images_per_s"
ROOT = Path(__file__).resolve().parent.parent
STEPS = 50
# Largest over the images of ‖difference‖ / ‖eager output‖. Compiled code rounds to bf16 at other places than eager code does, in some
# hundred layers one after the other; a wrong kernel is off by about 1.
TOLERANCES = {"bf16": 0.05, "fp32": 1e-3}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PIECE = 16  # images of a reference pass: far from what memory and 32-bit indices hold
GRACE_S = 120.0  # longest that one answer of a process may take once it is compiled
OUT_OF_MEMORY = "out of memory"
DENSE, HALF = "dense", "half of the MACs"

DDPM_256: dict[str, Any] = {
    "sample_size": 256, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "attention_head_dim": None, "norm_num_groups": 32, "norm_eps": 1e-6, "act_fn": "silu", "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1,
}  # fmt: skip
TINY: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"), "norm_num_groups": 8, "attention_head_dim": None,
}  # fmt: skip


def narrower(config: dict[str, Any], widths: Sequence[int], groups: int) -> dict[str, Any]:
    """The configuration with these widths per level and this number of norm groups: what the stock layout changes."""
    return {**config, "block_out_channels": tuple(widths), "norm_num_groups": groups}


CIFAR10_32 = {
    DENSE: shapes.DDPM_CIFAR10,
    HALF: narrower(shapes.DDPM_CIFAR10, (128, 112, 176, 80), 16),
    "56 % of the MACs": narrower(shapes.DDPM_CIFAR10, (128, 160, 96, 64), 32),
}
FREE_WIDTHS = Path(__file__).resolve().parent / "free_widths.json"


def free_networks() -> dict[str, dict[str, Any]]:
    """Networks of the free layout: configuration and kept channels per slot."""
    networks = json.loads(FREE_WIDTHS.read_text(encoding="utf-8"))["networks"]
    return {name: {**shapes.DDPM_CIFAR10, "pruned_widths": widths} for name, widths in networks.items()}


PIXELS_256 = {DENSE: DDPM_256, HALF: narrower(DDPM_256, (112, 80, 64, 96, 128, 144), 16)}


@dataclass(frozen=True)
class Group:
    """Networks that are timed in turns at one batch size; the first is the dense one."""

    model: str
    batch: int
    networks: dict[str, dict[str, Any]]


# ------------------------------------------------------------------------------------------------ the process of a network


class Turn:
    """The right to use the GPU, a lock on a file; it is given up when its process ends, however it ends."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._left = False
        self.waited = 0.0

    def take(self) -> None:
        if self._file is None and not self._left:
            import fcntl

            start = time.perf_counter()
            self._file = open(self._path, "ab")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self.waited += time.perf_counter() - start

    def give(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def leave(self) -> None:
        """Give it up and never take it again: from here on the asking process does."""
        self.give()
        self._left = True


class Network:
    """A network in its process: compiles itself, and measures its forward pass in the modes it is asked for."""

    def __init__(self, job: dict[str, Any]) -> None:
        from wanda_fast.evaluation import count_macs, count_params

        if job["threads"]:
            torch.set_num_threads(job["threads"])
        self.device, dtype = torch.device(job["device"]), DTYPES[job["dtype"]]
        self.tolerance = TOLERANCES[job["dtype"]]
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        torch.manual_seed(job["seed"])
        unet = build(job["config"]).eval().requires_grad_(False)
        self.about: dict[str, Any] = {"params": count_params(unet), "macs": count_macs(unet)}
        size, channels = job["config"]["sample_size"], unet.config["in_channels"]
        generator = torch.Generator().manual_seed(job["seed"])
        x = torch.randn(job["batch"], channels, size, size, generator=generator)
        self.x = x.to(self.device, dtype).contiguous(memory_format=torch.channels_last)
        self.t = torch.randint(0, 1000, (job["batch"],), generator=generator).to(self.device)
        self.unet = unet.to(self.device, dtype).to(memory_format=torch.channels_last)
        self.turn = Turn(job["lock"])
        self.run: Callable[[], Any] | None = None
        self.compiled: Any = None
        with torch.inference_mode():
            if job["compile"]:
                self._compile()
            self.turn.take()
            self._free()
            pieces = zip(self.x.split(PIECE), self.t.split(PIECE), strict=True)
            self.reference = torch.cat([self.unet(x, t, return_dict=False)[0] for x, t in pieces])
        self._free()
        self.turn.leave()

    def _compile(self) -> None:
        from torch._dynamo import lookup_backend

        started = time.perf_counter()
        built: list[float] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            """What torch.compile uses by default, and waits for its turn before it first runs anything."""
            made = lookup_backend("inductor")(graph, inputs)
            built.append(time.perf_counter())

            def call(*args: Any) -> Any:
                self.turn.take()
                return made(*args)

            return call

        compiled = torch.compile(self.unet, backend=backend, dynamic=False)
        compiled(self.x, self.t, return_dict=False)
        self._wait()
        self.about |= {
            "compile_s": round(built[-1] - started, 1),
            "first_run_s": round(time.perf_counter() - built[-1] - self.turn.waited, 1),
            "graphs": len(built),
        }
        self.compiled = compiled

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _free(self) -> None:
        self._wait()
        if self.on_gpu:
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def prepare(self, mode: str) -> dict[str, Any]:
        """Make `time` measure this mode, after a comparison with the reference."""
        from wanda_fast.graphs import CudaCapture

        self.drop()
        network = self.compiled if mode.startswith("compiled") else self.unet

        def run() -> Tensor:
            return network(self.x, self.t, return_dict=False)[0]

        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        capture_s = None
        for _ in range(2):
            out = run()
        self._wait()
        self.run = run
        if mode.endswith("graph"):
            del out
            self._free()
            start = time.perf_counter()
            self.run = CudaCapture(self.device)(run)
            out = self.run()
            self._wait()
            capture_s = round(time.perf_counter() - start, 3)
        peak = round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1) if self.on_gpu else None
        error = largest_error(out, self.reference)
        del out
        found = {"rel_error": error, "capture_s": capture_s, "peak_mib": peak}
        if not error <= self.tolerance:
            self.drop()
            return {**found, "error": f"wrong result: relative error {error:.3g}, at most {self.tolerance:g} is accepted"}
        return found

    @torch.inference_mode()
    def time(self, count: int) -> dict[str, Any]:
        """Milliseconds per pass of `count` passes."""
        assert self.run is not None
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(count):
                self.run()
            return {"ms": (time.perf_counter() - start) * 1e3 / count}
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if count > 1:  # short passes: clocks and caches of this process after its pause
            self.run()
            self._wait()
        first.record()
        for _ in range(count):
            self.run()
        last.record()
        last.synchronize()
        return {"ms": first.elapsed_time(last) / count}

    def drop(self) -> dict[str, Any]:
        """Let go of the mode's memory."""
        self.run = None
        self._free()
        return {}


def build(config: dict[str, Any]) -> Any:
    """A randomly initialised network; "pruned_widths" in the configuration makes it one of the free layout."""
    from diffusers import UNet2DModel

    from wanda_fast.compact import new_unet
    from wanda_fast.plan import norm_groups_after
    from wanda_fast.pruned_unet import PrunedUNet2DModel
    from wanda_fast.slots import find_slots

    dense = {name: value for name, value in config.items() if name != "pruned_widths"}
    widths = config.get("pruned_widths")
    if widths is None:
        return UNet2DModel(**dense)
    groups = norm_groups_after(find_slots(new_unet(dense)), widths, "free")
    network = PrunedUNet2DModel({"widths": widths, "norm_groups": groups, "identity_shortcuts": []}, **dense)
    for module in network.modules():  # its parameters wait for those of a checkpoint
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


def level_widths(config: dict[str, Any]) -> list[int | str]:
    """Widths per level; in the free layout least-most of the resnet convolutions of each."""
    from wanda_fast import compare

    if "pruned_widths" not in config:
        return list(config["block_out_channels"])
    with torch.device("meta"):
        levels = compare.level_widths(build(config))
    return [str(w["least"]) if w["least"] == w["most"] else f"{w['least']}-{w['most']}" for w in levels]


def largest_error(out: Tensor, reference: Tensor) -> float:
    """Largest over the images of ‖out - reference‖ / ‖reference‖; infinite where anything is not finite or the shape differs."""
    if out.shape != reference.shape:
        return float("inf")
    want = reference.double().flatten(1)
    errors = (out.double().flatten(1) - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)
    return float(errors.max()) if bool(errors.isfinite().all()) else float("inf")


def reason(error: BaseException) -> str:
    """One line for a row that has no time."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def serve() -> None:
    """The process of one network: a job on the first line of the input, then questions; one line of JSON answers each."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between

    def say(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.readline())
    os.nice(job["nice"])
    try:
        network = Network(job)
        say(network.about)
    except Exception as error:  # this process exists to find out; its parent writes the reason down
        say({"error": reason(error)})
        raise
    for line in sys.stdin:
        name, *given = json.loads(line)
        try:
            say(getattr(network, name)(*given))
        except Exception as error:
            say({"error": reason(error)})
            del error  # it holds the tensors of what failed
            network.drop()


# --------------------------------------------------------------------------------------------------------- the processes


class Process:
    """A network's process as seen from outside. `about` is None until it is ready; it has "error" if it never will be."""

    def __init__(self, job: dict[str, Any], folder: Path, environment: dict[str, str]) -> None:
        self._job = job
        self._noise = folder / f"{id(self)}.log"
        self._environment = environment
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._child: subprocess.Popen[str] | None = None
        self.about: dict[str, Any] | None = None

    @property
    def started(self) -> bool:
        return self._child is not None

    def start(self) -> None:
        with open(self._noise, "w", encoding="utf-8") as noise:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.images_per_s", "--serve"], cwd=ROOT, env=self._environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=noise, text=True, encoding="utf-8",
            )  # fmt: skip
        threading.Thread(target=self._listen, args=(self._child,), daemon=True).start()
        self._send(self._job)

    def _listen(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            self._answers.put(json.loads(line))
        lines = self._noise.read_text(encoding="utf-8", errors="replace").strip().splitlines() if self._noise.is_file() else []
        self._answers.put({"error": f"the process ended: {lines[-1][:200] if lines else child.wait()}"})

    def _send(self, message: Any) -> None:
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # its end is answer enough, see _listen

    def poll(self) -> bool:
        """Whether it is ready, or failed."""
        if self.about is None and self.started:
            try:
                self.about = self._answers.get_nowait()
            except queue.Empty:
                return False
        return self.about is not None

    def ask(self, *question: Any) -> dict[str, Any]:
        assert self.about is not None
        if "error" in self.about:
            return {"error": self.about["error"]}
        self._send(question)
        try:
            return self._answers.get(timeout=GRACE_S)
        except queue.Empty:
            self.about = {"error": f"no answer within {GRACE_S:.0f} s"}
            self.stop()
            return dict(self.about)

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()


@contextmanager
def processes(
    groups: Sequence[Group], device: torch.device, dtype: str, *, seed: int, with_compile: bool, workers: int
) -> Iterator[tuple[dict[tuple[int, str], Process], Turn]]:
    """A process per network of each group, not started yet, and the lock they share; at the end all are gone."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        lock = Path(folder) / "gpu"
        environment = {**os.environ}
        if with_compile:  # the processes share the cores
            environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(4, workers // 4))))
        made = {}
        for rank, group in enumerate(groups):
            for name, config in group.networks.items():
                job = {
                    "config": config, "batch": group.batch, "device": str(device), "dtype": dtype, "compile": with_compile, "seed": seed,
                    "lock": str(lock), "nice": min(3 * rank, 19) if device.type == "cuda" else 0,
                    "threads": 0 if device.type == "cuda" else torch.get_num_threads(),
                }  # fmt: skip
                made[rank, name] = Process(job, Path(folder), environment)
        try:
            yield made, Turn(lock)
        finally:
            for process in made.values():
                process.stop()


@dataclass
class Schedule:
    """Starts processes in order, at most `workers` that are not ready at once."""

    waiting: list[Process]
    workers: int
    end: float
    busy: list[Process] = field(default_factory=list)

    def until(self, wanted: Sequence[Process]) -> bool:
        """Wait until these are ready; False if the time is up before."""
        while True:
            self.busy = [p for p in self.busy if not p.poll()]
            while self.waiting and len(self.busy) < self.workers:
                self.busy.append(self.waiting.pop(0))
                self.busy[-1].start()
            if all(p.about is not None for p in wanted):
                return True
            if time.perf_counter() > self.end:
                return False
            time.sleep(0.05)


def measure(
    groups: Sequence[Group],
    device: torch.device,
    *,
    seed: int = 0,
    with_compile: bool = True,
    limit_s: float = 270.0,
    seconds: float = 0.6,
    workers: int | None = None,
    save: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Rows of all groups, in their order.

    Args:
        limit_s: no group is begun later than this after the start.
        seconds: that the passes of one network in one mode take together.
        workers: processes that compile at once; None: the number of processors, at most 16.
        save: gets the rows so far after each mode of each group.
    """
    on_gpu = device.type == "cuda"
    dtype = "bf16" if on_gpu else "fp32"
    modes = [m for kind in (["compiled"] if with_compile else []) + ["eager"] for m in (kind, f"{kind} graph")[: 1 + on_gpu]]
    workers = workers or min(16, os.cpu_count() or 1)
    begin = time.perf_counter()
    found: list[dict[str, Any]] = []
    with processes(groups, device, dtype, seed=seed, with_compile=with_compile, workers=workers) as (made, turn):
        schedule = Schedule(list(made.values()), workers, begin + limit_s)
        for rank, group in enumerate(groups):
            members = {name: made[rank, name] for name in group.networks}
            # Small batches wait for the host, so it must be idle; a GPU's large ones do not.
            wanted = [p for (k, _), p in made.items() if k == rank or not (on_gpu and group.batch >= 64)]
            ready = schedule.until(wanted) or all(p.about is not None for p in members.values())
            late = not ready or time.perf_counter() - begin > limit_s
            log(f"  {group.model} b{group.batch}: {'no time left' if late else 'ready'} after {time.perf_counter() - begin:.0f} s")
            turn.take()
            for mode in modes:
                if late:
                    answers: dict[str, dict[str, Any]] = {
                        name: {"error": f"not measured within the limit of {limit_s:.0f} s"} for name in members
                    }
                else:
                    answers = timed(members, mode, seconds)
                found += described(group, members, mode, answers, dtype, seed)
                save(found)
            turn.give()
            for process in members.values():
                process.stop()
    return found


def timed(members: dict[str, Process], mode: str, seconds: float) -> dict[str, dict[str, Any]]:
    """What each network answers to `prepare`, and "samples", its milliseconds, taken in turns; by themselves where not all fit at once."""
    answers = {name: process.ask("prepare", mode) for name, process in members.items()}
    if len(members) > 1 and any(answer.get("error") == OUT_OF_MEMORY for answer in answers.values()):
        for process in members.values():
            process.ask("drop")
        log(f"  {mode}: not all networks fit into memory at once, so one is timed after the other")
        return {name: timed({name: process}, mode, seconds)[name] for name, process in members.items()}
    counts: dict[str, int] = {}
    rounds = 0

    def once(name: str, count: int) -> float:
        """Milliseconds; NaN where the network fails, which takes it out."""
        found = members[name].ask("time", count)
        if "error" in found:
            answers[name] = found
        return float(found.get("ms", "nan"))

    def alive() -> list[str]:
        return [name for name, answer in answers.items() if "error" not in answer]

    for name in alive():
        ms = once(name, 1)
        if ms == ms:
            counts[name] = int(min(50, max(1, 30.0 / ms)))
            rounds = max(rounds, int(min(20, max(5, seconds * 1e3 / (counts[name] * ms)))))
            answers[name]["samples"] = []
    for _ in range(rounds):
        for name in alive():
            ms = once(name, counts[name])
            if ms == ms:
                answers[name]["samples"].append(ms)
    for process in members.values():
        process.ask("drop")
    return answers


def described(
    group: Group, members: dict[str, Process], mode: str, answers: dict[str, dict[str, Any]], dtype: str, seed: int
) -> list[dict[str, Any]]:
    """One row per network of a group in one mode."""
    rows = []
    dense = statistics.median(answers[DENSE]["samples"]) if "samples" in answers[DENSE] else None
    whole = (members[DENSE].about or {}).get("macs")
    for name, answer in answers.items():
        config, about = group.networks[name], members[name].about or {}
        row: dict[str, Any] = {
            "op": OP, "case": f"{group.model} b{group.batch}, {name}", "dtype": dtype, "layout": "channels_last", "backend": mode,
            "model": group.model, "network": name, "batch_size": group.batch, "mode": mode, "steps": STEPS,
            "settings": {
                "layout": "free" if "pruned_widths" in config else "stock", "widths": level_widths(config),
                "norm_num_groups": config["norm_num_groups"],
                "macs": about.get("macs"), "params": about.get("params"), "weights": f"random, seed {seed}",
                "macs_share": round(about["macs"] / whole, 4) if whole and "macs" in about else None,
            },
        }  # fmt: skip
        rows.append(row)
        if "error" in answer:
            row["error"] = answer["error"]
            log(f"  {row['case']} {mode}: {row['error']}")
            continue
        median, low, high = percentiles(answer["samples"])
        pruned = name != DENSE and dense is not None
        row |= {
            "ms": median, "ms_p20": low, "ms_p80": high, "images_per_s": group.batch / (STEPS * median / 1e3),
            "images_per_s_dense": group.batch / (STEPS * dense / 1e3) if dense else None,
            "times_as_fast": dense / median if pruned and dense else None,
            "rel_error": answer["rel_error"], "peak_mib": answer["peak_mib"], "capture_s": answer["capture_s"],
            "compile_s": about.get("compile_s") if mode.startswith("compiled") else None,
            "first_run_s": about.get("first_run_s") if mode.startswith("compiled") else None,
            "gbps": None, "copy_fraction": None, "speedup_vs_reference": None, "speedup_vs_compile": None, "speedup_vs_published": None,
        }  # fmt: skip
        faster = f", {row['times_as_fast']:.2f} times the dense network" if row["times_as_fast"] else ""
        log(f"  {row['case']} {mode}: {median:.3f} ms, {row['images_per_s']:.2f} images/s{faster}")
    return rows


# ------------------------------------------------------------------------------------------------------------------- cases


def plan(
    config: dict[str, Any], *, device: torch.device, images: int, batch_size: int, seed: int = 0, split: str = "sensitivity"
) -> dict[str, Any]:
    """Configuration of a randomly initialised network at half of its MACs: our plan, on enlarged samples of the bundled model."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from PIL import Image

    import wanda_fast
    from wanda_fast.data import read_sample_sheet

    torch.manual_seed(seed)
    pipeline = DDPMPipeline(UNet2DModel(**config), DDPMScheduler())
    size = (config["sample_size"], config["sample_size"])
    with tempfile.TemporaryDirectory() as folder:
        for i, pixels in enumerate(read_sample_sheet()[:images]):
            Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC).save(f"{folder}/{i}.png")
        found = wanda_fast.prune(
            pipeline, target_macs="50%", dataset=folder, calib_steps=images, batch_size=batch_size, repair="none", num_samples=0,
            split=split, seed=seed, device=str(device), dry_run=True,
        ).plan.config  # fmt: skip
    assert found is not None
    return narrower(config, found["block_out_channels"], found["norm_num_groups"])


def cases(device: torch.device, size: str, seed: int) -> list[Group]:
    """Groups in order of weight: where the time runs out, the last ones are missing."""
    if device.type == "cuda":
        small, large = ("ddpm-cifar10-32", CIFAR10_32), ("ddpm-celebahq-256", PIXELS_256)
        # What else the MACs can be, for batch 256 alone.
        aligned = {"half of the MACs, --align 64": narrower(shapes.DDPM_CIFAR10, (128, 64, 256, 192), 32)}
        more = ("ddpm-cifar10-32", {**CIFAR10_32, **aligned, **free_networks()})
        chosen = [(more, 256), (large, 256), (small, 1), (small, 16), (large, 16), (large, 1)]
        return [Group(model, batch, networks) for (model, networks), batch in chosen[:: {"quick": 6, "default": 1, "full": 1}[size]]]
    if size == "quick":
        networks = {DENSE: TINY, HALF: plan(TINY, device=device, images=4, batch_size=4, seed=seed)}
        return [Group("tiny", batch, networks) for batch in (1, 2)]
    from wanda_fast.checkpoint import load_pipeline

    network: Any = load_pipeline(None).unet
    bundled = {k: v for k, v in network.config.items() if not k.startswith("_")}
    networks = {DENSE: bundled, HALF: plan(bundled, device=device, images=16, batch_size=16, seed=seed)}
    return [Group("bundled", batch, networks) for batch in (8, 1)]


def rows(
    device: torch.device,
    size: str,
    seed: int,
    *,
    with_compile: bool = True,
    limit_s: float = 270.0,
    save: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """One row per network, batch and mode."""
    return measure(cases(device, size, seed), device, seed=seed, with_compile=with_compile, limit_s=limit_s, save=save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plan", choices=("32px", "256px"), help="choose the widths at half of the MACs on random weights, and print them")
    parser.add_argument("--images", type=int, default=64, help="images of the calibration (default: 64)")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--split", choices=("sensitivity", "uniform"), default="sensitivity")
    args = parser.parse_args()
    if args.serve:
        serve()
    elif args.plan:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = {"32px": shapes.DDPM_CIFAR10, "256px": DDPM_256}[args.plan]
        found = plan(config, device=device, images=args.images, batch_size=args.batch_size, split=args.split)
        log(f"widths {found['block_out_channels']}, norm groups {found['norm_num_groups']}")
    else:
        parser.error("run it by: python bench.py --op images_per_s; or give --plan")


if __name__ == "__main__":
    main()
