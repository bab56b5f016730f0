"""Publishing on the Hugging Face Hub: models, adapters, and plans that rebuild a model from its base."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hfprune.io.output_folder import CARD_FILE
from hfprune.publishing.card import What, model_card
from hfprune.publishing.folder import PrunedFolder, hub_id, open_folder
from hfprune.utils.errors import ConfigError, first_line, hub_reason
from hfprune.utils.files import write_json

_ADAPTER_CONFIG = "adapter_config.json"
_NOT_PUBLISHED = ["*.ckpt", "*.failed-check", ".*"]


def push(
    folder: str | Path,
    repo: str,
    *,
    what: What = "model",
    private: bool | None = None,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> str:
    """Publishes what a run wrote on the Hugging Face Hub, with a model card.

    ``model``: the model folder; ``AutoModelForCausalLM.from_pretrained(repo)`` or :func:`hfprune.load` loads it.
    ``plan``: the plan and the weights that differ from the base's, if any: ``hfprune.load(base, plan=repo)`` rebuilds
    the model. ``adapter``: adapters that were not merged; they name the pruned model that ``base_model`` gives.

    Args:
        folder: ``OUT`` or ``OUT/model``.
        repo: Hub id, ``owner/name``. It is made where it does not exist; files of the same name are replaced.
        what: What to publish.
        private: Whether a new repository is private; the account's default if not given.
        base_model: Of a model or a plan the dense model, a hub id or a folder; the run's own if not given. Of an
            adapter the hub id of the pruned model.
        license: Identifier of the license; that of the base model's card if not given.
        token: Access token; that of ``hf auth login`` or ``HF_TOKEN`` if not given.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: There is nothing of this kind in the folder, a plan cannot rebuild the model, or the hub refuses.
        PlanError: The plan is damaged or does not fit the base.
    """
    if what not in get_args(What):
        raise ConfigError(f"what='{what}' is unknown: it is one of {', '.join(get_args(What))}.")
    found = open_folder(str(folder))
    if what == "adapter" and (base_model is None or Path(base_model).is_dir()):
        raise ConfigError(
            "base_model=... is missing: an adapter belongs to the pruned model. Publish that first, then give its hub "
            "id."
        )
    settings: dict[str, Any] = {"what": what, "license": license, "repo": repo, "base_model": hub_id(base_model)}
    card = model_card(folder, **settings)
    with tempfile.TemporaryDirectory() as made:
        source = _prepared(found, what, Path(made), base_model)
        with _hub(repo):
            return _upload(source, card, repo, private=private, token=token, what=what)


def _prepared(found: PrunedFolder, what: What, made: Path, base_model: str | None) -> Path:
    """Returns the folder whose files are published; ``made`` receives those that differ from the run's own."""
    if what == "model":
        return found.model
    if what == "adapter":
        assert found.adapter is not None
        shutil.copytree(found.adapter, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns("base", CARD_FILE))
        config = json.loads((made / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        write_json(made / _ADAPTER_CONFIG, config | {"base_model_name_or_path": base_model})
        return made
    from hfprune.io.rebuild import REBUILD_FILE, write_package  # loads transformers

    base = base_model or found.base
    if base is None:
        raise ConfigError("base_model=... is missing: the plan does not record which model it was made for.")
    record = write_package(found.model, base, made)
    write_json(made / REBUILD_FILE, record | {"base_model": hub_id(base) or Path(base).name})
    return made


def _upload(source: Path, card: Any, repo: str, *, private: bool | None, token: str | None, what: What) -> str:
    api = HfApi(token=token, library_name="hfprune")
    address = api.create_repo(repo, private=private, exist_ok=True)
    own_card = what == "model" and (source / CARD_FILE).is_file()
    api.upload_folder(
        repo_id=repo,
        folder_path=source,
        ignore_patterns=_NOT_PUBLISHED,
        commit_message=f"Add the {what} with hfprune",
    )
    if not own_card:
        api.upload_file(
            path_or_fileobj=str(card).encode(),
            path_in_repo=CARD_FILE,
            repo_id=repo,
            commit_message="Add the model card with hfprune",
        )
    return str(address)


@contextmanager
def _hub(repo: str) -> Iterator[None]:
    """Turns errors of the hub and its client into a ``ConfigError`` of one line."""
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"repo='{repo}' is not a hub id (owner/name): {first_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise ConfigError("The hub needs a token: run 'hf auth login', or set HF_TOKEN.") from error
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"repo='{repo}' cannot be reached: HF_HUB_OFFLINE is set.") from error
    except (HfHubHTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = (
            " Run 'hf auth login' with a token that may write there, or set HF_TOKEN." if status in (401, 403) else ""
        )
        raise ConfigError(f"repo='{repo}' cannot be written: {hub_reason(error)}{hint}") from error
