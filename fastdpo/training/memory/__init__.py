"""How much goes through the model at once: the plan, the trial that finds its budget, and what is counted for it."""

from fastdpo.training.memory.plan import MemoryPlan, OutOfMemory, RetryStep
from fastdpo.training.memory.trial import MemoryTrial

__all__ = ["MemoryPlan", "MemoryTrial", "OutOfMemory", "RetryStep"]
