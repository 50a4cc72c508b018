"""Long texts are encoded in pieces; the tokens are those of the whole text in one call."""

import itertools
import warnings
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rkl.distill.text import data, encoding, token_cache
from rkl.distill.text.data import tokenize
from rkl.distill.text.encoding import batches, encode, encode_long

TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:20_000]
TEXT += "naïve café — 東京で新しい店が開いた。 \U0001f600\U0001f600 e\u0301 \t  \n" * 40


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return core, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )


def without_words():
    """As Llama 2 has it: merges may cross any space, and the text begins with one."""
    core = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return core, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], max_token_length=12
    )


def unigram():
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return core, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>"
    )


def made(kind):
    core, trainer = kind()
    trainer.show_progress = False
    core.train_from_iterator([TEXT[:4000]], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", [byte_level, without_words, unigram])
@pytest.mark.parametrize("piece", [700, 1999])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(kind, piece):
    tokenizer, told = made(kind), []
    for special in (True, False):
        whole = tokenizer(TEXT, add_special_tokens=special)["input_ids"]
        pieces = encode_long(
            tokenizer, TEXT, special=special, piece=piece, overlap=400, advance=told.append
        )
        assert list(pieces) == whole
    assert len(told) > 20
    assert abs(sum(told) - 2 * len(TEXT)) <= 800


@pytest.mark.parametrize("text", ["a" * 3000, " " * 3000, "-=" * 1500, "\n" * 3001, "xyz"])
def test_a_text_without_a_place_to_join_at_is_encoded_whole(text):
    for kind in (byte_level, without_words, unigram):
        tokenizer = made(kind)
        whole = tokenizer(text)["input_ids"]
        assert list(encode_long(tokenizer, text, piece=700, overlap=200)) == whole


def test_texts_are_given_to_the_tokenizer_in_batches_of_bounded_size(monkeypatch):
    monkeypatch.setattr(encoding, "MAX_BATCH_CHARACTERS", 900)
    monkeypatch.setattr(encoding, "MAX_BATCH_TEXTS", 3)
    texts = ["a b", "c", "", "d", TEXT, "e" * 500, "f" * 500, "g"]
    assert [len(it) for it in batches(texts)] == [3, 1, 1, 1, 2]
    tokenizer, done = made(byte_level), []
    monkeypatch.setattr(encoding, "OVERLAP", 400)
    encoded = list(encode(tokenizer, texts, advance=done.append))
    expected = [tokenizer(text)["input_ids"][:-1] for text in texts]
    assert [list(ids) for ids in encoded] == expected
    assert [*batches([])] == []


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of kept tokens, in which even small data are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "MANY_CHARACTERS", 1000)
    return tmp_path / "rkl" / "tokens"


@pytest.fixture
def calls(monkeypatch):
    """The texts that the tokenizer was given as rows."""
    given, encode = [], encoding.encode_without_places

    def noted(tokenizer, texts, *, special):
        given.extend(it for it in texts if it)
        return encode(tokenizer, texts, special=special)

    monkeypatch.setattr(encoding, "encode_without_places", noted)
    return given


def blocks_of(rows, tokenizer, **how):
    """The blocks, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return tokenize(rows, tokenizer, max_length=64, **how), [str(it.message) for it in caught]


ROWS = [{"text": part} for part in TEXT.split("\n\n") if part][:80] + [{"text": ""}]


def test_the_same_rows_are_tokenized_once_and_warned_of_each_time(kept, calls):
    tokenizer = made(byte_level)
    first, warned = blocks_of(ROWS, tokenizer)
    assert len(calls) == len(ROWS) - 1
    again, warned_again = blocks_of(list(ROWS), made(byte_level))
    assert len(calls) == len(ROWS) - 1
    assert warned_again == warned != []
    assert str(again) == str(first)
    for name in ("tokens", "trained", "bounds"):
        assert torch.equal(getattr(again, name), getattr(first, name))


def test_whatever_decides_over_the_tokens_decides_over_what_is_kept(kept, calls):
    tokenizer = made(byte_level)
    blocks_of(ROWS, tokenizer)
    changed = [
        lambda: blocks_of([*ROWS[:-2], {"text": "other"}], tokenizer),
        lambda: blocks_of(ROWS, tokenizer, packing=False),
        lambda: blocks_of(ROWS, made(unigram)),
        lambda: (tokenizer.add_tokens(["the"]), blocks_of(ROWS, tokenizer)),
        lambda: (setattr(tokenizer, "eos_token", "<s>"), blocks_of(ROWS, tokenizer)),
        lambda: (setattr(tokenizer, "split_special_tokens", True), blocks_of(ROWS, tokenizer)),
    ]
    for number, change in enumerate(changed, 2):
        change()
        assert len(list(kept.iterdir())) == number


@pytest.mark.parametrize("harm", ["torn", "flipped", "other"])
def test_damaged_tokens_are_made_anew(kept, harm):
    tokenizer = made(byte_level)
    first, _ = blocks_of(ROWS, tokenizer)
    (path,) = kept.iterdir()
    content = bytearray(path.read_bytes())
    if harm == "torn":
        del content[-10:]
    elif harm == "flipped":
        content[-10] ^= 4
    else:
        content = b"not safetensors"
    path.write_bytes(content)
    again, _ = blocks_of(ROWS, tokenizer)
    assert torch.equal(again.tokens, first.tokens)
    assert path.read_bytes() != bytes(content)


def test_what_was_not_used_for_longest_goes_first(kept, monkeypatch):
    tokenizer = made(byte_level)
    sizes = []
    for skipped in range(3):
        blocks_of(ROWS[skipped:], tokenizer)
        sizes.append({it.name: it.stat().st_size for it in kept.iterdir()})
    blocks_of(ROWS, tokenizer)  # the first again
    names = [list(after.keys() - before.keys()) for before, after in itertools.pairwise(sizes)]
    monkeypatch.setattr(token_cache, "MAX_SIZE", 2.5 * max(sizes[0].values()))
    blocks_of(ROWS[3:], tokenizer)
    assert len(list(kept.iterdir())) == 2
    assert (kept / next(iter(sizes[0]))).exists()
    assert not (kept / names[0][0]).exists()


def test_small_data_and_a_folder_that_cannot_be_written_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    blocks_of(ROWS, made(byte_level))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(data, "MANY_CHARACTERS", 1000)
    (tmp_path / "rkl").write_text("a file")
    assert blocks_of(ROWS, made(byte_level))[0].rows == len(ROWS)
