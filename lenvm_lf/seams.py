"""Every private part of LlamaFactory that this plug-in touches, in one place.

Each target module is handed to `apply` right after the host has executed it. A seam that no longer fits is written
down in `PROBLEMS` and left alone; it is reported (`check`) only to somebody who asks for `stage: lenvm`, so a plain
LlamaFactory run is never disturbed. For every other stage the wrappers below call straight through.

Module-level imports are the standard library only: this module is imported while the host is being imported.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from lenvm_lf._hook import TARGETS

STAGE = "lenvm"
FORMATTING = "lenvm"
HOST_FLOOR, HOST_CEILING = "0.9.5", "0.9.6"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seam:
    """A function of the host that is wrapped or called.

    Attributes:
        parameters: its parameter names; another list means that the seam does not fit.
        sha256: first 16 digits of the hash of its source in the tested version; another source only warns.
    """

    function: str
    parameters: tuple[str, ...]
    sha256: str


SEAMS: dict[str, tuple[Seam, ...]] = {
    "llamafactory.extras.constants": (),
    "llamafactory.hparams.parser": (
        Seam("_parse_train_args", ("args",), "2487a44fad12d90d"),
        Seam("_parse_infer_args", ("args",), "250d12c194ab94e9"),
        Seam("get_train_args", ("args",), "2d64e1b1e3825fcc"),
    ),
    "llamafactory.data.loader": (
        Seam(
            "_get_dataset_processor",
            ("data_args", "stage", "template", "tokenizer", "processor", "do_generate"),
            "e20204cab0d0bf03",
        ),
        Seam("_load_single_dataset", ("dataset_attr", "model_args", "data_args", "training_args"), "832a51bcf55bc509"),
        Seam(
            "get_dataset",
            ("template", "model_args", "data_args", "training_args", "stage", "tokenizer", "processor"),
            "80d56c1fa2e92b9e",
        ),
    ),
    "llamafactory.model.loader": (
        Seam(
            "load_model",
            ("tokenizer", "model_args", "finetuning_args", "is_trainable", "add_valuehead"),
            "90f2a445a1d01cb4",
        ),
    ),
    "llamafactory.train.tuner": (Seam("_training_function", ("config",), "73d6585e4355a03a"),),
}
REQUIRED_NAMES: dict[str, tuple[str, ...]] = {
    "llamafactory.extras.constants": ("TRAINING_STAGES",),
    "llamafactory.hparams.parser": ("FinetuningArguments", "_TRAIN_ARGS", "_INFER_ARGS"),
    "llamafactory.data.loader": ("load_dataset",),
    "llamafactory.model.loader": ("AutoModelForCausalLM", "AutoModelForImageTextToText", "load_config"),
    "llamafactory.train.tuner": (
        "get_train_args",
        "LogCallback",
        "PissaConvertCallback",
        "ReporterCallback",
        "TorchProfilerCallback",
        "ModuleProfilerCallback",
        "get_swanlab_callback",
        "is_ray_available",
    ),
}
PROBLEMS: list[str] = []
APPLIED: set[str] = set()
CHANGED: list[str] = []
"""Functions whose signature fits but whose source is not the tested one."""


class SeamError(RuntimeError):
    """This LlamaFactory cannot run `stage: lenvm`; the message names the hook and what to install."""


def apply(module: ModuleType) -> None:
    """Hook a freshly executed target module; on any mismatch leave it as it is and remember why."""
    try:
        _check_version()
        _check_module(module)
        _PATCHES[module.__name__](module)
        APPLIED.add(module.__name__)
    except Exception as error:  # whatever goes wrong must not break a plain LlamaFactory run
        PROBLEMS.append(f"{module.__name__}: {error}")
        _refuse_stage(module)


def check(complete: bool = False) -> None:
    """Called by everything that serves `stage: lenvm`.

    Args:
        complete: every target must have been imported by now (where training starts).

    Raises:
        SeamError: naming every hook that does not fit and what to do.
    """
    missing = sorted(TARGETS - APPLIED) if complete and not PROBLEMS else []
    problems = PROBLEMS + [f"{name}: was never imported by the host" for name in missing]
    if problems:
        raise SeamError(
            "stage `lenvm` cannot hook into this LlamaFactory: "
            + "; ".join(problems)
            + f". Install llamafactory>={HOST_FLOOR},<{HOST_CEILING} unchanged, or a newer lenvm. "
            "Other stages are not affected."
        )
    if CHANGED:
        changed = ", ".join(CHANGED)
        CHANGED.clear()  # said once
        logger.warning(
            "lenvm_lf: %s: signature as in the tested LlamaFactory %s, source not; check the results.",
            changed,
            HOST_FLOOR,
        )


def source_hash(function: Callable[..., Any]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def asks_for_stage(args: Any) -> bool:
    """Whether parsed YAML (dict) or command-line words (list) ask for `stage: lenvm`."""
    if isinstance(args, dict):
        return args.get("stage") == STAGE
    words = [str(word) for word in args or []]
    return any(
        word == f"--stage={STAGE}" or (word == "--stage" and words[i + 1 : i + 2] == [STAGE])
        for i, word in enumerate(words)
    )


def _check_version() -> None:
    from packaging.version import Version

    found = metadata.version("llamafactory")
    if not Version(HOST_FLOOR) <= Version(found) < Version(f"{HOST_CEILING}.dev0"):
        raise SeamError(f"llamafactory {found} is outside the supported range >={HOST_FLOOR},<{HOST_CEILING}")


def _check_module(module: ModuleType) -> None:
    for name in REQUIRED_NAMES[module.__name__]:
        if not hasattr(module, name):
            raise SeamError(f"it has no `{name}`")
    for seam in SEAMS[module.__name__]:
        function = getattr(module, seam.function, None)
        if function is None:
            raise SeamError(f"it has no function `{seam.function}`")
        found = tuple(inspect.signature(function).parameters)
        if found != seam.parameters:
            raise SeamError(f"`{seam.function}` takes {found}, expected {seam.parameters}")
        if source_hash(function) != seam.sha256:
            CHANGED.append(f"{module.__name__}.{seam.function}")


def _refuse_stage(module: ModuleType) -> None:
    """Keep one place that turns `stage: lenvm` away with a clear error when a seam is broken: the training entry."""
    original = getattr(module, "_training_function", None)
    if module.__name__ != "llamafactory.train.tuner" or original is None:
        return

    @functools.wraps(original)
    def _training_function(config: dict[str, Any]) -> Any:
        if isinstance(config, dict) and asks_for_stage(config.get("args")):
            check()
        return original(config)

    module._training_function = _training_function  # type: ignore[attr-defined]


def _patch_constants(module: Any) -> None:
    module.TRAINING_STAGES.setdefault("Length Value Model", STAGE)  # the web UI's list


def _patch_parser(module: Any) -> None:
    from lenvm_lf.arguments import check_supported, make_finetuning_arguments, take_over_packing

    extended = make_finetuning_arguments(module.FinetuningArguments)
    for group in (module._TRAIN_ARGS, module._INFER_ARGS):
        group[group.index(module.FinetuningArguments)] = extended

    parse_train, parse_infer, get_train = module._parse_train_args, module._parse_infer_args, module.get_train_args

    @functools.wraps(parse_train)
    def _parse_train_args(args: Any = None) -> Any:
        parsed = parse_train(args)
        if parsed[3].stage == STAGE:
            check()
            check_supported(parsed[0], parsed[1], parsed[2], parsed[3])
            take_over_packing(parsed[1], parsed[3])
        return parsed

    @functools.wraps(parse_infer)
    def _parse_infer_args(args: Any = None) -> Any:
        parsed = parse_infer(args)
        if parsed[2].stage == STAGE:
            check()
            check_supported(parsed[0], parsed[1], None, parsed[2])
        return parsed

    @functools.wraps(get_train)
    def get_train_args(args: Any = None) -> Any:
        parsed = get_train(args)
        if parsed[3].stage == STAGE and parsed[3].use_mca:  # set from USE_MCA, after parsing
            raise ValueError("stage `lenvm` does not run on Megatron; unset USE_MCA.")
        return parsed

    module._parse_train_args, module._parse_infer_args = _parse_train_args, _parse_infer_args
    module.get_train_args = get_train_args


def _patch_data_loader(module: Any) -> None:
    from llamafactory.data.converter import DATASET_CONVERTERS, register_dataset_converter

    from lenvm_lf.rows import SampledRowConverter, load_lines

    if FORMATTING not in DATASET_CONVERTERS:
        register_dataset_converter(FORMATTING, SampledRowConverter)  # type: ignore[arg-type]

    get_processor, load_single = module._get_dataset_processor, module._load_single_dataset

    @functools.wraps(get_processor)
    def _get_dataset_processor(
        data_args: Any, stage: str, template: Any, tokenizer: Any, processor: Any, do_generate: bool = False
    ) -> Any:
        if stage != STAGE:
            return get_processor(data_args, stage, template, tokenizer, processor, do_generate)
        from lenvm_lf.processor import LengthValueProcessor

        return LengthValueProcessor(template, tokenizer, data_args.cutoff_len, processor)

    @functools.wraps(load_single)
    def _load_single_dataset(dataset_attr: Any, model_args: Any, data_args: Any, training_args: Any) -> Any:
        if dataset_attr.formatting != FORMATTING or dataset_attr.load_from != "file":
            return load_single(dataset_attr, model_args, data_args, training_args)
        # Arrow would infer one type per column from the file, and one ill-typed row would stop the whole load with a
        # message that names no row: read lines instead, the converter parses and judges each by itself.
        host_load, module.load_dataset = module.load_dataset, load_lines
        try:
            return load_single(dataset_attr, model_args, data_args, training_args)
        finally:
            module.load_dataset = host_load

    module._get_dataset_processor, module._load_single_dataset = _get_dataset_processor, _load_single_dataset


def _patch_model_loader(module: Any) -> None:
    original = module.load_model

    @functools.wraps(original)
    def load_model(
        tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool = False, add_valuehead: bool = False
    ) -> Any:
        from lenvm_lf import checkpoint

        if finetuning_args.stage != STAGE:
            checkpoint.refuse_other_stage(model_args, finetuning_args.stage)
            return original(tokenizer, model_args, finetuning_args, is_trainable, add_valuehead)
        check()
        return checkpoint.load_model(module, original, tokenizer, model_args, finetuning_args, is_trainable)

    module.load_model = load_model


def _patch_tuner(module: Any) -> None:
    original = module._training_function

    @functools.wraps(original)
    def _training_function(config: dict[str, Any]) -> Any:
        if not asks_for_stage(config.get("args")):
            return original(config)
        check(complete=True)
        from lenvm_lf.workflow import training_function

        return training_function(module, config)

    module._training_function = _training_function


_PATCHES: dict[str, Callable[[Any], None]] = {
    "llamafactory.extras.constants": _patch_constants,
    "llamafactory.hparams.parser": _patch_parser,
    "llamafactory.data.loader": _patch_data_loader,
    "llamafactory.model.loader": _patch_model_loader,
    "llamafactory.train.tuner": _patch_tuner,
}
