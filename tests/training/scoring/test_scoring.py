"""Completion log-probs of padded micro-batches against full logits of single sequences, over model families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import MODELS, alone, batch

from fastdpo.training.models.dropout import disable_dropout
from fastdpo.training.objectives import PairScores, PreferenceObjective
from fastdpo.training.scoring import CompletionScorer, Scores
from fastdpo.training.scoring.head import find_head
from fastdpo.training.scoring.scorer import completion_logits, scored_hidden


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_logps_of_a_micro_batch(name: str, budget: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    disable_dropout(model)
    pairs = batch()
    scorer = CompletionScorer()
    seen = []
    for micro in pairs.cut(budget):
        scores = Scores.zeros(pairs.lengths())
        scorer.fill_policy(scores, scorer.tokens(model, micro), micro)
        for index in micro.indices.tolist():
            pair = pairs.examples[index]
            for found, completion in zip(scores.logps[:, index], pair.completions, strict=True):
                truth = alone(model, pair.prompt, completion).sum()
                torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)
            seen.append(index)
    assert sorted(seen) == [0, 1, 2, 3]


def test_cut_respects_the_budget() -> None:
    """Row lengths are 16, 13, 20 and 10 tokens: sorted 20, 16, 13, 10, two rows each, padded to the longest."""
    sizes = {budget: [m.input_ids.shape for m in batch().cut(budget)] for budget in (1, 40, 79, 80, 120)}
    assert sizes[1] == sizes[40] == [(2, 20), (2, 16), (2, 13), (2, 10)]
    assert sizes[79] == [(2, 20), (4, 16), (2, 10)]  # 4 × 20 does not fit, 4 × 16 does, 6 × 16 does not
    assert sizes[80] == [(4, 20), (4, 13)]
    assert sizes[120] == [(6, 20), (2, 10)]


def test_only_scored_rows_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model's own logits: the scored rows. Otherwise none at all, and `linear_logprob` gets them."""
    model = tiny.llama(vocab_size=97)
    (micro,) = batch().cut(10_000)
    rows = []
    linear = torch.nn.functional.linear

    def counted(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is model.lm_head.weight:
            rows.append(input.shape[:-1].numel())
        return linear(input, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    logits = completion_logits(model, micro)
    assert rows == [len(logits)] == [4 + 9 + 12 + 1 + 3 + 5 + 6 + 6]
    rows.clear()
    assert scored_hidden(model, find_head(model), micro).shape == (46, 32)
    assert rows == []
    assert "forward" not in vars(model.lm_head), "the head is not the model's own again"


def test_length_desensitised_and_weighted_scores(tmp_path: Path) -> None:
    """LD-DPO weights the tokens beyond the pair's shorter answer by α, under the policy and under its reference; WPO's
    weight is a pair's length-normalised likelihood over Σp². Both from one sequence at a time."""
    model = tiny.llama(vocab_size=97)
    pairs = batch()
    (micro,) = pairs.cut(10_000)
    objective = PreferenceObjective(tiny.config(tmp_path, ld_alpha=0.25, use_weighting=True))
    scorer = CompletionScorer(objective.token_weights, objective.statistics)
    scores = Scores.zeros(pairs.lengths(), 1)
    scorer.fill_policy(scores, scorer.tokens(model, micro, statistics=True), micro)
    reference = tiny.llama(seed=1, vocab_size=97)
    scorer.fill_reference(scores, scorer.tokens(reference, micro), micro)
    weights = PairScores.of(scores).pair_weights
    for index, pair in enumerate(pairs.examples):
        shared = min(map(len, pair.completions))
        weight = 1.0
        found_of_both = zip(scores.logps[:, index], scores.ref_logps[:, index], strict=True)
        for (found, ref_found), completion in zip(found_of_both, pair.completions, strict=True):
            tokens = alone(model, pair.prompt, completion)
            expected = tokens[:shared].sum() + 0.25 * tokens[shared:].sum()
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
            of_reference = alone(reference, pair.prompt, completion)
            expected = of_reference[:shared].sum() + 0.25 * of_reference[shared:].sum()
            torch.testing.assert_close(ref_found.double(), expected, rtol=1e-5, atol=1e-4)
            prompt = pair.prompt
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].double()
            weight *= float((tokens - logits.softmax(-1).square().sum(-1).log()).mean().exp().detach())
        assert float(weights[index]) == pytest.approx(weight, rel=1e-4)


@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_head_called_by_keyword(path: str) -> None:
    class Keyword(type(tiny.llama())):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            hidden = self.model(input_ids=input_ids).last_hidden_state
            return type("Output", (), {"logits": self.lm_head(input=hidden)})()

    torch.manual_seed(0)
    model = Keyword(tiny.llama(vocab_size=97).config)
    (micro,) = batch().cut(10_000)
    if path == "logits":
        assert completion_logits(model, micro).shape == (len(micro.targets), 97)
    else:
        assert scored_hidden(model, find_head(model), micro).shape == (len(micro.targets), 32)


def test_model_that_bypasses_its_head_is_refused() -> None:
    class Bypass(type(tiny.llama())):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            hidden = self.model(input_ids=input_ids).last_hidden_state
            return type("Output", (), {"logits": hidden @ self.lm_head.weight.T})()

    model = Bypass(tiny.llama(vocab_size=97).config)
    (micro,) = batch().cut(10_000)
    for score in (
        lambda: completion_logits(model, micro),
        lambda: scored_hidden(model, find_head(model), micro),
        lambda: CompletionScorer().tokens(model, micro),
    ):
        with pytest.raises(RuntimeError, match="Bypass did not call its output embedding once"):
            score()
