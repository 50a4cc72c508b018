"""What is read before a distillation, data and models, and what of it must be refused."""

import torch
from distill import material
from subjects import Lazy, Subject, fault

from rkl.distill import (
    load_model,
    load_tokenizer,
    read_head,
)
from rkl.distill.generate import prompts_of
from rkl.distill.models.layers import parse_layers, without_layers
from rkl.distill.text.batches import shifted
from rkl.distill.text.data import tokenize
from rkl.distill.text.sources import read_rows
from rkl.distill.text.vocabulary import common_vocabulary


def of_file(name, kind, *says):
    """A file that is at fault, and that the message names, with a line where it has lines."""
    return fault("data", kind, name, *says, named=name)


OF_DATA = [
    of_file("missing.jsonl", "no file", "no file"),
    of_file("broken.jsonl", "a broken line", "line 2", "not JSON"),
    of_file("numbers.jsonl", "a number for a row", "line 2", "3"),
    of_file("columns.jsonl", "other columns", "line 1", "'body'", "text"),
    of_file("mixed.jsonl", "two kinds of rows", "line 2", "completion", "text"),
    of_file("not-text.jsonl", "a number for a text", "line 1", "string", "3"),
    of_file("null.jsonl", "null for a text", "line 1", "null"),
    of_file("halves.jsonl", "text and messages", "line 1", "prompt"),
    of_file("no-role.jsonl", "a message without role", "line 1", "role"),
    of_file("no-messages.jsonl", "no messages", "line 1", "[]"),
    of_file("tools.jsonl", "tools", "line 1", "tools"),
    of_file("deep.jsonl", "nested too deeply", "line 1", "not JSON"),
    of_file("latin.jsonl", "a line not UTF-8", "line 2", "UTF-8", "0xe9"),
    of_file("latin.txt", "a text not UTF-8", "UTF-8", "0xe9"),
    of_file("empty.jsonl", "an empty file", "no rows"),
    of_file("blank.jsonl", "blank lines", "no rows"),
    of_file("blank.txt", "a blank text", "no rows"),
    of_file("garbage.gguf", "another format", ".jsonl", ".parquet"),
]


def other_tokenizer():
    tokenizer = material.tokenizer()
    tokenizer.add_tokens(["another", *(f"another{number}" for number in range(20))])
    return tokenizer  # too many tokens for a version of the same


OTHER = Lazy(other_tokenizer)


def endless():
    tokenizer = material.tokenizer()
    tokenizer.eos_token = None
    return tokenizer


READING = [
    Subject(
        "read_rows",
        read_rows,
        lambda: {"data": "rows.jsonl", "split": "train"},
        [
            *OF_DATA,
            fault("data", "a number", 3, "list of rows", "3"),
            fault("data", "nothing", None, "list of rows", "None"),
            fault("data", "no rows", [], "no rows"),
            fault("data", "strings", ["a"], "row 1", "'a'"),
            fault("data", "a row of nothing", [{"text": "a"}, {}], "row 2", "columns"),
        ],
    ),
    Subject(
        "read_rows",
        read_rows,
        lambda: {"data": {"train": [{"text": "a"}]}, "split": "train"},
        [fault("split", "another", "test", "'test'", "'train'")],
    ),
    Subject(
        "tokenize",
        tokenize,
        lambda: {"rows": [{"text": "def"}], "tokenizer": material.tokenizer(), "max_length": 8},
        [
            fault("rows", "none", [], "no rows", named="data"),
            fault("rows", "numbers", [3], "got 3", named="row 1"),
            fault("rows", "other columns", [{"a": "b"}], "'a'", named="row 1"),
            fault("rows", "a prompt alone", [{"prompt": "a"}], "lmbda=1", named="row 1"),
            fault(
                "rows",
                "a chat without template",
                [{"messages": [{"role": "user", "content": "a"}]}],
                "chat template",
                "tokenizer",
            ),
            fault("rows", "nothing to predict", [{"text": ""}], "no trained tokens", named="data"),
            fault("max_length", "one", 1, "at least 2", "1"),
            fault("max_length", "a fraction", 8.0, "integer", "8.0"),
            fault("max_length", "a truth value", True, "integer", "True"),
            fault("tokenizer", "without an end", Lazy(endless), "eos_token"),
        ],
    ),
    Subject(
        "prompts_of",
        prompts_of,
        lambda: {"rows": [{"text": "def a b c"}], "tokenizer": material.tokenizer(), "count": 1},
        [
            fault("rows", "none", [], "no rows", named="data"),
            fault("rows", "too short", [{"text": "x"}], "2 tokens", named="data"),
            fault("count", "zero", 0, "at least 1", "0"),
            fault("count", "a truth value", True, "at least 1", "True"),
            fault("prompt_tokens", "zero", 0, "at least 1", "0"),
            fault("reply_tokens", "zero", 0, "at least 1", "0"),
        ],
    ),
]


