"""`stage: lenvm` from parsed arguments to a saved checkpoint: the stage's counterpart of the host's `run_sft`."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from lenvm.bins import LengthBins
from lenvm.definitions import gamma_from_lengths
from lenvm.format import AblationTarget, LenvmConfig
from lenvm_lf import checkpoint
from lenvm_lf.collator import DenseReturnCollator, ImageReturnCollator
from lenvm_lf.data import StreamFilter, by_length, foreign_prompts, shared_prompts, split_by_prompt, usable_rows
from lenvm_lf.packing import PackedCollator, PackedRows, check_packing
from lenvm_lf.record import write_record
from lenvm_lf.shared_prefix import SharedPrefixCollator, check_backbone

logger = logging.getLogger(__name__)
CENSORED_SHARE_FOR_AUTO = 0.01
"""`gamma: auto` looks at the 99th percentile: with more censored completions than this, that length is unknown."""
LOOKED_AT = 256
"""Rows of a stream that are looked at before training."""
PLOTTED = ("loss", "value_loss", "length_nll", "eval_loss", "eval_length_mae", "eval_expected_length_mae")


def training_function(tuner: Any, config: dict[str, Any]) -> None:
    """The host's `_training_function` for this stage.

    Args:
        tuner: the host module `llamafactory.train.tuner`.
        config: `args` as read from YAML or the command line, `callbacks`.
    """
    from transformers import EarlyStoppingCallback

    callbacks: list[Any] = config["callbacks"]
    model_args, data_args, training_args, finetuning_args, generating_args = tuner.get_train_args(config["args"])
    callbacks.append(tuner.LogCallback())
    if finetuning_args.pissa_convert:
        callbacks.append(tuner.PissaConvertCallback())
    if finetuning_args.use_swanlab:
        callbacks.append(tuner.get_swanlab_callback(finetuning_args))
    if finetuning_args.early_stopping_steps is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=finetuning_args.early_stopping_steps))
    if getattr(training_args, "enable_torch_profiler", False):
        callbacks.append(tuner.TorchProfilerCallback(training_args))
    if getattr(training_args, "profile_modules", None):
        callbacks.append(tuner.ModuleProfilerCallback(training_args.profile_modules))
    callbacks.append(tuner.ReporterCallback(model_args, data_args, finetuning_args, generating_args))

    run_lenvm(model_args, data_args, training_args, finetuning_args, callbacks)

    if tuner.is_ray_available() and tuner.ray.is_initialized():
        return  # Ray ends the process group itself
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_lenvm(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, callbacks: list[Any]) -> None:
    """Load the data and the model, then train, evaluate and predict as asked.

    Raises:
        ValueError, LenvmFormatError: one sentence for each thing that is wrong with data, arguments or checkpoint.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_config, load_model, load_tokenizer
    from llamafactory.train.trainer_utils import create_modelcard_and_push

    from lenvm_lf.trainer import LengthValueTrainer

    tokenizer_module = load_tokenizer(model_args)
    tokenizer = tokenizer_module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    config = load_config(model_args)
    checkpoint.check_backbone(config)
    if checkpoint.sees_images(config):
        check_image_run(template, tokenizer_module["processor"], model_args, data_args)
    else:
        tokenizer_module["processor"] = None  # so that a row with images is refused, whatever lies beside the model
    datasets = load_datasets(template, config, model_args, data_args, training_args, finetuning_args, tokenizer_module)
    train_set, eval_set = datasets
    lenvm = decide_block(config, train_set, model_args, training_args, finetuning_args)
    finetuning_args.lenvm_config = lenvm
    model = load_model(tokenizer, model_args, finetuning_args, training_args.do_train)
    multiple_of = 8 if torch.cuda.is_available() else 1  # tensor cores like it
    collator: Any = DenseReturnCollator(tokenizer.pad_token_id, multiple_of)
    if checkpoint.sees_images(config):
        collator = ImageReturnCollator(template, tokenizer_module["processor"], tokenizer, model, multiple_of)
    rows = train_set  # as they are, before packing
    train_collator = collator  # only training packs, evaluation looks at one completion a row
    if training_args.do_train and finetuning_args.lenvm_shared_prefix:
        check_backbone(model.config)
        train_collator = SharedPrefixCollator(tokenizer.pad_token_id, multiple_of)
    elif training_args.do_train and finetuning_args.lenvm_neat_packing:
        check_packing(model.config, training_args.per_device_train_batch_size)
        train_collator = PackedCollator(tokenizer.pad_token_id, multiple_of)
        train_set = PackedRows(train_set, data_args.cutoff_len)

    training_args.average_tokens_across_devices = True  # the denominator of Eq. 9 is global: not a choice here
    training_args.label_names = ["labels"]
    trainer = LengthValueTrainer(
        lenvm=lenvm,
        finetuning_args=finetuning_args,
        processor=tokenizer_module["processor"],
        model=model,
        args=training_args,
        processing_class=tokenizer,
        data_collator=collator,
        train_collator=train_collator,
        train_dataset=train_set,
        eval_dataset=eval_set,
        callbacks=callbacks,
    )
    if training_args.do_train:
        write_record(trainer, model, rows, eval_set, model_args, data_args, training_args, finetuning_args)
        train(trainer, training_args, finetuning_args)
    if training_args.do_eval:
        trainer.keep_states = training_args.do_train
        metrics = trainer.evaluate(metric_key_prefix="eval")
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        trainer.save_calibration()
        if training_args.do_train:
            trainer.store_spread()
            trainer.keep_states = False
    if training_args.do_predict:
        result = trainer.predict(eval_set, metric_key_prefix="predict")
        trainer.log_metrics("predict", result.metrics)
        trainer.save_metrics("predict", result.metrics)
        trainer.save_predictions(eval_set["row"])
    create_modelcard_and_push(trainer, model_args, data_args, training_args, finetuning_args)


