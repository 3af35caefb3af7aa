"""The results of finetuning on disk: one glue.json a folder, complete after every seed."""

import json
from pathlib import Path

from ..errors import UserError
from ..train.checkpoint import write_json
from ..train.settings import differences

NAME = "glue.json"


class Results:
    """The finished (task, seed) pairs of one folder, all made with the same settings.

    Raises UserError for a folder that holds results of other settings, or no results under their name.
    """

    def __init__(self, folder: Path, settings: dict, facts: dict):
        """facts: what stands in the file besides, from the command that began it."""
        self.path = folder / NAME
        self.content = {**facts, "settings": settings, "tasks": {}}
        if self.path.is_file():
            self.content = self._read()
            differing = differences(self.content["settings"], settings)
            if differing:
                words = "; ".join(differing)
                raise UserError(f"--out {folder} holds results of other settings: {words}; give another --out")

    def _read(self) -> dict:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: damaged or unreadable: {error}; give another --out") from error
        if not isinstance(content, dict) or not {"settings", "checkpoint", "tasks"} <= content.keys():
            raise UserError(f"{self.path}: not results of finetuning; give another --out")
        return content

    def has(self, task: str, seed: int) -> bool:
        return str(seed) in self.content["tasks"].get(task, {}).get("seeds", {})

    def record(self, task: str, facts: dict, seed: int, result: dict) -> None:
        """Add one seed's result to a task, of which `facts` are the same for all seeds, and write the file. What other
        processes have added in the meantime stays."""
        if self.path.is_file():
            self.content = self._read()
        entry = self.content["tasks"].setdefault(task, facts | {"seeds": {}})
        entry["seeds"][str(seed)] = result
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.content)
        except OSError as error:
            raise UserError(f"--out {self.path.parent}: {error.strerror}") from error
