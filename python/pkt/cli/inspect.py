"""`pkt inspect`: what two models are, how they fit, and the plan of a run, from headers alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from pkt import api
from pkt.cli import options
from pkt.cli.environment import aliases, stay_offline
from pkt.cli.running import problems_line
from pkt.cli.tables import match_table, models_table, plan_json, plan_table
from pkt.errors import IncompatibleError, UsageError
from pkt.records import Inspection


@click.command(short_help="Two models, how they fit, and the plan of a run.")
@options.models
@options.shape
@options.spool
@options.as_json
def inspect(
    teacher: str | None,
    student: str | None,
    max_tokens: int,
    limit: int,
    as_json: bool,
    **rest: Any,
) -> None:
    """Describe teacher and student, what fits what, and the plan of an extraction.

    Reads headers only; nothing is downloaded, a hub id must be in the local cache. --limit and
    --max-tokens say how many seeds of what length the plan assumes.

    Exit code 3: the models do not fit together; 4: the plan does not fit memory or disk.
    """
    if not teacher:
        raise UsageError("pkt inspect needs --teacher", "pkt inspect --teacher 70b --student 7b")
    stay_offline()
    found = api.inspect(
        teacher, student, seeds=limit or 32, tokens=max_tokens, aliases=aliases(), **rest
    )
    click.echo(_json(found) if as_json else _text(found))
    if found.problems:
        raise IncompatibleError(problems_line(teacher, student or "", found.problems))
    if found.plan:
        api.require_fit(found.plan)


def _text(found: Inspection) -> str:
    parts = [models_table(found.teacher, found.student)]
    if found.rows:
        parts.append(match_table(found.rows))
    if found.plan:
        parts.append(plan_table(found.plan))
    if found.notes:
        parts.append("\n".join(f"note: {note}" for note in found.notes))
    if found.problems:
        parts.append("\n".join(f"problem: {problem}" for problem in found.problems))
    return "\n\n".join(parts)


def _json(found: Inspection) -> str:
    plan = plan_json(found.plan) if found.plan else None
    return json.dumps({**asdict(found), "plan": plan}, indent=1)
