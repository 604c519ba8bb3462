"""The generated world: ten shapes and ten motions that a person can tell apart, and all else at random.

It needs no files, so that every script runs at once. "generated" images give a tokenizer something to learn;
"generated-plain" ones (few hues, light plain grounds, almost upright) suit a transformer that trains for
minutes. A sample is a function of (seed, split, index): at another size it is the same scene, and train and
val are disjoint. numpy only. Axis letters: B samples, T frames, S side of an image.

    1. shapes      signed distances
    2. scenes      what is drawn at random, and how it is painted
    3. motions     where the figure is in each frame of a clip
"""
import dataclasses
import math

import numpy as np

SPLITS = ("train", "val", "test")

# ---- 1. Shapes ---------------------------------------------------------------------------------------------

# A shape is a signed distance: negative inside, positive outside, in a plane where x points right and y up,
# and the figure fills about the unit disc. The minimum of two distances joins their shapes; the maximum
# keeps what they share; a minus sign turns a shape inside out.

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


def ball(x, y):
    """A full disc."""
    return disc(x, y, 0.9)


def ring(x, y):
    """A disc with a wide hole."""
    return abs(disc(x, y, 0.68)) - 0.24


def triangle(x, y):
    """Equilateral, standing on its base."""
    return np.maximum(half_plane(abs(x), y, (0, 1.0), 30), -0.5 - y)


def square(x, y):
    """Four equal sides."""
    return box(x, y, 0.72, 0.72)


def star(x, y):
    """Five points. Folding the plane along the star's mirror lines lays all ten edges onto one."""
    for degrees in (108, 144):                            # the directions towards which the folds go
        x = abs(x)
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        beyond = 2 * np.minimum(x * cos + y * sin, 0)
        x, y = x - beyond * cos, y - beyond * sin
    return half_plane(x, y, (0, 1.0), 24)


def heart(x, y):
    """A square on its corner, with a half disc on each upper side."""
    x = abs(x)
    y = y + 0.2
    tilted = box((x - y) * math.sqrt(0.5), (x + y) * math.sqrt(0.5), 0.545, 0.545)
    return np.minimum(tilted, disc(x - 0.385, y - 0.385, 0.545))


def moon(x, y):
    """A crescent: a disc less another disc. The half plane through its horns keeps shadows out of the gap."""
    x = x + 0.1
    return np.maximum(np.maximum(disc(x, y, 0.9), -disc(x - 0.42, y, 0.72)), x - 0.56)


def cross(x, y):
    """Two equal bars."""
    return np.minimum(box(x, y, 0.92, 0.31), box(x, y, 0.31, 0.92))


def flower(x, y):
    """Six petals around a hole."""
    x = abs(x)
    y = abs(y)
    petals = np.minimum(disc(x, y - 0.58, 0.34), disc(x - 0.502, y - 0.29, 0.34))
    return np.maximum(np.minimum(petals, disc(x, y, 0.45)), -disc(x, y, 0.2))


def arrow(x, y):
    """A head on a shaft, pointing up."""
    head = np.maximum(half_plane(abs(x), y, (0, 1.0), 41), 0.1 - y)
    return np.minimum(head, box(x, y + 0.4, 0.24, 0.55))


SHAPES = {shape.__name__: shape for shape in (ball, ring, triangle, square, star, heart, moon, cross, flower,
                                              arrow)}
LARGEST_TURN = {"heart": 0.12}                            # upside down, people call it a leaf or a spade


# ---- 2. Scenes ---------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Variety:
    """How much the images of a class differ. Pairs are ranges, the rest chances."""
    hues: int = 0                                         # how many hues there are; 0: any
    scale: tuple = (0.60, 0.88)                           # size of the figure, of half the image's width
    turn: float = 0.5                                     # largest rotation either way, in full turns
    dark_ground: float = 0.4                              # a light figure on a dark ground
    ground_luma: tuple = (0.66, 0.95)                     # brightness of a light ground
    contrast: tuple = (0.34, 0.5)                         # brightness between the figure and the ground
    ground_saturation: tuple = (0.15, 0.75)
    figure_saturation: tuple = (0.6, 1.0)
    gradient: float = 0.5                                 # a ground that runs from one colour to another
    stripes: float = 0.35                                 # a figure with stripes in a second colour
    shaded: float = 0.7                                   # a figure lit from above
    shadow: tuple = (0.0, 0.5)                            # how dark the figure's shadow is


