# %% [markdown]
# # Distil: a smaller model, and what it lost
#
# You use TRL, and want a small model that does what a large one does. This page shows every step,
# on models so small that it takes about a minute: rows, teacher, student, training under several
# divergences. Then it measures what a falling loss does not show: how far the student is from its
# teacher, in which direction, and with which error. [Distil](../../docs/distill.md) has the rest.

# %% [markdown]
# ## Rows
#
# Rows are those of TRL: `text`, `prompt` and `completion`, or `messages`. Of a prompt and a
# completion only the completion is trained on. These are weather reports, random on purpose: after
# "The weather in Lima on Monday is" several completions are right, each with its own probability.
# A student can lose some of these probabilities.

# %%
import json
import random

SKIES = {"sunny": "sunglasses", "cloudy": "a coat", "rainy": "an umbrella", "foggy": "a lamp"}
CITIES = ["Lima", "Oslo", "Quito", "Delhi", "Dakar", "Hanoi", "Turin", "Perth"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]


def report(rng):
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    likely = [1 + (3 * CITIES.index(city) + 5 * k) % 7 for k in range(4)]
    sky = rng.choices(list(SKIES), likely)[0]
    degrees = 5 + 2 * CITIES.index(city) + 3 * list(SKIES).index(sky) + rng.randrange(3)
    completion = f" {sky}, {degrees} degrees. Take {SKIES[sky]}."
    return {"prompt": f"The weather in {city} on {day} is", "completion": completion}


rng = random.Random(0)
rows, held_out = ([report(rng) for _ in range(n)] for n in (2_000, 200))
for name, part in {"train.jsonl": rows, "held-out.jsonl": held_out}.items():
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in part)
rows[0]

# %% [markdown]
# ## A teacher, and a student to begin with
#
# You have your own: `load_model("Qwen/Qwen3-0.6B")`, a folder, or a .gguf file. These two are made
# on the spot and learn the rows by transformers' own trainer, the student for a short time only.

# %%
from transformers import PrinterCallback, Trainer, TrainingArguments

from rkl.distill import PadRows, Shape, new_model, new_tokenizer, tokenize

quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
quiet |= {"per_device_train_batch_size": 16, "lr_scheduler_type": "cosine"}
tokenizer = new_tokenizer([row["prompt"] + row["completion"] for row in rows], size=350)
blocks = tokenize(rows, tokenizer, max_length=64)


