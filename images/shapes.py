"""Shapes: a small world to learn from, drawn from a seed alone; no files, no download.

    (seed, index) --> scene: what, where, how large, turned, lit, on which ground
                        |
                        +--> render --> image (3, S, S) uint8, mask (S, S), depth (S, S), label

Idea     Ten kinds of things. A kind is a silhouette *and* a texture; its colours only lean
         towards a palette. Pose, size, light, ground and colour change from image to image, so
         that pixels and colour histograms say little, and a network has to find out what stays
         the same.
Paper    none: the world is ours. The tests hold it to that: simple statistics must fail on it
Try      python -m images.shapes  draws a page of the world into shapes.png
Change   a silhouette is one line in SILHOUETTES, a texture one in TEXTURES, a kind one in KINDS
Tests    pytest tests/images/test_shapes.py

Letters  S side of the image in pixels; u v coordinates of the thing itself, its edge at about
         1.
"""

import colorsys
import math

import numpy as np

SIZE = 64

# ----------------------------------------------------------------------------------------------
# What there is. A silhouette is negative inside; a texture runs from 0 (dark) to 1 (light).


def polar(u, v):
    return np.hypot(u, v), np.arctan2(v, u)


def polygon(u, v, sides):
    """Distance to a regular polygon: the largest distance to one of its edges."""
    r, a = polar(u, v)
    step = 2 * math.pi / sides
    return r * np.cos((a % step) - step / 2) - math.cos(step / 2)


def petals(u, v, count, depth):
    """A disc whose radius swings `count` times around: stars and flowers."""
    r, a = polar(u, v)
    return r - 1 + depth * (0.5 + 0.5 * np.cos(count * a))


def heart(u, v):
    x, y = 1.15 * np.abs(u), 0.1 - 1.2 * v
    return np.hypot(x, y + 0.15 - 0.75 * np.sqrt(x + 1e-6)) - 0.9


SILHOUETTES = {
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.75,
    "triangle": lambda u, v: polygon(u, v, 3) * 0.9, "hexagon": lambda u, v: polygon(u, v, 6),
    "star": lambda u, v: petals(u, v, 5, 0.6), "flower": lambda u, v: petals(u, v, 8, 0.3),
    "cross": lambda u, v: np.maximum(
        np.minimum(np.abs(u), np.abs(v)) - 0.27,
        np.maximum(np.abs(u), np.abs(v)) - 0.95),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.68) - 0.27,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v)),
    "heart": heart}


def wave(x):
    """0 to 1, soft-edged, one period per unit."""
    return 0.5 + 0.5 * np.tanh(3 * np.sin(2 * math.pi * x))


def turned(u, v, turn):
    return math.cos(2 * math.pi * turn) * u + math.sin(2 * math.pi * turn) * v


TEXTURES = {  # of f periods per unit, shifted by p and q periods
    "bands": lambda u, v, f, p, q: wave(f * v + p),
    "bars": lambda u, v, f, p, q: wave(f * u + p), "dots": lambda u, v, f, p, q:
    (0.5 + 0.5 * np.tanh(5 * (np.cos(2 * math.pi * (f * u + p)) + np.cos(2 * math.pi *
                                                                         (f * v + q)) - 0.7))),
    "checks": lambda u, v, f, p, q:
    (0.5 + 0.5 * np.tanh(6 * np.sin(math.pi * (f * u + p)) * np.sin(math.pi * (f * v + q)))),
    "fade": lambda u, v, f, p, q: wave(0.3 * turned(u, v, p))}

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
    """Everything about one picture but its pixels: a function of the seed and of its kind."""
    rng = np.random.default_rng(seed)

    def uniform(low, high):
        return float(rng.uniform(low, high))

    hue = KINDS[kind][2] + uniform(-PALETTE_SPREAD, PALETTE_SPREAD)
    dark = colorsys.hsv_to_rgb(hue % 1, uniform(0.5, 1.0), uniform(0.15, 0.45))
    light = colorsys.hsv_to_rgb((hue + uniform(-0.12, 0.12)) % 1, uniform(0.15, 0.7),
                                uniform(0.7, 1.0))
    ground = [
        colorsys.hsv_to_rgb(uniform(0, 1), uniform(0.0, 0.15), value + uniform(-0.1, 0.1))
        for value in (0.25, 0.75)]
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
        "light": uniform(0, 2 * math.pi),
        "exposure": uniform(0.8, 1.15),
        "distance": uniform(1.5, 2.5),
        "noise": int(rng.integers(2**31))}


