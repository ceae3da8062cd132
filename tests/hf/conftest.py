import os
import sys
from pathlib import Path

import pytest

# No test may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Helpers stand beside the tests that use them.
here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "model"), str(here.parent / "nn")]


@pytest.fixture(autouse=True)
def _quiet():
    """No progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
