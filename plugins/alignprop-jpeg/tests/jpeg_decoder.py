"""An independent reader of baseline JPEG files in plain Python: tables and quantized coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Decoded:
    header: int  # bytes before the scan and the two bytes after it
    quantization: dict[int, list[int]] = field(default_factory=dict)  # zigzag order
    code_lengths: dict[int, dict[int, int]] = field(default_factory=dict)  # table class and id -> symbol -> bits
    blocks: list[dict[tuple[int, int], list[int]]] = field(default_factory=list)  # component -> (row, column) -> zigzag


def decode(data: bytes) -> Decoded:
    codes: dict[int, dict[tuple[int, int], int]] = {}
    found = Decoded(header=0)
    at = 2
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        segment, at = data[at + 4 : at + 2 + length], at + 2 + length
        if marker == 0xDB:
            while segment:
                found.quantization[segment[0]], segment = list(segment[1:65]), segment[65:]
        elif marker == 0xC4:
            while segment:
                counts, total, code = segment[1:17], sum(segment[1:17]), 0
                symbols, table = iter(segment[17 : 17 + total]), {}
                for bits, count in enumerate(counts, start=1):
                    for _ in range(count):
                        table[bits, code] = next(symbols)
                        code += 1
                    code <<= 1
                codes[segment[0]] = table
                found.code_lengths[segment[0]] = {symbol: bits for (bits, _), symbol in table.items()}
                segment = segment[17 + total :]
        elif marker == 0xC0:
            height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
        elif marker == 0xDA:
            break
    found.header = at + 2
    bits = "".join(f"{byte:08b}" for byte in data[at:-2].replace(b"\xff\x00", b"\xff"))
    place = 0

    def symbol(table: dict[tuple[int, int], int]) -> int:
        nonlocal place
        for length in range(1, 17):
            key = (length, int(bits[place : place + length], 2))
            if key in table:
                place += length
                return table[key]
        raise AssertionError("no such code")

    def number(size: int) -> int:
        nonlocal place
        raw = int(bits[place : place + size] or "0", 2)
        place += size
        return raw if size == 0 or raw >= 1 << (size - 1) else raw - (1 << size) + 1

    found.blocks = [{}, {}, {}]
    previous = [0, 0, 0]
    mcu = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (2, 0, 0)]
    for row in range(-(-height // 16)):
        for column in range(-(-width // 16)):
            for component, down, right in mcu:
                table = int(component > 0)
                block = [0] * 64
                previous[component] += number(symbol(codes[table]))
                block[0], k = previous[component], 1
                while k < 64:
                    both = symbol(codes[16 + table])
                    if both == 0:
                        break
                    k += both >> 4
                    block[k] = number(both & 15) if both != 0xF0 else 0
                    k += 1
                step = 1 if component else 2
                found.blocks[component][row * step + down, column * step + right] = block
    return found
