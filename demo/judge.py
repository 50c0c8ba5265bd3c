"""Reads off a video which shape of which colour moves in which direction, and how well its worst frame is drawn.

A plain program with fixed thresholds: nothing in it is learnt, so it cannot have been trained to like what a network
draws. It fits the three shapes to every frame at the area and the centroid of the frame's foreground; a frame with
parts missing, torn off or smeared matches no shape well, which the minimum over frames reports.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from demo import shapes

FOREGROUND_LEVEL = 100
"""A pixel is foreground if its brightest channel is at least this: about half of every colour's brightest channel."""
MINIMUM_AREA = 8
"""Pixels; frames with less foreground count as blank."""
MAXIMUM_SHARE = 0.5
"""Of the frame's pixels; with more foreground the frame counts as blank too, for it shows no object on a background."""
MAXIMUM_COLOUR_DISTANCE = 60.0
"""Euclidean distance in 8-bit RGB from a named colour, beyond which the colour has no name."""
MINIMUM_TRAVEL = 4.0
"""Pixels between first and last frame; less is standing still."""
MINIMUM_IOU = 0.5
"""A frame whose best fit is not above this is torn."""

Mask = npt.NDArray[np.bool_]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """What a video shows; None where it shows nothing that has a name.

    Attributes:
        colour: from the median foreground pixel.
        shape: the best fit on average over all frames.
        direction: from the centroid's motion, which must be mostly along one axis.
        minimum_iou: intersection over union of that shape and the foreground, in the worst frame; 0 if one is blank.
    """

    colour: str | None
    shape: str | None
    direction: str | None
    minimum_iou: float


@dataclass(frozen=True)
class Verdict:
    """A reading held against a caption."""

    colour: bool
    shape: bool
    direction: bool
    intact: bool


def read(video: shapes.Video) -> Reading:
    """Judges uint8 frames (frames, height, width, 3) of any number and size."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"got {video.dtype} frames of shape {video.shape}; expected uint8 (frames, height, width, 3)")
    masks = video.max(axis=-1) >= FOREGROUND_LEVEL
    visible = (masks.sum(axis=(1, 2)) >= MINIMUM_AREA) & (masks.mean(axis=(1, 2)) <= MAXIMUM_SHARE)
    if not visible.any():
        return Reading(None, None, None, 0.0)
    fits = np.zeros((len(masks), len(shapes.SHAPES)))
    fits[visible] = [_shape_fits(mask) for mask in masks[visible]]
    best = int(fits.mean(axis=0).argmax())
    return Reading(
        colour=_colour(video[visible][masks[visible]]),
        shape=shapes.SHAPES[best] if fits[:, best].mean() > MINIMUM_IOU else None,
        direction=_direction(masks, visible),
        minimum_iou=float(fits[:, best].min()),
    )


def verdict(reading: Reading, expected: shapes.Combination) -> Verdict:
    """Whether a reading is what the caption of a combination asks for."""
    return Verdict(
        colour=reading.colour == expected.colour,
        shape=reading.shape == expected.shape,
        direction=reading.direction == expected.direction,
        intact=reading.minimum_iou > MINIMUM_IOU,
    )


def _centroid(mask: Mask) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def _shape_fits(mask: Mask) -> Array:
    # Intersection over union with every shape in turn, in the order of shapes.SHAPES.
    x, y = _centroid(mask)
    rows, columns = (np.arange(length, dtype=np.float64) + 0.5 for length in mask.shape)
    fits = []
    for shape in shapes.SHAPES:
        template = shapes.signed_distance(shape, columns[None, :] - x, rows[:, None] - y, float(mask.sum())) < 0
        fits.append((mask & template).sum() / (mask | template).sum())
    return np.array(fits, dtype=np.float64)


def _colour(foreground: shapes.Video) -> str | None:
    median = np.median(foreground, axis=0)
    distances = {name: float(np.linalg.norm(median - np.array(rgb))) for name, rgb in shapes.COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= MAXIMUM_COLOUR_DISTANCE else None


def _direction(masks: Mask, visible: Mask) -> str | None:
    times = np.flatnonzero(visible)
    if len(times) < 2:
        return None
    centroids = np.array([_centroid(masks[time]) for time in times])
    velocity = np.polyfit(times, centroids, 1)[0]
    travel = velocity * (len(masks) - 1)
    along, across = sorted(np.abs(travel), reverse=True)
    if along < MINIMUM_TRAVEL or across > along / 2:
        return None
    name: str = max(shapes.DIRECTIONS, key=lambda name: float(np.dot(shapes.DIRECTIONS[name], travel)))
    return name
