"""The first step of TRL's DPOTrainer and of ours, on the same model, adapter and token ids: loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from datasets import Dataset
from same_run import KeepGradients

from fastdpo import FastDPOConfig, FastDPOTrainer

PAIRS = 8


def token_ids() -> Dataset:
    """Ragged pairs; some answers begin alike."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(1, 257, (length,), generator=generator).tolist()

    rows = []
    for index in range(PAIRS):
        common = draw(1, 3) if index % 2 else []
        rows.append(
            {
                "prompt_ids": draw(3, 20),
                "chosen_ids": common + draw(2, 12),
                "rejected_ids": common + draw(2, 12),
                "example_id": str(index),
            }
        )
    return Dataset.from_list(rows)


class TokenisedDPOTrainer(trl.DPOTrainer):
    """Takes token ids as they are, as TRL's collator does."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def first_step(build: Any, arguments: dict[str, Any], data: Dataset) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and the gradient of every LoRA weight."""
    keeper, losses = KeepGradients(), []
    trainer = build(
        tiny.llama(),
        args=arguments,
        train_dataset=data,
        processing_class=tiny.tokenizer(pad_token="</s>"),
        peft_config=tiny.lora(),
        callbacks=[keeper],
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(trainer.model.named_parameters()):
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32
                # With B = 0 every margin is 0, and A has no gradient
                parameter.normal_(std=0.3 if "lora_B" in name else parameter.shape[-1] ** -0.5, generator=generator)
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.training_step = recorded
    trainer.train()
    return sum(losses), keeper.grads


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": PAIRS,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "beta": 0.5,
    }


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch_tokens": "60"}, {"prefix_sharing": "off", "packing": "off", "gradient_checkpointing": True}],
    ids=["default", "micro-batches", "plain rows"],
)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_first_step(loss: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = token_ids()
    theirs = trl.DPOConfig(**arguments(tmp_path / "trl"), loss_type=[loss])
    ours = FastDPOConfig(**arguments(tmp_path / "fastdpo"), loss_type=[loss], **options)
    expected_loss, expected = first_step(TokenisedDPOTrainer, theirs, data)
    found_loss, found = first_step(FastDPOTrainer, ours, data)
    assert found_loss == pytest.approx(expected_loss, rel=1e-4)
    # log 2 and 1 / (2 β)² are the losses of a policy that is its reference, where agreement would say little
    assert abs(expected_loss - {"sigmoid": 0.6931, "ipo": 1.0}[loss]) > 0.05
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 2 * 7  # A and B of seven linear layers in either block
    for name, grad in expected.items():
        assert float(grad.abs().max()) > 0, name
        torch.testing.assert_close(
            found[name], grad, rtol=0, atol=1e-4 * float(grad.abs().max()), msg=lambda text, name=name: name + text
        )
