import sys
from pathlib import Path

# Helpers stand beside the tests that use them.
tests = Path(__file__).parent.parent
sys.path[:0] = [str(tests / folder) for folder in ("generate", "model", "nn")]
