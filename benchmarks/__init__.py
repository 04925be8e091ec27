"""Benchmarks: `python -m benchmarks [SECTION ...]`, see README.md beside this file; on a card `benchmarks.gpu`.

A file or folder bears the name of the operation that it measures: `linear_logprob/`, `linear_preference_loss`,
`preference_loss`; `training*`, `ablation`, `profile_step` and `long_pair*` measure the whole step. `cases` holds shapes
and inputs, `contenders` what is compared, `report` the figures.
"""
