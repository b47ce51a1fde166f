"""Recovery training: noise loss and distillation from the dense network; or training from nothing."""

from __future__ import annotations

import argparse
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanda_fast.cli.parser import Parser, model_name, whole
from wanda_fast.cli.terminal import Terminal, si, table
from wanda_fast.errors import UserError

EXAMPLES = """\
wanda-fast finetune --model run/ddpm-cifar10-small-wanda-diff-0.3 --teacher bundled --steps 200      no data needed
wanda-fast finetune --model PRUNED --teacher DENSE --dataset cifar10 --data_dir DATA --dtype bf16 --compile
wanda-fast finetune --from_scratch --model CONFIG_FOLDER --dataset IMAGES --steps 10000 --lr 2e-4
wanda-fast finetune ... --resume                                                      go on after a stop

Pruning needs no training; this is for what is left to gain. While it runs, FOLDER.train holds checkpoints, log and grids.
Ctrl-C writes a checkpoint. A resumed run ends with the weights of an unbroken one (bit for bit on a CPU)."""


def number(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0; got {text}")
    return value


def add_arguments(parser: Parser) -> None:
    """All options of the subcommand, in groups; defaults are those of `FinetuneOptions`."""
    group = parser.add_argument_group("model and result")
    group.add_argument("--model_path", "--model", dest="model", metavar="FOLDER|HUB_ID",
        help="network to train, pruned or dense, either layout (default: the bundled ddpm-cifar10-small)")  # fmt: skip
    group.add_argument("--save_path", "--out", dest="save_path", metavar="FOLDER",
        help="folder to write, in one step at the end (default: run/<model>-finetuned)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace that folder and start anew")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    group.add_argument("--from_scratch", action="store_true",
        help="take the architecture of --model alone (its config.json is enough), with fresh weights")  # fmt: skip
    group.add_argument("--save_dtype", choices=("fp32", "bf16", "fp16"), default=None,
        help="of the saved weights (default: that of the model; fp32 with --from_scratch)")  # fmt: skip

    group = parser.add_argument_group("images")
    group.add_argument("--dataset", default="self", metavar="self|cifar10|FOLDER",
        help="training images: samples of the teacher (or of the model), CIFAR-10 from --data_dir, or a folder (default: self)")  # fmt: skip
    group.add_argument("--data_dir", metavar="FOLDER", help="where CIFAR-10 lies (binary version or images)")
    group.add_argument("--num_images", type=whole(1), default=None, metavar="N", help="images used (default: all; 1024 for self)")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of them (default: True)")

    group = parser.add_argument_group("loss")
    group.add_argument("--teacher", metavar="FOLDER|HUB_ID", help="the dense network; 'bundled' for the bundled model")
    group.add_argument("--noise_weight", type=number, default=1.0, metavar="W",
        help="of the squared error of the predicted noise (default: 1.0)")  # fmt: skip
    group.add_argument("--distill_weight", type=number, default=None, metavar="W",
        help="of the squared difference from the teacher's prediction (default: 1 with a teacher)")  # fmt: skip
    group.add_argument("--feature_weight", type=number, default=0.0, metavar="W",
        help="of the difference between the attention maps of all blocks (default: 0.0)")  # fmt: skip

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=whole(1), default=2000, metavar="N", help="of the optimiser (default: 2000)")
    group.add_argument("--batch_size", type=whole(1), default=128, metavar="N", help="images per step (default: 128)")
    group.add_argument("--accumulate", type=whole(1), default=1, metavar="N",
        help="parts of a batch that pass one after the other, for small memories (default: 1)")  # fmt: skip
    group.add_argument("--lr", type=number, default=1e-4, metavar="RATE", help="learning rate of AdamW (default: 0.0001)")
    group.add_argument("--warmup", type=whole(0), default=100, metavar="N", help="steps of linear warm-up (default: 100)")
    group.add_argument("--lr_schedule", choices=("cosine", "constant"), default="cosine",
        help="cosine ends at zero with the last step (default: cosine)")  # fmt: skip
    group.add_argument("--weight_decay", type=number, default=0.0, metavar="W", help="of AdamW (default: 0.0)")
    group.add_argument("--grad_clip", type=number, default=1.0, metavar="NORM", help="largest gradient, 0 for any (default: 1.0)")
    group.add_argument("--ema_decay", type=number, default=0.999, metavar="D",
        help="of the moving average of the weights, which is what is saved; 0 for none (default: 0.999)")  # fmt: skip
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of everything random (default: 0)")
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "float32", "bfloat16", "float16"), default=None,
        help="of the passes; the weights are trained in float32 (default: fp32)")  # fmt: skip
    group.add_argument("--compile", action="store_true", help="torch.compile; about a minute at the start, then faster")

    group = parser.add_argument_group("checkpoints and validation")
    group.add_argument("--save_every", type=whole(0), default=500, metavar="N", help="steps, 0 for never (default: 500)")
    group.add_argument("--validate_every", type=whole(0), default=500, metavar="N",
        help="steps, 0 for the first and the last only (default: 500)")  # fmt: skip
    group.add_argument("--validation_images", type=whole(0), default=256, metavar="N",
        help="images held out for the noise error, at most a tenth of all (default: 256)")  # fmt: skip
    group.add_argument("--num_samples", type=whole(0), default=16, metavar="N", help="images of the grid (default: 16)")
    group.add_argument("--num_inference_steps", type=whole(1), default=50, metavar="N", help="its DDIM steps (default: 50)")
    group.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too")
    group.add_argument("--json", action="store_true", help="print the report as one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress bars and no notes, only the result")
    group.add_argument("-h", "--help", action="help", help="show this text")


