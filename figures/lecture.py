"""Lecture: the method in nine slides, each of them computed by the code that it explains.

    vit, heads, losses, augment, training.optim --> a function for each slide --> NAME.png

Idea     A drawing by hand can be wrong, and stays as it is when the code changes. Here the
         numbers of a slide are asked of the code: which pairs of views count, which tokens reach
         which in a packed sequence, what happens to a small network without centering.
Paper    DINO fig. 2, fig. 7 and eq. 3; iBOT sec. 3.1; DINOv2 sec. 5
Try      python visualize.py lecture pairs masks
Change   another slide is a function that returns a figure, and one line in SLIDES
Tests    pytest tests/figures/test_lecture.py

Letters  G global views, V all views, B images, K prototypes, T tokens of a packed sequence.
"""

import copy
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import MASK_SHAPES
from figures.inputs import enlarge
from figures.views import BOX_COLOURS, LOCAL_COLOUR, views_of
from heads import DINOHead
from images.shapes import draw_scene, render
from losses import CENTERING, entropies, make_targets, view_pair_loss
from machinery.flags import UsageError, did_you_mean
from machinery.page import COLOURS, SLIDE, picture, save, show, slide
from training.config import Config as TrainingConfig
from training.optim import cosine, ema_update, linear
from training.recipes import PRESETS
from vit import ARCHS, VisionTransformer

BLUE, ORANGE, GREEN, PURPLE, _ = COLOURS
GREY = "0.45"  # what is written beside a thing
SMALL = 15  # points: the smallest letters on a slide

# The recipe that the slides tell of, where they tell of one.
PRESET = "dino_vits16_300ep"


def settings_of(preset: str = PRESET, **changes) -> TrainingConfig:
    """The settings of a recipe, with some of them changed."""
    return TrainingConfig(**PRESETS[preset] | changes)


@functools.cache
def drawing(kind: int = 1, size: int = 320) -> Tensor:
    """A picture of the drawn world that no run is trained on: (3, S, S) uint8."""
    # Training and validation have the numbers 0 and 1, videos have 2, this has 4. The picture is
    # drawn four times as large and averaged, so that its grain does not show.
    large, _, _ = render(draw_scene(0, 4, kind, kind=kind), 4 * size)
    return F.avg_pool2d(torch.from_numpy(large).float(), 4).round().byte()


def draw_box(axis, left, bottom, width, height, colour, text="", **style):
    """A filled rectangle on a canvas, with text in its middle."""
    # Imported here, as all of matplotlib is: most programs draw nothing.
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, zorder=2))
    axis.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", zorder=3,
              **style)


def below(axis, x, y, text):
    """What is said of a thing, in grey below it."""
    axis.text(x, y, text, ha="center", va="top", color=GREY, fontsize=SMALL)


# ----------------------------------------------------------------------------------------------
# The network
#
# The first slide has no formula in it: it shows what goes in, what comes out, and how large the
# parts are. The slide on packing belongs to DINOv2, and to the question why a step is fast.


