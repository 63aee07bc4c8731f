"""Videos: frames, and masks of the objects that are marked in them, by the name of the data.

    "shapes" | "davis:PATH" | "frames:PATH"
                  |
    Video: read_frame(t) -> (C, H, W), read_mask(t) -> (H, W): 0, or the number of an object

Idea     A video is long, so its frames are read one by one, when they are asked for. Some data
         sets mark every frame, some the first one only, and some mark an object first where it
         appears; what is told and what is judged follows from the masks that there are.
Paper    Perazzi 2016 (DAVIS 2016: one object); Pont-Tuset 2017 (DAVIS 2017: several)
Try      python evaluate.py video --data frames:PATH --weights RUN
Change   videos from elsewhere are a function that gives a list of Video, and one line in VIDEOS
Tests    pytest tests/images/test_videos.py

Letters  C channels, H W pixels of a frame.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from images.files import EXTENSIONS, in_channels, read_file
from images.names import in_natural_order
from images.shapes import video as draw_video
from machinery.flags import UsageError


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
    # Frames are in the order of the numbers in their names: 2.jpg is before 10.jpg.
    paths = [p for p in frames.glob("[!.]*") if p.suffix.lower() in EXTENSIONS]
    paths.sort(key=lambda path: in_natural_order(path.name))
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
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except (OSError, Image.DecompressionBombError) as error:
            raise UsageError(f"--data: {path} is no image ({error!s:.100})") from None
        # Whether its mask was made before or after it was turned nobody can tell.
        if orientation in range(2, 9):
            raise UsageError(f"--data: {path} is to be turned by its EXIF (orientation "
                             f"{orientation}), and its mask is not: save it upright")
        if sizes[path] != sizes[paths[0]]:
            raise UsageError("--data: {} has {} x {} pixels, but {} has {} x {}".format(
                path, *sizes[path], paths[0].name, *sizes[paths[0]]))

    # What only the head of a file did not tell: it may be cut off.
    def whole(read, path):
        try:
            return read(path)
        except (OSError, SyntaxError) as error:
            raise UsageError(f"--data: {path} does not decode ({error!s:.100})") from None

    if not any(whole(read_mask, mask_paths[t]).any() for t in annotated):
        raise UsageError(f"--data: no object is marked in {len(annotated)} masks in {masks}")
    read_frame = partial(read_file, channels=channels)
    return Video(name, [path.stem for path in paths], lambda t: whole(read_frame, paths[t]),
                 annotated, lambda t: whole(read_mask, mask_paths[t]))


def open_davis(argument: str, side: int, channels: int) -> list[Video]:
    """davis:PATH: PATH/JPEGImages/480p/NAME/*.jpg and PATH/Annotations/480p/NAME/*.png.

    The videos are those of PATH/ImageSets/2017/val.txt, or all if there is no such file.
    """
    # DAVIS has two sizes of every frame; its figures are those of the smaller one, which is 480
    # pixels high.
    frames = Path(os.path.expanduser(argument)) / "JPEGImages" / "480p"
    masks = Path(os.path.expanduser(argument)) / "Annotations" / "480p"
    listed = Path(os.path.expanduser(argument)) / "ImageSets" / "2017" / "val.txt"
    names = sorted(folder.name for folder in frames.glob("[!.]*"))
    if listed.exists():
        names = listed.read_text().split()
    return [video_of_files(name, frames / name, masks / name, channels) for name in names]


def open_frames(argument: str, side: int, channels: int) -> list[Video]:
    """frames:PATH: PATH/NAME/images/*.jpg and PATH/NAME/masks/*.png, for each NAME.

    Only the first frame needs a mask. Where others have one, it is judged.
    """
    folders = sorted(Path(os.path.expanduser(argument)).glob("[!.]*/images"))
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


# ----------------------------------------------------------------------------------------------
# Which object is which

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
    # Programs that show a mask use the colours in its file, so ours are those that a reader of
    # DAVIS knows.
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
