"""Which URLs name a place in an object store, and why another one is refused.

Credentials never stand in a URL, because settings are stored in config.yaml and in every checkpoint: a store takes them
from its usual variables (docs/object_stores.md).
"""

from __future__ import annotations

import importlib.util
from urllib.parse import urlsplit

SCHEMES = {
    "s3": "s3://BUCKET/PREFIX",
    "gs": "gs://BUCKET/PREFIX",
    "az": "az://CONTAINER/PREFIX",
    "file": "file:///FOLDER",
    "memory": "memory:///NAME",
}
"""Scheme -> how its URLs look."""
EXTRA = "store"
"""The optional extra of this package that holds the client."""


def is_url(text: str) -> bool:
    """Whether `text` is a URL of any kind and no path of this machine."""
    return "://" in text


def url_objection(text: str) -> str:
    """Why `text` cannot be a place in an object store; "" if it can. Never repeats what may be a secret."""
    parts = urlsplit(text)
    if "@" in parts.netloc or parts.query or parts.fragment:
        return (
            "a URL holds no credentials, because settings are stored in config.yaml and in every checkpoint; put them"
            " into the store's usual variables (AWS_..., GOOGLE_..., AZURE_...), and write the URL without @, ? and #"
        )
    looks = ", ".join(SCHEMES.values())
    if parts.scheme not in SCHEMES or not text.startswith(f"{parts.scheme}://"):
        return f"no object store is reached by this; the URLs of stores look like {looks}"
    local = parts.scheme in ("file", "memory")
    if bool(parts.netloc) == local or not parts.path.strip("/") or "//" in parts.path.rstrip("/"):
        return f"it must look like {SCHEMES[parts.scheme]}"
    if any(part in (".", "..") for part in parts.path.split("/")):
        return "a path in a store has no parts . and .."
    return ""


def missing_extra() -> str:
    """What to install before a URL can be read; "" if it is there."""
    if importlib.util.find_spec("obstore") is None:
        return f"URLs need the package obstore: pip install 'megatron-fp4[{EXTRA}]'"
    return ""


def check_url(text: str, setting: str) -> None:
    """Raise ValueError if `text` is no URL of a store, or none is reached without an extra. setting: what it is of."""
    if objection := url_objection(text) or missing_extra():
        shown = text if is_shown(text) else "(a URL that is not repeated here)"
        raise ValueError(f"{setting} = {shown}: {objection}")


def check_place(text: str, setting: str) -> None:
    """Raise ValueError for a URL of which no store can be; a path passes. The extra is not asked for here."""
    if is_url(text) and (objection := url_objection(text)):
        raise ValueError(f"{setting} = {text if is_shown(text) else '(a URL that is not repeated here)'}: {objection}")


def is_shown(text: str) -> bool:
    """Whether a URL may be repeated in a message: one with a user, a password or a signature may not."""
    parts = urlsplit(text)
    return not ("@" in parts.netloc or parts.query or parts.fragment)