def run(args: argparse.Namespace, out: Terminal) -> int:
    """Train as asked, print the result."""
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with an earlier training, --overwrite throws it away; give one of them")
    target = Path(args.save_path) if args.save_path is not None else default_folder(args.model)
    other = ("model", "save_path", "overwrite", "resume", "json", "quiet", "help")
    options = {name: value for name, value in vars(args).items() if name not in other}

    from wanda_fast.finetune import finetune

    received: list[int] = []
    try:
        with _flag(received):
            result = finetune(
                args.model, save_path=target, overwrite=args.overwrite, resume=args.resume, progress=out.progress,
                log=out.note, stop=lambda: bool(received), **options,
            )  # fmt: skip
    except KeyboardInterrupt:
        if received and received[0] == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)  # with the program's own handler again: says so, and exits with its code
        raise
    out.json({**result.report, "path": str(result.path)})
    out.result(text(result.report, result.path))
    return 0


def default_folder(model: str | None) -> Path:
    """run/<model>-finetuned."""
    return Path("run") / (re.sub(r"[^\w.+-]", "_", model_name(model)).lstrip(".") + "-finetuned")


@contextmanager
def _flag(received: list[int]) -> Iterator[None]:
    """The first SIGINT or SIGTERM only asks for a stop at the end of a step; the second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def text(report: dict[str, Any], path: Path) -> str:
    """The validations as a table, then speed and place."""
    rows = [
        [str(v["step"]), f"{v['noise_error']:.5f}" if "noise_error" in v else "",
         f"{v['teacher_error_relative']:.3%}" if "teacher_error_relative" in v else ""]
        for v in report["validation"]
    ]  # fmt: skip
    rate = report["images_per_second"]
    speed = "" if rate is None else f" at {rate:.4g} images per second"
    lines = ["", table(["step", "noise error", "difference from the teacher"], rows), "",
             f"{report['steps']} steps of {report['settings']['batch_size']} images{speed}; {si(report['params'])} parameters, "
             f"{report['device']}, {report['settings']['dtype'] or 'fp32'}", f"written to {path}"]  # fmt: skip
    return "\n".join(lines)
