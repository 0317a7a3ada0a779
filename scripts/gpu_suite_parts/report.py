"""What a part is told and what it tells: cases that are ok, failed or not run, and rows of numbers."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Settings:
    """deadline: of time.monotonic(). tiny: the same paths on a CPU, with next to nothing to do."""

    seconds: float
    tiny: bool = False
    model: str | None = None
    level: int = 0
    mode: str = "FULL_DECODE_ONLY"
    workers: int = 1
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


class Report:
    """Written to its file at every change, so that a part that is stopped leaves what it found out.

    Cases that were planned and have no outcome when the part ends were not run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.data: dict[str, Any] = {"planned": [], "cases": {}, "rows": []}

    def plan(self, names: list[str]) -> None:
        self.data["planned"] += names
        self._save()

    def case(self, name: str, status: str, detail: str = "", quiet: bool = False) -> None:
        """status: "ok", "failed" or "not run"."""
        self.data["cases"][name] = {"status": status, "detail": detail}
        if not quiet or status == "failed":
            print(f"{status:8} {name}{': ' if detail else ''}{detail}", flush=True)
        self._save()

    def row(self, row: dict[str, Any]) -> None:
        self.data["rows"].append(row)
        self._save()

    def note(self, key: str, value: Any) -> None:
        self.data[key] = value
        self._save()

    def _save(self) -> None:
        # In one move: a reader never sees half a file.
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.data))
        part.replace(self._path)
