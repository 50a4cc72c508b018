"""Training on text that the student, or the teacher, writes at that step."""

import copy
import json
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import rkl
from rkl.distill import DistillConfig, cache_teacher
from rkl.distill.generate import Prompt, generate
from rkl.distill.selection import DivergedError
from rkl.distill.text.batches import DATA, ROUTE, SOURCES, STUDENT, TEACHER, shifted, sources_of
from rkl.distill.text.data import IGNORED
from rkl.distill.writing.rollouts import (
    ModelWriter,
    Reply,
    Sampling,
    Writer,
    batch_with,
    common_ends,
    generation_config,
    prompts_in,
    replies_of,
    seed_of,
)

SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
CPU = torch.device("cpu")
OWN = {"lmbda": 1.0, "max_completion_length": 6, "save_strategy": "no", "logging_steps": 1}


def taken_by(trainer):
    """The batches that a trainer trains on, in a list that fills as it does."""
    batches, take = [], trainer._mixture.take

    def noting(*arguments):
        taken = take(*arguments)
        batches.extend(taken)
        return taken

    trainer._mixture.take = noting
    return batches


def trained_rows(batches):
    """The rows of batches without their padding."""
    for batch in batches:
        columns = (batch[it] for it in ("input_ids", "labels", "attention_mask"))
        for ids, labels, attended in zip(*columns, strict=True):
            yield ids[attended.bool()], labels[attended.bool()]


def test_a_step_is_the_gradient_of_the_mean_over_the_tokens_that_the_student_wrote(
    tiny_model, tiny_rows, tiny_trainer
):
    teacher, student = tiny_model(seed=1).double(), tiny_model(seed=2).double()
    trained = copy.deepcopy(student)
    how = SGD | OWN | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    settings = {"divergence": rkl.ReverseKL()}
    trainer = tiny_trainer(
        trained, teacher, tiny_rows(8), settings=settings, **how | {"max_steps": 1}
    )
    batches = taken_by(trainer)
    trainer.train()
    terms = []
    for ids, labels in trained_rows(batches):
        at = labels[1:] != IGNORED
        logp, logq = (
            model(ids[None]).logits[0, :-1][at].log_softmax(-1) for model in (teacher, student)
        )
        terms.append((logq.exp() * (logq - logp.detach())).sum(-1))
    lengths = [len(term) for term in terms]
    assert len(lengths) == 8
    assert len({*lengths}) > 1  # else the denominator would be none that is counted
    loss = torch.cat(terms).mean()
    loss.backward()
    for (name, parameter), after in zip(
        student.named_parameters(), trained.parameters(), strict=True
    ):
        expected = parameter.detach() - parameter.grad
        torch.testing.assert_close(after.detach(), expected, rtol=1e-6, atol=1e-12, msg=name)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_the_default_trains_on_the_data_alone(tiny_model, tiny_rows, tiny_trainer):
    trainer = tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), tiny_rows(2))
    assert DistillConfig("out", use_cpu=True).lmbda == 0
    assert trainer._mixture is None


def test_replies_follow_the_prompts_of_the_data(tiny_model, tiny_rows, tiny_trainer):
    rows = tiny_rows(6)
    trainer = tiny_trainer(
        tiny_model(seed=2), tiny_model(seed=1), rows, per_device_train_batch_size=6, **OWN
    )
    (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, CPU)
    prompts = sorted(prompts_in(trainer.data_collator(rows), 32))
    written = []
    for (ids, labels), source in zip(trained_rows([batch]), batch[SOURCES], strict=True):
        start = int((labels != IGNORED).nonzero()[0])
        assert (labels[start:] == ids[start:]).all()
        assert len(ids) - start <= 6
        assert source[:start].eq(DATA).all()
        assert source[start : len(ids)].eq(STUDENT).all()
        written.append(ids[:start].tolist())
    assert sorted(written) == prompts


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_lmbda_is_the_share_of_batches_that_the_student_writes(
    lmbda, tiny_model, tiny_rows, tiny_trainer
):
    trainer = tiny_trainer(
        tiny_model(seed=2), tiny_model(seed=1), tiny_rows(2), **OWN | {"lmbda": lmbda or 0.5}
    )
    mixture, batch = trainer._mixture, trainer.data_collator(tiny_rows(1))
    mixture.lmbda, mixture.student = lmbda, Parrot()
    draws = [mixture.take(iter([(batch, 1)]), 1, step)[0] is not batch for step in range(600)]
    # five standard deviations of a share of 600
    assert abs(sum(draws) / 600 - lmbda) <= 5 * math.sqrt(lmbda * (1 - lmbda) / 600)


