"""Comparisons with float64 on random inputs, for any device: what the correctness stage and
tests/benchmarks/test_gpu.py run.

Each gives `Error`s: a name, the error seen, and what is allowed. Allowed are, relative to the largest true log-prob:
1e-5 in float32, 3e-5 for 16-bit inputs, whose products are exact but summed by tensor cores with a few bits less than
float32 has (`tl.exp` is ex2.approx, 2 ulp). Gradients in their norm: float32 1e-5; bfloat16 2⁻⁸, as E, the kept unit
gradient and the result are each rounded by up to 2⁻⁹, which adds up as squares do, to √3·2⁻⁹ at most; 3·2⁻⁸ in
Triton's interpreter, which truncates where hardware rounds, always towards 0; float16 2⁻¹⁰, its roundings being 2⁻¹².

TF32 keeps 10 bits of a mantissa, and a tensor core may cut off the rest: an operand loses up to 2⁻¹⁰, a product up to
2⁻⁹ and half of that on average, always on the same side, so logits shrink. Log-probs, which are differences of logits,
are allowed 2⁻⁹ of the largest. A probability changes as its logit does beside its neighbours', of whose standard
deviation, 3, 2⁻¹⁰ are lost: gradients are allowed 2⁻⁸.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdpo
from benchmarks.gpu.linear_logprob.plans import environment
from benchmarks.gpu.sizes import FLAGGED_SPREAD, HeadCheck
from fastdpo import DynamicBeta
from fastdpo.formulas import LOSSES, oracle, rng
from fastdpo.formulas.head_options import STATS
from fastdpo.ops.backends import resolve_backend

LOGPS_ALLOWED = {torch.float32: 1e-5, torch.float16: 3e-5, torch.bfloat16: 3e-5}
GRADIENT_ALLOWED = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
TF32_ALLOWED = (2.0**-9, 2.0**-8)
#: Of losses, β, margins and their gradients, relative to the largest value: e^u of log-ratios rounded to float32.
LOSS_ALLOWED = 1e-5
#: Of statistics: sums over the vocabulary of what log-probs are made of.
STATS_ALLOWED = 1e-4
#: How far below the largest logit a target is whose row is flagged: LIFT_LIMIT of the kernels' `linear_logprob.gemm`,
#: in units of log 2, and a little, as the logits here are float64's.
FLAGGED_BELOW = 93.0 * math.log(2.0)
#: Gumbel draws: two logarithms, in units of the last place.
GUMBEL_ULPS = 4
#: Attention in 16 bits rounds its probabilities and its output by 2⁻⁹ each; its backward rounds what it recomputes too.
ATTENTION_ALLOWED = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2.0**-7, 2.0**-6)}
#: Blocks that the caching allocator hands out for small tensors, and how many of them are filled.
SMALL_BLOCK, SMALL_BLOCKS = 2**20, 64
#: Of a confident row's gradient float64 itself, by p and not by 1 − p, keeps no more than 1e-12 of the weight.
SMALLEST = 1e-8
IGNORED = -100
LABEL_SMOOTHING, BETA = 1e-3, 0.1


class Error(NamedTuple):
    """name, the error that was seen, the error that is allowed. NaN is not allowed."""

    name: str
    seen: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.seen <= self.allowed

    def __str__(self) -> str:
        return f"{self.name} {self.seen:.1e} of {self.allowed:.1e}"


def poison(device: str, size: int) -> None:
    """Fill freed memory with NaN, `size` bytes of it in one block and some small blocks, so that whatever a kernel does
    not write shows. A CUDA allocator hands exactly these out next; a CPU's may."""
    if device != "cpu":  # or blocks that the last check has freed are handed out before these
        torch.cuda.empty_cache()
    large = torch.full((size // 4,), float("nan"), device=device)
    small = [torch.full((SMALL_BLOCK // 4,), float("nan"), device=device) for _ in range(SMALL_BLOCKS)]
    del large, small


def largest(seen: Tensor, truth: Tensor, floor: float = 1.0) -> float:
    """The largest error, relative to the largest true value or `floor`; NaN or infinite where `seen` is."""
    if not truth.numel():
        return 0.0
    seen, truth = seen.detach().double(), truth.detach().double()
    return float((seen - truth).abs().max() / truth.abs().max().clamp(min=floor))


def in_norm(seen: Tensor, truth: Tensor) -> float:
    """‖seen − truth‖ / ‖truth‖, ‖seen‖ where the truth is 0; a truth below SMALLEST counts as that."""
    gap, size = (seen.double() - truth.double()).norm(), truth.double().norm()
    return float(gap / size.clamp(min=SMALLEST)) if size else float(gap)


# The head


class HeadProblem(NamedTuple):
    """hidden (N, H), weight (V, H), bias (V,) or None, targets (N,), dL/dlogp (N,)."""

    tensors: dict[str, Tensor]
    targets: Tensor
    upstream: Tensor


def head_problem(check: HeadCheck, device: str, seed: int) -> HeadProblem:
    """Half the targets are their row's likeliest, a quarter the least likely; the first two are 0 and V − 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(check.rows, check.hidden, generator=generator).to(check.dtype).to(device)
    weight = torch.randn(check.vocab, check.hidden, generator=generator) * (check.spread / check.hidden**0.5)
    tensors = {"hidden": hidden, "weight": weight.to(check.dtype).to(device)}
    if check.bias:
        tensors["bias"] = torch.randn(check.vocab, generator=generator).to(check.dtype).to(device)
    targets = torch.randint(0, check.vocab, (check.rows,), generator=generator).to(device)
    targets[::2] = (hidden[::2] @ tensors["weight"].t()).argmax(1)
    targets[3::4] = (hidden[3::4] @ tensors["weight"].t()).argmin(1)
    targets[:2] = torch.tensor([0, check.vocab - 1], device=device)[: check.rows]
    if check.ignored == "some":
        targets[2::3] = IGNORED
    elif check.ignored == "all":
        targets[:] = IGNORED
    return HeadProblem(tensors, targets, torch.linspace(-1.0, 2.0, check.rows, device=device))


def run_head(
    function: Callable[..., Any], check: HeadCheck, x: HeadProblem, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Log-probs, statistics, and the gradients of the weighted log-probs with respect to what is trained."""
    leaves = {
        name: tensor.detach().to(dtype, copy=True).requires_grad_(name in check.trained)
        for name, tensor in x.tensors.items()
    }
    logps, stats = function(**leaves, targets=x.targets, stats=STATS, **check.options, **options)
    if not check.trained:
        return logps, stats, {}
    trained = [leaves[name] for name in check.trained]
    grads = torch.autograd.grad(logps, trained, x.upstream.to(logps))
    return logps.detach(), stats, dict(zip(check.trained, grads, strict=True))


def without_stats(**arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_logprob` as training calls it."""
    return fastdpo.linear_logprob(**{**arguments, "stats": ()}), {}  # type: ignore[return-value]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may be rounded to TF32, by torch's own setting; afterwards as before."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def head_allowed(check: HeadCheck, device: str) -> tuple[float, float]:
    """Errors of log-probs and of gradients."""
    if check.tf32:
        return TF32_ALLOWED
    truncated = device == "cpu" and check.dtype == torch.bfloat16
    return LOGPS_ALLOWED[check.dtype], GRADIENT_ALLOWED[check.dtype] * (3 if truncated else 1)


def check_head(check: HeadCheck, device: str, backend: str, seed: int, poisoned: int = 0) -> list[Error]:
    """`linear_logprob` against float64, and against itself: twice the same bits."""
    problem = head_problem(check, device, seed)
    truth = run_head(oracle.linear_logprob, check, problem, torch.float64)
    function = fastdpo.linear_logprob if check.stats else without_stats
    if poisoned:
        poison(device, poisoned)
    with tf32(check.tf32), environment({"FASTDPO_HEAD": "fused"} if check.fused else {}):
        options = {"backend": backend, "workspace": check.workspace}
        logps, stats, grads = run_head(function, check, problem, check.dtype, **options)
        again = run_head(function, check, problem, check.dtype, **options)
    logps_allowed, gradient_allowed = head_allowed(check, device)
    errors = [Error("log-probs", largest(logps, truth[0]), logps_allowed)]
    for name, grad in grads.items():
        errors.append(Error(f"gradient of {name}", in_norm(grad, truth[2][name]), gradient_allowed))
    if check.spread >= FLAGGED_SPREAD:  # apart, as flagged rows have the largest gradients
        flagged, seen, true = flagged_rows(problem), grads["hidden"], truth[2]["hidden"]
        errors += [
            Error("gradient of hidden, flagged rows", in_norm(seen[flagged], true[flagged]), gradient_allowed),
            Error("gradient of hidden, other rows", in_norm(seen[~flagged], true[~flagged]), gradient_allowed),
            Error("inputs without a flagged row", float(not flagged.any()), 0.0),
        ]
    for name, values in stats.items():
        if name == "is_top1":
            clear = clear_winners(problem)
            errors.append(Error(name, float((values != truth[1][name])[clear].sum()), 0.0))
        else:
            errors.append(Error(name, largest(values, truth[1][name]), STATS_ALLOWED))
    pairs = [(logps, again[0]), *((grad, again[2][name]) for name, grad in grads.items())]
    errors.append(Error("values that differ in a second run", float(sum((a != b).sum() for a, b in pairs)), 0.0))
    return errors


def true_logits(x: HeadProblem) -> Tensor:
    """(N, V) float64, neither capped nor scaled."""
    weight = x.tensors["weight"].double()
    return x.tensors["hidden"].double() @ weight.t() + x.tensors.get("bias", weight.new_zeros(()))


def clear_winners(x: HeadProblem) -> Tensor:
    """(N,) bool: rows whose two likeliest logits are further apart than rounding."""
    first, second = true_logits(x).topk(2, dim=1).values.unbind(1)
    return first - second > 1e-3


def flagged_rows(x: HeadProblem) -> Tensor:
    """(N,) bool: rows whose target lies so far below the largest logit that E cannot refer to it."""
    logits = true_logits(x)
    return logits.amax(1) - logits.gather(1, x.targets[:, None]).squeeze(1) > FLAGGED_BELOW


# Logits that exist


def check_selective(shape: tuple[int, int, int], device: str, backend: str, seed: int) -> list[Error]:
    """`selective_logprob` of bfloat16 logits (B, T, V) without their last position, a view, against float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3.0 * torch.randn(shape, generator=generator)).bfloat16().to(device)
    targets = torch.randint(0, shape[2], (shape[0], shape[1] - 1), generator=generator).to(device)
    targets[:, ::3] = IGNORED
    targets[0, 1] = shape[2] - 1
    upstream = torch.randn(targets.shape, generator=generator).to(device)

    def run(function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
        leaf = logits.to(dtype, copy=True).requires_grad_()
        logps = function(leaf[:, :-1], targets, temperature=0.7, **options)
        (gradient,) = torch.autograd.grad(logps, leaf, upstream.to(logps))
        return logps.detach(), gradient

    truth = run(oracle.selective_logprob, torch.float64)
    logps, gradient = run(fastdpo.selective_logprob, torch.bfloat16, backend=backend)
    allowed = GRADIENT_ALLOWED[torch.bfloat16] * (2 if device == "cpu" else 1)
    return [
        Error("log-probs", largest(logps, truth[0]), LOGPS_ALLOWED[torch.float32]),
        Error("gradient", in_norm(gradient, truth[1]), allowed),
    ]


# The loss and β


def pair_tensors(pairs: int, device: str, seed: int) -> dict[str, Tensor]:
    """Summed log-probs of policy and reference, and lengths, all (B,), in float32."""
    generator = torch.Generator().manual_seed(seed)
    ref = -40 + 8 * torch.randn(2, pairs, generator=generator)
    policy = ref + 3 * torch.randn(2, pairs, generator=generator)
    lengths = torch.randint(1, 30, (2, pairs), generator=generator)
    names = [f"{prefix}{side}_logps" for prefix in ("", "ref_") for side in ("chosen", "rejected")]
    names += ["chosen_lengths", "rejected_lengths"]
    return {name: x.to(device) for name, x in zip(names, (*policy, *ref, *lengths), strict=True)}


def run_loss(function: Callable[..., Any], data: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> Any:
    """The output, and the gradients of the loss with respect to both sides, (2, B)."""
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.items()}
    sides = [cast[name].clone().requires_grad_() for name in ("chosen_logps", "rejected_logps")]
    output = function(*sides, *list(cast.values())[2:4], **dict(list(cast.items())[4:]), **options)
    grads = torch.autograd.grad(output.loss, sides, allow_unused=True)  # the likelihood loss has one side only
    return output, torch.stack([torch.zeros_like(x) if g is None else g for x, g in zip(sides, grads, strict=True)])


def check_loss(loss_type: str, pairs: int, device: str, backend: str, seed: int) -> list[Error]:
    """`preference_loss` with a fixed β against the oracle in float64."""
    data = pair_tensors(pairs, device, seed)
    options: dict[str, Any] = {"loss_type": loss_type}
    if LOSSES[loss_type].uses_label_smoothing:
        options["label_smoothing"] = LABEL_SMOOTHING
    truth, true_grads = run_loss(oracle.preference_loss, data, torch.float64, **options)
    output, grads = run_loss(fastdpo.preference_loss, data, torch.float32, backend=backend, **options)
    fields = ("loss", "losses", "chosen_rewards", "rejected_rewards", "margins")
    errors = [Error(name, largest(getattr(output, name), getattr(truth, name)), LOSS_ALLOWED) for name in fields]
    return [*errors, Error("gradient", largest(grads, true_grads, 1.0 / pairs), LOSS_ALLOWED)]


def check_token_loss(pairs: int, device: str, backend: str, seed: int) -> list[Error]:
    """`token_preference_loss`, the sigmoid one, against the oracle of sums that are taken row by row in float64."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (2 * pairs,), generator=generator)
    lengths[0], lengths[-1] = 700, 1  # longer than what a program sums at a time
    before, after = 2, 3  # tokens that take no part
    count = before + int(lengths.sum()) + after
    boundaries = before + torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    tokens = -torch.rand(count, generator=generator)
    references = tokens + 0.1 * torch.randn(count, generator=generator)
    upstream_parts = [before, *lengths.tolist(), after]

    def true_sums(x: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in x.split(upstream_parts)[1:-1]])

    exact = tokens.double().requires_grad_()
    sums, ref_sums = true_sums(exact), true_sums(references.double())
    truth = oracle.preference_loss(*sums.chunk(2), *ref_sums.chunk(2), beta=BETA)
    (true_gradient,) = torch.autograd.grad(truth.loss, exact)
    leaf = tokens.to(device).requires_grad_()
    output = fastdpo.token_preference_loss(
        leaf, boundaries.to(device), references.to(device), beta=BETA, backend=backend
    )
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    fields = ("loss", "losses", "chosen_rewards", "rejected_rewards", "margins")
    # A margin is made of four sums in float32; one that is added up token by token is off by √n·2⁻²⁴ of itself or so
    allowed = LOSS_ALLOWED + BETA * 4 * int(lengths.max()) ** 0.5 * 2.0**-24 * float(sums.detach().abs().max())
    errors = [Error(name, largest(getattr(output, name).cpu(), getattr(truth, name)), allowed) for name in fields]
    return [*errors, Error("gradient", largest(gradient.cpu(), true_gradient, 1.0 / pairs), LOSS_ALLOWED)]


def check_dynamic_beta(pairs: int, device: str, backend: str, seed: int, **options: Any) -> list[Error]:
    """Three steps of `preference_loss` with a `DynamicBeta` against the oracle: pairs kept, β, statistics, loss."""
    module = DynamicBeta(seed=seed, backend=backend, **options).to(device)
    state = oracle.BetaState(*(torch.zeros((), dtype=x, device=device) for x in (torch.float64,) * 2 + (torch.int64,)))
    errors = []
    for step in range(3):
        data = pair_tensors(pairs, device, seed + step)
        output, grads = run_loss(fastdpo.preference_loss, data, torch.float32, beta=module)
        gaps = oracle.preference_gap(*(x.double() for x in list(data.values())[:4]))
        plan = oracle.dynamic_beta(gaps, state, seed=seed, **options)
        truth, true_grads = run_loss(
            oracle.preference_loss, data, torch.float64, beta=plan.beta, keep=plan.keep, reward_beta=module.beta
        )
        state = plan.state
        errors += [
            Error(f"step {step}: pairs kept otherwise", float((output.plan.keep != plan.keep).sum()), 0.0),
            Error(f"step {step}: β", largest(output.plan.beta, plan.beta, 1e-3), LOSS_ALLOWED),
            Error(f"step {step}: M0", largest(module.m0, state.m0), LOSS_ALLOWED),
            Error(f"step {step}: σ", largest(module.sigma, state.sigma), LOSS_ALLOWED),
            Error(f"step {step}: loss", largest(output.loss, truth.loss), LOSS_ALLOWED),
            Error(f"step {step}: gradient", largest(grads, true_grads, 1.0 / pairs), LOSS_ALLOWED),
        ]
    return errors


def check_draws(count: int, device: str, seed: int) -> list[Error]:
    """The kernel's draws, and torch's on the device, against NumPy's on the CPU: uniforms bit for bit."""
    resolve_backend("triton", torch.device(device))
    from fastdpo_kernels import rng as kernels

    step = torch.tensor(seed % 2**31, device=device)
    expected = rng.philox_uniform(seed, int(step), count)
    noise = rng.gumbel(seed, int(step), count)
    ulps = (kernels.gumbel(seed, step, count).cpu() - noise).abs() / (torch.finfo().eps * noise.abs().clamp(min=1.0))
    return [
        Error("uniforms that differ, kernel", float((kernels.uniform(seed, step, count).cpu() != expected).sum()), 0.0),
        Error(
            "uniforms that differ, torch", float((rng.philox_uniform(seed, step, count).cpu() != expected).sum()), 0.0
        ),
        Error("Gumbel draws, ulp", float(ulps.max()), GUMBEL_ULPS),
    ]


# Attention


def check_attention(device: str, dtype: torch.dtype, seed: int, heads: int = 8, width: int = 64) -> list[Error]:
    """Segments with shared prefixes, packed in two rows, against SDPA in float64 under the dense mask."""
    from fastdpo.training.rows.attention import Segment, Segments, dense_mask, segment_attention

    # prompt 40 | chosen 30 | rejected 25, a second pair behind it; the second row has one pair and padding
    items = [Segment(0, 70), Segment(70, 95, 0, 40), Segment(95, 131), Segment(131, 140, 95, 120)]
    items += [Segment(160, 250), Segment(250, 300, 160, 201)]
    segments = Segments.build(2, 160, items, torch.device(device))
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, 160, width), *[(2, heads // 4, 160, width)] * 2]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)
    upstream = torch.randn(2, 160, heads, width, generator=generator).to(dtype).to(device)
    covered = torch.zeros(320, dtype=torch.bool, device=device)
    for item in items:
        covered[item.start : item.stop] = True
    upstream *= covered.view(2, 160, 1, 1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return segment_attention(torch.nn.Identity(), q, k, v, None, segments=segments)[0]

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(4, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, dense_mask(segments)).transpose(1, 2)

    def run(attend: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype)))

    expected, found = run(truth, torch.float64), run(ours, dtype)
    forward, backward = ATTENTION_ALLOWED[dtype]
    mask = covered.view(2, 160, 1, 1)
    errors = [Error("output", in_norm(found[0] * mask, expected[0] * mask), forward)]
    errors += [
        Error(f"gradient of {name}", in_norm(seen, true), backward)
        for name, seen, true in zip("qkv", found[1:], expected[1:], strict=True)
    ]
    return errors
