import itertools
import math
import random
import re
import sys
import unicodedata
from collections import Counter

import pytest
import torch

from rkl.metrics.text import (
    distinct_n,
    distinct_n_together,
    length,
    rouge_l,
    self_bleu,
    words,
)


def sentences(seed, count=12, letters="abcd", longest=14):
    draw = random.Random(seed)
    return [" ".join(draw.choices(letters, k=draw.randrange(longest))) for _ in range(count)]


def longest_common(a, b):
    """By the usual table, row by row."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(row[j], before[j + 1]))
    return row[-1]


def bleu(candidate, references, n):
    """Sentence BLEU as its definition has it, smoothed by NLTK's method 1."""
    logs = []
    for order in range(1, n + 1):
        grams = [tuple(candidate[i : i + order]) for i in range(len(candidate) - order + 1)]
        hits = sum(
            min(
                count,
                max(
                    sum(tuple(other[i : i + order]) == gram for i in range(len(other) - order + 1))
                    for other in references
                ),
            )
            for gram, count in Counter(grams).items()
        )
        if order == 1 and hits == 0:
            return 0.0
        logs.append(math.log((hits if hits else 0.1) / max(len(grams), 1)))
    nearest = min((abs(len(it) - len(candidate)), len(it)) for it in references)[1]
    penalty = 1.0 if len(candidate) > nearest else math.exp(1 - nearest / len(candidate))
    return penalty * math.exp(sum(logs) / n)


def test_words_are_runs_of_letters_and_digits_in_any_script():
    assert words("Don't STOP-ping 42%, 日本 ok_no") == [
        *("don", "t", "stop", "ping", "42", "日", "本", "ok", "no")
    ]


# How the names of such letters begin, in the Unicode data of Python; the code reads no names.
UNSPACED = re.compile(
    "CJK |HANGZHOU |IDEOGRAPHIC (?!TALLY)|VERTICAL (IDEOGRAPHIC|KANA) |OLD CHINESE |MASU MARK"
    "|(HALFWIDTH )?(KATAKANA|HIRAGANA)[ -]|HENTAIGANA |BOPOMOFO |YI |TANGUT |KHITAN |NUSHU "
    "|THAI |LAO |KHMER |MYANMAR |(NEW )?TAI (LE|LUE|THAM|VIET) |AHOM |BALINESE |JAVANESE "
)


def test_each_letter_of_a_script_without_spaces_is_a_token():
    every = map(chr, range(128, sys.maxunicode + 1))
    letters = [it for it in every if it.isalnum() and unicodedata.name(it, "")]
    alone = {it for it in letters if UNSPACED.match(unicodedata.name(it)) and not it.isdecimal()}
    cut = words(" ".join(f"a{letter}b" for letter in letters))
    together = [it for it in letters if it not in alone]
    assert len(cut) == 3 * len(alone) + len(together)
    assert [it[1:-1] for it in cut if len(it) > 2] == [
        unicodedata.normalize("NFC", it.lower()) for it in together
    ]


def test_marks_belong_to_the_letter_before_them():
    marks = [
        it
        for it in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(it).startswith("M")
    ]
    assert len(words(" ".join(f"x{mark}y" for mark in marks))) == len(marks)
    assert words("".join(marks)) == []
    assert words("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]
    assert words("สวัสดี ๒๕๖๗") == ["ส", "วั", "ส", "ดี", "๒๕๖๗"]
    assert words("می\u200cخواهم") == ["می\u200cخواهم"]


def test_a_letter_with_its_accent_is_one_word_however_it_is_written():
    for text in ("résumé", "İstanbul", "が ガ", "한국어", "Việt Nam", "क़लम"):
        assert words(unicodedata.normalize("NFD", text)) == words(text)
    assert words(unicodedata.normalize("NFD", "résumé")) == ["résumé"]


def test_chinese_is_measured_by_its_characters():
    alike = "今天天气很好，我们去公园散步。", "今天天气很好，我们去公园玩吧。"
    assert rouge_l([alike[0]], [alike[1]]).item() == pytest.approx(11 / 13)
    assert distinct_n(["哈" * 10, "好的" * 5], 1).tolist() == pytest.approx([0.1, 0.2])
    assert distinct_n(["好的" * 5], 2).item() == pytest.approx(2 / 9)
    assert length([alike[0]]).item() == 13
    by_character = [list(it) for it in ("我喜欢你", "我喜欢他们")]
    assert torch.equal(self_bleu(["我喜欢你。", "我喜欢他们！"]), self_bleu(by_character))


@pytest.mark.parametrize("seed", range(5))
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(seed):
    candidates, references = sentences(seed), sentences(seed + 100)
    expected = []
    for a, b in zip(map(str.split, candidates), map(str.split, references), strict=True):
        common = longest_common(a, b)
        precision, recall = (common / len(x) if x else 0.0 for x in (a, b))
        total = precision + recall
        expected.append(2 * precision * recall / total if total else 0.0)
    value = rouge_l(candidates, references)
    assert value.tolist() == pytest.approx(expected, rel=1e-12)


def test_rouge_l_reads_texts_beyond_the_width_of_a_machine_word():
    a = [str(i) for i in range(200)]
    b = [str(i) for i in range(0, 400, 2)]
    assert rouge_l([a], [b]).item() == pytest.approx(2 * 100 / 400)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_self_bleu_is_the_bleu_of_each_sample_against_all_others(seed, n):
    samples = sentences(seed)
    cut = [sample.split() for sample in samples]
    expected = [bleu(it, cut[:i] + cut[i + 1 :], n) if it else 0.0 for i, it in enumerate(cut)]
    assert self_bleu(samples, n).tolist() == pytest.approx(expected, rel=1e-12)
    assert 0 < sum(expected) < len(expected)


def test_self_bleu_needs_something_to_compare_with():
    with pytest.raises(ValueError, match="samples must be two at least, .* got 1"):
        self_bleu(["a b"])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_counts_different_n_grams_within_and_across_samples(n):
    samples = sentences(3)
    grams = [
        [tuple(cut[i : i + n]) for i in range(len(cut) - n + 1)] for cut in map(str.split, samples)
    ]
    within = [len(set(it)) / len(it) if it else math.nan for it in grams]
    together = list(itertools.chain(*grams))
    assert distinct_n(samples, n).tolist() == pytest.approx(within, nan_ok=True)
    assert distinct_n_together(samples, n) == pytest.approx(len(set(together)) / len(together))


def test_samples_without_n_grams_have_no_distinct_n():
    assert distinct_n(["a"], 2).isnan().item()
    assert math.isnan(distinct_n_together(["a", ""], 2))


@pytest.mark.parametrize("n", [0, -1])
def test_an_order_of_n_grams_is_a_positive_integer(n):
    for measure in (distinct_n, distinct_n_together, self_bleu):
        with pytest.raises(
            (TypeError, ValueError), match="n must be (an integer of )?at least 1; got"
        ):
            measure(["a b", "a c"], n)


def test_one_text_in_place_of_a_list_is_refused():
    for measure in (length, distinct_n, self_bleu):
        with pytest.raises(TypeError, match="samples must be a list of texts; got one text"):
            measure("a b c")
    with pytest.raises(ValueError, match="2 candidates but 1 references"):
        rouge_l(["a", "b"], ["a"])


def test_lists_of_tokens_are_taken_as_they_are():
    tokens = [[1, 2, 2], [3]]
    assert length(tokens).tolist() == [3, 1]
    assert rouge_l(tokens, [[1, 2], [4]]).tolist() == pytest.approx([0.8, 0.0])
    assert distinct_n([["A", "a"]], 1).item() == 1
