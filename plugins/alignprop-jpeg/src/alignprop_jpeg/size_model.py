"""How large libjpeg's file would be: a smooth, analytic model of its baseline coder. No learned part.

The steps are the encoder's own: RGB to YCbCr (JFIF), chroma averaged 2x2, 8x8 DCT, division by the quantisation table,
zigzag, and the price of every block in the standard Huffman code (ITU-T T.81, Annex K). One thing differs: rounding.
A coefficient x (in quantisation steps) that libjpeg rounds to one whole number belongs here to every *size category*
s (the number of magnitude bits, 0 for a zero) in part. With theta_s the magnitude from which the category is s,

    P(size >= s) = (x / theta_s)^4 / (1 + (x / theta_s)^4),

a step at theta_s with its corner rounded: polynomial in x^2, so smooth at zero too. The price is then the *expected*
number of bits, taking coefficients as independent: for the coefficient at zigzag position k

    sum_r P(r zeros before k) * sum_s P(size_k = s) * (s + length of the code for (r, s)),

plus the ZRL codes of longer runs and the EOB code if the last coefficient is zero. With a true step instead of the
rounded one this *is* libjpeg's count, bit for bit (`exact=True`; the tests hold it to Pillow's files).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alignprop_jpeg.tables import (
    AC_CODES,
    CHROMA_BASE,
    DC_CODES,
    EOB,
    HEADER_BYTES,
    LUMA_BASE,
    ZRL,
    quantisation_table,
    zigzag,
)

ZERO_MARGIN = 1.25
"""The one calibrated number: theta_1 is raised by this factor. Natural coefficients crowd towards zero, so more of them
sit just below the step, where each is charged a part of a bit, than just above it; unraised, sizes come out 4-6% high.
At 1.25 the mean error is within 0.4% at every quality (`python -m alignprop_jpeg.calibrate --margins 1.0 1.25 1.4`)."""

SHARPNESS = 4
"""The exponent in P(size >= s), a compromise: 2 makes sizes come out about 10% high, 8 is nearly a step and leaves
coefficients below it next to no slope. Under gradient ascent on photographs 3 and 4 lower the true bytes fastest."""

RUNS = 16  # a Huffman symbol holds a run of 0..15 zeros
AC_SIZES = 10  # an 8-bit picture's AC coefficients have at most 10 magnitude bits, DC differences 11
STUFFING = 1 + 1 / 256  # a 0xFF byte in the scan is followed by 0x00; scan bytes are close to uniform
PADDING_BITS = 3.5  # the last byte is filled up; half a byte on average

_BLOCKS_AT_ONCE = {"cpu": 256}  # keeps the working set in a core's cache
_BLOCKS_AT_ONCE_ELSEWHERE = 16384


class _Component(NamedTuple):
    """What one colour component's blocks are priced with; `R` runs, `S` sizes."""

    transform: Tensor  # (64, 64): block of pixels -> zigzag coefficients in quantisation steps
    ac_thresholds: Tensor  # (S, 63, 1): theta_s to the power -4
    ac_exact: Tensor  # (S, 63, 1): theta_s
    ac_steps: Tensor  # (R, S): bits that size s costs more than size s - 1 after a run of r
    dc_thresholds: Tensor  # (11, 1, 1)
    dc_exact: Tensor
    dc_steps: Tensor  # (11,)
    dc_zero: int  # bits of an unchanged DC
    eob: int
    zrl: int


