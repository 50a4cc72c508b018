"""Chats under templates of the kinds that models have, none of them patched."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rkl.distill.text.chats import ChatTemplate, read_template
from rkl.distill.text.data import show_example, tokenize

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|return|>", "<think>", "</think>"]
ROLE = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chat_template(content, prompt=PROMPT):
    return f"{{% for m in messages %}}{ROLE}{content}<|im_end|>\n{{% endfor %}}{prompt}"


PLAIN = chat_template("{{ m.content }}")
PARTS = chat_template(
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
)
# An empty thought before the last answer only, as Qwen3 has.
LAST_THINKS = chat_template(
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
# The prompt of a reply opens a thought that the answer does not have, as DeepSeek-R1's.
OPENS = chat_template(
    "{{ m.content.split('</think>')[-1] }}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
)
# Thoughts of the last answer only, from a key of their own or from the content.
KEYED = chat_template(
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n"
    "</think>\n{% endif %}{{ m.content }}"
)
# Another end behind the last answer, as GPT-OSS and Phi-3.
ENDS = (
    f"{{% for m in messages %}}{ROLE}{{{{ m.content }}}}"
    "{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|im_end|>\n{% endif %}"
    f"{{% endfor %}}{PROMPT}"
)
MARKED = chat_template(
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools|tojson }}<|im_end|>\n{% endif %}"
    + chat_template(
        "{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ call.function.name }} "
        "{{ call.function.arguments|tojson }}{% endfor %}"
    )
)


def user(content):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


TALK = [user("2+2"), said("FOUR"), user("3+3"), said("SIX"), user("4+4"), said("EIGHT")]


@pytest.fixture(scope="module")
def _core():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", *SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["two and two is four"] * 9, trainer)
    return core.to_str()


@pytest.fixture
def tokenizer(_core):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core),
        eos_token="<eos>",
        additional_special_tokens=SPECIAL,
    )


def shown(tokenizer, template, messages, **how):
    tokenizer.chat_template = template
    rows = [{"messages": messages} | how.pop("row", {})]
    blocks = tokenize(rows, tokenizer, packing=False, max_length=9999, **how)
    return [show_example(blocks, tokenizer, index) for index in range(len(blocks))]


def untagged(texts):
    return [text.replace("<|im_start|>", "^").replace("<|im_end|>", "$") for text in texts]


@pytest.mark.parametrize("template", [PLAIN, PARTS, MARKED], ids=["plain", "parts", "marked"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_chat_that_only_grows_is_one_text(template, parts, tokenizer):
    talk = TALK[:4]
    if parts:
        talk = [it | {"content": [{"type": "text", "text": it["content"]}]} for it in talk]
    (text,) = shown(tokenizer, template, talk)
    end = "]" if template == MARKED else "<|im_end|>\n["
    start = "<|im_end|>\n" if template == MARKED else ""
    expected = (
        f"[<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n]FOUR{end.replace(']', '[')}"
        f"{start}<|im_start|>user\n3+3<|im_end|>\n<|im_start|>assistant\n]SIX"
    )
    assert text.startswith(expected)


def test_an_answer_is_trained_on_as_it_was_rendered_when_it_was_said(tokenizer):
    found = untagged(shown(tokenizer, LAST_THINKS, TALK[:4]))
    assert found == [
        "[^user\n2+2$\n^assistant\n]<think>\n\n</think>\n\nFOUR$\n",
        "[^user\n2+2$\n^assistant\nFOUR$\n^user\n3+3$\n^assistant\n]<think>\n\n</think>\n\nSIX$\n",
    ]
    assert untagged(shown(tokenizer, LAST_THINKS, TALK[:4], train_on="last")) == found[1:]
    for number in (1, 2, 3):
        assert len(shown(tokenizer, LAST_THINKS, TALK[: 2 * number])) == number


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_an_answer_of_weight_0_is_not_trained_on(template, tokenizer):
    """As files for the fine-tuning of OpenAI's models say it."""
    chat = [user("2+2"), said("5", weight=0), user("3+3"), said("6", weight=1)]
    (text,) = shown(tokenizer, template, chat)
    assert text.startswith("[")
    assert "]" not in text.partition("5")[2].partition("3+3")[0]
    assert text.partition("6")[0].endswith("]")
    with pytest.raises(ValueError, match="all messages of the assistant have weight 0: data, row"):
        shown(tokenizer, template, chat[:2])
    with pytest.raises(ValueError, match=r"row 1: weight of a message must be 0 or 1; got 0\.5"):
        shown(tokenizer, template, [user("2+2"), said("5", weight=0.5)])


