"""Agreement with TRL's DPO loss, in float32: values and gradients of its 15 losses, 4 f-divergences, LD-DPO and WPO.

TRL's `_compute_loss` runs unbound on a stand-in for the trainer and a model that returns given log-probs.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.formulas import LOSSES
from fastdpo.formulas.oracle import completion_logps, preference_loss

DPOTrainer = pytest.importorskip("trl").DPOTrainer

B, T = 6, 9
TRL_LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
DIVERGENCES = ["forward_kl", "js_divergence", "alpha_divergence"]


class Batch:
    """2B sequences, chosen first, whose completions differ in length; token log-probs are the leaf."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        lengths = torch.tensor([3, 7, 5, 2, 8, 4, 6, 2, 5, 7, 1, 3])
        position = torch.arange(T + 1)
        self.mask = ((position >= 1) & (position <= lengths.unsqueeze(1))).long()  # (2B, T + 1)
        self.token_mask = self.mask[:, 1:]
        self.token_logps = (-2.0 * torch.rand(2 * B, T, generator=g) * self.token_mask).requires_grad_()
        self.log_sum_sq_probs = -torch.rand(2 * B, T, generator=g)
        noise = torch.randn(2, B, generator=g)
        self.ref_chosen, self.ref_rejected = self.token_logps.detach().sum(1).view(2, B) + noise
        self.lengths = lengths.view(2, B)

    def trl_loss(self, loss_types: list[str], **changes: Any) -> Tensor:
        settings = {
            "model": SimpleNamespace(training=True),
            "accelerator": SimpleNamespace(
                device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
            ),
            "args": SimpleNamespace(discopop_tau=0.05),
            "precompute_ref_logps": True,
            "aux_loss_enabled": False,
            "use_weighting": False,
            "ld_alpha": None,
            "loss_types": loss_types,
            "loss_weights": [1.0] * len(loss_types),
            "beta": 0.3,
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "_metrics": defaultdict(lambda: defaultdict(list)),
            "_total_train_tokens": 0,
            "_tp_size": 1,
        }
        zeros = torch.zeros(2 * B, T)
        output = SimpleNamespace(
            log_probs=self.token_logps,
            log_sum_sq_probs=self.log_sum_sq_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )
        inputs = {
            "input_ids": torch.zeros_like(self.mask),
            "attention_mask": torch.ones_like(self.mask),
            "completion_mask": self.mask,
            "ref_chosen_logps": self.ref_chosen,
            "ref_rejected_logps": self.ref_rejected,
        }
        return DPOTrainer._compute_loss(SimpleNamespace(**{**settings, **changes}), lambda **_: output, inputs, False)

    def loss(self, loss_types: list[str], ld_alpha: float | None = None, **options: Any) -> Tensor:
        others = None if ld_alpha is None else self.lengths.flip(0).reshape(-1)
        logps = completion_logps(self.token_logps, self.token_mask, other_lengths=others, ld_alpha=ld_alpha)
        return preference_loss(
            *logps.view(2, B),
            self.ref_chosen,
            self.ref_rejected,
            loss_type=loss_types,
            chosen_lengths=self.lengths[0],
            rejected_lengths=self.lengths[1],
            sft_logps=completion_logps(self.token_logps, self.token_mask)[:B],
            **{"beta": 0.3, **options},
        ).loss

    def assert_same(self, ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
        (our_grad,) = torch.autograd.grad(ours, self.token_logps)
        (their_grad,) = torch.autograd.grad(theirs, self.token_logps)
        on_completion = self.token_mask.bool()
        assert their_grad[on_completion].abs().max() > 0
        # Off the completion TRL has whatever its log-probs have there; its own are constant zeros
        torch.testing.assert_close(our_grad[on_completion], their_grad[on_completion], rtol=1e-5, atol=1e-6)


@pytest.fixture
def batch() -> Batch:
    return Batch()


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_losses(batch: Batch, name: str) -> None:
    # TRL's sigmoid ignores label smoothing
    epsilon = 0.1 if LOSSES[name].uses_label_smoothing and name != "sigmoid" else 0.0
    batch.assert_same(batch.loss([name], label_smoothing=epsilon), batch.trl_loss([name], label_smoothing=epsilon))


@pytest.mark.parametrize("f_divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [name for name in TRL_LOSSES if LOSSES[name].supports_f_divergence])
def test_f_divergences(batch: Batch, name: str, f_divergence: str) -> None:
    epsilon = 0.1 if name in ("exo_pair", "robust") else 0.0
    parameters = {"f_alpha_divergence_coef": 0.3} if f_divergence == "alpha_divergence" else {}
    batch.assert_same(
        batch.loss([name], label_smoothing=epsilon, f_divergence=f_divergence, **parameters),
        batch.trl_loss([name], label_smoothing=epsilon, f_divergence_type=f_divergence, **parameters),
    )


def test_mixed_losses(batch: Batch) -> None:
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]
    batch.assert_same(batch.loss(names, loss_weights=weights), batch.trl_loss(names, loss_weights=weights))


@pytest.mark.parametrize("names", [["sigmoid"], ["sigmoid", "sft"]], ids="+".join)
def test_ld_dpo(batch: Batch, names: list[str]) -> None:
    batch.assert_same(batch.loss(names, ld_alpha=0.4), batch.trl_loss(names, ld_alpha=0.4))


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_wpo(batch: Batch, name: str) -> None:
    """WPO's weight of a completion: exp of the token mean of log p − log Σ p² (2406.11827 eq. 2, aligned)."""
    aligned = (batch.token_logps.detach() - batch.log_sum_sq_probs) * batch.token_mask
    weights = (aligned.sum(1) / batch.token_mask.sum(1)).exp().view(2, B)
    batch.assert_same(
        batch.loss([name], pair_weights=weights[0] * weights[1]), batch.trl_loss([name], use_weighting=True)
    )
