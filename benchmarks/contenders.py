"""The implementations that are compared, each as one function of a case's inputs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdpo
from benchmarks.cases import HeadCase, HeadInputs, PairInputs, head_inputs

#: What TRL's DPOTrainer asks its head for; of a PEFT model in the reference pass too, as it is the same model.
TRL_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


class Outcome(NamedTuple):
    """DPO loss, 0-D, and its gradient with respect to the hidden states, (2B, T, H)."""

    loss: Tensor
    hidden_grad: Tensor


# The head alone


def fastdpo_head(x: HeadInputs) -> None:
    """Policy forward and backward, reference forward."""
    fastdpo_policy_head(x)
    with torch.no_grad():
        fastdpo_logps(x.ref_hidden, x.weight, x.targets)


def warm_up(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Load BLAS and its threads, the operators and autograd, which take more than a second in the first call."""
    fastdpo_head(head_inputs(HeadCase(16, 32, 64), dtype, device=device))


def fastdpo_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logps = fastdpo.linear_logprob(hidden, weight, targets, ignore_index=None)
    assert isinstance(logps, Tensor)  # no statistics were asked for
    return logps


def fastdpo_policy_head(x: HeadInputs) -> Tensor:
    logps = fastdpo_logps(x.hidden, x.weight, x.targets)
    (gradient,) = torch.autograd.grad(logps, x.hidden, x.grad_logps)
    return gradient


class BareGemms:
    """h Wᵀ, P W, h Wᵀ into outputs that exist already: what nothing with these three products can beat by much."""

    def __init__(self, x: HeadInputs) -> None:
        self.hidden, self.ref_hidden, self.weight = x.hidden.detach(), x.ref_hidden, x.weight
        rows, vocab = len(x.hidden), len(x.weight)
        self.probs = x.weight.new_full((rows, vocab), 1.0 / vocab)
        self.logits = torch.zeros_like(self.probs)
        self.gradient = torch.zeros_like(self.hidden)

    def __call__(self) -> None:
        torch.mm(self.hidden, self.weight.t(), out=self.logits)
        torch.mm(self.probs, self.weight, out=self.gradient)
        torch.mm(self.ref_hidden, self.weight.t(), out=self.logits)


def against_floor(x: HeadInputs) -> dict[str, Callable[[], None]]:
    """fastdpo's head and the bare GEMMs, on the same inputs."""
    return {"fastdpo": lambda: fastdpo_head(x), "floor": BareGemms(x)}


def full_logits_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits in the inputs' dtype, their log-softmax in float32. (N, H), (V, H), (N,) → (N,)."""
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def full_logits_policy_head(x: HeadInputs) -> Tensor:
    (gradient,) = torch.autograd.grad(full_logits_logps(x.hidden, x.weight, x.targets), x.hidden, x.grad_logps)
    return gradient


class CompiledPolicyHead:
    """`full_logits_policy_head` under torch.compile, compiled anew for each shape."""

    def __init__(self, backend: str) -> None:
        self.logps = torch.compile(full_logits_logps, backend=backend, dynamic=False)

    def __call__(self, x: HeadInputs) -> Tensor:
        (gradient,) = torch.autograd.grad(self.logps(x.hidden, x.weight, x.targets), x.hidden, x.grad_logps)
        return gradient


def trl_policy_head(x: HeadInputs) -> Tensor:
    (gradient,) = torch.autograd.grad(_trl_logps(x.hidden, x.weight, x.targets), x.hidden, x.grad_logps)
    return gradient


def liger_policy_head(x: HeadInputs, sequences: int = 8) -> Tensor:
    """The rows as 8 sequences, without a reference, to Liger's own loss."""
    hidden, targets = x.hidden.view(sequences, -1, x.hidden.shape[1]), x.targets.view(sequences, -1)
    loss = _liger_loss(x.weight, hidden, targets, None, compiled=x.hidden.is_cuda)
    (gradient,) = torch.autograd.grad(loss, x.hidden)
    return gradient


def cce_policy_head(x: HeadInputs) -> Tensor:
    """cut-cross-entropy's Triton kernels, which need a GPU, as they come: gradients below 2⁻¹² are left out."""
    (gradient,) = torch.autograd.grad(-_cce_losses(x.hidden, x.weight, x.targets), x.hidden, x.grad_logps)
    return gradient