def check_image_run(template: Any, processor: Any, model_args: Any, data_args: Any) -> None:
    """Refuse a vision-language model without what it needs.

    Raises:
        ValueError: one sentence: what is missing, what to do.
    """
    if processor is None:
        raise ValueError(
            f"{model_args.model_name_or_path} reads images, but has no processor beside it; "
            "copy preprocessor_config.json (and processor_config.json) from the model it was made of."
        )
    if template.mm_plugin.image_token is None:
        raise ValueError(
            f"{model_args.model_name_or_path} reads images, but the template {data_args.template!r} has no place for "
            "them; use the model's own (`qwen2_vl`, `qwen3_vl`)."
        )
    if data_args.streaming:
        raise ValueError(
            "stage `lenvm` does not support `streaming` with a vision-language model: a batch of images cannot be cut "
            "by rows when it is handed to the ranks; set `streaming: false`."
        )


def train(trainer: Any, training_args: Any, finetuning_args: Any) -> None:
    """Train, save and plot."""
    from llamafactory.extras.ploting import plot_loss

    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.is_world_process_zero() and finetuning_args.plot_loss:
        logged = {key for entry in trainer.state.log_history for key in entry}
        plot_loss(training_args.output_dir, keys=[key for key in PLOTTED if key in logged])


def load_datasets(
    template: Any,
    config: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
    tokenizer_module: dict[str, Any],
) -> tuple[Any, Any]:
    """Usable training rows and validation rows (a data set, a dict of them, or None)."""
    from llamafactory.data import get_dataset

    if training_args.do_predict and data_args.eval_on_each_dataset:
        raise ValueError("`do_predict` writes one file; set `eval_on_each_dataset: false`.")
    val_size, data_args.val_size = data_args.val_size, 0.0  # the host splits rows; samples of one prompt would leak
    try:
        module = get_dataset(template, model_args, data_args, training_args, stage="lenvm", **tokenizer_module)
    finally:
        data_args.val_size = val_size
    vocab_size = config.get_text_config().vocab_size
    drop = finetuning_args.lenvm_censored == "drop"

    def usable(dataset: Any, name: str) -> Any:
        if data_args.streaming:  # a validation set is small, and is sorted and grouped below
            dataset = Dataset.from_list(list(dataset))
        return usable_rows(dataset, name, vocab_size, data_args.cutoff_len, drop)

    train_set, eval_set = module.get("train_dataset"), module.get("eval_dataset")
    head = None
    if train_set is not None and data_args.streaming:
        train_set = train_set.filter(StreamFilter(vocab_size, data_args.cutoff_len, drop))
        rows = list(train_set.take(LOOKED_AT))
        if not rows:
            raise ValueError(
                "the training stream has no usable row; check the data, `cutoff_len` and `lenvm_censored`."
            )
        head = Dataset.from_list(rows)
    elif train_set is not None:
        head = train_set = usable(train_set, "training")
    if head is not None:
        warn_foreign_prompts(head, tokenizer_module["tokenizer"], model_args.model_name_or_path)
    if eval_set is None and train_set is not None and val_size > 0:
        train_set, eval_set = split_by_prompt(train_set, val_size, training_args.seed)
    elif isinstance(eval_set, dict):
        eval_set = {name: usable(part, f"validation ({name})") for name, part in eval_set.items()}
    elif eval_set is not None:
        eval_set = usable(eval_set, "validation")
    parts = list(eval_set.values()) if isinstance(eval_set, dict) else [] if eval_set is None else [eval_set]
    for part in parts if not data_args.streaming else []:  # what a stream will bring is not known
        shared = shared_prompts(train_set, part) if train_set is not None else 0
        if shared:
            logger.warning(
                "%d of %d validation rows have a prompt that is trained on: their errors come out too small. "
                "Use `val_size`, which splits by prompt, or other prompts.",
                shared,
                len(part),
            )
    if isinstance(eval_set, dict):
        eval_set = {name: by_length(part) for name, part in eval_set.items()}
    elif eval_set is not None:
        eval_set = by_length(eval_set)
    return train_set, eval_set


