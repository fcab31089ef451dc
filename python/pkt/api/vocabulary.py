"""Whether two models mean the same tokens by the same numbers."""

from __future__ import annotations

from pkt.errors import IncompatibleError
from pkt.models import Model, vocabulary


def shared_rows(teacher: Model, student: Model, why: str, remedy: str) -> int:
    """Tokens of the one vocabulary that both have, without rows that only pad it.

    Args:
        teacher: larger model.
        student: smaller model.
        why: the same tokenizer is needed, for the message.
        remedy: what to do otherwise.

    Raises:
        IncompatibleError: their tokenizers differ, or one has no tokenizer.json.

    """
    ours, theirs = vocabulary(student), vocabulary(teacher)
    for model, found in ((student, ours), (teacher, theirs)):
        if found is None:
            raise IncompatibleError(f"{model.folder}: no tokenizer.json to compare vocabularies by")
    assert ours is not None
    assert theirs is not None
    if ours != theirs:
        differing = len(set(ours.items()) ^ set(theirs.items()))
        raise IncompatibleError(
            f"{teacher.name}, {student.name}: {differing} entries of the two tokenizers differ; "
            f"{why}",
            remedy,
        )
    rows = max(ours.values(), default=-1) + 1
    return min(rows, student.embedding.shape[0], teacher.embedding.shape[0])


def same_vocabulary(teacher: Model, student: Model) -> bool:
    """Whether both tokenizers give every token the same id."""
    return not vocabulary_problems(teacher, student)


def vocabulary_problems(teacher: Model, student: Model) -> list[str]:
    """Same number of rows is not enough: the tokens must be the same ones."""
    ours, theirs = vocabulary(student), vocabulary(teacher)
    if ours is None or theirs is None:
        lacking = student if ours is None else teacher
        return [f"vocabulary: {lacking.folder} has no tokenizer.json to compare"]
    if ours == theirs:
        return []
    differing = len(set(ours.items()) ^ set(theirs.items()))
    return [
        f"vocabulary: {differing} entries of the two tokenizers differ; "
        "--embeddings needs the same vocabulary"
    ]
