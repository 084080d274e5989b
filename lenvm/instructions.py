"""The paper's instructions before a question: the same words where samples are drawn and where models are judged."""

from __future__ import annotations

MATH = r"Please reason step by step, and put your final answer within \boxed{}."
FOLLOW = "Please follow the instructions below."
CODE = (
    "Please solve the programming task below in Python step by step and then provide the complete solution in a single "
    "code block."
)


def instructed(instruction: str, question: str) -> str:
    """A question after its instruction and an empty line; alone where there is no instruction."""
    return f"{instruction}\n\n{question}" if instruction else question
