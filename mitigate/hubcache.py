"""Which revisions of a hub repository the local cache has. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path


def cached_instead(path: str, revision: str | None) -> str | None:
    """Return the value of ``model.revision`` that takes what the local cache has instead of what was asked for.

    Parameters
    ----------
    path
        Hub id.
    revision
        Commit, branch or tag that was asked for; ``None`` for the newest.

    Returns
    -------
    str or None
        ``null``, or a commit where the cache does not know which is the newest; ``None`` if it has no other revision,
        or has the one that was asked for.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=path, repo_type="model")
    commits = sorted(file.parent.name for file in folder.glob("snapshots/*/config.json"))
    newest = _commit_of(folder, "main")
    asked = newest if revision is None else _commit_of(folder, revision) or revision
    if not commits or asked in commits:
        return None
    return "null" if newest in commits else commits[0]


def download_command(path: str, revision: str | None) -> str:
    """Return the command that brings a revision of a hub repository into the local cache."""
    return f"hf download {path}" if revision is None else f"hf download {path} --revision {revision}"


def _commit_of(folder: Path, name: str) -> str | None:
    """Return the commit a branch or tag had when it was downloaded."""
    file = folder / "refs" / name
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None
