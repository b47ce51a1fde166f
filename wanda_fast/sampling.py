"""Draw images: DDIM or DDPM sampling in which every image depends on (seed, its index) alone, and picture grids.

Everything random about image i comes from CPU generators seeded by (seed, stream, i). So image i is the same whatever
the batch size, the number of images or the device, up to the rounding of batched kernels, and "before" and "after"
grids start from the same noise.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

KINDS = ("ddim", "ddpm")
CPU_PASS = 8  # images per forward pass on a CPU; measured: as fast as 32
# Streams keep the draws for one image independent of each other.
STREAMS = {"image": 1, "ddpm": 2, "label": 3, "calibration": 4, "timesteps": 5, "trajectory": 6}
STREAMS |= {"latent": 21, "prompt": 22, "pooled": 23}  # of conditioned networks


def sample(
    unet: nn.Module,
    scheduler: Any,
    n: int,
    *,
    steps: int = 50,
    kind: str = "ddim",
    seed: int = 0,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    desc: str = "sampling",
) -> Tensor:
    """Draw n images from noise: x_T ~ N(0, 1), then `steps` steps of DDIM (η = 0) or ancestral DDPM.

    The timesteps have "leading" spacing: with 1000 training steps and 50 steps they are 980, 960, …, 0. The predicted
    x₀ is clipped as the scheduler's config says (``clip_sample``, ``clip_sample_range``). Class-conditional networks
    get random labels.

    Args:
        unet: UNet2DModel; moved to `device` if it is elsewhere.
        n: number of images, 0 or more.
        batch_size: images per forward pass; changes speed and memory. On a CPU the images are the same bit for bit
            whatever it is (passes there hold 8 images always, see :func:`predict_evenly`); on a GPU the libraries choose
            other algorithms for other batches, which changes the rounding of the network and here and there one pixel by 1.
        device: None for where the network is.
        dtype: float32, or bfloat16 or float16 for autocast; None for the network's own.
        progress: show a bar counted in images.

    Returns:
        uint8 [n, H, W, C] on the CPU.

    Raises:
        UserError: steps outside 1 … number of training steps, a negative n, an unknown kind or an unsupported network.

    Source: DDPM, Ho et al. 2020, arXiv:2006.11239; DDIM, Song et al. 2020, arXiv:2010.02502, η = 0.
    """
    if n < 0:
        raise UserError(f"the number of images must be at least 0, not {n}.")
    check_network(unet, scheduler)
    shape = image_shape(unet)
    parts = draw(
        unet,
        scheduler,
        range(n),
        steps=steps,
        kind=kind,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=progress,
        desc=desc,
    )
    done = [images for _, images in parts]
    return torch.cat(done) if done else torch.zeros(0, shape[1], shape[2], shape[0], dtype=torch.uint8)


def draw(
    unet: nn.Module,
    scheduler: Any,
    indices: Sequence[int],
    *,
    steps: int = 50,
    kind: str = "ddim",
    seed: int = 0,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    even: bool = False,
    progress: bool = False,
    desc: str = "sampling",
    note: Callable[[str], None] | None = None,
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """:func:`sample` for chosen image indices, batch by batch: (indices, uint8 [N, H, W, C] on the CPU).

    On a CPU the same images bit for bit whatever the batch size and whichever indices are asked for together. Where a
    GPU has too little memory the batch is halved, `note` is told, and the drawing goes on.

    Args:
        indices: numbers of the images, in any order.
        even: fill the last batch up, so that the network sees batches of one size only (for compiled networks).
        note: called with a line when the batch is halved.

    Raises:
        UserError: as `sample`.
    """
    from tqdm import tqdm

    if kind not in KINDS:
        raise UserError(f"sampler {kind!r} is not one of {', '.join(KINDS)}.")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}.")
    check_network(unet, scheduler)
    device, dtype = place(unet, device, dtype)
    stepper = make_stepper(scheduler, steps, kind)
    shape = image_shape(unet)
    if device.type == "cpu":
        batch_size = -(-batch_size // CPU_PASS) * CPU_PASS  # so that the passes start at the same images in any case

    def batch(chosen: Sequence[int], bar: Any) -> Tensor:
        wanted = len(chosen)
        if even and wanted < batch_size:
            chosen = [*chosen, *[chosen[-1]] * (batch_size - wanted)]
        x = noise(shape, chosen, seed, "image").to(device)
        labels = class_labels(unet, chosen, seed, device)
        generators = [generator(seed, "ddpm", i) for i in chosen] if kind == "ddpm" else None
        for step, t in enumerate(stepper.timesteps.tolist()):
            eps = predict_evenly(unet, x, torch.full((len(chosen),), t, device=device), labels, dtype=dtype)
            extra = {"generator": generators} if generators is not None else {"eta": 0.0}
            x = stepper.step(eps, t, x, **extra).prev_sample
            # Fractions of an image, so that the bar also moves within one large batch.
            bar.update(wanted * (step + 1) // steps - wanted * step // steps)
        return to_uint8(x[:wanted])

    start = 0
    with tqdm(total=len(indices), desc=desc, unit="image", disable=not progress) as bar:
        while start < len(indices):
            chosen = indices[start : start + batch_size]
            images = None
            # Not around the yield: between two batches the network and the mode are the caller's.
            with torch.no_grad(), evaluating(unet), fast_layout(unet):
                try:
                    images = batch(chosen, bar)
                except torch.OutOfMemoryError:
                    if batch_size == 1 or device.type == "cpu":
                        raise
            if images is None:  # outside the except block, whose traceback holds on to the tensors
                torch.cuda.empty_cache()
                batch_size = -(-batch_size // 2)
                if note is not None:
                    note(f"too little memory on {device}: going on with batches of {batch_size}")
                bar.n = start
                continue
            yield chosen, images
            start += len(chosen)


def make_stepper(scheduler: Any, steps: int, kind: str = "ddim") -> Any:
    """A DDIM or DDPM scheduler with this scheduler's betas and clipping, "leading" spacing, timesteps on the CPU."""
    from diffusers import DDIMScheduler, DDPMScheduler

    total = int(scheduler.config.num_train_timesteps)
    if not 1 <= steps <= total:
        raise UserError(f"the number of sampling steps must be 1 to {total}, not {steps}.")
    cls = DDPMScheduler if kind == "ddpm" else DDIMScheduler
    stepper = cls.from_config(scheduler.config, timestep_spacing="leading", steps_offset=0)
    stepper.set_timesteps(steps)
    return stepper


