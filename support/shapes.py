"""The generated world: ten shapes and ten motions that a person can tell apart, and all else at random.

It needs no files, so every script runs at once. "generated" images give a tokenizer something to learn; the
"generated-plain" ones (few hues, light grounds, almost upright) suit transformers that train for minutes.
A sample is a function of (seed, split, index): splits are disjoint, another size shows the same scene.

Axis letters: B samples, T frames, S side of an image. numpy only.
"""
import colorsys
import math
from types import SimpleNamespace

import numpy as np

SPLITS = ("train", "val", "test")

# ---- 1. Shapes: signed distances ---------------------------------------------------------------------------

# Negative inside, positive outside, in a plane where x points right and y up; the figure fills about the unit
# disc. The minimum of two distances joins their shapes; the maximum keeps what they share; a minus sign turns
# a shape inside out.

def disc(x, y, radius):
    """Signed distance to a disc around the origin."""
    return np.sqrt(x * x + y * y) - radius


def box(x, y, half_width, half_height):
    """Signed distance to a rectangle around the origin (somewhat short outside its corners)."""
    return np.maximum(abs(x) - half_width, abs(y) - half_height)


def half_plane(x, y, point, degrees):
    """Signed distance to a half plane with an edge through `point` and the outward normal at `degrees`."""
    angle = math.radians(degrees)
    return (x - point[0]) * math.cos(angle) + (y - point[1]) * math.sin(angle)


def star(x, y):
    """Five points. Folding the plane along the star's mirror lines lays all ten edges onto one."""
    for degrees in (108, 144):                            # the directions towards which the folds go
        toward = math.radians(degrees)
        x = abs(x)
        beyond = 2 * np.minimum(x * math.cos(toward) + y * math.sin(toward), 0)
        x, y = x - beyond * math.cos(toward), y - beyond * math.sin(toward)
    return half_plane(x, y, (0, 1.0), 24)


def heart(x, y):
    """A square on its corner, with a half disc on each upper side."""
    x, y = abs(x), y + 0.2
    tilted = box((x - y) * math.sqrt(0.5), (x + y) * math.sqrt(0.5), 0.545, 0.545)
    return np.minimum(tilted, disc(x - 0.385, y - 0.385, 0.545))


def flower(x, y):
    """Six petals around a hole."""
    petals = np.minimum(disc(x, abs(y) - 0.58, 0.34), disc(abs(x) - 0.502, abs(y) - 0.29, 0.34))
    return np.maximum(np.minimum(petals, disc(x, y, 0.45)), -disc(x, y, 0.2))


SHAPES = {
    "ball": lambda x, y: disc(x, y, 0.9),
    "ring": lambda x, y: abs(disc(x, y, 0.68)) - 0.24,
    "triangle": lambda x, y: np.maximum(half_plane(abs(x), y, (0, 1.0), 30), -0.5 - y),
    "square": lambda x, y: box(x, y, 0.72, 0.72),
    "star": star, "heart": heart,
    # A disc less another disc. The half plane through the moon's horns keeps shadows out of the gap.
    "moon": lambda x, y: np.maximum(np.maximum(disc(x + 0.1, y, 0.9), -disc(x - 0.32, y, 0.72)), x - 0.46),
    "cross": lambda x, y: np.minimum(box(x, y, 0.92, 0.31), box(x, y, 0.31, 0.92)),
    "flower": flower,
    "arrow": lambda x, y: np.minimum(np.maximum(half_plane(abs(x), y, (0, 1.0), 41), 0.1 - y),     # head
                                     box(x, y + 0.4, 0.24, 0.55)),                                 # shaft
}


# ---- 2. Scenes: what is left to chance, and how it is painted ----------------------------------------------

# Ranges, and chances of what an image may have. `hues`: how many there are. `scale`: the figure's, of half
# the image's width. `turn`: the largest rotation either way, in full turns. `ground_luma`: brightness of a
# light ground. `contrast`: in brightness, between figure and ground. `gradient`: of the ground.
FULL = SimpleNamespace(hues=999, scale=(0.60, 0.88), turn=0.5, ground_luma=(0.66, 0.95), dark_ground=0.4,
                       contrast=(0.34, 0.50), ground_saturation=(0.15, 0.75), figure_saturation=(0.6, 1.0),
                       gradient=0.5, stripes=0.35, light=0.7, shadow=(0.0, 0.5))
