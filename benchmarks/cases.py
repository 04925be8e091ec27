"""What is measured: shapes, inputs, and the FLOPs and bytes that each case must spend.

Inputs look like a model's: hidden states of unit variance and logits of standard deviation 3. Seeds are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOGIT_STD = 3.0
#: Distance of the reference's hidden states from the policy's, in their standard deviation.
REFERENCE_DISTANCE = 0.1
IGNORE_INDEX = -100


@dataclass(frozen=True)
class HeadCase:
    """Scored rows through a frozen head: policy forward and backward, and the reference's forward.

    Attributes:
        rows, hidden, vocab: N, H, V.
        target: bound of the time over that of three bare GEMMs, in float32.
        peers: whether the memory section measures the peers on it too.
        heavy: left out unless asked for.
    """

    rows: int
    hidden: int
    vocab: int
    target: float | None = None
    peers: bool = False
    heavy: bool = False

    @property
    def name(self) -> str:
        return f"{self.rows:,} rows, H = {self.hidden}, V = {self.vocab:,}"

    @property
    def flops(self) -> int:
        """Of three GEMMs, each 2·N·H·V."""
        return 6 * self.rows * self.hidden * self.vocab

    def bytes(self, itemsize: int = 4) -> int:
        """The weight once for the policy and once for the reference; both hidden states read, a gradient written."""
        return itemsize * (2 * self.vocab * self.hidden + 3 * self.rows * self.hidden)


@dataclass(frozen=True)
class HeadInputs:
    """hidden (N, H) that needs a gradient, ref_hidden (N, H), frozen weight (V, H), targets (N,), dL/dlogp (N,)."""

    hidden: Tensor
    ref_hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad_logps: Tensor


@dataclass(frozen=True)
class PairCase:
    """A padded batch of prompt + completion, shaped like HH: 2·pairs sequences, chosen first."""

    pairs: int
    hidden: int
    vocab: int
    prompt: tuple[int, int] = (60, 240)
    completion: tuple[int, int] = (20, 120)
    beta: float = 0.1

    def flops(self, rows: int, gemms: int) -> int:
        """Of `gemms` head GEMMs over this many rows."""
        return 2 * gemms * rows * self.hidden * self.vocab


@dataclass(frozen=True)
class PairInputs:
    """hidden, ref_hidden (2B, T, H), chosen first; frozen weight (V, H); targets (2B, T), IGNORE_INDEX where unscored.

    Row t predicts token t + 1, so nothing is left to shift.
    """

    hidden: Tensor
    ref_hidden: Tensor
    weight: Tensor
    targets: Tensor
    beta: float

    @property
    def mask(self) -> Tensor:
        return self.targets != IGNORE_INDEX

    @property
    def scored_rows(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True)
class LossCase:
    """Everything after the head, for ragged completions of 20 to 120 tokens; bound in milliseconds, None for none."""

    pairs: int
    target_ms: float | None = None


HEAD_CASES = (
    HeadCase(1024, 896, 151936, target=1.08),
    HeadCase(1024, 2048, 32000, target=1.08),
    HeadCase(1024, 576, 49152, target=1.10),
    *(HeadCase(n, h, v) for n in (128, 16) for h, v in ((896, 151936), (2048, 32000), (576, 49152))),
)
PAIR_CASE = PairCase(pairs=8, hidden=576, vocab=49152)
ROW_SCALING = tuple(HeadCase(n, 576, 32000) for n in (256, 512, 1024, 2048, 4096, 8192))
VOCAB_SCALING = tuple(HeadCase(1024, 576, v) for v in (32000, 64000, 128000, 256000))
MEMORY_CASES = tuple(
    HeadCase(n, h, v, peers=(n, h) == (1024, 576), heavy=h * v > 5e8)
    for n in (1024, 4096)
    for h in (576, 2048)
    for v in (32000, 256000)
)
LOSS_CASES = (LossCase(8), LossCase(64, target_ms=1.0), LossCase(1024))
#: One completion, and how many of them, for the error of a summed log-prob.
ACCURACY_CASE = HeadCase(512, 576, 49152)
ACCURACY_COMPLETIONS = {torch.bfloat16: 15, torch.float32: 5}

#: Heads of a GPU: what `linear_logprob.gpu_static` predicts and `benchmarks.gpu` measures.
GPU_HEADS = (HeadCase(4096, 4096, 128256), HeadCase(4096, 896, 151936), HeadCase(8192, 2048, 128256))

#: Shapes that only show that everything runs.
TINY_HEAD = (HeadCase(16, 16, 301, target=1.08), HeadCase(5, 8, 97))
TINY_PAIR = PairCase(pairs=2, hidden=16, vocab=301, prompt=(3, 9), completion=(2, 6))
TINY_ROW_SCALING = tuple(HeadCase(n, 16, 301) for n in (4, 8, 16))
TINY_VOCAB_SCALING = tuple(HeadCase(4, 16, v) for v in (97, 201, 301))
TINY_LOSS = (LossCase(3, target_ms=1.0),)


def head_weight(case: HeadCase | PairCase, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """(V, H) where the generator is, giving logits of LOGIT_STD from hidden states of unit variance."""
    weight = torch.empty(case.vocab, case.hidden, device=generator.device)
    return weight.normal_(std=LOGIT_STD / case.hidden**0.5, generator=generator).to(dtype)


def head_inputs(
    case: HeadCase, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> HeadInputs:
    """Drawn on `device`: each kind of device has numbers of its own."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(case.rows, case.hidden, generator=generator, device=device)
    reference = hidden + REFERENCE_DISTANCE * torch.randn(hidden.shape, generator=generator, device=device)
    return HeadInputs(
        hidden.to(dtype).requires_grad_(),
        reference.to(dtype),
        head_weight(case, dtype, generator),
        torch.randint(0, case.vocab, (case.rows,), generator=generator, device=device),
        torch.randn(case.rows, generator=generator, device=device),
    )


def pair_inputs(
    case: PairCase, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> PairInputs:
    """Drawn on the CPU whatever the device, as the shapes follow from the draws."""
    generator = torch.Generator().manual_seed(seed)

    def draw(bounds: tuple[int, int], count: int) -> Tensor:
        return torch.randint(bounds[0], bounds[1] + 1, (count,), generator=generator)

    prompts = draw(case.prompt, case.pairs).repeat(2)  # both completions of a pair follow the same prompt
    completions = draw(case.completion, 2 * case.pairs)
    position = torch.arange(int((prompts + completions).max()) - 1)
    first, last = (prompts - 1)[:, None], (prompts + completions - 1)[:, None]
    scored = (position >= first) & (position < last)
    targets = torch.randint(0, case.vocab, scored.shape, generator=generator).masked_fill(~scored, IGNORE_INDEX)
    hidden = torch.randn(*scored.shape, case.hidden, generator=generator)
    reference = hidden + REFERENCE_DISTANCE * torch.randn(hidden.shape, generator=generator)
    weight = head_weight(case, dtype, generator)
    hidden, reference = (x.to(device, dtype) for x in (hidden, reference))
    return PairInputs(hidden.requires_grad_(), reference, weight.to(device), targets.to(device), case.beta)


def loss_inputs(case: LossCase, seed: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs (N,) that need a gradient, those of the reference (N,), boundaries (2·pairs + 1,)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 121, (2 * case.pairs,), generator=generator)
    boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    logps = -torch.rand(int(boundaries[-1]), generator=generator)
    reference = logps + 0.1 * torch.randn(logps.shape, generator=generator)
    return logps.to(device, copy=True).requires_grad_(), reference.to(device), boundaries.to(device)