def check_network(unet: nn.Module, scheduler: Any) -> None:
    """Refuse by name what sampling and calibration do not support.

    Raises:
        UserError: learned variances (out_channels ≠ in_channels), class embeddings given as vectors, or a table of
            learned time embeddings that is shorter than the noise schedule.
    """
    from . import inputs

    if inputs.is_conditioned(unet):
        inputs.check_conditioned(unet, scheduler)
        return
    config: Any = unet.config
    total = int(scheduler.config.num_train_timesteps)
    if config.get("time_embedding_type") == "learned" and config["num_train_timesteps"] < total:
        raise UserError(
            f"the network has learned embeddings for {config['num_train_timesteps']} timesteps, the scheduler has "
            f"{total}."
        )
    if config["out_channels"] != config["in_channels"]:
        raise UserError(
            f"unsupported network: {config['out_channels']} output channels for {config['in_channels']} input channels "
            "(learned variances or an inpainting network)."
        )
    if config.get("class_embed_type") == "identity":
        raise UserError("unsupported network: class_embed_type 'identity' expects ready embeddings instead of labels.")


def check_schedule(scheduler: Any, where: str = "") -> None:
    """Refuse a scheduler without the noise schedule ᾱ that everything here is computed with; `where` stands before the text.

    Raises:
        UserError: it has none.
    """
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise UserError(f"{where}{type(scheduler).__name__} has no alphas_cumprod; only schedulers of the DDPM family are supported.")


def prediction_target(kind: str, clean: Tensor, eps: Tensor, signal: Tensor, blur: Tensor) -> Tensor:
    """What a network is trained to give for x_t = signal · x₀ + blur · ε: ε, x₀, or v = signal · ε - blur · x₀.

    Args:
        kind: `prediction_type` of the scheduler: "epsilon", "sample" or "v_prediction".
        clean, eps: x₀ and ε, [N, C, H, W].
        signal, blur: √ᾱ_t and √(1-ᾱ_t), [N, 1, 1, 1].

    Raises:
        UserError: another kind.
    """
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return signal * eps - blur * clean
    raise UserError(f"unsupported prediction type {kind!r} of the scheduler.")


