"""The sizes of all stages: REAL for a card, TOY for `--dry`, which runs the same code on a CPU in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import HeadCase

MIB = 2**20


@dataclass(frozen=True)
class HeadCheck:
    """One comparison of `linear_logprob` with float64.

    options: of the call. bias: with one. trained: what gets a gradient. ignored: none, some or all of the rows.
    """

    name: str
    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    options: dict[str, float] = field(default_factory=dict)
    bias: bool = False
    stats: bool = False
    trained: tuple[str, ...] = ("hidden",)
    ignored: str = "none"


def head_checks(rows: int, hidden: int, vocab: int) -> tuple[HeadCheck, ...]:
    """The list of GPU.md around one ragged shape."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shape = (rows, hidden, vocab)
    options = {"logit_scale": 0.3, "temperature": 0.7, "softcap": 5.0}
    return (
        HeadCheck("bf16", *shape, bf16),
        HeadCheck("fp16", *shape, fp16),
        HeadCheck("fp32", *shape, fp32),
        HeadCheck("one row, bf16", 1, hidden, vocab, bf16),
        HeadCheck("one row, fp32", 1, hidden, vocab, fp32),
        HeadCheck("softcap, bf16", *shape, bf16, {"softcap": 5.0}),
        HeadCheck("bias, bf16", *shape, bf16, bias=True),
        HeadCheck("statistics, bf16", *shape, bf16, stats=True),
        HeadCheck("all options and statistics, fp32", *shape, fp32, options, bias=True, stats=True, ignored="some"),
        HeadCheck("odd H, bf16", rows, hidden - 1, vocab, bf16),
        HeadCheck("every third row ignored, bf16", *shape, bf16, ignored="some"),
        HeadCheck("all rows ignored, bf16", *shape, bf16, ignored="all"),
        HeadCheck("trained head, bf16", *shape, bf16, bias=True, trained=("hidden", "weight", "bias")),
        HeadCheck("softcap, fp16", *shape, fp16, {"softcap": 5.0}),
    )


@dataclass(frozen=True)
class TrainingShape:
    """Attributes:
    architecture: a name of `fastdpo.estimate.architectures`; "" for TOY_LLAMA.
    pairs, steps: of each trainer, the first step warms up.
    prompt, completion: bounds of the uniform lengths in tokens, shaped like HH.
    cards: memories for which the longest pair is looked for; longest: tokens at which the search ends.
    """

    architecture: str
    pairs: int
    steps: int
    prompt: tuple[int, int]
    completion: tuple[int, int]
    cards: tuple[str, ...]
    longest: int


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    device, dtype: of what is measured.
    backend: of the kernels that are checked.
    seconds: of one contender's runs, warm-up aside.
    poison: bytes of freed memory that is filled with NaN before a check.
    copy: bytes of the copy whose rate is the ceiling. square: edge of the product whose rate is.
    tiles: rows × columns of the products; a 0 stands for all of them.
    chunk: vocabulary columns of the bare products. workspaces: bytes for the exponentials, where the head takes them.
    fold_tiles: FASTDPO_TILE of the separate fold, "" for its own plan.
    truth_rows: rows whose logits are formed in float64 at a time.
    compile_backend: of torch.compile.
    pairs: of the loss. replays: of its graph.
    pytest, environment: arguments and variables of the suite.
    checks, losses, draws: of the correctness stage. heads: shapes. training: the last but one stage's.
    """

    device: str
    dtype: torch.dtype
    backend: str
    seconds: float
    poison: int
    copy: int
    square: int
    checks: tuple[HeadCheck, ...]
    losses: tuple[str, ...]
    draws: int
    heads: tuple[HeadCase, ...]
    tiles: tuple[tuple[int, int], ...]
    chunk: int
    workspaces: tuple[int, ...]
    fold_tiles: tuple[str, ...]
    truth_rows: int
    compile_backend: str
    pairs: tuple[int, ...]
    replays: int
    training: TrainingShape
    pytest: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


#: Losses whose kernels are checked: one of each kind, as each compiles for some seconds. The suite has all of them.
CHECKED_LOSSES = ("sigmoid", "ipo", "exo_pair", "aot", "simpo")

REAL = Sizes(
    device="cuda",
    dtype=torch.bfloat16,
    backend="triton",
    seconds=0.6,
    poison=4096 * MIB,
    copy=4096 * MIB,
    square=8192,
    checks=head_checks(1025, 512, 50257),
    losses=CHECKED_LOSSES,
    draws=100_000,
    heads=(HeadCase(4096, 4096, 128256), HeadCase(4096, 896, 151936), HeadCase(8192, 2048, 128256)),
    tiles=((1024, 1024), (1024, 8192), (4096, 8192), (0, 32768), (0, 0)),
    chunk=32768,
    workspaces=(64 * MIB, 256 * MIB, 1024 * MIB),
    fold_tiles=("", "1024x1024", "4096x8192"),
    truth_rows=1024,
    compile_backend="inductor",
    pairs=(8, 64, 1024, 4096),
    replays=100,
    training=TrainingShape(
        architecture="Llama-3-8B",
        pairs=8,
        steps=5,
        prompt=(60, 240),
        completion=(20, 120),
        cards=("12GB", "24GB"),
        longest=16384,
    ),
    pytest=("-m", "gpu and not slow"),
    environment={"FASTDPO_TEST_DEVICE": "cuda"},
)

#: Small enough for Triton's interpreter, which takes about a millisecond per program.
#: H = 16: rows of whole 16 bytes, as the fused head asks for.
TOY = Sizes(
    device="cpu",
    dtype=torch.float32,
    backend="triton",
    seconds=0.0,
    poison=MIB,
    copy=MIB,
    square=32,
    checks=head_checks(5, 16, 101),
    losses=CHECKED_LOSSES,
    draws=300,
    heads=(HeadCase(16, 16, 301),),
    tiles=((4, 32), (0, 0)),
    chunk=128,
    workspaces=(MIB // 16, MIB // 8),
    fold_tiles=("", "8x128"),
    truth_rows=8,
    compile_backend="eager",
    pairs=(3,),
    replays=2,
    training=TrainingShape(
        architecture="",
        pairs=2,
        steps=2,
        prompt=(6, 12),
        completion=(3, 8),
        cards=("12GB",),
        longest=128,
    ),
    pytest=("-m", "not gpu", "-k", "draws"),
    environment={},
)

#: What a Llama for `--dry` looks like.
TOY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": None,
}
