"""`fastdpo demo`: options come in, the demo runs (`fastdpo.demo.run`), which prints what changed."""

from __future__ import annotations

from fastdpo.commands.options import make_parser, parse
from fastdpo.commands.stages import beside, stage
from fastdpo.demo.run import DemoConfig, run

_DESCRIPTION = """Align SmolLM2-135M-Instruct (NF4, LoRA r = 16 on all linear layers) with β-DPO on the preference
pairs that come with fastdpo, and print what changed. Needs no GPU and no hub.

  fastdpo demo
  fastdpo demo --pairs all --minutes 60"""


def main(argv: list[str]) -> int:
    """Parse and run. Returns 0; raises what `fastdpo.commands.cli` reports."""
    with stage("reading the options"):
        (config,) = parse(make_parser("fastdpo demo", _DESCRIPTION, DemoConfig), argv)
    with beside(config.output_dir), stage("the demo was at work", begun=lambda: True):
        run(config)
    return 0
