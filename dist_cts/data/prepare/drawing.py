"""Drawing primitives of the embedded tasks: glyph stamps, random placement, noise and colours.

Conventions: n images of p x p pixels; values lie in 0..1 until `to_uint8`; a *stamp* is the uint8 mask [BOX, BOX] of
one glyph or shape before it is rotated, sheared and placed.
"""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

BOX = 64  # side of a stamp, about twice its side in an image

DEJAVU = [f"DejaVu{family}" for family in (
    "Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique", "SansMono", "SansMono-Bold", "SansMono-Oblique",
    "Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic",
)]  # fmt: skip
STIX = ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]
COMPUTER_MODERN = ["cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"]


def to_uint8(images: np.ndarray) -> np.ndarray:
    return (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)


def grid(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixel centres, each [p, p], from -1 to 1."""
    axis = (2 * np.arange(pixels) + 1) / pixels - 1
    return np.meshgrid(axis, axis)


def between(rng: np.random.Generator, low: float, high: float, n: int) -> np.ndarray:
    """Uniform values [n, 1, 1], one per image, broadcastable over its pixels."""
    return rng.uniform(low, high, (n, 1, 1))


def clouds(rng: np.random.Generator, n: int, pixels: int, slope: float) -> np.ndarray:
    """Noise [n, p, p] of zero mean and unit variance with amplitude proportional to frequency ** -slope."""
    fx, fy = np.meshgrid(np.fft.rfftfreq(pixels), np.fft.fftfreq(pixels))
    frequency = np.maximum(np.hypot(fx, fy), 1 / pixels)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, pixels, pixels))) * frequency**-slope)
    return standardised(noise)


def standardised(images: np.ndarray) -> np.ndarray:
    return (images - images.mean((1, 2), keepdims=True)) / images.std((1, 2), keepdims=True)


def two_tones(rng: np.random.Generator, n: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A dark and a light colour per image, each [n, 1, 1, channels], in random order."""
    dark = rng.uniform(0.0, 0.35, (n, 1, 1, channels))
    light = rng.uniform(0.65, 1.0, (n, 1, 1, channels))
    swap = rng.random((n, 1, 1, 1)) < 0.5
    return np.where(swap, dark, light), np.where(swap, light, dark)


def paint(rng: np.random.Generator, masks: np.ndarray, channels: int, clutter: float) -> np.ndarray:
    """Masks [n, p, p] in one tone on a noisy background of the other: uint8 [n, p, p] or [n, p, p, 3]."""
    n, pixels = masks.shape[:2]
    ink, paper = two_tones(rng, n, channels)
    noise = clouds(rng, n * channels, pixels, 1.0).reshape(n, channels, pixels, pixels)
    ground = paper + clutter * np.moveaxis(noise, 1, 3)
    images = ground + masks[..., None] * (ink - ground)
    images = to_uint8(images + 0.03 * rng.standard_normal(images.shape))
    return images if channels == 3 else images[..., 0]


def place(rng: np.random.Generator, stamps: np.ndarray, each: int, pixels: int, turn: float) -> np.ndarray:
    """Masks [n, p, p] in 0..1, `each` per class, from stamps [classes, variants, BOX, BOX].

    A stamp is rotated by up to `turn` degrees, stretched and sheared, scaled so that its bounding box covers 0.8 to 1.0
    of the image's side, and placed at random without clipping.
    """
    classes, variants = stamps.shape[:2]
    n = classes * each
    variant = rng.integers(variants, size=n)
    angle = np.radians(rng.uniform(-turn, turn, n))
    stretch, shear = np.exp(rng.uniform(-0.2, 0.2, n)), rng.uniform(-0.25, 0.25, n)
    cos, sin = np.cos(angle), np.sin(angle)
    # forward map: rotation @ [[stretch, shear], [0, 1 / stretch]], of determinant 1
    a, b = cos * stretch, cos * shear - sin / stretch
    c, d = sin * stretch, sin * shear + cos / stretch
    side = 2 * pixels  # drawn at twice the size and halved: antialiasing
    cover = rng.uniform(0.8, 1.0, n)
    scale = cover * side / BOX / np.maximum(abs(a) + abs(b), abs(c) + abs(d))
    slack = side * (1 - cover[:, None]) / 2
    x, y = (side / 2 + slack * rng.uniform(-1, 1, (n, 2))).T
    # PIL takes the inverse map, from output pixels to stamp pixels
    inverse = np.stack([d, -b, -c, a], 1) / scale[:, None]
    masks = np.empty((n, pixels, pixels), np.uint8)
    for i, (p, q, r, s) in enumerate(inverse):
        stamp = Image.fromarray(stamps[i % classes, variant[i]])
        back = (p, q, BOX / 2 - p * x[i] - q * y[i], r, s, BOX / 2 - r * x[i] - s * y[i])
        masks[i] = stamp.transform((side, side), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR).reduce(2)
    return masks / 255


def glyph_stamps(characters: str, fonts: list[str]) -> np.ndarray:
    """Every character in every font, scaled to fill its box: uint8 [characters, fonts, BOX, BOX]."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    # every Pillow has the basic layout engine; the other one depends on system libraries
    loaded = [ImageFont.truetype(folder / f"{f}.ttf", 2 * BOX, layout_engine=ImageFont.Layout.BASIC) for f in fonts]
    stamps = np.zeros((len(characters), len(fonts), BOX, BOX), np.uint8)
    for row, character in zip(stamps, characters, strict=True):
        for stamp, font in zip(row, loaded, strict=True):
            left, top, right, bottom = font.getbbox(character)
            glyph = Image.new("L", (right - left, bottom - top))
            ImageDraw.Draw(glyph).text((-left, -top), character, 255, font)
            shrink = (BOX - 4) / max(glyph.size)
            glyph = glyph.resize([max(1, round(length * shrink)) for length in glyph.size], Image.Resampling.BOX)
            x, y = (BOX - glyph.width) // 2, (BOX - glyph.height) // 2
            stamp[y : y + glyph.height, x : x + glyph.width] = glyph
    return stamps
