"""DistillKit's captures: packed here from what its source does, unpacked by rkl, or refused."""

import math
from typing import Any

import material
import numpy as np
import pytest
import torch
import yaml

from rkl.distill import PublishedTeacher
from rkl.distill.teachers.captures import (
    Compression,
    log_probabilities,
    places_of,
    read_compression,
    unpack,
)
from rkl.distill.text.batches import PadRows, shifted

VOCAB, K = material.VOCAB, 12


def bits_of(numbers, bits):
    """The bytes of whole numbers, the highest bit first, padded with zeros at the end."""
    text = "".join(format(int(it), f"0{bits}b") for it in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


def bytes_of(values, dtype):
    if dtype == "bfloat16":  # the upper half of single precision, rounded to the nearest
        return torch.tensor(values).bfloat16().view(torch.uint8).tolist()
    return list(np.asarray(values, dtype=dtype).tobytes())


def packed(values, how):
    """The bytes of falling log-probabilities, one place."""
    values = np.asarray(values, dtype=np.float64)
    if how.get("delta_encoding", True):
        values = np.diff(values, prepend=0.0)
    exact, rest = values[: how["exact_k"]], values[how["exact_k"] :]
    out = bytes_of(exact, how.get("exact_dtype", "float32"))
    if terms := how.get("polynomial_terms"):
        t = np.arange(len(rest), dtype=np.float64)
        if how.get("normalize_t"):
            t = t / (len(rest) - 1)
        functions = {"sqrt": np.sqrt, "exp": np.exp}
        basis = np.stack([functions[it](t) if it in functions else t**it for it in terms], -1)
        fitted = np.linalg.lstsq(basis, rest, rcond=None)[0]
        out += bytes_of(fitted, how.get("term_dtype", "float32"))
        rest = rest - basis @ fitted
    for one in how.get("residual_bins", []):
        some, rest = rest[: one["num_elements"]], rest[one["num_elements"] :]
        bits = one["element_bits"]
        scale = np.abs(some).max() / (1 if bits == 1 else 2 ** (bits - 1))
        scale_bytes = bytes_of([scale], one["scale_dtype"])
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        out += scale_bytes + bits_of(np.clip(np.round(some / scale), low, high) - low, bits)
    return out


def falling(places=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(places, VOCAB, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1).topk(K)


EXACT = {"d": VOCAB, "k": K, "exact_k": K, "delta_encoding": False}
ONE = {"scale_dtype": "float16", "element_bits": 4, "num_elements": 1}
FORMS = {
    "exact": (EXACT, 1e-6),
    "differences": (EXACT | {"delta_encoding": True}, 1e-5),
    "half": (EXACT | {"exact_dtype": "bfloat16"}, 0.03),  # 2⁻⁸ of 8 nats
    "all powers": (EXACT | {"exact_k": 8, "polynomial_terms": [0, 1, 2, 3]}, 1e-4),
    "roots": (
        EXACT | {"exact_k": 9, "polynomial_terms": [0, "sqrt", 1], "normalize_t": True},
        1e-4,
    ),
    "exponentials": (EXACT | {"exact_k": 10, "polynomial_terms": [0, "exp"]}, 1e-4),
    "remainders": (
        EXACT
        | {
            "exact_k": 2,
            "polynomial_terms": [0, 1],
            "residual_bins": [
                {"scale_dtype": "float32", "element_bits": 11, "num_elements": 7},
                {"scale_dtype": "float16", "element_bits": 9, "num_elements": 3},
            ],
        },
        0.02,  # half a step of 2⁻⁸ of at most 2 nats, and the step that clipping takes
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_log_probabilities_are_what_was_packed(form):
    how, tolerance = FORMS[form]
    values, _ = falling()
    rows = torch.tensor([packed(it, how) for it in values.tolist()], dtype=torch.uint8)
    compression = read_compression(how)
    assert rows.shape[1] == compression.logprob_bytes
    torch.testing.assert_close(
        log_probabilities(rows, compression).double(), values, atol=tolerance, rtol=0
    )


def test_one_bit_is_the_sign_of_a_remainder():
    how = EXACT | {"exact_k": 10}
    how["residual_bins"] = [{"scale_dtype": "float32", "element_bits": 1, "num_elements": 2}]
    row = bytes_of([-1.0] * 10, "float32") + bytes_of([3.0], "float32") + [0b10000000]
    (logp,) = log_probabilities(torch.tensor([row], dtype=torch.uint8), read_compression(how))
    assert logp.tolist() == [-1.0] * 10 + [3.0, -3.0]


@pytest.mark.parametrize("bits", [1, 7, 8, 17, 31, 62])
def test_numbers_of_any_width_are_unpacked(bits):
    numbers = [0, 1, 2**bits - 1, 2**bits // 3, 5 % 2**bits]
    found = unpack(torch.tensor([bits_of(numbers, bits)], dtype=torch.uint8), bits, len(numbers))
    assert found.tolist() == [numbers]


@pytest.fixture(scope="module")
def capture():
    """A teacher, rows and its captures: a place says what follows its token."""
    teacher: Any = material.model(2, 16, seed=1).eval()
    torch.manual_seed(5)
    start = torch.randint(1, VOCAB, (2, 2))
    rows = teacher.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=K,
        min_new_tokens=7,
        max_new_tokens=7,
    )
    with torch.no_grad():
        values, index = teacher(rows).logits.log_softmax(-1).topk(K)
    bits = read_compression(EXACT).index_bits
    made = [
        {
            "input_ids": row.tolist(),
            "compressed_logprobs": [packed(it, EXACT) for it in some[:-1].tolist()],
            "bytepacked_indices": [bits_of(it, bits) for it in tokens[:-1].tolist()],
        }
        for row, some, tokens in zip(rows, values, index, strict=True)
    ]
    return rows, values, index, made


def check(known, capture):
    rows, values, index, _ = capture
    batch = shifted(PadRows()([{"input_ids": it.tolist(), "labels": it.tolist()} for it in rows]))
    top = known.observe(batch.inputs, batch.predicting)
    torch.testing.assert_close(top.logp, values[:, :-1].flatten(0, 1), atol=1e-6, rtol=0)
    assert torch.equal(top.index, index[:, :-1].flatten(0, 1))


def test_a_capture_is_a_teacher_at_its_rows(capture, tmp_path):
    file = tmp_path / "compression_config.yaml"
    file.write_text(yaml.safe_dump(EXACT), encoding="utf-8")
    check(PublishedTeacher(capture[3], vocab=VOCAB, compression=file), capture)


def test_texts_that_were_packed_into_one_row_are_read_apart(capture):
    """As DistillKit packs them: cut to what is captured, one behind the other, and counted."""
    parts = [
        {name: values[: len(row["compressed_logprobs"])] for name, values in row.items()}
        for row in capture[3]
    ]
    one = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    one["attention_mask"] = [1] * len(parts[0]["input_ids"]) + [2] * len(parts[1]["input_ids"])
    known = PublishedTeacher([one], vocab=VOCAB, compression=EXACT)
    whole = PublishedTeacher(parts, vocab=VOCAB, compression=EXACT)
    assert known.rows == whole.rows
    assert [row["input_ids"] for row in known.rows] == [row["input_ids"] for row in parts]


def test_an_approximation_with_too_much_mass_is_divided_by_it():
    values = torch.full((1, K), math.log(1.05 / K))
    row = {
        "compressed_logprobs": [packed(values[0].tolist(), EXACT)],
        "bytepacked_indices": [bits_of(range(K), read_compression(EXACT).index_bits)],
    }
    (atoms,) = places_of(row, read_compression(EXACT), "row 0")
    assert sum(map(math.exp, atoms.values())) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"packed_indices": []}, "row 0 is a capture of legacy_logit_compression"),
        ({"bytepacked_indices": None}, "row 0 has no column 'bytepacked_indices'"),
        ({"compressed_logprobs": [[1, 2]]}, "has 2 bytes at a place; expected 48 with these"),
        ({"bytepacked_indices": []}, "8 places of log-probabilities and 0 of tokens"),
        ({"compressed_logprobs": [packed([0.5] * K, EXACT)] * 8}, "masses at place 0 sum to 19.8"),
    ],
)
def test_a_capture_that_does_not_fit_is_refused(change, named, capture):
    with pytest.raises(ValueError, match=named):
        PublishedTeacher([capture[3][0] | change], vocab=VOCAB, compression=EXACT)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"d": 5}, "compression must have 'k'"),
        (EXACT | {"bins": 3}, "compression has no entry 'bins'"),
        (EXACT | {"exact_k": 13}, "exact_k must be at most 12"),
        (EXACT | {"exact_dtype": "int8"}, "exact_dtype must be one of float16"),
        (EXACT | {"polynomial_terms": ["cube"]}, "powers, sqrt or exp; got 'cube'"),
        (
            EXACT | {"residual_bins": [ONE]},
            "residual_bins must hold at most k - exact_k = 0",
        ),
    ],
)
def test_settings_that_are_none_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        read_compression(settings)


def test_settings_are_taken_as_they_are():
    assert read_compression(Compression(**EXACT)) == read_compression(EXACT)
