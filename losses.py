"""Losses: what the student must match, and what keeps the two networks from collapsing.

    teacher logits --> softmax(logits / teacher_temp + bias) --> targets --+
                                                      ^                    +--> cross-entropy:
                                 centering: one bias per prototype         |    DINO, all pairs of
                                                                           |    different views;
    student logits --> log_softmax(logits / student_temp) -----------------+    iBOT, masked patches
    student features --> distance to the nearest other image --> KoLeo

Idea     The teacher's softmax is sharpened by a low temperature, so that it commits itself to
         few prototypes, and biased against prototypes that are used too often, so that it does
         not give the same answer for every image. Low means lower than the student's: of the
         same logits the teacher makes a sharper answer than the student, so that every step
         makes the student more certain. Either of the two alone collapses. Without the bias a
         prototype that is ahead for all images gets further ahead, until it is the answer for
         each of them. With the bias alone nothing rewards being certain, and the networks agree
         best on the uniform answer.
Paper    DINO sec. 3.1, eq. 1-4 and Alg. 1; iBOT eq. 3; DINOv2 sec. 4 (Sinkhorn-Knopp, KoLeo)
Try      python losses.py       the two collapses and the balance between them, in numbers
Change   a new centering is one class that returns a bias, and one line in CENTERING
Tests    pytest tests/test_losses.py

Letters  G global and L local views, V = G + L, B images, K prototypes, n rows (views times
         images), M masked patches of all global views, padded to a fixed number; D width.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ----------------------------------------------------------------------------------------------
# Centering: teacher logits -> one bias per prototype


class NoCenter(nn.Module):
    """No bias at all, and the interface of all centerings.

    With sharpening alone the networks collapse to one prototype: `--centering none` shows it.
    momentum: of the running mean, for centerings that keep one.
    """

    def __init__(self, n_prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum

    def forward(self, logits: Tensor, temp: float, real: Tensor | None = None) -> Tensor:
        """Teacher logits (..., K) -> bias (K,), float32. real (n,) is 0 for rows of padding."""
        return logits.new_zeros(logits.shape[-1], dtype=torch.float32)  # (K,)

    def update(self, logits: Tensor, real: Tensor | None = None, ok: Tensor | bool = True):
        """Called once per step, after the optimizer has moved the student.

        ok: a boolean tensor on the device, False after a step that was not finite: then nothing
        changes.
        """


class EMACenter(NoCenter):
    """DINO eq. 4: subtract the centre, a moving average (EMA) of the teacher's logits:

        centre <- momentum * centre + (1 - momentum) * mean of the logits of the batch

    softmax((logits - centre) / temp) is softmax(logits / temp + bias) with bias = -centre /
    temp. A prototype with large logits for all images has a large centre, and loses its
    advantage.

    Example: two images have the logits (.9, .1) and (.7, .3), so the first prototype wins for
    both. If the batches stay like this one, the centre approaches their mean, (.8, .2), and what
    is left approaches (.1, -.1) and (-.1, .1): at a temperature of 0.1 the targets are then (.88,
    .12) and (.12, .88). It begins at zero. With a momentum of .9 it is (.08, .02) after one
    update, where the first prototype still wins for both; the second image turns at the eleventh,
    with a centre of (.55, .14) and the target (.47, .53).
    """

    def __init__(self, n_prototypes: int, momentum: float = 0.9):
        super().__init__(n_prototypes, momentum)
        self.register_buffer("center", torch.zeros(n_prototypes))

    def forward(self, logits: Tensor, temp: float, real: Tensor | None = None) -> Tensor:
        # The centre of this step knows only the batches before it: `update` comes later, as in
        # the official code. So it cannot depend on the very images that it is applied to.
        return -self.center / temp  # (K,)

    @torch.no_grad()
    def update(self, logits: Tensor, real: Tensor | None = None, ok: Tensor | bool = True):
        # The mean is over the images of all processes, so that every process has the same
        # centre. Where a batch has no masked patch, that mean is 0, and the centre of the
        # patches moves a little towards 0.
        mean = column_mean(logits.flatten(0, -2), real)  # (K,)
        moved = self.momentum * self.center + (1 - self.momentum) * mean

        # torch.where keeps the decision on the device: `if ok` would make the CPU wait for it.
        ok = torch.as_tensor(ok, device=moved.device)
        self.center.copy_(torch.where(ok, moved, self.center))


class SinkhornKnopp(NoCenter):
    """DINOv2: the bias with which this batch uses all prototypes nearly equally. DINOv2 sec. 4.

    Sinkhorn-Knopp scales the matrix exp(logits / temp), (n, K), by turns: columns, so that
    every prototype gets the same share of all rows, and rows, so that each adds up to one. The
    scale of a row cancels in the softmax of make_targets. So all there is to find is one factor
    per column, or its logarithm, which is a bias. SwAV (Caron 2020) eq. 3-5, three sweeps.

    Example: three images, two prototypes, and the targets sweep by sweep. The first sweep
    divides the columns of exp(logits / temp) by their means, 4.67 and 1.33; each further one
    divides the columns of the targets so far by their means. After each, rows add up to one
    again:

        exp(logits / temp)   no bias      1 sweep      2 sweeps     3 sweeps
            9    1           .90  .10     .72  .28     .75  .25     .76  .24
            4    1           .80  .20     .53  .47     .57  .43     .58  .42
            1    2           .33  .67     .13  .87     .14  .86     .15  .85
        mean of a column     .68  .32     .46  .54     .49  .51     .50  .50
        second bias less first     0      1.25         1.09         1.05

    Only the difference of two biases matters: softmax ignores what is added to all of them. (.875
    is printed as .87, so that the rows add up to one.) DINOv2's published recipe for ImageNet-1k
    has EMACenter; only those for larger sets of images have this class.
    """

    def __init__(self, n_prototypes: int, momentum: float = 0.9, iterations: int = 3):
        super().__init__(n_prototypes, momentum)
        self.iterations = iterations

    @torch.no_grad()
    def forward(self, logits: Tensor, temp: float, real: Tensor | None = None) -> Tensor:
        rows = logits.flatten(0, -2)  # (n, K)

        # The first sweep divides each column by its mean. It sees the rows before any of them
        # is normalised, so that a row of large logits weighs more, as in the official code. The
        # exponential of large logits would overflow, so one number is subtracted from all of
        # them, on all processes: the mean of the largest logits of the rows. It makes all column
        # means smaller by the same factor. So it adds the same number to all biases, which
        # softmax ignores. (The largest logit of all would do as well, but a maximum over the
        # processes is another kind of exchange than the sums of the other steps.)
        shift = column_mean(rows.amax(1, keepdim=True), real) / temp  # (1,)
        share = column_mean(rows, real, lambda x: exponentials(x, temp, shift))  # (K,)
        bias = -share.clamp(min=1e-38).log()  # (K,)

        # Every further sweep normalises the rows with the bias so far, which is a softmax, and
        # takes from the bias the logarithm of what each prototype then gets.
        for _ in range(self.iterations - 1):
            share = column_mean(rows, real, lambda x: probabilities(x, temp, bias))  # (K,)
            bias = bias - share.clamp(min=1e-38).log()  # (K,)
        return bias


CENTERING = {"ema": EMACenter, "sinkhorn": SinkhornKnopp, "none": NoCenter}


@torch.no_grad()
def make_targets(logits: Tensor, temp: float, bias: Tensor) -> Tensor:
    """softmax(logits / temp + bias) over prototypes, in float32, without gradient. DINO eq. 1:

        target_k = exp(logit_k / temp + bias_k) / sum over j of exp(logit_j / temp + bias_j)

    logits (..., K), bias (K,) -> targets (..., K), rows of probabilities.
    """
    targets = torch.empty_like(logits, dtype=torch.float32)
    # Some rows at a time: see "A large (n, K) matrix, some rows at a time" below. `out` is a view
    # of some rows of `targets`, so writing into it fills `targets`.
    for out, x in chunks(targets.flatten(0, -2), logits.flatten(0, -2)):
        out.copy_(probabilities(x, temp, bias))
    return targets


# ----------------------------------------------------------------------------------------------
# Losses: pure functions of targets and student logits


def view_pair_loss(targets: Tensor, student_logits: Tensor,
                   student_temp: float = 0.1) -> Tensor:
    """Mean cross-entropy over all pairs (teacher view, other student view). DINO eq. 3, Alg. 1:

        loss = mean over teacher views x and student views x' != x of H(P_t(x), P_s(x'))
        H(q, p) = -sum over k of q_k log p_k                                   (DINO eq. 2)

    targets (G, B, K), probabilities; student_logits (V, B, K) with V >= G, whose first G views
    are those of the teacher. A view is never paired with itself: to answer the same pixels alike
    teaches nothing about what two crops share. So there are G*V - G ordered pairs. The unit is
    nats (natural logarithms): the loss is ln K when the student's answers are uniform, whatever
    the targets are. ValueError where no pair is left.

    H(q, p) is H(q), the entropy of the target, plus KL(q | p), how far the answer is from it.
    The log shows these two apart, and calls the first one H.

    Cross-entropy is linear in its target. So a student view does not need one pass for each
    teacher view: it meets the sum of the targets of its teachers. Example with two global views
    a and b and one local view c (G = 2, V = 3, four pairs):

        student view    its teachers    sum of targets    mass of a row of that sum
             a               b               q_b                   1 = G - 1
             b               a               q_a                   1
             c             a and b         q_a + q_b               2 = G

    In numbers, with one image and two prototypes: q_a = (.9, .1) and q_b = (.6, .4) are the
    targets, p_a = (.5, .5), p_b = (.8, .2) and p_c = (.7, .3) the answers. The four pairs cost
    H(q_b, p_a) = .693, H(q_a, p_b) = .362, H(q_a, p_c) = .441 and H(q_b, p_c) = .696, so the loss
    is their mean, .548. The targets' own entropies have the mean H = .499; KL is the rest, .049.
    """
    G = len(targets)
    V = len(student_logits)
    if V < G or G * (V - 1) == 0:
        raise ValueError(f"{G} teacher and {V} student views leave no pair of different views")

    sum_of_targets = targets.sum(0)  # (B, K)
    total = 0.0
    for v, logits in enumerate(student_logits):
        if v < G:  # a global view: all teachers but the one that saw the same pixels
            q = sum_of_targets - targets[v]  # (B, K)
            mass = G - 1
        else:
            q = sum_of_targets  # (B, K)
            mass = G
        total = total + CrossEntropies.apply(q, logits, student_temp, mass).mean()
    return total / (G * V - G)


def patch_loss(targets: Tensor, student_logits: Tensor, weights: Tensor, crops: int,
               student_temp: float = 0.1) -> Tensor:
    """Cross-entropy at masked patches: the student guesses what the teacher saw. iBOT eq. 3:

        loss = sum over masked patches i of weight_i * H(P_t(i), P_s(i)) / crops

    targets and student_logits (M, K) are of the same patches. weights (M,) are 1 / (masked
    patches of that crop), so that crops count alike whatever the size of their mask, and 0 for
    padding. The sum is divided by `crops`, the number of global crops, also those without a
    mask, as in DINOv2's code.

    Example: of four crops, one has two masked patches, whose cross-entropies are 3 and 5, and
    one has a single one, of 2. The weights are .5, .5 and 1, the loss is (.5 * 3 + .5 * 5 + 1 *
    2) / 4 = 1.5. The log shows 1.5 * 4 / 2 = 3, the mean over the two masked crops, because that
    can be compared with H and with ln K.
    """
    each = CrossEntropies.apply(targets, student_logits, student_temp)  # (M,)
    return (weights * each).sum() / crops


def koleo_loss(features: Tensor) -> Tensor:
    """-log of the distance to the nearest other image: pushes features apart. DINOv2 sec. 4:

        loss = -mean over images i of log(min over j != i of |x_i - x_j|), with |x| = 1

    features (B, D) are class tokens of one view of B >= 2 different images. This is Kozachenko
    and Leonenko's estimate of entropy, with its sign turned, on the unit sphere: features that
    are spread evenly over the sphere have the lowest loss. Neighbours are searched among the
    images of this process only. ValueError for a single image.

    Example: features at 0, 60 and 180 degrees of a circle have their nearest neighbours at the
    distances 1, 1 and 1.73, so the loss is -(0 + 0 + .55) / 3 = -.18. It is below 0 where most
    neighbours are more than 1 apart; two opposite features have -ln 2 = -.69.
    """
    if len(features) < 2:
        raise ValueError(f"KoLeo of {len(features)} image has no neighbour to keep away from: "
                         "--batch_size_per_gpu at least 2, or --koleo_weight 0")

    # Distances of nearly equal features vanish in half precision, so this is computed in
    # float32.
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=1e-8)  # (B, D)

        # On the unit sphere the nearest image is the one with the largest cosine. The diagonal,
        # an image's cosine with itself, is set below any cosine: that of opposite features is
        # -1. Choosing has no gradient.
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)  # (B,)

        # The small constants bound the loss. pairwise_distance adds its eps to each of the D
        # coordinates, so two equal features are 1e-8 * sqrt(D) apart: 15 to 16 nats, not
        # infinity.
        distance = F.pairwise_distance(x, x[nearest], eps=1e-8)  # (B,)
        return -(distance + 1e-8).log().mean()


# ----------------------------------------------------------------------------------------------
# What the log needs to tell a healthy loss from a collapsed one


@torch.no_grad()
def entropies(targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(mean entropy of the targets, entropy of their mean over all processes), in nats.

    The first is near ln K when every target is nearly uniform (uniform collapse). The
    second is near 0 when the teacher gives the same sharp answer for every image (one-prototype
    collapse). A small first and a large second figure mean health. targets (..., K); weights,
    one per row, are 0 for padding.
    """
    rows = targets.flatten(0, -2)  # (n, K)
    each = torch.cat([row_entropies(x) for (x,) in chunks(rows)])[:, None]  # (n, 1)
    mean_target = column_mean(rows, weights)  # (K,)
    return column_mean(each, weights)[0], torch.special.entr(mean_target).sum()


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of (n, D): from 1 to min(n, D). RankMe.

    It counts the directions in which features vary: 1 if all lie on one line through the
    origin, min(n, D) if they vary equally in all directions. Garrido 2023, eq. 1.
    """
    # The squares of the singular values of x are the eigenvalues of x^T x, and of x x^T.
    # The smaller of the two matrices is decomposed: on the CPU, where it takes less time than on a
    # GPU, and in float64, because squares of small numbers lose digits.
    x = features.cpu().double()  # (n, D)
    square = x.T @ x if len(x) > x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(square).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-12)
    return torch.special.entr(p).sum().exp()


# ----------------------------------------------------------------------------------------------
# Between processes


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes; x itself with one. Only here do the losses cross processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()  # all_reduce writes into its argument
        dist.all_reduce(x)
    return x


def column_mean(rows: Tensor, real: Tensor | None = None, transform=Tensor.float) -> Tensor:
    """Mean of transform(rows) over the real rows of all processes, float32: (n, K) -> (K,).

    real (n,) weighs the rows, 0 for padding; without any real row the mean is 0. transform is
    applied to some rows at a time.
    """
    if real is None:
        real = torch.ones(len(rows), device=rows.device)  # (n,)
    else:
        real = real.float()  # (n,)
    total = sum(weight @ transform(part) for part, weight in chunks(rows, real))  # (K,)

    # Processes may hold different numbers of real rows, so a mean of their means would be
    # wrong. Sums and counts are added up in one exchange, and divided once.
    total = all_sum(torch.cat([total, real.sum()[None]]))
    return total[:-1] / total[-1].clamp(min=1)


# ----------------------------------------------------------------------------------------------
# A large (n, K) matrix, some rows at a time
#
# With thousands of rows of 65,536 numbers or more, targets and logits are the largest matrices
# of a step. Every function that reads or writes them takes some rows at a time, so that the float32
# copies of these rows stay in the processor's cache. On a GPU each such pass is compiled into
# one kernel.

# How many numbers of a matrix are processed at a time. On a GPU these are 512 rows if there are
# 131,072 prototypes, enough for the 132 units of an H100, which process a row each.
CHUNK = {"cpu": 2**20, "cuda": 2**26}
COMPILE = False  # train.compile_blocks sets it where it compiles the networks


def chunks(*tensors: Tensor):
    """Tensors of n rows, the first one (n, K) -> tuples of some rows of each, in order."""
    at_once = CHUNK.get(tensors[0].device.type, 2**24)
    rows = max(1, at_once // tensors[0].shape[1])
    return zip(*(x.split(rows) for x in tensors))


@functools.cache
def compiled(function):
    return torch.compile(function)


def one_pass(function):
    """Decorator: where training compiles, the function becomes one kernel for the rows given."""

    @functools.wraps(function)
    def run(*args):
        return (compiled(function) if COMPILE else function)(*args)

    return run


@one_pass
def probabilities(logits: Tensor, temp: float, bias: Tensor) -> Tensor:
    return F.softmax(logits.float() / temp + bias, -1)


@one_pass
def exponentials(logits: Tensor, temp: float, shift: Tensor) -> Tensor:
    # float32 holds up to exp(88), so logits far above `shift` are cut off; at 80, because a sum
    # over many rows must fit, too.
    return (logits.float() / temp - shift).clamp(max=80).exp()


class CrossEntropies(torch.autograd.Function):
    """-(q * log_softmax(s)).sum(-1) of each row, s = logits / temp: (n, K) twice -> (n,).

    The result is float32. The formula is the usual one. It is written as a Function because
    autograd would keep the log-softmax of all rows, another (n, K) matrix in float32, until the
    backward pass. Here only the inputs are kept, and the softmax is computed again. Each row of
    q adds up to `mass`.

    The gradient by s is mass * softmax(s) - q. Example: q = (.8, .2) and softmax(s) = (.5, .5)
    give (-.3, .3): the step against it raises the first logit and lowers the second.
    """

    @staticmethod
    def forward(ctx, q: Tensor, logits: Tensor, temp: float, mass: int = 1) -> Tensor:
        ctx.save_for_backward(q, logits)
        ctx.temp = temp
        ctx.mass = mass
        return torch.cat([row_losses(*rows, temp) for rows in chunks(q, logits)])  # (n,)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, logits = ctx.saved_tensors
        by_logits = torch.empty_like(logits)
        # s = logits / temp: the chain rule brings one more factor of 1 / temp.
        grad = grad / ctx.temp
        for rows in chunks(by_logits, q, logits, grad):
            fill_gradients(*rows, ctx.temp, ctx.mass)
        return None, by_logits, None, None  # targets, temperature and mass are constants


@one_pass
def row_losses(q: Tensor, logits: Tensor, temp: float) -> Tensor:
    return -(q * F.log_softmax(logits.float() / temp, -1)).sum(-1)


@one_pass
def fill_gradients(out: Tensor, q: Tensor, logits: Tensor, grad: Tensor, temp: float,
                   mass: int):
    # Written straight into `out`, so that a compiled pass stores each number once, in the type
    # of the logits, and no float32 copy of it.
    p = F.softmax(logits.float() / temp, -1)
    out.copy_((mass * p - q) * grad[:, None])


@one_pass
def row_entropies(q: Tensor) -> Tensor:
    return -(q * q.clamp(min=1e-38).log()).sum(-1)  # the clamp makes 0 * log(0) a 0


if __name__ == "__main__":
    import math

    torch.manual_seed(0)
    K = 1024
    # Logits with a small part that differs between images, and a large one that all images
    # share.
    logits = 0.1 * torch.randn(2, 64, K) + 0.4 * torch.randn(K)
    centre = EMACenter(K, momentum=0.0)  # the mean of this batch alone
    centre.update(logits)
    cases = {
        "neither": (NoCenter(K), 1.0), "sharpening only": (NoCenter(K), 0.02),
        "centering only": (centre, 1.0), "both": (centre, 0.02)}
    print(f"ln K = {math.log(K):.2f}        entropy of each target   entropy of their mean")
    for name, (centering, temp) in cases.items():
        each, mean = entropies(make_targets(logits, temp, centering(logits, temp)))
        print(f"{name:16s} {each:16.2f} {mean:24.2f}")
    print(
        "\nFirst number near ln K: every target is nearly uniform and says nothing about its image."
        "\nBoth small: the targets are sharp, but all images share one of them, or very few."
        "\nFirst small, second large ('both'): they are sharp, and differ from image to image.")
