"""Measure a checkpoint, alone or beside the network it came from: images, errors, speed, size."""

from __future__ import annotations

import argparse
from typing import Any

from wanda_fast.cli.parser import Parser, add_batch_size, whole
from wanda_fast.cli.terminal import Terminal, change, seconds, si, table
from wanda_fast.errors import UserError

EXAMPLES = """\
wanda-fast evaluate run/ddpm-cifar10-small-wanda-diff-0.3 --reference bundled            likeness to the dense model
wanda-fast evaluate FOLDER --reference DENSE_FOLDER --real IMAGES --features efficientnet-lite0 --num_samples 5000
wanda-fast evaluate FOLDER --real STATS.npz --num_samples 5000                      distance to real images alone

Images of both networks come from the same noise, image by image: DDIM, eta 0, "leading" timestep spacing. A Frechet distance
is measured in the features that --features names; figures in other features, or of other counts of images, do not compare."""


def add_arguments(parser: Parser) -> None:
    """All options of the subcommand, in groups."""
    group = parser.add_argument_group("what is measured")
    group.add_argument("model", nargs="?", metavar="FOLDER|HUB_ID",
        help="checkpoint to measure (default: the bundled ddpm-cifar10-small)")  # fmt: skip
    group.add_argument("--model_path", "--model", dest="model_path", metavar="FOLDER|HUB_ID", help="the same as a flag")
    group.add_argument("--reference", metavar="FOLDER|HUB_ID",
        help="network to compare with, as a rule the dense one; 'bundled' for the bundled model (default: none)")  # fmt: skip
    group.add_argument("--real", metavar="IMAGES|STATS.npz",
        help="real images for the Frechet distance: a folder, cifar10 (with --data_dir), or a file of wanda-fast fid "
        "--save-stats (default: none)")  # fmt: skip
    group.add_argument("--data_dir", metavar="FOLDER", help="where CIFAR-10 lies (binary version or images)")
    group.add_argument("--features", metavar="NAME|FILE",
        help="inception (clean-fid), efficientnet-lite0, or a TorchScript file that you trust (default: inception where --real "
        "is given, or what its statistics were made with)")  # fmt: skip
    group = parser.add_argument_group("how")
    group.add_argument("--num_samples", type=whole(0), default=1000, metavar="N",
        help="images drawn from each network, 0 for none (default: 1000)")  # fmt: skip
    group.add_argument("--num_inference_steps", type=whole(1), default=50, metavar="N", help="DDIM steps (default: 50)")
    group.add_argument("--noise_images", type=whole(0), default=1000, metavar="N",
        help="noised images for the error over the timesteps and the denoising loss, 0 for none (default: 1000)")  # fmt: skip
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="measure speed under torch.compile too, which takes minutes on a CPU (default: on a GPU)")  # fmt: skip
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "float32", "bfloat16", "float16"), default=None,
        help="number format of sampling and errors, for both networks (default: fp32)")  # fmt: skip
    add_batch_size(group)
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the noise (default: 0)")
    group = parser.add_argument_group("result")
    group.add_argument("--save_path", "--out", dest="save_path", metavar="FOLDER",
        help="folder for evaluation.json and evaluation.png (default: print only)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace a folder that exists and is not empty")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress bars and no notes, only the result")
    group.add_argument("-h", "--help", action="help", help="show this text")


def run(args: argparse.Namespace, out: Terminal) -> int:
    """Measure as asked, print the table."""
    if args.model is not None and args.model_path is not None:
        raise UserError("give the model once, as the argument or with --model_path")
    if args.overwrite and args.save_path is None:
        raise UserError("--overwrite is for --save_path; without it nothing is written")
    if args.features is not None and (args.num_samples == 0 or (args.real is None and args.reference is None)):
        raise UserError("--features measure images: give --real or --reference, and --num_samples above 0")
    from wanda_fast.data import DATASETS

    if args.data_dir is not None and args.real not in DATASETS:
        raise UserError(f"--data_dir is where {', '.join(DATASETS)} lies, for --real {next(iter(DATASETS))}")
    from wanda_fast.evaluation import evaluate

    result = evaluate(
        args.model if args.model is not None else args.model_path,
        args.reference,
        real=args.real,
        features=args.features,
        n=args.num_samples,
        steps=args.num_inference_steps,
        noise_images=args.noise_images,
        seed=args.seed,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        compiled=args.compile,
        data_dir=args.data_dir,
        save_path=args.save_path,
        overwrite=args.overwrite,
        progress=out.progress,
        log=out.note,
    )
    out.json(result)
    out.result(report(result))
    if args.save_path is not None:
        out.result(f"written to {result['path']}")
    return 0


