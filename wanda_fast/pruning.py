"""The whole recipe as one function: load, calibrate, score, plan, compact, repair, sample, measure, save."""

from __future__ import annotations

import copy
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import compact as compaction
from . import distributed, latency, ops
from .calibrate import TABLE_LIMIT, table_memory
from .errors import UserError
from .experts import join, own_layers, parse_experts
from .importance import COMBINATIONS, CRITERIA, Context, draw_anew, get_criterion, slot_scores
from .inner_slots import base_class
from .memory import PeakMemory, free_gpu_bytes, parse_bytes
from .plan import (
    LAYOUTS,
    NORM_POLICIES,
    SPLITS,
    CostModel,
    PruningPlan,
    Target,
    WidthProblem,
    build_plan,
    free_problem,
    sensitive_widths,
    stock_problem,
    uniform_widths,
)
from .resume import Unfinished
from .shards import calibrate_in_shards
from .slots import SlotMap, find_slots, identity_shortcuts
from .smaller_batches import in_smaller_batches, large_batch_size, usual_batch_size

if TYPE_CHECKING:
    from diffusers import DDPMPipeline

    from .repair import RepairReport
    from .stats import ActivationStats

OPERATIONS = ("channel_sq_norm", "wanda_score", "compact", "conv_gram")
REPAIRS = ("lstsq", "bias", "none")
TIMESTEPS = ("random", "trajectory")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTINGS = ("none", "last", "all")  # layers whose repair counts timesteps by their effect on the image
# Least shares of a width for the sensitivity split. With one width per slot many deep slots would shrink together, which an estimate slot by
# slot does not see: the largest share is taken that makes the estimated damage at most EVENNESS times that of the first. Measured on two
# networks at four budgets (benchmarks/results/recipe-h200.md, "As even as the estimate allows").
FLOORS: dict[str, tuple[float, ...]] = {"stock": (0.25,), "free": tuple(n / 16 for n in range(4, 16))}
EVENNESS = 2.5
# Images drawn for the dataset "self", at least; half of those of the repair where that is more (a GPU): each is noised twice then, and
# 4096 different ones in place of 512 lower the Fréchet distance by 0.5 (benchmarks/results/recipe-h200.md).
DRAWN = 512
# DDIM steps of these images: 50 gave no better a network (three seeds, benchmarks/results/recipe-h200.md).
DRAWING_STEPS = 25
SENSITIVITY_IMAGES = (32, 128)  # noised images of the sensitivity study, on a CPU and on a GPU
TRIAL_IMAGES = (32, 128)  # images that judge a trial, on a CPU and on a GPU
TRIAL_REPAIR = (64, 512)  # noised images of its repair: four times as many change no order (benchmarks/results/recipe-h200.md)
SENSITIVITY_LIMIT = 6 << 30  # bytes of second moments, of conditioned networks
_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", **{n: n for n in DTYPES}}
FINDINGS = ("split_report", "trials_report", "latency_report")  # of a run: how its plan was found
RESULT_FORMAT = "wanda_fast.pruning/1"


