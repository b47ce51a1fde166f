"""bench.py --quality: what pruning leaves of a model's images, for every criterion at equal multiply-accumulates.

    python bench.py --quality --real IMAGES --budget_seconds 540                 rows in order of priority, as many as the time allows
    python bench.py --quality --shared --rows 1-9 --out PART.json                one of some processes on one GPU, without times; then --merge
                                                                                 (OMP_NUM_THREADS=4 for each: their threads would wait)
    python bench.py --quality --speed                                            missing times; compiled images per second of the main rows
    python -m benchmarks.quality --grids                                         docs/grid-<model>.png: samples before and after, three budgets

Tables and plots are made from the results by `python -m benchmarks.quality_report`.
A row is written as soon as it is measured, and a row that is there is not measured again: a run that was stopped goes on where it was.
Dense and pruned networks are always sampled in the same number format; how much that format alone changes is measured too (`precision_ssim`).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import environment, log
from benchmarks.images_per_s import Turn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
# 4.6, 3.41, 2.4 and 1.5 GMACs of the 6.05 of the ddpm-cifar10-32 architecture
MAIN_BUDGET = "56.3%"
BUDGETS = ("76%", MAIN_BUDGET, "39.6%", "24.8%")
OURS = "wanda-diff"
RIVALS = ("magnitude", "wanda-fluctuation", "lstsq-residual", "taylor", "diff-pruning", "random", "reinit")
TORCH_PRUNING = tuple(f"torch-pruning {name}" for name in ("magnitude", "taylor", "random"))
PRUNE_BATCH = (256, 32)  # images per pass of prune, on a GPU and on a CPU
CALIB_IMAGES = (2048, 512)  # that prune draws there
Row = dict[str, Any]


class Refused(Exception):
    """A mistake that one line explains; exit code 2."""


# In the repair of a row; what follows is `--repair_weighting` and `--experts` of prune.
WEIGHTED, EXPERTS = ", weighting ", ", experts "


@dataclass(frozen=True)
class Config:
    """What one row measures."""

    pruner: str
    repair: str = "lstsq"
    layout: str = "stock"
    split: str = "sensitivity"
    budget: str = MAIN_BUDGET
    seed: int = 0

    @property
    def main(self) -> bool:
        """Whether its compiled speed is measured (`--speed`)."""
        return self.pruner == OURS and self.repair == "lstsq" and self.split == "sensitivity" and self.seed == 0

    def __str__(self) -> str:
        if self.pruner == "dense":
            return "dense"
        return f"{self.pruner}, repair {self.repair}, {self.layout}, split {self.split}, {self.budget} of the MACs, seed {self.seed}"


def configurations() -> list[Config]:
    """All rows, the most important first."""
    found = [Config("dense", "none", "stock", "-", "100%")]
    found += [Config(OURS, seed=s) for s in range(3)]
    found += [Config(OURS, layout="free", seed=s) for s in range(3)]
    found += [Config(OURS, budget=b) for b in BUDGETS if b != MAIN_BUDGET]
    found += [Config(p) for p in RIVALS]
    found += [Config(p, repair="none") for p in (OURS, *RIVALS)]
    found += [Config(p, repair="none", split="-") for p in TORCH_PRUNING]
    found += [Config(p, seed=s) for s in (1, 2) for p in RIVALS]
    found += [Config(p, budget=b) for b in BUDGETS if b != MAIN_BUDGET for p in RIVALS]
    found += [Config(OURS, layout="free", budget=b) for b in BUDGETS if b != MAIN_BUDGET]
    found += [Config(p, split="uniform") for p in (OURS, *RIVALS)]
    found += [Config(p, layout="free", seed=s) for p in ("wanda-fluctuation", "lstsq-residual") for s in range(3)]
    found += [Config(OURS, f"lstsq{WEIGHTED}{w}", layout, seed=s) for s in range(3) for layout in ("stock", "free") for w in ("last", "all")]
    found += [Config(OURS, f"lstsq{EXPERTS}{n}", "free", seed=s) for n in (3, 4, 2) for s in range(3)]
    found += [Config(OURS, f"lstsq{EXPERTS}3", "free", budget=b) for b in BUDGETS if b != MAIN_BUDGET]
    return found


def of_checkpoint(folder: Path, repair: str) -> Config:
    """What the row of a folder is, by its report: the budget as asked for in MACs, else the MACs reached; split "latency" where widths come
    from measured times."""
    report = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))
    settings = report["settings"]
    asked = str(settings["target_macs"] or "")
    return Config(
        pruner=settings["pruner"],
        repair=repair,
        layout=settings["layout"],
        split="latency" if settings["target_latency"] else settings["split"],
        budget=asked if asked.endswith("%") else f"{100 * report['pruned']['macs'] / report['dense']['macs']:.1f}%",
        seed=report["seed"],
    )


def recipe(repair: str) -> tuple[str, str, str]:
    """("lstsq", "experts", "3") of "lstsq, experts 3"; what is missing is empty."""
    method, _, more = repair.partition(", ")
    word, _, value = more.partition(" ")
    return method, word, value


def key(row: Row) -> tuple[str, ...]:
    """What a row is of; rows of one key are the same measurement."""
    return tuple(str(row[k]) for k in ("model", *asdict(Config("")).keys()))


# --------------------------------------------------------------------------------------------------------------- results


def read_results(path: Path) -> dict[str, Any] | None:
    """What an earlier run wrote, None where there is nothing yet.

    Raises:
        Refused: the file is something else.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not set(found) >= {"env", "protocol", "rows"}:
            raise ValueError("it lacks env, protocol or rows")
        for row in found["rows"]:
            key(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path}: no results of this benchmark ({error})") from error
    return found


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one step."""
    from wanda_fast.checkpoint import atomic_file
    from wanda_fast.evaluation import _finite

    with atomic_file(path) as temp:
        temp.write_text(json.dumps(_finite(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")


# What must agree for rows to stand in one file; the other entries of the protocol explain.
PROTOCOL_KEYS = ("samples", "steps", "precision", "noise_images", "calib_steps", "repair_images", "calibration", "features", "real")


def same_protocol(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first entry in which two protocols differ, in words; empty where rows of both may stand together."""
    for name in PROTOCOL_KEYS:
        if json.dumps(a.get(name), sort_keys=True) != json.dumps(b.get(name), sort_keys=True):
            return f"{name} {a.get(name)} there, {b.get(name)} here"
    return ""


