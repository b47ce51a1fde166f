"""Put two or more checkpoints beside each other: one HTML page and one PNG."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from wanda_fast.cli.parser import Parser, whole
from wanda_fast.cli.terminal import Terminal, table
from wanda_fast.errors import UserError

EXAMPLES = """\
wanda-fast compare bundled run/ddpm-cifar10-small-wanda-diff-0.3            the bundled model and what became of it
wanda-fast compare DENSE PRUNED FINETUNED --save_path report.html --num_samples 32

Models are folders or hub ids, dense or pruned in either layout; the word `bundled` is the model that comes with the
package. The first is what the others are compared with. The page holds everything it shows and needs no network."""


def add_arguments(parser: Parser) -> None:
    """All options of the subcommand."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="two or more folders, hub ids, or the word bundled")
    group = parser.add_argument_group("result")
    group.add_argument("--save_path", "--out", dest="save_path", metavar="FILE.html",
        help="page to write; the picture gets the same name with .png (default: run/compare-<A>-<B>.html)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace files that exist")

    group = parser.add_argument_group("what is measured")
    group.add_argument("--num_samples", type=whole(1), default=16, metavar="N",
        help="images of each model, from the same noise (default: 16)")  # fmt: skip
    group.add_argument("--num_inference_steps", type=whole(1), default=50, metavar="N", help="DDIM steps (default: 50)")
    group.add_argument("--noise_images", type=whole(1), default=200, metavar="N",
        help="noised images for the error of the predicted noise over t (default: 200)")  # fmt: skip

    group = parser.add_argument_group("running it")
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "float32", "bfloat16", "float16"), default=None,
        help="number format of sampling, errors and the timed passes (default: fp32)")  # fmt: skip
    group.add_argument("--batch_size", type=whole(1), default=16, metavar="N",
        help="images per pass, of the timed passes too (default: 16)")  # fmt: skip
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of everything random (default: 0)")
    group.add_argument("--json", action="store_true", help="print the report as one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress bars and no notes, only the result")
    group.add_argument("-h", "--help", action="help", help="show this text")


def run(args: argparse.Namespace, out: Terminal) -> int:
    """Compare as asked, write page and picture, print the table."""
    from wanda_fast import checkpoint, compare
    from wanda_fast.cli import compare_page
    from wanda_fast.pruning import _DTYPE_NAMES, DTYPES

    if len(args.models) < 2:
        raise UserError("compare needs at least two models")
    page = Path(args.save_path) if args.save_path is not None else _default_page(args.models)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{page}: the page's name must end in .html")
    picture = page.with_suffix(".png")
    for file in (page, picture):
        checkpoint.check_file(file, args.overwrite)
    report, images = compare.compare(
        args.models, n=args.num_samples, steps=args.num_inference_steps, noise_images=args.noise_images, seed=args.seed,
        batch_size=args.batch_size, device=args.device, dtype=DTYPES[_DTYPE_NAMES[args.dtype or "fp32"]],
        progress=out.progress,
    )  # fmt: skip
    with checkpoint.atomic_file(page, args.overwrite) as file:
        file.write_text(compare_page.page(report, images), encoding="utf-8")
    with checkpoint.atomic_file(picture, args.overwrite) as file:
        compare_page.save_picture(report, images, file)
    out.json({**report, "path": str(page), "picture": str(picture)})
    head = ["", *(f"{m['label']}: {m['name']}" for m in report["models"])]
    rows = [[what, *(f"{v} ({c})" if c else v for v, c in zip(values, changes, strict=True))]
            for what, values, changes in compare_page.rows(report)]  # fmt: skip
    out.result("\n".join(["", table(head, rows), f"on {report['device']}, {report['dtype']}", "", f"written to {page} and {picture}"]))
    return 0


def _default_page(models: Sequence[str]) -> Path:
    names = []
    for model in models:
        path = Path(model).expanduser().resolve()
        names.append(path.parent.name if path.name == "unet" else path.name)
    name = re.sub(r"[^\w.+-]", "_", "-".join(names))[:150]
    return Path("run") / f"compare-{name}.html"
