"""Fetches a checkpoint from the Hugging Face hub, or from its cache when the hub cannot be asked."""

import glob
import logging
from pathlib import Path

from halimede.engine.config import LoadFormat
from halimede.engine.loader.checkpoint_files import (
    CHAT_TEMPLATE_FILES,
    TOKENIZER_FILES,
    WeightChoice,
    choose_weights,
    matching,
    read_index,
)
from halimede.engine.loader.quant_config_files import QUANT_CONFIG_FILES
from halimede.errors import ModelLoadError

_logger = logging.getLogger(__name__)


class HubRepository:
    """One repository on the hub at one revision. Asks the network only when `fetch` is called."""

    def __init__(
        self, name: str, *, revision: str | None, token: str | None, download_dir: str | None
    ) -> None:
        self.name = name
        self._revision = revision
        self._token = token
        self._cache_dir = download_dir

    def fetch(self, quant: str | None, load_format: LoadFormat = "auto") -> tuple[Path, WeightChoice]:
        """Download what is needed to run the model and is not in the cache yet; quant as in choose_weights.

        Returns the directory of the snapshot and the weights in it, all by name. Raises ModelLoadError when
        the repository cannot be had (not found, no access, no network and not in the cache) or holds no
        model.
        """
        from huggingface_hub import HfApi, constants

        api = HfApi(token=self._token)
        try:
            info = api.model_info(self.name, revision=self._revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except _hub_errors() as error:
            return self._from_cache(quant, load_format, error)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        choice = choose_weights(names, f"the repository {self.name}", quant, load_format)
        # A GGUF holds its configuration and its tokenizer.
        whole = ("config.json", *QUANT_CONFIG_FILES, *TOKENIZER_FILES, *CHAT_TEMPLATE_FILES)
        extra = () if choice.format == "gguf" else whole
        wanted = matching(names, ("generation_config.json", *extra))
        if choice.index is not None:
            folder = self._download([*wanted, choice.index])
            shards = read_index(folder / choice.index, names)
            choice = WeightChoice(choice.format, shards)
            wanted = []
        return self._download([*wanted, *choice.names]), choice

    def _download(self, names: list[str]) -> Path:
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                self.name,
                revision=self._revision,
                token=self._token,
                cache_dir=self._cache_dir,
                allow_patterns=[glob.escape(name) for name in names],
            )
        except _hub_errors() as error:
            raise ModelLoadError(self._explain(error)) from error
        return Path(folder)

    def _from_cache(
        self, quant: str | None, load_format: LoadFormat, reason: Exception
    ) -> tuple[Path, WeightChoice]:
        """The snapshot in the cache, for when the hub gave `reason` instead of an answer."""
        from huggingface_hub import errors, snapshot_download

        try:
            # No pattern: the folder is wanted, whatever is in it. What is missing shows when choosing.
            folder = Path(
                snapshot_download(
                    self.name,
                    revision=self._revision,
                    cache_dir=self._cache_dir,
                    local_files_only=True,
                    allow_patterns=[],
                )
            )
        except _hub_errors():
            raise ModelLoadError(self._explain(reason)) from reason
        wanted_so = isinstance(reason, errors.OfflineModeIsEnabled)
        level = logging.INFO if wanted_so else logging.WARNING
        _logger.log(level, "%s: using the snapshot in %s (%s)", self.name, folder, _short(reason))
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        try:
            choice = choose_weights(names, str(folder), quant, load_format)
            if choice.index is not None:
                choice = WeightChoice(choice.format, read_index(folder / choice.index, names))
        except ModelLoadError as error:
            raise ModelLoadError(
                f"{error}. This is the cached copy; for the rest: {self._explain(reason)}"
            ) from reason
        return folder, choice

    def _explain(self, error: BaseException) -> str:
        """What went wrong and what to do, for an error of the hub's client."""
        from huggingface_hub import constants, errors

        where = f"{self.name} at {constants.ENDPOINT}"
        cause = _http_cause(error)
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        if isinstance(cause, errors.GatedRepoError) or status == 403:
            return (
                f"access to {where} is refused ({status}): the model is gated, or the token may not read it. "
                "Accept its licence on its page there, then pass hf_token or log in with `hf auth login`"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{where} has no revision {self._revision!r} (404); give a branch, tag or commit of it"
        if status == 401 and "Invalid credentials" in str(cause):
            return f"{where} refuses the token (401); pass a valid hf_token or log in with `hf auth login`"
        if isinstance(cause, errors.RepositoryNotFoundError) or status in (401, 404):
            # To whoever is not logged in the hub says 401 of a private repository and of one that never was.
            return (
                f"{where} does not exist or is private ({status}), and there is no file or directory "
                f"{self.name!r} here either: check the spelling; for a private one pass hf_token or log in "
                "with `hf auth login`"
            )
        return (
            f"{where} cannot be downloaded ({_short(error)}) and is not, or not completely, in the cache "
            f"{self._cache_dir or constants.HF_HUB_CACHE}; connect to the network (and unset "
            "HF_HUB_OFFLINE), give a local directory as the model, or point HF_HOME or download_dir at a "
            "cache that has it"
        )


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises for a refusal, a network that is down or a name it does not allow."""
    from huggingface_hub import errors

    # The HTTP client is httpx in hub 1 and httpx2 in hub 2; the hub's errors derive from the one in use.
    return (OSError, ValueError, *errors.HfHubHTTPError.__bases__)


def _http_cause(error: BaseException) -> BaseException:
    """The HTTP error that lies behind an exception; itself when there is none."""
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.HfHubHTTPError):
        cause = cause.__cause__
    return error if cause is None else cause


def _short(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}"
