"""Own text that runs away is noticed, each way of it by a detector of its own."""

import copy
import json
import math

import material
import pytest
import torch
from safetensors.torch import load_file

import rkl
from rkl.distill import CollapseError, CollapseLimits, DistillConfig, distill
from rkl.distill import guard as guards
from rkl.distill.guard import MAX_MEASURED, Watch, repetition
from rkl.distill.known import confidence
from rkl.distill.text.batches import SOURCES, STUDENT, shifted
from rkl.distill.text.data import IGNORED
from rkl.distill.writing.rollouts import Reply, Writer, batch_with
from rkl.estimators import Sampled, TopK
from rkl.runs import Run, read_jsonl

CPU, END, WINDOW, VOCAB = torch.device("cpu"), 1, 3, 40
HOW = {"lmbda": 1.0, "guard_window": WINDOW, "max_steps": 12, "logging_steps": 1}
HOW |= {"max_completion_length": 12, "save_strategy": "no", "learning_rate": 0.0}


class Script(Writer):
    """Replies that are made by a function of the number of the call and of the prompt."""

    def __init__(self, reply):
        self.reply, self.calls = reply, 0

    def write(self, prompts, *, seed):
        self.calls += 1
        draw = torch.Generator().manual_seed(seed)
        return [self.reply(self.calls, draw) for _ in prompts]


def ordinary(draw, length=5):
    tokens = torch.randint(3, VOCAB, (length,), generator=draw).tolist()
    return Reply([*tokens, END], True)


def inflating(call, draw):
    if call <= WINDOW:
        return ordinary(draw)
    return Reply(torch.randperm(VOCAB - 3, generator=draw)[:12].add(3).tolist(), False)


def repeating(call, draw):
    return ordinary(draw) if call <= WINDOW else Reply([7] * 6 + [END], True)


def writing_nothing(call, draw):
    return ordinary(draw) if call <= WINDOW else Reply([END], True)


def always_ordinary(call, draw):
    return ordinary(draw)


def sharpen(model, factor):
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)


class Sharpened:
    """Sharpens models behind the first steps, as weights that move would."""

    def __init__(self, factor, models):
        self.factor, self.models = factor, models

    def __call__(self, call, draw):
        if call > WINDOW:
            while self.models:
                sharpen(self.models.pop(), self.factor)
        return ordinary(draw)


