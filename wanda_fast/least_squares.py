"""Ridge regression from sums: normal equations, their solution, and what an answer is worth on other rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import Ranks, ranks


class Sums:
    """Normal equations of rows X [M, K + 1] (last column ones) against residuals R and targets Y [M, C], in float64.

    Args:
        unknowns: K.
        outputs: C.
        device: where the rows are; the sums are kept there too, if it knows float64, else on the CPU.
        together: the processes that each add their own rows; None for those of this run.
    """

    def __init__(self, unknowns: int, outputs: int, device: torch.device, together: Ranks | None = None) -> None:
        self._ranks = together or ranks()
        self.home = torch.device("cpu") if device.type == "mps" else device
        self.xtx = self._zeros(unknowns + 1, unknowns + 1)
        self.xtr = self._zeros(unknowns + 1, outputs)
        self.rr, self.y, self.yy = self._zeros(outputs), self._zeros(outputs), self._zeros(outputs)
        self.rows = 0
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.home)

    def add(
        self, xtx: Tensor, xtr: Tensor, r: Tensor, y: Tensor, dims: tuple[int, ...], weight: Tensor | None = None
    ) -> None:
        """Add the sums of some rows. r and y hold the rows themselves, `dims` are all their dimensions but the outputs'."""
        self.xtx += xtx.to(self.home)
        self.xtr += xtr.to(self.home)
        y_w, r_w = (y, r) if weight is None else (y * weight, r * weight)
        self.y += y_w.sum(dims).to(self.home)
        self.yy += (y_w * y).sum(dims).to(self.home)
        self.rr += (r_w * r).sum(dims).to(self.home)
        self.rows += y.numel() // max(1, len(self.rr))

    def hold_out(self, x: Tensor, r: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Keep rows, of weight [M] or 1, that judge answers and take no part in them."""
        if weight is not None:
            root = weight[:, None].sqrt()
            x, r, y = x * root, r * root, y * root
        self._held.append((x, r, y))

    def join(self) -> None:
        """Add up the sums of all processes; after the last `add` of each."""
        rows = torch.tensor(self.rows, dtype=torch.int64)
        self._ranks.add([self.xtx, self.xtr, self.rr, self.y, self.yy, rows])
        self.rows = int(rows)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.xtx).all()) and bool(torch.isfinite(self.xtr).all())

    def error(self, delta: Tensor | None, columns: slice) -> float:
        """Σ(R - XΔ)² / Σ(Y - mean Y)² over some outputs; Δ None is 0."""
        rr = self.rr[columns].sum()
        if delta is not None:
            d = delta[:, columns]
            rr = rr - 2 * (d * self.xtr[:, columns]).sum() + (d * (self.xtx @ d)).sum()
        return float(rr.clamp_min(0) / _spread(self.xtx[-1, -1], self.y[columns], self.yy[columns]))

    def held_error(self, delta: Tensor | None, columns: slice) -> float | None:
        """The same on the rows held out, those of all processes together; None where there are none."""
        if len(self._held) > 1:
            self._held = [tuple(torch.cat(parts) for parts in zip(*self._held, strict=True))]  # type: ignore[list-item]
        rr, sums, squares = self._zeros(1), self._zeros(len(self.rr[columns])), self._zeros(len(self.rr[columns]))
        n = self._zeros(1)
        for x, r, y in self._held:
            r, y = r[:, columns], y[:, columns]
            if delta is not None:
                r = r - x @ delta[:, columns].to(device=x.device, dtype=x.dtype)
            rr += r.square().sum().to(self.home)
            root = x[:, -1:]  # the column of ones: roots of the rows' weights
            sums += (y * root).sum(0).to(self.home)
            squares += y.square().sum(0).to(self.home)
            n += root.square().sum().to(self.home)
        self._ranks.add([rr, sums, squares, n])
        return float(rr / _spread(n, sums, squares)) if float(n) else None


def _spread(n: Tensor, y: Tensor, yy: Tensor) -> Tensor:
    """Σ(Y - mean Y)² over all outputs; an output that is constant counts with ΣY² instead."""
    spread = yy - y.square() / n.to(y).clamp_min(1e-300)
    return torch.where(spread > 1e-12 * yy, spread, yy).sum().clamp_min(1e-300)


def solve_ridge(xtx: Tensor, xtr: Tensor, ridge: float, *, bias: bool = True) -> tuple[Tensor, float, str]:
    """Δ that minimises ‖R - XΔ‖² + λ‖Δ‖², λ = ridge · mean diagonal of the centred XᵀX.

    The last column of X is ones; its coefficient is not penalised, hence "centred".

    Args:
        xtx: [K + 1, K + 1] float64.
        xtr: [K + 1, C] float64.
        ridge: at least 0.
        bias: whether the layer has a bias that can take up the coefficient of the ones. Without one it is 0, and nothing is centred.

    Returns:
        Δ [K + 1, C], the ridge that was used, and a remark ("" if there is nothing to say). Where the matrix is not positive
        definite to rounding, the ridge is raised tenfold until it is.
    """
    n = xtx[-1, -1]
    mean = xtx[-1, :-1] / n if bias else torch.zeros_like(xtx[-1, :-1])  # [K]
    gram = xtx[:-1, :-1] - torch.outer(mean, mean) * n
    rhs = xtr[:-1] - mean[:, None] * xtr[-1]
    diagonal = gram.diagonal().clamp_min(0)
    scale = float(diagonal.mean()) if len(diagonal) else 0.0
    # the sums were made in float32: a variance below this share of the mean square is rounding
    constant = int((diagonal <= 1e-6 * xtx.diagonal()[:-1]).sum())
    remarks = [f"{constant} constant inputs"] if constant else []
    delta = torch.zeros_like(xtr)
    used = ridge
    if scale > 0:
        while True:
            shifted = gram.clone()
            shifted.diagonal().add_(used * scale)
            factor, info = torch.linalg.cholesky_ex(shifted)
            # A pivot of rounding size is a singular matrix too; with a ridge of more than that there is none.
            if int(info) == 0 and float(factor.diagonal().min()) ** 2 > 1e-10 * scale:
                break
            if used > 1e6:
                raise RuntimeError("the normal equations are not finite")
            used = max(used * 10, 1e-9)
        delta[:-1] = torch.cholesky_solve(rhs, factor)
        if used != ridge:
            remarks.append(f"rank-deficient: ridge raised to {used:.0e}")
    if bias:
        delta[-1] = (xtr[-1] - (mean * n) @ delta[:-1]) / n
    return delta, used, ", ".join(remarks)
