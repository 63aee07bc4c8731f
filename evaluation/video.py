"""Video: objects that are marked in the first frame are followed through the video.

    first frame and its mask --> features and labels of patches, a context for all other frames
                                     |
    next frame --> patch features --> the 5 most similar patches of the contexts
                                     |
                                     +--> mean of their labels --> enlarged, argmax --> mask
                                                |                                        |
                                                +--> a context for the next 7 frames    J, F

Idea     If features tell the parts of objects apart, then the patch of an earlier frame that is
         most similar to a patch shows the same part of the same object, and has its label.
         Nothing is trained and no motion is computed: only the features decide.
Paper    DINO sec. 4.2.2; Jabri 2020 (the propagation); Perazzi 2016 (J and F)
Try      python -m evaluation.video       how J and F see a disc that is in the wrong place
         python evaluate.py video --weights RUN
Change   videos from elsewhere are a function that gives a list of Video, and one line in VIDEOS
Tests    pytest tests/evaluation/test_video.py

Letters  h w patches down and across, D width, C labels (the background and each object),
         c columns near a patch, k neighbours, n masks, H W pixels of a frame.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from augment import normalise
from evaluation import protocol
from evaluation.protocol import Extractor, results_folder
from images.data import EXTENSIONS, in_channels, read_file
from images.shapes import video as draw_video
from machinery.clock import Progress
from machinery.flags import UsageError, require
from machinery.process import autocast
from vit import VisionTransformer

# ----------------------------------------------------------------------------------------------
# Propagation: from the labels of earlier frames to those of the next one


def propagate(queries: Tensor, contexts: list[tuple[Tensor, Tensor]], radius: int = 12,
              topk: int = 5, temperature: float = 0.1) -> Tensor:
    """Labels (h, w, C) of the patches of a frame, from earlier frames. DINO sec. 4.2.2.

    queries (h, w, D): features of the frame, of unit length; contexts: features (h, w, D) and
    labels (h, w, C) of each earlier frame. A patch looks at the patches that are at most
    `radius` rows and columns away from its own place, in every context. Of all these it takes
    the topk most similar ones and the mean of their labels, with weights exp(cosine /
    temperature). Example with three neighbours, and the labels background and object:

        cosines      .90       .85       .70
        labels      (0, 1)   (.2, .8)   (1, 0)
        weights      .57       .35       .08       exp(cosine / .1), divided by their sum
        mean        (.15, .85)
    """
    # The columns near each column. Beyond the border of the frame there are none: there the
    # nearest column that exists stands for them, and is left out below.
    h, w, _ = queries.shape
    reach = min(radius, w - 1)
    offset = torch.arange(-reach, reach + 1, device=queries.device)
    columns = torch.arange(w, device=queries.device)[:, None] + offset  # (w, c)
    outside = (columns < 0) | (columns >= w)  # (w, c)
    columns = columns.clamp(0, w - 1)  # (w, c)

    # All pairs of patches of two frames of 60 x 104 patches would be 39 million cosines, and
    # there are eight contexts. So the patches of one row are compared at a time, with the rows
    # near it: 104 patches with 25 x 104 of each context, of which the near columns are kept.
    rows = []
    for y in range(h):
        near = slice(max(0, y - radius), y + radius + 1)
        cosines = []
        labels = []
        for context_features, context_labels in contexts:
            keys = context_features[near].flatten(0, 1)  # (r*w, D)
            cosine = (queries[y] @ keys.T).unflatten(1, (-1, w))  # (w, r, w)
            near_columns = columns[:, None].expand(-1, cosine.shape[1], -1)  # (w, r, c)
            cosines.append(cosine.gather(2, near_columns))
            labels.append(context_labels[near])

        # The neighbours may be of one context or of several. Where fewer than topk patches are
        # near, the others have the cosine -inf and the weight 0.
        all_cosines = torch.cat(cosines, 1)  # (w, m, c)
        all_cosines = all_cosines.masked_fill(outside[:, None], -torch.inf).flatten(1)
        top = all_cosines.topk(min(topk, all_cosines.shape[1]))
        weights = (top.values / temperature).softmax(1)  # (w, k)

        # From the place in the flattened table back to row and column, to get the labels there.
        row = top.indices // len(offset)  # (w, k)
        column = columns.gather(1, top.indices % len(offset))  # (w, k)
        neighbour_labels = torch.cat(labels)[row, column]  # (w, k, C)
        rows.append((weights[:, :, None] * neighbour_labels).sum(1))
    return torch.stack(rows)


def patch_labels(mask: Tensor, grid: tuple[int, int], C: int) -> Tensor:
    """Mask (H, W) of numbers below C -> labels (h, w, C), each 0 or 1.

    A patch has the number of the pixel in its middle.
    """
    middle = F.interpolate(mask[None, None].float(), grid, mode="nearest-exact")[0, 0]  # (h, w)
    return F.one_hot(middle.long(), C).float()


def to_mask(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Soft labels (h, w, C) -> mask (H, W) uint8: the label that is strongest at each pixel."""
    maps = labels.permute(2, 0, 1)[None]  # (1, C, h, w)
    maps = F.interpolate(maps, size, mode="bilinear")[0]  # (C, H, W)

    # A small object has labels well below 1 after some frames, because the background is mixed
    # in at each step. So each map is stretched to the range from 0 to 1 before they compete.
    lowest = maps.amin((1, 2), keepdim=True)  # (C, 1, 1)
    highest = maps.amax((1, 2), keepdim=True)  # (C, 1, 1)
    stretched = (maps - lowest) / (highest - lowest).clamp(min=1e-12)  # (C, H, W)

    # The map of an object that has not appeared yet is 0 everywhere. It must not win where the
    # stretched background is 0, too.
    stretched = torch.where(highest > 0, stretched, -1.0)  # (C, H, W)
    return stretched.argmax(0).byte().cpu()


