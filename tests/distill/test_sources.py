"""Rows as other libraries and spreadsheets keep them."""

import gzip
import json

import pytest

from rkl.distill.text.sources import read_rows

ROWS = [{"text": "one, two"}, {"text": 'three "four"\nfive;\tsix'}]


def said(*texts, system=None):
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": it} for i, it in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + chat}


def write(path, text):
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv"])
def test_a_file_of_every_format_gives_its_rows(tmp_path, ending, zipped):
    if ending == "json":
        text = json.dumps(ROWS, indent=1)
    elif ending == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
    else:
        mark = {"csv": ",", "tsv": "\t"}[ending]
        cells = ['"' + row["text"].replace('"', '""') + '"' for row in ROWS]
        text = f"\ufeffid{mark}text\r\n" + "".join(f"7{mark}{it}\r\n" for it in cells)
    path = write(tmp_path / f"rows.{ending}{zipped}", text)
    rows = read_rows(path)
    assert rows == ROWS
    assert rows.place(0).endswith({"json": "row 1", "jsonl": "line 1"}.get(ending, "line 2"))


def test_a_compressed_text_and_lines_in_a_json_file_are_read(tmp_path):
    assert read_rows(write(tmp_path / "book.txt.gz", "a\r\nb")) == [{"text": "a\nb"}]
    lines = write(tmp_path / "lines.json", '{"text": "a"}\n{"text": "b"}\n')
    assert read_rows(lines) == [{"text": "a"}, {"text": "b"}]
    assert read_rows(lines.rename(tmp_path / "lines.ndjson")) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("ending", ["jsonl", "ndjson.gz", "json"])
def test_a_list_is_read_under_each_ending(tmp_path, ending):
    rows = read_rows(write(tmp_path / f"list.{ending}", json.dumps(ROWS, indent=1)))
    assert rows == ROWS
    assert rows.place(1).endswith("row 2")


def test_columns_by_their_names_are_rows(tmp_path):
    """As a slice of a data set of Hugging Face; of several splits one is read."""
    assert read_rows({"text": ["a", "b"], "id": [1, 2]}) == [{"text": "a"}, {"text": "b"}]
    chats = [said("a", "b"), said("c", "d")]
    assert read_rows({"messages": [it["messages"] for it in chats]}) == chats
    assert read_rows({"train": ROWS, "test": []}) == ROWS
    with pytest.raises(ValueError, match="as many values each; got 2 of text, 1 of id"):
        read_rows({"text": ["a", "b"], "id": [1]})


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_may_be_json_in_a_cell(tmp_path, column):
    chat = said("a", 'b "quoted"')["messages"]
    turns = [{"from": it["role"], "value": it["content"]} for it in chat]
    text = json.dumps(chat if column == "messages" else turns).replace('"', '""')
    assert read_rows(write(tmp_path / "chats.csv", f'{column}\n"{text}"\n')) == [
        {"messages": chat}
    ]


def test_one_object_over_several_lines_is_a_row(tmp_path):
    one = write(tmp_path / "one.json", json.dumps(ROWS[0], indent=1))
    assert read_rows(one) == ROWS[:1]
    whole = write(tmp_path / "whole.json", json.dumps({"data": ROWS}, indent=1))
    with pytest.raises(ValueError, match=r"row 1: expected text.*got the columns \['data'\]"):
        read_rows(whole)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "response": "b"}, {"prompt": "a", "completion": "b"}),
        ({"instruction": "a", "input": "", "output": "b"}, said("a", "b")),
        ({"instruction": "a", "output": "b", "input": None}, said("a", "b")),
        ({"instruction": "a", "input": "c", "output": "b"}, said("a\nc", "b")),
        (
            {"instruction": "a", "output": "b", "system": "s", "history": [["x", "y"]]},
            said("x", "y", "a", "b", system="s"),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            said("a", "b"),
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "user", "value": "a", "weight": 0},
                    {"from": "assistant", "value": "b"},
                ],
            },
            said("a", "b", system="s"),
        ),
        ({"conversations": said("a", "b")["messages"]}, said("a", "b")),
        # Where a row has our own columns too, these count.
        (
            {"prompt": "a", "completion": "b", "response": "c"},
            {"prompt": "a", "completion": "b"},
        ),
    ],
)
def test_the_columns_of_other_libraries_are_read(row, expected):
    assert read_rows([row, {**row, "id": 3}]) == [expected, expected]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "input": "", "output": "b"},
        {"prompt": "a", "response": "b"},
        {"conversations": said("a", "b")["messages"]},
    ],
)
def test_a_text_beside_an_answer_counts_and_is_warned_of(row):
    rows = [{"text": "w"}, row | {"text": "whole"}]
    with pytest.warns(UserWarning, match="rows have text beside .* leave the column text out"):
        assert read_rows(rows) == [{"text": "w"}, {"text": "whole"}]
    read_rows([{"text": "w", "output": "b"}])  # a warning would be an error


