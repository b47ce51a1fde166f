"""Prune a DDPM by whole channels and write a folder that diffusers opens."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_fast.cli.parser import Parser, add_batch_size, model_name, share, whole
from wanda_fast.cli.terminal import Terminal, change, seconds, si, table
from wanda_fast.errors import UserError
from wanda_fast.publish import PublishError, check_repo_id, push

if TYPE_CHECKING:
    from wanda_fast.pruning import PruneResult

EXAMPLES = """\
python prune.py --ratio 0.3 --pruner wanda-diff              prune the bundled model into run/...
python prune.py --ratio 0.3 --dry_run                        show the plan and the sizes, write nothing
python prune.py --target_macs 56%                            a budget of multiply-accumulates instead of a ratio
python prune.py --model FOLDER_OR_HUB_ID --dataset FOLDER_OF_IMAGES --target_params 20M

`wanda-fast prune ...` and `python -m wanda_fast prune ...` are the same program. Every flag can be written with
underscores or dashes. One-shot: channels are scored by S = |W| * ||X||_2 over diffusion timesteps, removed for good,
and the layers that remain are refitted in closed form; nothing is trained."""

# Flags whose name is not that of the option of `prune`.
_OPTION = {
    "pruning_ratio": "ratio",
    "wanda_calib_steps": "calib_steps",
    "wanda_time_strategy": "time_strategy",
    "wanda_target_steps": "target_steps",
    "wanda_activation_strategy": "activation_strategy",
}
# Arguments that are no fields of PruneOptions.
_OTHER = ("model", "save_path", "overwrite", "push_to_hub", "dry_run", "analyze", "save_analysis", "json", "quiet", "help")


def add_arguments(parser: Parser) -> None:
    """All options of the subcommand, in groups; defaults are those of `PruneOptions`."""
    group = parser.add_argument_group("model and result")
    group.add_argument("--model_path", "--model", dest="model", metavar="FOLDER|HUB_ID",
        help="diffusers folder or hub id with a UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel or "
        "PixArtTransformer2DModel (default: the bundled ddpm-cifar10-small)")  # fmt: skip
    group.add_argument("--save_path", "--out", dest="save_path", metavar="FOLDER",
        help="folder to write, in one step at the end (default: run/<model>-<pruner>-<ratio>)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace a folder that exists and is not empty")
    group.add_argument("--push_to_hub", metavar="OWNER/NAME",
        help="upload the folder, model card included, to this repository of the Hugging Face hub (token: hf auth login, or "
        "HF_TOKEN); where that fails the folder is kept (default: no upload)")  # fmt: skip
    group.add_argument("--dry_run", action="store_true", help="print the plan and the sizes, write nothing")
    group.add_argument("--layout", choices=("stock", "free"), default="stock",
        help="stock: opens with plain diffusers; free: a width for every slot, opens with wanda_fast.load_pruned "
        "(default: stock)")  # fmt: skip

    group = parser.add_argument_group("how much to remove (one of)")
    how_much = group.add_mutually_exclusive_group()
    how_much.add_argument("--pruning_ratio", "--ratio", dest="ratio", type=share, metavar="R", default=None,
        help="share of all channels that is removed, 0 <= R < 1 (default: 0.3); with the split 'sensitivity' at least "
        "this share of the MACs goes as well")  # fmt: skip
    how_much.add_argument("--target_macs", metavar="N|P%",
        help="budget of multiply-accumulates of one forward pass, such as 3.4G, or a share of the dense network's, "
        "such as 56%%")  # fmt: skip
    how_much.add_argument("--target_params", metavar="N|P%", help="budget of parameters, such as 20M or 56%%")
    how_much.add_argument("--target_latency", metavar="0.6x",
        help="budget of measured time: share of the dense network's on this device and batch; widths come from a table of "
        "layer times (default: no such budget)")  # fmt: skip
    how_much.add_argument("--plan", metavar="FILE", help="replay the plan in a pruning.json; nothing is scored")

    group = parser.add_argument_group("what to remove")
    group.add_argument("--pruner", metavar="NAME",
        help="criterion: {pruners} (default: lstsq-residual in the stock layout with its repair, wanda-diff elsewhere)")  # fmt: skip
    group.add_argument("--thr", type=float, default=0.05, metavar="R",
        help="of diff-pruning: timesteps count whose loss is over this share of the largest one, 0 <= R < 1 "
        "(default: 0.05)")  # fmt: skip
    group.add_argument("--split", choices=("uniform", "sensitivity"), default="sensitivity",
        help="sensitivity: estimates from a few images which levels can spare channels; uniform: every level is cut "
        "alike (default: sensitivity)")  # fmt: skip
    group.add_argument("--trials", type=whole(0), default=0, metavar="N",
        help="with the split 'sensitivity': cut, repair and sample up to N allocations of widths and keep the one whose images are "
        "nearest to the dense network's; 0 takes the estimate as it is (default: 0)")  # fmt: skip
    group.add_argument("--combine", choices=("both", "producers", "consumers"), default="both",
        help="layers that judge a channel: those that write it, those that read it, or both (default: both)")  # fmt: skip
    group.add_argument("--norm_policy", choices=("balanced", "free", "groups"), default="free",
        help="what happens to GroupNorm: equally many channels leave every block (balanced), the best channels stay "
        "wherever they are (free), or whole groups leave (default: free)")  # fmt: skip
    group.add_argument("--align", type=whole(1), default=16, metavar="N",
        help="widths are multiples of N channels, where the norms leave a choice (default: 16)")  # fmt: skip
    group.add_argument("--min_width", type=whole(1), default=8, metavar="N", help="least channels kept (default: 8)")

    group = parser.add_argument_group("calibration")
    group.add_argument("--dataset", default="self", metavar="self|cifar10|FOLDER",
        help="calibration images: the model's own samples, CIFAR-10 from --data_dir, or a folder of images of any size "
        "and mode (default: self)")  # fmt: skip
    group.add_argument("--data_dir", metavar="FOLDER", help="where CIFAR-10 lies (binary version or images)")
    group.add_argument("--prompt_embeds", metavar="FILE",
        help="safetensors file with prompt_embeds and whatever else a text-to-image or transformer network reads, for its "
        "calibration (default: random conditioning)")  # fmt: skip
    group.add_argument("--guidance_scale", type=float, metavar="S",
        help="calibrate such a network on guided pairs, with and without the prompt (default: without guidance)")  # fmt: skip
    group.add_argument("--wanda_calib_steps", "--calib_steps", dest="calib_steps", type=whole(1), default=1024,
        metavar="N", help="number of noised images that are run through the network, at least 1 (default: 1024)")  # fmt: skip
    group.add_argument("--timesteps", choices=("random", "trajectory"), default="random",
        help="random: images noised to timesteps that cover the target range evenly; trajectory: states of the model's "
        "own DDIM sampling (default: random)")  # fmt: skip
    group.add_argument("--wanda_target_steps", "--target_steps", dest="target_steps", default="all", metavar="STEPS",
        help="timesteps that count: all, early (the noisiest 30 %%), late (the cleanest 30 %%), middle, or a-b for "
        "a <= t < b (default: all)")  # fmt: skip
    group.add_argument("--wanda_time_strategy", "--time_strategy", dest="time_strategy", default="mean",
        choices=("mean", "max", "median", "weighted_mean"),
        help="joins the norms of the timesteps; weighted_mean weighs from 0.5 (noisiest) to 1.5 (cleanest) "
        "(default: mean)")  # fmt: skip
    group.add_argument("--wanda_activation_strategy", "--activation_strategy", dest="activation_strategy",
        default="mean", choices=("mean", "max", "median"),
        help="joins the samples of a timestep; mean is their root mean square (default: mean)")  # fmt: skip
    group.add_argument("--load_stats", metavar="FILE",
        help="score with the statistics in an activation_stats.safetensors; nothing is calibrated")  # fmt: skip
    group.add_argument("--wanda_analyze_activations", "--analyze", dest="analyze", action="store_true",
        help="add wanda_analysis.png to the folder: norms, outliers per layer, layer x timestep map")  # fmt: skip
    group.add_argument("--wanda_save_analysis", "--save_analysis", dest="save_analysis", metavar="PATH",
        help="write the analysis to PATH too: the figure for .png, its numbers for .json, both for a folder")  # fmt: skip

    group = parser.add_argument_group("repair")
    group.add_argument("--repair", choices=("lstsq", "bias", "none"), default="lstsq",
        help="lstsq: least-squares refit of every layer that remains; bias: biases alone; none (default: lstsq)")  # fmt: skip
    group.add_argument("--repair_images", type=whole(1), default=None, metavar="N",
        help="noised images of the repair, at least 1 (default: 256 on a CPU, 4096 on a GPU that holds them; 32 and 128 "
        "for latents)")  # fmt: skip
    group.add_argument("--experts", type=lambda text: int(text) if text.isdecimal() else text, default=1, metavar="N",
        help="weights of their own for N ranges of timesteps, or for ranges that begin at the listed timesteps, such as "
        "300,600, in the free layout (default: 1)")  # fmt: skip
    group.add_argument("--repair_weighting", choices=("none", "last", "all"), default="none",
        help="layers whose fit counts timesteps by what an error there does to the sampled image: none, the last layer, or "
        "all (default: none)")  # fmt: skip

    group = parser.add_argument_group("running it")
    group.add_argument("--latency_mode", choices=("compiled", "eager"), default="compiled",
        help="how --target_latency times networks; compiling takes up to a minute for each (default: compiled)")  # fmt: skip
    group.add_argument("--latency_batch", type=whole(1), default=None, metavar="N",
        help="images per pass of these timings (default: 16 on a CPU, 256 on a GPU)")  # fmt: skip
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)")
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "float32", "bfloat16", "float16"), default=None,
        help="number format of calibration and sampling; the weights keep the model's own (default: fp32)")  # fmt: skip
    add_batch_size(group, more=", more in drawing and repairing small ones")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of everything random (default: 0)")
    group.add_argument("--num_samples", type=whole(0), default=16, metavar="N",
        help="images in the grids before and after, 0 for none (default: 16)")  # fmt: skip
    group.add_argument("--num_inference_steps", type=whole(1), default=50, metavar="N",
        help="DDIM steps of these images (default: 50)")  # fmt: skip
    group.add_argument("--backend", choices=("auto", "reference", "cpu", "triton", "cuda"), default="auto",
        help="implementation of the operations; a named one never steps down (default: auto)")  # fmt: skip
    group.add_argument("--stats_memory", metavar="SIZE",
        help="most memory of the activation statistics, such as 256M or 2G; above it they hold one row per timestep bin "
        "in place of one per image (default: 256M)")  # fmt: skip
    group.add_argument("--resume", action="store_true",
        help="keep what is done beside the target, in <save_path>.unfinished, and go on from what a killed run left there: "
        "repeat the same command")  # fmt: skip
    group.add_argument("--offload", action="store_true",
        help="keep the dense network's weights in the host's memory while the pruned network is repaired")  # fmt: skip
    group.add_argument("--json", action="store_true", help="print the report as one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress bars and no notes, only the result")
    group.add_argument("-h", "--help", action=_Help, help="show this text")


class _Help(argparse.Action):
    """Help with the criteria that are registered, for which torch has to be imported."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        from wanda_fast.importance import CRITERIA

        print(parser.format_help().replace("{pruners}", ", ".join(sorted(CRITERIA))), end="")
        parser.exit()