def of_models(argument):
    """Names of models and tokenizers that lead nowhere."""
    return [
        fault(argument, "no folder", "missing", "missing", "safetensors", named="model"),
        fault(argument, "an empty folder", "nothing", "nothing", named="model"),
        fault(argument, "no GGUF file", "missing.gguf", "no file missing.gguf", named="model"),
        fault(argument, "a package not there", "package:unheard-of", "unheard-of", named="model"),
        fault(argument, "a package without one", "package:json", "package:json", named="model"),
        fault(argument, "a package of no name", "package:", "package:", named="model"),
        fault(argument, "a torn configuration", "torn-config", "torn-config", named="model"),
    ]


MODELS = [
    Subject(
        "load_model",
        load_model,
        lambda: {"name": "student", "drop_layers": None},
        [
            *of_models("name"),
            fault("name", "a garbled GGUF file", "garbage.gguf", "garbage.gguf", named="model"),
            fault("name", "torn weights", "torn-weights", "torn-weights", named="model"),
            fault("name", "a file of text", "text.txt", "text.txt", named="model"),
            fault("name", "nothing", None, "None"),
            fault("dtype", "unknown", "float7", "'float7'"),
        ],
    ),
    Subject(
        "load_model",
        load_model,
        lambda: {"name": "teacher", "drop_layers": "1"},
        [
            fault("drop_layers", "beyond the last", "2", "between 0 and 1", "'2'"),
            fault("drop_layers", "all of them", "0-1", "leave a layer"),
        ],
    ),
    Subject(
        "load_tokenizer",
        load_tokenizer,
        lambda: {"name": "student"},
        [
            fault("name", "no folder", "missing", "missing", "tokenizer", named="model"),
            fault("name", "an empty folder", "nothing", "nothing", named="model"),
            fault("name", "no GGUF file", "missing.gguf", "no file", named="model"),
            fault("name", "a garbled GGUF file", "garbage.gguf", "garbage.gguf", named="model"),
        ],
    ),
    Subject(
        "parse_layers",
        parse_layers,
        lambda: {"layers": "3,5,7-9", "total": 12},
        [
            fault("layers", kind, text, *says, named="drop_layers")
            for kind, text, *says in [
                ("empty", "", "''"),
                ("words", "middle", "'middle'", "13-18"),
                ("negative", "-1", "'-1'"),
                ("a fraction", "1.5", "'1.5'"),
                ("an open range", "3-", "'3-'"),
                ("falling", "9-7", "from low to high", "'9-7'"),
                ("beyond the last", "11,12", "between 0 and 11", "'12'"),
                ("a layer twice", "3,2-4", "layer 3 twice"),
                ("all of them", "0-11", "leave a layer"),
                ("a comma too many", "3,,4", "'3,,4'"),
            ]
        ],
    ),
    Subject(
        "without_layers",
        without_layers,
        lambda: {"model": material.model(2, 8, seed=0), "layers": "0"},
        [fault("layers", "beyond the last", "2", "between 0 and 1", named="drop_layers")],
    ),
    Subject(
        "read_head",
        read_head,
        lambda: {"model": material.model(1, 8, seed=0)},
        [
            fault("model", "a name", "student", "model", "str"),
            fault("model", "a layer", torch.nn.Linear(2, 2), "Linear"),
        ],
    ),
    Subject(
        "common_vocabulary",
        common_vocabulary,
        lambda: {
            "teacher": 300,
            "student": 310,
            "teacher_tokenizer": material.tokenizer(),
            "student_tokenizer": material.tokenizer(),
        },
        [
            fault("teacher", "fewer than the tokens", 7, "7", "300"),
            fault("student", "fewer than the tokens", 7, "7", "300"),
            fault("teacher_tokenizer", "another", OTHER, named="tokenizer"),
        ],
    ),
    Subject(
        "shifted",
        shifted,
        lambda: {"inputs": {"labels": torch.zeros(1, 2).long(), "input_ids": torch.zeros(1, 2)}},
        [fault("inputs", "no labels", {"input_ids": torch.zeros(1, 2)}, "labels", named="batch")],
    ),
]


SUBJECTS = [*READING, *MODELS]