@torch.no_grad()
def follow(features: Iterable[Tensor], given: dict[int, Tensor], C: int, n_last_frames: int = 7,
           **options) -> Iterator[Tensor]:
    """Yields the mask (H, W) of each frame, uint8, numbers below C.

    features: (h, w, D) of each frame, of unit length. given: number of a frame -> mask (H, W)
    of the objects that are marked there, 0 elsewhere; not empty. options: of `propagate`.
    """
    # A frame in which an object is marked stays a context for all later frames, because its
    # labels are certain. Of the others only the last few are kept: an object that turns and
    # changes is most similar to how it looked just before, but errors add up in these labels.
    certain = []
    recent = deque(maxlen=n_last_frames)
    size = tuple(next(iter(given.values())).shape)
    nothing = torch.zeros(size, dtype=torch.uint8)
    for t, patches in enumerate(features):
        grid = tuple(patches.shape[:2])
        if t == 0:
            mask = nothing
            labels = patch_labels(nothing, grid, C).to(patches.device)  # (h, w, C)
        else:
            # Soft labels are handed on, and not the mask: a patch that is half sure stays so.
            labels = propagate(patches, [*certain, *recent], **options)  # (h, w, C)
            mask = to_mask(labels, size)

        # The pixels of an object that is marked in this frame are known; the rest stays.
        if t in given:
            mask = torch.where(given[t] > 0, given[t], mask)
            marked = patch_labels(given[t], grid, C).to(patches.device)  # (h, w, C)
            labels = torch.where(marked[..., :1] == 0, marked, labels)  # (h, w, C)
        (certain if t == 0 or t in given else recent).append((patches, labels))
        yield mask


# ----------------------------------------------------------------------------------------------
# Judging a mask, and a video: the definitions of DAVIS (Perazzi 2016; Pont-Tuset 2017)


def region_similarity(masks: Tensor, truths: Tensor) -> Tensor:
    """J (n,): what two masks share over what either covers. (n, H, W) bool each.

    It is 1 if both are empty: an object that is gone was rightly not found.
    """
    shared = (masks & truths).sum((1, 2)).double()  # (n,)
    covered = (masks | truths).sum((1, 2)).double()  # (n,)
    return torch.where(covered > 0, shared / covered.clamp(min=1), 1.0)


def boundary(masks: Tensor) -> Tensor:
    """Masks (n, H, W) bool -> pixels that differ from the one at the right, below, or both."""
    # The last row and column are repeated, so that the border of the image is no boundary.
    padded = torch.cat([masks, masks[:, -1:]], 1)  # (n, H + 1, W)
    padded = torch.cat([padded, padded[:, :, -1:]], 2)  # (n, H + 1, W + 1)
    right = padded[:, :-1, 1:]  # (n, H, W)
    below = padded[:, 1:, :-1]  # (n, H, W)
    diagonal = padded[:, 1:, 1:]  # (n, H, W)
    return (masks ^ right) | (masks ^ below) | (masks ^ diagonal)


