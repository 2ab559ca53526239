"""The scan of a baseline JPEG file, bit by bit: the exact number of bytes that stuffing adds to it.

Byte stuffing depends on the bits themselves: a 0x00 byte follows each 0xFF byte of the scan. In photographs that is one
byte in 256; the regular bits of a checkerboard have many times more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from alignprop_jpeg.tables import AC_CODES, DC_CODES, EOB, ZRL

Block = Sequence[int]  # 64 quantized coefficients in zigzag order


def stuffed_bytes(luma: Sequence[Block | None], chroma: Sequence[Sequence[Block]], per_unit: int) -> int:
    """Return how many bytes of the scan are 0xFF.

    Args:
        luma: blocks in scan order; None for a block outside the image, which repeats the DC value and has no AC.
        chroma: the blocks of both chroma components in scan order, one per minimum coded unit.
        per_unit: luma blocks per minimum coded unit: 4 with 4:2:0, 1 with 4:4:4.
    """
    bits = "".join(_scan_bits(luma, chroma, per_unit))
    bits += "1" * (-len(bits) % 8)  # libjpeg fills the last byte with ones
    return int(bits, 2).to_bytes(len(bits) // 8, "big").count(0xFF) if bits else 0


def _scan_bits(luma: Sequence[Block | None], chroma: Sequence[Sequence[Block]], per_unit: int) -> Iterator[str]:
    before = [0, 0, 0]  # DC value of the block before, of each component
    for unit in range(len(luma) // per_unit):
        blocks: list[tuple[int, Block | None]] = [(0, luma[unit * per_unit + i]) for i in range(per_unit)]
        blocks += [(1 + i, component[unit]) for i, component in enumerate(chroma)]
        for component, block in blocks:
            dc = before[component] if block is None else block[0]
            kind = min(component, 1)
            yield _symbol(_DC[kind], 0, dc - before[component])
            before[component] = dc
            yield from _ac_bits(block, kind)


def _ac_bits(block: Block | None, kind: int) -> Iterator[str]:
    codes, run, end = _AC[kind], 0, 0
    if block is not None:
        for position in range(1, 64):
            if not block[position]:
                run += 1
                continue
            for _ in range(run // 16):
                yield codes[ZRL]
            yield _symbol(codes, run % 16, block[position])
            run, end = 0, position
    if end < 63:
        yield codes[EOB]


def _symbol(codes: Mapping[int, str], run: int, value: int) -> str:
    """Return the Huffman code of a run of zeros and a value's size, and the magnitude bits of the value."""
    size = abs(value).bit_length()
    if not size:
        return codes[0]
    magnitude = value if value > 0 else value + (1 << size) - 1  # T.81 F.1.2.1: the ones' complement
    return codes[16 * run + size] + f"{magnitude:0{size}b}"


def _codes(lengths: Mapping[int, int]) -> dict[int, str]:
    """Return the canonical Huffman codes of symbols that are ordered by code length (T.81, Annex C)."""
    codes, code, before = {}, 0, 0
    for symbol, length in lengths.items():
        code <<= length - before
        codes[symbol] = f"{code:0{length}b}"
        code, before = code + 1, length
    return codes


_DC = tuple(map(_codes, DC_CODES))
_AC = tuple(map(_codes, AC_CODES))
