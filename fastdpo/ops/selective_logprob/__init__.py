"""log p of targets under logits that exist: `torch.ops.fastdpo.selective_logprob`, its backward also over the logits.

    operators                        schemas, fakes, autograd: logits (..., V), targets (...) → logps, normalizers
    backend_torch, backend_triton    the implementations; `row_views` walks rows of any strides without a copy

Public function `fastdpo.loss.logprobs.selective_logprob`; oracle `fastdpo.formulas.oracle`; kernels
`fastdpo_kernels.selective_logprob`; test `test_selective_logprob.py`; on a card `benchmarks.gpu.checks.check_selective`
compares it with float64. Nothing times it.
"""
