"""Store: two ways to keep millions of images so that they are read fast.

    images --decode once, make small--> pixels.bin, sizes.bin: one memory map   (Cache)
    photos in tar files --list once--> (file, start, bytes) of each            (Shards)
                                               |
                  order of an epoch: shards shuffled, then each image delayed a little

Idea     Where decoding is slow, a Cache keeps the decoded images, made smaller, in one file.
         Where there are too many images for a file each, Shards reads them out of tar files. A
         disk is fast when it reads on from where it is, and slow when it jumps. So shards are
         visited one after the other, and an image moves by some thousands of places at most:
         random enough to learn from, near enough to be one long read. The order is computed
         without reading anything, so a run can be taken up at any step.
Paper    none; tar shards and shuffle buffers are WebDataset's (Aizman 2019)
Try      python -m images.store  a cache and shards of little images, and how fast they are read
Change   how far images are mixed: BUFFER; what a label is: Shards.list_members
Tests    pytest tests/images/test_store.py
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import sys
import tarfile
import zlib
from array import array
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

# ----------------------------------------------------------------------------------------------
# Cache: images that are decoded once, for sets that are slow to decode
#
# Example: --cache FOLDER --cache_side 256 for two photographs, which become 256 x 340 and
# 300 x 256 pixels (height x width). The folder then has
#
#     source.json   {"images": 2, "side": 256, "names": "5f2c..."}     what it was made from
#     sizes.bin     256 340 checksum | 300 256 checksum                uint32: 12 bytes an image
#     pixels.bin    261,120 bytes    | 230,400 bytes                   height * width * 3 bytes
#     lock          empty; held by the process that builds
#
# The second image begins where the first one ends, at byte 256 * 340 * 3 = 261,120 of
# pixels.bin.


def shrink(image: Tensor, side: int) -> Tensor:
    """(3, H, W) uint8 with the short side at most `side` pixels; 0: as it is."""
    height, width = image.shape[-2:]
    short = min(height, width)
    if not side or short <= side:
        return image
    size = [max(side, round(x * side / short)) for x in (height, width)]
    return TF.resize(image, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


class Cache:
    """Decoded images in one file, read through a memory map. `build` makes it.

    With a memory map, the operating system loads the parts of the file that are asked for, and
    keeps what is used often, once for all processes.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.sizes = np.fromfile(self.folder / "sizes.bin", np.uint32).reshape(-1, 3)

        # Image i lies from starts[i] to starts[i + 1]. These are 64 bits wide: 32 bits count to
        # 4 GB, which is some 16,000 images of 256 x 340 pixels.
        ends = np.cumsum(3 * self.sizes[:, 0].astype(np.int64) * self.sizes[:, 1])
        self.starts = np.concatenate([[0], ends])

        # An empty file cannot be mapped: then no image has decoded, and `read` needs no pixels.
        self.pixels = None
        if self.starts[-1] > 0:
            self.pixels = np.memmap(self.folder / "pixels.bin", np.uint8, "r")

    def __reduce__(self):
        # What pickle sends to a worker: the folder, from which the worker opens the map again.
        # Without this it would send all pixels.
        return Cache, (self.folder,)

    def read(self, i: int) -> Tensor:
        """(3, H, W) uint8, channels last in memory, as from a decoder."""
        height, width, checksum = (int(x) for x in self.sizes[i])
        if not height:
            raise ValueError(
                f"it did not decode when {self.folder} was built; remove the folder "
                "to try again")
        # A copy in memory: the map is read-only, and torch expects memory that can be written.
        data = np.array(self.pixels[self.starts[i]:self.starts[i + 1]])
        if zlib.crc32(data) != checksum:
            raise ValueError(f"{self.folder}/pixels.bin is damaged; remove the folder")
        return torch.from_numpy(data).view(height, width, 3).permute(2, 0, 1)  # (3, H, W)


