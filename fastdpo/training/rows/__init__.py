"""How examples become rows of micro-batches: ids, layout, attention that keeps sequences apart, and the way to the
device."""

from fastdpo.training.rows.batch import TokenBatch
from fastdpo.training.rows.choice import LayoutChoice
from fastdpo.training.rows.global_batch import GlobalBatch
from fastdpo.training.rows.layout import PLAIN, Example, Layout, MicroBatch

__all__ = ["PLAIN", "Example", "GlobalBatch", "Layout", "LayoutChoice", "MicroBatch", "TokenBatch"]
