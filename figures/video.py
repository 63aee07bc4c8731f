"""Video: what a network sees in each frame of a video, beside the frame.

    a video file, GIF or APNG --+
    a folder of frames ---------+--> frame by frame --> attention or PCA --> colours --+
                                                                                       |
    a folder of finished maps (--video_only) ------------------------------------------+--> video

Idea     A map of one photo may be luck. In a video the same head has to stay on the same object
         while it moves and turns. This can only be seen if a colour means the same in all
         frames, so colours are chosen once, from a few frames of the whole video.
Paper    DINO fig. 1 and the video of its README; PCA: DINOv2 fig. 1
Try      python visualize.py video FOLDER --weights RUN_OR_FILE_OR_NAME
Change   another map of a frame is one class and one line in METHODS; another kind of file is one
         function and one line in WRITERS
Tests    pytest tests/figures/test_video_figure.py

Letters  C channels, H W pixels, h w patches down and across, D width.

Only one frame is in memory at a time, however long the video is.
"""

import contextlib
import functools
import importlib.util
import itertools
import struct
import textwrap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, GifImagePlugin, Image, ImageDraw, ImageFont, ImageSequence
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from augment import normalise
from backbones.weights import load_backbone
from evaluation.masks import top_mass
from figures.inputs import check_numbers, enlarge, fit
from images.files import EXTENSIONS, in_channels, read_file
from images.names import in_natural_order
from machinery.clock import Progress
from machinery.flags import UsageError, near_path, require
from machinery.page import MAPS, picture, pyplot
from machinery.process import start_process
from training.snapshots import page_side
from vit import VisionTransformer

FPS = 30  # frames a second, where the frames do not say it
PLAYED_BY_PILLOW = (".gif", ".png", ".webp")  # files of one picture or of many

# ----------------------------------------------------------------------------------------------
# Frames, one at a time


@dataclass
class Frames:
    """The frames of a video. They can be read more than once, always from the first one on."""

    count: int
    fps: float
    read: Callable[[int], Iterator[Tensor]]  # step -> every step-th frame, (C, H, W)


def open_frames(path: Path, channels: int) -> Frames:
    """The frames of a folder, an animation or a video; UsageError if there are none."""
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder{near_path(path)}")
    if path.is_dir():
        return open_folder(path, channels)
    if path.suffix.lower() in PLAYED_BY_PILLOW:
        return open_animation(path, channels)
    return open_video(path, channels)


def open_folder(path: Path, channels: int) -> Frames:
    """The pictures in a folder, sorted by their names."""
    files = [p for p in path.glob("[!.]*") if p.suffix.lower() in EXTENSIONS]
    files.sort(key=lambda file: in_natural_order(file.name))
    if not files:
        raise UsageError(f"{path}: a video without frames; expected {', '.join(EXTENSIONS)}")

    # A frame of another size would end a long computation in its middle. The head of a file
    # tells its size, and whether it has to be turned (orientations 5 to 8); reading it is quick.
    sizes = {}
    for file in files:
        try:
            with Image.open(file) as image:
                lying = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
                sizes[image.size[::-1] if lying else image.size] = file
        except Exception as error:  # decoders raise exceptions of many kinds
            raise UsageError(f"{file}: not a readable frame ({error!s:.100})") from None
    if len(sizes) > 1:
        (size, file), (other_size, other) = list(sizes.items())[:2]
        raise UsageError(f"{path}: frames of several sizes, {file.name} has {size[0]} x "
                         f"{size[1]} pixels and {other.name} {other_size[0]} x {other_size[1]}")

    # Only decoding the whole of a file tells that its end is missing.
    def read_frame(file):
        try:
            return read_file(file, channels)
        except Exception as error:
            raise UsageError(f"{file}: not a readable frame ({error!s:.100})") from None

    return Frames(len(files), FPS, lambda step: map(read_frame, files[::step]))


