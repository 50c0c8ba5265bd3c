"""Synthetic videos of one coloured shape that moves over a black background, each with its caption.

The world is small on purpose: 4 colours, 3 shapes and 4 directions make 48 captions, few enough for a network of a few
million parameters to learn on a CPU, and simple enough for `demo.judge` to read a video back without learning anything.
Twelve combinations are held out: every colour, shape and direction is trained on, but never these twelve together, so a
right video for one of their captions cannot have been remembered.

Shapes are drawn from signed distances (negative inside, in pixels), which gives anti-aliased edges and motion by
fractions of a pixel. Everything follows from seeds: the same arguments give the same bytes.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FRAMES = 8
"""Of a video when no number is asked for."""
SIZE = 32
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 210, 70),
    "blue": (60, 90, 240),
    "yellow": (235, 215, 40),
}
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit vectors (x, y) in pixels; y grows downwards."""
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")

AREA_RANGE = (60.0, 120.0)
TRAVEL_RANGE = (9.0, 14.0)
"""Area of the shape in pixels, and the distance in pixels that it covers between the first and the last frame."""
HELD_OUT_SEED = 7

Video = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]


class Combination(NamedTuple):
    """What a video shows, and so what its caption says."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        """The prompt, for example "a red circle moving right"."""
        return f"a {self.colour} {self.shape} moving {self.direction}"


@dataclass(frozen=True)
class Placement:
    """Area in pixels, and the centre (x, y) of the shape in pixels in every frame, shape (frames, 2)."""

    area: float
    centres: Array


def combinations() -> list[Combination]:
    """All 48 combinations, in a fixed order."""
    return [Combination(*parts) for parts in itertools.product(COLOURS, SHAPES, DIRECTIONS)]


def held_out() -> list[Combination]:
    """The twelve combinations that no training video shows.

    Balanced: three of every colour (one per shape), four of every shape and three of every direction.
    """
    rng = random.Random(HELD_OUT_SEED)
    colours, shapes, directions = list(COLOURS), list(SHAPES), list(DIRECTIONS)
    for names in (colours, shapes, directions):
        rng.shuffle(names)
    return sorted(
        Combination(colour, shape, directions[(i + j) % len(directions)])
        for i, colour in enumerate(colours)
        for j, shape in enumerate(shapes)
    )


def trained() -> list[Combination]:
    """The 36 combinations that training videos show."""
    excluded = set(held_out())
    return [combination for combination in combinations() if combination not in excluded]


def signed_distance(shape: str, x: Array, y: Array, area: float) -> Array:
    """Signed distance in pixels from points (x, y) to the edge of a shape of `area` pixels centred at its centroid.

    Outside the corners of squares and triangles it is the distance to the nearest edge line, which is all that
    anti-aliasing needs. Triangles are equilateral and stand on one side.
    """
    if shape == "circle":
        return np.hypot(x, y) - math.sqrt(area / math.pi)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - math.sqrt(area) / 2
    if shape == "triangle":
        inradius = math.sqrt(area / (3 * math.sqrt(3)))
        slanted = math.sqrt(3) / 2 * np.abs(x) - y / 2
        return np.maximum(slanted, y) - inradius
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def coverage(shape: str, area: float, centre: tuple[float, float], size: int = SIZE) -> Array:
    """How much of every pixel a shape covers, (size, size) in [0, 1]."""
    pixels = np.arange(size, dtype=np.float64) + 0.5
    distance = signed_distance(shape, pixels[None, :] - centre[0], pixels[:, None] - centre[1], area)
    return np.clip(0.5 - distance, 0.0, 1.0)


def _extent(shape: str, area: float) -> tuple[Array, Array]:
    # Reach from the centroid to the left and top, and to the right and bottom, as (x, y).
    if shape == "triangle":
        inradius = math.sqrt(area / (3 * math.sqrt(3)))
        half_side = math.sqrt(3) * inradius
        return np.array([half_side, 2 * inradius]), np.array([half_side, inradius])
    reach = math.sqrt(area / math.pi) if shape == "circle" else math.sqrt(area) / 2
    return np.full(2, reach), np.full(2, reach)


def placement(combination: Combination, rng: np.random.Generator, frames: int = FRAMES) -> Placement:
    """Draws size, speed and starting point so that the whole shape stays inside the picture in every frame.

    The draw does not depend on the number of frames, so longer videos show the same motion in finer steps.
    """
    area = float(rng.uniform(*AREA_RANGE))
    travel = float(rng.uniform(*TRAVEL_RANGE)) * np.array(DIRECTIONS[combination.direction], dtype=np.float64)
    before, after = _extent(combination.shape, area)
    lowest = before + np.maximum(-travel, 0)
    highest = SIZE - after - np.maximum(travel, 0)
    start = rng.uniform(lowest, highest)
    centres = start + np.linspace(0, 1, frames)[:, None] * travel
    return Placement(area, centres)


def render(combination: Combination, where: Placement) -> Video:
    """Draws a video, uint8 (frames, height, width, 3)."""
    alpha = np.stack([coverage(combination.shape, where.area, (x, y)) for x, y in where.centres])
    colour = np.array(COLOURS[combination.colour], dtype=np.float64)
    return np.rint(alpha[..., None] * colour).astype(np.uint8)


def make_video(combination: Combination, seed: int | tuple[int, ...], frames: int = FRAMES) -> Video:
    """One video of a combination, uint8 (frames, 32, 32, 3); the seed decides size, speed and place."""
    return render(combination, placement(combination, np.random.default_rng(seed), frames))


def make_dataset(count: int, seed: int, first: int = 0, frames: int = FRAMES) -> tuple[Video, npt.NDArray[np.int64]]:
    """Videos `first` to `first + count` of the training set of a seed, which has no end.

    Returns:
        Videos uint8 (count, frames, 32, 32, 3), and for each the index of its combination in `trained()`, int64
        (count,).
    """
    choices = trained()
    indices = range(first, first + count)
    labels = np.array([index % len(choices) for index in indices], dtype=np.int64)
    videos = np.stack([make_video(choices[index % len(choices)], (seed, index), frames) for index in indices])
    return videos, labels
