import inspect
import json
import sys
import types
import warnings

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

from rkl.distill import prepare
from rkl.distill.text.data import IGNORED, passages, show_example, tokenize
from rkl.distill.text.sources import Rows, read_rows

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} <end>{% endgeneration %}{% else %}{{ m.content }} <end>"
    "{% endif %} {% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}> "
    "{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% endif %} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TALK = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]


@pytest.fixture
def tokenizer():
    """Letters and tags are words: what becomes of a row can be written down."""
    words = ["<unk>", "<eos>", "<user>", "<assistant>", "<end>", *"abcdefghijklmnop"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def merging():
    """A byte-level BPE in which letters merge across the end of a prompt."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = token_decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    core.train_from_iterator(["abab abab"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def shown(dataset, tokenizer):
    return [show_example(dataset, tokenizer, i) for i in range(len(dataset))]


def test_a_jsonl_file_gives_its_rows_without_foreign_columns_or_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"text": "a", "id": 1}\n\n{"text": "b"}', encoding="utf-8")
    assert read_rows(path) == [{"text": "a"}, {"text": "b"}]


def test_a_text_file_is_one_row(tmp_path):
    path = tmp_path / "book.TXT"
    path.write_text("one\n\ntwo\n")
    assert read_rows(path) == [{"text": "one\n\ntwo\n"}]


def test_rows_in_memory_may_come_in_splits():
    splits = {"train": [{"text": "a"}], "test": [{"text": "b"}]}
    assert read_rows(splits, split="test") == [{"text": "b"}]
    assert read_rows(iter([{"text": "a"}])) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"text": "a"}\n{"text": \n', r"rows\.jsonl, line 2: not JSON .* expected text, or"),
        (b'{"text": "a"}\n["b"]\n', r"line 2: expected text, .* got \['b'\], which is no object"),
        (b'{"txt": "a"}\n', r"line 1: expected text, or prompt and completion, or .*\['txt'\]"),
        (b'{"text": null}\n', r"line 1: expected text"),
        (b'{"text": 3}\n', r"line 1: text must be a string; got 3"),
        (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', r"line 2: .* among rows of text"),
        (
            b'{"prompt": "a", "completion": []}\n',
            r"line 1: completion must be text or a list of messages; got \[\]",
        ),
        (
            b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
            r"line 1: prompt and completion must both be text or both messages",
        ),
        (b'{"messages": "hello"}\n', r"line 1: messages must be a list of messages; got 'hello'"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "tools": "f("}\n',
            r"line 1: tools are not JSON",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "tools": [3]}\n',
            r"line 1: tools must be a list of objects; got \[3\]",
        ),
        (
            b'{"text": "a"}\n{"text": "half an emoji \\ud83d here"}\n',
            r"line 2: text must be text that UTF-8 can write; .*'\\ud83d', at character 15",
        ),
        (
            b'{"messages": [{"role": "u", "content": [{"type": "text", "text": "\\udc00"}]}]}\n',
            r"line 1: messages must be text that UTF-8 can write",
        ),
        (
            b'{"messages": [{"role": "user", "content": ["a"]}]}\n',
            r"line 1: a part of content in messages must be an object with a type; got 'a'",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}\n',
            r"line 1: text of a part of content in messages must be a string; got 3",
        ),
        (b'{"messages": [{"content": "a"}]}\n', r"line 1: each of messages must be an object"),
        (b'{"messages": [{"role": "user", "content": 3}]}\n', r"line 1: content in messages"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: expected UTF-8; got the byte 0xff at 10"),
        (b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", r"line 2: not JSON"),
        (b"[" * 100_000 + b"\n", r"rows\.jsonl: not JSON"),  # as a list over several lines
        (b"\n \n", r"rows\.jsonl has no rows"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_what_was_expected(tmp_path, content, named):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=named) as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", b"caf\n\xe9", r"a\.txt: expected UTF-8; got the byte 0xe9 at 4"),
        ("a.txt", b" \n", r"a\.txt has no rows"),
        ("a.doc", b"text\na", r"data must end in \.jsonl, \.ndjson, \.json, .*\.parquet"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name, content, named):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=named):
        read_rows(path)


def test_rows_held_out_that_are_trained_on_too_are_told_of(tmp_path, capsys):
    """Of rows that the data have twice some are held out, and their copies are not."""
    rows = Rows({"text": f"row {number % 5}"} for number in range(10))
    prepare._tell_of_shared(rows.some(range(5, 10)), rows.some([0, 1]))
    assert "2 OF 2 ROWS HELD OUT ARE TRAINED ON TOO" in capsys.readouterr().err
    prepare._tell_of_shared(rows.some([2, 3]), rows.some([0, 1]))
    prepare._tell_of_shared(rows, rows.some([]))
    assert capsys.readouterr().err == ""


def test_rows_without_a_length_are_read(tokenizer):
    """As of a data set that is streamed."""
    rows = [{"text": "a b"}, {"text": "c"}]
    assert torch.equal(tokenize(iter(rows), tokenizer).tokens, tokenize(rows, tokenizer).tokens)
    with pytest.raises(ValueError, match="has no rows"):
        tokenize(iter(()), tokenizer)


def test_what_is_missing_or_no_data_at_all_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.jsonl"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(TypeError, match="data must be a file, a data set or a list of rows"):
        inspect.unwrap(read_rows)(3)  # without the tests' own check of types
    with pytest.raises(ValueError, match=r"split must be one of \['train'\]; got 'test'"):
        read_rows({"train": [{"text": "a"}]}, split="test")
    with pytest.raises(ValueError, match="data: list has no rows"):
        read_rows([])


@pytest.mark.parametrize("data", ["rows.parquet", ".", "owner/name"])
def test_a_missing_extra_is_named_with_the_line_to_type(tmp_path, monkeypatch, data):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'rkl\[data\]'"):
        read_rows(data)


def test_parquet_files_and_saved_data_sets_give_their_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    chats = [{"messages": TALK[:2], "id": 1}, {"messages": TALK, "id": 2}]
    rows = [{"messages": TALK[:2]}, {"messages": TALK}]
    table = datasets.Dataset.from_list(chats)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    for data in (tmp_path / "rows.parquet", tmp_path / "saved", tmp_path / "splits", table):
        assert read_rows(data) == rows
    with pytest.raises(ValueError, match="holds no data set"):
        read_rows(tmp_path)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"torn\.parquet is no parquet file"):
        read_rows(tmp_path / "torn.parquet")


def test_a_name_that_is_no_file_is_a_data_set_with_its_configuration(monkeypatch):
    hub = types.ModuleType("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "missing":
            raise ConnectionError("offline")
        return [{"text": "a", "id": 1}]

    hub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_rows("owner/name:small", split="test") == [{"text": "a"}]
    assert read_rows("name") == [{"text": "a"}]
    assert asked == [("owner/name", "small", "test"), ("name", None, "train")]
    with pytest.raises(ValueError, match="'missing' is neither a file nor a data set: offline"):
        read_rows("missing")


def test_packed_text_is_one_stream_that_loses_nothing(tokenizer):
    rows = [{"text": "a b c"}, {"text": "d e"}, {"text": "f g h i"}]
    dataset = tokenize(rows, tokenizer, max_length=5)
    stream = torch.cat([block["input_ids"] for block in dataset])
    assert tokenizer.decode(stream) == "a b c <eos> d e <eos> f g h i <eos>"
    assert [len(block["input_ids"]) for block in dataset] == [5, 5, 2]
    assert shown(dataset, tokenizer) == ["[a]b c <eos>[d]", "[e]<eos>[f]g h", "[i]<eos>"]
    assert dataset.trained_tokens == 7  # all but the first of a text, or of a part of one
    assert dataset.cut_tokens == 0
    positions = [block["position_ids"].tolist() for block in dataset]
    assert positions == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 2], [0, 1]]


def test_unpacked_each_text_has_a_block(tokenizer):
    rows = [{"text": "a b c"}, {"text": "d e"}, {"text": "f g h i"}]
    packed = tokenize(rows, tokenizer, max_length=5)
    assert shown(packed.unpacked(), tokenizer) == [
        "[a]b c <eos>",
        "[e]<eos>",
        "[f]g h",
        "[i]<eos>",
    ]
    assert packed.unpacked().trained_tokens == packed.trained_tokens
    pairs = [{"prompt": f"{it} ", "completion": "a"} for it in "bcdef"]
    apart = tokenize(pairs, tokenizer, packing=False)
    together = tokenize(pairs, tokenizer)
    assert len(together) == 1
    assert shown(together.unpacked(), tokenizer) == shown(apart, tokenizer)
    assert apart.unpacked() is apart


def test_unpacked_text_shares_no_block_and_loses_nothing(tokenizer):
    rows = [{"text": "a b c d e f"}, {"text": "g"}]
    dataset = tokenize(rows, tokenizer, max_length=4, packing=False)
    assert shown(dataset, tokenizer) == ["[a]b c d", "[e]f <eos>", "[g]<eos>"]


def test_only_completions_are_trained_on(tokenizer):
    rows = [{"prompt": "a b ", "completion": "c d"}]
    dataset = tokenize(rows, tokenizer)
    assert shown(dataset, tokenizer) == ["[a b]c d <eos>"]
    assert dataset[0]["labels"].tolist()[:2] == [IGNORED] * 2
    assert str(dataset) == "1 rows of completion in 1 blocks: 5 tokens, 3 of them trained on"


def test_an_end_that_the_tokenizer_puts_itself_is_not_doubled(tokenizer):
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", end)]
    )
    text = tokenize([{"text": "a b"}], tokenizer)
    completion = tokenize([{"prompt": "a", "completion": " b"}], tokenizer)
    assert shown(text, tokenizer) == ["[a]b <eos>"]
    assert shown(completion, tokenizer) == ["[a]b <eos>"]


def test_tokens_that_merge_across_the_prompts_end_are_trained_on_and_warned_of(merging):
    with pytest.warns(UserWarning, match="In 1 of 2 rows the tokens of the prompt change"):
        dataset = tokenize(
            [{"prompt": "xa", "completion": "b"}, {"prompt": "x", "completion": "y"}],
            merging,
            packing=False,
        )
    assert shown(dataset, merging) == ["[x]ab<eos>", "[x]y<eos>"]


def test_packed_completions_keep_their_prompts_whole_by_best_fit(tokenizer):
    rows = [
        {"prompt": "a", "completion": " b"},
        {"prompt": "c d e", "completion": " f"},
        {"prompt": "g", "completion": " h i"},
        {"prompt": "j", "completion": " k"},
    ]
    dataset = tokenize(rows, tokenizer, max_length=8)
    assert shown(dataset, tokenizer) == [
        "[c d e]f <eos>[a]b <eos>",
        "[g]h i <eos>[j]k <eos>",
    ]


def test_a_completion_longer_than_a_block_loses_its_end_and_says_so(tokenizer):
    rows = [
        {"prompt": "a", "completion": " b c d e"},
        {"prompt": "f g h i", "completion": " j"},
    ]
    with pytest.warns(UserWarning, match="2 of 2 rows are longer than max_length=4 .* 4 tokens"):
        dataset = tokenize(rows, tokenizer, max_length=4, packing=False)
    assert shown(dataset, tokenizer) == ["[a]b c d"]
    assert dataset.cut_tokens == 4


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_only_the_assistants_turns_are_trained_on(tokenizer, template):
    tokenizer.chat_template = template
    (text,) = shown(tokenize([{"messages": TALK}], tokenizer), tokenizer)
    assert text == ("[<user> a b <end> <assistant>]c <end>[<user> d <end> <assistant>]e f <end>")


def test_of_a_prompt_in_messages_no_turn_is_trained_on(tokenizer):
    tokenizer.chat_template = CHAT
    rows = [{"prompt": TALK[:3], "completion": TALK[3:]}]
    (text,) = shown(tokenize(rows, tokenizer), tokenizer)
    assert text == "[<user> a b <end> <assistant> c <end> <user> d <end> <assistant>]e f <end>"


def test_a_template_that_rewrites_earlier_turns_gives_a_text_for_each_of_them(tokenizer):
    tokenizer.chat_template = FORGETFUL
    dataset = tokenize([{"messages": TALK}], tokenizer, packing=False)
    assert shown(dataset, tokenizer) == [
        "[<user> a b <end> <assistant>]c <end>",
        "[<user> a b <end> <assistant> <end> <user> d <end> <assistant>]e f <end>",
    ]
    (text,) = shown(tokenize([{"messages": TALK[:2]}], tokenizer), tokenizer)
    assert text == "[<user> a b <end> <assistant>]c <end>"


def test_rows_with_nothing_to_train_on_are_counted_and_named_with_their_reason(
    tokenizer, tmp_path
):
    tokenizer.chat_template = CHAT
    path, roles = tmp_path / "rows.jsonl", ("assistant", "Assistant", "gpt")
    chats = [{"messages": [TALK[0], {"role": it, "content": "c"}]} for it in roles]
    path.write_text("".join(json.dumps(it) + "\n\n" for it in chats))
    said = r"no message has the role assistant \(found: Assistant, gpt\): .*line 3.*line 5"
    with pytest.warns(UserWarning, match=f"2 of 3 rows have nothing to train on .*{said}"):
        dataset = tokenize(read_rows(path), tokenizer)
    assert str(dataset).startswith("1 of 3 rows of messages in 1 blocks: 7 tokens, 2 of them")
    assert "2 rows left out (no message" in str(dataset)
    longer = [{"prompt": "a b c d", "completion": " e"}, {"prompt": "a", "completion": " b"}]
    with pytest.warns(
        UserWarning, match=r"1 of 2 rows have nothing .*max_length=4 tokens: data, row 1"
    ):
        dataset = tokenize(longer, tokenizer, max_length=4)
    assert (dataset.rows, dataset.left_out) == (2, 1)
    with pytest.warns(
        UserWarning, match="1 of 2 rows have nothing .*the text is empty: data, row 2"
    ):
        assert len(tokenize([{"text": "a b"}, {"text": ""}], tokenizer)[0]["input_ids"]) == 3


def test_a_beginning_that_the_tokenizer_adds_is_warned_of_where_the_text_has_it(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", begin)]
    )
    for rows in ([{"text": "<bos> a b"}], [{"prompt": "<bos> a", "completion": " b"}]):
        with pytest.warns(UserWarning, match="1 of 1 rows begin with <bos>.* is there twice"):
            tokenize(rows, tokenizer)
    tokenize([{"text": "a b"}], tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    dataset = tokenize([{"messages": TALK[:2]}], tokenizer)
    assert dataset.tokens.tolist().count(begin) == 1


def test_text_that_a_chat_template_wrote_is_warned_of(tokenizer):
    tokenizer.chat_template = CHAT
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<end>"]})
    with pytest.warns(UserWarning, match="begin with <user>, as if a chat template"):
        tokenize([{"text": "<user> a <end>"}], tokenizer)


def test_line_ends_of_other_systems_are_line_feeds(tmp_path):
    for name, end in (("crlf.txt", "\r\n"), ("cr.txt", "\r"), ("lf.txt", "\n")):
        (tmp_path / name).write_bytes(end.join(["one", "", "two", ""]).encode())
        assert read_rows(tmp_path / name) == [{"text": "one\n\ntwo\n"}]


def test_nulls_that_arrow_fills_in_are_not_trained_on(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")

    def asked(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        told = [{"type": "function", "function": {"name": "f", "parameters": arguments}}]
        return {"messages": [TALK[0], answer], "tools": told}

    rows = [asked({"a": 1}), asked({"b": 2})]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    for data in (table, tmp_path / "saved", tmp_path / "rows.parquet"):
        with pytest.warns(UserWarning, match="in 2 of 2 rows null values below tool_calls or"):
            read = read_rows(data)
        for row, expected in zip(read, rows, strict=True):
            found = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
            assert found == expected["messages"][1]["tool_calls"][0]["function"]["arguments"]
            assert row["tools"] == expected["tools"]
    null = [asked({"a": None})]
    assert read_rows(null)[0]["tools"] == null[0]["tools"]  # a null that somebody wrote


def test_chats_that_a_template_cannot_place_are_refused_by_row(tokenizer):
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        tokenize([{"messages": TALK}], tokenizer)
    tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match="row 2: the chat begins with the assistant"):
        tokenize([{"messages": TALK}, {"messages": TALK[1:]}], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="row 1: the chat template refuses it: roles must"):
        tokenize([{"messages": TALK}], tokenizer)
    tokenizer.chat_template = "{% generation %}{% endgeneration %}<user> a b"
    with pytest.raises(ValueError, match="row 1: .* marks none of the assistant's turns"):
        tokenize([{"messages": TALK}], tokenizer)


def test_data_with_nothing_to_train_on_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no trained tokens: in none of 2 rows of text"):
        tokenize([{"text": ""}, {"text": ""}], tokenizer, packing=False)
    tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match="no trained tokens: in none of 1 rows of messages"):
        tokenize([{"messages": TALK[:1]}], tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the row is cut, which is tested above
        with pytest.raises(ValueError, match="within max_length=2 tokens"):
            tokenize([{"prompt": "a b c", "completion": " d"}], tokenizer, max_length=2)


@pytest.mark.parametrize("max_length", [1, 0, True, 8.0, None])
def test_a_block_must_have_room_for_a_token_and_the_next(tokenizer, max_length):
    with pytest.raises((ValueError, TypeError), match=r"max_length must be .*at least 2; got"):
        # without the tests' own check of types
        inspect.unwrap(tokenize)([{"text": "a b"}], tokenizer, max_length=max_length)


def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        tokenize([{"text": "a b"}], tokenizer)


def test_a_tokenizer_is_left_as_it_was_and_gives_the_same_blocks_again(tokenizer):
    rows = [{"text": "a b c d"}]
    first, second = (tokenize(rows, tokenizer, max_length=3) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert tokenizer.pad_token is None


def test_blocks_are_indexed_like_a_list(tokenizer):
    dataset = tokenize([{"text": "a b c d"}], tokenizer, max_length=3)
    assert torch.equal(dataset[-1]["input_ids"], dataset[1]["input_ids"])
    for index in (2, -3):
        with pytest.raises(IndexError, match="index must be below 2"):
            dataset[index]


def test_a_text_is_known_again_by_its_paragraphs_and_other_rows_as_a_whole():
    long = "A paragraph long enough to be told from all others."
    rows = [{"text": f"Heading\n\n{long}\n \n{long[::-1]}"}, {"text": " short\n"}]
    assert list(passages(rows)) == [long, long[::-1], "short"]
    pair = {"prompt": "a", "completion": "b"}
    assert list(passages([pair])) == [pair]


def test_a_token_added_to_the_vocabulary_is_shown_as_it_is(tokenizer):
    tokenizer.add_tokens([AddedToken("<new>")])
    dataset = tokenize([{"prompt": "a", "completion": " <new>"}], tokenizer)
    assert "<new>" in show_example(dataset, tokenizer)
