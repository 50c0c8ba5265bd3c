"""The judge is right about every real video, and is not fooled by videos that are wrong in one respect."""

from __future__ import annotations

import numpy as np
import pytest

from demo import shapes
from demo.judge import Reading, read, verdict

ALL = shapes.combinations()
RED_CIRCLE_RIGHT = shapes.Combination("red", "circle", "right")


@pytest.fixture
def video() -> shapes.Video:
    return shapes.make_video(RED_CIRCLE_RIGHT, seed=11)


@pytest.mark.parametrize("combination", ALL, ids=lambda combination: combination.caption)
def test_real_videos_are_read_right(combination: shapes.Combination) -> None:
    for seed in range(8):
        reading = read(shapes.make_video(combination, seed))
        assert (reading.colour, reading.shape, reading.direction) == combination
        assert reading.minimum_iou > 0.9


def test_the_verdict_on_a_real_video_is_right_in_every_respect(video: shapes.Video) -> None:
    outcome = verdict(read(video), RED_CIRCLE_RIGHT)
    assert outcome.colour and outcome.shape and outcome.direction and outcome.intact


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (shapes.Combination("blue", "circle", "right"), "colour"),
        (shapes.Combination("red", "square", "right"), "shape"),
        (shapes.Combination("red", "circle", "left"), "direction"),
    ],
)
def test_the_verdict_blames_the_part_that_differs(video: shapes.Video, other: shapes.Combination, wrong: str) -> None:
    outcome = verdict(read(video), other)
    assert [name for name in ("colour", "shape", "direction") if not getattr(outcome, name)] == [wrong]


def test_blank_videos_show_nothing() -> None:
    assert read(np.zeros((8, 32, 32, 3), np.uint8)) == Reading(None, None, None, 0.0)


def test_pictures_filled_to_the_edge_show_nothing() -> None:
    assert read(np.full((8, 32, 32, 3), shapes.COLOURS["red"], np.uint8)) == Reading(None, None, None, 0.0)


def test_one_blank_frame_is_not_intact(video: shapes.Video) -> None:
    video[4] = 0
    assert read(video).minimum_iou == 0.0


def test_a_shape_torn_in_two_is_not_intact(video: shapes.Video) -> None:
    middle = round(float(np.flatnonzero(video[3].any(axis=(0, 2))).mean()))
    video[3, :, :middle] = np.roll(video[3, :, :middle], -7, axis=0)
    video[3, :, middle:] = np.roll(video[3, :, middle:], 7, axis=0)
    assert not verdict(read(video), RED_CIRCLE_RIGHT).intact


def test_two_objects_are_not_intact(video: shapes.Video) -> None:
    video[5] = np.maximum(video[5], np.roll(video[5], 16, axis=0))
    assert not verdict(read(video), RED_CIRCLE_RIGHT).intact


def test_scattered_pixels_have_no_shape() -> None:
    noise = np.random.default_rng(0).random((8, 32, 32, 1)) < 0.1
    scattered = (noise * np.array(shapes.COLOURS["red"])).astype(np.uint8)
    assert read(scattered).shape is None


def test_still_objects_have_no_direction(video: shapes.Video) -> None:
    still = np.repeat(video[:1], shapes.FRAMES, axis=0)
    assert read(still).direction is None


def test_diagonal_motion_has_no_direction() -> None:
    centres = np.linspace((10.0, 10.0), (20.0, 20.0), shapes.FRAMES)
    diagonal = shapes.render(RED_CIRCLE_RIGHT, shapes.Placement(80.0, centres))
    assert read(diagonal).direction is None


def test_motion_to_and_fro_has_no_direction(video: shapes.Video) -> None:
    assert read(np.concatenate([video[::2], video[::-2]])).direction is None


@pytest.mark.parametrize(
    ("direction", "opposite"), [("left", "right"), ("right", "left"), ("up", "down"), ("down", "up")]
)
def test_backwards_in_time_is_the_opposite_direction(direction: str, opposite: str) -> None:
    video = shapes.make_video(shapes.Combination("green", "square", direction), seed=2)
    assert read(video[::-1]).direction == opposite


@pytest.mark.parametrize("name", ["white", "purple", "grey"])
def test_colours_without_a_name_are_not_forced_into_one(video: shapes.Video, name: str) -> None:
    rgb = {"white": (255, 255, 255), "purple": (200, 40, 200), "grey": (128, 128, 128)}[name]
    alpha = video.max(axis=-1, keepdims=True) / max(shapes.COLOURS["red"])
    assert read(np.rint(alpha * np.array(rgb)).astype(np.uint8)).colour is None


def test_mild_noise_changes_no_reading(video: shapes.Video) -> None:
    noise = np.random.default_rng(0).normal(0, 12, video.shape)
    reading = read(np.clip(video + noise, 0, 255).astype(np.uint8))
    assert (reading.colour, reading.shape, reading.direction) == RED_CIRCLE_RIGHT


def test_floating_point_frames_are_refused(video: shapes.Video) -> None:
    with pytest.raises(ValueError, match="uint8"):
        read((video / 255).astype(np.float32))