def architecture():
    """From an image to a distribution over prototypes, with the sizes of ViT-S/16."""
    # On the "meta" device a network has shapes and no numbers, so it is built at once. All sizes
    # on the slide are asked of it.
    settings = settings_of()
    with torch.device("meta"):
        model = VisionTransformer(settings.global_crops_size, settings.patch_size,
                                  **ARCHS[settings.arch])
        head = DINOHead(model.embed_dim, settings.n_prototypes, settings.head_hidden_dim,
                        settings.head_bottleneck_dim, settings.head_nlayers)

    # Everything stands on one canvas of 120 x 60 units, from the left to the right.
    figure = slide("From an image to an answer: ViT-S/16 and its head")
    axis = figure.add_axes((0.01, 0.0, 0.98, 0.9), xlim=(0, 120), ylim=(0, 60))
    axis.axis("off")
    draw_image(axis, settings.global_crops_size, settings.patch_size)
    draw_tokens(axis, 33)
    draw_box(axis, 44, 14, 16, 34, "0.92", f"{model.depth}\nblocks of\nattention\nand MLP")
    draw_tokens(axis, 67)
    for start, end in ((26, 32), (38, 43), (61, 66)):
        arrow(axis, start, end, 32)

    # What is said below and beside these parts.
    patches = model.pos_embed.shape[1] - 1
    below(axis, 33, 8.5, f"1 + {patches} tokens\nof {model.embed_dim} numbers")
    below(axis, 54, 8.5, f"{millions(model)} million\nweights")
    axis.text(37, 49.5, "class token", color=ORANGE, ha="right")
    axis.text(72.5, 30, "patch\ntokens", color=BLUE, va="center")
    axis.text(
        72.5, 19.5,
        "In iBOT and DINOv2 they have a head, too.\nAfter training they tell what is "
        "where: maps\nof attention and PCA, segmentation, depth.", color=GREY, va="center",
        fontsize=SMALL)

    # The class token goes on through the head, which compares it with K prototypes.
    arrow(axis, 72, 78, 46)
    draw_box(axis, 79, 39, 16, 14, "0.92", "head: MLP,\nlength 1,\nprototypes")
    below(axis, 87, 36.5, f"{millions(head)} million\nweights")
    arrow(axis, 96, 100, 46)
    draw_answer(axis, settings.warmup_teacher_temp)
    below(axis, 110, 36.5, f"an answer: shares of\n{settings.n_prototypes:,d} prototypes")
    return figure


def millions(network: nn.Module) -> str:
    """The number of weights, such as 21.7."""
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}"


def arrow(axis, start, end, height):
    """From the left to the right on a canvas."""
    style = dict(arrowstyle="-|>", color="black", lw=2)
    axis.annotate("", (end, height), (start, height), arrowprops=style)


def draw_image(axis, size: int, patch: int):
    """A picture at the left of the canvas, cut into patches by white lines."""
    axis.imshow(picture(drawing()).numpy(), extent=(0, 25, 20, 45), zorder=1)
    side = size // patch
    for i in range(side + 1):
        place = 25 * i / side
        axis.plot([place, place], [20, 45], color="white", linewidth=1.2, zorder=2)
        axis.plot([0, 25], [20 + place, 20 + place], color="white", linewidth=1.2, zorder=2)
    below(axis, 12.5, 18,
          f"{size} x {size} pixels:\n{side} x {side} patches\nof {patch} x {patch}")


def draw_tokens(axis, left: float):
    """A column of tokens: that of the class at the top, a few of the patches below it."""
    draw_box(axis, left, 44, 4, 3.4, ORANGE)
    for i in range(6):
        draw_box(axis, left, 38.3 - 4.2 * i, 4, 3.4, BLUE)
    axis.text(left + 2, 10.8, "...", ha="center", color=BLUE, fontweight="bold")


def draw_answer(axis, temp: float):
    """Bars at the right of the canvas: a target of random logits, as sharp as a teacher's."""
    logits = 0.06 * torch.randn(1, 14, generator=torch.Generator().manual_seed(3))
    answer = make_targets(logits, temp, torch.zeros(14))[0]
    for i, share in enumerate((answer / answer.max()).tolist()):
        draw_box(axis, 101.5 + 1.25 * i, 40, 0.9, 0.2 + 12 * share, GREEN)


def reach(groups: tuple[tuple[int, int], ...]) -> Tensor:
    """Which packed tokens change when one of them does: (T, T) bool, column j if j is changed.

    groups: (crops, tokens of a crop) for each crop size, as run_blocks gets them.
    """
    # It is measured: each token is replaced in turn, and the outputs of a small random network
    # are compared. In float64 rounding is far below what an attention weight changes.
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1).double().eval()
    tokens = torch.randn(sum(b * n for b, n in groups), 64, dtype=torch.float64)
    changed = []
    with torch.no_grad():
        before = model.run_blocks(tokens, groups, None)
        for j in range(len(tokens)):
            moved = tokens.clone()
            moved[j] = torch.randn(64, dtype=torch.float64)
            after = model.run_blocks(moved, groups, None)
            changed.append((after - before).abs().amax(1) > 1e-12)
    return torch.stack(changed, 1)


