"""A differentiable, analytic estimate of the size of libjpeg's baseline files. It has no learned parameters.

The estimate follows the encoder: RGB to YCbCr (JFIF), 2x2 chroma averaging, 8x8 DCT, division by the quantization
table, zigzag order, and the length of each block in the standard Huffman code (ITU-T T.81, Annex K). Only rounding is
replaced. libjpeg rounds a coefficient x (in quantization steps) to an integer, and the integer has one *size category*
s: its number of magnitude bits, 0 for a zero. Here the category is a random variable. With theta_s the smallest
magnitude of category s,

    P(size >= s) = (x / theta_s)^4 / (1 + (x / theta_s)^4),

a smooth step at theta_s. It is a function of x^2, so it is smooth at zero as well. The estimate is the *expected*
number of bits under independent coefficients. The coefficient at zigzag position k contributes

    sum_r P(r zeros before k) * sum_s P(size_k = s) * (s + length of the code for (r, s)).

ZRL codes are added for runs of 16 zeros or more, and the EOB code if the last coefficient is zero. With a hard step
instead of the smooth one, the result is libjpeg's own bit count (`exact=True`; tests compare it with Pillow's files).

Shape symbols: B images, N blocks, S = 10 AC size categories, R = 16 run lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_jpeg.scan import stuffed_bytes
from alignprop_jpeg.tables import (
    AC_CODES,
    CHROMA_BASE,
    DC_CODES,
    EOB,
    HEADER_BYTES,
    LUMA_BASE,
    ZRL,
    quantization_table,
    zigzag,
)

ZERO_MARGIN = 1.25
"""Factor on theta_1, the only calibrated number. Coefficients of natural images concentrate near zero: more of them are
just below the step, where the smooth step charges part of a bit, than just above it. With a factor of 1 the estimate is
4-6% too high; with 1.25 the mean error is at most 0.4% at every quality: `scripts/calibrate.py --margins 1.0 1.25`."""

SHARPNESS = 4
"""Exponent in P(size >= s). With 2 the estimate is about 10% too high; 8 is nearly a hard step, and coefficients below
it get almost no gradient. In gradient ascent on photographs, 3 and 4 reduce the true bytes fastest."""

RUNS = 16  # a Huffman symbol encodes a run of 0..15 zeros
AC_SIZES = 10  # AC coefficients of an 8-bit image have at most 10 magnitude bits, DC differences 11
STUFFING = 1 + 1 / 256  # a 0x00 byte follows each 0xFF byte of the scan; those of photographs are nearly uniform
PADDING_BITS = 3.5  # fills the last byte of the scan; half a byte on average

_BLOCKS_AT_ONCE = {"cpu": 256}  # keeps the intermediate tensors in the cache of one core
_BLOCKS_AT_ONCE_ELSEWHERE = 16384


class _Component(NamedTuple):
    """Constants that turn the blocks of one color component into bits; see `_component`."""

    transform: Tensor  # (64, 64): pixels of a block -> zigzag coefficients in quantization steps
    ac_thresholds: Tensor  # (S, 63, 1): theta_s ** -SHARPNESS
    ac_exact: Tensor  # (S, 63, 1): theta_s without ZERO_MARGIN, for the exact count
    ac_steps: Tensor  # (R, S): extra bits of size s over size s - 1, after a run of r zeros
    dc_thresholds: Tensor  # (11, 1, 1): as ac_thresholds
    dc_exact: Tensor  # (11, 1, 1): as ac_exact
    dc_steps: Tensor  # (11,): extra bits of DC size s over size s - 1
    dc_zero: int  # bits of a DC difference of zero
    eob: int  # bits of the end-of-block code
    zrl: int  # bits of the code for 16 zeros


@lru_cache(maxsize=64)
def _component(kind: int, quality: int, margin: float, dtype: torch.dtype, device: torch.device) -> _Component:
    """Build the constants of luma (kind 0) or chroma (kind 1)."""
    # The result is cached, and tensors created in inference mode cannot be saved for a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        # Orthonormal 8-point DCT, basis[u, x] = c_u / 2 * cos((2 x + 1) u pi / 16) with c_0 = 1 / sqrt(2), else 1.
        frequency = torch.arange(8, dtype=torch.float64)
        basis = torch.cos((2 * frequency + 1) * frequency[:, None] * torch.pi / 16) / 2
        basis[0] /= 2**0.5
        order = list(zigzag())
        steps = torch.tensor(quantization_table((LUMA_BASE, CHROMA_BASE)[kind], quality), dtype=torch.float64)[order]
        # The Kronecker product is the 2-D transform of a flattened block; its rows are put into zigzag order.
        transform = torch.kron(basis, basis)[order] / steps[:, None]

        lower = 2.0 ** torch.arange(11, dtype=torch.float64) - 0.5  # x rounds to at least 2^(s-1): size s or more
        # libjpeg's integer DCT yields rounded eighths, which moves ties by 1/16 of a unit before the division.
        ac_exact = lower[:AC_SIZES, None] - 1 / (16 * steps[1:])
        ac_soft = ac_exact.clone()
        ac_soft[0] *= margin

        # Bits of a symbol: its Huffman code plus s magnitude bits. Size 0 costs nothing here: ZRL and EOB are separate.
        codes = AC_CODES[kind]
        ac = torch.tensor([[codes[16 * r + s] + s for s in range(1, AC_SIZES + 1)] for r in range(RUNS)])
        dc = torch.tensor([DC_CODES[kind][s] + s for s in range(12)])

        def constant(tensor: Tensor) -> Tensor:
            return tensor.to(dtype).to(device)

        # With step_s = cost_s - cost_(s - 1), sum_s P(size = s) * cost_s equals sum_s P(size >= s) * step_s.
        return _Component(
            transform=constant(transform),
            ac_thresholds=constant(ac_soft[..., None] ** -SHARPNESS),
            ac_exact=constant(ac_exact[..., None]),
            ac_steps=constant(torch.diff(ac, dim=1, prepend=torch.zeros_like(ac[:, :1]))),
            dc_thresholds=constant(lower[:, None, None] ** -SHARPNESS),
            dc_exact=constant(lower[:, None, None]),
            dc_steps=constant(torch.diff(dc)),
            dc_zero=int(dc[0]),
            eob=codes[EOB],
            zrl=codes[ZRL],
        )


def _at_least(values: Tensor, thresholds: Tensor, exact_thresholds: Tensor, exact: bool) -> Tensor:
    """Return P(size >= s) for s = 1, 2, ..., with shape (S, *values.shape); 0 or 1 if `exact`."""
    if exact:
        return (values.abs() >= exact_thresholds - 1e-5).to(values.dtype)
    power: Tensor = values.square().square() * thresholds  # values ** SHARPNESS; squaring twice is cheaper than pow
    return power / (1 + power)


def _ac_bits(coefficients: Tensor, part: _Component, exact: bool) -> Tensor:
    """Return the expected bits (N,) of AC coefficients (63, N) in zigzag order."""
    at_least = _at_least(coefficients, part.ac_thresholds, part.ac_exact, exact)  # (S, 63, N)
    nonzero = at_least[0]  # (63, N): P(size >= 1)
    zero = 1 - nonzero
    # (R, 63, N): expected bits of the symbol at position k if r zeros precede it; a zero coefficient costs nothing.
    price = (part.ac_steps @ at_least.flatten(1)).reshape(RUNS, *nonzero.shape)

    # runs[r][k] = P(exactly r zeros between k and the previous nonzero coefficient or the start of the block), r < 16.
    start = torch.cat([torch.ones_like(nonzero[:1]), nonzero[:-1]])
    all_zero = torch.ones_like(nonzero)
    runs = []
    for r in range(RUNS):
        runs.append(all_zero * _delayed(start, r))
        all_zero = all_zero * _delayed(zero, r + 1)  # [k] = P(the r + 1 coefficients before k are zero)
    # all_zero[k] is now P(the 16 coefficients before k are zero). Then a ZRL code is written, and the run is counted
    # again from k - 16. That is a recurrence with a stride of 16, so four slices of positions suffice.
    run = torch.stack(runs)  # (R, 63, N)
    longs = torch.zeros_like(nonzero[:RUNS])  # expected ZRL codes before k; none in the first 16 positions
    run_parts, long_parts = [run[:, :RUNS]], [longs]
    for low in range(RUNS, 63, RUNS):
        high = min(63, low + RUNS)
        gate = all_zero[low:high]
        run_parts.append(run[:, low:high] + gate * run_parts[-1][:, : high - low])
        long_parts.append(gate * (1 + long_parts[-1][: high - low]))
    bits = (torch.cat(run_parts, dim=1) * price).sum((0, 1))  # over run lengths and positions: (N,)
    # ZRL codes are written only if a nonzero coefficient follows, and EOB only if the last coefficient is zero.
    bits = bits + part.zrl * (torch.cat(long_parts) * nonzero).sum(0)
    return bits + part.eob * zero[-1]


def _delayed(values: Tensor, places: int) -> Tensor:
    """Shift (63, N) along the zigzag order: result[k] = values[k - places], and zero for k < places."""
    return values if places == 0 else F.pad(values, (0, 0, places, -places))


class _AcBits(torch.autograd.Function):
    """`_ac_bits` in chunks of blocks. The gradient is computed in the forward pass, so memory is that of one chunk."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, part: _Component) -> Tensor:
        count = _BLOCKS_AT_ONCE.get(coefficients.device.type, _BLOCKS_AT_ONCE_ELSEWHERE)
        bits, slopes = [], []
        # Blocks are independent: the gradient of the sum over a chunk is the gradient of each block's own bits.
        for piece in torch.split(coefficients.detach(), count, dim=1):
            if ctx.needs_input_grad[0]:
                with torch.enable_grad():
                    leaf = piece.clone().requires_grad_()
                    cost = _ac_bits(leaf, part, exact=False)
                    slopes.append(torch.autograd.grad(cost.sum(), leaf)[0])
                bits.append(cost.detach())
            else:
                bits.append(_ac_bits(piece, part, exact=False))
        if slopes:
            ctx.save_for_backward(torch.cat(slopes, dim=1))
        return torch.cat(bits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors  # (63, N), while grad is (N,)
        return grad * slopes, None


def _blocks(plane: Tensor) -> Tensor:
    """Split (B, H, W) into 8x8 blocks, (64, B, rows, columns); edges are replicated to a multiple of 8."""
    height, width = plane.shape[1:]
    plane = F.pad(plane[:, None], (0, -width % 8, 0, -height % 8), mode="replicate")[:, 0]
    batch, height, width = plane.shape
    # (B, rows, 8, columns, 8) -> (8, 8, B, rows, columns); the pixels of a block come first, for the matrix product.
    return plane.reshape(batch, height // 8, 8, width // 8, 8).permute(2, 4, 0, 1, 3).flatten(0, 1)


@lru_cache(maxsize=64)
def _scan_order(rows: int, columns: int, device: torch.device, outside: bool = False) -> Tensor:
    """Return the order in which 4:2:0 luma blocks are written: 2x2 blocks per minimum coded unit (MCU), row by row.

    Blocks outside the image are dropped, or -1 if `outside`.
    """
    with torch.inference_mode(False):
        index = torch.arange(rows * columns).reshape(rows, columns)
        index = F.pad(index, (0, columns % 2, 0, rows % 2), value=-1)
        index = index.reshape(-(-rows // 2), 2, -(-columns // 2), 2).permute(0, 2, 1, 3).flatten()
        return (index if outside else index[index >= 0]).to(device)


def _plane_bits(plane: Tensor, part: _Component, exact: bool, pairs: bool) -> Tensor:
    """Return the expected bits (B,) of one component.

    Args:
        plane: (B, H, W) level-shifted values, -128..127.
        part: constants of the component.
        exact: count the bits of rounded coefficients.
        pairs: blocks are written 2x2 per MCU, as 4:2:0 luma is.
    """
    blocks = _blocks(plane)
    _, batch, rows, columns = blocks.shape
    coefficients = part.transform @ blocks.flatten(1)  # (64, N) with N = B * rows * columns
    dc = coefficients[0].reshape(batch, -1)  # (B, blocks per image)
    padding = 0
    if pairs:
        dc = dc[:, _scan_order(rows, columns, dc.device)]
        # libjpeg fills incomplete MCUs with blocks that have an unchanged DC and no AC coefficients.
        padding = (-(-rows // 2) * -(-columns // 2) * 4 - rows * columns) * (part.dc_zero + part.eob)
    # DC is coded as the difference from the previous block in scan order; the first block's predecessor is 0.
    change = torch.diff(dc.round() if exact else dc, dim=1, prepend=torch.zeros_like(dc[:, :1]))
    sizes = _at_least(change, part.dc_thresholds, part.dc_exact, exact)  # (11, B, blocks per image)
    dc_bits = torch.einsum("s,sbn->b", part.dc_steps, sizes) + part.dc_zero * rows * columns
    ac: Tensor = _ac_bits(coefficients[1:], part, True) if exact else _AcBits.apply(coefficients[1:], part)
    return dc_bits + ac.reshape(batch, -1).sum(1) + padding


def jpeg_size(
    images: Tensor,
    quality: int = 95,
    subsampling: str = "4:2:0",
    *,
    exact: bool = False,
    zero_margin: float = ZERO_MARGIN,
) -> Tensor:
    """Estimate the size in bytes of the JPEG file that Pillow writes for each image.

    Args:
        images: (B, 3, H, W) RGB in [0, 1], any height and width.
        quality: libjpeg quality, 1..95.
        subsampling: "4:2:0" (chroma averaged over 2x2 pixels) or "4:4:4".
        exact: count the Huffman bits of the rounded coefficients and the stuffed bytes instead; no gradient. For tests
            and calibration.
        zero_margin: see `ZERO_MARGIN`; only calibration changes it.

    Returns:
        Bytes including headers, shape (B,); float32, or float64 if the images are float64. Smooth in the images, with
        a first-order gradient. Values outside [0, 1] are not clipped, so they have a gradient as well.
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):
        # JFIF conversion in full precision, also under autocast; each plane is (B, H, W).
        red, green, blue = (images.to(dtype) * 255).unbind(1)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        chroma = (0.5 / 0.886 * (blue - luma), 0.5 / 0.701 * (red - luma))
        half = subsampling == "4:2:0"
        if exact:
            luma, chroma = luma.round(), (chroma[0].round(), chroma[1].round())
        parts = [_component(kind, quality, zero_margin, dtype, images.device) for kind in (0, 1)]
        # Luma is shifted to -128..127. Chroma is centered at zero already: its offset of 128 cancels the shift.
        planes = [luma - 128, *(_halve(plane, exact) if half else plane for plane in chroma)]
        bits = torch.zeros(len(images), dtype=dtype, device=images.device)
        for index, plane in enumerate(planes):
            bits = bits + _plane_bits(plane, parts[min(index, 1)], exact, pairs=half and index == 0)
        if exact:
            return HEADER_BYTES + (bits / 8).ceil() + _stuffed_bytes(planes, parts, half)
        return HEADER_BYTES + (bits + PADDING_BITS) / 8 * STUFFING


def _stuffed_bytes(planes: Sequence[Tensor], parts: Sequence[_Component], half: bool) -> Tensor:
    """Return the bytes (B,) that stuffing adds to the scan, from the bits of the rounded coefficients."""
    quantized = []  # of each component: (B, blocks, 64)
    for index, plane in enumerate(planes):
        part = parts[min(index, 1)]
        blocks = _blocks(plane)
        coefficients = (part.transform @ blocks.flatten(1)).reshape(64, len(plane), -1)  # (64, B, blocks)
        dc, ac = coefficients[:1].round(), coefficients[1:]
        ac = (ac.abs() - part.ac_exact[0][..., None] + 1 + 1e-5).floor() * ac.sign()
        quantized.append(torch.cat([dc, ac]).permute(1, 2, 0).long())
        if index == 0:
            rows, columns = blocks.shape[2:]
    order = list(range(rows * columns))
    if half:
        order = _scan_order(rows, columns, torch.device("cpu"), outside=True).tolist()
    counts = []
    for luma, *chroma in zip(*quantized, strict=True):
        inside = luma.tolist()
        ordered = [inside[i] if i >= 0 else None for i in order]
        counts.append(stuffed_bytes(ordered, [component.tolist() for component in chroma], 4 if half else 1))
    return torch.tensor(counts, dtype=planes[0].dtype, device=planes[0].device)


def _halve(plane: Tensor, exact: bool) -> Tensor:
    """Average (B, H, W) over 2x2 pixels; edges are replicated to the end of the last MCU, as in libjpeg."""
    height, width = plane.shape[1:]
    small = F.avg_pool2d(F.pad(plane[:, None], (0, -width % 16, 0, -height % 16), mode="replicate"), 2)[:, 0]
    if exact:  # libjpeg rounds halves down in even columns and up in odd ones
        small = torch.floor(small + torch.tensor([0.25, 0.5], device=plane.device).repeat(small.shape[2] // 2))
    return small
