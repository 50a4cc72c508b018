"""Every divergence through every estimator: the same number, whatever is known of p and q."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from catalogued import ALL, every, every_f, pair
from torch._inductor.exc import InductorError
from torch.nn.functional import cross_entropy

import rkl
import rkl.testing
from rkl import LinearHead, TopK, exact, per_token


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def head(tokens=37, width=8, vocab=50, **settings):
    tensors = torch.randn(tokens, width), torch.randn(vocab, width), torch.randn(vocab)
    return LinearHead(*(x.requires_grad_() for x in tensors), **settings)


def logits(head):
    """As written in the docstring of LinearHead."""
    y = head.scale * (head.hidden @ head.weight.T + head.bias)
    y = y if head.softcap is None else head.softcap * (y / head.softcap).tanh()
    return y / head.temperature


@every
@pytest.mark.parametrize(
    "settings",
    [{}, {"scale": 0.3, "softcap": 2.0, "temperature": 1.7}],
    ids=["plain", "scaled, capped, hot"],
)
def test_heads_agree_with_full_logits_in_value_and_every_gradient(divergence, settings):
    student, teacher = head(**settings), head(width=5, **settings)
    mask, labels = 0.5 * (torch.rand(37) < 0.7).double(), torch.randint(50, (37,))
    plain = (mask * divergence(*(logits(x).log_softmax(-1) for x in (teacher, student)))).sum()
    hard = cross_entropy(logits(student._replace(temperature=1.0)), labels, reduction="none")
    expected = torch.autograd.grad(3 * (plain + 0.4 * mask @ hard), student[:3])
    fused = exact(
        divergence,
        p=teacher,
        q=student,
        weight=mask,
        chunk=10,
        labels=labels,
        hard_label_weight=0.4,
    )
    assert torch.allclose(fused, plain + 0.4 * mask @ hard)
    for one, other in zip(torch.autograd.grad(3 * fused, student[:3]), expected, strict=True):
        assert torch.allclose(one, other)


@every
def test_logits_and_mixed_sides_agree_with_heads(divergence):
    student, teacher = head(), head(width=5)
    full = exact(divergence, p=logits(teacher), q=logits(student))
    (expected,) = torch.autograd.grad(full, student.hidden, retain_graph=True)
    for p, q in [(teacher, logits(student)), (logits(teacher), student)]:
        value = exact(divergence, p=p, q=q)
        (gradient,) = torch.autograd.grad(value, student.hidden)
        assert torch.allclose(value, full)
        assert torch.allclose(gradient, expected)
    assert torch.allclose(
        full, divergence(*(logits(x).log_softmax(-1) for x in (teacher, student))).mean()
    )


def coarse(x, index):
    top = x.log_softmax(-1).gather(-1, index)
    return torch.cat([top, (-top.exp().sum(-1, keepdim=True)).log1p()], -1)


@every
def test_a_top_k_teacher_is_the_teacher_coarsened(divergence):
    teacher, student = torch.randn(37, 50), head(scale=0.7, softcap=3.0, temperature=1.3)
    top = TopK(*teacher.log_softmax(-1).topk(5))
    if divergence.needs_every_atom:
        with pytest.raises(ValueError, match=r"p must be the whole .* a top k does not.* 5 of 50"):
            exact(divergence, p=top, q=student, chunk=10)
    else:
        expected = divergence(*(coarse(x, top.index) for x in (teacher, logits(student)))).mean()
        value = exact(divergence, p=top, q=student, chunk=10)
        assert torch.allclose(value, expected)
        gradients = (torch.autograd.grad(v, student[:3]) for v in (value, expected))
        assert all(torch.allclose(*pair) for pair in zip(*gradients, strict=True))
    whole = TopK(*teacher.log_softmax(-1).topk(50))
    assert torch.allclose(
        exact(divergence, p=whole, q=student), exact(divergence, p=teacher, q=student)
    )


@every_f
def test_a_top_k_teacher_bounds_an_f_divergence_from_below(divergence):
    teacher, student = 3 * torch.randn(2, 37, 50)
    full = exact(divergence, p=teacher, q=student)
    bounds = [
        exact(divergence, p=TopK(*teacher.log_softmax(-1).topk(k)), q=student) for k in (1, 5, 20)
    ]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= full


def test_hard_labels_beside_a_top_k_teacher_are_those_of_the_whole_vocabulary():
    teacher, student, labels = torch.randn(37, 50), head(), torch.randint(50, (37,))
    top = TopK(*teacher.log_softmax(-1).topk(5))
    soft = exact(rkl.KL(), p=top, q=student)
    both = exact(rkl.KL(), p=top, q=student, labels=labels, hard_label_weight=1.0)
    assert torch.allclose(both - soft, cross_entropy(logits(student), labels))


def test_per_token_agrees_with_exact():
    teacher, student = head(softcap=2.0), head(width=5, temperature=2.0)
    values = per_token({repr(d): d for d in ALL}, p=teacher, q=student, chunk=4)
    for d in ALL:
        assert torch.allclose(values[repr(d)].mean(), exact(d, p=teacher, q=student))
        assert not values[repr(d)].requires_grad


def test_weights_default_to_the_mean_and_are_divided_by_nothing():
    a, b = torch.randn(2, 11, 20)
    mean = exact(rkl.KL(), p=a, q=b)
    assert torch.allclose(exact(rkl.KL(), p=a, q=b, weight=torch.ones(11)), 11 * mean)


def test_token_of_weight_0_is_never_looked_at():
    a, b = torch.randn(2, 5, 20)
    poisoned = torch.cat([b, torch.full((1, 20), math.nan)]).requires_grad_()
    weight = torch.tensor([0.2] * 5 + [0.0])
    value = exact(rkl.KL(), p=torch.cat([a, a[:1]]), q=poisoned, weight=weight)
    value.backward()
    assert torch.allclose(value, exact(rkl.KL(), p=a, q=b))
    assert poisoned.grad.isfinite().all()


def test_an_infinite_token_is_infinite_and_leaves_the_others_their_gradient():
    a, b = torch.randn(2, 5, 20)
    student, alone = b.clone(), b[1:].clone().requires_grad_()
    student[0, 3] = -math.inf
    value = exact(rkl.KL(), p=a, q=student.requires_grad_(), weight=torch.ones(5))
    (gradient,) = torch.autograd.grad(value, student)
    (expected,) = torch.autograd.grad(
        exact(rkl.KL(), p=a[1:], q=alone, weight=torch.ones(4)), alone
    )
    assert value == math.inf
    assert (gradient[0] == 0).all()
    assert torch.allclose(gradient[1:], expected)


def test_a_frozen_head_gets_no_gradient_and_no_product():
    student, teacher = head(), torch.randn(37, 50)
    frozen = student._replace(weight=student.weight.detach(), bias=None)
    with torch.profiler.profile() as profile:
        exact(rkl.KL(), p=teacher, q=frozen, chunk=37).backward()
    products = [e for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")]
    assert sum(e.count for e in products) == 2  # the projection and the hidden states' gradient


def test_nothing_is_multiplied_twice():
    student, teacher = head(), head(width=5)
    with torch.profiler.profile() as profile:
        exact(rkl.AKL(), p=teacher, q=student, chunk=37).backward()
    products = [e for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")]
    assert sum(e.count for e in products) == 4


def test_no_gradient_is_computed_where_none_is_asked_for():
    student = head()
    with torch.no_grad(), torch.profiler.profile() as profile:
        value = exact(rkl.KL(), p=torch.randn(37, 50), q=student, chunk=37)
    assert not value.requires_grad
    products = [e for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")]
    assert sum(e.count for e in products) == 1


def test_logits_exist_for_one_chunk_at_a_time():
    seen = []

    @dataclass(frozen=True)
    class _Watching(rkl.FDivergence):
        def integrand(self, logp, logq):
            seen.append(logq.shape)
            return rkl.KL().integrand(logp, logq)

    exact(_Watching(), p=head(width=5), q=head(), chunk=10)
    assert max(shape[0] for shape in seen if len(shape) == 2) == 10


def test_half_precision_keeps_small_gradients():
    """Weights of 2⁻¹⁶ and an upstream of 2¹⁶ are as weights of 1: error below 2e-3."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float32)
        for shape in ((64, 32), (500, 32), (64, 500))
    )
    for dtype in (torch.float16, torch.bfloat16):
        student = [x.to(dtype).requires_grad_() for x in (hidden, weight / 4)]
        small = exact(
            rkl.KL(), p=teacher, q=LinearHead(*student), weight=torch.full((64,), 2.0**-16)
        )
        gradients = torch.autograd.grad(small * 2**16, student)
        single = [x.detach().float().requires_grad_() for x in student]
        products = LinearHead(*single)
        expected = torch.autograd.grad(
            exact(rkl.KL(), p=teacher, q=products, weight=torch.ones(64)), single
        )
        rounding = 2e-3 if dtype == torch.float16 else 1.6e-2  # bfloat16 keeps 8 bits
        for one, other in zip(gradients, expected, strict=True):
            assert (one.float() - other).norm() < rounding * other.norm()