def boundary_measure(masks: Tensor, truths: Tensor, tolerance: float = 0.008) -> Tensor:
    """F (n,): the harmonic mean of precision and recall of the boundary. (n, H, W) bool each.

    A boundary pixel is right if the other boundary has a pixel at most `tolerance` of the
    image's diagonal away: 8 pixels of 854 x 480.
    """
    # To be near a boundary is to lie in a disk around one of its pixels. The convolution counts
    # for each pixel how many boundary pixels are in the disk around it.
    radius = math.ceil(tolerance * math.hypot(*masks.shape[1:]))
    offset = torch.arange(-radius, radius + 1)
    disk = (offset[:, None]**2 + offset**2 <= radius**2).float()  # (2*radius + 1, 2*radius + 1)

    def near(edges):
        return F.conv2d(edges[:, None].float(), disk[None, None], padding=radius)[:, 0] > 0.5

    def share(edges, right):
        """How many of the edges' pixels are right: 1 where there is no edge."""
        total = edges.sum((1, 2)).double()
        return torch.where(total > 0, (edges & right).sum((1, 2)) / total.clamp(min=1), 1.0)

    edges = boundary(masks)  # (n, H, W)
    true_edges = boundary(truths)  # (n, H, W)
    precision = share(edges, near(true_edges))  # (n,)
    recall = share(true_edges, near(edges))  # (n,)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def over_time(values: list[float]) -> dict[str, float]:
    """J or F of each frame -> mean; recall, the share above .5; decay, how much it falls.

    Decay is the mean of the first quarter of the frames minus that of the last one. As in the
    toolkit of DAVIS, neighbouring quarters share a frame: of nine frames the first quarter is
    0, 1, 2 and the last is 6, 7, 8.
    """
    x = torch.tensor(values, dtype=torch.float64)
    first_end = math.floor((len(x) - 1) / 4 + 0.5)
    last_begin = math.floor(3 * (len(x) - 1) / 4 + 0.5)
    decay = x[:first_end + 1].mean() - x[last_begin:].mean()
    return {
        "mean": x.mean().item(), "recall": (x > 0.5).double().mean().item(),
        "decay": decay.item()}


# ----------------------------------------------------------------------------------------------
# Videos by name


@dataclass
class Video:
    """Frames and masks, which are read one by one, by the number of the frame: 0, 1, 2, ..."""

    name: str
    frame_names: list[str]  # what the masks are called that are written
    read_frame: Callable[[int], Tensor]  # number -> (channels, H, W), see images/data.py
    annotated: list[int]  # the numbers of the frames that have a mask
    read_mask: Callable[[int], Tensor]  # such a number -> (H, W) uint8, as in the file


