"""Plain: what makes the training step fast, each idea as the plain code that it replaces.

    train_step ----------------------------------> the same loss, the same gradients
        |                                                        ^
        +-- without(["packing"]): that part, the plain way ------+   slower, or larger

Idea     Fast code is hard to trust and hard to learn from. So the plain code of each idea is
         kept here. It gives the same numbers up to rounding, and it serves to read what the
         idea is, to test the fast code, and to measure what the idea brings.
Paper    DINO Alg. 1 (loss by pairs) and main_dino.py; DINOv2 sec. 5 (packing, stochastic depth
         that skips work) and dinov2/loss (Sinkhorn-Knopp)
Try      python -m bench.plain                          each idea taken out, what changes
         python -m bench step shapes --without each     what each brings, in seconds
Change   another idea is its plain code as a function, and one entry of IDEAS
Tests    pytest tests/bench/test_plain.py

Letters  B images, G global crops, K prototypes, n rows, M masked patches; b n one crop size: b
         crops of n tokens; T tokens of all crops; nh heads, hd numbers of a head.

Lines of main_dino.py are those of facebookresearch/dino at commit 7c446df, lines of dinov2/
those of facebookresearch/dinov2 at commit b8931f7.
"""

import contextlib
import random
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2 import functional as TF

from augment import (BLUR_SIGMA, BLUR_TAPS, ORDERS, PHOTOMETRY, RGB, SOLARIZE_THRESHOLD,
                     ChannelStats)
from losses import all_sum, make_targets
from vit import Groups, Keep, VisionTransformer

# ----------------------------------------------------------------------------------------------
# Packing
#
# The fast version (vit.VisionTransformer.forward_features) puts the tokens of all crop sizes
# into one long sequence, so that every linear layer runs once per block and reads its weights
# once. Only attention splits the sequence again, because a crop must not attend to another one.
#
# The plain version below is that of the papers' code before DINOv2 (utils.py of DINO, class
# MultiCropWrapper): one forward pass for each crop size.

packed = VisionTransformer.forward_features


def one_forward_per_size(self, images, masks=None, plan=None):
    """Takes the place of forward_features: more and smaller kernels, which read the weights
    anew.
    """
    if not isinstance(images, (list, tuple)):
        return packed(self, images, masks, plan)

    # The plan of stochastic depth was drawn for the packed sequence of all crop sizes. So that
    # the same images are dropped as in the fast version, each size gets its part of that plan.
    # An entry of the plan is None where a block drops nothing.
    outs = []
    start = 0  # the row at which the tokens of this crop size begin
    for i, (x, mask) in enumerate(zip(images, masks or [None] * len(images))):
        plan_of_size = None
        if plan:
            plan_of_size = []
            for keeps in plan:  # one block: (attention, feed-forward), or None
                parts = keeps and tuple(own_part(keep, i, start) for keep in keeps)
                plan_of_size.append(parts)
        out = packed(self, x, mask, plan_of_size)
        outs.append(out)
        start += out["x_prenorm"].shape[:2].numel()  # (b, n, D): b * n rows
    return outs


def own_part(keep: Keep, i: int, start: int) -> Keep:
    """What a plan says of the i-th crop size alone, whose tokens begin at row `start`.

    Example: 2 crops of 5 tokens are packed before 3 crops of 2 tokens, which begin at row 10.
    One crop of the first size is kept, and two of the second:

        keep.rows = [5, 6, 7, 8, 9, 10, 11, 14, 15]     keep.groups = ((1, 5), (2, 2))
        own_part(keep, 1, start=10).rows = [0, 1, 4, 5]             .groups = ((2, 2),)
    """
    sizes = [b * n for b, n in keep.groups]  # kept rows of each crop size
    rows = keep.rows.split(sizes)[i]
    scale = keep.scale.split(sizes)[i]
    return Keep(rows - start, scale, keep.groups[i:i + 1])


# ----------------------------------------------------------------------------------------------
# SDPA
#
# The fast version, PyTorch's scaled_dot_product_attention, goes over the n x n weights of each
# head in tiles and never stores them. For the backward pass it keeps one number per row and
# computes the tiles again.
#
# In bfloat16 on a CPU vit.attention does not call it, because the formula is faster there.


