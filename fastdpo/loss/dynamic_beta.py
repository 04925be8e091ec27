"""`DynamicBeta`: the running statistics of β-DPO (2407.08639) as a module whose state is saved and resumed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.formulas import BetaOptions, BetaPlan, BetaState
from fastdpo.formulas.checks import check_plan_tensors
from fastdpo.formulas.oracle import dynamic_beta
from fastdpo.formulas.signatures import documents_options
from fastdpo.ops.backends import check_backend_name
from fastdpo.ops.preference_loss.operators import PackedPlan, as_plan, plan_batch, serving_backend


@documents_options(BetaOptions)
class DynamicBeta(nn.Module):
    """Chooses β and the pairs to keep for every batch; the rules are `fastdpo.formulas.oracle.dynamic_beta`'s.

    Calling it plans a batch and, in training mode, commits the statistics. A trainer whose step may be retried calls
    `plan`, and `commit` once the optimizer has stepped. In eval mode the statistics are frozen and every pair is kept.

    Args:
        beta, alpha, momentum, keep_ratio, min_beta, scope, variant, seed: the fields of `BetaOptions`, as below.
        backend: "auto", "torch" or "triton"; all draw the same.

    Raises:
        ValueError: a setting is out of range.
    """

    m0: Tensor
    sigma: Tensor
    step: Tensor

    def __init__(
        self,
        beta: float = BetaOptions.beta,
        alpha: float = BetaOptions.alpha,
        momentum: float = BetaOptions.momentum,
        keep_ratio: float = BetaOptions.keep_ratio,
        min_beta: float = BetaOptions.min_beta,
        scope: str = BetaOptions.scope,
        variant: str = BetaOptions.variant,
        seed: int = BetaOptions.seed,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options = BetaOptions(beta, alpha, momentum, keep_ratio, min_beta, scope, variant, seed)
        check_backend_name(backend)
        self.backend = backend
        self.register_buffer("m0", torch.zeros((), dtype=torch.float32))
        self.register_buffer("sigma", torch.zeros((), dtype=torch.float32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def beta(self) -> float:
        """β0, which also scales the rewards."""
        return float(self.options.beta)

    @property
    def state(self) -> BetaState:
        """The statistics, 0-D: m0 and sigma in float32, step in int64."""
        return BetaState(self.m0, self.sigma, self.step)

    def plan_options(self) -> PackedPlan:
        """The settings as operators take them."""
        return PackedPlan(self.options, self.training)

    def backend_for(self, backend: str) -> str:
        """The backend of a call that names one too. Raises ValueError where the two differ."""
        if "auto" not in (backend, self.backend) and backend != self.backend:
            raise ValueError(f"backend={backend!r}, but the DynamicBeta has backend={self.backend!r}; give it to one.")
        return self.backend if backend == "auto" else backend

    def plan(self, margins: Tensor, *, backend: str = "auto") -> BetaPlan:
        """Plan the batch of these (N,) margins without changing the state; `backend` defaults to the module's."""
        margins = margins.detach()
        check_plan_tensors(margins, *self.state)
        backend = serving_backend(self.backend_for(backend), margins, margins.shape[0])
        if backend == "torch":
            return dynamic_beta(margins, self.state, options=self.options, training=self.training)
        return as_plan(plan_batch(margins, *self.state, *self.plan_options().packed(), backend))

    # In training: `FastDPOTrainer.commit_plan`, which the callback `CommitStatistics` calls after the optimizer's step
    @torch.no_grad()
    def commit(self, plan: BetaPlan) -> None:
        """Write the plan's statistics into the buffers, in place."""
        self.m0.copy_(plan.state.m0)
        self.sigma.copy_(plan.state.sigma)
        self.step.copy_(plan.state.step)

    def forward(
        self, margins: Tensor, process_group: dist.ProcessGroup | None = None, *, backend: str = "auto"
    ) -> BetaPlan:
        """Plan the global batch and, in training mode, commit it.

        Args:
            margins: (B,), this rank's raw log-ratio gaps.
            process_group: ranks that share the batch, each with B pairs; None for this rank alone.
            backend: of the plan; default: the module's.

        Returns:
            The plan of the global batch, pairs ordered by rank, with this rank's part of `keep` (and of an
            instance-level `beta`), (B,). Every rank draws the same.
        """
        gathered, first_pair = gather_margins(margins.detach(), process_group)
        plan = self.plan(gathered, backend=backend)
        if self.training:
            self.commit(plan)
        return plan_of(plan, slice(first_pair, first_pair + margins.numel()))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicBeta:
        # .half() and .to(dtype) move the statistics but leave them as they are: 16 bits cannot hold a running mean
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(move, recurse)


def gather_margins(margins: Tensor, process_group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """The margins of all ranks, ordered by rank, and where this rank's begin. Every rank has as many."""
    if process_group is None:
        return margins, 0
    parts = [torch.empty_like(margins) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, margins.contiguous(), group=process_group)
    return torch.cat(parts), dist.get_rank(process_group) * margins.numel()


def plan_of(plan: BetaPlan, pairs: slice) -> BetaPlan:
    """The plan with the `keep` and the β of these pairs alone."""
    return plan._replace(keep=plan.keep[pairs], beta=plan.beta[pairs] if plan.beta.dim() else plan.beta)
