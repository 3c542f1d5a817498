"""Uploads an export to the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vdrop_cli import stored
from vdrop_cli.errors import ConfigError, RunError, one_line
from vdrop_cli.sharing import card
from vdrop_cli.sharing import folder as export_folder

HUB_FILES = {".gitattributes"}  # which the Hub itself adds to a new repository
REFUSED = (401, 403)  # HTTP status codes


def require_token() -> None:
    """Raises ConfigError where no token is stored."""
    if get_token() is None:
        raise ConfigError("push needs a token of the Hugging Face Hub; set HF_TOKEN, or run hf auth login")


def push(folder: Path, name: str, private: bool, message: str) -> str:
    """Uploads an export as one commit and returns its address. A new repository is private if `private`.

    Raises ConfigError where the repository holds other files or refuses the token, RunError where the upload
    fails.
    """
    api = HfApi()
    with one_line_errors(name):
        address = str(api.create_repo(name, private=private, exist_ok=True))
        present = set(api.list_repo_files(name)) - HUB_FILES
        require_export(api, name, present)
        require_unedited_card(api, name, present, folder)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[f"{export_folder.WEIGHTS}-*"],  # evaluations, with paths of this machine
        )
    return address


def download(api: HfApi, name: str, file: str) -> bytes:
    """Returns the content of a file of a repository."""
    with TemporaryDirectory() as temporary:
        return Path(api.hf_hub_download(name, file, local_dir=temporary)).read_bytes()


def require_export(api: HfApi, name: str, present: set[str]) -> None:
    """Raises ConfigError unless a repository, with the files `present`, is new or holds an export."""
    if not present:
        return
    is_config = stored.readable_by(export_folder.parse_config)
    if export_folder.CONFIG not in present or not is_config(download(api, name, export_folder.CONFIG)):
        raise ConfigError(f"push={name} holds other files than an export; choose another name")


def require_unedited_card(api: HfApi, name: str, present: set[str], folder: Path) -> None:
    """Raises ConfigError if the upload would replace an edited model card by one that was not edited."""
    page = export_folder.CARD
    if not card.is_unedited((folder / page).read_bytes()) or page not in present:
        return
    uploaded_page = download(api, name, page)
    if uploaded_page and not card.is_unedited(uploaded_page):
        raise ConfigError(
            f"push={name} holds a {page} that was edited there; export with folder=…, make the same changes "
            f"in the {page} that it writes, and push it with the same folder=…"
        )


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Errors of the Hub and of the network as one line."""
    try:
        yield
    except (ConfigError, RunError):
        raise
    except HFValidationError as error:
        raise ConfigError(f"push must be owner/name, got {name!r} ({one_line(error)})") from None
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        if status in REFUSED:
            raise ConfigError(
                f"push={name} was refused (HTTP {status}); use a token that may write there, or another name"
            ) from None
        raise RunError(f"push={name} failed ({one_line(error)}); repeat the command later") from None
    except Exception as error:  # the network's errors depend on the version of huggingface_hub
        raise RunError(
            f"push={name} failed ({one_line(error)}); check the network, and repeat the command"
        ) from None
