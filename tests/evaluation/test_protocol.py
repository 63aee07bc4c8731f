"""Claims
1. Random crops of all processes together are those of one process; neighbours that belong
   together stay together.
2. A broken image among those to learn from is named, not replaced.
3. Kept features are used again; those of another network, of other images or of another size,
   those that are no numbers, and files of anything else are refused.
4. A file of --class_mapping renames classes, and a class without an image to learn from is
   named.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import run_evaluate

from evaluation.protocol import mapped_classes, open_judged, random_crops
from images.data import Images, open_images
from machinery.flags import UsageError
from machinery.process import Process
from vit import VisionTransformer


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_random_crops_of_all_processes_are_those_of_one(world):
    processes = [Process(torch.device("cpu"), rank, world) for rank in range(world)]
    images, alone = open_images("shapes:9"), Process(torch.device("cpu"))
    whole = list(random_crops(images, 8, 7, 2, alone))
    parts = [list(random_crops(images, 8, 7, 2, process, together=3)) for process in processes]
    for step, (crops, labels) in enumerate(whole):
        groups = [list(zip(*(v.split(3) for v in part[step]))) for part in parts]
        order = [groups[g % world][g // world] for g in range(3)]  # of 3, 3 and 1
        assert torch.equal(torch.cat([crops for crops, _ in order]), crops)
        assert torch.equal(torch.cat([labels for _, labels in order]), labels)


def test_a_broken_image_is_named(photos):
    (photos / "cats/05.png").write_bytes(b"not a picture")
    images = open_images(f"folder:{photos}")
    with pytest.raises(ValueError, match="does not decode: cats/05.png"):
        list(random_crops(images, 8, 24, 1, Process(torch.device("cpu"))))


def test_kept_features(small_backbone, photos, tmp_path, capsys):
    line = f"knn --weights {small_backbone} --data folder:{photos} --val_data folder:{photos} "
    line += "--nb_knn 1 20 --n_per_class 2"
    kept = dict(output_dir=tmp_path / "out", features_dir=tmp_path / "kept")
    first = run_evaluate(line, **kept)
    (photos / "cats/01.png").write_bytes(b"not read again")
    assert run_evaluate(line, **kept)["knn"] == first["knn"]

    def check_refused(words, line=line):
        with pytest.raises(SystemExit):
            run_evaluate(line, **kept)
        assert words in capsys.readouterr().err

    check_refused("other images", line.replace(f"folder:{photos}", "shapes:24"))
    check_refused("other protocol", line + " --image_size 8")
    torch.manual_seed(1)
    other = VisionTransformer(16, 8, embed_dim=64, depth=4, num_heads=1)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    check_refused("other weights", line.replace(small_backbone, str(tmp_path / "other.pth")))
    file = tmp_path / "kept/knn-data.pt"
    content = torch.load(file)
    content["rows"][3, 5] = torch.nan
    torch.save(content, file)
    check_refused("1 of 24 images have features that are no numbers")
    file.write_bytes(b"nothing")
    check_refused("holds no features")


def test_classes_by_other_names(tmp_path):
    train = Images("a", None, list("abc"), [0, 1, 1], ["cat", "dog", "owl"])
    val = Images("b", None, list("de"), [1, 0], ["eule", "katze"])
    file = tmp_path / "map.csv"
    file.write_text("katze, cat\n\neule,dog\n")
    assert mapped_classes(str(file), "val_data", val) == ["dog", "cat"]
    config = SimpleNamespace(class_mapping=str(file), data="a", val_data="b")
    extractor = SimpleNamespace(config=config, open=lambda flag: val)
    assert open_judged(extractor, train)[1].tolist() == [0, 1]
    file.write_text("katze, cat\neule, owl\n")  # no image of an owl to learn from
    with pytest.raises(UsageError, match="--data a has no image of 1 classes .* first: owl"):
        open_judged(extractor, train)
    file.write_text("katze cat\n")
    with pytest.raises(UsageError,
                       match="--class_mapping .*expected lines 'class in --val_data"):
        open_judged(extractor, train)
