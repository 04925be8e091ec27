"""Comparisons with float64 on random inputs, for any device: what the correctness stage and tests/test_gpu.py run.

Each gives `Error`s: a name, the error seen, and what is allowed. Allowed are, relative to the largest true log-prob:
1e-5 in float32, 3e-5 for 16-bit inputs, whose products are exact but summed by tensor cores with a few bits less than
float32 has (`tl.exp` is ex2.approx, 2 ulp). Gradients in their norm: float32 1e-5; bfloat16 2⁻⁸, as E, the kept unit
gradient and the result are each rounded by up to 2⁻⁹ (E's rounding alone gave 1.4e-3 to 2.7e-3 in a sketch), and twice
that in Triton's interpreter, which truncates where hardware rounds; float16 2⁻¹⁰, its roundings being 2⁻¹².
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdpo
from benchmarks.gpu.sizes import HeadCheck
from fastdpo import DynamicBeta, reference, rng
from fastdpo.backends import resolve_backend
from fastdpo.checks import STATS
from fastdpo.losses import LOSSES

LOGPS_ALLOWED = {torch.float32: 1e-5, torch.float16: 3e-5, torch.bfloat16: 3e-5}
GRADIENT_ALLOWED = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
#: Of losses, β, margins and their gradients, relative to the largest value: e^u of log-ratios rounded to float32.
LOSS_ALLOWED = 1e-5
#: Of statistics: sums over the vocabulary of what log-probs are made of.
STATS_ALLOWED = 1e-4
#: Gumbel draws: two logarithms, in units of the last place.
GUMBEL_ULPS = 4
#: Attention in 16 bits rounds its probabilities and its output by 2⁻⁹ each; its backward rounds what it recomputes too.
ATTENTION_ALLOWED = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2.0**-7, 2.0**-6)}
#: Blocks that the caching allocator hands out for small tensors, and how many of them are filled.
SMALL_BLOCK, SMALL_BLOCKS = 2**20, 64
IGNORED = -100
LABEL_SMOOTHING = 1e-3


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
    """‖seen − truth‖ / ‖truth‖; ‖seen‖ where the truth is 0."""
    gap, size = (seen.double() - truth.double()).norm(), truth.double().norm()
    return float(gap / size) if size else float(gap)


# The head


class HeadProblem(NamedTuple):
    """hidden (N, H), weight (V, H), bias (V,) or None, targets (N,), dL/dlogp (N,)."""

    tensors: dict[str, Tensor]
    targets: Tensor
    upstream: Tensor


def head_problem(check: HeadCheck, device: str, seed: int) -> HeadProblem:
    """Logits of standard deviation 3; half the targets are their row's likeliest, the first two are 0 and V − 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(check.rows, check.hidden, generator=generator).to(check.dtype).to(device)
    weight = torch.randn(check.vocab, check.hidden, generator=generator) * (3.0 / check.hidden**0.5)
    tensors = {"hidden": hidden, "weight": weight.to(check.dtype).to(device)}
    if check.bias:
        tensors["bias"] = torch.randn(check.vocab, generator=generator).to(check.dtype).to(device)
    targets = torch.randint(0, check.vocab, (check.rows,), generator=generator).to(device)
    targets[::2] = (hidden[::2] @ tensors["weight"].t()).argmax(1)
    targets[:2] = torch.tensor([0, check.vocab - 1], device=device)[: check.rows]
    if check.ignored == "some":
        targets[2::3] = IGNORED
    elif check.ignored == "all":
        targets[:] = IGNORED
    return HeadProblem(tensors, targets, torch.linspace(-1.0, 2.0, check.rows, device=device))


