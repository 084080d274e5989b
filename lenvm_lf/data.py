"""The processed data set: counting and dropping rows that cannot be used, and splitting it by prompt."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import numpy as np

from lenvm_lf.processor import COLUMNS, LONG_PROMPT

MAX_BAD_SHARE = 0.05
"""A larger share of unusable rows means that the file is not what it is taken for."""
SHOWN = 5
logger = logging.getLogger(__name__)


def usable_rows(dataset: Any, name: str, vocab_size: int, cutoff_len: int, drop_censored: bool) -> Any:
    """Drop the rows that cannot be trained on, and say how many and why.

    Args:
        dataset: as `LengthValueProcessor` makes it.
        name: what to call it in messages.
        vocab_size: of the model; a row with a token id outside is a bad row.
        cutoff_len: for the message about prompts that do not fit.
        drop_censored: leave completions without a known length out.

    Raises:
        ValueError: if more than 5 % of the rows are bad, or none is left.
    """
    missing = [column for column in COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the {name} set was not tokenised for stage `lenvm` (it lacks {', '.join(missing)}); "
            "delete `tokenized_path` or point it at an empty place."
        )
    reasons: list[str] = list(dataset["skip"])
    rows: list[int] = list(dataset["row"])
    top = np.asarray(dataset["max_id"])
    bad: list[tuple[int, str]] = []
    long_prompts = 0
    for i, reason in enumerate(reasons):
        if reason == LONG_PROMPT:
            long_prompts += 1
        elif reason:
            bad.append((i, reason))
        elif top[i] >= vocab_size:
            bad.append((i, f"token id {top[i]} is out of the vocabulary of {vocab_size}"))
    if bad:
        _report_bad(bad, rows, name, len(reasons))
    if long_prompts:
        logger.warning(
            "%s set: %d of %d rows dropped, their prompt is longer than `cutoff_len` %d and prompts are never cut.",
            name,
            long_prompts,
            len(reasons),
            cutoff_len,
        )
    drop = {i for i, _ in bad}
    cut = np.asarray(dataset["censored"])
    keep = [i for i, reason in enumerate(reasons) if not (reason or i in drop or (drop_censored and cut[i]))]
    if not keep:
        raise ValueError(
            f"the {name} set has no usable row: {len(bad)} bad, {long_prompts} with a prompt longer than `cutoff_len`, "
            f"{int(cut.sum()) if drop_censored else 0} censored and dropped, of {len(reasons)}; "
            "check the data, `cutoff_len` and `lenvm_censored`."
        )
    return dataset if len(keep) == len(reasons) else dataset.select(keep)


class StreamFilter:
    """`usable_rows` for a stream: judges each row as it comes. A data loader's worker counts for itself.

    Args:
        vocab_size, cutoff_len, drop_censored: as for `usable_rows`.
    """

    ENOUGH = 100
    """Rows seen before the share of bad ones says anything."""

    def __init__(self, vocab_size: int, cutoff_len: int, drop_censored: bool) -> None:
        self.vocab_size = vocab_size
        self.cutoff_len = cutoff_len
        self.drop_censored = drop_censored
        self.seen = 0
        self.bad: list[tuple[int, str]] = []

    def __call__(self, row: dict[str, Any]) -> bool:
        """Whether the row is used.

        Raises:
            ValueError: if more than 5 % of the rows so far are bad.
        """
        self.seen += 1
        reason = row["skip"]
        if reason == LONG_PROMPT:
            logger.warning(
                "training stream: row %d dropped, its prompt is longer than `cutoff_len` %d.",
                row["row"] or self.seen,
                self.cutoff_len,
            )
            return False
        if not reason and row["max_id"] >= self.vocab_size:
            reason = f"token id {row['max_id']} is out of the vocabulary of {self.vocab_size}"
        if reason:
            self.bad.append((self.seen - 1, reason))
            if len(self.bad) > MAX_BAD_SHARE * max(self.seen, self.ENOUGH):
                _report_bad(self.bad, [0] * self.seen, "training", self.seen)
            logger.warning("training stream: row %d is skipped: %s.", row["row"] or self.seen, reason)
            return False
        return not (self.drop_censored and row["censored"])


def _report_bad(bad: list[tuple[int, str]], rows: list[int], name: str, total: int) -> None:
    counts = Counter(reason for _, reason in bad)
    shown = "; ".join(f"row {rows[i] or i + 1}: {reason}" for i, reason in bad[:SHOWN])
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    message = f"{name} set: {len(bad)} of {total} rows cannot be used ({len(counts)} kind(s) of error): {shown}{more}."
    if len(bad) > MAX_BAD_SHARE * total:
        raise ValueError(
            f"{message} That is more than {MAX_BAD_SHARE:.0%}; "
            "see the data format in docs/training.md, or remove these rows."
        )
    logger.warning("%s They are skipped.", message)


def split_by_prompt(dataset: Any, val_size: float, seed: int) -> tuple[Any, Any]:
    """Training and validation rows that share no prompt (samples of one prompt have related lengths: a split by rows
    would leak).

    Args:
        val_size: share of the rows if below 1, else a number of rows; the nearest whole set of prompts is taken.

    Raises:
        ValueError: if there are fewer than two prompts, or nothing is left to train on.
    """
    keys = np.asarray(dataset["prompt_hash"])
    prompts, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    wanted = val_size * len(keys) if val_size < 1 else val_size
    order = np.random.default_rng(seed).permutation(len(prompts))
    cumulated = np.cumsum(sizes[order])
    taken = max(1, int(np.searchsorted(cumulated, wanted, side="left")) + 1) if wanted > 0 else 0
    if len(prompts) < 2 or taken >= len(prompts):
        raise ValueError(
            f"`val_size` {val_size:g} of {len(keys)} rows over {len(prompts)} different prompts leaves nothing to "
            "train on; lower it, sample more prompts, or give an `eval_dataset`."
        )
    held_out = np.isin(inverse, order[:taken])
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def foreign_prompts(dataset: Any, tokenizer: Any, most: int = 64) -> tuple[int, int]:
    """How many of the first `most` different prompts this tokenizer cuts into other tokens than the rows have.

    The text of a prompt comes from its own ids, so a difference means that another tokenizer wrote them, or another
    version of transformers reads the same files differently.

    Returns:
        (prompts that differ, prompts looked at).
    """
    _, first = np.unique(np.asarray(dataset["prompt_hash"]), return_index=True)
    rows = dataset.select(np.sort(first)[:most])
    differing = 0
    for ids, length in zip(rows["input_ids"], rows["prompt_length"], strict=True):
        prompt = list(ids)[:length]
        text = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        differing += tokenizer.encode(text, add_special_tokens=False) != prompt
    return differing, len(rows)


def shared_prompts(train: Any, held_out: Any) -> int:
    """How many validation rows have a prompt that is trained on."""
    return int(np.isin(np.asarray(held_out["prompt_hash"]), np.asarray(train["prompt_hash"])).sum())


def by_length(dataset: Any) -> Any:
    """The rows in order of length, so that evaluation batches carry no padding to speak of."""
    return dataset.select(np.argsort(np.asarray(dataset["length"]), kind="stable"))
