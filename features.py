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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from augment import center_crop, normalise
from data import Images
from runtime import Place, autocast


class Centered(torch.utils.data.Dataset):
    """Image i as evaluations see it: (3, size, size) uint8."""

    def __init__(self, images: Images, size: int):
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return center_crop(self.images.read(i), self.size)


@torch.no_grad()
def extract(model: nn.Module, images: Images, size: int, place: Place, batch_size: int = 128,
            num_workers: int = 0, precision: str = "fp32", report=None) -> Tensor:
    """Features (n, D) float32 of all images, on the CPU, the same on every process.

    model maps normalised images to (B, D). Process r takes images r, r + W, ...; `report` is called
    with the number of images done. An image that does not decode raises: judging needs them all.
    """
    mine = list(range(place.rank, len(images), place.world_size))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(Centered(images, size), mine), batch_size, num_workers=num_workers)
    training, parts, done = model.training, [], 0
    model.eval()
    for batch in loader:
        with autocast(precision, place.device):
            parts.append(model(normalise(batch.to(place.device))).float().cpu())
        done += len(batch)
        if report:
            report(done * place.world_size)
    model.train(training)
    rows = torch.cat(parts) if parts else torch.empty(0, 0)
    return gather(rows, len(images), place)


def gather(rows: Tensor, total: int, place: Place) -> Tensor:
    """Rows r, r + W, ... of process r -> all rows in order, on every process."""
    if place.world_size == 1:
        return rows
    parts = [None] * place.world_size
    dist.all_gather_object(parts, rows)
    out = torch.empty(total, parts[0].shape[1])
    for r, part in enumerate(parts):
        out[r::place.world_size] = part
    return out


def top_neighbours(queries: Tensor, bank: Tensor, k: int, chunk: int = 1024):
    """Cosine similarities and bank rows of the k nearest: (n, k) each, nearest first.

    Both are normalised here. Works through the queries in chunks: memory is chunk * n_bank numbers.
    """
    if not 0 < k <= len(bank):
        raise ValueError(f"k={k} neighbours out of a bank of {len(bank)} images")
    bank = F.normalize(bank, dim=1)
    best = [(F.normalize(part, dim=1) @ bank.T).topk(k) for part in queries.split(chunk)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def knn_vote(similarities: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """(n, k) similarities and neighbours' labels -> predicted class (n,).

    Each neighbour votes for its label with weight exp(similarity / temperature).
    """
    weights = (similarities / temperature).exp()  # (n, k)
    votes = torch.zeros(len(labels), int(labels.max()) + 1)
    votes = votes.to(weights.dtype).scatter_add_(1, labels, weights)  # (n, C)
    return votes.argmax(1)


def knn_accuracy(bank: Tensor, bank_labels, queries: Tensor, query_labels,
                 ks: tuple[int, ...] = (20,), temperature: float = 0.07) -> dict[int, float]:
    """Share of queries whose neighbours vote for their label, for each k. Neighbours found once."""
    bank_labels, query_labels = torch.as_tensor(bank_labels), torch.as_tensor(query_labels)
    similarities, rows = top_neighbours(queries, bank, max(ks))
    labels = bank_labels[rows]  # (n, k)
    return {k: (knn_vote(similarities[:, :k], labels[:, :k], temperature) == query_labels)
            .float().mean().item() for k in ks}


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
        accuracy = knn_accuracy(x[:600], labels[:600], x[600:], labels[600:], (1, 20))
        print(f"noise {noise}: k-NN(1) {accuracy[1]:.1%}, k-NN(20) {accuracy[20]:.1%}, chance 25 %")
