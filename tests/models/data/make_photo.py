"""Makes photo.jpg: a simulated photograph of a line of text on paper, as a hand-held camera sees it.

Perspective, uneven light, the grain of the paper, defocus, sensor noise and JPEG compression, all from one seed:
    python make_photo.py
The font is the one that pillow ships (Aileron, public domain).
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

TEXT = "Parcel 7306 for Bergen"
WIDTH, HEIGHT = 800, 480
PAPER = (1000, 455)  # of the sheet before the camera looks at it
# where the sheet's corners lie in the picture: top left, top right, bottom right, bottom left
CORNERS = ((60.0, 95.0), (765.0, 38.0), (735.0, 415.0), (30.0, 395.0))


def perspective_coefficients(corners: tuple[tuple[float, float], ...], size: tuple[int, int]) -> list[float]:
    """The eight numbers of the projective map from the picture (corners) back to the sheet, for Image.transform."""
    width, height = size
    sheet = ((0, 0), (width, 0), (width, height), (0, height))
    rows, right = [], []
    for (x, y), (u, v) in zip(corners, sheet, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return [float(c) for c in np.linalg.solve(np.array(rows, np.float64), np.array(right, np.float64))]


def grain(random: np.random.Generator, cell: int, strength: float) -> NDArray[np.float64]:
    """Smooth noise [HEIGHT, WIDTH] whose blotches are `cell` pixels wide."""
    coarse = random.normal(0, 1, (HEIGHT // cell + 2, WIDTH // cell + 2)).astype(np.float32)
    return strength * np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float64)


def photograph() -> Image.Image:
    random = np.random.default_rng(20480317)
    sheet = Image.new("RGB", PAPER, (236, 231, 219))
    font = ImageFont.load_default(72)
    spaced = TEXT.replace(" ", "   ")  # words set apart as on a label: the recognizer overlooks narrow spaces
    ImageDraw.Draw(sheet).text((PAPER[0] // 2, PAPER[1] // 2), spaced, fill=(38, 40, 66), font=font, anchor="mm")

    coefficients = perspective_coefficients(CORNERS, PAPER)
    method, cubic = Image.Transform.PERSPECTIVE, Image.Resampling.BICUBIC
    seen = sheet.transform((WIDTH, HEIGHT), method, coefficients, cubic, fillcolor=(96, 74, 58))  # on a wooden table
    light = np.asarray(seen.filter(ImageFilter.GaussianBlur(1.1)), np.float64)

    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    lamp = 1.06 - 0.5 * np.hypot((x - 0.22 * WIDTH) / WIDTH, (y - 0.2 * HEIGHT) / HEIGHT)  # lamp at the upper left
    shadow = 1 - 0.28 / (1 + np.exp((0.62 * WIDTH + 0.5 * y - x) / 25))  # of the hand, over the right end
    light *= (lamp * shadow)[:, :, None] * [1.0, 0.97, 0.9]  # a warm lamp
    light += grain(random, 6, 2.5)[:, :, None] + random.normal(0, 5, light.shape)
    return Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    photograph().save(Path(__file__).with_name("photo.jpg"), quality=72)
