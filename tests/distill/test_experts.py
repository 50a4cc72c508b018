"""Mixtures of experts: the loss that balances them is transformers' own."""

import pytest
import torch

import rkl
from rkl.distill import PadRows
from rkl.distill.text.batches import shifted

EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {
    "Mixtral": LOCAL,
    "Qwen2Moe": ROUTED | {"moe_intermediate_size": 8},
    "Qwen3Moe": ROUTED | {"moe_intermediate_size": 8},
    "Olmoe": ROUTED,
    "GraniteMoe": LOCAL,
    "GptOss": LOCAL,
    "Phimoe": LOCAL | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
}
every_mixture = pytest.mark.parametrize("name", MIXTURES)
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}


@pytest.fixture
def mixture(tiny_model):
    """A function that makes a small mixture of experts: mixture("Mixtral", seed=2)."""

    def make(name, **changes):
        model = tiny_model(name, seed=2, **EXPERTS | MIXTURES[name] | changes)
        model.set_experts_implementation("eager")  # grouped products know no double precision
        return model.double()

    return make


def own_aux_loss(student, batch):
    """What the model itself adds to its cross-entropy."""
    inputs = {name: it for name, it in batch.items() if name != "labels"}
    return 0.7 * student(**inputs).aux_loss


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return {name: torch.zeros_like(it) if it.grad is None else it.grad for name, it in named}


@every_mixture
def test_the_balancing_loss_is_the_models_own(name, tiny_model, mixture, tiny_rows, tiny_trainer):
    teacher = tiny_model("Llama", seed=1).double()
    student = mixture(name)
    batch = PadRows()(tiny_rows(4))
    losses, gradients = [], []
    for added in (True, False):
        settings = {"divergence": rkl.KL()}
        trainer = tiny_trainer(student, teacher, settings=settings, router_aux_loss=added)
        losses.append(trainer.compute_loss(student, dict(batch)))
        gradients.append(gradient_of(student, losses[-1]))
    own = own_aux_loss(student, batch)
    assert own.item() > 0.1
    # Routers of transformers compute in single precision, whatever the model's is.
    assert (losses[0] - losses[1]).item() == pytest.approx(own.item(), rel=1e-6)
    for name, expected in gradient_of(student, own).items():
        added = gradients[0][name] - gradients[1][name]
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-6)


def test_without_router_logits_nothing_is_added(tiny_model, mixture, tiny_rows, tiny_trainer):
    teacher = tiny_model("Llama", seed=1)
    batch = PadRows()(tiny_rows(4))
    losses = []
    for asked in (False, True):
        student = mixture("Mixtral", output_router_logits=asked)
        trainer = tiny_trainer(student, teacher, router_aux_loss=not asked)
        losses.append(trainer.compute_loss(student, dict(batch)).item())
    assert losses[0] == losses[1]


def test_batches_weigh_by_their_tokens_however_they_are_accumulated(
    tiny_model, mixture, tiny_rows, tiny_trainer
):
    teacher, rows = tiny_model("Llama", seed=1), tiny_rows(4)
    student = mixture("Mixtral")
    batches = [PadRows()(rows[:2]), PadRows()(rows[2:])]
    counts = [len(shifted(batch).targets) for batch in batches]
    trainer = tiny_trainer(student, teacher, settings={"divergence": rkl.KL()})
    alone = [trainer.compute_loss(student, dict(batch)).item() for batch in batches]
    expected = sum(n * it for n, it in zip(counts, alone, strict=True)) / sum(counts)
    shared = [
        trainer.compute_loss(student, dict(batch), num_items_in_batch=sum(counts)).item()
        for batch in batches
    ]
    assert counts[0] != counts[1]
    assert sum(shared) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [None, torch.tensor(0)])
def test_a_step_without_trained_tokens_has_a_loss_of_0(
    count, tiny_model, mixture, tiny_rows, tiny_trainer
):
    """As rows whose answers are all cut off give; its balancing loss was divided by 0 tokens."""
    batch = PadRows()(tiny_rows(2))
    batch["labels"].fill_(-100)
    student = mixture("Mixtral")
    trainer = tiny_trainer(student, tiny_model("Llama", seed=1))
    loss = trainer.compute_loss(student, batch, num_items_in_batch=count)
    assert loss.item() == 0
    assert not any(it.any() for it in gradient_of(student, loss).values())


def test_evaluation_measures_the_divergence_alone(tiny_model, mixture, tiny_rows, tiny_trainer):
    teacher, rows = tiny_model("Llama", seed=1), tiny_rows(4)
    student = mixture("Mixtral")
    values = []
    for added in (True, False):
        trainer = tiny_trainer(
            student, teacher, settings={"eval_dataset": rows}, router_aux_loss=added
        )
        values.append(trainer.evaluate()["eval_loss"])
    assert values[0] == values[1]


def test_an_adapted_mixture_is_balanced_too(
    tiny_model, mixture, tiny_lora, tiny_rows, tiny_trainer
):
    teacher, batch = tiny_model("Llama", seed=1).double(), PadRows()(tiny_rows(4))
    student = mixture("Mixtral")
    student = tiny_lora(student, ["q_proj"])
    losses = []
    for added in (True, False):
        settings = {"divergence": rkl.KL()}
        trainer = tiny_trainer(student, teacher, settings=settings, router_aux_loss=added)
        losses.append(trainer.compute_loss(student, dict(batch)).item())
    own = own_aux_loss(student, batch).item()
    assert losses[0] - losses[1] == pytest.approx(own, rel=1e-6)
