"""Measures of generated text, one value per sample: their mean has an error (rkl.stats.mean).

Text is cut by :func:`words`; whoever prefers another cut passes lists of tokens instead.
"""

import bisect
import functools
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rkl.checks import integer

Sample = str | Sequence[Hashable]

_ASCII_WORD = re.compile(r"[^\W_]+")
_JOINERS = "\u200c\u200d"  # zero-width: they shape the letters of one word, in Persian or Sinhala
# Blocks of scripts without spaces between words: line-breaking classes ID, CJ and SA of Unicode's
# annex 14, without Hangul, which has spaces, and with Balinese and Javanese, which have none.
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\U000116d0-\U000116ff"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf\U00011700-\U0001174f"  # Tai, Ahom
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u2e80-\u312f\u3190-\u31ff\uff66-\uff9f"  # kana, bopomofo, iteration marks
    "\u3400-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff"  # Han, Yi
    "\U00016fe0-\U0001b2ff"  # Tangut, Khitan, Nüshu, rare kana
)
_ALMOST_NONE = 0.1  # matches credited to an order of n-grams that has none, as NLTK's method 1


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, in lower case; what is between them is dropped.

    Accents and vowel signs belong to the letter before them, and an accent may be written apart
    from its letter or as one character with it (Unicode's form C is taken). Scripts without
    spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) give one token for each
    letter. On ASCII text this is the cut of the rouge_score package without its stemmer.

    >>> words("It's 3 o'clock: naïve_ÉTÉ!")
    ['it', 's', '3', 'o', 'clock', 'naïve', 'été']
    >>> words("नमस्ते दुनिया"), words("2024年、東京")
    (['नमस्ते', 'दुनिया'], ['2024', '年', '東', '京'])
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string; got {text!r:.60}.")
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _word_pattern().findall(unicodedata.normalize("NFC", text.lower()))


def rouge_l(
    candidates: Sequence[Sample], references: Sequence[Sample]
) -> Float[Tensor, " samples"]:
    r"""ROUGE-L: how much of the reference a candidate retells in order, and little else.

        F1 = 2 PR/(P + R),    P = LCS/|candidate|,    R = LCS/|reference|

    LCS is the length of the longest common subsequence of tokens. 1 for equal texts, 0 where
    nothing is shared or either is empty.

    Source: Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1,
    at β = 1.

    Args:
        candidates: The generated texts.
        references: What each of them should have said.

    Returns:
        One value in [0, 1] per sample.

    >>> rouge_l(["the cat sat"], ["the dog sat down"])
    tensor([0.5714], dtype=torch.float64)
    """
    written, wanted = _tokens_of(candidates, "candidates"), _tokens_of(references, "references")
    if len(written) != len(wanted):
        raise ValueError(f"{len(written)} candidates but {len(wanted)} references.")
    pairs = zip(written, wanted, strict=True)
    return _double([2 * _common(a, b) / max(len(a) + len(b), 1) for a, b in pairs])


def distinct_n(samples: Sequence[Sample], n: int = 2) -> Float[Tensor, " samples"]:
    """Distinct-n within each sample: how many of its n-grams are different ones.

    1 where nothing is said twice; low where a model loops. A sample of fewer than n tokens has
    no n-gram and nothing to repeat: nan. For repetition across samples, see
    :func:`distinct_n_together`.

    Source: Li et al. (2016), arXiv 1510.03055, section 5.3, sample by sample.

    Args:
        samples: The generated texts.
        n: Length of the n-grams in tokens, at least 1.

    Returns:
        One value in (0, 1] per sample, or nan.

    >>> distinct_n(["no no no yes"], n=1)
    tensor([0.5000], dtype=torch.float64)
    """
    integer("n", n, at_least=1)
    grams = [_grams(tokens, n) for tokens in _tokens_of(samples, "samples")]
    return _double([len(x) / x.total() if x else math.nan for x in grams])


def distinct_n_together(samples: Sequence[Sample], n: int = 2) -> float:
    """Distinct-n of all samples taken together: different n-grams over all n-grams.

    It falls as samples are added; compare only sets of equal size. Its error comes from
    several sets, one per seed. nan where no sample has n tokens.

    Source: Li et al. (2016), arXiv 1510.03055, section 5.3.

    >>> distinct_n_together(["yes", "yes", "no", "no"], n=1)
    0.5
    """
    integer("n", n, at_least=1)
    together = Counter[tuple[Hashable, ...]]()
    for tokens in _tokens_of(samples, "samples"):
        together.update(_grams(tokens, n))
    return len(together) / together.total() if together else math.nan


