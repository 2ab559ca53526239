"""Combine the gradients of several terms, using only their inner products: no image-sized tensor is copied."""

from __future__ import annotations

import torch
from torch import Tensor


def project_conflicts(products: Tensor) -> Tensor:
    """Remove from each term's gradient the component that conflicts with another term's, for each sample (PCGrad).

    Algorithm 1 of "Gradient Surgery for Multi-Task Learning" (Yu et al. 2020, https://arxiv.org/abs/2001.06782):
    if <g_k, g_j> < 0, then g_k becomes g_k - <g_k, g_j> / ||g_j||^2 g_j, for all other terms j in turn. Two
    differences: each sample's gradient is projected separately (so it does not depend on the other samples, chunks or
    processes), and the other terms are visited in list order, starting after k, instead of in random order.

    Args:
        products: (B, K, K), inner products of the K gradients of each sample.

    Returns:
        (B, K, K): row k contains the coefficients of term k's projected gradient in terms of the K gradients.
    """
    size = products.shape[-1]
    rows = []
    for term in range(size):
        # (B, K): the projected gradient of this term as coefficients of all K gradients; at first 1 of its own.
        parts = torch.zeros_like(products[:, 0])
        parts[:, term] = 1
        for other in ((term + offset) % size for offset in range(1, size)):
            # <projected gradient, g_other> is linear in the coefficients, so the Gram matrix suffices: (B,).
            product = (parts * products[:, :, other]).sum(1)
            square = products[:, other, other]
            conflict = (product < 0) & (square > 0)
            # The inner `where` keeps a zero gradient from dividing by zero; the outer one ignores its result.
            multiple = torch.where(conflict, product / torch.where(square > 0, square, 1), 0)
            parts = parts.clone()
            parts[:, other] = parts[:, other] - multiple
        rows.append(parts)
    return torch.stack(rows, dim=1)
