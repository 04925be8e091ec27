"""What a card is asked of `fastdpo.linear_logprob`, the head, whose operators are `fastdpo/ops/linear_logprob/`.

products (stage 3)   its products alone, by tile      speed (stage `head`)   whole head calls, by `plans`
peers (stage 5)      policy forward and backward beside peers; correctness (stage 2) is `benchmarks.gpu.checks`
"""
