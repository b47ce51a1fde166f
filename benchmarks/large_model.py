"""The full SDXL UNet (2.6 billion random parameters), pruned in its own memory: seconds, peak memory and share per stage.

    python -m benchmarks.large_model                    on a GPU, writes benchmarks/results/sdxl-<gpu>.json
    python -m benchmarks.large_model --dry_run          shapes and plan on the meta device, no weights
    python -m benchmarks.large_model --size small       the same code on a small network, for a CPU

Random weights cannot say anything about quality; the error of the predicted noise is given beside that of the plain cut,
to show that the repair works at this size. The peak must stay under 1.5 times the network's own memory plus a constant,
which covers what does not grow with the network: paused passes, activations of a batch and the sums of one layer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import environment, log

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL: dict[str, Any] = {
    **SDXL,
    "sample_size": 16,
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 6 * 256 + 64,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Stages:
    """Seconds and peak memory of every stage, and their shares."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: dict[str, dict[str, Any]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else None
        self.rows[name] = {"seconds": time.perf_counter() - start, "peak_bytes": peak}
        shown = "" if peak is None else f", peak {peak / 2**30:.2f} GiB"
        log(f"{name}: {self.rows[name]['seconds']:.1f} s{shown}")

    def shares(self, of: tuple[str, ...]) -> None:
        total = sum(self.rows[n]["seconds"] for n in of)
        for name in of:
            self.rows[name]["share"] = self.rows[name]["seconds"] / total


