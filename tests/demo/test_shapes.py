"""The synthetic videos: deterministic, inside the picture, captioned, and honest about what is held out."""

from __future__ import annotations

import numpy as np
import pytest

from demo import shapes

ALL = shapes.combinations()


def test_there_are_48_combinations_with_distinct_captions() -> None:
    assert len(ALL) == 48
    assert len({combination.caption for combination in ALL}) == 48


def test_captions_are_plain_sentences() -> None:
    assert shapes.Combination("red", "circle", "right").caption == "a red circle moving right"


def test_trained_and_held_out_split_the_combinations() -> None:
    assert len(shapes.held_out()) == 12
    assert not set(shapes.trained()) & set(shapes.held_out())
    assert set(shapes.trained()) | set(shapes.held_out()) == set(ALL)


def test_the_split_is_the_same_every_time() -> None:
    assert shapes.held_out() == shapes.held_out()


def test_every_word_is_held_out_equally_often() -> None:
    words = [word for combination in shapes.held_out() for word in combination]
    assert {words.count(name) for name in shapes.COLOURS} == {3}
    assert {words.count(name) for name in shapes.SHAPES} == {4}
    assert {words.count(name) for name in shapes.DIRECTIONS} == {3}


def test_the_training_set_shows_trained_combinations_only() -> None:
    _, labels = shapes.make_dataset(100, seed=0)
    assert set(labels.tolist()) == set(range(len(shapes.trained())))


def test_the_training_set_is_deterministic() -> None:
    first, again = (shapes.make_dataset(20, seed=3)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_another_seed_gives_other_videos() -> None:
    assert not np.array_equal(shapes.make_dataset(5, seed=3)[0], shapes.make_dataset(5, seed=4)[0])


def test_a_share_of_the_training_set_is_a_slice_of_it() -> None:
    videos, labels = shapes.make_dataset(12, seed=3)
    share, share_labels = shapes.make_dataset(5, seed=3, first=7)
    np.testing.assert_array_equal(share, videos[7:])
    np.testing.assert_array_equal(share_labels, labels[7:])


@pytest.mark.parametrize("combination", ALL, ids=lambda combination: combination.caption)
def test_videos_are_uint8_rgb_frames_of_one_colour(combination: shapes.Combination) -> None:
    video = shapes.make_video(combination, seed=0)
    assert video.dtype == np.uint8
    assert video.shape == (shapes.FRAMES, shapes.SIZE, shapes.SIZE, 3)
    assert {tuple(frame.max(axis=(0, 1))) for frame in video} == {shapes.COLOURS[combination.colour]}


@pytest.mark.parametrize("frames", [9, 17])
def test_longer_videos_show_the_same_motion_in_finer_steps(frames: int) -> None:
    combination = ALL[0]
    short, long = shapes.make_video(combination, seed=5), shapes.make_video(combination, seed=5, frames=frames)
    assert long.shape == (frames, *short.shape[1:])
    np.testing.assert_array_equal(long[[0, -1]], short[[0, -1]])


def test_the_training_set_has_as_many_frames_as_asked_for() -> None:
    assert shapes.make_dataset(2, seed=3, frames=9)[0].shape == (2, 9, shapes.SIZE, shapes.SIZE, 3)


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("area", shapes.AREA_RANGE)
def test_shapes_cover_the_area_asked_for(shape: str, area: float) -> None:
    assert shapes.coverage(shape, area, (16.2, 15.7)).sum() == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize("combination", ALL, ids=lambda combination: combination.caption)
def test_shapes_stay_whole_inside_the_picture(combination: shapes.Combination) -> None:
    for seed in range(5):
        where = shapes.placement(combination, np.random.default_rng(seed))
        for x, y in where.centres:
            assert shapes.coverage(combination.shape, where.area, (x, y)).sum() == pytest.approx(where.area, rel=0.03)


def test_unknown_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        shapes.coverage("hexagon", 80.0, (16.0, 16.0))
