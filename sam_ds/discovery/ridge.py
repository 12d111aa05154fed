"""Linear least squares with a ridge: what gates and stand-ins are fitted with."""

from __future__ import annotations

import torch
from torch import Tensor


def ridge(gram_FF: Tensor, cross_FO: Tensor, strength: float) -> Tensor:
    """(F, O) minimiser of ||Y - X W||^2 + strength * mean(diag(X'X)) * ||W||^2, from X'X and X'Y (float64)."""
    scale = gram_FF.diagonal().mean().clamp(min=1e-12) * strength
    solved_FO: Tensor = torch.linalg.solve(gram_FF + torch.diag(scale.expand(len(gram_FF))), cross_FO)
    return solved_FO


def ridge_of(x_TF: Tensor, y_TO: Tensor, strength: float) -> Tensor:
    """(F, O) the same from X and Y; every column of X counts alike, whatever its unit."""
    rms_F = x_TF.square().mean(0).sqrt().clamp(min=1e-12)
    scaled_TF = x_TF / rms_F
    gram_FF, cross_FO = (scaled_TF.t() @ scaled_TF).double(), (scaled_TF.t() @ y_TO).double()
    return ridge(gram_FF, cross_FO, strength).to(x_TF) / rms_F[:, None]
