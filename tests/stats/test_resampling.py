import torch

from rkl.stats import resample


def test_resampling_is_as_even_as_can_be():
    log_w = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1e-30, 1e-30]]).log()
    assert resample(log_w, 1, count=8).tolist() == [[0, 0, 0, 0, 1, 1, 2, 2], [0] * 8]
    assert resample(log_w.mT, 0, count=4).mT.tolist() == [[0, 0, 1, 2], [0] * 4]


def test_resampling_keeps_weights_to_one_particle():
    torch.manual_seed(0)
    log_w = 3 * torch.randn(50, 7)
    counts = torch.stack([it.bincount(minlength=50) for it in resample(log_w).T], 1)
    assert (counts - 50 * log_w.softmax(0)).abs().max() < 1 + 1e-4


def test_a_fixed_offset_takes_the_same_draws_again_and_each_as_often_as_it_weighs():
    log_w = torch.tensor([0.0, 1.0, 0.0, 3.0]).log()
    assert resample(log_w, count=8, offset=0.5).tolist() == [1, 1, 3, 3, 3, 3, 3, 3]
    equal = torch.zeros(1_000)
    assert torch.equal(resample(equal, offset=0.5), torch.arange(1_000))
