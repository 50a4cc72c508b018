"""rkl distill on text of the student's own: its rows, its settings, what it records."""

import json
import signal

import material
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rkl.cli import main
from rkl.distill import distill, dry_run, load_tokenizer
from rkl.distill.evaluate import EvaluateSettings, evaluate_run
from rkl.distill.generate import GenerateSettings, generate_run
from rkl.distill.limits import template_variables
from rkl.distill.prepare import load, make_trainer
from rkl.distill.progress import Display
from rkl.distill.text.batches import SOURCES
from rkl.distill.text.data import NoTrainedTokensError, tokenize
from rkl.distill.writing.rollouts import prompt_lengths, prompts_in
from rkl.runs import Run

OWN = {"lmbda": 1.0, "max_completion_length": 6, "prompt_tokens": 4}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if mood %}({{ mood }}){% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models, text, prompts.jsonl, pairs.jsonl and chats.jsonl, only read."""
    path = tmp_path_factory.mktemp("material")
    material.write(path)
    pairs = [{"prompt": f"Item {it} of", "completion": f" the list {it}."} for it in range(24)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{it}?"},
                {"role": "assistant", "content": "a"},
            ]
        }
        for it in range(12)
    ]
    kinds = {
        "pairs": pairs,
        "prompts": [{"prompt": row["prompt"]} for row in pairs],
        "chats": chats,
        "asked": [{"prompt": row["messages"][:1]} for row in chats],
    }
    for name, rows in kinds.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(lines)
    (path / "template.jinja").write_text(TEMPLATE)
    return path


def settings_for(folder, data, **changes):
    how = OWN | {"data": str(folder / f"{data}.jsonl"), "max_length": 24} | changes
    if data in ("chats", "asked"):
        how["chat_template"] = str(folder / "template.jinja")
    return material.settings(folder, **how)


@pytest.mark.parametrize("data", ["pairs", "prompts", "chats", "asked", "rows"])
def test_every_kind_of_row_gives_prompts(data, folder, tmp_path):
    settings = settings_for(folder, data)
    text, models = load(settings)
    trainer = make_trainer(settings, tmp_path, text, models)
    (batch,), count = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), 1, torch.device("cpu")
    )
    assert int(count) == int(batch[SOURCES].sum())
    tokenizer = models.tokenizer
    for prompt in map(tokenizer.decode, prompts_in(batch, 4)):
        if data in ("pairs", "prompts"):
            assert prompt.startswith("Item ")
            assert prompt.endswith(" of")
        elif data in ("chats", "asked"):
            assert prompt.startswith("<user>")
            assert prompt.endswith("<assistant>")
        else:
            assert prompt in material.TEXT + "\n"


@pytest.mark.parametrize("data", ["prompts", "asked"])
def test_a_prompt_alone_is_refused_where_the_student_does_not_write_all(data, folder, tmp_path):
    for lmbda in (0.0, 0.5):
        with pytest.raises(ValueError, match=r"line 1: a row with a prompt alone .*--lmbda 1"):
            distill(settings_for(folder, data, lmbda=lmbda), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_alone_hold_nothing_out_and_say_so(folder, tmp_path, capsys):
    distill(settings_for(folder, "prompts"), tmp_path / "run")
    assert "NOTHING IS HELD OUT: prompts alone hold no text" in capsys.readouterr().err
    assert Run.open(tmp_path / "run").record["result"]["held_out_loss"] is None


def test_a_response_of_its_own_name_is_a_completion_still():
    rows = [{"prompt": "a", "response": "b"}]
    assert tokenize(rows, material.tokenizer(), max_length=8).kind == "completion"


def test_empty_and_long_prompts_are_left_out_and_counted():
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "a b c d e f g h i j k"}]
    with pytest.warns(UserWarning, match=r"2 of 3 rows .* the prompt is empty: data, row 2"):
        blocks = tokenize(rows, material.tokenizer(), max_length=8, prompts=True)
    assert len(blocks) == 1
    assert blocks.left_out == 2
    with pytest.raises(NoTrainedTokensError, match="the prompt is longer than max_length=8"):
        tokenize(rows[1:], material.tokenizer(), max_length=8, prompts=True)


def test_the_settings_are_flags_keys_and_entries_of_the_record(folder, tmp_path):
    settings = settings_for(folder, "pairs", lmbda=0.5, top_k=20, sampling_temperature=0.8)
    given = {"lmbda": 0.25, "max_completion_length": 5, "data": settings.data}
    given |= {"teacher": settings.teacher, "student": settings.student, "max_length": 24}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(given))
    words = ["--config", tmp_path / "settings.yaml", "--out", tmp_path / "run", "--device", "cpu"]
    words += ["--max-steps", 2, "--top-k", 20, "--sampling-temperature", 0.8, "--min-p", 0.1]
    words += ["--num-generations", 2, "--steps-per-generation", 2, "--top-p", 0.9, "--seq-kd"]
    words += ["--chat-template-kwargs", '{"mood": "calm"}', "--prompt-tokens", 8]
    assert main(["distill", *map(str, words)]) == 0
    record = Run.open(tmp_path / "run").settings
    expected = {"lmbda": 0.25, "max_completion_length": 5, "top_k": 20, "min_p": 0.1}
    expected |= {"sampling_temperature": 0.8, "num_generations": 2, "steps_per_generation": 2}
    expected |= {"top_p": 0.9, "seq_kd": True, "prompt_tokens": 8}
    expected |= {"chat_template_kwargs": '{"mood": "calm"}'}
    assert {name: record[name] for name in expected} == expected


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    how = {"lmbda": 0.6, "max_steps": 6, "save_every": 2, "steps_per_generation": 3}
    settings = settings_for(folder, "pairs", **how)
    distill(settings, tmp_path / "whole")
    advance = Display.advance

    def stop_at_two(display, step):
        advance(display, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "advance", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            distill(settings, tmp_path / "stopped")
    distill(settings, tmp_path / "stopped", resume=True)
    whole, stopped = (
        load_file(tmp_path / it / "model.safetensors") for it in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not list((tmp_path / "whole").glob("on_policy*"))


def test_a_dry_run_measures_the_writing_too(folder):
    told = dry_run(settings_for(folder, "pairs"))
    assert told.seconds > 0


def test_a_cache_of_the_teacher_is_refused_with_own_text(folder):
    with pytest.raises(ValueError, match=r"cache_teacher .* lmbda=1\.0, seq_kd=False"):
        settings_for(folder, "pairs", cache_teacher=True)


def test_a_prompt_without_room_for_a_reply_is_refused_before_the_run(folder, tmp_path):
    with pytest.raises(ValueError, match=r"max_completion_length=30 behind the longest prompt"):
        distill(settings_for(folder, "pairs", max_completion_length=30), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_template_is_called_with_what_it_is_given(folder):
    rows = [{"prompt": [{"role": "user", "content": "a"}]}]
    tokenizer = material.tokenizer()
    tokenizer.chat_template = TEMPLATE
    how = {"max_length": 64, "prompts": True}
    blocks = tokenize(rows, tokenizer, chat_template_kwargs={"mood": "calm"}, **how)
    assert tokenizer.decode(blocks[0]["input_ids"]).endswith("<assistant>(calm)")
    assert tokenizer.decode(tokenize(rows, tokenizer, **how)[0]["input_ids"]).endswith("tant>")


def test_replies_of_a_run_follow_the_template_as_it_was_called_in_training(folder, tmp_path):
    mood = {"chat_template_kwargs": '{"mood": "calm"}'}
    run = tmp_path / "run"
    distill(settings_for(folder, "chats", lmbda=0.0, max_length=32, max_steps=1, **mood), run)
    how = {"data": str(folder / "chats.jsonl"), "prompts": 2, "max_new_tokens": 1, "seeds": 1}
    with pytest.warns(UserWarning, match="were trained on"):
        evaluate_run(run, EvaluateSettings(**how, max_blocks=1, device="cpu"))
    generate_run(run, GenerateSettings(**how, device="cpu"))
    for file in ("generations.jsonl", "replies.jsonl"):
        prompts = [json.loads(line)["prompt"] for line in (run / file).read_text().splitlines()]
        assert len(prompts) == 2
        assert all(it.endswith("<assistant>(calm)") for it in prompts)


@pytest.mark.parametrize("value", ["[1]", "no", 3, '{"tokenize": true}'])
def test_variables_that_are_no_object_are_refused(value):
    with pytest.raises(ValueError, match="chat_template_kwargs must"):
        template_variables(value)


@pytest.mark.parametrize("data", ["pairs", "prompts", "rows"])
def test_lengths_of_prompts_are_those_of_the_prompts(data, folder):
    tokenizer = load_tokenizer(folder / "student")
    lines = (folder / f"{data}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    blocks = tokenize(rows, tokenizer, max_length=24, packing=False, prompts=True)
    for number, expected in enumerate(prompt_lengths(blocks, 4)):
        row = {name: it[None] for name, it in blocks[number].items()}
        (prompt,) = prompts_in(row | {"attention_mask": torch.ones_like(row["labels"])}, 4)
        assert len(prompt) == expected
