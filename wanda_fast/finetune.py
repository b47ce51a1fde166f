"""Recovery training of a pruned network, and training from nothing: noise loss, distillation, EMA, exact resumption.

Everything random about a step comes from (seed, step): the order of the images from (seed, epoch), noise, timesteps and
flips from a generator of the step. So a checkpoint holds weights, EMA, moments of the optimiser and the number of the
step, as safetensors and JSON, and a run that was killed and resumed ends with the weights of an unbroken one (bit for
bit on a CPU).

The images lie on the device as uint8. Mixed precision and gradient accumulation are accelerate's, the moving average is
diffusers' ``EMAModel``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, sampling
from .errors import UserError
from .experts import has_experts
from .memory import free_gpu_bytes

FORMAT = "wanda_fast.finetune/1"
SCHEDULES = ("cosine", "constant")
LOG_EVERY = 50  # steps; the loss is read from the device no more often than that
KEEP = 2  # checkpoints
_STATE, _MODEL, _EMA, _OPTIMISER = "state.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"
# Options that may differ between a run and the one that resumes it: they change no weight, or (the last two) say where.
_FREE_ON_RESUME = ("save_every", "validate_every", "num_samples", "num_inference_steps", "tensorboard", "save_dtype", "data_dir",
                   "device")  # fmt: skip


@dataclass
class FinetuneOptions:
    """Everything that can be asked of `finetune`; the command line has a flag for each.

    Attributes:
        dataset: "self" (samples of the teacher, or of the model), "cifar10", or a folder of images.
        data_dir: where CIFAR-10 lies.
        num_images: images used; None for all (1024 for "self").
        teacher: folder or hub id of the dense network, "bundled" for the bundled model; None for no distillation.
        from_scratch: use the architecture of the model alone, with fresh weights.
        steps: steps of the optimiser.
        batch_size: images per step.
        accumulate: parts of a batch that pass one after the other, to save memory; divides batch_size.
        lr: learning rate after the warm-up.
        warmup: steps of the linear warm-up.
        lr_schedule: "cosine" to zero at the last step, or "constant".
        weight_decay: of AdamW.
        grad_clip: largest norm of the gradient; 0 for none.
        ema_decay: of the moving average of the weights, which is what is saved; 0 saves the weights themselves.
        noise_weight: weight of the noise loss, mean (prediction - target)².
        distill_weight: weight of mean (prediction - teacher's prediction)²; None for 1 with a teacher.
        feature_weight: weight of the attention maps of all blocks, see :func:`attention_loss`.
        flip: mirror half of the images.
        dtype: "fp32", "bf16" or "fp16" for the passes; the weights are trained in float32.
        save_dtype: of the saved weights; None for that of the model on disk (fp32 from nothing).
        compile: torch.compile of both networks.
        device: "cuda", "cpu", …; None for a GPU if there is one.
        seed: of everything random.
        save_every: steps between checkpoints; 0 for none.
        validate_every: steps between validations; 0 for the first and the last only.
        validation_images: images held out for the noise error, at most a tenth of all.
        num_samples: images of the validation grid, 0 for none.
        num_inference_steps: DDIM steps of the grid.
        tensorboard: also write the log for TensorBoard.
    """

    dataset: str = "self"
    data_dir: str | None = None
    num_images: int | None = None
    teacher: str | None = None
    from_scratch: bool = False
    steps: int = 2000
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 1e-4
    warmup: int = 100
    lr_schedule: str = "cosine"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    noise_weight: float = 1.0
    distill_weight: float | None = None
    feature_weight: float = 0.0
    flip: bool = True
    dtype: str | None = None
    save_dtype: str | None = None
    compile: bool = False
    device: str | None = None
    seed: int = 0
    save_every: int = 500
    validate_every: int = 500
    validation_images: int = 256
    num_samples: int = 16
    num_inference_steps: int = 50
    tensorboard: bool = False

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            UserError: the first option that is out of range, with its value.
        """
        from . import data
        from .pruning import _DTYPE_NAMES, check_device

        counts = [("steps", 1), ("batch_size", 1), ("accumulate", 1), ("warmup", 0), ("seed", 0), ("save_every", 0),
                  ("validate_every", 0), ("validation_images", 0), ("num_samples", 0), ("num_inference_steps", 1)]  # fmt: skip
        if self.num_images is not None:
            counts.append(("num_images", 1))
        for name, least in counts:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
                raise UserError(f"{name} must be a whole number of at least {least}; got {value}")
        for name in ("lr", "weight_decay", "grad_clip", "noise_weight", "distill_weight", "feature_weight"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise UserError(f"{name} must be a number of at least 0; got {value}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be at least 0 and below 1; got {self.ema_decay}")
        if self.batch_size % self.accumulate:
            raise UserError(f"accumulate ({self.accumulate}) must divide the batch size ({self.batch_size})")
        if self.lr_schedule not in SCHEDULES:
            raise UserError(f"unknown lr_schedule {self.lr_schedule!r}; known: {', '.join(SCHEDULES)}")
        for name in ("dtype", "save_dtype"):
            if getattr(self, name) is not None and getattr(self, name) not in _DTYPE_NAMES:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(_DTYPE_NAMES)}")
        if self.teacher is None and (self.distill_weight or self.feature_weight):
            raise UserError("distillation needs a teacher: the folder of the dense network (--teacher)")
        if self.teacher is not None and self.distillation == 0 and self.feature_weight == 0:
            raise UserError("the teacher has no weight in the loss; set distill_weight or feature_weight above 0")
        if self.noise_weight == 0 and self.teacher is None:
            raise UserError("the loss is empty: noise_weight is 0 and there is no teacher")
        if self.from_scratch and self.dataset == "self" and self.teacher is None:
            raise UserError("training from nothing needs images (--dataset); the model has no samples of its own")
        data.check_source(self.dataset, data_dir=self.data_dir)
        device = check_device(self.device)
        if device.type == "cpu" and _DTYPE_NAMES[self.dtype or "fp32"] == "fp16":
            raise UserError("fp16 training needs a GPU; use bf16 or fp32 on a CPU")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("fine-tuning runs in one process on one device; start it without torchrun or accelerate launch")

    @property
    def distillation(self) -> float:
        """Weight of the teacher's predictions."""
        if self.distill_weight is not None:
            return self.distill_weight
        return 0.0 if self.teacher is None else 1.0


@dataclass
class FinetuneResult:
    """What `finetune` returns.

    Attributes:
        pipeline: a DDPMPipeline with the trained network (the moving average of its weights).
        report: settings, losses, validation, speed and versions (plain JSON values); what `finetune.json` holds.
        path: the folder written.
    """

    pipeline: Any
    report: dict[str, Any]
    path: Path


def finetune(
    model: str | Path | None = None,
    *,
    save_path: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> FinetuneResult:
    """Train a network on, and write a folder that opens as the one it came from.

    While it runs, `<save_path>.train` holds the checkpoints, the log and the validation grids; it stays there.

    Args:
        model: folder or hub id, stock or free layout; None for the bundled model.
        save_path: folder to write, in one step at the end.
        overwrite: replace that folder, and start anew where an earlier training left checkpoints.
        resume: go on from the newest checkpoint, if there is one.
        progress: show a bar.
        log: called with one line at a time.
        stop: asked after every step; where it says True a checkpoint is written and KeyboardInterrupt raised.
        **options: fields of `FinetuneOptions`.

    Raises:
        UserError: a mistake in the arguments, the model, the data, the target or the checkpoint.
        RuntimeError: the loss became NaN or infinite.

    Source: DDPM, Ho et al. 2020, arXiv:2006.11239; distillation, Hinton et al. 2015, arXiv:1503.02531.
    """
    unknown = sorted(set(options) - set(FinetuneOptions.__dataclass_fields__))
    if unknown:
        raise TypeError(f"finetune() has no option {unknown[0]!r}")
    asked = FinetuneOptions(**options)
    asked.check()
    _need("accelerate")
    if asked.tensorboard:
        _need("tensorboard")
    if resume and overwrite:
        raise UserError("resume goes on with an earlier training, overwrite throws it away; give one of them")
    if resume and (Path(save_path).expanduser() / "finetune.json").is_file():
        raise UserError(f"{save_path}: this training is finished, there is nothing to go on with; another one needs another folder")
    target = checkpoint.check_target(save_path, overwrite, reads=[model, asked.teacher, asked.dataset, asked.data_dir])
    work = target.with_name(target.name + ".train")
    if work.exists() and not work.is_dir():
        raise UserError(f"{work}: exists and is not a folder")
    if work.exists() and not (resume or overwrite):
        raise UserError(f"{work}: holds an earlier training; go on with it (--resume) or start anew (--overwrite)")
    run = _Training(asked, target, work, progress, log or (lambda line: None), stop or (lambda: False))
    run.load(model)
    checkpoint.check_target(save_path, overwrite, need_bytes=5 * checkpoint.saved_bytes(run.unet, torch.float32))
    if overwrite and work.exists():
        shutil.rmtree(work)
    run.prepare(resume)
    with run.logging():
        run.train()
        return run.finish(save_path, overwrite)


def _need(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UserError(f"this needs the package {package}: pip install 'wanda-fast[train]'")


def attention_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over blocks and samples of ‖q_s / ‖q_s‖ - q_t / ‖q_t‖‖², with q = the mean over channels of the squared output.

    The maps have one channel, so networks of different widths can be compared.

    Args:
        student, teacher: outputs of the blocks, [N, C, H, W] with any C.

    Source: Zagoruyko and Komodakis 2017, arXiv:1612.03928.
    """
    total = torch.zeros((), device=student[0].device)
    for a, b in zip(student, teacher, strict=True):
        maps = [F.normalize(x.float().square().mean(1).flatten(1), dim=1) for x in (a, b)]
        total = total + (maps[0] - maps[1]).square().sum(1).mean()
    return total / len(student)


class _Blocks:
    """Collects the outputs of a network's down, middle and up blocks while it is entered."""

    def __init__(self, unet: Any) -> None:
        middle = [] if unet.mid_block is None else [unet.mid_block]
        self.modules = [*unet.down_blocks, *middle, *unet.up_blocks]
        self.outputs: list[Tensor] = []
        for module in self.modules:
            module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        taken, self.outputs = self.outputs, []
        return taken


@dataclass
class _Training:
    """State of one call of `finetune`."""

    options: FinetuneOptions
    target: Path
    work: Path
    progress: bool
    log: Callable[[str], None]
    stop: Callable[[], bool]
    step: int = 0  # steps done
    history: list[dict[str, Any]] = field(default_factory=list)  # validations
    trained_seconds: float = 0.0
    trained_steps: int = 0  # of this process
    first_steps: int = 0
    first_seconds: float = 0.0
    writer: Any = None
    _order: tuple[int, Tensor] | None = None

    # ------------------------------------------------------------------------------------------------------------ load

    def load(self, model: str | Path | None) -> None:
        from . import data
        from .pruning import _DTYPE_NAMES, DTYPES, check_device

        o = self.options
        self.asked_model = None if model is None else str(model)
        self.device = check_device(o.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.precision = _DTYPE_NAMES[o.dtype or "fp32"]
        self.teacher: Any = None
        teacher = None
        if o.teacher is not None:
            teacher = checkpoint.load_pipeline(None if o.teacher == "bundled" else o.teacher, device=self.device)
            self.teacher = teacher.unet.requires_grad_(False)
        if o.from_scratch:
            self.unet, self.scheduler, self.name, self.source = _fresh(model, o.seed)
            own = torch.float32
        else:
            loaded = checkpoint.load_pipeline(model)
            self.unet, self.scheduler, self.name, self.source = loaded.unet, loaded.scheduler, loaded.name, loaded.path
            own = checkpoint.stored_dtype(loaded.path)
        self.saved_dtype = own if o.save_dtype is None else DTYPES[_DTYPE_NAMES[o.save_dtype]]
        for net in (self.unet, self.teacher):
            if net is not None and (not hasattr(net, "up_blocks") or "cross_attention_dim" in net.config):
                raise UserError(f"{type(net).__name__} cannot be trained here; only UNet2DModel can")
        sampling.check_network(self.unet, self.scheduler)
        for net in (self.unet, self.teacher):
            if net is not None and has_experts(net):  # which send each sample through the weights of its timestep
                if o.feature_weight > 0:
                    raise UserError("feature_weight compares maps of whole batches, and experts split a batch by timestep: leave it at 0")
                if o.compile:
                    raise UserError("experts split a batch by timestep, and a compiled network is for one batch size: leave compile out")
        self._check_parts(teacher)
        for net in (self.unet, self.teacher):
            if net is not None:  # nn.Module's own: the override of diffusers warns about a choice that is not made here
                nn.Module.to(nn.Module.to(net, self.device), memory_format=torch.channels_last)
        self.log(f"model: {self.name}{' (architecture alone)' if o.from_scratch else ''}"
                 + (f"; teacher: {teacher.name}" if teacher else "") + f"; device: {self.device}, {self.precision}")  # fmt: skip
        drawn = teacher if teacher is not None else None
        bundled = o.teacher == "bundled" if o.teacher is not None else model in (None, "bundled")
        images = data.load_images(
            o.dataset,
            n=o.num_images or (1024 if o.dataset == "self" else 2**40),
            unet=self.unet if drawn is None else drawn.unet,
            scheduler=self.scheduler if drawn is None else drawn.scheduler,
            bundled=bundled,
            data_dir=o.data_dir,
            seed=o.seed,
            device=self.device,
            dtype=DTYPES[self.precision],
            progress=self.progress,
        )
        held = min(o.validation_images, len(images) // 10)
        chosen = torch.linspace(0, len(images) - 1, held).round().long().unique() if held else torch.zeros(0, dtype=torch.int64)
        mask = torch.ones(len(images), dtype=torch.bool)
        mask[chosen] = False
        self.held_out = images[chosen]
        self.images = images[mask]
        self.log(f"images: {len(self.images)} for training, {len(self.held_out)} held out ({Path(o.dataset).name})")
        if self.device.type == "cuda" and self.images.nbytes < free_gpu_bytes(self.device) // 4:
            self.images = self.images.to(self.device)  # no loader, no copies: a step only picks rows

    def _check_parts(self, teacher: Any) -> None:
        o, config = self.options, self.unet.config
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise UserError(f"{self.name}: predicts {kind!r}; epsilon, v_prediction and sample are supported")
        self.prediction = kind
        sampling.make_stepper(self.scheduler, o.num_inference_steps)
        self.shape = sampling.image_shape(self.unet)
        if getattr(self.unet, "class_embedding", None) is not None and o.noise_weight > 0:
            raise UserError(f"{self.name}: is class-conditional and the images have no labels; distil only (--noise_weight 0)")
        if teacher is None:
            return
        if sampling.image_shape(teacher.unet) != self.shape:
            raise UserError(f"the teacher draws {list(sampling.image_shape(teacher.unet))}, the model {list(self.shape)}")
        theirs = teacher.scheduler
        if theirs.config.get("prediction_type", "epsilon") != kind or not torch.equal(
            theirs.alphas_cumprod, self.scheduler.alphas_cumprod
        ):
            raise UserError("the teacher and the model have different noise schedules, so their predictions do not compare")
        for name in ("num_class_embeds", "class_embed_type"):
            if teacher.unet.config.get(name) != config.get(name):
                raise UserError(f"the teacher and the model differ in {name}")
        if o.feature_weight > 0 and len(teacher.unet.down_blocks) != len(self.unet.down_blocks):
            raise UserError("the teacher and the model have different numbers of blocks, so their features do not compare")

    # --------------------------------------------------------------------------------------------------------- prepare

    def prepare(self, resume: bool) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from diffusers.training_utils import EMAModel

        o = self.options
        AcceleratorState._reset_state(True)  # one process may train twice, in other precisions
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision={"fp32": "no"}.get(self.precision, self.precision),
            gradient_accumulation_steps=o.accumulate,
        )
        self.named = [(n, p) for n, p in self.unet.named_parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW([p for _, p in self.named], lr=o.lr, weight_decay=o.weight_decay, fused=True)
        self.optimiser: Any = self.accelerator.prepare(optimiser)
        self.ema = EMAModel(self.unet.parameters(), decay=o.ema_decay, foreach=True) if o.ema_decay > 0 else None
        self.shadow: Any = copy.deepcopy(self.unet).eval().requires_grad_(False)  # what is validated and saved; never compiled
        self.before = None
        self.unet.train()
        self.random_layers = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.unet.modules())
        alphas = self.scheduler.alphas_cumprod.to(self.device, torch.float32)
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        self.features = None
        if o.feature_weight > 0:
            self.features = (_Blocks(self.unet), _Blocks(self.teacher))
        if resume:
            self._resume()
        if o.compile:
            self.unet.compile(dynamic=False)
            if self.teacher is not None:
                self.teacher.compile(dynamic=False)

    def _resume(self) -> None:
        folders = sorted(p for p in self.work.glob("step-*") if p.is_dir() and (p / _STATE).is_file())
        if not folders:
            self.log("nothing to resume: starting at step 0")
            return
        folder = folders[-1]
        state = checkpoint._read_json(folder / _STATE)
        if state.get("format") != FORMAT:
            raise UserError(f"{folder}: is no checkpoint of this program")
        theirs, ours = state.get("settings", {}), self._settings()
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise UserError(f"{folder}: belongs to a training with another {name} ({theirs.get(name)}, not {ours[name]})")
        step = state.get("step")
        if not isinstance(step, int) or not 0 <= step <= self.options.steps:
            raise UserError(f"{folder}: stands at step {step}, beyond the {self.options.steps} that are asked for")
        self.step = step
        self.history = list(state.get("history", []))
        self._fill(folder / _MODEL, dict(self.unet.state_dict()))
        names = [n for n, _ in self.unet.named_parameters()]
        if self.ema is not None:
            self._fill(folder / _EMA, dict(zip(names, self.ema.shadow_params, strict=True)))
            self.ema.optimization_step = step
        inner = self.optimiser.optimizer
        wanted = {}
        for name, p in self.named:
            like = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            inner.state[p] = like
            wanted.update({f"{name}.{key}": value for key, value in like.items()})
        self._fill(folder / _OPTIMISER, wanted)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.log(f"resumed at step {step} from {folder.name}")

    @staticmethod
    def _fill(file: Path, wanted: dict[str, Tensor]) -> None:
        """Copy the tensors of a file into these, in their memory formats; strictly."""
        found = checkpoint._read_weights([file])
        for name, tensor in wanted.items():
            if name not in found or found[name].shape != tensor.shape:
                raise UserError(f"{file}: {name} is missing or has another shape; this checkpoint cannot be used")
            with torch.no_grad():
                tensor.copy_(found[name])
        if len(found) != len(wanted):
            raise UserError(f"{file}: holds other tensors than this network has; this checkpoint cannot be used")

    def _settings(self) -> dict[str, Any]:
        """What the weights depend on; a cosine depends on the number of steps too."""
        values = {k: v for k, v in asdict(self.options).items() if k not in _FREE_ON_RESUME}
        if self.options.lr_schedule == "constant":
            values.pop("steps")
        return {"model": self.name, **values, "images": len(self.images)}

    # ----------------------------------------------------------------------------------------------------------- steps

    def _pick(self, step: int) -> Tensor:
        """Clean images of a step as float32 [B, C, H, W]: the next ones of the permutation of their epoch."""
        n, size = len(self.images), self.options.batch_size
        rows, at = [], step * size
        while size > 0:
            epoch, start = divmod(at, n)
            if self._order is None or self._order[0] != epoch:
                order = torch.randperm(n, generator=_generator(self.options.seed, 1, epoch))
                self._order = (epoch, order.to(self.images.device))
            part = self._order[1][start : start + size]
            rows.append(part)
            at, size = at + len(part), size - len(part)
        images = self.images[torch.cat(rows)].to(self.device, non_blocking=True)
        return sampling.to_float(images)

    def _labels(self, n: int, g: torch.Generator) -> Tensor | None:
        if getattr(self.unet, "class_embedding", None) is None:
            return None
        return torch.randint(sampling.label_count(self.unet), (n,), generator=g, device=self.device)

    def _target(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, what the network is to predict)."""
        a, b = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        x = a * clean + b * noise
        return x, sampling.prediction_target(self.prediction, clean, noise, a, b)

    def _losses(self, clean: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        o = self.options
        x, target = self._target(clean, noise, t)
        x = x.contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            out = self.unet(x, t, class_labels=labels, return_dict=False)[0].float()
            theirs = None
            if self.teacher is not None:
                with torch.no_grad():
                    theirs = self.teacher(x, t, class_labels=labels, return_dict=False)[0].float()
        losses = {"noise": F.mse_loss(out, target)}
        total = o.noise_weight * losses["noise"]
        if theirs is not None:
            losses["distill"] = F.mse_loss(out, theirs)
            total = total + o.distillation * losses["distill"]
        if self.features is not None:
            losses["features"] = attention_loss(self.features[0].take(), self.features[1].take())
            total = total + o.feature_weight * losses["features"]
        return {"loss": total, **losses}

    def _step(self) -> dict[str, Tensor]:
        o = self.options
        g = torch.Generator(self.device).manual_seed(_hash(o.seed, 2, self.step))
        clean = self._pick(self.step)
        noise = torch.randn(clean.shape, generator=g, device=self.device)
        t = torch.randint(len(self.signal), (len(clean),), generator=g, device=self.device)
        if o.flip:
            mirrored = torch.rand(len(clean), generator=g, device=self.device) < 0.5
            clean = torch.where(mirrored.view(-1, 1, 1, 1), clean.flip(3), clean)
        labels = self._labels(len(clean), g)
        if self.random_layers:
            torch.manual_seed(_hash(o.seed, 3, self.step))
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(self.step)
        size = o.batch_size // o.accumulate
        sums: dict[str, Tensor] = {}
        for k in range(o.accumulate):
            part = slice(k * size, (k + 1) * size)
            with self.accelerator.accumulate(self.unet):
                losses = self._losses(clean[part], noise[part], t[part], None if labels is None else labels[part])
                self.accelerator.backward(losses["loss"])
                if self.accelerator.sync_gradients and has_experts(self.unet):
                    for _, p in self.named:  # no sample in a range: its weights get a state of the optimiser all the same
                        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                if self.accelerator.sync_gradients and o.grad_clip > 0:
                    self.accelerator.clip_grad_norm_([p for _, p in self.named], o.grad_clip)
                self.optimiser.step()
                self.optimiser.zero_grad()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / o.accumulate
        if self.ema is not None:
            self.ema.step(self.unet.parameters())
        self.step += 1
        return sums

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a half cosine to zero, or constant."""
        o = self.options
        warm = min(1.0, (step + 1) / o.warmup) if o.warmup else 1.0
        if o.lr_schedule == "constant":
            return o.lr * warm
        share = max(0, step - o.warmup) / max(1, o.steps - o.warmup)
        return o.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def train(self) -> None:
        """All steps that are left, with the log, the checkpoints and the validations that fall due."""
        from tqdm import tqdm

        o = self.options
        if self.step == 0:
            self._validate()
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True  # shapes never change
        sums: dict[str, Tensor] = {}
        since, begin = 0, time.perf_counter()
        try:
            with tqdm(total=o.steps, initial=self.step, unit="step", desc="training", disable=not self.progress) as bar:
                while self.step < o.steps:
                    for name, value in self._step().items():
                        sums[name] = sums.get(name, 0) + value
                    since += 1
                    bar.update()
                    stopping = self.stop()
                    save = stopping or (o.save_every and self.step % o.save_every == 0) or self.step == o.steps
                    check = (o.validate_every and self.step % o.validate_every == 0) or self.step == o.steps
                    if self.step % LOG_EVERY and not save and not check:
                        continue
                    means = {name: float(value) / since for name, value in sums.items()}  # waits for the device
                    seconds = time.perf_counter() - begin
                    if not all(math.isfinite(v) for v in means.values()):
                        raise RuntimeError(
                            f"the loss became NaN or infinite before step {self.step}; {self._advice()}"
                        )
                    self._note(means, since, seconds, bar)
                    if save or check:
                        self._check_weights()
                    if check and not stopping:
                        self._validate()
                    if save and (o.save_every or stopping):
                        self._save_state()
                    if stopping:
                        self.log(f"stopped; the checkpoint of step {self.step} is written, --resume goes on")
                        raise KeyboardInterrupt
                    sums, since, begin = {}, 0, time.perf_counter()
        finally:
            torch.backends.cudnn.benchmark = before

    def _check_weights(self) -> None:
        """The loss is that of the weights before a step; what the last step made of them shows in them alone."""
        if not _finite(self.unet):
            raise RuntimeError(f"the weights became NaN or infinite before step {self.step} was done; {self._advice()}")

    def _advice(self) -> str:
        return f"lower the learning rate (--lr {self.options.lr:g})"

    def _note(self, means: dict[str, float], steps: int, seconds: float, bar: Any) -> None:
        rate = steps * self.options.batch_size / seconds
        if self.trained_steps:  # the first stretch holds compilation and the choice of algorithms
            self.trained_seconds += seconds
        else:
            self.first_steps = steps
            self.first_seconds = seconds
        self.trained_steps += steps
        bar.set_postfix({k: f"{v:.4g}" for k, v in means.items()} | {"images/s": f"{rate:.3g}"}, refresh=False)
        self._record("train", {**means, "lr": self.learning_rate(self.step - 1), "images_per_second": rate})

    @property
    def images_per_second(self) -> float | None:
        """Over the steps of this process, without the first stretch of the log where there are more."""
        counted, seconds = self.trained_steps - self.first_steps, self.trained_seconds
        if not counted:
            counted, seconds = self.first_steps, self.first_seconds
        return counted * self.options.batch_size / seconds if counted and seconds else None

    # ------------------------------------------------------------------------------------------------------ validation

    def _average(self) -> Any:
        """The network that is validated and saved: the moving average, or the weights themselves."""
        self.shadow.load_state_dict(self.unet.state_dict())
        if self.ema is not None:
            self.ema.copy_to(self.shadow.parameters())
        return self.shadow

    def _validate(self) -> None:
        from .pruning import DTYPES

        o, net = self.options, self._average()
        total = len(self.signal)
        entry: dict[str, Any] = {"step": self.step}
        sums = torch.zeros(3, dtype=torch.float64)
        n = len(self.held_out)
        for start in range(0, n, o.batch_size):
            rows = range(start, min(start + o.batch_size, n))
            # One stratum of the timesteps each, in an order that has nothing to do with that of the images.
            t = torch.tensor([int((((i * 7919) % n) + 0.5) / n * total) for i in rows], device=self.device)
            noise = sampling.noise(self.shape, rows, o.seed, "calibration").to(self.device)
            x, target = self._target(sampling.to_float(self.held_out[rows.start : rows.stop]).to(self.device), noise, t)
            labels = sampling.class_labels(net, rows, o.seed, self.device)
            with torch.no_grad():
                out = sampling.predict(net, x, t, labels, dtype=DTYPES[self.precision])
                sums[0] += (out - target).double().square().sum().cpu()
                if self.teacher is not None:
                    with self._eager(self.teacher):
                        theirs = sampling.predict(self.teacher, x, t, labels, dtype=DTYPES[self.precision])
                    sums[1] += (out - theirs).double().square().sum().cpu()
                    sums[2] += theirs.double().square().sum().cpu()
        if n:
            entry["noise_error"] = float(sums[0]) / (n * math.prod(self.shape))
            if self.step and not math.isfinite(entry["noise_error"]):
                raise RuntimeError(f"the noise error is NaN or infinite after step {self.step}; {self._advice()}")
            if self.teacher is not None:
                entry["teacher_error_relative"] = float(sums[1] / sums[2])
        for blocks in self.features or ():
            blocks.take()
        if o.num_samples:
            images = sampling.sample(
                net, self.scheduler, o.num_samples, steps=o.num_inference_steps, seed=o.seed, batch_size=o.batch_size,
                dtype=DTYPES[self.precision],
            )  # fmt: skip
            if images.shape[-1] in (1, 3):
                sampling.save_grid(images, self.work / "validation" / f"step-{self.step:06d}.png")
                if self.writer is not None:
                    self.writer.add_image("samples", sampling.make_grid(images), self.step, dataformats="HWC")
        for blocks in self.features or ():
            blocks.take()
        self.history = [h for h in self.history if h["step"] != self.step] + [entry]
        self._record("validation", {k: v for k, v in entry.items() if k != "step"})
        words = [f"noise error {entry['noise_error']:.5f}"] if "noise_error" in entry else []
        if "teacher_error_relative" in entry:
            words.append(f"difference from the teacher {entry['teacher_error_relative']:.3%}")
        if words:
            self.log(f"step {self.step}: {', '.join(words)}")

    @staticmethod
    @contextlib.contextmanager
    def _eager(net: Any) -> Iterator[None]:
        """Without the compiled form, which is for one batch size alone."""
        compiled, net._compiled_call_impl = net._compiled_call_impl, None
        try:
            yield
        finally:
            net._compiled_call_impl = compiled

    # ------------------------------------------------------------------------------------------------- log, checkpoints

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Open log.jsonl (without what a killed run wrote after its last checkpoint) and TensorBoard."""
        self.work.mkdir(parents=True, exist_ok=True)
        file = self.work / "log.jsonl"
        kept = []
        with contextlib.suppress(OSError):
            for line in file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, TypeError, AttributeError):
                    if self.step and int(json.loads(line).get("step", 0)) <= self.step:
                        kept.append(line + "\n")
        with checkpoint.atomic_file(file) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
        if self.options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.work / "tensorboard"), purge_step=self.step + 1 if self.step else None)
        try:
            yield
        finally:
            if self.writer is not None:
                self.writer.close()

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        with (self.work / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": self.step, "kind": kind, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, self.step)

    def _save_state(self) -> None:
        """A checkpoint appears whole or not at all; the newest two are kept."""
        from safetensors.torch import save_file

        def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: t.detach().to("cpu").contiguous() for n, t in tensors.items()}

        names = [n for n, _ in self.unet.named_parameters()]
        with checkpoint.atomic_folder(self.work / f"step-{self.step:08d}", overwrite=True) as folder:
            save_file(flat(dict(self.unet.state_dict())), folder / _MODEL)
            if self.ema is not None:
                save_file(flat(dict(zip(names, self.ema.shadow_params, strict=True))), folder / _EMA)
            state = self.optimiser.optimizer.state
            save_file(flat({f"{n}.{k}": v for n, p in self.named for k, v in state[p].items()}), folder / _OPTIMISER)
            scaler = self.accelerator.scaler
            checkpoint._write_json(folder / _STATE, {
                "format": FORMAT, "step": self.step, "settings": self._settings(), "history": self.history,
                "scaler": None if scaler is None else scaler.state_dict(),
            })  # fmt: skip
        for old in sorted(p for p in self.work.glob("step-*") if p.is_dir())[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    # ---------------------------------------------------------------------------------------------------------- finish

    def report(self) -> dict[str, Any]:
        import diffusers

        from . import __version__
        from .evaluation import count_macs, count_params, peak_memory
        from .pruning import _device_name

        rate = self.images_per_second
        return {
            "format": FORMAT,
            "model": self.name,
            "settings": {k: v for k, v in asdict(self.options).items() if k not in ("dataset", "data_dir", "teacher", "device")}
            | {"dataset": Path(self.options.dataset).name, "teacher": None if self.options.teacher is None
               else Path(self.options.teacher).name},
            "images": {"training": len(self.images), "held_out": len(self.held_out)},
            "params": count_params(self.shadow),
            "macs": count_macs(self.shadow),
            "steps": self.step,
            "images_seen": self.step * self.options.batch_size,
            "images_per_second": None if rate is None else round(rate, 1),
            "first_seconds": round(self.first_seconds, 2),
            "peak_memory_bytes": peak_memory(self.device),
            "validation": self.history,
            "device": _device_name(self.device),
            "versions": {"wanda_fast": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        }

    def finish(self, save_path: str | Path, overwrite: bool) -> FinetuneResult:
        from diffusers import DDPMPipeline

        from . import run_config

        net = self._average()
        report = self.report()
        nn.Module.to(nn.Module.to(net, self.saved_dtype), memory_format=torch.contiguous_format)
        if not _finite(net):
            raise RuntimeError(f"weights are too large for {self.saved_dtype}; save them in another format (--save_dtype)")
        result = FinetuneResult(DDPMPipeline(unet=net, scheduler=copy.deepcopy(self.scheduler)), report, Path(save_path))

        def instead(path: Path) -> None:
            result.path = path
            self.log(f"{save_path} was taken by something else meanwhile; the result is in {path}")

        with checkpoint.atomic_folder(save_path, overwrite, instead=instead) as folder:
            checkpoint.save_folder(folder, net, self.scheduler)
            (folder / "finetune.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            run_config.write(folder, "finetune", {"model": self.asked_model, **asdict(self.options)})
            shutil.copyfile(self.work / "log.jsonl", folder / "log.jsonl")
            grids = sorted((self.work / "validation").glob("step-*.png"))
            if grids:
                (folder / "vis").mkdir()
                shutil.copyfile(grids[0], folder / "vis" / "before_finetuning.png")
                shutil.copyfile(grids[-1], folder / "vis" / "after_finetuning.png")
            record = self.source / "pruning.json"
            if not self.options.from_scratch and record.is_file():  # how the network got its shape
                shutil.copyfile(record, folder / "pruning.json")
        return result


def _fresh(model: str | Path | None, seed: int) -> tuple[Any, Any, str, Path]:
    """A network with the architecture of a folder (config.json is enough) and fresh weights."""
    from diffusers import UNet2DModel

    from .importance import draw_anew
    from .pruned_unet import PrunedUNet2DModel

    folder, _, name = checkpoint._locate(model)
    unet_dir, scheduler_file, _ = checkpoint._find_parts(folder)
    raw = checkpoint._read_json(unet_dir / "config.json")
    kind = str(raw.get("_class_name", "UNet2DModel"))
    base = kind.removeprefix("Pruned")
    if base != "UNet2DModel":
        raise UserError(f"{unet_dir}: holds a {kind}; only UNet2DModel can be trained")
    config = {k: v for k, v in raw.items() if not k.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            unet = (UNet2DModel if kind == base else PrunedUNet2DModel)(**config)
            if kind != base:  # layers that are cut to their widths hold no values
                draw_anew(unet, seed)
        except Exception as error:  # any constructor error means that this config describes no network
            raise UserError(f"{unet_dir / 'config.json'}: {checkpoint._no_network(kind, error)}") from error
    return unet, checkpoint._load_scheduler(scheduler_file), name, folder


def _finite(net: nn.Module) -> bool:
    """Whether all weights are; one wait for the device."""
    return bool(torch.stack([torch.isfinite(p.detach()).all() for p in net.parameters()]).all())


def _hash(seed: int, stream: int, index: int) -> int:
    """63 bits that differ for every (seed, stream, index)."""
    mixed = sampling._splitmix64((seed & (2**64 - 1)) ^ sampling._splitmix64(stream))
    return sampling._splitmix64(mixed ^ sampling._splitmix64(index)) >> 1


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(_hash(seed, stream, index))
