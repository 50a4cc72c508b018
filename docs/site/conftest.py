"""What only Sphinx imports, which is not installed for the tests."""

collect_ignore = ["conf.py", "rkl_pages.py"]
