"""Small language models out of nothing but text: a tokenizer, new weights, next-token training."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from rkl.checks import LARGEST_COUNT, LARGEST_SEED, integer
from rkl.distill.progress import Display, Journal, journaled
from rkl.distill.text.batches import PadRows
from rkl.distill.text.data import TokenDataset
from rkl.distill.text.encoding import end_of_text
from rkl.runs import Run, replacing_files

END = "<|endoftext|>"


HEAD = 32  # width of an attention head


@dataclass(frozen=True)
class Shape:
    """The size of a new model.

    Args:
        layers: Number of layers.
        width: Of the hidden states, a multiple of 32, the width of an attention head.
        context: Longest text it can read, in tokens.
    """

    layers: int
    width: int
    context: int = 256

    def __post_init__(self):
        integer("layers", self.layers, at_least=1, at_most=LARGEST_COUNT)
        integer("width", self.width, at_least=HEAD, at_most=LARGEST_COUNT)
        integer("context", self.context, at_least=2, at_most=LARGEST_COUNT)
        if self.width % HEAD:
            raise ValueError(f"width must be a multiple of {HEAD}; got {self.width}.")


@dataclass(frozen=True)
class Schooling:
    """Settings of the training of a new model on the next token.

    Args:
        steps: Updates of the weights.
        batch_size: Blocks of tokens in each.
        learning_rate: Its peak, after a tenth of the steps; then it falls as a cosine.
        weight_decay: AdamW's.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.1


def new_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``size`` tokens, the first of which ends a text.

    Args:
        texts: What it is learnt from.
        size: Most tokens, at least 257: those of single bytes and of the end of a text.

    Raises:
        TypeError: ``texts`` is a single text, or holds what is none.
    """
    integer("size", size, at_least=257, at_most=LARGEST_COUNT)
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a list of texts; got a {type(texts).__name__}.")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must be a list of texts; texts[{number}] is {text!r:.40}.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def new_model(tokenizer: PreTrainedTokenizerFast, shape: Shape, *, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings.

    Args:
        tokenizer: Whose tokens it reads.
        shape: Its size.
        seed: Random seed of the weights.
    """
    if not isinstance(shape, Shape):
        raise TypeError(f"shape must be a Shape; got {shape!r:.80}.")
    integer("seed", seed, at_least=0, at_most=LARGEST_SEED)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=8 * -(-shape.width // 3),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // HEAD,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text(tokenizer),
        pad_token_id=end_of_text(tokenizer),
    )
    return LlamaForCausalLM(config)


def school(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    blocks: TokenDataset,
    schooling: Schooling,
    run: Run,
    *,
    seed: int,
    device: str | None = None,
) -> None:
    """Minimise the cross-entropy of the next token, and save model and tokenizer into a run.

    Args:
        model: Changed in place.
        tokenizer: Its tokenizer.
        blocks: What it learns from.
        schooling: For how long, and how.
        run: Where it is kept; the loss goes into its metrics.
        seed: Of the order of the blocks.
        device: "cpu", or None for a GPU if there is one.
    """
    arguments = TrainingArguments(
        output_dir=str(run.path),
        max_steps=schooling.steps,
        per_device_train_batch_size=schooling.batch_size,
        learning_rate=schooling.learning_rate,
        weight_decay=schooling.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=schooling.steps // 10,
        logging_steps=max(1, schooling.steps // 50),
        save_strategy="no",
        seed=seed,
        **journaled(device),
    )
    display = Display(schooling.steps)
    trainer = Trainer(
        model,
        arguments,
        data_collator=PadRows(end_of_text(tokenizer)),
        train_dataset=blocks,
        callbacks=[Journal(run, display)],
    )
    trainer.remove_callback(PrinterCallback)
    with display.bar:
        trainer.train()
    with replacing_files(run.path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
