"""Texts in the tokens of two tokenizers, and the bytes at which both divide them."""

import json
import random

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from rkl.distill import new_tokenizer
from rkl.distill.text.alignment import TokenTable, Translation

SAMPLE = (
    "The cat sat on the mat; the naïve cafés 日本語 and 🙂🏽 don't  sit.\n\n\tdef f(x): return"
)
CHARACTERS = "abc  theéñ日本🙂🏽\n\t.,'‑"


def random_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    lengths = (draw.randint(1, 40) for _ in range(count))
    return ["".join(draw.choice(CHARACTERS) for _ in range(it)) for it in lengths]


def sentencepiece(size: int, *, dummy: bool, begin: bool = False) -> PreTrainedTokenizerFast:
    """A BPE of sentencepiece's form: a mark for spaces, bytes for what it does not know."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    bpe.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if dummy else replace
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if dummy else parts)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 256, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    bpe.train_from_iterator([SAMPLE.replace("日本語", "").replace("🙂🏽", "")], trainer)
    described = json.loads(bpe.to_str())
    words = described["model"]["vocab"]
    words |= {f"<0x{it:02X}>": len(words) + it for it in range(256)}
    described["model"] |= {"byte_fallback": True, "fuse_unk": True}
    bpe = Tokenizer.from_str(json.dumps(described))
    if begin:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS = {
    "bytes-300": lambda: new_tokenizer([SAMPLE], 300),
    "bytes-400": lambda: new_tokenizer([SAMPLE * 2 + " the thecat catsat"], 400),
}


@pytest.fixture(scope="module", params=["large to small", "small to large"])
def pair(request):
    small, large = new_tokenizer([SAMPLE], 280), new_tokenizer([SAMPLE, "the hat the cat"], 420)
    return (large, small) if request.param == "large to small" else (small, large)


def boundaries(tokenizer, ids) -> list[int]:
    """The byte at which each token ends, told by decoding ever longer beginnings."""
    raw = [tokenizer.backend_tokenizer.id_to_token(it) for it in ids]
    table = {ord(c): b for b, c in _gpt2().items()}
    ends, total = [], 0
    for token in raw:
        total += len(bytes(table[ord(c)] for c in token))
        ends.append(total)
    return ends


def _gpt2() -> dict[int, str]:
    """The characters of bytes, derived from the tokenizers library itself, byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    direct = {ord(c): c for c in alphabet if ord(c) < 256}
    rest = [it for it in range(256) if it not in direct]
    shifted = [c for c in alphabet if ord(c) >= 256]
    return direct | dict(zip(rest, shifted, strict=True))


def test_bytes_of_tokens_are_those_of_the_text():
    for make in TOKENIZERS.values():
        tokenizer = make()
        table = TokenTable(tokenizer)
        for text in random_texts(50, 1):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert table.bytes_of(ids) == text.encode()


def test_spans_are_those_of_brute_force(pair):
    source, target = pair
    translation = Translation(TokenTable(source), TokenTable(target))
    for text in random_texts(60, 2):
        ids = source(text)["input_ids"]
        (reading,) = translation.read([ids])
        assert reading.tokens == target(text)["input_ids"]
        ours, theirs = boundaries(source, ids), boundaries(target, reading.tokens)
        common = [it for it in ours if it in theirs]
        expected, before = [], (0, 0)
        for end in common:
            here = ours.index(end) + 1, theirs.index(end) + 1
            expected.append(((before[0], here[0]), (before[1], here[1])))
            before = here
        assert [(it.source, it.target) for it in reading.spans] == expected
        for span in reading.spans:
            a, b = (slice(*it) for it in (span.source, span.target))
            spelt = translation.source.bytes_of(ids[a])
            assert translation.target.bytes_of(reading.tokens[b]) == spelt
            if span.atom >= 0:
                number = translation.source_atoms[span.atom]
                assert translation.source.spelling[number] == spelt


def test_atoms_are_the_tokens_of_both(pair):
    source, target = map(TokenTable, pair)
    translation = Translation(source, target)
    ours = {it for it in source.spelling if it}
    theirs = {it for it in target.spelling if it}
    pairs = zip(translation.source_atoms, translation.target_atoms, strict=True)
    spelt = [(source.spelling[a], target.spelling[b]) for a, b in pairs]
    assert {a for a, b in spelt if a is not None and a == b} == ours & theirs
    assert (None, None) in spelt  # the ends of a text, which mean the same


def test_unmatched_tokens_count_as_what_they_begin_with(pair):
    source, target = map(TokenTable, pair)
    translation = Translation(source, target)
    of_source, of_target = translation.columns(prefix=True)
    count = len(translation.source_atoms)
    for table, column in ((source, of_source), (target, of_target)):
        for number, spelling in enumerate(table.spelling):
            if spelling:
                atom = translation.source_atoms[column[number]]
                assert spelling.startswith(source.spelling[atom])
    kept, others = translation.columns(prefix=False)
    assert (kept < count).sum() == (others < count).sum() == count