def run(args: argparse.Namespace, out: Terminal) -> int:
    """Prune as asked, print the result."""
    if args.dry_run and (args.analyze or args.save_analysis):
        raise UserError("--dry_run writes nothing, so there is no analysis to save")
    if args.push_to_hub is not None:
        if args.dry_run:
            raise UserError("--dry_run writes nothing, so there is nothing to upload")
        check_repo_id(args.push_to_hub)
    analysis = None if args.save_analysis is None else _analysis_target(args.save_analysis, args.overwrite)
    target = Path(args.save_path) if args.save_path is not None else default_folder(args)
    options = {name: value for name, value in vars(args).items() if name not in _OTHER}
    options["ratio"] = 0.3 if args.ratio is None else args.ratio

    from wanda_fast.pruning import prune

    result = prune(
        args.model,
        save_path=None if args.dry_run else target,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        analyse=args.analyze or analysis is not None,
        progress=out.progress,
        log=out.note,
        **options,
    )
    if out.silent:  # of several processes one has the result
        return 0
    if analysis is not None:
        _save_analysis(result, analysis)
    uploaded: str | PublishError | None = None
    if args.push_to_hub is not None:
        assert result.path is not None  # this is no dry run
        try:
            uploaded = push(result.path, args.push_to_hub)
        except PublishError as error:  # the result is printed before that
            uploaded = error
    address = {"uploaded": uploaded} if isinstance(uploaded, str) else {}
    out.json({**result.report, "path": None if result.path is None else str(result.path), **address})
    out.result(dry_report(result) if args.dry_run else full_report(result))
    if isinstance(uploaded, PublishError):
        raise uploaded
    if uploaded is not None:
        out.result(f"uploaded to {uploaded}")
    return 0


