"""The settings of a distillation trainer."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from rkl.checks import LARGEST_RATE, number
from rkl.distill.limits import (
    check_alignment,
    check_counts,
    check_one_of,
    check_temperature,
    check_within,
    template_variables,
)
from rkl.distill.teachers.self_teacher import KINDS
from rkl.distill.writing.sampling import check_generation


@dataclass
class DistillConfig(TrainingArguments):
    """The settings of a distillation, beside all those of transformers.TrainingArguments.

    Args:
        temperature: What the logits of both are divided by before they are compared, > 0. The
            loss is not multiplied by its square.
        hard_label_weight: Weight of the cross-entropy on the labels, at temperature 1, beside
            the divergence, >= 0; the papers take 0.5.
        schedule: Fields of the divergence that change from the first step to the last, in a
            straight line, such as "taid.t: 0.2 -> 1.0", several separated by ";". A new
            value compiles nothing. Evaluations take the last value, so that they are comparable.
        router_aux_loss: Whether to add the loss that balances the experts of a student that is a
            mixture of them, times its ``router_aux_loss_coef``, where its configuration has
            ``output_router_logits``.
        max_length: Tokens that are kept of each row, from the first on; None keeps all.
        compiled: Whether to compile the loss; None lets the size of the work decide.
        lmbda: Probability that a batch is the student's own text, written to the batch's prompts
            by the student as it is at that step: 0 trains on the data, 1 on own text alone.
        seq_kd: Whether the teacher writes the text of all other batches.
        max_completion_length: Longest reply, in tokens.
        sampling_temperature: What the logits of the writer are divided by, >= 0; 0 takes the
            likeliest token. It has no part in the loss.
        top_p: Mass of the nucleus that tokens are drawn from.
        top_k: Number of likeliest tokens that tokens are drawn from; 0 for all.
        min_p: Smallest probability of a token that is drawn, as a share of the largest.
        num_generations: Replies to each prompt. A batch holds as many replies as it has rows, so
            that only this share of its prompts is replied to.
        steps_per_generation: Batches written at once, before the first of them is trained on; a
            multiple of gradient_accumulation_steps, which is the default. More of them are
            written by an earlier student than the one that learns from them.
        prompt_tokens: Length of a prompt in tokens where rows have none, as plain text.
        chat_template_kwargs: What else the chat template is called with, as an object or JSON.
        guard: What to do where own text collapses: "stop" the training, "mix" in more of the
            data, half the probability of own text at a time, or "off".
        guard_window: Steps with own text in the means that are judged; the first so many say how
            the student began.
        student_server: Address of a server that writes as the student, such as
            http://localhost:8000/v1; None writes here. Of several processes it is refused.
        student_server_weights: A folder through which that server gets the student's weights;
            None takes one in the output folder.
        log_completions: Whether to write the own text of the first batches of logged steps, of the
            first process, into completions.jsonl.
        teacher_routing_column: Column of the data with the name of each row's teacher, where
            there are several.
        teacher_model_kind: In place of a teacher, the student itself: "base", as it began; "ema",
            its moving average; or "live", as it is at each step.
        teacher_update_rate: Share of the way to the student that the moving average goes at a
            time, in (0, 1].
        teacher_sync_steps: Steps between two of them.
        teachers_on_device: "all" of several teachers, or "one" at a time, the others waiting on
            the CPU.
        teacher_alignment: How a teacher with another tokenizer, whose ``teacher_processing_class``
            the trainer then needs, is compared with the student: "bytes", where both begin a token
            at the same byte (:class:`AlignedTeacher`); "sorted", by sorted probabilities
            (:class:`SortedTeacher`); "text", by the text that it writes alone, with ``seq_kd``
            (:class:`TextTeacher`); None for a teacher with the student's tokens.
        loss_top_k: Number of likeliest common tokens that "bytes" tells apart from the rest; None
            for all.
        allow_partial: Whether to minimise, on a teacher known by its top k, also a divergence of
            which most may lie among the other atoms, such as reverse KL or AKL.
    """

    temperature: float = field(default=1.0, metadata={"help": "Divides the logits of both."})
    hard_label_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy on the labels."}
    )
    schedule: str | None = field(
        default=None, metadata={"help": 'Change the divergence, such as "taid.t: 0.2 -> 1.0".'}
    )
    router_aux_loss: bool = field(
        default=True, metadata={"help": "Add the loss that balances the student's experts."}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Tokens kept of each row."})
    compiled: bool | None = field(default=None, metadata={"help": "Compile the loss."})
    lmbda: float = field(
        default=0.0, metadata={"help": "Probability that a batch is the student's own text."}
    )
    seq_kd: bool = field(
        default=False, metadata={"help": "Have the teacher write the other batches."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest reply, in tokens."})
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits of the writer, not of the loss."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Mass of the nucleus drawn from."})
    top_k: int = field(default=0, metadata={"help": "Likeliest tokens drawn from; 0 for all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Smallest probability drawn, as a share of the largest."}
    )
    num_generations: int = field(default=1, metadata={"help": "Replies to each prompt."})
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Batches written at once."}
    )
    prompt_tokens: int = field(
        default=32, metadata={"help": "Length of a prompt out of plain text, in tokens."}
    )
    teacher_routing_column: str = field(
        default="teacher_id", metadata={"help": "Column that names each row's teacher."}
    )
    teacher_model_kind: str | None = field(
        default=None, metadata={"help": "The student as teacher: base, ema or live."}
    )
    teacher_update_rate: float = field(
        default=0.05, metadata={"help": "Share of the way that the moving average goes."}
    )
    teacher_sync_steps: int = field(
        default=1, metadata={"help": "Steps between updates of the moving average."}
    )
    teachers_on_device: str = field(
        default="all", metadata={"help": "All of several teachers, or one at a time."}
    )
    teacher_alignment: str | None = field(
        default=None, metadata={"help": "Compare another tokenizer by bytes, sorted or text."}
    )
    loss_top_k: int | None = field(
        default=None, metadata={"help": "Likeliest common tokens compared one by one."}
    )
    allow_partial: bool = field(
        default=False, metadata={"help": "Minimise any divergence on a teacher's top k."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "What else the chat template is called with."}
    )
    guard: str = field(default="stop", metadata={"help": "Stop or mix where own text collapses."})
    guard_window: int = field(default=20, metadata={"help": "Steps in the means it judges."})
    student_server: str | None = field(
        default=None, metadata={"help": "Address of a server that writes as the student."}
    )
    student_server_weights: str | None = field(
        default=None, metadata={"help": "Folder through which it gets the student's weights."}
    )
    log_completions: bool = field(default=False, metadata={"help": "Write own text to a file."})

    def __post_init__(self):
        # The Trainer takes the largest of what is not called a loss.
        if self.greater_is_better is None and _is_of_tokens(self.metric_for_best_model):
            self.greater_is_better = False
        super().__post_init__()
        template_variables(self.chat_template_kwargs)
        check_generation(self, self.per_device_train_batch_size, self.gradient_accumulation_steps)
        check_temperature(self)
        check_within(self, "hard_label_weight", ends="[)")
        number("hard_label_weight", self.hard_label_weight, at_most=LARGEST_RATE)
        check_counts(self, "max_length", at_least=2)  # a token and the next
        if self.router_aux_loss not in (True, False):
            got = self.router_aux_loss
            raise TypeError(f"router_aux_loss must be True or False; got {got!r}.")
        check_one_of(self, "teachers_on_device", "all", "one")
        check_within(self, "teacher_update_rate", high=1, ends="(]")
        check_counts(self, "teacher_sync_steps")
        if self.teacher_model_kind is not None:
            check_one_of(self, "teacher_model_kind", *KINDS)
        check_counts(self, "loss_top_k")
        check_alignment(self)
        if self.loss_top_k is not None and self.teacher_alignment != "bytes":
            raise ValueError(
                f"loss_top_k goes with teacher_alignment='bytes', and has no effect; got "
                f"{self.loss_top_k}."
            )
        if self.allow_partial not in (True, False):
            raise TypeError(f"allow_partial must be True or False; got {self.allow_partial!r}.")
        if self.compiled not in (None, True, False):
            raise TypeError(f"compiled must be True, False or None; got {self.compiled!r}.")
        if self.label_smoothing_factor != 0:
            raise ValueError(
                "label_smoothing_factor has no meaning in distillation, where the teacher smooths "
                f"the labels; got {self.label_smoothing_factor}, expected 0."
            )


def _is_of_tokens(metric: str | None) -> bool:
    """True for the name of one of our own metrics, of which smaller ones are better."""
    ends = "cross_entropy", "infinite_tokens"
    return metric is not None and any(metric == it or metric.endswith(f"_{it}") for it in ends)
