"""The adapters beside the trainers that they are for: one loss, where both have the divergence.

Axolotl 0.19.0: its plugins and its loss, installed without most of what it depends on.
NeMo Automodel 0.7.0: its KDLoss, installed without what it depends on, which needs a GPU.
KDFlow (songmzhang/KDFlow): not on PyPI, so its published registry and formulas, written anew.
TRL 1.16.0: its two trainers, installed whole, trained for two steps on a CPU.
verl 0.9.1: its registry, losses and configuration, installed without what needs a GPU.
"""

import functools
import importlib
import os
import subprocess
import sys
import types

import material
import pytest
import torch
from torch import nn

import rkl
from rkl.distill import KDLoss
from rkl.distill.adapters.axolotl import TopKLoss, with_loss
from rkl.distill.adapters.trl import DivergenceMixin
from rkl.distill.models.heads import read_head

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


# --- TRL ---------------------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
CHATS = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
    for asked, said in (("one", "two three"), ("four", "five"), ("a", "b c d"), ("x y", "z"))
]


class Logits(DivergenceMixin):
    """The mixin without a trainer, for its arithmetic alone."""

    def __init__(self, divergence):
        self.divergence = divergence


def trl_models(**changes):
    """A teacher and a student without dropout."""
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | changes
    teacher = material.model(2, 16, seed=1, **still)
    return teacher, material.model(1, 8, seed=2, **still)


def trained_by_trl(kind, config_kind, folder, rows, *, config, **settings):
    """The weights, and the losses and entropies in the log, after two steps of a trainer."""
    datasets = pytest.importorskip("datasets")
    words = material.tokenizer()
    words.chat_template = TEMPLATE
    teacher, student = trl_models()
    args = config_kind(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **config,
    )
    trainer = kind(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words,
        **settings,
    )
    trainer.train()
    keys = {"loss", "entropy", "grad_norm"}
    logs = [{k: v for k, v in row.items() if k in keys} for row in trainer.state.log_history[:2]]
    return nn.utils.parameters_to_vector(student.parameters()), logs


def assert_same_training(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    assert [row.keys() for row in ours[1]] == [row.keys() for row in theirs[1]]
    for of_ours, of_theirs in zip(ours[1], theirs[1], strict=True):
        assert of_ours == pytest.approx(of_theirs, rel=1e-5)  # logs are rounded there


def divergence_of(beta):
    return {0.0: rkl.KL(), 1.0: rkl.ReverseKL()}.get(beta) or rkl.JensenShannon(beta)


@pytest.mark.parametrize("divergence", [rkl.KL(), rkl.AKL()])
def test_the_mixin_is_the_mean_over_labels_that_lie_where_they_are_predicted(
    divergence, logits, labels
):
    student, teacher = logits
    chosen = labels != -100
    p, q = (it.log_softmax(-1)[chosen] for it in (teacher, student))
    expected = divergence(p, q).sum()
    loss = Logits(divergence).generalized_jsd_loss
    assert_same(loss(student, teacher, labels), expected / chosen.sum(), student)
    total = loss(student, teacher, labels, beta=0.3, num_items_in_batch=torch.tensor(5))
    assert_same(total, expected / 5, student)


@peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_gkd_training_with_the_mixin_is_that_of_trl(beta, tmp_path):
    gkd = pytest.importorskip("trl.experimental.gkd")

    class Ours(DivergenceMixin, gkd.GKDTrainer):
        pass

    settings = {"config": {"beta": beta, "lmbda": 0.0, "max_length": 32}}
    theirs = trained_by_trl(gkd.GKDTrainer, gkd.GKDConfig, tmp_path / "theirs", CHATS, **settings)
    settings = {"config": {"lmbda": 0.0, "max_length": 32}, "divergence": divergence_of(beta)}
    ours = trained_by_trl(Ours, gkd.GKDConfig, tmp_path / "ours", CHATS, **settings)
    assert_same_training(ours, theirs)


@peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 0.7), (1.0, 1.0)])
def test_a_distillation_training_with_the_mixin_is_that_of_trl(beta, temperature, tmp_path):
    trl = pytest.importorskip("trl")

    class Ours(DivergenceMixin, trl.DistillationTrainer):
        pass

    shared = {"temperature": temperature, "max_completion_length": 6}
    rows = [{"prompt": row["messages"][0]["content"]} for row in CHATS]
    folders = tmp_path / "theirs", tmp_path / "ours"
    kinds = trl.DistillationTrainer, Ours
    changes = (
        {"config": shared | {"beta": beta}},
        {"config": shared, "divergence": divergence_of(beta)},
    )
    theirs, ours = (
        trained_by_trl(kind, trl.DistillationConfig, folder, rows, **change)
        for kind, folder, change in zip(kinds, folders, changes, strict=True)
    )
    assert_same_training(ours, theirs)