def build(config: dict[str, Any], device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """A network with random weights, made on the device in its dtype: never held in another."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UNet2DConditionModel(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def widths_for(model: nn.Module, slots: Any, target: str) -> tuple[dict[str, int], Any, dict[str, Any]]:
    """Kept channels per slot for a MACs budget, and the sizes."""
    from wanda_fast.compact import cost_model
    from wanda_fast.plan import Target, free_problem, uniform_widths
    from wanda_fast.pruning import parse_budget

    costs = cost_model(model, slots)
    params, macs = costs.sizes({})
    problem = free_problem(slots, costs, "free", 16, 8)
    widths = uniform_widths(problem, Target(macs=parse_budget(target, macs)))
    least = costs.sizes(problem.widths(dict.fromkeys(problem.options, 0)))
    new_params, new_macs = costs.sizes(widths)
    sizes = {
        "dense": {"params": params, "macs": macs},
        "pruned": {"params": new_params, "macs": new_macs, "macs_share": new_macs / macs, "params_share": new_params / params},
        "least_possible": {"macs_share": least[1] / macs, "params_share": least[0] / params},
        "slots": len(slots.slots),
    }
    log(f"{params / 1e9:.3f} G parameters, {macs / 1e12:.3f} TMACs an image; kept: {new_params / params:.1%} of the parameters, "
        f"{new_macs / macs:.1%} of the MACs; least possible: {least[0] / params:.1%} and {least[1] / macs:.1%}")  # fmt: skip
    return widths, costs, sizes


def dry_run(config: dict[str, Any], target: str) -> dict[str, Any]:
    """Slots, plan, compaction and a pass of the pruned network, on the meta device."""
    from wanda_fast.compact import compact, new_unet
    from wanda_fast.inputs import Prompts, forward, input_spec
    from wanda_fast.plan import build_plan
    from wanda_fast.slots import find_slots

    model: Any = new_unet(config, base="UNet2DConditionModel").eval()
    slots = find_slots(model)
    widths, costs, sizes = widths_for(model, slots, target)
    scores = {n: torch.arange(s.width).float() for n, s in slots.slots.items()}
    plan = build_plan(slots, widths, scores, model.config, layout="free", norm_policy="free")
    pruned = compact(model, plan)
    spec = input_spec(pruned)
    condition = {k: v.to("meta") for k, v in Prompts().pick(spec, [0], [True], 0, "cpu").items()}
    with torch.no_grad():
        out = forward(pruned, torch.empty(1, *spec.shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta"), condition)
    assert tuple(out.shape[1:]) == spec.shape
    assert sum(p.numel() for p in pruned.parameters()) == costs.sizes(widths)[0]
    log("dry run: the pruned network runs on the meta device and has the planned number of parameters")
    return sizes


def predictions(model: nn.Module, batches: list[Any]) -> list[Tensor]:
    from wanda_fast.sampling import predict

    with torch.no_grad():
        return [predict(model, x, t, condition).cpu() for x, t, condition in batches]


def relative_error(want: list[Tensor], got: list[Tensor]) -> float:
    off = sum(float((a - b).double().square().sum()) for a, b in zip(want, got))
    return off / sum(float((a - a.mean()).double().square().sum()) for a in want)


def forward_seconds(model: nn.Module, batch: Any, device: torch.device) -> float:
    """Median seconds of five passes."""
    from wanda_fast.sampling import fast_layout

    times = []
    with fast_layout(model):
        for _ in range(6):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            predictions(model, [batch])
            times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--target_macs", default="60%")
    parser.add_argument("--calib", type=int, default=128, help="noised latents of the calibration")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--repair_images", type=int, default=32)
    parser.add_argument("--pass_gib", type=float, default=8.0, help="memory that the paused passes of the repair may hold")
    parser.add_argument("--constant_gib", type=float, default=14.0, help="allowed beside 1.5 times the network, those included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    config = SDXL if args.size == "full" else SMALL
    if args.dry_run:
        dry_run(config, args.target_macs)
        return

    from diffusers import DDIMScheduler

    from wanda_fast.calibrate import calibrate, noised_batches
    from wanda_fast.importance import Context, get_criterion, slot_scores
    from wanda_fast.in_place import prune_in_place
    from wanda_fast.inputs import Prompts
    from wanda_fast.plan import build_plan
    from wanda_fast.slots import find_slots
    from wanda_fast.stats import fingerprint

    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    stages = Stages(device)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    with stages("build"):
        model = build(config, device, dtype, args.seed)
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    log(f"the network takes {own / 2**30:.2f} GiB")

    def batches(n: int, seed: int) -> Iterator[Any]:
        given = noised_batches(model, scheduler, Prompts(), n=n, batch_size=args.batch_size, seed=seed, device=device)
        for x, t, _, condition in given:
            yield x, t, condition

    held_out = list(batches(2 * args.batch_size, args.seed + 1_000_003))
    with stages("dense predictions"):
        want = predictions(model, held_out)
        dense_seconds = forward_seconds(model, held_out[0], device)
    with stages("calibrate"):
        stats = calibrate(
            model, scheduler, Prompts(), n=args.calib, batch_size=args.batch_size, seed=args.seed, device=device, dtype=dtype,
            graph=False,
        )  # fmt: skip
    with stages("fingerprint"):  # a part of the calibration: SHA-256 of all weights, on the host
        fingerprint(model)
    settings: Any = model.config
    with stages("plan"):
        slots = find_slots(model)
        widths, _, sizes = widths_for(model, slots, args.target_macs)
        norms = {layer: stats.act_norm(layer) for layer in stats.tables}
        scores = slot_scores(model, slots, get_criterion("wanda-diff"), Context(act_norm=norms, seed=args.seed))
        plan = build_plan(slots, widths, scores, settings, layout="free", norm_policy="free")
    with stages("compact and repair"):
        pruned, report = prune_in_place(
            model, plan, lambda: batches(args.repair_images, args.seed), memory_limit=int(args.pass_gib * 2**30)
        )
    with stages("pruned predictions"):
        got = predictions(pruned, held_out)
        pruned_seconds = forward_seconds(pruned, held_out[0], device)
    del pruned
    model = nn.Identity()  # the dense network is used up; its memory goes before its twin is made, for the plain cut
    model = build(config, device, dtype, args.seed)
    plain = predictions(prune_in_place(model, plan, lambda: iter(()), ridge=())[0], held_out)
    both, cut = stages.rows.pop("compact and repair"), float(report.settings["cut_seconds"])
    stages.rows["compact"] = {"seconds": cut, "peak_bytes": both["peak_bytes"]}
    stages.rows["repair"] = {"seconds": both["seconds"] - cut, "peak_bytes": both["peak_bytes"]}
    stages.shares(("calibrate", "plan", "compact", "repair"))
    peaks = [stages.rows[n]["peak_bytes"] for n in ("calibrate", "plan", "compact", "repair")]
    limit = int(1.5 * own + args.constant_gib * 2**30)
    peak = max((p for p in peaks if p is not None), default=None)
    done = [r for r in report.layers if r.accepted and r.held_before and r.held_after]
    result: dict[str, Any] = {
        "what": f"UNet2DConditionModel of SDXL, {args.size} size, random weights, {args.dtype}",
        "environment": environment(device, args.seed),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "dry_run")},
        "sizes": sizes,
        "model_bytes": own,
        "stages": stages.rows,
        "memory": {
            "peak_bytes": peak,
            "limit_bytes": limit,
            "limit": f"1.5 x model + {args.constant_gib:g} GiB (paused passes {args.pass_gib:g} GiB of them)",
            "within": None if peak is None else peak <= limit,
            "peak_over_model": None if peak is None else peak / own,
            "peak_less_model_gib": None if peak is None else (peak - own) / 2**30,
            "bytes_per_paused_image": report.settings["pass_bytes"],
        },
        "repair": {
            "images": report.images,
            "layers": len(report.layers),
            "refitted": len(done),
            "typical_held_before": _geometric(r.held_before for r in done),
            "typical_held_after": _geometric(r.held_after for r in done),
        },
        "noise_error_relative": {"plain_cut": relative_error(want, plain), "repaired": relative_error(want, got)},
        "forward_seconds": {"batch_size": args.batch_size, "dense": dense_seconds, "pruned": pruned_seconds},
    }
    text = json.dumps(result, indent=1)
    gpu = result["environment"].get("gpu", "cpu").split()[-1].lower()
    out = args.out or Path(__file__).parent / "results" / f"sdxl{'' if args.size == 'full' else '-small'}-{gpu}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    log(text)
    if result["memory"]["within"] is False:
        raise SystemExit(f"the peak of {(peak or 0) / 2**30:.2f} GiB is over the limit of {limit / 2**30:.2f} GiB")


def _geometric(values: Any) -> float:
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


if __name__ == "__main__":
    main()