# For a transformer that trains for minutes: what its tokens tell must be mostly the shape.
PLAIN = SimpleNamespace(hues=6, scale=(0.70, 0.88), turn=0.04, ground_luma=(0.90, 0.93), dark_ground=0,
                        contrast=(0.45, 0.50), ground_saturation=(0.25, 0.25), figure_saturation=(0.9, 1.0),
                        gradient=0, stripes=0, light=0.2, shadow=(0, 0))
MOVING = SimpleNamespace(**{**vars(PLAIN), "scale": (0.32, 0.44), "turn": 0.5, "contrast": (0.40, 0.50)})


def colour(hue, saturation, luma):
    """(red, green, blue) of a hue in turns, mixed with black or white until the brightness is `luma`."""
    rgb = colorsys.hsv_to_rgb(hue % 1, saturation, 1)
    own = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    luma = min(max(luma, 0.03), 0.97)
    if luma < own:
        return [value * luma / own for value in rgb]
    return [1 - (1 - value) * (1 - luma) / max(1 - own, 1e-3) for value in rgb]


def scene(rng, name, variety):
    """All that chance decides about an image of the shape `name`; lengths in half widths of the image."""
    chance = iter(rng.random(32).tolist()).__next__       # all at once: single draws cost more

    def between(low, high):
        return low + (high - low) * chance()

    turn = min(variety.turn, 0.12) if name == "heart" else variety.turn  # upside down, it looks like a leaf
    place = {"x": between(-1, 1), "y": between(-1, 1),                   # of the room beside the figure
             "scale": between(*variety.scale), "turn": between(-turn, turn)}
    # Figure and ground differ by `contrast` in brightness, whatever their hues: no figure is ever hidden.
    luma = between(*variety.ground_luma)
    sign = 1 if chance() < variety.dark_ground else -1               # from the ground's to the figure's
    if sign > 0:
        luma = between(0.10, 0.30)
    figure_luma = luma + sign * between(*variety.contrast)
    hue = chance()
    figure_hue = hue + between(0.2, 0.8)
    hue = (math.floor(hue * variety.hues) + 0.5) / variety.hues
    figure_hue = (math.floor(figure_hue * variety.hues) + 0.5) / variety.hues
    colours = [colour(hue, between(*variety.ground_saturation), luma),
               colour(hue + between(-0.1, 0.1), between(*variety.ground_saturation),
                      luma - sign * between(-0.10, 0.22)),
               colour(figure_hue, between(*variety.figure_saturation), figure_luma),
               colour(figure_hue + between(-0.12, 0.12), between(0.5, 1.0),
                      figure_luma + sign * between(0.12, 0.30)), (1, 1, 1)]
    return {"name": name, "shown": 1, **place, "colours": colours,
            "gradient": chance() < variety.gradient, "toward": chance(),
            "stripes": chance() < variety.stripes, "phase": chance(),
            "light": between(0.12, 0.25) * (chance() < variety.light), "shadow": between(*variety.shadow)}


def paint(scenes, size):
    """uint8 (B, 3, S, S): the images of `scenes`, so few at a time that their arrays stay in the cache."""
    block = max(1, 2 ** 14 // size ** 2)
    if len(scenes) > block:
        return np.concatenate([paint(scenes[i:i + block], size) for i in range(0, len(scenes), block)])

    def column(key):                                      # (B, 1, 1): a number for each image
        return np.array([s[key] for s in scenes], np.float32)[:, None, None]

    def fade(distance, width):                            # 1 inside, 0 outside, on an edge `width` wide
        return np.clip(0.5 - distance * (scale / width), 0, 1)

    scale = column("scale")
    x = (2 * np.arange(size, dtype=np.float32) + 1) / size - 1                       # pixel centres
    y = -x[:, None]
    u = (x - column("x") * (1 - scale)) / scale           # (B, 1, S): x in the figure's plane, not turned
    v = (y - column("y") * (1 - scale)) / scale           # (B, S, 1)

    # Distances (2, B, S, S) to the figure, and to its shadow, which falls to the lower right.
    layers = 1 + column("shadow").any()                   # plain scenes save the work for the shadow
    u2 = np.stack([u, u - 0.1])[:layers]
    v2 = np.stack([v, v + 0.16])[:layers]
    cos = np.cos(2 * np.pi * column("turn"))
    sin = np.sin(2 * np.pi * column("turn"))
    u2, v2 = u2 * cos + v2 * sin, v2 * cos - u2 * sin
    distance = np.empty_like(u2)
    names = np.array([s["name"] for s in scenes])
    for name in set(names):
        chosen = np.flatnonzero(names == name)
        distance[:, chosen] = SHAPES[name](u2[:, chosen], v2[:, chosen])

    # A pixel is a weighted sum of five colours: two of the ground, two of the figure's stripes, white light.
    toward = 2 * np.pi * column("toward")
    gradient = column("gradient") * np.clip(0.5 + 0.5 * (x * np.cos(toward) + y * np.sin(toward)), 0, 1)
    figure = column("shown") * fade(distance[0], 2 / size)                           # anti-aliased
    ground = (1 - figure) * (1 - column("shadow") * fade(distance[-1], 0.35))
    phase = 1.5 * (u + v) + column("phase")
    wave = abs(2 * (phase - np.floor(phase)) - 1) - 0.5
    stripes = column("stripes") * fade(wave / 3, 2 / size)
    weights = np.stack([ground * (1 - gradient), ground * gradient, figure * (1 - stripes), figure * stripes,
                        figure * column("light") * (0.6 * v - 0.4 * u)], axis=1)     # (B, 5, S, S)
    colours = np.array([s["colours"] for s in scenes], np.float32)                   # (B, 5, 3)
    images = colours.swapaxes(1, 2) @ weights.reshape(-1, 5, size * size)
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8).reshape(-1, 3, size, size)


