"""Claims
1. mIoU, accuracy and the IoU of each class equal a plain count of pixels; ignored pixels and
   classes that do not occur do not count.
2. The task learns: on a world in which the colour tells the class it is nearly right, and the
   head it saves gives the same figures without training. Classes that no mask to learn from has
   are not answered.
3. Every scale and the mirror image take part; protocols set what no flag has set.
4. What does not fit is refused with one line.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import copy_of, run_evaluate
from PIL import Image

from augment import RGB
from backbones.dense_heads import SegmentationHead
from evaluation.dense import with_protocol
from evaluation.segment import PROTOCOLS, Config, confusion, read_segmenter, scores, segment
from images.pairs import IGNORE
from machinery.flags import parse
from machinery.process import start_process
from vit import VisionTransformer


def test_figures_against_a_count():
    rng = np.random.default_rng(0)
    truth = rng.integers(-1, 5, (30, 40))  # -1 is IGNORE
    predicted = rng.integers(0, 6, (30, 40))
    figures = scores(confusion(torch.from_numpy(truth), torch.from_numpy(predicted), 7))
    judged = truth != IGNORE
    expected = []
    for c in range(6):
        both = ((truth == c) & (predicted == c)).sum()
        either = (((truth == c) | (predicted == c)) & judged).sum()
        expected.append(both / either)
    assert figures["iou"][:6] == pytest.approx(expected, rel=1e-12)
    assert figures["iou"][6] is None
    assert figures["miou"] == pytest.approx(np.mean(expected), rel=1e-12)
    right = (truth == predicted)[judged].mean()
    assert figures["accuracy"] == pytest.approx(right, rel=1e-12)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Six pairs of 32 x 48 pixels: the left is red, the right green, some of it ignored."""
    folder = tmp_path_factory.mktemp("colours")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(6):
        pixels = np.full((32, 48, 3), 30, np.uint8)
        mask = np.zeros((32, 48), np.uint8)
        edge = 16 + 4 * i  # somewhere between the patches
        pixels[:, :edge, 0] = 220
        pixels[:, edge:, 1] = 220
        mask[:, edge:] = 1
        mask[:3] = 9
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
    return folder


def test_the_task(small_backbone, colours, tmp_path, capsys):
    line = (
        f"segment --weights {small_backbone} --data pairs:{colours} --val_data "
        f"pairs:{copy_of(colours)} --ignore_label 9 --image_size 32 --head_batch 4 --head_lr 0.1"
    )
    results = run_evaluate(f"{line} --steps 25 --last_blocks 2", output_dir=tmp_path)
    figures = results["segment"]
    assert figures["classes"] == ["class 0", "class 1"]
    assert figures["miou"] > 0.85 and figures["accuracy"] > 0.9
    assert f"mIoU {figures['miou']:.2%}" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["segment"] == figures
    assert Image.open(tmp_path / "segment.png").size[0] > 500

    again = run_evaluate(line, head=tmp_path / "head.pt", output_dir=tmp_path / "again")
    assert again["segment"] == figures and again["image_size"] == 32
    more = f"{line} --scales 1.0 1.5 --flip"
    several = run_evaluate(more, head=tmp_path / "head.pt", output_dir=tmp_path / "again")
    assert several["segment"]["miou"] > 0.85 and several["segment"] != figures


def test_classes_that_no_mask_has_are_not_answered(small_backbone, colours, tmp_path):
    """After one step the head knows nothing, and would answer the classes 2 to 8, too."""
    line = (f"segment --weights {small_backbone} --data pairs:{colours} --val_data "
            f"pairs:{copy_of(colours)} --image_size 32 --steps 1 --head_batch 4")
    trained = run_evaluate(line, output_dir=tmp_path)["segment"]
    assert len(trained["classes"]) == 10  # 0, 1 and 9 are there
    assert trained["iou"][2:9] == [None] * 7
    again = run_evaluate(line, head=tmp_path / "head.pt", output_dir=tmp_path / "again")
    assert again["segment"] == trained


def test_protocols():
    config = with_protocol(parse(Config, "--protocol ade20k_ms --steps 7".split()), PROTOCOLS)
    assert config.steps == 7 and config.last_blocks == 4 and config.image_size == 640
    config = with_protocol(parse(Config, []), PROTOCOLS)
    assert config.steps == 300 and config.head_batch == 16


