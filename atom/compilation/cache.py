"""Compiled models on disk: one directory a key, with a manifest that tells stale or damaged from good.

A directory holds code that will be executed, so it is used only when it belongs to this user and nobody
else can write to it.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from atom.compilation.plan import Plan
from atom.utils.logging import get_logger

logger = get_logger(__name__)

_MANIFEST = "manifest.json"


class Manifest(msgspec.Struct, kw_only=True):
    """plan: how to run the pieces; files: SHA-256 of each artifact, `<piece>.<size or any>.bin`.

    graphs: piece -> its graph as readable code, for whoever wants to see what runs.
    """

    plan: Plan
    files: dict[str, str]
    graphs: dict[str, str]


def cache_key(facts: dict[str, Any]) -> str:
    """Hash of everything the compiled code depends on: `facts` (JSON-like) and ATOM's own sources."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode())
    root = Path(__file__).parent.parent
    for folder in ("models", "layers", "kernels", "compilation"):
        for source in sorted((root / folder).rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


class CompilationCache:
    """The directory of one key below `root`."""

    def __init__(self, root: str, key: str) -> None:
        self.root = Path(root)
        self.directory = self.root / key

    def load(self) -> Manifest | None:
        """The manifest, when every file it lists is there and whole; None, with a log line, otherwise."""
        path = self.directory / _MANIFEST
        if not path.exists():
            return None
        try:
            _require_private(self.directory)
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
            for name, expected in manifest.files.items():
                if os.path.basename(name) != name or _sha256(self.directory / name) != expected:
                    raise ValueError(f"{name} has changed")
        except (OSError, ValueError, msgspec.DecodeError) as error:
            logger.warning("compilation cache %s is not used and will be rebuilt: %s", self.directory, error)
            return None
        return manifest

    def start(self) -> Path:
        """A private directory to write artifacts into; `finish` puts it in place."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(tempfile.mkdtemp(prefix=".building-", dir=self.root))

    def finish(self, building: Path, plan: Plan, graphs: dict[str, str]) -> None:
        """Write the manifest and swap the directory in, whole or not at all."""
        files = {path.name: _sha256(path) for path in sorted(building.glob("*.bin"))}
        manifest = Manifest(plan=plan, files=files, graphs=graphs)
        (building / _MANIFEST).write_bytes(msgspec.json.encode(manifest))
        shutil.rmtree(self.directory, ignore_errors=True)
        try:
            building.rename(self.directory)
        except OSError:  # another process was faster
            shutil.rmtree(building, ignore_errors=True)


def default_root() -> str:
    return os.path.join(os.path.expanduser("~"), ".cache", "atom", "compile")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _require_private(directory: Path) -> None:
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError("it must belong to this user and be writable by nobody else")
