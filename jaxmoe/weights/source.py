"""Resolving a model to a directory: a path, the name of an embedded preset, or a hub id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from jaxmoe.assets import asset_dir
from jaxmoe.errors import CheckpointError
from jaxmoe.paths import expanded
from jaxmoe.weights.checkpoint import BESIDE
from jaxmoe.weights.manifest import CHAT_TEMPLATES, JOURNAL

DEFAULT_MODEL = "demo"
_ONLY_PLANNED = ("deepseek-v3.1-nvfp4", "deepseek-v3.2")  # presets that cannot be run
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    f"{CHAT_TEMPLATES}/*.jinja",
    BESIDE,
    "*.safetensors",
    "*.safetensors.index.json",
]


def preset_models() -> list[str]:
    """Return the names of the checkpoints in the package."""
    return sorted(path.parent.name for path in asset_dir("checkpoints").glob("*/config.json"))


def find_model(model: str | Path, *, revision: str | None = None) -> Path:
    """Return the local directory of a model. A hub id is downloaded first; an interrupted download is resumed.

    Raises: CheckpointError naming the value and the accepted forms.
    """
    text = str(model)
    path = expanded(model, "model", CheckpointError)
    is_preset = text in preset_models()
    if text and (path.is_dir() or is_preset):
        _check_revision(text, revision)
        if path.is_dir() and (path / JOURNAL).exists():
            raise CheckpointError(f"{text} is an unfinished conversion: run the same jaxmoe convert again to finish it")
        return path if path.is_dir() else asset_dir("checkpoints") / text
    if text and path.exists():
        raise CheckpointError(f"{text} is a file; give the directory that holds config.json and the weights")
    if isinstance(model, str) and _HUB_ID.fullmatch(text):
        return _fetch(text, revision, _HUB_FILES)
    raise CheckpointError(
        f"model {text!r} is not an existing directory, a preset ({', '.join(preset_models())}) or a hub id (org/name)"
    )


def checkpoint_of(model: str) -> str | None:
    """Return the name by which find_model finds the weights of a model of find_config, None if it has no weights.

    They belong to the directory of a config.json. A preset of models/ and another JSON file have none.
    """
    path = Path(model)
    if model in preset_configs(planned=True) or (path.suffix == ".json" and path.name != "config.json"):
        return None
    return str(path.parent) if path.name == "config.json" else model


def preset_configs(*, planned: bool = False) -> list[str]:
    """Return the names of the model configs in the package, which have no weights.

    planned: include models that can be planned but not run.
    """
    names = sorted(path.stem for path in asset_dir("models").glob("*.json"))
    return [name for name in names if planned or name not in _ONLY_PLANNED]


def find_config(model: str | Path, *, hub: bool = False, revision: str | None = None) -> Path:
    """Return the path of a model's config.json: the file itself, or the config of a directory or preset.

    hub: also accept a hub id, and download only its config.json, at a revision.
    Raises: CheckpointError naming the value and the accepted forms.
    """
    name = str(model)
    if name in preset_configs(planned=True):
        _check_revision(name, revision)
        return asset_dir("models") / f"{name}.json"
    path = find_model(model) if name in preset_models() else expanded(model, "model", CheckpointError)
    path = path / "config.json" if path.is_dir() else path
    if hub and not path.exists() and path.suffix != ".json" and _HUB_ID.fullmatch(name):
        return _fetch(name, revision, ["config.json"]) / "config.json"
    if not path.is_file():
        near, known = _nearest(Path(model)), ", ".join([*preset_models(), *preset_configs(planned=True)])
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CheckpointError(f"config {name!r} is not a config.json, a folder with one, or a preset ({known}){hint}")
    _check_revision(name, revision)
    return path


def _check_revision(name: str, revision: str | None) -> None:
    """Raise CheckpointError if a revision is given for a local model."""
    if revision is not None:
        raise CheckpointError(
            f"revision {revision!r} was given but model {name!r} is local: only hub models have revisions; leave it out"
        )


def _nearest(path: Path) -> list[str]:
    """Return presets, and possible configs in the directory of path, with names similar to path."""
    try:
        near = [one for one in path.parent.iterdir() if one.suffix == ".json" or one.is_dir()]
        beside = {one.name: str(one) for one in near if one.name != path.name}
    except OSError:
        beside = {}
    known = beside | {name: name for name in (*preset_models(), *preset_configs(planned=True))}
    return [known[name] for name in difflib.get_close_matches(path.name.lower(), known, 3, 0.6)]


def _fetch(repo_id: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"hub model {repo_id!r} has no revision {revision!r}: name a branch, tag or commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"model {repo_id!r} is not a local directory and the hub has no such model{at}: check the name, "
            f"or log in for a private one"
        ) from error
    except Exception as error:  # the HTTP client's errors share no base with the library's
        reason = next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__
        raise CheckpointError(
            f"model {repo_id!r} is not a local directory and could not be fetched{at}: {reason}; check the name and "
            f"the connection and run again (the download resumes), or give a local directory"
        ) from error


def model_name(config: str) -> str:
    """Return a short name for the model of a config.json, a folder, or a preset."""
    path = Path(config)
    return (path.resolve().parent.name or path.name) if path.name == "config.json" else path.name.removesuffix(".json")
