"""A pytest plugin: the environment as if peft were not installed. `pytest -p tests.without_peft`."""

import sys

if "peft" in sys.modules:
    raise RuntimeError("peft is imported already; load this plugin with -p, before anything else")
# Both `import peft` and `importlib.util.find_spec("peft")` then say that there is none.
sys.modules["peft"] = None  # type: ignore[assignment]