FULL = Variety()
# For a transformer that trains for minutes: what its tokens tell must be mostly the shape.
PLAIN = Variety(hues=6, scale=(0.70, 0.88), turn=0.04, dark_ground=0.0, ground_luma=(0.90, 0.93),
                contrast=(0.45, 0.50), ground_saturation=(0.25, 0.25), figure_saturation=(0.9, 1.0),
                gradient=0.2, stripes=0.0, shaded=0.4, shadow=(0.0, 0.0))
MOVING = dataclasses.replace(PLAIN, scale=(0.32, 0.44), turn=0.5, contrast=(0.40, 0.50))


def scene(rng, variety, name):
    """Everything about an image of the shape `name` that is left to chance: a dict of numbers.

    A colour is (hue in turns, saturation, brightness), all else in 0..1 or in half widths of the image.
    """
    def between(low, high):
        return low + (high - low) * rng.random()

    s = {"place_x": between(-1, 1), "place_y": between(-1, 1), "scale": between(*variety.scale)}
    turn = min(variety.turn, LARGEST_TURN.get(name, 0.5))
    s["turn"] = between(-turn, turn)                                     # in full turns
    # Colours: figure and ground differ by `contrast` in brightness, whatever their hues.
    sign = -1                                                            # from the ground's to the figure's
    ground_luma = between(*variety.ground_luma)
    if rng.random() < variety.dark_ground:
        sign = 1
        ground_luma = between(0.10, 0.30)
    figure_luma = ground_luma + sign * between(*variety.contrast)
    ground_hue = rng.random()
    figure_hue = ground_hue + between(0.2, 0.8)
    if variety.hues:
        ground_hue = (math.floor(ground_hue * variety.hues) + 0.5) / variety.hues
        figure_hue = (math.floor(figure_hue * variety.hues) + 0.5) / variety.hues
    s["ground"] = ground_hue, between(*variety.ground_saturation), ground_luma
    s["other_ground"] = (ground_hue + between(-0.1, 0.1), between(*variety.ground_saturation),
                         ground_luma - sign * between(-0.10, 0.22))
    s["figure"] = figure_hue, between(*variety.figure_saturation), figure_luma
    s["other_figure"] = (figure_hue + between(-0.12, 0.12), between(0.5, 1.0),
                         figure_luma + sign * between(0.12, 0.30))
    s["gradient"] = rng.random() < variety.gradient
    s["toward"] = rng.random()                                           # where the gradient goes, in turns
    s["stripes"] = rng.random() < variety.stripes
    s["phase"] = rng.random()
    s["light"] = between(0.12, 0.25) * (rng.random() < variety.shaded)
    s["shadow"] = between(*variety.shadow)
    return s


def colour(hue, saturation, luma):
    """RGB (B, 3, 1, 1) of hues (in turns), mixed with black or white to the brightness `luma`, (B,)."""
    sector = (np.array([5, 3, 1], np.float32) + 6 * hue[:, None]) % 6
    rgb = 1 - saturation[:, None] * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    own = (rgb @ np.array([0.299, 0.587, 0.114], np.float32))[:, None]
    luma = np.clip(luma[:, None], 0.03, 0.97)
    rgb = np.where(luma < own, rgb * (luma / own), 1 + (rgb - 1) * ((1 - luma) / np.maximum(1 - own, 1e-3)))
    return rgb[:, :, None, None]