def test_probabilities_are_averaged_over_mirror_images():
    """Class 2 would win by the mean of the logits, and class 1 wins by that of probabilities."""
    answers = iter([[4.0, 0, 3], [0, 5.0, 3]])  # for the image, for its mirror image

    def segmenter(part):
        return torch.tensor(next(answers))[None, :, None, None].expand(1, 3, 16, 16)

    segmenter.patch_size = 8
    config = Config(scales=(1.0,), flip=True, precision="fp32")
    classes = segment(segmenter, torch.zeros(3, 16, 16), RGB, 16, config, start_process("cpu"))
    assert (classes == 1).all()


def test_a_head_goes_where_its_backbone_is(tmp_path):
    torch.save(SegmentationHead(64, 3).state_dict(), tmp_path / "three.pt")
    with torch.device("meta"):  # stands for a GPU
        backbone = VisionTransformer(16, 8, embed_dim=64, depth=2, num_heads=1)
    segmenter = read_segmenter(str(tmp_path / "three.pt"), backbone, 3)
    assert all(p.device.type == "meta" for p in segmenter.parameters())


def test_misfits(small_backbone, colours, tmp_path, capsys):
    line = (f"segment --weights {small_backbone} --data pairs:{colours} --val_data "
            f"pairs:{copy_of(colours)} --image_size 32 --steps 1 --head_batch 2 "
            f"--output_dir {tmp_path} ")

    def refused(more):
        with pytest.raises(SystemExit) as stop:
            run_evaluate(line + more)
        assert stop.value.code == 2
        return capsys.readouterr().err

    torch.save(SegmentationHead(64, 3).state_dict(), tmp_path / "three.pt")
    assert "knows 3 classes, --data has 10" in refused(f"--head {tmp_path}/three.pt")
    torch.save(SegmentationHead(65, 10).state_dict(), tmp_path / "wide.pt")
    assert "reads 65 channels" in refused(f"--head {tmp_path}/wide.pt")
    assert "no segmentation head" in refused(f"--head {colours}/masks/0.png")
    assert "--scales" in refused("--scales 0")
    assert "this task needs a map" in refused("--data CIFAR10")
    assert "--val_data has other classes than --data" in refused("--data shapes:4 --val_data "
                                                                 f"pairs:{named(colours)}")

    assert "--last_blocks 5: the network has 4" in refused("--last_blocks 5")

    # Masks of 0 and 255 have one class only; and a set whose names are known may have no answer.
    binary = tmp_path / "binary"
    shutil.copytree(colours / "images", binary / "images")
    (binary / "masks").mkdir()
    for file in (colours / "masks").iterdir():
        Image.fromarray(np.array(Image.open(file)) // 9 * 255).save(binary / "masks"
                                                                    / file.name)
    data = f"--data pairs:{binary} --val_data pairs:{copy_of(binary)}"
    assert "the masks have the class 0 alone" in refused(data)
    (binary / "classes.txt").write_text("thing\nground\n")
    assert "the masks have the class thing alone" in refused(data)
    for file in (binary / "masks").iterdir():
        Image.new("L", (48, 32), 255).save(file)
    assert "--data: every pixel of every mask is ignored" in refused(data)

    # The names of one set count for both. Two names are too few for masks of ten classes.
    two = tmp_path / "two"
    shutil.copytree(colours, two)
    (two / "classes.txt").write_text("sky\nroad\n")
    assert "its mask has the class" in refused(f"--val_data pairs:{two}")

    # A pair that is wrong is said in one line, whichever process finds it.
    broken = tmp_path / "broken"
    shutil.copytree(colours, broken)
    Image.new("L", (5, 5)).save(broken / "masks/3.png")
    for workers in (0, 1):
        error = refused(f"--data pairs:{broken} --num_workers {workers} --steps 9")
        assert "3.png: an image of 48 x 32 pixels with a map of 5 x 5" in error
        assert error.count("error:") == 1 and "Traceback" not in error

    # Masks without any class to be judged are no result.
    for mask in (broken / "masks").iterdir():
        Image.new("L", (48, 32), 9).save(mask)
    assert "every pixel of every mask is ignored" in refused(f"--val_data pairs:{broken} "
                                                             "--ignore_label 9")


def named(folder):
    """The same pairs, whose classes have names."""
    (folder.parent / "named").mkdir(exist_ok=True)
    shutil.copytree(folder, folder.parent / "named", dirs_exist_ok=True)
    names = [f"colour {c}" for c in range(10)]
    (folder.parent / "named/classes.txt").write_text("\n".join(names))
    return folder.parent / "named"
