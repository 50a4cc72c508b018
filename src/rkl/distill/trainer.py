"""Distillation as a transformers.Trainer: D(teacher ‖ student) at every labelled token."""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from rkl.checks import warn
from rkl.distill.arguments import (
    check_arguments,
    check_on_policy,
    check_sharded,
    check_teacher_length,
    check_teacher_texts,
    check_zero3,
    tokenized,
    warn_of_cut,
)
from rkl.distill.batch_loss import BatchLoss
from rkl.distill.checkpoints import (
    PENDING,
    Moment,
    is_pending,
    replacing_folder_together,
    rotate,
    settle,
)
from rkl.distill.config import DistillConfig
from rkl.distill.guard import MAX_MEASURED, CollapseError, CollapseLimits, Watch
from rkl.distill.known import (
    Known,
    Observed,
    confidence,
)
from rkl.distill.limits import (
    context_of,
)
from rkl.distill.models import zero3
from rkl.distill.models.heads import read_head, why_not_apart
from rkl.distill.models.sharded import (
    is_sharded,
    load_state,
    load_weights,
    local_gradient,
    whole_state,
    whole_weights,
)
from rkl.distill.processes import disconnect_at_exit
from rkl.distill.selection import PATIENCE, DivergedError, bad_weights, improves, not_finite
from rkl.distill.teachers.other_tokens import align_teacher
from rkl.distill.teachers.self_teacher import SelfTeacher
from rkl.distill.teachers.several import RouteRows, SeveralTeachers
from rkl.distill.teachers.teacher import Teacher, as_teacher
from rkl.distill.text.batches import (
    SOURCES,
    STUDENT,
    TEACHER_MASK,
    Batch,
    PadRows,
    attended,
    for_teacher,
    shifted,
    sources_of,
)
from rkl.distill.text.data import IGNORED, TEACHER_IDS, TEACHER_LABELS, TokenDataset
from rkl.distill.text.vocabulary import share_vocabulary
from rkl.distill.writing.on_policy import (
    COMPLETIONS,
    MIN_LMBDA,
    Mixture,
    completions_of,
    rewind_completions,
)
from rkl.distill.writing.rollouts import (
    ModelWriter,
    check_prompts,
    common_ends,
)
from rkl.distill.writing.sampling import sampling_of
from rkl.distill.writing.server import ServerWriter
from rkl.divergences import AKL, Divergence
from rkl.divergences.schedule import read_schedule
from rkl.estimators import LinearHead
from rkl.runs import measure_written, replacing_files, sweep, write_json
from rkl.runs.files import append_jsonl
from rkl.runs.processes import world

_NOTHING = 1e-9  # nats per token below which a divergence is rounding


