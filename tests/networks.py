"""Networks that the tests share: the bundled model and small random configurations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel

ATTENTION_AT_1 = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
PLAIN = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8,
    "attention_head_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    **ATTENTION_AT_1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "two_layers_one_channel": {**PLAIN, "layers_per_block": 2, "in_channels": 1, "out_channels": 1},
    "heads": {**PLAIN, "attention_head_dim": 16, "block_out_channels": (32, 64, 96)},
    "classes": {**PLAIN, "num_class_embeds": 5},
    "class_timestep": {**PLAIN, "class_embed_type": "timestep"},
    "scale_shift": {**PLAIN, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "resnet_resampling": {
        **PLAIN,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "no_mid": {**PLAIN, "mid_block_type": None},
    "fourier": {**PLAIN, "time_embedding_type": "fourier"},
    "learned": {**PLAIN, "time_embedding_type": "learned", "num_train_timesteps": 100},
}
CIFAR32: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
# google/ddpm-celebahq-256 and google/ddpm-church-256
WIDE256: dict[str, Any] = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


def random_unet(name_or_config: str | dict[str, Any], seed: int = 0) -> UNet2DModel:
    """A small network with random weights, norms included (fresh norms are all ones and would hide mistakes)."""
    config = CONFIGS[name_or_config] if isinstance(name_or_config, str) else name_or_config
    torch.manual_seed(seed)
    unet = UNet2DModel(**config).eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return unet


def inputs_for(unet: UNet2DModel, n: int = 2, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of a forward pass."""
    g = torch.Generator().manual_seed(seed)
    size, steps = unet.config["sample_size"], unet.config.get("num_train_timesteps") or 1000
    found: dict[str, Any] = {
        "sample": torch.randn(n, unet.config["in_channels"], size, size, generator=g),
        "timestep": torch.randint(1, steps, (n,), generator=g),
    }
    if unet.class_embedding is not None:
        found["class_labels"] = torch.arange(n)
    return found