def read_mask(path: Path) -> Tensor:
    """A palette or grey image -> (H, W) uint8; ValueError for another kind of image."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"{path}: a mask is a palette or a grey image of 8 bits, and not "
                             f"of the mode {image.mode}")
        # Of a palette image the numbers are wanted, which numpy gives, and not the colours.
        grey = image.convert("L") if image.mode == "1" else image
        return torch.from_numpy(np.array(grey))


def video_of_files(name: str, frames: Path, masks: Path, channels: int) -> Video:
    """A folder of frames and one of masks that have the same names.

    UsageError for a single frame, for sizes that differ, and if nothing is marked.
    """
    paths = sorted(p for p in frames.glob("[!.]*") if p.suffix.lower() in EXTENSIONS)
    if len(paths) < 2:
        count = "1 image" if paths else "no images"
        raise UsageError(f"--data: {frames} has {count}, expected at least 2 frames")
    mask_paths = [masks / f"{path.stem}.png" for path in paths]
    annotated = [t for t, path in enumerate(mask_paths) if path.exists()]

    # Files are checked before the first frame is computed. `Image.open` reads only the head of
    # a file, so this is quick.
    sizes = {}
    for path in [*paths, *(mask_paths[t] for t in annotated)]:
        try:
            with Image.open(path) as image:
                sizes[path] = image.size
        except OSError as error:
            raise UsageError(f"--data: {path} is no image ({error!s:.100})") from None
        if sizes[path] != sizes[paths[0]]:
            raise UsageError("--data: {} has {} x {} pixels, but {} has {} x {}".format(
                path, *sizes[path], paths[0].name, *sizes[paths[0]]))

    if not any(read_mask(mask_paths[t]).any() for t in annotated):
        raise UsageError(f"--data: no object is marked in {len(annotated)} masks in {masks}")
    return Video(name, [path.stem for path in paths], lambda t: read_file(paths[t], channels),
                 annotated, lambda t: read_mask(mask_paths[t]))


def open_davis(argument: str, side: int, channels: int) -> list[Video]:
    """davis:PATH: PATH/JPEGImages/480p/NAME/*.jpg and PATH/Annotations/480p/NAME/*.png.

    The videos are those of PATH/ImageSets/2017/val.txt, or all if there is no such file.
    """
    frames = Path(argument).expanduser() / "JPEGImages" / "480p"
    masks = Path(argument).expanduser() / "Annotations" / "480p"
    listed = Path(argument).expanduser() / "ImageSets" / "2017" / "val.txt"
    names = sorted(folder.name for folder in frames.glob("[!.]*"))
    if listed.exists():
        names = listed.read_text().split()
    return [video_of_files(name, frames / name, masks / name, channels) for name in names]


def open_frames(argument: str, side: int, channels: int) -> list[Video]:
    """frames:PATH: PATH/NAME/images/*.jpg and PATH/NAME/masks/*.png, for each NAME.

    Only the first frame needs a mask. Where others have one, it is judged.
    """
    folders = sorted(Path(argument).expanduser().glob("[!.]*/images"))
    return [
        video_of_files(folder.parent.name, folder, folder.parent / "masks", channels)
        for folder in folders]


N_DRAWN = 10  # videos, one for each kind of thing
N_FRAMES = 24  # of a drawn video


def open_shapes(argument: str, side: int, channels: int) -> list[Video]:
    """shapes, or shapes:N for N videos that images/shapes.py draws, at `side` pixels."""
    if argument and not argument.isdigit():
        raise UsageError(f"--data shapes:{argument}: expected a number of videos, or nothing")
    videos = []
    for seed in range(int(argument or N_DRAWN)):
        # Drawn when the first frame is asked for, by the process whose turn it is.
        drawn = cache(partial(draw_video, seed, N_FRAMES, side))

        def frame(t, drawn=drawn):
            return in_channels(torch.from_numpy(drawn()[0][t]), channels)

        def mask(t, drawn=drawn):
            return torch.from_numpy(drawn()[1][t]).byte()

        names = [f"{t:05d}" for t in range(N_FRAMES)]
        videos.append(Video(f"shapes-{seed}", names, frame, list(range(N_FRAMES)), mask))
    return videos


VIDEOS = {"shapes": open_shapes, "davis": open_davis, "frames": open_frames}


def open_videos(spec: str, side: int, channels: int) -> list[Video]:
    """NAME or NAME:ARGUMENT -> videos; UsageError if there are none."""
    name, _, argument = spec.partition(":")
    if name not in VIDEOS:
        raise UsageError(f"--data {spec}: choose from {', '.join(VIDEOS)}, as in davis:PATH")
    videos = VIDEOS[name](argument, side, channels)

    # The layout that was expected is the first line of the docstring.
    if not videos:
        layout = VIDEOS[name].__doc__.splitlines()[0].rstrip(".")
        raise UsageError(f"--data {spec}: found no videos; expected {layout}")
    return videos


VOID = 255  # in a mask: nobody can say what these pixels belong to


