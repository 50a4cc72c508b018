"""Two models without a run: figures of full logits, drafts as in assisted generation."""

import dataclasses
import json
import math
import shutil

import material
import pytest
import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from rkl.cli import main
from rkl.distill import PairSettings, evaluate_pair, load_model
from rkl.distill.pair import _percentiles, _Side, draft_survival
from rkl.distill.text.data import tokenize
from rkl.distill.text.sources import read_rows

ROLES = "user", "assistant"
QUICK = {"max_length": 16, "device": "cpu", "prefix": 4, "own": 4, "draft_length": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pair")
    material.write(path)
    return path


def settings(folder, **changes):
    named = {"teacher": str(folder / "teacher"), "data": str(folder / "text.txt")}
    return PairSettings(**named | QUICK | {"max_blocks": 30, "contexts": 20} | changes)


@pytest.fixture(scope="module")
def compared(folder):
    return evaluate_pair(folder / "student", settings(folder)).result


def full_logits(folder, count=30):
    """Log-probabilities of both and the targets, block by block."""
    student, teacher = (load_model(folder / name).eval() for name in ("student", "teacher"))
    blocks = tokenize(
        read_rows(str(folder / "text.txt"), split="test"), material.tokenizer(), max_length=16
    )
    for block in range(count):
        tokens = blocks[block]["input_ids"][None]
        with torch.no_grad():
            logs = [m(tokens).logits[0, :-1].double().log_softmax(-1) for m in (teacher, student)]
        yield *logs, tokens[0, 1:]


def test_figures_are_those_of_full_logits(folder, compared):
    logp, logq, targets = (torch.cat(parts) for parts in zip(*full_logits(folder), strict=True))
    p, q = logp.exp(), logq.exp()
    forward, reverse = (p * (logp - logq)).sum(-1), (q * (logq - logp)).sum(-1)
    entropy = [-x.gather(-1, targets[:, None]).mean().item() for x in (logp, logq)]
    assert compared["tokens"] == len(targets)
    for name, values in {"forward-kl": forward, "reverse-kl": reverse}.items():
        found = compared["divergences"][name]
        assert found["value"] == pytest.approx(values.mean().item(), rel=1e-4)
        assert found["percentiles"]["50"]["value"] == pytest.approx(
            values.sort().values[math.ceil(len(values) / 2) - 1].item(), rel=1e-4
        )
        assert found["percentiles"]["100"]["value"] == pytest.approx(values.max().item(), rel=1e-4)
        assert found["error"] > 0
        assert found["percentiles"]["90"]["error"] > 0
    accepted = torch.minimum(p, q).sum(-1).mean().item()
    assert compared["acceptance"]["value"] == pytest.approx(accepted, rel=1e-5)
    assert compared["acceptance"]["value"] + compared["divergences"]["tv"]["value"] == (
        pytest.approx(1)
    )
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert compared["top1_agreement"]["value"] == pytest.approx(agreement)
    assert compared["perplexity"]["ratio"]["value"] == pytest.approx(
        math.exp(entropy[1] - entropy[0]), rel=1e-5
    )
    confidence, hit = q.max(-1).values, (q.argmax(-1) == targets).double()
    gaps = [
        (hit - confidence)[(confidence > low / 15) & (confidence <= (low + 1) / 15)].sum().abs()
        for low in range(15)
    ]
    error = sum(gaps).item() / len(targets)
    assert compared["calibration_error"]["student"]["value"] == pytest.approx(error, rel=1e-4)


def test_a_model_compared_with_itself_differs_in_nothing(folder):
    result = evaluate_pair(folder / "teacher", settings(folder)).result
    for found in result["divergences"].values():
        assert found["value"] == found["percentiles"]["100"]["value"] == 0
    assert result["acceptance"]["value"] == pytest.approx(1)
    assert result["perplexity"]["ratio"] == {"value": 1.0, "error": 0.0}
    drafts = result["drafts"]
    assert drafts["cost"] == 1
    assert [it["value"] for it in drafts["passed"]][0] == pytest.approx(1)
    assert drafts["speed_up"][0]["value"] == pytest.approx(1)


def test_the_chance_that_drafts_pass_is_that_of_all_paths(folder):
    """Over 20 tokens, drafts of two: enumerated, against the mean of many drafts."""
    student, teacher = (load_model(folder / name).eval() for name in ("student", "teacher"))
    chosen = settings(folder, own=0, draft_length=2, batch_size=4000, seed=3)
    context = torch.tensor([[17, 17, 17, 17]])
    vocab = 20
    with torch.no_grad():
        paths = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
        texts = torch.cat([context.expand(len(paths), -1), paths], -1)
        logs = [
            m(texts).logits[:, 3:5, :vocab].double().log_softmax(-1) for m in (teacher, student)
        ]
    (p1, q1), (p2, q2) = ([x[:, at].exp() for x in logs] for at in (0, 1))
    first = torch.minimum(p1[0], q1[0]).sum()
    of_path = q1.gather(-1, paths[:, :1]).squeeze(-1)
    ratio = (p1 / q1).gather(-1, paths[:, :1]).squeeze(-1).clamp_max(1)
    alive = ~torch.isin(paths[:, 0], torch.tensor([teacher.generation_config.eos_token_id]))
    second = (of_path * ratio * alive * torch.minimum(p2, q2).sum(-1)).sum() / vocab
    passed = draft_survival(
        student=student,
        teacher=teacher,
        prefixes=context.expand(4000, -1),
        settings=chosen,
        vocab=vocab,
    )
    error = passed.std(0) / len(passed) ** 0.5
    assert passed[:, 0].mean() == pytest.approx(first.item(), rel=1e-9)
    assert abs(passed[:, 1].mean() - second) < 4 * error[1]
    assert abs(passed[:, 1].mean() - first**2) > 4 * error[1]  # no power of the mean


@pytest.mark.slow
def test_accepted_lengths_are_those_of_assisted_generation(folder, monkeypatch):
    """The first round after each of some contexts, many times over."""
    student, teacher = (load_model(folder / name).eval() for name in ("student", "teacher"))
    prefix = torch.tensor([[5, 9, 12, 7]]).expand(12, -1)
    replies = _Side(teacher, 1.0, [0], material.VOCAB).write(prefix, 6, seed=0)
    own = torch.tensor([reply.tokens for reply in replies if not reply.ended])
    contexts = torch.cat([prefix[: len(own)], own], -1)
    length, rounds = 4, 40
    foretold = draft_survival(
        student=student,
        teacher=teacher,
        prefixes=contexts.repeat(100, 1),
        settings=settings(folder, own=0, draft_length=length, batch_size=400),
        vocab=material.VOCAB,
    ).sum(-1)
    student.generation_config.num_assistant_tokens = length
    student.generation_config.num_assistant_tokens_schedule = "constant"
    student.generation_config.assistant_confidence_threshold = 0.0
    matches = []
    kept = AssistedCandidateGenerator.update_candidate_strategy

    def note(self, input_ids, scores, num_matches):
        matches.append(int(num_matches))
        return kept(self, input_ids, scores, num_matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", note)
    torch.manual_seed(0)
    measured = []
    for context in contexts:
        for _ in range(rounds):
            matches.clear()
            teacher.generate(
                context[None],
                attention_mask=torch.ones_like(context[None]),
                assistant_model=student,
                do_sample=True,
                top_k=0,
                max_new_tokens=length + 1,
            )
            measured.append(matches[0])
    measured = torch.tensor(measured).double()
    error = (measured.var() / len(measured) + foretold.var() / len(foretold)).sqrt()
    assert abs(measured.mean() - foretold.mean()) < 3 * error
    assert measured.mean() > 0.1


@pytest.mark.slow
def test_every_round_of_a_text_accepts_what_is_foretold_after_its_beginning(folder, monkeypatch):
    """Where a round begins depends on the drafts before it, so that rounds are no fair sample of
    the places of a text. Given its beginning each is foretold, and the differences of a text add
    up without correlation."""
    student, teacher = (load_model(folder / name).eval() for name in ("student", "teacher"))
    length, new = 3, 20
    student.generation_config.num_assistant_tokens = length
    student.generation_config.num_assistant_tokens_schedule = "constant"
    student.generation_config.assistant_confidence_threshold = 0.0
    ends, kept = [], AssistedCandidateGenerator.update_candidate_strategy

    def note(self, input_ids, scores, num_matches):
        ends.append((input_ids[0].tolist(), int(num_matches)))
        return kept(self, input_ids, scores, num_matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", note)
    torch.manual_seed(0)
    begun: dict[int, list] = {}  # by their length: where rounds begin, and what they accept
    for number in range(40):
        start = [5 + number, 9, 12, 7]
        ends.clear()
        teacher.generate(
            torch.tensor([start]),
            attention_mask=torch.ones(1, 4, dtype=torch.long),
            assistant_model=student,
            do_sample=True,
            top_k=0,
            max_new_tokens=new,
        )
        begins = [start, *(text for text, _ in ends)]
        for text, (_, accepted) in zip(begins, ends, strict=False):
            if len(text) + length < len(start) + new and 0 not in text:
                begun.setdefault(len(text), []).append((text, accepted))
    differences = []
    for rounds in begun.values():
        texts = torch.tensor([text for text, _ in rounds])
        foretold = draft_survival(
            student=student,
            teacher=teacher,
            prefixes=texts.repeat(20, 1),
            settings=settings(folder, own=0, draft_length=length, batch_size=400),
            vocab=material.VOCAB,
        ).sum(-1)
        accepted = torch.tensor([it for _, it in rounds]).double()
        differences.append(accepted - foretold.reshape(20, -1).mean(0))
    assert sum(length > 8 for length in begun) > 5
    difference = torch.cat(differences)
    error = difference.std() / math.sqrt(len(difference))
    assert abs(difference.mean()) < 4 * error
    assert error < 0.1


def test_a_draft_vocabulary_renormalises_the_teacher_and_shows_what_it_leaves_out(folder):
    (folder / "tokens.json").write_text(json.dumps([*range(0, 300, 2)]))
    chosen = settings(folder, vocab=str(folder / "tokens.json"))
    result = evaluate_pair(folder / "student", chosen).result
    logp, logq, _ = (torch.cat(parts) for parts in zip(*full_logits(folder), strict=True))
    of_p, q = logp[:, ::2].exp(), logq[:, ::2].softmax(-1)
    p = of_p / of_p.sum(-1, keepdim=True)
    value = (p * (p / q).log()).sum(-1).mean().item()
    assert result["divergences"]["forward-kl"]["value"] == pytest.approx(value, rel=1e-4)
    left_out = 1 - of_p.sum(-1).mean().item()
    assert result["mass_left_out"]["value"] == pytest.approx(left_out, rel=1e-5)
    # what is drafted is judged by the whole of the teacher
    accepted = torch.minimum(of_p, q).sum(-1).mean().item()
    assert result["acceptance"]["value"] == pytest.approx(accepted, rel=1e-5)
    whole = evaluate_pair(folder / "student", settings(folder, vocab="300", contexts=0)).result
    assert whole["mass_left_out"]["value"] == pytest.approx(0, abs=1e-6)
    for name, it in (
        evaluate_pair(folder / "student", settings(folder)).result["divergences"].items()
    ):
        assert whole["divergences"][name]["value"] == pytest.approx(it["value"], rel=1e-5)


def test_percentiles_have_the_error_that_new_samples_show():
    """Independent tokens, one a block: the error of a median is 1.25 s/sqrt(n)."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator, dtype=torch.float64)
    chosen = torch.randint(2000, (200, 2000), generator=generator)
    weights = torch.zeros(200, 2000).double()
    weights.scatter_add_(1, chosen, torch.ones(200, 2000).double())
    error = _percentiles(values, torch.arange(2000), weights)["50"]["error"]
    # 200 resamples know an error to 5 %, and a density is known to less than a tenth
    assert error == pytest.approx(math.sqrt(math.pi / 2) / math.sqrt(2000), rel=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 33}, "max_length must be at most 32, the student's context; got 33"),
        ({"max_length": None, "prefix": 30}, "at most max_length, 32 tokens; got 38"),
        ({"prefix": 14}, r"prefix \+ own \+ draft_length must be at most max_length, 16 tokens"),
        ({"vocab": "0"}, r"vocab must hold numbers of tokens in \[0, 300\); got none"),
        ({"vocab": "301"}, r"vocab must hold numbers of tokens in \[0, 300\); got 0 to 300"),
        ({"vocab": "missing.txt"}, r"vocab: missing.txt: No such file"),
    ],
)
def test_settings_that_do_not_fit_the_models_are_refused(folder, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate_pair(folder / "student", settings(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"cost": -1.0}, "cost must be finite, at least 0; got -1.0"),
        ({"draft_length": 0}, "draft_length must be at least 1; got 0"),
        ({"divergences": ("unheard-of",)}, "unheard-of"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PairSettings(teacher="T", data="D", **changes)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture
def chatting(folder, tmp_path):
    """A function that gives forward KL on chats, student and teacher with these templates."""
    (tmp_path / "chats.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": role, "content": f"{n}"} for role in ROLES]}) + "\n"
            for n in range(4)
        )
    )

    def measure(of_student, of_teacher, **changes):
        tokenizer = material.tokenizer()
        for name, template in (("student", of_student), ("teacher", of_teacher)):
            shutil.copytree(folder / name, tmp_path / name, dirs_exist_ok=True)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(tmp_path / name)
            if template is None:
                (tmp_path / name / "chat_template.jinja").unlink(missing_ok=True)
        how = {"teacher": str(tmp_path / "teacher"), "data": str(tmp_path / "chats.jsonl")}
        how |= {"max_length": 32, "contexts": 0} | changes
        result = evaluate_pair(tmp_path / "student", settings(folder, **how)).result
        return result["divergences"]["forward-kl"]["value"]

    return measure


def test_chats_are_read_by_the_template_that_one_of_two_models_has(chatting, tmp_path):
    expected = chatting(TEMPLATE, TEMPLATE)
    with pytest.warns(UserWarning, match="has no chat template; the teacher's is used"):
        assert chatting(None, TEMPLATE) == expected
    assert chatting(TEMPLATE, None) == expected
    other = TEMPLATE.replace("<|end|>", ".<|end|>")
    with pytest.warns(UserWarning, match="different chat templates; the student's is used"):
        assert chatting(TEMPLATE, other) == expected
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    named = {"chat_template": str(tmp_path / "template.jinja")}
    for template in (None, other):
        assert chatting(template, template, **named) == expected
    assert chatting(other, other) != expected


def test_on_the_command_line(folder, capsys, tmp_path):
    words = ["evaluate", str(folder / "student"), "--teacher", str(folder / "teacher")]
    words += ["--data", str(folder / "text.txt"), "--divergences", "neg-log-acceptance"]
    for field in dataclasses.fields(PairSettings):
        if field.name in QUICK and field.name != "device":
            words += [f"--{field.name.replace('_', '-')}", str(QUICK[field.name])]
    words += ["--max-blocks", "8", "--contexts", "4", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "pair.json")]) == 0
    said = capsys.readouterr().out
    for name in ("acceptance of a token", "accepted of 4 drafted", "neg-log-acceptance", "99.9 %"):
        assert name in said
    result = json.loads((tmp_path / "pair.json").read_text())
    assert result["drafts"]["lengths"] == [1, 2, 3, 4]
    assert main([*words, "--out", str(tmp_path / "pair.json")]) == 2
    assert "pair.json" in capsys.readouterr().err