def open_animation(path: Path, channels: int) -> Frames:
    """A GIF, an animated PNG (APNG) or WebP, which Pillow reads."""
    try:
        with Image.open(path) as image:
            # Each frame may last as long as it likes; what is written has one speed, the mean.
            durations = []
            for frame in ImageSequence.Iterator(image):
                frame.load()  # before it WebP does not know how long a frame lasts
                durations.append(frame.info.get("duration", 0))
    except Exception as error:  # decoders raise exceptions of many kinds
        raise UsageError(f"{path}: not a readable video ({error!s:.100})") from None
    count = len(durations)
    if count < 2:
        raise UsageError(f"{path}: one picture and no video; python visualize.py attention "
                         "draws one photo")

    def read(step):
        with Image.open(path) as image:
            frames = itertools.islice(ImageSequence.Iterator(image), 0, None, step)
            for frame in frames:
                yield in_channels(pil_to_tensor(frame.convert("RGB")), channels)

    total = sum(durations)  # milliseconds; 0 where the file says nothing
    return Frames(count, 1000 * count / total if total else FPS, read)


def pyav(what: str):
    """The module av of PyAV, which reads and writes video files; UsageError without it."""
    # torchvision had functions for videos, but has dropped them. PyAV is no requirement of this
    # project, because only this figure needs it.
    try:
        return importlib.import_module("av")
    except ImportError:
        raise UsageError(
            f"{what} needs PyAV (pip install av); without it give a folder of frames or a GIF, "
            "and --video_format gif or png") from None


def open_video(path: Path, channels: int) -> Frames:
    """A video file, which PyAV reads."""
    av = pyav(f"{path}: a video file")

    @contextlib.contextmanager
    def opened():
        try:
            with av.open(str(path)) as file:
                if not file.streams.video:
                    raise UsageError(f"{path}: a file without a video")
                yield file
        except av.FFmpegError as error:
            raise UsageError(f"{path}: not a readable video ({error!s:.100})") from None

    def decoded():
        with opened() as file:
            yield from file.decode(video=0)

    # Some files do not say how many frames they have; then the frames are counted.
    with opened() as file:
        stream = file.streams.video[0]
        fps = float(stream.average_rate or FPS)
        count = stream.frames
    count = count or sum(1 for _ in decoded())
    if not count:
        raise UsageError(f"{path}: a video without frames")

    def read(step):
        for frame in itertools.islice(decoded(), 0, None, step):
            # A telephone that was held upright writes frames that lie on their side, and beside
            # them by how many degrees they have to be turned.
            turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            image = torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)
            yield in_channels(image, channels)

    return Frames(count, fps, read)


# ----------------------------------------------------------------------------------------------
# Maps: what is computed of a frame, and the colours that it gets
#
# A method computes numbers for the patches of one frame; `choose_colours` gets those of a few
# frames, and decides once what each number will look like; `paint` gives the colours of any
# frame.


class AttentionMaps:
    """Attention of the class token, mean of all heads: dark where there is little of it."""

    def __init__(self, model: VisionTransformer, block: int):
        self.model = model
        self.block = block
        self.title = f"attention of the class token, mean of {model.num_heads} heads"

    def __call__(self, images: Tensor) -> Tensor:
        """One normalised image (1, C, H, W) -> (h, w)."""
        return self.model.get_class_attention(images, self.block)[0].mean(0)

    def choose_colours(self, maps: list[Tensor]):
        # A few patches may get most of the attention. The brightest and the darkest 2 % share a
        # colour, so that the rest can be told apart.
        values = torch.stack(maps).flatten()
        self.lowest, self.highest = values.quantile(torch.tensor([0.02, 0.98])).tolist()
        colours = pyplot().get_cmap(MAPS["video"])(np.linspace(0, 1, 256))[:, :3]
        self.colours = torch.from_numpy(colours * 255).round().byte()  # (256, 3)

    def paint(self, grid: Tensor) -> Tensor:
        """(h, w) -> (h, w, 3) uint8."""
        # A map that is the same everywhere has no spread to divide by.
        spread = max(self.highest - self.lowest, 1e-12)
        shares = ((grid - self.lowest) / spread).clamp(0, 1)
        return self.colours[(shares * 255).round().long()]