# ---------------------------------------------------------------------------------------------------------------- inputs


def model_folder(spec: str | None, cache: Path) -> str | None:
    """A diffusers folder for `--model`: the folder or hub id itself, or an int8 weight pack of the ddpm-cifar10-32 architecture, unpacked
    (rows "name|q" with scales "name|s", other tensors plain).
    """
    if spec is None or not spec.endswith(".npz"):
        return spec
    from diffusers import DDPMScheduler, UNet2DModel

    from wanda_fast.checkpoint import atomic_folder, save_folder
    from wanda_fast.features import read_npz

    target = cache / Path(spec).name.split(".")[0]
    if not target.is_dir():
        pack, weights = read_npz(spec), {}
        for name, values in pack.items():
            if name.endswith("|q"):
                q = torch.from_numpy(values.astype("float32"))
                weights[name[:-2]] = q * torch.from_numpy(pack[name[:-2] + "|s"]).view(-1, *[1] * (q.dim() - 1))
            elif not name.endswith("|s"):
                weights[name] = torch.from_numpy(values)
        unet = UNet2DModel(
            sample_size=32, block_out_channels=(128, 256, 256, 256), attention_head_dim=None, norm_eps=1e-6, downsample_padding=0,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=False, freq_shift=1,
        )  # fmt: skip
        unet.load_state_dict(weights)
        with atomic_folder(target) as folder:
            save_folder(folder, unet, DDPMScheduler(variance_type="fixed_large"))
    return str(target)


def read_images(spec: str) -> Tensor:
    """All images of a folder, or of a pack of JPEG files (an npz of "blob", the bytes, and "off", where each begins): uint8 [N, H, W, 3]."""
    import io

    import numpy as np
    from PIL import Image

    from wanda_fast.features import image_batches, read_npz

    if not spec.endswith(".npz"):
        return torch.cat(list(image_batches(spec, batch_size=1000)))
    pack = read_npz(spec)
    blob, off = pack["blob"], pack["off"].tolist()
    pictures = [Image.open(io.BytesIO(blob[a:b].tobytes())).convert("RGB") for a, b in zip(off[:-1], off[1:], strict=True)]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))


# ------------------------------------------------------------------------------------------------------------------ bench


