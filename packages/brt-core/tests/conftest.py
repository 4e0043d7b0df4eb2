from __future__ import annotations

import sys
from pathlib import Path

# For core_cases: in pytest's importlib mode the folder of a test is not on the path.
sys.path.insert(0, str(Path(__file__).parent))
