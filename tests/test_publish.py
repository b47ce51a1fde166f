"""The model card is what the hub reads; the upload is tested up to the network."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from networks import PLAIN, random_unet
from PIL import Image
from runs import flags, tree
from runs import one_thread as one_thread

import wanda_fast
from wanda_fast import model_card, publish
from wanda_fast.cli import main
from wanda_fast.errors import UserError

SMALL = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}
CARD = "---\nlicense: apache-2.0\nlicense_link: https://example.org/l\nbase_model: someone/original\ndatasets: [x]\n---\n# Dense\n"


@pytest.fixture(scope="module")
def how(tmp_path_factory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("publish")
    DDPMPipeline(unet=random_unet(SMALL), scheduler=DDPMScheduler()).save_pretrained(place / "dense")
    (place / "dense" / "README.md").write_text(CARD)
    (place / "images").mkdir()
    Image.new("RGB", (8, 8), "teal").save(place / "images" / "a.png")
    return {"model": str(place / "dense"), "pruner": "magnitude", "ratio": 0.4, "repair": "none", "split": "uniform", "num_samples": 2,
            "num_inference_steps": 2, "align": 4, "batch_size": 4, "device": "cpu", "dataset": str(place / "images")}  # fmt: skip


@pytest.fixture(scope="module", params=["stock", "free"])
def result(request, how, tmp_path_factory):
    return wanda_fast.prune(save_path=tmp_path_factory.mktemp("result") / "out", layout=request.param, min_width=4, **how)


class Api:
    """What the hub's client would be asked for."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.fail, self.files, self.calls = fail, {}, []  # type: ignore[var-annotated]

    def create_repo(self, repo_id: str, **how: Any) -> Any:
        self.calls.append(("create_repo", repo_id, how))
        if self.fail is not None:
            raise self.fail

        class Address(str):
            repo_id: str

        made = Address(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")
        made.repo_id = f"me/{repo_id.split('/')[-1]}"
        return made

    def create_commit(self, repo_id: str, operations: list[Any], **how: Any) -> None:
        self.calls.append(("create_commit", repo_id, how))
        for operation in operations:
            with operation.as_file() as stream:
                self.files[operation.path_in_repo] = stream.read()


def test_the_card_is_what_the_hub_reads(result, how):
    text = (result.path / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text, ignore_metadata_errors=False)
    stock = result.plan.layout == "stock"
    assert card.data.license == "apache-2.0" and card.data.base_model == "someone/original" and card.data.datasets is None
    assert card.data.library_name == ("diffusers" if stock else "wanda_fast")
    assert card.data.pipeline_tag == "unconditional-image-generation" and "pruning" in card.data.tags
    figures = {r.metric_type: r.metric_value for r in card.data.eval_results or []}
    for kind, key in (("ssim", "ssim"), ("psnr", "psnr"), ("mse", "noise_mse")):
        assert figures[kind] == pytest.approx(result.report["quality"][key], rel=1e-4)
    for size in (result.report["dense"], result.report["pruned"]):
        assert f"{size['params']:,}" in card.text and f"{size['macs']:,}" in card.text
    assert ("DDPMPipeline.from_pretrained" in card.text) == stock and ("wanda_fast.load_pruned" in card.text) != stock
    command = next(line for line in card.text.splitlines() if line.startswith("wanda-fast prune"))
    assert {"--ratio", "--repair", "--pruner", "--align"} <= set(shlex.split(command))
    local = str(Path(how["model"]).parent)
    assert local not in text and "/tmp" not in text and "/home" not in text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (CARD, {"license": "apache-2.0", "license_link": "https://example.org/l", "base_model": "someone/original"}),
        ("# no front matter\n", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\n{{{\n---\n", {}),
        ("---\nlicense: \"a\\nb\"\n---\n", {}),
        ("---\nlicense: mit\n", {}),
    ],
)
def test_license_and_base_model_of_the_source(text, kept, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert model_card.of_source(tmp_path, "folder") == kept


def test_source_without_a_card(tmp_path):
    assert model_card.of_source(tmp_path, "folder") == {} and model_card.of_source(tmp_path, "bundled") == {"license": "apache-2.0"}


def test_all_files_go_up_in_one_commit(result):
    (result.path / ".secret").write_text("x")
    api = Api()
    assert publish.push(result.path, "small-ddpm", api=api) == "https://huggingface.co/me/small-ddpm"
    (result.path / ".secret").unlink()
    assert [c[:2] for c in api.calls] == [("create_repo", "small-ddpm"), ("create_commit", "me/small-ddpm")]
    assert api.calls[0][2]["exist_ok"] is True and api.calls[0][2]["private"] is False
    assert sorted(api.files) == tree(result.path)
    for name, blob in api.files.items():
        if name != "README.md":
            assert blob == (result.path / name).read_bytes()
    card = ModelCard(api.files["README.md"].decode())
    assert '"me/small-ddpm"' in card.text and "FOLDER" not in card.text  # how to load it from there
    assert card.data.to_dict() == ModelCard((result.path / "README.md").read_text()).data.to_dict()


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), huggingface_hub.errors.HfHubHTTPError("403", response=SimpleNamespace(  # type: ignore[arg-type]
        headers={}, status_code=403, request=None)), OSError(28, "No space left on device")], ids=["network", "forbidden", "disk"],
)  # fmt: skip
def test_a_failed_upload_is_one_line_and_keeps_the_folder(result, error):
    before = tree(result.path)
    with pytest.raises(publish.PublishError, match=r"not uploaded to me/x .*the result is in") as caught:
        publish.push(result.path, "me/x", api=Api(error))
    assert "\n" not in str(caught.value) and tree(result.path) == before


@pytest.mark.parametrize("name", ["a/b/c", "", "-a/b", "a b/c", "../x", "a/b.git"])
def test_bad_repository_names_are_found_before_any_work(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wanda_fast.checkpoint, "load_pipeline", lambda *a, **k: pytest.fail("the model was opened"))
    assert main(["prune", f"--push_to_hub={name}"]) == 2
    error = capsys.readouterr().err
    assert ("no name of a hub repository" if name else "is empty") in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
    with pytest.raises(UserError):
        publish.push(tmp_path, "me/x", api=Api())  # an empty folder


def test_the_command_without_a_token(how, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    words = [*flags({**how, "num_samples": 0, "min_width": 4}), "--save_path", tmp_path / "out", "--quiet", "--push_to_hub", "me/x"]
    assert main(["prune", *map(str, words)]) == 1
    captured = capsys.readouterr()
    assert "no token" in captured.err and str(tmp_path / "out") in captured.err and captured.err.count("\n") == 1
    assert "written to" in captured.out and (tmp_path / "out" / "pruning.json").is_file()


def test_the_command_uploads(how, tmp_path, monkeypatch, capsys):
    api = Api()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **how: api)
    words = [*flags({**how, "num_samples": 0, "min_width": 4}), "--save_path", tmp_path / "out", "--quiet", "--push_to_hub", "me/x"]
    assert main(["prune", *map(str, words)]) == 0
    assert "uploaded to https://huggingface.co/me/x" in capsys.readouterr().out and "README.md" in api.files
