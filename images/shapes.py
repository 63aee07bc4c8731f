"""Shapes: a small world to learn from, drawn from a seed alone; no files, no download.

    (seed, index) --> scene: what, where, how large, turned, lit, on which ground
                        |
                        +--> render --> image (3, S, S) uint8, mask (S, S), depth (S, S), label

Idea     There are ten kinds of things. A kind is a silhouette *and* a texture; its colours only
         lean towards a palette. Pose, size, light, ground and colour change from image to
         image. So pixels and colour histograms say little of the kind, and a network has to
         find out what stays the same.
Paper    none: the world is ours. The tests hold it to that: simple statistics must fail on it
Try      python -m images.shapes  a page of the world in shapes.png, pictures in drawings/
Change   a silhouette is one line in SILHOUETTES, a texture one in TEXTURES, a kind one in KINDS
Tests    pytest tests/images/test_shapes.py

Letters  S side of the image in pixels; u v coordinates of the thing itself: its centre is at 0,
         its edge at about 1.
"""

import colorsys
import math
from pathlib import Path

import numpy as np

SIZE = 64  # pixels

# ----------------------------------------------------------------------------------------------
# Silhouettes: (u, v) -> a number that is negative inside, 0 on the edge, positive outside
#
# Example: for a disc of radius 0.85 it is the distance from the centre, less 0.85. The smaller
# of two such numbers (np.minimum) is negative inside either silhouette, which joins them; the
# larger (np.maximum) is negative inside both, which leaves what they share.


def polar(u, v):
    """Distance from the centre, and angle in radians."""
    return np.hypot(u, v), np.arctan2(v, u)


def polygon(u, v, sides):
    """Distance to a regular polygon with corners at 1: the distance to the nearest edge's line.

    Example: the edges of a hexagon are cos(pi / 6) = 0.87 away from the centre. So the number
    is -0.87 at the centre and 0 on the whole border.
    """
    r, a = polar(u, v)
    step = 2 * math.pi / sides
    # a % step - step / 2 is the angle from the middle of the edge that a point looks at.
    return r * np.cos((a % step) - step / 2) - math.cos(step / 2)


def petals(u, v, count, depth):
    """A disc whose radius swings `count` times around, from 1 - depth to 1: stars, flowers."""
    r, a = polar(u, v)
    return r - 1 + depth * (0.5 + 0.5 * np.cos(count * a))


def heart(u, v):
    """A disc that is pushed up on both sides, and stays where it is in the middle."""
    x = 1.15 * np.abs(u)
    y = 0.1 - 1.2 * v
    return np.hypot(x, y + 0.15 - 0.75 * np.sqrt(x + 1e-6)) - 0.9


def cross(u, v):
    """Two bars: near one of the axes, and not beyond the ends of the bars."""
    near = np.minimum(np.abs(u), np.abs(v)) - 0.27
    far = np.maximum(np.abs(u), np.abs(v)) - 0.95
    return np.maximum(near, far)


SILHOUETTES = {
    "disc": lambda u, v: np.hypot(u, v) - 0.85,  # the distance from the centre
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) -
    0.75,  # the larger of two distances
    "triangle": lambda u, v: polygon(u, v, 3) * 0.9,  # flatter: softer edges
    "hexagon": lambda u, v: polygon(u, v, 6),
    "star": lambda u, v: petals(u, v, 5, 0.6),  # radius from 0.4 to 1
    "flower": lambda u, v: petals(u, v, 8, 0.3),
    "cross": cross,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.68) - 0.27,  # radii from 0.41 to 0.95
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v)),
    "heart": heart}

# ----------------------------------------------------------------------------------------------
# Textures: (u, v, f, p, q) -> from 0 (dark) to 1 (light), f periods per unit, shifted by p and
# q periods


def wave(x):
    """0 to 1, soft-edged, one period per unit."""
    return 0.5 + 0.5 * np.tanh(3 * np.sin(2 * math.pi * x))


def turned(u, v, turn):
    """The coordinate along a direction, which is given in whole turns from that of u."""
    return math.cos(2 * math.pi * turn) * u + math.sin(2 * math.pi * turn) * v


def dots(u, v, f, p, q):
    """Round spots where two waves are both high."""
    across = np.cos(2 * math.pi * (f * u + p))
    down = np.cos(2 * math.pi * (f * v + q))
    return 0.5 + 0.5 * np.tanh(5 * (across + down - 0.7))


def checks(u, v, f, p, q):
    """A chessboard: the product of two waves is positive where their signs are the same."""
    across = np.sin(math.pi * (f * u + p))
    down = np.sin(math.pi * (f * v + q))
    return 0.5 + 0.5 * np.tanh(6 * across * down)


TEXTURES = {
    "bands": lambda u, v, f, p, q: wave(f * v + p),  # lying stripes
    "bars": lambda u, v, f, p, q: wave(f * u + p),  # upright stripes
    "dots": dots,
    "checks": checks,
    "fade": lambda u, v, f, p, q: wave(0.3 * turned(u, v, p))}  # p turns it

