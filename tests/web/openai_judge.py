"""Checks events against the types of the ``openai`` package, run with a Python that has it.

    PYTHON openai_judge.py realtime|live < EVENTS       one JSON object a line

Every event must be of its type, with all required fields, and have no field that its type does not know. Prints what is
wrong, a line each, and how many events were seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError


def unknown(value: Any, where: str) -> Iterator[str]:
    """Fields that their type does not have."""
    if isinstance(value, BaseModel):
        yield from (f"{where}.{name}" for name in value.model_extra or {})
        for name in type(value).model_fields:
            yield from unknown(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from unknown(part, f"{where}[{index}]")


def main() -> int:
    if sys.argv[1] == "live":
        from openai.types.live.server_event import ServerEvent as Event
    else:
        from openai.types.realtime.realtime_server_event import RealtimeServerEvent as Event
    adapter: TypeAdapter[Any] = TypeAdapter(Event)
    seen = wrong = 0
    for line in sys.stdin:
        seen += 1
        event = json.loads(line)
        try:
            found = adapter.validate_python(event)
        except ValidationError as error:
            print(f"{event.get('type')}: {error.errors()[:3]}")
            wrong += 1
            continue
        if found.type != event["type"]:
            print(f"{event['type']} was taken for {found.type}")
            wrong += 1
        for name in unknown(found, event["type"]):
            print(f"unknown field {name}")
            wrong += 1
    print(f"{seen} events")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