def render(scene: dict, size: int = SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scene -> image (3, S, S) uint8, mask of the thing (S, S), depth (S, S) in metres."""
    y, x = np.mgrid[0:size, 0:size] / size + 0.5 / size
    dx, dy = x - scene["center"][0], y - scene["center"][1]
    cos, sin = math.cos(scene["angle"]), math.sin(scene["angle"])
    squash, radius = scene["squash"], scene["radius"]
    u = (cos * dx + sin * dy) / radius * squash
    v = (cos * dy - sin * dx) / radius / squash
    silhouette, texture, _ = KINDS[scene["kind"]]
    edge = SILHOUETTES[silhouette](u, v)
    cover = np.clip(0.5 - edge * radius * size, 0, 1)[..., None]  # one pixel of soft border

    # The thing: two colours, a dome that is lit from one side.
    pattern = TEXTURES[texture](u, v, scene["frequency"], *scene["phase"])[..., None]
    dark, light = scene["colors"]
    towards = (math.cos(scene["light"]), math.sin(scene["light"]))
    dome = np.clip(1 - u**2 - v**2, 0, 1)
    shade = 0.8 + 0.3 * (dx * towards[0] + dy * towards[1]) / radius + 0.2 * dome
    thing = (dark + (light - dark) * pattern) * shade[..., None]

    # The ground: hills of light and dark, which no two crops share, and a soft shadow.
    hills = (sum(
        np.sin(2 * math.pi * (across * x + down * y) + phase)
        for (across, down), phase in zip(scene["waves"], scene["wave_phases"])) / 6)
    first, second = scene["ground"]
    ground = first + (second - first) * np.clip(0.5 + HILLS * hills, 0, 1)[..., None]
    sx, sy = dx + 0.05 * towards[0], dy + 0.05 * towards[1]
    shadow_u = (cos * sx + sin * sy) / radius * squash
    shadow_v = (cos * sy - sin * sx) / radius / squash
    shadow = 1 / (1
                  + np.exp(np.clip(12 * SILHOUETTES[silhouette](shadow_u, shadow_v), -30, 30)))
    ground = ground * (1 - 0.45 * shadow[..., None])

    image = (ground + (thing - ground) * cover) * scene["exposure"]
    image = image + np.random.default_rng(scene["noise"]).normal(0, 0.02, image.shape)
    wall = 3.0 + 0.4 * hills + 0.5 * y
    depth = np.where(cover[..., 0] > 0.5, scene["distance"] - 0.4 * dome, wall)
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(2, 0, 1)
    return pixels, cover[..., 0] > 0.5, depth.astype(np.float32)


def video(seed: int, frames: int = 24, size: int = SIZE):
    """One thing drifting, turning and coming nearer: lists of images, masks, depths."""
    scene = draw_scene(seed, 2, kind=seed % len(KINDS))
    out = []
    for t in np.linspace(-1, 1, frames):
        x, y = scene["center"]
        moved = dict(scene, center=(x + 0.18 * t, y + 0.08 * math.sin(3 * t)),
                     angle=scene["angle"] + 0.8 * t, radius=scene["radius"] * (1 + 0.2 * t))
        out.append(render(moved, size))
    return tuple(map(list, zip(*out)))


class Shapes:
    """A split of the world: item i is kind i % 10. Images are drawn when asked for."""

    def __init__(self, split: str = "train", length: int | None = None, seed: int = 0,
                 size: int = SIZE):
        self.part = {"train": 0, "val": 1}[split]
        self.length = length or {"train": 5000, "val": 1000}[split]
        self.seed, self.size = seed, size
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
    for row in axes[:4]:
        for axis in row:
            axis.imshow(world[list(axes.flat).index(axis)][0].transpose(1, 2, 0))
    for i, name in enumerate(NAMES):
        _, mask, depth = world[i]
        axes[0, i].set_title(name, fontsize=9)
        axes[4, i].imshow(mask, cmap="gray")
        axes[5, i].imshow(depth, cmap="magma_r", vmin=1, vmax=4)
    for axis in axes.flat:
        axis.axis("off")
    fig.savefig("shapes.png", dpi=110, bbox_inches="tight")
    print("wrote shapes.png: four rows of images, their masks and depths (of the first row)")
