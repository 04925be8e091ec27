"""Kernels of `fastdpo.ops.preference_loss`: from log-probs to the loss, its gradient, and the batch's dynamic β.

    `sequence_logps`   per token → per sequence → margins; what the other kernels begin with
    `dynamic_beta`     margins of a batch → β, kept pairs, the statistics after it
    `loss`             log-probs, β and weights → losses and dL/dlogp; `formulas` holds each loss with its derivative

In go log-probs per sequence (B,) or per token (N,) with boundaries. Oracle `fastdpo.formulas.oracle`; tests
`test_preference_loss.py` and, of the machine code, `test_kernels_compile.py`; on a card
`benchmarks/gpu/preference_loss.py`.
"""
