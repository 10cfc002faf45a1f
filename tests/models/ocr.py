"""Reading one line of text with PP-OCR: what lies before, between and after its detection and recognition networks.

Follows the package `rapidocr-onnxruntime` (differentiable binarization, Liao et al. 2020; CTC, Graves et al. 2006) for
pictures that hold one line. A model is any callable {name: array} -> {name: array}.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Arrays = dict[str, NDArray[Any]]
Model = Callable[[Arrays], Arrays]
Quad = NDArray[np.float64]  # [4, 2]: x, y of top left, top right, bottom right, bottom left

SHORT_SIDE = 736  # the detector wants text at the size it has when the short side is at least this
TEXT_HEIGHT = 48  # of the recognizer
TEXT_PROBABILITY = 0.3  # a pixel above it is text
UNCLIP_RATIO = 1.6  # the detector's region is shrunk; grow it by this times area / perimeter


def normalised(image: Image.Image, width: int, height: int) -> NDArray[np.float32]:
    """Picture as [1, 3, height, width] in -1..1, blue first, as the networks were trained."""
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), np.float32)
    return np.ascontiguousarray((pixels[:, :, ::-1] / 127.5 - 1).transpose(2, 0, 1)[None])


def detector_input(image: Image.Image, short_side: int = SHORT_SIDE) -> NDArray[np.float32]:
    """[1, 3, height, width] with both sides multiples of 32 and the shorter at least about `short_side`."""
    scale = max(1.0, short_side / min(image.size))
    width, height = (max(32, round(side * scale / 32) * 32) for side in image.size)
    return normalised(image, width, height)


def recognizer_input(line: Image.Image, width: int | None = None) -> NDArray[np.float32]:
    """[1, 3, 48, width] of a cropped line; the width follows from its proportions (at least 320) unless given."""
    text_width = max(1, round(line.width * TEXT_HEIGHT / line.height))
    padded = np.zeros((1, 3, TEXT_HEIGHT, width or max(320, text_width)), np.float32)
    text_width = min(text_width, padded.shape[3])
    padded[..., :text_width] = normalised(line, text_width, TEXT_HEIGHT)
    return padded


def text_region(probability: NDArray[Any]) -> Quad | None:
    """Rotated rectangle around the text of one line in a probability map [height, width]; None where there is none.

    The line's direction is the main axis of the text pixels' scatter.
    """
    rows, columns = np.nonzero(probability > TEXT_PROBABILITY)
    if len(rows) < 16:
        return None
    points = np.stack([columns, rows], 1).astype(np.float64) + 0.5
    centre = points.mean(0)
    _, axes = np.linalg.eigh(np.cov((points - centre).T))
    along = axes[:, 1] if axes[0, 1] > 0 else -axes[:, 1]
    frame = np.stack([along, [-along[1], along[0]]], 1)  # columns: along the line, down across it
    across = (points - centre) @ frame
    low, high = across.min(0), across.max(0)
    length, height = high - low
    distance = length * height * UNCLIP_RATIO / (2 * (length + height))
    (left, top), (right, bottom) = low - distance, high + distance
    return np.asarray(centre + np.array([[left, top], [right, top], [right, bottom], [left, bottom]]) @ frame.T)


def run_det(model: Model, image: Image.Image, input_name: str = "x") -> Quad | None:
    """Corners of the line of text in `image`, in its pixels, or None where no text is found."""
    pixels = detector_input(image)
    (probability,) = model({input_name: pixels}).values()
    quad = text_region(probability[0, 0])
    height, width = probability.shape[2:]
    return None if quad is None else quad * [image.width / width, image.height / height]


def crop(image: Image.Image, quad: Quad) -> Image.Image:
    """The part of `image` within a rotated rectangle, upright."""
    width, height = (max(1, round(float(np.linalg.norm(quad[k] - quad[0])))) for k in (1, 3))
    corners = quad[[0, 3, 2, 1]].ravel().tolist()  # pillow wants them anticlockwise from the top left
    quadrilateral = Image.Transform.QUAD
    return image.convert("RGB").transform((width, height), quadrilateral, corners, Image.Resampling.BICUBIC)


def alphabet(character_list: str) -> list[str]:
    """Classes of the recognizer from its metadata entry `character`: a blank, the lines of the list, a space."""
    return ["", *character_list.splitlines(), " "]


def ctc_text(probabilities: NDArray[Any], characters: list[str]) -> str:
    """Greedy CTC decoding of [steps, classes]: the best class of each step, repeats merged, blanks dropped."""
    best = probabilities.argmax(1)
    first = np.concatenate([[True], best[1:] != best[:-1]])
    return "".join(characters[k] for k in best[first & (best != 0)])


def run_rec(model: Model, line: Image.Image, characters: list[str], input_name: str = "x") -> str:
    """Text of a cropped line; `characters` is `alphabet(...)` of the model's metadata."""
    (probabilities,) = model({input_name: recognizer_input(line)}).values()
    if probabilities.shape[2] != len(characters):
        raise ValueError(f"the recognizer has {probabilities.shape[2]} classes, its alphabet {len(characters)}")
    return ctc_text(probabilities[0], characters)


def read_line(detector: Model, recognizer: Model, image: Image.Image, characters: list[str]) -> str:
    """Text of the one line in a photograph: detection, crop, recognition. Empty where no text is found."""
    quad = run_det(detector, image)
    return "" if quad is None else run_rec(recognizer, crop(image, quad), characters)


def drawn_text(text: str, size: int = 40, margin: int = 12, ink: int = 20, paper: int = 235) -> Image.Image:
    """A clean picture of a line of text in pillow's own font."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGB", (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin), (paper,) * 3)
    ImageDraw.Draw(image).text((margin - left, margin - top), text, fill=(ink,) * 3, font=font)
    return image
