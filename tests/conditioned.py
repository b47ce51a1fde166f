"""Tiny random text-to-image UNets and diffusion transformers that tests share."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

_UNET: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}
_DIT: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
    "out_channels": 8,
}
CONDITIONED: dict[str, tuple[str, dict[str, Any]]] = {
    # eight heads everywhere, convolutions in and out of the transformers
    "sd15": ("UNet2DConditionModel", {**_UNET, "attention_head_dim": 4}),
    # heads of one size, so their number differs by level; linear projections
    "sd21": ("UNet2DConditionModel", {**_UNET, "attention_head_dim": (2, 4), "use_linear_projection": True}),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **_UNET,
            "block_out_channels": (16, 32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        },
    ),
    "scale_shift": (
        "UNet2DConditionModel",
        {**_UNET, "attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5},
    ),
    "dit": ("DiTTransformer2DModel", _DIT),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **_DIT,
            "attention_head_dim": 12,
            "num_embeds_ada_norm": 1000,
            "cross_attention_dim": 48,
            "caption_channels": 20,
            "use_additional_conditions": True,
        },
    ),
}


def random_network(name: str, seed: int = 0) -> nn.Module:
    """A network with random weights, norms and embeddings included (fresh ones hide mistakes)."""
    kind, config = CONDITIONED[name]
    torch.manual_seed(seed)
    network = getattr(diffusers, kind)(**config).eval().requires_grad_(False)
    for key, parameter in network.named_parameters():
        if "norm" in key or key.endswith("bias"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network