class PCAMaps:
    """The three main directions of the patch features as red, green and blue. DINOv2 sec. 7.5.

    Patches of the same colour have similar features, in this frame and in all others.
    """

    title = "patch features, three main directions as colours"

    def __init__(self, model: VisionTransformer, block: int):
        self.model = model
        self.block = block % model.depth

    def __call__(self, images: Tensor) -> Tensor:
        """One normalised image (1, C, H, W) -> features (h, w, D)."""
        [features] = self.model.get_intermediate_layers(images, [self.block], reshape=True)
        return features[0].permute(1, 2, 0)

    def choose_colours(self, maps: list[Tensor]):
        rows = torch.cat([features.flatten(0, 1) for features in maps]).double()  # (n, D)
        self.mean = rows.mean(0)
        _, directions = torch.linalg.eigh((rows - self.mean).T.cov())
        self.directions = directions[:, -3:].flip(1)  # (D, 3), that of the largest spread first

        # A direction is as good as its opposite. Its largest number is made positive, so that
        # the colours are the same on every machine.
        largest = self.directions.gather(0, self.directions.abs().argmax(0, keepdim=True))
        self.directions = self.directions * largest.sign()

        # Each colour goes from the lowest to the highest value, but for the outermost 1 %.
        values = (rows - self.mean) @ self.directions  # (n, 3)
        ends = torch.tensor([0.01, 0.99], dtype=torch.float64)
        self.lowest, self.highest = values.quantile(ends, dim=0)

    def paint(self, features: Tensor) -> Tensor:
        """(h, w, D) -> (h, w, 3) uint8."""
        values = (features.double() - self.mean) @ self.directions  # (h, w, 3)
        spread = (self.highest - self.lowest).clamp(min=1e-12)
        shares = ((values - self.lowest) / spread).clamp(0, 1)
        return (shares * 255).round().byte()


METHODS = {"attention": AttentionMaps, "pca": PCAMaps}
SAMPLE = 8  # frames, evenly spread over the video, that the colours are chosen from


