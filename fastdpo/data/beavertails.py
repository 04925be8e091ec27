"""BeaverTails / PKU-SafeRLHF: a prompt, two responses, which one is better and which ones are safe.

Source: Ji et al., 2023 (arXiv 2307.04657). The two readings follow arXiv 2406.04879: helpful takes the better
response as chosen; harmless keeps the pairs with exactly one safe response, and takes that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdpo.data.fields import binary_field, bool_field, string_field
from fastdpo.data.shared_prefix import Pair, Reading

HELPFUL_COLUMNS = ("prompt", "response_0", "response_1", "better_response_id")
HARMLESS_COLUMNS = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
HARMLESS_DROP_REASON = "both responses safe, or both unsafe"


def convert_helpful(row: Mapping[str, Any], where: str) -> Reading:
    return Reading(_pair(row, binary_field(row, "better_response_id", where), where))


def convert_harmless(row: Mapping[str, Any], where: str) -> Reading:
    """The pair of one row, without it when not exactly one response is safe."""
    is_safe = [bool_field(row, f"is_response_{i}_safe", where) for i in (0, 1)]
    pair = _pair(row, is_safe.index(True) if any(is_safe) else 0, where)
    return Reading(pair if is_safe[0] != is_safe[1] else None)


def _pair(row: Mapping[str, Any], chosen: int, where: str) -> Pair:
    responses = [[{"role": "assistant", "content": string_field(row, f"response_{i}", where)}] for i in (0, 1)]
    prompt = [{"role": "user", "content": string_field(row, "prompt", where)}]
    return Pair(prompt, responses[chosen], responses[1 - chosen])
