"""The head that is read from a model gives the loss and the gradients of its full logits."""

import copy

import pytest
import torch
import transformers

import rkl
from rkl.distill import PadRows, read_head
from rkl.distill.models.heads import inference, logits_of
from rkl.distill.text.vocabulary import common_vocabulary

ARCHITECTURES = {
    "GPT2": ("GPT2", {}),
    "GPT2 untied": ("GPT2", {"tie_word_embeddings": False}),
    "Llama": ("Llama", {}),
    "Llama tied": ("Llama", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {}),
    "Gemma2": ("Gemma2", {"final_logit_softcapping": 3.0}),
    "Cohere": ("Cohere", {"logit_scale": 0.7}),
    "Granite": ("Granite", {"logits_scaling": 1.6}),
    "GPTNeoX": ("GPTNeoX", {}),
    "Phi, with a bias": ("Phi", {}),
    "GPTJ, with a bias": ("GPTJ", {"rotary_dim": 4}),
    "RecurrentGemma": ("RecurrentGemma", {"num_hidden_layers": 3, "logits_soft_cap": 4.0}),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


class _Cubed(transformers.LlamaForCausalLM):
    """A head whose logits no configuration explains."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits**3
        return output


def kl_written_out(teacher, student, batch, temperature=1.0, vocab=None):
    """The mean over labelled tokens of sum p (log p - log q), from full logits by autograd."""
    labelled = batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        a = teacher(**inputs).logits[:, :-1][labelled][:, :vocab]
    b = student(**inputs).logits[:, :-1][labelled][:, :vocab]
    logp, logq = (a / temperature).log_softmax(-1), (b / temperature).log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: it.grad.clone() for name, it in model.named_parameters() if it.grad is not None}


def assert_same(model, loss, expected):
    # Both are sums of the same float64 numbers in another order: some 1e-13 apart.
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, reference = gradients(model, loss), gradients(model, expected)
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        # An entry is a sum that may cancel: what is known of it is a share of the largest. Some
        # 1e3 roundings of 1e-16, which norms and soft caps enlarge a hundredfold, come to 1e-11.
        # Norms of Gemma compute in single precision, whatever the weights are, where a difference
        # of 1e-16 can round to one of 6e-8; a few of these add up.
        share = 3e-7 if "Gemma" in type(model).__name__ else 1e-10
        known = share * gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=known, msg=name)


@every_architecture
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_are_those_of_full_logits(
    name, temperature, tiny_model, tiny_rows, tiny_trainer
):
    architecture, changes = ARCHITECTURES[name]
    teacher, student = (tiny_model(architecture, seed=s, **changes).double() for s in (1, 2))
    with torch.no_grad():
        for head in (teacher.get_output_embeddings(), student.get_output_embeddings()):
            if head.bias is not None:
                head.bias.normal_()
    trainer = tiny_trainer(
        student, teacher, temperature=temperature, settings={"divergence": rkl.KL()}
    )
    batch = PadRows()(tiny_rows())
    loss = trainer.compute_loss(student, batch)
    assert_same(student, loss, kl_written_out(teacher, student, batch, temperature))


@every_architecture
def test_a_head_is_found_without_full_logits(name, tiny_model):
    architecture, changes = ARCHITECTURES[name]
    model = tiny_model(architecture, **changes)
    head = read_head(model)
    assert head.linear is model.get_output_embeddings()
    assert head.vocab == 40


@pytest.mark.parametrize("pad", [0, 1])
def test_a_padding_token_embedded_as_0_hides_no_head(pad, tiny_model):
    model = tiny_model("Llama", pad_token_id=pad)
    assert not model.get_input_embeddings().weight[pad].any()
    assert read_head(model).linear is not None


def test_logits_are_never_computed_for_the_loss(tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model(seed=1), tiny_model(seed=2)
    trainer = tiny_trainer(student, teacher)
    sizes = []
    for model in (teacher, student):
        model.lm_head.register_forward_hook(lambda module, x, logits: sizes.append(logits.numel()))
    trainer.compute_loss(student, PadRows()(tiny_rows())).backward()
    assert sizes == [0, 0]


def test_a_model_is_left_as_it_was(tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model(seed=1).train(), tiny_model(seed=2)
    teacher.transformer.h[0].eval()
    before = {name: module.training for name, module in teacher.named_modules()}
    trainer = tiny_trainer(student, teacher)
    trainer.compute_loss(student, PadRows()(tiny_rows())).backward()
    assert {name: module.training for name, module in teacher.named_modules()} == before
    assert all(it.requires_grad and it.grad is None for it in teacher.parameters())
    for model in (teacher, student):
        hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.modules()]
        assert not any(hooks)


def test_dropout_is_off_in_the_teacher_and_on_in_the_student(tiny_model, tiny_rows, tiny_trainer):
    teacher = tiny_model(seed=1, embd_pdrop=0.5).train()
    trainer = tiny_trainer(teacher, copy.deepcopy(teacher), settings={"divergence": rkl.KL()})
    batch = PadRows()(tiny_rows())
    assert trainer.compute_loss(teacher, batch) > 0.1
    teacher.eval()
    assert trainer.compute_loss(teacher, batch).abs() < 1e-6


def test_a_frozen_head_gets_no_gradient(tiny_model, tiny_rows, tiny_trainer):
    teacher, student = tiny_model("Llama", seed=1), tiny_model("Llama", seed=2)
    student.lm_head.requires_grad_(False)
    trainer = tiny_trainer(student, teacher)
    trainer.compute_loss(student, PadRows()(tiny_rows())).backward()
    assert student.lm_head.weight.grad is None
    assert student.model.norm.weight.grad.abs().sum() > 0


def test_a_head_that_nothing_explains_falls_back_to_full_logits(
    tiny_model, tiny_rows, tiny_trainer
):
    teacher = tiny_model("Llama", seed=1).double()
    student = _Cubed(tiny_model("Llama").config).double()
    with pytest.warns(UserWarning, match="_Cubed: its logits differ .* Its full logits will be"):
        trainer = tiny_trainer(student, teacher, settings={"divergence": rkl.KL()})
    batch = PadRows()(tiny_rows())
    loss = trainer.compute_loss(student, batch)
    assert_same(student, loss, kl_written_out(teacher, student, batch))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_full_logits_have_the_hard_label_term_at_temperature_1(
    temperature, tiny_model, tiny_rows, tiny_trainer
):
    teacher, student = tiny_model("Llama", seed=1).double(), tiny_model("Llama", seed=2).double()
    batch = PadRows()(tiny_rows())
    settings = {"temperature": temperature, "hard_label_weight": 0.5}
    expected = tiny_trainer(student, teacher, **settings).compute_loss(student, batch)
    trainer = tiny_trainer(student, teacher, **settings)
    trainer._head = type(trainer._head)(student, 40)
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected)


def test_a_soft_cap_that_the_configuration_hides_is_noticed(tiny_model):
    model = tiny_model("Gemma2", final_logit_softcapping=30.0, initializer_range=0.001)
    ids = torch.tensor([[3, 4]])
    with torch.no_grad():
        plain = model.lm_head(model.model(ids).last_hidden_state)
        assert (model(ids).logits - plain).abs().max() < 1e-5 * plain.abs().max()
    head = read_head(model)
    assert head.softcap == 30.0
    forward = model.forward

    def uncapped(*args, **kwargs):
        cap, model.config.final_logit_softcapping = model.config.final_logit_softcapping, 30.0
        try:
            return forward(*args, **kwargs)
        finally:
            model.config.final_logit_softcapping = cap

    model.forward, model.config.final_logit_softcapping = uncapped, None
    with pytest.warns(UserWarning, match="Gemma2ForCausalLM: its logits differ"):
        assert read_head(model).linear is None


def test_what_a_head_says_of_a_token_are_its_logits(tiny_model):
    model = tiny_model("Gemma2", final_logit_softcapping=2.0)
    ids = torch.randint(3, 40, (2, 7))
    predicting = torch.rand(2, 6) < 0.5
    told = logits_of(read_head(model).observe({"input_ids": ids}, predicting))
    with inference(model):
        torch.testing.assert_close(told, model(ids).logits[:, :-1][predicting])


@pytest.mark.parametrize(("of_teacher", "of_student"), [(48, 40), (40, 64), (48, 64), (40, 40)])
def test_padded_vocabularies_are_compared_on_the_tokens_alone(
    of_teacher, of_student, tiny_model, tiny_rows, tiny_trainer, tiny_tokenizer
):
    teacher = tiny_model("Llama", seed=1, vocab_size=of_teacher).double()
    student = tiny_model("Llama", seed=2, vocab_size=of_student).double()
    settings = {"divergence": rkl.KL(), "processing_class": tiny_tokenizer(40)}
    trainer = tiny_trainer(student, teacher, settings=settings)
    batch = PadRows()(tiny_rows())
    loss = trainer.compute_loss(student, batch)
    assert_same(student, loss, kl_written_out(teacher, student, batch, vocab=40))


def test_different_tokenizers_are_refused(tiny_model, tiny_trainer, tiny_tokenizer):
    settings = {
        "processing_class": tiny_tokenizer(40),
        "teacher_processing_class": tiny_tokenizer(40, prefix="other"),
    }
    with pytest.raises(ValueError, match="must share a tokenizer; theirs differ in 80 tokens"):
        tiny_trainer(tiny_model(), tiny_model(), settings=settings)


@pytest.mark.parametrize(
    ("sizes", "tokens", "message"),
    [
        ((48, 40), None, "teacher has 48 logits but the student 40, and no tokenizer says"),
        ((48, 40), 44, "teacher has 48 logits and the student 40, fewer than the 44 tokens"),
    ],
)
def test_vocabularies_that_no_tokenizer_explains_are_refused(
    sizes, tokens, message, tiny_tokenizer
):
    tokenizer = None if tokens is None else tiny_tokenizer(tokens)
    with pytest.raises(ValueError, match=message):
        common_vocabulary(*sizes, None, tokenizer)


def test_equal_vocabularies_need_no_tokenizer():
    assert common_vocabulary(40, 40) == 40


def test_a_peft_student_has_the_head_of_its_base(tiny_model, tiny_lora, tiny_rows, tiny_trainer):
    teacher = tiny_model("Llama", seed=1).double()
    student = tiny_lora(tiny_model("Llama", seed=2).double(), ["q_proj"])
    trainer = tiny_trainer(student, teacher, settings={"divergence": rkl.KL()})
    assert trainer._head.linear is student.get_output_embeddings()
    batch = PadRows()(tiny_rows())
    loss = trainer.compute_loss(student, batch)
    assert_same(student, loss, kl_written_out(teacher, student, batch))
    assert all("lora" in name for name in gradients(student, trainer.compute_loss(student, batch)))


def test_an_adapted_head_falls_back_to_full_logits(tiny_model, tiny_lora, tiny_rows, tiny_trainer):
    teacher = tiny_model("Llama", seed=1).double()
    student = tiny_lora(tiny_model("Llama", seed=2).double(), ["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="no plain linear layer"):
        trainer = tiny_trainer(student, teacher, settings={"divergence": rkl.KL()})
    batch = PadRows()(tiny_rows())
    loss = trainer.compute_loss(student, batch)
    assert_same(student, loss, kl_written_out(teacher, student, batch))


def test_the_product_runs_in_the_precision_of_autocast(tiny_model):
    model = tiny_model("Llama")
    ids, predicting = torch.tensor([[3, 4, 5]]), torch.ones(1, 2, dtype=torch.bool)
    head = read_head(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        known = head.observe({"input_ids": ids}, predicting)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
    assert known.hidden.dtype == known.weight.dtype == torch.bfloat16
    found = logits_of(known)  # which rounds no products
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.bfloat16(), logits)
