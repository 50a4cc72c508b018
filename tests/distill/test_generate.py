import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rkl.distill.generate import (
    GenerateSettings,
    Generation,
    Prompt,
    Sampling,
    generate,
    generate_run,
    measure,
    prompts_of,
    save,
)
from rkl.runs import Run

VOCAB = 30
SHORT = Sampling(12)
WORDS = ["<eos>", *(f"w{i}" for i in range(VOCAB - 1))]
TEXT = " ".join(f"w{i % 7}" for i in range(50))


@pytest.fixture
def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture
def student():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=48,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def asked(*texts):
    return [Prompt([WORDS.index(word) for word in text.split()], text, "") for text in texts]


def greedy(student, ids, count):
    """The likeliest continuation, one forward of the whole text a token, until its end."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(student(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            return ids[:-1]
    return ids


def test_padding_on_the_left_changes_no_reply(student, tokenizer):
    prompts = asked("w1 w2 w3 w4", "w5", "w6 w7")
    replies = generate(
        student, tokenizer, prompts, seeds=[0], sampling=Sampling(12, temperature=0)
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        expected = greedy(student, prompt.tokens, 12)[len(prompt.tokens) :]
        assert reply.text == tokenizer.decode(expected)
        assert reply.tokens == len(expected)


def test_the_same_seed_gives_the_same_replies_and_another_gives_others(student, tokenizer):
    prompts = asked("w1 w2", "w3")
    first, again = (
        generate(student, tokenizer, prompts, seeds=[3, 4], sampling=SHORT) for _ in range(2)
    )
    assert first == again
    assert [reply.seed for reply in first] == [3, 3, 4, 4]
    assert [reply.prompt for reply in first] == ["w1 w2", "w3"] * 2
    assert first[0].text != first[2].text
    alone = generate(student, tokenizer, prompts, seeds=[4], sampling=SHORT)
    assert alone == first[2:]


def test_generating_touches_neither_the_global_random_state_nor_the_models_mode(
    student, tokenizer
):
    student.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(student, tokenizer, asked("w1"), seeds=[0], sampling=Sampling(3))
    assert torch.equal(torch.rand(3), expected)
    assert student.training


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_from_the_models_tempered_nucleus_and_nothing_else(
    student, tokenizer, temperature, top_p
):
    student.generation_config.update(top_k=2, repetition_penalty=1.7)  # which shall not apply
    prompts = asked(*["w1 w2"] * 4000)
    with torch.no_grad():
        logits = student(torch.tensor([prompts[0].tokens])).logits[0, -1].double()
    p = (logits / temperature).softmax(-1)
    ranked, order = p.sort(descending=True)
    p[order[ranked.cumsum(0) - ranked >= top_p]] = 0
    p /= p.sum()
    replies = generate(
        student,
        tokenizer,
        prompts,
        seeds=[0],
        sampling=Sampling(1, temperature, top_p),
        batch_size=4000,
    )
    drawn = [0 if reply.tokens == 0 else WORDS.index(reply.text) for reply in replies]
    share = torch.bincount(torch.tensor(drawn), minlength=VOCAB) / len(drawn)
    # Five standard deviations of a share; every atom outside the nucleus must have none at all.
    assert ((share - p).abs() <= 5 * (p * (1 - p) / len(drawn)).sqrt()).all()


@pytest.mark.parametrize(
    "own",
    [
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [1, 2, 3, 4, 5, 6]},
        {"sequence_bias": [[[3], 100.0]]},
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"stop_strings": ["w"]},
    ],
    ids=str,
)
def test_the_models_own_generation_settings_shape_no_reply(student, tokenizer, own):
    def replies():
        prompts, samplings = asked("w1 w2", "w3"), (Sampling(8), Sampling(8, temperature=0))
        return [generate(student, tokenizer, prompts, seeds=[0], sampling=it) for it in samplings]

    expected = replies()
    for name, value in own.items():
        setattr(student.generation_config, name, value)
    before = student.generation_config.to_dict()
    assert replies() == expected
    assert student.generation_config.to_dict() == before


def test_an_end_of_text_token_in_a_prompt_is_part_of_it(tokenizer):
    (prompt,) = prompts_of([{"prompt": "w1 w2 <eos>", "completion": "w3"}], tokenizer)
    assert prompt.tokens == tokenizer("w1 w2 <eos>")["input_ids"] == [2, 3, 0]


def test_a_reply_stops_before_its_end_of_text(student, tokenizer):
    student.generation_config.eos_token_id = [5, 0]
    replies = generate(student, tokenizer, asked("w1", "w2"), seeds=range(6), sampling=SHORT)
    assert all("<eos>" not in reply.text and "w4" not in reply.text for reply in replies)
    assert min(reply.tokens for reply in replies) < 12
    assert all(reply.tokens == len(reply.text.split()) for reply in replies)


def test_plain_text_is_cut_into_windows_of_prompt_and_reference(tokenizer):
    prompts = prompts_of([{"text": TEXT}], tokenizer, count=10, prompt_tokens=8, reply_tokens=4)
    words = TEXT.split()
    assert len(prompts) == 4  # the last two of 50 tokens are not enough for a prompt
    for i, prompt in enumerate(prompts):
        assert prompt.text == " ".join(words[12 * i : 12 * i + 8])
        assert prompt.reference == " ".join(words[12 * i + 8 : 12 * i + 12])
        assert prompt.tokens == tokenizer(prompt.text)["input_ids"]


def test_prompts_are_spread_evenly_over_the_rows(tokenizer):
    rows = [{"prompt": f"w{i}", "completion": " w0"} for i in range(10)]
    prompts = prompts_of(rows, tokenizer, count=4)
    assert [prompt.text for prompt in prompts] == ["w0", "w2", "w5", "w7"]
    assert {prompt.reference for prompt in prompts} == {" w0"}


def test_a_text_shorter_than_a_prompt_gives_half_of_itself(tokenizer):
    (prompt,) = prompts_of([{"text": "w1 w2 w3 w4"}], tokenizer, prompt_tokens=8)
    assert (prompt.text, prompt.reference) == ("w1 w2", "w3 w4")


def test_a_chat_is_replied_to_where_the_assistant_spoke_last(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
    talk = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
    ]
    (chat,) = prompts_of([{"messages": talk}], tokenizer)
    (split,) = prompts_of([{"prompt": talk[:3], "completion": talk[3:]}], tokenizer)
    assert chat == split == Prompt([2, 3, 4, 10], "w1 w2 w3 w9", "w4")
    with pytest.raises(ValueError, match="must have a turn before the assistant's last"):
        prompts_of([{"messages": talk[:1]}], tokenizer)


def test_a_reference_in_parts_is_their_text_and_a_tool_call_has_none(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls }} {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
    asked = {"role": "user", "content": [{"type": "text", "text": "w1"}]}

    def reference_of(content, **others):
        answer = {"role": "assistant", "content": content, **others}
        (prompt,) = prompts_of([{"messages": [asked, answer]}], tokenizer)
        return prompt.reference

    assert reference_of([{"type": "text", "text": None}, {"type": "text", "text": "w2"}]) == "w2"
    assert reference_of([{"type": "text"}]) == ""
    assert reference_of(None, tool_calls=[{"function": {"name": "w3"}}]) == ""
    with pytest.raises(ValueError, match="must be text for a language model; got a part of type"):
        reference_of([{"type": "image", "url": "w4.png"}])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer of at least 1; got True"),
        ({"temperature": -1.0}, r"temperature must lie in \[0, ∞\); got -1.0"),
        ({"temperature": math.inf}, r"temperature must lie in \[0, ∞\); got inf"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\]; got 1.5"),
    ],
)
def test_sampling_out_of_range_is_refused(settings, named):
    with pytest.raises((ValueError, TypeError), match=named):
        Sampling(**settings)


def test_what_cannot_be_replied_to_is_refused(student, tokenizer):
    with pytest.raises(ValueError, match="passes the model's context of 48"):
        generate(student, tokenizer, asked("w1"), seeds=[0], sampling=Sampling(48))
    for nothing in ([], [Prompt([], "", "")]):
        with pytest.raises(ValueError, match="prompts must hold at least one"):
            generate(student, tokenizer, nothing, seeds=[0])
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        prompts_of([{"text": TEXT}], tokenizer, count=0)
    with pytest.raises(ValueError, match="no text of 2 tokens or more"):
        prompts_of([{"text": "w1"}], tokenizer)


def test_replies_are_kept_as_json_lines(tmp_path):
    replies = [Generation(0, "a", "b", "naïve\n", 2), Generation(1, "a", "b", "", 0)]
    save(tmp_path / "replies.jsonl", replies)
    lines = (tmp_path / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Generation(**json.loads(line)) for line in lines] == replies


@pytest.mark.parametrize("out", [None, "elsewhere.jsonl"])
def test_the_student_of_a_run_replies_to_data_under_every_seed(student, tokenizer, tmp_path, out):
    run = Run.create(tmp_path / "run", "distill", {}, seed=0)
    student.save_pretrained(run.path)
    tokenizer.save_pretrained(run.path)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": TEXT}) + "\n")
    out = None if out is None else str(tmp_path / out)
    settings = GenerateSettings(
        str(data), prompts=2, prompt_tokens=8, seeds=3, seed=5, max_new_tokens=4, out=out
    )
    written = generate_run(run.path, settings)
    assert written == (run.path / "replies.jsonl" if out is None else Path(out))
    replies = [Generation(**json.loads(line)) for line in written.read_text().splitlines()]
    prompts = prompts_of([{"text": TEXT}], tokenizer, count=2, prompt_tokens=8, reply_tokens=4)
    assert replies == generate(student, tokenizer, prompts, seeds=[5, 6, 7], sampling=Sampling(4))


def test_errors_take_prompts_or_seeds_as_independent():
    replies = [
        Generation(0, "p", "a b", "a b", 2),
        Generation(0, "q", "a b", "c", 1),
        Generation(1, "p", "a b", "a b", 2),
        Generation(1, "q", "a b", "a c", 6),
    ]
    measured = measure(replies)
    # By prompt: ROUGE-L (1 + 1)/2 and (0 + 1/2)/2, lengths (2 + 2)/2 and (1 + 6)/2; the error
    # of a mean of two is half their distance.
    assert [it.item() for it in measured["rouge_l"]] == pytest.approx([0.625, 0.375])
    assert [it.item() for it in measured["length"]] == pytest.approx([2.75, 0.75])
    # By seed: 3 of 3 words differ, then 3 of 4.
    assert [it.item() for it in measured["distinct_1"]] == pytest.approx([0.875, 0.125])
    # No pair of words within "c"; every other reply says its one pair once.
    assert measured["distinct_2_within"].value == 1
    assert measured["distinct_3_within"].value.isnan()
    assert 0 < measured["self_bleu"].value < 1


def test_only_replies_with_a_reference_count_in_rouge_l():
    with_one = [Generation(0, "p", "a b", "a b", 2), Generation(0, "q", "a b", "a c", 2)]
    without = [Generation(0, "r", "", "a b", 2), Generation(0, "s", "{}!", "a b", 2)]
    rouge = measure(with_one + without)["rouge_l"]
    assert [it.item() for it in rouge] == pytest.approx([0.75, 0.25])
    assert measure(with_one + without)["length"].value == 2
    assert measure(with_one[:1] + without)["rouge_l"].error.isnan()  # of a single prompt
    assert measure(without)["rouge_l"].value.isnan()
    empty = [Generation(0, "p", "a b", "", 0), Generation(0, "q", "a b", "a b", 2)]
    assert measure(empty)["rouge_l"].value == 0.5  # no reply to a reference does count


def test_one_seed_leaves_the_error_of_a_set_unknown_and_one_reply_has_no_self_bleu():
    pair = [Generation(0, "p", "a", "a", 1), Generation(0, "q", "a", "b", 1)]
    assert measure(pair)["distinct_1"].error.isnan()
    assert "self_bleu" not in measure(pair[:1])
