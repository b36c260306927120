"""Ten embedded tasks of image classification, drawn by code: eight for meta-training, two held out for meta-test.

Nothing is downloaded: the digits are scikit-learn's scans, the glyphs come from matplotlib's fonts, the photographs are
scikit-learn's two samples, and everything else is drawn. Every label is invariant to a horizontal flip and a padded
crop; colours, contrast and polarity are random, so that brightness carries almost no information about the class.

Image i of a task belongs to class i % classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw

from dist_cts.data.prepare.drawing import (
    BOX,
    COMPUTER_MODERN,
    DEJAVU,
    STIX,
    between,
    clouds,
    glyph_stamps,
    grid,
    paint,
    place,
    standardised,
    to_uint8,
    two_tones,
)
from dist_cts.seeds import hashed_seed

VERSION = "a1238d20"  # part of a prepared task's source; change it whenever any image changes
TEST_SHARE = 0.2
Drawn = tuple[np.ndarray, list[str]]  # images uint8 [n, p, p] or [n, p, p, 3], and the class names

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SYMBOLS = "αβγδεζηθκλμξπρσφψωΓΔΛΞΣΩ∞∫√±≠÷"
GEORGIAN = "აბგდევზთიკლმნოპჟრსტუფქღყ"
ICONS = "☀☁☂☃☎☘☠☢☮☯♀♉♋♎♐♔♘♠♪♻⚓⚙✈✉"
SYMBOL_FONTS = [*DEJAVU, "STIXGeneral", "STIXGeneralBol"]  # the fonts that have all of SYMBOLS
ICON_FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold"]  # all of ICONS


@dataclass(frozen=True)
class Split:
    """Train or test part: images uint8 [N, H, W] (greyscale) or [N, H, W, 3], labels int64 [N], the class names."""

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]


def make(name: str, seed: int = 0) -> tuple[Split, Split]:
    """Draws the train and test split of a task; bit-identical for the same (name, seed) in every process.

    Raises:
        ValueError: unknown task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown embedded task {name!r}; choose one of {', '.join(TASKS)}")
    images, class_names = TASKS[name](np.random.default_rng(hashed_seed("embedded", name, seed)))
    classes = len(class_names)
    labels = np.arange(len(images), dtype=np.int64) % classes
    cut = classes * round((1 - TEST_SHARE) * (len(images) // classes))
    return Split(images[:cut], labels[:cut], class_names), Split(images[cut:], labels[cut:], class_names)


def digits(rng: np.random.Generator) -> Drawn:
    """Real handwritten digits from scikit-learn: 10 classes, greyscale, 24 px."""
    from sklearn.datasets import load_digits

    scans = load_digits()  # 8 x 8 values of 0..16
    each = np.bincount(scans.target).min()
    chosen = np.stack([rng.permutation(np.flatnonzero(scans.target == digit))[:each] for digit in range(10)], 1)
    images = [
        np.pad(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC), 2)
        for image in to_uint8(scans.images[chosen.ravel()] / 16)
    ]
    return np.stack(images), [str(digit) for digit in range(10)]


def letters(rng: np.random.Generator) -> Drawn:
    """Latin capitals in twenty fonts under random affine maps: 26 classes, greyscale, 28 px."""
    masks = place(rng, glyph_stamps(LETTERS, DEJAVU + STIX + COMPUTER_MODERN), 66, 28, turn=20)
    return paint(rng, masks, 1, clutter=0.05), list(LETTERS)


def symbols(rng: np.random.Generator) -> Drawn:
    """Greek letters and mathematical symbols under random affine maps: 30 classes, greyscale, 28 px."""
    masks = place(rng, glyph_stamps(SYMBOLS, SYMBOL_FONTS), 60, 28, turn=20)
    return paint(rng, masks, 1, clutter=0.05), list(SYMBOLS)


def shapes(rng: np.random.Generator) -> Drawn:
    """Outlined and filled geometric shapes of any orientation and colour: 12 classes, RGB, 32 px."""

    def star(corners: int, inner: float) -> np.ndarray:
        angle = np.pi * np.arange(2 * corners) / corners
        radius = np.where(np.arange(2 * corners) % 2, inner, 1.0)
        return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)

    disc = star(32, 1.0)
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    bulge = np.stack([np.sin(t / 2), -np.cos(t / 2)], 1)  # a half circle, top to bottom
    outlines = {
        "disc": disc,
        "half-disc": disc[disc[:, 1] <= 0.01] + [0, 0.5],
        "triangle": star(3, 1.0)[::2],
        "square": star(2, 1.0),
        "pentagon": star(5, 1.0)[::2],
        "star": star(5, 0.42),
        "burst": star(8, 0.6),
        "spark": star(4, 0.3),
        "heart": np.stack([16 * np.sin(t) ** 3, -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t)], 1) / 17,
        "crescent": np.concatenate([bulge, bulge[::-1] * [0.4, 1.0]]) - [0.5, 0],
        "arrow": np.array([(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)]),
        "corner": np.array([(-0.9, -0.9), (-0.2, -0.9), (-0.2, 0.2), (0.9, 0.2), (0.9, 0.9), (-0.9, 0.9)]),
    }
    stamps = np.empty((len(outlines), 3, BOX, BOX), np.uint8)
    for row, corners in zip(stamps, outlines.values(), strict=True):
        points = [tuple(point) for point in 4 * BOX * (corners * 0.42 + 0.5)]
        for stamp, width in zip(row, (0, 24, 40), strict=True):  # 0: filled
            canvas = Image.new("L", (4 * BOX, 4 * BOX))
            ImageDraw.Draw(canvas).polygon(points, fill=None if width else 255, outline=255, width=width or 1)
            stamp[:] = canvas.reduce(4)
    return paint(rng, place(rng, stamps, 140, 32, turn=180), 3, clutter=0.12), list(outlines)


