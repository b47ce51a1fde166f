"""What a conditioned network takes beside x_t and t, and calibration batches of it.

Text-to-image UNets and diffusion transformers work on latents and read prompt embeddings, pooled embeddings, size
numbers or class labels. Here their conditioning is one flat dictionary of tensors, sample by sample along dimension 0,
that stands where class labels stand for a UNet2DModel; `forward` turns it into the network's own arguments.

Prompts come from a safetensors file (`Prompts.load`) or, without one, are random numbers, which the run says. Latents of
the mode "random" come from the same file, or are noise: encoded images have about unit variance, so x_t then has it at
every t as well.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .inner_slots import base_class, is_inner

# Entries of a prompt file; those with a negative have it under "negative_" + name.
PROMPT_KEYS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask", "time_ids", "class_labels", "latents")
_NEGATIVES = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")


@dataclass(frozen=True)
class InputSpec:
    """Inputs of a conditioned network.

    Attributes:
        shape: (C, H, W) of the latents.
        tokens: (length, width) of prompt embeddings; None where the network reads none.
        pooled: width of the pooled prompt embedding (SDXL); None where there is none.
        time_ids: how many size numbers follow it.
        classes: class labels 0 … classes - 1; None where there are none.
        null_class: the label that means "no class"; None where the network has none.
        sizes: whether resolution and aspect ratio are wanted (PixArt at 1024 pixels).
    """

    shape: tuple[int, int, int]
    tokens: tuple[int, int] | None = None
    pooled: int | None = None
    time_ids: int = 0
    classes: int | None = None
    null_class: int | None = None
    sizes: bool = False


def is_conditioned(model: nn.Module) -> bool:
    """Whether the network takes its conditioning as a dictionary (see above)."""
    return is_inner(model)


def input_spec(model: nn.Module) -> InputSpec:
    """What a network takes, read off its configuration.

    Raises:
        UserError: an option whose inputs are not known here, by name.
    """
    config: Any = model.config
    kind = base_class(model)
    size = config.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    shape = (int(config["in_channels"]), int(height), int(width))
    if kind == "DiTTransformer2DModel":
        classes = int(config["num_embeds_ada_norm"])
        return InputSpec(shape, classes=classes, null_class=classes)
    if kind == "PixArtTransformer2DModel":
        text = int(config.get("caption_channels") or config["cross_attention_dim"])
        return InputSpec(shape, (120, text), sizes=bool(model.use_additional_conditions))
    if kind != "UNet2DConditionModel":
        raise UserError(f"{kind}: its inputs are not known")
    for option, known in (
        ("encoder_hid_dim_type", (None, "text_proj")),
        ("addition_embed_type", (None, "text_time")),
        ("class_embed_type", (None,)),
        ("time_cond_proj_dim", (None,)),
        ("dual_cross_attention", (None, False)),  # two texts at once
        ("attention_type", (None, "default")),  # "gated": boxes of GLIGEN
    ):
        if config.get(option) not in known:
            raise UserError(f"UNet2DConditionModel with {option} {config.get(option)!r} is not supported")
    text = config["encoder_hid_dim"] if config.get("encoder_hid_dim") else config["cross_attention_dim"]
    if isinstance(text, list | tuple):
        if len(set(text)) > 1:
            raise UserError(f"UNet2DConditionModel with several cross_attention_dim {list(text)} is not supported")
        text = text[0]
    classes = config.get("num_class_embeds")
    pooled, numbers = None, 0
    if config.get("addition_embed_type") == "text_time":
        total, each = int(config["projection_class_embeddings_input_dim"]), int(config["addition_time_embed_dim"])
        numbers = 5 if total - 5 * each == 1280 else 6  # the refiner of SDXL has five, all others six
        pooled = total - numbers * each
    return InputSpec(shape, (77, int(text)), pooled, numbers, None if classes is None else int(classes))


# --------------------------------------------------------------------------------------------------------------- prompts


@dataclass
class Prompts:
    """Where the conditioning and the clean latents of the calibration come from.

    Attributes:
        tensors: entries of `PROMPT_KEYS` and their negatives, [P, ...]; empty for random ones.
        guidance: scale of classifier-free guidance, or None. With a scale samples 2k and 2k + 1 are the two halves of a
            guided batch: the same x_t and t, without and with the prompt.
        name: of the file.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    guidance: float | None = None
    name: str = ""

    @classmethod
    def load(cls, path: str | Path, guidance: float | None = None) -> Prompts:
        """Read a safetensors file with `prompt_embeds` [P, L, D] and, where the network has them, `pooled_prompt_embeds`
        [P, E], `prompt_attention_mask` [P, L], `time_ids` [P or 1, 6], `class_labels` [P], `latents` [M, C, H, W], and
        `negative_` versions of the first three.

        Raises:
            UserError: not such a file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read as a safetensors file ({error})") from None
        known = {*PROMPT_KEYS, *(f"negative_{k}" for k in _NEGATIVES)}
        for name, tensor in tensors.items():
            if name not in known:
                raise UserError(f"{path}: unknown entry {name}; known: {', '.join(sorted(known))}")
            if tensor.dim() == 0 or len(tensor) == 0:
                raise UserError(f"{path}: {name} is empty")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{path}: {name} holds NaN or Inf")
        return cls(tensors, guidance, Path(path).name)

    def check(self, model: nn.Module) -> None:
        """Compare the tensors with what a network takes.

        Raises:
            UserError: an entry of the wrong shape, or one that is missing.
        """
        spec = input_spec(model)
        where = self.name or "the prompts"
        if self.guidance is not None and not self.guidance >= 0:
            raise UserError(f"the guidance scale must be at least 0; got {self.guidance}")
        if self.guidance is not None and spec.tokens is None and spec.null_class is None:
            raise UserError("classifier-free guidance needs a prompt or a class, and this network takes neither")
        ends: dict[str, tuple[int | None, ...]] = {"latents": spec.shape, "class_labels": (), "time_ids": (spec.time_ids,)}
        if spec.tokens is not None:
            ends |= {"prompt_embeds": (None, spec.tokens[1]), "prompt_attention_mask": (None,)}
        if spec.pooled is not None:
            ends["pooled_prompt_embeds"] = (spec.pooled,)
        if spec.classes is None:
            del ends["class_labels"]
        if spec.pooled is None:
            del ends["time_ids"]
        for name in self.tensors:
            if name.removeprefix("negative_") not in ends:
                raise UserError(f"{where}: {name} is nothing that this {base_class(model)} takes")
        for name, tensor in self.tensors.items():
            end = ends[name.removeprefix("negative_")]
            fits = tensor.dim() == len(end) + 1 and all(b in (None, a) for a, b in zip(tensor.shape[1:], end))
            if not fits:
                shown = ", ".join(str(n or "any") for n in ("any", *end))
                raise UserError(f"{where}: {name} has shape {list(tensor.shape)}, the network needs [{shown}]")
        labels = self.tensors.get("class_labels")
        if labels is not None and spec.classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < spec.classes:
            raise UserError(f"{where}: class_labels must lie in 0 to {spec.classes - 1}")
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            if self.tensors and name in ends and name not in self.tensors:
                raise UserError(f"{where}: has no {name}")
        for name in _NEGATIVES:
            a, b = self.tensors.get(name), self.tensors.get(f"negative_{name}")
            if a is None and b is not None:
                raise UserError(f"{where}: has negative_{name} and no {name}")
            if a is not None and b is not None and a.shape[1] != b.shape[1]:
                raise UserError(f"{where}: negative_{name} has another length than {name}")
        for first in ("prompt_embeds", "negative_prompt_embeds"):
            self._check_rows(where, first)

    def _check_rows(self, where: str, first: str) -> None:
        """Refuse entries that do not say the same number of prompts, or of tokens, as `first` does."""
        prompts = self.tensors.get(first)
        if prompts is None:
            return
        before = first.removesuffix("prompt_embeds")
        mask = self.tensors.get(f"{before}prompt_attention_mask")
        if mask is not None and mask.shape[1] != prompts.shape[1]:
            raise UserError(f"{where}: {before}prompt_attention_mask is for {mask.shape[1]} tokens, {first} has {prompts.shape[1]}")
        of_each = [f"{before}pooled_prompt_embeds", f"{before}prompt_attention_mask"]
        for name in (*of_each, *(() if before else ("time_ids", "class_labels"))):
            rows = len(self.tensors.get(name, prompts))
            if rows != len(prompts) and (name in of_each or rows != 1):
                raise UserError(f"{where}: {name} has {rows} rows, {first} has {len(prompts)}")

    def describe(self) -> str:
        """One phrase for the report."""
        parts = []
        for name, what in (("prompt_embeds", "prompts"), ("class_labels", "labels"), ("latents", "latents")):
            if name in self.tensors:
                parts.append(f"{len(self.tensors[name])} {what}")
        kind = f"{', '.join(parts) or 'conditioning'} from {self.name}" if self.tensors else "random conditioning"
        return kind + ("" if self.guidance is None else f", in pairs for guidance {self.guidance:g}")

    def pick(
        self, spec: InputSpec, indices: Sequence[int], guided: Sequence[bool], seed: int, device: torch.device | str
    ) -> dict[str, Tensor]:
        """Conditioning of samples; entry k depends on (seed, indices[k], guided[k]) alone.

        Args:
            indices: prompt i is the file's entry i modulo their number, or the i-th random one.
            guided: False for the unconditional half of a guided pair.
        """
        from .sampling import generator, noise

        found: dict[str, Tensor] = {}

        def rows(name: str, shape: tuple[int, ...], stream: str) -> Tensor:
            have = self.tensors.get(name)
            if have is None:
                values = noise(shape, indices, seed, stream)
            else:
                values = have[torch.tensor([i % len(have) for i in indices])]
            if all(guided):
                return values
            negative = self.tensors.get(f"negative_{name}")
            for k, yes in enumerate(guided):
                if not yes:  # without a negative prompt the embedding is zero, as pipelines do; all of it is then looked at
                    usual = int(name == "prompt_attention_mask")
                    values[k] = usual if negative is None else negative[indices[k] % len(negative)].to(values)
            return values

        if spec.tokens is not None:
            found["encoder_hidden_states"] = rows("prompt_embeds", spec.tokens, "prompt").float()
            if "prompt_attention_mask" in self.tensors:
                found["encoder_attention_mask"] = rows("prompt_attention_mask", (), "prompt")
        if spec.pooled is not None:
            found["text_embeds"] = rows("pooled_prompt_embeds", (spec.pooled,), "pooled").float()
            ids = self.tensors.get("time_ids")
            if ids is None:
                high, wide = (8.0 * n for n in spec.shape[1:])
                # original size, crop, and target size or (refiner) aesthetic score
                ids = torch.tensor([[high, wide, 0, 0, *((high, wide) if spec.time_ids == 6 else (6.0,))]])
            found["time_ids"] = ids[torch.tensor([i % len(ids) for i in indices])].float()
        if spec.classes is not None:
            labels = self.tensors.get("class_labels")
            draws = [
                int(torch.randint(spec.classes, (1,), generator=generator(seed, "label", int(i))))
                if labels is None else int(labels[i % len(labels)])
                for i in indices
            ]  # fmt: skip
            draws = [d if yes or spec.null_class is None else spec.null_class for d, yes in zip(draws, guided)]
            found["class_labels"] = torch.tensor(draws, dtype=torch.int64)
        if spec.sizes:
            high, wide = (8.0 * n for n in spec.shape[1:])
            found["resolution"] = torch.tensor([[high, wide]]).repeat(len(indices), 1)
            found["aspect_ratio"] = torch.tensor([[high / wide]]).repeat(len(indices), 1)
        return {name: value.to(device) for name, value in found.items()}


# --------------------------------------------------------------------------------------------------------------- forward


def forward(model: nn.Module, x: Tensor, t: Tensor, condition: Tensor | Mapping[str, Tensor] | None) -> Tensor:
    """The network's output for x_t, with class labels (a tensor) or a dictionary of conditioning."""
    if not isinstance(condition, Mapping):
        return model(x, t, class_labels=condition, return_dict=False)[0]
    like = x.dtype
    given = {k: v.to(like) if v.is_floating_point() else v for k, v in condition.items()}
    kind = base_class(model)
    if kind == "UNet2DConditionModel":
        extra = {k: given.pop(k) for k in ("text_embeds", "time_ids") if k in given}
        if extra:
            given["added_cond_kwargs"] = extra  # type: ignore[assignment]
    elif kind == "PixArtTransformer2DModel":
        given["added_cond_kwargs"] = {k: given.pop(k, None) for k in ("resolution", "aspect_ratio")}  # type: ignore[assignment]
    return model(x, timestep=t, **given, return_dict=False)[0]


