"""`linear_logprob` and `selective_logprob`: log-probs from hidden states or from logits, arguments as in the oracle.

`backend` is "auto", "torch" or "triton"; an explicit one that cannot run here raises and says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdpo.formulas.head_options import check_head_options
from fastdpo.ops.backends import resolve_backend
from fastdpo.ops.linear_logprob.operators import check_head_tensors
from fastdpo.ops.linear_logprob.tiles import MIN_WORKSPACE, WORKSPACE
from fastdpo.ops.selective_logprob.operators import check_logits, check_overwritable
from fastdpo.ops.targets import check_targets


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    backend: str = "auto",
    stats: Sequence[str] = (),
    workspace: int = WORKSPACE,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of the targets under the head, without its logits: z = (h Wᵀ + b)·logit_scale, capped, /temperature.

    Rows with `ignore_index` never reach a GEMM. A frozen head costs one GEMM of 2·N·H·V FLOPs, or two if `hidden` needs
    a gradient, whose backward then costs none; a trainable weight or bias recomputes the logits in the backward. Above
    inputs and outputs a tile of logits is in memory (`ops.linear_logprob.tiles`), whatever V is; on a GPU none where
    the fold is in the product's epilogue (`ops.linear_logprob.fused`, which says what it serves).

    Args:
        hidden: (..., H), floating point.
        weight: (V, H).
        targets: (...), int64 in [0, V) or `ignore_index`. Checked on a CPU; on a GPU only if FASTDPO_CHECK_TARGETS=1,
            as that waits for the device: there such a row becomes NaN.
        bias: (V,).
        softcap: bound of the logits, softcap·tanh(·/softcap), as in Gemma 2; None for none.
        ignore_index: the target of rows to leave out; None if there are none, which saves a GPU's host the one wait of
            a call, for their count.
        backend: "auto", "torch" or "triton".
        stats: names of further outputs, over the distribution that is scored: "entropy" in nats, "mean_logits" over
            the vocabulary, "is_top1" (bool; the first of equal logits counts), "log_sum_sq_probs" = log Σ_v p_v². They
            carry no gradient.
        workspace: bytes that a GPU's buffer of exponentials, or tile of logits, may take; at least 64 KiB. It decides
            in which order the vocabulary is added up, so runs are bitwise equal only where it is the same.

    Returns:
        (...) log-probs in float32 (float64 for float64), 0 where ignored; with `stats`, also {name: (...)}, 0 or False
        where ignored.

    Raises:
        ValueError, TypeError: an option, shape, dtype, device or target that does not fit, named with its value.
        NotImplementedError: for another derivative than the first by backward: a second one, forward mode, torch.func's
            transforms but vmap. `fastdpo.formulas.oracle` has them.
    """
    check_head_options(stats, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    check_head_tensors(hidden, weight, bias, targets)
    if workspace < MIN_WORKSPACE:
        raise ValueError(f"workspace={workspace} bytes is too little; the least is {MIN_WORKSPACE}.")
    states, own = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = scored_rows(own, len(weight), ignore_index)
    if rows is not None:
        ignore_index = None
        if len(rows) == len(own):
            rows = None
        else:
            states, own = states.index_select(0, rows), own.index_select(0, rows)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    logps, _, _, values = torch.ops.fastdpo.linear_logprob(
        states,
        weight,
        bias,
        own,
        ignore_index,
        float(logit_scale),
        float(temperature),
        None if softcap is None else float(softcap),
        _gemm_dtype(hidden, weight),
        hidden.requires_grad and frozen and torch.is_grad_enabled(),
        True,
        list(stats),
        workspace,
        resolve_backend(backend, hidden.device, torch.promote_types(hidden.dtype, weight.dtype)),
    )
    if rows is not None:
        logps, values = spread_rows(logps, rows, targets.numel()), spread_rows(values.t(), rows, targets.numel()).t()
    logps = logps.view(targets.shape)
    if not stats:
        return logps
    named = dict(zip(stats, values.reshape(len(stats), *targets.shape).unbind(), strict=True))
    return logps, {name: value.bool() if name == "is_top1" else value for name, value in named.items()}


def scored_rows(targets: Tensor, vocab_size: int, ignore_index: int | None) -> Tensor | None:
    """Positions of the rows that are not ignored, for targets (N,), whose range is checked as `linear_logprob` says.

    On a GPU the host waits for their count: the one wait of a call and its backward. None where nothing may be ignored,
    and where a tracer is at work, which has no count: the operator leaves the rows out then.
    """
    if ignore_index is None or torch.compiler.is_compiling() or type(targets) is not Tensor:
        return None
    check_targets(targets, vocab_size, ignore_index)
    return (targets != ignore_index).nonzero().squeeze(1)


def spread_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """(R, ...) → (count, ...), 0 in the other rows."""
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, rows, values)


def _gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the GEMM's operands are rounded to: autocast's dtype where that is on, as for torch's own linear."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and dtype != torch.float64 else dtype


def selective_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    backend: str = "auto",
    inplace_backward: bool = False,
) -> Tensor:
    """log softmax(logits / temperature)[target] of logits that exist already; `linear_logprob` never builds them.

    The logits are read once, in any strides (logits[:, :-1] is not copied), and once more in the backward. Memory above
    the inputs: the gradient, which `inplace_backward` saves, and with the torch backend a block of rows.

    Args:
        logits: (..., V), floating point.
        targets: (...), int64 in [0, V) or `ignore_index`. Checked on a CPU; on a GPU only if FASTDPO_CHECK_TARGETS=1,
            as that waits for the device: there such a row becomes NaN.
        ignore_index: the target of rows that score 0, with gradient 0, whatever their logits; None if there are none.
        backend: "auto", "torch" or "triton".
        inplace_backward: the backward overwrites the logits with their gradient. They may then be read no more, nor the
            backward be repeated; what autograd can see of that raises. Under torch.compile nothing is overwritten, as
            memory is the compiler's there.

    Returns:
        (...) log-probs in float32 (float64 for float64), 0 where ignored.

    Raises:
        NotImplementedError: as `linear_logprob`.
        ValueError, TypeError: an option, a shape, a dtype, a device or a target that does not fit, with its value.
        RuntimeError: in the backward, if `inplace_backward` meets retain_graph or create_graph.
    """
    check_head_options((), temperature=temperature, logit_scale=1.0, softcap=None)
    check_logits(logits, targets)
    operator = torch.ops.fastdpo.selective_logprob
    if inplace_backward and not torch.compiler.is_compiling():
        check_overwritable(logits)
        operator = torch.ops.fastdpo.selective_logprob_inplace_backward
    logps, _ = operator(logits, targets, ignore_index, float(temperature), resolve_backend(backend, logits.device))
    return logps
