"""Distil one small model into a smaller one, in Python and without a download.

Any two causal language models with the same tokenizer will do: load_model("Qwen/Qwen3-0.6B"),
a folder, a .gguf file; for two tokenizers see teacher_alignment of DistillConfig. These two are
made on the spot, so that this runs in seconds.

    python examples/distil.py RUN
"""

import sys
from pydoc_data.topics import topics

import rkl
from rkl.distill import DistillConfig, DistillTrainer, Shape, new_model, new_tokenizer, tokenize


def main(out: str) -> None:
    texts = [topics[name] for name in ("for", "while", "if", "try", "with")]
    tokenizer = new_tokenizer(texts, size=400)
    teacher = new_model(tokenizer, Shape(layers=2, width=64), seed=0)
    student = new_model(tokenizer, Shape(layers=1, width=32), seed=1)
    blocks = tokenize([{"text": text} for text in texts], tokenizer, max_length=64)

    trainer = DistillTrainer(
        student,
        DistillConfig(out, max_steps=20, learning_rate=1e-2, report_to="none", use_cpu=True),
        teacher=teacher,
        divergence=0.5 * rkl.KL() + 0.5 * rkl.ReverseKL(),
        train_dataset=blocks,
        eval_dataset=blocks,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(out)  # an ordinary folder for AutoModelForCausalLM.from_pretrained
    print(f"{trainer.divergence}: {before:.3f} nats per token before, {after:.3f} after")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/distil.py RUN")
    main(sys.argv[1])