def image_shape(unet: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the network's images.

    Raises:
        UserError: the config has no sample_size.
    """
    from . import inputs

    if inputs.is_conditioned(unet):
        return inputs.input_spec(unet).shape
    config: Any = unet.config
    size = config["sample_size"]
    if size is None:
        raise UserError("the network's config has no sample_size, so the size of its images is unknown.")
    height, width = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), int(height), int(width)


def watch_shapes(unet: nn.Module, kinds: tuple[type[nn.Module], ...], note: Callable[[str, nn.Module, Tensor], None]) -> None:
    """Call note(name, layer, output) for every call of a layer of these kinds in a pass of one image.

    The network is not run, a copy on the meta device is: the tensors have shapes and no values.
    """
    twin = nn.Module.to(copy.deepcopy(unet), "meta")
    for name, layer in twin.named_modules():
        if isinstance(layer, kinds):
            layer.register_forward_hook(lambda module, _, out, name=name: note(name, module, out))
    x = torch.empty(1, *image_shape(unet), device="meta", dtype=next(twin.parameters()).dtype)
    zero = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad():
        twin(x, zero, class_labels=None if getattr(twin, "class_embedding", None) is None else zero)


def place(
    unet: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Move the network to `device` if it is elsewhere and settle the dtype; None means the network's own."""
    parameter = next(unet.parameters())
    target = parameter.device if device is None else torch.device(device)
    if (target.type, target.index or 0) != (parameter.device.type, parameter.device.index or 0):
        with torch.inference_mode(False):  # see `fast_layout`
            unet.to(target)
    return target, dtype or parameter.dtype


def predict(
    unet: nn.Module, x: Tensor, t: Tensor, labels: Any = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The network's output for x_t at timesteps t, in float32.

    Args:
        x: [N, C, H, W].
        t: [N] int64.
        labels: [N] int64 for class-conditional networks; a dictionary for conditioned ones, see `wanda_fast.inputs`.
        dtype: where it differs from the parameters' dtype the forward pass runs under autocast.
    """
    from .inputs import forward

    own = next(unet.parameters()).dtype
    dtype = dtype or own
    x = x.to(own).contiguous(memory_format=layout_for(x.device, _is_compiled(unet)))
    autocast = (
        torch.autocast(x.device.type, dtype=dtype)
        if dtype != own and dtype != torch.float32
        else contextlib.nullcontext()
    )
    with autocast:
        out = forward(unet, x, t, labels)
    return out.float()


def predict_evenly(unet: nn.Module, x: Tensor, t: Tensor, labels: Any = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`predict`, on a CPU in passes of exactly 8 images, the last one filled up.

    The CPU libraries round differently in batches of another size (observed: differences of 1e-6 between batches of 1, 2,
    3, 5 and 8), so only passes of one size give the same images whatever the batch size.
    """
    if x.device.type != "cpu":
        return predict(unet, x, t, labels, dtype=dtype)

    def part(value: Any, start: int) -> Any:
        if isinstance(value, dict):
            return {name: part(v, start) for name, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        rows = value[start : start + CPU_PASS]
        return torch.cat([rows, rows[-1:].expand(CPU_PASS - len(rows), *rows.shape[1:])])

    done = []
    for start in range(0, len(x), CPU_PASS):
        out = predict(unet, part(x, start), part(t, start), part(labels, start), dtype=dtype)
        done.append(out[: len(x) - start])
    return torch.cat(done)


def layout_for(device: torch.device, compiled: bool = False) -> torch.memory_format:
    """The memory format of maps and weights that a network of convolutions and group norms runs fastest in.

    Channels-last on CPUs, a third faster in float32, and for compiled networks. Contiguous on a GPU without the compiler: PyTorch's
    group norm knows no other there and copies, so that a pass of ddpm-cifar10-32 takes 17 % longer in channels-last in float32 and 20 % in
    bfloat16 (H200, benchmarks/results/h200-calibration_step.json).
    """
    return torch.contiguous_format if device.type == "cuda" and not compiled else torch.channels_last


def _is_compiled(unet: nn.Module) -> bool:
    return unet._compiled_call_impl is not None


@contextlib.contextmanager
def fast_layout(unet: nn.Module) -> Iterator[None]:
    """Hold 4-d weights in the format of :func:`layout_for` for the block. Values and parameter objects stay; the memory format is put
    back.
    """
    if layout_for(next(unet.parameters()).device, _is_compiled(unet)) == torch.contiguous_format:
        yield
        return
    changed = [p for p in unet.parameters() if p.dim() == 4 and p.is_contiguous()]

    def lay_out(memory_format: torch.memory_format) -> None:
        # A caller's inference mode must not reach the weights: they could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            for p in changed:
                p.data = p.data.contiguous(memory_format=memory_format)

    lay_out(torch.channels_last)
    try:
        yield
    finally:
        lay_out(torch.contiguous_format)


@contextlib.contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block, so that no dropout is drawn; each module's own mode is put back."""
    training = [module for network in networks for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ----------------------------------------------------------------------------------------------------------- randomness


def generator(seed: int, stream: str, index: int) -> torch.Generator:
    """The CPU generator of one image. Within a seed and stream no two indices below 2³² share a state."""
    # The CPU generator looks at 32 bits of its seed. Consecutive values after a hash of (seed, stream) cannot collide,
    # as hashes of all three would for some pair among 50,000 images.
    base = _splitmix64((seed & (2**64 - 1)) ^ _splitmix64(STREAMS[stream]))
    return torch.Generator().manual_seed((base + index) & 0xFFFFFFFF)


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return value ^ (value >> 31)


def noise(shape: Sequence[int], indices: Sequence[int], seed: int, stream: str) -> Tensor:
    """Standard normal noise [len(indices), *shape], float32 on the CPU; row k depends on (seed, stream, indices[k])
    alone.
    """
    if len(indices) == 0:
        return torch.zeros(0, *shape)
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream, int(i))) for i in indices])


