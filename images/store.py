"""Store: images where they are cheap to read, for sets that are slow to decode or too many
files.

    images --decode once, make small--> pixels.bin, sizes.bin: one memory map   (Cache)
    photos in tar files --list once--> (file, place, bytes) of each            (Shards)
                                               |
                  order of an epoch: shards shuffled, then each image delayed a little

Idea     A disk likes to read on where it is. So shards are visited one after the other, and
         images within some thousands of their neighbours change places: random enough to learn
         from, near enough to be one long read. The order is numbers, computed without reading
         anything, so that a run can be taken up at any step.
Paper    none; tar shards and shuffle buffers are WebDataset's (Aizman 2019)
Try      python -m images.store  a cache and shards of little images, and how fast they are read
Change   how far images are mixed: BUFFER; what a label is: Shards.list
Tests    pytest tests/images/test_store.py
"""

import glob
import hashlib
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

# ----------------------------------------------------------------------------------------------
# Decoded once


def shrink(image: Tensor, side: int) -> Tensor:
    """(3, H, W) uint8 with the short side at most `side` pixels; 0: as it is."""
    height, width = image.shape[-2:]
    short = min(height, width)
    if not side or short <= side:
        return image
    size = [max(side, round(x * side / short)) for x in (height, width)]
    return TF.resize(image, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


class Cache:
    """Images as bytes in one file, read through a memory map. Built at once, by `build`.

    pixels.bin holds image after image, sizes.bin (height, width, checksum) of each, written
    after its pixels: what sizes.bin has is whole. A build that was killed goes on where it was.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.sizes = np.fromfile(self.folder / "sizes.bin", np.uint32).reshape(-1, 3)
        ends = np.cumsum(3 * self.sizes[:, 0].astype(np.int64) * self.sizes[:, 1])
        self.starts = np.concatenate([[0], ends])
        some = self.starts[-1] > 0  # an empty file cannot be mapped
        self.pixels = np.memmap(self.folder / "pixels.bin", np.uint8, "r") if some else None

    def __reduce__(self):  # a memory map would be sent to a worker as its content
        return Cache, (self.folder,)

    def read(self, i: int) -> Tensor:
        """(3, H, W) uint8, channels last in memory, as from a decoder."""
        height, width, checksum = (int(x) for x in self.sizes[i])
        if not height:
            raise ValueError("it did not decode when the cache was built")
        data = np.array(self.pixels[self.starts[i]:self.starts[i + 1]])
        if zlib.crc32(data) != checksum:
            raise ValueError(f"{self.folder}/pixels.bin is damaged; remove the folder")
        return torch.from_numpy(data).view(height, width, 3).permute(2, 0, 1)  # (3, H, W)


class Shrunk(torch.utils.data.Dataset):
    """Image i as it is stored, (H, W, 3) uint8; one that does not decode is (0, 0, 3)."""

    def __init__(self, read, side: int):
        self.read, self.side = read, side

    def __getitem__(self, i: int) -> Tensor:
        try:
            return shrink(self.read(i), self.side).permute(1, 2, 0).contiguous()  # (H, W, 3)
        except Exception:  # whatever a decoder raises
            return torch.empty(0, 0, 3, dtype=torch.uint8)


def build(folder: Path, read, names: list[str], side: int, num_workers: int = 0,
          report=None) -> Cache:
    """The cache of read(0), read(1), ... in `folder`, made or completed. ValueError if it is
    not.

    One process builds; others that ask meanwhile wait. A few images are decoded again and
    compared: the folder may be an old one. `report` is called with the number of images done.
    """
    import fcntl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = {
        "images": len(names), "side": side,
        "names": hashlib.sha256("\n".join(names).encode()).hexdigest()}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system, however the process ends
        about = folder / "source.json"
        if not about.exists():
            aside = folder / "source.json.tmp"
            aside.write_text(json.dumps(source))
            os.replace(aside, about)
        known = json.loads(about.read_text())
        if known != source:
            raise ValueError(f"{folder} was made from {known['images']} images at "
                             f"{known['side']} px, not from these {len(names)} at {side} px; "
                             "give another folder, or remove it")
        complete(folder, Shrunk(read, side), len(names), num_workers, report)
    cache = Cache(folder)
    for i in np.linspace(0, len(names) - 1, min(8, len(names))).astype(int):
        if cache.sizes[i, 0] and not torch.equal(cache.read(i), shrink(read(int(i)), side)):
            raise ValueError(f"{folder}: {names[i]} has changed since it was made; remove it")
    return cache


def complete(folder: Path, images: Shrunk, count: int, num_workers: int, report=None):
    """Write what is missing after the last whole image."""
    with open(folder / "sizes.bin", "a+b") as sizes, open(folder / "pixels.bin",
                                                          "a+b") as pixels:
        done = sizes.tell() // 12
        sizes.seek(0)
        known = np.frombuffer(sizes.read(12 * done), np.uint32).reshape(-1, 3).astype(np.int64)
        ends = np.cumsum(3 * known[:, 0] * known[:, 1])
        done = int((ends <= pixels.tell()).sum())  # after a power cut pixels may be missing
        sizes.truncate(12 * done)
        pixels.truncate(int(ends[done - 1]) if done else 0)
        rest = torch.utils.data.Subset(images, range(done, count))
        loader = torch.utils.data.DataLoader(rest, batch_size=None, num_workers=num_workers)
        for i, image in enumerate(loader, done + 1):
            data = image.numpy()
            pixels.write(data)
            pixels.flush()
            sizes.write(np.array([*data.shape[:2], zlib.crc32(data)], np.uint32).tobytes())
            sizes.flush()
            if report:
                report(i)
        for file in (pixels, sizes):
            os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------
# Tar files of images

BUFFER = 4096  # places by which an image may be delayed
BLOCK = 2**22  # bytes that are asked of a disk at once


class Shards:
    """The images in all tar files that fit a pattern, by number.

    Labels are what NAME.cls says beside NAME.jpg (WebDataset), or else the first folder, where
    all images have one. A list of what is in a file is kept beside it, NAME.tar.index, if it
    may be.
    """

    def __init__(self, pattern: str, extensions: tuple[str, ...]):
        self.files = sorted(glob.glob(os.path.expanduser(pattern)))
        if not self.files:
            raise ValueError(
                f"{pattern}: no such file; expected tar files, as in 'shards:/data/train-*.tar'"
            )
        lists = [self.list(file) for file in self.files]
        rows = [(shard, *row) for shard, part in enumerate(lists) for row in part
                if row[0].lower().endswith(extensions)]
        if not rows:
            raise ValueError(
                f"{pattern}: found 0 images in {len(self.files)} tar files; expected "
                f"{', '.join(extensions)}")
        self.names = [f"{Path(self.files[shard]).name}/{name}" for shard, name, *_ in rows]
        self.places = np.array([(shard, start, size) for shard, _, start, size, _ in rows])
        said = [label for *_, label in rows]
        tops = [name.split("/")[0] if "/" in name else None for _, name, *_ in rows]
        said = said if None not in said else tops if len(set(tops)) > 1 else [None]
        self.classes = self.labels = None
        if None not in said:
            # Numbers by value, so that class 10 comes after class 9.
            numeric = all(label.isdigit() for label in said)
            self.classes = sorted(set(said), key=int if numeric else str)
            number = {label: i for i, label in enumerate(self.classes)}
            self.labels = [number[label] for label in said]

    @staticmethod
    def list(file: str) -> list:
        """[name, start, bytes, label or None] of each member, from the list beside it if
        valid.
        """
        stamp = [os.path.getsize(file), os.stat(file).st_mtime_ns]
        beside = Path(file + ".index")
        try:
            known = json.loads(beside.read_text())
            if known["stamp"] == stamp:
                return known["members"]
        except (OSError, ValueError, KeyError):
            pass
        try:
            with tarfile.open(file, "r:") as tar:
                found = [m for m in tar if m.isfile()]
                labels = {
                    m.name[:-4]: tar.extractfile(m).read().decode().strip()
                    for m in found if m.name.endswith(".cls")}
        except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no whole tar file ({error})") from None
        members = [[
            m.name.removeprefix("./"), m.offset_data, m.size,
            labels.get(os.path.splitext(m.name)[0])] for m in found]
        if members and members[-1][1] + members[-1][2] > stamp[0]:
            raise ValueError(f"{file} is no whole tar file (it ends within {members[-1][0]})")
        try:
            aside = Path(f"{beside}.{os.getpid()}.tmp")
            aside.write_text(json.dumps({"stamp": stamp, "members": members}))
            os.replace(aside, beside)
        except OSError:  # a place that is not ours to write to: listed again next time
            pass
        return members

    def bytes(self, i: int) -> bytes:
        """The i-th file. The disk is asked for all that lies around it, since that is next."""
        shard, start, size = (int(x) for x in self.places[i])
        handle = os.open(self.files[shard], os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, start // BLOCK * BLOCK, 2 * BLOCK,
                                 os.POSIX_FADV_WILLNEED)
            return os.pread(handle, size, start)
        finally:
            os.close(handle)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All numbers once: shards shuffled, each read from its beginning to its end, each
        image then delayed by up to BUFFER places.
        """
        ends = np.cumsum(np.bincount(self.places[:, 0], minlength=len(self.files)))
        parts = np.split(np.arange(len(self.places)), ends[:-1])
        stream = np.concatenate([parts[i] for i in rng.permutation(len(parts))])
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
        shards = Shards(f"{folder}/*.tar", (".jpg",))
        print(f"bytes from shards      {rate(shards.bytes)}")
        print(f"decoded from shards    {rate(lambda i: decode(io.BytesIO(shards.bytes(i))))}")
        cache = build(f"{folder}/cache", lambda i: decode(io.BytesIO(shards.bytes(i))), names,
                      256)
        print(f"from the cache         {rate(cache.read)}   {tuple(cache.read(0).shape)}")
        print(f"first of an epoch      {shards.order(np.random.default_rng(0))[:8].tolist()}")