def stored_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(hd)) v as the formula stands, from (b, nh, n, hd). ViT eq. 6 and 7.

    All scores are in memory at once, and the weights stay there until the backward pass.
    """
    scores = q @ k.transpose(-2, -1) * q.shape[-1]**-0.5  # (b, nh, n, n)
    return scores.softmax(-1) @ v


# ----------------------------------------------------------------------------------------------
# Skipping
#
# The fast version (vit.residual) takes the rows of the kept images out of the sequence and runs
# the branch on those alone. At a drop rate of 0.4 that saves two fifths of the work of all
# blocks.


def compute_then_drop(x: Tensor, branch, groups: Groups, keep: Keep | None) -> Tensor:
    """x + branch(x) for all rows of x (T, D), with dropped images multiplied by zero.

    This is stochastic depth as in DINO (drop_path of vision_transformer.py): the whole work, at
    any drop rate.
    """
    if keep is None:
        return x + branch(x, groups)

    # The factor of a row is b / kept for images that are kept, as in the fast version, and 0
    # for the others.
    factor = torch.zeros(len(x), 1, device=x.device)  # (T, 1)
    factor.index_copy_(0, keep.rows, keep.scale)
    return x + factor * branch(x, groups)


# ----------------------------------------------------------------------------------------------
# Fused losses
#
# The fast version (losses.py) adds up the targets of a student view's teachers first, and so
# needs one softmax per view where the papers need one per pair. It takes some rows at a time,
# keeps no log-probabilities for the backward pass, and its Sinkhorn-Knopp searches a bias of K
# numbers where the papers write a matrix of (n, K) again and again.


def loss_pair_by_pair(targets: Tensor, student_logits: Tensor,
                      student_temp: float = 0.1) -> Tensor:
    """Mean cross-entropy over all pairs of different views. DINO eq. 3, Alg. 1.

    targets (G, B, K), student_logits (V, B, K). The loop is that of main_dino.py, lines
    392-402. It computes the log-softmax of a student's view once for each of its teachers: 18
    times a matrix of (B, K) for 2 global and 8 local crops.
    """
    total = 0
    pairs = 0
    for i, q in enumerate(targets):
        for v, logits in enumerate(student_logits):
            if v == i:  # the teacher and the student see the same pixels
                continue
            log_p = F.log_softmax(logits.float() / student_temp, -1)  # (B, K)
            total = total + -(q * log_p).sum(-1).mean()
            pairs += 1
    return total / pairs


def loss_patch_by_patch(targets: Tensor, student_logits: Tensor, weights: Tensor, crops: int,
                        student_temp: float = 0.1) -> Tensor:
    """Cross-entropy at masked patches, by the logarithm of every probability. iBOT eq. 3.

    targets and student_logits (M, K), weights (M,), as in losses.patch_loss. The lines are
    those of dinov2/loss/ibot_patch_loss.py, 105-126 (forward_masked).
    """
    log_p = F.log_softmax(student_logits.float() / student_temp, -1)  # (M, K)
    return (weights * -(targets * log_p).sum(-1)).sum() / crops


@torch.no_grad()
def sinkhorn_in_place(self, logits: Tensor, temp: float, real: Tensor | None = None) -> Tensor:
    """Sinkhorn-Knopp on the matrix itself: (n, K) logits -> (n, K) targets, not a bias.

    SwAV (Caron 2020) eq. 3-5; dinov2/loss/dino_clstoken_loss.py, lines 35-61, and for patches
    ibot_patch_loss.py, lines 62-90, whose matrix is this one transposed. real (n,) is 0 for
    rows of padding; their targets are 0. A sum over rows is over all processes.

    Example: one sweep over two rows and two prototypes (n = K = 2), Q adding up to 1 already:

        Q = exp(logits / temp) / sum     columns / their sums / K     rows / their sums / n
                .50   .17                       .375   .25                  .30   .20
                .17   .17                       .125   .25                  .17   .33

    Times n, each row adds up to one: (.60, .40) and (.33, .67).
    """
    if real is None:
        real = torch.ones(len(logits), device=logits.device)  # (n,)
    else:
        real = real.float()  # (n,)

    # All numbers together shall add up to one. That is the total which the sweeps below share
    # out between prototypes and between rows.
    Q = torch.exp(logits.float() / temp) * real[:, None]  # (n, K)
    rows = all_sum(real.sum())  # rows that are no padding, of all processes
    Q /= all_sum(Q.sum())

    for _ in range(self.iterations):
        # Each prototype gets the same share, 1 / K. A column spans the rows of all processes.
        Q /= all_sum(Q.sum(0))
        Q /= Q.shape[1]

        # Each row gives the same share, 1 / rows. The sum of a row of padding is 0, and the
        # clamp keeps 0 / 0 from becoming NaN.
        Q /= Q.sum(1, keepdim=True).clamp(min=1e-38)
        Q /= rows
    return Q * rows  # each row adds up to one


def targets_or_bias(logits: Tensor, temp: float, bias: Tensor) -> Tensor:
    """Takes the place of make_targets, which makes targets (n, K) of logits and a bias (K,)."""
    # sinkhorn_in_place has returned the targets themselves where train_step expects a bias;
    # other centerings are as they were and have returned a bias. The shape tells which it is.
    return bias if bias.shape == logits.shape else make_targets(logits, temp, bias)


# ----------------------------------------------------------------------------------------------
# Foreach
#
# The fast version (training/optim.py) hands whole lists of tensors to torch._foreach_* and to
# the fused AdamW, so that a GPU starts a few kernels where the papers' loops start some for
# each of a few hundred tensors. It decides about clipping by a clamp on the device, where the
# loop's `if` makes the host wait for every single norm.


def clip_one_by_one(networks: list, max_norm: float, mode: str) -> Tensor:
    """Clips gradients in place and returns the norm of all of them, as optim.clip_gradients.

    mode "parameter": the loop of DINO (utils.py, lines 132-141); "network": DINOv2.
    """
    norms = []  # one for each network
    for network in networks:
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        each = [grad.norm() for grad in grads]
        norms.append(torch.stack(each).norm())
        for grad, norm in zip(grads, each):
            limited = norm if mode == "parameter" else norms[-1]
            factor = max_norm / (limited + 1e-6)
            if max_norm and factor < 1:  # max_norm 0: only measure
                grad.mul_(factor)
    return torch.stack(norms).norm()


@torch.no_grad()
def ema_one_by_one(teacher, student, momentum: float, ok: Tensor | float = 1.0):
    """teacher <- m * teacher + (1 - m) * student. DINO sec. 3.1; main_dino.py, lines 347-350.

    `ok` is ignored. The fast version needs it to leave a step out whose loss is not finite; the
    papers' loop has looked at the loss by then, and has stopped.
    """
    for t, s in zip(teacher.parameters(), student.parameters()):
        t.mul_(momentum).add_((1 - momentum) * s)


class DefaultAdamW(torch.optim.AdamW):
    """AdamW as torch runs it unless asked for more: on a CPU it goes tensor by tensor.

    train_step gives every optimizer an attribute found_inf, with which a fused optimizer leaves
    a step out. torch's other versions of AdamW refuse to run when it is set. So setting it has
    no effect here.
    """

    found_inf = property(lambda self: None, lambda self, value: None)


# ----------------------------------------------------------------------------------------------
# The input path
#
# The fast version (augment.py) cuts crops of bytes in the loader's workers, and colours whole
# batches of them on the device. The papers' worker does everything itself: each crop of each
# image is a PIL image of its own, which it resizes, colours and turns into floats.
#
# This is no part of the step, so it is not in IDEAS: `python -m bench data --plain` compares
# it.


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR_SIGMA)))


def crop_by_crop(views: list[tuple[int, tuple[float, float], int]], kind: str,
                 stats: ChannelStats):
    """A function from a PIL image to its crops, floats (3, s, s) each. DINO sec. 3.2.

    views: (size, scale, column of chances) of each crop, as MultiCrop has them; kind: a name of
    PHOTOMETRY. Operations and order are those of main_dino.py, lines 419-464.
    """
    chances = PHOTOMETRY[kind]
    worker = []  # for each view what makes its crop
    for size, scale, view in views:
        jitter = transforms.ColorJitter(*chances["strength"])
        operations = [
            transforms.RandomResizedCrop(size, scale,
                                         interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], chances["jitter"][view]),
            transforms.RandomGrayscale(chances["gray"][view]),
            transforms.RandomApply([transforms.Lambda(blurred)], chances["blur"][view]),
            transforms.RandomSolarize(128, chances["solarize"][view]),
            transforms.ToTensor(),
            transforms.Normalize(*stats)]
        worker.append(transforms.Compose(operations))
    return lambda image: [make_crop(image) for make_crop in worker]


def colour_one_by_one(crops: Tensor, params: Tensor) -> Tensor:
    """augment.photometry by torchvision's functions: a crop, and an operation, after the other.

    crops (n, 3, s, s) uint8 and params (n, 8), as photometry takes them -> (n, 3, s, s) floats.
    """
    jitters = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    coloured = []
    for x, p in zip(crops, params.tolist()):
        x = TF.to_dtype(x, torch.float32, scale=True)
        # The columns stand in the order of augment.COLUMNS: the order of the four jitters (below
        # 0: none), their factors, then grey, the blur's sigma, solarize.
        if p[0] >= 0:
            for operation in ORDERS[int(p[0])]:
                x = jitters[operation](x, p[1 + operation])
        if p[5]:
            x = TF.rgb_to_grayscale(x, 3)
        if p[6]:
            x = TF.gaussian_blur(x, [BLUR_TAPS, BLUR_TAPS], [p[6], p[6]])
        if p[7]:
            x = TF.solarize(x, SOLARIZE_THRESHOLD)
        coloured.append(TF.normalize(x, *RGB))
    return torch.stack(coloured)


# ----------------------------------------------------------------------------------------------
# All ideas, and how one is taken out

# The name of an idea -> what is replaced, by its full name -> the plain code.
IDEAS = {
    # several crop sizes in one sequence
    "packing": {"vit.VisionTransformer.forward_features": one_forward_per_size},
    # attention by tiles
    "sdpa": {"torch.nn.functional.scaled_dot_product_attention": stored_attention},
    # dropped images are left out of the work
    "skipping": {"vit.residual": compute_then_drop},
    # targets added up first, a softmax per view, Sinkhorn-Knopp as a bias
    "fused_loss": {
        "train.view_pair_loss": loss_pair_by_pair, "train.patch_loss": loss_patch_by_patch,
        "losses.SinkhornKnopp.forward": sinkhorn_in_place,
        "train.make_targets": targets_or_bias},
    # one kernel for many tensors; DefaultAdamW belongs to it, see bench/step.py
    "foreach": {"train.clip_gradients": clip_one_by_one, "train.ema_update": ema_one_by_one}}


@contextlib.contextmanager
def without(ideas):
    """Inside, train.train_step does the work of these ideas the plain way."""
    # unittest.mock.patch puts an object in the place of a name until its context ends, also
    # when an error ends it. The ExitStack holds as many of these contexts as are needed.
    with contextlib.ExitStack() as stack:
        for idea in ideas:
            for name, plain in IDEAS[idea].items():
                stack.enter_context(patch(name, plain))
        yield


if __name__ == "__main__":
    import time

    # A small network with two crop sizes and stochastic depth, so that each idea has something
    # to do. The loss is one direction of the class tokens.
    torch.manual_seed(0)
    model = VisionTransformer(64, 8, embed_dim=128, depth=4, num_heads=2, drop_path_rate=0.4)
    crops = [torch.randn(16, 3, 64, 64), torch.randn(64, 3, 32, 32)]
    plan = model.draw_plan(crops, torch.Generator().manual_seed(0))
    direction = torch.randn(128)

    def run():
        """(seconds, gradient of the patch embedding) of one forward and backward pass."""
        begun = time.perf_counter()
        model.zero_grad()
        sum((x @ direction).sum() for x in model(crops, plan=plan)).backward()
        return time.perf_counter() - begun, model.patch_embed.proj.weight.grad.clone()

    # The first pass warms up. Then the two versions run by turns, and the ratio is the median
    # of five pairs.
    run()
    gradient = run()[1]
    for idea in ("packing", "sdpa", "skipping"):
        ratios = []
        for _ in range(5):
            fast_seconds = run()[0]
            with without([idea]):
                plain_seconds, plain_gradient = run()
            ratios.append(plain_seconds / fast_seconds)
        difference = (plain_gradient - gradient).norm() / gradient.norm()
        print(f"without {idea:10s} {sorted(ratios)[2]:5.2f} times the seconds, "
              f"gradient apart by {difference:.0e} of itself")
