"""Memory and time of a run, predicted from its configuration without weights or a GPU. Reads `training/` only.

`options` go in; `prediction` asks `memory` (parts, largest sizes) and `timing` (FLOPs and bytes at a device's rates).
Both count on the fake models of `skeleton`, which `activations` runs. Command `fastdpo estimate`; test
`test_estimate.py`.
"""
