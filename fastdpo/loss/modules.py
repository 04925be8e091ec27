"""`FusedLinearDPOLoss`: `linear_preference_loss` in the call form of Liger's LigerFusedLinearDPOLoss (0.8.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.formulas import PARAMETERS, LossOptions
from fastdpo.formulas.head_options import check_head_options
from fastdpo.formulas.options import takes_loss_options
from fastdpo.loss.dynamic_beta import DynamicBeta
from fastdpo.loss.linear_preference import LinearPreferenceOutput, check_sequence_options, linear_preference_loss

#: Rows of the head's weight that are summed at a time: on a CPU a 16-bit block is copied in float32.
_SUMMED_ROWS = 16384
#: Those of Liger's arguments that are options of the loss.
_LIGERS_DEFAULTS: dict[str, Any] = {
    "beta": LossOptions.beta,
    "loss_type": LossOptions.loss_type,
    "label_smoothing": LossOptions.label_smoothing,
    "discopop_tau": PARAMETERS["discopop_tau"].default,
}
#: chosen_logps, rejected_logps (B,); chosen_logits_mean, rejected_logits_mean, nll_loss 0-D; both rewards (B,).
Metrics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class FusedLinearDPOLoss(nn.Module):
    """A preference loss from hidden states and the head's weight, constructed and called as Liger's.

    The same numbers as Liger for its losses, with these differences. `beta` may be a `DynamicBeta`, whose statistics
    are then saved with this module and committed in training mode. Every loss of `preference_loss` is there, and lists
    of losses. `label_smoothing` acts on "sigmoid" too, and an option that the loss does not read is refused. Without
    `ref_weight` the reference is scored with the policy's head. A completion without targets scores 0, not NaN. Only
    the loss carries a gradient, which has no derivative (`linear_logprob`).

    Args:
        ignore_index: the target of prompt and padding.
        beta: float or `DynamicBeta`, no tensor.
        alpha: weight of the likelihood term.
        compute_nll_loss: add alpha times the chosen completions' negative log-likelihood, a mean over tokens (of the
            kept pairs, with a `DynamicBeta`).
        compiled, chunk_size: accepted so that a call of Liger's can stay as it is. They choose how Liger computes, not
            what: here the head plans its tiles itself, and the module may be compiled from outside.
        use_ref_model: whether there is a reference; else the loss is on plain log-probs, as if the reference's were 0.
        average_log_prob: means over tokens in the place of sums.
        loss_type, label_smoothing, discopop_tau: as below; by position too, as Liger's.
        process_group: as in `linear_preference_loss`.
        temperature, logit_scale, softcap: of the head, as in `linear_logprob`.
        backend: "auto", "torch" or "triton".
        options: the loss' options together, in the place of all that are below; the loss is a mean.

    Raises:
        ValueError, TypeError: an option unknown, out of range or without effect.
    """

    beta: float | DynamicBeta

    @takes_loss_options(without=["reduction"])
    def __init__(
        self,
        ignore_index: int = -100,
        beta: float | DynamicBeta = _LIGERS_DEFAULTS["beta"],
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str | Sequence[str] = _LIGERS_DEFAULTS["loss_type"],
        label_smoothing: float = _LIGERS_DEFAULTS["label_smoothing"],
        discopop_tau: float = _LIGERS_DEFAULTS["discopop_tau"],
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        options: LossOptions | None = None,
        **named: Any,
    ) -> None:
        super().__init__()
        chosen = options.beta if isinstance(options, LossOptions) else beta
        if not isinstance(chosen, (int, float, DynamicBeta)):
            raise TypeError(f"beta is a {type(chosen).__name__}; pass a float or a DynamicBeta.")
        self.beta = chosen
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1; it has no effect on the result.")
        if alpha != 1.0 and not compute_nll_loss:
            raise ValueError(f"alpha={alpha} weighs the likelihood term; it needs compute_nll_loss=True.")
        own = {"beta": beta, "loss_type": loss_type, "label_smoothing": label_smoothing, "discopop_tau": discopop_tau}
        given = _loss_options(options, own, named)
        self.loss_type, self.loss_weights = given.loss_type, given.loss_weights
        self.label_smoothing, self.f_divergence = given.label_smoothing, given.f_divergence
        self.reward_beta, self.loss_parameters = given.reward_beta, dict(given.parameters)
        self.ignore_index = ignore_index
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.head_options: dict[str, Any] = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        self.process_group, self.backend = process_group, backend
        check_sequence_options(self.options.terms, average_log_prob=average_log_prob)
        check_head_options((), **self.head_options)

    @property
    def options(self) -> LossOptions:
        """The loss' options as the attributes stand now, with the likelihood term as the loss "sft"."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = [1.0] * len(names) if self.loss_weights is None else list(self.loss_weights)
        if self.compute_nll_loss:
            names, weights = [*names, "sft"], [*weights, self.alpha]
        return LossOptions(
            loss_type=names,
            loss_weights=weights,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence=self.f_divergence,
            reward_beta=self.reward_beta,
            parameters=self.loss_parameters,
        )

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss of B pairs, and metrics without gradient.

        Args:
            lin_weight: (V, H).
            _input: (2B, T, H), hidden states, chosen first.
            target: (2B, T) int64, `ignore_index` on prompt and padding.
            bias: (V,).
            ref_input: (2B, T, H'), the reference's hidden states.
            ref_weight, ref_bias: (V, H') and (V,), its head; default the policy's.

        Returns:
            The loss, 0-D, and (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
            chosen_rewards, rejected_rewards). As Liger's, the means of logits are over all T positions, prompt and
            padding too, and over the vocabulary, of h Wᵀ + b before scale, cap and temperature; nll_loss is 0 unless
            it was asked for.

        Raises:
            ValueError, TypeError: as `linear_preference_loss`, by its names of the arguments; a reference that is
                missing, or unused because of use_ref_model=False.
        """
        if self.use_ref_model and ref_input is None:
            raise ValueError("ref_input is missing; pass the reference's hidden states, or set use_ref_model=False.")
        given = {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        stray = [name for name, tensor in given.items() if tensor is not None]
        if stray and not self.use_ref_model:
            raise ValueError(f"{stray} would not be read, as use_ref_model=False; leave them out.")
        output = linear_preference_loss(
            _input,
            lin_weight,
            target,
            bias=bias,
            ref_hidden=ref_input,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=None if self.use_ref_model else _input.new_zeros(_input.shape[:1], dtype=torch.float32),
            options=self.options,
            average_log_prob=self.average_log_prob,
            ignore_index=self.ignore_index,
            process_group=self.process_group,
            backend=self.backend,
            **self.head_options,
        )
        nll = self._nll(output, target)
        logits_means = _mean_logits(_input, lin_weight, bias)
        logps, rewards = (output.chosen_logps, output.rejected_logps), (output.chosen_rewards, output.rejected_rewards)
        return output.loss, (*logps, *logits_means, nll, *rewards)

    @torch.no_grad()
    def _nll(self, output: LinearPreferenceOutput, target: Tensor) -> Tensor:
        """The likelihood term as it stands in the loss, 0-D."""
        if not self.compute_nll_loss:
            return torch.zeros_like(output.loss)
        lengths = (target != self.ignore_index).sum(1).chunk(2)[0]
        sums = output.chosen_logps * lengths if self.average_log_prob else output.chosen_logps
        if output.plan is not None:
            sums, lengths = torch.where(output.plan.keep, sums, 0.0), torch.where(output.plan.keep, lengths, 0)
        return -sums.sum() / lengths.sum().clamp(min=1)


def _loss_options(options: LossOptions | None, own: dict[str, Any], named: dict[str, Any]) -> LossOptions:
    """`options`, or Liger's arguments (`own`) with the other ones `named`."""
    if options is not None:
        given = {name: value for name, value in own.items() if value is not _LIGERS_DEFAULTS[name]}
        if LossOptions.of(options, named | given).reduction != "mean":
            raise ValueError(f"options has reduction={options.reduction!r}; the module's loss is a mean, as Liger's.")
        return options
    if "reduction" in named:
        raise ValueError(f"reduction={named['reduction']!r} is not taken: the module's loss is a mean, as Liger's.")
    names = [own["loss_type"]] if isinstance(own["loss_type"], str) else own["loss_type"]
    if "discopop" not in names and own["discopop_tau"] == _LIGERS_DEFAULTS["discopop_tau"]:
        own = {name: value for name, value in own.items() if name != "discopop_tau"}
    return LossOptions.of(None, own | named)


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means of h Wᵀ + b over positions and vocabulary, of the chosen and of the rejected half.

    mean_{t,v}(h_t·W_v + b_v) = mean_t(h_t)·mean_v(W_v) + mean_v(b_v): W is read once, and no logit is computed.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    hidden_means = [half.mean((0, 1), dtype=dtype) for half in hidden.chunk(2)]
    blocks = torch.stack([block.sum(0, dtype=dtype) for block in weight.split(_SUMMED_ROWS)])
    weight_mean = blocks.sum(0) / weight.shape[0]
    bias_mean = 0.0 if bias is None else bias.mean(dtype=dtype)
    chosen, rejected = ((mean * weight_mean).sum() + bias_mean for mean in hidden_means)
    return chosen, rejected
