"""Settings of ``rkl distill``, and the errors that need no input to be read.

torch and transformers are imported where a setting needs them: the help of the command does not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from rkl import checks
from rkl.checks import LARGEST_RATE, number
from rkl.distill.limits import (
    COMPRESSED,
    check_alignment,
    check_counts,
    check_one_of,
    check_temperature,
    check_within,
    divergence_named,
    is_address,
    is_cache,
    published_column,
    template_variables,
)
from rkl.distill.writing.sampling import check_generation
from rkl.importing import import_object
from rkl.runs.typed import with_defaults

if TYPE_CHECKING:
    from rkl.divergences import Divergence

_RateSchedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class DistillSettings:
    """Everything that decides the result of :func:`rkl.distill.distill`.

    Args:
        teacher: The model to imitate, with the student's tokenizer or --teacher-alignment: a
            folder of save_pretrained, a .gguf file, package:NAME for the one in an installed
            package, or a name on the Hub;
            or the address of a server that gives log-probabilities, such as http://host:8000/v1,
            whose key, if it wants one, is read from RKL_TEACHER_API_KEY; or a folder that
            rkl cache wrote; or data:COLUMN, the log-probabilities that others published in a
            column of --data and --eval-data, such as data:target_logprobs; by default none, where
            --teachers or --teacher-model-kind is given.
        teacher_alignment: How a teacher with another tokenizer is compared with the student:
            bytes, over the tokens that both have, where both begin one at the same byte; sorted,
            by sorted probabilities, which do not tell tokens apart (give --hard-label-weight);
            text, by the text that it writes alone (--seq-kd); by default the tokenizers must be
            the same.
        teacher_compression: Of a teacher in a column that is a capture of DistillKit
            (data:compressed_logprobs), the compression_config.yaml beside it; none by default.
        teachers: Several models, each with a name, as math=PATH code=PATH; of each row the one
            teaches that --teacher-routing-column names, and rows share no block; by default
            --teacher alone.
        teacher_routing_column: The column of the data with the name of each row's teacher; by
            default teacher_id, where there are several.
        teachers_on_device: All of several teachers at once, or one at a time, the others waiting
            on the CPU; by default all.
        teacher_model_kind: In place of a teacher the student itself: base, as it began; ema, its
            moving average; live, as it is at each step; by default another model.
        teacher_update_rate: Share of the way to the student that the moving average goes at a
            time, above 0 and at most 1; by default 0.05.
        teacher_sync_steps: Steps between two moves of the moving average; by default 1.
        data: The text to learn on (required): a file (.jsonl, .json, .csv, .parquet,
            .txt), a folder of datasets' save_to_disk, or the name of a data set on the Hub.
        student: The model to train, given as the teacher is, or a config.json for random weights
            of that architecture; by default the teacher without --drop-layers.
        drop_layers: Layers that the student loses, counted from 0, both ends included, such as
            3,5,7-9; none by default.
        split: Which split of --data is read, where it has several.
        eval_data: Held-out text, given as --data is; by default a share of --data.
        eval_split: Which split of --eval-data is read, where it has several.
        held_out: Share of --data held out where there is no --eval-data, at least 0 and below 1.
            The student kept is the best one on it, or without any the last, as with
            --teacher-model-kind.
        eval_blocks: Held-out blocks looked at in each evaluation, at most.
        divergence: What is minimised, in nats per token: a name, with settings or in a sum, as
            rkl divergences lists them.
        on_policy_divergence: What is minimised in its place at the tokens that the student wrote,
            where --lmbda is above 0; by default the same. Evaluations are of --divergence.
        schedule: Values of the divergence that change from the first step to the last, in a
            straight line, such as "taid.t: 0.2 -> 1.0"; none by default. The student is evaluated
            with the last ones.
        temperature: What the logits of both models are divided by before they are compared,
            above 0. The loss is not multiplied by its square.
        hard_label_weight: Weight, beside the divergence, of the cross-entropy on the text itself
            in nats per token, at least 0; papers often take 0.5.
        token_weight: A function as package.module:name, called with log p, log q [tokens, vocab]
            and the batch, that gives the weight of each token in the training loss; by default
            every token counts as one.
        router_aux_loss: Add the loss that balances the experts of a student that is a mixture of
            them, times its router_aux_loss_coef, where its configuration has
            output_router_logits.
        max_steps: Number of steps, which are updates of the weights; by default as many as
            --epochs takes.
        epochs: Passes over the data, without --max-steps.
        max_length: Longest block, in tokens, at most the models' context; by default 512, or the
            context where that is shorter.
        packing: Let short rows share a block, in which they do not see one another. They share
            none where a model cannot keep them apart, --lmbda is above 0, or with --seq-kd or a
            teacher data:COLUMN.
        train_on: Of a chat, all turns of the assistant or the last.
        chat_template: A file with the chat template to use and to save with the student; by
            default the student's, or the teacher's where the student has none.
        chat_template_kwargs: What else the chat template is called with, as JSON, such as
            '{"enable_thinking": false}'; nothing by default.
        lmbda: Probability, the share of batches, that a batch is text which the student writes to
            its prompts at that step: 0 is the data alone, 1 own text alone. Rows may be prompts
            alone where it is 1.
        seq_kd: Have the teacher write the text of all other batches.
        max_completion_length: Longest reply that is trained on, in tokens.
        sampling_temperature: What the logits of the writer are divided by; 0 takes the likeliest
            token. It has no part in the loss.
        top_p: Probability mass of the likeliest tokens that a reply is drawn from, above 0.
        top_k: Number of likeliest tokens that a reply is drawn from; 0 for all.
        min_p: Smallest probability of a token that is drawn, as a share of the largest; none by
            default.
        num_generations: Replies to each prompt. A batch holds as many replies as blocks, so that
            it uses that share of its prompts.
        steps_per_generation: Batches written at once, before the first is trained on; by default
            those of a step.
        prompt_tokens: Length of a prompt in tokens, where the rows are plain text.
        guard: What to do where the student's own text collapses (grows, repeats itself, or is
            too sure): stop the training, mix in more of the data, or nothing (off).
        guard_window: Steps with own text in the means that are judged; the first so many say how
            the student began.
        student_server: Address of an OpenAI-compatible server that writes the student's replies,
            such as http://localhost:8000/v1; by default they are written here.
        student_server_weights: A folder that this server sees, through which it gets the weights;
            by default RUN/checkpoints/served.
        log_completions: Write the own text of logged steps into completions.jsonl, with the loss
            of the batch in nats per token.
        batch_size: Blocks run together, which decides the memory needed; of several processes
            each runs as many.
        gradient_accumulation: Batches in a step, whose loss is that of one large batch.
        learning_rate: Peak rate of AdamW, which is about how far a weight moves in a step.
        learning_rate_schedule: How the learning rate goes on from its peak: down to 0, or
            constant.
        warmup: Share of the steps in which the learning rate rises to its peak, at least 0 and
            below 1.
        weight_decay: Share of itself, times the learning rate, that a weight loses in a step.
        max_gradient: Norm that a longer gradient is shortened to; 0 shortens none.
        eval_every: Steps between evaluations on held-out text; by default a tenth of all.
        save_every: Steps between checkpoints; by default a tenth of all.
        keep_checkpoints: Checkpoints kept on the disk, 2 or more: the best and the last too.
        dtype: What is computed in; the weights of the student stay float32.
        compiled: Compile the loss; by default where the work is worth the minute it takes.
        loss_top_k: Of a teacher on a server, the number of likeliest tokens asked for at each
            place; 64 by default. Servers of vLLM give 20 unless started with --max-logprobs. With
            --teacher-alignment bytes, the number of likeliest common tokens compared one by one;
            all by default.
        teacher_timeout: Seconds that an answer of a server may take.
        teacher_reference: A local model of the same weights as the one on the server, from which
            the distance of its answers is measured on the first batch, and printed; by default
            nothing is measured.
        allow_partial: On a teacher known by its top k, minimise also a divergence of which most
            may lie among the other atoms, such as reverse KL or AKL.
        gradient_checkpointing: Compute activations twice rather than keep them: less memory, more
            time.
        shard: Give each of several processes a part of the weights of student and teacher (FSDP2),
            which are gathered layer by layer, rather than all of them: for models that are too
            large for one GPU. Not with --teachers, --teacher-model-kind or --teacher-alignment.
        lora_rank: Rank of LoRA adapters, which are then trained in place of all weights (extra
            peft); none by default. Their alpha is twice the rank, so that the rate needs no
            change with it. The run holds the student with the adapters merged, and the adapters
            in adapter/.
        lora_targets: Modules that get adapters, such as q_proj,v_proj; by default all linear
            layers but the head.
        cache_teacher: Run the teacher once over the data, and keep its hidden states on the disk
            until the run ends: faster from the second epoch on.
        report_to: Where metrics go beside metrics.jsonl, such as tensorboard or wandb, or several
            with commas, as transformers names them; nowhere by default.
        seed: Of the order of the blocks, and of new weights.
        device: "cpu" or "cuda"; by default a GPU if there is one.
    """

    teacher: str | None = None
    data: str = ""  # refused: a word before it has a default
    teacher_compression: str | None = None
    teacher_alignment: Literal["text", "bytes", "sorted"] | None = None
    teachers: tuple[str, ...] = field(default=(), metadata={"metavar": "NAME=PATH"})
    teacher_routing_column: str | None = None
    teachers_on_device: Literal["all", "one"] | None = None
    teacher_model_kind: Literal["base", "ema", "live"] | None = None
    teacher_update_rate: float | None = None
    teacher_sync_steps: int | None = None
    student: str | None = None
    drop_layers: str | None = None
    split: str = "train"
    eval_data: str | None = None
    eval_split: str = "test"
    held_out: float = 0.05
    eval_blocks: int | None = 64
    divergence: str = "akl(mu=0.5)"
    on_policy_divergence: str | None = None
    schedule: str | None = None
    temperature: float = 1.0
    hard_label_weight: float = 0.0
    token_weight: str | None = None
    router_aux_loss: bool = True
    max_steps: int | None = None
    epochs: float = 1.0
    max_length: int | None = None
    packing: bool = True
    train_on: Literal["all", "last"] = "all"
    chat_template: str | None = None
    chat_template_kwargs: str | None = None
    lmbda: float = 0.0
    seq_kd: bool = False
    max_completion_length: int = 256
    sampling_temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    num_generations: int = 1
    steps_per_generation: int | None = None
    prompt_tokens: int = 32
    guard: Literal["stop", "mix", "off"] = "stop"
    guard_window: int = 20
    student_server: str | None = None
    student_server_weights: str | None = None
    log_completions: bool = False
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    learning_rate_schedule: _RateSchedule = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_gradient: float = 1.0
    eval_every: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    compiled: bool | None = None
    loss_top_k: int | None = None
    teacher_timeout: float = 120.0
    teacher_reference: str | None = None
    allow_partial: bool = False
    gradient_checkpointing: bool = False
    shard: bool = False
    lora_rank: int | None = None
    lora_targets: str | None = None
    cache_teacher: bool = False
    report_to: str = "none"
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        if not self.data:
            raise ValueError("data must be given: --data FILE, here or in --config FILE.")
        self._check_teachers()
        if self.student is None and self.drop_layers is None:
            raise ValueError(
                "student must be given, or drop_layers, which makes it out of the teacher."
            )
        if self.schedule in get_args(_RateSchedule):  # in settings from before there were two
            object.__setattr__(self, "learning_rate_schedule", self.schedule)
            object.__setattr__(self, "schedule", None)
        _ = self.minimised, self.minimised_on_policy
        if self.on_policy_divergence is not None and not self.lmbda:
            raise ValueError(
                "on_policy_divergence needs lmbda above 0, so that the student writes text; got "
                f"{self.on_policy_divergence} with lmbda={self.lmbda}."
            )
        _ = self.weigh_tokens
        self._check_aligned()
        self._check_published()
        self._check_server()
        if self.student is None and self.teacher is not None and is_cache(self.teacher):
            raise ValueError(
                f"student must be given where the teacher is a cache, which holds no model; got "
                f"{self.teacher}."
            )
        if self.cache_teacher and self.teacher is None:
            raise ValueError(
                "cache_teacher keeps what one teacher tells of the data; got True with "
                f"{'teachers' if self.teachers else 'teacher_model_kind'}."
            )
        if self.cache_teacher and is_cache(str(self.teacher)):
            raise ValueError(f"cache_teacher: {self.teacher} is a cache already; got True.")
        check_counts(
            self,
            "loss_top_k",
            *("eval_blocks", "max_steps", "batch_size", "gradient_accumulation"),
            *("eval_every", "save_every", "lora_rank"),
        )
        check_generation(self, self.batch_size, self.gradient_accumulation)
        if self.cache_teacher and self.writes:
            raise ValueError(
                "cache_teacher keeps what the teacher says of the data, and must be off where "
                f"text is written later: with lmbda={self.lmbda}, seq_kd={self.seq_kd}."
            )
        self._check_shard()
        template_variables(self.chat_template_kwargs)
        if self.lora_targets is not None and self.lora_rank is None:
            raise ValueError("lora_targets needs lora_rank, such as 16; got None.")
        if self.lora_targets is not None and "" in self.lora_targets.replace(" ", "").split(","):
            raise ValueError(
                f"lora_targets must be names of modules such as q_proj,v_proj; "
                f"got {self.lora_targets!r}."
            )
        self._check_reporters()
        # Two checkpoints for the best and the last, two tokens for one and the next.
        check_counts(self, "keep_checkpoints", "max_length", at_least=2)
        check_within(self, "held_out", "warmup", high=1, ends="[)")
        check_within(self, "hard_label_weight", "weight_decay", "max_gradient", ends="[)")
        check_within(self, "epochs", "learning_rate", "teacher_timeout")
        check_temperature(self)
        for name in ("learning_rate", "hard_label_weight", "weight_decay"):
            number(name, getattr(self, name), at_most=LARGEST_RATE)
        check_one_of(self, "train_on", "all", "last")
        check_one_of(self, "learning_rate_schedule", *get_args(_RateSchedule))
        check_one_of(self, "dtype", "float32", "bfloat16")
        check_counts(self, "seed", at_least=0)
        if self.seed >= 2**32:
            raise ValueError(f"seed must lie between 0 and 2³² − 1; got {self.seed}.")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(
                f"device must be cpu or cuda; got {self.device!r}. CUDA_VISIBLE_DEVICES says "
                "which GPU."
            )
        checks.device(self.device)

    def _check_shard(self) -> None:
        """Refuse what models whose weights processes share cannot do."""
        names = "teachers", "teacher_model_kind", "teacher_alignment"
        for name in names if self.shard else ():
            if value := getattr(self, name):
                raise ValueError(
                    f"shard: {name} is not supported with weights that several processes share; "
                    f"got {value!r}. Leave one of the two out."
                )

    def _check_reporters(self) -> None:
        """Refuse what transformers reports to under no such name."""
        if not self.reporters:
            return
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        for name in self.reporters:
            if name not in INTEGRATION_TO_CALLBACK:
                known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
                raise ValueError(f"report_to must be none or of {known}; got {name!r}.")

    def _check_teachers(self) -> None:
        """Refuse settings that name no teacher, or two kinds of them, or have no effect."""
        kinds = "teacher", "teachers", "teacher_model_kind"
        given = [name for name in kinds if getattr(self, name)]
        if len(given) != 1:
            got = "none" if not given else " and ".join(given)
            raise ValueError(
                "teacher must be given, or teachers (--teachers math=PATH code=PATH), or "
                f"teacher_model_kind, which makes the student its own, and one of them; got {got}."
            )
        needed = {
            "teacher_routing_column": self.teachers,
            "teachers_on_device": self.teachers,
            "teacher_update_rate": self.teacher_model_kind == "ema",
            "teacher_sync_steps": self.teacher_model_kind == "ema",
        }
        for name, used in needed.items():
            if (value := getattr(self, name)) is not None and not used:
                of = "teachers" if "teachers" in name or "column" in name else "ema"
                wanted = "--teachers" if of == "teachers" else "--teacher-model-kind ema"
                raise ValueError(f"{name} goes with {wanted}, and has no effect; got {value!r}.")
        check_counts(self, "teacher_sync_steps")
        if self.teacher_update_rate is not None:
            check_within(self, "teacher_update_rate", high=1, ends="(]")
        if self.teacher is None and self.student is None:
            raise ValueError(f"student must be given with {given[0]}; got None.")
        for name, model in self.named_teachers.items():
            elsewhere = is_address(model) or is_cache(model) or published_column(model) is not None
            if self.teachers and elsewhere:
                raise ValueError(
                    "teachers must be models, for one of them alone may be a server, a cache or a "
                    f"column of the data; got {name}={model}."
                )
        if self.teachers and self.seq_kd:
            raise ValueError("seq_kd needs one teacher, which writes; got True with teachers.")

    @property
    def named_teachers(self) -> dict[str, str]:
        """The model of each teacher by its name, which a single one lacks; none is the student."""
        if self.teacher is not None:
            return {"": self.teacher}
        models: dict[str, str] = {}
        for text in self.teachers:
            name, equals, model = text.partition("=")
            if not (name and equals and model):
                raise ValueError(
                    f"teachers must be names with models, as math=PATH code=PATH; got {text!r}."
                )
            if name in models:
                raise ValueError(f"teachers must have different names; got {name} twice.")
            models[name] = model
        return models

    @property
    def routing_column(self) -> str | None:
        """The column of the data that names the teacher of each row, where there are several."""
        return (self.teacher_routing_column or "teacher_id") if self.teachers else None

    @property
    def weigh_tokens(self) -> "Callable[..., Any] | None":
        """The function that weighs tokens in the training loss."""
        if self.token_weight is None:
            return None
        try:
            found = import_object(self.token_weight)
        except ValueError as error:
            raise ValueError(f"token_weight: {error}") from None
        if not callable(found):
            raise TypeError(
                f"token_weight must be a function of log_p, log_q and batch; "
                f"{self.token_weight} is a {type(found).__name__}."
            )
        return found

    def _check_server(self) -> None:
        """Refuse what a teacher on a server, known by its likeliest tokens, cannot do."""
        if self.teacher is None or not is_address(self.teacher):
            names = ("loss_top_k", "teacher_reference")
            for name in names[1:] if self.teacher_alignment == "bytes" else names:
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"{name} is for a teacher on a server, such as http://host:8000/v1, and "
                        f"has no effect; got {value!r} with {self.teacher or 'a model'}."
                    )
            return
        if self.student is None:
            raise ValueError(
                f"student must be given where the teacher is on a server; got {self.teacher}."
            )
        if self.cache_teacher:
            raise ValueError(
                "cache_teacher keeps hidden states, which a server does not give; got True with "
                f"{self.teacher}."
            )
        self._check_top_k("a teacher on a server")

    def _check_aligned(self) -> None:
        """Refuse what a teacher with another tokenizer cannot be, or do."""
        check_temperature(self)
        check_alignment(self)
        if (kind := self.teacher_alignment) is None:
            return
        named = str(self.teacher)
        elsewhere = is_address(named) or is_cache(named) or published_column(named) is not None
        if self.teacher is None or elsewhere:
            raise ValueError(
                f"teacher must be one model with teacher_alignment={kind!r}; got "
                f"{'teachers' if self.teachers else named}."
            )
        if self.cache_teacher:
            raise ValueError(
                f"cache_teacher keeps what a teacher tells of the student's tokens; got True with "
                f"teacher_alignment={kind!r}."
            )
        if kind == "sorted":
            for divergence in filter(None, (self.minimised, self.minimised_on_policy)):
                if divergence.takes_labels:
                    raise ValueError(
                        f"divergence: {divergence} looks at the true token, and sorted "
                        "probabilities have lost which one that is."
                    )
            return
        self._check_top_k(f"a teacher with teacher_alignment={kind!r}")

    def _check_published(self) -> None:
        """Refuse what a teacher in a column of the data cannot do."""
        column = published_column(self.teacher)
        if column is None:
            if self.teacher_compression is not None:
                raise ValueError(
                    "teacher_compression goes with --teacher data:compressed_logprobs, and has no "
                    f"effect; got {self.teacher_compression!r} with {self.teacher}."
                )
            return
        if not column:
            raise ValueError(
                f"teacher must name a column, such as data:target_logprobs; got {self.teacher!r}."
            )
        if (column == COMPRESSED) != (self.teacher_compression is not None):
            raise ValueError(
                f"teacher_compression must be given for the column {COMPRESSED}, a capture of "
                f"DistillKit, and for no other; got {self.teacher_compression!r} with "
                f"{self.teacher}."
            )
        if self.student is None:
            raise ValueError(
                "student must be given where the teacher is a column of the data, which holds no "
                f"model; got {self.teacher}."
            )
        for name in ("lmbda", "seq_kd"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name} needs a teacher that reads text which is written later; got {value} "
                    f"with {self.teacher}, which is known at the rows of the data alone."
                )
        if self.cache_teacher:
            raise ValueError(
                "cache_teacher keeps hidden states, which a column of log-probabilities does not "
                f"give; got True with {self.teacher}."
            )
        self._check_top_k("a teacher in a column of the data")

    def _check_top_k(self, teacher: str) -> None:
        """Refuse what a teacher that is known by its likeliest tokens cannot do."""
        if self.temperature != 1:
            raise ValueError(
                f"temperature must be 1 for {teacher}, which is known by its likeliest "
                f"tokens; got {self.temperature}."
            )
        from rkl.distill.known import lost_in_the_rest

        chosen = {"divergence": self.minimised, "on_policy_divergence": self.minimised_on_policy}
        for name, divergence in chosen.items():
            reason = None if divergence is None else lost_in_the_rest(divergence)
            if reason is not None and not self.allow_partial:
                raise ValueError(
                    f"{name}: {getattr(self, name)} on {teacher}, known by its "
                    f"likeliest tokens: {reason}, so that most of it may lie among the others. "
                    "Take kl or jensen-shannon, or say --allow-partial."
                )

    @property
    def minimised(self) -> "Divergence":
        """The divergence that the text means, of a schedule that at the last step."""
        from rkl.divergences.schedule import read_schedule

        return read_schedule(self.schedule, divergence_named(self.divergence)).at(1.0)

    @property
    def minimised_on_policy(self) -> "Divergence | None":
        """The divergence at the student's own tokens, where it is another one."""
        text = self.on_policy_divergence
        return None if text is None else divergence_named(text, "on_policy_divergence")

    @property
    def writes(self) -> bool:
        """True if some batches are text of the student or the teacher."""
        return self.lmbda > 0 or self.seq_kd

    @property
    def reporters(self) -> list[str]:
        """The names in ``report_to``."""
        return [name.strip() for name in self.report_to.split(",") if name.strip() != "none"]

    def steps(self, blocks: int, processes: int = 1) -> int:
        """Steps of a run on so many blocks, of which each process takes a batch at a time."""
        if self.max_steps is not None:
            return self.max_steps
        batches = -(-blocks // (self.batch_size * processes))
        return max(1, round(self.epochs * -(-batches // self.gradient_accumulation)))


def upgrade(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that an earlier rkl began, as they are called today."""
    values = {**earlier}
    if values.get("schedule") in get_args(_RateSchedule):  # from before there were two
        values["learning_rate_schedule"] = values.pop("schedule")
    return with_defaults(DistillSettings, values)
