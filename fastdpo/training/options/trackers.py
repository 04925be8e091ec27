"""The trackers that `report_to` names: whether each is known, and installed."""

from __future__ import annotations

from typing import Any

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fastdpo.training.options.kinds import OptionError, seen, suggestion

#: Tracker → package, where the two differ.
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
#: Stand for several, or for none.
_WORDS = ("all", "none")


def check_trackers(report_to: Any) -> None:
    """Raise OptionError for a tracker that transformers does not know, or that is not installed."""
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in _WORDS:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = [*_WORDS, *INTEGRATION_TO_CALLBACK]
            near = suggestion(str(name), known)
            raise OptionError(f"report_to={seen(name)} is unknown; accepted are {', '.join(known)}.{near}")
        # flyte is none of those that transformers looks for: it is used within tasks of its own
        if name != "flyte" and name not in get_available_reporting_integrations():
            package = _PACKAGES.get(name, name)
            raise OptionError(
                f"report_to={name!r} needs {package}, which is not installed: pip install {package}, or set "
                "report_to=none."
            )
