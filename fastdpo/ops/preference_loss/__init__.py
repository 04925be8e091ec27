"""What follows the log-probs: margins, the batch's dynamic β, loss and dL/dlogp, as `torch.ops.fastdpo.*` on Triton.

    operators         schemas, fakes, autograd: log-probs per sequence (B,), or per token (N,) with boundaries
                      (2B + 1,) → losses, values, gradients, and the plan of β
    backend_triton    the implementations, by kernels; the torch backend is the oracle, as torch runs it
    rows              rows of tokens, summed and expanded in torch

Public functions `fastdpo.loss.preference` and `fastdpo.loss.dynamic_beta`; oracle `fastdpo.formulas.oracle`; kernels
`fastdpo_kernels.preference_loss` (dynamic β in it); tests `test_preference_loss.py`, `test_dynamic_beta.py`; benchmarks
`benchmarks/preference_loss.py` and `benchmarks/gpu/preference_loss.py`.
"""
