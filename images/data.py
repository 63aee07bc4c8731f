"""Data: images by name, in an order that can be taken up again at any step.

  "shapes" | "folder:PATH" | "list:FILE" | "shards:PATTERN" | a torchvision class   (or --cache)
                                   |
                  Images: read(i) -> (C, H, W), labels, names
                                   |
    Sampler: (epoch, step, index) from the seed --> Views: read, crop, colours --> DataLoader

Idea     No random generator lives longer than one image or one pass over the data, so there is
         no state of a generator to save. The order of a pass follows from (seed, epoch), the
         crops of an image from (seed, epoch, index). A resumed run differs only in the step
         that it starts counting from. With the same global batch, any number of workers and of
         processes sees the same images and crops in the same steps.
Paper    none; DINOv2's released loader takes another seed on resume, which changes the order
Try      python -m images.data [NAME ...]      what a data set holds, by name
Change   a new data set is a function that opens it, one that reads an image, and one line in
         DATASETS
Tests    pytest tests/images/test_data.py
"""

import contextlib
import inspect
import io
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from augment import RGB, ChannelStats, Masking, MultiCrop, collate
from machinery.flags import UsageError, command, user_errors
from machinery.process import STOPPING

# ----------------------------------------------------------------------------------------------
# A set of images
#
# An `Images` goes to the workers of the DataLoader. Where these are started as new processes
# (on macOS and Windows, and with Python 3.14 and later on Linux, too) it is sent to them by
# pickle, which does not write the code of a function but its module and name. A lambda, or a
# function within a function, cannot be found by its name. This is why small functions such as
# _read_part, _read_path, _draw_scene and begin_worker stand at the top level of this file.
# What such a function has to know (the folder, the names, the number of channels) is bound to
# it by functools.partial, which pickle writes together with the name.


@dataclass
class Images:
    """A set of images that are read one by one, by their numbers 0, 1, 2, ..."""

    name: str  # of the data set, as in --data
    read: Callable[[int],
                   Tensor]  # number -> (C, H, W), see images/files.py; raises if it cannot
    names: Sequence[str]  # one for each image, tells it apart; of files they are Names
    labels: list[int] | None = None  # one for each image; None where there are none
    classes: list[str] | None = None  # the name of each label, no two the same
    # Where reading in any order is slow: generator -> an order to read in. None stands for
    # "any": then the Sampler takes a random permutation.
    order: Callable[[np.random.Generator], np.ndarray] | None = None
    channel_stats: ChannelStats = RGB  # the channels, mean and spread that a network will be fed
    # Where images are drawn: (number, side) -> the same picture, drawn with `side` pixels.
    draw: Callable[[int, int], Tensor] | None = None
    split: str = ""  # train or val, if the set itself is divided so; empty: it is not
    root: Path | None = None  # where names are files: the folder that they are relative to

    def __len__(self) -> int:
        return len(self.names)

    def read_at(self, i: int, side: int) -> Tensor:
        """Image i drawn with `side` pixels, if it can be drawn; else as `read` gives it."""
        return self.draw(i, side) if self.draw else self.read(i)

    def subset(self, indices) -> "Images":
        """The images of these numbers alone; they are numbered anew, from 0."""
        # Whatever millions of images have one of each is kept in arrays: see images/names.py.
        indices = np.fromiter(indices, np.int64)
        read = partial(_read_part, self.read, indices)
        draw = self.draw and partial(_draw_part, self.draw, indices)
        in_a_list = isinstance(self.names, list)
        names = [self.names[i] for i in indices] if in_a_list else self.names[indices]
        labels = self.labels and [self.labels[i] for i in indices]
        order = self.order and partial(_order_of_part, self.order, indices)
        return replace(self, read=read, names=names, labels=labels, order=order, draw=draw)


def _read_part(read, indices: np.ndarray, i: int) -> Tensor:
    return read(int(indices[i]))


def _draw_part(draw, indices: np.ndarray, i: int, side: int) -> Tensor:
    return draw(int(indices[i]), side)


