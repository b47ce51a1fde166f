"""A short run of every GPU kernel for compute-sanitizer: `compute-sanitizer --tool memcheck python -m benchmarks.sanitize`.

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own and an access just outside it is seen.
"""

from __future__ import annotations

import torch

from wanda_fast import ops, reference


def main() -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device=device).manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    inputs = [
        rand(6, 37, 9, 7),
        rand(4, 64, 16, 16).bfloat16().to(memory_format=torch.channels_last),
        rand(2, 320, 64, 64).half(),
        rand(3, 77, 130),
        rand(9, 31),
        rand(3, 128, 32, 32).bfloat16().to(memory_format=torch.channels_last),
    ]
    for x in inputs:
        for rows in (
            torch.arange(len(x), device=device),
            torch.arange(len(x), device=device) // 2,
            torch.zeros(len(x), dtype=torch.int64, device=device),
        ):
            out = torch.zeros(len(x), x.shape[1] if x.dim() == 4 else x.shape[-1], device=device)
            want = reference.channel_sq_norm(x.double(), rows, out.double())
            ops.channel_sq_norm(x, rows, out, backend="triton")
            assert torch.allclose(out.double(), want, rtol=1e-4, atol=1e-3)
    for weight in (
        rand(40, 24, 3, 3),
        rand(33, 70).bfloat16(),
        rand(64, 32, 3, 3).to(memory_format=torch.channels_last),
        rand(1030, 460, 3, 3),  # past LARGE_ELEMENTS, full and cut tiles
        rand(2050, 2100).half(),
    ):
        norm = rand(weight.shape[1]).abs()
        for got, want in zip(
            ops.wanda_score(weight, norm, backend="triton"),
            reference.wanda_score(weight.double(), norm.double()),
            strict=True,
        ):
            assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-2)
        sq, row_weight = rand(33, weight.shape[1]).square(), rand(33).abs()
        ops.wanda_score_stats(weight, sq, row_weight, backend="triton")
    tensors = [
        rand(40, 24, 3, 3),
        rand(40),
        rand(33, 70).bfloat16(),
        rand(64, 32, 3, 3).to(memory_format=torch.channels_last),
        rand(17, 5).to(torch.int8),
        rand(37, 303, 3, 3),
        rand(37, 606, 3, 3).bfloat16(),
        rand(37, 606, 3, 3).half()[:, 1:],
    ]
    keep_out = [torch.arange(0, t.shape[0], 3, device=device) for t in tensors]
    keep_in = [None if t.dim() == 1 else torch.arange(1, t.shape[1], 2, device=device) for t in tensors]
    for dtype in (None, torch.bfloat16, torch.float32):
        results = ops.compact(tensors, keep_out, keep_in, dtype=dtype, backend="cuda")
        for got, want in zip(results, reference.compact(tensors, keep_out, keep_in, dtype), strict=True):
            assert torch.equal(got, want)
    maps = ((rand(5, 70, 7, 9), 20, 3), (rand(3, 130, 8, 8).bfloat16(), 140, 3), (rand(4, 33, 6, 5), 7, 1), (rand(2, 3, 9, 9), 4, 3))
    for x, c_out, kernel in maps:
        y = rand(len(x), c_out, *x.shape[2:])
        geometry = (kernel, kernel), (1, 1), (kernel // 2, kernel // 2)
        for samples in (None, rand(len(x)).abs()):
            exact = reference.conv_gram(x.double(), y.double(), *geometry, None if samples is None else samples.double())
            for got, want in zip(ops.conv_gram(x, y, *geometry, weight=samples, backend="triton"), exact, strict=True):
                assert torch.allclose(got.double(), want, rtol=1e-4, atol=3e-6 * float(want.abs().max()))
    torch.cuda.synchronize()
    print("all kernels ran and are right")


if __name__ == "__main__":
    main()
