"""BatchNorm over all processes: mean and variance of the joined batch, whoever holds its rows.

    rows of process 0 --> mean, variance --+                            +--> rows, normalised
                                           +--> those of all rows ------+
    rows of process 1 --> mean, variance --+                            +--> rows, normalised

Idea     BatchNorm subtracts the mean of the batch and divides by its deviation. When a batch is
         shared out, each process would normalise by its own part of it, and the result would
         depend on the number of processes. So they exchange two numbers for each channel, once
         in the forward pass and once in the backward pass.
Paper    BatchNorm (Ioffe and Szegedy 2015), Alg. 1
Try      pytest tests/machinery/test_batch_norm.py
Change   BatchNorm over part of the processes: a group for the two exchanges below
Tests    pytest tests/machinery/test_batch_norm.py

Letters  N rows of one process: all places of all its images; C channels.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

# torch.nn.SyncBatchNorm does the same on GPUs, but not on CPUs. It also makes the program wait
# for the GPU at every call, as it looks for processes without rows. Ours all have equally many.


def synchronise(network: nn.Module) -> nn.Module:
    """The same network, whose BatchNorm layers see the rows of all processes from now on."""
    # Only the class is another one: parameters, statistics and their names stay as they are.
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = BatchNorm
    return network


class BatchNorm(_BatchNorm):
    """BatchNorm1d or 2d, of (N, C) or (B, C, H, W), over the rows of all processes.

    Every process must have as many rows as every other.
    """

    def _check_input_dim(self, x: Tensor):
        """Any number of dimensions: where N is, and where C, is the same for all."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # the statistics that were gathered in training
            return super().forward(x)

        # What each process finds in its own rows.
        with torch.no_grad():
            dims = [d for d in range(x.ndim) if d != 1]
            var, mean = torch.var_mean(x.float(), dims, correction=0)  # (C,) each
            own = torch.stack([mean, var])  # (2, C)
            gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, own)

            # The variance of the joined batch is the mean of the variances, and the variance of
            # the means. Example: rows 1, 3 on one process and 5, 7 on the other. The variances
            # are 1 and 1, the means 2 and 6: each is 2 away from their mean 4, so the variance
            # of all four rows is 1 + 2**2 = 5.
            means, variances = torch.stack(gathered).unbind(1)  # (processes, C) each
            mean = means.mean(0)  # (C,)
            var = (variances + (means - mean)**2).mean(0)  # (C,)

            # The running variance is the unbiased one, as in every BatchNorm of PyTorch.
            rows = x.numel() // x.shape[1] * dist.get_world_size()
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * rows / max(rows - 1, 1), self.momentum)
        return Normalise.apply(x, self.weight, self.bias, mean, var, self.eps)


class Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on all x.

    With n = (x - mean) / sqrt(var + eps) and g the gradient by weight * n + bias, that by x is

        weight / sqrt(var + eps) * (g - mean(g) - n * mean(g * n))

    The first term alone would be right if mean and var were constants. The other two take from
    g what moving the mean, or the deviation, would take back. These means are over the joined
    batch, too, so here is the second exchange.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor,
                eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, mean, var = ctx.saved_tensors
        # PyTorch's own kernel for constant mean and var, in one pass over the rows: the first
        # term, and the sums of g * n and of g, which are the gradients of weight and bias.
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])

        # The other two terms are a straight line in x: n is (x - mean) * scale.
        rows = x.numel() // x.shape[1]
        sums = torch.stack([by_bias, by_weight])  # (2, C)
        dist.all_reduce(sums)
        mean_g, mean_gn = sums / (rows * dist.get_world_size())  # (C,) each
        scale = (var + ctx.eps).rsqrt()
        slope = weight * scale**2 * mean_gn
        offset = weight * scale * mean_g
        shape = (1, -1) + (1,) * (x.ndim - 2)  # along the channels
        line = (x - mean.view(shape)) * slope.view(shape) + offset.view(shape)
        return (by_x - line).to(x.dtype), by_weight, by_bias, None, None, None