def test_a_prompt_that_opens_a_thought_is_not_part_of_an_answer_without_one(tokenizer):
    (text,) = untagged(shown(tokenizer, OPENS, TALK[:4]))
    assert text == "[^user\n2+2$\n^assistant\n]FOUR$\n[^user\n3+3$\n^assistant\n]SIX$\n"
    (text,) = untagged(shown(tokenizer, OPENS, [user("a"), said("<this>")]))
    assert text == "[^user\na$\n^assistant\n]<this>$\n"


@pytest.mark.parametrize("key", [None, "reasoning_content", "thinking"])
def test_a_thought_that_the_template_opens_and_drops_is_trained_on(key, tokenizer):
    answer = said("FOUR", **{key: "Two."}) if key else said("<think>\nTwo.\n</think>\n\nFOUR")
    one, two = untagged(shown(tokenizer, OPENS, [user("2+2"), answer, user("3+3"), said("SIX")]))
    assert one == "[^user\n2+2$\n^assistant\n<think>\n]Two.\n</think>\n\nFOUR$\n"
    assert "Two." not in two
    assert two.endswith("[^user\n3+3$\n^assistant\n]SIX$\n") or two.endswith("^assistant\n]SIX$\n")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_go_where_the_template_reads_them(key, tokenizer):
    (text,) = untagged(shown(tokenizer, KEYED, [user("2+2"), said("FOUR", **{key: "Two."})]))
    assert text == "[^user\n2+2$\n^assistant\n]<think>\nTwo.\n</think>\nFOUR$\n"


def test_thoughts_that_no_template_key_takes_are_warned_of(tokenizer):
    with pytest.warns(UserWarning, match="does not write reasoning_content, which rows have"):
        (text,) = shown(tokenizer, PLAIN, [user("2+2"), said("FOUR", reasoning_content="Two.")])
    assert "Two." not in text


def test_another_end_of_the_last_answer_gives_each_its_own_text(tokenizer):
    texts = untagged(shown(tokenizer, ENDS, TALK[:4]))
    assert texts == [
        "[^user\n2+2$\n^assistant\n]FOUR<|return|>",
        "[^user\n2+2$\n^assistant\nFOUR$\n^user\n3+3$\n^assistant\n]SIX<|return|>",
    ]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (PLAIN, "<|im_end|>"),
        (ENDS, "<|return|>"),
        (PARTS, "<|im_end|>"),
        ("{{ messages[-1].content }}", None),
    ],
)
def test_the_token_that_ends_a_turn_is_read_from_the_template(template, end, tokenizer):
    tokenizer.chat_template = template
    found = ChatTemplate(tokenizer).turn_end
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


