"""Frozen features: what a network has learned, judged without teaching it anything more.

    images --> center crop --> backbone --> class tokens (n, D) --> unit length
                                                |
    bank (n_train, D) with labels --> k nearest by cosine --> weighted vote --> accuracy

Idea     If neighbours in feature space share a label that training never saw, the network has found
         the classes by itself. The vote has nothing to train, so nothing hides in it.
Paper    DINO sec. 4.1 and F ("k-NN"); Wu 2018 sec. 3.4 for the weighted vote
Try      python features.py     the vote on four clouds of points
Change   another vote is another function of (similarities, labels); see knn_vote
Tests    pytest tests/test_features.py

Letters  n images, D width, k neighbours, C classes.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from augment import MultiCrop, center_crop, normalise
from data import Images, Sampler, Views, training_loader
from runtime import Place, autocast

MOST = 2**27  # similarities at once: half a GB


class Prepared(torch.utils.data.Dataset):
    """Image i as an evaluation sees it: prepare(image), uint8."""

    def __init__(self, images: Images, prepare: Callable[[Tensor], Tensor]):
        self.images, self.prepare = images, prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.prepare(self.images.read(i))


@torch.no_grad()
def extract(model: nn.Module, images: Images, size: int, place: Place, batch_size: int = 128,
            num_workers: int = 0, precision: str = "fp32", report=None, prepare=None) -> Tensor:
    """Features (n, D) float32 of all images, on the CPU, the same on every process.

    model maps normalised images to (B, D). `report` is called with the number of images done;
    `prepare` takes the place of the centre crop to `size` pixels, with batch_size 1 where images
    keep their shapes. An image that does not decode raises: judging needs them all.
    """
    mine = spread(range(len(images)), place)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(Prepared(images, prepare or partial(center_crop, size=size)), mine),
        batch_size, num_workers=min(num_workers, (len(mine) - 1) // batch_size))
    training, out, done = model.training, torch.empty(0), 0
    model.eval()
    for batch in loader:
        with autocast(precision, place.device):
            rows = model(normalise(batch.to(place.device), images.pixels)).float()  # (B, D)
        rows = gather(rows, len(images) - done, place)
        if not done:  # one table for all, in place: these can be gigabytes
            out = torch.empty(len(images), rows.shape[1])
        out[done:done + len(rows)] = rows
        done += len(rows)
        if report:
            report(done)
    model.train(training)
    return out


def spread(rows, place: Place) -> list:
    """This process's share of rows: r, r + W, ... Shares are equally long: the first rows fill up.

    So every process takes as many steps, and none waits for another that has finished.
    """
    world = place.world_size
    return [rows[i % len(rows)] for i in range(place.rank, -(-len(rows) // world) * world, world)]


def gather(rows: Tensor, total: int, place: Place) -> Tensor:
    """What all processes made of their shares -> all `total` rows in order, on every process."""
    if place.world_size == 1:
        return rows[:total]
    parts = [torch.empty_like(rows) for _ in range(place.world_size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)[:total]


def random_crops(images: Images, size: int, batch_size: int, steps: int, place: Place,
                 num_workers: int = 0, seed: int = 0, together: int = 1):
    """What classifiers are trained on: this process's share of each batch of random crops.

    Yields crops (b, C, size, size), normalised, and their labels (b,). The batches, batch_size
    images on all processes together, are the same for any number of them. `together` neighbours
    stay on one process. A crop covers 8 to 100 % of its image. A broken image raises: its label
    would go to another one.
    """
    def shares():
        for keys in Sampler(len(images), batch_size, steps, seed=seed):
            groups = [keys[i:i + together] for i in range(0, len(keys), together)]
            yield [key for group in spread(groups, place) for key in group]

    crop = MultiCrop(size, size, 1, 0, (0.08, 1.0), photometry="none")
    labels = torch.as_tensor(images.labels)
    for batch in training_loader(Views(images, crop, seed), shares(), num_workers):
        if batch["broken"]:
            raise ValueError(f"--data: an image does not decode: {batch['broken'][0]}")
        crops = normalise(batch["global_crops"][0].to(place.device), images.pixels)  # (b, C, H, W)
        yield crops, labels[batch["index"]].to(place.device)


# ------------------------------------------------------------------------------------------------
# What is read off a network beside its class token


class Blocks(nn.Module):
    """Class tokens of the last n blocks in order, and the mean patch of the last: (B, (n+1)*D)."""

    def __init__(self, model: nn.Module, n: int):
        super().__init__()
        self.model, self.n = model, n

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self.model, "blocks"):  # a convnet: its class token is the mean
            return self.model(images).repeat(1, 2)
        outs = self.model.get_intermediate_layers(images, self.n, return_class_token=True)
        return torch.cat([cls for _, cls in outs] + [outs[-1][0].mean(1)], 1)


def gem(patches: Tensor, p: float = 4.0) -> Tensor:
    """Generalised mean over patches: (B, P, D) -> (B, D). p = 1 is the mean, large p the maximum.

    Radenovic 2017, eq. 3.
    """
    return patches.clamp(min=1e-6).pow(p).mean(1).pow(1 / p)


class Descriptor(nn.Module):
    """Class token and GeM of the patches, for copy detection: (B, 2*D). DINO sec. 4.2.1."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        out = self.model.forward_features(images)
        return torch.cat([out["x_norm_clstoken"], gem(out["x_norm_patchtokens"].float())], 1)