@pytest.mark.parametrize("dummy", [False, True])
@pytest.mark.parametrize("begin", [False, True])
def test_sentencepiece_and_byte_level(dummy, begin):
    source = new_tokenizer([SAMPLE], 320)
    target = sentencepiece(360, dummy=dummy, begin=begin)
    table = TokenTable(target)
    translation = Translation(TokenTable(source), table)
    assert table.prefix == ([target.bos_token_id] if begin else [])
    for text in [SAMPLE, *random_texts(40, 3)]:
        ids = source(text)["input_ids"]
        (reading,) = translation.read([ids])
        assert reading.tokens == target(text)["input_ids"]
        shift = len(table.prefix)
        for span in reading.spans:
            assert span.target[0] >= shift
            spelt = translation.source.bytes_of(ids[slice(*span.source)])
            assert table.bytes_of(reading.tokens[slice(*span.target)]) == spelt
        last = reading.spans[-1] if reading.spans else None
        if "▁" not in text and not dummy:
            assert last is not None
            assert last.source[1] == len(ids)
            assert last.target[1] == len(reading.tokens)


def test_special_tokens_become_those_that_mean_the_same():
    source, target = new_tokenizer([SAMPLE], 300), sentencepiece(360, dummy=False)
    source.add_special_tokens({"additional_special_tokens": ["<odd>"]})
    translation = Translation(TokenTable(source), TokenTable(target))
    end, odd = source.eos_token_id, source.convert_tokens_to_ids("<odd>")
    words = source("the cat")["input_ids"]
    (reading,) = translation.read([[*words, odd, *words, end]])
    plain = target("the cat", add_special_tokens=False)["input_ids"]
    spelt = target("<odd>", add_special_tokens=False)["input_ids"]
    assert reading.tokens == [*plain, *spelt, *plain, target.eos_token_id]
    covered = {at for span in reading.spans for at in range(*span.source)}
    assert covered == {*range(2 * len(words) + 2)} - {len(words)}
    atom = reading.spans[-1].atom
    assert translation.target_atoms[atom] == target.eos_token_id


def test_text_that_spells_a_special_token_is_text():
    source, target = new_tokenizer(["a<|endoftext|>"], 300), new_tokenizer([SAMPLE], 400)
    table = TokenTable(source)
    ids = source("see <|endoftext|> here", split_special_tokens=True)["input_ids"]
    assert source.eos_token_id not in ids
    (reading,) = Translation(table, TokenTable(target)).read([ids])
    assert target.eos_token_id not in reading.tokens
    assert TokenTable(target).bytes_of(reading.tokens) == b"see <|endoftext|> here"


def test_half_a_character_is_not_read():
    source, target = new_tokenizer(["abc"], 257), new_tokenizer([SAMPLE], 400)
    ids = source("ab日cd")["input_ids"]
    translation = Translation(TokenTable(source), TokenTable(target))
    (whole,), (cut,) = translation.read([ids]), translation.read([ids[:3]])
    assert TokenTable(target).bytes_of(whole.tokens) == "ab日cd".encode()
    assert TokenTable(target).bytes_of(cut.tokens) == b"ab"
    (bad,) = translation.read([[*ids[:3], *ids[5:]]])
    assert TokenTable(target).bytes_of(bad.tokens) == b"ab"


def test_text_that_a_tokenizer_changes_is_aligned_as_far_as_it_is_the_same():
    source, target = new_tokenizer([SAMPLE], 300), new_tokenizer([SAMPLE], 400)
    target.backend_tokenizer.normalizer = normalizers.NFC()
    text = "the cat e\u0301 sat"
    ids = source(text)["input_ids"]
    translation = Translation(TokenTable(source), TokenTable(target))
    (reading,) = translation.read([ids])
    aligned = translation.source.bytes_of(ids[: reading.spans[-1].source[1]])
    assert b"the cat ".startswith(aligned) or aligned == b"the cat "
    assert reading.tokens == target(text)["input_ids"]


def test_a_continuation_has_no_space_of_its_own():
    source = new_tokenizer([SAMPLE], 300)
    for target in (sentencepiece(360, dummy=True), new_tokenizer([SAMPLE], 350)):
        table = TokenTable(target)
        translation = Translation(TokenTable(source), table)
        tokens = translation.continuation(source("cat sat")["input_ids"])
        assert table.bytes_of(tokens) == b"cat sat"


def test_a_tokenizer_of_unknown_bytes_is_refused():
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(ValueError, match="tokenizer must be byte-level.*WordPiece"):
        TokenTable(tokenizer)