class Shrunk(torch.utils.data.Dataset):
    """Image i as it is stored, (H, W, 3) uint8; one that does not decode is (0, 0, 3).

    Where the disk fails it is a text that says so: an exception would come out of a worker as a
    page of calls.
    """

    def __init__(self, read, side: int):
        self.read = read
        self.side = side

    def __getitem__(self, i: int) -> Tensor | str:
        # Decoders raise exceptions of many kinds. Those of the operating system have a number: a
        # file that is not there or may not be read will not be there tomorrow, but a disk that
        # fails for a while must not cost an image for ever.
        try:
            return shrink(self.read(i), self.side).permute(1, 2, 0).contiguous()  # (H, W, 3)
        except MemoryError:
            raise
        except Exception as error:
            number = getattr(error, "errno", None)
            if number not in (None, errno.ENOENT, errno.EACCES, errno.ELOOP):
                return str(error)
            return torch.empty(0, 0, 3, dtype=torch.uint8)


def build(folder: Path, read, names: list[str], side: int, num_workers: int = 0,
          report=None) -> Cache:
    """The cache of read(0), read(1), ... in `folder`, made or completed.

    One process builds; others that ask meanwhile wait. `report` is called with the number of
    images done. ValueError if the folder was made from other images, or from these before they
    changed.
    """
    import fcntl  # only Unix has it, and only a cache needs it

    # What is written to source.json: a hash stands for the names, which may be millions.
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = {
        "images": len(names), "side": side,
        "names": hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()}

    with contextlib.ExitStack() as stack:
        # The system lets go of this lock when the process ends, even if it is killed. So a lock
        # never has to be removed by hand. Some network disks know no locks, and others cannot be
        # written to: a cache that is whole already can be used there all the same.
        with contextlib.suppress(OSError):
            lock = stack.enter_context(open(folder / "lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)

        # Written under another name and renamed: after a kill the file is whole or not there.
        source_file = folder / "source.json"
        if not source_file.exists():
            unfinished = folder / "source.json.tmp"
            unfinished.write_text(json.dumps(source))
            os.replace(unfinished, source_file)

        # A folder that was there before may be of other images.
        try:
            stored = json.loads(source_file.read_text())
            made_from = f"{stored['images']} images at {stored['side']} px"
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{source_file} is damaged; remove {folder}") from None
        if stored != source:
            raise ValueError(
                f"{folder} was made from {made_from}, not from these {len(names)} at "
                f"{side} px; give another folder, or remove it")
        complete(folder, Shrunk(read, side), len(names), num_workers, report)

    # Files of the same names may have got other pixels since. Eight images, evenly spread over
    # the set, are decoded again and compared; all of them would take as long as to build it.
    cache = Cache(folder)
    for i in np.linspace(0, len(names) - 1, min(8, len(names))).astype(int):
        if cache.sizes[i, 0] and not torch.equal(cache.read(i), shrink(read(int(i)), side)):
            raise ValueError(f"{folder}: {names[i]} has changed since it was made; remove it")
    return cache


def complete(folder: Path, images: Shrunk, count: int, num_workers: int, report=None):
    """Write what is missing after the last whole image.

    Each image's pixels are written before its size. So a build that is killed leaves whole
    images, for which sizes.bin has a record, and perhaps a piece of one more, which is cut off.
    Example: sizes.bin of 41 bytes has 3 whole records (36 bytes). If they promise 700,000 bytes
    and pixels.bin has 705,000, it is cut to 700,000, and the build goes on with image 3.
    """
    # A whole cache may lie where nothing can be written. (ValueError: half a record.)
    with contextlib.suppress(OSError, ValueError):
        cache = Cache(folder)
        if len(cache.sizes) == count and os.path.getsize(
                folder / "pixels.bin") == cache.starts[-1]:
            return

    with open(folder / "sizes.bin", "a+b") as sizes, open(folder / "pixels.bin",
                                                          "a+b") as pixels:
        # Files opened to append stand at their end: `tell` is their length.
        done = sizes.tell() // 12
        sizes.seek(0)
        records = np.frombuffer(sizes.read(12 * done), np.uint32)
        records = records.reshape(-1, 3).astype(np.int64)
        ends = np.cumsum(3 * records[:, 0] * records[:, 1])

        # After a power cut pixels may be missing, too: a disk writes in an order of its own.
        done = int((ends <= pixels.tell()).sum())
        sizes.truncate(12 * done)
        pixels.truncate(int(ends[done - 1]) if done else 0)

        # Workers decode side by side; the loader returns the images in their order. batch_size
        # None means no batches: images have different sizes.
        rest = torch.utils.data.Subset(images, range(done, count))
        loader = torch.utils.data.DataLoader(rest, batch_size=None, num_workers=num_workers)
        for i, image in enumerate(loader, done + 1):
            if isinstance(image, str):
                raise OSError(f"{image}; the same command goes on where it stopped")
            data = image.numpy()
            pixels.write(data)
            pixels.flush()
            sizes.write(np.array([*data.shape[:2], zlib.crc32(data)], np.uint32).tobytes())
            sizes.flush()
            if report:
                report(i)

        # fsync waits until the disk has everything: now the files survive a power cut.
        for file in (pixels, sizes):
            os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------
# Shards: images in tar files, for sets of too many files
#
# A tar file is its members one after the other, each behind a header of 512 bytes and filled up
# to a multiple of 512. So a member can be read without unpacking anything, once it is known
# where it begins. Example: train-000.tar, and the list that is kept beside it when it has been
# read through once, train-000.tar.index:
#
#     {"stamp": [2, 184320, 1700000000000000000],          LISTED, size and time of the tar file
#      "members": [["cats/01.jpg",   512, 84213, null],    name, first byte, bytes, label
#                  ["dogs/02.jpg", 85504, 91020, null]]}
#
# The labels are null, because the file has no members 01.cls and 02.cls; so the first folder of
# each name is the label here, cats or dogs.

BUFFER = 4096  # places by which an image may be delayed
BLOCK = 2**22  # bytes that are asked of a disk at once
LISTED = 2  # the version of list_members: the list of an earlier one is made again


def with_content(headers: list, file: str) -> list:
    """(header of a name, header before its content) of each file in a tar file.

    Both are the same but for links: GNU tar writes the content of a file of several names once,
    and for each further name a hard link to the first. A symbolic link may lead out of the tar
    file; those that do are left out, with a warning.
    """
    by_name = {os.path.normpath(entry.name): entry for entry in headers if entry.isfile()}
    pairs = []
    left_out = 0
    for entry in headers:
        # A hard link gives the whole name of the other file, a symbolic link the way to it from
        # its own folder. Example: cats/2.jpg -> ../dogs/1.jpg is dogs/1.jpg.
        source = entry if entry.isfile() else None
        if entry.islnk():
            source = by_name.get(os.path.normpath(entry.linkname))
        elif entry.issym():
            folder = os.path.dirname(entry.name)
            source = by_name.get(os.path.normpath(os.path.join(folder, entry.linkname)))
        if source:
            pairs.append((entry, source))
        elif entry.islnk() or entry.issym():
            left_out += 1
    if left_out and os.environ.get("RANK", "0") == "0":  # torchrun numbers its processes so
        print(
            f"warning: {file}: left out {left_out:,d} links to what is no file in it; tar's "
            "--dereference writes the files themselves", file=sys.stderr)
    return pairs


class Shards:
    """The images in all tar files that fit a pattern, by number.

    Labels are what NAME.cls says beside NAME.jpg (WebDataset), or else the first folder, where
    all images have one. names, labels and classes are those of data.Images.
    """

    def __init__(self, pattern: str, extensions: tuple[str, ...], collect=list):
        """collect: what makes a sequence of the names that come one by one."""
        # Without the lists that list_members writes beside them, whole and half-written ones.
        pattern = os.path.expanduser(pattern)
        files = [pattern] if os.path.isfile(pattern) else glob.glob(pattern)
        self.files = sorted(f for f in files if not f.endswith((".index", ".tmp")))
        expected = "expected tar files, as in 'shards:/data/train-*.tar'"
        if not self.files:
            raise ValueError(f"{pattern}: no such file; {expected}")
        for file in self.files:
            if not os.path.isfile(file):
                raise ValueError(f"{pattern}: {file} is no file; {expected}")

        # A name, a label and three numbers for each image are all that is kept in memory; pixels
        # stay on the disk. Equal labels are one object, by `intern`.
        places = array("q")  # (number of the tar file, first byte, bytes) of each image
        labels = []

        def names():
            for shard, file in enumerate(self.files):
                for name, start, size, label in self.list_members(file):
                    # The tar of macOS adds a member ._x.jpg to each x.jpg, which is no image.
                    hidden = any(part.startswith(".") for part in Path(name).parts)
                    if name.lower().endswith(extensions) and not hidden:
                        places.extend((shard, start, size))
                        labels.append(label and sys.intern(label))
                        yield f"{Path(file).name}/{name}"

        self.names = collect(names())
        if not places:
            raise ValueError(
                f"{pattern}: found 0 images in {len(self.files)} tar files; expected "
                f"{', '.join(extensions)}")
        self.places = np.frombuffer(places, np.int64).reshape(-1, 3)

        # Labels only where every image has one. A single folder for all tells nothing apart. In
        # x.tar/cats/01.jpg it is cats, and in x.tar/01.jpg there is none.
        if None in labels:
            labels = []
            for name in self.names:
                parts = name.split("/")
                labels.append(sys.intern(parts[1]) if len(parts) > 2 else None)
            if None in labels or len(set(labels)) < 2:
                labels = None

        # Labels that are numbers are sorted by value, so that class 10 comes after class 9. A
        # single label tells nothing apart.
        self.classes = self.labels = None
        if labels and len(set(labels)) > 1:
            numeric = all(label.isdigit() for label in labels)
            self.classes = sorted(set(labels), key=int if numeric else str)
            number = {label: i for i, label in enumerate(self.classes)}
            self.labels = [number[label] for label in labels]

    @staticmethod
    def list_members(file: str) -> list:
        """[name, first byte, bytes, label or None] of each member of a tar file.

        From the list beside it, if there is one and it is of this very file; else from the tar
        file itself, which has to be read through, header by header. ValueError for a file that
        is no tar file or is cut off.
        """
        length = os.path.getsize(file)
        stamp = [LISTED, length, os.stat(file).st_mtime_ns]
        list_file = Path(file + ".index")
        try:
            stored = json.loads(list_file.read_text())
            if stored["stamp"] == stamp:
                return stored["members"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no list, or one that is damaged or not ours: it is made again

        # "r:" takes uncompressed files only: in a compressed one no member could be read by its
        # place. A label is the content of a small member, so it is read at once.
        try:
            with tarfile.open(file, "r:") as tar:
                entries = with_content(tar.getmembers(), file)
                labels = {}  # name without its ending -> label
                for entry, source in entries:
                    if entry.name.endswith(".cls"):
                        content = tar.extractfile(source).read()
                        labels[entry.name[:-4]] = content.decode(errors="replace").strip()
                end = tar.offset  # where tarfile has looked for another header, and found none
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{file} is no whole tar file ({error}); expected one that is not "
                             "compressed") from None
        members = []
        for entry, source in entries:
            # What belongs together has the same name up to its first dot: 01.rgb.png and 01.cls.
            # Some write 01.a.png and 01.a.cls, which the name up to the last dot tells apart.
            folder, name = os.path.split(entry.name)
            first = os.path.join(folder, name.split(".")[0])
            label = labels.get(os.path.splitext(entry.name)[0], labels.get(first))
            members.append([
                entry.name.removeprefix("./"), source.offset_data, source.size, label])

        # tarfile does not notice when the content of the last member is cut off.
        for name, start, size, _ in members:
            if start + size > length:
                raise ValueError(f"{file} is no whole tar file (it ends within {name})")

        # Neither does it notice a damaged header, which it takes for the end, nor a file that is
        # cut off between two members. A tar file ends with blocks of zeros.
        with open(file, "rb") as tar:
            tar.seek(end)
            closing = tar.read(512)
        if len(closing) < 512 or any(closing):
            last = members[-1][0] if members else "the start"
            raise ValueError(
                f"{file} is no whole tar file (no header and no end behind {last}, "
                f"at byte {end:,d})")

        # Several processes may write the list at once, so each writes a file of its own name
        # and renames it when it is whole. Where the folder cannot be written to there is no
        # list, and the next run reads the tar file again.
        try:
            unfinished = Path(f"{list_file}.{os.getpid()}.tmp")
            unfinished.write_text(json.dumps({"stamp": stamp, "members": members}))
            os.replace(unfinished, list_file)
        except OSError:
            pass
        return members

    def read_bytes(self, i: int) -> bytes:
        """The i-th image, as it is in its file: not decoded."""
        # The file is opened for each image. An open file could not be shared by workers, and
        # its descriptor is cheap beside the decoding.
        shard, start, size = (int(x) for x in self.places[i])
        handle = os.open(self.files[shard], os.O_RDONLY)
        try:
            # By the order below, the images around this one are next. So the system is told
            # that the 8 MB here will be needed: it reads them in one go, while this call
            # returns at once. macOS does not have the call.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, start // BLOCK * BLOCK, 2 * BLOCK,
                                 os.POSIX_FADV_WILLNEED)
            return os.pread(handle, size, start)
        finally:
            os.close(handle)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All numbers once: whole shards in a random order, then each image a little delayed.

        The delay is up to BUFFER places. Example: two shards, 0 1 2 and 3 4 5, with BUFFER = 2.
        Shuffled, the second comes first. Images are sorted by place + delay:

            image      3     4     5     0     1     2
            place      0     1     2     3     4     5
            delay     1.8   0.3   0.1   1.5   0.2   0.6
            sum       1.8   1.3   2.1   4.5   4.2   5.6      order 4 3 5 1 0 2
        """
        # The numbers of each shard's images, and these parts end to end in a random order.
        ends = np.cumsum(np.bincount(self.places[:, 0], minlength=len(self.files)))
        parts = np.split(np.arange(len(self.places)), ends[:-1])
        stream = np.concatenate([parts[i] for i in rng.permutation(len(parts))])

        # WebDataset mixes by a buffer of images, from which it takes a random one at a time. To
        # resume, such a buffer has to be filled again; here the order is there at once.
        return stream[(np.arange(len(stream)) + BUFFER * rng.random(len(stream))).argsort()]


if __name__ == "__main__":
    import io
    import tempfile
    import time

    from PIL import Image

    def decode(file) -> Tensor:
        return TF.pil_to_tensor(Image.open(file).convert("RGB"))

    def rate(read, count=200) -> str:
        begun = time.perf_counter()
        for i in range(count):
            read(i)
        return f"{count / (time.perf_counter() - begun):8,.0f} images/s"

    # The same photograph of noise 200 times, in four tar files of 50.
    noise = torch.randint(256, (3, 24, 32), dtype=torch.uint8)
    image = TF.to_pil_image(TF.resize(noise, [375, 500]))
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{i % 2}/{i:03d}.jpg" for i in range(200)]
        for shard in range(4):
            with tarfile.open(f"{folder}/{shard}.tar", "w") as tar:
                for name in names[50 * shard:50 * (shard + 1)]:
                    jpeg = io.BytesIO()
                    image.save(jpeg, "JPEG")
                    info = tarfile.TarInfo(name)
                    info.size = len(jpeg.getvalue())
                    tar.addfile(info, io.BytesIO(jpeg.getvalue()))

        # Three rates: reading alone, reading and decoding, and reading what is decoded already.
        shards = Shards(f"{folder}/*.tar", (".jpg",))

        def read_and_decode(i: int) -> Tensor:
            return decode(io.BytesIO(shards.read_bytes(i)))

        cache = build(f"{folder}/cache", read_and_decode, names, 256)
        print(f"bytes from shards      {rate(shards.read_bytes)}")
        print(f"decoded from shards    {rate(read_and_decode)}")
        print(f"from the cache         {rate(cache.read)}   {tuple(cache.read(0).shape)}")
        print(f"first of an epoch      {shards.order(np.random.default_rng(0))[:8].tolist()}")
