"""Eight small, different image-classification tasks for meta-training and two held-out ones for meta-test.

Nothing is downloaded: the digits are scikit-learn's scans, the glyphs come from the fonts inside matplotlib, the
photographs are scikit-learn's two samples, and the rest is drawn. Every label survives a horizontal flip and a
padded crop; colours, contrast and polarity of what is drawn are random, so that brightness tells next to nothing.

Conventions of this file: n images of p x p pixels; image i belongs to class i % classes; values lie in 0..1 until
`_to_uint8`; a *stamp* is the uint8 mask [BOX, BOX] of one glyph or shape before it is turned, sheared and placed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw, ImageFont

from dist_cts.seeds import hashed_seed

BOX = 64  # side of a stamp, about twice what is left of it in an image
TEST_SHARE = 0.2
Drawn = tuple[np.ndarray, list[str]]  # images uint8 [n,p,p] or [n,p,p,3], and the names of the classes


@dataclass(frozen=True)
class Split:
    """Half of a task: images uint8 [N,H,W] (grey) or [N,H,W,3], labels int64 [N], one name for each class."""

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]


def make(name: str, seed: int = 0) -> tuple[Split, Split]:
    """Draw the task `name`: its train and test split, the same bits for the same (name, seed) in every process.

    Raises ValueError if there is no task of that name.
    """
    if name not in TASKS:
        raise ValueError(f"no embedded task {name!r}: choose one of {', '.join(TASKS)}")
    images, class_names = TASKS[name](np.random.default_rng(hashed_seed("embedded", name, seed)))
    classes = len(class_names)
    labels = np.arange(len(images), dtype=np.int64) % classes
    cut = classes * round((1 - TEST_SHARE) * (len(images) // classes))
    return Split(images[:cut], labels[:cut], class_names), Split(images[cut:], labels[cut:], class_names)


def _to_uint8(images: np.ndarray) -> np.ndarray:
    return (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)


def _grid(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel's centre, each [p,p], from -1 to 1."""
    axis = (2 * np.arange(pixels) + 1) / pixels - 1
    return np.meshgrid(axis, axis)


def _between(rng: np.random.Generator, low: float, high: float, n: int) -> np.ndarray:
    """Uniform values [n,1,1]: one for each image, ready to broadcast over its pixels."""
    return rng.uniform(low, high, (n, 1, 1))


def _clouds(rng: np.random.Generator, n: int, pixels: int, slope: float) -> np.ndarray:
    """Noise [n,p,p] of zero mean and unit deviation, whose amplitude falls as frequency ** -slope."""
    fx, fy = np.meshgrid(np.fft.rfftfreq(pixels), np.fft.fftfreq(pixels))
    frequency = np.maximum(np.hypot(fx, fy), 1 / pixels)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, pixels, pixels))) * frequency**-slope)
    return _standardised(noise)


def _standardised(images: np.ndarray) -> np.ndarray:
    return (images - images.mean((1, 2), keepdims=True)) / images.std((1, 2), keepdims=True)


