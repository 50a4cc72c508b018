"""What every test relies on: no network, fixed random examples, signatures that are true."""

import inspect
import os
import re
import signal
import sys

import fuzzing
import hypothesis
import jaxtyping
import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

# A shell without job control starts what it puts in the background deaf to Ctrl-C, and that is
# inherited: the programs that tests interrupt would never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header():
    return f"random inputs: RKL_FUZZ_SEED={fuzzing.SEED} RKL_FUZZ_EXAMPLES={fuzzing.EXAMPLES}"


@pytest.fixture(autouse=True)
def _signatures(request, monkeypatch):
    """Hold rkl's functions to their signatures, except where a test asks what they refuse.

    Such a test hands over what no signature allows, to read what the function itself says.
    """
    source = inspect.getsource(request.function)
    # The compiler cannot trace the checks either.
    refuses = "raises(" in source or "compiled=True" in source
    if refuses or request.node.get_closest_marker("malformed"):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def no_matplotlib(monkeypatch):
    """Take matplotlib away, and what of rkl has imported it."""
    import rkl  # not above: jaxtyping must come first

    for name in [it for it in sys.modules if re.match(r"rkl\.(plots|report)(\.|$)", it)]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("plots", "report"):
        monkeypatch.delattr(rkl, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