# --- KDFlow ------------------------------------------------------------------------------------


@pytest.fixture
def kdflow(monkeypatch):
    """A registry with the signatures of ``kdflow.loss``, and what its trainers make of a name."""
    losses = {}

    def register_loss(name):
        return lambda loss: losses.setdefault(name, loss)

    module = types.ModuleType("kdflow.loss")
    module.register_loss = register_loss
    monkeypatch.setitem(sys.modules, "kdflow", types.ModuleType("kdflow"))
    monkeypatch.setitem(sys.modules, "kdflow.loss", module)

    def per_token(name, student_logits, teacher_logits, temperature=1.0):
        """As VanillaKD calls it, after build_loss_fn has bound the settings."""
        bound = functools.partial(losses[name], temperature=temperature, jsd_beta=0.5)
        return bound(student_logits, teacher_logits, reduction="none")

    return per_token


def by_formula(name, p, q, beta=0.3):
    """The formulas of KDFlow's losses, with logarithms of probabilities."""
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    mixed = lambda a, b, weight: (weight * a.exp() + (1 - weight) * b.exp()).log()  # noqa: E731

    def adaptive():
        """Its tail is the unlikely tokens, up to a mass of its adaptive_alpha."""
        mass, order = p.exp().sort(-1)
        tail = mass.cumsum(-1) <= beta
        gaps = (p.exp() - q.exp()).abs().gather(-1, order)
        share = ((gaps * ~tail).sum(-1) / gaps.sum(-1)).detach()
        return share * kl(p, q) + (1 - share) * kl(q, p)

    return {
        "kl": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        # its jsd_beta is the weight of the student
        "jsd": lambda: beta * kl(q, mixed(q, p, beta)) + (1 - beta) * kl(p, mixed(q, p, beta)),
        "skl": lambda: kl(p, mixed(p, q, beta)),
        "srkl": lambda: kl(q, mixed(q, p, beta)),
        "akl": adaptive,
        "tvd": lambda: (p.exp() - q.exp()).abs().sum(-1) / 2,
    }[name]()


IN_KDFLOW = {
    "kl": "kl",
    "rkl": "reverse-kl",
    "jsd": "jensen-shannon(beta=0.7)",
    "skl": "skew-kl(alpha=0.3)",
    "srkl": "skew-reverse-kl(alpha=0.3)",
    "akl": "akl(mu=0.7, straddle='head')",
    "tvd": "total-variation",
}


@pytest.mark.parametrize("name", IN_KDFLOW)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_loss_in_kdflow_is_that_of_its_formula(name, temperature, kdflow):
    from rkl.distill.adapters.kdflow import register

    register(IN_KDFLOW[name])
    student, teacher = random(7, VOCAB, seed=0).requires_grad_(), random(7, VOCAB, seed=1)
    ours = kdflow(IN_KDFLOW[name], student, teacher, temperature)
    p, q = ((it / temperature).log_softmax(-1) for it in (teacher, student))
    theirs = by_formula(name, p, q)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    weights = torch.arange(7.0)  # the gradient of each token by itself
    assert_same(ours @ weights / 5, theirs @ weights / 5, student)


