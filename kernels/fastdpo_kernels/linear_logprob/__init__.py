"""Kernels of `fastdpo.ops.linear_logprob`: log-probs of targets under a head, logits in tiles or registers.

fused, 16-bit and TF32 heads   `gemm` (the product with the sums in its epilogue) → `merge` (log-probs, unit gradient);
                               `tiles` is the table of its tiles
separate, after torch's GEMM   `fold` (a tile into the rows' state) → `unit_gradient`; `logit_gradient` if trained

In go hidden states or a tile of raw logits, targets (N,) and `scales`; out come log-probs, normalizers, statistics and
dlogp/dh. Oracle `fastdpo.formulas.oracle.linear_logprob`; tests `test_head_kernels.py`, `test_linear_logprob_fused.py`;
machine code `test_kernels_compile.py`, `test_head_gemm_compile.py`; on a card `benchmarks/gpu/linear_logprob/`.
"""
