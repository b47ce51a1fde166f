"""Study a model's activations without pruning it: figures, tables, a plain verdict."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from wanda_fast.cli.parser import Parser, add_batch_size, model_name, share, whole
from wanda_fast.cli.terminal import Terminal, finite, table

EXAMPLES = """\
wanda-fast analyze                                           study the bundled model, write run/ddpm-cifar10-small-analysis
wanda-fast analyze --num_samples 64                          a quick look
wanda-fast analyze --model_path FOLDER_OR_HUB_ID --dataset FOLDER_OF_IMAGES --device cuda --num_samples 1024 --save_path OUT

Nothing is pruned. The folder gets figures (activations.png, timesteps.png, stability.png, removed.png), the same
numbers as CSV and JSON, and activation_stats.safetensors, which `wanda-fast prune --load_stats` can use."""


def add_arguments(parser: Parser) -> None:
    """All options of the subcommand."""
    group = parser.add_argument_group("model and result")
    group.add_argument("--model_path", "--model", dest="model", metavar="FOLDER|HUB_ID",
        help="diffusers folder or hub id with a UNet2DModel (default: the bundled ddpm-cifar10-small)")  # fmt: skip
    group.add_argument("--save_path", "--out", dest="save_path", metavar="FOLDER",
        help="folder to write, in one step at the end (default: run/<model>-analysis)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace a folder that exists and is not empty")

    group = parser.add_argument_group("what is run through the network")
    group.add_argument("--dataset", default="self", metavar="self|cifar10|FOLDER",
        help="images: the model's own samples, CIFAR-10 from --data_dir, or a folder of images of any size and mode "
        "(default: self)")  # fmt: skip
    group.add_argument("--data_dir", metavar="FOLDER", help="where CIFAR-10 lies (binary version or images)")
    group.add_argument("--num_samples", type=whole(8), default=1024, metavar="N",
        help="number of noised images, at least 8 (default: 1024)")  # fmt: skip
    group.add_argument("--timesteps", choices=("random", "trajectory"), default="random",
        help="random: images noised to timesteps that cover the schedule evenly; trajectory: states of the model's own "
        "DDIM sampling (default: random)")  # fmt: skip
    group.add_argument("--ratio", type=share, default=0.3, metavar="R",
        help="share of every slot's channels for the comparison of removed sets, 0 < R < 1 (default: 0.3)")  # fmt: skip

    group = parser.add_argument_group("running it")
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "float32", "bfloat16", "float16"), default=None,
        help="number format of the forward passes; sums are float64 (default: fp32)")  # fmt: skip
    add_batch_size(group)
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of everything random (default: 0)")
    group.add_argument("--json", action="store_true", help="print the report as one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress bars and no notes, only the result")
    group.add_argument("-h", "--help", action="help", help="show this text")


def run(args: argparse.Namespace, out: Terminal) -> int:
    """Study as asked, write the folder, print the verdict."""
    from wanda_fast import checkpoint, data, run_config, study, study_figures
    from wanda_fast.errors import UserError
    from wanda_fast.pruning import _DTYPE_NAMES, DTYPES, check_device
    from wanda_fast.sampling import image_shape
    from wanda_fast.smaller_batches import usual_batch_size

    if args.ratio == 0:
        raise UserError("--ratio: a study of removed channels needs a ratio above 0")
    data.check_source(args.dataset, data_dir=args.data_dir)
    device = check_device(args.device)
    target = Path(args.save_path) if args.save_path is not None else _default_folder(args.model)
    checkpoint.check_target(target, args.overwrite, reads=[args.model, args.dataset, args.data_dir])
    loaded = checkpoint.load_pipeline(args.model, device=device)
    for note in loaded.notes:
        out.note(note)
    if loaded.layout == "free":
        raise UserError(f"{args.model}: is pruned in the free layout already; study its original instead")
    out.note(f"model: {loaded.name}; device: {device}")
    dtype = DTYPES[_DTYPE_NAMES[args.dtype or "fp32"]]
    batch_size = args.batch_size or usual_batch_size(device, *image_shape(loaded.unet)[1:])
    images = data.load_images(
        args.dataset, n=min(args.num_samples, 512) if args.dataset == "self" else args.num_samples, unet=loaded.unet,
        scheduler=loaded.scheduler, bundled=loaded.source == "bundled", data_dir=args.data_dir, seed=args.seed,
        batch_size=batch_size, device=device, dtype=dtype, progress=out.progress,
    )  # fmt: skip
    name = "the model's own samples" if args.dataset == "self" else Path(args.dataset).name
    report, stats = study.study(
        loaded.unet, loaded.scheduler, images, n=args.num_samples, ratio=args.ratio, mode=args.timesteps,
        batch_size=batch_size, seed=args.seed, device=device, dtype=dtype, dataset=name, name=loaded.name,
        progress=out.progress,
    )  # fmt: skip
    def instead(path: Path) -> None:
        nonlocal target
        out.note(f"{target} was taken by something else meanwhile; the result is in {path}")
        target = path

    with checkpoint.atomic_folder(target, args.overwrite, instead=instead) as folder:
        (folder / "analysis.json").write_text(json.dumps(finite(report), indent=1) + "\n", encoding="utf-8")
        for file, text in study.tables(report):
            (folder / file).write_text(text, encoding="utf-8")
        study_figures.save_figures(report, folder)
        stats.save(folder / "activation_stats.safetensors")
        run_config.write(folder, "analyze", vars(args))
        files = sorted(p.name for p in folder.iterdir())
    out.json({**report, "path": str(target)})
    out.result(summary(report) + f"\n\nwritten to {target}: {', '.join(files)}")
    return 0


def summary(report: dict[str, Any]) -> str:
    """The table of the whole network and the verdict."""
    values, norms = report["activations"]["global"], report["channel_norms"]["global"]
    rows = [["number", f"{values['values']:,}", f"{norms['channels']:,}"]]
    for key, label in (("mean", "mean"), ("deviation", "deviation"), ("skewness", "skewness"), ("kurtosis", "excess kurtosis")):
        rows.append([label, f"{values[key]:.4g}", f"{norms[key]:.4g}"])
    for k in (2, 3):
        rows.append([f"beyond {k} sigma", *(f"{part[f'beyond_{k}_sigma']:.2%}" for part in (values, norms))])
    head = ("all layers together", "activations", "channel norms")
    return "\n".join(["", table(head, rows), "", *report["verdict"]["lines"]])


def _default_folder(model: str | None) -> Path:
    return Path("run") / (re.sub(r"[^\w.+-]", "_", f"{model_name(model)}-analysis").lstrip(".") or "analysis")
