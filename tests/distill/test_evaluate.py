import copy
import inspect
import json
import math
import re
import shlex
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rkl import plots
from rkl.cli import main
from rkl.distill import evaluate as module
from rkl.distill.compare import Evaluations, compare_runs
from rkl.distill.evaluate import EvaluateSettings, evaluate, evaluate_run
from rkl.distill.limits import context_of
from rkl.distill.models.loading import load_model, load_tokenizer
from rkl.distill.text.data import IGNORED, passages, tokenize
from rkl.distill.text.sources import read_rows
from rkl.divergences import AKL, JensenShannon
from rkl.metrics.precision_recall import SLOPES
from rkl.runs import Run
from rkl.tables import pair_of

VOCAB = 40
WORDS = ["<eos>", *(f"w{i}" for i in range(VOCAB - 1))]


def model(seed, vocab=VOCAB, layers=1):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=64,
        n_embd=16,
        n_layer=layers,
        n_head=2,
        initializer_range=0.6,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def rows(seed, count=12):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=draw).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(VOCAB - 1, (n,), generator=draw)) for n in lengths
    ]


@pytest.fixture
def tokenizer():
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture
def blocks(tokenizer):
    """Blocks of different lengths, half of their tokens untrained here and there."""
    prompts = [{"prompt": text, "completion": f" {text} w1"} for text in rows(0)]
    return tokenize(prompts, tokenizer, max_length=48, packing=False)


def by_block(student, teacher, blocks):
    """log p, log q and the label of every trained token, block by block, in float64."""
    student, teacher = (copy.deepcopy(it).double() for it in (student, teacher))
    for block in blocks:
        ids, labels = block["input_ids"][None], block["labels"][1:]
        with torch.no_grad():
            logp, logq = (it(ids).logits[0, :-1].log_softmax(-1) for it in (teacher, student))
        kept = labels != IGNORED
        yield logp[kept], logq[kept], labels[kept]


def reference(values, counts):
    """The mean over tokens and its error, blocks being independent; from sums over each."""
    values, counts = (torch.tensor(it, dtype=torch.float64) for it in (values, counts))
    value = values.sum() / counts.sum()
    residual = values - value * counts
    blocks = len(counts)
    error = (blocks / (blocks - 1) * (residual**2).sum()).sqrt() / counts.sum()
    return {
        "value": pytest.approx(value.item(), rel=1e-4),
        "error": pytest.approx(error.item(), rel=1e-3),
    }


def of_tokens(per_token, student, teacher, blocks):
    """The reference of a quantity, given as a function of one token's log p, log q and label."""
    values, counts = [], []
    for triples in by_block(student, teacher, blocks):
        each = [float(per_token(*triple)) for triple in zip(*triples, strict=True)]
        values.append(math.fsum(each))
        counts.append(len(each))
    return reference(values, counts)


def part(result, *keys):
    for key in keys:
        result = result[key]
    return {name: result[name] for name in ("value", "error")}


def order_of(logp):
    return logp.argsort(descending=True, stable=True)


def head_of(logp):
    """The top token, and each whose inclusive cumulative mass is at most a half."""
    order = order_of(logp)
    inside = logp.exp()[order].cumsum(0) <= 0.5
    inside[0] = True
    return order[inside]


def nucleus_of(logp):
    order = order_of(logp)
    mass = logp.exp()[order].cumsum(0)
    return order[: int((mass < 0.9).sum()) + 1]


def kl(p, q):
    return p * (p / q).log() - p + q


EXCESS = {
    "forward-kl": kl,
    "reverse-kl": lambda p, q: kl(q, p),
    "js": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "tv": lambda p, q: (p - q).abs() / 2,
}


@pytest.fixture
def pair():
    return model(1), model(2)


@pytest.fixture
def result(pair, blocks):
    return evaluate(*pair, blocks, batch_size=5)


def test_each_divergence_is_its_sum_over_the_vocabulary_with_errors_by_block(pair, blocks, result):
    for name, excess in EXCESS.items():
        expected = of_tokens(lambda a, b, _, f=excess: f(a.exp(), b.exp()).sum(), *pair, blocks)
        assert part(result, "divergences", name) == expected
        assert result["divergences"][name]["infinite_tokens"] == 0


def test_head_and_tail_are_the_teachers_and_add_up(pair, blocks, result):
    for name, excess in EXCESS.items():
        found = result["divergences"][name]
        expected = of_tokens(
            lambda a, b, _, f=excess: f(a.exp(), b.exp())[head_of(a)].sum(), *pair, blocks
        )
        assert part(found, "head") == expected
        total = found["head"]["value"] + found["tail"]["value"]
        assert total == pytest.approx(found["value"], rel=1e-6)