def _two_tones(rng: np.random.Generator, n: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A dark and a light colour for each image, each [n,1,1,channels], in random order."""
    dark = rng.uniform(0.0, 0.35, (n, 1, 1, channels))
    light = rng.uniform(0.65, 1.0, (n, 1, 1, channels))
    swap = rng.random((n, 1, 1, 1)) < 0.5
    return np.where(swap, dark, light), np.where(swap, light, dark)


def _paint(rng: np.random.Generator, masks: np.ndarray, channels: int, clutter: float) -> np.ndarray:
    """Masks [n,p,p] in one tone on a cloudy ground of the other: uint8 [n,p,p] or [n,p,p,3]."""
    n, pixels = masks.shape[:2]
    ink, paper = _two_tones(rng, n, channels)
    clouds = _clouds(rng, n * channels, pixels, 1.0).reshape(n, channels, pixels, pixels)
    ground = paper + clutter * np.moveaxis(clouds, 1, 3)
    images = ground + masks[..., None] * (ink - ground)
    images = _to_uint8(images + 0.03 * rng.standard_normal(images.shape))
    return images if channels == 3 else images[..., 0]


def _place(rng: np.random.Generator, stamps: np.ndarray, each: int, pixels: int, turn: float) -> np.ndarray:
    """Masks [n,p,p] in 0..1, `each` of every class, from stamps [classes, variants, BOX, BOX].

    A stamp is turned by up to `turn` degrees, stretched and sheared, then scaled so that its box covers
    0.8 to all of the picture's side, and moved where it fits: nothing is clipped.
    """
    classes, variants = stamps.shape[:2]
    n = classes * each
    variant = rng.integers(variants, size=n)
    angle = np.radians(rng.uniform(-turn, turn, n))
    chunk, shear = np.exp(rng.uniform(-0.2, 0.2, n)), rng.uniform(-0.25, 0.25, n)
    cos, sin = np.cos(angle), np.sin(angle)
    # forward map: rotation @ [[stretch, shear], [0, 1 / stretch]], of determinant 1
    a, b = cos * chunk, cos * shear - sin / chunk
    c, d = sin * chunk, sin * shear + cos / chunk
    side = 2 * pixels  # twice the size first, then halved: no jagged edges
    cover = rng.uniform(0.8, 1.0, n)
    scale = cover * side / BOX / np.maximum(abs(a) + abs(b), abs(c) + abs(d))
    slack = side * (1 - cover[:, None]) / 2
    x, y = (side / 2 + slack * rng.uniform(-1, 1, (n, 2))).T
    # PIL asks where in the stamp an output pixel comes from: the inverse map
    inverse = np.stack([d, -b, -c, a], 1) / scale[:, None]
    masks = np.empty((n, pixels, pixels), np.uint8)
    for i, (p, q, r, s) in enumerate(inverse):
        stamp = Image.fromarray(stamps[i % classes, variant[i]])
        back = (p, q, BOX / 2 - p * x[i] - q * y[i], r, s, BOX / 2 - r * x[i] - s * y[i])
        masks[i] = stamp.transform((side, side), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR).reduce(2)
    return masks / 255


def _glyph_stamps(characters: str, fonts: list[str]) -> np.ndarray:
    """Every character in every font, scaled to fill its box: [characters, fonts, BOX, BOX]."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    # the basic layout engine is part of every Pillow; the other one depends on the system's libraries
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


DEJAVU = [f"DejaVu{family}" for family in (
    "Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique", "SansMono", "SansMono-Bold", "SansMono-Oblique",
    "Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic",
)]  # fmt: skip
STIX = ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]
COMPUTER_MODERN = ["cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SYMBOLS = "αβγδεζηθκλμξπρσφψωΓΔΛΞΣΩ∞∫√±≠÷"
GEORGIAN = "აბგდევზთიკლმნოპჟრსტუფქღყ"
ICONS = "☀☁☂☃☎☘☠☢☮☯♀♉♋♎♐♔♘♠♪♻⚓⚙✈✉"
SYMBOL_FONTS = [*DEJAVU, "STIXGeneral", "STIXGeneralBol"]  # the fonts that have all of SYMBOLS
ICON_FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold"]  # all of ICONS


def digits(rng: np.random.Generator) -> Drawn:
    """Real handwritten digits from scikit-learn: 10 classes, grey, 24 px."""
    from sklearn.datasets import load_digits

    scans = load_digits()  # 8 x 8 values of 0..16
    each = np.bincount(scans.target).min()
    chosen = np.stack([rng.permutation(np.flatnonzero(scans.target == digit))[:each] for digit in range(10)], 1)
    images = [
        np.pad(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC), 2)
        for image in _to_uint8(scans.images[chosen.ravel()] / 16)
    ]
    return np.stack(images), [str(digit) for digit in range(10)]


def letters(rng: np.random.Generator) -> Drawn:
    """Latin capitals in twenty fonts under random affine maps: 26 classes, grey, 28 px."""
    masks = _place(rng, _glyph_stamps(LETTERS, DEJAVU + STIX + COMPUTER_MODERN), 66, 28, turn=20)
    return _paint(rng, masks, 1, clutter=0.05), list(LETTERS)