@lru_cache(maxsize=64)
def _component(kind: int, quality: int, margin: float, dtype: torch.dtype, device: torch.device) -> _Component:
    """Build the constants of luma (0) or chroma (1)."""
    # A tensor made under inference_mode could never be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        frequency = torch.arange(8, dtype=torch.float64)
        basis = torch.cos((2 * frequency + 1) * frequency[:, None] * torch.pi / 16) / 2
        basis[0] /= 2**0.5
        order = list(zigzag())
        steps = torch.tensor(quantisation_table((LUMA_BASE, CHROMA_BASE)[kind], quality), dtype=torch.float64)[order]
        transform = torch.kron(basis, basis)[order] / steps[:, None]

        lower = 2.0 ** torch.arange(11, dtype=torch.float64) - 0.5  # |rounded| >= 2^(s-1) from here on
        # libjpeg's integer DCT ends in eighths, themselves rounded: ties move by 1/16 before the division.
        ac_exact = lower[:AC_SIZES, None] - 1 / (16 * steps[1:])
        ac_soft = ac_exact.clone()
        ac_soft[0] *= margin

        codes = AC_CODES[kind]
        ac = torch.tensor([[codes[16 * r + s] + s for s in range(1, AC_SIZES + 1)] for r in range(RUNS)])
        dc = torch.tensor([DC_CODES[kind][s] + s for s in range(12)])

        def place(tensor: Tensor) -> Tensor:
            return tensor.to(dtype).to(device)

        return _Component(
            transform=place(transform),
            ac_thresholds=place(ac_soft[..., None] ** -SHARPNESS),
            ac_exact=place(ac_exact[..., None]),
            ac_steps=place(torch.diff(ac, dim=1, prepend=torch.zeros_like(ac[:, :1]))),
            dc_thresholds=place(lower[:, None, None] ** -SHARPNESS),
            dc_exact=place(lower[:, None, None]),
            dc_steps=place(torch.diff(dc)),
            dc_zero=int(dc[0]),
            eob=codes[EOB],
            zrl=codes[ZRL],
        )


def _at_least(values: Tensor, thresholds: Tensor, exact_thresholds: Tensor, exact: bool) -> Tensor:
    """Return P(size >= s) for s = 1, 2, ...: (S, *values.shape)."""
    if exact:
        return (values.abs() >= exact_thresholds - 1e-5).to(values.dtype)
    power: Tensor = values.square().square() * thresholds  # to the power SHARPNESS, without the cost of pow
    return power / (1 + power)


def _ac_bits(coefficients: Tensor, part: _Component, exact: bool) -> Tensor:
    """Return the expected bits of the AC coefficients (63, N), zigzag order first: (N,)."""
    at_least = _at_least(coefficients, part.ac_thresholds, part.ac_exact, exact)  # (S, 63, N)
    nonzero = at_least[0]
    zero = 1 - nonzero
    # Bits of the symbol at position k, were the run before it r; zero coefficients cost nothing. (R, 63, N)
    price = (part.ac_steps @ at_least.flatten(1)).reshape(RUNS, *nonzero.shape)

    # runs[r][k] = P(exactly r zeros stand between k and the nonzero one, or the block's start, before it), r < 16.
    start = torch.cat([torch.ones_like(nonzero[:1]), nonzero[:-1]])
    all_zero = torch.ones_like(nonzero)
    runs = []
    for r in range(RUNS):
        runs.append(all_zero * _delayed(start, r))
        all_zero = all_zero * _delayed(zero, r + 1)
    # all_zero[k] is now P(the 16 before k are zero): a ZRL code, and the count starts again at k - 16.
    run = torch.stack(runs)
    longs = torch.zeros_like(nonzero[:RUNS])
    run_parts, long_parts = [run[:, :RUNS]], [longs]
    for low in range(RUNS, 63, RUNS):
        high = min(63, low + RUNS)
        gate = all_zero[low:high]
        run_parts.append(run[:, low:high] + gate * run_parts[-1][:, : high - low])
        long_parts.append(gate * (1 + long_parts[-1][: high - low]))
    bits = (torch.cat(run_parts, dim=1) * price).sum((0, 1))
    bits = bits + part.zrl * (torch.cat(long_parts) * nonzero).sum(0)
    return bits + part.eob * zero[-1]


def _delayed(values: Tensor, places: int) -> Tensor:
    """Shift along the zigzag: result[k] = values[k - places], zero where there is none."""
    return values if places == 0 else F.pad(values, (0, 0, places, -places))


