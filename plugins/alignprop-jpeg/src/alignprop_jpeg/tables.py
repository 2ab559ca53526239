"""Quantization tables, Huffman code lengths and header size of libjpeg's baseline files (ITU-T T.81, Annex K).

Imports no torch.
"""

from __future__ import annotations

#: T.81 table K.1: luminance quantization at quality 50, in row-major order.
LUMA_BASE = (
    16, 11, 10, 16, 24, 40, 51, 61,
    12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77,
    24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip

#: T.81 table K.2: chrominance quantization at quality 50, in row-major order.
CHROMA_BASE = (
    17, 18, 24, 47, 99, 99, 99, 99,
    18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99,
    99, 99, 99, 99, 99, 99, 99, 99,
)  # fmt: skip

#: Bytes outside the scan, one term per segment; the same for every three-channel image that Pillow saves.
HEADER_BYTES = (
    2  # SOI
    + 18  # APP0: JFIF
    + 2 * (4 + 65)  # DQT, luma and chroma
    + 19  # SOF0, three components
    + 2 * (4 + 1 + 16 + 12)  # DHT, DC
    + 2 * (4 + 1 + 16 + 162)  # DHT, AC
    + 14  # SOS
    + 2  # EOI
)

# T.81 tables K.3 to K.6: the number of codes of each length 1..16, then the symbols ordered by code length.
_DC_SYMBOLS = "000102030405060708090a0b"
_DC_LUMA = ((0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0), _DC_SYMBOLS)
_DC_CHROMA = ((0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0), _DC_SYMBOLS)
_AC_LUMA = (
    (0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125),
    "01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728"
    "292a3435363738393a434445464748494a535455565758595a636465666768696a737475767778797a83848586878889"
    "8a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2"
    "e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa",
)
_AC_CHROMA = (
    (0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119),
    "000102031104052131061241510761711322328108144291a1b1c109233352f0156272d10a162434e125f11718191a26"
    "2728292a35363738393a434445464748494a535455565758595a636465666768696a737475767778797a828384858687"
    "88898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9da"
    "e2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa",
)


def _code_lengths(counts: tuple[int, ...], symbols: str) -> dict[int, int]:
    """Map each symbol to the length of its code in bits."""
    lengths = [length for length, count in enumerate(counts, start=1) for _ in range(count)]
    return dict(zip(bytes.fromhex(symbols), lengths, strict=True))


#: Code length by DC size (0..11) and by AC symbol (run * 16 + size); luma first, then chroma.
DC_CODES = (_code_lengths(*_DC_LUMA), _code_lengths(*_DC_CHROMA))
AC_CODES = (_code_lengths(*_AC_LUMA), _code_lengths(*_AC_CHROMA))

EOB = 0x00  # end of block: all remaining AC coefficients are zero
ZRL = 0xF0  # zero run length: sixteen zeros, and a nonzero coefficient later in the block


def quantization_table(base: tuple[int, ...], quality: int) -> tuple[int, ...]:
    """Scale a base table to a quality of 1..100, as `jpeg_set_quality` in libjpeg (baseline: entries are 1..255)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(min(255, max(1, (entry * scale + 50) // 100)) for entry in base)


def zigzag() -> tuple[int, ...]:
    """Return the row-major index of each coefficient, in zigzag order (T.81 figure A.6)."""
    order: list[int] = []
    for diagonal in range(15):
        cells = [(row, diagonal - row) for row in range(8) if 0 <= diagonal - row < 8]
        order += [8 * row + column for row, column in (cells if diagonal % 2 else reversed(cells))]
    return tuple(order)