def train_model(name, shape, steps):
    """A new model that has learnt the rows, saved in the folder of this name."""
    trainer = Trainer(
        new_model(tokenizer, shape, seed=0),
        TrainingArguments(name, max_steps=steps, learning_rate=5e-3, **quiet),
        train_dataset=blocks,
        data_collator=PadRows(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(name)
    print(f"{name}: {trainer.model.num_parameters():,} parameters")
    return trainer.model


teacher = train_model("teacher", Shape(layers=2, width=64), steps=150)
start = train_model("start", Shape(layers=1, width=32), steps=50)

# %% [markdown]
# ## Four divergences
#
# `DistillTrainer` is a `transformers.Trainer`, as TRL's are, and `DistillConfig` its
# `TrainingArguments`. In place of `beta` there is a value, `divergence=`:
#
# | GKDTrainer | here |
# |---|---|
# | `GKDTrainer(model, teacher_model=t)` | `DistillTrainer(model, teacher=t)` |
# | `beta=0` | `divergence=rkl.KL()`, forward KL, D(teacher ‖ student) |
# | `beta=1` | `divergence=rkl.ReverseKL()`, D(student ‖ teacher) |
# | `beta=0.5` | `divergence=rkl.JensenShannon(beta=0.5)` |
# | none | `rkl.AKL(mu=0.5)`, or any other, or a sum: `0.5 * rkl.KL() + 0.5 * rkl.ReverseKL()` |
# | `lmbda=0.5`, its default | `lmbda=0.5`; 0, no text of the student's own, is the default here |
# | `seq_kd=True` | `seq_kd=True` |
# | `temperature`, of the text that the student writes | `sampling_temperature` |
# | none: its loss is at temperature 1 | `temperature`, which divides both models' logits |
# | `max_new_tokens` | `max_completion_length` |
#
# [Coming from TRL](../../docs/distill.md#coming-from-trl) has all of them. All students begin
# as `start`. The last has GKD's default `beta` and `lmbda`: half of its steps are on its own text.

# %%
import rkl
from rkl.distill import DistillConfig, DistillTrainer, load_model


def distil(name, divergence, **settings):
    """A student under one divergence, saved in the folder of this name; its log."""
    student = load_model("start")
    trainer = DistillTrainer(
        student,
        DistillConfig(
            name, max_steps=90, learning_rate=1e-2, logging_steps=9, **settings, **quiet
        ),
        teacher=teacher,
        divergence=divergence,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(name)  # an ordinary folder for AutoModelForCausalLM.from_pretrained
    log = [row for row in trainer.state.log_history if "loss" in row]
    print(f"{name:10} {log[0]['loss']:.3f} to {log[-1]['loss']:.3f} nats per token")
    return student


own_text = {"lmbda": 0.5, "max_completion_length": 24}
students = {
    "forward": distil("forward", rkl.KL()),
    "reverse": distil("reverse", rkl.ReverseKL()),
    "akl": distil("akl", rkl.AKL(mu=0.5)),
    "gkd": distil("gkd", rkl.JensenShannon(beta=0.5), **own_text),
}

# %% [markdown]
# These losses cannot be compared with each other: each is another divergence. What follows is
# the same for all.

# %% [markdown]
# ## What was lost
#
# `evaluate_pair` takes any two models with the same tokenizer, and text that neither was trained
# on. (For training, a teacher may have
# [another tokenizer](../../docs/distill.md#teachers-with-another-tokenizer).) Divergences are
# exact, over the whole vocabulary, in nats per token; errors are standard errors from block to
# block.

# %%
from rkl.distill import PairSettings, evaluate_pair

settings = PairSettings(
    teacher="teacher",
    data="held-out.jsonl",
    max_length=64,
    contexts=48,
    prefix=8,
    own=8,
    draft_length=4,
    device="cpu",
)
comparisons = {name: evaluate_pair(name, settings) for name in students}
print(comparisons["forward"])

# %% [markdown]
# Read it from the top. The ratio of the perplexities is what most reports give. Forward KL is
# large where the student gives too little probability to what the teacher may say, reverse KL
# where it generates what the teacher would not. The acceptance is the share of the student's
# tokens that speculative decoding with this teacher would keep, Σ min(p, q) = 1 − TV.
#
# The same for all students, side by side:


# %%
def cell(value):
    return f"{value['value']:.3f} ± {value['error']:.3f}"


print(f"{'student':9}{'forward KL':16}{'reverse KL':16}{'acceptance':16}perplexity ratio")
for name, comparison in comparisons.items():
    result = comparison.result
    values = [result["divergences"][it] for it in ("forward-kl", "reverse-kl")]
    values += [result["acceptance"], result["perplexity"]["ratio"]]
    print(f"{name:9}" + "   ".join(map(cell, values)))
for name in ("forward", "reverse"):
    forward, reverse = (
        comparisons[name].result["divergences"][it]["value"] for it in ("forward-kl", "reverse-kl")
    )
    print(f"reverse KL is {reverse / forward:.2f} times forward KL for the student of {name} KL")

# %% [markdown]
# The divergence that is minimised falls first. Relative to its forward KL, the student of reverse
# KL generates less that the teacher would not, and misses more of what the teacher may say.
# Which student is nearest after so few steps also depends on how fast each learns. Here it is
# AKL's, which weighs forward KL by the gap over the teacher's likely tokens, and reverse KL by the
# gap over the others.
# [Which divergence](../../docs/choose.md) helps to choose.

# %% Forward and reverse KL of each student on held-out rows; bars are two standard errors
from matplotlib import pyplot as plt

figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
for shift, (name, label) in enumerate(
    (("forward-kl", "forward KL"), ("reverse-kl", "reverse KL"))
):
    divergences = [comparison.result["divergences"][name] for comparison in comparisons.values()]
    axes.bar(
        [k + 0.38 * shift for k in range(len(comparisons))],
        [it["value"] for it in divergences],
        yerr=[2 * it["error"] for it in divergences],
        width=0.34,
        label=label,
    )
axes.set_xticks([k + 0.19 for k in range(len(comparisons))], list(comparisons))
axes.set(xlabel="student", ylabel="nats per token")
figure.legend(loc="outside upper left", ncols=2)
figure.savefig("lost.png")

# %% [markdown]
# And what it looks like at one place of the text: the next token after one prompt, the six
# likeliest of the teacher.

# %% Probability of the next token after one prompt, teacher and students
import torch

prompt = "The weather in Quito on Friday is"
tokens = tokenizer(prompt, return_tensors="pt").input_ids
with torch.no_grad():
    next_token = {
        name: model.eval()(tokens).logits[0, -1].softmax(-1)
        for name, model in {"teacher": teacher, **students}.items()
    }
likeliest = next_token["teacher"].topk(6).indices
figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
for k, (name, probability) in enumerate(next_token.items()):
    places = [place + 0.16 * k for place in range(6)]
    axes.bar(places, probability[likeliest].tolist(), width=0.15, label=name)
axes.set_xticks([place + 0.32 for place in range(6)], map(repr, map(tokenizer.decode, likeliest)))
axes.set_ylabel("probability")
axes.legend()
figure.savefig("next-token.png")

# %% [markdown]
# ## The same on the command line
#
# With the folders and files of this page:
#
# ```sh
# rkl distill --teacher teacher --student start --data train.jsonl --divergence kl --out RUN
# rkl evaluate RUN --data held-out.jsonl
# rkl evaluate RUN --teacher teacher --data held-out.jsonl --out pair.json
# rkl compare RUN OTHER --out comparison.html
# ```
#
# `rkl distill` also packs rows, holds some out, keeps the best student, resumes, and writes down
# everything that a run depends on. `--dry-run` prints time and memory first.
# `rkl evaluate RUN` adds what the student writes: ROUGE-L, Distinct-n and Self-BLEU.