class Bench:
    """A model, its dense samples and the statistics that the rows share, each made once."""

    def __init__(self, args: argparse.Namespace, device: torch.device, cache: Path) -> None:
        from wanda_fast import checkpoint, evaluation

        self.args, self.device, self.cache = args, device, cache
        self.source = model_folder(args.model, cache)
        loaded = checkpoint.load_pipeline(self.source, dtype=torch.float32, device=device)
        self.unet: nn.Module = loaded.unet.requires_grad_(False)
        self.scheduler, self.model = loaded.scheduler, loaded.name
        self.macs, self.params = evaluation.count_macs(self.unet), evaluation.count_params(self.unet)
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision]
        self.built: dict[Any, nn.Module] = {}  # compiled networks by the shapes of their tensors
        self.seconds: dict[str, float] = {}  # of the calibration, by "stats <seed>", "means <seed>" and "images <seed>"

    def start(self) -> None:
        """What all rows need: real statistics, held-out images, the dense samples."""
        from wanda_fast import evaluation, features

        args = self.args
        self.extractor = None if args.features == "none" else features.get_features(args.features, self.device)
        self.real: Any = None
        images: Tensor | None = None
        if args.real is not None:
            if self.extractor is None:
                raise Refused("--real needs --features")
            if args.real.endswith(".npz") and "mean" in features.read_npz(args.real):
                self.real = features.FeatureStats.load(args.real)
            else:
                images = read_images(args.real)
                source = Path(args.real).name.removesuffix(".npz")
                self.real = features.feature_stats(self.extractor, images, batch_size=self.args.feature_batch, source=source)
        with clock(f"dense samples of {self.model}"):
            self.dense_images = self.dense_samples().to(self.device)
        self.dense_stats = self.statistics(self.dense_images)
        self.held_out = images[_evenly(len(images), args.noise_images)] if images is not None else self.dense_images.cpu()
        self.held_out_source = "real images" if images is not None else "the dense network's own samples"
        self.floor = None
        if self.dtype != torch.float32:
            count = min(256, args.samples)
            with clock("the same in exact float32, for the floor of the number format"), features._exact_float32():
                exact = self.sample(self.unet, count, exact=True).to(self.device)
            self.floor = evaluation.ssim(self.dense_images[:count], exact)

    def dense_samples(self) -> Tensor:
        """The dense network's samples, kept in the cache for other processes and later runs."""
        from safetensors.torch import load_file, save_file

        from wanda_fast.checkpoint import atomic_file

        args = self.args
        file = self.cache / f"dense-{self.model}-{args.samples}-{args.steps}-{args.seed}-{args.precision}-{args.batch_size}.safetensors"
        if file.is_file():
            return load_file(file)["images"]
        images = self.sample(self.unet, args.samples)
        with atomic_file(file) as temp:
            save_file({"images": images}, temp)
        return images

    def sample(self, unet: nn.Module, n: int, seed: int | None = None, exact: bool = False, compiled: bool = False) -> Tensor:
        """Samples with the weights and activations in the precision of this run."""
        from wanda_fast.sampling import sample

        dtype = torch.float32 if exact else self.dtype
        twin = nn.Module.to(copy.deepcopy(unet), dtype=dtype).eval()
        if compiled:
            twin = self.compiled(twin)
        return sample(
            twin, self.scheduler, n, steps=self.args.steps, seed=self.args.seed if seed is None else seed,
            batch_size=self.args.batch_size, device=self.device, dtype=dtype,
        )  # fmt: skip

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network under torch.compile; networks of equal shapes take turns in one that was compiled once."""
        shapes = tuple((name, tuple(t.shape)) for name, t in network.state_dict().items())
        if shapes in self.built:
            self.built[shapes].load_state_dict(network.state_dict())
        else:
            torch._dynamo.config.recompile_limit = 64  # past it networks would run eagerly
            network.compile(dynamic=False)
            self.built[shapes] = network
        return self.built[shapes]

    def statistics(self, images: Tensor) -> Any:
        from wanda_fast.features import feature_stats

        return None if self.extractor is None else feature_stats(self.extractor, images, batch_size=self.args.feature_batch)

    def protocol(self) -> dict[str, Any]:
        """Everything that a reader needs to measure the same."""
        from wanda_fast.evaluation import _listed
        from wanda_fast.sampling import make_stepper

        args = self.args
        stepper = make_stepper(self.scheduler, args.steps)
        protocol = None if self.extractor is None else self.extractor.protocol()
        how = {torch.float16: "float16 weights and activations", torch.bfloat16: "bfloat16 weights and activations"}
        tf32 = ", TF32 convolutions" if self.device.type == "cuda" and torch.backends.cudnn.allow_tf32 else ""
        return {
            "samples": args.samples,
            "steps": args.steps,
            "sampler": "DDIM, eta 0, x0 clipped as the scheduler says; the sampler's arithmetic in float32",
            "spacing": f"leading: {_listed(stepper.timesteps.tolist())}",
            "noise": f"image i from a CPU generator of (seed {args.seed}, i); the same for every row; labels likewise",
            "sampled": "rows say whether their network was sampled eagerly or under torch.compile (`sampled`); the dense network was eagerly; "
            "what rounding alone changes is the dense row's precision_ssim",
            "precision": f"{how.get(self.dtype, 'float32' + tf32)}; the same for dense and pruned",
            "features": None if protocol is None else {k: v for k, v in protocol.items() if k != "versions"},
            "versions": {} if protocol is None else protocol["versions"],
            "real": None if self.real is None else {"source": self.real.protocol["source"], "count": self.real.n},
            "fd": "Frechet distance in float64 between the samples and the real images; fd_to_dense: to the dense network's samples",
            "ssim": "7x7 uniform window, per channel, range 255, mean over pairs of equal noise with the dense network; psnr likewise",
            "noise_images": args.noise_images,
            "noise_mse": "mean squared difference of the predicted noise, float32, t over all timesteps evenly, noise of its own",
            "images_per_s": f"batch {args.speed_batch} / ({args.steps} x median forward seconds), eager, "
            f"{'bf16' if self.device.type == 'cuda' else 'fp32'}, channels-last; _dense: the dense network in turns with it; "
            "_compiled: the same under torch.compile(mode='reduce-overhead'), measured with --speed",
            "calib_steps": args.calib_steps,
            "repair_images": args.repair_images or "default",
            "calibration": "the model's own samples: "
            + ("the bundled sheet" if self.source is None else f"{args.calib_images} drawn with the row's seed"),
            "times": "of rows measured alone; rows measured beside other processes get theirs afterwards (--speed): eager speed once for all "
            "stock rows of one plan; prune_seconds for the default recipe at the main budget, calibration included, drawing its images not",
            "prune_seconds": "all stages of prune, load to save, without samples; drawing and calibration are those of the first row of "
            "their seed, which the others reuse",
        }

    # ------------------------------------------------------------------------------------------------------------ rows

    def dense_row(self) -> Row:
        from wanda_fast.features import frechet_distance

        row = self.row(configurations()[0], self.unet)
        row |= {
            "plan": "dense",
            "fd": None if self.real is None else frechet_distance(self.dense_stats, self.real, self.device),
            "fd_to_dense": 0.0, "ssim": 1.0, "psnr": None, "noise_mse": 0.0, "prune_seconds": 0.0, "precision_ssim": self.floor,
            "noise_images_from": self.held_out_source,
            **self.noise(self.unet), **self.eager_speed(self.unet),
        }  # fmt: skip
        return row

    def row(self, config: Config, unet: nn.Module) -> Row:
        from wanda_fast.evaluation import count_macs, count_params

        return {
            "model": self.model, **asdict(config), "macs": count_macs(unet), "params": count_params(unet),
            "dense_macs": self.macs, "dense_params": self.params,
        }  # fmt: skip

    def measure(self, config: Config, checkpoint: str | None = None) -> Row:
        """Prune, or take a checkpoint, sample, compare."""
        from wanda_fast import evaluation
        from wanda_fast.features import frechet_distance

        begin = time.perf_counter()
        unet, found = self.prune(config) if checkpoint is None else self.load(checkpoint)
        pruned_at = time.perf_counter()
        row = self.row(config, unet) | found
        compiled = self.args.compile and (config.split, config.budget) == ("sensitivity", MAIN_BUDGET) and checkpoint is None
        row["sampled"] = "compiled" if compiled else "eager"
        images = self.sample(unet, self.args.samples, compiled=compiled).to(self.device)
        sampled_at = time.perf_counter()
        stats = self.statistics(images)
        row |= {
            "fd": None if self.real is None else frechet_distance(stats, self.real, self.device),
            "fd_to_dense": None if stats is None else frechet_distance(stats, self.dense_stats, self.device),
            "ssim": evaluation.ssim(images, self.dense_images),
            "psnr": evaluation.psnr(images, self.dense_images),
            **self.noise(unet),
            **self.eager_speed(unet),
        }
        row["row_seconds"] = {
            "prune": round(pruned_at - begin, 1),
            "sample": round(sampled_at - pruned_at, 1),
            "measure": round(time.perf_counter() - sampled_at, 1),
        }
        if self.args.shared:
            row |= dict.fromkeys(("prune_seconds", "stages"))
        return row

    def noise(self, unet: nn.Module) -> Row:
        from wanda_fast.evaluation import errors_over_time, held_out_batches

        batches = held_out_batches(self.unet, self.scheduler, self.held_out, n=self.args.noise_images, seed=self.args.seed,
            batch_size=min(self.args.batch_size, 250), device=self.device)  # fmt: skip
        errors = errors_over_time(unet, self.unet, batches, steps=int(self.scheduler.config.num_train_timesteps))
        return {
            "noise_mse": errors[-1]["mse"],
            "noise_mse_relative": errors[-1]["relative"],
            "noise_mse_over_t": [float(f"{e['mse']:.4g}") for e in errors[:-1]],
            "denoising_loss": errors[-1]["loss"],
        }

    def eager_speed(self, unet: nn.Module) -> Row:
        from wanda_fast.evaluation import speed

        if self.args.shared:
            return dict.fromkeys(("images_per_s", "images_per_s_dense"))
        found = speed(unet, self.unet, steps=self.args.steps, batch_size=self.args.speed_batch, repeats=5)
        return {"images_per_s": found["images_per_s"], "images_per_s_dense": found["images_per_s_reference"]}

    def compiled_speed(self, config: Config) -> Row:
        from wanda_fast.evaluation import speed

        unet, _ = self.prune(config)
        found = speed(unet, self.unet, steps=self.args.steps, batch_size=self.args.speed_batch, compiled=True)
        return {
            "images_per_s_compiled": found["images_per_s"],
            "images_per_s_compiled_dense": found["images_per_s_reference"],
            "compile_seconds": found["compile_seconds"],
        }

    # ----------------------------------------------------------------------------------------------------------- prune

    def prune(self, config: Config, folder: str = "pruned") -> tuple[nn.Module, Row]:
        """The pruned network in float32 on the device, and what is to be said about it. It is kept in `folder` of the cache."""
        if config.pruner.startswith("torch-pruning "):
            return self.rival(config)
        name = "-".join(str(v) for v in asdict(config).values()).replace("%", "pct").replace(", ", "-").replace(" ", "-")
        kept = self.cache / folder / self.model / name
        with _turn(self.cache if self.args.shared else None):
            self.pruned(config, kept, folder)
        unet, found = self.load(kept)
        seconds = json.loads((kept / "wall.json").read_text(encoding="utf-8"))["seconds"]
        return unet, found | {"prune_seconds": round(seconds, 2)}

    def pruned(self, config: Config, kept: Path, folder: str) -> None:
        """Make the folder `kept` of a row, where it is not there yet."""
        from wanda_fast import checkpoint, prune
        from wanda_fast.importance import CRITERIA

        if (kept / "pruning.json").is_file():
            return
        args = self.args
        method, word, value = recipe(config.repair)
        extra: dict[str, Any] = {"repair_weighting": value} if word == "weighting" else {"experts": int(value)} if word == "experts" else {}
        dataset = self.calibration_images(config.seed)
        criterion = CRITERIA[config.pruner]
        needs, tables = criterion.needs_stats, "means" if criterion.needs_means else "stats"
        file = self.cache / f"{tables}-{self.model}-{config.seed}.safetensors"
        begin = time.perf_counter()
        result = prune(
            self.source, save_path=kept, overwrite=True, pruner=config.pruner, repair=method, **extra, layout=config.layout,
            split=config.split, target_macs=config.budget, seed=config.seed, num_samples=0, device=str(self.device),
            dataset=dataset, calib_steps=args.calib_steps, repair_images=args.repair_images, batch_size=args.prune_batch,
            load_stats=str(file) if needs and file.is_file() and folder == "pruned" else None,
        )  # fmt: skip
        wall = time.perf_counter() - begin
        stages = result.report["seconds"]
        if needs and not file.is_file():
            with checkpoint.atomic_file(file) as temp:
                shutil.copyfile(kept / "activation_stats.safetensors", temp)
            self.seconds[f"{tables} {config.seed}"] = stages.get("calibrate", 0.0)
        elif needs and folder == "pruned":
            wall += self.seconds.get(f"{tables} {config.seed}", 0.0)
        wall += self.seconds.get(f"images {config.seed}", 0.0)
        (kept / "wall.json").write_text(json.dumps({"seconds": wall}), encoding="utf-8")

    def load(self, folder: Path | str) -> tuple[nn.Module, Row]:
        """The network of a folder that `prune` wrote or `finetune` went on with, and what is to be said about it."""
        from wanda_fast import checkpoint

        kept = Path(folder)
        loaded = checkpoint.load_pipeline(kept, dtype=torch.float32, device=self.device)
        report = json.loads((kept / "pruning.json").read_text(encoding="utf-8"))
        widths = ", ".join(
            "-".join(str(w) for w in sorted({min(level["pruned"]), max(level["pruned"])})) for level in report["widths"].values()
        )
        digest = hashlib.sha256(json.dumps(report["plan"]["slots"] if "slots" in report["plan"] else report["plan"], sort_keys=True).encode())
        found = {
            "plan": f"({widths})",
            "plan_sha256": digest.hexdigest()[:12],
            "norm_policy": report["settings"]["norm_policy"],
            "prune_seconds": None,
            "stages": report["seconds"],
        }
        return loaded.unet.requires_grad_(False), found

    def rival(self, config: Config) -> tuple[nn.Module, Row]:
        """torch-pruning's own selection, as a user of that library calls it."""
        from benchmarks import rivals

        begin = time.perf_counter()
        importance = config.pruner.removeprefix("torch-pruning ")
        batches = None
        if importance == "taylor":
            batches = rivals.noised_batches(self.unet, self.scheduler, self.calibration_batch(config.seed), n=self.args.calib_steps,
                batch_size=self.args.prune_batch, seed=config.seed)  # fmt: skip
        unet: Any
        unet, _ = rivals.torch_pruning(
            self.unet, self.scheduler, batches, target_macs=int(self.macs * float(config.budget.rstrip("%")) / 100),
            importance=importance, seed=config.seed,
        )  # fmt: skip
        widths = ", ".join(str(block.resnets[-1].conv2.out_channels) for block in unet.down_blocks)
        return unet, {"plan": f"({widths})", "prune_seconds": round(time.perf_counter() - begin, 2)}

    def calibration_batch(self, seed: int) -> Tensor:
        from wanda_fast import data

        spec = self.calibration_images(seed)
        return data.load_images(spec, n=self.args.calib_images, unet=self.unet, scheduler=self.scheduler, bundled=self.source is None)

    def calibration_images(self, seed: int) -> str:
        """A folder of samples of the dense network, drawn once per seed; for the bundled model the sheet that ships with it."""
        if self.source is None:
            return "self"
        from PIL import Image

        from wanda_fast.data import SHEET_SEED

        folder = self.cache / f"calibration-{self.model}-{self.args.calib_images}-{seed}"
        if not folder.is_dir():
            begin = time.perf_counter()
            images = self.sample(self.unet, self.args.calib_images, seed=seed ^ SHEET_SEED)
            partial = Path(tempfile.mkdtemp(dir=self.cache))
            for i, image in enumerate(images.numpy()):
                picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
                picture.save(partial / f"{i:05d}.png", compress_level=1)
            try:
                partial.rename(folder)
            except OSError:  # another process has drawn the same meanwhile
                shutil.rmtree(partial)
            self.seconds[f"images {seed}"] = time.perf_counter() - begin
        return str(folder)


