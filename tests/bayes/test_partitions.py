"""The partition act, against all partitions of a few items and losses written out by hand."""

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
import xarray as xr

from rkl.bayes import partitions, read_draws
from rkl.bayes.partitions import canonical, partition_act, partition_losses

LOSSES = list(partitions.LOSSES)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def all_partitions(items):
    """Every partition of so many items, clusters numbered by first items."""
    found = [[0]]
    for _ in range(items - 1):
        found = [it + [k] for it in found for k in range(max(it) + 2)]
    return found


def variation_of_information(one, other):
    """H(C | S) + H(S | C), from counts of pairs of labels."""
    both, first, second = Counter(zip(one, other, strict=True)), Counter(one), Counter(other)
    return -sum(
        n / len(one) * (math.log(n / first[c]) + math.log(n / second[s]))
        for (c, s), n in both.items()
    )


def binder(one, other):
    """The share of pairs that are together in one and apart in the other."""
    pairs = list(itertools.combinations(range(len(one)), 2))
    return sum((one[i] == one[j]) != (other[i] == other[j]) for i, j in pairs) / len(pairs)


BY_HAND = {"variation-of-information": variation_of_information, "binder": binder}


def noisy(generator, draws, items, clusters, noise):
    """Draws about one partition, some labels replaced, and all labels renamed in each draw."""
    truth = torch.arange(items) % clusters
    other = torch.randint(0, clusters + 1, (draws, items), generator=generator)
    flip = torch.rand(draws, items, generator=generator) < noise
    return renamed(other.where(flip, truth), generator)


def renamed(labels, generator):
    """The same partitions under other names, draw by draw."""
    names = torch.rand(len(labels), 50, generator=generator).argsort(1)
    return names.gather(1, labels)


@every_loss
@pytest.mark.parametrize("items", [1, 2, 6])
def test_losses_are_those_counted_by_hand(loss, items):
    labels = noisy(torch.Generator().manual_seed(1), 40, items, 3, 0.5)
    found = partition_losses(labels[0], labels, loss).tolist()
    if items == 1:
        assert found == [0.0] * 40
        return
    expected = [BY_HAND[loss](labels[0].tolist(), it) for it in labels.tolist()]
    assert found == pytest.approx(expected, abs=1e-14)


@every_loss
@pytest.mark.parametrize("noise", [0.2, 0.5, 1.0])
def test_no_partition_of_seven_items_has_a_smaller_expected_loss(loss, noise):
    candidates = all_partitions(7)
    assert len(candidates) == 877  # Bell's number
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        labels = noisy(generator, 25, 7, 3, noise)
        weights = torch.rand(25, generator=generator, dtype=torch.float64)
        share = weights / weights.sum()
        to_all = torch.stack([partition_losses(it, candidates, loss) for it in labels])
        act = partition_act(labels, loss, weights=weights)
        assert act.risk.value.item() == pytest.approx((share @ to_all).min().item(), abs=1e-12)
        assert act.partition.tolist() in candidates


def test_the_act_may_have_more_clusters_than_any_draw():
    """Three items, of which each draw joins another two: apart, most pairs are right."""
    act = partition_act([[0, 0, 1], [0, 1, 0], [1, 0, 0]], "binder")
    assert act.partition.tolist() == [0, 1, 2]
    assert act.risk.value.item() == pytest.approx(1 / 3)


@every_loss
def test_renaming_the_labels_of_any_draw_changes_nothing(loss):
    generator = torch.Generator().manual_seed(2)
    labels = noisy(generator, 60, 30, 4, 0.3)
    one, other = partition_act(labels, loss), partition_act(renamed(labels, generator), loss)
    assert torch.equal(one.partition, other.partition)
    assert one.risk == other.risk


def test_the_mean_of_the_labels_does_change():
    """What the act is immune to, seen on what is not."""
    generator = torch.Generator().manual_seed(2)
    labels = noisy(generator, 60, 30, 4, 0.3)
    one, other = labels.double().mean(0), renamed(labels, generator).double().mean(0)
    assert not torch.equal(one, other)


@every_loss
def test_the_truth_is_found_from_noisy_draws(loss):
    labels = noisy(torch.Generator().manual_seed(3), 100, 60, 5, 0.2)
    act = partition_act(labels, loss)
    assert act.partition.tolist() == [item % 5 for item in range(60)]
    assert act.agreeing == act.starts == 16


