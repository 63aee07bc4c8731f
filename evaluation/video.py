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
Paper    DINO sec. 4.2.2; Jabri 2020 (the propagation)
Try      python evaluate.py video --weights RUN
Change   how labels are handed on: propagate; other videos: VIDEOS in images/videos.py
Tests    pytest tests/evaluation/test_video.py

Letters  h w patches down and across, D width, C labels (the background and each object),
         c columns near a patch, k neighbours, n masks, H W pixels of a frame.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from augment import normalise
from evaluation import protocol
from evaluation.contours import boundary_measure, over_time, region_similarity
from evaluation.protocol import Extractor, results_folder
from images.videos import (VOID, Video, first_masks, number_objects, open_videos, overlay,
                           write_mask)
from machinery.clock import Progress
from machinery.flags import UsageError, require
from machinery.process import autocast
from machinery.read_once import wait_for_all
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
    # The columns near each column: row x of `columns` has x - reach to x + reach. Beyond the
    # border of the frame there is no column: there the entry is the nearest column that exists,
    # so that it can be looked up, and `outside` marks it, so that it gets no weight below.
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

        # For each patch of row y a table: a row for each context and each row of it near y, a
        # column for each horizontal offset. It is written out flat, so that the neighbours may be
        # of one context or of several. Offsets beyond the border have the cosine -inf; where
        # fewer than topk patches are near, they are among the neighbours, with the weight 0.
        all_cosines = torch.cat(cosines, 1)  # (w, m, c)
        all_cosines = all_cosines.masked_fill(outside[:, None], -torch.inf).flatten(1)
        top = all_cosines.topk(min(topk, all_cosines.shape[1]))
        weights = (top.values / temperature).softmax(1)  # (w, k)

        # From the place in the flat table back to its row and offset, to get the labels there.
        # Example: with 25 offsets the place 57 is row 57 // 25 = 2 of the table and offset number
        # 57 % 25 = 7. `columns` says which column of the frame that offset is for this patch.
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
    images = normalise(frame[None].to(extractor.process.device), model.channel_stats)

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
    """For `evaluate.py all`: None but where --data is drawn, so that videos can be drawn."""
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
    videos = open_videos(config.data, side, model.channel_stats.channels)

    # Each process takes every W-th video. The main process shows how far it is with its own.
    own_videos = videos[process.rank::process.world_size]
    progress = Progress("video", sum(len(v.frame_names) for v in own_videos), process)
    frames_done = itertools.count(1)

    def report():
        progress(next(frames_done))

    # The figures of all videos go to all processes, in the order of the videos.
    folder = results_folder(config, "video")
    own_scores = {v.name: segment(v, extractor, folder, report) for v in own_videos}
    wait_for_all(process)  # one video may take an hour longer than the others
    scores = {}
    for part in process.all_gather(own_scores):
        scores |= part
    figures = figures_of({v.name: scores[v.name] for v in videos})

    process.print(f"video: {len(videos)} videos at {extractor.size} px, labels of the first "
                  f"frame and of the last {config.n_last_frames}; masks and animations are in "
                  f"{folder}")
    results = {
        "video": figures,
        "protocol": f"labels of the first frame and the last {config.n_last_frames}, at most "
        f"{config.size_mask_neighborhood} patches away, top {config.topk}, "
        f"T = {config.temperature}; judged without first and last frame"}
    return results | summary(figures, process)


def summary(figures: dict, process) -> dict:
    """Prints the table of all objects and returns their means; {} where nothing was judged."""
    rows = [row for objects in figures.values() for row in objects.values()]
    if not rows:
        process.print("  no frame but the first and the last one has a mask to judge with")
        return {}

    # All objects count the same, those of a video with many objects, too.
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    both = (means["J mean"] + means["F mean"]) / 2
    process.print(table(figures, means))
    process.print(f"  J&F {both:.3f}; \"J still\" is J of an object's first mask, which stays "
                  "where it is")
    return {"means": means, "J&F": both, "headline": {"video J&F": both}}


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