def select(condition: Any, index: Tensor | slice) -> Any:
    """Samples of a conditioning (dictionary, labels or None)."""
    if condition is None:
        return None
    if isinstance(condition, Mapping):
        return {k: v[index] for k, v in condition.items()}
    return condition[index]


def to_device(condition: Any, device: torch.device | str) -> Any:
    """A conditioning (dictionary, labels or None) on a device."""
    if isinstance(condition, Mapping):
        return {k: v.to(device) for k, v in condition.items()}
    return None if condition is None else condition.to(device)


# --------------------------------------------------------------------------------------------------------------- batches


def check_conditioned(model: nn.Module, scheduler: Any) -> None:
    """Refuse by name what calibration does not support.

    Raises:
        UserError: inputs that are not known here.
    """
    from .sampling import check_schedule

    input_spec(model)
    check_schedule(scheduler)


def latent_stepper(scheduler: Any, steps: int) -> Any:
    """DDIM with the scheduler's betas and prediction type; latents are not clipped."""
    from diffusers import DDIMScheduler

    stepper = DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading", steps_offset=0, clip_sample=False)
    stepper.set_timesteps(steps)
    return stepper


def conditioned_batches(
    model: nn.Module,
    scheduler: Any,
    prompts: Prompts,
    *,
    n: int,
    mode: str,
    target: tuple[int, int],
    batch_size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    part: tuple[int, int],
    steps: int,
) -> Generator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor | None, None]:
    """(x_t, t, indices, conditioning) of samples part[0] … part[1]-1 of n; repeating the call repeats them.

    "random": x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε with x₀ the file's latents, or noise. "trajectory": states of DDIM trajectories
    from noise, with guidance where a scale is given; all states of one trajectory share its prompt.
    """
    from .calibrate import timestep_schedule
    from .sampling import generator, noise

    spec = input_spec(model)
    prompts.check(model)
    pair = 2 if prompts.guidance is not None else 1
    count = -(-n // pair)  # distinct (x_t, t)
    low, high = target
    first, last = part
    if mode == "random":
        schedule = timestep_schedule(count, low, high, generator(seed, "timesteps", 0))
        alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
        latents = prompts.tensors.get("latents")
        for start in range(first, last, batch_size):
            indices = list(range(start, min(start + batch_size, last)))
            own = [i // pair for i in indices]
            t = schedule[torch.tensor(own)]
            signal = alphas[t].sqrt().float().view(-1, 1, 1, 1)
            blur = (1 - alphas[t]).sqrt().float().view(-1, 1, 1, 1)
            if latents is None:
                clean = noise(spec.shape, own, seed, "latent")
            else:
                clean = latents[torch.tensor(own) % len(latents)].float()
            x = signal * clean + blur * noise(spec.shape, own, seed, "calibration")
            condition = prompts.pick(spec, own, [pair == 1 or i % 2 == 1 for i in indices], seed, device)
            yield x.to(device), t.to(device), torch.tensor(indices), condition
        return

    stepper = latent_stepper(scheduler, steps)
    inside = [k for k, t in enumerate(stepper.timesteps.tolist()) if low <= t < high]
    if not inside:
        raise UserError(f"none of the {steps} DDIM steps lies in timesteps {low}-{high}.")
    # Enough trajectories for all states; at least eight, since the states of one resemble each other.
    runs = max(-(-count // len(inside)), min(count, 8))
    per = -(-count // runs)
    for start in range(0, runs, max(1, batch_size // pair)):
        mine = list(range(start, min(start + max(1, batch_size // pair), runs)))
        at: dict[int, list[tuple[int, int]]] = {}  # step -> (place among all rows, sample)
        for k, run in enumerate(mine):
            for j, state in enumerate(range(run, count, runs)):
                step = inside[int((j + (run + 0.5) / runs) * len(inside) / per)]
                for half in range(pair):
                    if first <= state * pair + half < min(last, n):
                        at.setdefault(step, []).append((half * len(mine) + k, state * pair + half))
        if not at:
            continue
        x = noise(spec.shape, mine, seed, "trajectory").to(device)
        halves = [prompts.pick(spec, mine, [pair == 1 or half == 1] * len(mine), seed, device) for half in range(pair)]
        condition = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
        for k, step_t in enumerate(stepper.timesteps.tolist()):
            both = torch.cat([x] * pair)
            if k in at:
                rows = torch.tensor([row for row, _ in at[k]], device=device)
                t = torch.full((len(rows),), step_t, device=device)
                yield both[rows], t, torch.tensor([i for _, i in at[k]]), select(condition, rows)
            if k >= max(at):
                break
            from .sampling import predict

            with torch.no_grad():
                t = torch.full((len(both),), step_t, device=device)
                out = predict(model, both, t, condition, dtype=dtype)[:, : spec.shape[0]]
            if pair == 2:
                plain, guided = out.chunk(2)
                out = plain + float(prompts.guidance or 0) * (guided - plain)
            if out.shape[1] != spec.shape[0]:
                raise UserError("a trajectory needs a network that returns as many channels as it takes; use random timesteps")
            x = stepper.step(out, step_t, x, eta=0.0).prev_sample