def test_bins_of_ranks_hold_the_terms_of_the_teachers_order(pair, blocks, result):
    edges = [0, 1, 2, 4, 8, 16, 32, 40]
    assert result["ranks"]["edges"] == edges
    for i, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        expected = of_tokens(
            lambda a, b, _, i=start, j=stop: kl(a.exp(), b.exp())[order_of(a)[i:j]].sum(),
            *pair,
            blocks,
        )
        found = result["divergences"]["forward-kl"]["by_rank"]
        assert {key: found[key][i] for key in found} == expected
        mass = of_tokens(
            lambda a, b, _, i=start, j=stop: b.exp()[order_of(a)[i:j]].sum(), *pair, blocks
        )
        assert {key: values[i] for key, values in result["ranks"]["student"].items()} == mass


def test_ranks_beyond_those_told_apart_share_a_bin(pair, blocks, result, monkeypatch):
    monkeypatch.setattr(module, "RANKED", 4)
    coarse = evaluate(*pair, blocks)
    assert coarse["ranks"]["edges"] == [0, 1, 2, 4, 40]
    for name in EXCESS:
        fine, found = (it["divergences"][name]["by_rank"]["value"] for it in (result, coarse))
        assert found == pytest.approx([*fine[:3], sum(fine[3:])], rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "per_token"),
    [
        (("cross_entropy", "student"), lambda a, b, label: -b[label]),
        (("cross_entropy", "teacher"), lambda a, b, label: -a[label]),
        (("entropy", "teacher"), lambda a, b, label: -(a.exp() * a).sum()),
        (("entropy", "student"), lambda a, b, label: -(b.exp() * b).sum()),
        (("top1_agreement",), lambda a, b, label: a.argmax() == b.argmax()),
        (("mass_in_nucleus", "student"), lambda a, b, label: b.exp()[nucleus_of(a)].sum()),
        (("mass_in_nucleus", "teacher"), lambda a, b, label: a.exp()[nucleus_of(b)].sum()),
        (("mass_in_head", "teacher"), lambda a, b, label: a.exp()[head_of(a)].sum()),
        (("mass_in_head", "student"), lambda a, b, label: b.exp()[head_of(a)].sum()),
    ],
)
def test_each_mean_is_that_of_its_definition(pair, blocks, result, keys, per_token):
    assert part(result, *keys) == of_tokens(per_token, *pair, blocks)


def test_perplexity_is_the_exponential_of_the_cross_entropy_and_so_is_its_error(result):
    for side in ("teacher", "student"):
        entropy, found = (result[key][side] for key in ("cross_entropy", "perplexity"))
        assert found["value"] == pytest.approx(math.exp(entropy["value"]))
        assert found["error"] == pytest.approx(found["value"] * entropy["error"])


def test_the_precision_recall_curve_is_the_mean_of_those_of_the_tokens(pair, blocks, result):
    curve = result["precision_recall"]
    assert curve["slopes"] == list(SLOPES)
    for i in (0, 13, 16, 32):
        lam = SLOPES[i]
        expected = of_tokens(
            lambda a, b, _, lam=lam: torch.minimum(lam * a.exp(), b.exp()).sum(), *pair, blocks
        )
        assert {key: values[i] for key, values in curve["precision"].items()} == expected
        assert curve["recall"]["value"][i] == pytest.approx(curve["precision"]["value"][i] / lam)


def test_tokens_and_blocks_are_those_trained_on(blocks, result):
    assert result["tokens"] == blocks.trained_tokens
    assert result["blocks"] == len(blocks)


