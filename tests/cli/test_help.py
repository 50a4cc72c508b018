"""The help of a command, which does not wait for what the command itself needs."""

import subprocess
import sys
import textwrap


def test_the_help_of_distilling_loads_neither_torch_nor_transformers():
    code = """
        import contextlib, io, sys
        from rkl import cli
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
            cli.main(["distill", "--help"])
        assert "--teacher" in shown.getvalue()
        print(*sys.modules)
    """
    probe = [sys.executable, "-c", textwrap.dedent(code)]
    loaded = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.split()
    assert "rkl.distill.settings" in loaded
    assert not {"torch", "numpy", "transformers"} & {*loaded}