# (silhouette, texture, hue it leans to, in turns). Every texture serves two kinds.
KINDS = [("disc", "bands", 0.00), ("star", "bands", 0.50), ("square", "dots", 0.10),
         ("crescent", "dots", 0.60), ("triangle", "checks", 0.20), ("ring", "checks", 0.70),
         ("cross", "bars", 0.30), ("heart", "bars", 0.80), ("hexagon", "fade", 0.40),
         ("flower", "fade", 0.90)]
NAMES = [f"{texture} {silhouette}" for silhouette, texture, _ in KINDS]
PALETTE_SPREAD = 0.12  # turns; at 0.5 the palette says nothing
TILT = 0.35  # radians to either side
HILLS = 1.1  # how much the ground varies

# ----------------------------------------------------------------------------------------------
# Scenes


def draw_scene(*seed: int, kind: int) -> dict:
    """Everything about one picture but its pixels: a function of the seed and of its kind.

    The seed is any few numbers, as (seed of the world, split, index).
    """
    rng = np.random.default_rng(seed)

    def uniform(low, high):
        return float(rng.uniform(low, high))

    # A dark and a light colour of the thing. Both hues lie near that of the kind; saturation
    # and brightness are free. So the colour hints at the kind and does not settle it.
    hue = KINDS[kind][2] + uniform(-PALETTE_SPREAD, PALETTE_SPREAD)
    dark = colorsys.hsv_to_rgb(hue % 1, uniform(0.5, 1.0), uniform(0.15, 0.45))
    light = colorsys.hsv_to_rgb((hue + uniform(-0.12, 0.12)) % 1, uniform(0.15, 0.7),
                                uniform(0.7, 1.0))

    # Two greys of the ground, with a tint of any hue.
    ground = [
        colorsys.hsv_to_rgb(uniform(0, 1), uniform(0.0, 0.15), value + uniform(-0.1, 0.1))
        for value in (0.25, 0.75)]

    # The order of the draws is part of what a seed means: a new line goes to the end, or every
    # image of the world changes.
    return {
        "kind": kind,
        "center": (uniform(0.15, 0.85), uniform(0.15, 0.85)),  # x, y as shares of the image
        "radius": uniform(0.22, 0.42),
        "angle": uniform(-TILT, TILT),
        "squash": uniform(0.85, 1.18),  # seen a little from the side
        "frequency": uniform(1.9, 2.2),
        "phase": (uniform(0, 1), uniform(0, 1)),  # where the texture starts, in periods
        "colors": np.array([dark, light]),
        "ground": np.array(ground),
        "waves": rng.normal(0, 1.3, size=(6, 2)),  # of the ground, in periods across the image
        "wave_phases": rng.uniform(0, 2 * math.pi, size=6),
        "light": uniform(0, 2 * math.pi),  # the direction that it comes from, in radians
        "exposure": uniform(0.8, 1.15),
        "distance": uniform(1.5, 2.5),  # metres to the thing's edge
        "noise": int(rng.integers(2**31))}  # the seed of the camera's noise


