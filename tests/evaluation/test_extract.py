"""Claims
1. Features do not depend on the batch size, and come in order.
2. Shares of processes put together are the whole in order, whatever their number.
3. Labels of two sets are compared by the names of their classes; where a name is not that of one
   class alone they are refused. Numbers without names are matched with names that are numbers.
4. Accuracy, that of the five best classes, and its mean over classes equal a loop, with classes
   of one image and of none.
"""

from dataclasses import replace

import pytest
import torch

from evaluation.extract import (accuracy, best_classes, extract, gather, same_labels, spread)
from images.data import Images, open_images
from machinery.process import Process
from vit import VisionTransformer


def test_extraction():
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=64, depth=1, num_heads=1).train()
    images, process = open_images("shapes:10"), Process(torch.device("cpu"))
    by_three, at_once = (extract(model, images, 16, process, batch_size=b) for b in (3, 10))
    torch.testing.assert_close(by_three, at_once, rtol=1e-4, atol=1e-5)
    assert by_three.shape == (10, 64) and model.training
    assert torch.equal(gather(by_three, 10, process), by_three)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_the_whole(world):
    processes = [Process(torch.device("cpu"), rank, world) for rank in range(world)]
    for n in (1, 4, 7):
        shares = [spread(range(n), process) for process in processes]
        assert len({len(share) for share in shares}) == 1
        assert torch.tensor(shares).T.flatten()[:n].tolist() == list(range(n))


def test_labels_go_by_names():
    bank = Images("a", None, list("abc"), [0, 1, 2], ["cat", "dog", "owl"])
    some = Images("b", None, list("de"), [0, 1], ["dog", "owl"])  # no cat among them
    assert same_labels(bank, some).tolist() == [1, 2]
    with pytest.raises(ValueError, match="--val_data has classes that --data has not: cat"):
        same_labels(some, bank)
    with pytest.raises(ValueError, match="--test_data has classes that --data has not: cat"):
        same_labels(some, bank, "--test_data")


def test_numbers_and_names_that_are_numbers():
    """Folders are sorted as words, so that label 2 is the class 10 here."""
    numbers = Images("GTSRB", None, list("abcd"), [0, 2, 10, 11])
    folders = Images("folder", None, list("efgh"), [0, 1, 2, 3], ["0", "11", "10", "2"])
    assert same_labels(numbers, folders).tolist() == [0, 11, 10, 2]
    assert same_labels(folders, numbers).tolist() == [0, 3, 2, 1]
    assert same_labels(numbers, numbers).tolist() == numbers.labels
    digits = Images("MNIST", None, list("kl"), [1, 0], ["0 - zero", "2 - two"])
    assert same_labels(numbers, digits).tolist() == [2, 0]
    with pytest.raises(ValueError, match="--val_data has classes that --data has not: 7"):
        same_labels(folders, replace(numbers, labels=[0, 2, 7, 11]))

    animals = Images("folder", None, list("ij"), [0, 1], ["cat", "dog"])
    with pytest.raises(ValueError,
                       match="--data has numbers .*, and --test_data names such as"):
        same_labels(numbers, animals, "--test_data")
    with pytest.raises(ValueError,
                       match="--val_data has numbers .*, and --data names such as cat"):
        same_labels(animals, numbers)


def test_a_name_of_two_classes_is_refused():
    bank = Images("a", None, list("abc"), [0, 1, 2], ["crane", "cat", "crane"])
    some = Images("b", None, list("d"), [0], ["crane"])
    with pytest.raises(ValueError, match="--data has two classes called crane"):
        same_labels(bank, some)
    assert same_labels(bank, bank).tolist() == [0, 1, 2]  # the same list has the same numbers


def test_accuracies_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 1, 4, 4, 4, 4, 4])  # one image of 0, none of 2 and 3
    for _ in range(20):
        scores = torch.rand(8, 9, generator=generator)
        right = {}  # class -> for each image of it, whether it was recognised
        among_five = []  # for each image, whether its class was among the five best
        for row, label in zip(scores.tolist(), labels.tolist()):
            order = sorted(range(9), key=lambda c: -row[c])
            right.setdefault(label, []).append(order[0] == label)
            among_five.append(label in order[:5])
        per_class = [sum(images) / len(images) for images in right.values()]
        figures = accuracy(best_classes(scores), labels)
        assert accuracy(scores.argmax(1), labels)["top1"] == figures["top1"]
        assert figures["top1"] == pytest.approx(sum(map(sum, right.values())) / 8, abs=1e-12)
        assert figures["top5"] == pytest.approx(sum(among_five) / 8, abs=1e-12)
        assert figures["mean_per_class"] == pytest.approx(sum(per_class) / 3, abs=1e-12)