@pytest.mark.parametrize(
    "row",
    [
        said("a", "b"),
        {"prompt": "a", "response": "b"},
        {"prompt": said("a")["messages"], "completion": said("a", "b")["messages"][1:]},
    ],
)
def test_a_system_prompt_in_a_column_that_is_not_read_is_warned_of(row):
    expected = read_rows([row])  # a warning would be an error
    with pytest.warns(UserWarning, match="have a column system, which is not read"):
        assert read_rows([row, row | {"system": "s"}]) == expected * 2
    assert read_rows([row | {"system": ""}]) == expected


def test_a_system_prompt_that_messages_have_too_is_not_warned_of():
    row = said("a", "b", system="s")
    assert read_rows([row | {"system": "s"}]) == [row]


def test_a_system_turn_is_not_said_twice():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]
    turns += [{"from": "gpt", "value": "b"}]
    assert read_rows([{"conversations": turns, "system": "s"}]) == [said("a", "b", system="s")]


def test_alpaca_s_columns_are_found_in_parquet_too(tmp_path):
    table = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"instruction": "a", "input": "c", "output": "b", "id": 1}]
    parquet.write_table(table.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == [said("a\nc", "b")]


def test_a_data_frame_and_its_records_are_rows_with_lists_for_arrays(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": 2}}}
    rows = [said("a", "b")]
    for it in (call, other):
        answer = {"role": "assistant", "content": "", "tool_calls": [it]}
        rows.append({"messages": [*said("a")["messages"], answer]})
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    for data in (frame, frame.to_dict("records"), {"train": frame}, tmp_path / "rows.parquet"):
        with pytest.warns(UserWarning, match="null values below tool_calls"):
            read = read_rows(data)
        assert [row["messages"][1]["tool_calls"] for row in read[1:]] == [[call], [other]]


def test_missing_cells_of_a_data_frame_are_null():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"text": ["one", "two"], "prompt": ["a", None], "number": [1.0, None]}
    )
    assert read_rows(frame) == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(ValueError, match=r"data, row 2: expected text"):
        read_rows(frame.drop(columns="text"))


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.csv", "text,id\na\n", r"a\.csv, line 2: expected 2 cells, .* got 1"),
        ("a.csv", "text,id\n\na,b,c\n", r"line 3: expected 2 cells, one for each of text, id"),
        ("a.csv", 'text,id\n"a,b\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", r"two columns are called 'text'"),
        (
            "a.csv",
            "words\na\n",
            r"line 2: expected text, or prompt .* got the columns \['words'\]",
        ),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json, row 2: expected text, .* got 3"),
        ("a.json", '[{"text": "a"}', r"a\.json: not JSON"),
        ("a.json", '{"text": \n', r"a\.json, line 1: not JSON"),
        ("a.json", " ", r"a\.json has no rows"),
        ("a.xlsx", "x", r"data must end in .*\.csv.* or one of these with \.gz; got the file"),
        (
            "a.jsonl",
            '{"conversations": [{"from": "alien", "value": "a"}]}',
            r"line 1: each of conversations .* human, user, .* got \{'from': 'alien'",
        ),
        ("a.jsonl", '{"conversations": "a"}', r"line 1: conversations must be a list of objects"),
        ("a.jsonl", '{"instruction": 3, "output": "b"}', r"line 1: instruction, .* text; got 3"),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b", "history": ["c"]}',
            r"line 1: history must be a list of pairs",
        ),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, text, named):
    with pytest.raises(ValueError, match=named):
        read_rows(write(tmp_path / name, text))


def test_a_torn_gzip_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl.gz", '{"text": "a"}\n' * 50)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz"):
        read_rows(path)
