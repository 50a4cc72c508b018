import math

import numpy as np
import pytest
import torch

from rkl import checks


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "k must be an integer of at least 2; got True"),
        (2.0, "k must be an integer of at least 2; got 2.0"),
        ("2", "k must be an integer of at least 2; got '2'"),
        (np.int64(3), r"k must be an integer of at least 2; got .*3.*\. Take its \.item\(\)\."),
        (1, "k must be at least 2; got 1"),
        (9, "k must be at most 8; got 9"),
        (10**400, "k must be at most 8; got an integer of 1,329 bits"),
    ],
)
def test_an_integer_is_refused_by_type_then_by_range(value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        checks.integer("k", value, at_least=2, at_most=8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "x must be a number; got True"),
        ("1", "x must be a number; got '1'"),
        (np.float32(1), r"x must be a number; got .*1.*\. Take its \.item\(\)\."),
        (math.nan, "x must be finite, above 0, at most 1; got nan"),
        (math.inf, "x must be finite, above 0, at most 1; got inf"),
        (0.0, "x must be finite, above 0, at most 1; got 0.0"),
        (1.5, "x must be finite, above 0, at most 1; got 1.5"),
    ],
)
def test_a_number_is_refused_with_its_range(value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        checks.number("x", value, above=0, at_most=1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "x must be a tensor; got a list"),
        (torch.ones(2, dtype=torch.long), "x must hold floating-point numbers; got torch.int64"),
        (torch.ones(2).to(torch.float8_e5m2), "x must have 16 bits or more; got torch.float8"),
    ],
)
def test_what_is_no_tensor_of_floats_is_refused(value, message):
    with pytest.raises(TypeError, match=message):
        checks.floats("x", value)


def test_a_device_is_found_by_its_name_and_refused_where_there_is_none(monkeypatch):
    assert checks.device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be cpu, cuda, .*; got 'abacus'"):
        checks.device("abacus")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert checks.device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match="got cuda, it finds no GPU"):
        checks.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checks.device(None) == torch.device("cuda")
    assert checks.device("cuda:1").index == 1
    with pytest.raises(ValueError, match="got cuda:2, it finds 2 GPUs"):
        checks.device("cuda:2")
