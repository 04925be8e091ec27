"""The demo: `run` trains SmolLM2 (`smollm2`) on the pairs in `data/`, and `report` shows what changed.

`baseline` is the bag of words beside it; `generate` wrote the pairs. Command `fastdpo demo`; test `test_demo_data.py`.
"""
