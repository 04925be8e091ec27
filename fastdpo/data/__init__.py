"""Preference data: readers, formats, chat templates, tokenisation and collation."""

from fastdpo.data.collation import ExampleCollator, PreferenceCollator
from fastdpo.data.errors import PreferenceDataError
from fastdpo.data.formats import DATA_FORMATS
from fastdpo.data.readers import load_preferences, read_preferences
from fastdpo.data.reports import ReadReport, TokenizationReport
from fastdpo.data.tokenization import tokenize_preferences

__all__ = [
    "DATA_FORMATS",
    "ExampleCollator",
    "PreferenceCollator",
    "PreferenceDataError",
    "ReadReport",
    "TokenizationReport",
    "load_preferences",
    "read_preferences",
    "tokenize_preferences",
]