def self_bleu(samples: Sequence[Sample], n: int = 4) -> Float[Tensor, " samples"]:
    r"""Self-BLEU: the BLEU of each sample against all the others; high where they are alike.

        BLEU = min(1, e^(1 − r/c)) (Π pₖ)^(1/n),    k = 1 … n

    pₖ is the share of its k-grams that some other sample has as often, c its length and r the
    length of the other nearest to it (the shorter one of two). Smoothing: an order without a
    match counts 0.1 matches, and one without k-grams has one (NLTK's method 1); but a sample
    that shares no token at all has BLEU 0. All samples take one pass over their n-grams.

    Source: Zhu et al. (2018), arXiv 1802.01886, section 2.3; Papineni et al. (2002) for BLEU;
    Chen & Cherry (2014) for the smoothing.

    Args:
        samples: The generated texts, two at least.
        n: Longest n-grams, in tokens.

    Returns:
        One value in [0, 1] per sample. They are not independent; their mean over one seed is
        one observation, and its error comes from several seeds.

    >>> self_bleu(["a b c d", "a b c d", "x y z w"]).round(decimals=6)
    tensor([1., 1., 0.], dtype=torch.float64)
    """
    cut = _tokens_of(samples, "samples")
    if len(cut) < 2:
        raise ValueError(f"samples must be two at least, to be compared; got {len(cut)}.")
    integer("n", n, at_least=1)
    precision = [_shared_counts(cut, order) for order in range(1, n + 1)]
    lengths = sorted(map(len, cut))
    return _double(
        [
            _bleu(len(tokens), _nearest(lengths, len(tokens)), [x[i] for x in precision])
            for i, tokens in enumerate(cut)
        ]
    )


def length(samples: Sequence[Sample]) -> Float[Tensor, " samples"]:
    """Length of each sample, in tokens.

    >>> length(["one two three", ""])
    tensor([3., 0.], dtype=torch.float64)
    """
    return _double([len(tokens) for tokens in _tokens_of(samples, "samples")])


def _tokens_of(samples: Sequence[Sample], name: str) -> list[Sequence[Hashable]]:
    if isinstance(samples, str):
        raise TypeError(f"{name} must be a list of texts; got one text, {samples[:40]!r}.")
    if not isinstance(samples, Sequence):
        raise TypeError(f"{name} must be a list of texts; got a {type(samples).__name__}.")
    for number, sample in enumerate(samples):
        if not isinstance(sample, Sequence):
            got = type(sample).__name__
            raise TypeError(f"{name}[{number}] must be a text or a list of tokens; got a {got}.")
    return [words(sample) if isinstance(sample, str) else sample for sample in samples]


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """One letter of an unspaced script, or a run of others and of digits; each with its marks."""
    characters = map(chr, range(sys.maxunicode + 1))
    marks = "".join(it for it in characters if unicodedata.category(it).startswith("M"))
    with_marks = f"[{marks}{_JOINERS}]*"
    alone, joined = rf"(?=[^\W\d_])[{_UNSPACED}]", rf"(?:[^\W_{_UNSPACED}]|\d)+"
    return re.compile(rf"{alone}{with_marks}|(?:{joined}{with_marks})+")


def _double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a row of the usual table being bits of one int.

    A zero bit is a place where the row steps up. Source: Hyyrö (2004), "Bit-parallel LCS-length
    computation revisited".
    """
    places: dict[Hashable, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for token in b:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(a) - row.bit_count()


def _grams(tokens: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _shared_counts(cut: list[Sequence[Hashable]], n: int) -> list[tuple[int, int]]:
    """For each sample: its n-grams that another sample has as often, and all its n-grams."""
    grams = [_grams(tokens, n) for tokens in cut]
    most: dict[tuple, tuple[int, int]] = {}  # the two largest counts, each in one sample
    for counts in grams:
        for gram, count in counts.items():
            first, second = most.get(gram, (0, 0))
            most[gram] = (max(first, count), max(second, min(first, count)))

    def elsewhere(gram, count):
        first, second = most[gram]
        return second if count == first else first

    return [
        (sum(min(k, elsewhere(gram, k)) for gram, k in counts.items()), counts.total())
        for counts in grams
    ]


def _nearest(lengths: list[int], length: int) -> int:
    """The length of the others that is nearest to this one, which is among them; ties: shorter."""
    i = bisect.bisect_left(lengths, length)
    return min(
        lengths[max(i - 1, 0) : i] + lengths[i + 1 : i + 2], key=lambda x: (abs(x - length), x)
    )


def _bleu(length: int, nearest: int, precision: list[tuple[int, int]]) -> float:
    if not precision[0][0]:
        return 0.0
    logs = [math.log((hits or _ALMOST_NONE) / max(total, 1)) for hits, total in precision]
    return math.exp(min(0.0, 1 - nearest / length) + math.fsum(logs) / len(logs))
