"""A vocabulary that processes share: values and gradients of one process that has all of it."""

import os
import re
import socket
import subprocess
import sys

import pytest
import sharded
import torch
from patience import HANGS

import rkl
from rkl.testing import check_divergence


def run_processes(count, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, sharded.__file__, folder],
            env=os.environ | common | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request, tmp_path_factory):
    """What each of several processes found."""
    return run_processes(request.param, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def whole():
    problems = sharded.problems().items()
    return {name: sharded.compare(in_order(it, how), **how) for name, (it, how) in problems}


class _StableAKL(rkl.AKL):
    """AKL whose search sorts the whole row, so that ties keep the order of the vocabulary."""

    def search(self, logits):
        logp, index = logits.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
        total = logp.exp().cumsum(-1)
        head = total <= self.mu if self.straddle == "tail" else total - logp.exp() < self.mu
        head[..., 0] = True
        return index, head


def is_ours(cls):
    return cls.__module__.startswith("rkl.")


def in_order(divergence, how):
    """The divergence itself, or the reference for ties, which a top k takes in any order."""
    return _StableAKL(divergence.mu, divergence.straddle) if how.get("ties") else divergence


def joined(results):
    """The loss, the values and the gradients of the whole, from those of all processes."""
    loss, values, hidden = results[0][:3]
    for other in results[1:]:
        for x, y in zip((loss, values, hidden), other, strict=False):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    return loss, values, hidden, *map(torch.cat, zip(*(it[3:] for it in results), strict=True))


def test_every_divergence_is_that_of_one_process(processes, whole):
    names = processes[0][0].keys() - {"careless"}
    assert {repr(cls()) for cls in rkl.catalogue().values() if is_ours(cls)} <= names
    for name in names:
        got, expected = joined([results[name] for results, _, _ in processes]), whole[name]
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(
                x, y, rtol=1e-6, atol=1e-9, equal_nan=True, msg=f"{name}: {x} is not {y}"
            )


def test_a_reduction_that_is_left_out_shows(processes):
    loss, _, hidden, weight, _ = joined([results["careless"] for results, _, _ in processes])
    expected = sharded.compare(sharded._Careless())
    assert abs(loss - expected[0]) > 1e-3
    assert (hidden - expected[2]).abs().max() > 1e-3
    assert (weight - expected[3]).abs().max() > 1e-3


def test_a_reduction_that_is_left_out_breaks_a_law():
    with pytest.raises(AssertionError, match=r"_Careless\(\): .* a reduction lacks"):
        check_divergence(sharded._Careless())


def test_what_a_class_says_of_its_rows_does_not_hold_for_a_method_written_below_it():
    class _Below(rkl.AKL):
        def held(self, logp, logq, *inputs):
            return (logp[..., :1].exp(),)

    assert rkl.AKL().needs_whole_rows == rkl.KL().needs_whole_rows == ""
    assert "its held may look at the whole row" in _Below().needs_whole_rows
    assert "its held" in (0.5 * rkl.KL() + sharded._Split()).needs_whole_rows


def test_what_is_sent_does_not_grow_with_the_vocabulary(processes):
    for _, _, traffic in processes:
        for name, (small, large) in traffic.items():
            assert small == large < 1000, name


EXPECTED = {
    "whole rows": "ValueError: divergence: .* needs all of it: its held may look at the whole row",
    "whole rows in a sum": "ValueError: divergence: .* of .*Split.*, its held may look at",
    "other divergences": "ValueError: the processes of a group must compute the same",
    "other batches": "ValueError: q's hidden states must be the same in all processes",
    "other numbers of tokens": "ValueError: the processes of a group must compute the same",
    "compiled": "ValueError: compiled must be False or None where processes share",
    "no group": "TypeError: q.group must be a process group.*; got 'tensor'",
    "whole q": "ValueError: q must be shared among the processes of p.group",
    "a part too many": "ValueError: p must have [0-9]+ atoms in this process, as q has; got 38",
}


def test_what_processes_do_not_agree_on_is_refused_by_all(processes):
    for _, told, _ in processes:
        for name, words in EXPECTED.items():
            assert re.match(words, told[name]), (name, told[name])
    first, *others = (told["a bad argument in one"] for _, told, _ in processes)
    assert first.startswith("ValueError: process 1 of the group has refused its arguments")
    assert all(it.startswith("ValueError: q.scale must be") for it in others)