@pytest.mark.parametrize("divergence", [rkl.KL(), rkl.AKL()], ids=repr)
def test_inputs_in_half_precision_are_summed_in_single(divergence):
    a, b = (3 * torch.randn(2, 16, 400)).to(torch.bfloat16)
    value = exact(divergence, p=a, q=b)
    assert value.dtype == torch.float32
    assert torch.allclose(value, exact(divergence, p=a.double(), q=b.double()).float(), rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_chunks_take_the_memory_of_the_one_before(bias, monkeypatch):
    from rkl import estimators, kernels

    places = []

    def watched(step, a, b, *rest):
        places.append((a.data_ptr(), b.data_ptr()))
        return kernels.step_(step, a, b, *rest)

    student, teacher = (x._replace(bias=x.bias if bias else None) for x in (head(21), head(21)))
    expected = exact(rkl.KL(), p=teacher, q=student, chunk=21)
    monkeypatch.setattr(estimators, "step_", watched)
    value = exact(rkl.KL(), p=teacher, q=student, chunk=8)
    assert torch.allclose(value, expected)
    assert len(places) == 3
    assert len(set(places)) == 1
    pairs = zip(*(torch.autograd.grad(v, student[:2]) for v in (value, expected)), strict=True)
    assert all(torch.allclose(one, other) for one, other in pairs)


def test_a_teacher_in_another_precision_has_memory_of_its_own():
    student, teacher = head(tokens=21), head(tokens=21)
    single = LinearHead(*(x.detach().float() for x in teacher[:3]))
    values = [exact(rkl.KL(), p=single, q=student, chunk=chunk) for chunk in (8, 21)]
    assert torch.allclose(*values)


@pytest.mark.slow
@every
def test_compiled_agrees_with_eager_and_is_one_graph(divergence):
    torch._dynamo.utils.counters.clear()
    student, teacher = head(tokens=21, vocab=300), head(tokens=21, width=5, vocab=300)
    labels = torch.randint(300, (21,))
    settings = {"p": teacher, "q": student, "labels": labels, "hard_label_weight": 0.5}
    eager = exact(divergence, compiled=False, **settings)
    # 21 tokens in chunks of 8 leave a ragged last one
    values = eager, exact(divergence, compiled=True, chunk=8, **settings)
    assert torch.allclose(*values)
    for one, other in zip(*(torch.autograd.grad(v, student[:3]) for v in values), strict=True):
        assert torch.allclose(one, other)
    # None where other values of its parameters were compiled before: they are inputs.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1


@pytest.mark.parametrize("divergence", [rkl.KL(), rkl.AKL()], ids=repr)
def test_compiled_agrees_with_eager(divergence):
    student, teacher = head(tokens=21), torch.randn(21, 50)
    eager = exact(divergence, p=teacher, q=student, compiled=False)
    values = eager, exact(divergence, p=teacher, q=student, compiled=True)
    assert torch.allclose(*values)
    for one, other in zip(*(torch.autograd.grad(v, student[:3]) for v in values), strict=True):
        assert torch.allclose(one, other)


def test_compiling_is_chosen_by_the_size_of_the_work_and_said_once(caplog, monkeypatch):
    from rkl import kernels

    cpu = torch.device("cpu")
    kernels._say.cache_clear()
    assert not kernels.compiles(2**20, cpu)
    assert not caplog.records
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    assert kernels.compiles(2**26, cpu)
    assert kernels.compiles(2**26, cpu)
    assert [r.message for r in caplog.records if "Compiling the loss" in r.message] == [
        caplog.records[0].message
    ]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not kernels.compiles(2**26, cpu)
    assert "No C++ compiler" in caplog.records[-1].message


class AtLaunchError(Exception):
    """As Triton raises it where a GPU cannot hold a kernel."""

    __module__ = "triton.runtime.errors"


@pytest.mark.parametrize(
    "error",
    [
        OSError("not executable"),
        InductorError(OSError("no g++"), None),
        AtLaunchError("out of shared memory"),
    ],
)
def test_a_compiler_that_does_not_work_is_said_once_and_done_without(error, caplog, monkeypatch):
    from rkl import kernels

    asked = []

    def fail(function, step):
        asked.append(step)
        raise error

    kernels._say.cache_clear()
    monkeypatch.setattr(kernels, "_FAILED", set())
    monkeypatch.setattr(kernels, "_compiled", fail)
    p, q = torch.randn(7, 50), torch.randn(7, 50)
    values = [exact(rkl.KL(), p=p, q=q, compiled=it) for it in (True, True, False)]
    assert values[0] == values[1] == values[2]
    assert len(asked) == len(caplog.records) == 1
    reason = str(error).partition("\n")[0]
    assert caplog.records[0].message.endswith(f"compiling failed: {reason}")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("a bug")])