def flat(value):
    if isinstance(value, dict):
        return [number for inner in value.values() for number in flat(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in flat(inner)]
    return [value] if isinstance(value, int | float) else []


def test_neither_batches_nor_chunks_of_logits_change_a_figure(pair, blocks, result, monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS", 3 * VOCAB)
    calls = []
    again = evaluate(*pair, blocks, batch_size=1, progress=lambda *it: calls.append(it))
    assert flat(again) == pytest.approx(flat(result), rel=1e-4, abs=1e-6)
    assert calls == [(i + 1, len(blocks)) for i in range(len(blocks))]


def test_logits_exist_for_a_chunk_of_tokens_at_a_time(pair, blocks, monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS", 3 * VOCAB)
    sizes, whole = [], module.logits_of

    def watched(known):
        logits = whole(known)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(module, "logits_of", watched)
    evaluate(*pair, blocks)
    assert max(sizes) == 3 * VOCAB


def test_each_model_runs_once_over_each_batch_and_is_left_in_its_mode(pair, blocks):
    calls = []
    for it in pair:
        it.train()
        it.register_forward_hook(lambda *call: calls.append(call[0]))
    evaluate(*pair, blocks, batch_size=6, divergences={"akl": AKL(), "js": JensenShannon()})
    probes = 2  # one for the head of each, at set-up
    assert len(calls) == 2 * math.ceil(len(blocks) / 6) + probes
    assert all(it.training for it in pair)


def test_a_divergence_that_holds_coefficients_is_measured_with_them(pair, blocks):
    def akl(a, b, _):
        p, q = a.exp(), b.exp()
        gap = (p - q).abs()
        w = gap[head_of(a)].sum() / gap.sum()
        return w * kl(p, q).sum() + (1 - w) * kl(q, p).sum()

    found = evaluate(*pair, blocks, divergences={"mine": AKL(mu=0.5)})["divergences"]
    assert list(found) == ["mine"]
    assert part(found, "mine") == of_tokens(akl, *pair, blocks)
    assert found["mine"]["divergence"] == "AKL(mu=0.5, straddle='tail')"


def test_an_infinite_divergence_is_infinite_and_says_at_how_many_tokens(pair, blocks):
    class Masked(torch.nn.Linear):
        """An output embedding that rules out the last atom."""

        def forward(self, hidden):
            logits = super().forward(hidden)
            return logits.masked_fill(torch.arange(VOCAB) == VOCAB - 1, -math.inf)

    student, teacher = pair
    student.lm_head.__class__ = Masked
    with pytest.warns(UserWarning, match="full logits"):
        result = evaluate(student, teacher, blocks)
    table = {row[0]: row[1:] for row in Evaluations({"student": result}).rows()}
    assert table["  tokens where infinite"] == (None, blocks.trained_tokens)
    found = result["divergences"]
    assert found["forward-kl"]["value"] == math.inf
    assert math.isnan(found["forward-kl"]["error"])
    assert found["forward-kl"]["infinite_tokens"] == blocks.trained_tokens
    assert found["forward-kl"]["by_rank"]["value"].count(math.inf) >= 1
    assert found["reverse-kl"]["infinite_tokens"] == 0
    assert 0 < found["reverse-kl"]["value"] < math.inf
    assert 0 < found["js"]["value"] <= math.log(2)


def test_padded_vocabularies_are_compared_on_the_tokens_they_share(tokenizer, blocks):
    student, teacher = model(1), model(2, vocab=VOCAB + 8)
    found = evaluate(student, teacher, blocks, tokenizer=tokenizer)
    values, counts = [], []
    for logp, logq, _ in by_block(student, teacher, blocks):
        logp = logp[:, :VOCAB].log_softmax(-1)
        values.append(kl(logp.exp(), logq.exp()).sum().item())
        counts.append(len(logp))
    assert part(found, "divergences", "forward-kl") == reference(values, counts)
    with pytest.raises(ValueError, match="no tokenizer says"):
        evaluate(student, teacher, blocks)


def test_one_block_has_no_error_and_none_trained_is_refused(pair, tokenizer):
    one = tokenize([{"text": "w1 w2 w3"}], tokenizer)
    found = evaluate(*pair, one)
    assert math.isnan(found["divergences"]["js"]["error"])
    untrained = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([IGNORED, IGNORED])}]
    with pytest.raises(ValueError, match="dataset has no trained tokens"):
        evaluate(*pair, untrained)


@pytest.fixture
def run(tmp_path, tokenizer):
    """A finished run, as far as evaluating it needs one, and data held out from it."""
    teacher, student = model(2), model(1)
    for it in (teacher, student):
        it.generation_config.eos_token_id = 0
    teacher.save_pretrained(tmp_path / "teacher")
    run = Run.create(
        tmp_path / "run",
        "distill",
        {"teacher": str(tmp_path / "teacher"), "divergence": "akl(mu=0.5)"},
        seed=0,
    )
    student.save_pretrained(run.path)
    tokenizer.save_pretrained(run.path)
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in rows(5))
    )
    return run


def settings(run, **others):
    data = str(run.path.parent / "held.jsonl")
    given = {"data": data, "max_length": 16, "prompts": 3, "seeds": 2, "max_new_tokens": 6}
    return EvaluateSettings(**{**given, **others})


