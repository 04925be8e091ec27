"""When the head's product is fused, in which room and tiles, and which operands it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fused_inputs import MATMUL, SLACK, ours, problem

import fastdpo
from fastdpo.formulas import oracle
from fastdpo.ops.linear_logprob import backends as linear_logprob_backends
from fastdpo.ops.linear_logprob import fused as fused_head
from fastdpo.ops.linear_logprob import tile_loop
from fastdpo.ops.linear_logprob.head import Head
from fastdpo.ops.linear_logprob.tiles import plan_fused
from fastdpo_kernels.linear_logprob import gemm as head_gemm
from fastdpo_kernels.linear_logprob import merge as head_merge
from fastdpo_kernels.linear_logprob import tiles as head_tiles
from fastdpo_kernels.linear_logprob.gemm import Partials, Reference
from fastdpo_kernels.linear_logprob.scales import LogitScales
from fastdpo_kernels.linear_logprob.tiles import INTERPRETED, TILES, Tile

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@pytest.fixture(autouse=True)
def poisoned_and_fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory is NaN, float32 may be rounded to TF32 (exact in the interpreter), no fallback."""
    monkeypatch.setenv("FASTDPO_HEAD", "fused")
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "tf32"
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    MATMUL.fp32_precision = before


# The rule


def head_of(dtype: torch.dtype, *, gemm: torch.dtype | None = None, columns: int = 16, step: int = 1) -> Head:
    weight = torch.zeros(20, columns * step, dtype=dtype)[:, ::step]
    return Head(weight, None, 1.0, 1.0, None, gemm or dtype)