#: Policy forward and backward, for the memory section.
POLICY_HEADS: dict[str, Callable[[HeadInputs], Tensor]] = {
    "fastdpo": fastdpo_policy_head,
    "Liger": liger_policy_head,
    "TRL's head": trl_policy_head,
    "full logits": full_logits_policy_head,
}


# A preference batch


def fastdpo_pairs(x: PairInputs) -> Outcome:
    output = fastdpo.linear_preference_loss(x.hidden, x.weight, x.targets, ref_hidden=x.ref_hidden, beta=x.beta)
    return _outcome(output.loss, x)


def liger_pairs(x: PairInputs) -> Outcome:
    """With a weight that needs no gradient Liger computes none, its best setting for a frozen head."""
    return _outcome(_liger_loss(x.weight, x.hidden, x.targets, x.ref_hidden, x.beta), x)


def trl_pairs(x: PairInputs) -> Outcome:
    """The head as DPOTrainer installs and calls it; on a CPU it scores every row."""

    def score(hidden: Tensor) -> Tensor:
        return _trl_model(hidden, x.weight)(shift_labels=x.targets, fused_lm_head=True).log_probs.sum(1)

    return _dpo_outcome(score, x)


def trl_scored_pairs(x: PairInputs) -> Outcome:
    """TRL's head given the scored rows only, as it does on CUDA."""
    mask = x.mask

    def score(hidden: Tensor) -> Tensor:
        logps = _trl_logps(hidden[mask], x.weight, x.targets[mask])
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum(1)

    return _dpo_outcome(score, x)


def full_logits_pairs(x: PairInputs) -> Outcome:
    """All logits of all rows, as a model's own forward gives them."""

    def score(hidden: Tensor) -> Tensor:
        logps = (hidden @ x.weight.t()).float().log_softmax(-1)
        return (logps.gather(-1, x.targets.clamp(min=0)[..., None]).squeeze(-1) * x.mask).sum(1)

    return _dpo_outcome(score, x)


def true_pairs(x: PairInputs) -> Outcome:
    """The truth in float64, of the scored rows."""
    weight, mask = x.weight.double(), x.mask

    def score(hidden: Tensor) -> Tensor:
        logps = (hidden[mask].double() @ weight.t()).log_softmax(-1).gather(1, x.targets[mask][:, None]).squeeze(1)
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum(1)

    return _dpo_outcome(score, x)


def _dpo_outcome(score: Callable[[Tensor], Tensor], x: PairInputs) -> Outcome:
    """score: (2B, T, H) hidden states → (2B,) summed log-probs."""
    chosen, rejected = score(x.hidden).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = score(x.ref_hidden).chunk(2)
    return _outcome(-F.logsigmoid(x.beta * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean(), x)


def _outcome(loss: Tensor, x: PairInputs) -> Outcome:
    (gradient,) = torch.autograd.grad(loss, x.hidden)
    return Outcome(loss.detach(), gradient)


# The peers' own entrances, imported where they are needed


def _liger_loss(
    weight: Tensor,
    hidden: Tensor,
    targets: Tensor,
    ref_hidden: Tensor | None,
    beta: float = 0.1,
    *,
    compiled: bool = False,
) -> Tensor:
    """compiled: Liger's default, and its best setting on a GPU; on a CPU it gains nothing here."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=beta, compiled=compiled, use_ref_model=ref_hidden is not None)
    return loss(weight, hidden, targets, ref_input=ref_hidden, ref_weight=None if ref_hidden is None else weight)[0]


def _cce_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(N, H), (V, H), (N,) → (N,)."""
    from cut_cross_entropy import linear_cross_entropy

    losses: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce")
    return losses


def _trl_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(N, H), (V, H), (N,) → (N,)."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    return _ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, TRL_OUTPUTS
    )[0]


class _HeadOnly(nn.Module):
    """A causal LM whose body has run already, for TRL to install its head on."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(get_text_config=lambda: self.config, model_type="llama")
        self.base_model = lambda use_cache: SimpleNamespace(last_hidden_state=hidden)
        self.head = SimpleNamespace(weight=weight, bias=None)

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self) -> None:
        raise NotImplementedError("only the fused head is measured")


def _trl_model(hidden: Tensor, weight: Tensor) -> nn.Module:
    from trl.trainer.utils import add_fused_lm_head

    model = _HeadOnly(hidden, weight)
    add_fused_lm_head(model, outputs=TRL_OUTPUTS)
    return model
