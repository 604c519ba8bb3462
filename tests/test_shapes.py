"""The generated world: ten classes that can be told apart, everything else at random and repeatable."""
import numpy as np
import pytest

from support import shapes


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("size", [32, 50])
def test_an_image_alone_equals_the_one_in_a_batch(plain, size):
    batch = shapes.draw_images([3, 14, 15, 92, 65], "train", size, plain=plain)
    assert batch.shape == (5, 3, size, size) and batch.dtype == np.uint8
    for i, index in enumerate([3, 14, 15, 92, 65]):
        alone = shapes.draw_images([index], "train", size, plain=plain)[0].astype(int)
        assert abs(alone - batch[i]).max() <= 1 and (alone == batch[i]).mean() > 0.999


def test_splits_and_seeds_share_no_image():
    sets = [shapes.draw_images(range(200), split, 16, seed) for split, seed in
            (("train", 0), ("val", 0), ("test", 0), ("train", 1))]
    images = {image.tobytes() for each in sets for image in each}
    assert len(images) == 800


def test_another_size_shows_the_same_scene():
    small = shapes.draw_images(range(20), "train", 32).astype(float)
    large = shapes.draw_images(range(20), "train", 128).astype(float)
    shrunk = large.reshape(20, 3, 32, 4, 32, 4).mean((3, 5))
    assert abs(shrunk - small).mean() < 3


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_figures_fill_about_the_unit_disc(name):
    at = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    x, y = np.meshgrid(at, at)
    inside = shapes.SHAPES[name](x, y) < 0
    radius = np.sqrt(x * x + y * y)[inside]
    assert 0.8 < radius.max() < 1.15 and 0.12 < inside.mean() * 9 / np.pi < 1


def test_no_two_shapes_cover_the_same_pixels():
    x, y = np.meshgrid(np.linspace(-1, 1, 65), np.linspace(-1, 1, 65))
    masks = np.array([distance(x, y) < 0 for distance in shapes.SHAPES.values()]).reshape(10, -1)
    both = (masks[:, None] & masks).sum(-1) / (masks[:, None] | masks).sum(-1)  # intersection / union
    assert (both - np.eye(10)).max() < 0.9


def test_ground_and_figure_colours_do_not_tell_the_class():
    images = shapes.draw_images(range(1000), "train", 16).astype(float)
    labels = np.arange(1000) % 10
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean((1, 2))
    means = [corners[labels == label].mean() for label in range(10)]
    assert np.std(means) < 0.35 * corners.std()


def test_the_plain_variety_has_less_to_tell():
    full = shapes.draw_images(range(300), "train", 32).astype(float)
    plain = shapes.draw_images(range(300), "train", 32, plain=True).astype(float)
    corners = [images[:, :, 0, 0].std(0).mean() for images in (full, plain)]
    detail = [abs(np.diff(images, axis=3)).mean() for images in (full, plain)]
    assert corners[1] < 0.5 * corners[0] and detail[1] < 0.9 * detail[0]


def test_plain_grounds_are_light_and_full_ones_often_dark():
    for plain, dark in ((True, 0.0), (False, 0.4)):
        corner = shapes.draw_images(range(1000), "val", 32, plain=plain)[:, :, 0, 0] / 255
        luma = corner @ np.array([0.299, 0.587, 0.114])
        assert abs((luma < 0.5).mean() - dark) < 0.06
        assert not plain or np.median(abs(luma - 0.915)) < 0.02


def centres(clip):
    """Centre (x right, y up) and area of the figure in each frame of a clip (3, T, S, S)."""
    frames = clip.transpose(1, 0, 2, 3).astype(float)
    mask = abs(frames - frames[:, :, :1, :1]).max(1) > 60                # what is unlike the corner
    at = np.linspace(-1, 1, mask.shape[-1])
    area = mask.sum((1, 2))
    x = (mask * at).sum((1, 2)) / np.maximum(area, 1)
    return x, (mask * -at[:, None]).sum((1, 2)) / np.maximum(area, 1), area


def test_clips_move_as_their_class_says():
    clips = shapes.draw_clips(range(40), "train", 48, 17)
    assert clips.shape == (40, 3, 17, 48, 48) and list(shapes.MOTIONS)[:2] == ["right", "left"]
    for i, clip in enumerate(clips):
        x, y, area = centres(clip)
        name = list(shapes.MOTIONS)[i % 10]
        expected = {"right": x[-1] > x[0] + 0.5, "left": x[-1] < x[0] - 0.5, "up": y[-1] > y[0] + 0.5,
                    "down": y[-1] < y[0] - 0.5, "grow": area[-1] > 3 * area[0],
                    "shrink": area[-1] < area[0] / 3, "blink": (area == 0).any() and (area > 0).any(),
                    "bounce": y.max() > y[0] + 0.5}
        assert expected.get(name, abs(x[-1] - x[0]) + abs(y[-1] - y[0]) < 0.8), (i, name)


def test_other_numbers_of_frames_show_the_same_motion():
    few = shapes.draw_clips([0, 4], "val", 32, 5)
    many = shapes.draw_clips([0, 4], "val", 32, 17)
    assert np.array_equal(few, many[:, :, ::4])


def test_left_turns_are_positive_angles_and_right_ones_negative():
    assert shapes.MOTIONS["turn-left"](1.0, 0, 1)[3] == 1 and shapes.MOTIONS["turn-right"](1.0, 0, 1)[3] == -1
