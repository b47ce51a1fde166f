"""Export the network as torch.export program, AOTInductor package or ONNX, checked against eager."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from wanda_fast.cli.parser import Parser, model_name, whole
from wanda_fast.cli.terminal import Terminal, seconds, si, table

EXAMPLES = """\
wanda-fast export --model run/ddpm-cifar10-small-wanda-diff-0.3 --save_path run/exported
wanda-fast export --formats pt2 aoti --device cuda --dtype bf16 --batch_size 64
wanda-fast export --formats onnx

Each form is opened again and compared with the network before the folder appears. The files open where neither
wanda_fast nor diffusers is installed: torch.export.load, torch._inductor.aoti_load_package, onnxruntime."""


def add_arguments(parser: Parser) -> None:
    """All options of the subcommand, in groups."""
    group = parser.add_argument_group("model and result")
    group.add_argument("--model_path", "--model", dest="model", metavar="FOLDER|HUB_ID",
        help="checkpoint, dense or pruned in either layout (default: the bundled ddpm-cifar10-small)")  # fmt: skip
    group.add_argument("--save_path", "--out", dest="save_path", metavar="FOLDER",
        help="folder to write, in one step at the end (default: run/<model>-exported)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace a folder that exists and is not empty")
    group.add_argument("--formats", nargs="+", choices=("pt2", "aoti", "onnx"), default=["pt2", "onnx"], metavar="FORM",
        help="pt2: torch.export program; aoti: AOTInductor package, compiled for this kind of machine; onnx "
        "(default: pt2 onnx)")  # fmt: skip
    group = parser.add_argument_group("how")
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "float32", "bfloat16", "float16"), default=None,
        help="of the weights and the input; ONNX is fp32 only (default: fp32)")  # fmt: skip
    group.add_argument("--batch_size", type=whole(1), default=8, metavar="N",
        help="images of a pass when speed is measured; the files take any number (default: 8)")  # fmt: skip
    group.add_argument("--repeats", type=whole(1), default=5, metavar="N", help="timed passes (default: 5)")
    group.add_argument("--json", action="store_true", help="print the report as one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="no notes, only the result")
    group.add_argument("-h", "--help", action="help", help="show this text")


def run(args: argparse.Namespace, out: Terminal) -> int:
    """Export as asked, print the table."""
    target = Path(args.save_path) if args.save_path is not None else default_folder(args.model)

    from wanda_fast.export import export

    report = export(
        args.model, save_path=target, forms=args.formats, overwrite=args.overwrite, device=args.device, dtype=args.dtype,
        batch_size=args.batch_size, repeats=args.repeats, log=out.note,
    )  # fmt: skip
    out.json(report)
    rows = []
    for entry in report["forms"].values():
        worst = max(entry["differences"].values())
        rows.append([entry["file"], si(entry["bytes"], "B"), f"{worst:.1e}", entry["runs_on"], seconds(entry["seconds"]),
                     f"{entry['eager_seconds'] / entry['seconds']:.2f} x"])  # fmt: skip
    head = ["file", "size", "difference", "runs on", f"{report['timed_batch']} images", "speed of eager"]
    out.result("\n".join([
        "", table(head, rows), f"difference: largest, as a share of the largest output ({report['tolerance']:g} is let through), "
        f"for 1, 2 and 5 images; batches of 1 to {report['largest_batch']}", f"times on {report['device']}",
        f"written to {report['path']}",
    ]))  # fmt: skip
    return 0


def default_folder(model: str | None) -> Path:
    """run/<model>-exported."""
    return Path("run") / (re.sub(r"[^\w.+-]", "_", model_name(model)).lstrip(".") + "-exported")