# --------------------------------------------------------------------------------------------------------------- targets


def default_folder(args: argparse.Namespace) -> Path:
    """run/<model>-<pruner>-<ratio>, with the budget or the plan in place of the ratio where that was asked, no pruner where none was, and the
    layout and the experts where they are not the usual ones.
    """
    model = model_name(args.model)
    if args.plan is not None:
        file = Path(args.plan).expanduser().resolve()
        parts = [model, "plan", file.parent.name if file.stem == "pruning" else file.stem]
    elif args.target_macs is not None:
        parts = [model, args.pruner, f"macs{args.target_macs}"]
    elif args.target_params is not None:
        parts = [model, args.pruner, f"params{args.target_params}"]
    elif args.target_latency is not None:
        parts = [model, args.pruner, f"latency{args.target_latency}"]
    else:
        parts = [model, args.pruner, f"{0.3 if args.ratio is None else args.ratio:g}"]
    if args.layout != "stock":
        parts.append(args.layout)
    if args.experts != 1:
        parts.append(f"experts{args.experts}".replace(",", "_"))
    name = "-".join(p for p in parts if p).replace("%", "pct")
    return Path("run") / (re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "pruned")


def _analysis_target(text: str, overwrite: bool) -> Path:
    """Refuse, before any work, a place where the analysis could not be written."""
    from wanda_fast.checkpoint import check_file

    path = Path(text).expanduser()
    single = path.suffix.lower() in (".png", ".json")
    for file in [path] if single else [path / "wanda_analysis.png", path / "wanda_analysis.json"]:
        check_file(file, overwrite)
    return path


