"""Downloading pinned files: what is on the disk under its name is complete and has the pinned sha256."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mitigate.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from mitigate.data.sources import Source

RETRIES = 2
_TIMEOUT = 30.0  # seconds without a byte


def download(
    source: Source, path: Path, *, progress: bool = False, retries: int = RETRIES, timeout: float = _TIMEOUT
) -> None:
    """Download a file to its place.

    It is written beside its place under another name, and moved there when its sha256 is the pinned one; otherwise
    nothing of it is left.

    Parameters
    ----------
    source
        Has a URL and a sha256.
    path
        Where to put it.
    progress
        Whether to draw a bar on stderr.
    retries
        How often to try again.
    timeout
        Seconds without a byte after which a try has failed.

    Raises
    ------
    DataError
        If the file cannot be had, is not the pinned one, or cannot be written.
    """
    import pooch
    from requests.exceptions import RequestException

    if source.url is None or source.sha256 is None:
        raise DataError(f"{source.path} cannot be downloaded: {source.instruction}")
    pooch.get_logger().setLevel("WARNING")  # the table says what was done
    fetcher = pooch.create(
        path=path.parent,
        base_url="",
        registry={path.name: f"sha256:{source.sha256}"},
        urls={path.name: source.url},
        retry_if_failed=retries,
    )
    by_hand = f"try again, or get it by hand and save it as {path}"
    try:
        fetcher.fetch(path.name, downloader=pooch.HTTPDownloader(progressbar=progress, timeout=timeout))
    except RequestException as error:
        raise DataError(f"cannot download {source.url}: {_reason(error)}\n{by_hand}") from None
    except ValueError:
        raise DataError(
            f"{source.url} gave a file with another sha256 than the pinned one; nothing of it was kept\n"
            f"a proxy or login page may have answered instead: {by_hand}"
        ) from None
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None
    _readable(path)


def _readable(path: Path) -> None:
    """Give the file the permissions of any new one; a temporary file is its owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _reason(error: Exception) -> str:
    """Say in a few words why a download failed; the library's own text names sockets and pools."""
    from requests import exceptions

    if isinstance(error, exceptions.HTTPError) and error.response is not None:
        return f"the server says {error.response.status_code} {error.response.reason}"
    reasons: list[tuple[type[Exception], str]] = [
        (exceptions.ProxyError, "the proxy cannot be used (HTTP_PROXY, HTTPS_PROXY)"),
        (exceptions.SSLError, "the server's certificate is not accepted"),
        (exceptions.Timeout, "no answer in time"),
        (exceptions.ChunkedEncodingError, "the connection broke off in the middle"),
        (exceptions.ConnectionError, "no connection; is this machine offline?"),
    ]
    return next((text for kind, text in reasons if isinstance(error, kind)), f"{type(error).__name__}: {error}")
