"""The trainer of the stage: the objective over the whole optimizer step, streamed evaluation, what is saved beside."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from llamafactory.train.callbacks import SaveProcessorCallback
from llamafactory.train.trainer_utils import create_custom_optimizer, create_custom_scheduler
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from lenvm.format import LenvmConfig
from lenvm.lognormal import fit_spread
from lenvm.objective import Objective
from lenvm_lf.checkpoint import write_adapter_block, write_block
from lenvm_lf.collator import IGNORE
from lenvm_lf.metrics import LengthMetrics, batch_statistics
from lenvm_lf.samplers import PromptSampler, ShuffledLengthGroups

PREDICTIONS_FILE = "predictions.jsonl"
CALIBRATION_FILE = "calibration.json"


class LengthValueTrainer(Trainer):
    """transformers' Trainer with the loss

        sum over target tokens [(V - G)^2 + length_weight * -log q(n)] / number of target tokens,

    where both sums run over all ranks and accumulation steps of the optimizer step (Eq. 9); `lenvm.objective` has its
    variants. Both parts are logged.

    Args:
        lenvm: the model's block.
        finetuning_args: the host's, for its optimizers and schedulers and `lenvm_length_weight`.
        processor: the host's multimodal processor, or None.
        train_collator: makes the training batches, where they are packed; `data_collator` otherwise.
    """

    def __init__(
        self,
        lenvm: LenvmConfig,
        finetuning_args: Any,
        processor: Any = None,
        train_collator: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train_collator = train_collator or self.data_collator  # type: ignore[has-type]
        self.lenvm = lenvm
        self.finetuning_args = finetuning_args
        # transformers then counts `labels != -100` over the whole optimizer step and does not rescale our loss
        self.model_accepts_loss_kwargs = True
        self.length_weight = finetuning_args.lenvm_length_weight if lenvm.has_length_head else 0.0
        self.objective = Objective(
            space=lenvm.value_space,
            bins=lenvm.length_bins if lenvm.has_length_head else None,
            lam=finetuning_args.lenvm_lambda,
            bootstrap=finetuning_args.lenvm_censored == "bootstrap",
            weighting=finetuning_args.lenvm_weighting,
            huber=finetuning_args.lenvm_huber,
        )
        self.metrics_of = LengthMetrics(lenvm, self.length_weight)
        self._parts: Tensor | None = None  # [value, length] loss, summed over the steps since the last log
        self._last_logged_step = 0
        self.keep_states = False  # collect what `store_spread` fits, over the evaluations to come
        self._calibration: dict[str, Any] = {}  # deciles of the latest evaluation under each prefix
        self._states: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        if processor is not None:
            self.add_callback(SaveProcessorCallback(processor))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = create_custom_optimizer(self.model, self.args, self.finetuning_args)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        create_custom_scheduler(self.args, num_training_steps, optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.finetuning_args.disable_shuffling:
            return torch.utils.data.SequentialSampler(self.train_dataset)
        if self.finetuning_args.lenvm_batches == "by_prompt":
            return PromptSampler(list(self.train_dataset["prompt_hash"]), self.args.seed)
        if self.args.train_sampling_strategy == "group_by_length":
            # with a list of lengths: transformers would look each one up in the Arrow file, 0.1 ms a row
            batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return ShuffledLengthGroups(batch_size, lengths=list(self.train_dataset["length"]))
        return super()._get_train_sampler(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """transformers' loader; only training packs, evaluation looks at one completion a row."""
        plain, self.data_collator = self.data_collator, self.train_collator  # type: ignore[has-type]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # the workflow sorted the set by length; transformers' grouping would draw from the global random state
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """What the step's sum is divided by; transformers gathers it over all ranks and accumulation steps."""
        counted = [
            self.objective.counted(batch["labels"] != IGNORE, batch.get("completion")) for batch in batch_samples
        ]
        as_labels = [{"labels": torch.where(part, 0, IGNORE)} for part in counted]
        return super()._get_num_items_in_batch(as_labels, device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, scaled so that the average over ranks is Eq. 9."""
        inputs = dict(inputs)
        labels, censored, _ = inputs.pop("labels"), inputs.pop("censored"), inputs.pop("prompt")
        completion = inputs.pop("completion", None)  # of packed sequences
        output = model(**inputs)
        mask = labels != IGNORE
        logits = output.length_logits if self.length_weight else None
        value, length = self.objective.sums(output.z, logits, labels, mask, censored, completion)
        if output.length_logits is not None and logits is None:
            length = output.length_logits.sum() * 0.0  # weight 0: keep the head in the graph, as DDP and ZeRO expect
        count = self.objective.counted(mask, completion).sum() if num_items_in_batch is None else num_items_in_batch
        ranks = self.accelerator.num_processes if num_items_in_batch is not None else 1
        scale = ranks / torch.as_tensor(count, device=value.device, dtype=torch.float32).clamp(min=1)
        if model.training:
            part = torch.stack([value.detach(), length.detach()]) * scale
            if self._parts is None:
                self._parts, self._last_logged_step = part, self.state.global_step
            else:
                self._parts += part
        loss = (value + self.length_weight * length) * scale
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `value_loss` and `length_nll`, averaged over the steps since the last log as `loss` is."""
        if "loss" in logs and self._parts is not None:
            steps = max(1, self.state.global_step - self._last_logged_step)
            value, length = (self.accelerator.reduce(self._parts, "mean") / steps).tolist()
            logs["value_loss"] = value
            if self.length_weight:
                logs["length_nll"] = length
            self._parts = None
        super().log(logs, start_time)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Streams the batch into the metrics; nothing of the size of the evaluation set is kept."""
        inputs = self._prepare_inputs(inputs)
        labels, censored, prompts = inputs.pop("labels"), inputs.pop("censored"), inputs.pop("prompt")
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        tokens, rows = batch_statistics(output, labels, censored, self.lenvm)
        tokens = self.accelerator.pad_across_processes(tokens, dim=1, pad_index=IGNORE)
        # leaves out rows repeated to fill the last batch
        tokens, rows, prompts = self.gather_function((tokens, rows, prompts))
        self.metrics_of.update(tokens.cpu().numpy(), rows.cpu().numpy(), prompts.cpu().numpy())
        return None, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop; the metrics come from the stream."""
        self.metrics_of.reset()
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self.metrics_of.result().items()})
        self._calibration[prefix] = self.metrics_of.calibration()
        if self.keep_states:
            self._states += zip(self.metrics_of.predicted, self.metrics_of.true, strict=True)
        return output

    def store_spread(self) -> LenvmConfig | None:
        """Fit the spread of the true length around n_hat on the states evaluated since `keep_states` was set, and write
        it into the saved model's `lenvm` block (what a value-only checkpoint's length distribution rests on).

        Returns:
            the new block, or None if there were fewer than two states of finished completions.
        """
        if sum(len(n) for _, n in self._states) < 2:
            return None
        predicted, true = (torch.from_numpy(np.concatenate(part)) for part in zip(*self._states, strict=True))
        spread = fit_spread(predicted, true)
        self.set_block(self.lenvm.model_copy(update={"spread": spread}))
        if self.is_world_process_zero():
            write_block(self.args.output_dir, self.lenvm)
        return self.lenvm

    def set_block(self, lenvm: LenvmConfig) -> None:
        """Use this block from now on, and save it with the model."""
        self.lenvm = self.metrics_of.lenvm = lenvm
        model = self.accelerator.unwrap_model(self.model)
        model.config.lenvm = lenvm.to_json()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):  # a PEFT adapter
            write_adapter_block(output_dir or self.args.output_dir, self.lenvm)

    def save_predictions(self, rows: Sequence[int]) -> None:
        """One line a row of the last prediction, as JSONL and as parquet: the true length, and what was predicted
        before the first token.

        Args:
            rows: row number of each completion in its data file, in the order of the prediction.
        """
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, PREDICTIONS_FILE)
        lines = [{"row": row} | state for row, state in zip(rows, self.metrics_of.first_states, strict=True)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(lines), path.with_suffix(".parquet"))

    def save_calibration(self) -> None:
        """Write the deciles of the latest evaluation of each set: mean predicted against mean true remaining length."""
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, CALIBRATION_FILE)
            path.write_text(json.dumps(self._calibration, indent=2) + "\n", encoding="utf-8")