def test_a_loss_in_kdflow_has_a_name_of_ones_own_and_its_reductions(kdflow):
    from rkl.distill.adapters.kdflow import register

    loss = register(rkl.AKL(mu=0.3), name="mine")
    student, teacher = random(7, VOCAB, seed=0), random(7, VOCAB, seed=1)
    each = kdflow("mine", student, teacher)
    expected = rkl.AKL(mu=0.3)(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(each, expected)
    for reduction in ("sum", "mean"):
        total = loss(student, teacher, reduction=reduction)
        torch.testing.assert_close(total, getattr(each, reduction)())
    with pytest.raises(ValueError, match="reduction"):
        loss(student, teacher, reduction="batchmean")


# --- verl --------------------------------------------------------------------------------------


def enumerated(divergence):
    """Two distributions over ten atoms, and terms and slopes at every atom, with q's weights."""
    from rkl.distill.adapters.verl import terms_and_slopes

    logits = random(10, seed=0).double().requires_grad_()
    p, q = random(10, seed=1).double().log_softmax(-1), logits.log_softmax(-1)
    terms, slopes = terms_and_slopes(divergence, p - q)
    return logits, p, q, terms, slopes


SAMPLED = [
    rkl.ReverseKL(),
    rkl.KL(),
    rkl.JensenShannon(beta=0.3),
    0.5 * rkl.KL() + rkl.ReverseKL(),
]


@pytest.mark.parametrize("divergence", SAMPLED, ids=str)
def test_terms_and_slopes_at_drawn_tokens_have_no_bias(divergence):
    logits, p, q, terms, slopes = enumerated(divergence)
    exact = divergence(p, q)
    weights = q.exp().detach()
    torch.testing.assert_close(weights @ terms, exact.detach())
    gradient = torch.autograd.grad(exact, logits, retain_graph=True)[0]
    sampled = torch.autograd.grad((weights * slopes) @ q, logits)[0]
    torch.testing.assert_close(sampled, gradient)


def test_k3_without_the_policy_gradient_has_the_gradient_of_forward_kl():
    logits, p, q, *_ = enumerated(rkl.KL())
    k3 = (p - q).exp() - (p - q) - 1
    sampled = torch.autograd.grad(q.exp().detach() @ k3, logits, retain_graph=True)[0]
    torch.testing.assert_close(sampled, torch.autograd.grad(rkl.KL()(p, q), logits)[0])


def test_k3_as_a_reward_has_the_gradient_of_a_difference_of_divergences():
    """Which is 0 to first order near agreement: the trap in docs/distill.md."""
    logits, p, q, *_ = enumerated(rkl.KL())
    k3 = ((p - q).exp() - (p - q) - 1).detach()
    sampled = torch.autograd.grad((q.exp().detach() * k3) @ q, logits, retain_graph=True)[0]
    difference = rkl.ReverseKL()(p, q) - rkl.KL()(p, q)
    torch.testing.assert_close(sampled, torch.autograd.grad(difference, logits)[0])


@pytest.fixture
def in_verl():
    """The losses and metrics of verl's function of this name, on two replies of other lengths."""
    losses = pytest.importorskip("verl.trainer.distillation.losses")
    tensordict = pytest.importorskip("tensordict")

    def of_tokens(*rows):
        return torch.nested.nested_tensor(list(rows), layout=torch.jagged)

    logq, logp = (-random(9, seed=seed).abs() for seed in (0, 1))
    logq.requires_grad_()
    lengths = (2, 3), (1, 3)  # of prompt and reply
    prompts, replies = (of_tokens(*(torch.ones(n[i]) for n in lengths)) for i in (0, 1))
    data = tensordict.TensorDict(
        {
            "prompts": prompts,
            "responses": replies,
            "response_mask": of_tokens(*(torch.ones(n[1]) for n in lengths)),
            "teacher_logprobs": torch.nested.nested_tensor_from_jagged(
                logp[:, None], torch.tensor([0, 5, 9])
            ),
        },
        batch_size=[2],
    )
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(logq, torch.tensor([0, 5, 9]))}

    def call(name, *, rewarded):
        settings = types.SimpleNamespace(use_policy_gradient=rewarded, loss_mode=name)
        config = types.SimpleNamespace(distillation_loss=settings)
        function = losses.get_distillation_loss_fn(name)
        return function(config=None, distillation_config=config, model_output=output, data=data)

    return call, logq