@torch.no_grad()
def frames_and_maps(frames: Frames, method, side: int, device: torch.device,
                    report=None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (frame, numbers, colours) of each frame.

    The frame is (C, H, W), with `side` pixels on its shorter side; the numbers are those of the
    method, one or D for each patch; the colours are (h, w, 3) uint8. report is called with the
    number of frames that are computed.
    """
    model = method.model
    computed = itertools.count(1)

    def prepared(step):
        for frame in frames.read(step):
            yield fit(frame, side, model.patch_size)

    def compute(frame):
        grid = method(normalise(frame[None].to(device), model.channel_stats)).float().cpu()
        if report:
            report(next(computed))
        return grid

    # First the frames that colours are chosen from. Their maps are kept until their turn comes
    # below, so that no frame is computed twice.
    step = -(-frames.count // SAMPLE)
    sample = {i * step: compute(frame) for i, frame in enumerate(prepared(step))}
    if not sample:
        raise UsageError("a video without frames: none of them can be decoded")
    method.choose_colours(list(sample.values()))

    for t, frame in enumerate(prepared(1)):
        grid = sample.pop(t) if t in sample else compute(frame)
        yield frame, grid, method.paint(grid)


# ----------------------------------------------------------------------------------------------
# From a frame and its map to one picture


@functools.cache
def caption_strip(text: str, width: int) -> Tensor:
    """A white strip (height, width, 3) uint8 with grey text in its middle."""
    # One line, as large as the width allows, from 14 pixels down to 10. Below a small video there
    # are several lines of 10 pixels.
    for size in range(14, 9, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width - 8:
            break
    lines = [text]
    length = font.getlength(text)
    if length > width - 8:
        letters = int(len(text) * (width - 8) / length) - 2  # of a line, with some to spare
        lines = textwrap.wrap(text, max(1, letters))

    # A line takes one and a half times the size of its letters.
    strip = Image.new("RGB", (width, int(1.5 * size * len(lines)) + size // 2), "white")
    for i, line in enumerate(lines):
        place = (width // 2, size + int(1.5 * size * i))
        ImageDraw.Draw(strip).text(place, line, (90, 90, 90), font, anchor="mm")
    return torch.from_numpy(np.array(strip))


def side_by_side(panels: list[Tensor], caption: str) -> Tensor:
    """Panels (H, W, 3) uint8 with a white gap between them, and the caption, if any, below."""
    gap = torch.full((panels[0].shape[0], 8, 3), 255, dtype=torch.uint8)
    row = []
    for panel in panels:
        row += [panel, gap]
    page = torch.cat(row[:-1], 1)
    if caption:
        page = torch.cat([page, caption_strip(caption, page.shape[1])])

    # MP4 keeps colours for squares of 2 x 2 pixels, so both sides have to be even. The pixels
    # that are missing are white.
    height, width = page.shape[:2]
    even = torch.full((height + height % 2, width + width % 2, 3), 255, dtype=torch.uint8)
    even[:height, :width] = page
    return even


def to_bytes(shown: Tensor) -> Tensor:
    """(H, W, 3) from 0 to 1 -> uint8."""
    return (shown * 255).round().byte()


def pages(frames: Frames, method, side: int, device: torch.device, caption: str,
          threshold: float = 0.0, maps_dir: str = "", report=None) -> Iterator[Tensor]:
    """Yields the picture of each frame: the frame, its map, and what holds the `threshold`.

    (height, width, 3) uint8. In the third picture, which a threshold of 0 leaves out, the
    patches are bright that hold this share of the attention. maps_dir keeps the maps as files.
    """
    patch = method.model.patch_size
    for t, (frame, grid,
            colours) in enumerate(frames_and_maps(frames, method, side, device, report)):
        painted = enlarge(colours.permute(2, 0, 1), patch).permute(1, 2, 0)
        panels = [to_bytes(picture(frame)), painted]
        if threshold:
            mask = enlarge(top_mass(grid, threshold), patch)
            panels.append(torch.where(mask[..., None], panels[0], panels[0] // 4))
        if maps_dir:
            Image.fromarray(painted.numpy()).save(Path(maps_dir) / f"map-{t:05d}.png")
        yield side_by_side(panels, caption)


# ----------------------------------------------------------------------------------------------
# Writers: (path, pictures (H, W, 3) uint8, frames a second) -> a file
#
# Each takes the pictures one by one and writes them at once. Pillow could write GIF and APNG as
# well, but would first collect all of their frames.


def write_gif(path: Path, pictures: Iterator[Tensor], fps: float):
    """GIF: at most 256 colours in a frame, plays everywhere."""
    with open(path, "wb") as file:
        for t, shown in enumerate(pictures):
            image = Image.fromarray(shown.numpy()).quantize(256)
            if t == 0:  # loop 0: again and again
                file.writelines(GifImagePlugin.getheader(image, info={"loop": 0})[0])

            # GIF counts in hundredths of a second. Each frame lasts until the rounded begin of
            # the next one, so that the errors do not add up: at 30 frames a second 3, 4, 3, 3,
            # 4, ... Players take less than 2 for a mistake, and play it slowly.
            hundredths = round(100 * (t + 1) / fps) - round(100 * t / fps)
            file.writelines(
                GifImagePlugin.getdata(image, duration=10 * max(hundredths, 2),
                                       include_color_table=True))
        file.write(b";")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file: length, kind, data, checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(
        ">I", zlib.crc32(kind + data))


def write_png(path: Path, pictures: Iterator[Tensor], fps: float):
    """APNG, an animated PNG: all colours without loss, plays in browsers."""
    delay = Fraction(1 / fps).limit_denominator(1001)
    with open(path, "wb") as file:
        number = 0  # of the next chunk that belongs to the animation
        for t, shown in enumerate(pictures):
            height, width = shown.shape[:2]
            if t == 0:
                file.write(b"\x89PNG\r\n\x1a\n")
                # 8 bits a channel, colours of kind 2 (RGB).
                size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
                file.write(chunk(b"IHDR", size))
                # How many frames there are is known at the end, and written here then.
                place_of_count = file.tell()
                file.write(chunk(b"acTL", bytes(8)))

            # Each row is written as its difference from the row above (filter 2), which makes it
            # half as long once it is compressed. Bytes wrap around: 3 - 5 is 254.
            rows = shown.flatten(1)  # (H, 3*W)
            above = torch.cat([torch.zeros_like(rows[:1]), rows[:-1]])
            kind_of_filter = torch.full((height, 1), 2, dtype=torch.uint8)
            filtered = torch.cat([kind_of_filter, rows - above], 1)
            data = zlib.compress(filtered.numpy().tobytes())

            control = struct.pack(">IIIIIHHBB", number, width, height, 0, 0, delay.numerator,
                                  delay.denominator, 0, 0)
            file.write(chunk(b"fcTL", control))
            number += 1
            if t == 0:  # programs that know no APNG show this frame
                file.write(chunk(b"IDAT", data))
            else:
                file.write(chunk(b"fdAT", struct.pack(">I", number) + data))
                number += 1
        file.write(chunk(b"IEND", b""))
        file.seek(place_of_count)
        file.write(chunk(b"acTL", struct.pack(">II", t + 1, 0)))  # 0: again and again


# Kind of file -> codec and its options, for little loss.
CODECS = {"mp4": ("libx264", {"crf": "18"}), "avi": ("mpeg4", {"qmin": "2", "qmax": "4"})}


def write_video(path: Path, pictures: Iterator[Tensor], fps: float, kind: str):
    """MP4 or AVI, by PyAV."""
    av = pyav(f"{path}: a video file")
    codec, options = CODECS[kind]
    with av.open(str(path), "w", format=kind) as file:
        stream = file.add_stream(codec, Fraction(fps).limit_denominator(1001), options=options)
        stream.pix_fmt = "yuv420p"  # what players expect
        for t, shown in enumerate(pictures):
            if t == 0:
                stream.height, stream.width = shown.shape[:2]
            frame = av.VideoFrame.from_ndarray(shown.numpy(), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())  # the frames that the encoder still holds back


WRITERS = {
    "mp4": functools.partial(write_video, kind="mp4"),
    "avi": functools.partial(write_video, kind="avi"), "gif": write_gif, "png": write_png}


def file_to_write(output: str, video_format: str) -> tuple[Path, str]:
    """(path, name in WRITERS) for the flags --output and --video_format.

    Without a format the ending of the output decides. Without both it is mp4, or gif where PyAV
    is not installed.
    """
    ending = Path(output).suffix.lower().lstrip(".")
    if video_format == "auto":
        installed = importlib.util.find_spec("av") is not None
        video_format = ending if ending in WRITERS else "mp4" if installed else "gif"
    path = Path(output or f"video.{video_format}")
    if path.suffix.lower() != f".{video_format}":
        raise UsageError(f"--output {output}: expected a name that ends in .{video_format}, or "
                         f"--video_format with one of {', '.join(WRITERS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, video_format


# ----------------------------------------------------------------------------------------------
# The figure of visualize.py

ARGUMENTS = "VIDEO_OR_FOLDER --weights RUN_OR_FILE_OR_NAME"


@dataclass
class Config:
    # -- video
    weights: str = ""  # the network: a run, a released name such as dino_vits8, a URL, a file
    checkpoint_key: Literal["teacher",
                            "student"] = "teacher"  # which network of a training's two
    num_heads: int = 0  # attention heads, for a file that does not tell them; 0: of width 64
    method: Literal[*METHODS] = "attention"  # what is drawn beside each frame
    block: int = -1  # the block that is drawn; -1: the last
    # 0 is the rule of page_side: six times the network's own size, but at most 480 unless that
    # size is larger.
    image_size: int = 0  # shorter side in pixels; 0: the frame's, at most 480 or the network's own
    threshold: float = 0.0  # share of the attention that a third picture shows; 0: none
    maps_dir: str = ""  # a folder, without maps so far, to keep that of each frame in; empty: none
    video_only: bool = False  # make a video of a folder of pictures as they are, without weights
    # -- file
    fps: float = 0.0  # frames a second; 0: those of the video, or 30 for a folder
    video_format: Literal["auto", *WRITERS] = "auto"  # auto: as --output ends, mp4, or gif
    output: str = ""  # the video to write; empty: video.FORMAT in this folder
    # -- machine
    device: str = "auto"  # auto | cpu | cuda | mps


def open_vit(config, purpose: str) -> VisionTransformer:
    """The Vision Transformer of --weights.

    UsageError for a convnet, which lacks `purpose`, and for weights that are no numbers.
    """
    if not config.weights:
        raise UsageError("--weights: give a run, a file, or a released name such as dino_vits8")
    model = load_backbone(config.weights, config.checkpoint_key, config.num_heads)
    check_numbers(model, config.weights)
    if not isinstance(model, VisionTransformer):
        raise UsageError(f"--weights {config.weights}: a convnet, which has no {purpose}")
    return model


def draw(arguments: list[str], config: Config) -> Path:
    """Attention or PCA of each frame of a video, beside the frame."""
    if len(arguments) > 1:
        raise UsageError(f"video draws one video, not {len(arguments)}: {' '.join(arguments)}")
    require(config, lambda x: x < 1, "below 1", "threshold")
    require(config, lambda x: x == 0 or 0.01 <= x <= 1000, "0.01 to 1,000, or 0", "fps")
    if config.threshold and config.method != "attention":
        raise UsageError(
            f"--threshold is a share of attention, not of --method {config.method}")

    source = Path(arguments[0]).expanduser()
    path, kind = file_to_write(config.output, config.video_format)

    # Finished maps, perhaps edited or made elsewhere, only have to be put together.
    if config.video_only:
        frames = open_frames(source, 3)
        shown = (side_by_side([to_bytes(picture(frame))], "") for frame in frames.read(1))
        WRITERS[kind](path, shown, config.fps or frames.fps)
        return path

    process = start_process(config.device)
    model = open_vit(config, "patches").to(process.device)

    # What cannot be computed is refused before the first frame is.
    if not -model.depth <= config.block < model.depth:
        raise UsageError(
            f"--block {config.block}: the network has blocks 0 to {model.depth - 1}")
    frames = open_frames(source, model.channel_stats.channels)
    height, width = next(frames.read(1)).shape[1:]
    side = config.image_size or min(height, width, page_side(model.img_size, model.patch_size))
    if config.maps_dir:
        # Behind a shorter video the last maps of a longer one would stay, and --video_only would
        # play both. They may have been edited, so they are not deleted unasked.
        maps = Path(config.maps_dir)
        maps.mkdir(parents=True, exist_ok=True)
        if old := next(maps.glob("map-*.png"), None):
            raise UsageError(f"--maps_dir {maps}: it holds maps already, such as {old.name}; "
                             "expected a folder without any")

    patch = model.patch_size
    shown_side = min(fit(torch.zeros(3, height, width), side, patch).shape[1:])

    # The pictures are made one by one, whenever the writer asks for the next.
    method = METHODS[config.method](model, config.block)
    caption = (f"{method.title}, block {config.block % model.depth} of 0 to "
               f"{model.depth - 1}; {Path(config.weights).name}, shorter side {shown_side} px")
    if config.threshold:
        caption += f"; at the right the patches that hold {config.threshold:.0%} of it"
    report = Progress("video", frames.count, process)
    shown = pages(frames, method, side, process.device, caption, config.threshold,
                  config.maps_dir, report)
    WRITERS[kind](path, shown, config.fps or frames.fps)
    return path
