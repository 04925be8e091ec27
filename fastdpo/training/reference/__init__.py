"""The reference policy, and its log-probs that are kept: what they belong to, in memory, in a file, over ranks."""

from fastdpo.training.reference.cache import REFERENCE_CACHE_FILE, ReferenceCache
from fastdpo.training.reference.identity import adapter_settings, adapters_digest, model_identity, reference_identity
from fastdpo.training.reference.policy import ReferencePolicy
from fastdpo.training.reference.store import ReferenceStore

__all__ = [
    "REFERENCE_CACHE_FILE",
    "ReferenceCache",
    "ReferencePolicy",
    "ReferenceStore",
    "adapter_settings",
    "adapters_digest",
    "model_identity",
    "reference_identity",
]
