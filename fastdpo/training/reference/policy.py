"""The reference policy: the model as it was when training was set up, or a separate model.

For an adapter that is trained further, the reference is the adapter as it was at the start, not the bare base model.
There are three ways to get there, and the cheapest that is exact is taken:
- a separate `ref_model`;
- adapters switched off, where they are LoRAs that change nothing yet (B = 0) and nothing else is trained;
- otherwise the trainable weights are swapped with their values at the start for the duration of the pass. This also
  covers `modules_to_save`, trained biases, PiSSA and full fine-tuning, where a switched-off adapter is not the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastdpo.training.models.sharded import Sharding, local, reshard
from fastdpo.training.ranks import Ranks
from fastdpo.training.reference.fingerprint import state_digest


class ReferencePolicy:
    """Gives the reference as a context: `with reference.active() as model: model(...)`."""

    def __init__(self, model: nn.Module, ref_model: nn.Module | None = None) -> None:
        self.model = model
        self.ref_model = ref_model
        self._start: dict[str, Tensor] | None = None
        if ref_model is not None:
            ref_model.requires_grad_(False)
            ref_model.eval()
        elif not _adapters_change_nothing(model):
            self._start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        # Now, while what will be trained is at its start. Later a first forward may change the dtype of a quantised
        # layer's bias, and sharding replaces the tensors.
        self._fingerprint = state_digest(
            model if ref_model is None else ref_model, adapters=self.kind != "adapters off"
        )
        # Under an adapter the policy has frozen weights, which a reference of its own says nothing of
        frozen = ref_model is not None and isinstance(model, PeftModel)
        self._base_fingerprint = state_digest(model, adapters=False) if frozen else None

    def tensors(self) -> list[Tensor]:
        """What the reference holds beside the policy's own."""
        own = [] if self.ref_model is None else [*self.ref_model.parameters(), *self.ref_model.buffers()]
        return [*own, *(self._start or {}).values()]

    @property
    def kind(self) -> str:
        """ "ref_model", "adapters off" or "weights at the start"."""
        if self.ref_model is not None:
            return "ref_model"
        return "adapters off" if self._start is None else "weights at the start"

    def fingerprint(self) -> str:
        """A digest of all that the reference's weights are, quantisation included; see `state_digest`.

        Saved with checkpoints and compared on resume; training does not change it, as it does not change the reference.
        """
        return self._fingerprint

    def base_fingerprint(self) -> str | None:
        """The same of the weights under the policy's adapter, at the start; None where `fingerprint` covers them, or
        all of them are trained."""
        return self._base_fingerprint

    def agree_on_fingerprint(self, ranks: Ranks) -> None:
        """Take rank 0's: with FSDP, other ranks may get their weights only when these are sharded."""
        self._fingerprint, self._base_fingerprint = ranks.of_first((self._fingerprint, self._base_fingerprint))

    def shard(self, sharding: Sharding) -> None:
        """Follow a model whose parameters were just sharded: of its values at the start, keep this rank's part; a
        model of its own is sharded as well."""
        if self.ref_model is not None:
            self.ref_model = sharding.shard_frozen(self.ref_model)
        if self._start is None:
            return
        for name, p in self.model.named_parameters():
            if name in self._start and isinstance(p, DTensor):
                self._start[name] = distribute_tensor(self._start[name].to(p.device), p.device_mesh, p.placements)

    def equals_policy(self) -> bool:
        """Whether the policy's weights are the reference's, as before the first step: one pass then scores both.

        Of sharded weights each rank sees its own part.
        """
        reshard(self.model)
        if self.ref_model is not None:
            return False
        if self._start is None:
            return _adapters_change_nothing(self.model)
        return all(
            torch.equal(local(p), local(self._start[name]))
            for name, p in self.model.named_parameters()
            if name in self._start
        )

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference as a model to call, without gradients."""
        with torch.no_grad():
            if self.ref_model is not None:
                yield self.ref_model
            elif self._start is None:
                assert isinstance(self.model, PeftModel)
                # peft switches requires_grad of the parameters that it finds: find the same ones before and after
                reshard(self.model)
                with self.model.disable_adapter():
                    yield self.model
                    reshard(self.model)
            else:
                self._swap()
                try:
                    yield self.model
                finally:
                    self._swap()

    def _swap(self) -> None:
        assert self._start is not None
        reshard(self.model)
        for name, parameter in self.model.named_parameters():
            if name not in self._start:
                continue
            if isinstance(parameter, DTensor):  # whose memory FSDP gathers from, so that it has to stay in place
                mine, start = local(parameter), local(self._start[name])
                held = mine.clone()
                mine.copy_(start)
                start.copy_(held)
            else:
                parameter.data, self._start[name] = self._start[name], parameter.data


def _adapters_change_nothing(model: nn.Module) -> bool:
    """Whether switching the adapters off gives exactly the model as it is now."""
    if not isinstance(model, PeftModel):
        return False
    for config in model.peft_config.values():
        if not isinstance(config, LoraConfig) or config.bias != "none" or config.modules_to_save or config.use_dora:
            return False
        # PiSSA, OLoRA, CorDA, LoftQ and the like start by changing the base weights.
        if config.init_lora_weights not in (True, "gaussian"):
            return False
    named = list(model.named_parameters())
    only_lora_is_trained = all("lora_" in name for name, p in named if p.requires_grad)
    # Frozen adapters count as well: a stack on top of one starts from what that one does.
    updates = [p for name, p in named if "lora_B" in name or "lora_embedding_B" in name]
    return only_lora_is_trained and not any(bool(local(p).any()) for p in updates)
