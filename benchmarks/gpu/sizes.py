"""The sizes of all stages: REAL for a card, TOY for `--dry`, which runs the same code on a CPU in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import GPU_HEADS, HeadCase
from fastdpo.ops.linear_logprob.tiles import MIN_WORKSPACE, WORKSPACE

MIB = 2**20


@dataclass(frozen=True)
class HeadCheck:
    """One comparison of `linear_logprob` with float64.

    options: of the call. bias: with one. trained: what gets a gradient; nothing for a reference pass. ignored: none,
    some or all of the rows. workspace: bytes of E. spread: standard deviation of the logits; from FLAGGED_SPREAD on
    some rows are flagged, and computed anew. tf32: float32 products may be rounded to it. fused: by the fused product,
    which is then the only way that is allowed.
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
    workspace: int = WORKSPACE
    spread: float = 3.0
    tf32: bool = False
    fused: bool = False


#: Targets are at most LIFT_LIMIT·log 2 = 64 below the largest logit at a spread of 3, and some further at this one.
FLAGGED_SPREAD = 60.0


def head_checks(
    shape: tuple[int, int, int], *, chunked: tuple[int, int, int], workspace: int, long_vocab: int
) -> tuple[HeadCheck, ...]:
    """What a card runs of the head: the fused product, which has most to show, then the separate fold.

    shape: (rows, H, V), ragged, H divided by the depth of every tile. chunked: (rows, H, V) whose E takes several
    chunks of `workspace` bytes; long_vocab: V of which a single row's takes several of the least workspace.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    rows, hidden, vocab = shape
    cap = {"softcap": 5.0}
    options = {"logit_scale": 0.3, "temperature": 0.7, "softcap": 5.0}
    return (
        HeadCheck("bf16", *shape, bf16, fused=True),
        HeadCheck("several chunks, bf16", *chunked, bf16, workspace=workspace, fused=True),
        HeadCheck("one row in several chunks, bf16", 1, hidden, long_vocab, bf16, workspace=MIN_WORKSPACE, fused=True),
        HeadCheck("flagged rows, bf16", *shape, bf16, spread=FLAGGED_SPREAD, fused=True),
        HeadCheck("H that no depth divides, bf16", rows, hidden + 8, vocab, bf16, fused=True),
        HeadCheck("no gradient, bf16", *shape, bf16, trained=(), fused=True),
        HeadCheck("TF32", *shape, fp32, tf32=True, fused=True),
        HeadCheck("softcap, bf16", *shape, bf16, cap, fused=True),
        HeadCheck("bias, bf16", *shape, bf16, bias=True, fused=True),
        HeadCheck("softcap, no gradient, fp16", *shape, fp16, cap, trained=(), fused=True),
        HeadCheck("trained head, bf16", *shape, bf16, bias=True, trained=("hidden", "weight", "bias"), fused=True),
        HeadCheck("every third row ignored, bf16", *shape, bf16, ignored="some", fused=True),
        HeadCheck("all rows ignored, bf16", *shape, bf16, ignored="all", fused=True),
        HeadCheck("fp32", *shape, fp32),
        HeadCheck("fp16", *shape, fp16),
        HeadCheck("statistics, bf16", *shape, bf16, stats=True),
        HeadCheck("all options and statistics, fp32", *shape, fp32, options, bias=True, stats=True, ignored="some"),
        HeadCheck("odd H, bf16", rows, hidden - 1, vocab, bf16),
        HeadCheck("one row, fp32", 1, hidden, vocab, fp32),
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
    device, dtype: of what is measured. head_dtype: of the heads that are timed by plan, one that can be fused.
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
    checks, losses, draws, logits: of the correctness stage; logits is a shape (B, T, V).
    heads: shapes. training: the last but one stage's.
    """

    device: str
    dtype: torch.dtype
    head_dtype: torch.dtype
    backend: str
    seconds: float
    poison: int
    copy: int
    square: int
    checks: tuple[HeadCheck, ...]
    losses: tuple[str, ...]
    draws: int
    logits: tuple[int, int, int]
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
    head_dtype=torch.bfloat16,
    backend="triton",
    seconds=0.6,
    poison=4096 * MIB,
    copy=4096 * MIB,
    square=8192,
    checks=head_checks((1025, 512, 50257), chunked=(1025, 512, 50257), workspace=32 * MIB, long_vocab=50257),
    losses=CHECKED_LOSSES,
    draws=100_000,
    logits=(2, 513, 50257),
    heads=GPU_HEADS,
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
#: H of the heads: rows of whole 16 bytes, as the fused head asks for; that of the checks is the interpreter's depth.
TOY = Sizes(
    device="cpu",
    dtype=torch.float32,
    head_dtype=torch.bfloat16,
    backend="triton",
    seconds=0.0,
    poison=MIB,
    copy=MIB,
    square=32,
    checks=head_checks((5, 32, 101), chunked=(40, 32, 1003), workspace=MIN_WORKSPACE, long_vocab=32773),
    losses=CHECKED_LOSSES,
    draws=300,
    logits=(2, 4, 101),
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