def test_evaluating_a_run_keeps_its_figures_and_replies_and_prints_a_table(run, tokenizer):
    found = evaluate_run(run.path, settings(run))
    kept = json.loads((run.path / "evaluation.json").read_text())
    assert flat(kept) == pytest.approx(flat(found.results["run"]), nan_ok=True)
    dataset = tokenize(read_rows(settings(run).data), tokenizer, max_length=16)
    direct = evaluate(model(1), model(2), dataset)
    js, expected = (it["divergences"]["js"] for it in (kept, direct))
    assert flat(js) == pytest.approx(flat(expected))
    assert kept["divergences"]["akl"]["divergence"] == "AKL(mu=0.5, straddle='tail')"
    replies = (run.path / "generations.jsonl").read_text().splitlines()
    assert len(replies) == 3 * 2
    assert {"seed", "prompt", "reference", "text", "tokens"} == json.loads(replies[0]).keys()
    table = str(found)
    for words in ("perplexity", "forward-kl (nats/token)", "of it in the tail", "Self-BLEU"):
        assert words in table
    assert re.search(r"forward-kl \(nats/token\) .*\(\d+\)", table)


def test_evaluating_on_rows_that_were_trained_on_warns(run):
    data = read_rows(settings(run).data)
    run.remember_rows(passages(data[:5]))
    with pytest.warns(UserWarning, match="5 of 12 passages were trained on by"):
        evaluate_run(run.path, settings(run, prompts=0))


def test_a_run_that_does_not_say_its_teacher_must_be_told(tmp_path):
    run = Run.create(tmp_path / "run", "distill", {}, seed=0)
    (tmp_path / "held.jsonl").write_text('{"text": "w1 w2"}\n')
    with pytest.raises(ValueError, match="teacher must be given"):
        module._load_teacher(run, settings(run))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"max_blocks": 0}, "max_blocks must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"seeds": -1}, "seeds must be at least 1; got -1"),
        ({"prompts": -1}, "prompts must be at least 0; got -1"),
        ({"top_p": 2.0}, "top_p must lie in"),
        ({"device": "abacus"}, "device must be cpu, cuda, .* got 'abacus'"),
        ({"divergences": ("kl", "kll")}, "kll"),
    ],
)
def test_settings_that_mean_nothing_are_refused_and_nothing_is_written(run, wrong, named):
    before = sorted(run.path.iterdir())
    with pytest.raises(ValueError, match=named):
        evaluate_run(run.path, settings(run, **wrong))
    assert sorted(run.path.iterdir()) == before


def test_evaluation_may_stop_after_some_blocks_and_skip_the_replies(run):
    found = evaluate_run(run.path, settings(run, max_blocks=2, prompts=0))
    assert found.results["run"]["blocks"] == 2
    assert "generations" not in found.results["run"]


def test_a_run_is_measured_under_what_it_minimised_and_what_else_is_asked_for(run):
    run.update(settings=run.settings | {"divergence": "kl + js"})
    named = ("todi", "akl", "skew-kl(alpha=0.3)")
    found = evaluate_run(run.path, settings(run, max_blocks=1, prompts=0, divergences=named))
    others = ["KL() + JensenShannon(beta=0.5)", "ToDi()", "SkewKL(alpha=0.3)"]
    assert list(found.results["run"]["divergences"]) == [*module.DIVERGENCES, *others]


@pytest.mark.parametrize(("said", "length"), [(None, 8), (12, 12)])
def test_blocks_are_as_long_as_in_training_unless_another_length_is_said(run, said, length):
    run.update(settings=run.settings | {"max_length": 8})
    chosen = settings(run, max_length=said, prompts=0)
    found = evaluate_run(run.path, chosen).results["run"]
    rows = read_rows(chosen.data)
    assert found["blocks"] == len(tokenize(rows, load_tokenizer(run.path), max_length=length))
    assert found["settings"]["max_length"] == length


def test_without_a_length_in_run_json_blocks_are_as_long_as_the_context(run):
    run.update(settings={name: it for name, it in run.settings.items() if name != "max_length"})
    room = context_of(load_model(run.path))
    assert room < 512
    found = evaluate_run(run.path, settings(run, max_length=None, prompts=0)).results["run"]
    assert found["settings"]["max_length"] == room
    with pytest.raises(ValueError, match=f"max_length must be at most {room}"):
        evaluate_run(run.path, settings(run, max_length=room + 1, prompts=0))