def draw_images(indices, split, size, seed=0, plain=False):
    """uint8 (B, 3, S, S) of the images `indices` (B,), S = `size`; image i shows shape i % 10 of `SHAPES`."""
    names = list(SHAPES)
    scenes = [scene(np.random.default_rng((seed, SPLITS.index(split), i)), names[i % len(names)],
                    PLAIN if plain else FULL) for i in indices]
    return paint(scenes, size)


# ---- 3. Motions --------------------------------------------------------------------------------------------

# Where the figure is after the fraction p of the clip: (x, y, size, turns, shown), with chance in a and b;
# x and y in -1..1 of the room that there is, size as a factor.
MOTIONS = {
    "right": lambda p, a, b: (b * (2 * p - 1), a, 1, 0, 1),
    "left": lambda p, a, b: (b * (1 - 2 * p), a, 1, 0, 1),
    "up": lambda p, a, b: (a, b * (2 * p - 1), 1, 0, 1),
    "down": lambda p, a, b: (a, b * (1 - 2 * p), 1, 0, 1),
    "grow": lambda p, a, b: (a, b - 0.85, 0.5 + 1.4 * p, 0, 1),
    "shrink": lambda p, a, b: (a, b - 0.85, 1.9 - 1.4 * p, 0, 1),
    "turn-left": lambda p, a, b: (a, b - 0.85, 1.6, p, 1),
    "turn-right": lambda p, a, b: (a, b - 0.85, 1.6, -p, 1),
    "bounce": lambda p, a, b: (a, 2 * b * (1 - (4 * p - math.floor(2 * p) * 2 - 1) ** 2) - 1, 1, 0, 1),
    "blink": lambda p, a, b: (a, b - 0.85, 1.6, 0, math.floor(4 * p + 0.5) % 2 == 0),
}
# Round ones and the flower hardly show that they turn.
MOVING_SHAPES = [name for name in SHAPES if name not in ("ball", "ring", "flower")]


def draw_clips(indices, split, size, frames, seed=0):
    """uint8 (B, 3, T, S, S) of the clips `indices` (B,), T = `frames`; clip i moves by motion i % 10.

    A motion takes the whole clip, except that a turn takes at most 18 degrees a frame: more could be seen as
    a turn of a square or a star the other way round.
    """
    motions = list(MOTIONS.values())
    scenes = []
    for i in indices:
        rng = np.random.default_rng((seed, SPLITS.index(split), i))
        name = MOVING_SHAPES[rng.integers(len(MOVING_SHAPES))]
        a = rng.uniform(-0.7, 0.7)
        b = rng.uniform(0.7, 1.0)
        still = scene(rng, name, MOVING)
        for frame in range(frames):
            x, y, zoom, turns, shown = motions[i % len(motions)](frame / max(1, frames - 1), a, b)
            turns = turns * min(0.75, 0.05 * (frames - 1))
            scenes.append({**still, "x": x, "y": y, "shown": shown,
                           "scale": zoom * still["scale"], "turn": turns + still["turn"]})
    return paint(scenes, size).reshape(-1, frames, 3, size, size).swapaxes(1, 2)