def _save_analysis(result: PruneResult, path: Path) -> None:
    """The figure, its numbers, or both; each file appears whole or not at all."""
    import json

    from wanda_fast import analysis
    from wanda_fast.cli.terminal import finite

    if path.suffix.lower() in (".png", ".json"):
        files = [path]
    else:
        files = [path / "wanda_analysis.png", path / "wanda_analysis.json"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.stem}.partial{file.suffix}")
        try:
            if file.suffix.lower() == ".png":
                assert result.stats is not None  # an analysis was asked for, so there was a calibration
                analysis.save_picture(result.stats, partial, title=result.report["model"])
            else:
                partial.write_text(json.dumps(finite(result.report["analysis"]), indent=1) + "\n", encoding="utf-8")
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------- reports


_HEAD = ("", "dense", "pruned", "change")


def _asked(report: dict[str, Any]) -> str:
    asked, reached = report["asked"], report["reached"]
    ratio = f"ratio {reached['ratio']:.3f}"
    if "target_macs" in asked:
        return f"asked: at most {si(asked['target_macs'], 'MACs')} ({asked['given_as']}); reached: " \
            f"{si(reached['macs'], 'MACs')}, {ratio}"  # fmt: skip
    if "target_latency" in asked:
        found = report["latency"]
        missed = "" if found["met"] else " (MISSED)"
        return f"asked: at most {asked['target_latency']:g}x of the dense network's time; measured: {found['measured']:.3f}x{missed} " \
            f"({found['mode']}, {found['batch_size']} images); {ratio}"  # fmt: skip
    if "target_params" in asked:
        return f"asked: at most {si(asked['target_params'])} parameters ({asked['given_as']}); reached: " \
            f"{si(reached['params'])}, {ratio}"  # fmt: skip
    if "plan" in asked:
        return f"asked: the plan {asked['plan']}; reached: {ratio}"
    if report["settings"]["split"] == "uniform":
        near = "" if abs(asked["ratio"] - reached["ratio"]) < 5e-3 else ", the nearest with legal widths"
        return f"asked: ratio {asked['ratio']:g} (share of channels removed); reached: {ratio}{near}"
    gone = 1 - reached["macs"] / report["dense"]["macs"]  # the split asks for both
    return f"asked: ratio {asked['ratio']:g} (at least, of channels and of MACs); reached: {reached['ratio']:.3f} and {gone:.3f}"