def separate_head(model):
    """The model with a head of its own, which moves without the embeddings."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def trainer_on(reply, tiny_model, tiny_rows, tiny_trainer, models=None, **changes):
    student, teacher = models or (tiny_model(seed=2), tiny_model(seed=1))
    rows = tiny_rows(4)
    trainer = tiny_trainer(student, teacher, rows, **HOW | changes)
    trainer._mixture.student = Script(reply)
    return trainer


# The way of collapse, and the detector that must notice it.
WAYS = {
    "length inflation": "length_inflation",
    "repetition": "more_repetition",
    "entropy collapse": "entropy_collapse",
    "overconfidence": "overconfidence",
    "no text": "empty_replies",
}


def collapsing(way, tiny_model):
    """The replies, and the models, of a training that collapses in one way."""
    student, teacher = (
        separate_head(tiny_model(seed=seed, tie_word_embeddings=False)) for seed in (2, 1)
    )
    if way == "entropy collapse":  # of both, so that neither is surer than the other
        teacher = copy.deepcopy(student)
        with torch.no_grad():
            teacher.lm_head.weight.mul_(1.001)
    reply = {
        "length inflation": inflating,
        "repetition": repeating,
        "no text": writing_nothing,
        "entropy collapse": Sharpened(40.0, [student, teacher]),
        "overconfidence": Sharpened(4.0, [student]),
    }[way]
    return reply, (student, teacher)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_collapse_stops_the_training_and_is_named(
    way, tiny_model, tiny_rows, tiny_trainer
):
    reply, models = collapsing(way, tiny_model)
    trainer = trainer_on(reply, tiny_model, tiny_rows, tiny_trainer, models)
    with pytest.raises(
        CollapseError, match=f"own text collapses \\({way}: .* since step 4"
    ) as told:
        trainer.train()
    assert ";" not in str(told.value)  # one way alone
    assert trainer.state.global_step < 12


@pytest.mark.parametrize("way", WAYS)
def test_without_its_detector_a_collapse_is_missed(
    way, tiny_model, tiny_rows, tiny_trainer, monkeypatch
):
    others = tuple(it for it in guards.DETECTORS if it.__name__ != WAYS[way])
    assert len(others) == len(guards.DETECTORS) - 1
    monkeypatch.setattr(guards, "DETECTORS", others)
    reply, models = collapsing(way, tiny_model)
    trainer = trainer_on(reply, tiny_model, tiny_rows, tiny_trainer, models)
    trainer.train()
    assert trainer.state.global_step == 12


def test_text_as_in_the_beginning_is_let_through(tiny_model, tiny_rows, tiny_trainer):
    trainer = trainer_on(always_ordinary, tiny_model, tiny_rows, tiny_trainer)
    trainer.train()
    assert trainer.state.global_step == 12


def test_off_is_off(tiny_model, tiny_rows, tiny_trainer):
    trainer = trainer_on(repeating, tiny_model, tiny_rows, tiny_trainer, guard="off")
    trainer.train()
    assert trainer.state.log_history[-2]["repetition"] > 0.5


def test_mixing_halves_the_share_of_own_text_and_stops_in_the_end(
    tiny_model, tiny_rows, tiny_trainer
):
    trainer = trainer_on(
        repeating, tiny_model, tiny_rows, tiny_trainer, guard="mix", max_steps=400
    )
    with (
        pytest.warns(
            UserWarning, match=r"own text collapses \(repetition: .*: lmbda is now"
        ) as told,
        pytest.raises(CollapseError),
    ):
        trainer.train()
    assert str(told[0].message).startswith("At step 6 ")
    assert trainer._mixture.lmbda == 1 / 16
    logged = [row["lmbda"] for row in trainer.state.log_history if "lmbda" in row]
    assert logged == sorted(logged, reverse=True)
    assert {*logged} == {1.0, 0.5, 0.25, 0.125, 0.0625}


def test_after_a_collapse_the_student_has_the_weights_from_before_it(
    tmp_path, tiny_model, tiny_rows, tiny_trainer
):
    how = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    trainer = trainer_on(repeating, tiny_model, tiny_rows, tiny_trainer, **how)
    with pytest.raises(CollapseError) as told:
        trainer.train()
    assert told.value.step == WINDOW + 1
    saved = load_file(tmp_path / "out" / f"checkpoint-{WINDOW}" / "model.safetensors")
    found = dict(trainer.model.named_parameters())
    assert all(torch.equal(found[name], it) for name, it in saved.items() if name in found)


def test_the_best_evaluated_student_is_kept(tiny_model, tiny_rows, tiny_trainer):
    how = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    how |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    student, teacher = tiny_model(seed=2), tiny_model(seed=1)
    settings = {"eval_dataset": tiny_rows(4, seed=5)}
    trainer = tiny_trainer(student, teacher, tiny_rows(4), settings=settings, **HOW | how)
    trainer._mixture.student = Script(repeating)
    with pytest.raises(CollapseError):
        trainer.train()
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_a_guard_that_was_stopped_goes_on_where_it_was(
    tmp_path, tiny_model, tiny_rows, tiny_trainer
):
    how = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "guard": "off"}
    whole = trainer_on(repeating, tiny_model, tiny_rows, tiny_trainer, **how)
    whole.train()
    state = json.loads((tmp_path / "out/checkpoint-4/on_policy-0.json").read_text())
    assert len(state["own_text"]["first"]) == WINDOW
    assert len(state["own_text"]["last"]) == 1
    again = trainer_on(repeating, tiny_model, tiny_rows, tiny_trainer, **how)
    again._mixture.student.calls = 4
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert again._own_text.state() == whole._own_text.state()


def test_prompts_alone_have_nothing_to_mix_in(tiny_model, tiny_trainer, tiny_tokenizer):
    settings = {"processing_class": tiny_tokenizer(VOCAB)}
    with pytest.raises(ValueError, match="guard must be stop or off for rows with a prompt alone"):
        tiny_trainer(
            tiny_model(seed=2),
            tiny_model(seed=1),
            [{"prompt": "w5 w6"}],
            settings=settings,
            **HOW | {"guard": "mix"},
        )


def test_figures_of_own_text_are_those_of_its_tokens(tiny_model):
    student, teacher = tiny_model(seed=2), tiny_model(seed=1)
    replies = [Reply([7, 8, END], True), Reply([9] * 8, False), Reply([END], True)]
    inputs = batch_with([[5], [6, 7], [8]], replies, STUDENT, pad=2, device=CPU)
    batch = shifted(inputs)
    with torch.no_grad():
        logits = [model(**batch.inputs).logits[:, :-1] for model in (teacher, student)]
    p, q = (it[batch.predicting] for it in logits)
    watch = Watch(CollapseLimits(), [END])
    watch.note(inputs, confidence(p, q, MAX_MEASURED))
    watch.end_step(lambda sums: sums)
    figures = watch.pop()
    assert figures["truncated"] == pytest.approx(1 / 3)
    assert figures["completion_length"] == pytest.approx(12 / 3)
    assert figures["empty"] == pytest.approx(1 / 3)
    assert figures["repetition"] == pytest.approx((1 - 1 / 5) / 3)
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    assert figures["student_entropy"] == pytest.approx(-(q * q.log()).sum(-1).mean().item())
    assert figures["teacher_entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item())
    assert figures["acceptance"] == pytest.approx(p.minimum(q).sum(-1).mean().item())
    total = rkl.per_token({"tv": rkl.TotalVariation()}, p=p.log(), q=q.log())["tv"]
    assert figures["acceptance"] == pytest.approx(1 - total.mean().item())


def test_of_a_teacher_known_in_part_the_figures_are_those_of_what_is_known():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, VOCAB, generator=generator)
    logp = p.log_softmax(-1)
    top = TopK(*logp.topk(4))
    known = confidence(top, q, MAX_MEASURED)
    coarse = []
    for it in (logp, q.log_softmax(-1)):
        kept = it.gather(-1, top.index).exp()
        coarse.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1))
    expected = torch.stack(
        [
            torch.special.entr(coarse[1]).sum(-1),
            torch.special.entr(coarse[0]).sum(-1),
            coarse[0].minimum(coarse[1]).sum(-1),
        ],
        -1,
    )
    torch.testing.assert_close(known, expected, rtol=1e-5, atol=1e-6)
    index = torch.randint(VOCAB, (6, 3), generator=generator)
    drawn = confidence(Sampled(logp.gather(-1, index), index), q, MAX_MEASURED)
    assert drawn[:, 1:].isnan().all()
    torch.testing.assert_close(drawn[:, 0], torch.special.entr(q.softmax(-1)).sum(-1))
    few = confidence(p, q, 3)
    assert torch.equal(few, confidence(p, q, MAX_MEASURED)[[0, 2, 5]])


def test_a_teacher_that_says_no_entropy_is_not_compared():
    first = {"truncated": 0.0, "completion_length": 5.0, "repetition": 0.0, "empty": 0.0}
    first |= {"student_entropy": 2.0, "teacher_entropy": math.nan, "acceptance": math.nan}
    assert CollapseLimits().reasons(first, first | {"student_entropy": 1.0}) == []
    assert CollapseLimits().reasons(first, first | {"student_entropy": 0.1}) != []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guard": "maybe"}, "guard must be one of stop, mix, off; got 'maybe'"),
        ({"guard_window": 0}, "guard_window must be at least 1; got 0"),
        ({"log_completions": 1.5}, r"log_completions must be True or False; got 1\.5"),
    ],
)
def test_settings_of_the_guard_are_refused_by_name(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DistillConfig("out", use_cpu=True, **changes)


@pytest.mark.parametrize("changes", [{"truncated": 2.0}, {"length": 0.5}, {"empty": "none"}])
def test_limits_that_mean_nothing_are_refused_by_name(changes):
    with pytest.raises((ValueError, TypeError), match=next(iter(changes))):
        CollapseLimits(**changes)


def test_repetition_of_short_texts_is_none():
    assert [repetition([5] * length) for length in (0, 3, 4, 5)] == [0, 0, 0, 0.5]


@pytest.mark.parametrize("divergence", [rkl.ReverseKL(), rkl.AKL()])
def test_the_loss_of_a_logged_batch_is_that_of_its_file(
    divergence, tmp_path, tiny_model, tiny_rows, tiny_trainer
):
    student, teacher = tiny_model(seed=2).double(), tiny_model(seed=1).double()
    begun = copy.deepcopy(student)
    how = {"log_completions": True, "logging_steps": 2, "gradient_accumulation_steps": 2}
    how |= {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "temperature": 1.5}
    how |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    settings = {"divergence": divergence}
    trainer = tiny_trainer(student, teacher, tiny_rows(12), settings=settings, **HOW | how)
    trainer.train()
    rows = read_jsonl(tmp_path / "out" / "completions.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 2, 2]
    later = tiny_model(seed=2).double()
    weights = load_file(tmp_path / "out/checkpoint-2/model.safetensors")
    later.load_state_dict(weights, strict=False)
    for row in rows:
        model = begun if row["step"] == 0 else later
        logits = {"p": [], "q": []}
        for text in row["rows"]:
            ids = torch.tensor([text["prompt"] + text["completion"]])
            for name, it in (("p", teacher), ("q", model)):
                with torch.no_grad():
                    whole = it(ids).logits[0, len(text["prompt"]) - 1 : -1]
                logits[name].append(whole / 1.5)
        loss = rkl.exact(divergence, **{name: torch.cat(it) for name, it in logits.items()})
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert row["source"] == "student"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("material")
    material.write(path)
    return path


def test_the_texts_of_step_50_are_not_those_of_step_0(folder, tmp_path):
    how = {"lmbda": 1.0, "max_completion_length": 6, "prompt_tokens": 4, "max_steps": 51}
    how |= {"log_completions": True, "sampling_temperature": 0.0, "batch_size": 483}
    how |= {"max_length": 16, "eval_every": 51, "guard": "off"}
    distill(material.settings(folder, **how), tmp_path / "run")
    rows = {row["step"]: row for row in read_jsonl(tmp_path / "run" / "completions.jsonl")}
    texts = {
        step: {tuple(it["prompt"]): it["completion_text"] for it in rows[step]["rows"]}
        for step in (0, 50)
    }
    assert texts[0].keys() == texts[50].keys()  # every block is in the batch
    differing = sum(texts[0][it] != texts[50][it] for it in texts[0])
    assert differing > len(texts[0]) / 4
    files = Run.open(tmp_path / "run").files
    assert files["completions.jsonl"]["sha256"]


def test_completions_behind_the_checkpoint_are_written_again(
    tmp_path, tiny_model, tiny_rows, tiny_trainer
):
    how = {"log_completions": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    path = tmp_path / "out" / "completions.jsonl"

    def make():
        return tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), tiny_rows(8), **HOW | how)

    make().train()
    whole = path.read_text()
    with path.open("a") as file:
        file.write('{"step": 4, "torn')
    make().train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert path.read_text() == whole
    make().train()
    assert path.read_text() == whole


def test_a_run_that_collapses_says_so_and_holds_a_student(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "DETECTORS", (lambda limits, first, now: "no text: of none",))
    how = {"lmbda": 1.0, "max_completion_length": 6, "prompt_tokens": 4, "guard_window": 2}
    with pytest.raises(CollapseError, match=r"own text collapses \(no text: .*--guard mix"):
        distill(material.settings(folder, **how), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.record["status"] == "diverged"
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert IGNORED < 0
    assert SOURCES not in run.metrics[0]