def test_what_is_fused_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDPO_HEAD")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert fused_head.refusal(head_of(bf16), True, ()) == ""
    assert fused_head.refusal(head_of(fp16), False, ()) == ""
    assert fused_head.refusal(head_of(fp32), True, ()) == ""
    assert "float16 cannot hold" in fused_head.refusal(head_of(fp16), True, ())
    assert "statistics" in fused_head.refusal(head_of(bf16), False, ("entropy",))
    assert "the products are in torch.bfloat16" in fused_head.refusal(head_of(fp32, gemm=bf16), True, ())
    assert "multiples of 16 bytes" in fused_head.refusal(head_of(bf16, columns=17), True, ())
    assert "multiples of 16 bytes" in fused_head.refusal(head_of(bf16, step=2), True, ())
    for refused in ("ieee", "none"):
        MATMUL.fp32_precision = refused
        assert "TF32" in fused_head.refusal(head_of(fp32), True, ())
    monkeypatch.setenv("FASTDPO_HEAD", "separate")
    assert fused_head.refusal(head_of(bf16), True, ()) == "FASTDPO_HEAD=separate"
    monkeypatch.setenv("FASTDPO_HEAD", "fused")
    with pytest.raises(ValueError, match=r"FASTDPO_HEAD=fused cannot serve this head: statistics"):
        fused_head.refusal(head_of(bf16), True, ("entropy",))
    monkeypatch.setenv("FASTDPO_HEAD", "fast")
    with pytest.raises(ValueError, match=r"FASTDPO_HEAD='fast' is unknown; accepted are fused, separate"):
        fused_head.refusal(head_of(bf16), True, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The separate fold on the same inputs, which the rule takes for statistics, fp32 and fp16."""
    monkeypatch.delenv("FASTDPO_HEAD")
    seen: list[str] = []
    for module in (fused_head, tile_loop):
        own = module.forward

        def spied(*args: Any, own: Any = own, name: str = module.__name__) -> Any:
            seen.append(name.rpartition(".")[2])
            return own(*args)

        monkeypatch.setattr(module, "forward", spied)
    data = problem(14, 16, 80, dtype)
    fused = ours(data)
    monkeypatch.setenv("FASTDPO_HEAD", "separate")
    separate = ours(data)
    policy = "tile_loop" if dtype == torch.float16 else "fused"
    assert seen == [policy, "fused", "tile_loop", "tile_loop"]
    for one, other in zip(fused, separate, strict=True):
        assert (one.float() - other.float()).abs().max() <= 2 * SLACK[dtype][1] * other.abs().max()


def test_statistics_are_served_beside_it_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("FASTDPO_HEAD")
    caplog.set_level("INFO", "fastdpo")
    linear_logprob_backends._tell.cache_clear()
    data = problem(5, 16, 60, torch.bfloat16)
    logps, stats = fastdpo.linear_logprob(
        data["hidden"], data["weight"], data["targets"], backend="triton", stats=STATS
    )
    truth, expected = oracle.linear_logprob(
        data["hidden"].double(), data["weight"].double(), data["targets"], stats=STATS
    )
    torch.testing.assert_close(logps.double(), truth, rtol=0.0, atol=1e-5)
    for name in STATS:
        torch.testing.assert_close(stats[name].double(), expected[name].double(), rtol=0.0, atol=1e-4)
    assert [record.getMessage() for record in caplog.records] == [
        "linear_logprob folds tiles of logits in memory, not within the product: statistics need every logit more than "
        "once."
    ]


# Room, tiles, bad input


def test_one_allocation_within_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are at most what the memory plan counts, and at least E and the accumulator."""
    sizes = []
    own = fused_head._Room.__init__

    def measured(room: Any, *args: Any) -> None:
        own(room, *args)
        sizes.append(len(room.bytes))

    monkeypatch.setattr(fused_head._Room, "__init__", measured)
    ours(problem(100, 16, 1003, torch.bfloat16), workspace=2**16)
    bounds = []
    for unit_gradient in (True, False):
        plan = plan_fused(100, 1003, 2, 2**16, unit_gradient=unit_gradient)
        # The interpreter's tiles are narrower than the narrowest of a GPU's: so many more partial sums
        narrow = 8 * 100 * (-(-1003 // INTERPRETED.columns) - -(-1003 // 128))
        bounds.append(plan.bytes(1003, 16, 2, unit_gradient=unit_gradient) + narrow)
    assert sizes[0] >= 100 * 256 * 2 + 100 * 16 * 4
    assert all(size <= bound for size, bound in zip(sizes, bounds, strict=True))
    assert min(tile.columns for tile in TILES.values()) >= 128


def test_tiles_by_capability() -> None:
    assert head_tiles.listed((90, "plain")) == TILES[90, "plain"]
    assert head_tiles.listed((87, "adjusted")) == TILES[86, "adjusted"]
    assert head_tiles.listed((103, "tf32")) == TILES[100, "tf32"]
    with pytest.raises(ValueError, match=r"no tile is known for sm_75; the kernels need sm_80"):
        head_tiles.listed((75, "plain"))
    for tile in (*TILES.values(), *head_tiles.CANDIDATES):
        assert 256 % tile.columns == 0  # chunks begin at multiples of 256


def test_a_search_prints_the_line_for_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times are given; what does not fit is left out; the first product searches and later ones do not."""
    wanted = Tile(128, 128, 64, 4, 3)
    tried: list[Tile] = []

    def run(tile: Tile) -> None:
        tried.append(tile)
        if tile.rows == 256:
            raise head_tiles.OutOfResources(300_000, 232_448, "shared memory")

    def milliseconds(work: Any) -> float:
        work()
        return 1.0 if tried[-1] == wanted else 2.0

    monkeypatch.setenv("FASTDPO_TUNE_HEAD", "1")
    monkeypatch.setattr(head_tiles, "_milliseconds", milliseconds)
    monkeypatch.setattr(head_tiles, "_found", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    card = torch.device("cuda", 0)
    assert head_tiles.tile_for(card, "plain", run) == wanted
    assert '(90, "plain"): Tile(128, 128, 64, 4, 3),  # 1.000 ms' in capsys.readouterr().err
    assert set(head_tiles.CANDIDATES) <= set(tried)
    count = len(tried)
    assert head_tiles.tile_for(card, "plain", run) == wanted
    assert len(tried) == count
    assert head_tiles.tile_for(card, "adjusted", None) == TILES[90, "adjusted"]  # too few rows to search on
    monkeypatch.setenv("FASTDPO_TUNE_HEAD", "0")
    assert head_tiles.tile_for(card, "plain", run) == TILES[90, "plain"]
    monkeypatch.setenv("FASTDPO_TUNE_HEAD", "yes")
    with pytest.raises(ValueError, match=r"FASTDPO_TUNE_HEAD='yes' is unknown; accepted are 1, 0, or nothing"):
        head_tiles.tile_for(card, "plain", run)


def test_what_a_search_runs_is_a_product() -> None:
    """The function that a card would time, with a tile of the interpreter's size."""
    data = problem(5, 16, 40, torch.bfloat16)
    seen = []

    def tile_for(device: torch.device, kind: str, run: Any) -> Tile:
        run(Tile(16, 16, 16, 4, 1))
        seen.append(kind)
        return INTERPRETED

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_gemm, "tile_for", tile_for)
        patch.setattr(head_gemm, "_SEARCHED_ROWS", 5)
        head_gemm.fused_tile(data["hidden"], data["weight"])
        head_gemm.fused_tile(data["hidden"], data["weight"], data["bias"])
        head_gemm.fused_tile(data["hidden"], data["weight"], None, LogitScales(softcap=3.0))
        head_gemm.fused_tile(data["hidden"].float(), data["weight"].float(), data["bias"])
    assert seen == ["plain", "adjusted", "adjusted", "tf32"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 8, dtype=torch.float64)}, TypeError, "hidden is torch.float64"),
        ({"weight": torch.zeros(40, 8)}, TypeError, "weight is torch.float32; accepted: torch.bfloat16"),
        ({"weight": torch.zeros(40, 9).bfloat16()}, ValueError, r"weight has shape \(40, 9\); \(V, 8\)"),
        ({"weight": torch.zeros(8, 40).bfloat16().t()}, ValueError, "columns must be contiguous"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, TypeError, "targets is torch.int32"),
        (
            {"hidden": torch.zeros(4, 9).bfloat16(), "weight": torch.zeros(40, 9).bfloat16()},
            ValueError,
            "hidden has columns of 9; a multiple of 8",
        ),
        ({"bias": torch.zeros(39)}, ValueError, r"bias has shape \(39,\)"),
        ({"exps": torch.zeros(4, 40).bfloat16()}, ValueError, "exps and reference go together"),
        (
            {"exps": torch.zeros(4, 40).bfloat16(), "reference": Reference(torch.zeros(4), torch.zeros(4).int())},
            ValueError,
            "exps has a row stride of 40 .*; whole tiles, 64 columns, are written",
        ),
        ({"first_column": 8, "columns": 32}, ValueError, "a chunk begins at a multiple"),
        ({"partials": Partials(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(4))}, ValueError, "needs 2 tiles"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_operands_that_do_not_fit_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs: dict[str, Any] = {
        "hidden": torch.zeros(4, 8).bfloat16(),
        "weight": torch.zeros(40, 8).bfloat16(),
        "bias": None,
        "targets": torch.zeros(4, dtype=torch.int64),
        "partials": Partials(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(4)),
        "tile": Tile(16, 32, 16, 4, 1),
    }
    with pytest.raises(error, match=message):
        head_gemm.head_gemm(**(inputs | changes))


def test_exponentials_are_written_in_whole_tiles_and_no_further() -> None:
    """40 columns in tiles of 32: zeros up to 64, and what lies between the rows beyond that stays."""
    data = problem(4, 8, 40, torch.float32)
    reference = Reference(torch.empty(4), torch.empty(4, dtype=torch.int32))
    head_gemm.target_logits(data["hidden"], data["weight"], None, data["targets"], reference)
    buffer = torch.full((4, 70), 7.0)
    partials = Partials(torch.empty(2, 4), torch.empty(2, 4), torch.empty(4))
    head_gemm.head_gemm(
        data["hidden"], data["weight"], None, data["targets"], partials, Tile(16, 32, 16, 4, 1),
        exps=buffer[:, :40], reference=reference,
    )  # fmt: skip
    z = data["hidden"] @ data["weight"].t()
    expected = (z - z.gather(1, data["targets"][:, None])).exp().scatter(1, data["targets"][:, None], 0.0)
    torch.testing.assert_close(buffer[:, :40], expected, rtol=1e-5, atol=0.0)
    assert (buffer[:, 40:64] == 0.0).all()
    assert (buffer[:, 64:] == 7.0).all()


def test_merging_checks_what_it_gets() -> None:
    partials = Partials(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(4))
    targets, rows = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    with pytest.raises(ValueError, match="go together; pass all or none"):
        head_merge.merge(partials, targets, rows, rows, vocab_size=40, gradient=torch.zeros(4, 8))
    wrong = partials._replace(sums=torch.zeros(4, 2).t())
    with pytest.raises(ValueError, match="sums has shape"):
        head_merge.merge(wrong, targets, rows, rows, vocab_size=40)


@pytest.mark.parametrize("workspace", [0, 2**16 - 1])
def test_a_workspace_that_is_too_small_is_named(workspace: int) -> None:
    data = problem(3, 8, 20, torch.bfloat16)
    with pytest.raises(ValueError, match=rf"workspace={workspace} bytes is too little; the least is 65536"):
        fastdpo.linear_logprob(data["hidden"], data["weight"], data["targets"], workspace=workspace)
