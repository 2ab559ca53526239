"""Draws one panorama per place: 256x128 pixels, periodic in x, with sky and ground, from seeded shapes.

Scenes use 128-pixel windows at multiples of 8 pixels. Backgrounds are rich in texture (blades, ripples, ridges, leaves)
but contain little information: a small autoencoder can memorize them and reconstruct them sharply.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

from alignprop_starter.vocabulary import BACKGROUNDS

WIDTH, HEIGHT, HORIZON = 256, 128, 52
_ZOOM = 4
Color = tuple[int, int, int]


class _Canvas:
    """An image that is periodic in x; coordinates are final pixels, and drawing is at four times the resolution."""

    def __init__(self, seed: int) -> None:
        self.image = Image.new("RGB", (WIDTH * _ZOOM, HEIGHT * _ZOOM))
        self.pen = ImageDraw.Draw(self.image)
        self.rng = random.Random(seed)

    def gradient(self, top: float, bottom: float, first: Color, last: Color) -> None:
        for y in range(int(top * _ZOOM), int(bottom * _ZOOM)):
            t = (y / _ZOOM - top) / (bottom - top)
            self.pen.line([(0, y), (WIDTH * _ZOOM, y)], fill=_blend(first, last, t))

    def polygon(self, points: list[tuple[float, float]], fill: Color) -> None:
        for shift in (-WIDTH, 0, WIDTH):
            self.pen.polygon([((x + shift) * _ZOOM, y * _ZOOM) for x, y in points], fill=fill)

    def line(self, points: list[tuple[float, float]], fill: Color, width: float) -> None:
        for shift in (-WIDTH, 0, WIDTH):
            self.pen.line(
                [((x + shift) * _ZOOM, y * _ZOOM) for x, y in points],
                fill=fill,
                width=max(1, round(width * _ZOOM)),
                joint="curve",
            )

    def blob(self, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
        for shift in (-WIDTH, 0, WIDTH):
            self.pen.ellipse(
                [(x + shift - rx) * _ZOOM, (y - ry) * _ZOOM, (x + shift + rx) * _ZOOM, (y + ry) * _ZOOM], fill=fill
            )

    def scatter(self, top: float, bottom: float, step: float) -> list[tuple[float, float, float]]:
        """Return jittered rows of (x, y, size) from far to near, denser and smaller in the distance."""
        places = []
        y = top
        while y < bottom:
            size = 0.45 + 0.9 * (y - top) / max(bottom - top, 1)
            count = max(4, round(WIDTH / (step * size)))
            for i in range(count):
                places.append(
                    (
                        (i + self.rng.uniform(-0.4, 0.4)) * WIDTH / count,
                        y + self.rng.uniform(-0.3, 0.3) * step * size,
                        size,
                    )
                )
            y += step * size * 0.8
        return sorted(places, key=lambda place: place[1])

    def ridge(
        self, base: float, height: float, waves: int, fill: Color, rough: float = 0.25, low: float = HORIZON + 1
    ) -> list[tuple[float, float]]:
        phases = [(self.rng.uniform(0, 2 * math.pi), waves * k, 1 / k) for k in (1, 2, 3)]
        line = []
        for x in range(0, WIDTH + 1, 2):
            level = sum(
                a * math.sin(2 * math.pi * n * x / WIDTH + p) * (1 if i == 0 else rough * 2)
                for i, (p, n, a) in enumerate(phases)
            )
            line.append((float(x), base - height * (0.5 + 0.4 * level)))
        self.polygon([(0, low), *line, (WIDTH, low)], fill)
        return line

    def finish(self) -> Image.Image:
        return self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _blend(a: Color, b: Color, t: float) -> Color:
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


def _blades(c: _Canvas, top: float, colors: list[Color], step: float, length: float) -> None:
    for x, y, size in c.scatter(top, HEIGHT + 6, step):
        lean = c.rng.uniform(-2.0, 2.0) * size
        tall = length * size * c.rng.uniform(0.7, 1.3)
        c.polygon([(x - 0.8 * size, y), (x + 0.8 * size, y), (x + lean, y - tall)], c.rng.choice(colors))


def _leaves(c: _Canvas, top: float, bottom: float, colors: list[Color], step: float, size_px: float) -> None:
    for x, y, size in c.scatter(top, bottom, step):
        r, turn = size_px * size, c.rng.uniform(0, math.pi)
        dx, dy = r * math.cos(turn), 0.6 * r * math.sin(turn)
        c.polygon(
            [(x - dx, y - dy), (x - dy * 0.6, y + dx * 0.35), (x + dx, y + dy), (x + dy * 0.6, y - dx * 0.35)],
            c.rng.choice(colors),
        )


def _ripples(c: _Canvas, top: float, bottom: float, colors: list[Color], gap: float, height: float) -> None:
    y = top
    while y < bottom + 6:
        near = (y - top) / (bottom - top)
        amplitude, waves, phase = height * (0.3 + near), c.rng.choice((3, 4, 5)), c.rng.uniform(0, 2 * math.pi)
        line = [
            (float(x), y + amplitude * math.sin(2 * math.pi * waves * x / WIDTH + phase))
            for x in range(0, WIDTH + 1, 2)
        ]
        c.line(line, c.rng.choice(colors), 0.6 + 1.1 * near)
        y += gap * (0.4 + near)


def _meadow(c: _Canvas) -> None:
    c.gradient(0, HORIZON, (96, 174, 240), (196, 230, 250))
    c.ridge(HORIZON, 14, 3, (120, 190, 120))
    c.ridge(HORIZON + 2, 8, 5, (98, 176, 84))
    c.gradient(HORIZON, HEIGHT, (118, 196, 80), (70, 150, 50))
    _blades(c, HORIZON + 3, [(86, 170, 58), (140, 210, 90), (104, 186, 70), (58, 138, 44)], 7.5, 7)
    for x, y, size in c.scatter(HORIZON + 8, HEIGHT, 24):
        for i in range(5):
            c.blob(
                x + 1.7 * size * math.cos(i * 1.257),
                y + 1.7 * size * math.sin(i * 1.257),
                1.1 * size,
                1.1 * size,
                (255, 250, 235),
            )
        c.blob(x, y, 1.0 * size, 1.0 * size, (250, 200, 50))


def _desert(c: _Canvas) -> None:
    c.gradient(0, HORIZON, (250, 178, 98), (255, 228, 170))
    c.ridge(HORIZON, 22, 2, (214, 132, 88), 0.1)
    c.ridge(HORIZON + 2, 10, 3, (228, 160, 100), 0.1)
    c.gradient(HORIZON, HEIGHT, (240, 196, 124), (222, 160, 86))
    _ripples(c, HORIZON + 3, HEIGHT, [(202, 140, 72), (250, 214, 150), (214, 152, 82)], 5.5, 2.4)
    for x, y, size in c.scatter(HORIZON + 10, HEIGHT, 26):
        c.blob(x, y, 2.0 * size, 1.2 * size, (176, 116, 70))
        c.blob(x - 0.4 * size, y - 0.4 * size, 1.1 * size, 0.6 * size, (216, 164, 112))


def _beach(c: _Canvas) -> None:
    c.gradient(0, 34, (70, 186, 236), (190, 236, 246))
    c.gradient(34, HORIZON + 20, (20, 126, 190), (70, 206, 214))
    _ripples(c, 36, HORIZON + 10, [(226, 250, 250), (120, 220, 230), (24, 140, 200)], 4, 1.2)
    shore = HORIZON + 14
    edge = [(float(x), shore + 2.2 * math.sin(2 * math.pi * 4 * x / WIDTH)) for x in range(0, WIDTH + 1, 2)]
    c.polygon([(0, HEIGHT), *edge, (WIDTH, HEIGHT)], (250, 226, 168))
    c.line(edge, (255, 255, 250), 2.6)
    for x, y, size in c.scatter(shore + 6, HEIGHT, 8):
        c.blob(x, y, 0.9 * size, 0.7 * size, c.rng.choice([(222, 186, 120), (255, 244, 206), (206, 166, 104)]))
    _ripples(c, shore + 8, HEIGHT, [(232, 200, 136), (255, 240, 196)], 11, 2.0)


def _snow(c: _Canvas) -> None:
    c.gradient(0, HORIZON, (150, 176, 206), (222, 232, 242))
    c.ridge(HORIZON, 26, 4, (190, 206, 226), 0.4)
    for i in range(30):
        x = (i + c.rng.uniform(-0.3, 0.3)) * WIDTH / 30
        tall = c.rng.uniform(9, 17)
        for k in range(3):
            y, w = HORIZON + 1 - tall * k / 4, tall * (0.34 - 0.08 * k)
            c.polygon([(x - w, y), (x + w, y), (x, y - tall * 0.5)], (84, 128, 140) if k < 2 else (236, 244, 250))
    c.gradient(HORIZON, HEIGHT, (246, 250, 255), (214, 228, 244))
    for x, y, size in c.scatter(HORIZON + 5, HEIGHT + 8, 22):
        c.blob(x, y, 11 * size, 3.6 * size, (200, 216, 238))
        c.blob(x, y - 1.5 * size, 11 * size, 3.4 * size, (250, 252, 255))
    for x, y, size in c.scatter(2, HEIGHT, 21):
        c.blob(x, y, 0.9 * size + 0.3, 0.9 * size + 0.3, (255, 255, 255) if y < HORIZON else (172, 198, 232))


def _forest(c: _Canvas) -> None:
    c.gradient(0, HORIZON + 6, (40, 92, 62), (110, 160, 92))
    for i in range(18):
        x, w = (i + c.rng.uniform(-0.3, 0.3)) * WIDTH / 18, c.rng.uniform(1.6, 3.4)
        shade = c.rng.choice([(70, 52, 38), (92, 68, 46), (54, 44, 36)])
        c.polygon([(x - w, 0), (x + w, 0), (x + w * 1.3, HORIZON + 8), (x - w * 1.3, HORIZON + 8)], shade)
        for k in range(5):
            c.line([(x - w * 0.5, 10.0 * k + 3), (x + w * 0.2, 10.0 * k + 8)], _blend(shade, (150, 120, 90), 0.5), 0.6)
    _leaves(c, 0, 22, [(30, 96, 44), (58, 134, 58), (24, 76, 40), (86, 156, 66)], 9, 8)
    c.gradient(HORIZON + 5, HEIGHT, (66, 98, 44), (44, 66, 32))
    _leaves(c, HORIZON + 7, HEIGHT + 4, [(88, 120, 50), (52, 84, 38), (110, 96, 52), (36, 58, 30)], 9, 4.6)


def _mountains(c: _Canvas) -> None:
    c.gradient(0, HORIZON, (126, 160, 214), (220, 226, 236))
    for base, peaks, tall, rock in ((HORIZON + 2, 5, 44, (138, 142, 160)), (HORIZON + 4, 7, 28, (104, 108, 126))):
        for i in range(peaks):
            x, h, w = (
                (i + c.rng.uniform(-0.2, 0.2)) * WIDTH / peaks,
                tall * c.rng.uniform(0.75, 1.0),
                tall * c.rng.uniform(0.75, 0.95),
            )
            c.polygon([(x - w, base), (x, base - h), (x + w, base)], rock)
            c.polygon([(x + 0.1 * w, base), (x, base - h), (x + w, base)], _blend(rock, (40, 44, 66), 0.35))
            snow = [(x - 0.3 * w, base - 0.7 * h), (x, base - h), (x + 0.3 * w, base - 0.7 * h)]
            c.polygon(
                [*snow, (x + 0.12 * w, base - 0.76 * h), (x, base - 0.64 * h), (x - 0.14 * w, base - 0.76 * h)],
                (246, 250, 255),
            )
    c.gradient(HORIZON + 3, HEIGHT, (150, 146, 140), (106, 100, 96))
    for x, y, size in c.scatter(HORIZON + 5, HEIGHT + 4, 11):
        w, h = 4.6 * size * c.rng.uniform(0.7, 1.2), 3.0 * size
        gray = c.rng.choice([(168, 164, 158), (134, 128, 124), (188, 184, 178)])
        c.polygon([(x - w, y), (x - 0.5 * w, y - h), (x + 0.5 * w, y - h * 1.1), (x + w, y)], gray)
        c.polygon([(x, y), (x + 0.5 * w, y - h * 1.1), (x + w, y)], _blend(gray, (50, 48, 52), 0.45))


def _night(c: _Canvas) -> None:
    c.gradient(0, HORIZON + 4, (12, 14, 48), (52, 50, 116))
    for x, y, _ in c.scatter(2, HORIZON - 8, 15):
        r = c.rng.choice((0.5, 0.7, 1.2))
        c.blob(x, y, r, r, c.rng.choice([(255, 250, 220), (200, 214, 255)]))
    c.ridge(HORIZON + 2, 20, 3, (30, 32, 78))
    c.ridge(HORIZON + 4, 12, 6, (22, 26, 60), 0.5)
    c.gradient(HORIZON + 3, HEIGHT, (36, 52, 88), (20, 30, 58))
    _blades(c, HORIZON + 6, [(48, 72, 112), (26, 40, 74), (62, 88, 128), (36, 56, 94)], 8.5, 8)


def _autumn(c: _Canvas) -> None:
    c.gradient(0, HORIZON, (214, 206, 196), (250, 226, 186))
    for i in range(15):
        x, y, r = (i + c.rng.uniform(-0.3, 0.3)) * WIDTH / 15, HORIZON - c.rng.uniform(14, 24), c.rng.uniform(8, 12)
        c.line([(x, HORIZON + 3), (x, y)], (96, 62, 40), 2.2)
        crown = c.rng.choice([(214, 84, 34), (236, 140, 36), (190, 56, 40), (244, 184, 60)])
        c.blob(x, y, r, r * 1.15, crown)
        for _ in range(9):
            c.blob(
                x + c.rng.uniform(-0.7, 0.7) * r,
                y + c.rng.uniform(-0.8, 0.8) * r,
                r * 0.2,
                r * 0.2,
                _blend(crown, (255, 220, 130), c.rng.uniform(0.2, 0.6)),
            )
    c.gradient(HORIZON, HEIGHT, (196, 140, 70), (150, 92, 46))
    _leaves(
        c,
        HORIZON + 5,
        HEIGHT + 4,
        [(224, 104, 36), (240, 168, 56), (176, 60, 36), (140, 84, 44), (206, 132, 60)],
        9,
        4.8,
    )


_PAINTERS: dict[str, Callable[[_Canvas], None]] = {
    "meadow": _meadow,
    "desert": _desert,
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "mountains": _mountains,
    "night": _night,
    "autumn": _autumn,
}


def draw_panoramas() -> Image.Image:
    """Return the panoramas stacked in the order of `BACKGROUNDS`, an RGB image of 256 x (128 * 8) pixels."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT * len(BACKGROUNDS)))
    for row, place in enumerate(BACKGROUNDS):
        canvas = _Canvas(seed=row)
        _PAINTERS[place](canvas)
        sheet.paste(canvas.finish(), (0, row * HEIGHT))
    return sheet