def packing():
    """Crops of two sizes in one sequence, and which tokens attend to which."""
    # How many tokens each crop of an image has, the global ones first.
    settings = settings_of()
    crops = []
    for side, count in ((settings.global_crops_size, settings.global_crops_number),
                        (settings.local_crops_size, settings.local_crops_number)):
        crops += [1 + (side // settings.patch_size)**2] * count
    longest = max(crops)
    colours = [BLUE if count == longest else ORANGE for count in crops]

    # Above, the crops are padded to the same length, one a line: what is grey is wasted.
    figure = slide("Packing: crops of two sizes, one sequence")
    axis = figure.add_axes((0.03, 0.48, 0.5, 0.33))
    axis.axis("off")
    lines = [-i for i in range(len(crops))]
    axis.barh(lines, longest, color="0.88", height=0.75)
    axis.barh(lines, crops, color=colours, height=0.75)
    axis.set_title(f"padded: {len(crops)} x {longest} = {len(crops) * longest:,d} tokens",
                   loc="left")

    # Below, they stand one after the other.
    axis = figure.add_axes((0.03, 0.3, 0.5, 0.08))
    axis.axis("off")
    starts = np.cumsum([0, *crops])
    axis.barh(0, crops, left=starts[:-1], color=colours, edgecolor="white", linewidth=2)
    axis.set_title(f"packed: {starts[-1]:,d} tokens, of one image", loc="left")
    share = starts[-1] / (len(crops) * longest)
    figure.text(
        0.03, 0.2, f"All layers but attention treat tokens one by one:\nthey run once, on "
        f"{share:.0%} of the rows.\nAttention runs once for each size of crop.", va="top")

    # At the right a short sequence, so that single tokens can be seen: two crops of nine tokens
    # and four of four.
    axis = figure.add_axes((0.6, 0.12, 0.38, 0.68))
    groups = ((2, 9), (4, 4))
    draw_reach(axis, reach(groups), [n for b, n in groups for _ in range(b)])
    axis.set_title("2 large crops, 4 small ones,\none block, measured", loc="left")
    return figure


def draw_reach(axis, matrix: Tensor, lengths: list[int]):
    """The matrix of `reach` in blue and white, with lines between the crops."""
    white_and_blue = np.array([[1.0, 1.0, 1.0], [0.0, 0.447, 0.698]])
    axis.imshow(white_and_blue[matrix.int().numpy()])
    axis.set(xticks=[], yticks=[], xlabel="token that is changed", ylabel="token that notices")
    for edge in np.cumsum([0, *lengths]):
        axis.axhline(edge - 0.5, color="0.7", linewidth=1)
        axis.axvline(edge - 0.5, color="0.7", linewidth=1)


# ----------------------------------------------------------------------------------------------
# What the two networks see
#
# Crops, pairs and masks are what makes the task hard: the student sees less than the teacher, and
# has to give the teacher's answer.

VIEWS_SEED = 13  # of a draw in which the global crops keep their colours


def views():
    """The crops of one picture: what the teacher sees, and what the student."""
    # The crops, colours and masks of a run, for the first image of its first step.
    settings = settings_of("ibot_vits16", local_crops_number=6, seed=VIEWS_SEED)
    image = drawing()
    seen = views_of(image, settings)
    G = settings.global_crops_number
    figure = slide("Two networks see different crops of one image")
    draw_boxes(figure, image, seen.boxes, G)

    # Above the row of the teacher, below it that of the student, whose global crops have masks:
    # what is black is hidden.
    figure.text(0.45, 0.85, "teacher: whole global crops", va="top")
    figure.text(0.45, 0.44, "student: masked global crops, and local ones", va="top")
    for i in range(G):
        masked = torch.where(seen.masks[i][..., None], 0.0, seen.crops[i])
        framed(figure, 0.45 + 0.175 * i, 0.5, 0.28, seen.crops[i], BOX_COLOURS[i])
        framed(figure, 0.45 + 0.175 * i, 0.09, 0.28, masked, BOX_COLOURS[i])

    # The local crops stand in two lines beside them.
    for i, crop in enumerate(seen.crops[G:]):
        left = 0.8 + 0.066 * (i % 3)
        bottom = 0.24 - 0.15 * (i // 3)
        framed(figure, left, bottom, 0.105, crop, LOCAL_COLOUR)
    return figure


def draw_boxes(figure, image: Tensor, boxes: list, G: int):
    """The picture at the left, with the boxes that the crops are cut from; G of them global."""
    from matplotlib.patches import Rectangle

    # A dark line below each coloured one keeps it visible on every ground.
    axis = figure.add_axes((0.01, 0.08, 0.4, 0.74))
    show(axis, picture(image))
    for i, (top, left, height, width, _) in enumerate(boxes):
        colour = BOX_COLOURS[i] if i < G else LOCAL_COLOUR
        for shade, line in (("black", 6), (colour, 4)):
            axis.add_patch(Rectangle((left, top), width, height, fill=False, ec=shade, lw=line))


def framed(figure, left: float, bottom: float, side: float, pixels: Tensor, colour: str):
    """A square picture (H, W, 3) in a coloured frame, `side` of the slide's height."""
    # A slide is 16 wide and 9 high, and matplotlib counts in shares of each.
    axis = figure.add_axes((left, bottom, side * 9 / 16, side), xticks=[], yticks=[])
    axis.imshow(pixels.numpy())
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=4)


def pair_weights(G: int, V: int, K: int = 8) -> Tensor:
    """How much the cross-entropy of each pair counts in the loss: (G, V), rows are teachers."""
    # It is measured. Only teacher view i has a target, all of it on prototype 0. Every student
    # view is certain of that prototype, which costs nothing, but for view v, which is uniform and
    # costs ln K. So the loss is ln K times the weight of this pair.
    weights = torch.zeros(G, V)
    for i in range(G):
        for v in range(V):
            targets = torch.zeros(G, 1, K)
            targets[i, :, 0] = 1
            logits = torch.zeros(V, 1, K)
            logits[:, :, 0] = 100
            logits[v, :, 0] = 0
            weights[i, v] = view_pair_loss(targets, logits) / math.log(K)
    return weights


def pairs():
    """Which views of the student have to match which views of the teacher."""
    settings = settings_of()
    G = settings.global_crops_number
    V = G + settings.local_crops_number
    weights = pair_weights(G, V)
    count = int((weights > 0).sum())

    # A square for each pair: blue, with its weight, or grey where it does not count.
    figure = slide("Every pair of different views counts the same")
    axis = figure.add_axes((0.16, 0.36, 0.82, 0.34), xlim=(-0.5, V - 0.5), ylim=(G - 0.5, -0.5))
    for i in range(G):
        for v in range(V):
            place = (v - 0.46, i - 0.46, 0.92, 0.92)
            if weights[i, v] > 0:
                text = f"1/{round(1 / float(weights[i, v]))}"
                draw_box(axis, *place, BLUE, text, color="white", fontsize=19)
            else:
                draw_box(axis, *place, "0.88", "same\nview", fontsize=SMALL)

    # The views by name: of the student above, of the teacher at the left.
    names = [f"global\n{i + 1}" for i in range(G)]
    names += [f"local\n{i + 1}" for i in range(V - G)]
    axis.xaxis.tick_top()
    axis.set_xticks(range(V), names)
    axis.set_yticks(range(G), [f"global {i + 1}" for i in range(G)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.text(0.57, 0.86, "view of the student", ha="center", va="top")
    figure.text(0.02, 0.53, "view of\nthe teacher", va="center", ha="center", rotation=90)

    # What it means.
    figure.text(
        0.16, 0.28, f"{G} x {V} - {G} = {count} pairs: the student has to tell from a local "
        "crop what\nthe teacher has seen in a global one. A view need not match itself:\nthat "
        "would say nothing about the image.", va="top")
    return figure


def masks():
    """Masks of rectangles and of single patches, at several shares."""
    settings = settings_of("ibot_vits16")
    side = settings.global_crops_size // settings.patch_size
    image = picture(drawing(7, settings.global_crops_size))
    rng = np.random.default_rng(1)

    # A row for each shape of mask, a column for each share that it hides.
    figure = slide("The student has to guess what is hidden")
    for row, (name, shape) in enumerate(MASK_SHAPES.items()):
        for column, share in enumerate((0.1, 0.25, 0.5)):
            mask = shape((side, side), int(share * side**2), settings.mask_min_patches, rng)
            hidden = enlarge(torch.from_numpy(mask), settings.patch_size)[..., None]
            axis = figure.add_axes((0.16 + 0.22 * column, 0.44 - 0.42 * row, 0.22, 0.38))
            show(axis, torch.where(hidden, 0.0, image))
            if row == 0:
                axis.set_title(f"{share:.0%}", fontsize=SLIDE["axes.titlesize"])
        figure.text(0.02, 0.63 - 0.42 * row, f"--mask_shape\n{name}", va="center")

    # What is said at the right of each row.
    low, high = settings.mask_ratio
    figure.text(
        0.83, 0.63, f"iBOT hides\n{low:.0%} to {high:.0%}\nof the patches\nin half of the\n"
        "global crops", va="center", fontsize=SMALL)
    figure.text(0.83, 0.21, "a single patch\ncan be filled in\nfrom next door,\na rectangle\n"
                "cannot", va="center", fontsize=SMALL)
    return figure


# ----------------------------------------------------------------------------------------------
# Targets, and the two collapses
#
# `python losses.py` prints the same in numbers. Here the collapses happen: a network of two layers
# is trained for 300 steps, with the losses, the head and the averages of the real training.


def targets():
    """The same logits without centering, with the running mean, with Sinkhorn-Knopp."""
    # A part of the logits differs between images, and a larger one is the same for all.
    rng = torch.Generator().manual_seed(1)
    n, K, temp = 40, 24, 0.07
    common = 0.22 * torch.randn(K, generator=rng)
    logits = 0.15 * torch.randn(n, K, generator=rng) + common

    # A column of the slide for each centering.
    figure = slide("Centering: no prototype may win every image")
    titles = {"none": "without", "ema": "running mean (DINO)", "sinkhorn": "Sinkhorn-Knopp"}
    for i, (name, title) in enumerate(titles.items()):
        # With a momentum of 0 the running mean is that of this batch, as it would be after many
        # batches like it.
        centering = CENTERING[name](K, momentum=0.0)
        centering.update(logits)
        rows = make_targets(logits, temp, centering(logits, temp))
        each, mean = entropies(rows)

        # Above the targets the share that each prototype gets of all images.
        left = 0.07 + 0.315 * i
        axis = figure.add_axes((left, 0.67, 0.28, 0.13))
        axis.bar(range(K), rows.mean(0).numpy(), color=GREEN, width=0.85)
        axis.axhline(1 / K, color="black", linestyle="--", linewidth=1.5)
        axis.set(xlim=(-0.5, K - 0.5), ylim=(0, 0.4), xticks=[], yticks=[])
        axis.set_title(title, loc="left")

        # The targets themselves, an image a row.
        axis = figure.add_axes((left, 0.2, 0.28, 0.45))
        axis.imshow(rows.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"{K} prototypes\nH {each:.2f}, mean H {mean:.2f}")
        if i == 0:
            axis.set_ylabel(f"{n} images")
    figure.text(0.005, 0.735, "use", va="center")
    figure.text(
        0.07, 0.04, f"A row is the target of an image: dark 0, bright 1. ln K is "
        f"{math.log(K):.2f}.", color=GREY, va="bottom")
    return figure


def toy_run(centering: str, teacher_temp: float, steps: int = 300) -> list[tuple]:
    """(entropy of a target, entropy of the mean target) at each step of a small training.

    DINO's method with the parts of the real one: an image is a point of 32 numbers, a crop of it
    is the point with some noise, and the backbone is one layer.
    """
    # Both networks begin equal, and the teacher gets no gradient, as in train.build.
    torch.manual_seed(3)
    B, K = 64, 64
    images = torch.randn(512, 32)
    student = nn.Sequential(nn.Linear(32, 64), nn.GELU(), DINOHead(64, K, 64, 16))
    teacher = copy.deepcopy(student).requires_grad_(False)
    centre = CENTERING[centering](K)
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3)

    curve = []
    for _ in range(steps):
        # Two global views and two more; all of them go through a network together.
        batch = images[torch.randint(len(images), (B,))]
        crops = batch + 0.3 * torch.randn(4, B, 32)  # (V, B, 32)
        logits = teacher(crops[:2].flatten(0, 1)).view(2, B, K)
        rows = make_targets(logits, teacher_temp, centre(logits, teacher_temp))
        loss = view_pair_loss(rows, student(crops.flatten(0, 1)).view(4, B, K))

        # The student's step, then the teacher's and the centre's, as in train_step.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(teacher, student, 0.99)
        centre.update(logits)
        each, mean = entropies(rows)
        curve.append((float(each), float(mean)))
    return curve


# What the slide of the collapses shows: title -> (centering, temperature of the teacher).
COLLAPSES = {
    "sharpening alone:\none prototype": ("none", 0.04),
    "centering alone:\nevery answer uniform": ("ema", 0.5), "both: healthy": ("ema", 0.04)}


def collapse():
    """Three small trainings: without centering, without sharpening, and with both."""
    # The same scale in all three panels; ln K is the most that an entropy can be.
    figure = slide("Two ways to collapse, and the balance between them")
    for i, (title, (centering, temp)) in enumerate(COLLAPSES.items()):
        curve = torch.tensor(toy_run(centering, temp))
        axis = figure.add_axes((0.075 + 0.315 * i, 0.26, 0.28, 0.45))
        ln_k = math.log(64)
        axis.axhline(ln_k, color="black", linestyle="--", linewidth=1.5)
        axis.plot(curve[:, 1], color=ORANGE, linewidth=4)
        axis.plot(curve[:, 0], color=BLUE, linewidth=3, linestyle=(0, (3, 1)))
        axis.set(ylim=(-0.15, 4.6), xlabel="step", yticks=range(5))
        axis.set_title(title, loc="left")

        # The first panel has room for the names of the curves.
        if i == 0:
            axis.set_ylabel("nats")
            axis.text(len(curve), ln_k - 0.1, "ln K", ha="right", va="top")
            axis.text(90, 2.3, "mean H", color=ORANGE, fontweight="bold")
            axis.text(90, 1.6, "H", color=BLUE, fontweight="bold")
    figure.text(
        0.075, 0.13, "H: how open a target is.   mean H: how open the mean of all targets is.\n"
        "Healthy: H low, because images are told apart, and mean H near ln K.", va="top")
    return figure


# ----------------------------------------------------------------------------------------------
# Averages and schedules
#
# These need no network: the functions of training/optim.py are asked for their values.


def averaged(path: Tensor, momentum: float) -> Tensor:
    """The teacher's weight while the student's one goes along a path (n,): (n,)."""
    # A network of a single weight, so that ema_update can be watched.
    student = nn.Linear(1, 1, bias=False)
    teacher = copy.deepcopy(student)
    places = []
    with torch.no_grad():
        teacher.weight.fill_(path[0])
        for value in path:
            student.weight.fill_(value)
            ema_update(teacher, student, momentum)
            places.append(float(teacher.weight))
    return torch.tensor(places)


def teacher():
    """One weight of a noisy student, and its averages in teachers of two momenta."""
    # A weight of a student goes up, as training does, and is shaken by every batch.
    steps = 600
    rng = torch.Generator().manual_seed(0)
    path = torch.linspace(0, 1, steps).sqrt() + 0.2 * torch.randn(steps, generator=rng)
    path[0] = 0

    # The larger the momentum, the smoother the average, and the further behind.
    figure = slide("The teacher is an average of past students")
    axis = figure.add_axes((0.075, 0.15, 0.52, 0.58))
    axis.plot(path, color="0.75", linewidth=1, label="student")
    for momentum, colour in ((0.9, ORANGE), (0.98, BLUE), (0.996, GREEN)):
        axis.plot(averaged(path, momentum), color=colour, linewidth=4,
                  label=f"m = {momentum}: {1 / (1 - momentum):.0f} steps")
    axis.set(xlabel="step", ylabel="one weight", xlim=(0, steps))
    axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, frameon=False,
                columnspacing=1, handlelength=1.2)

    # The schedule of the momentum, as the number of steps that it averages over.
    settings = settings_of()
    share = torch.linspace(0, 0.98, 200)
    momenta = [
        cosine(int(10000 * x), settings.momentum_teacher, settings.final_momentum_teacher,
               10000) for x in share.tolist()]
    axis = figure.add_axes((0.71, 0.15, 0.27, 0.58))
    axis.semilogy(100 * share, [1 / (1 - m) for m in momenta], color=PURPLE, linewidth=4)
    axis.yaxis.set_major_formatter("{x:,.0f}")  # 1,000, not a power of ten
    axis.set(xlabel="% of the training", ylabel="steps averaged over")
    axis.set_title(
        f"m from {settings.momentum_teacher} to {settings.final_momentum_teacher:.0f}",
        loc="left")
    return figure


def schedules():
    """Four settings that change during a run, over its epochs."""
    # Late in a run little should change: the learning rate falls, the teacher gets slower. The
    # teacher's answers are sharpest at the start, when its features say little.
    # The functions of training/optim.py, asked once an epoch instead of once a step.
    settings = settings_of()
    epochs = settings.epochs
    e = np.arange(epochs)
    curves = {
        "learning rate / peak": [
            cosine(i, 1.0, settings.min_lr / settings.lr, epochs, settings.warmup_epochs)
            for i in e], "weight decay": [
                cosine(i, settings.weight_decay, settings.weight_decay_end, epochs) for i in e],
        "teacher's momentum": [
            cosine(i, settings.momentum_teacher, settings.final_momentum_teacher, epochs)
            for i in e], "teacher's temperature": [
                linear(i, settings.warmup_teacher_temp, settings.teacher_temp,
                       settings.warmup_teacher_temp_epochs) for i in e]}

    # Four panels, two in a row.
    figure = slide("What changes during training")
    for i, ((name, values), colour) in enumerate(zip(curves.items(), COLOURS)):
        axis = figure.add_axes((0.1 + 0.5 * (i % 2), 0.55 - 0.42 * (i // 2), 0.38, 0.27))
        axis.plot(e, values, color=colour, linewidth=4)
        axis.set_title(name, loc="left")
        axis.set_xlim(0, epochs)
        if i >= 2:
            axis.set_xlabel(f"epoch of {epochs}")
    return figure


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

# In the order of a lecture. The name is that of the file, and what is typed.
SLIDES = {
    "architecture": architecture, "views": views, "pairs": pairs, "targets": targets,
    "collapse": collapse, "teacher": teacher, "masks": masks, "packing": packing,
    "schedules": schedules}

ARGUMENTS = f"all | {' | '.join(SLIDES)} ..."


@dataclass
class Config:
    # -- lecture
    output_dir: str = "slides"  # folder for the slides, NAME.png each


def draw(arguments: list[str], config: Config) -> Path:
    """Slides that explain the method, computed by the code that they explain."""
    # The slides have 128 colours: that is enough for their drawings, and keeps the files small.
    names = list(SLIDES) if arguments == ["all"] else arguments
    folder = Path(config.output_dir)
    for name in names:
        if name not in SLIDES:
            raise UsageError(f"{name}: the slides are all, {', '.join(SLIDES)}"
                             f"{did_you_mean(name, SLIDES)}")
        save(SLIDES[name](), folder / f"{name}.png", colours=128)
    return folder
