"""Benchmarks of `fastdpo.linear_logprob`, the head. On a card: `benchmarks.gpu.linear_logprob`.

speed (section `head`)   time over three bare GEMMs        scaling      time over rows and vocabulary
memory                   peak above the inputs             accuracy     error against float64, in nats
gpu_static               a model of 16-bit heads on GPUs, from counted launches, bytes and FLOPs
"""
