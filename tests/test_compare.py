"""The comparison: its numbers are those of the parts it is made of, its page is whole and loads nothing."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import PLAIN, random_unet
from PIL import Image
from runs import one_thread as one_thread

import wanda_fast
from wanda_fast import compare, evaluation
from wanda_fast.cli import compare_page, main
from wanda_fast.sampling import sample

SMALL = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Balanced tags, all text, every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A dense network and two that are pruned from it, in the stock and the free layout; a name that HTML must escape."""
    place = tmp_path_factory.mktemp("compare")
    DDPMPipeline(unet=random_unet(SMALL), scheduler=DDPMScheduler()).save_pretrained(place / "dense")
    images = place / "images"
    images.mkdir()
    Image.new("RGB", (8, 8), "teal").save(images / "a.png")
    how = {"pruner": "magnitude", "ratio": 0.4, "repair": "none", "split": "uniform", "num_samples": 0, "align": 4, "batch_size": 4,
           "device": "cpu", "dataset": str(images), "min_width": 4}  # fmt: skip
    wanda_fast.prune(str(place / "dense"), save_path=place / "a <b> & c", **how)
    wanda_fast.prune(str(place / "dense"), save_path=place / "free", layout="free", **how)
    return [place / "dense", place / "a <b> & c", place / "free"]


@pytest.fixture(scope="module")
def compared(folders):
    return compare.compare(folders, n=3, steps=2, noise_images=20, batch_size=4, seed=5, device="cpu")


def test_numbers_are_those_of_the_parts(folders, compared):
    report, images = compared
    assert [m["label"] for m in report["models"]] == ["A", "B", "C"] and [m["layout"] for m in report["models"]] == [
        "stock", "stock", "free"]  # fmt: skip
    dense, pruned, free = (wanda_fast.load_pruned(f) for f in folders)
    for pipeline, drawn, entry, folder in zip((dense, pruned, free), images, report["models"], folders, strict=True):
        assert entry["params"] == sum(p.numel() for p in pipeline.unet.parameters())
        assert entry["macs"] == evaluation.count_macs(pipeline.unet)
        file = next(folder.rglob("diffusion_pytorch_model.safetensors"))
        assert entry["file_bytes"] == file.stat().st_size and entry["forward_seconds"] > 0
        assert torch.equal(drawn, sample(pipeline.unet, dense.scheduler, 3, steps=2, seed=5, batch_size=4))
    for entry, drawn in zip(report["models"][1:], images[1:], strict=True):
        assert entry["ssim"] == evaluation.ssim(images[0], drawn) and entry["psnr"] == evaluation.psnr(images[0], drawn)
        assert sum(e["samples"] for e in entry["noise"]["over_t"]) == entry["noise"]["all"]["samples"] == 20
        weighted = sum(e["mse"] * e["samples"] for e in entry["noise"]["over_t"]) / 20
        assert entry["noise"]["all"]["mse"] == pytest.approx(weighted) and weighted > 0
    assert json.loads(json.dumps(report)) == report and str(folders[0].parent) not in json.dumps(report)


def test_widths_per_level(compared):
    a, b, c = (m["widths"] for m in compared[0]["models"])
    assert [(w["level"], w["least"], w["most"]) for w in a] == [(0, 16, 16), (1, 32, 32), (2, 32, 32)]
    assert all(y["most"] < x["most"] for x, y in zip(a, b, strict=True)) and len(c) == 3
    assert compare.level_widths(torch.nn.Linear(2, 2)) == []


def test_the_page_is_whole_and_loads_nothing(compared):
    report, images = compared
    text = compare_page.page(report, images)
    page = Page(text)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "xlink:href", "action", "poster"):
            assert tag == "img" and value.startswith("data:image/png;base64,")
        assert not name.startswith("on")
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text) and "url(" not in text and "@import" not in text
    assert "<script" not in text and "<link" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert "a <b> & c" in page.text  # escaped in the source
    for m in report["models"]:
        assert f"{m['params']:,}" in page.text and f"{m['macs']:,}" in page.text and m["name"] in page.text
        for level in m["widths"]:
            assert str(level["most"]) in page.text
    for m in report["models"][1:]:
        assert f"{m['ssim']:.3f}" in page.text and f"{m['psnr']:.1f} dB" in page.text and f"{m['noise']['all']['mse']:.3g}" in page.text
        for e in m["noise"]["over_t"]:
            assert f"{e['mse']:.3g}" in page.text and f"t {e['from']}-{e['to']}" in page.text


def test_the_pictures_of_the_page_are_the_images(compared):
    report, images = compared
    sources = [v for t, n, v in Page(compare_page.page(report, images)).attributes if (t, n) == ("img", "src")]
    assert len(sources) == 3 * 5  # A, B, B - A, C, C - A of every image
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2])))) for s in sources]
    for i in range(3):
        assert (shown[5 * i] == images[0][i].numpy()).all() and (shown[5 * i + 1] == images[1][i].numpy()).all()
        far = np.abs(images[0][i].numpy().astype(int) - images[2][i].numpy()) * compare_page.GAIN
        assert (shown[5 * i + 4] == far.clip(0, 255)).all()


def test_one_channel_and_equal_models(tmp_path):
    DDPMPipeline(unet=random_unet({**SMALL, "in_channels": 1, "out_channels": 1}), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "m")
    report, images = compare.compare([tmp_path / "m", tmp_path / "m"], n=2, steps=2, noise_images=4, device="cpu")
    assert report["models"][1]["psnr"] is None and report["models"][1]["noise"]["all"]["mse"] == 0
    assert "The predictions are equal" in Page(compare_page.page(report, images)).text
    compare_page.save_picture(report, images, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_command_writes_page_and_picture(folders, tmp_path, capsys):
    words = [*folders[:2], "--save_path", tmp_path / "new" / "page.html", "--num_samples", 2, "--num_inference_steps", 2,
             "--noise_images", 10, "--device", "cpu", "--quiet", "--json"]  # fmt: skip
    assert main(["compare", *map(str, words)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["page.html", "page.png"]
    assert report["picture"].endswith("page.png")
    page = Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert f"{report['models'][1]['params']:,}" in page.text
    with Image.open(tmp_path / "new" / "page.png") as picture:
        assert picture.width > 1000
    assert main(["compare", *map(str, words)]) == 2  # nothing is overwritten unasked
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{dense}"], "at least two"),
        (["{dense}", "no/such"], "no such folder"),
        (["{dense}", "bundled"], "different shapes"),
        (["{dense}", "{dense}", "--save_path", "page.pdf"], "end in .html"),
        (["{dense}", "{dense}", "--device", "tpu9"], "device 'tpu9'"),
        (["{dense}", "{dense}", "--num_samples", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(words, says, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *(w.format(dense=folders[0]) for w in words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wanda-fast: error: ") and error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())