@dataclass
class PruneOptions:
    """Everything that can be asked of `prune`; the command line has a flag for each.

    Attributes:
        ratio: share of all channels that is removed, 0 ≤ ratio < 1; the split "sensitivity" takes at least this share
            of the MACs as well. Used when no budget is given.
        target_macs: MACs budget, a number ("3.4G") or a share of the dense network's ("56%").
        target_params: parameter budget, likewise.
        target_latency: share of the dense network's measured time, such as "0.6x": widths are chosen from a table of layer times on
            this device, and whole networks are timed until one is within it, see `wanda_fast.latency`.
        latency_mode: "compiled" or "eager": how these networks are timed. Compiling takes up to a minute for each.
        latency_batch: images per forward pass of these timings; None for 16 on a CPU and 256 on a GPU.
        pruner: name of a criterion, see `wanda_fast.importance`; None for the one that keeps most of the images, see `usual_pruner`.
        thr: of "diff-pruning": timesteps count whose loss is over this share of the largest one, 0 ≤ thr < 1.
        layout: "stock" opens with plain diffusers; "free" has one width per slot and opens with `load_pruned`.
        norm_policy: "balanced", "free" or "groups", see `wanda_fast.plan`.
        split: "uniform" cuts every level alike; "sensitivity" measures which levels or slots can spare channels.
        trials: most allocations of widths that are cut, repaired with few images and judged by their images, see
            `wanda_fast.trials`; 0 takes the estimate of the split "sensitivity" as it is.
        combine: sides of a slot that are scored: "both", "producers" or "consumers".
        align: legal widths are multiples of this many channels (where the norms leave a choice).
        min_width: least channels of a slot.
        dataset: calibration images: "self" (the model's own samples), "cifar10", or a folder of images.
        data_dir: where CIFAR-10 lies.
        prompt_embeds: safetensors file with the conditioning of a text-to-image or transformer network, see
            `wanda_fast.inputs.Prompts`; None for random conditioning.
        guidance_scale: such a network is calibrated on guided pairs (with and without the prompt); None for no guidance.
        calib_steps: number of noised images of the calibration.
        timesteps: "random" (images noised to stratified random t) or "trajectory" (states of DDIM sampling).
        time_strategy, activation_strategy, target_steps: see `wanda_fast.stats`.
        repair: "lstsq" refits the remaining layers in closed form, "bias" folds the mean of what was removed,
            "none" leaves plain pruning.
        repair_weighting: in whose fit the timesteps count by what an error there does to the sampled image: "none" (all count alike),
            "last" (the network's last layer) or "all" (every layer, those of clean timesteps with at least a tenth).
        repair_images: noised images of the repair; None for 256 on a CPU and 4096 on a GPU that holds them (32 and 128 latents).
        experts: ranges of timesteps with weights of their own, as a number of ranges or as the timesteps where the
            second and later ones begin ("300,600"); 1 for one set of weights. Each is fitted on its range with `repair_images` more.
            Layout "free" and repair "lstsq" alone, see `wanda_fast.experts`.
        load_stats: file of saved statistics, used instead of a calibration.
        plan: file of a saved plan that is replayed.
        device: "cuda", "cpu", …; None for a GPU if there is one.
        dtype: "fp32", "bf16" or "fp16" for calibration and sampling; the saved weights keep the model's own dtype.
        batch_size: images per forward pass; None for 32 on a CPU and 32 to 256 on a GPU, by the size of the images (where they are small, two
            and four times as many in the repair and in drawing).
        seed: of everything random.
        num_samples: images of the before and after grids, 0 for none.
        num_inference_steps: DDIM steps of these grids.
        backend: backend of the operations.
        stats_memory: most memory of the activation statistics, such as "256M"; above it they keep one row per timestep bin
            in place of one per sample.
        resume: keep what is done in `save_path` + ".unfinished", and go on from what a killed run left there.
        offload: keep the dense network's weights in the host's memory while the pruned one is repaired.
    """

    ratio: float = 0.3
    target_macs: str | float | None = None
    target_params: str | float | None = None
    target_latency: str | float | None = None
    latency_mode: str = "compiled"
    latency_batch: int | None = None
    pruner: str | None = None
    thr: float = 0.05
    layout: str = "stock"
    norm_policy: str = "free"
    split: str = "sensitivity"
    trials: int = 0
    combine: str = "both"
    align: int = 16
    min_width: int = 8
    dataset: str = "self"
    data_dir: str | None = None
    prompt_embeds: str | None = None
    guidance_scale: float | None = None
    calib_steps: int = 1024
    timesteps: str = "random"
    time_strategy: str = "mean"
    activation_strategy: str = "mean"
    target_steps: str = "all"
    repair: str = "lstsq"
    repair_weighting: str = "none"
    repair_images: int | None = None
    experts: int | str = 1
    load_stats: str | None = None
    plan: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    seed: int = 0
    num_samples: int = 16
    num_inference_steps: int = 50
    backend: str = "auto"
    stats_memory: str | int | None = None
    resume: bool = False
    offload: bool = False

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            UserError: the first option that is out of range, with its value.
        """
        from . import data, stats

        if not (isinstance(self.ratio, (int, float)) and 0 <= self.ratio < 1):
            raise UserError(f"the ratio is the share of channels removed, 0 <= ratio < 1; got {self.ratio}")
        if sum(t is not None for t in (self.target_macs, self.target_params, self.target_latency)) > 1:
            raise UserError("give one target: MACs, parameters or latency")
        if self.target_latency is not None:
            latency.parse_latency(self.target_latency)
        for what, budget in (("target_macs", self.target_macs), ("target_params", self.target_params)):
            if budget is not None:
                parse_budget(budget, 1_000_000_000, what)
        get_criterion(self.usual_pruner)
        if self.stats_memory is not None:
            parse_bytes(self.stats_memory, "stats_memory")
        if not (isinstance(self.thr, (int, float)) and 0 <= self.thr < 1):
            raise UserError(f"the threshold is a share of the largest loss, 0 <= thr < 1; got {self.thr}")
        choices: list[tuple[str, str, Iterable[str]]] = [
            ("layout", self.layout, LAYOUTS),
            ("norm policy", self.norm_policy, NORM_POLICIES),
            ("split", self.split, SPLITS),
            ("repair weighting", self.repair_weighting, WEIGHTINGS),
            ("combination", self.combine, COMBINATIONS),
            ("repair", self.repair, REPAIRS),
            ("timesteps mode", self.timesteps, TIMESTEPS),
            ("time strategy", self.time_strategy, stats.TIME_STRATEGIES),
            ("activation strategy", self.activation_strategy, stats.ACTIVATION_STRATEGIES),
            ("backend", self.backend, ops.BACKENDS),
            ("latency mode", self.latency_mode, latency.MODES),
        ]
        for what, value, known in choices:
            if value not in known:
                raise UserError(f"unknown {what} {value!r}; known: {', '.join(known)}")
        try:  # the length of the model's schedule is not known yet; `prune` asks again when it is
            stats.parse_target_steps(self.target_steps, 10**9)
        except UserError:
            known = ", ".join(stats.TARGET_STEPS)
            raise UserError(
                f"timestep range {self.target_steps!r}: expected {known} or a-b with 0 <= a < b <= the model's number "
                "of timesteps, usually 1000"
            ) from None
        counts = [("align", 1), ("min_width", 1), ("calib_steps", 1), ("num_samples", 0), ("trials", 0)]
        optional = [(n, 1) for n in ("batch_size", "repair_images", "latency_batch") if getattr(self, n) is not None]
        for name, least in [*counts, *optional, ("num_inference_steps", 1), ("seed", 0)]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
                raise UserError(f"{name} must be a whole number of at least {least}; got {value}")
        if self.trials:
            self._check_trials()
        if parse_experts(self.experts):
            if self.layout != "free":
                raise UserError("experts need layout free: the configuration of a stock network has room for one set of weights")
            if self.repair != "lstsq":
                raise UserError(f"experts are fitted by repair lstsq; with repair {self.repair} they would all be the same")
        if self.dtype is not None and self.dtype not in _DTYPE_NAMES:
            raise UserError(f"unknown dtype {self.dtype!r}; known: {', '.join(_DTYPE_NAMES)}")
        data.check_source(self.dataset, data_dir=self.data_dir)
        check_device(self.device)
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"the guidance scale must be at least 0; got {self.guidance_scale}")
        for what, file in (("statistics", self.load_stats), ("plan", self.plan), ("prompt", self.prompt_embeds)):
            if file is not None and not Path(file).is_file():
                known = {"statistics": ", activation_stats.safetensors", "plan": ", pruning.json"}.get(what, "")
                why = f"is a folder; give the file in it{known}" if Path(file).is_dir() else "does not exist"
                raise UserError(f"the {what} file {file} {why}")

    @property
    def usual_pruner(self) -> str:
        """The criterion that is asked for, or the default one.

        "lstsq-residual" in the stock layout before a least-squares repair, where it leaves the lower Fréchet distance at the same SSIM,
        "wanda-diff" elsewhere: in the free layout, for networks on latents, and where options of its statistics are given
        (benchmarks/results/recipe-h200.md, "The default criterion").
        """
        if self.pruner is not None:
            return self.pruner
        usual = type(self)()
        asked = any(getattr(self, n) != getattr(usual, n) for n in ("load_stats", "time_strategy", "activation_strategy", "stats_memory"))
        return "lstsq-residual" if (self.layout, self.repair) == ("stock", "lstsq") and not asked else "wanda-diff"

    def idle(self, analyse: bool = False) -> list[str]:
        """A line for every option that was changed and has no effect beside the others.

        Args:
            analyse: whether the activation study is asked for.
        """
        scored = self.plan is None
        pruner = self.usual_pruner
        reads = scored and get_criterion(pruner).needs_stats
        strategies = ("time_strategy", "activation_strategy")
        rules: list[tuple[bool, tuple[str, ...], str]] = [
            (not scored, ("pruner", "thr", "split", "combine", "norm_policy", "align", "min_width", *strategies), "a plan is replayed"),
            (scored and pruner != "diff-pruning", ("thr",), f"it is for the pruner diff-pruning, not {pruner}"),
            (scored and not reads, strategies, f"the pruner {pruner} reads no activation statistics"),
            (self.load_stats is not None or not (reads or analyse), ("stats_memory",), "nothing is calibrated"),
            (self.target_latency is None, ("latency_mode", "latency_batch"), "no target_latency is asked for"),
            (self.repair == "none", ("repair_images", "offload"), "nothing is repaired"),
            (self.repair != "lstsq", ("repair_weighting",), "nothing is fitted"),
        ]
        usual = type(self)()
        return [
            f"{name} has no effect: {why}"
            for holds, names, why in rules
            for name in names
            if holds and getattr(self, name) != getattr(usual, name)
        ]

    def _check_trials(self) -> None:
        if self.split != "sensitivity":
            raise UserError(f"trials vary what the split sensitivity estimates; the split is {self.split}")
        for name in ("plan", "target_latency"):
            if getattr(self, name) is not None:
                raise UserError(f"trials and {name} do not go together: both decide about the widths")
        if self.offload:
            raise UserError("trials and offload do not go together: candidates are repaired with both networks on the device")
        if distributed.ranks().size > 1:
            raise UserError("trials need a single process; run them alone, then replay the plan in several (plan=.../pruning.json)")


@dataclass
class PruneResult:
    """What `prune` returns.

    Attributes:
        pipeline: a DDPMPipeline with the pruned network; None for a network that is part of another pipeline.
        plan: kept channels per slot.
        stats: activation statistics; None where neither the criterion nor an analysis needed them.
        report: sizes, quality, seconds per stage and versions (plain JSON values); what `pruning.json` holds.
        path: the folder written, or None.
        repair: report of the repair, or None.
        network: the pruned network; None for a dry run.
    """

    pipeline: DDPMPipeline | None
    plan: PruningPlan
    stats: ActivationStats | None
    report: dict[str, Any]
    path: Path | None = None
    repair: Any = None
    network: Any = None


def parse_budget(value: str | float, dense: int, what: str = "target") -> int:
    """An absolute budget from "3.4G", "20M", "1200000000" or a share of the dense size such as "56%".

    Raises:
        UserError: not a positive number, or a share over 100 %.
    """
    text = str(value).strip()
    scale = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if not 0 < share <= 1:
                raise UserError(f"{what}: {text} is not a share between 0% and 100%")
            return int(dense * share)
        factor = scale.get(text[-1:].upper(), 1.0)
        number = float(text[:-1] if factor != 1.0 else text) * factor
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: {text!r} is neither a number such as 3.4G nor a share such as 56%") from None
    if not (math.isfinite(number) and number >= 1):
        raise UserError(f"{what}: {text} is not a positive number")
    return int(number)


def check_device(device: str | None) -> torch.device:
    """The device to run on: the one named, else a GPU if there is one, else the CPU.

    Raises:
        UserError: no such device on this machine.
    """
    several = distributed.ranks().size > 1
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if several and found.type == "cuda":
            if found.index is not None:
                raise UserError(f"device {device!r}: each of several processes takes the GPU of its own number; say cuda or nothing")
            # By number: the repair's threads do not inherit the current device.
            return torch.device("cuda", torch.cuda.current_device())
        if found.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no GPU that this torch can use is visible")
        found = torch.empty(1, device=found).device  # a GPU with its number, which some calls of torch insist on
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return found


class _Stages:
    """Wall-clock seconds and peak memory per stage; on a GPU each stage ends with a synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}  # type: ignore[var-annotated]
        self.memory: dict[str, dict[str, int | None]] = {}
        self._peak = PeakMemory(device)
        self._inside = [0.0]  # seconds of the stages inside each one that is running: they do not count twice

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        self._inside.append(0.0)
        self._peak.start()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            took, inside = time.perf_counter() - start, self._inside.pop()
            self._inside[-1] += took
        self.seconds[name] = round(self.seconds.get(name, 0.0) + took - inside, 3)
        before, now = self.memory.get(name, {}), self._peak.stop()
        self.memory[name] = {where: max(filter(None, (before.get(where), n)), default=None) for where, n in now.items()}


