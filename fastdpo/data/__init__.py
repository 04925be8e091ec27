"""Preference data: readers, formats, chat templates, tokenisation and collation."""

from fastdpo.data.collation import ExampleCollator, PreferenceCollator
from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.formats import DATA_FORMATS
from fastdpo.data.readers import load_preferences
from fastdpo.data.tokenization import TokenizationReport, tokenize_preferences

__all__ = [
    "DATA_FORMATS",
    "ExampleCollator",
    "PreferenceCollator",
    "PreferenceDataError",
    "TokenizationReport",
    "load_preferences",
    "tokenize_preferences",
]