class _AcBits(torch.autograd.Function):
    """`_ac_bits` in pieces, its gradient taken on the spot: memory stays that of one piece, whatever the picture."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, part: _Component) -> Tensor:
        count = _BLOCKS_AT_ONCE.get(coefficients.device.type, _BLOCKS_AT_ONCE_ELSEWHERE)
        bits, slopes = [], []
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
        (slopes,) = ctx.saved_tensors
        return grad * slopes, None


def _blocks(plane: Tensor) -> Tensor:
    """Cut (B, H, W) into 8x8 blocks, edges repeated up to a multiple of 8: (64, B, rows, columns)."""
    height, width = plane.shape[1:]
    plane = F.pad(plane[:, None], (0, -width % 8, 0, -height % 8), mode="replicate")[:, 0]
    batch, height, width = plane.shape
    return plane.reshape(batch, height // 8, 8, width // 8, 8).permute(2, 4, 0, 1, 3).flatten(0, 1)


@lru_cache(maxsize=64)
def _scan_order(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the order in which 4:2:0 luma blocks are written: two by two, MCU after MCU."""
    with torch.inference_mode(False):
        index = torch.arange(rows * columns).reshape(rows, columns)
        index = F.pad(index, (0, columns % 2, 0, rows % 2), value=-1)
        index = index.reshape(-(-rows // 2), 2, -(-columns // 2), 2).permute(0, 2, 1, 3).flatten()
        return index[index >= 0].to(device)


def _plane_bits(plane: Tensor, part: _Component, exact: bool, pairs: bool) -> Tensor:
    """Return the expected bits of one component (B, H, W), level-shifted, 0..255 wide: (B,)."""
    blocks = _blocks(plane)
    _, batch, rows, columns = blocks.shape
    coefficients = part.transform @ blocks.flatten(1)
    dc = coefficients[0].reshape(batch, -1)
    padding = 0
    if pairs:
        dc = dc[:, _scan_order(rows, columns, dc.device)]
        # An MCU that hangs over the edge is filled with empty blocks whose DC does not change.
        padding = (-(-rows // 2) * -(-columns // 2) * 4 - rows * columns) * (part.dc_zero + part.eob)
    change = torch.diff(dc.round() if exact else dc, dim=1, prepend=torch.zeros_like(dc[:, :1]))
    sizes = _at_least(change, part.dc_thresholds, part.dc_exact, exact)
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
    """Estimate the size in bytes of the JPEG file Pillow would write for each image.

    Args:
        images: (B, 3, H, W), RGB in [0, 1], any height and width.
        quality: 1..95, libjpeg's.
        subsampling: "4:2:0" (chroma averaged over 2x2 pixels) or "4:4:4".
        exact: count the true Huffman bits of the rounded coefficients instead; no gradient. For tests and calibration.
        zero_margin: see `ZERO_MARGIN`; only calibration changes it.

    Returns:
        (B,) bytes, headers included; float32, or float64 if the images are. Smooth in the images; the gradient passes
        `gradcheck`. Values outside [0, 1] are taken as they are, so that they get a gradient too.
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):
        red, green, blue = (images.to(dtype) * 255).unbind(1)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        chroma = (0.5 / 0.886 * (blue - luma), 0.5 / 0.701 * (red - luma))
        half = subsampling == "4:2:0"
        if exact:
            luma, chroma = luma.round(), (chroma[0].round(), chroma[1].round())
        parts = [_component(kind, quality, zero_margin, dtype, images.device) for kind in (0, 1)]
        bits: Tensor = _plane_bits(luma - 128, parts[0], exact, pairs=half)
        for plane in chroma:
            small = _halve(plane, exact) if half else plane
            bits = bits + _plane_bits(small, parts[1], exact, pairs=False)
        return HEADER_BYTES + (bits + PADDING_BITS) / 8 * STUFFING


def _halve(plane: Tensor, exact: bool) -> Tensor:
    """Average (B, H, W) over 2x2 pixels; the edge is repeated as far as the last block reaches, as libjpeg does."""
    height, width = plane.shape[1:]
    small = F.avg_pool2d(F.pad(plane[:, None], (0, -width % 16, 0, -height % 16), mode="replicate"), 2)[:, 0]
    if exact:  # libjpeg rounds halves down and up in alternate columns
        small = torch.floor(small + torch.tensor([0.25, 0.5], device=plane.device).repeat(small.shape[2] // 2))
    return small
