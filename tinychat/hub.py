"""Models on a hub: what is downloaded of them, and what it means where that fails."""

from __future__ import annotations

import stat
from errno import ELOOP, ENOENT, ENOTDIR
from pathlib import Path

from tinychat.config import VilaConfig
from tinychat.errors import ModelError, TinychatError, UsageError

WORDS = ["*.json", "*.jinja", "*.txt", "*.model"]  # configs, chat templates, vocabularies
SAFE = [*WORDS, "*.safetensors"]
PICKLED = ["*.bin", "*.pt"]
HUB_FAULTS = (  # an exception of huggingface_hub, the first that fits; what it means; what to do
    (
        "HFValidationError",
        "{repo!r} is neither a folder nor a hub id",
        "give an existing folder, or owner/name as on the hub",
    ),
    (
        "GatedRepoError",
        "the hub gives {repo} only to those who were granted access",
        "accept its terms on its page, then log in with `hf auth login`",
    ),
    (
        "RepositoryNotFoundError",
        "there is no folder {repo}, and the hub has no model {repo}",
        "check the name; for a private model log in with `hf auth login`",
    ),
    ("RevisionNotFoundError", "the hub has no revision {revision} of {repo}", "check the revision"),
    (
        "LocalEntryNotFoundError",
        "there is no folder {repo}, the cache has no complete copy, and the hub cannot be reached",
        "connect once (and unset HF_HUB_OFFLINE), or give a folder",
    ),
)
NOT_NEEDED = ["onnx/*", "original/*", "consolidated*", "training_args.bin", "optimizer*", "scheduler*", "rng_state*"]


def find_tower(folder: Path, config: VilaConfig) -> Path:
    """The folder of an original LLaVA's vision tower: config.mm_vision_tower as a path, vision_tower/, or a hub id."""
    named = config.mm_vision_tower or ""
    local = [folder / name for name in (named, "vision_tower") if name]
    for path in local:
        if (path / "config.json").is_file():
            return path
    if not named or looks_like_path(named):
        tried = ", ".join(str(path) for path in local)
        message = f"the vision tower {named!r} of {folder} was not found (looked for {tried})"
        raise ModelError(message, f"put the tower into {folder / 'vision_tower'}")
    return snapshot(named, None)


def looks_like_path(text: str) -> bool:
    parts = text.replace("\\", "/").split("/")
    return len(parts) > 2 or parts[0] in ("", ".", "..", "~") or parts[-1] == "" or "\\" in text


def standing(path: Path, wrong: type[TinychatError] = UsageError) -> str:
    """What is there: "folder", "file", or "" for nothing. Raises `wrong` where that cannot be seen."""
    try:
        return "folder" if stat.S_ISDIR(path.stat().st_mode) else "file"
    except ValueError:  # of a NUL in the name
        return ""
    except OSError as error:
        if error.errno in (ENOENT, ENOTDIR, ELOOP):
            return ""
        remedy = "check the name, and the permissions of the folders above it"
        raise wrong(f"{path} cannot be looked at ({error.strerror})", remedy) from error


def nearby(path: Path) -> str:
    """What to do about a folder that is not there: the nearest parent that is, and what it holds."""
    parent = next((p for p in path.absolute().parents if p.is_dir()), Path("/"))
    try:
        there = sorted(p.name for p in parent.iterdir() if p.is_dir())[:8]
    except OSError as error:
        return f"{parent} cannot be listed ({error.strerror})"
    return f"{parent} has {', '.join(there) or 'no folders'}"


def snapshot(repo: str, revision: str | None) -> Path:
    """The files of a hub id that are needed, through the hub's cache; pickles only where there are no safetensors."""
    folder = _download(repo, revision, SAFE)
    if any(folder.rglob("*.safetensors")):
        return folder
    return _download(repo, revision, [*WORDS, *PICKLED])


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    transport: type[Exception] = vars(errors)["HTTPError"]  # of whichever HTTP library it uses
    try:
        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_NEEDED
        )
    except (ValueError, OSError, transport) as error:
        for name, message, remedy in HUB_FAULTS:
            if isinstance(error, getattr(errors, name)):
                raise ModelError(message.format(repo=repo, revision=revision or "main"), remedy) from error
        raise ModelError(f"{repo} could not be downloaded ({error})", "try again: what is there is kept") from error
    return Path(found)