def textures(rng: np.random.Generator) -> Drawn:
    """Periodic and random textures of any angle, scale and contrast: 14 classes, greyscale, 32 px."""
    each, pixels = 120, 32
    x, y = grid(pixels)

    def waves() -> tuple[np.ndarray, np.ndarray]:
        """Two perpendicular phases [each, p, p], with 4 to 6 half waves from the centre to an edge."""
        angle, speed = between(rng, 0, 2 * np.pi, each), np.pi * between(rng, 4, 6, each)
        along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        return speed * along + between(rng, 0, 6.3, each), speed * across + between(rng, 0, 6.3, each)

    def polar() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance and angle [each, p, p] around a random point, and a random phase [each, 1, 1]."""
        u, v = x - between(rng, -0.5, 0.5, each), y - between(rng, -0.5, 0.5, each)
        return np.hypot(u, v), np.arctan2(v, u), between(rng, 0, 6.3, each)

    def cells() -> np.ndarray:
        """Dark edges of Voronoi cells: distance to the second nearest of 14 random points minus that to the nearest."""
        points = rng.uniform(-1.1, 1.1, (each, 14, 2, 1, 1))
        nearest = np.partition(np.hypot(x - points[:, :, 0], y - points[:, :, 1]), 1, axis=1)
        return np.minimum(nearest[:, 1] - nearest[:, 0], 0.15)

    lattices = {
        "stripes": lambda u, v: np.sin(u),
        "checks": lambda u, v: np.sign(np.sin(0.8 * u) * np.sin(0.8 * v)),
        "net": lambda u, v: np.maximum(np.cos(u), np.cos(v)) > 0.8,
        "dots": lambda u, v: np.cos(u) + np.cos(v) > 0.8,
        "honeycomb": lambda u, v: np.cos(u) + np.cos(u / 2 + v * 0.866) + np.cos(u / 2 - v * 0.866),
        "zigzag": lambda u, v: np.sin(u + 1.6 * np.arcsin(np.sin(v))),
        "bricks": lambda u, v: np.maximum(np.cos(1.6 * u), np.cos(0.8 * (v + u // 3.927 % 2 * 3.927))) > 0.75,
    }
    rounds = {
        "rings": lambda r, a, phase: np.sin(17 * r + phase),
        "spokes": lambda r, a, phase: np.sin(rng.integers(6, 12, (each, 1, 1)) * a + phase),
        "spirals": lambda r, a, phase: np.sin(12 * r + rng.choice([-3, 3], (each, 1, 1)) * a + phase),
    }
    drawn = {name: texture(*waves()) for name, texture in lattices.items()}
    drawn |= {name: texture(*polar()) for name, texture in rounds.items()}
    drawn |= {"cells": cells(), "grain": clouds(rng, each, pixels, 0.0), "clouds": clouds(rng, each, pixels, 1.8)}
    drawn["camouflage"] = np.sign(clouds(rng, each, pixels, 1.8))
    images = np.stack([standardised(texture) for texture in drawn.values()], 1).reshape(-1, pixels, pixels)
    n = len(images)
    contrast = between(rng, 0.12, 0.25, n) * rng.choice([-1, 1], (n, 1, 1))
    images = between(rng, 0.4, 0.6, n) + contrast * (images + 0.4 * clouds(rng, n, pixels, 0.5))
    return to_uint8(images), list(drawn)


def colours(rng: np.random.Generator) -> Drawn:
    """Which of four hues is the inner, middle and outer region: 24 classes, RGB, 20 px."""
    hues = {"red": 0.0, "yellow": 0.17, "green": 0.37, "blue": 0.63}
    orders = list(permutations(hues, 3))
    n, pixels = 75 * len(orders), 20
    x, y = grid(pixels)
    distance = np.hypot(x - between(rng, -0.2, 0.2, n), y - between(rng, -0.2, 0.2, n))
    distance += 0.1 * clouds(rng, n, pixels, 2.0)
    inner = between(rng, 0.3, 0.5, n)
    region = (distance > inner).astype(int) + (distance > inner + between(rng, 0.25, 0.35, n))
    hue = np.array([[hues[name] for name in order] for order in orders])[np.arange(n) % len(orders)]
    hsv = np.stack([hue, rng.uniform(0.45, 1, (n, 3)), rng.uniform(0.45, 1, (n, 3))], -1)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-0.05, 0.05, (n, 3))) % 1
    images = hsv_to_rgb(hsv)[np.arange(n)[:, None, None], region]
    return to_uint8(images + 0.06 * rng.standard_normal(images.shape)), ["-".join(order) for order in orders]


def counting(rng: np.random.Generator) -> Drawn:
    """Number of separate spots, 1 to 8, of any size and colour: 8 classes, RGB, 28 px."""
    most, pixels = 8, 28
    n = 220 * most
    count = (np.arange(n) % most + 1)[:, None]
    # the total area in pixels is drawn independently of the count, so that it reveals little about it
    area = rng.uniform(40, 110, (n, 1)) / count * rng.uniform(0.6, 1.6, (n, most))
    radius = np.clip(np.sqrt(area / np.pi), 1.2, 6)
    radius = -np.sort(np.where(np.arange(most) < count, -radius, 0))  # large ones first; 0: absent
    centre = np.full((n, most, 2), 1e3)  # far outside
    for k in range(most):
        room = radius[:, k, None, None] + 2
        tries = room + rng.random((n, 100, 2)) * (pixels - 2 * room)
        gaps = np.linalg.norm(tries[:, :, None] - centre[:, None, :k], axis=-1) - radius[:, None, :k]
        clearance = gaps.min(2, initial=1e3) - radius[:, k, None]
        best = np.minimum(clearance, 2).argmax(1)  # the first candidate at least 2 pixels from the others
        centre[:, k] = np.where(radius[:, k, None] > 0, tries[np.arange(n), best], 1e3)
    away = np.arange(pixels) + 0.5 - centre[..., None]  # [n, spots, x or y, p]
    distance = np.hypot(away[:, :, 0, None, :], away[:, :, 1, :, None])
    masks = np.clip(radius[:, :, None, None] - distance + 0.5, 0, 1).max(1)
    return paint(rng, masks, 3, clutter=0.08), [str(k + 1) for k in range(most)]


def orientation(rng: np.random.Generator) -> Drawn:
    """Steepness of random stripes, rising or falling, in steps of 18 degrees: 6 classes, greyscale, 24 px."""
    classes, pixels = 6, 24
    n = 290 * classes
    x, y = grid(pixels)
    steepness = 18.0 * (np.arange(n) % classes) + rng.uniform(-5, 5, n)
    angle = np.radians(steepness * rng.choice([-1, 1], n))[:, None, None]
    across = np.cos(angle) * y - np.sin(angle) * x
    profile = sum(np.sin(between(rng, 2, 12, n) * across + between(rng, 0, 6.3, n)) for _ in range(3))
    window = np.hypot(x - between(rng, -0.3, 0.3, n), y - between(rng, -0.3, 0.3, n)) < between(rng, 0.6, 1.2, n)
    contrast = between(rng, 0.11, 0.25, n)
    images = between(rng, 0.35, 0.65, n) + contrast * window * profile
    return to_uint8(images + 0.1 * clouds(rng, n, pixels, 0.6)), [f"{18 * k}-degrees" for k in range(classes)]


def georgian(rng: np.random.Generator) -> Drawn:
    """Georgian letters in eleven fonts on a cluttered background: 24 classes, greyscale, 28 px."""
    masks = place(rng, glyph_stamps(GEORGIAN, DEJAVU), 75, 28, turn=20)
    return paint(rng, masks, 1, clutter=0.1), [f"letter-{ord(letter):x}" for letter in GEORGIAN]


def icons(rng: np.random.Generator) -> Drawn:
    """Weather, zodiac, chess and other symbols in colour on photographs: 24 classes, RGB, 32 px."""
    from sklearn.datasets import load_sample_images

    pixels = 32
    masks = place(rng, glyph_stamps(ICONS, ICON_FONTS), 75, pixels, turn=25)
    n = len(masks)
    photos = np.stack([Image.fromarray(photo).reduce(3) for photo in load_sample_images().images])
    top = rng.integers(photos.shape[1] - pixels, size=n)[:, None] + np.arange(pixels)
    left = rng.integers(photos.shape[2] - pixels, size=n)[:, None] + np.arange(pixels)
    ground = photos[rng.integers(len(photos), size=(n, 1, 1)), top[:, :, None], left[:, None, :]] / 255
    ink, paper = two_tones(rng, n, 3)
    ground = paper + 0.5 * (ground - ground.mean((1, 2), keepdims=True))
    return to_uint8(ground + masks[..., None] * (ink - ground)), [f"sign-{ord(sign):x}" for sign in ICONS]


# name -> function, whose docstring is the one-line description of the task; the last two are held out
TASKS: dict[str, Callable[[np.random.Generator], Drawn]] = {
    draw.__name__: draw
    for draw in (digits, letters, symbols, shapes, textures, colours, counting, orientation, georgian, icons)
}
META_TRAIN, META_TEST = tuple(TASKS)[:8], tuple(TASKS)[8:]
