"""The README.md of a pruned model: what it is, how small, how good, how to open it and how to make it again.

The front matter follows the hub's model card metadata, so that the folder can be uploaded as it is. No path of the machine that
made it is written.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

_CARD_BYTES = 1 << 20  # a longer file is no model card
_METHODS = {
    "wanda-diff": "S = |W| * ||X||_2 with activation norms over diffusion timesteps",
    "wanda-fluctuation": "S = |W| * ||X - mean X||_2 with activation norms over diffusion timesteps",
    "lstsq-residual": "what a least-squares fit on the other channels cannot restore of them",
    "taylor": "the first-order change of the noise-prediction loss, summed over diffusion timesteps",
    "diff-pruning": "the first-order change of the noise-prediction loss, summed over the clean diffusion timesteps",
    "magnitude": "the sum of |W|",
    "random": "chance",
    "reinit": "S = |W| * ||X||_2 with activation norms over diffusion timesteps, and then all weights were drawn anew",
}
_REPAIRS = {
    "lstsq": "The layers that remain were refitted to the dense network's outputs by least squares; nothing was trained.",
    "bias": "The mean of what was removed was folded into the biases; nothing was trained.",
    "none": "Nothing was repaired and nothing was trained.",
}


def write(folder: str | Path, report: dict[str, Any]) -> None:
    """Write `README.md` into a folder, from the report that `pruning.json` holds."""
    Path(folder, "README.md").write_text(text(report), encoding="utf-8")


def text(report: dict[str, Any], repo_id: str | None = None) -> str:
    """The model card as Markdown with YAML front matter.

    Args:
        repo_id: the hub repository that it is read in; None for a folder on a disk.
    """
    settings, versions = report["settings"], report["versions"]
    name = report["model"]
    quality = report.get("quality", {})
    method = _METHODS.get(settings["pruner"], f"the criterion {settings['pruner']}")
    if report["asked"].keys() == {"plan"}:
        method = "a saved plan"
    parts = [
        _front_matter(report),
        f"# {name}, pruned",
        f"A smaller version of `{report.get('base_model') or name}`: whole channels were removed, chosen by {method}. "
        + _REPAIRS[settings["repair"]]
        + _experts(report),
        _table(report, quality),
        _quality_note(report, quality),
        "## Use",
        _usage(report, repo_id),
        "## How it was made",
        "```bash\n" + command(report) + "\n```",
        f"wanda_fast {versions['wanda_fast']}, torch {versions['torch']}, diffusers {versions['diffusers']}, "
        f"Python {versions['python']}, on {report['device']}. `pruning.json` holds the kept channels of every slot and all "
        "settings; `--plan pruning.json` replays them.",
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _experts(report: dict[str, Any]) -> str:
    if "experts" not in report:
        return ""
    lows = [str(low) for low, _ in report["experts"]["ranges"]]
    return f" Each of {len(lows)} ranges of timesteps (from {', '.join(lows)}) has weights of its own; a step uses one set."


def command(report: dict[str, Any]) -> str:
    """The command line that makes this model again; folders and files of the user appear by name alone."""
    from .pruning import PruneOptions

    settings, defaults = report["settings"], PruneOptions()
    words = ["wanda-fast", "prune"]
    if report.get("source") != "bundled":
        words += ["--model", report.get("base_model") or report["model"]]
    budget = settings["target_macs"] or settings["target_params"] or settings["target_latency"] or settings["plan"]
    skip = {"resume", "ratio"} if budget else {"resume"}
    for option, value in settings.items():
        if option in skip or value is None or (option != "ratio" and value == getattr(defaults, option)):
            continue
        words += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    return " ".join(shlex.quote(w) for w in words)


def _front_matter(report: dict[str, Any]) -> str:
    import yaml

    quality = report.get("quality", {})
    metrics = [
        {"type": kind, "name": label, "value": float(f"{quality[key]:.6g}")}
        for key, kind, label in (
            ("ssim", "ssim", "SSIM with the dense model's images from the same noise"),
            ("psnr", "psnr", "PSNR with the dense model's images from the same noise, dB"),
            ("noise_mse", "mse", "squared error of the predicted noise"),
        )
        if key in quality and math.isfinite(quality[key])
    ]
    data: dict[str, Any] = {
        "library_name": "diffusers" if report["plan"]["layout"] == "stock" else "wanda_fast",
        "pipeline_tag": _task(report),
        "tags": ["pruning", "structured-pruning", "wanda", "ddpm", "diffusion"],
    }
    data |= report.get("source_card", {})
    if report.get("base_model"):
        data["base_model"] = report["base_model"]
    if metrics:
        data["model-index"] = [{
            "name": f"{report['model']}-pruned",
            "results": [{
                "task": {"type": _task(report)},
                "dataset": {"type": "generated", "name": "samples and predictions of the dense model"},
                "metrics": metrics,
            }],
        }]  # fmt: skip
    return "---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True) + "---"


def of_source(folder: Path, source: str) -> dict[str, Any]:
    """What a pruned model takes over from the model card of the dense one: license and base model.

    Args:
        folder: the dense model's.
        source: "bundled" (which is under this package's license), "folder" or "hub".
    """
    import yaml

    if source == "bundled":
        return {"license": "apache-2.0"}
    card = folder / "README.md"
    if folder.name in ("unet", "transformer") and not card.is_file():
        card = folder.parent / "README.md"
    try:
        if card.stat().st_size > _CARD_BYTES:
            return {}
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        data = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(data, dict):
        return {}
    kept = ("license", "license_name", "license_link", "base_model")
    return {k: data[k] for k in kept if isinstance(data.get(k), str) and "\n" not in data[k] and len(data[k]) < 200}


def _task(report: dict[str, Any]) -> str:
    reads_text = report.get("network") in ("UNet2DConditionModel", "PixArtTransformer2DModel")
    return "text-to-image" if reads_text else "unconditional-image-generation"


def _table(report: dict[str, Any], quality: dict[str, Any]) -> str:
    dense, pruned = report["dense"], report["pruned"]
    rows = [
        ("parameters", f"{dense['params']:,}", f"{pruned['params']:,}", dense["params"], pruned["params"]),
        ("multiply-accumulates, one image", f"{dense['macs']:,}", f"{pruned['macs']:,}", dense["macs"], pruned["macs"]),
    ]
    if "file_bytes" in quality:
        a, b = quality["file_bytes"]["dense"], quality["file_bytes"]["pruned"]
        rows.append(("weights file, bytes", f"{a:,}", f"{b:,}", a, b))
    if "forward_seconds" in quality:
        forward = quality["forward_seconds"]
        a, b = forward["dense"], forward["pruned"]
        rows.append((f"forward pass of {forward['batch_size']} images, ms", f"{a * 1e3:.1f}", f"{b * 1e3:.1f}", a, b))
    lines = ["| | dense | pruned | left |", "|---|---|---|---|"]
    lines += [f"| {name} | {a} | {b} | {y / x:.1%} |" for name, a, b, x, y in rows]
    return "\n".join(lines)


def _quality_note(report: dict[str, Any], quality: dict[str, Any]) -> str:
    settings = report["settings"]
    notes = []
    if "ssim" in quality:
        psnr = f", PSNR {quality['psnr']:.1f} dB" if math.isfinite(quality["psnr"]) else ""
        notes.append(
            f"Images of the dense and the pruned model from the same noise ({settings['num_samples']} images, DDIM with "
            f"{settings['num_inference_steps']} steps): SSIM {quality['ssim']:.3f}{psnr}."
        )
    if "noise_mse" in quality:
        notes.append(
            f"Mean squared error of the predicted noise against the dense model: {quality['noise_mse']:.3g} "
            f"({quality['noise_mse_relative']:.2%} of the prediction's energy)."
        )
    if "forward_seconds" in quality:
        notes.append(f"Forward time measured on {report['device']}, {settings['dtype'] or 'fp32'}.")
    return " ".join(notes)


def _usage(report: dict[str, Any], repo_id: str | None) -> str:
    place = repo_id or "FOLDER"
    local = f'huggingface_hub.snapshot_download("{repo_id}")' if repo_id else '"FOLDER"'
    more = "import huggingface_hub\n" if repo_id else ""
    network = report.get("network", "UNet2DModel")
    if network != "UNet2DModel":
        return (
            f"```python\n{more}import wanda_fast\n\nmodel = wanda_fast.load_pruned({local})\n```\n\nThis is the pipeline, or the "
            f"`Pruned{network}` where the folder holds nothing else. Inside its blocks the widths differ from layer to layer, "
            "which the constructors of diffusers cannot express, so the package `wanda_fast` is needed to open it; with "
            "`import wanda_fast` the pipelines' own `from_pretrained` open it as well."
        )
    if report["plan"]["layout"] == "stock":
        body = 'from diffusers import DDPMPipeline\n\npipeline = DDPMPipeline.from_pretrained("' + place + '")'
        note = "Plain diffusers opens this folder; the package that made it is not needed."
    else:
        body = f"{more}import wanda_fast\n\npipeline = wanda_fast.load_pruned({local})"
        note = (
            "Its widths differ from slot to slot, which the constructor of diffusers' `UNet2DModel` cannot express (it knows "
            "one width per level), so the package `wanda_fast` is needed to open it."
        )
    return f"```python\n{body}\nimage = pipeline(num_inference_steps=50).images[0]\n```\n\n{note}"
