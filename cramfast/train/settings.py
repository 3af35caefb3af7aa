"""The settings that a folder of results was made with: as JSON, as a short name, and what tells two of them apart."""

import hashlib
import json


def as_json(settings: dict) -> dict:
    """The settings as they come back from a JSON file."""
    return json.loads(json.dumps(settings, default=str))


def digest(settings: dict) -> str:
    """Hexadecimal digits, the same for the same settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differences(stored: dict, now: dict) -> list[str]:
    """Each setting that differs, in words."""
    found = []
    for name in stored.keys() | now.keys():
        there, here = stored.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found += differences(there, here)
        elif there != here:
            found.append(f"{name} is {there} there, {here} here")
    return sorted(found)