def warn_foreign_prompts(rows: Any, tokenizer: Any, model: str) -> None:
    """Say so if the prompts were tokenised otherwise than this tokenizer does."""
    differing, seen = foreign_prompts(rows, tokenizer)
    if differing:
        logger.warning(
            "%d of the first %d prompts are cut into other tokens by the tokenizer of %s than in the data. "
            "If they were sampled from another model, or the server's version of transformers reads the tokenizer "
            "differently, the length value model learns tokens that the served one does not see.",
            differing,
            seen,
            model,
        )


def decide_block(config: Any, train_set: Any, model_args: Any, training_args: Any, finetuning_args: Any) -> LenvmConfig:
    """The run's `lenvm` block: that of the checkpoint it starts from, or a new one fitted to the training lengths.

    Raises:
        ValueError: if arguments contradict the checkpoint, or there is neither a checkpoint nor training data.
    """
    stored = checkpoint.stored_block(config, model_args, training_args.resume_from_checkpoint)
    if stored is not None:
        block, where = stored
        checkpoint.agree(block, where, finetuning_args)
        # a spread fitted to other weights says nothing about the ones that training will give
        return block.model_copy(update={"spread": None}) if training_args.do_train else block
    if not training_args.do_train or train_set is None:
        raise ValueError(
            f"{model_args.model_name_or_path} is no length value model and there is nothing to train it on; "
            "evaluate a checkpoint of stage `lenvm`, or set `do_train: true` with a `dataset`."
        )
    gamma, longest = finetuning_args.lenvm_gamma_value, finetuning_args.lenvm_max_length
    heads = finetuning_args.lenvm_head_names or ("value", "length")
    if not isinstance(train_set, IterableDataset):  # of a stream both are given (`check_supported`)
        gamma, longest = fit_to_lengths(train_set, gamma, longest, "length" in heads)
    representation = finetuning_args.lenvm_target
    if representation != "return":
        logger.warning(
            "`lenvm_target: %s` is for comparison: the checkpoint can be evaluated and trained further under "
            "`stage: lenvm`, and nothing else reads it.",
            representation,
        )
    return LenvmConfig(
        heads=heads,  # type: ignore[arg-type]  # checked by the model
        gamma=gamma,
        target=None
        if representation == "return"
        else AblationTarget(
            representation=representation, longest=longest if representation == "normalized_length" else None
        ),
        bins=LengthBins.for_max_length(longest).centres if "length" in heads else (),
        base_model=str(model_args.model_name_or_path),
    )


def fit_to_lengths(train_set: Any, gamma: float | None, longest: int | None, has_length: bool) -> tuple[float, int]:
    """gamma and the last bin, where they are not given, from the training completions.

    Args:
        train_set: usable rows.
        gamma: as given, or None.
        longest: as given, or None.
        has_length: whether there is a length head, whose last bin `longest` is.
    """
    lengths = np.asarray(train_set["completion_length"])
    if gamma is None:
        share = float(np.mean(train_set["censored"]))
        if share > CENSORED_SHARE_FOR_AUTO:
            logger.warning(
                "`lenvm_gamma: auto` rests on the 99th percentile of lengths, but %.1f %% of the completions are cut, "
                "so it is a lower bound; sample with a larger max_tokens or set `lenvm_gamma`.",
                100 * share,
            )
        gamma = round(gamma_from_lengths(lengths.tolist()), 10)  # digits a person can write into YAML again
    longest = longest or max(2, int(lengths.max()))
    if has_length and longest < lengths.max():
        logger.warning(
            "`lenvm_max_length` %d is shorter than the longest completion (%d): %d of %d count as %d tokens long.",
            longest,
            lengths.max(),
            int((lengths > longest).sum()),
            len(lengths),
            longest,
        )
    return gamma, longest