def triangles_broken(distance, seed=4):
    """Of how many triples of partitions one side is longer than the other two."""
    labels = noisy(torch.Generator().manual_seed(seed), 24, 8, 3, 0.7)
    d = torch.stack([distance(it, labels) for it in labels])
    assert torch.allclose(d, d.T)
    assert d.diagonal().abs().max() < 1e-13  # a difference of entropies of a few nats
    return int((d[:, None, :] > d[:, :, None] + d[None, :, :] + 1e-12).sum())


@every_loss
def test_a_loss_is_a_metric(loss):
    assert triangles_broken(lambda one, all_: partition_losses(one, all_, loss)) == 0


def test_the_square_of_a_metric_is_seen_to_be_none():
    squared = lambda one, all_: partition_losses(one, all_).square()  # noqa: E731
    assert triangles_broken(squared) > 0


def test_the_error_is_that_of_repeated_posteriors():
    """Batch means against the spread of the risk over independent sets of draws."""
    generator = torch.Generator().manual_seed(5)
    acts = [partition_act(noisy(generator, 400, 6, 2, 0.3), starts=2) for _ in range(40)]
    spread = np.std([act.risk.value for act in acts], ddof=1)
    claimed = np.mean([act.risk.error for act in acts])
    assert claimed == pytest.approx(spread, rel=0.35)  # three standard errors of a spread of 40


def test_draws_in_long_runs_have_the_error_of_the_runs():
    """Each draw ten times over is no more information: batches of 20 see it."""
    labels = noisy(torch.Generator().manual_seed(6), 400, 6, 2, 0.3)
    once, often = partition_act(labels), partition_act(labels.repeat_interleave(10, 0))
    assert once.risk.value.item() == pytest.approx(often.risk.value.item())
    assert often.risk.error.item() == pytest.approx(once.risk.error.item(), rel=0.3)


def test_weights_are_repetitions():
    labels = noisy(torch.Generator().manual_seed(7), 20, 8, 3, 0.5)
    times = torch.arange(20) % 3
    one = partition_act(labels, weights=times)
    other = partition_act(labels.repeat_interleave(times, 0))
    assert torch.equal(one.partition, other.partition)
    assert one.risk.value.item() == pytest.approx(other.risk.value.item())


def test_the_weights_of_a_posterior_count():
    labels = noisy(torch.Generator().manual_seed(7), 20, 8, 3, 0.5).reshape(2, 10, 8)
    weights = (torch.arange(20) % 3).reshape(2, 10).double()
    plain = partition_act(labels, weights=weights)
    for of_draws, given in ((weights, None), (None, weights), (None, weights.flatten())):
        draws = read_draws({"z": labels}, of_draws)
        weighted = partition_act(draws, variable="z", weights=given)
        assert torch.equal(weighted.partition, plain.partition)
        assert weighted.risk.value.item() == pytest.approx(plain.risk.value.item())


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64])
def test_labels_may_be_unsigned(kind):
    labels = noisy(torch.Generator().manual_seed(7), 20, 8, 3, 0.2)
    found = partition_act(labels.numpy().astype(kind))
    assert torch.equal(found.partition, partition_act(labels).partition)


def test_searches_that_memory_has_no_room_for_are_made_one_by_one(monkeypatch):
    labels = noisy(torch.Generator().manual_seed(8), 30, 12, 3, 0.3)
    expected = partition_act(labels)
    monkeypatch.setattr(partitions, "COUNTS", 1)
    act = partition_act(labels)
    assert torch.equal(act.partition, expected.partition)
    assert act.starts == 16


def test_clusters_are_numbered_by_their_first_items():
    labels = torch.tensor([[7, 3, 7, 0, 3], [-5, -5, -5, -5, 2]])
    assert canonical(labels).tolist() == [[0, 1, 0, 2, 1], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("labels", "settings", "said"),
    [
        ([0, 1, 2], {}, r"labels must be \[draws, items\].*got \[3\]"),
        ([[]], {}, r"labels must be \[draws, items\].*got \[1, 0\]"),
        ([[0.5, 1.0]], {}, "labels must hold integers"),
        ([[math.nan, 1.0]], {}, "labels must hold integers"),
        ([["a", "b"]], {}, "labels must hold integers"),
        ([[0, 1], [0]], {}, "labels must hold integers"),
        ([[0, 1]], {"loss": "vi"}, "loss must be one of .*binder; got 'vi'"),
        ([[0, 1]], {"weights": [1.0, 1.0]}, r"weights must hold one for each of 1 draws"),
        ([[0, 1]], {"weights": [-1.0]}, "weights must be finite, at least 0"),
        ([[0, 1]], {"weights": [math.inf]}, "weights must be finite"),
        ([[0, 1]], {"weights": [0.0]}, "weights must be .* not all 0"),
        ([[0, 1]], {"starts": 0}, "starts must be at least 1; got 0"),
    ],
)
def test_bad_input_is_named(labels, settings, said):
    with pytest.raises(ValueError, match=said):
        partition_act(labels, **settings)