def test_tools_and_calls_reach_the_template(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    told = [{"type": "function", "function": {"name": "f", "description": "Finds."}}]
    for arguments in ({"a": 1}, '{"a": 1}'):
        call["function"]["arguments"] = arguments
        talk = [
            user("w"),
            said(None, tool_calls=[call]),
            {"role": "tool", "content": "3"},
            said("It is 3"),
        ]
        (text,) = untagged(shown(tokenizer, TOOLS, talk, row={"tools": told}))
        assert text.startswith('[^system\n[{"type": "function", "function": {"name": "f"')
        assert (
            text.endswith(
                '[^user\nw$\n^assistant\n]f {"a": 1}$\n[^tool\n3$\n^assistant\n]It is 3$\n'
            )
            or '^assistant\n]f {"a": 1}$\n[^tool\n3$\n^assistant\n]It is 3$\n' in text
        )


def test_tool_calls_and_tools_that_the_template_does_not_write_are_not_trained_on_in_silence(
    tokenizer,
):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    tokenizer.chat_template = PLAIN
    rows = [{"messages": [user("w"), said(None, tool_calls=[call])]}, {"messages": TALK}]
    with pytest.warns(UserWarning, match=r"1 of 2 rows .*writes no tool calls: data, row 1"):
        assert "None" not in show_example(tokenize(rows, tokenizer), tokenizer)
    with pytest.warns(UserWarning, match="does not write tools, which rows have"):
        tokenize([{"messages": TALK, "tools": [call]}], tokenizer)


def test_content_that_is_no_text_is_refused_by_row(tokenizer):
    tokenizer.chat_template = PLAIN
    image = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    with pytest.raises(ValueError, match="row 1: content in parts must be text.*image_url"):
        tokenize([{"messages": [user(image), said("a")]}], tokenizer)


@pytest.mark.parametrize(
    "template", [PLAIN, PARTS, MARKED, TOOLS], ids=["plain", "parts", "marked", "tools"]
)
@pytest.mark.parametrize("odd", ["", " spaced ", "q{{ 1 }}", "two\n\nlines"])
def test_a_long_chat_is_rendered_a_few_times_and_gives_the_same(
    template, odd, tokenizer, monkeypatch
):
    talk = [
        it for n in range(20) for it in (user(f"question {n} {odd}"), said(f"{odd}answer {n}"))
    ]
    tokenizer.chat_template = template
    rendered, kept = [], ChatTemplate.render
    monkeypatch.setattr(
        ChatTemplate,
        "render",
        lambda self, messages, *args, **how: (
            rendered.append(len(messages)) or kept(self, messages, *args, **how)
        ),
    )
    quick = shown(tokenizer, template, talk)
    assert sum(rendered) < 12 * len(talk)
    monkeypatch.setattr("rkl.distill.text.chats._FEW", 100)
    assert shown(tokenizer, template, talk) == quick


def test_a_long_chat_that_is_rewritten_is_rendered_turn_by_turn(tokenizer):
    talk = [it for n in range(7) for it in (user(f"question {n}"), said(f"answer {n}"))]
    assert len(shown(tokenizer, LAST_THINKS, talk)) == 7
    thoughts = [f"<think>so {n}</think>" if n % 4 == 1 else "" for n in range(len(talk))]
    thinking = [
        it | {"content": f"{t}{it['content']}"} for t, it in zip(thoughts, talk, strict=True)
    ]
    texts = shown(tokenizer, OPENS, thinking)
    # Turns 1, 3, 5 and 7 have a thought, and a text each; 2, 4 and 6 share one.
    assert [text.count("]so") for text in texts] == [1, 1, 1, 0, 1]
    assert re.findall(r"\]answer (\d)", texts[3]) == ["1", "3", "5"]


def test_a_file_must_hold_a_template(tmp_path):
    path = tmp_path / "chat.jinja"
    with pytest.raises(FileNotFoundError, match="chat_template: there is no file"):
        read_template(path)
    path.write_text(MARKED)
    assert read_template(path) == MARKED
    path.write_text("{% for m in messages %}")
    with pytest.raises(ValueError, match="is no Jinja template"):
        read_template(path)


def stored_templates():
    spec = importlib.util.find_spec("trl")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [it for folder in folders for it in Path(folder, "chat_templates").glob("*.jinja")]
    return sorted(it for it in files if not it.stem.endswith("_training"))


THOUGHT = "<think>\nTwo and two.\n</think>\n\n"
CHATS = {
    "one turn": TALK[:2],
    "two turns": TALK[:4],
    "three turns": TALK,
    "thoughts": [user("2+2"), said(f"{THOUGHT}FOUR"), user("3+3"), said(f"{THOUGHT}SIX")],
    "thoughts apart": [
        user("2+2"),
        said("FOUR", reasoning_content="Two and two."),
        user("3+3"),
        said("SIX", reasoning_content="Two and two."),
    ],
    "parts": [it | {"content": [{"type": "text", "text": it["content"]}]} for it in TALK],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("talk", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("file", stored_templates() or [None], ids=lambda it: it and it.stem)
def test_every_template_that_trl_stores_trains_on_each_answer_once(file, talk, tokenizer):
    if file is None:
        pytest.skip("trl is not installed")
    source = file.read_text()
    special = set(re.findall(r"<[|｜][^<>{}'\"\n]{1,40}?[|｜]>", source))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special | {*SPECIAL})})
    tokenizer.chat_template = source
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token  # llama3 writes it
    blocks = tokenize([{"messages": talk}], tokenizer, packing=False, max_length=10_000)
    kept = [block["input_ids"][block["labels"] != -100] for block in blocks]
    text = "".join(tokenizer.decode(it) for it in kept)
    answers = [json.dumps(it["content"]) for it in talk if it["role"] == "assistant"]
    for word in ("FOUR", "SIX", "EIGHT"):
        assert text.count(word) == sum(word in answer for answer in answers)
    assert not re.search(r"[234]\+[234]", text)
