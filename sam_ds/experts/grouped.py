"""Multiplying rows by the matrix of their group: one call for all experts.

Legend: P rows (token, expert pairs sorted by expert), S slots, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm


def grouped_matmul(x_PI: Tensor, weight_SIO: Tensor, ends_S: Tensor) -> Tensor:
    """(P, O) in the weights' precision: row p times the matrix of its group, which owns rows [ends[s-1], ends[s]).

    `ends_S` int32, ends_S[-1] == P. Where the shapes do not suit the grouped kernel (rows of 16 bytes), and for a
    handful of rows, where its start-up costs more than it saves, a loop over the groups computes the same.
    """
    x_PI = x_PI.to(weight_SIO.dtype)  # under autocast a product of two fp32 matrices comes in half precision
    aligned = all(size * x_PI.element_size() % 16 == 0 for size in weight_SIO.shape[1:])
    if aligned and x_PI.shape[0] >= 4 * weight_SIO.shape[0]:
        return grouped_mm(x_PI, weight_SIO, offs=ends_S)
    sizes = torch.diff(ends_S, prepend=ends_S.new_zeros(1)).tolist()
    return torch.cat([rows @ weight_SIO[slot] for slot, rows in enumerate(x_PI.split(sizes))])