def number_objects(masks: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """Masks as in the files -> (the numbers to write, masks with the numbers 1, 2, 3, ...).

    DAVIS 2016 marks its one object by 255; it is written as 1. Where there are other numbers,
    as in DAVIS 2017, 255 marks void pixels, which do not count when masks are judged: they stay
    255.

        numbers in the files      0    3    8   255             0   255
        numbers from here on      0    1    2   VOID            0    1
        numbers to write          0    3    8                   0    1
    """
    values = set()
    for mask in masks.values():
        values |= set(mask.unique().tolist())
    objects = sorted(values - {0, VOID})

    # A table: the new number of each number that a byte can have.
    new_number = torch.zeros(256, dtype=torch.uint8)
    new_number[VOID] = VOID if objects else 1
    for i, value in enumerate(objects, 1):
        new_number[value] = i
    renumbered = {t: new_number[mask.long()] for t, mask in masks.items()}
    return torch.tensor([0, *(objects or [1])], dtype=torch.uint8), renumbered


def first_masks(masks: dict[int, Tensor]) -> dict[int, Tensor]:
    """What the network is told: each object's mask in the first frame that has the object.

    Frame -> mask (H, W) of the objects that are new in it, 0 elsewhere. Mostly all objects are
    in the first frame, so that it is the only one.
    """
    # Of a later frame only the objects that no earlier frame has: all else in it is what has to
    # be found.
    known = {0, VOID}
    given = {}
    for t, mask in sorted(masks.items()):
        new = set(mask.unique().tolist()) - known
        if new:
            is_new = torch.isin(mask, torch.tensor(sorted(new), dtype=torch.uint8))
            given[t] = torch.where(is_new, mask, 0)
            known |= new
    return given


# ----------------------------------------------------------------------------------------------
# What is written


def colours_of_numbers() -> np.ndarray:
    """A colour for each object's number, (256, 3) uint8: those of Pascal VOC and DAVIS.

    The bits of a number go to red, green and blue in turn. The first three set the highest bit
    of their colour, the next three the second highest. Example: 1 is (128, 0, 0), 2 is (0, 128,
    0), 3 = 1 + 2 is (128, 128, 0), and 8 is (64, 0, 0).
    """
    numbers = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        is_set = numbers >> bit & 1
        colours[:, bit % 3] += (is_set << 7 - bit // 3).astype(np.uint8)
    return colours


COLOURS = colours_of_numbers()


def write_mask(path: Path, mask: Tensor):
    """A mask (H, W) as a PNG of numbers with a palette, as DAVIS has them."""
    image = Image.fromarray(mask.numpy())
    image.putpalette(COLOURS.tobytes())
    image.save(path)


def overlay(frame: Tensor, mask: Tensor, short: int = 240) -> Image.Image:
    """A frame in grey, made smaller, with its objects in colour: a picture of the animation."""
    # Without its own colours the frame does not compete with those of the objects.
    grey = in_channels(frame, 3).numpy().mean(0)[..., None].repeat(3, 2)  # (H, W, 3)
    is_object = mask.numpy()[..., None] > 0
    picture = np.where(is_object, grey / 2 + COLOURS[mask.numpy()] / 2, grey)
    image = Image.fromarray(picture.astype(np.uint8))

    # A GIF of whole frames of 480 pixels would have some 20 MB.
    scale = min(1.0, short / min(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size])


# ----------------------------------------------------------------------------------------------
# The protocol


@dataclass
class Config(protocol.WeightsConfig):
    # -- video
    data: str = "shapes"  # videos: shapes, davis:PATH, or frames:PATH with PATH/NAME/images
    image_size: int = 0  # short side of the frames; 0: six times as in training, 480 at most
    n_last_frames: int = 7  # how many of the last frames are looked at, beside the first one
    size_mask_neighborhood: int = 12  # how many patches away a similar patch may be
    topk: int = 5  # from how many of the most similar patches a label is taken
    temperature: float = 0.1  # the temperature of their weights: lower counts near ones more

    def check(self):
        require(self, lambda x: x >= 1, "at least 1", "topk", "size_mask_neighborhood")
        require(self, lambda x: x > 0, "a positive number", "temperature")


def network_size(height: int, width: int, side: int, patch: int) -> tuple[int, int]:
    """The size at which the network sees a frame, in whole patches: (height, width).

    The frame is stretched to it. As in DINO's code a short side of 480 pixels goes with a long
    side that is a multiple of 64, which patches of 8 and 16 pixels divide; else it is a
    multiple of the patch. Example: a frame of 854 x 480 becomes 832 x 480 with patches of 8,
    and 840 x 476 with patches of 14.
    """
    # Integers are cut down, as in DINO's code. A square stays a square.
    short = side // patch * patch
    step = 64 if short == 480 and 64 % patch == 0 else patch
    long = max(height, width) * short // min(height, width)
    long = max(short, long // step * step)
    return (long, short) if height > width else (short, long)


def patch_features(extractor: Extractor, frame: Tensor) -> Tensor:
    """A frame (C, H, W) -> features of its patches (h, w, D), each of unit length."""
    # The frame is not cropped: its objects may be anywhere.
    model = extractor.model
    size = network_size(*frame.shape[1:], extractor.size, model.patch_size)
    frame = TF.resize(frame, size, TF.InterpolationMode.BILINEAR, antialias=True)
    images = normalise(frame[None].to(extractor.process.device), model.pixels)

    # The class token and the registers belong to no place. Of features of unit length the
    # product is the cosine. It decides between near neighbours, so it is always in float32.
    with autocast(extractor.config.precision, extractor.process.device):
        patches = model.forward_features(images)["x_norm_patchtokens"][0].float()  # (P, D)
    if not patches.isfinite().all():
        raise UsageError(
            f"--weights {extractor.config.weights}: it has features that are no numbers")
    return F.normalize(patches, dim=1).unflatten(0, model.grid(images))


def judge(mask: Tensor, still: Tensor, truth: Tensor, objects: list[int]) -> dict:
    """One frame: {"J": a value for each of the objects, "F": ..., "J_still": ...}.

    mask, still and truth are (H, W), numbers of objects; void pixels of the truth do not count.
    """
    numbers = torch.tensor(objects)[:, None, None]
    counts = truth != VOID
    true_masks = truth == numbers  # (n, H, W)
    own_masks = (mask == numbers) & counts  # (n, H, W)
    still_masks = (still == numbers) & counts  # (n, H, W)
    return {
        "J": region_similarity(own_masks, true_masks).tolist(),
        "F": boundary_measure(own_masks, true_masks).tolist(),
        "J_still": region_similarity(still_masks, true_masks).tolist()}


def segment(video: Video, extractor: Extractor, folder: Path, report) -> dict:
    """Follows the objects of one video, writes masks and animation, and judges the masks.

    -> object -> {"J": of each judged frame, "F": ..., "J_still": ...}. J_still is J of the
    object's first mask, which stays where it is. report() is called after each frame.
    """
    # All masks of a video are kept, a byte for each pixel. Frames and features are larger: they
    # are made one by one, when `follow` asks for them.
    config = extractor.config
    to_write, truths = number_objects({t: video.read_mask(t) for t in video.annotated})
    given = first_masks(truths)
    last = len(video.frame_names) - 1
    features = (patch_features(extractor, video.read_frame(t)) for t in range(last + 1))
    masks = follow(features, given, len(to_write), config.n_last_frames,
                   radius=config.size_mask_neighborhood, topk=config.topk,
                   temperature=config.temperature)

    (folder / video.name).mkdir(parents=True, exist_ok=True)
    scores = {n: {"J": [], "F": [], "J_still": []} for n in range(1, len(to_write))}
    objects = []  # those that were given in earlier frames
    still = torch.zeros_like(given[min(given)])
    pictures = []
    for t, mask in enumerate(masks):
        # An object is judged from the frame after the one in which it was given. As in the
        # toolkit of DAVIS, the last frame of a video is left out.
        if t in truths and objects and t < last:
            for figure, values in judge(mask, still, truths[t], objects).items():
                for number, value in zip(objects, values):
                    scores[number][figure].append(value)
        if t in given:
            objects += given[t][given[t] > 0].unique().tolist()
            still = torch.where(given[t] > 0, given[t], still)

        # The toolkit of DAVIS, or any other, finds the masks by the names of the frames.
        written = to_write[mask.long()]
        write_mask(folder / video.name / f"{video.frame_names[t]}.png", written)
        pictures.append(overlay(video.read_frame(t), written))
        report()

    # Ten frames a second, again and again.
    pictures[0].save(folder / f"{video.name}.gif", save_all=True, append_images=pictures[1:],
                     duration=100, loop=0)
    return {str(int(to_write[n])): values for n, values in scores.items() if values["J"]}


def on_report_card(config: Config, model) -> Config | None:
    """For `evaluate.py all`: None but where --data is drawn, and so videos can be drawn, too."""
    # Of images shapes:5000 are 5,000; as many videos would take days.
    fits = config.data.startswith("shapes") and hasattr(model, "blocks")
    return replace(config, data="shapes") if fits else None


def run(extractor: Extractor) -> dict:
    """Objects of the first frame, followed through videos: J and F. DINO sec. 4.2.2 (DAVIS).

    Writes a mask for each frame, OUTPUT_DIR/VIDEO/00000.png, and an animation for each video.
    """
    config = extractor.config
    process = extractor.process
    model = extractor.model
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"--weights {config.weights}: a convnet, which has no patches")

    # DINO's networks were trained at 224 pixels and see frames of 480. A network for drawings
    # of 40 pixels has 8 x 8 patches there, too few to draw an outline with: it sees 240 pixels.
    extractor.size = config.image_size or min(480, 6 * model.img_size)
    side = extractor.size // model.patch_size * model.patch_size
    videos = open_videos(config.data, side, model.pixels.channels)

    # Each process takes every W-th video. The main process shows how far it is with its own.
    own_videos = videos[process.rank::process.world_size]
    progress = Progress("video", sum(len(v.frame_names) for v in own_videos), process)
    frames_done = itertools.count(1)

    def report():
        progress(next(frames_done))

    # The figures of all videos go to all processes, in the order of the videos.
    folder = results_folder(config, "video")
    own_scores = {v.name: segment(v, extractor, folder, report) for v in own_videos}
    scores = {}
    for part in process.all_gather(own_scores):
        scores |= part
    figures = figures_of({v.name: scores[v.name] for v in videos})

    process.print(f"video: {len(videos)} videos at {extractor.size} px, labels of the first "
                  f"frame and of the last {config.n_last_frames}; masks and animations are in "
                  f"{folder}")
    rows = [row for objects in figures.values() for row in objects.values()]
    results = {
        "video": figures,
        "protocol": f"labels of the first frame and the last {config.n_last_frames}, at most "
        f"{config.size_mask_neighborhood} patches away, top {config.topk}, "
        f"T = {config.temperature}; judged without first and last frame"}
    if not rows:
        process.print("  no frame but the first and the last one has a mask to judge with")
        return results

    # All objects count the same, those of a video with many objects, too.
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    process.print(table(figures, means))
    results |= {"means": means, "J&F": (means["J mean"] + means["F mean"]) / 2}
    process.print(f"  J&F {results['J&F']:.3f}; \"J still\" is J of an object's first mask, "
                  "which stays where it is")
    return results | {"headline": {"video J&F": results["J&F"]}}


def figures_of(scores: dict) -> dict:
    """The lists of `segment` for each video -> video -> object -> figures by name."""
    figures = {}
    for name, objects in scores.items():
        figures[name] = {}
        for number, values in objects.items():
            row = {}
            for measure in ("J", "F"):
                for figure, value in over_time(values[measure]).items():
                    row[f"{measure} {figure}"] = value
            row["J still"] = over_time(values["J_still"])["mean"]
            figures[name][number] = row
    return figures


def table(figures: dict, means: dict) -> str:
    """A line for each object, and one for the means, which are those of all objects."""
    lines = []
    for name, objects in figures.items():
        lines += [(f"{name}, {number}", row) for number, row in objects.items()]
    lines.append(("mean", means))

    text = [f"  {'video, object':24s}" + "".join(f"{name:>10s}" for name in means)]
    for title, row in lines:
        text.append(f"  {title:24s}" + "".join(f"{value:10.3f}" for value in row.values()))
    return "\n".join(text)


if __name__ == "__main__":
    # A disc of radius 30 in an image of 200 x 300 pixels, at a place that is more and more
    # wrong. The tolerance of F is .008 of the diagonal of 361 pixels, rounded up: 3 pixels.
    y, x = torch.meshgrid(torch.arange(200), torch.arange(300), indexing="ij")
    truth = (y - 100)**2 + (x - 150)**2 <= 30**2
    for shift in (0, 1, 2, 3, 4, 6, 10, 30):
        mask = (y - 100)**2 + (x - 150 - shift)**2 <= 30**2
        J = region_similarity(mask[None], truth[None]).item()
        boundary_F = boundary_measure(mask[None], truth[None]).item()
        print(f"{shift:2d} pixels beside its place: J {J:.3f}, F {boundary_F:.3f}")
