"""Uploading a folder to the Hugging Face hub, in one commit: all of it is there, or nothing.

The token is huggingface_hub's own affair (`hf auth login`, or HF_TOKEN); no setting here takes one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from cogvideox_factory.errors import FactoryError, MissingError


def repository_of(name: str) -> str:
    """Return `owner/name` of a repository, asking the hub who is logged in; nothing is made there.

    Raises:
        FactoryError: no name for a repository.
        MissingError: no network, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FactoryError(f"--push-to-hub {name!r} is no name of a repository. Write NAME or OWNER/NAME.") from error
    with _told(f"{name} cannot be pushed to the Hugging Face hub", "Nothing was exported or uploaded."):
        user = HfApi().whoami()["name"]
    return name if "/" in name else f"{user}/{name}"


def push_folder(folder: Path, repository: str, *, public: bool) -> str:
    """Upload all files of `folder` in one commit, making the repository if there is none, and return its address.

    Args:
        folder: what is uploaded.
        repository: `owner/name`, of the kind "model".
        public: whether a repository that is made now is for all to see; one that exists stays as it is.

    Raises:
        MissingError: no network, no permission, or the upload broke off; nothing of it is in the repository then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [
        CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=path) for path in files
    ]
    way_out = f"The export is whole in {folder}; upload it with `hf upload {repository} {folder}`."
    with _told(f"{folder} was not uploaded to {repository}", way_out):
        api = HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.create_commit(repository, operations, commit_message="Upload weights and card")
    return str(address)


@contextmanager
def _told(what: str, way_out: str) -> Iterator[None]:
    """Turn whatever the hub or the network does not do into one line."""
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's own HTTP error derives from that of whichever HTTP client it uses; that one is no OSError.
    network_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    try:
        yield
    except (OSError, ValueError, *network_errors) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if status in (401, 403) or "oken" in type(error).__name__:
            reason = f"{reason}. Log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
        raise MissingError(f"{what}: {reason}. {way_out}") from error
