"""From gradients of several terms to one direction: by their products alone, so that no large tensor is made twice."""

from __future__ import annotations

import torch
from torch import Tensor


def project_conflicts(products: Tensor) -> Tensor:
    """Take out of each term's gradient what pulls against another's, sample by sample.

    Gradient surgery of "Gradient Surgery for Multi-Task Learning" (Yu et al., 2020, https://arxiv.org/abs/2001.06782,
    algorithm 1): a gradient with a negative product with another term's gradient is projected onto the plane at right
    angles to that; the others are visited in turn. Two differences: each sample's gradient is projected by itself (a
    sample's direction then depends on no neighbour, and chunks and processes change nothing), and the others are
    visited from the next term in the list onwards instead of in random order.

    Args:
        products: (B, K, K), products of the K gradients of each sample.

    Returns:
        (B, K, K): row k says of which multiples of the K gradients the projected gradient of term k consists.
    """
    size = products.shape[-1]
    rows = []
    for term in range(size):
        parts = torch.zeros_like(products[:, 0])
        parts[:, term] = 1
        for other in ((term + offset) % size for offset in range(1, size)):
            product = (parts * products[:, :, other]).sum(1)
            square = products[:, other, other]
            conflict = (product < 0) & (square > 0)
            multiple = torch.where(conflict, product / torch.where(square > 0, square, 1), 0)
            parts = parts.clone()
            parts[:, other] = parts[:, other] - multiple
        rows.append(parts)
    return torch.stack(rows, dim=1)


def weighted_sum(gradients: Tensor, coefficients: Tensor) -> Tensor:
    """Return the sum over terms of coefficient * gradient.

    Args:
        gradients: (B, K, ...).
        coefficients: (B, K).
    """
    flat = gradients.flatten(2)
    return torch.bmm(coefficients.to(flat).unsqueeze(1), flat).view(gradients[:, 0].shape)
