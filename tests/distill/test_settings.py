"""What the flags say of themselves, and that a newcomer can read it without having a run."""

import argparse
import dataclasses
import re

import pytest

from rkl.cli import main, settings
from rkl.distill import CacheSettings, DistillSettings, EvaluateSettings, GenerateSettings

SETTINGS = {"distill": DistillSettings, "evaluate": EvaluateSettings, "generate": GenerateSettings}
SETTINGS |= {"cache": CacheSettings}
UNITS = (
    "tokens|blocks|steps|passes|batches|prompts|replies|checkpoints|share|mass|logits|"
    "nats per token|norm|rate|seconds"
)
commands = pytest.mark.parametrize("command", SETTINGS)


@commands
def test_the_help_of_every_flag_says_what_it_does_its_unit_and_what_happens_without_it(command):
    parser = argparse.ArgumentParser()
    settings.add_flags(parser, SETTINGS[command])
    said = {action.dest: str(action.help) for action in parser._actions}
    for field in dataclasses.fields(SETTINGS[command]):
        if field.name in settings.COMMON:
            continue
        text = said[field.name]
        assert len(text.split()) > 5, text
        assert re.search(r"\(default: |\(required\)|by default", text, re.I), text
        if field.type in (int, float, int | None):
            assert re.search(UNITS, text, re.I), text


@commands
def test_the_flags_are_shown_without_a_run(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    names = {field.name.replace("_", "-") for field in dataclasses.fields(SETTINGS[command])}
    assert {f"--{name}" for name in names} <= shown