def test_what_fails_in_a_compiled_step_is_not_taken_for_the_compiler(error, monkeypatch):
    from rkl import kernels

    def failing(*arguments):
        raise error

    monkeypatch.setattr(kernels, "_compiled", lambda function, step: failing)
    with pytest.raises(type(error), match=str(error)):
        exact(rkl.KL(), p=torch.randn(7, 50), q=torch.randn(7, 50), compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "/bin/false"}, "runs uncompiled"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache"}, "TORCHINDUCTOR_CACHE_DIR cannot be used"),
    ],
)
def test_a_machine_that_cannot_compile_computes_the_same(environment, said, tmp_path):
    script = (
        "import torch, rkl; torch.manual_seed(0); p, q = torch.randn(2, 7, 50)\n"
        "one, other = (rkl.exact(rkl.KL(), p=p, q=q, compiled=it) for it in (True, False))\n"
        "torch.testing.assert_close(one, other)"
    )
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | environment
    probe = [sys.executable, "-c", script]
    done = subprocess.run(probe, env=environment, capture_output=True, text=True, check=True)
    assert said in done.stderr


@pytest.mark.parametrize(
    ("p", "q", "weight", "message"),
    [
        ((4, 9), (3, 9), None, "p has 4 tokens but q has 3"),
        ((3, 1), (3, 9), None, "p has a vocabulary of 1 but q of 9; pad"),
        ((0, 9), (0, 9), None, "None of the 0 tokens"),
        ((3, 9), (3, 9), [0, 0, 0], "None of the 3 tokens has a weight"),
        ((3, 9), (3, 9), [1, 1], r"weight must be \[3\].* got \[2\]"),
        ((3, 9), (3, 9), [1, -1, 1], "weight must be at least 0 and finite"),
        ((3, 9), (3, 9), [1, math.nan, 1], "weight must be at least 0 and finite"),
        ((2, 3, 9), (2, 3, 9), None, r"got \[2, 3, 9\].*flatten\(0, -2\)"),
        ((3, 0), (3, 0), None, r"p must be \[tokens, vocab\]; got \[3, 0\]"),
    ],
)
def test_mismatches_are_refused(p, q, weight, message):
    weight = weight if weight is None else torch.tensor(weight).double()
    with pytest.raises(ValueError, match=message):
        exact(rkl.KL(), p=torch.zeros(p), q=torch.zeros(q), weight=weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(50, 7)}, r"q.weight must be \[vocab, 8\].* got \[50, 7\]"),
        ({"bias": torch.zeros(49)}, r"q.bias must be \[50\]; got \[49\]"),
        ({"temperature": 0.0}, "q.temperature must be finite, above 0; got 0.0"),
        ({"scale": math.nan}, "q.scale must be finite, above 0; got nan"),
        ({"softcap": -1.0}, "q.softcap must be finite, above 0; got -1.0"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        exact(rkl.KL(), p=torch.zeros(37, 50), q=head()._replace(**change))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1; got 0"),
        ({"hard_label_weight": 1.0}, "labels must be given .* got None"),
        ({"hard_label_weight": -1.0}, "hard_label_weight must be finite, at least 0; got -1.0"),
        (
            {"hard_label_weight": 1.0, "labels": torch.tensor([0, 9, 1])},
            r"labels must lie in \[0, 9\).* got 0 to 9",
        ),
        ({"p": TopK(torch.zeros(3, 2), torch.zeros(3, 1).long())}, "p.index must have the shape"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    settings = {"p": torch.zeros(3, 9), "q": torch.zeros(3, 9)} | settings
    with pytest.raises(ValueError, match=message):
        exact(rkl.KL(), **settings)


@pytest.mark.parametrize(
    ("divergence", "p", "q", "message"),
    [
        ("kl", torch.zeros(3, 9), torch.zeros(3, 9), "divergence must be a Divergence.*'kl'"),
        (rkl.KL(), torch.zeros(3, 9).long(), torch.zeros(3, 9), "p must hold floating-point"),
        (
            rkl.KL(),
            torch.zeros(3, 9),
            [1.0],
            "q must be a tensor, a LinearHead, a TopK or a S",
        ),
        (rkl.KL(), torch.zeros(3, 9), TopK(torch.zeros(3, 1), torch.zeros(3, 1)), "only p may be"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(divergence, p, q, message):
    with pytest.raises(TypeError, match=message):
        exact(divergence, p=p, q=q)


@every_f
@pytest.mark.parametrize("sampled_from", ["p", "q"])
def test_monte_carlo_terms_average_to_the_divergence(divergence, sampled_from):
    logp, logq = pair(20)
    weight = (logp if sampled_from == "p" else logq).exp()
    terms = rkl.monte_carlo(divergence, logp - logq, sampled_from=sampled_from)
    assert torch.allclose(torch.dot(weight, terms), divergence(logp, logq))


@every_f
@pytest.mark.parametrize("sampled_from", ["p", "q"])
def test_monte_carlo_is_unbiased_where_supports_differ(divergence, sampled_from):
    logp, logq = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.6, 0.2, 0.0, 0.2]]).log()
    weight = (logp if sampled_from == "p" else logq).exp()
    seen = weight > 0
    terms = rkl.monte_carlo(divergence, (logp - logq)[seen], sampled_from=sampled_from)
    value = divergence(logp, logq)
    if value.isfinite():
        assert torch.allclose(torch.dot(weight[seen], terms), value)


def test_monte_carlo_counts_mass_that_weighs_less_than_nothing():
    logp, logq = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.2, 0.3]]).log()
    divergence = rkl.RecallHalf(lam=2.0)  # F(0, 1) = -1/2
    terms = rkl.monte_carlo(divergence, (logp - logq)[:2], sampled_from="p")
    value = divergence(logp, logq)
    assert torch.allclose(torch.dot(logp[:2].exp(), terms), value)