@torch.inference_mode(False)  # a caller's own would forbid the gradients of the sensitivity study
def prune(
    model: str | Path | DDPMPipeline | None = None,
    *,
    save_path: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    analyse: bool = False,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a DDPM by whole channels: S = |W| · ‖X‖₂, one shot, then closed-form repair.

    Args:
        model: a folder, a hub id, a DDPMPipeline (left as it is), or None for the bundled model.
        save_path: folder to write; None to keep the result in memory. Where something else takes the name while this runs, the
            result gets the first free one of save_path-2, -3, … (`PruneResult.path`).
        overwrite: replace a folder that exists and is not empty.
        dry_run: stop after the plan; nothing is compacted or written.
        analyse: also draw `wanda_analysis.png` and put the activation study into the report.
        progress: show progress bars.
        log: called with one line at a time: what is used and what was decided.
        **options: fields of `PruneOptions`, such as `ratio=0.3` or `target_macs="56%"`.

    Returns:
        See `PruneResult`.

    Raises:
        UserError: a mistake in the arguments, the model, the data or the target; raised before heavy work.
        RuntimeError: an activation or weight became non-finite (names the layer), or the named backend is missing.

    Example:
        >>> import wanda_fast
        >>> result = wanda_fast.prune(ratio=0.3, split="uniform", calib_steps=4, repair="none", num_samples=0, batch_size=2)
        >>> result.report["pruned"]["params"] < result.report["dense"]["params"]
        True
    """
    from . import checkpoint

    unknown = sorted(set(options) - set(PruneOptions.__dataclass_fields__))
    if unknown:
        raise TypeError(f"prune() has no option {unknown[0]!r}")
    asked = PruneOptions(**options)
    asked.check()
    device = check_device(asked.device)
    if asked.resume and (save_path is None or dry_run):
        raise UserError("to resume needs a folder that is written: what is done so far is kept beside it")
    if save_path is not None and not dry_run:
        # Statistics and plans are read long before the folder is replaced, and the new one holds them too.
        checkpoint.check_target(save_path, overwrite, reads=[model, asked.dataset, asked.data_dir, asked.prompt_embeds])
    together = distributed.ranks()
    silent = log is None or not together.main
    run = _Run(asked, device, progress and together.main, (lambda line: None) if silent else log)  # type: ignore[arg-type]
    backend = ops.get_backend()
    try:
        run.load(model)
        for line in asked.idle(analyse):
            run.log(line)
        if asked.resume:
            run.open_unfinished(save_path)  # type: ignore[arg-type]
        if save_path is not None and not dry_run:
            checkpoint.check_target(save_path, overwrite, need_bytes=checkpoint.saved_bytes(run.unet))
        run.calibrate(analyse)
        run.make_plan()
        if dry_run:
            return PruneResult(None, run.plan, run.stats, run.report())
        run.compact()
        run.repair()
        before, after = run.sample()
        if together.main:
            run.measure(before, after)
            result = run.finish(save_path, overwrite, analyse, before, after)
        else:
            result = PruneResult(None, run.plan, run.stats, {}, None, run.repair_report)
        together.wait()  # a rank that leaves early would look like one that was lost
        return result
    finally:
        ops.set_backend(backend)  # the asked one is for this call alone


@dataclass
class _Run:
    """State of one call of `prune`, stage by stage."""

    options: PruneOptions
    device: torch.device
    progress: bool
    log: Callable[[str], None]
    stats: Any = None
    quality: dict[str, Any] = field(default_factory=dict)
    repair_report: Any = None
    expert_reports: list[Any] = field(default_factory=list)
    expert_starts: tuple[int, ...] = ()
    own_layers: list[str] = field(default_factory=list)
    split_report: dict[str, Any] = field(default_factory=dict)
    latency_report: dict[str, Any] = field(default_factory=dict)
    trials_report: list[dict[str, Any]] = field(default_factory=list)
    conditioned: bool = False
    pipeline_folder: Path | None = None
    unet: Any = None
    unfinished: Unfinished | None = None

    def __post_init__(self) -> None:
        self.ranks = distributed.ranks()
        self.stages = _Stages(self.device)
        self.dtype = DTYPES[_DTYPE_NAMES[self.options.dtype or "fp32"]]

    # ------------------------------------------------------------------------------------------------------------ load

    def load(self, model: Any) -> None:
        from . import checkpoint, model_card
        from .sampling import check_schedule

        self.asked_model = str(model) if isinstance(model, (str, Path)) else None
        with self.stages("load"):
            if model is None or isinstance(model, (str, Path)):
                loaded = checkpoint.load_pipeline(model, dtype=torch.float32, device=self.device, conditioned=True)
                self.unet, self.scheduler, self.name = loaded.unet, loaded.scheduler, loaded.name
                self.bundled, self.source = loaded.source == "bundled", loaded.source
                self.hub_id = str(model) if loaded.source == "hub" else None
                self.source_card = model_card.of_source(loaded.path, loaded.source)
                self.saved_dtype = checkpoint.stored_dtype(loaded.path)
                self.pipeline_folder = checkpoint.pipeline_folder(loaded.path)
                for note in loaded.notes:
                    self.log(note)
            else:
                unet = getattr(model, "unet", None) or getattr(model, "transformer", None)
                if unet is None or getattr(model, "scheduler", None) is None:
                    raise UserError(f"{type(model).__name__} is not a pipeline with a unet and a scheduler")
                check_schedule(model.scheduler)
                self.saved_dtype = next(unet.parameters()).dtype
                # nn.Module.to, here and below: the override of diffusers warns about a choice that is not made here
                self.unet = nn.Module.to(copy.deepcopy(unet), device=self.device, dtype=torch.float32)
                self.unet.eval().requires_grad_(False)
                self.scheduler, self.name, self.bundled = model.scheduler, "model", False
                self.source, self.hub_id, self.source_card = "memory", None, {}
            if "pruning" in self.unet.config:
                raise UserError("this network is already pruned in the free layout; prune its original instead")
            self.log(f"model: {self.name}" + (
                " (bundled with the package; --model FOLDER_OR_HUB_ID prunes another one)" if self.bundled else ""))
            self._adapt()
            self.log(f"device: {self.device}; {ops.describe_backends()}")
            if self.options.backend != "auto":
                ops.set_backend(self.options.backend)
            name = ops.get_backend()
            lacking = [op for op in OPERATIONS if _backend_of(op) != name]
            if lacking:
                self.log(f"backend {name}: not written for {', '.join(lacking)}, which run on the best there is")
            self.slots: SlotMap = find_slots(self.unet)
            self.costs = compaction.cost_model(self.unet, self.slots)
            self.dense_params, self.dense_macs = self.costs.sizes({})
            self.expert_starts = parse_experts(self.options.experts, int(self.scheduler.config.num_train_timesteps))
            self.own_layers = own_layers(self.unet) if self.expert_starts else []
            self.costs = self._with_experts(self.costs)
            self.target = self._target()
            self._steps(self.options.target_steps)

    def _adapt(self) -> None:
        """What is different for a network that reads conditioning and works on latents; each said aloud."""
        from .inputs import Prompts, input_spec, is_conditioned

        self.conditioned = is_conditioned(self.unet)
        usual = "wanda-diff" if self.conditioned and self.options.pruner is None else self.options.usual_pruner
        if self.options.pruner is None and self.options.plan is None:
            self.log(f"criterion: {usual} (the default here; --pruner names another)")
        o = self.options = replace(self.options, pruner=usual)
        if self.conditioned and parse_experts(self.options.experts):
            raise UserError(f"experts are for networks that draw images themselves; {type(self.unet).__name__} works on latents")
        if not self.conditioned:
            for name in ("prompt_embeds", "guidance_scale"):
                if getattr(o, name) is not None:
                    raise UserError(f"{name} is for networks that read prompts or classes; {self.name} is none")
            channels = int(self.unet.config["in_channels"])
            if o.num_samples and channels not in (1, 3):
                self.log(f"no sample grids: a picture has 1 or 3 channels, this network has {channels}")
                self.options = replace(o, num_samples=0)
            return
        if self.criterion_needs_images():
            raise UserError(f"the pruner {o.pruner} needs images, and {type(self.unet).__name__} works on latents")
        if o.trials:
            raise UserError(f"trials are judged by images, and {type(self.unet).__name__} works on latents")
        input_spec(self.unet)
        prompts = Prompts() if o.prompt_embeds is None else Prompts.load(o.prompt_embeds)
        prompts.guidance = o.guidance_scale
        prompts.check(self.unet)
        self._images: Any = prompts
        self.log(f"calibration: {prompts.describe()}" + (
            "" if prompts.tensors else " (--prompt_embeds FILE calibrates with real prompts)"))
        if o.layout == "stock":
            self.log(f"layout: free, since no stock configuration of {type(self.unet).__name__} has other widths inside a block")
        if o.num_samples:
            self.log("no sample grids for latents: the error of the predicted noise is measured instead")
        self.options = replace(o, layout="free", num_samples=0)

    def criterion_needs_images(self) -> bool:
        return self.options.plan is None and get_criterion(self.options.usual_pruner).needs_images

    def open_unfinished(self, save_path: str | Path) -> None:
        """Begin to keep what is done, or go on from what is found."""
        from .stats import fingerprint

        key = {name: value for name, value in asdict(self.options).items() if name not in ("resume", "offload", "device")}
        key |= {"model": fingerprint(self.unet), "processes": self.ranks.size, "version": _version()}
        if self.ranks.main:
            self.unfinished = Unfinished(save_path, key)
        self.ranks.wait()
        if not self.ranks.main:
            self.unfinished = Unfinished(save_path, key, write=False)
        assert self.unfinished is not None
        if self.unfinished.found:
            self.log(f"resuming: {self.unfinished.folder} holds what an earlier run has done")

    def _steps(self, text: str) -> tuple[int, int]:
        """Range [low, high) of timesteps on this model's schedule."""
        from . import stats

        return stats.parse_target_steps(text, int(self.scheduler.config.num_train_timesteps))

    def _target(self) -> Target:
        o = self.options
        if o.target_macs is not None:
            return Target(macs=parse_budget(o.target_macs, self.dense_macs, "target_macs"))
        if o.target_params is not None:
            return Target(params=parse_budget(o.target_params, self.dense_params, "target_params"))
        return Target(ratio=float(o.ratio))

    @cached_property
    def batch_size(self) -> int:
        """Images per forward pass."""
        from .sampling import image_shape

        return self.options.batch_size or usual_batch_size(self.device, *image_shape(self.unet)[1:])

    def _large_batch(self, factor: int) -> int:
        """Images per pass of the drawing and the repair, where nothing is asked."""
        from .sampling import image_shape

        if self.conditioned:
            return self.batch_size
        return self.options.batch_size or large_batch_size(self.device, *image_shape(self.unet)[1:], factor)

    # ------------------------------------------------------------------------------------------------------- calibrate

    def images(self) -> Tensor:
        """Calibration images, read or drawn once: uint8 [N, H, W, C]."""
        if not hasattr(self, "_images"):
            from . import data

            o = self.options
            repair = self.repair_images if o.repair != "none" else 0
            need = max(o.calib_steps, repair)
            drawn = o.dataset == "self"
            with self.stages("images"):
                self._images = data.load_images(
                    o.dataset,
                    n=min(need, max(DRAWN, repair // 2)) if drawn else need,
                    unet=self.unet,
                    scheduler=self.scheduler,
                    bundled=self.bundled,
                    data_dir=o.data_dir,
                    seed=o.seed,
                    steps=min(DRAWING_STEPS, o.num_inference_steps),
                    batch_size=self._large_batch(4),
                    device=self.device,
                    # A picture has 8 bits, and on a GPU the drawing is a good part of the run.
                    dtype=torch.bfloat16 if drawn and self.device.type == "cuda" else self.dtype,
                    progress=self.progress,
                )
            self.log(f"calibration images: {len(self._images)} ({self._source_of_images()})")
        return self._images

    def _source_of_images(self) -> str:
        if self.conditioned:
            return self._images.describe()
        if self.options.dataset != "self":
            return Path(self.options.dataset).name  # a name, not a path of this machine
        return "the bundled model's own samples" if self.bundled else "the model's own samples"

    @property
    def repair_images(self) -> int:
        """Noised images that the repair uses."""
        if self.options.repair_images is not None:
            return self.options.repair_images
        if self.conditioned:
            return 128 if self.device.type == "cuda" else 32
        return self._most_images if self.device.type == "cuda" else 256

    @cached_property
    def _most_images(self) -> int:
        """4096, or as many as the GPU holds both networks' passes of."""
        from .lockstep import peak_bytes
        from .sampling import class_labels, image_shape

        home = next(self.unet.parameters()).device  # the host's memory where the network is kept there
        x = torch.zeros(1, *image_shape(self.unet), device=home)
        t = torch.zeros(1, dtype=torch.int64, device=home)
        labels = class_labels(self.unet, [0], 0, home)
        each = 2 * peak_bytes(lambda: self.unet(x, t, class_labels=labels))
        most = int(0.5 * free_gpu_bytes(self.device) / each)
        return min(4096, max(256, most // 256 * 256))

    def batches(
        self, n: int, seed_offset: int = 0, batch_size: int | None = None, steps: tuple[int, int] | None = None
    ) -> Callable[[], Iterable[Any]]:
        """A function that yields the same (x_t, t, labels) batches each time it is called; `steps` is their range of timesteps [low, high)."""
        from .calibrate import noised_batches

        o = self.options
        images = self.images()
        lo, hi = steps or self._steps(o.target_steps if seed_offset == 0 else "all")

        def make() -> Iterable[Any]:
            for x, t, _, labels in noised_batches(
                self.unet, self.scheduler, images, n=n, mode=o.timesteps, target=(lo, hi), batch_size=batch_size or self.batch_size,
                seed=o.seed + seed_offset, device=self.device, dtype=torch.float32,
            ):  # fmt: skip
                yield x, t, labels

        return make

    def calibrate(self, analyse: bool) -> None:
        from . import stats
        from .calibrate import calibrate

        o = self.options
        self.criterion = get_criterion(o.usual_pruner)
        if o.load_stats is not None:
            self.stats = stats.ActivationStats.load(o.load_stats)
            self.stats.check_model(self.unet)
            self.log(f"activation statistics: read from {o.load_stats}, nothing is calibrated")
        elif (self.criterion.needs_stats and o.plan is None) or analyse:
            images = self.images()
            limit = TABLE_LIMIT if o.stats_memory is None else parse_bytes(o.stats_memory, "stats_memory")
            need = table_memory(self.unet, o.calib_steps)
            if need > limit and o.activation_strategy != "mean":
                raise UserError(
                    f"the activation strategy {o.activation_strategy} needs the statistics of every sample, {need >> 20} MiB; the limit is "
                    f"{limit >> 20} MiB: raise stats_memory, calibrate with fewer images, or take the strategy mean"
                )
            if need > limit:
                self.log(f"activation statistics: {stats.BINS} timestep bins, since a row for each of {o.calib_steps} images would take "
                         f"{need >> 20} MiB, over the limit of {limit >> 20} MiB (--stats_memory)")  # fmt: skip

            def part(cut: tuple[int, int]) -> ActivationStats:
                return calibrate(
                    self.unet, self.scheduler, images, n=o.calib_steps, mode=o.timesteps, target_steps=o.target_steps,
                    batch_size=self.batch_size, seed=o.seed, device=self.device, dtype=self.dtype,
                    backend=_backend_of("channel_sq_norm"), progress=self.progress,
                    dataset=self._source_of_images(), table_bytes=limit, means=self.criterion.needs_means, part=cut,
                )  # fmt: skip

            with self.stages("calibrate"):
                self.stats = calibrate_in_shards(part, o.calib_steps, self.batch_size, self.ranks, self.unfinished, self.log)
        if o.plan is None:

            def prepare(size: int) -> None:
                self.context = self._context(size)
                with self.stages("calibrate"):
                    self.criterion.prepare(self.unet, self.context)

            in_smaller_batches(prepare, self.batch_size, what="the scoring", say=self.log)
            if self.criterion.notes:
                self.log(f"{o.pruner}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in self.criterion.notes.items()))

    def _context(self, batch_size: int) -> Context:
        """What the criterion may use."""
        o = self.options
        context = Context(
            seed=o.seed, backend=_backend_of("wanda_score"), stats=self.stats, images=o.calib_steps,
            timesteps=self._steps(o.target_steps), batch_size=batch_size, thr=float(o.thr),
        )  # fmt: skip
        if self.stats is not None:
            strategy: dict[str, Any] = {
                "time_strategy": o.time_strategy, "activation_strategy": o.activation_strategy, "target_steps": o.target_steps,
            }  # fmt: skip
            context.act_norm = self.stats.norms(**strategy)
            context.score_tables = self.stats.score_tables(**strategy)
        if self.criterion.needs_images:
            from .taylor import NoisedImages

            context.noised = NoisedImages(self.unet, self.scheduler, self.images(), seed=o.seed)
            context.batches = lambda n: self.batches(n, batch_size=batch_size)()
            context.alphas_cumprod = self.scheduler.alphas_cumprod
            context.prediction_type = self._prediction_type
        return context

    # ------------------------------------------------------------------------------------------------------------ plan

    def make_plan(self) -> None:
        o = self.options
        if o.plan is not None:
            self.plan = PruningPlan.load(o.plan)
            if o.layout == "free" and self.plan.layout == "stock":
                raise UserError(f"{o.plan}: a plan of the layout stock, asked is free; leave out the layout, or plan anew")
            self._fit_to_plan()
            self.log(f"plan: replayed from {o.plan}")
        else:
            with self.stages("plan"):
                self._plan_once()
            if self._whole and o.ratio > 0 and self.target.ratio is not None and o.target_latency is None:
                raise UserError(f"ratio {o.ratio:g} would remove nothing: widths are multiples of {o.align} (align), at least {o.min_width} "
                                "(min_width), and the norms must allow them; ask for more, or for a smaller align or min_width")  # fmt: skip
        if self.expert_starts and self._whole:
            self.log("experts: one set of weights, since nothing is removed")
            self.expert_starts, self.costs = (), replace(self.costs, copies={})
        self.pruned_params, self.pruned_macs = self._sizes(self.plan, self.costs)

    def _plan_once(self) -> None:
        """Choose the plan, or take over the one of the main rank or of an earlier life of this run."""
        kept = None if self.unfinished is None else self.unfinished.plan
        known = self.ranks.share(kept is not None and kept.is_file())
        head: dict[str, Any] | None = None
        if self.ranks.main:
            if known and self.unfinished is not None:
                plan, findings = self.unfinished.load_plan()
                for name in FINDINGS:
                    setattr(self, name, findings.get(name, getattr(self, name)))
                head = {"plan": plan.to_dict()}
            else:
                self._choose_plan()
                head = {"plan": self.plan.to_dict()}
                if self.unfinished is not None:
                    self.unfinished.save_plan(self.plan, {name: getattr(self, name) for name in FINDINGS})
        if self.ranks.size > 1:
            head = self.ranks.share(head)
        if known or not self.ranks.main:
            assert head is not None
            self.plan = PruningPlan.from_dict(head["plan"])
            self._fit_to_plan()

    def _fit_to_plan(self) -> None:
        """Slots and costs of the network that a plan from elsewhere is for.

        Raises:
            UserError: the plan does not fit the network.
        """
        twin = compaction.prepared_copy(self.unet, self.plan.identity_shortcuts)
        self.slots = find_slots(twin)
        compaction.check_plan(self.plan, self.unet, self.slots)
        self.costs = self._with_experts(compaction.cost_model(twin, self.slots))

    @property
    def _whole(self) -> bool:
        """Whether the plan removes nothing."""
        return all(w == self.slots.slots[n].width for n, w in self.plan.widths.items())

    def _with_experts(self, costs: CostModel) -> CostModel:
        """The costs of a network with a set of weights for each range of timesteps."""
        return replace(costs, copies=dict.fromkeys(self.own_layers, len(self.expert_starts) + 1)) if self.expert_starts else costs

    def _sizes(self, plan: PruningPlan, costs: CostModel) -> tuple[int, int]:
        sinusoid = None
        if plan.config is not None and costs.sinusoid_consumers:
            sinusoid = int(plan.config["block_out_channels"][0])
        return costs.sizes(plan.widths, sinusoid=sinusoid)

    def _problem(self, slots: SlotMap, costs: Any) -> WidthProblem:
        o = self.options
        if o.layout == "stock":
            return stock_problem(slots, costs, self.unet.config, o.norm_policy, o.align, o.min_width)
        return free_problem(slots, costs, o.norm_policy, o.align, o.min_width)

    def _sensitive_widths(
        self, problem: WidthProblem, target: Target, damage: Mapping[str, list[float]], least: float | None = None
    ) -> dict[str, int]:
        """Widths of least damage by the rules of the layout; `least` is another least share of a width than theirs."""
        o = self.options
        floor = FLOORS[o.layout] if least is None else least
        # A stock configuration has one number of norm groups for all norms.
        shared = o.layout == "stock" and o.norm_policy == "free"
        groups = int(self.unet.config.get("norm_num_groups") or 1) if shared else 1
        return sensitive_widths(problem, target, damage, floor=floor, evenness=EVENNESS, groups=groups)

    def _choose_plan(self) -> None:
        o = self.options
        shortcuts: list[str] = []
        unet, slots, costs = self.unet, self.slots, self.costs
        if o.layout == "stock" and o.split == "sensitivity":
            # Levels of equal width can only differ behind an explicit identity shortcut.
            shortcuts = identity_shortcuts(self.unet)
            unet = compaction.prepared_copy(self.unet, shortcuts)
            slots = find_slots(unet)
            costs = compaction.cost_model(unet, slots)
            self.context.identities = frozenset(f"{name}.conv_shortcut" for name in shortcuts)
        scores = slot_scores(unet, slots, self.criterion, self.context, combine=o.combine)
        problem = self._problem(slots, costs)
        split = o.split
        moments = 8 * sum(s.width**2 for s in slots.slots.values()) if self.conditioned else 0
        if split == "sensitivity" and moments > SENSITIVITY_LIMIT:
            self.log(f"split: uniform, since the sensitivity study would hold {moments / 2**30:.0f} GiB of second moments")
            split = "uniform"
        damage = None if split == "uniform" else self._damage(unet, slots, problem, scores)

        def choose(problem: WidthProblem, target: Target) -> tuple[SlotMap, Any, PruningPlan]:
            if damage is None:
                return planned(uniform_widths(problem, target))
            return planned(self._sensitive_widths(problem, target, damage))

        def planned(widths: dict[str, int]) -> tuple[SlotMap, Any, PruningPlan]:
            needed, final, final_costs = shortcuts, slots, costs
            if shortcuts:
                needed, _, final, final_costs, widths = self._drop_idle_shortcuts(shortcuts, slots, widths)
            plan = build_plan(
                final, widths, {n: scores[n] for n in final.slots}, self.unet.config, layout=o.layout,
                norm_policy=o.norm_policy, identity_shortcuts=needed,
            )  # fmt: skip
            return final, final_costs, plan

        if o.trials and damage is not None:
            self.slots, self.costs, self.plan = self._by_trials(problem, damage, planned)
        elif o.target_latency is None:
            self.slots, self.costs, self.plan = choose(problem, self.target)
        else:
            self.slots, self.costs, self.plan = self._by_latency(unet, problem, choose)

    def _by_trials(self, problem: WidthProblem, damage: dict[str, list[float]], planned: Callable[[dict[str, int]], Any]) -> Any:
        """Widths by what they do to the images: see `trials`."""
        from . import evaluation, sampling, trials

        o = self.options
        count, images = (pair[self.device.type != "cpu"] for pair in (TRIAL_IMAGES, TRIAL_REPAIR))

        def drawn(network: nn.Module) -> Tensor:
            return sampling.sample(
                network, self.scheduler, count, steps=o.num_inference_steps, seed=o.seed + 202, batch_size=self.batch_size,
                device=self.device, dtype=self.dtype,
            )  # fmt: skip

        dense = drawn(self.unet)

        def measure(widths: dict[str, int]) -> trials.Trial:
            slots, costs, plan = planned(widths)
            thin = self._repaired(plan, slots, images)
            similar = [evaluation.ssim(*pair) for pair in zip(dense.split(1), drawn(thin).split(1), strict=True)]
            trial = trials.Trial(similar, self._sizes(plan, costs)[1], _level_range(slots, plan), {})
            self.log(f"trial: {trial.describe()}")
            return trial

        def widths_for(least: float | None, emphasis: Mapping[int, float]) -> dict[str, int]:
            return self._sensitive_widths(problem, self.target, trials.emphasised(problem, damage, emphasis), least)

        widths, tried = trials.search(widths_for, measure, range(problem.slots.levels), o.trials)
        self.trials_report = [t.to_dict() for t in tried]
        taken = next(t for t in tried if t.taken)
        self.log(f"trials: the best of {len(tried)} is {taken.describe()}")
        return planned(widths)

    def _repaired(self, plan: PruningPlan, slots: SlotMap, images: int) -> nn.Module:
        """The network of a plan, cut and repaired with this many images."""
        from .repair import repair

        o = self.options
        twin = compaction.prepared_copy(self.unet, plan.identity_shortcuts)

        def run(size: int) -> nn.Module:
            thin = self._thin(plan)
            if o.repair != "none":
                keep = compaction.plan_keep(slots, plan)
                repair(
                    twin, thin, keep, self.batches(images, batch_size=size), method=o.repair, seed=o.seed, device=self.device,
                    **self._weights(),
                )  # fmt: skip
            return thin

        return in_smaller_batches(run, self.batch_size, what="the repair of a trial", say=self.log)

    def _by_latency(self, unet: nn.Module, problem: WidthProblem, choose: Callable[[WidthProblem, Target], Any]) -> Any:
        """Widths by measured time: a table of layer times for the search, whole networks timed to hold it to."""
        from . import evaluation

        o = self.options
        batch = o.latency_batch or (256 if self.device.type == "cuda" else 16)
        asked = latency.parse_latency(str(o.target_latency))

        def pass_(network: nn.Module) -> None:
            evaluation._speed_run(network, network, batch, self.device, self.dtype)()

        twin = nn.Module.to(nn.Module.to(copy.deepcopy(unet), self.dtype), memory_format=torch.channels_last)
        compiled = o.latency_mode == "compiled"
        # On a CPU the eager norm is as good a measure, and compiling some ten of them takes more than a minute.
        fused = compiled and self.device.type == "cuda"
        model = latency.measure_layers(twin, problem.slots, problem.costs, pass_, dtype=self.dtype, fused_norms=fused)
        del twin
        by_time = replace(problem, costs=model)  # type: ignore[arg-type]  # has the form of one

        if compiled:
            evaluation.forget_compiled()
        mode = f"{o.latency_mode}, {evaluation._short(self.dtype)}, channels-last"
        whole = evaluation.SpeedRun(self.unet, batch, self.dtype, compiled)  # compiled once, timed in turns with every candidate

        def measure(candidate: Any) -> float:
            thin = compaction.compact(self.unet, candidate[2], backend=_backend_of("compact"))
            thin_s, dense_s = evaluation.in_turns([evaluation.SpeedRun(thin, batch, self.dtype, compiled), whole])
            self.log(f"latency: {thin_s * 1e3:.2f} of the dense network's {dense_s * 1e3:.2f} ms ({mode}, {batch} images)")
            return thin_s / dense_s

        dense = by_time.sizes({})[1]
        least = by_time.sizes(by_time.widths(dict.fromkeys(by_time.options, 0)))[1]
        if asked * dense < least:
            raise UserError(f"target_latency {o.target_latency}: by its layers' times the smallest legal network of this layout and norm "
                            f"policy takes {least / dense:.2f}x of the dense network's time")  # fmt: skip
        best, found = latency.search(asked, dense, lambda budget: choose(by_time, Target(macs=budget)), measure)
        self.log(found.describe())
        self.latency_report = {
            "asked": asked, "measured": found.share, "met": found.met, "rounds": found.rounds, "mode": mode,
            "batch_size": batch, "layers": {k: [list(p) for p in v] for k, v in model.table.items()},
        }  # fmt: skip
        return best

    def _drop_idle_shortcuts(self, shortcuts: list[str], slots: SlotMap, widths: dict[str, int]) -> Any:
        """Stock diffusers has no `conv_shortcut` where both sides kept the same width: take those out again."""
        needed = []
        for name in shortcuts:
            level = int(name.split(".")[1])
            above = next(widths.get(n, s.width) for n, s in slots.slots.items() if s.levels == (level - 1,))
            here = next(widths.get(n, s.width) for n, s in slots.slots.items() if s.levels == (level,))
            if above != here:
                needed.append(name)
        unet = compaction.prepared_copy(self.unet, needed)
        new_slots = find_slots(unet)
        return needed, unet, new_slots, compaction.cost_model(unet, new_slots), {n: widths[n] for n in new_slots.slots}

    def _damage(
        self, unet: nn.Module, slots: SlotMap, problem: WidthProblem, scores: dict[str, Tensor]
    ) -> dict[str, list[float]]:
        """Estimated relative squared error of the predicted noise for every unit and width, see `sensitivity`."""
        from .plan import choose_channels
        from .sensitivity import damage_table

        o = self.options
        count = SENSITIVITY_IMAGES[self.device.type != "cpu"]
        table = in_smaller_batches(
            lambda size: damage_table(
                unet,
                slots,
                problem,
                lambda widths: choose_channels(slots, widths, scores, o.norm_policy, o.layout),
                self.batches(count, 101, size)(),
                weight=self._image_weight(),
                seed=o.seed,
            ),
            self.batch_size,
            what="the sensitivity study",
            say=self.log,
        )
        self.split_report = {unit: [float(f"{d:.3g}") for d in values] for unit, values in table.items()}
        return table

    # ------------------------------------------------------------------------------------------------- compact, repair

    def compact(self) -> None:
        with self.stages("compact"):
            self._cut()

    def _cut(self) -> None:
        self.pruned = self._thin(self.plan)

    def _thin(self, plan: PruningPlan) -> Any:
        thin = compaction.compact(self.unet, plan, backend=_backend_of("compact"))
        if self.criterion.draws_anew:
            draw_anew(thin, self.options.seed)
        return thin

    @property
    def _prediction_type(self) -> str:
        return str(self.scheduler.config.get("prediction_type", "epsilon"))

    def _image_weight(self, gamma: float = 1.0, least: float = 0.0) -> Callable[[Tensor], Tensor]:
        from .sensitivity import image_weight

        return image_weight(self.scheduler.alphas_cumprod, gamma, least=least, prediction_type=self._prediction_type)

    def _weights(self) -> dict[str, Any]:
        """How the repair counts timesteps, see `repair_weighting`.

        The last layer alone can follow the measured effect of an error, which grows up to σ² = 10 and beyond; fitted so
        everywhere, clean timesteps would be given up (benchmarks/results/recipe-h200.md, "Weights of the timesteps in the fit").
        """
        chosen = self.options.repair_weighting
        return {
            "timestep_weight": self._image_weight(least=0.1) if chosen == "all" else None,
            "last_weight": self._image_weight(gamma=0.1) if chosen == "last" else None,
        }

    def repair(self) -> None:
        from .repair import repair

        o = self.options
        if o.repair == "none" or self._whole:
            return

        keep = compaction.plan_keep(self.slots, self.plan)

        def fit(network: nn.Module, part: int, batches: Callable[[], Iterable[Any]], layers: Sequence[str] | None = None) -> RepairReport:
            return repair(
                twin, network, keep, batches, method=o.repair, layers=layers, **self._weights(), seed=o.seed, device=self.device,
                progress=self.progress, offload=o.offload, state=None if self.unfinished is None else self.unfinished.repair(part),
            )  # fmt: skip

        def run(batch_size: int) -> list[RepairReport]:
            if batch_size != first:  # an attempt before has refitted some layers
                self._cut()
            reports = [fit(self.pruned, 0, self.batches(self.repair_images, batch_size=batch_size))]
            if not self.expert_starts:
                return reports
            networks = []
            for part, steps in enumerate(self._ranges(), start=1):
                network = copy.deepcopy(self.pruned)
                own = self.batches(self.repair_images, 300 + part, batch_size, steps)
                reports.append(fit(network, part, own, self.own_layers))
                networks.append(network)
            self.pruned = join(networks, self.expert_starts, self.own_layers)
            return reports

        with self.stages("repair"):
            twin = compaction.prepared_copy(self.unet, self.plan.identity_shortcuts)
            if o.offload:
                nn.Module.to(self.unet, "cpu")
                nn.Module.to(twin, "cpu")
            # Its time goes with the number of batches; several processes take them in turns and want many.
            first = self.batch_size if self.ranks.size > 1 else self._large_batch(2)
            self.repair_report, *self.expert_reports = in_smaller_batches(run, first, what="the repair", say=self.log)
            nn.Module.to(self.unet, self.device)

    def _ranges(self) -> list[tuple[int, int]]:
        """[low, high) of the timesteps of each expert."""
        return list(itertools.pairwise((0, *self.expert_starts, int(self.scheduler.config.num_train_timesteps))))

    # --------------------------------------------------------------------------------------------------- sample, measure

    def sample(self) -> tuple[Tensor, Tensor]:
        o = self.options
        images = []
        with self.stages("sample"):
            for unet, which in ((self.unet, "before"), (self.pruned, "after")):
                images.append(
                    distributed.sample(
                        unet, self.scheduler, o.num_samples, self.ranks, steps=o.num_inference_steps, seed=o.seed,
                        batch_size=self.batch_size, device=self.device, dtype=self.dtype,
                        progress=self.progress and o.num_samples > 0, desc=f"sampling {which}",
                    )
                )  # fmt: skip
        return images[0], images[1]

    def measure(self, before: Tensor, after: Tensor) -> None:
        from . import evaluation

        o = self.options
        with self.stages("measure"):
            if o.num_samples > 0:
                self.quality["ssim"] = evaluation.ssim(before, after)
                self.quality["psnr"] = evaluation.psnr(before, after)
            error = in_smaller_batches(
                lambda size: evaluation.noise_mse(self.unet, self.pruned, self.batches(64, 1_000_003, size)()),
                self.batch_size, what="the noise error", say=self.log,
            )  # fmt: skip
            self.quality["noise_mse"], self.quality["noise_mse_relative"] = error.mse, error.relative

            def timed(size: int) -> dict[str, Any]:
                dense_s, pruned_s = evaluation.paired_forward_seconds(
                    self.unet, self.pruned, batch_size=size, device=self.device, dtype=self.dtype
                )
                return {"dense": dense_s, "pruned": pruned_s, "batch_size": size}

            self.quality["forward_seconds"] = in_smaller_batches(timed, min(self.batch_size, 16), what="the timing", say=self.log)

    # ------------------------------------------------------------------------------------------------------------ finish

    def report(self) -> dict[str, Any]:
        """Everything a reader of `pruning.json` needs, as plain JSON values."""
        import diffusers

        from .data import DATASETS

        o = self.options
        removed = 1 - sum(len(k) for k in self.plan.keep.values()) / sum(s.width for s in self.slots.slots.values())
        asked: dict[str, Any] = {"ratio": o.ratio}
        if self.target.macs is not None:
            asked = {"target_macs": self.target.macs, "given_as": str(o.target_macs)}
        elif self.target.params is not None:
            asked = {"target_params": self.target.params, "given_as": str(o.target_params)}
        elif o.target_latency is not None:
            asked = {"target_latency": latency.parse_latency(o.target_latency), "given_as": str(o.target_latency)}
        if o.plan is not None:
            asked = {"plan": Path(o.plan).name}
        settings = asdict(o)
        for name in ("load_stats", "plan", "data_dir", "prompt_embeds"):  # names, not paths of this machine
            if settings[name] is not None:
                settings[name] = Path(settings[name]).name
        if o.dataset not in ("self", *DATASETS):
            settings["dataset"] = Path(o.dataset).name
        shifted = [
            norm
            for norm, segments in self.slots.inputs.items()
            if norm in self.slots.norms
            and len({len(self.plan.keep[s.slot]) / self.slots.slots[s.slot].width for s in segments}) > 1
        ]
        report: dict[str, Any] = {
            "format": RESULT_FORMAT,
            "model": self.name,
            "network": base_class(self.unet),
            "source": self.source,
            "base_model": self.hub_id,
            "source_card": self.source_card,
            "asked": asked,
            "reached": {"ratio": round(removed, 6), "params": self.pruned_params, "macs": self.pruned_macs},
            "dense": {"params": self.dense_params, "macs": self.dense_macs},
            "pruned": {"params": self.pruned_params, "macs": self.pruned_macs},
            "widths": self._level_widths(),
            "slots": {
                name: {"levels": list(slot.levels), "dense": slot.width, "kept": len(self.plan.keep[name])}
                for name, slot in self.slots.slots.items()
            },
            "norms_with_shifted_groups": len(shifted),
            "plan": self.plan.to_dict(),
            "settings": settings,
            "seed": o.seed,
            "batch_size": self.batch_size,
            "versions": {
                "wanda_fast": _version(),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "python": platform.python_version(),
            },
            "device": _device_name(self.device),
            "seconds": dict(self.stages.seconds),
            "peak_bytes": dict(self.stages.memory),
            "processes": self.ranks.size,
        }
        if self.criterion.notes:
            report["criterion"] = dict(self.criterion.notes)
        if self.quality:
            report["quality"] = self.quality
        if self.split_report:
            report["sensitivity"] = self.split_report
        if self.trials_report:
            report["trials"] = self.trials_report
        if self.latency_report:
            report["latency"] = self.latency_report
        if self.repair_report is not None:
            report["repair"] = self.repair_report.to_dict()
        if self.expert_starts:
            report["experts"] = {
                "ranges": [list(steps) for steps in self._ranges()],
                "own_layers": self.own_layers,
                "repairs": [r.to_dict() for r in self.expert_reports],
            }
        if self.stats is not None:
            report["statistics"] = self.stats.info
        return report

    def _level_widths(self) -> dict[str, Any]:
        """Range of kept channels per level, dense and pruned."""
        found: dict[str, Any] = {}
        for level in range(self.slots.levels):
            names = [n for n, s in self.slots.slots.items() if level in s.levels]
            kept = sorted({len(self.plan.keep[n]) for n in names})
            dense = sorted({self.slots.slots[n].width for n in names})
            found[f"level {level}"] = {"dense": dense, "pruned": kept}
        return found

    def _config(self, analyse: bool) -> tuple[dict[str, Any], str]:
        """Options that repeat this run from the command line, and what a file cannot say."""
        values = {"model": self.asked_model, **asdict(self.options), "analyze": analyse or None}
        if any(values[name] is not None for name in ("target_macs", "target_params", "target_latency", "plan")):
            del values["ratio"]
        note = "The model was one in memory: add --model." if self.source == "memory" else ""
        return values, note

    def finish(
        self, save_path: str | Path | None, overwrite: bool, analyse: bool, before: Tensor, after: Tensor
    ) -> PruneResult:
        from diffusers import DDPMPipeline

        from . import analysis, checkpoint, model_card, run_config, sampling
        from .repair import save_picture as save_repair_picture

        nn.Module.to(self.pruned, self.saved_dtype)
        pruned = self.pruned
        pipeline = None if self.conditioned else DDPMPipeline(unet=pruned, scheduler=copy.deepcopy(self.scheduler))
        result = PruneResult(pipeline, self.plan, self.stats, {}, None, self.repair_report, pruned)
        study = analysis.analyse(self.stats) if analyse else None
        if save_path is not None:
            result.path = Path(save_path)

            def instead(path: Path) -> None:
                result.path = path
                self.log(f"{save_path} was taken by something else meanwhile; the result is in {path}")

            with self.stages("save"), checkpoint.atomic_folder(save_path, overwrite, instead=instead) as folder:
                checkpoint.save_folder(folder, pruned, self.scheduler, pipeline=self.pipeline_folder)
                self.quality["file_bytes"] = {
                    "dense": self.dense_params * self.saved_dtype.itemsize,
                    "pruned": checkpoint.weights_file(folder).stat().st_size,
                }
                (folder / "vis").mkdir()
                if self.options.num_samples > 0:
                    sampling.save_grid(before, folder / "vis" / "before_pruning.png")
                    sampling.save_grid(after, folder / "vis" / "after_pruning.png")
                if self.repair_report is not None and any(r.error_before for r in self.repair_report.layers):
                    save_repair_picture(self.repair_report, folder / "vis" / "repair.png", title=self.name)
                for (low, high), expert in zip(self._ranges(), self.expert_reports, strict=False):
                    title = f"{self.name}, timesteps {low} to {high - 1}"
                    save_repair_picture(expert, folder / "vis" / f"repair_t{low:04d}.png", title=title)
                if self.stats is not None:
                    self.stats.save(folder / "activation_stats.safetensors")
                if analyse:
                    analysis.save_picture(self.stats, folder / "wanda_analysis.png", title=self.name)
                result.report = self.report()
                if study is not None:
                    result.report["analysis"] = study
                (folder / "pruning.json").write_text(json.dumps(result.report, indent=1) + "\n", encoding="utf-8")
                model_card.write(folder, result.report)
                run_config.write(folder, "prune", *self._config(analyse))
            if self.unfinished is not None:
                self.unfinished.remove()
        result.report = self.report()
        if study is not None:
            result.report["analysis"] = study
        return result


def _level_range(slots: SlotMap, plan: PruningPlan) -> dict[str, list[int]]:
    """Least and most channels that the slots of a level keep."""
    found = {}
    for level in range(slots.levels):
        kept = [len(plan.keep[n]) for n, s in slots.slots.items() if level in s.levels]
        found[f"level {level}"] = [min(kept), max(kept)]
    return found


def _backend_of(operation: str) -> str:
    """The backend in force; "auto" for an operation that has no such implementation at all (the run says so)."""
    name = ops.get_backend()
    return name if name in ("auto", "reference") or name in ops.homes(operation) else "auto"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    count = torch.get_num_threads()
    return f"{device.type} ({name}, {count} thread{'s' if count > 1 else ''})"


def _version() -> str:
    from . import __version__

    return __version__


__all__ = ["CRITERIA", "PruneOptions", "PruneResult", "parse_budget", "prune"]