def render(scene: dict, size: int = SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scene -> image (3, S, S) uint8, mask of the thing (S, S), depth (S, S) in metres.

    All arrays are functions of the pixels' coordinates, so a scene can be drawn at any size.
    """
    # The centre of each pixel, as a share of the image: 0.5 / S, 1.5 / S, ...
    y, x = np.mgrid[0:size, 0:size] / size + 0.5 / size

    # In the thing's own coordinates: moved to its centre, turned back by its angle, divided by
    # its radius. Squash makes one axis shorter and the other longer, so that the area stays.
    dx = x - scene["center"][0]
    dy = y - scene["center"][1]
    cos = math.cos(scene["angle"])
    sin = math.sin(scene["angle"])
    squash = scene["squash"]
    radius = scene["radius"]
    u = (cos * dx + sin * dy) / radius * squash
    v = (cos * dy - sin * dx) / radius / squash

    # How much of each pixel the thing covers, from 0 to 1. edge * radius * size is the distance
    # to the edge in pixels. A pixel whose centre lies on the edge is half covered; one whose
    # centre lies half a pixel inside is wholly covered. So the border is soft, without steps.
    silhouette, texture, _ = KINDS[scene["kind"]]
    edge = SILHOUETTES[silhouette](u, v)
    cover = np.clip(0.5 - edge * radius * size, 0, 1)[..., None]

    # The thing: the texture mixes its two colours. It is a dome that is lit from one side, so
    # it is brighter towards the light and in the middle.
    pattern = TEXTURES[texture](u, v, scene["frequency"], *scene["phase"])[..., None]
    dark, light = scene["colors"]
    towards = (math.cos(scene["light"]), math.sin(scene["light"]))
    dome = np.clip(1 - u**2 - v**2, 0, 1)
    shade = 0.8 + 0.3 * (dx * towards[0] + dy * towards[1]) / radius + 0.2 * dome
    thing = (dark + (light - dark) * pattern) * shade[..., None]

    # The ground: hills of dark and light, the mean of six waves of any direction. They differ
    # from place to place, so two crops of an image cannot be matched by the ground they show.
    hills = (sum(
        np.sin(2 * math.pi * (across * x + down * y) + phase)
        for (across, down), phase in zip(scene["waves"], scene["wave_phases"])) / 6)
    first, second = scene["ground"]
    ground = first + (second - first) * np.clip(0.5 + HILLS * hills, 0, 1)[..., None]

    # A soft shadow on it: the silhouette once more, moved away from the light by a twentieth of
    # the image, and blurred by the logistic function. The clip keeps exp from overflowing.
    sx = dx + 0.05 * towards[0]
    sy = dy + 0.05 * towards[1]
    shadow_u = (cos * sx + sin * sy) / radius * squash
    shadow_v = (cos * sy - sin * sx) / radius / squash
    outside = np.clip(12 * SILHOUETTES[silhouette](shadow_u, shadow_v), -30, 30)
    shadow = 1 / (1 + np.exp(outside))
    ground = ground * (1 - 0.45 * shadow[..., None])

    # The thing before its ground, as a camera takes it: too dark or too bright, and with noise.
    image = (ground + (thing - ground) * cover) * scene["exposure"]
    image = image + np.random.default_rng(scene["noise"]).normal(0, 0.02, image.shape)

    # The ground is a wall about 3 metres away, the thing stands before it and bulges forward.
    wall = 3.0 + 0.4 * hills + 0.5 * y
    depth = np.where(cover[..., 0] > 0.5, scene["distance"] - 0.4 * dome, wall)
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(2, 0, 1)
    return pixels, cover[..., 0] > 0.5, depth.astype(np.float32)


def video(seed: int, frames: int = 24, size: int = SIZE):
    """One thing drifting, turning and coming nearer: lists of images, masks, depths."""
    # 0 is train and 1 is val (see Shapes), so with 2 a video shows no scene of either.
    scene = draw_scene(seed, 2, kind=seed % len(KINDS))
    rendered = []
    for t in np.linspace(-1, 1, frames):
        x, y = scene["center"]
        moved = dict(scene, center=(x + 0.18 * t, y + 0.08 * math.sin(3 * t)),
                     angle=scene["angle"] + 0.8 * t, radius=scene["radius"] * (1 + 0.2 * t))
        rendered.append(render(moved, size))

    # From a triple for each frame to a list for each of image, mask and depth.
    return tuple(map(list, zip(*rendered)))


class Shapes:
    """A split of the world: item i is kind i % 10. Images are drawn when asked for."""

    def __init__(self, split: str = "train", length: int | None = None, seed: int = 0,
                 size: int = SIZE):
        # The number of the split is part of each scene's seed: no image is in both.
        self.part = {"train": 0, "val": 1}[split]
        self.length = length or {"train": 5000, "val": 1000}[split]
        self.seed = seed
        self.size = size

        # In turn, so that all kinds are equally frequent.
        self.labels = [i % len(KINDS) for i in range(self.length)]
        self.classes = NAMES

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> dict:
        return draw_scene(self.seed, self.part, index, kind=self.labels[index])

    def __getitem__(self, index: int):
        """(image, mask, depth), as render gives them."""
        return render(self.scene(index), self.size)


if __name__ == "__main__":
    import matplotlib.pyplot as plt

    world = Shapes("train", size=128)
    fig, axes = plt.subplots(6, 10, figsize=(13, 8.2))
    for i, axis in enumerate(axes[:4].flat):
        axis.imshow(world[i][0].transpose(1, 2, 0))
    for i, name in enumerate(NAMES):
        _, mask, depth = world[i]
        axes[0, i].set_title(name, fontsize=9)
        axes[4, i].imshow(mask, cmap="gray")
        axes[5, i].imshow(depth, cmap="magma_r", vmin=1, vmax=4)
    for axis in axes.flat:
        axis.axis("off")
    fig.savefig("shapes.png", dpi=110, bbox_inches="tight")
    print("wrote shapes.png: four rows of images, their masks and depths (of the first row)")

    # Files for the figures of visualize.py: a picture of each kind, and the frames of a video. No
    # run is trained on them: the pictures are scenes of the validation split, drawn larger.
    pictures = {}
    for i, (silhouette, _, _) in enumerate(KINDS):
        pictures[f"drawings/{silhouette}.png"] = Shapes("val", size=480)[i][0]
    for i, frame in enumerate(video(1, 12, 240)[0]):
        pictures[f"drawn_video/{i:02d}.png"] = frame
    for name, pixels in pictures.items():
        Path(name).parent.mkdir(exist_ok=True)
        plt.imsave(name, pixels.transpose(1, 2, 0))
    print(f"wrote {len(KINDS)} pictures into drawings/, and a video into drawn_video/")
