"""Claims
1. A cached image is the source's, byte for byte, or the source's made smaller by torchvision.
2. A build that was killed anywhere, or ran twice at once, ends with the same files; what was
   whole is not decoded again.
3. Another source, a changed one and a damaged cache are refused, naming the folder.
4. Shards give each file's own bytes and labels; a broken image is named, half a tar file refused.
5. An epoch's order has every image once, near its place in a shuffled row of shards.
6. A run on shards with a cache, killed and run again, has the same weights, bit for bit.
"""

import errno
import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import killed_in_step

import train
from augment import MultiCrop
from images import store
from images.data import Images, Sampler, Views, cached, open_images, training_loader
from images.files import EXTENSIONS
from machinery.flags import UsageError, parse
from training.config import Config
from training.recipes import PRESETS

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def shards(photos, tmp_path):
    """The 24 photos in three tar files of 8; the pattern of their names."""
    files = sorted(photos.rglob("*.*"), key=lambda path: path.name)
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for path in files[8 * shard:8 * (shard + 1)]:
                tar.add(path, str(path.relative_to(photos)))
    return str(tmp_path / "*.tar")


def content(folder):
    return [(folder / name).read_bytes() for name in ("pixels.bin", "sizes.bin")]


# -- 1: the source's bytes


@pytest.mark.parametrize("side", [0, 32, 1000])
def test_cached_images_are_the_sources(side, photos, tmp_path):
    images = open_images(f"folder:{photos}")
    kept = cached(images, str(tmp_path / "cache"), side)
    assert kept.labels == images.labels and kept.names == images.names
    for i in range(len(images)):
        source = images.read(i)
        if side == 32:
            height, width = source.shape[1:]
            short = min(height, width)
            size = (round(height * 32 / short), round(width * 32 / short))
            source = torchvision.transforms.v2.functional.resize(
                source, size, interpolation=torchvision.transforms.InterpolationMode.BICUBIC)
        assert torch.equal(kept.read(i), source)
    assert cached(images, "", side) is images


def test_batches_do_not_depend_on_workers_or_pickling(photos, tmp_path):
    kept = cached(open_images(f"folder:{photos}"), str(tmp_path / "cache"), 32, num_workers=2)
    crops = MultiCrop(24, 16, 2, 2)
    loaders = [
        training_loader(Views(images, crops, 3), Sampler(24, 8, 3), workers)
        for images, workers in ((kept, 0), (kept, 2))]
    for a, b in zip(*loaders, strict=True):
        assert torch.equal(a["global_crops"], b["global_crops"])
    sent = pickle.dumps(kept)
    assert len(sent) < 10_000 and torch.equal(pickle.loads(sent).read(5), kept.read(5))


# -- 2: builds that were cut off