def _size_rows(report: dict[str, Any]) -> list[list[str]]:
    dense, pruned = report["dense"], report["pruned"]
    return [
        ["parameters", si(dense["params"]), si(pruned["params"]), change(dense["params"], pruned["params"])],
        ["MACs, one image", si(dense["macs"]), si(pruned["macs"]), change(dense["macs"], pruned["macs"])],
    ]


def dry_report(result: PruneResult) -> str:
    """Widths of every slot, and the sizes; for `--dry_run`."""
    report = result.report
    rows = [
        [name, "+".join(str(level) for level in slot["levels"]) or "-", str(slot["dense"]), str(slot["kept"])]
        for name, slot in report["slots"].items()
    ]
    lines = ["", table(["slot", "level", "dense", "kept"], rows)]
    config = result.plan.config
    if config is not None:
        lines += ["", f"widths of the levels: {_widths(result.plan.dense_config)} -> {_widths(config)}"]
    lines += ["", table(_HEAD, _size_rows(report)), "", _asked(report), "dry run: nothing was written"]
    return "\n".join(lines)


def full_report(result: PruneResult) -> str:
    """The table at the end of a run, what was asked and reached, where the time went and where the files are."""
    report = result.report
    quality = report["quality"]
    rows = _size_rows(report)
    if "file_bytes" in quality:
        dense, pruned = quality["file_bytes"]["dense"], quality["file_bytes"]["pruned"]
        rows.append(["weights file", si(dense, "B"), si(pruned, "B"), change(dense, pruned)])
    forward = quality["forward_seconds"]
    dense, pruned = forward["dense"], forward["pruned"]
    rows.append([f"forward pass, {forward['batch_size']} images", seconds(dense), seconds(pruned),
                 f"{dense / pruned:.2f} x as fast"])  # fmt: skip
    if "ssim" in quality:
        rows.append(["SSIM of the samples, before to after", "1", f"{quality['ssim']:.3f}"])
        rows.append(["PSNR of the samples", "", f"{quality['psnr']:.1f} dB" if quality["psnr"] < 1e3 else "equal"])
    rows.append(["squared error of the predicted noise", "0", f"{quality['noise_mse']:.3g}",
                 f"{quality['noise_mse_relative']:.2%} of its variance"])  # fmt: skip
    dtype = report["settings"]["dtype"] or "fp32"
    lines = ["", table(_HEAD, rows), f"times on {report['device']}, {dtype}", "", _asked(report)]
    if result.repair is not None:
        lines.append(result.repair.summary())
    if "experts" in report:
        ranges = ", ".join(f"{low} to {high - 1}" for low, high in report["experts"]["ranges"])
        lines.append(f"experts: {len(report['experts']['ranges'])} sets of weights of {len(report['experts']['own_layers'])} layers, for the "
                     f"timesteps {ranges}")  # fmt: skip
    stages = report["seconds"]
    lines.append(f"seconds: {', '.join(f'{name} {value:.1f}' for name, value in stages.items())}; "
                 f"together {sum(stages.values()):.1f}")  # fmt: skip
    if result.path is not None:
        lines += ["", f"written to {result.path}", f"open it with: {_how_to_open(result)}"]
    return "\n".join(lines)


def _widths(config: dict[str, Any]) -> str:
    return "(" + ", ".join(str(w) for w in config["block_out_channels"]) + ")"


def _how_to_open(result: PruneResult) -> str:
    if result.pipeline is None and not (result.path / "model_index.json").is_file():  # type: ignore[operator]
        return f"wanda_fast.{type(result.network).__name__}.from_pretrained({str(result.path)!r})"
    if result.plan.layout == "stock":
        return f"diffusers.DDPMPipeline.from_pretrained({str(result.path)!r})"
    return f"wanda_fast.load_pruned({str(result.path)!r})"
