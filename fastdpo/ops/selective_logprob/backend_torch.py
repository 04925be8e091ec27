"""`selective_logprob` in PyTorch: by blocks of rows that stay in the cache from the maximum to the sum.

Memory beyond the outputs: a block in the statistics' dtype, and for 16-bit logits PyTorch's own conversion of it. A
block is BLOCK_BYTES, or one row where that is more. On a CPU ignored rows are not read, but for the gradient's zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.ops.selective_logprob.operators import check_logits
from fastdpo.ops.selective_logprob.row_views import blocks, scored_rows, statistics_dtype
from fastdpo.ops.targets import check_targets

#: Per thread of a CPU, about its part of L2; a GPU needs more to be filled.
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 2**20, 64 * 2**20


def forward(logits: Tensor, targets: Tensor, ignore_index: int | None, temperature: float) -> tuple[Tensor, Tensor]:
    """logps (...) and normalizers (2, ...)."""
    check_logits(logits, targets)
    check_targets(targets, logits.shape[-1], ignore_index)
    dtype = statistics_dtype(logits)
    logps = torch.zeros(targets.shape, dtype=dtype, device=logits.device)
    normalizers = logps.new_zeros(2, *targets.shape)
    flat_targets, flat_logps, flat_normalizers = targets.reshape(-1), logps.view(-1), normalizers.view(2, -1)
    work = _work(logits, dtype)
    for rows, x, wanted in blocks(logits, scored_rows(targets, ignore_index), len(work)):
        if wanted is False:
            continue
        column, valid = _columns(flat_targets[rows], logits.shape[-1])
        peak = x.amax(1, keepdim=True).to(dtype)
        # z − m = (x − peak)/T
        centred = torch.sub(x, peak, out=work[: len(x)])
        if temperature != 1.0:
            centred.div_(temperature)
        target_logit = centred.gather(1, column).squeeze(1).masked_fill(~valid, torch.nan)
        # log Σ exp(z − m)
        log_total = centred.exp_().sum(1).log_()
        flat_logps[rows] = target_logit - log_total
        flat_normalizers[0, rows], flat_normalizers[1, rows] = peak.squeeze(1), log_total
    if ignore_index is not None:
        ignored = targets == ignore_index
        logps.masked_fill_(ignored, 0.0)
        normalizers.masked_fill_(ignored, 0.0)
    return logps, normalizers


def backward(
    grad: Tensor, logits: Tensor, targets: Tensor, normalizers: Tensor, ignore_index: int | None, temperature: float
) -> Tensor:
    """dL/dlogits (..., V) for grad = dL/dlogps (...), contiguous."""
    gradient = logits.new_empty(logits.shape)
    _backward(grad, logits, targets, normalizers, ignore_index, temperature, gradient.view(-1, logits.shape[-1]))
    return gradient


def backward_(
    grad: Tensor, logits: Tensor, targets: Tensor, normalizers: Tensor, ignore_index: int | None, temperature: float
) -> None:
    """`backward`, over the logits."""
    _backward(grad, logits, targets, normalizers, ignore_index, temperature, None)


def _backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    normalizers: Tensor,
    ignore_index: int | None,
    temperature: float,
    out: Tensor | None,
) -> None:
    """Write dL/dlogits into out (N, V), or over the logits."""
    flat_targets, flat_grad = targets.reshape(-1), grad.reshape(-1, 1)
    peak, log_total = normalizers.reshape(2, -1, 1).unbind(0)
    scored = scored_rows(targets, ignore_index)
    # Where the gradient is as wide as the statistics, it is itself the memory that a block is computed in
    work = _work(logits, normalizers.dtype)
    for rows, x, wanted in blocks(logits, scored, len(work)):
        gradient = x if out is None else out[rows]
        if wanted is False:
            gradient.zero_()
            continue
        column, valid = _columns(flat_targets[rows], logits.shape[-1])
        scale = flat_grad[rows].masked_fill(~valid.unsqueeze(1), torch.nan) / temperature
        # −p = −exp((x − peak)/T − log Σ), in one block's memory
        block = gradient if gradient.dtype == normalizers.dtype else work[: len(x)]
        torch.sub(x, peak[rows], out=block)
        if temperature != 1.0:
            block.div_(temperature)
        block.sub_(log_total[rows]).exp_().mul_(-scale)
        block.scatter_add_(1, column, scale)
        if wanted is None and scored is not None:
            block.masked_fill_(~scored[rows].unsqueeze(1), 0.0)
        if block is not gradient:
            gradient.copy_(block)


def _work(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a block, (rows, V)."""
    on_cpu = logits.device.type == "cpu"
    size = CPU_BLOCK_BYTES * torch.get_num_threads() if on_cpu else GPU_BLOCK_BYTES
    vocab = logits.shape[-1]
    rows = max(size // (max(vocab, 1) * dtype.itemsize), 1)
    return torch.empty(min(rows, max(logits.shape[:-1].numel(), 1)), vocab, dtype=dtype, device=logits.device)


def _columns(targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Targets (R,) as indices (R, 1) that may be read, and whether they are the targets (R,)."""
    return targets.clamp(0, vocab - 1).unsqueeze(1), (targets >= 0) & (targets < vocab)