def test_continues_after_any_cut(photos, tmp_path):
    """Files as a kill leaves them, at every kind of place: within pixels, within a record."""
    images = open_images(f"folder:{photos}")
    whole = tmp_path / "whole"
    store.build(whole, images.read, images.names, 32)
    pixels, sizes = content(whole)
    rng = np.random.default_rng(0)
    calls = []  # which images were decoded

    def counted(i):
        calls.append(i)
        return images.read(i)

    cuts = [(int(rng.integers(len(pixels))), int(rng.integers(len(sizes)))) for _ in range(12)]
    for at_pixel, at_size in [(0, 0), (1, 0), (0, 5), (len(pixels), 12 * 7 + 5), *cuts]:
        folder = tmp_path / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        (folder / "pixels.bin").write_bytes(pixels[:at_pixel])
        (folder / "sizes.bin").write_bytes(sizes[:at_size])
        calls.clear()
        store.build(folder, counted, images.names, 32)
        assert content(folder) == [pixels, sizes]
        ends = np.cumsum(
            3 * np.prod(np.frombuffer(sizes, np.uint32).reshape(-1, 3)[:, :2].astype(int), 1))
        whole_images = min(at_size // 12, int((ends <= at_pixel).sum()))
        checks = min(8, len(images))
        assert calls[:len(calls) - checks] == list(range(whole_images, len(images)))


def test_killed_while_it_builds(photos, tmp_path):
    images = open_images(f"folder:{photos}")

    def dies(i):
        if i == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return images.read(i)

    child = multiprocessing.get_context("fork").Process(
        target=store.build, args=(tmp_path / "cut", dies, images.names, 32))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(store.Cache(tmp_path / "cut").sizes) == 11
    for name in ("cut", "whole"):
        store.build(tmp_path / name, images.read, images.names, 32)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_two_at_once(photos, tmp_path):
    images = open_images(f"folder:{photos}")
    children = [
        multiprocessing.get_context("fork").Process(
            target=store.build, args=(tmp_path / "both", images.read, images.names, 32))
        for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    store.build(tmp_path / "one", images.read, images.names, 32)
    assert content(tmp_path / "both") == content(tmp_path / "one")


# -- 3: what is refused


def test_another_source_is_refused(photos, tmp_path):
    images, folder = open_images(f"folder:{photos}"), tmp_path / "cache"
    store.build(folder, images.read, images.names, 32)
    before = content(folder)
    for names, side in (([*images.names[:-1], "new.png"], 32), (images.names, 48)):
        with pytest.raises(ValueError,
                           match="--cache .*cache was made from 24 images at 32 px"):
            cached(Images("x", images.read, names), str(folder), side)
    assert content(folder) == before
    first = photos / images.names[0]
    shutil.copy(photos / images.names[6], first)
    with pytest.raises(ValueError, match=f"{images.names[0]} has changed"):
        cached(images, str(folder), 32)


def test_broken_images_and_broken_caches(photos, tmp_path):
    (photos / "cats" / "05.png").write_bytes(b"no")
    images, folder = open_images(f"folder:{photos}"), tmp_path / "cache"
    broken = images.names.index("cats/05.png")
    kept = cached(images, str(folder), 32)
    with pytest.raises(ValueError, match="did not decode"):
        kept.read(broken)
    assert Views(kept, MultiCrop(24, 16, 2, 0))[0, 0,
                                                broken]["broken"][0].startswith("cats/05.png")
    pixels = bytearray((folder / "pixels.bin").read_bytes())
    pixels[1000] ^= 1
    (folder / "pixels.bin").write_bytes(pixels)
    with pytest.raises(ValueError, match="is damaged"):
        store.Cache(folder).read(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_for_a_while_costs_no_image(workers, photos, tmp_path):
    """The build stops and goes on later; a file that is not there is stored as broken."""
    images = open_images(f"folder:{photos}")
    folder = tmp_path / "cache"

    def fails(i):
        if i == 5:
            raise OSError(errno.ESTALE, "Stale file handle")
        return images.read(i)

    with pytest.raises(OSError, match="Stale") as stop:
        store.build(folder, fails, images.names, 32, workers)
    assert "\n" not in str(stop.value)
    (photos / images.names[7]).unlink()
    built = store.build(folder, images.read, images.names, 32)
    assert [i for i in range(len(images)) if not built.sizes[i, 0]] == [7]
    with pytest.raises(ValueError, match="did not decode when .*/cache was built; remove"):
        built.read(7)


def test_a_cache_on_a_disk_without_locks_or_without_writing(photos, tmp_path, monkeypatch):
    images = open_images(f"folder:{photos}")
    folder = tmp_path / "cache"

    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    made = content(folder) if store.build(folder, images.read, images.names, 32) else None
    opened = []

    def not_for_writing(file, mode="r", *args, **kwargs):
        opened.append(mode)
        if set(mode) & set("wa+"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(file, mode, *args, **kwargs)

    monkeypatch.setattr(store, "open", not_for_writing, raising=False)
    assert store.build(folder, images.read, images.names, 32).read(3).shape[0] == 3
    assert content(folder) == made and opened == ["w"]


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_a_damaged_note_of_the_source(text, photos, tmp_path):
    images = open_images(f"folder:{photos}")
    cached(images, str(tmp_path / "cache"), 32)
    (tmp_path / "cache/source.json").write_text(text)
    with pytest.raises(ValueError, match="source.json is damaged; remove .*cache"):
        cached(images, str(tmp_path / "cache"), 32)


# -- 4: tar files


def test_shards_have_what_was_put_in(photos, shards):
    images, files = open_images(f"shards:{shards}"), open_images(f"folder:{photos}")
    assert len(images) == 24 and images.classes == ["cats", "dogs"]
    for i, name in enumerate(images.names):
        j = files.names.index(name.split("/", 1)[1])
        assert torch.equal(images.read(i),
                           files.read(j)) and images.labels[i] == files.labels[j]


def test_labels_of_webdataset(photos, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i, label in enumerate(["9", "10", "9"]):
            tar.add(sorted(photos.rglob("*.*"))[i], f"./{i:03d}.png")
            info = tarfile.TarInfo(f"./{i:03d}.cls")
            info.size = len(label)
            tar.addfile(info, io.BytesIO(label.encode()))
    images = open_images(f"shards:{tmp_path}/x.tar")
    assert images.classes == ["9", "10"] and images.labels == [0, 1, 0]
    assert images.names[0] == "x.tar/000.png"

    # A name may have more parts behind its first dot, and what belongs to it has the first.
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        for name in ("0.rgb", "1.rgb", "2.a", "2.b"):
            tar.add(sorted(photos.rglob("*.*"))[0], f"z.d/{name}.png")
        for name, label in (("0", "9"), ("1", "10"), ("2.a", "9"), ("2.b", "10")):
            info = tarfile.TarInfo(f"z.d/{name}.cls")
            info.size = len(label)
            tar.addfile(info, io.BytesIO(label.encode()))
    assert open_images(f"shards:{tmp_path}/y.tar").labels == [0, 1, 0, 1]


def test_links_in_a_shard(photos, tmp_path, capsys):
    """What tar writes for a file of two names; symbolic links that lead in and out of it."""
    first, second = sorted(photos.rglob("*.*"))[:2]
    folder = tmp_path / "set"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
    shutil.copy(first, folder / "cats/1.jpg")
    os.link(folder / "cats/1.jpg", folder / "cats/2.jpg")
    shutil.copy(second, folder / "dogs/3.jpg")
    (folder / "dogs/4.jpg").symlink_to("../cats/1.jpg")
    (folder / "dogs/5.jpg").symlink_to(second)  # no file of the tar file
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, ".")
    found = store.Shards(f"{tmp_path}/x.tar", EXTENSIONS)
    expected = {
        "cats/1.jpg": first, "cats/2.jpg": first, "dogs/3.jpg": second, "dogs/4.jpg": first}
    assert {name.removeprefix("x.tar/") for name in found.names} == {*expected}
    for i, name in enumerate(found.names):
        assert found.read_bytes(i) == expected[name.removeprefix("x.tar/")].read_bytes()
    assert found.classes == ["cats", "dogs"] and len(found.labels) == 4
    assert "x.tar: left out 1 links to what is no file in it" in capsys.readouterr().err


def test_the_list_of_an_earlier_version_is_made_again(shards, tmp_path):
    names = store.Shards(shards, EXTENSIONS).names
    list_file = tmp_path / "0.tar.index"
    listed = json.loads(list_file.read_text())
    list_file.write_text(json.dumps({"stamp": listed["stamp"][1:], "members": []}))
    assert store.Shards(shards, EXTENSIONS).names == names


def test_the_list_beside_a_shard(shards, tmp_path):
    first = store.Shards(shards, EXTENSIONS)
    list_file = tmp_path / "0.tar.index"
    listed = json.loads(list_file.read_text())
    listed["members"] = listed["members"][:3]
    list_file.write_text(json.dumps(listed))
    assert len(store.Shards(shards, EXTENSIONS).names) == 19  # it is believed
    os.utime(tmp_path / "0.tar", ns=(0, 0))  # another file: it is not
    assert store.Shards(shards, EXTENSIONS).names == first.names
    for damaged in ("{", "[]", "7"):
        list_file.write_text(damaged)
        assert store.Shards(shards, EXTENSIONS).names == first.names


def test_the_lists_are_no_shards(shards):
    pattern = shards.replace("*.tar", "[0-9]*")
    names = store.Shards(pattern, EXTENSIONS).names  # which writes the lists
    open(shards.replace("*", "0") + ".index.7.tmp", "w").close()
    assert os.path.exists(shards.replace("*", "0") + ".index")
    assert store.Shards(pattern, EXTENSIONS).names == names


def test_no_shards_and_half_shards(shards, tmp_path):
    cases = (("/none/*.tar", "--data /none"), (f"{tmp_path}/*.index", "no such file"),
             (tmp_path, f"--data {tmp_path}: .* is no file"))
    for pattern, words in cases:
        open_images(f"shards:{shards}")  # leaves lists, which are no tar files
        with pytest.raises(ValueError, match=words):
            open_images(f"shards:{pattern}")
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "a [1].tar").write_bytes(whole)  # a file, and no pattern
    assert len(open_images(f"shards:{tmp_path}/a [1].tar"))
    (tmp_path / "a [1].tar").unlink()
    for size in (1000, len(whole) // 2, 700):
        (tmp_path / "1.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="1.tar is no whole tar file"):
            open_images(f"shards:{shards}")


@pytest.mark.parametrize("how", ["flipped", "cut in a header", "cut between two", "compressed"])
def test_damaged_shards_do_not_lose_images_in_silence(how, shards, tmp_path):
    """tarfile takes a header that it cannot read, and the end of the file, for the end."""
    file = tmp_path / "0.tar"
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        fourth = [entry for entry in tar if entry.isfile()][3].offset
    if how == "flipped":
        content[fourth] ^= 1
    elif how == "compressed":
        content = gzip.compress(bytes(content))
    else:
        content = content[:fourth + 100 * (how == "cut in a header")]
    file.write_bytes(content)
    words = "not compressed" if how == "compressed" else "no header and no end behind"
    with pytest.raises(ValueError, match=f"0.tar is no whole tar file .*{words}"):
        store.Shards(shards, EXTENSIONS)
    assert not Path(f"{file}.index").exists()


def test_a_single_label_tells_nothing_apart(photos, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(2):
            tar.add(sorted(photos.rglob("*.*"))[i], f"{i}.png")
            info = tarfile.TarInfo(f"{i}.cls")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"3"))
    images = open_images(f"shards:{tmp_path}/x.tar")
    assert len(images) == 2 and images.labels is None and images.classes is None


def test_a_broken_image_of_a_shard_is_named(photos, shards):
    (photos / "cats" / "01.png").write_bytes(b"not an image")
    with tarfile.open(shards.replace("*", "0"), "w") as tar:
        for path in sorted(photos.rglob("*.*")):
            tar.add(path, str(path.relative_to(photos)))
    images = open_images(f"shards:{shards}")
    views = Views(images, MultiCrop(24, 16, 2, 0))
    name = "0.tar/cats/01.png"
    line = f"{name}: this is no image that Pillow can read"
    assert views[0, 0, images.names.index(name)]["broken"][0] == line


# -- 5: the order of an epoch


def test_order_of_an_epoch(shards, monkeypatch):
    images = open_images(f"shards:{shards}")

    def order(seed):
        return images.order(np.random.default_rng([0, seed]))

    monkeypatch.setattr(store, "BUFFER", 5)
    one = order(0)
    assert sorted(one) == list(range(24)) and (one == order(0)).all() and (one
                                                                           != order(1)).any()
    monkeypatch.setattr(store, "BUFFER", 0)
    row = order(0)  # the same shards one after the other, each in order
    assert all((part == part[0] + np.arange(8)).all() for part in row.reshape(3, 8))
    place = np.empty(24, int)
    place[row] = np.arange(24)
    moved = np.arange(24) - place[one]
    assert np.abs(moved).max() <= 5 and (moved != 0).sum() > 10
    first = {tuple(order(seed)[::8] // 8) for seed in range(40)}
    assert len(first) == 6  # all orders of three shards


def test_order_of_a_part(shards):
    some = [1, 5, 6, 17, 23]
    images = open_images(f"shards:{shards}")
    part = images.subset(some)
    whole, of_part = (x.order(np.random.default_rng(4)) for x in (images, part))
    assert [some[i] for i in of_part] == [i for i in whole if i in some]


def test_a_step_in_an_epoch_does_not_depend_on_where_one_began(shards):
    images = open_images(f"shards:{shards}")

    def keys(**how):
        return list(Sampler(24, steps=11, seed=5, order=images.order, **how))

    whole = keys(batch_size=6)
    assert keys(batch_size=6, start=7) == whole[7:]
    halves = [keys(batch_size=3, rank=r, world_size=2) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == whole
    assert len({i for batch in whole[:4] for _, _, i in batch}) == 24


# -- 6: a run


def test_a_run_on_shards_with_a_cache(tiny, tmp_path, shards):
    flags = [f"shards:{shards}" if flag == "shapes:64" else flag for flag in tiny]
    flags += ["--val_data", "", "--val_share", "0.2"]
    flags += ["--cache", str(tmp_path / "cache"), "--cache_side", "32", "--save_every", "2"]

    def run(name, *more):
        train.run(parse(Config, [*flags, *more, "--output_dir", str(tmp_path / name)], PRESETS))
        return torch.load(tmp_path / name / "teacher.pt", weights_only=True)

    whole = run("whole")
    with killed_in_step(4):
        run("broken")
    broken = run("broken", "--num_workers", "1")
    assert all(torch.equal(whole[k], broken[k]) for k in whole)
    with pytest.raises(UsageError, match="--cache_side 48"):
        run("broken", "--cache_side", "48", "--cache", str(tmp_path / "other"))