class Parrot(Writer):
    """Replies to each prompt with its first token and the seed."""

    def __init__(self):
        self.seeds = []

    def write(self, prompts, *, seed):
        self.seeds.append(seed)
        return [Reply([prompt[0], 1], True) for prompt in prompts]


def test_the_text_is_that_of_the_student_as_it_is_at_each_step(
    tiny_model, tiny_rows, tiny_trainer
):
    student = tiny_model(seed=2)
    greedy = OWN | {"sampling_temperature": 0.0, "max_steps": 4, "learning_rate": 0.1}
    trainer = tiny_trainer(student, tiny_model(seed=1), tiny_rows(1), **greedy)
    batches, expected = taken_by(trainer), []

    class Expect(TrainerCallback):
        """Writes what the student replies before a step."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            prompts = prompts_in(trainer.data_collator(tiny_rows(1)), 32)
            (reply,) = ModelWriter(model, Sampling(6, temperature=0), [1]).write(prompts, seed=0)
            expected.append([*prompts[0], *reply.tokens])

    trainer.add_callback(Expect())
    trainer.train()
    written = [ids.tolist() for ids, _ in trained_rows(batches)]
    assert written == expected
    assert len({*map(tuple, written)}) > 1


ALONE = {"Rwkv": {"context_length": 32}, "RecurrentGemma": {"num_hidden_layers": 3}}


def told_of(architecture):
    if architecture not in ALONE:
        return nullcontext()
    return pytest.warns(UserWarning, match=f"{architecture}ForCausalLM replies otherwise beside")


@pytest.mark.parametrize("architecture", ["GPT2", "Llama", "Rwkv"])
def test_a_batch_of_prompts_of_any_length_is_replied_to_as_each_alone(architecture, tiny_model):
    model = tiny_model(architecture, seed=3, **ALONE.get(architecture, {})).eval()
    writer = ModelWriter(model, Sampling(8, temperature=0), [1])
    prompts = [[5], [6, 7, 8, 9, 10], [11, 12], [13]]
    with told_of(architecture):
        together = writer.write(prompts, seed=0)
    assert together == [writer.write([prompt], seed=0)[0] for prompt in prompts]
    for prompt, reply in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in reply.tokens:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
        assert reply.ended == (reply.tokens[-1] == 1)
        assert 1 not in reply.tokens[:-1]


@pytest.mark.parametrize("how", [torch.float32, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("architecture", ["GPT2", "Qwen2", "Bloom", "Mamba", "Lfm2", "Mixtral"])
def test_models_that_reply_beside_others_as_alone_are_recognised_in_any_precision(
    architecture, how, tiny_model
):
    model = tiny_model(architecture, seed=3)
    around = nullcontext
    if how == "autocast":
        around = partial(torch.autocast, "cpu", torch.bfloat16)
    else:
        model = model.to(how)
    writer = ModelWriter(model, Sampling(2), [1], around=around)
    writer.write([[5], [6, 7, 8]], seed=0)  # a warning would be an error


def test_replies_to_a_set_of_prompts_are_those_to_each_alone(tiny_model, tiny_tokenizer):
    model = tiny_model("RecurrentGemma", seed=3, **ALONE["RecurrentGemma"])
    prompts = [Prompt(it, "", "") for it in ([5, 9], [6, 7, 8, 9, 10], [11, 12, 3, 4])]
    how = {"seeds": [0], "sampling": Sampling(8, temperature=0)}
    with told_of("RecurrentGemma"):
        together = generate(model, tiny_tokenizer(), prompts, **how)
    alone = [generate(model, tiny_tokenizer(), [it], **how)[0] for it in prompts]
    assert together == alone


def test_processes_that_share_a_model_refuse_one_that_replies_alone(tiny_model):
    model = tiny_model("Rwkv", seed=3, **ALONE["Rwkv"]).eval()
    config = generation_config(Sampling(2), [1])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.no_grad(), pytest.raises(NotImplementedError, match="Give each process the"):
            replies_of(model, [[5], [6]], config, together=True)
    finally:
        dist.destroy_process_group()


def test_writing_leaves_modes_and_random_numbers_as_they_were(tiny_model):
    model = tiny_model(seed=3, resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    writer = ModelWriter(model, Sampling(8), [1])
    first, again = (writer.write([[5, 6]], seed=9) for _ in range(2))
    assert first == again
    assert writer.write([[5, 6]], seed=10) != first
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), before)


def test_top_k_and_min_p_bound_what_is_drawn(tiny_model):
    model = tiny_model(seed=3)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    likeliest = {int(it) for it in logits.topk(3).indices}
    near = {int(it) for it in (logits >= logits.max() + math.log(0.5)).nonzero()}
    for sampling, allowed in (
        (Sampling(1, top_k=3), likeliest),
        (Sampling(1, min_p=0.5), near),
    ):
        writer = ModelWriter(model, sampling, [1])
        drawn = {
            writer.write([[5, 6]] * 64, seed=it)[place].tokens[0]
            for it in range(2)
            for place in range(64)
        }
        assert drawn == allowed


def test_tokens_that_only_one_of_the_models_has_are_never_written(
    tiny_model, tiny_rows, tiny_trainer, tiny_tokenizer
):
    student, teacher = tiny_model(seed=2, vocab_size=48), tiny_model(seed=1)
    settings = {"processing_class": tiny_tokenizer(40)}
    trainer = tiny_trainer(student, teacher, tiny_rows(2), settings=settings, **OWN)
    replies = trainer._mixture.student.write([[5, 6, 7]] * 64, seed=0)
    assert max(token for reply in replies for token in reply.tokens) < 40
    trainer.train()


def test_labels_count_on_tokens_of_the_data_alone(tiny_model, tiny_trainer):
    teacher, student = tiny_model(seed=1).double(), tiny_model(seed=2).double()
    trainer = tiny_trainer(
        student, teacher, [], settings={"divergence": rkl.KL()}, hard_label_weight=0.5
    )
    ids = torch.randint(3, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :2] = IGNORED
    sources = torch.tensor([[DATA] * 8, [STUDENT] * 8, [DATA] * 4 + [TEACHER] * 4])
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    loss = trainer.compute_loss(student, inputs | {SOURCES: sources})
    at = labels[:, 1:] != IGNORED
    logits = student(ids).logits[:, :-1][at]
    logp, logq = teacher(ids).logits[:, :-1][at].log_softmax(-1).detach(), logits.log_softmax(-1)
    hard = cross_entropy(logits, labels[:, 1:][at], reduction="none")
    of_data = sources[:, 1:][at] == DATA
    expected = ((logp.exp() * (logp - logq)).sum(-1) + 0.5 * hard * of_data).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = (torch.autograd.grad(it, [*student.parameters()]) for it in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)


def test_the_teacher_writes_where_the_student_does_not(tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    how = OWN | {"lmbda": 0.0, "seq_kd": True, "sampling_temperature": 0.0}
    trainer = tiny_trainer(student, teacher, tiny_rows(1), **how | {"max_steps": 1})
    batches = taken_by(trainer)
    trainer.train()
    prompts = prompts_in(trainer.data_collator(tiny_rows(1)), 32)
    (reply,) = ModelWriter(teacher, Sampling(6, temperature=0), [1]).write(prompts, seed=0)
    ((ids, _),) = trained_rows(batches)
    assert ids.tolist() == [*prompts[0], *reply.tokens]
    assert {*sources_of(batches[0], shifted(batches[0])).tolist()} == {TEACHER}


def test_each_prompt_gets_as_many_replies_as_asked(tiny_model, tiny_rows, tiny_trainer):
    how = OWN | {"num_generations": 3, "per_device_train_batch_size": 6}
    trainer = tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), tiny_rows(6), **how)
    (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, CPU)
    prompts = prompts_in(batch, 32)
    assert len(prompts) == 6
    assert len({*map(tuple, prompts)}) == 2
    replies = [tuple(ids.tolist()) for ids, _ in trained_rows([batch])]
    assert len({*replies}) > 2


def test_a_reply_is_compared_with_the_teacher_of_its_prompt(tiny_model, tiny_rows, tiny_trainer):
    how = OWN | {"num_generations": 2, "per_device_train_batch_size": 4}
    trainer = tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), tiny_rows(4), **how)
    batch = trainer.data_collator(tiny_rows(4)) | {ROUTE: torch.tensor([2, 0, 1, 3])}
    (written,) = trainer._mixture.take(iter([(batch, 4)]), 1, 0)
    assert written[ROUTE].tolist() == [2, 2, 0, 0]


def test_neither_a_padding_token_nor_a_tokenizer_is_needed(tiny_model, tiny_rows, tiny_trainer):
    models = [tiny_model(seed=it, pad_token_id=None) for it in (2, 1)]
    for model in models:
        model.generation_config.pad_token_id = None
    trainer = tiny_trainer(*models, tiny_rows(4), per_device_train_batch_size=4, **OWN)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_a_student_that_writes_nothing_is_trained_on_where_it_ends(
    tiny_model, tiny_rows, tiny_trainer
):
    class Silent(Writer):
        def __init__(self, tokens):
            self.tokens = tokens

        def write(self, prompts, *, seed):
            return [Reply(self.tokens, bool(self.tokens)) for _ in prompts]

    for tokens, expected in (([1], 4), ([], 0)):
        trainer = tiny_trainer(
            tiny_model(seed=2), tiny_model(seed=1), tiny_rows(4), max_steps=1, **OWN
        )
        trainer._mixture.student = Silent(tokens)
        batches = taken_by(trainer)
        trainer.train()
        assert sum(int((it["labels"] != IGNORED).sum()) for it in batches) == expected


def test_a_teacher_with_a_nan_weight_is_named(tiny_model, tiny_rows, tiny_trainer):
    teacher = tiny_model(seed=1)
    with torch.no_grad():
        teacher.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.warns(UserWarning, match="its logits are NaN"):
        trainer = tiny_trainer(tiny_model(seed=2), teacher, tiny_rows(4), **OWN)
    words = r"the loss is NaN .*the teacher's weight transformer\.h\.1\.mlp\.c_fc\.weight is not"
    with pytest.raises(DivergedError, match=words):
        trainer.train()


def test_messages_without_a_chat_template_are_refused(tiny_model, tiny_trainer, tiny_tokenizer):
    rows = [{"prompt": [{"role": "user", "content": "w5"}]}]
    settings = {"processing_class": tiny_tokenizer(40)}
    with pytest.raises(ValueError, match="The tokenizer has no chat template"):
        tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), rows, settings=settings, **OWN)


def weights_after(trainer, **how):
    trainer.train(**how)
    return [it.detach().clone() for it in trainer.model.parameters()]


@pytest.mark.parametrize("at_once", [None, 6])
def test_a_resumed_training_ends_in_the_same_bits(
    at_once, tmp_path, tiny_model, tiny_rows, tiny_trainer
):
    how = OWN | {"lmbda": 0.6, "max_steps": 5, "gradient_accumulation_steps": 2}
    how |= {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    how |= {"steps_per_generation": at_once, "learning_rate": 1e-2}

    def make(out):
        dropout = tiny_model(seed=2, resid_pdrop=0.1)
        return tiny_trainer(dropout, tiny_model(seed=1), tiny_rows(12), out=tmp_path / out, **how)

    whole = make("whole")
    expected = weights_after(whole)
    for step in (2, 4):
        resumed = make(f"resumed {step}")
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        found = weights_after(resumed, resume_from_checkpoint=checkpoint)
        assert all(map(torch.equal, found, expected))
    if at_once:
        state = json.loads((tmp_path / "whole/checkpoint-2/on_policy-0.json").read_text())
        assert len(state["ahead"]) == 2
    assert get_last_checkpoint(str(tmp_path / "whole")).endswith("-5")


def test_all_batches_of_an_epoch_are_trained_on_when_written_ahead(
    tiny_model, tiny_rows, tiny_trainer
):
    how = OWN | {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    how |= {"per_device_train_batch_size": 2, "steps_per_generation": 4}
    trainer = tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), tiny_rows(11), **how)
    batches = taken_by(trainer)
    trainer.train()
    assert sum(len(batch["labels"]) for batch in batches) == 22
    assert trainer.state.global_step == 6


def test_different_ends_of_text_are_told_and_writing_stops_at_either(
    tiny_model, tiny_rows, tiny_trainer, tiny_tokenizer
):
    student, teacher = tiny_model(seed=2), tiny_model(seed=1, eos_token_id=7)
    settings = {"processing_class": tiny_tokenizer(40)}
    with pytest.warns(UserWarning, match=r"the student's end with w1; the teacher's end with w7"):
        trainer = tiny_trainer(student, teacher, tiny_rows(2), settings=settings, **OWN)
    writer = trainer._mixture.student
    assert writer.ends == [1, 7]
    ended = [it.tokens[-1] for it in writer.write([[5, 6]] * 400, seed=0) if it.ended]
    assert {*ended} == {1, 7}


def test_models_without_an_end_of_text_are_refused(tiny_model):
    model = tiny_model(seed=2, eos_token_id=None)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="replies would never end"):
        common_ends({"student": (model, None)})


def test_a_cache_cannot_read_what_is_written_later(tmp_path, tiny_model, tiny_rows, tiny_trainer):
    cached = cache_teacher(tiny_model(seed=1), tiny_rows(4), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"lmbda: a CachedTeacher holds the rows"):
        tiny_trainer(tiny_model(seed=2), cached, tiny_rows(4), **OWN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lmbda": 1.5}, r"lmbda must lie in \[0, 1\]; got 1\.5"),
        ({"lmbda": "half"}, r"lmbda must be a number; got 'half'"),
        ({"max_completion_length": 0}, r"max_completion_length must be at least 1; got 0"),
        ({"sampling_temperature": -1.0}, r"sampling_temperature must lie in"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0"),
        ({"top_k": -1}, r"top_k must be at least 0; got -1"),
        ({"min_p": 2.0}, r"min_p must lie in \[0, 1\]; got 2"),
        ({"num_generations": 3, "lmbda": 1.0}, r"num_generations must divide the 8 rows"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "lmbda": 1.0},
            r"steps_per_generation must be a multiple of the 2 batches of a step; got 3",
        ),
        ({"seq_kd": "yes"}, r"seq_kd must be True or False; got 'yes'"),
        ({"prompt_tokens": 0}, r"prompt_tokens must be at least 1; got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DistillConfig("out", use_cpu=True, **changes)


def test_a_prompt_that_leaves_no_room_is_refused(tiny_model, tiny_rows, tiny_trainer):
    how = OWN | {"max_completion_length": 31}
    trainer = tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), tiny_rows(4), **how)
    with pytest.raises(ValueError, match=r"max_completion_length=31 behind a prompt of \d+"):
        trainer.train()


def test_rows_that_share_a_block_have_no_prompt(tiny_model, tiny_trainer):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}]
    trainer = tiny_trainer(tiny_model(seed=2), tiny_model(seed=1), rows, **OWN)
    with pytest.raises(ValueError, match="packing=False"):
        trainer.train()


@pytest.mark.parametrize(
    ("labels", "prompt"),
    [
        ([0, 0, 1, 1, 0], [10, 11]),  # a prompt and a completion
        ([0, 1, 0, 1, 0], [10, 11, 12]),  # a chat: all before the last turn
        ([0, 1, 1, 1, 1], [10, 11]),  # plain text: at most one half
        ([0, 0, 0, 0, 0], [10, 11, 12, 13, 14]),  # a prompt alone
    ],
)
def test_the_prompt_of_a_row_is_what_stands_before_its_last_reply(labels, prompt):
    ids = torch.arange(10, 15)
    batch = {"input_ids": ids, "labels": ids.where(torch.tensor(labels).bool(), IGNORED)}
    batch |= {"attention_mask": torch.ones_like(ids)}
    padded = {
        name: torch.nn.functional.pad(it, (0, 2), value=IGNORED if name == "labels" else 0)[None]
        for name, it in batch.items()
    }
    assert prompts_in(padded, 3) == [prompt]


def test_padding_of_a_written_batch_is_neither_attended_nor_trained_on():
    replies = [Reply([7, 1], True), Reply([8], False)]
    batch = batch_with([[5, 6, 9], [5]], replies, STUDENT, pad=2, device=CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 9, 7, 1], [5, 8, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 1], [-100, 8, -100, -100, -100]]
    assert batch[SOURCES].tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]


def test_seeds_of_different_counts_differ():
    seeds = {seed_of(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert max(seeds) < 2**63
