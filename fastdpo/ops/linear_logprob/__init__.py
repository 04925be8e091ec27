"""log p of targets under a linear head, its logits formed a tile at a time: `torch.ops.fastdpo.linear_logprob`.

    operators   schemas, fakes, autograd: hidden (N, H), weight (V, H), targets (N,) → logps, lse, statistics (N,)
    backends    the implementations by name: `tile_loop` over `tiles`, with `fold_torch` or `fold_triton`, or `fused`
    head        weight, bias and scales of a call; `row_sums` is what a fold leaves

Public function `fastdpo.loss.logprobs.linear_logprob`; oracle `fastdpo.formulas.oracle`; kernels
`fastdpo_kernels.linear_logprob`; tests `test_linear_logprob.py`, `test_linear_logprob_fused.py`; benchmarks
`benchmarks/linear_logprob/` and `benchmarks/gpu/linear_logprob/`. Triton is imported by the backends that need it.
"""