class Scales(nn.Module):
    """Mean of the class tokens at several sizes. DINO's retrieval."""

    def __init__(self, model: nn.Module, scales: tuple[float, ...] = (1, 0.5**0.5, 0.5)):
        super().__init__()
        self.model, self.scales = model, scales

    def forward(self, images: Tensor) -> Tensor:
        sizes = [[max(self.model.patch_size, int(side * s)) for side in images.shape[-2:]]
                 for s in self.scales]
        views = [F.interpolate(images, size, mode="bilinear") for size in sizes]
        return torch.stack([self.model(view) for view in views]).mean(0)


# ------------------------------------------------------------------------------------------------
# Nearest neighbours and their vote


def top_neighbours(queries: Tensor, bank: Tensor, k: int, chunk: int = 0):
    """Cosine similarities and bank rows of the k nearest: (n, k) each, nearest first.

    Neither need be of unit length. Works through the queries in chunks, memory beyond the bank is
    chunk * n_bank numbers; chunk 0: as many queries as fill MOST numbers.
    """
    if not 0 < k <= len(bank):
        raise ValueError(f"k={k} neighbours out of a bank of {len(bank)} images")
    chunk = chunk or max(1, MOST // len(bank))
    lengths = torch.linalg.vector_norm(bank, dim=1).clamp(min=1e-12)  # a normalised copy is large
    table, best = queries.new_empty(min(chunk, len(queries)), len(bank)), []  # used over and over
    for part in queries.split(chunk):
        cosines = torch.mm(F.normalize(part, dim=1), bank.T, out=table[:len(part)]).div_(lengths)
        best.append(cosines.topk(k))
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def knn_vote(similarities: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """(n, k) similarities and neighbours' labels -> predicted class (n,).

    Each neighbour votes for its label with weight exp(similarity / temperature).
    """
    weights = (similarities / temperature).exp()  # (n, k)
    votes = weights.new_zeros(len(labels), int(labels.max()) + 1)  # (n, C)
    votes = votes.scatter_add_(1, labels, weights)  # (n, C)
    return votes.argmax(1)


def knn_predict(bank: Tensor, bank_labels, queries: Tensor, ks: tuple[int, ...] = (20,),
                temperature: float = 0.07) -> dict[int, Tensor]:
    """The class that the neighbours of each query vote for, (n,) for each k. Found once."""
    bank_labels = torch.as_tensor(bank_labels, device=bank.device)
    similarities, rows = top_neighbours(queries, bank, max(ks))
    labels = bank_labels[rows]  # (n, k)
    return {k: knn_vote(similarities[:, :k], labels[:, :k], temperature) for k in ks}


def knn_accuracy(bank: Tensor, bank_labels, queries: Tensor, query_labels,
                 ks: tuple[int, ...] = (20,), temperature: float = 0.07) -> dict[int, float]:
    """Share of queries whose neighbours vote for their label, for each k."""
    predicted = knn_predict(bank, bank_labels, queries, ks, temperature)
    return {k: accuracy(p, query_labels)["top1"] for k, p in predicted.items()}


def accuracy(predicted: Tensor, labels) -> dict[str, float]:
    """Share of images that are right; and the mean over classes of each class's own share.

    The second counts a rare class as much as a frequent one. Classes without an image do not count.
    """
    predicted, labels = predicted.cpu(), torch.as_tensor(labels).cpu()
    right = (predicted == labels).double()  # (n,)
    count, hits = labels.bincount(), labels.bincount(right)
    return {"top1": right.mean().item(),
            "mean_per_class": (hits / count)[count > 0].mean().item()}


def few_of(labels: list[int], n: int, seed: int) -> Tensor:
    """n rows of each class, drawn from the seed."""
    labels = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == c][:n] for c in labels.unique()])


def same_labels(bank: Images, queries: Images) -> Tensor:
    """Labels of the queries in the bank's numbers. A split may lack a class: go by names.

    ValueError if the queries have a class that the bank has not.
    """
    labels = torch.as_tensor(queries.labels)
    if not (bank.classes and queries.classes):
        return labels
    odd = sorted(set(queries.classes) - set(bank.classes))
    if odd:
        raise ValueError(f"--val_data has classes that --data has not: {', '.join(odd[:5])}")
    return torch.tensor([bank.classes.index(c) for c in queries.classes])[labels]


if __name__ == "__main__":
    torch.manual_seed(0)
    centres, labels = torch.randn(4, 16), torch.arange(800) % 4
    for noise in (0.5, 1.0, 2.0, 4.0):
        x = centres[labels] + noise * torch.randn(800, 16)
        right = knn_accuracy(x[:600], labels[:600], x[600:], labels[600:], (1, 20))
        print(f"noise {noise}: k-NN(1) {right[1]:.1%}, k-NN(20) {right[20]:.1%}, chance 25 %")