def _order_of_part(order, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The order of the whole set, less the images that are not in the part.

    Example: the part has the images 1, 3 and 4 of five, which it calls 0, 1 and 2. The order of
    the whole, 3 0 4 1 2, becomes 1 - 2 0 - in the part's numbers, and without the gaps 1 2 0.
    """
    whole = order(rng)
    new_index = np.full(len(whole), -1)  # old number -> new number, -1 if not in the part
    new_index[indices] = np.arange(len(indices))
    renumbered = new_index[whole]
    return renumbered[renumbered >= 0]


# ----------------------------------------------------------------------------------------------
# Data sets by name
#
# Each function takes (argument, split, root, download, channels) and returns Images. Of
# "folder:PATH:val", PATH is the argument and val the split, which is empty where none is named;
# root and download are --data_root and --download; channels are those that `read` has to give.
# A function that does not know of splits returns all images: open_images divides them.


def open_folder(argument: str, split: str, root: str, download: bool, channels: int) -> Images:
    """folder:PATH, all images below a folder; with :train or :val its folder of this name.

    Where all of them lie in folders, of which there are two at least, the first folder on the
    way to an image is its label; else there are no labels.
    """
    # Imported here, because drawn images have no files.
    from images.files import ARRAYS, EXTENSIONS
    from images.names import Names, labels_of_folders, list_images

    path = Path(os.path.expanduser(argument))
    if not argument or not path.is_dir():
        raise ValueError(f"folder:{argument}: there is no such folder")

    path, divided = _part_of_folder(path, split)

    # Names are relative to the folder. So they, and what is chosen by them (see held_out), stay
    # the same when the folder moves. Arrays count only where there is no other image: beside
    # photographs a .npy is more likely to be a depth map or a table of features.
    names = Names(list_images(path, EXTENSIONS)) or Names(list_images(path, ARRAYS))
    if not names:
        raise ValueError(f"folder:{argument}: found 0 images under it; expected "
                         f"{', '.join(EXTENSIONS + ARRAYS)} files, or folders of them")
    read = partial(_read_path, path, names, channels)

    return Images("folder", read, names, *labels_of_folders(path, names), split=divided,
                  root=path)


def open_list(argument: str, split: str, root: str, download: bool, channels: int) -> Images:
    """list:FILE, one path in each line, relative to the file's folder; a label behind a tab."""
    from images.names import read_list

    path = Path(os.path.expanduser(argument))
    names, labels, classes = read_list(path)
    read = partial(_read_path, path.parent, names, channels)
    return Images("list", read, names, labels, classes, root=path.parent)


def _part_of_folder(path: Path, split: str) -> tuple[Path, str]:
    """(folder of this split, the split); (path, "") where nothing in the folder divides it."""
    # If only one of the two folders is there, PATH with the other split is refused. Example: beside
    # PATH/val and PATH/cats, PATH:train might be meant as PATH/cats or as all images, of which
    # those of PATH/val are a part. And without a split nobody means train and val to be classes.
    parts = [part for part in ("train", "val") if (path / part).is_dir()]
    if not parts or not (split or len(parts) == 2):
        return path, ""
    if split not in parts:
        found = " and ".join(parts) + f", and no {split}" * bool(split)
        raise ValueError(f"{path} has {found}: give one, as in folder:{path}:{parts[0]}")
    return path / split, split


def _read_path(root: Path, names: Sequence[str], channels: int, i: int) -> Tensor:
    from images.files import patiently, read_file

    return patiently(read_file, root / names[i], channels)


class _Drawn:
    """Draws each image of a world once and keeps it: drawing takes longer than cropping.

    A small world is drawn before there are workers, so that all of them have it.
    """

    def __init__(self, world):
        self.world = world
        self.kept = {}  # number -> image, of those that were drawn
        # 10,000 images of 64 pixels take 120 MB. In a larger world each worker draws and keeps
        # the images that it is asked for.
        if len(world) <= 10_000:
            for i in range(len(world)):
                self(i)

    def __call__(self, i: int) -> Tensor:
        if i not in self.kept:
            self.kept[i] = torch.from_numpy(self.world[i][0])
        return self.kept[i]


@cache
def _drawn(split: str, count: int | None) -> _Drawn:
    """One object for each split and count, so that a program draws no world twice."""
    from images.shapes import Shapes  # the embedded world: other data sets do not need it

    return _Drawn(Shapes(split, count))


def open_shapes(argument: str, split: str, root: str, download: bool, channels: int) -> Images:
    """shapes, or shapes:N for N images, drawn by shapes.py; train and val share no image."""
    if argument and (not argument.isdecimal() or int(argument) == 0):
        raise ValueError(f"shapes:{argument}: expected a number of images, or nothing")
    split = split or "train"
    drawn = _drawn(split, int(argument or 0) or None)
    names = [f"{split}-{i:06d}" for i in range(len(drawn.world))]
    draw = partial(_draw_scene, drawn.world, channels)
    return Images("shapes", partial(_read_drawn, drawn, channels), names, drawn.world.labels,
                  drawn.world.classes, draw=draw, split=split)


def _with_channels(drawn: Tensor, channels: int) -> Tensor:
    if channels == 3:
        return drawn
    from images.files import in_channels  # few runs draw in grey

    return in_channels(drawn, channels)


def _read_drawn(drawn: _Drawn, channels: int, i: int) -> Tensor:
    return _with_channels(drawn(i), channels)


def _draw_scene(world, channels: int, i: int, side: int) -> Tensor:
    from images.shapes import render

    image, _, _ = render(world.scene(i), side)
    return _with_channels(torch.from_numpy(image), channels)


def open_shards(argument: str, split: str, root: str, download: bool, channels: int) -> Images:
    """shards:PATTERN, tar files of images, read nearly in order. Labels: see store.Shards."""
    from images import store  # tar files: few runs need them
    from images.files import ARRAYS, EXTENSIONS
    from images.names import Names

    shards = store.Shards(argument, EXTENSIONS + ARRAYS, Names)
    return Images("shards", partial(_read_shards, shards, channels), shards.names,
                  shards.labels, shards.classes, shards.order)


def _read_shards(shards, channels: int, i: int) -> Tensor:
    from images.files import patiently, read_file

    return read_file(io.BytesIO(patiently(shards.read_bytes, i)), channels)


DATASETS = {
    "shapes": open_shapes, "folder": open_folder, "list": open_list, "shards": open_shards}


def open_images(spec: str, root: str = "data", download: bool = False, flag: str = "--data",
                channel_stats: ChannelStats = RGB) -> Images:
    """NAME[:ARGUMENT][:train or :val] -> Images with these statistics of the channels.

    A ValueError names the flag, and for an unknown name the choices. Examples: shapes:100:val
    is the name shapes, the argument 100 and the split val; in folder:a:b the argument is a:b,
    because b is no split.
    """
    split = ""
    before, _, last = spec.rpartition(":")
    if before and last in ("train", "val"):
        spec = before
        split = last
    name, _, argument = spec.partition(":")
    if name not in DATASETS and not inspect.isclass(getattr(torchvision.datasets, name, None)):
        raise ValueError(
            f"{flag} {spec!r}: choose from {', '.join(DATASETS)} (as in folder:PATH), "
            "or a torchvision class name such as CIFAR10")

    try:
        if name in DATASETS:
            images = DATASETS[name](argument, split, root, download, channel_stats.channels)
        else:
            from images import torchvision_sets  # few runs need it

            images = torchvision_sets.open_torchvision(name, argument, split, root, download,
                                                       channel_stats.channels)

        # Labels of two sets are matched by the names of their classes (evaluation/extract.py).
        if repeated := repeated_class(images.classes or []):
            raise ValueError(f"{spec} has two classes called {repeated}, which cannot be told "
                             "apart; give each a name of its own")

        # A set that is not divided, of which a part is wanted. torchrun numbers the processes
        # by RANK, and one of them says it for all.
        if split and not images.split:
            part = part_by_name(images, split)
            if not len(part):
                raise ValueError(f"{spec}:{split}: by their names none of its {len(images)} "
                                 f"images is for {split}; give another set")
            if os.environ.get("RANK", "0") == "0":
                print(f"{flag} {spec}:{split}: the set itself has no such part; these are "
                      f"{len(part):,d} of its {len(images):,d} images, chosen by their names")
            images = part

        # Photographs have three channels, or are given them. Whether the images have another
        # number is found out by reading one of them now, and not by a worker hours later. A
        # file that is merely broken is no reason to stop: training replaces it (Views.read).
        if channel_stats.channels != 3:
            with contextlib.suppress(OSError):
                images.read(0)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None
    return replace(images, channel_stats=channel_stats)


def cached(images: Images, folder: str, side: int, num_workers: int = 0) -> Images:
    """The same images, read from a store.Cache in `folder`; it is built where there is none.

    side: pixels of the short side of what is kept, 0 for the images as they are. An empty
    `folder` means no cache: the images are returned unchanged.
    """
    if not folder:
        return images

    # The counter overwrites its own line, which makes sense in a terminal and nowhere else.
    def report(done):
        if sys.stderr.isatty() and (done % 100 == 0 or done == len(images)):
            print(f"\r--cache: {done:,d} of {len(images):,d} images", end="", file=sys.stderr,
                  flush=True)

    try:
        from images import store  # a cache: few runs need one

        built = store.build(Path(folder), images.read, images.names, side, num_workers, report)
    except (ValueError, OSError) as error:
        raise ValueError(f"--cache {error}") from None
    return replace(images, read=built.read)


def held_out(name: str, share: float = 0.05) -> bool:
    """Whether an image is kept back from training, to judge by: this share of all images.

    Chosen by a hash of its name. So it is the same images in every run, and adding or removing
    files does not change what is held out of the others.
    """
    return zlib.crc32(os.fsencode(name)) % 10_000 < 10_000 * share


def part_by_name(images: Images, split: str, share: float = 0.05) -> Images:
    """The part "val" of a set that is not divided: what held_out says; "train": all others."""
    chosen = (held_out(name, share) == (split == "val") for name in images.names)
    return images.subset(np.fromiter(chosen, bool, len(images)).nonzero()[0])


def repeated_class(classes: list[str]) -> str | None:
    """The first name that is there more than once; None if each class has its own."""
    counts = Counter(classes)
    return next((name for name in counts if counts[name] > 1), None)


# ----------------------------------------------------------------------------------------------
# Order, and the loader of training batches


class Sampler:
    """Batches of keys (epoch, step, index) for one process, from step `start` up to `steps`.

    An epoch here is one pass over the data: floor(length / global batch) steps; the images that
    are left over sit out this pass. Step s of a pass takes the s-th global batch of its
    permutation, and process r the r-th slice of that. `order` draws the permutation
    (Images.order).

    Example: 10 images, batches of 2 on each of 2 processes. The global batch is 4, and a pass
    has 10 // 4 = 2 steps. With seed 0 the permutations are

        epoch 0    4 6 | 2 7 | 3 5 | 9 0 | 8 1        epoch 1    9 1 | 3 8 | 7 6 | 0 4 | 2 5

        step 0    epoch 0    rank 0 gets 4 6    rank 1 gets 2 7
        step 1    epoch 0    rank 0 gets 3 5    rank 1 gets 9 0    8 and 1 sit out this pass
        step 2    epoch 1    rank 0 gets 9 1    rank 1 gets 3 8

    So rank 1 yields [(0, 0, 2), (0, 0, 7)], then [(0, 1, 9), (0, 1, 0)], then [(1, 2, 3), ...].
    One process with batches of 4 gets the same images in the same steps.
    """

    def __init__(self, length: int, batch_size: int, steps: int, start: int = 0, seed: int = 0,
                 rank: int = 0, world_size: int = 1, order=None):
        self.length = length
        self.batch_size = batch_size
        self.steps = steps
        self.start = start
        self.seed = seed
        self.rank = rank
        self.global_batch = batch_size * world_size
        # A lambda will do here: a sampler stays in the training process.
        self.order = order or (lambda rng: rng.permutation(length))
        self.steps_per_pass = length // self.global_batch
        if not self.steps_per_pass:
            raise ValueError(
                f"--batch_size_per_gpu {batch_size}: a global batch of "
                f"{self.global_batch} is larger than the data set of {length} images; "
                f"give at most {length // world_size or '1, on fewer processes'}")

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self):
        epoch = None
        for step in range(self.start, self.steps):
            # Every process draws the whole permutation, from a generator that is made for this
            # pass alone: nothing has to be exchanged, and a run that begins in the middle of a
            # pass has the permutation that it would have had.
            if epoch != step // self.steps_per_pass:
                epoch = step // self.steps_per_pass
                order = self.order(np.random.default_rng([self.seed, epoch]))

            # Where in the permutation the global batch of this step begins, and this process's
            # slice within it.
            first = step % self.steps_per_pass * self.global_batch + self.rank * self.batch_size
            yield [(epoch, step, int(i)) for i in order[first:first + self.batch_size]]


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its kind where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Views(torch.utils.data.Dataset):
    """Key (epoch, step, index) -> the crops of one image and the colours they will get.

    The dictionary of augment.MultiCrop, and in it also `index`, `step` (augment.collate draws
    the masks of a step from it) and `broken` (what could not be read).
    """

    def __init__(self, images: Images, multi_crop: MultiCrop, seed: int = 0):
        self.images = images
        self.multi_crop = multi_crop
        self.seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        epoch, step, index = key
        image, broken = self.read(epoch, index)
        # A generator of its own for each image and pass: whichever worker or process cuts the
        # crops, and whatever it did before, they are the same.
        rng = np.random.default_rng([self.seed, epoch, index])
        return dict(self.multi_crop(image, rng), index=index, step=step, broken=broken)

    def read(self, epoch: int, index: int) -> tuple[Tensor, list[str]]:
        """(image, broken): an image that cannot be read is replaced by another of the set.

        broken: a line for each that failed, its name and the error. A batch stays full this
        way, and one damaged file in millions does not end a run. UsageError when ten fail in
        turn, because then the set or the disk is wrong rather than a file.
        """
        broken = []
        # The 1 at the end makes this another generator than the one of the crops. What replaces
        # an image follows from the seed, as all else does.
        replacements = np.random.default_rng([self.seed, epoch, index, 1])
        for _ in range(10):
            try:
                return self.images.read(index), broken
            except Exception as error:  # decoders raise exceptions of many kinds
                broken.append(f"{self.images.names[index]}: {first_line(error)}")
                index = int(replacements.integers(len(self.images)))
        raise UsageError(f"--data: ten images in a row cannot be read, the last: {broken[-1]}")


