"""Write what the GSM8K pipeline starts from: tokenizer, untrained base model, training text, prompts.

    python examples/gsm8k/prepare_gsm8k.py OUT --data DIR [--seed 0]

DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl (`question`, `answer` with `<<...>>` and `#### N`).
The output has the layout of the demo's (examples/demo/prepare.py). Training questions are split three ways: most are
text for the base model; the others, which it never sees, are what it is sampled on to train the length value model, so
that their lengths are those of new questions and not of learned ones. Runs in the train environment.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

from prepare import MAX_LENGTH, base_model, write_jsonl
from tokenizer import train_tokenizer

PROMPTS = {"train": 1200, "val": 150}
GRADED = 100  # test questions with an answer to check: a base this small has few right, lengths are what counts
ANNOTATION = re.compile(r"<<[^>]*>>")
FINAL = re.compile(r"\n?####\s*(.+?)\s*$")


def read_problems(path: Path) -> list[tuple[str, str, str]]:
    """(question, answer in words, final answer) of each line; the answer in words ends with "Answer: N"."""
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        text = ANNOTATION.sub("", row["answer"])
        final = FINAL.search(text)
        if final is None:
            raise SystemExit(f"{path}, line {number}: the answer has no `#### N` at its end")
        value = final.group(1).replace(",", "")
        problems.append((row["question"].strip(), f"{text[: final.start()].strip()}\nAnswer: {value}", value))
    return problems


def prompt_row(prompt_id: str, question: str, value: str | None) -> dict[str, object]:
    """A line of a prompt file; `value` is the answer to check, if it is to be checked."""
    row: dict[str, object] = {"id": prompt_id, "messages": [{"role": "user", "content": question}], "kind": "gsm8k"}
    return row if value is None else {**row, "answer": value}


def prepare(out: Path, data: Path, seed: int) -> None:
    train, test = (read_problems(data / f"gsm8k_{split}.jsonl") for split in ("train", "test"))
    random.Random(seed).shuffle(train)
    held = sum(PROMPTS.values())
    if len(train) < 2 * held:
        raise SystemExit(f"{data}/gsm8k_train.jsonl has {len(train)} problems, at least {2 * held} are needed")
    start = 0
    for split, count in PROMPTS.items():
        rows = (prompt_row(f"{split}-{i:04d}", q, v) for i, (q, _, v) in enumerate(train[start : start + count]))
        write_jsonl(out / f"prompts_{split}.jsonl", rows)
        start += count
    asked = (prompt_row(f"test-{i:04d}", q, v if i < GRADED else None) for i, (q, _, v) in enumerate(test))
    write_jsonl(out / "prompts_test.jsonl", asked)

    text = train[held:]
    rows = (
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer, _ in text
    )
    write_jsonl(out / "data" / "base_train.jsonl", rows)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages"}
    info = {"gsm8k_base": {"file_name": "base_train.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    (out / "data" / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    tokenizer = train_tokenizer((part for question, answer, _ in text for part in (question, answer)), MAX_LENGTH)
    base_model(tokenizer, seed).save_pretrained(out / "base_init")
    tokenizer.save_pretrained(out / "base_init")
    print(
        f"{out}: {len(text)} problems as text, {held} for sampling, {len(test)} for the test, {len(tokenizer)} tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the weights (default 0)")
    arguments = parser.parse_args()
    prepare(arguments.out, arguments.data, arguments.seed)


if __name__ == "__main__":
    main()