def paint(scenes, names, size):
    """uint8 (B, 3, S, S) of `scenes`, with the shapes `names`. Lengths are in half widths of the image."""
    def column(key):                                      # (B, 1, 1)
        return np.array([s[key] for s in scenes], np.float32)[:, None, None]

    def rgb(key):                                         # (B, 3, 1, 1)
        return colour(*np.array([s[key] for s in scenes], np.float32).T)

    def inside(distance):                                 # 1 inside, 0 outside, anti-aliased over one pixel
        return np.clip(0.5 - distance * (size / 2), 0, 1)

    # Where the figure is: inside the image. u, v: the same points in the figure's own plane.
    at = (2 * np.arange(size, dtype=np.float32) + 1) / size - 1
    x = at[None, None, :]                                 # (1, 1, S): pixel centres
    y = -at[None, :, None]                                # (1, S, 1)
    scale = column("scale")
    u = (x - column("place_x") * (1 - scale)) / scale     # (B, 1, S), not turned yet
    v = (y - column("place_y") * (1 - scale)) / scale     # (B, S, 1)
    angle = 2 * np.pi * column("turn")
    cos = np.cos(angle)
    sin = np.sin(angle)

    def distance_to_figure(u, v):                         # (B, S, S), in half widths of the image
        u, v = u * cos + v * sin, v * cos - u * sin
        distance = np.empty(u.shape, np.float32)
        for name in set(names):
            chosen = np.array([other == name for other in names])
            distance[chosen] = SHAPES[name](u[chosen], v[chosen])
        return distance * scale

    # The ground: one colour, or a gradient of two; on it the figure's soft shadow.
    toward = 2 * np.pi * column("toward")
    mix = column("gradient") * np.clip(0.5 + 0.5 * (x * np.cos(toward) + y * np.sin(toward)), 0, 1)
    canvas = rgb("ground") + (rgb("other_ground") - rgb("ground")) * mix[:, None]               # (B, 3, S, S)
    if column("shadow").any():
        near = np.clip(0.5 - distance_to_figure(u - 0.1, v + 0.16) / 0.35, 0, 1)
        canvas = canvas * (1 - column("shadow") * column("shown") * near)[:, None]

    # The figure: one colour, or stripes of two; lit from above; laid on top.
    figure = rgb("figure")
    if column("stripes").any():
        wave = np.abs(2 * ((1.5 * (u + v) + column("phase")) % 1) - 1) - 0.5
        mix = column("stripes") * inside(wave * scale / 3)
        figure = figure + (rgb("other_figure") - figure) * mix[:, None]
    figure = figure + (column("light") * (0.6 * v - 0.4 * u))[:, None]
    covered = column("shown") * inside(distance_to_figure(u, v))
    canvas = canvas + (figure - canvas) * covered[:, None]
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def paint_in_blocks(scenes, names, size):
    """`paint`, so few at a time that their arrays stay in the cache."""
    block = max(1, 2 ** 15 // size ** 2)
    return np.concatenate([paint(scenes[i:i + block], names[i:i + block], size)
                           for i in range(0, len(scenes), block)])


def draw_images(indices, split, size, seed=0, plain=False):
    """uint8 (B, 3, S, S) of the images `indices` (B,), S = `size`; image i shows shape i % 10 of `SHAPES`."""
    names = [list(SHAPES)[i % len(SHAPES)] for i in indices]
    scenes = []
    for i, name in zip(indices, names):
        rng = np.random.default_rng((seed, SPLITS.index(split), i))
        scenes.append({**scene(rng, PLAIN if plain else FULL, name), "shown": 1.0})
    return paint_in_blocks(scenes, names, size)


# ---- 3. Motions --------------------------------------------------------------------------------------------

# Where the figure is after the fraction p of the clip: (x, y, size, turns, shown), with chance in a and b. x
# and y are in -1..1 of the room that there is.
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
    scenes = []
    names = []
    for i in indices:
        rng = np.random.default_rng((seed, SPLITS.index(split), i))
        name = MOVING_SHAPES[rng.integers(len(MOVING_SHAPES))]
        a = rng.uniform(-0.7, 0.7)
        b = rng.uniform(0.7, 1.0)
        still = scene(rng, MOVING, name)
        for frame in range(frames):
            motion = list(MOTIONS.values())[i % len(MOTIONS)]
            x, y, zoom, turns, shown = motion(frame / max(1, frames - 1), a, b)
            turns = turns * min(0.75, 0.05 * (frames - 1))
            scenes.append({**still, "place_x": x, "place_y": y, "scale": still["scale"] * zoom,
                           "turn": still["turn"] + turns, "shown": float(shown)})
            names.append(name)
    images = paint_in_blocks(scenes, names, size)
    return images.reshape(-1, frames, 3, size, size).swapaxes(1, 2)
