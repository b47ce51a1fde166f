"""Frechet distance (FID) of a folder of images to saved statistics, or save such statistics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanda_fast.cli.parser import Parser, whole
from wanda_fast.cli.terminal import Terminal
from wanda_fast.errors import UserError

if TYPE_CHECKING:
    from wanda_fast.features import FeatureStats

EXAMPLES = """\
wanda-fast fid --save-stats IMAGES OUT.npz            statistics of real images, once
wanda-fast fid SAMPLES STATS.npz --device cuda        distance of drawn images to them
wanda-fast fid SAMPLES IMAGES --features efficientnet-lite0

IMAGES and SAMPLES are folders of single images (any sizes; subfolders count), or cifar10 with --data_dir. The features are those
of clean-fid's Inception unless --features names others; statistics remember theirs, and others are refused."""


def add_arguments(parser: Parser) -> None:
    """All options of the subcommand."""
    group = parser.add_argument_group("images")
    group.add_argument("paths", nargs="*", metavar="SAMPLES STATS.npz",
        help="a folder of drawn images, and a statistics file or a folder of real images")  # fmt: skip
    group.add_argument("--save_stats", nargs=2, metavar=("IMAGES", "OUT.npz"), help="write the statistics of a folder of images")
    group.add_argument("--data_dir", metavar="FOLDER", help="where CIFAR-10 lies, for the name cifar10")
    group.add_argument("--num_images", type=whole(2), default=None, metavar="N",
        help="at most N images of each folder, taken evenly (default: all)")  # fmt: skip
    group = parser.add_argument_group("how")
    group.add_argument("--features", metavar="NAME|FILE",
        help="inception (clean-fid), efficientnet-lite0, or a TorchScript file that you trust (default: those of STATS.npz, "
        "else inception)")  # fmt: skip
    group.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, cpu, ... (default: cuda if there, else cpu)")
    group.add_argument("--batch_size", type=whole(1), default=64, metavar="N", help="images per pass (default: 64)")
    group.add_argument("--overwrite", action="store_true", help="replace OUT.npz where it exists")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object and nothing else")
    group.add_argument("--quiet", action="store_true", help="no progress bars and no notes, only the result")
    group.add_argument("-h", "--help", action="help", help="show this text")


def run(args: argparse.Namespace, out: Terminal) -> int:
    """Save statistics, or compare with them."""
    if (args.save_stats is not None) == bool(args.paths):
        raise UserError("give either --save-stats IMAGES OUT.npz, or SAMPLES STATS.npz")
    if args.paths and len(args.paths) != 2:
        raise UserError(f"two places are needed, SAMPLES and STATS.npz; got {len(args.paths)}")
    if args.paths and args.overwrite:
        raise UserError("--overwrite is for the file of --save-stats; a comparison writes nothing")
    from wanda_fast.data import DATASETS

    if args.data_dir is not None and not set(DATASETS) & set(args.paths or args.save_stats):
        raise UserError(f"--data_dir is where {', '.join(DATASETS)} lies; no images of that name are asked for")
    from wanda_fast.pruning import check_device

    device = check_device(args.device)
    return _save(args, out, device) if args.save_stats is not None else _compare(args, out, device)


def _save(args: argparse.Namespace, out: Terminal, device: Any) -> int:
    from wanda_fast.checkpoint import check_file
    from wanda_fast.features import count_images, describe, feature_stats, get_features

    images, target = args.save_stats
    if Path(target).suffix != ".npz":
        raise UserError(f"{target}: the statistics file must end in .npz")
    path = check_file(target, args.overwrite)
    count_images(images, n=args.num_images, data_dir=args.data_dir)
    extractor = get_features(args.features or "inception", device)
    stats = feature_stats(extractor, images, batch_size=args.batch_size, n=args.num_images, data_dir=args.data_dir,
        progress=out.progress)  # fmt: skip
    stats.save(path)
    out.json({"path": str(path), "count": stats.n, "protocol": stats.protocol})
    out.result(f"{stats.n} images of {stats.protocol['source']} ({', '.join(stats.protocol['sizes'])}): {describe(stats.protocol)}")
    out.result(f"written to {path}")
    return 0


def _compare(args: argparse.Namespace, out: Terminal, device: Any) -> int:
    from wanda_fast.features import (
        FEATURES,
        FeatureStats,
        count_images,
        describe,
        feature_stats,
        frechet_distance,
        get_features,
    )

    samples, real = args.paths
    known = None
    if Path(real).suffix == ".npz" or Path(real).is_file():
        known = FeatureStats.load(real)
    else:
        count_images(real, n=args.num_images, data_dir=args.data_dir)
    if Path(samples).suffix == ".npz" and Path(samples).is_file():
        drawn = FeatureStats.load(samples)
        if known is not None:
            for name in ("features", "num_images"):
                if getattr(args, name) is not None:
                    raise UserError(f"--{name} is for images; {samples} and {real} are statistics already")
        known = known or _stats(args, out, real, str(drawn.protocol.get("features")), device)
    else:
        count_images(samples, n=args.num_images, data_dir=args.data_dir)
        name = args.features or ("inception" if known is None else str(known.protocol.get("features")))
        if known is not None and args.features is None and name not in FEATURES:
            raise UserError(f"{real}: made with {name}; name that file with --features")
        extractor = get_features(name, device)
        if known is not None:
            mine = extractor.protocol()
            for key in ("features", "resize", "weights"):
                if mine[key] != known.protocol.get(key):
                    raise UserError(f"{real}: made with {describe(known.protocol)}, asked for are {describe(mine)}")
        drawn = feature_stats(extractor, samples, batch_size=args.batch_size, n=args.num_images, data_dir=args.data_dir,
            progress=out.progress)  # fmt: skip
        if known is None:
            known = feature_stats(extractor, real, batch_size=args.batch_size, n=args.num_images, data_dir=args.data_dir,
                progress=out.progress)  # fmt: skip
    distance = frechet_distance(drawn, known)
    few = min(drawn.n, known.n) < len(drawn.mean)
    out.json({
        "frechet_distance": distance,
        "features": drawn.protocol.get("features"),
        "protocol": {k: drawn.protocol.get(k) for k in ("features", "dim", "resize", "weights", "versions")},
        "samples": {"source": drawn.protocol.get("source"), "count": drawn.n, "sizes": drawn.protocol.get("sizes")},
        "real": {"source": known.protocol.get("source"), "count": known.n, "sizes": known.protocol.get("sizes")},
    })  # fmt: skip
    if few:
        out.note(f"fewer images than the {len(drawn.mean)} features: the distance is biased upwards; compare it only with others of the "
            "same count")  # fmt: skip
    out.result(f"Frechet distance {distance:.4f} in {describe(drawn.protocol)}")
    out.result(f"{drawn.n} images of {drawn.protocol.get('source')} to {known.n} of {known.protocol.get('source')}")
    return 0


def _stats(args: argparse.Namespace, out: Terminal, images: str, name: str, device: Any) -> FeatureStats:
    from wanda_fast.features import feature_stats, get_features

    extractor = get_features(args.features or name, device)
    return feature_stats(extractor, images, batch_size=args.batch_size, n=args.num_images, data_dir=args.data_dir,
        progress=out.progress)  # fmt: skip
