"""Whether the bodies of a run are lean: what the options ask for, what the models allow, a check on the first batch.

The check runs a few hundred tokens of one example of the first batch through the untouched model and through the lean
one, forward and backward, and compares log-probs and gradients. What differs is not used. It leaves no gradient, and
random numbers as they were.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.training.body.functions import own_functions
from fastdpo.training.body.lean import LeanBody
from fastdpo.training.body.liger import liger_functions
from fastdpo.training.body.mlp import Tiles
from fastdpo.training.memory.plan import is_out_of_memory, release_memory
from fastdpo.training.models.unwrapped import model_class
from fastdpo.training.options import FastDPOConfig
from fastdpo.training.ranks import Ranks
from fastdpo.training.rows import Layout, TokenBatch
from fastdpo.training.rows.batch import Example
from fastdpo.training.rows.choice import TokenScorer

logger = logging.getLogger(__name__)

#: Tokens of the prompt and of each completion in the check.
_CHECKED_PROMPT, _CHECKED_COMPLETION = 96, 48
#: What of them is checked, the next where memory ran out.
_CHECKED_SHARES = (1.0, 0.5, 0.25, 0.125)
#: Largest differences, of log-probs on average a token, and of a parameter's gradient in its norm. Float32 differs by
#: rounding, 1e-6 and 1e-5; in 16 bits every layer rounds elsewhere. A wrong function differs by 0.1 and more.
_TOLERANCES = {torch.float32: (1e-3, 1e-3), torch.float64: (1e-6, 1e-6)}
_TOLERANCES_16_BITS = (5e-2, 0.25)
#: Largest difference from 1 of the factor between the gradients of all layers' parameters of one name.
_FACTOR = 0.05
#: The number of a layer in a parameter's name.
_LAYER = re.compile(r"\.\d+\.")
#: Share of the largest gradient's norm below which a gradient is compared with this.
_SMALL = 1e-2


def cannot_be_had(reason: str) -> ValueError:
    """What is raised where a lean body is demanded, of a run and of an estimate alike."""
    return ValueError(f"lean_body='on' cannot be had: {reason}. Set it to 'auto' or 'off'.")


class BodyChoice:
    """Settles on lean bodies for the models of a run, on the first batch, alike on all ranks.

    Args:
        args: the run's options.
        scorer: of token log-probs.
        models: the policy first, then a separate reference if there is one.
        ranks: that choose together.
        autocast: the run's precision.
        sharded: whether FSDP is on, whose layers gather their weights only around their own calls.

    Raises ValueError where lean_body="on" or use_liger_kernel=True cannot be had; the message says why.
    """

    def __init__(
        self,
        args: FastDPOConfig,
        scorer: TokenScorer,
        models: Sequence[PreTrainedModel],
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        sharded: bool = False,
    ) -> None:
        self.args, self.scorer, self.ranks, self.autocast = args, scorer, ranks, autocast
        self.bodies: list[LeanBody] = []
        tiles = Tiles.on_cpu() if args.device.type == "cpu" else Tiles.on_gpu(_memory(args))
        self.functions = liger_functions() if args.liger else own_functions(tiles.elements)
        self._settled = args.lean_body == "off"
        if self._settled:
            return
        if sharded:
            self._refuse("FSDP gathers a layer's weights for the layer's own calls, and lean functions read them later")
            return
        for model in models:
            body = LeanBody(model, tiles, self.functions)
            if body.reason or (body.foreign and args.lean_body == "on"):
                self._refuse(body.reason or body.told())
            else:
                self.bodies.append(body)

    def _refuse(self, reason: str, level: int = logging.INFO) -> None:
        """Go on without, or raise ValueError where it is demanded."""
        if self.args.liger:
            raise ValueError(
                f"use_liger_kernel=True cannot be had, as its functions serve in a lean body: {reason}. Drop it."
            )
        if self.args.lean_body == "on":
            raise cannot_be_had(reason)
        logger.log(level, "no lean body: %s.", reason)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the bodies are lean, in forwards, recomputations and backwards."""
        with ExitStack() as stack:
            for body in self.bodies:
                stack.enter_context(body.active())
            yield

    def settle(self, batch: TokenBatch, layout: Layout, active: Callable[[], AbstractContextManager[None]]) -> None:
        """Check on the first example of `batch`; later calls do nothing. active: within it rows of `layout` work."""
        if self._settled:
            return
        self._settled = True
        for body in list(self.bodies):
            with active():
                reason = self._checked(body, batch, layout)
            reason = next((each for each in self.ranks.gathered_objects(reason) if each), "")
            name = model_class(body.model)
            if reason:
                self.bodies.remove(body)
                self._refuse(f"{name}: {reason}", logging.WARNING)
                continue
            if self.args.liger and not self.functions.served:
                self._refuse(f"{name}: {self.functions.told()}")
            said = [f"lean body of {name}: {len(body.served)} modules", self.functions.told()]
            said += [f"Not served: {told}"] if (told := body.told()) else []
            logger.info("%s", " ".join(f"{each}." for each in said if each))

    def _checked(self, body: LeanBody, batch: TokenBatch, layout: Layout) -> str:
        """`_mismatch`, on fewer tokens where memory does not hold the untouched model's graph: the memory plan, which
        may have layers checkpointed, is settled later."""
        for share in _CHECKED_SHARES:
            try:
                return self._mismatch(body, _short(batch, share), layout)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            release_memory()
        return "memory does not hold the check on the first batch. gradient_checkpointing=True makes it smaller"

    def _mismatch(self, body: LeanBody, batch: TokenBatch, layout: Layout) -> str:
        """How the lean body's log-probs or gradients differ, or ""."""
        trained = {name: p for name, p in body.model.named_parameters() if p.requires_grad}
        own = {name: p.grad for name, p in trained.items()}
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        found = []
        try:
            for context in (nullcontext(), body.active()):
                for p in trained.values():
                    p.grad = None
                with torch.random.fork_rng(devices), context:
                    found.append(self._run(body.model, batch, layout, list(trained.values())))
        finally:
            for name, p in trained.items():
                p.grad = own[name]
        (logps, grads), (lean_logps, lean_grads) = found
        tolerance, tolerance_of_gradients = _TOLERANCES.get(self._dtype(body.model), _TOLERANCES_16_BITS)
        if not (logps.isfinite().all() and lean_logps.isfinite().all()):
            # A model full of NaN is the step's matter, not the body's
            return "" if not (logps.isfinite().all() or lean_logps.isfinite().all()) else "log-probs are not finite"
        difference = float((logps - lean_logps).abs().mean())
        if not difference <= tolerance:
            return f"log-probs differ from the untouched model's by {difference:.3g} a token on average"
        return _gradients_differ(list(trained), grads, lean_grads, tolerance_of_gradients)

    @torch.enable_grad()
    def _run(
        self, model: PreTrainedModel, batch: TokenBatch, layout: Layout, trained: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probs of the example's tokens, and the gradients of a weighted sum of them."""
        (micro,) = batch.cut(10**9, layout=layout)
        with self.autocast():
            logps = self.scorer.token_logps(model, micro)
        # Weights that no symmetry cancels
        weights = torch.linspace(0.5, 1.5, logps.numel(), device=logps.device, dtype=logps.dtype).view_as(logps)
        if logps.requires_grad:
            (logps * weights).sum().backward()
        # On the host: a card that trains holds the gradients once
        grads = [
            torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.detach().to("cpu", copy=True)
            for p in trained
        ]
        return logps.detach(), grads

    def _dtype(self, model: PreTrainedModel) -> torch.dtype:
        with self.autocast():
            weight = model.get_input_embeddings().weight
            if torch.is_autocast_enabled(self.args.device.type):
                return torch.get_autocast_dtype(self.args.device.type)
        found: torch.dtype = weight.dtype
        return found


def _gradients_differ(names: list[str], expected: list[Tensor], found: list[Tensor], tolerance: float) -> str:
    """How gradients differ, or "": one by one, and by a factor over all layers, where rounding averages out."""
    largest = max((float(each.norm()) for each in expected), default=0.0)
    products: dict[str, list[float]] = {}
    for name, true, grad in zip(names, expected, found, strict=True):
        error, norm = float((grad - true).norm()), float(true.norm())
        if not error <= tolerance * max(norm, _SMALL * largest):
            return f"the gradient of {name!r}, of norm {norm:.3g}, differs from the untouched model's by {error:.3g}"
        both = products.setdefault(_LAYER.sub(".", name), [0.0, 0.0])
        both[0] += float((grad.double() * true.double()).sum())
        both[1] += norm**2
    for name, (product, square) in products.items():
        if square > (_SMALL * largest) ** 2 and not abs(product / square - 1) <= min(tolerance, _FACTOR):
            return f"the gradients of {name!r} are {product / square:.3g} times the untouched model's over all layers"
    return ""


def _memory(args: FastDPOConfig) -> int:
    """Bytes that the run may take on its GPU. Not what is free just now: a resumed run cuts as the first one did."""
    total = torch.cuda.get_device_properties(args.device).total_memory
    return min(args.memory_limit_bytes or total, total)


def _short(batch: TokenBatch, share: float = 1.0) -> TokenBatch:
    """The shortest example of a batch, cut to what the check takes, or a share of it."""
    lengths = [len(each.prompt) + sum(map(len, each.completions)) for each in batch.examples]
    at = min(range(len(batch)), key=lengths.__getitem__)
    example = batch.examples[at]
    prompt, completion = (int(share * most) for most in (_CHECKED_PROMPT, _CHECKED_COMPLETION))
    short = Example(example.prompt[-prompt:], tuple(ids[:completion] for ids in example.completions))
    return TokenBatch([short], [batch.example_ids[at]], batch.device)