def report(result: dict[str, Any]) -> str:
    """The tables of one evaluation."""
    model, other = result["model"], result["reference"]
    pair = other is not None
    head = ("", other["name"] if pair else "", model["name"], "change") if pair else ("", model["name"])

    def row(name: str, mine: str, reference: str = "", note: str = "") -> list[str]:
        return [name, reference, mine, note] if pair else [name, mine]

    rows = []
    for key, name, unit in (("params", "parameters", ""), ("macs", "MACs, one image", "")):
        note = change(other[key], model[key]) if pair else ""
        rows.append(row(name, si(model[key], unit), si(other[key], unit) if pair else "", note))
    if "fd" in result:
        fd = result["fd"]
        rows.append(row(f"Frechet distance, {result['features']['features']}", f"{fd['model']:.2f}",
            f"{fd['reference']:.2f}" if pair else "", f"to {fd['real_images']} of {fd['real']}"))  # fmt: skip
    if "ssim" in result:
        rows.append(row("SSIM of same-noise images", "-" if result["ssim"] is None else f"{result['ssim']:.4f}", "1"))
        equal = result["psnr"] is None or result["psnr"] > 1e3
        rows.append(row("PSNR of same-noise images", "equal" if equal else f"{result['psnr']:.2f} dB"))
    if "feature_distance" in result:
        rows.append(row(f"feature distance, {result['features']['features']}", f"{result['feature_distance']['value']:.4f}", "0",
            "not LPIPS"))  # fmt: skip
    if "noise" in result:
        whole_ = result["noise"]["all"]
        if pair:
            rows.append(row("squared error of the predicted noise", f"{whole_['mse']:.4g}", "0", f"{whole_['relative']:.2%} of its energy"))
        rows.append(row("denoising loss, held-out noise", f"{whole_['loss']:.5f}",
            f"{whole_['loss_reference']:.5f}" if pair else "", change(whole_["loss_reference"], whole_["loss"]) if pair else ""))  # fmt: skip
    for speed in result["speed"]:
        name = f"images per second, {speed['mode']}"
        rows.append(row(name, f"{speed['images_per_s']:.3g}", f"{speed['images_per_s_reference']:.3g}" if pair else "",
            f"{speed['times_as_fast']:.2f} x as fast" if pair else ""))  # fmt: skip
        if speed["peak_bytes"] is not None:
            rows.append(row("peak memory of a pass", si(speed["peak_bytes"], "B"),
                si(speed["peak_bytes_reference"], "B") if pair else "",
                change(speed["peak_bytes_reference"], speed["peak_bytes"]) if pair else ""))  # fmt: skip
    lines = ["", table(head, rows), ""]
    if "noise" in result:
        columns = ["mse", "relative", "loss", "loss_reference"] if pair else ["loss"]
        names = {"mse": "difference", "relative": "of energy", "loss": "loss", "loss_reference": "loss of reference"}
        body = [
            [f"{e['from']}-{e['to'] - 1}", str(e["samples"]), *(f"{e[c]:.2%}" if c == "relative" else f"{e[c]:.4g}" for c in columns)]
            for e in result["noise"]["over_t"]
        ]
        lines += [table(("timesteps", "images", *(names[c] for c in columns)), body), f"noised images: {result['noise']['images']}", ""]
    how = result["sampling"]
    dtype = how["dtype"] + (" (TF32 convolutions)" if how["tf32_convolutions"] else "")
    lines.append(f"samples: {how['images']} per network, {how['sampler']}, {how['steps']} steps, {how['spacing']}; seed {how['seed']}, {dtype}")
    batch = result["speed"][0]["batch_size"]
    lines.append(f"speed: {batch} images per pass, {how['steps']} passes an image; on {result['device']}; {seconds(result['seconds'])} in all")
    if "features" in result:
        lines.append(f"features: {result['features']['features']}; {result['features']['resize']}")
    return "\n".join(lines)
