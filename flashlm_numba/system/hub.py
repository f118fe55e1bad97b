"""The library huggingface_hub as every part of the program imports it. It is heavy, so it is imported on first use."""

from __future__ import annotations

import os
from typing import Any

from flashlm_numba.system.cache import set_hub_home

HUB_TIMEOUT = 10.0  # seconds for the request that tests whether the hub can be reached


def quiet_hub() -> Any:
    """Import huggingface_hub without its log lines and telemetry, and with a folder for its cache."""
    set_hub_home()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub.utils

    huggingface_hub.utils.logging.set_verbosity_error()
    return huggingface_hub