def symbols(rng: np.random.Generator) -> Drawn:
    """Greek letters and mathematical symbols under random affine maps: 30 classes, grey, 28 px."""
    masks = _place(rng, _glyph_stamps(SYMBOLS, SYMBOL_FONTS), 60, 28, turn=20)
    return _paint(rng, masks, 1, clutter=0.05), list(SYMBOLS)


def shapes(rng: np.random.Generator) -> Drawn:
    """Outlined and filled geometric shapes in any direction and colour: 12 classes, RGB, 32 px."""

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
    return _paint(rng, _place(rng, stamps, 140, 32, turn=180), 3, clutter=0.12), list(outlines)


def textures(rng: np.random.Generator) -> Drawn:
    """Periodic and random textures at any angle, scale and contrast: 14 classes, grey, 32 px."""
    each, pixels = 120, 32
    x, y = _grid(pixels)

    def waves() -> tuple[np.ndarray, np.ndarray]:
        """Two perpendicular phases [each,p,p], of 4 to 6 half waves from the centre to an edge."""
        angle, speed = _between(rng, 0, 2 * np.pi, each), np.pi * _between(rng, 4, 6, each)
        along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        return speed * along + _between(rng, 0, 6.3, each), speed * across + _between(rng, 0, 6.3, each)

    def polar() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance and angle [each,p,p] round a random point, and a random phase [each,1,1]."""
        u, v = x - _between(rng, -0.5, 0.5, each), y - _between(rng, -0.5, 0.5, each)
        return np.hypot(u, v), np.arctan2(v, u), _between(rng, 0, 6.3, each)

    def cells() -> np.ndarray:
        """The second nearest of 14 random points is hardly farther than the nearest: dark edges of Voronoi cells."""
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
    drawn |= {"cells": cells(), "grain": _clouds(rng, each, pixels, 0.0), "clouds": _clouds(rng, each, pixels, 1.8)}
    drawn["camouflage"] = np.sign(_clouds(rng, each, pixels, 1.8))
    images = np.stack([_standardised(texture) for texture in drawn.values()], 1).reshape(-1, pixels, pixels)
    n = len(images)
    contrast = _between(rng, 0.12, 0.25, n) * rng.choice([-1, 1], (n, 1, 1))
    images = _between(rng, 0.4, 0.6, n) + contrast * (images + 0.4 * _clouds(rng, n, pixels, 0.5))
    return _to_uint8(images), list(drawn)


def colours(rng: np.random.Generator) -> Drawn:
    """Which of four hues is inside, which between, which outside: 24 classes, RGB, 20 px."""
    hues = {"red": 0.0, "yellow": 0.17, "green": 0.37, "blue": 0.63}
    orders = list(permutations(hues, 3))
    n, pixels = 75 * len(orders), 20
    x, y = _grid(pixels)
    distance = np.hypot(x - _between(rng, -0.2, 0.2, n), y - _between(rng, -0.2, 0.2, n))
    distance += 0.1 * _clouds(rng, n, pixels, 2.0)
    inner = _between(rng, 0.3, 0.5, n)
    region = (distance > inner).astype(int) + (distance > inner + _between(rng, 0.25, 0.35, n))
    hue = np.array([[hues[name] for name in order] for order in orders])[np.arange(n) % len(orders)]
    hsv = np.stack([hue, rng.uniform(0.45, 1, (n, 3)), rng.uniform(0.45, 1, (n, 3))], -1)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-0.05, 0.05, (n, 3))) % 1
    images = hsv_to_rgb(hsv)[np.arange(n)[:, None, None], region]
    return _to_uint8(images + 0.06 * rng.standard_normal(images.shape)), ["-".join(order) for order in orders]


def counting(rng: np.random.Generator) -> Drawn:
    """How many separate spots, 1 to 8, whatever their size and colour: 8 classes, RGB, 28 px."""
    most, pixels = 8, 28
    n = 220 * most
    count = (np.arange(n) % most + 1)[:, None]
    # the inked area, in pixels, is drawn without a look at the count, so that it tells little
    area = rng.uniform(40, 110, (n, 1)) / count * rng.uniform(0.6, 1.6, (n, most))
    radius = np.clip(np.sqrt(area / np.pi), 1.2, 6)
    radius = -np.sort(np.where(np.arange(most) < count, -radius, 0))  # large ones first; 0: not there
    centre = np.full((n, most, 2), 1e3)  # far away
    for k in range(most):
        room = radius[:, k, None, None] + 2
        tries = room + rng.random((n, 100, 2)) * (pixels - 2 * room)
        gaps = np.linalg.norm(tries[:, :, None] - centre[:, None, :k], axis=-1) - radius[:, None, :k]
        clearance = gaps.min(2, initial=1e3) - radius[:, k, None]
        best = np.minimum(clearance, 2).argmax(1)  # the first that is 2 pixels clear of the others
        centre[:, k] = np.where(radius[:, k, None] > 0, tries[np.arange(n), best], 1e3)
    away = np.arange(pixels) + 0.5 - centre[..., None]  # [n, spots, x or y, p]
    distance = np.hypot(away[:, :, 0, None, :], away[:, :, 1, :, None])
    masks = np.clip(radius[:, :, None, None] - distance + 0.5, 0, 1).max(1)
    return _paint(rng, masks, 3, clutter=0.08), [str(k + 1) for k in range(most)]


def orientation(rng: np.random.Generator) -> Drawn:
    """How steep random stripes are, rising or falling, in steps of 18 degrees: 6 classes, grey, 24 px."""
    classes, pixels = 6, 24
    n = 290 * classes
    x, y = _grid(pixels)
    steepness = 18.0 * (np.arange(n) % classes) + rng.uniform(-5, 5, n)
    angle = np.radians(steepness * rng.choice([-1, 1], n))[:, None, None]
    across = np.cos(angle) * y - np.sin(angle) * x
    profile = sum(np.sin(_between(rng, 2, 12, n) * across + _between(rng, 0, 6.3, n)) for _ in range(3))
    window = np.hypot(x - _between(rng, -0.3, 0.3, n), y - _between(rng, -0.3, 0.3, n)) < _between(rng, 0.6, 1.2, n)
    contrast = _between(rng, 0.11, 0.25, n)
    images = _between(rng, 0.35, 0.65, n) + contrast * window * profile
    return _to_uint8(images + 0.1 * _clouds(rng, n, pixels, 0.6)), [f"{18 * k}-degrees" for k in range(classes)]


def georgian(rng: np.random.Generator) -> Drawn:
    """Georgian letters in eleven fonts on a cluttered ground: 24 classes, grey, 28 px."""
    masks = _place(rng, _glyph_stamps(GEORGIAN, DEJAVU), 75, 28, turn=20)
    return _paint(rng, masks, 1, clutter=0.1), [f"letter-{ord(letter):x}" for letter in GEORGIAN]


def icons(rng: np.random.Generator) -> Drawn:
    """Weather, zodiac, chess and other signs in colour over photographs: 24 classes, RGB, 32 px."""
    from sklearn.datasets import load_sample_images

    pixels = 32
    masks = _place(rng, _glyph_stamps(ICONS, ICON_FONTS), 75, pixels, turn=25)
    n = len(masks)
    photos = np.stack([Image.fromarray(photo).reduce(3) for photo in load_sample_images().images])
    top = rng.integers(photos.shape[1] - pixels, size=n)[:, None] + np.arange(pixels)
    left = rng.integers(photos.shape[2] - pixels, size=n)[:, None] + np.arange(pixels)
    ground = photos[rng.integers(len(photos), size=(n, 1, 1)), top[:, :, None], left[:, None, :]] / 255
    ink, paper = _two_tones(rng, n, 3)
    ground = paper + 0.5 * (ground - ground.mean((1, 2), keepdims=True))
    return _to_uint8(ground + masks[..., None] * (ink - ground)), [f"sign-{ord(sign):x}" for sign in ICONS]


# name -> maker, whose docstring is the task's one-line description; the last two are held out
TASKS: dict[str, Callable[[np.random.Generator], Drawn]] = {
    maker.__name__: maker
    for maker in (digits, letters, symbols, shapes, textures, colours, counting, orientation, georgian, icons)
}
META_TRAIN, META_TEST = tuple(TASKS)[:8], tuple(TASKS)[8:]