class DistillTrainer(Trainer):
    """A transformers.Trainer that minimises D(teacher ‖ student) per labelled token.

    With ``lmbda`` above 0 some batches, or all, are text that the student writes to the prompts
    of the data. The gradient is that of the per-token divergence with the text held fixed: the
    effect of a token on what is written after it is left out, as in all on-policy distillation.

    The loss takes the place of the student's head, inside the forward of whatever wraps the
    student, and logits exist for a chunk of tokens at a time. Its denominator is the number of
    tokens trained on in a whole step, over all processes and accumulated batches, however the
    rows are split among them.

    A NaN in a loss, a gradient or an evaluation raises :class:`DivergedError` before it reaches
    the weights; so do steps in a row whose divergence is infinite at every token.

    Args:
        model: The student.
        args: Its settings.
        teacher: A model with the student's tokenizer, which is left as it is; "base" for the
            model below a PEFT student's adapters; or any :class:`Teacher`, such as a cache. One of
            another tokenizer is an :class:`AlignedTeacher`, or a model with ``teacher_alignment``
            in ``args`` and its ``teacher_processing_class``.
        teachers: Several of them, by name, in place of one: the column of the data that
            ``teacher_routing_column`` names says which of them a row learns from.
        divergence: Any divergence.
        on_policy_divergence: What is minimised in its place at the tokens that the student wrote
            (``lmbda`` above 0), as DistiLLM-2 does with a skewed KL on given text and a skewed
            reverse KL on own text (arXiv 2503.07067). The text of ``seq_kd`` counts as given.
            The log then has ``data_loss`` and ``on_policy_loss``, the mean over the tokens of
            either. Evaluations and a schedule are of ``divergence``.
        token_weight: Called with log p, log q [tokens, vocab] and the batch, gives the weight of
            each token in the loss of training, at least 0 and constant to autograd. The
            denominator stays the number of tokens. Full logits of both then exist at once.
        limits: How far the student's own text may go from what it was in the beginning.
        teacher_processing_class: The teacher's tokenizer, to be compared with the student's,
            which is ``processing_class``, or that of a processor.
        **kwargs: As for transformers.Trainer. Data sets may be rows of text, of prompt and
            completion or of messages, which ``processing_class`` then tokenizes, unpacked; call
            :func:`rkl.distill.tokenize` yourself to have them packed.
    """

    args: DistillConfig

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillConfig | None = None,
        *,
        teacher: nn.Module | Literal["base"] | Teacher | None = None,
        teachers: Mapping[str, nn.Module | Teacher] | None = None,
        divergence: Divergence = AKL(),
        on_policy_divergence: Divergence | None = None,
        token_weight: Callable[..., Any] | None = None,
        limits: CollapseLimits | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args = DistillConfig() if args is None else args
        check_arguments(
            model, args, teacher, teachers, divergence, kwargs, teacher_processing_class
        )
        check_on_policy(on_policy_divergence, args)
        tokenizer = _tokenizer_in(kwargs.get("processing_class"))
        if (started := world().size) != args.world_size:
            raise ValueError(
                f"args: {started} processes were started, but each of them would train alone "
                f"(args.world_size is {args.world_size}). On CPUs pass use_cpu=True."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"one process cannot share {args.n_gpu} GPUs; start one for each with "
                "torchrun or accelerate launch, or show it only one with CUDA_VISIBLE_DEVICES."
            )
        check_sharded(model, args, teacher, teachers)
        self._zero3 = args.deepspeed_plugin is not None
        if args.deepspeed_plugin is not None:
            check_zero3(model, args, teacher, teachers)
        self._tokenized = functools.partial(
            tokenized,
            tokenizer=tokenizer,
            args=args,
            column=None if teachers is None else args.teacher_routing_column,
        )
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = self._tokenized(name, kwargs.get(name))
        self._schedule = read_schedule(args.schedule, divergence)
        self._batch_loss = BatchLoss(
            args, self._schedule.at(1.0), on_policy_divergence, token_weight, tokenizer
        )
        with zero3.gathered(model):
            self._head = read_head(cast(nn.Module, model))
        teacher_processing_class = _tokenizer_in(teacher_processing_class)
        tokenizers = teacher_processing_class, tokenizer
        with zero3.gathered(teacher):
            self._teacher = self._as_one(teacher, teachers, args, tokenizers)
        for it in (self._schedule.at(1.0), on_policy_divergence):
            if it is not None:
                self._teacher.check_divergence(it)
        with zero3.gathered(model), zero3.gathered(teacher):
            if self._zero3 or is_sharded(model) or is_sharded(teacher):
                _ = self._mixing  # now, while all processes run the models
            for name in ("train_dataset", "eval_dataset"):
                kwargs[name] = self._kept_apart(kwargs[name])
        of_teacher = teacher_processing_class if self._teacher.shares_tokens else None
        self._shared = share_vocabulary(
            self._teacher.vocab, self._head.vocab, of_teacher, tokenizer
        )
        self._vocab = self._shared.size
        if kwargs.get("data_collator") is None:
            pad = 0 if tokenizer is None else tokenizer.pad_token_id or 0
            # A padding token that only the student has would be none of the teacher's rows.
            kwargs["data_collator"] = PadRows(pad if pad < self._vocab else 0, args.max_length)
            for name in ("train_dataset", "eval_dataset"):
                warn_of_cut(name, kwargs[name], args.max_length)
        if teachers is not None:
            column, names = args.teacher_routing_column, [*teachers]
            kwargs["data_collator"] = RouteRows(kwargs["data_collator"], column, names)
        if isinstance(kwargs.get("train_dataset"), TokenDataset):
            context = min(map(context_of, self._models().values()))
            if args.lmbda or args.seq_kd:
                check_prompts(kwargs["train_dataset"], args, context)
        for name in ("train_dataset", "eval_dataset"):
            written = args.max_completion_length if name == "train_dataset" and args.lmbda else 0
            check_teacher_texts(kwargs.get(name), self._teacher_context(), written)
        if args.world_size > 1:
            disconnect_at_exit()
        self._sharded = is_sharded(model) or self._zero3
        if self._zero3 and isinstance(teacher, nn.Module):
            self._engine = zero3.engine_of(teacher)
        super().__init__(model, args, **kwargs)  # last, for it makes the output folder
        if is_sharded(model):  # as one that transformers has sharded: no DDP around it
            self.is_distributed_loading_by_transformers = True
        # The loss is divided by the tokens of the whole step, counted as `shifted` counts them.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self._moving = self._evaluating = False
        self._moment: Moment | None = None  # before the step, or the evaluation, that is going on
        self._staging: str | None = None
        self._scores: list[Tensor] = []
        self._losses: list[Tensor] = []  # of the step that is being taken
        self._checked: Any = None  # DeepSpeed's engine, once its steps are checked
        self._endless = 0  # steps in a row whose loss was infinite
        self._batch: Batch | None = None  # the last one
        self._mixture = self._writers(teacher_processing_class or tokenizer, tokenizer)
        ends = self._mixture.ends if self._mixture is not None else []
        self._own_text = Watch(limits or CollapseLimits(), ends, args.guard_window)
        self.completions = Path(str(self.args.output_dir), COMPLETIONS)
        self._balance = _balance(cast(nn.Module, model)) if args.router_aux_loss else 0.0
        self.add_callback(_Guard(self._check_step, self._rewind_completions))
        self.add_callback(_Follow(self._teacher))

    def _as_one(
        self, teacher: Any, teachers: Any, args: DistillConfig, tokenizers: tuple[Any, Any]
    ) -> Teacher:
        """The teacher, or several behind one; a single one of them is that one itself."""
        if args.teacher_model_kind is not None:
            how: Any = {"rate": args.teacher_update_rate, "sync_steps": args.teacher_sync_steps}
            return SelfTeacher(self._head, args.teacher_model_kind, device=args.device, **how)
        if args.teacher_alignment is not None:
            kind: Any = args.teacher_alignment
            teacher = teacher.to(args.device)
            return align_teacher(kind, teacher, *tokenizers, top_k=args.loss_top_k)
        if teachers is None:
            return as_teacher(teacher, self._head, args.device)
        one = args.teachers_on_device == "one" and len(teachers) > 1
        device = "cpu" if one else args.device
        made = {name: as_teacher(it, self._head, device) for name, it in teachers.items()}
        if len(made) == 1:
            return next(iter(made.values()))
        if args.seq_kd:
            raise NotImplementedError(
                f"seq_kd needs one teacher, which writes; got {len(made)} teachers."
            )
        return SeveralTeachers(made, device=args.device if one else None)

    def _student(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @functools.cached_property
    def _mixing(self) -> str:
        """The model that mixes up texts which share a row, and why, in words; empty if none."""
        models = self._models()
        if not self._teacher.shares_tokens:  # it reads texts one by one
            models = {"student": models["student"]}
        for name, model in models.items():
            if (reason := why_not_apart(model)) is not None:
                return f"the {name} mixes them up: {reason}"
        return ""

    def _kept_apart(self, dataset: Any) -> Any:
        """A data set of which rows share no block where a model would mix them up."""
        if isinstance(dataset, dict):
            return {name: self._kept_apart(it) for name, it in dataset.items()}
        packed = isinstance(dataset, TokenDataset) and dataset.begins is not None
        if not packed or not self._mixing:
            return dataset
        warn(f"packing: rows get a block each, for {self._mixing}.")
        return dataset.unpacked()

    def _check_apart(self, name: str, inputs: Mapping[str, Any]) -> None:
        """Refuse a row of several texts, told apart by positions alone, if a model mixes them."""
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if positions is None or positions.ndim != 2 or mask is not None or not self._mixing:
            return
        begins = (positions == 0) & attended(inputs)
        if bool((begins.sum(-1) > 1).any()):
            raise ValueError(
                f"{name} has rows of several texts, and {self._mixing}. Give each text a row of "
                "its own: rkl.distill.tokenize(..., packing=False)."
            )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's; raw rows are tokenized, and packed ones kept apart, as at the start."""
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            eval_dataset = self._prepared("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The Trainer's; raw rows are tokenized, and packed ones kept apart, as at the start."""
        return super().get_test_dataloader(self._prepared("test_dataset", test_dataset))

    def _prepared(self, name: str, dataset: Any) -> Any:
        """A data set that is given later, treated as those that the trainer was made with."""
        if isinstance(dataset, str):  # the name of one of those
            return dataset
        dataset = self._kept_apart(self._tokenized(name, dataset))
        if isinstance(self.data_collator, PadRows):
            warn_of_cut(name, dataset, self.data_collator.max_length)
        return dataset

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """The Trainer's, but padding is told from text also where there is no mask."""
        if "attention_mask" not in inputs and "position_ids" in inputs:
            inputs = {**inputs, "attention_mask": attended(inputs)}
        super()._track_num_input_tokens(inputs)

    def _models(self) -> dict[str, Any]:
        """The student, and the teacher where it is a model, by name."""
        models = {"student": self._head.model, "teacher": self._teacher.model}
        if isinstance(self._teacher, SeveralTeachers):
            several = self._teacher.teachers.items()
            models |= {f"teacher {name}": it.model for name, it in several}
        return {name: model for name, model in models.items() if model is not None}

    def _writers(self, teacher_tokenizer: Any, tokenizer: Any) -> Mixture | None:
        """The mixture that puts generated text into batches; None where all is data."""
        args, models = self.args, self._models()
        if not args.lmbda and not args.seq_kd:
            return None
        if not self._teacher.reads_any_text:
            name = "lmbda" if args.lmbda else "seq_kd"
            raise ValueError(
                f"{name}: a {type(self._teacher).__name__} holds the rows that it was made of, "
                "and no text that is written later. Give the model itself as the teacher."
            )
        if args.seq_kd and "teacher" not in models:
            raise ValueError(
                "seq_kd needs a teacher that is a model, to write the text; got a "
                f"{type(self._teacher).__name__}."
            )
        rows: Any = self.train_dataset
        alone = isinstance(rows, TokenDataset) and rows.kind == "prompt"
        if args.guard == "mix" and alone and not args.seq_kd:
            raise ValueError(
                "guard must be stop or off for rows with a prompt alone, which hold no text to "
                "mix in; got mix."
            )
        tokenizers = {"student": tokenizer, "teacher": teacher_tokenizer}
        alike = models if self._teacher.shares_tokens else {"student": models["student"]}
        written = {name: tokenizers.get(name, teacher_tokenizer) for name in alike}
        ends = common_ends({name: (it, written[name]) for name, it in alike.items()})
        how: Any = {"context": min(context_of(it) for it in models.values())}
        how |= {"vocab": self._vocab}
        how |= {"banned": [it for it in self._shared.differing if it < self._vocab]}
        autocast = cast(Any, self.accelerator.autocast)
        student = ModelWriter(models["student"], sampling_of(args), ends, around=autocast, **how)
        teacher = None
        if args.seq_kd:
            teacher = self._teacher.writer(sampling_of(args), ends, **how)
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        if args.student_server is not None:
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise ValueError(
                    "student_server needs processing_class, the student's tokenizer, which goes "
                    f"to the server with its weights; got {tokenizer!r}."
                )
            if args.world_size > 1:
                raise ValueError(
                    f"student_server takes one process; got {args.world_size}, which would all "
                    "write their weights into one folder."
                )
            weights = args.student_server_weights or Path(str(args.output_dir), "served")
            student = ServerWriter(
                args.student_server,
                tokenizer,
                sampling_of(args),
                ends,
                weights=weights,
                context=how["context"],
            )
        return Mixture(
            student,
            args.lmbda,
            args.seed if args.data_seed is None else args.data_seed,
            args.process_index,
            pad if pad < self._vocab else 0,
            args.device,
            teacher,
            models["student"],
            args.steps_per_generation or args.gradient_accumulation_steps,
            args.num_generations,
            args.prompt_tokens,
            ends,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the loss of a whole step, in nats per token trained on."""
        self.divergence = self._schedule.at(self._progress())
        self._batch = batch = shifted(inputs)
        sources = sources_of(inputs, batch)
        count = len(batch.targets) if num_items_in_batch is None else num_items_in_batch
        p, view = self._observe(batch, inputs)
        share = len(batch.targets) / count if len(batch.targets) else 0.0

        def measure(own: Known) -> Tensor:
            logged = (self.state.global_step + 1) % self._logging_steps == 0
            q = view(own)
            how: Any = {"own": None if q is own else own, "logged": logged}
            loss = self._batch_loss.of_step(batch, sources, p, q, count, **how)
            if sources is not None and len(sources):
                self._note_own_text(inputs, p, q, loss.detach() * (count / len(sources)))
            return loss

        balanced = self._balance * share if self._balance else None
        loss = self._in_place_of_head(model, batch, measure, balanced=balanced)
        if not self._moving and len(batch.targets):
            self._moving = True
            if self.is_world_process_zero():
                self._warn_if_nothing_moves(loss)
        if torch.is_grad_enabled():
            self._losses.append(loss.detach())
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP will average the gradients: undo it, for the count is that of all processes.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, CausalLMOutput(loss=cast(Any, loss))) if return_outputs else loss

    @property
    def divergence(self) -> Divergence:
        """The divergence of this step; a schedule moves it."""
        return self._batch_loss.divergence

    @divergence.setter
    def divergence(self, divergence: Divergence) -> None:
        self._batch_loss.divergence = divergence

    @property
    def on_policy_divergence(self) -> Divergence | None:
        """The divergence at the tokens that the student wrote; None for the same."""
        return self._batch_loss.of_own_text

    @property
    def _logging_steps(self) -> int:
        return max(1, int(self.state.logging_steps or 1))

    def _progress(self) -> float:
        """The share of the steps before this one, 1 at the last."""
        return self.state.global_step / max(1, self.state.max_steps - 1)

    def _note_own_text(
        self, inputs: Mapping[str, Any], p: Observed, q: Known, mean: Tensor
    ) -> None:
        """Measure the student's text, and write any to a file if the step is logged."""
        if bool((inputs[SOURCES] == STUDENT).any()):
            with torch.no_grad():
                self._own_text.note(inputs, confidence(p, q, MAX_MEASURED))
        step = self.state.global_step
        logged = step % self._logging_steps == 0
        if self.args.log_completions and logged and self.is_world_process_zero():
            row = completions_of(inputs, self.processing_class)
            append_jsonl(self.completions, {"step": step, "loss": float(mean), **row})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The mean divergence of a batch, noted down row by row for :meth:`evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        self.divergence = self._schedule.at(1.0)
        batch = shifted(inputs)
        with torch.no_grad():
            p, view = self._observe(batch, inputs)

            def score(own: Known) -> Tensor:
                q = view(own)
                return self._batch_loss.score(batch, p, q, own=None if q is own else own)

            scores = self._in_place_of_head(model, batch, score)
            self._scores.append(cast(Tensor, self.accelerator.gather_for_metrics(scores)))
            loss = scores[:, 0].sum() / scores[:, 3].sum().clamp_min(1)
            loss = loss.masked_fill(scores[:, 2].sum() > 0, math.inf)
            if prediction_loss_only:
                return loss, None, None
            return loss, model(**batch.inputs).logits, inputs["labels"]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's, but every mean is over the tokens of the data set, not over batches.

        ``eval_loss`` is the divergence and ``eval_cross_entropy`` that of the labels, both in
        nats per token. If the divergence is infinite at any token, so is ``eval_loss``;
        ``eval_infinite_tokens`` then counts these tokens, and ``eval_finite_loss`` is the mean
        over the others. A NaN anywhere makes it NaN.
        """
        self._scores = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not self._scores:
            return output
        value, entropy, infinite, tokens = torch.cat(self._scores).double().sum(0).tolist()
        means = {"loss": value / max(tokens, 1), "cross_entropy": entropy / max(tokens, 1)}
        if infinite:
            means["infinite_tokens"] = infinite
            if infinite < tokens:
                means["finite_loss"] = value / (tokens - infinite)
            if not math.isnan(value):
                means["loss"] = math.inf
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics=(output.metrics or {}) | metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values, and with the training loss what it left out or did not know.

        Fields that a schedule moves are logged at their value of that step.
        ``infinite_tokens`` counts tokens of infinite divergence. Of a teacher known in part,
        ``captured_mass`` is its mean probability of the atoms that are known, and of one known
        by draws ``loss_error`` is the standard error of the loss of the step that is logged.
        """
        if "loss" in logs:
            last = max(0, self.state.global_step - 1) / max(1, self.state.max_steps - 1)
            logs |= self._schedule.values(last)
            count = torch.tensor(self._batch_loss.infinite, device=self.args.device)
            total = int(cast(Tensor, self.accelerator.reduce(count, reduction="sum")))
            self._batch_loss.infinite = 0
            if total:
                logs["infinite_tokens"] = total
            if self._mixture is not None:
                logs |= {"lmbda": self._mixture.lmbda, **self._own_text.pop()}
            logs |= self._pop_losses()
            logs |= self._batch_loss.observations.pop(
                lambda sums: cast(
                    Tensor, self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
                )
            )
        super().log(logs, start_time)

    def _pop_losses(self) -> dict[str, float]:
        """The mean loss of each source since the last log, over the tokens of all processes."""
        if self._batch_loss.of_own_text is None:
            return {}
        sums = self._batch_loss.pop_by_source().to(self.args.device)
        sums = cast(Tensor, self.accelerator.reduce(sums, reduction="sum")).tolist()
        names = "data_loss", "on_policy_loss"
        return {
            name: loss / tokens for name, (loss, tokens) in zip(names, sums, strict=True) if tokens
        }

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, once what a killed process had begun to write is removed.

        Raises:
            DivergedError: At a NaN; the student then has the weights from before that step, or
                with ``load_best_model_at_end`` those of the best evaluation.
            CollapseError: Own text collapses; the student then has the weights of the best
                evaluation, or else of the last checkpoint from before that began.
        """
        if self.args.should_save:
            sweep(Path(str(self.args.output_dir)))
        self.accelerator.wait_for_everyone()
        self._losses, self._endless = [], 0
        try:
            return super().train(*args, **kwargs)
        except DivergedError as error:
            self._return(error)
            raise

    def _return(self, error: DivergedError) -> None:
        """Go back to the best weights, or after a collapse to those saved before it began."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()
        elif isinstance(error, CollapseError):
            saved = [Path(it) for it in sort_checkpoints(str(self.args.output_dir))]
            sound = [it for it in saved if int(it.name.rpartition("-")[2]) < error.step]
            if sound:
                self._load_from_checkpoint(str(sound[-1]))

    def keep_weights(self) -> None:
        """Save a checkpoint of the student as it is, unless there is one of this step.

        After a step or an evaluation that was cut short it is that of the moment before.
        """
        path = Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if path.exists():
            return
        if self._moment is not None:
            self._moment.restore(self.state)
        if self._mixture is not None and not self._evaluating:
            self._mixture.put_back()
        self._save_checkpoint(cast(nn.Module, self.model), None)

    def _set_signature_columns_if_needed(self) -> None:
        """The Trainer's, and what says where the texts in a row begin."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        more = "seq_lengths", "position_ids", self.args.teacher_routing_column
        of_teacher = TEACHER_IDS, TEACHER_LABELS
        self._signature_columns = [*dict.fromkeys([*columns, *more, *of_teacher])]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, whose update by DeepSpeed is checked before it."""
        if self._zero3 and self._checked is not self.deepspeed:
            self._checked = engine = cast(Any, self.deepspeed)
            engine.step = _after(self._check_step, engine.step)
        return super().training_step(*args, **kwargs)

    def _check_step(self) -> None:
        """End the training before an update that would make the weights NaN."""
        if not self._losses:  # DeepSpeed has made the update, which was checked
            return
        losses = torch.stack(self._losses)
        parameters = self._student().parameters()
        found = map(local_gradient, parameters)
        gradients = (it for it in found if it is not None)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # which skips such steps
        bad = not_finite(() if scaled else gradients).to(losses.device)
        flags = torch.stack([losses.isnan().any(), bad, losses.isinf().all()]).long()
        if self.accelerator.num_processes > 1:
            flags = cast(Tensor, self.accelerator.reduce(flags, reduction="sum"))
        lost, bad, infinite = flags.tolist()
        self._losses, step = [], self.state.global_step + 1
        self._endless = self._endless + 1 if infinite == self.accelerator.num_processes else 0
        self._judge_own_text(step)
        if lost or bad:
            what = "loss" if lost else "gradient"
            sound, place = self._together(not lost or self._student_is_finite())
            raise DivergedError(
                step,
                f"the {what} is NaN{' or infinite' * (not lost)}{place}{self._cause()}",
                sound=sound,
            )
        if self._endless == PATIENCE:
            raise DivergedError(
                step,
                f"{self.divergence} is infinite at every token of {PATIENCE} steps in a row, so "
                "that nothing is learned,",
                sound=True,
            )

    def _judge_own_text(self, step: int) -> None:
        """End the training where own text collapses, or have less of it."""
        if self._mixture is None:
            return
        wrong = self._own_text.end_step(
            lambda sums: cast(
                Tensor, self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
            ).cpu()
        )
        if not wrong or self.args.guard == "off":
            return
        since = max(1, step + 1 - self.args.guard_window)
        told, mixture = f"own text collapses ({'; '.join(wrong)})", self._mixture
        if self.args.guard == "stop" or mixture.lmbda <= MIN_LMBDA:
            raise CollapseError(since, told)
        mixture.lmbda /= 2
        self._own_text.forget_last()
        if self.is_world_process_zero():
            warn(f"At step {step:,} {told}: lmbda is now {mixture.lmbda:g}.")

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The batches of a step, with the text that is written for it, and their trained tokens.

        The count is taken after the writing, over all batches and processes.
        """
        if self._moment is None or self._moment.step != self.state.global_step:
            self._moment = Moment(self.state)
        batches = map(self._without_repeats, epoch_iterator)
        if self._mixture is None:
            taken = [batch for batch, _ in itertools.islice(batches, num_batches)]
        else:
            taken = self._mixture.take(batches, num_batches, self.state.global_step)
        return taken, self._get_num_items_in_batch(taken, device)

    def _without_repeats(self, batch: Any) -> tuple[Any, int]:
        """A batch, and its number of rows: repeated ones at the end of an epoch train nothing.

        Of several processes each gets as many rows; accelerate takes the missing ones from the
        beginning of the epoch.
        """
        if "labels" not in batch:
            return batch, 0
        state, accelerator = self.accelerator.gradient_state, self.accelerator
        rows = real = len(batch["labels"])
        several = accelerator.num_processes > 1 and not accelerator.split_batches
        several = several and not accelerator.dispatch_batches
        if several and state.end_of_dataloader and (remainder := self._remainder()) > 0:
            real = min(rows, max(0, remainder - accelerator.process_index * rows))
            for name in {"labels", TEACHER_LABELS} & batch.keys():
                batch[name][real:] = IGNORED
        return batch, real

    def _remainder(self) -> int:
        """Rows that are left for the last batches of an epoch; -1 where this is not known.

        accelerate does not know it of an epoch that a resumed training enters in the middle.
        """
        found: Any = self.accelerator.gradient_state.remainder
        if found >= 0 or self.args.dataloader_drop_last:
            return found
        try:
            rows = len(cast(Any, self.train_dataset))
        except TypeError:
            return found
        return rows % (self._train_batch_size * self.accelerator.num_processes)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            self._teacher.save(Path(output_dir))
            if self._evaluating:
                Path(output_dir, PENDING).touch()
        if self._mixture is not None:
            state = self._mixture.state() | {"own_text": self._own_text.state()}
            write_json(self._state_file(output_dir), state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(self._student(), self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir, "optimizer.pt"))
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir, "scheduler.pt"))

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Nothing is deferred: each batch's gradient is shared out, or all of it would be here."""
        yield

    def _load_sharded(self, checkpoint: Path) -> None:
        """The optimizer and the schedule of a student whose weights processes share."""
        how: Any = {"map_location": "cpu", "weights_only": True}
        state = torch.load(checkpoint / "optimizer.pt", **how)
        load_state(self._student(), self.optimizer, state)
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(checkpoint / "scheduler.pt", **how))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._sharded:
            load_weights(self._student(), Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._sharded:
            load_weights(self._student(), Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """The Trainer's, but no checkpoint is left to DeepSpeed, which writes pickles."""
        checkpoint = None if self._zero3 else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        if self._zero3 and resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, which gathers the weights whatever DeepSpeed's configuration says."""
        if not self._zero3:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            self._load_sharded(Path(checkpoint))
        if checkpoint is not None:
            self._teacher.load(Path(checkpoint))
        if self._mixture is not None and checkpoint is not None:
            file = self._state_file(checkpoint)
            if not file.is_file():
                raise FileNotFoundError(
                    f"resume_from_checkpoint: {checkpoint} has no {file.name}; it was saved by a "
                    "training without lmbda and seq_kd."
                )
            state = json.loads(file.read_text(encoding="utf-8"))
            self._mixture.restore(state)
            self._own_text.restore(state["own_text"])

    def _rewind_completions(self) -> None:
        if self.args.log_completions and self.is_world_process_zero():
            rewind_completions(self.completions, self.state.global_step)

    def _state_file(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"on_policy-{self.args.process_index}.json")

    def _together(self, sound: bool) -> tuple[bool, str]:
        """True if the student is sound in all processes; the first token that is NaN in one."""
        if self.accelerator.num_processes == 1:
            return sound, self._batch_loss.nan_at
        told: list[Any] = gather_object([(sound, self._batch_loss.nan_at)])
        return all(it for it, _ in told), next((place for _, place in told if place), "")

    def _student_is_finite(self) -> bool:
        """True if the student's weights, and what it gives its head on the last batch, are."""
        if self._batch is None or bad_weights(self._student()) is not None:
            return False
        q = self._head.observe(self._batch.inputs, self._batch.predicting, vocab=self._vocab)
        states: Any = q.hidden if isinstance(q, LinearHead) else q
        return bool(states.isfinite().all())

    def _cause(self) -> str:
        """A clause that names the model whose weights are not finite."""
        models = {"student": self._student()}
        if self._teacher.model is not None:
            models["teacher"] = self._teacher.model
        for name, model in models.items():
            if (weight := bad_weights(model)) is not None:
                return f" (the {name}'s weight {weight} is not finite)"
        return ""

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._moment, self._evaluating = Moment(self.state), True
        metrics = super()._evaluate(*args, **kwargs)
        self._moment, self._evaluating = None, False
        for name, value in metrics.items():
            if name.endswith("_loss") and math.isnan(value):
                place = self._together(False)[1]
                raise DivergedError(self.state.global_step, f"{name} is NaN{place}{self._cause()}")
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The Trainer's, but of infinite losses the one with fewer infinite tokens is better."""
        name = self.args.metric_for_best_model
        name = name if name is None or name.startswith("eval_") else f"eval_{name}"
        if name is None or not name.endswith("_loss") or self.args.greater_is_better:
            return super()._determine_best_metric(metrics=metrics, trial=trial)
        if name in metrics and not improves(metrics, self.state, name):
            return False
        self.state.best_metric = None
        better = super()._determine_best_metric(metrics=metrics, trial=trial)
        if not better:  # infinite, and yet the best so far
            self.state.best_global_step = self.state.global_step
        return True

    def _catch_up(self, checkpoint: str) -> None:
        """Evaluate the student of a checkpoint, as the training did not come to it."""
        self._load_rng_state(checkpoint)
        metrics = self._evaluate(None, None)
        self._determine_best_metric(metrics, None)
        self._save_checkpoint(cast(nn.Module, self.model), None)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if is_pending(checkpoint := kwargs["resume_from_checkpoint"]):
            self._catch_up(checkpoint)
        # Here, as the sampler of the epoch draws a seed before the first step.
        self._moment = Moment(self.state)
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed when all was done: the Trainer would take one more step before it looks
            self.control.should_training_stop = True

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's, in a temporary folder that gets its name when all is on the disk."""
        folder = self._get_output_dir(trial)
        path = Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with replacing_folder_together(path, self.accelerator, self.args.should_save) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()  # for what the others write into the folder
            settle(self.state, Path(staging, path.name), path, self.args.should_save)
        if self.args.should_save:
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
            measure_written(path)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The Trainer's, each file whole and without training_args.bin, which is a pickle."""
        if self._sharded:
            state_dict = whole_weights(self._student())
        if not self.args.should_save:
            return
        with replacing_files(output_dir or str(self.args.output_dir)) as folder:
            self._student().save_pretrained(folder, state_dict=state_dict)
            processing: Any = self.processing_class
            if processing is None:
                processing = getattr(self.data_collator, "tokenizer", None)
            if processing is not None:
                processing.save_pretrained(folder)

    def _observe(
        self, batch: Batch, inputs: Mapping[str, Any]
    ) -> tuple[Observed, Callable[[Known], Known]]:
        """The teacher's distributions for a batch, in the precision of the training.

        With it comes what gives the student's distributions over the same atoms.
        """
        tokens = batch.inputs.get("input_ids")
        dataset = "train_dataset" if self._student().training else "eval_dataset"
        self._check_apart(dataset, batch.inputs)
        if self._shared.differing and isinstance(tokens, Tensor):
            self._shared.check(dataset, tokens[attended(batch.inputs)])
        with torch.no_grad(), self.accelerator.autocast():
            read, predicting = for_teacher(batch, inputs, routed=self._teacher.is_routed)
            if TEACHER_IDS in inputs:
                self._check_teacher_text(inputs)
            p = self._teacher.observe(read, predicting, vocab=self._vocab)
        if self._student().training:
            self._batch_loss.observations.add(self._teacher.figures(read, predicting))
        how: Any = {"inputs": read, "predicting": predicting}
        return p, functools.partial(self._teacher.student_view, **how)

    def _check_teacher_text(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a text of the teacher's that it cannot read."""
        if not self._teacher.reads_any_text:
            raise ValueError(
                f"{TEACHER_IDS}: a {type(self._teacher).__name__} holds what the teacher told of "
                "the student's own prompts. Give the model itself as the teacher."
            )
        ids = inputs[TEACHER_IDS]
        if self._shared.differing:
            self._shared.check("teacher_prompt", ids[inputs[TEACHER_MASK].bool()])
        check_teacher_length(ids.shape[1], self._teacher_context())

    def _teacher_context(self) -> float:
        others = [it for name, it in self._models().items() if name != "student"]
        return min(map(context_of, others), default=math.inf)

    def _in_place_of_head(
        self,
        model: nn.Module,
        batch: Batch,
        measure: Callable[[Known], Tensor],
        *,
        balanced: Tensor | float | None = None,
    ) -> Tensor:
        """Run the student, and give ``measure`` of what it says of the batch as its loss.

        To it comes ``balanced`` times the loss that balances experts, where the model gives one.
        All that is computed within the forward of the student, where DDP expects the loss, FSDP
        has the head's weights at hand, and a scale or soft cap after the head no longer matters.
        """

        def loss_at(states: Tensor) -> Tensor:
            q = self._head.at(states, batch.predicting, vocab=self._vocab)
            with torch.autocast(states.device.type, enabled=False):
                return measure(q)

        def finish(module: nn.Module, args: Any, output: Any) -> CausalLMOutput:
            loss, balancing = measured.pop(), getattr(output, "aux_loss", None)
            if isinstance(balancing, Tensor) and balanced is not None:
                loss = loss + balanced * balancing.to(loss)
            return CausalLMOutput(loss=loss)

        hook = self._head.inner.register_forward_hook(finish, prepend=True)
        with hook, self._head.tap(loss_at) as measured:
            return model(**batch.inputs).loss

    def _warn_if_nothing_moves(self, loss: Tensor) -> None:
        if not self.args.hard_label_weight and loss.abs() <= _NOTHING:
            warn(
                f"{self.divergence} is 0 at the first step: the student says what the teacher "
                "says, as with fresh PEFT adapters on the teacher itself, so that the gradient is "
                "0 and nothing will be learned. Begin with a student that differs from its "
                "teacher, or set hard_label_weight above 0, to learn the text and stay near it."
            )


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls one without arguments, then the other."""

    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both


class _Guard(TrainerCallback):
    """Has a step checked between its gradient and its update, and something done before all."""

    def __init__(self, check: Callable[[], None], begin: Callable[[], None]):
        self._check, self._begin = check, begin

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._check()


class _Follow(TrainerCallback):
    """Has the teacher follow the student, before a checkpoint of the step is saved."""

    def __init__(self, teacher: Teacher):
        self._teacher = teacher

    def on_step_end(self, args, state, control, **kwargs):
        self._teacher.follow(state.global_step)


def _tokenizer_in(processing: Any) -> Any:
    """The tokenizer of a processor, which images or sounds go through too; others are one."""
    known: Any = processing
    return known.tokenizer if isinstance(processing, ProcessorMixin) else processing


def _balance(student: Any) -> float:
    """Weight of the loss that balances the student's experts; 0 without one."""
    config = student.config.get_text_config(decoder=True)
    if not any(getattr(it, "output_router_logits", False) for it in (config, student.config)):
        return 0.0
    names = "router_aux_loss_coef", "aux_loss_coef"
    found = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
    return float(found[0]) if found else 0.0
