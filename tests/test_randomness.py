"""Tests of torch's global random numbers, which one thread has at a time."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rkl.bayes import bayes_act
from rkl.divergences import JensenShannon
from rkl.randomness import random_numbers
from rkl.sample import XY
from rkl.sample.mcmc import markov_chain


def drawn(seed, numbers):
    """Numbers that are drawn slowly, so that another thread can come in between."""
    values = []
    with numbers(seed):
        for _ in range(20):
            values.append(torch.rand(()).item())
            time.sleep(1e-4)
    return values


@contextlib.contextmanager
def shared_numbers(seed):
    """A toy that does not wait."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def in_two_threads(numbers):
    begun = threading.Barrier(2)

    def begin(seed):
        begun.wait()
        return drawn(seed, numbers)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(begin, (0, 1)))


def test_each_of_two_threads_has_the_numbers_of_its_seed():
    alone = [drawn(seed, random_numbers) for seed in (0, 1)]
    before = torch.get_rng_state()
    assert in_two_threads(random_numbers) == alone
    assert torch.equal(torch.get_rng_state(), before)


def test_without_waiting_two_threads_share_one_sequence():
    alone = [drawn(seed, shared_numbers) for seed in (0, 1)]
    with torch.random.fork_rng(devices=[]):
        assert in_two_threads(shared_numbers) != alone


def test_the_generator_is_restored_after_an_error_and_blocks_may_be_nested():
    before = torch.get_rng_state()
    with random_numbers(0):
        first = torch.rand(2)
        with random_numbers(0):
            assert torch.equal(torch.rand(2), first)
    with pytest.raises(RuntimeError), random_numbers(0):
        torch.rand(2, 2).reshape(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0.5, "1", True, 2**64])
def test_what_is_no_seed_is_refused_by_name(seed):
    with pytest.raises((TypeError, ValueError), match="seed must"), random_numbers(seed):
        pass


def act(scale):
    generator = torch.Generator().manual_seed(0)
    mu = scale * torch.randn(4, 10, generator=generator, dtype=torch.float64)
    found = bayes_act({"mu": mu}, "laplace(loc=mu, scale=1.0)", JensenShannon())
    return found.act["mu"].item()


def walk(seed):
    condition = torch.tensor([[1.0]])
    return markov_chain(XY(side=2), condition, chains=2, draws=4, seed=seed).x.sum().item()


@pytest.mark.parametrize("compute", [act, walk])
def test_results_in_threads_are_those_of_one_after_the_other(compute):
    alone = [compute(it) for it in (1, 2)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(compute, (1, 2))) == alone
    assert torch.equal(torch.get_rng_state(), before)