def test_monte_carlo_of_a_kl_knows_nothing_of_the_normaliser():
    log_ratio = torch.randn(100)
    for divergence, sign in ((rkl.ReverseKL(), -1), (rkl.KL(), 1)):
        one = "q" if sign == -1 else "p"
        shifted = rkl.monte_carlo(divergence, log_ratio + 50, sampled_from=one)
        assert torch.allclose(
            shifted, rkl.monte_carlo(divergence, log_ratio, sampled_from=one) + sign * 50
        )


@every_f
def test_variational_bound_is_a_bound_and_is_tight(divergence):
    logp, logq = pair(12, scale=1.0)
    counts_p, counts_q = (50_000 * logp.exp()).round().long(), (50_000 * logq.exp()).round().long()
    p, q = counts_p / counts_p.sum(), counts_q / counts_q.sum()

    def bound(score):
        return rkl.variational_bound(
            divergence,
            score_p=score.repeat_interleave(counts_p),
            score_q=score.repeat_interleave(counts_q),
        )

    value = divergence(p.log(), q.log())
    assert torch.allclose(bound(p.log() - q.log()), value)
    assert bound(p.log() - q.log() + torch.randn(12)) <= value + 1e-12


def test_what_is_no_f_divergence_cannot_be_sampled():
    with pytest.raises(
        TypeError, match=r"divergence must be an f-divergence.*AKL.*use rkl\.exact"
    ):
        rkl.monte_carlo(rkl.AKL(), torch.zeros(3), sampled_from="q")
    with pytest.raises(TypeError, match="divergence must be an f-divergence"):
        rkl.variational_bound(rkl.ToDi(), score_p=torch.zeros(3), score_q=torch.zeros(3))
    with pytest.raises(ValueError, match="sampled_from must be 'p' or 'q'; got 'r'"):
        rkl.monte_carlo(rkl.KL(), torch.zeros(3), sampled_from="r")