def label_count(unet: nn.Module) -> int:
    """How many labels a class-conditional network knows."""
    config: Any = unet.config
    if config.get("class_embed_type") == "timestep":
        # Embeds a number as a timestep is embedded; its useful range is that of the timesteps. A learned embedding of timesteps holds
        # so many of them.
        return int(config.get("num_train_timesteps") or 1000)
    return int(config["num_class_embeds"])


def class_labels(
    unet: nn.Module, indices: Sequence[int], seed: int, device: torch.device | str = "cpu"
) -> Any:
    """Random labels [len(indices)] int64 of a class-conditional network, None for an unconditional one; a dictionary of
    random conditioning where the network takes one.
    """
    from . import inputs

    if inputs.is_conditioned(unet):
        return inputs.Prompts().pick(inputs.input_spec(unet), indices, [True] * len(indices), seed, device or "cpu")
    if getattr(unet, "class_embedding", None) is None:
        return None
    count = label_count(unet)
    draws = [int(torch.randint(count, (1,), generator=generator(seed, "label", int(i)))) for i in indices]
    return torch.tensor(draws, dtype=torch.int64, device=device)


# ------------------------------------------------------------------------------------------------------------- pictures


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] floats [N, C, H, W] → uint8 [N, H, W, C] on the CPU, rounded to the nearest value."""
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, H, W, C] → float32 [-1, 1] [N, C, H, W]; float input is taken to be that already."""
    if images.dtype != torch.uint8:
        return images.float()
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def make_grid(images: Tensor, *, columns: int | None = None, padding: int = 2) -> Tensor:
    """Tile uint8 images [N, H, W, C] row by row into one picture [H', W', C] on white; `columns` defaults to ⌈√N⌉."""
    n, height, width, channels = images.shape
    if n == 0:
        raise UserError("a grid needs at least one image.")
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = -(-n // columns)
    grid = torch.full(
        (rows * (height + padding) - padding, columns * (width + padding) - padding, channels), 255, dtype=torch.uint8
    )
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + padding), (i % columns) * (width + padding)
        grid[y : y + height, x : x + width] = image
    return grid


def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    padding: int = 2,
    scale: int | None = None,
) -> None:
    """Write a grid of uint8 images [N, H, W, C] (1 or 3 channels) as PNG; its folder is made.

    Args:
        scale: whole-number magnification without smoothing; None makes an image at least 64 pixels high, so that a
            person can see it.
    """
    from PIL import Image

    if images.shape[-1] not in (1, 3):
        raise UserError(f"a picture needs 1 or 3 channels, not {images.shape[-1]}.")
    if scale is None:
        scale = max(1, -(-64 // images.shape[1]))
    grid = make_grid(images, columns=columns, padding=padding)
    picture = Image.fromarray(grid.squeeze(-1).numpy() if grid.shape[-1] == 1 else grid.numpy())
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", optimize=True)