def test_runs_are_compared_column_by_column_and_drawn(run, tmp_path):
    evaluate_run(run.path, settings(run))
    other = Run.create(tmp_path / "other", "distill", run.settings, seed=1)
    model(3).save_pretrained(other.path)
    with pytest.raises(FileNotFoundError, match="rkl evaluate .* does it"):
        compare_runs([run.path, other.path])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (other.path / file).write_bytes((run.path / file).read_bytes())
    evaluate_run(other.path, settings(run, prompts=0))
    both = compare_runs([run.path, other.path], out=tmp_path / "comparison.html")
    assert list(both.results) == ["run", "other"]
    table = {row[0]: row[1:] for row in both.rows()}
    (teacher, *students) = table["perplexity"]
    assert teacher == tuple(both.results["run"]["perplexity"]["teacher"].values())
    assert students[1] == tuple(both.results["other"]["perplexity"]["student"].values())
    assert table["ROUGE-L"][2] is None
    html = (tmp_path / "comparison.html").read_text()
    assert html.count("<svg") == 3


def test_what_was_measured_of_one_run_alone_can_be_filled_in_by_the_command_that_is_said(
    run, tmp_path, capsys
):
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    run.update(settings=run.settings | {"divergence": "todi"})
    Run(other).update(settings=run.settings | {"divergence": "skew-kl"})
    for path in (run.path, other):
        evaluate_run(path, settings(run, prompts=0, divergences=("jeffreys",)))
    said = str(compare_runs([run.path, other]))
    for path, missing in ((run.path, "SkewKL(alpha=0.1)"), (other, "ToDi()")):
        (command,) = (line for line in said.splitlines() if f"rkl evaluate {path} " in line)
        assert command.endswith(f"--divergences jeffreys '{missing}'")
        assert main(shlex.split(command)[1:]) == 0
    said = str(compare_runs([run.path, other]))
    assert "rkl evaluate" not in said
    assert len(re.findall(r"ToDi.*\(\d+\).*\(\d+\)", said)) == 1


def test_the_arrays_of_a_comparison_are_the_arguments_of_its_figures(result):
    both = Evaluations({"a": result, "b": result})
    for draw, arguments in (
        (plots.precision_recall, both.precision_recall()),
        (plots.divergence_by_rank, both.divergence_by_rank("tv")),
    ):
        assert set(arguments) <= set(inspect.signature(draw).parameters)
        draw(**arguments)
    low, high = both.precision_recall()["bands"]["a"]
    precision = result["precision_recall"]["precision"]
    assert high[3] - low[3] == pytest.approx(4 * precision["error"][3])
    unknown = json.loads(json.dumps(result))  # as it is read back where an error is not known
    unknown["precision_recall"]["precision"]["error"][3] = None
    unknown["divergences"]["tv"]["by_rank"]["error"][0] = None
    one = Evaluations({"a": unknown})
    low, high = one.precision_recall()["bands"]["a"]
    assert math.isnan(low[3])
    assert math.isnan(high[3])
    assert math.isnan(one.divergence_by_rank("tv")["errors"]["a"][0])


def test_a_perplexity_that_is_infinite_is_compared(result):
    """It is stored as null, as of a teacher that gives a token of the data no mass."""
    infinite = {"value": None, "error": None}
    changed = {**result, "perplexity": {**result["perplexity"], "teacher": infinite}}
    name, teacher, *_ = Evaluations({"a": changed, "b": changed}).rows()[2]
    assert (name, teacher) == ("entropy (nats/token)", pair_of(result["entropy"]["teacher"]))
    assert Evaluations({"a": changed, "b": result}).rows()[2][1] is None


def test_different_data_or_teachers_are_not_compared_in_silence(run, tmp_path):
    evaluate_run(run.path, settings(run, prompts=0))
    other = tmp_path / "other"
    Run.create(other, "distill", {}, seed=0)
    changed = json.loads((run.path / "evaluation.json").read_text())
    changed["data"]["fingerprint"] = "another"
    changed["perplexity"]["teacher"]["value"] *= 2
    (other / "evaluation.json").write_text(json.dumps(changed))
    with pytest.warns(UserWarning, match="different data"):
        both = compare_runs([run.path, other])
    assert both.rows()[0][1] is None
    changed["ranks"]["edges"] = [0, 1, 2]
    with pytest.raises(ValueError, match="no ranks in common"):
        Evaluations({"a": changed, "b": both.results["run"]}).divergence_by_rank("js")
    with pytest.raises(ValueError, match="at least one run"):
        compare_runs([])
