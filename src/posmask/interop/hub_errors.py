"""Errors of huggingface_hub as errors of posmask."""

from collections.abc import Iterator
from contextlib import contextmanager

from posmask.errors import BadSetting, MissingAsset, first_line

__all__ = ["hub_errors", "network_error"]


@contextmanager
def hub_errors(repo: str, action: str) -> Iterator[None]:
    """Raise errors of huggingface_hub as errors of posmask, with a remedy."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except (errors.HFValidationError, errors.HfUriError):
        raise BadSetting(f"{repo!r} is not a repository's name: write USER/NAME") from None
    except errors.GatedRepoError:
        raise MissingAsset(f"{repo} is gated: accept its conditions on its page of the hub, then {log_in}") from None
    except errors.RepositoryNotFoundError:
        raise MissingAsset(f"{repo} is not on the hub, or private: check the name, or {log_in}") from None
    except errors.RevisionNotFoundError:
        raise MissingAsset(f"{repo} has no such revision: name a branch, tag or commit of it") from None
    except errors.RemoteEntryNotFoundError:
        raise MissingAsset(f"{repo} lacks a file of that SAE: look at its page on the hub") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            remedy = f"{log_in}, with a token that has this permission"
            raise MissingAsset(f"the hub does not let you {action} {repo} (status {code}): {remedy}") from None
        raise MissingAsset(f"the hub returned status {code} to a request to {action} {repo}: try later") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, network_error()):
        raise MissingAsset(
            f"the hub could not be reached to {action} {repo}, and the cache lacks it: check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None
    except (ValueError, KeyError, TypeError) as error:  # A login page of a network, for example.
        raise MissingAsset(
            f"what answers in place of the hub to a request to {action} {repo} is no hub ({first_line(error)}): check "
            "HF_ENDPOINT and the network"
        ) from None


def network_error() -> type[Exception]:
    """Return the base error of the HTTP library that this version of huggingface_hub uses."""
    from huggingface_hub import errors

    return errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
