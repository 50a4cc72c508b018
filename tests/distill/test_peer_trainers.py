"""The adapters beside the trainers that they are for: one loss, where both have the divergence.

NeMo Automodel 0.7.0: its KDLoss, installed without what it depends on, which needs a GPU.
"""

import pytest
import torch

import rkl
from rkl.distill import KDLoss

ROWS, POSITIONS, VOCAB = 2, 6, 50
peers = pytest.mark.peers
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def logits():
    """Of the student, with a gradient, and of the teacher."""
    return random(ROWS, POSITIONS, VOCAB, seed=0).requires_grad_(), random(
        ROWS, POSITIONS, VOCAB, seed=1
    )


@pytest.fixture
def labels():
    labels = torch.arange(ROWS * POSITIONS).reshape(ROWS, POSITIONS)
    return labels.masked_fill(labels % 3 == 0, -100)


def assert_same(ours, theirs, *leaves):
    torch.testing.assert_close(ours, theirs, **CLOSE)
    gradients = (torch.autograd.grad(it, leaves, retain_graph=True) for it in (ours, theirs))
    for of_ours, of_theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(of_ours, of_theirs, **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_loss_is_the_mean_over_labels_times_the_square_of_the_temperature(
    temperature, logits, labels
):
    student, teacher = logits
    p, q = ((it / temperature).log_softmax(-1)[labels != -100] for it in (teacher, student))
    expected = temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    loss = KDLoss(temperature=temperature)
    assert_same(loss(student, teacher, labels), expected, student)
    total = expected * (labels != -100).sum()
    assert_same(loss(student, teacher, labels, num_batch_labels=1), total, student)


def test_kd_loss_takes_a_divergence_by_its_text(logits, labels):
    student, teacher = logits
    by_text = KDLoss(divergence="akl(mu=0.3)")(student, teacher, labels)
    by_value = KDLoss(divergence=rkl.AKL(mu=0.3))(student, teacher, labels)
    assert by_text == by_value != KDLoss()(student, teacher, labels)


def test_kd_loss_of_no_token_is_0_with_a_gradient(logits):
    student, teacher = logits
    loss = KDLoss()(student, teacher, torch.full((ROWS, POSITIONS), -100), num_batch_labels=0)
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_kd_loss_gathers_a_vocabulary_in_shards(logits, labels, tmp_path):
    from torch import distributed
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        student, teacher = logits
        shards = (DTensor.from_local(it, mesh, [Shard(-1)]) for it in logits)
        assert_same(KDLoss()(*shards, labels), KDLoss()(student, teacher, labels), student)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tp_group": object()}, "tp_group"), ({"divergence": "nonsense"}, "divergence")],
)
def test_kd_loss_refuses_what_it_cannot_do(settings, message):
    with pytest.raises(ValueError, match=message):
        KDLoss(**settings)


@peers
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize("denominator", [None, 1, 17])
def test_kd_loss_is_that_of_automodel(temperature, chunk_size, denominator, logits, labels):
    theirs = pytest.importorskip("nemo_automodel.components.loss.kd_loss").KDLoss
    settings = {"ignore_index": -100, "temperature": temperature, "chunk_size": chunk_size}
    ours, theirs = (
        loss(**settings)(*logits, labels, num_batch_labels=denominator)
        for loss in (KDLoss, theirs)
    )
    assert_same(ours, theirs, logits[0])


@peers
def test_automodel_makes_our_loss_of_its_yaml(tmp_path):
    loader = pytest.importorskip("nemo_automodel.components.config.loader")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "kd_loss_fn:\n"
        "  _target_: rkl.distill.KDLoss\n"
        "  ignore_index: -100\n"
        "  temperature: 2.0\n"
        "  divergence: akl(mu=0.3)\n"
    )
    loss = loader.load_yaml_config(str(recipe)).kd_loss_fn.instantiate()
    assert isinstance(loss, KDLoss)
    assert (loss.temperature, loss.divergence) == (2.0, rkl.AKL(mu=0.3))
