"""Depth: how many metres away every pixel is, by a head on frozen patch tokens.

    crops, depths --> backbone, frozen --> tokens of some blocks --> head --> metres (B, 1, H, W)
                                                                       |
                 error of the logarithms, and of their slopes <--------+ at measured pixels

Idea     One picture does not say how large things are; a network that knows what it sees does.
         So depth shows whether patch tokens know of surfaces and sizes, which no label of an
         image asks for.
Paper    DINOv2 sec. 7.4 ("lin. 1", "lin. 4", "DPT"); Eigen 2014 (the loss and the figures)
Try      python evaluate.py depth --weights RUN --depth_head linear4
Change   another head: DEPTH_HEADS in backbones/depth_heads.py; another data set's settings:
         PROTOCOLS
Tests    pytest tests/evaluation/test_depth.py

Letters  B images, H W pixels, n measured pixels.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from augment import normalise
from backbones.dense_heads import at_pixels, read_dense_head
from backbones.depth_heads import DEPTH_HEADS, Depther, settings_of_released
from backbones.weights import load_strictly
from evaluation.dense import (PairsConfig, can_judge, crop_batches, hash_of_pairs, in_order,
                              open_for_patches, over_flips, page_of_rows, require_numbers,
                              shape_at, side_of_crops, source_of, with_protocol)
from evaluation.extract import gather
from evaluation.protocol import (Extractor, keep_earlier, require_other_images, results_folder)
from evaluation.unfinished import SAVE_EVERY, Unfinished
from images.pairs import DEPTHS, Pairs, read_depth
from machinery.checkpoints import live_state, save_tensors
from machinery.clock import Progress
from machinery.flags import UsageError, require
from machinery.page import picture, save
from machinery.process import Process, autocast
from training.optim import cosine

# ----------------------------------------------------------------------------------------------
# The loss


def sig_loss(predicted: Tensor, truth: Tensor, warm_up: bool = False) -> Tensor:
    """The scale-invariant error of the logarithms of depths, over the measured pixels.

    With g = log predicted - log truth: sqrt(variance of g + 0.15 * (mean of g)^2). Eigen 2014.
    A prediction that is right but for one factor has a variance of 0, and pays for the factor
    only .15 of what it would: shape matters more than scale. warm_up: the mean alone, with
    which training begins, because scale is what has to be found first.

    Example: predicted 2 and 4 where 1 and 2 are true. g = (log 2, log 2), its variance is 0,
    and the loss is sqrt(.15) * log 2 = .27.
    """
    # Logarithms turn factors into differences: 2 metres for 1 is as wrong as 8 metres for 4.
    # The small number keeps log finite where a head has answered 0 metres.
    measured = truth > 0
    g = (predicted[measured] + 1e-3).log() - (truth[measured] + 1e-3).log()  # (n,)
    # Fewer than two measured pixels have no variance. A sum over nothing is 0, and has the
    # gradient 0.
    if len(g) < 2:
        return predicted.sum() * 0
    scale_error = 0.15 * g.mean()**2
    # sqrt has an infinite slope at 0: the small number keeps the gradient finite.
    return (scale_error + (0 if warm_up else g.var()) + 1e-12).sqrt()


def gradient_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """How much the slopes of the log-depths (B, H, W) differ, at four coarsenesses.

    It asks for edges where the truth has them. The slope is the difference of pixels that are
    two apart, across and down; the maps are taken whole, and every 2nd, 4th and 6th pixel.
    DINOv2's code writes this sum, but takes it along the wrong axes, where it is 0 for batches
    of up to two images on each GPU; here it is along height and width.
    """
    # Coarse maps compare pixels that are up to 12 apart, and so ask whether a whole surface
    # leans as it should; the finest one asks for the place of an edge.
    total = 0
    for step in (1, 2, 4, 6):
        d = truth[:, ::step, ::step]
        measured = d > 0
        g = (predicted[:, ::step, ::step] + 1e-3).log() - (d + 1e-3).log()
        g = g.where(measured, 0)  # (B, H', W')

        # A slope counts where both of its pixels were measured.
        down = (g[:, 2:] - g[:, :-2]).abs() * (measured[:, 2:] & measured[:, :-2])
        across = (g[:, :, 2:] - g[:, :, :-2]).abs() * (measured[:, :, 2:] & measured[:, :, :-2])

        # Divided by the pixels of this map, so that each coarseness counts the same. Example:
        # the logarithms -.1, 0, .3, .2 of a row have the slopes .3 - -.1 = .4 and .2 - 0 = .2.
        total = total + (down.sum() + across.sum()) / measured.sum().clamp(min=1)
    return total


# ----------------------------------------------------------------------------------------------
# The figures


def errors(predicted: Tensor, truth: Tensor) -> dict[str, float] | None:
    """The figures of one image, over its measured pixels; None if it has none. Eigen 2014.

    rmse, in metres; abs_rel, the mean of |p - t| / t; log10, the mean of |log10 p - log10 t|;
    delta1, delta2, delta3: the share of pixels where the larger of p and t is less than 1.25,
    1.25^2, 1.25^3 times the smaller.
    """
    measured = truth > 0
    if not measured.any():
        return None
    p = predicted[measured].double()
    t = truth[measured].double()

    # Example: 2.4 metres for 2 metres are a ratio of 1.2, as are 2 metres for 2.4. Both are
    # within 1.25, so that delta1 counts them as right; RMSE has .4 metres for either.
    ratio = torch.maximum(p / t, t / p)
    figures = {
        "rmse": (p - t).square().mean().sqrt(), "abs_rel": ((p - t).abs() / t).mean(),
        "log10": (p.log10() - t.log10()).abs().mean()}
    for power in (1, 2, 3):
        figures[f"delta{power}"] = (ratio < 1.25**power).double().mean()
    return {name: value.item() for name, value in figures.items()}


# Which part of an image is judged, as shares of its height and width: (top, bottom, left,
# right). The borders of NYU's depths were filled in, and KITTI's laser sees no sky.
CROPS = {
    "none": (0.0, 1.0, 0.0, 1.0), "nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229)}


def only_inside(truth: Tensor, crop: str) -> Tensor:
    """The truth (H, W) with "not measured" outside of a crop of CROPS."""
    # The shares were published as pixels of frames of 480 x 640 (NYU), or as these fractions
    # (KITTI, whose frames differ by a few pixels). Example: "nyu" keeps the rows 45 to 470 and
    # the columns 41 to 600.
    height, width = truth.shape
    top, bottom, left, right = CROPS[crop]
    kept = torch.zeros_like(truth)
    box = (slice(int(top * height),
                 int(bottom * height)), slice(int(left * width), int(right * width)))
    kept[box] = truth[box]
    return kept


# ----------------------------------------------------------------------------------------------
# The protocol

# What the papers' protocols set, where no flag says otherwise.
PROTOCOLS = {
    "short": {},  # the flags as they are: short enough for a laptop, on a network of small images
    # NYU Depth v2: millimetres, rooms of up to 10 metres, photographs of 480 x 640 pixels.
    # DINOv2's heads learned from crops of 416 x 544 of them; ours are squares.
    "nyu": {
        "head_batch": 16, "steps": 38_400, "image_size": 480, "flip": True, "head_lr": 1e-4,
        "warmup": 1 / 3, "depth_scale": 1000.0, "farthest": 10.0, "judged_part": "nyu"},
    # KITTI: 256 units are a metre, streets of up to 80 metres, judged in Garg's crop. DINOv2's
    # heads learned from crops of 352 x 704, of images cut to 352 x 1216; ours are squares.
    "kitti": {
        "head_batch": 16, "steps": 38_400, "image_size": 352, "flip": True, "head_lr": 1e-4,
        "warmup": 1 / 3, "depth_scale": 256.0, "farthest": 80.0, "judged_part": "garg"},
    # SUN RGB-D, judged by a head that was trained on NYU (--head): 8,000 units are a metre.
    "sun": {"image_size": 480, "flip": True, "depth_scale": 8000.0, "farthest": 10.0}}


@dataclass
class Config(PairsConfig):
    num_workers: int = 2  # loader processes for each process
    # -- depth
    protocol: Literal[*PROTOCOLS] = "short"  # whose settings: short, or DINOv2's for a data set
    depth_head: Literal[*DEPTH_HEADS] = "linear"  # the head: linear, on 1 or 4 blocks, or DPT
    depth_scale: float = 1000.0  # units of a depth picture that are a metre; .npy is in metres
    nearest: float = 0.001  # the smallest depth that is predicted, in metres
    farthest: float = 10.0  # the largest; what was measured beyond it does not count
    judged_part: Literal[*CROPS] = "none"  # which part of an image is judged
    flip: bool = False  # judge the mirror image, too, and take the mean
    steps: int = 300  # of training the head
    head_batch: int = 8  # crops of a step, on all processes together
    head_lr: float = 1e-3  # peak of the head's learning rate
    warmup: float = 0.1  # share of the steps in which the learning rate rises to its peak
    head: str = ""  # judge this head, a file or a released NAME, and train none
    resume: bool = True  # continue a training in --output_dir that was stopped before its end
    seed: int = 0  # the seed of the head's first weights, the order of the pairs, and the crops

    def check(self):
        require(self, lambda x: x >= 1, "at least 1", "steps", "head_batch")
        require(self, lambda x: x > 0, "a positive number", "depth_scale", "nearest", "head_lr")
        require(self, lambda x: x < 1, "below 1", "warmup")
        require(self, lambda x: x > self.nearest, "more than --nearest", "farthest")


def on_report_card(config: Config, model) -> Config | None:
    """For `evaluate.py all`: None where there are no maps of pixels, or no patch tokens."""
    return config if can_judge(model, config.data, DEPTHS) else None


def run(extractor: Extractor) -> dict:
    """A head on frozen tokens tells the depth of each pixel, in metres. DINOv2 sec. 7.4."""
    config = with_protocol(extractor.config, PROTOCOLS)
    # A head is known by its kind and by the depths for which it was trained. Ours has both in its
    # file, a released one in its name.
    state, settings = read_head(config.head) if config.head else (None, {})
    config = replace(config, **{k: v for k, v in settings.items() if k not in config.given})

    process = extractor.process
    size = side_of_crops(config.image_size, extractor.model)
    read = partial(read_depth, scale=config.depth_scale)
    val = open_for_patches(extractor, DEPTHS, "val_data", read, size)

    # A head answers in the range that it was trained for. With --farthest less of the truth may
    # count, but the head's answers stay what they are.
    reach = [settings.get(name, getattr(config, name)) for name in ("nearest", "farthest")]
    depther = Depther(extractor.model, config.depth_head, *reach).to(process.device)

    # The head is read from a file, or trained here. All processes train the same head on the
    # same batches, so one of them saves it.
    if config.head:
        load_head(depther, state, config.head)
    else:
        train = open_for_patches(extractor, DEPTHS, "data", read, size)
        require_other_images(train, val, config.data, config.val_data)
        settings = {
            "data": hash_of_pairs(train), "crops": size, "steps": config.steps,
            "head_batch": config.head_batch, "head_lr": config.head_lr, "warmup": config.warmup,
            **{name: getattr(config, name)
               for name in SETTINGS}}
        unfinished = Unfinished(extractor, "depth", settings, config.resume)
        train_head(depther, train, size, config, process, unfinished)
        if process.main:
            file = results_folder(config, "depth") / "head.pt"
            settings = {name: getattr(config, name) for name in SETTINGS}
            keep_earlier(file)
            save_tensors(file,
                         {"state_dict": depther.decode_head.state_dict(), "settings": settings})
        unfinished.remove()

    # The mean of the figures over the images: each image counts the same, whatever number of
    # its pixels was measured.
    by_image, shown = judge(depther, val, size, config, process)
    rows = [row for row in by_image if row]
    if not rows:
        raise UsageError(f"--val_data {config.val_data}: no pixel of any image was measured "
                         f"below --farthest {config.farthest:g} metres")
    figures = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    trained = f"head {config.head}" if config.head else f"{config.steps} steps"
    how = f"{config.depth_head}, {trained}, crops of {size} px, {len(rows):,d} images judged"
    listed = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    process.print(f"depth: {how}, of {config.val_data}\n  {listed} (rmse in metres)")
    if process.main:
        draw_page(shown, results_folder(config, "depth") / "depth.png")
    learned_from = {"data": ""} if config.head else {}
    return learned_from | {
        "depth": figures, "protocol": how, "image_size": size, "headline": {
            "depth, delta1": figures["delta1"]}}


def judge(depther: Depther, val: Pairs, size: int, config, process: Process) -> tuple:
    """(figures of each image, None where nothing was measured; the first images to be drawn).

    An image to be drawn is (image, truth, prediction).
    """
    # Each process judges every W-th image.
    own = {}
    shown = []
    report = Progress("depth", len(val), process)
    depther.eval()
    for i in range(process.rank, len(val), process.world_size):
        image, truth = val[i]

        # What was measured beyond --farthest cannot be predicted by this head, and does not
        # count: NYU's camera sees walls at 10 metres at most, KITTI's laser is judged to 80.
        truth = truth.where(truth <= config.farthest, 0)
        predicted = metres_of(depther, image, val.channel_stats, size, config, process)
        own[i] = errors(predicted, only_inside(truth, config.judged_part))
        if len(shown) < 4:
            shown.append((image, truth, predicted))
        report(i + 1)
    return in_order(own, process), shown


def train_head(depther: Depther, train: Pairs, size: int, config, process: Process,
               unfinished: Unfinished | None = None):
    """Train the head on random crops of `size` pixels; the backbone stays as it is."""
    # The head is built anew behind the seed, so that its first weights do not depend on what
    # else has drawn random numbers before.
    torch.manual_seed(config.seed)
    fresh = Depther(depther.backbone, config.depth_head, config.nearest, config.farthest)
    depther.decode_head = fresh.decode_head.to(process.device)
    head = depther.decode_head
    optimizer = torch.optim.AdamW(head.parameters(), config.head_lr, weight_decay=0.01)

    # No random resize: a thing that is drawn larger would have to be nearer.
    batch = min(config.head_batch, len(train))
    # Pixels with a depth, in all crops.
    answers = torch.zeros((), dtype=torch.long, device=process.device)

    def state():
        return {"answers": answers, **live_state({"head": head}, optimizer, of="head")}

    start = unfinished.restore(state) if unfinished else 0
    batches = crop_batches(train, size, (1.0, 1.0), 0.0, batch, config.steps, process,
                           config.num_workers, config.seed, start)
    report = Progress("training the head", config.steps - start, process)
    for step, (images, truth) in enumerate(batches, start):
        # As in segment.py: each process runs the backbone on its share of the crops, and the
        # head learns from the whole batch on all of them.
        with torch.no_grad(), autocast(config.precision, process.device):
            maps = depther.features(images)
        gathered = []
        for patches, cls in maps:
            gathered.append((gather(patches.float(), batch,
                                    process), gather(cls.float(), batch, process)))
        truth = gather(truth, batch, process)  # (B, s, s)
        truth = truth.where(truth <= config.farthest, 0)
        answers += (truth > 0).sum()

        # The loss is taken at the size of the crop, as it will be judged.
        metres = at_pixels(head(gathered), truth.shape[-2:], depther.backbone.patch_size)[:, 0]
        # Slopes count half as much as depths, as in DINOv2's configurations. The first 100
        # steps, or the first tenth of a short training, look for the scale alone.
        warm_up = step < min(100, config.steps // 10)
        loss = sig_loss(metres, truth, warm_up) + 0.5 * gradient_loss(metres, truth)

        # A head that is suddenly metres wrong in a few pixels has a gradient that is much
        # larger than the usual one: it is clipped to a norm of 35, as in DINOv2's
        # configurations.
        warmup = int(config.warmup * config.steps)
        rate = cosine(step, config.head_lr, 0.0, config.steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 35.0)
        optimizer.step()
        report(step + 1 - start)
        done = step + 1
        if unfinished and done % SAVE_EVERY == 0 and done < config.steps:
            unfinished.save(done, state())

    if not answers:
        raise UsageError(
            f"--data {config.data}: in no crop has a pixel a depth up to --farthest "
            f"{config.farthest:g} m, so the head has learned nothing; are "
            "--depth_scale and --farthest right?")


# What a head of ours has in its file beside its tensors.
SETTINGS = ("depth_head", "nearest", "farthest")


def read_head(what: str) -> tuple[dict[str, Tensor], dict]:
    """A file, or the name of a released head -> (its tensors, what is known of SETTINGS)."""
    try:
        state, settings = read_dense_head(what)
    except Exception as error:  # torch.load raises different exceptions for different damage
        raise UsageError(f"--head {what}: no readable head ({error!r})") from None

    # The file may come from anywhere. A range that is none would give depths that are none.
    settings = settings_of_released(what) | settings
    kind, nearest, farthest = (settings.get(name) for name in SETTINGS)
    if settings and not (kind in DEPTH_HEADS and isinstance(nearest, float)
                         and isinstance(farthest, float) and 0 < nearest < farthest < math.inf):
        raise UsageError(f"--head {what}: its settings are {settings!r:.100}")
    return state, {name: settings[name] for name in SETTINGS if settings}


def load_head(depther: Depther, state: dict[str, Tensor], what: str):
    """Put the tensors of a head in place; UsageError, which names `what`, if they misfit."""
    # Strictly: a head with one tensor that is missing would answer by random weights. The usual
    # reason is a head of another kind, say of one block for --depth_head linear4.
    try:
        load_strictly(depther.decode_head, state, f"--head {what}")
    except ValueError as error:
        raise UsageError(f"{error}; is --depth_head the right one?") from None


@torch.no_grad()
def metres_of(depther: Depther, image: Tensor, stats, size: int, config,
              process: Process) -> Tensor:
    """The depth of every pixel of an image (C, H, W), in metres, (H, W) on the CPU.

    The image is judged as a whole, with a short side of `size` pixels.
    """
    # No windows here: how far a wall is away can be told from all that stands before it, and in
    # a part of an image that may be missing.
    height, width = image.shape[-2:]
    scaled = TF.resize(image, shape_at(height, width, size), antialias=True)
    scaled = normalise(scaled[None].to(process.device), stats)  # (1, C, H', W')

    def predict(images):
        with autocast(config.precision, process.device):
            return depther(images).float()

    # The answer is enlarged or shrunk to the image itself, at which the depths are given.
    metres = over_flips(predict, scaled) if config.flip else predict(scaled)
    metres = F.interpolate(metres, (height, width), mode="bilinear", align_corners=False)
    require_numbers(metres, source_of(config))
    return metres[0, 0].cpu()


def draw_page(shown: list, path: Path):
    """Images, truth, prediction, and by how much they differ: a column for each image."""
    fig, axes = page_of_rows(("image", "truth", "prediction", "difference"), len(shown))

    # One scale of colours for truth and prediction of all images, so that a colour is the same
    # distance everywhere. Errors have a scale of their own: a quarter of the farthest depth is
    # as bright as it gets.
    farthest = max(truth.max().item() for _, truth, _ in shown)
    scale = dict(cmap="viridis_r", vmin=0, vmax=farthest)
    for column, (image, truth, predicted) in zip(axes.T, shown):
        # NaN stays white: there nothing was measured.
        known = truth.where(truth > 0, math.nan)
        column[0].imshow(picture(image).numpy())
        column[1].imshow(known.numpy(), **scale)
        depth = column[2].imshow(predicted.numpy(), **scale)
        error = column[3].imshow((predicted - known).abs().numpy(), cmap="magma", vmin=0,
                                 vmax=farthest / 4)
    fig.colorbar(depth, ax=axes[1:3, -1], label="metres")
    fig.colorbar(error, ax=axes[3, -1], label="metres")
    save(fig, path)