def _evenly(total: int, n: int) -> list[int]:
    from wanda_fast.data import _evenly as evenly

    return evenly(total, n)


@contextmanager
def _turn(folder: Path | None) -> Iterator[None]:
    """Alone among the processes that share the folder: a repair takes half of a GPU's memory. None: at once."""
    if folder is None:
        yield
        return
    turn = Turn(folder / "turn")
    turn.take()
    try:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    finally:
        turn.give()


class clock:
    """Say how long the block took."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *unused: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        log(f"{self.what}: {time.perf_counter() - self.begin:.1f} s")


def available(config: Config) -> str:
    """Why a row cannot be measured; empty where it can."""
    import importlib.util

    from wanda_fast.importance import CRITERIA

    if config.pruner.startswith("torch-pruning "):
        for module in ("torch_pruning", "benchmarks.rivals"):
            if importlib.util.find_spec(module) is None:
                return f"there is no module {module}"
        return ""
    return "" if config.pruner == "dense" or config.pruner in CRITERIA else f"there is no criterion {config.pruner}"


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, as far as the time goes."""
    begin = time.perf_counter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    defaults = {
        "precision": ("fp16", "fp32"), "calib_images": CALIB_IMAGES, "batch_size": (1000, 8), "feature_batch": (500, 32),
        "prune_batch": PRUNE_BATCH, "speed_batch": (256, 8),
    }  # fmt: skip
    for name, (on_gpu, on_cpu) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if gpu else on_cpu)
    earlier = read_results(args.resume or args.out)
    cache = Path(args.cache) if args.cache else Path(tempfile.mkdtemp(prefix="wanda_fast-quality-"))
    cache.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(args, device, cache)
        log(f"{bench.model}: {bench.params:,} parameters, {bench.macs / 1e9:.3f} GMACs, on {device}")
        if args.speed:
            if earlier is None:
                raise Refused(f"{args.resume or args.out}: --speed adds to rows, and there are none")
            args.steps = earlier["protocol"]["steps"]
            return speeds(bench, args, earlier, begin)
        bench.start()
        protocol = bench.protocol()
        rows: list[Row] = []
        if earlier is not None:
            differs = same_protocol(earlier["protocol"], protocol)
            if differs:
                raise Refused(f"{args.resume or args.out}: measured by another protocol ({differs}); give another --out")
            rows = earlier["rows"]
        results: dict[str, Any] = {"env": environment(device, args.seed), "protocol": protocol, "rows": rows}
        there = {key(row) for row in rows}
        longest = 0.0
        rows_to_do = chosen(args) if args.checkpoint is None else [of_checkpoint(Path(args.checkpoint), args.named)]
        for config in rows_to_do:
            if key({"model": bench.model, **asdict(config)}) in there:
                continue
            reason = available(config)
            if reason:
                log(f"left out: {config}: {reason}")
                continue
            spent = time.perf_counter() - begin
            if args.budget_seconds is not None and spent + longest > args.budget_seconds:
                log(f"{spent:.0f} of {args.budget_seconds} s are spent and a row took up to {longest:.0f} s: stopping here")
                break
            start = time.perf_counter()
            try:
                row = bench.dense_row() if config.pruner == "dense" else bench.measure(config, args.checkpoint)
            except Exception as error:  # one method that cannot do it must not cost the others their rows
                if isinstance(error, (torch.OutOfMemoryError, KeyboardInterrupt)):
                    raise
                log(f"FAILED: {config}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                if args.strict:
                    raise
                continue
            longest = max(longest, time.perf_counter() - start)
            row |= {"commit": results["env"]["commit"], "device": results["env"].get("gpu") or results["env"].get("cpu")}
            rows.append(row)
            write_results(args.out, results)
            log(one_line(row, time.perf_counter() - start))
        write_results(args.out, results)
        log(f"{len(rows)} rows in {args.out}; {time.perf_counter() - begin:.0f} s")
        return 0
    finally:
        if not args.cache:
            shutil.rmtree(cache, ignore_errors=True)


def speeds(bench: Bench, args: argparse.Namespace, results: dict[str, Any], begin: float) -> int:
    """The times that rows lack: seconds of prune and eager images per second where the row was measured beside other processes,
    and compiled images per second of the main rows.

    Stock rows of one plan are networks of one shape, so one of them is timed for all.
    """
    mine = [(row, Config(**{k: row[k] for k in asdict(Config(""))})) for row in results["rows"] if row["model"] == bench.model]
    eager: dict[Any, Row] = {}
    for row, config in mine:
        spent = time.perf_counter() - begin
        if args.budget_seconds is not None and spent > args.budget_seconds:
            log("the time is spent: stopping here")
            break
        if config.main and config.budget == MAIN_BUDGET and row["prune_seconds"] is None:
            row |= {k: bench.prune(config, "timed")[1][k] for k in ("prune_seconds", "stages")}
            log(f"{config}: {row['prune_seconds']} s of prune")
        shape = row["plan"] if config.layout == "stock" and not config.pruner.startswith("torch-pruning ") else key(row)
        if row["images_per_s"] is None:
            if shape not in eager:
                eager[shape] = bench.eager_speed(bench.unet if config.pruner == "dense" else bench.prune(config)[0])
            row |= eager[shape]
        write_results(args.out, results)
    longest = 0.0
    for row, config in mine:
        if not config.main or row.get("images_per_s_compiled") is not None:
            continue
        start = time.perf_counter()
        if args.budget_seconds is not None and start - begin + longest > args.budget_seconds:
            log("the time is spent: stopping here")
            break
        row |= bench.compiled_speed(config)
        longest = max(longest, time.perf_counter() - start)
        write_results(args.out, results)
        log(f"{config}: compiled {row['images_per_s_compiled']:.1f} images/s, dense {row['images_per_s_compiled_dense']:.1f}; "
            f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    write_results(args.out, results)
    return 0


def chosen(args: argparse.Namespace) -> list[Config]:
    """The rows asked for, in order."""
    found = [c for c in configurations() if not args.pruner or c.pruner in args.pruner][: args.max_rows]
    return found if args.rows is None else [found[i] for i in args.rows if i < len(found)]


def numbers(text: str) -> tuple[int, ...]:
    """(4, 0, 1, 2) from "4,0-2"."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers such as 0,3-5 are expected; got {text}") from None
    return tuple(found)


def merge(files: Sequence[Path], out: Path) -> None:
    """Put the rows of several files of one protocol into one, in the order of `configurations`; the first of equal rows counts.

    Raises:
        Refused: a file is missing, or its protocol differs.
    """
    merged: dict[str, Any] | None = None
    for file in files:
        found = read_results(file)
        if found is None:
            raise Refused(f"{file}: no such file")
        if merged is None:
            merged = found
            continue
        differs = same_protocol(merged["protocol"], found["protocol"])
        if differs:
            raise Refused(f"{file}: measured by another protocol ({differs})")
        there = {key(row): row for row in merged["rows"]}
        for row in found["rows"]:
            if key(row) in there:  # times may have been added to one of them
                there[key(row)] |= {k: v for k, v in row.items() if there[key(row)].get(k) is None}
            else:
                merged["rows"].append(row)
    assert merged is not None
    place = {config: i for i, config in enumerate(configurations())}
    merged["rows"].sort(key=lambda row: (row["model"], place.get(Config(**{k: row[k] for k in asdict(Config(""))}), len(place))))
    write_results(out, merged)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def one_line(row: Row, seconds: float) -> str:
    fd = "-" if row["fd"] is None else f"{row['fd']:.2f}"

    def told(name: str, form: str, unit: str) -> str:
        return f"{_number(row[name], form)} {unit}"

    return (
        f"{Config(**{k: row[k] for k in asdict(Config(''))})}: {row['macs'] / 1e9:.3f} G, {row['params'] / 1e6:.2f} M, FD {fd}, "
        f"SSIM {row['ssim']:.4f}, "
        f"noise {row['noise_mse']:.5f}, {told('images_per_s', '.0f', 'images/s eager')}; {told('prune_seconds', '.1f', 's of prune')}, "
        f"row {seconds:.1f} s"
    )


# ---------------------------------------------------------------------------------------------------------------- grids


def grids(args: argparse.Namespace) -> Path:
    """One picture: the dense network's samples, and under them the same after pruning to three budgets with the default recipe."""
    from PIL import Image, ImageDraw, ImageFont

    from wanda_fast import evaluation
    from wanda_fast.sampling import make_grid, sample

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.precision, args.batch_size = args.precision or "fp32", args.batch_size or (128 if device.type == "cuda" else 8)
    args.prune_batch = args.prune_batch or PRUNE_BATCH[device.type != "cuda"]
    args.calib_images = args.calib_images or CALIB_IMAGES[device.type != "cuda"]
    cache = Path(args.cache) if args.cache else Path(tempfile.mkdtemp(prefix="wanda_fast-grids-"))
    cache.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(args, device, cache)
        columns = args.columns
        networks = [("dense", f"{bench.macs / 1e9:.2f} GMACs", bench.unet)]
        for budget in BUDGETS[:3]:
            unet = bench.prune(Config(OURS, budget=budget))[0]
            networks.append((f"{round(float(budget.rstrip('%')))} % of the MACs", f"{evaluation.count_macs(unet) / 1e9:.2f} GMACs", unet))
        strips, texts = [], []
        first: Tensor | None = None
        for name, size, unet in networks:
            images = sample(unet, bench.scheduler, columns, steps=args.steps, seed=args.seed, batch_size=args.batch_size, device=device)
            first = images if first is None else first
            likeness = "" if unet is bench.unet else f"SSIM {evaluation.ssim(images, first):.3f}"
            texts.append([name, size, likeness])
            strips.append(images)
            log(" ".join(texts[-1]))
        scale = max(1, 64 // strips[0].shape[1])
        grid = make_grid(torch.cat(strips), columns=columns)
        picture: Any = Image.fromarray(grid.expand(-1, -1, 3).numpy())
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        margin = 130
        whole = Image.new("RGB", (picture.width + margin, picture.height), "white")
        whole.paste(picture, (margin, 0))
        draw, font = ImageDraw.Draw(whole), ImageFont.load_default(13)
        height = (strips[0].shape[1] + 2) * scale
        for i, text in enumerate(texts):
            draw.multiline_text((4, i * height + 6), "\n".join(text).strip(), fill="black", font=font, spacing=3)
        args.folder.mkdir(parents=True, exist_ok=True)
        path = args.folder / f"grid-{bench.model}.png"
        whole.save(path, optimize=True)
        return path
    finally:
        if not args.cache:
            shutil.rmtree(cache, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bench.py --quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quality", action="store_true", help=argparse.SUPPRESS)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--speed", action="store_true", help="add the compiled images per second to the main rows; nothing else is measured")
    what.add_argument("--grids", action="store_true", help="write samples before and after pruning to three budgets into --folder")
    p.add_argument("--model",
        help="folder, hub id, or int8 weight pack (.npz) of the ddpm-cifar10-32 architecture (default: the bundled model)")  # fmt: skip
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    p.add_argument("--real", metavar="IMAGES",
        help="real images for the Frechet distance: a folder, a JPEG pack (.npz) or saved statistics (.npz)")  # fmt: skip
    p.add_argument("--features", default="efficientnet-lite0", help="feature extractor, or none (default: efficientnet-lite0)")
    p.add_argument("--samples", type=int, default=5000, help="images per row (default: 5000)")
    p.add_argument("--steps", type=int, default=50, help="DDIM steps (default: 50)")
    p.add_argument("--noise_images", type=int, default=1000, help="noised images of the noise error (default: 1000)")
    p.add_argument("--calib_steps", type=int, default=1024, help="noised images of the calibration (default: 1024)")
    p.add_argument("--calib_images", type=int, help="images drawn for the calibration (default: {}, {})".format(*CALIB_IMAGES))
    p.add_argument("--repair_images", type=int, help="noised images of the repair (default: that of prune)")
    p.add_argument("--precision", choices=("fp32", "fp16", "bf16"),
        help="of sampling, dense and pruned alike (default: fp16 on a GPU, fp32 on a CPU)")  # fmt: skip
    p.add_argument("--batch_size", type=int, help="of sampling (default: 1000 on a GPU, 8 on a CPU)")
    p.add_argument("--feature_batch", type=int, help="of the features (default: 500, 32)")
    p.add_argument("--prune_batch", type=int, help="of prune (default: {}, {})".format(*PRUNE_BATCH))
    p.add_argument("--speed_batch", type=int, help="of the speed (default: 256, 8)")
    p.add_argument("--seed", type=int, default=0, help="of the samples (default: 0); the rows' seeds are those of calibration and repair")
    p.add_argument("--pruner", action="append", help="only rows of this criterion; may be repeated")
    p.add_argument("--rows", type=numbers, metavar="0,3-5", help="only these rows of the order, counted from 0, in this order")
    p.add_argument("--merge", type=Path, nargs="+", metavar="FILE.json", help="put the rows of several files into --out; nothing is measured")
    p.add_argument("--max_rows", type=int, help="only the first rows of the order")
    p.add_argument("--budget_seconds", type=float, help="start no row that would end after this time")
    p.add_argument("--compile", action="store_true", help="sample the networks of the main budget, most of the rows, under torch.compile")
    p.add_argument("--checkpoint", metavar="FOLDER",
        help="measure this pruned checkpoint instead of the rows")  # fmt: skip
    p.add_argument("--named", default="lstsq, finetuned", metavar="WORDS", help="the repair of --checkpoint (default: lstsq, finetuned)")
    p.add_argument("--shared", action="store_true",
        help="other processes use the device too: leave out all times (--speed adds them)")  # fmt: skip
    p.add_argument("--strict", action="store_true", help="stop at a row that fails, instead of going on with the next")
    p.add_argument("--cache", metavar="FOLDER", help="keep calibration, statistics and pruned networks here (default: a temporary folder)")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="FILE.json", help="results (default: benchmarks/results/quality.json)")
    p.add_argument("--resume", type=Path, metavar="FILE.json", help="rows to begin with (default: those of --out)")
    p.add_argument("--folder", type=Path, default=ROOT / "docs", help="for --grids (default: docs)")
    p.add_argument("--columns", type=int, default=10, help="images per row of --grids (default: 10)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    from wanda_fast.errors import UserError

    args = parser().parse_args(argv)
    try:
        if args.merge:
            merge(args.merge, args.out)
            return 0
        if args.grids:
            log(f"wrote {args.folder.name}/{grids(args).name}")
            return 0
        return run(args)
    except (Refused, UserError) as error:
        print("bench.py:", *str(error).split(), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
