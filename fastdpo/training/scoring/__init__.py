"""Log-probs of rows: a model's head, token log-probs of micro-batches, and the scores of whole batches."""

from fastdpo.training.scoring.batches import BatchScores
from fastdpo.training.scoring.passes import Passes
from fastdpo.training.scoring.scorer import CompletionScorer, TokenScores
from fastdpo.training.scoring.scores import Scores

__all__ = ["BatchScores", "CompletionScorer", "Passes", "Scores", "TokenScores"]
