"""Conditioning of text-to-image UNets and diffusion transformers: prompt files, guided pairs, calibration batches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conditioned import CONDITIONED, random_network
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from safetensors.torch import save_file
from torch import Tensor

import wanda_fast
from wanda_fast.calibrate import calibrate, noised_batches
from wanda_fast.checkpoint import load_pipeline, stored_dtype
from wanda_fast.errors import UserError
from wanda_fast.inputs import Prompts, input_spec
from wanda_fast.pruning import prune

SMALL: dict[str, Any] = {
    "align": 2, "min_width": 2, "calib_steps": 8, "batch_size": 4, "repair_images": 8, "device": "cpu", "split": "uniform",
}  # fmt: skip


def scheduler(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, **changes)


def prompt_file(folder: Path, **changes: Tensor | None) -> Path:
    g = torch.Generator().manual_seed(3)
    tensors = {
        "prompt_embeds": torch.randn(3, 7, 24, generator=g),
        "negative_prompt_embeds": torch.randn(1, 7, 24, generator=g),
        "pooled_prompt_embeds": torch.randn(3, 20, generator=g),
        "latents": torch.randn(5, 4, 16, 16, generator=g),
        **changes,
    }
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "prompts.safetensors")
    return folder / "prompts.safetensors"


def collected(network: Any, prompts: Prompts, **options: Any) -> list[Any]:
    return list(noised_batches(network, scheduler(), prompts, **{"n": 10, "batch_size": 4, "seed": 5, **options}))


def test_batches_repeat_and_split() -> None:
    network = random_network("sdxl")
    whole = collected(network, Prompts(), batch_size=10)[0]
    for batch in collected(network, Prompts(), part=(4, 10)):
        assert torch.equal(batch.x, whole.x[batch.indices]) and torch.equal(batch.t, whole.t[batch.indices])
        for name, value in batch.labels.items():
            assert torch.equal(value, whole.labels[name][batch.indices]), name
    assert set(whole.labels) == {"encoder_hidden_states", "text_embeds", "time_ids"}
    assert whole.labels["encoder_hidden_states"].shape == (10, 77, 24) and whole.labels["text_embeds"].shape == (10, 20)
    assert whole.labels["time_ids"][0].tolist() == [128, 128, 0, 0, 128, 128]
    assert torch.equal(whole.t.sort().values // 100, torch.arange(10)), "the timesteps cover the schedule evenly"


def test_prompts_and_latents_of_a_file(tmp_path: Path) -> None:
    network = random_network("sdxl")
    prompts = Prompts.load(prompt_file(tmp_path))
    batch = collected(network, prompts, batch_size=10)[0]
    want = prompts.tensors["prompt_embeds"][torch.arange(10) % 3]
    assert torch.equal(batch.labels["encoder_hidden_states"], want)
    alpha = scheduler().alphas_cumprod[batch.t].view(-1, 1, 1, 1)
    noise = (batch.x - alpha.sqrt() * prompts.tensors["latents"][torch.arange(10) % 5]) / (1 - alpha).sqrt()
    other = collected(network, Prompts(), batch_size=10)[0]
    assert 0.9 < float(noise.std()) < 1.1 and not torch.allclose(batch.x, other.x)
    assert prompts.describe() == "3 prompts, 5 latents from prompts.safetensors"


@pytest.mark.parametrize("mode", ["random", "trajectory"])
def test_guided_pairs_share_all_but_the_prompt(mode: str, tmp_path: Path) -> None:
    network = random_network("sdxl")
    prompts = Prompts.load(prompt_file(tmp_path), guidance=5.0)
    found: dict[int, Any] = {}
    for x, t, indices, condition in collected(network, prompts, mode=mode, trajectory_steps=5):
        for k, i in enumerate(indices.tolist()):
            found[i] = x[k], int(t[k]), {name: value[k] for name, value in condition.items()}
    assert sorted(found) == list(range(10))
    for i in range(0, 10, 2):
        plain, guided = found[i], found[i + 1]
        assert torch.equal(plain[0], guided[0]) and plain[1] == guided[1]
        assert torch.equal(plain[2]["encoder_hidden_states"], prompts.tensors["negative_prompt_embeds"][0])
        assert bool((plain[2]["text_embeds"] == 0).all()), "no negative pooled embedding: zero, as pipelines have it"
        assert any(torch.equal(guided[2]["encoder_hidden_states"], p) for p in prompts.tensors["prompt_embeds"])


def test_guidance_steers_the_trajectory() -> None:
    network = random_network("dit")
    states = [collected(network, Prompts(guidance=g), mode="trajectory", trajectory_steps=4, batch_size=20) for g in (0.0, 3.0)]
    plain, steered = (next(b for b in s if int(b.t[0]) == 0) for s in states)
    assert not torch.allclose(plain.x, steered.x)
    assert set(plain.labels["class_labels"][plain.indices % 2 == 0].tolist()) == {input_spec(network).null_class}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "dit", "pixart"])
def test_calibration_counts_every_input(name: str) -> None:
    network = random_network(name)
    stats = calibrate(network, scheduler(), None, n=6, batch_size=4)
    seen: dict[str, Tensor] = {}

    def watch(layer: str) -> Any:
        def hook(_: Any, args: tuple) -> None:
            x = args[0].double()
            dims = (2, 3) if x.dim() == 4 else (1,)
            seen[layer] = torch.cat([seen.get(layer, x.new_zeros(0, x.shape[1 if x.dim() == 4 else -1])), x.square().sum(dims)])

        return hook

    picked = [n for n in stats.tables if n.endswith(("conv2", "net.2", "to_out.0", "attn2.to_k", "to_q"))]
    handles = [network.get_submodule(n).register_forward_pre_hook(watch(n)) for n in picked]
    from wanda_fast.sampling import predict

    for batch in noised_batches(network, scheduler(), None, n=6, batch_size=4):
        predict(network, batch.x, batch.t, batch.labels)
    for handle in handles:
        handle.remove()
    for layer in picked:
        assert torch.allclose(stats.tables[layer].double(), seen[layer], rtol=1e-4, atol=1e-6), layer


def test_bad_prompts_are_refused(tmp_path: Path) -> None:
    network = random_network("sdxl")

    def refused(says: str, net: Any = network, **changes: Any) -> None:
        with pytest.raises(UserError, match=says):
            Prompts.load(prompt_file(tmp_path, **changes)).check(net)

    refused(r"prompt_embeds has shape \[3, 7, 23\]", prompt_embeds=torch.zeros(3, 7, 23))
    refused("has no pooled_prompt_embeds", pooled_prompt_embeds=None)
    refused("holds NaN", latents=torch.full((1, 4, 16, 16), float("nan")))
    refused("unknown entry prompts", prompts=torch.zeros(1))
    refused("is nothing that this DiTTransformer2DModel takes", net=random_network("dit"))
    refused("another length", negative_prompt_embeds=torch.zeros(1, 5, 24))
    refused("prompt_attention_mask is for 5 tokens, prompt_embeds has 7", prompt_attention_mask=torch.ones(3, 5))
    refused("negative_prompt_attention_mask has another length", prompt_attention_mask=torch.ones(3, 7),
            negative_prompt_attention_mask=torch.ones(1, 5))  # fmt: skip
    refused("has negative_prompt_attention_mask and no prompt_attention_mask", negative_prompt_attention_mask=torch.ones(1, 7))
    refused("pooled_prompt_embeds has 2 rows, prompt_embeds has 3", pooled_prompt_embeds=torch.zeros(2, 20))
    refused("prompt_attention_mask has 2 rows", prompt_attention_mask=torch.ones(2, 7))
    refused("negative_pooled_prompt_embeds has 3 rows, negative_prompt_embeds has 1", negative_pooled_prompt_embeds=torch.zeros(3, 20))
    refused("time_ids has 2 rows", time_ids=torch.zeros(2, 6))
    Prompts.load(prompt_file(tmp_path, time_ids=torch.zeros(1, 6))).check(network)  # one for all prompts
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        Prompts.load(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="prompt_embeds is for networks that read prompts"):
        prune(prompt_embeds=str(prompt_file(tmp_path)), dry_run=True, device="cpu")
    with pytest.raises(UserError, match="guidance scale"):
        prune(guidance_scale=-1.0, dry_run=True)


def test_an_unconditional_half_without_a_mask_sees_every_token(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]]).expand(3, 7).contiguous()
    prompts = Prompts.load(prompt_file(tmp_path, prompt_attention_mask=mask), guidance=2.0)
    for t in (mask, mask.bool(), mask.half()):
        prompts.tensors["prompt_attention_mask"] = t
        found = prompts.pick(input_spec(random_network("sdxl")), [0, 0], [False, True], 0, "cpu")["encoder_attention_mask"]
        assert found.tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("option", [{"dual_cross_attention": True}, {"attention_type": "gated"}], ids=str)
def test_networks_with_inputs_of_their_own_are_refused(option: dict[str, Any]) -> None:
    kind, config = CONDITIONED["sd15"]
    network = getattr(diffusers, kind)(**{**config, **option})
    with pytest.raises(UserError, match=f"{next(iter(option))} .* is not supported"):
        input_spec(network)


def test_prune_a_bare_folder(tmp_path: Path) -> None:
    network = random_network("sdxl")
    network.half().save_pretrained(tmp_path / "model" / "unet")
    scheduler().save_pretrained(tmp_path / "model" / "scheduler")
    lines: list[str] = []
    result = prune(
        tmp_path / "model" / "unet", save_path=tmp_path / "out", ratio=0.4, prompt_embeds=str(prompt_file(tmp_path)),
        guidance_scale=3.0, repair="none", log=lines.append, **SMALL,
    )  # fmt: skip
    assert any("3 prompts, 5 latents from prompts.safetensors" in line and "guidance 3" in line for line in lines)
    assert any("layout: free" in line for line in lines)
    assert result.report["network"] == "UNet2DConditionModel" and result.pipeline is None
    again = wanda_fast.PrunedUNet2DConditionModel.from_pretrained(tmp_path / "out")
    opened = wanda_fast.load_pruned(tmp_path / "out")
    for key, tensor in result.network.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor) and torch.equal(opened.state_dict()[key], tensor.float()), key
    assert sum(p.numel() for p in again.parameters()) == result.report["pruned"]["params"]
    assert stored_dtype(tmp_path / "out") == torch.float16, "the dtype of the dense weights is kept"
    replayed = prune(tmp_path / "model" / "unet", plan=str(tmp_path / "out" / "pruning.json"), dry_run=True, **SMALL)
    assert replayed.plan.widths == result.plan.widths
    with pytest.raises(UserError, match="already pruned"):
        prune(tmp_path / "out", dry_run=True, **SMALL)
    assert replayed.report["settings"]["pruner"] == "wanda-diff"
    with pytest.raises(UserError, match="works on latents"):
        prune(tmp_path / "model" / "unet", dry_run=True, layout="free", experts=2, **SMALL)


def test_other_commands_refuse_latents(tmp_path: Path) -> None:
    random_network("dit").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="holds a DiTTransformer2DModel; only UNet2DModel is supported here"):
        load_pipeline(tmp_path / "model")
    assert load_pipeline(tmp_path / "model", conditioned=True).layout == "stock"
    with pytest.raises(UserError, match="the pruner taylor needs images"):
        prune(tmp_path / "model", pruner="taylor", dry_run=True, **SMALL)


def test_prune_inside_a_pipeline(tmp_path: Path) -> None:
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )  # fmt: skip
    DiTPipeline(transformer=random_network("dit"), vae=vae, scheduler=scheduler()).save_pretrained(tmp_path / "model")
    result = prune(tmp_path / "model", save_path=tmp_path / "out", target_macs="70%", **{**SMALL, "split": "sensitivity"})
    assert result.report["pruned"]["macs"] <= 0.7 * result.report["dense"]["macs"]
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline.transformer).__name__ == "PrunedDiTTransformer2DModel"
    images = pipeline([1, 2], num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert images.shape[0] == 2
    assert type(wanda_fast.load_pruned(tmp_path / "out")) is DiTPipeline
    shutil.rmtree(tmp_path / "model" / "vae")  # an incomplete pipeline: the network is written by itself
    prune(tmp_path / "model", save_path=tmp_path / "bare", target_macs="70%", repair="none", **SMALL)
    assert (tmp_path / "bare" / "config.json").is_file() and not (tmp_path / "bare" / "model_index.json").exists()
