"""A teacher on a server is the model that answers there; every fault is one clear error."""

import math
import threading
import traceback
from typing import Any

import pytest
import torch
from serving import Stub

import rkl
from rkl.distill import PadRows, Teacher
from rkl.distill.client import KEY, ServerError
from rkl.distill.limits import is_address
from rkl.distill.teachers.server import ServerTeacher, gap
from rkl.distill.teachers.teacher import ModelTeacher
from rkl.distill.text.batches import shifted
from rkl.estimators import TopK

KINDS = "vllm", "sglang", "llamacpp", "completions"
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses between attempts, not waited for."""
    waited: list[float] = []
    monkeypatch.setattr("rkl.distill.client.sleep", waited.append)
    monkeypatch.delenv(KEY, raising=False)
    return waited


@pytest.fixture
def stub(tiny_model, tiny_tokenizer):
    """A function that makes a server of a small model: stub("vllm", largest=5)."""
    return lambda kind, **settings: Stub(
        tiny_model("Llama", seed=1).eval(), tiny_tokenizer(), kind, **settings
    )


def expected(model, inputs, predicting, k):
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1][predicting]
    return TopK(*logits.log_softmax(-1).topk(k))


@every_kind
@pytest.mark.parametrize("k", [5, 40])
def test_the_server_gives_the_top_k_of_its_model(kind, k, stub, tiny_rows, tiny_tokenizer):
    served = stub(kind)
    inputs, predicting, _ = shifted(PadRows(pad_token_id=2)(tiny_rows(6)))
    with served.listening() as url:
        teacher = ServerTeacher(url, tiny_tokenizer(), top_k=k)
        assert teacher.kind == kind
        p = teacher.observe(inputs, predicting)
    top = expected(served.model, inputs, predicting, k)
    assert torch.equal(p.index, top.index)
    # one computes rows of other lengths together, in single precision
    torch.testing.assert_close(p.logp, top.logp, atol=1e-5, rtol=0)


@every_kind
def test_training_from_a_server_is_training_from_the_top_k(
    kind, stub, tiny_model, tiny_rows, tiny_trainer, tiny_tokenizer
):
    class Top(Teacher):
        def __init__(self, model):
            self.model, self.vocab = model, 40

        def observe(self, inputs, predicting, *, vocab=None):
            return expected(self.model, inputs, predicting, 40)

    rows, served, found = tiny_rows(8), stub(kind), []
    with served.listening() as url:
        for teacher in (Top(served.model), ServerTeacher(url, tiny_tokenizer(), top_k=40)):
            student = tiny_model("Llama", seed=2)
            trainer = tiny_trainer(
                student, teacher, rows, settings={"divergence": rkl.KL()}, save_strategy="no"
            )
            trainer.train()
            found.append(trainer.state.log_history[-1]["train_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_texts_of_a_packed_row_and_rows_padded_on_the_left_are_asked_apart(stub, tiny_tokenizer):
    served = stub("vllm")
    packed = {"input_ids": [4, 5, 6, 7, 8, 9], "labels": [4, 5, 6, 7, 8, 9]}
    inputs, predicting, _ = shifted(PadRows()([packed | {"seq_lengths": [4, 2]}]))
    padded = {"input_ids": torch.tensor([[2, 2, 4, 5, 6]])}
    padded["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1]])
    with served.listening() as url:
        teacher = ServerTeacher(url, tiny_tokenizer(), top_k=40)
        p = teacher.observe(inputs, predicting)
        left = teacher.observe(padded, torch.tensor([[False, False, True, True]]))
    assert served.asked[1][2]["prompt"] == [[4, 5, 6, 7], [8, 9]]
    assert served.asked[2][2]["prompt"] == [[4, 5, 6]]
    alone = torch.cat([served._logp([4, 5, 6, 7]), served._logp([8, 9])]).float()
    for top, logp in ((p, alone), (left, served._logp([4, 5, 6]).float())):
        torch.testing.assert_close(top.logp, logp.gather(-1, top.index))


def test_what_follows_the_last_predicted_token_is_not_sent(stub, tiny_tokenizer):
    served = stub("vllm")
    row = {"input_ids": [4, 5, 6, 7, 8], "labels": [-100, -100, 6, -100, -100]}
    inputs, predicting, _ = shifted(PadRows()([row, {"input_ids": [5, 6], "labels": [-100] * 2}]))
    with served.listening() as url:
        p = ServerTeacher(url, tiny_tokenizer(), top_k=3).observe(inputs, predicting)
    assert served.asked[1][2]["prompt"] == [[4, 5, 6]]
    assert p.logp.shape == (1, 3)


def test_a_server_that_takes_no_numbers_gets_the_text(stub, tiny_tokenizer):
    served = stub("completions", takes_numbers=False)
    rows: list[Any] = [{"input_ids": it, "labels": it} for it in ([4, 5, 6, 7], [9, 8], [5, 9, 7])]
    inputs, predicting, _ = shifted(PadRows(pad_token_id=2)(rows))
    with served.listening() as url:
        p = ServerTeacher(url, tiny_tokenizer(), top_k=7).observe(inputs, predicting)
    # the first text, two that say whose place is whose, and the others
    assert [type(body["prompt"]) for _, _, body in served.asked[1:]] == [list, *[str] * 5]
    torch.testing.assert_close(
        p.logp, expected(served.model, inputs, predicting, 7).logp, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("takes_numbers", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_a_place_that_is_that_of_the_next_token_is_moved(
    early, takes_numbers, stub, tiny_tokenizer
):
    served = stub("completions", early=early, takes_numbers=takes_numbers)
    rows: list[Any] = [{"input_ids": it, "labels": it} for it in ([4, 5, 6, 7], [9, 8], [9, 9, 9])]
    inputs, predicting, _ = shifted(PadRows(pad_token_id=2)(rows))
    with served.listening() as url:
        teacher = ServerTeacher(url, tiny_tokenizer(), top_k=7)
        p = teacher.observe(inputs, predicting)
    torch.testing.assert_close(
        p.logp, expected(served.model, inputs, predicting, 7).logp, atol=1e-5, rtol=0
    )
    said = [body for _, _, body in served.asked if body and body["max_tokens"] == 1]
    assert sum(not body["echo"] for body in said) == (3 if early else 0)


def test_a_bos_that_the_echo_leaves_out_is_not_missed(stub, tiny_tokenizer):
    def without_bos(answer):
        found = answer["choices"][0]["logprobs"]
        kept = [at for at, word in enumerate(found["tokens"]) if word != "w4"]
        for name in ("tokens", "top_logprobs"):
            found[name] = [found[name][at] for at in kept]
        return answer

    served, tokenizer = stub("completions", change=without_bos), tiny_tokenizer()
    tokenizer.bos_token = "w4"
    row = {"input_ids": [4, 5, 6, 4, 7], "labels": [-100, 5, 6, -100, 7]}
    inputs, predicting, _ = shifted(PadRows()([row]))
    with served.listening() as url:
        p = ServerTeacher(url, tokenizer, top_k=7).observe(inputs, predicting)
    torch.testing.assert_close(
        p.logp, expected(served.model, inputs, predicting, 7).logp, atol=1e-5, rtol=0
    )


def test_atoms_that_are_spelt_alike_are_left_to_the_rest(stub, tiny_tokenizer):
    """Of tokens with the same text one log-probability is left, and nobody says whose it is."""
    alike = {"w20", "w21", "w22", "w23"}

    class Spelling:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __call__(self, text):
            return self.tokenizer(text)

        def decode(self, tokens):
            return "" if (text := self.tokenizer.decode(tokens)) in alike else text

    class Halves(type(tiny_tokenizer())):
        def decode(self, tokens, **settings):
            text = super().decode(tokens, **settings)
            return "\N{REPLACEMENT CHARACTER}" if text in alike else text

    served, k = stub("completions"), 30
    served.tokenizer = Spelling(tiny_tokenizer())
    made = tiny_tokenizer()
    tokenizer = Halves(tokenizer_object=made.backend_tokenizer, eos_token="w1", pad_token="w2")
    row = {"input_ids": [4, 5, 6, 7, 8, 9], "labels": [4, 5, 6, 7, 8, 9]}
    inputs, predicting, _ = shifted(PadRows()([row]))
    with served.listening() as url:
        p = ServerTeacher(url, tokenizer, top_k=k).observe(inputs, predicting)
    full = served.model(**inputs).logits[:, :-1][predicting].log_softmax(-1).detach()
    for place in range(5):
        top = [int(it) for it in full[place].topk(k).indices if not 20 <= it < 24]
        given = dict(zip(p.index[place].tolist(), p.logp[place].tolist(), strict=True))
        assert {it for it, logp in given.items() if logp > -math.inf} == set(top)
        for token in top:
            assert given[token] == pytest.approx(float(full[place, token]), abs=1e-5)


def ask(served, tokenizer, *, k=5, **settings):
    """Observe one row, and give the error."""
    row = {"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}
    inputs, predicting, _ = shifted(PadRows()([row]))
    with served.listening() as url, pytest.raises(ServerError) as error:
        ServerTeacher(url, tokenizer, top_k=k, **settings).observe(inputs, predicting)
    return error.value


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("vllm", r"max allowed: 3\). Start it with --max-logprobs 5, or ask for fewer: --loss-"),
        ("sglang", r"fewer log-probabilities than the 5 asked for \(it gave 3\). Ask for fewer"),
        ("llamacpp", r"fewer log-probabilities than the 5 asked for \(it gave 3\). Ask for fewer"),
        ("completions", r"the 5 asked for \(it gave 3\). Such servers often give no more than 5"),
    ],
)
def test_fewer_log_probabilities_than_asked_for_name_what_to_do(kind, named, stub, tiny_tokenizer):
    error = ask(stub(kind, largest=3), tiny_tokenizer())
    assert error.args
    with pytest.raises(ServerError, match=named):
        raise error


@every_kind
def test_a_nan_is_refused(kind, stub, tiny_tokenizer):
    served = stub(kind)
    with torch.no_grad():
        served.model.lm_head.weight[3] = math.nan
    assert "NaN or none, at token 1: are the weights there finite?" in str(
        ask(served, tiny_tokenizer(), k=40)
    )


@every_kind
def test_another_tokenizer_is_refused(kind, stub, tiny_tokenizer):
    served = stub(kind)
    served.tokenizer = tiny_tokenizer(prefix="v")
    assert "tokenizer" in str(ask(served, tiny_tokenizer()))


def test_a_token_that_the_server_adds_is_refused(stub, tiny_tokenizer):
    error = str(ask(stub("completions", begins_with=0), tiny_tokenizer()))
    assert "'w0' where the student's tokenizer has 'w4', at token 0" in error


def test_a_larger_vocabulary_is_refused(stub, tiny_model, tiny_tokenizer):
    served = stub("vllm")
    served.model = tiny_model("Llama", seed=1, vocab_size=48).eval()
    served.tokenizer = tiny_tokenizer(48)
    assert "but the student's tokenizer has 40 tokens" in str(ask(served, tiny_tokenizer(), k=48))


def test_what_lies_in_a_prefix_cache_names_the_flag(stub, tiny_tokenizer):
    def forget(answer):
        answer["choices"][0]["prompt_logprobs"][1] = None
        return answer

    error = ask(stub("vllm", change=forget), tiny_tokenizer())
    assert "start it with --no-enable-prefix-caching" in str(error)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda answer: {"choices": []}, "gave 0 answers to 1 texts; expected one"),
        (lambda answer: {"text": "hello"}, "an answer without prompt_logprobs, which vllm has"),
        (lambda answer: b"<html>", "gave no JSON at .*, but '<html>'"),
    ],
)
def test_an_answer_that_is_none_is_refused(change, named, stub, tiny_tokenizer):
    error = ask(stub("vllm", change=change), tiny_tokenizer())
    with pytest.raises(ServerError, match=named):
        raise error


def test_probabilities_that_are_no_probabilities_are_refused(stub, tiny_tokenizer):
    def doubled(answer):
        for place in answer["choices"][0]["prompt_logprobs"][1:]:
            for atom in place.values():
                atom["logprob"] += 1
        return answer

    error = ask(stub("vllm", change=doubled), tiny_tokenizer(), k=40)
    assert "exponentials sum to 2.72 at token 1; expected at most 1" in str(error)


@pytest.mark.parametrize(
    ("status", "named", "attempts"),
    [
        (401, f"wants a key (401). It is read from the environment variable {KEY}", 1),
        (404, "has nothing at", 1),
        (400, "refused the request (400: it is so)", 1),
        (500, "answered 500 Internal Server Error: it is so, 3 times in a row", 3),
        (503, "answered 503 Service Unavailable: it is so, 3 times in a row", 3),
        (302, "refused the request (302", 1),
    ],
)
def test_each_status_is_one_clear_error(status, named, attempts, stub, tiny_tokenizer, pauses):
    served = stub("vllm", refuse=lambda number: (status, "it is so") if number > 1 else None)
    assert named in str(ask(served, tiny_tokenizer(), attempts=3))
    assert len(served.asked) == 1 + attempts
    assert pauses == [1.0, 2.0][: attempts - 1]


def test_a_server_that_recovers_is_waited_for(stub, tiny_rows, tiny_tokenizer, pauses):
    served = stub("vllm", refuse=lambda number: (503, "loading") if 1 < number < 4 else None)
    inputs, predicting, _ = shifted(PadRows()(tiny_rows(2)))
    with served.listening() as url:
        p = ServerTeacher(url, tiny_tokenizer(), top_k=4).observe(inputs, predicting)
    assert len(p.logp) == predicting.sum()
    assert pauses == [1.0, 2.0]


def test_a_server_that_hangs_is_given_up(stub, tiny_tokenizer, monkeypatch):
    ended = threading.Event()
    served = stub("vllm")
    wait = ended.wait

    def hang(number):
        if number > 1:
            wait(5)

    served.refuse = hang
    error = ask(served, tiny_tokenizer(), timeout=0.2, attempts=2)
    ended.set()
    assert "gave no answer within 0.2 s, 2 times in a row" in str(error)


def test_a_server_that_is_not_there_is_said(tiny_tokenizer):
    with pytest.raises(ServerError, match=r"cannot be reached .*, 2 times in a row. Is the serv"):
        ServerTeacher("http://127.0.0.1:9/v1", tiny_tokenizer(), attempts=2)


def test_a_key_is_sent_and_told_to_nobody(stub, tiny_rows, tiny_tokenizer, monkeypatch, capfd):
    key = "sk-verysecret"
    served = stub("vllm", key=key)
    with served.listening() as url:
        with pytest.raises(ServerError, match=f"variable {KEY}; it is not set"):
            ServerTeacher(url, tiny_tokenizer())
        monkeypatch.setenv(KEY, key)
        teacher = ServerTeacher(url, tiny_tokenizer(), top_k=3)
        assert served.asked[-1][1]["Authorization"] == f"Bearer {key}"
        served.refuse = lambda number: (400, f"not with {key}")
        inputs, predicting, _ = shifted(PadRows()(tiny_rows(1)))
        with pytest.raises(ServerError) as error:
            teacher.observe(inputs, predicting)
        monkeypatch.setenv(KEY, "sk-otherkey")
        served.refuse = lambda number: None
        with pytest.raises(ServerError, match="the key in it is refused"):
            teacher.observe(inputs, predicting)
    told = "".join(traceback.format_exception(error.value)) + repr(vars(teacher.server))
    assert "not with ***" in told
    assert key not in told + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("ftp://host/v1", "url must be an address such as http://host:8000/v1; got 'ftp"),
        ("http://me:secret@host:8000/v1", "url must hold no key, no password"),
        ("http://host:8000/v1?key=secret", "url must hold no key, no password"),
    ],
)
def test_an_address_with_a_key_in_it_is_refused_without_telling_it(url, named, tiny_tokenizer):
    with pytest.raises(ValueError, match=named) as error:
        ServerTeacher(url, tiny_tokenizer())
    assert "secret" not in str(error.value)


def test_the_gap_to_the_model_here_is_measured_and_said(stub, tiny_rows, tiny_tokenizer, capfd):
    served = stub("sglang")
    inputs, predicting, _ = shifted(PadRows()(tiny_rows(4)))
    with served.listening() as url:
        here = ModelTeacher(served.model)
        teacher = ServerTeacher(url, tiny_tokenizer(), top_k=8, reference=here)
        teacher.observe(inputs, predicting)
    assert teacher.gap is not None
    assert teacher.gap.largest < 1e-5
    assert teacher.gap.tokens == predicting.sum()
    assert "the server's log-probabilities differ from those of the model here by" in "".join(
        capfd.readouterr()
    )


def test_a_reference_of_other_weights_is_warned_of(
    stub, tiny_model, tiny_rows, tiny_tokenizer, capfd
):
    inputs, predicting, _ = shifted(PadRows()(tiny_rows(4)))
    with stub("vllm").listening() as url:
        other = ModelTeacher(tiny_model("Llama", seed=7))
        teacher = ServerTeacher(url, tiny_tokenizer(), top_k=8, reference=other)
        with pytest.warns(UserWarning, match="more than rounding explains: another model"):
            teacher.observe(inputs, predicting)


def test_several_models_must_be_told_apart(stub, tiny_tokenizer):
    served = stub("vllm")
    models = [{"id": "a", "owned_by": "vllm"}, {"id": "b", "owned_by": "vllm"}]
    answer = served.answer
    served.answer = lambda path, body: (
        (200, {"data": models}) if path == "/v1/models" else answer(path, body)
    )
    with served.listening() as url:
        with pytest.raises(ValueError, match=r"model must be one of a, b, which .*; got None"):
            ServerTeacher(url, tiny_tokenizer())
        with pytest.raises(ValueError, match=r"model must be one that .* has, a, b; got 'c'"):
            ServerTeacher(url, tiny_tokenizer(), model="c")
        assert ServerTeacher(url, tiny_tokenizer(), model="b").model_name == "b"


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"top_k": 0}, ValueError, "top_k must be at least 1; got 0"),
        ({"timeout": 0}, ValueError, "timeout must be"),
        ({"attempts": 1.5}, TypeError, "attempts must be an integer"),
        ({"kind": "tgi"}, ValueError, "kind must be one of vllm, sglang, llamacpp, completions"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, named, tiny_tokenizer):
    with pytest.raises(error, match=named):
        ServerTeacher("http://127.0.0.1:9/v1", tiny_tokenizer(), **settings)


def test_addresses_are_told_from_names():
    assert is_address("https://host/v1")
    assert not is_address("org/model")


def test_the_gap_from_logits_in_half_precision_is_not_their_rounding():
    logits = (3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))).bfloat16()
    top = TopK(*logits.double().log_softmax(-1).topk(10))
    assert gap(top, logits).largest < 1e-5  # single precision; in bfloat16 it would be 0.01
