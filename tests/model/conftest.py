import sys
from pathlib import Path

# Helpers stand beside the tests that use them.
here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "nn")]
