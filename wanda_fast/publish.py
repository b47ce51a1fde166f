"""Upload a result folder to the Hugging Face hub, model card included."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from . import model_card
from .errors import UserError


class PublishError(UserError, RuntimeError):
    """The upload failed; the folder is as it was."""


def check_repo_id(repo_id: str) -> None:
    """Refuse, before any work, what cannot be the name of a repository.

    Raises:
        UserError: not of the form name or owner/name.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no name of a hub repository, owner/name ({str(error).splitlines()[0]})") from None


def push(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False, token: str | None = None, api: Any = None) -> str:
    """Create the repository if it is missing and upload every file of a result folder in one commit.

    The model card is written anew for the repository: it says how to load the model from there. Hidden files stay here.

    Args:
        folder: what `prune` wrote.
        repo_id: "owner/name", or "name" for the token's owner.
        private: of a repository that is created.
        token: None for the one of `hf auth login` or HF_TOKEN.
        api: a `huggingface_hub.HfApi`, for tests.

    Returns:
        The address of the repository.

    Raises:
        UserError: no such folder, or no repository name.
        PublishError: no token, no network, no permission; the folder stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_repo_id(repo_id)
    path = Path(folder)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(s.startswith(".") for s in p.relative_to(path).parts))
    if not files:
        raise UserError(f"{folder}: holds nothing that could be uploaded.")
    if api is None:
        if token is None and get_token() is None:
            raise PublishError(f"not uploaded: no token for the hub (hf auth login, or HF_TOKEN); the result is in {folder}")
        api = HfApi(token=token, library_name="wanda_fast")
    try:
        made = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        # The hub knows the owner of a name alone.
        name = getattr(made, "repo_id", None) or repo_id
        operations = [
            CommitOperationAdd(p.relative_to(path).as_posix(), _card(path, name) if p == path / "README.md" else p) for p in files
        ]
        api.create_commit(name, operations, commit_message="Upload a pruned model", repo_type="model")
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = " ".join(str(error).split())[:200] or "no reason given"
        raise PublishError(f"not uploaded to {repo_id} ({type(error).__name__}: {reason}); the result is in {folder}") from error
    return str(made)


def _card(folder: Path, repo_id: str) -> bytes:
    """The model card as it is read on the hub."""
    report = folder / "pruning.json"
    if report.is_file():
        try:
            return model_card.text(json.loads(report.read_text(encoding="utf-8")), repo_id).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # a report of another version: its card stays
            pass
    return (folder / "README.md").read_bytes()
