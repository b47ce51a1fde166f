"""Draw images from a checkpoint, dense or pruned, into a folder or one picture."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from wanda_fast.cli.parser import Parser, add_batch_size, whole
from wanda_fast.cli.terminal import Terminal, seconds
from wanda_fast.errors import UserError

EXAMPLES = """\
wanda-fast sample --num_samples 64 --grid run/samples.png                          one picture of the bundled model
wanda-fast sample --model run/ddpm-cifar10-small-wanda-diff-0.3 --num_samples 5000 --save_path run/samples
wanda-fast sample --model FOLDER --num_samples 50000 --batch_size 512 --dtype bf16 --compile --save_path run/samples

Image i depends on the seed and on i alone. The same command goes on where an earlier one stopped, and draws exactly the
images that are missing. Give the same --seed for two networks and image i of both starts from the same noise."""


def add_arguments(parser: Parser) -> None:
    """All options of the subcommand, in groups."""
    group = parser.add_argument_group("what is drawn")
    group.add_argument("--model_path", "--model", dest="model", metavar="FOLDER|HUB_ID",
        help="checkpoint, dense or pruned in either layout (default: the bundled ddpm-cifar10-small)")  # fmt: skip
    group.add_argument("--num_samples", "-n", type=whole(1), default=64, metavar="N", help="images (default: 64)")
    group.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim",
        help="ddim with eta 0, or ancestral ddpm (default: ddim)")  # fmt: skip
    group.add_argument("--num_inference_steps", type=whole(1), default=50, metavar="N",
        help="steps from noise to image, with 'leading' spacing (default: 50)")  # fmt: skip
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of everything random (default: 0)")
    group = parser.add_argument_group("where to")
    place = group.add_mutually_exclusive_group()
    place.add_argument("--save_path", "--out", dest="save_path", metavar="FOLDER",
        help="folder for 000000.png, 000001.png, ... (default: run/<model>-samples)")  # fmt: skip
    place.add_argument("--grid", metavar="FILE.png", help="one picture of all images instead of a folder")
    group.add_argument("--overwrite", action="store_true", help="replace the picture of --grid if it exists")
    group = parser.add_argument_group("how")
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "float32", "bfloat16", "float16"), default=None,
        help="number format of the forward passes (default: fp32)")  # fmt: skip
    add_batch_size(group, "; on a CPU the images do not depend on it")
    group.add_argument("--compile", action="store_true", help="torch.compile; pays from some thousand images on")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress bars and no notes, only the result")
    group.add_argument("-h", "--help", action="help", help="show this text")


def run(args: argparse.Namespace, out: Terminal) -> int:
    """Draw as asked, print how fast it went."""
    if args.grid is not None and Path(args.grid).suffix.lower() != ".png":
        raise UserError(f"--grid writes a .png, not {args.grid}")
    if args.grid is None and args.overwrite:
        raise UserError("--overwrite is for --grid; a folder of samples is only ever added to")

    import torch

    from wanda_fast import checkpoint, distributed, run_config, sample_folder, sampling
    from wanda_fast.pruning import _DTYPE_NAMES, DTYPES, check_device
    from wanda_fast.smaller_batches import usual_batch_size

    together = distributed.ranks()
    device = check_device(args.device)
    name = _DTYPE_NAMES[args.dtype or "fp32"]
    dtype = DTYPES[name]
    grid = None if args.grid is None else checkpoint.check_file(args.grid, args.overwrite)
    loaded = checkpoint.load_pipeline(args.model, dtype=torch.float32, device=device)
    for note in loaded.notes:
        out.note(note)
    unet, scheduler = loaded.unet, loaded.scheduler
    sampling.check_network(unet, scheduler)
    sampling.make_stepper(scheduler, args.num_inference_steps, args.sampler)  # refuses too many steps
    if sampling.image_shape(unet)[0] not in (1, 3):
        raise UserError(f"{loaded.name}: draws {sampling.image_shape(unet)[0]} channels; a PNG has 1 or 3")
    args.batch_size = args.batch_size or usual_batch_size(device, *sampling.image_shape(unet)[1:])
    unet.requires_grad_(False)
    if args.compile:
        unet.compile(dynamic=False)  # in place: the network stays what it is for all who look at its class
    how: dict[str, Any] = {"steps": args.num_inference_steps, "kind": args.sampler, "seed": args.seed}
    out.note(f"model: {loaded.name} ({loaded.source}, layout {loaded.layout}); {args.sampler}, {args.num_inference_steps} steps; "
             f"{device}, {name}{', compiled' if args.compile else ''}")  # fmt: skip
    options = {"model": None if args.model is None else str(args.model), **{k: v for k, v in vars(args).items() if k != "model"}}
    kept = 0
    if grid is not None:
        if together.size > 1:
            raise UserError("one picture is drawn by one process: several draw a folder (--save_path)")
        result = _grid(args, grid, unet, scheduler, dtype, how, out)
    else:
        target = Path(args.save_path or "run/" + re.sub(r"[^\w.+-]", "_", loaded.name) + "-samples")
        wanted = sample_folder.settings(unet, scheduler, **how, dtype=name, device=device.type, compiled=args.compile)
        if together.main:
            folder, missing = sample_folder.open_folder(target, wanted, args.num_samples)
        together.wait()
        if not together.main:
            folder, missing = sample_folder.open_folder(target, wanted, args.num_samples)
        together.wait()  # all have looked before the first image comes
        kept = args.num_samples - len(missing)
        if kept:
            out.note(f"{target}: {kept} of {args.num_samples} images are there, {len(missing)} are to be drawn")
        if together.main:
            sample_folder._write(folder / run_config.NAME, run_config.text("sample", options).encode())
        first, last = together.part(len(missing), sampling.CPU_PASS)
        missing = missing[first:last]
        result = sample_folder.fill(
            folder, missing, unet, scheduler, **how, batch_size=args.batch_size, dtype=dtype, even=args.compile,
            progress=out.progress, note=out.note, kept=kept,
        )  # fmt: skip
    together.wait()
    if together.size > 1:  # the slowest rank's time, all ranks' images
        figures = torch.zeros(together.size, 2, dtype=torch.float64)
        figures[together.rank] = torch.tensor([float(result.drawn), result.seconds])
        together.add([figures])
        result = sample_folder.Drawn(int(figures[:, 0].sum()), kept, float(figures[:, 1].max()), None)
    if not out.silent:
        _report(args, out, result, grid or target, str(device), name)
    return 0


def _grid(args: argparse.Namespace, grid: Path, unet: Any, scheduler: Any, dtype: Any, how: dict[str, Any], out: Terminal) -> Any:
    import time

    import torch

    from wanda_fast import checkpoint, sampling
    from wanda_fast.sample_folder import Drawn

    with checkpoint.atomic_file(grid, args.overwrite) as partial:
        begin = time.perf_counter()
        parts = sampling.draw(unet, scheduler, range(args.num_samples), **how, batch_size=args.batch_size, dtype=dtype,
                              even=args.compile, progress=out.progress, note=out.note)  # fmt: skip
        images = torch.cat([part for _, part in parts])
        took = time.perf_counter() - begin
        sampling.save_grid(images, partial)
    return Drawn(args.num_samples, 0, took, None)


def _report(args: argparse.Namespace, out: Terminal, result: Any, target: Path, device: str, dtype: str) -> None:
    rate = result.drawn / result.seconds if result.drawn else None
    out.json({
        "path": str(target), "images": args.num_samples, "drawn": result.drawn, "kept": result.kept,
        "seconds": round(result.seconds, 4), "images_per_second": rate, "images_per_second_after_the_first_batch": result.steady,
        "device": device, "dtype": dtype, "compiled": args.compile, "sampler": args.sampler, "steps": args.num_inference_steps,
        "seed": args.seed,
    })  # fmt: skip
    if rate is None:
        out.result(f"all {args.num_samples} images were there: {target}")
        return
    steady = f" ({result.steady:.3g} after the first batch)" if result.steady else ""
    images = f"{result.drawn} image{'s' * (result.drawn != 1)}"
    out.result(f"{images} in {seconds(result.seconds)}: {rate:.3g} images per second{steady}, {device}, {dtype}\n"
               f"written to {target}")  # fmt: skip