def begin_worker(worker: int):
    """What each worker of the loader does first."""
    # The workers are processes that run side by side. If each of them also started as many
    # threads as there are cores, they would hinder one another.
    torch.set_num_threads(1)

    # Ctrl-C in a terminal, or its closing, reaches the workers, too, and they ignore it: the
    # training process may need their batches for its last step, and ends them afterwards.
    for number in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)

    # So it is with SIGTERM, which torchrun, systemd and others send to every process of a job.
    # But it is also the way in which the training process ends a worker, so it matters who sent
    # it. A function set by signal.signal is not told by whom a signal was sent. So SIGTERM is
    # blocked, which makes it wait, and a thread takes it with sigtimedwait, which tells the number
    # of the sending process. (macOS and Windows do not have it: there SIGTERM ends a worker,
    # whoever sent it.)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent():
    """End this worker when its training process asks for it by SIGTERM, or is gone."""
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 5)  # None after 5 seconds
        if received and received.si_pid == parent.pid:
            break
    os._exit(0)


PREFETCH = 2  # batches that each worker of training_loader prepares ahead


def training_loader(views: Views, sampler: Sampler, num_workers: int, pin_memory: bool = False,
                    masking: Masking | None = None):
    """A DataLoader of the batches of augment.collate, from the sampler's start to its end."""
    # Each worker prepares some batches ahead, so that one image that is slow to read does not
    # hold up the device. They wait in shared memory, which may be small (training/memory.py).
    return torch.utils.data.DataLoader(views, batch_sampler=sampler, num_workers=num_workers,
                                       collate_fn=partial(collate, masking=masking),
                                       pin_memory=pin_memory, worker_init_fn=begin_worker,
                                       prefetch_factor=PREFETCH if num_workers else None)


@command
def main(argv):
    """What the named sets hold."""
    for spec in argv or ["shapes:100", "shapes:100:val"]:
        with user_errors():
            images = open_images(spec)
        kinds = f"{len(set(images.labels))} classes" if images.labels else "no labels"
        # The first one, or another in its place where that file does not decode.
        image, _ = Views(images, None).read(0, 0)
        by_name = sum(map(held_out, images.names))
        print(f"{spec}: {len(images):,d} images, {kinds}, one of {tuple(image.shape)}, "
              f"{by_name:,d} of them held out by name")


if __name__ == "__main__":
    main()
