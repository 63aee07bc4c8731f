"""Contours: how well a mask and its outline fit the truth, and how both change over a video.

    mask, truth --> pixels in both / pixels in either                        J, the region
    mask, truth --> their outlines --> near enough to one another --> F, the outline

Idea     A region hides a wrong outline: a mask that misses the legs of a horse shares nearly
         all pixels with the truth, so J is high. F asks for the outline itself, and both
         together say how good a mask is.
Paper    Perazzi 2016 (DAVIS: J, F, recall, decay); Pont-Tuset 2017 (several objects)
Try      python -m evaluation.contours       how J and F see a disc that is in the wrong place
Change   how far an outline may be away: tolerance of boundary_measure
Tests    pytest tests/evaluation/test_contours.py

Letters  n masks, H W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def region_similarity(masks: Tensor, truths: Tensor) -> Tensor:
    """J (n,): what two masks share over what either covers. (n, H, W) bool each.

    It is 1 if both are empty: an object that is gone was rightly not found.
    """
    # This is the Jaccard index. Example: a mask of 6 pixels and a truth of 8 that share 4 have
    # 4 / (6 + 8 - 4) = .4.
    shared = (masks & truths).sum((1, 2)).double()  # (n,)
    covered = (masks | truths).sum((1, 2)).double()  # (n,)
    return torch.where(covered > 0, shared / covered.clamp(min=1), 1.0)


def boundary(masks: Tensor) -> Tensor:
    """Masks (n, H, W) bool -> pixels that differ from the one at the right, below, or both."""
    # The last row and column are repeated, so that the border of the image is no boundary.
    padded = torch.cat([masks, masks[:, -1:]], 1)  # (n, H + 1, W)
    padded = torch.cat([padded, padded[:, :, -1:]], 2)  # (n, H + 1, W + 1)
    right = padded[:, :-1, 1:]  # (n, H, W)
    below = padded[:, 1:, :-1]  # (n, H, W)
    diagonal = padded[:, 1:, 1:]  # (n, H, W)
    return (masks ^ right) | (masks ^ below) | (masks ^ diagonal)


def boundary_measure(masks: Tensor, truths: Tensor, tolerance: float = 0.008) -> Tensor:
    """F (n,): the harmonic mean of precision and recall of the boundary. (n, H, W) bool each.

    A boundary pixel is right if the other boundary has a pixel at most `tolerance` of the
    image's diagonal away: 8 pixels of 854 x 480.
    """
    # To be near a boundary is to lie in a disk around one of its pixels. The convolution counts
    # for each pixel how many boundary pixels are in the disk around it.
    radius = math.ceil(tolerance * math.hypot(*masks.shape[1:]))
    offset = torch.arange(-radius, radius + 1)
    disk = (offset[:, None]**2 + offset**2 <= radius**2).float()  # (2*radius + 1, 2*radius + 1)

    def near(edges):
        return F.conv2d(edges[:, None].float(), disk[None, None], padding=radius)[:, 0] > 0.5

    def share(edges, right):
        """How many of the edges' pixels are right: 1 where there is no edge."""
        total = edges.sum((1, 2)).double()
        return torch.where(total > 0, (edges & right).sum((1, 2)) / total.clamp(min=1), 1.0)

    edges = boundary(masks)  # (n, H, W)
    true_edges = boundary(truths)  # (n, H, W)
    precision = share(edges, near(true_edges))  # (n,)
    recall = share(true_edges, near(edges))  # (n,)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def over_time(values: list[float]) -> dict[str, float]:
    """J or F of each frame -> mean; recall, the share above .5; decay, how much it falls.

    Decay is the mean of the first quarter of the frames minus that of the last one. As in the
    toolkit of DAVIS, neighbouring quarters share a frame: of nine frames the first quarter is
    0, 1, 2 and the last is 6, 7, 8.
    """
    # The ends of the quarters are rounded as in the toolkit: of nine frames at 2 and 6, of ten
    # frames, whose quarters have 2.25 steps, at 2 and 7.
    x = torch.tensor(values, dtype=torch.float64)
    first_end = math.floor((len(x) - 1) / 4 + 0.5)
    last_begin = math.floor(3 * (len(x) - 1) / 4 + 0.5)
    decay = x[:first_end + 1].mean() - x[last_begin:].mean()
    return {
        "mean": x.mean().item(), "recall": (x > 0.5).double().mean().item(),
        "decay": decay.item()}


if __name__ == "__main__":
    # A disc of radius 30 in an image of 200 x 300 pixels, at a place that is more and more
    # wrong. The tolerance of F is .008 of the diagonal of 361 pixels, rounded up: 3 pixels.
    y, x = torch.meshgrid(torch.arange(200), torch.arange(300), indexing="ij")
    truth = (y - 100)**2 + (x - 150)**2 <= 30**2
    for shift in (0, 1, 2, 3, 4, 6, 10, 30):
        mask = (y - 100)**2 + (x - 150 - shift)**2 <= 30**2
        J = region_similarity(mask[None], truth[None]).item()
        boundary_F = boundary_measure(mask[None], truth[None]).item()
        print(f"{shift:2d} pixels beside its place: J {J:.3f}, F {boundary_F:.3f}")