def run_head(
    function: Callable[..., Any], check: HeadCheck, x: HeadProblem, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Log-probs, statistics, and the gradients of the weighted log-probs."""
    leaves = {
        name: tensor.detach().to(dtype, copy=True).requires_grad_(name in check.trained)
        for name, tensor in x.tensors.items()
    }
    logps, stats = function(**leaves, targets=x.targets, stats=STATS, **check.options, **options)
    trained = [leaves[name] for name in check.trained]
    grads = torch.autograd.grad(logps, trained, x.upstream.to(logps))
    return logps.detach(), stats, dict(zip(check.trained, grads, strict=True))


def without_stats(**arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_logprob` as training calls it."""
    return fastdpo.linear_logprob(**{**arguments, "stats": ()}), {}  # type: ignore[return-value]


def check_head(check: HeadCheck, device: str, backend: str, seed: int, poisoned: int = 0) -> list[Error]:
    """`linear_logprob` against float64, and against itself: twice the same bits."""
    problem = head_problem(check, device, seed)
    truth = run_head(reference.linear_logprob, check, problem, torch.float64)
    function = fastdpo.linear_logprob if check.stats else without_stats
    if poisoned:
        poison(device, poisoned)
    logps, stats, grads = run_head(function, check, problem, check.dtype, backend=backend)
    again = run_head(function, check, problem, check.dtype, backend=backend)
    errors = [Error("log-probs", largest(logps, truth[0]), LOGPS_ALLOWED[check.dtype])]
    for name, grad in grads.items():
        truncated = device == "cpu" and check.dtype == torch.bfloat16
        allowed = GRADIENT_ALLOWED[check.dtype] * (2 if truncated else 1)
        errors.append(Error(f"gradient of {name}", in_norm(grad, truth[2][name]), allowed))
    for name, values in stats.items():
        if name == "is_top1":
            clear = clear_winners(check, problem)
            errors.append(Error(name, float((values != truth[1][name])[clear].sum()), 0.0))
        else:
            errors.append(Error(name, largest(values, truth[1][name]), STATS_ALLOWED))
    pairs = [(logps, again[0]), *((grad, again[2][name]) for name, grad in grads.items())]
    errors.append(Error("values that differ in a second run", float(sum((a != b).sum() for a, b in pairs)), 0.0))
    return errors


def clear_winners(check: HeadCheck, x: HeadProblem) -> Tensor:
    """(N,) bool: rows whose two likeliest logits are further apart than rounding."""
    hidden, weight = x.tensors["hidden"].double(), x.tensors["weight"].double()
    logits = hidden @ weight.t() + x.tensors.get("bias", weight.new_zeros(()))
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return first - second > 1e-3


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
    truth, true_grads = run_loss(reference.preference_loss, data, torch.float64, **options)
    output, grads = run_loss(fastdpo.preference_loss, data, torch.float32, backend=backend, **options)
    fields = ("loss", "losses", "chosen_rewards", "rejected_rewards", "margins")
    errors = [Error(name, largest(getattr(output, name), getattr(truth, name)), LOSS_ALLOWED) for name in fields]
    return [*errors, Error("gradient", largest(grads, true_grads, 1.0 / pairs), LOSS_ALLOWED)]


def check_dynamic_beta(pairs: int, device: str, backend: str, seed: int, **options: Any) -> list[Error]:
    """Three steps of `preference_loss` with a `DynamicBeta` against the oracle: pairs kept, β, statistics, loss."""
    module = DynamicBeta(seed=seed, backend=backend, **options).to(device)
    state = reference.BetaState(
        *(torch.zeros((), dtype=x, device=device) for x in (torch.float64,) * 2 + (torch.int64,))
    )
    errors = []
    for step in range(3):
        data = pair_tensors(pairs, device, seed + step)
        output, grads = run_loss(fastdpo.preference_loss, data, torch.float32, beta=module)
        gaps = reference.preference_gap(*(x.double() for x in list(data.values())[:4]))
        plan = reference.dynamic_beta(gaps, state, seed=seed, **options)
        truth, true_grads = run_loss(
            reference.preference_loss, data, torch.float64, beta=plan.beta, keep=plan.keep, reward_beta=module.beta
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
    from fastdpo.training.attention import Segment, Segments, dense_mask, segment_attention

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