def test_a_partition_of_other_items_is_refused():
    with pytest.raises(ValueError, match="partition must hold 3 items as labels; got 2"):
        partition_losses([0, 1], [[0, 1, 2]])


@pytest.mark.slow
@every_loss
def test_a_thousand_draws_of_two_hundred_items_take_seconds(loss):
    """2.8 s of one core; what other programs take of it is not counted."""
    labels = noisy(torch.Generator().manual_seed(9), 1000, 200, 8, 0.3)
    began = time.process_time()
    assert partition_act(labels, loss).partition.tolist() == [item % 8 for item in range(200)]
    assert time.process_time() - began < 60


def test_labels_by_chain_are_those_of_all_draws():
    labels = torch.tensor([[[0, 0, 1], [1, 1, 0]], [[2, 2, 2], [0, 0, 1]]])
    together = partition_act(labels.flatten(0, 1))
    assert partition_act(labels).partition.tolist() == together.partition.tolist()


def test_posteriors_of_arviz_and_draws_by_chain_are_read_as_they_are():
    generator = torch.Generator().manual_seed(3)
    labels = noisy(generator, 60, 6, 2, 0.2)
    plain = partition_act(labels)
    by_chain = labels.reshape(3, 20, 6).numpy()
    names = ["a", "b", "c", "d", "e", "f"]
    array = xr.DataArray(by_chain, dims=("chain", "draw", "item"), coords={"item": names})
    data = xr.Dataset({"z": array, "mu": (("chain", "draw"), np.zeros((3, 20)))})
    tree = xr.DataTree.from_dict({"posterior": data})
    sources = [(by_chain, None), (array, None), (data, None), (tree, "z"), ({"z": by_chain}, "z")]
    for source, variable in sources:
        found = partition_act(source, variable=variable)
        assert found.partition.equal(plain.partition)
        assert found.risk.value == plain.risk.value
    assert partition_act(tree).items == names
    assert "a, c, e" in str(partition_act(tree))
    with pytest.raises(ValueError, match="variable must hold a label for each item"):
        partition_act(tree, variable="mu")
    with pytest.raises(ValueError, match="several variables"):
        partition_act({"z": by_chain, "y": by_chain})
    weights = torch.rand(3, 20, generator=generator)
    weighted = partition_act(by_chain, weights=weights)
    assert weighted.risk.value == partition_act(labels, weights=weights.flatten()).risk.value


def test_similarities_are_shares_of_draws_and_the_table_has_their_means():
    labels = [[0, 0, 0, 1, 1], [1, 1, 1, 0, 0], *[[0, 0, 1, 2, 2]] * 4]
    act = partition_act(labels)
    together = np.mean([[[x == y for x in row] for y in row] for row in np.array(labels)], 0)
    np.testing.assert_allclose(act.similarity, together)
    rows = {row[0]: row for row in act.table().rows}
    assert act.partition.tolist() == [0, 0, 1, 2, 2]
    assert rows["0"][1:] == (2, pytest.approx(1.0), "0, 1")
    assert rows["1"][1:] == (1, None, "2")
    assert act.to_dict()["partition"] == [0, 0, 1, 2, 2]


@every_loss
@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_bounded_act_is_the_best_of_all_partitions_of_so_many_clusters(loss, most):
    generator = torch.Generator().manual_seed(most)
    draws = noisy(generator, 20, 6, 4, 0.3)
    act = partition_act(draws, loss, max_clusters=most)
    allowed = [it for it in all_partitions(6) if max(it) < most]
    risks = [partition_losses(it, draws, loss).mean().item() for it in allowed]
    assert int(act.partition.max()) < most
    assert act.risk.value.item() == pytest.approx(min(risks), abs=1e-12)
    with pytest.raises(ValueError, match="max_clusters must be at least 1"):
        partition_act(draws, loss, max_clusters=0)
