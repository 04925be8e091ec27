"""A self-attention module's forward over lean projections, norms and rotary positions.

What attends is the function that transformers' interface has under the model's attention implementation, with the
arguments that the module itself gives it: rows of several sequences, windows and softcaps stay where they are served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdpo.training.body.functions import Functions
from fastdpo.training.body.linear import project
from fastdpo.training.body.norm import NormKind
from fastdpo.training.body.projections import read


@dataclass(frozen=True)
class AttentionKind:
    """What tells the attention modules of the known architectures apart.

    fused: queries, keys and values come from one layer, `qkv_proj`.
    norms: of queries and keys, over each head or over all of them, by modules `q_norm` and `k_norm`.
    window: where the sliding window is kept: by the module, in the configuration, or it has none.
    softcap: whether the attention function is given one.
    """

    fused: bool = False
    norms: Literal["none", "head", "all"] = "none"
    window: Literal["none", "module", "config"] = "none"
    softcap: bool = False


def attention_forward(
    module: Any,
    kind: AttentionKind,
    norm: NormKind,
    functions: Functions,
    eager: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """hidden_states (R, T, H) → (R, T, H), and the attention weights where the function returns them."""
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    query, key, value = _projected(module, kind, hidden_states)
    if kind.norms == "all":
        query, key = functions.norm(query, module.q_norm, norm), functions.norm(key, module.k_norm, norm)
    query, key, value = (each.view(shape) for each in (query, key, value))
    if kind.norms == "head":
        query, key = functions.norm(query, module.q_norm, norm), functions.norm(key, module.k_norm, norm)
    if getattr(module, "use_rope", True):  # SmolLM3 leaves some layers without positions
        query, key = functions.rotate(query, key, *position_embeddings)
    options: dict[str, Any] = {
        "scaling": module.scaling,
        "dropout": module.attention_dropout if module.training else 0.0,
    }
    if kind.window != "none":
        holder = module if kind.window == "module" else module.config
        options["sliding_window"] = getattr(holder, "sliding_window", None)
    if kind.softcap:
        options["softcap"] = module.attn_logit_softcapping
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    output, weights = attend(module, query, key, value, attention_mask, **options, **kwargs)
    del query, key, value
    (found,) = project(output.reshape(*shape[:2], -1), [read(module.o_proj)])
    return found, weights


def _projected(module: Any, kind: AttentionKind, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (R, T, heads·D)."""
    if not kind.fused:
        query, key, value = project(x, [read(each) for each in qkv_modules(module, kind)])
        return query, key, value
    (found,) = project(x, [read(module.qkv_proj)])
    shared = module.config.num_key_value_heads * module.head_dim
    query, key, value = found.split([found.shape[-1] - 2 * shared, shared, shared], -1)
    return query, key, value


def qkv_modules(module: Any, kind: AttentionKind) -> list[nn.Module]:
    """The layers that make queries, keys and values."""
    return [module.qkv_proj] if kind.fused else [module.q_proj, module.k_proj, module.v_proj]