def test_a_divergence_of_ones_own_is_one_class_and_reaches_everything(capsys):
    @dataclass(frozen=True)
    class LeCam(rkl.FDivergence):
        """Le Cam's divergence, Σ (p − q)² / (p + q) / 2."""

        def integrand(self, logp, logq):
            p, q = logp.exp(), logq.exp()
            tiny = torch.finfo(p.dtype).tiny
            return (p - q).square() / (p + q).clamp_min(tiny) / 2

    rkl.testing.check_divergence(LeCam())
    mine = rkl.parse("0.5*le-cam + 0.5*kl")
    student, teacher = head(), head(width=5)
    value = exact(mine, p=teacher, q=student, chunk=10)
    logp, logq = (logits(x).log_softmax(-1) for x in (teacher, student))
    assert torch.allclose(value, mine(logp, logq).mean())
    assert torch.allclose(per_token({"": mine}, p=teacher, q=student)[""], mine(logp, logq))
    weight, log_ratio = logq[0].exp(), (logp - logq)[0]
    terms = rkl.monte_carlo(LeCam(), log_ratio, sampled_from="q")
    assert torch.allclose(weight @ terms, LeCam()(logp[0], logq[0]))
    assert rkl.variational_bound(LeCam(), score_p=log_ratio, score_q=log_ratio).isfinite()
    assert LeCam().symmetric
    assert LeCam().bounded
    from rkl.cli import main

    main(["divergences"])
    assert "le-cam" in capsys.readouterr().out


@every
def test_a_token_that_is_no_number_leaves_masked_atoms_beside_it_alone(divergence):
    p, q = pair(2, 5)
    p[1, :2] = q[1, :2] = -math.inf
    alone = per_token({"it": divergence}, p=p[1:], q=q[1:])["it"]
    p[0, 0] = math.nan  # its loss is none, and no mask may hang on it
    beside = per_token({"it": divergence}, p=p, q=q)["it"]
    assert alone.isfinite().all()
    torch.testing.assert_close(beside[1:], alone)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("inner", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_loss_within_compiled_code_is_as_outside_of_it(inner):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, p = (torch.randn(n, 8, generator=generator) for n in (6, 8, 6))
    hidden.requires_grad_()

    def loss(hidden):
        head = rkl.LinearHead(2 * hidden, weight)
        found = per_token({"": rkl.ReverseKL()}, p=p, q=head)[""].mean()
        return 3 * exact(rkl.KL(), p=p, q=head, compiled=inner) + found

    values = torch.compile(loss, backend="eager")(hidden), loss(hidden)
    torch.testing.assert_close(*values)
    gradients = (torch.autograd.grad(value, hidden)[0] for value in values)
    torch.testing.assert_close(*gradients)