@peers
@pytest.mark.filterwarnings("default")
def test_reverse_kl_in_verl_is_its_k1_and_has_the_gradient_of_its_k2(in_verl):
    from rkl.distill.adapters.verl import register

    call, logq = in_verl
    register("reverse-kl", name="ours")
    k1, k2 = (call(name, rewarded=True)[0] for name in ("k1", "k2"))
    reward, metrics = call("ours", rewarded=True)
    torch.testing.assert_close(reward, k1, **CLOSE)
    loss, _ = call("ours", rewarded=False)
    torch.testing.assert_close(loss, k1, **CLOSE)
    gradients = (torch.autograd.grad(it.sum(), logq)[0] for it in (loss, k2))
    torch.testing.assert_close(*gradients, **CLOSE)
    mean = metrics["distillation/divergence"]
    torch.testing.assert_close(torch.as_tensor(mean.values[0]), k1.sum() / 6, **CLOSE)


@peers
@pytest.mark.filterwarnings("default")
def test_verl_refuses_by_its_type_what_drawn_tokens_cannot_tell():
    pytest.importorskip("verl.trainer.distillation.losses")
    from rkl.distill.adapters.verl import register

    with pytest.raises(TypeError, match="f-divergence"):
        register("akl")


@peers
def test_verl_imports_a_module_that_registers(tmp_path):
    pytest.importorskip("verl")
    (tmp_path / "our_losses.py").write_text(
        "from rkl.distill.adapters.verl import register\nregister('jensen-shannon(beta=0.3)')\n"
    )
    code = (
        "from verl.workers.config.distillation import DistillationLossConfig as Config\n"
        "print(Config(loss_mode='jensen-shannon(beta=0.3)').loss_settings.use_estimator)"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": paths, "VERL_USE_EXTERNAL_MODULES": "our_losses"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings
    )
    assert done.stdout.split()[-1:] == ["True"], done.stderr


# --- Axolotl -----------------------------------------------------------------------------------

TOP, WIDTH = 5, 8


@pytest.fixture
def top_k():
    """Head and hidden states of a student, the targets of a batch, and its labels."""
    student = material.model(1, WIDTH, seed=2)
    hidden = random(ROWS, POSITIONS, WIDTH, seed=3).requires_grad_()
    values, index = random(ROWS, POSITIONS, material.VOCAB, seed=4).topk(TOP)
    labels = torch.arange(ROWS * POSITIONS).reshape(ROWS, POSITIONS)
    labels = labels.masked_fill(labels % 4 == 1, -100)
    # at the position that predicts it, as the targets of a vLLM server lie there
    predicted = torch.cat([labels[:, 1:], torch.full((ROWS, 1), -100)], 1)
    mask = (predicted != -100)[..., None].expand(-1, -1, TOP).long()
    return student, hidden, (index, values.log_softmax(-1), mask), labels


def known_sum(student, hidden, targets, labels, temperature, alpha, hard):
    """α T² KL over the tokens of the mask, and h times the cross-entropy."""
    index, logp, mask = targets
    logits = hidden @ student.lm_head.weight.T
    logq = (logits / temperature).log_softmax(-1).gather(-1, index)
    kl = ((logp.exp() * (logp - logq)).sum(-1) * mask[..., 0]).sum()
    entropy = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return alpha * temperature**2 * kl + hard * entropy


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_in_axolotl_is_a_sum_over_tokens(temperature, top_k):
    student, hidden, targets, labels = top_k
    settings = {"temperature": temperature, "alpha": 0.9, "hard_label_weight": 0.1}
    loss = TopKLoss(rkl.KL(), read_head(student), **settings)
    ours = loss(student.lm_head.weight, hidden, *targets, true_labels=labels)
    expected = known_sum(student, hidden, targets, labels, temperature, 0.9, 0.1)
    assert_same(ours, expected, hidden, student.lm_head.weight)


def test_a_target_with_fewer_atoms_in_axolotl_is_that_without_the_missing_ones(top_k):
    student, hidden, (index, logp, mask), labels = top_k
    loss = TopKLoss(rkl.JensenShannon(), read_head(student))
    cut = index[..., :3], logp[..., :3].log_softmax(-1), mask[..., :3]
    filling = 0, -torch.inf  # as Axolotl fills them up
    padded = [
        nn.functional.pad(it, (0, 2), value=value) for it, value in zip(cut, filling, strict=False)
    ] + [mask]
    weight = student.lm_head.weight
    values = (loss(weight, hidden, *it, true_labels=labels) for it in (cut, padded))
    assert_same(*values, hidden)


