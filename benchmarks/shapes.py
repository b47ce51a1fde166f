"""Shapes the benchmarks share: google/ddpm-cifar10-32 and the UNet of Stable Diffusion XL.

Activations are [N, C, H, W] (4 numbers) or [N, L, C] / [N, C]; weights [C_out, C_in, kh, kw] or [C_out, C_in].
"""

from __future__ import annotations

from typing import Any

# The architecture of google/ddpm-cifar10-32 as diffusers' UNet2DModel takes it.
DDPM_CIFAR10: dict[str, Any] = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None, "norm_num_groups": 32, "norm_eps": 1e-6, "act_fn": "silu", "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1,
}  # fmt: skip

# Layer inputs at batch 128.
DDPM_ACTIVATIONS = {
    "ddpm level 0": (128, 128, 32, 32),
    "ddpm level 0 skip": (128, 384, 32, 32),
    "ddpm level 1": (128, 256, 16, 16),
    "ddpm level 1 skip": (128, 512, 16, 16),
    "ddpm level 2": (128, 256, 8, 8),
    "ddpm level 3": (128, 256, 4, 4),
    "ddpm attention": (128, 256, 256),
    "ddpm time": (128, 512),
}
# Inputs of at least 64 MiB in every dtype, where bandwidth alone decides.
LARGE_ACTIVATIONS = {
    "large 64x64": (256, 128, 64, 64),
    "large 16x16": (256, 1024, 16, 16),
    "large tokens": (64, 1024, 1024),
}
# 1024x1024 pixels: latents 128x128; classifier-free guidance doubles the batch.
SDXL_ACTIVATIONS = {
    "sdxl level 0": (2, 320, 128, 128),
    "sdxl level 0 skip": (2, 960, 128, 128),
    "sdxl level 1": (2, 640, 64, 64),
    "sdxl level 2 skip": (2, 2560, 32, 32),
    "sdxl attention 1": (2, 4096, 640),
    "sdxl feed-forward 2": (2, 1024, 5120),
    "sdxl text": (2, 77, 2048),
    "sdxl level 0 b16": (16, 320, 128, 128),
    "sdxl feed-forward 1 b16": (16, 4096, 2560),
}
CPU_ACTIVATIONS = {
    "ddpm level 0 b8": (8, 128, 32, 32),
    "ddpm level 1 b8": (8, 256, 16, 16),
    "ddpm attention b8": (8, 256, 256),
    "ddpm time b8": (8, 512),
}

DDPM_WEIGHTS = {
    "ddpm 128x128x3x3": (128, 128, 3, 3),
    "ddpm 256x512x3x3": (256, 512, 3, 3),
    "ddpm 256x256": (256, 256),
}
SDXL_WEIGHTS = {
    "sdxl 1280x2560x3x3": (1280, 2560, 3, 3),
    "sdxl 320x960x3x3": (320, 960, 3, 3),
    "sdxl 640x640": (640, 640),
    "sdxl 10240x1280": (10240, 1280),
    "sdxl 1280x5120": (1280, 5120),
}
CPU_WEIGHTS = {
    "ddpm 128x128x3x3": (128, 128, 3, 3),
    "ddpm 256x512x3x3": (256, 512, 3, 3),
    "sdxl 1280x1280": (1280, 1280),
}

# (C_out, C_in, kernel) of the resnet convolutions and (C_out, C_in) of the linear layers of one transformer block per level, with their number.
SDXL_NETWORK: tuple[tuple[tuple[int, ...], int], ...] = (
    ((320, 4, 3, 3), 1), ((320, 320, 3, 3), 8), ((320, 640, 3, 3), 2), ((320, 960, 3, 3), 1), ((4, 320, 3, 3), 1),
    ((640, 320, 3, 3), 1), ((640, 640, 3, 3), 9), ((640, 960, 3, 3), 1), ((640, 1280, 3, 3), 1), ((640, 1920, 3, 3), 1),
    ((1280, 640, 3, 3), 1), ((1280, 1280, 3, 3), 11), ((1280, 1920, 3, 3), 1), ((1280, 2560, 3, 3), 2),
    ((640, 640), 70), ((640, 2048), 20), ((5120, 640), 10), ((640, 2560), 10),
)  # fmt: skip


def ddpm_unet() -> Any:
    """The ddpm-cifar10-32 network with random weights."""
    from diffusers import UNet2DModel

    return UNet2DModel(**DDPM_CIFAR10)


def ddpm_convolutions() -> list[tuple[int, ...]]:
    """Weight shapes of its 65 convolutions, in the order of the modules."""
    import torch

    with torch.device("meta"):
        unet = ddpm_unet()
    return [tuple(m.weight.shape) for m in unet.modules() if isinstance(m, torch.nn.Conv2d)]


def ddpm_parameters() -> list[tuple[int, ...]]:
    """Shapes of all parameters: weights, biases and norm vectors."""
    import torch

    with torch.device("meta"):
        unet = ddpm_unet()
    return [tuple(p.shape) for p in unet.parameters()]
