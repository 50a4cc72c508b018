"""How long tests wait. Only what hangs is ended: a machine may be busy with eight other things."""

HANGS = 3_000  # seconds for a process, within the limit of pytest-timeout