def test_the_loss_in_axolotl_of_no_token_is_0(top_k):
    student, hidden, (index, logp, mask), labels = top_k
    loss = TopKLoss(rkl.KL(), read_head(student), hard_label_weight=1.0)
    nothing = index, logp, torch.zeros_like(mask)
    value = loss(
        student.lm_head.weight, hidden, *nothing, true_labels=torch.full_like(labels, -100)
    )
    assert value == 0


def axolotl_settings(**changes):
    settings = dict.fromkeys(("kd_normalize_topk", "kd_beta"))
    return types.SimpleNamespace(
        **settings | {"kd_trainer": True, "kd_divergence": "kl"} | changes
    )


def test_the_trainer_in_axolotl_gets_our_loss_with_its_settings():
    class Trainer:
        def __init__(self, model):
            self.model, self.accelerator = model, types.SimpleNamespace(unwrap_model=lambda it: it)
            self.args = types.SimpleNamespace(kd_temperature=2.0, kd_alpha=0.9, kd_ce_alpha=None)

    cfg = axolotl_settings(kd_divergence="jensen-shannon(beta=0.3)")
    loss = with_loss(Trainer, cfg)(material.model(1, WIDTH, seed=2))._kd_loss_fn
    assert loss.divergence == rkl.JensenShannon(beta=0.3)
    assert (loss.temperature, loss.alpha, loss.hard_label_weight) == (2.0, 0.9, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd_normalize_topk": True}, "kd_normalize_topk"),
        ({"kd_beta": 0.3}, "kd_beta"),
        ({"kd_divergence": "nonsense"}, "divergence"),
    ],
)
def test_axolotl_settings_that_a_divergence_has_not_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        with_loss(object, axolotl_settings(**changes))


def test_a_divergence_that_lies_beyond_the_top_k_is_refused_in_axolotl():
    with pytest.raises(ValueError, match="kd_divergence"):
        TopKLoss(rkl.ReverseKL(), read_head(material.model(1, WIDTH, seed=2)))


@pytest.fixture
def axolotl_loss():
    name = "axolotl.integrations.kd.kernels.liger"
    return pytest.importorskip(name).LigerFusedLinearKLTopKLogprobLoss


@peers
@pytest.mark.filterwarnings("default")
def test_forward_kl_in_axolotl_is_its_own(top_k, axolotl_loss):
    student, hidden, targets, labels = top_k
    weight = student.lm_head.weight
    theirs = axolotl_loss(0.1, 0.9, 1.0, 0.0, compiled=False, normalize_topk=False)
    ours = TopKLoss(rkl.KL(), read_head(student), alpha=0.9, hard_label_weight=0.1)
    values = (loss(weight, hidden, *targets, true_labels=labels) for loss in (ours, theirs))
    assert_same(*values, hidden, weight)


@peers
@pytest.mark.filterwarnings("default")
def test_the_gradient_of_axolotl_lacks_the_square_of_the_temperature(top_k, axolotl_loss):
    """Which its value has: the trap in docs/distill.md. Its compiled loss does the same."""
    student, hidden, targets, labels = top_k
    weight = student.lm_head.weight
    theirs = axolotl_loss(0.0, 1.0, 2.0, 0.0, compiled=False, normalize_topk=False)
    ours = TopKLoss(rkl.KL(), read_head(student), temperature=2.0)
    values = [loss(weight, hidden, *targets, true_labels=labels) for loss in (ours, theirs)]
    torch.testing.assert_close(*values, **CLOSE)
    gradients = (torch.autograd.grad(it, hidden)[0] for it in values)
    of_ours, of_theirs = gradients
    torch.testing.assert_close(of_ours, 4 * of_theirs, **CLOSE)


@peers
@pytest.mark.filterwarnings("default")
def test_axolotl_loads_our_plugin_and_its_settings():
    base = pytest.importorskip("axolotl.integrations.base")
    pytest.importorskip("axolotl.integrations.kd")
    plugin = base.load_plugin("rkl.distill.adapters.axolotl.DivergencePlugin")
    assert isinstance(plugin, base.BasePlugin)
    module, _, name = plugin.get_input_args().rpartition(".")
    settings = getattr(importlib.import_module(module), name)
    assert settings(kd_divergence="kl", kd_alpha=0.5).kd_divergence == "kl"
    assert plugin.get_trainer_cls(axolotl_settings(kd_trainer=False)) is None
