"""Fetching a model by its hub id, from a hub served on the loopback interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from jaxmoe import LLM, CheckpointError
from jaxmoe.weights.source import find_config, find_model

from ..conftest import ONE_DEVICE, mesh_of
from .hub_server import Hub, commit_of, serve

CASE = "mistral_window"  # two weight files and an index
UNNEEDED = {"pytorch_model.bin": b"torch", "model.pt": b"torch", "README.md": b"# read", "original/params.json": b"{}"}
TEXT = {  # what text needs of a repository, and how its weights are quantized
    "config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}", "chat_template.jinja": b"x", "chat_template.json": b"{}",
    "additional_chat_templates/rag.jinja": b"x", "hf_quant_config.json": b"{}",
}  # fmt: skip
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def hub(tiny_dir, tmp_path, monkeypatch) -> Iterator[Hub]:
    """org/tiny with branch main and tag v1 (another config), and huggingface_hub pointed at it with an empty cache."""
    main = {path.name: path.read_bytes() for path in tiny_dir(CASE).iterdir()}
    config = {**json.loads(main["config.json"]), "sliding_window": 7}
    v1 = {**main, "config.json": json.dumps(config).encode()}
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(
        Hub({"org/tiny": {"main": {**main, **UNNEEDED}, "v1": v1}, "org/text": {"main": {**TEXT, **UNNEEDED}}})
    ) as hub:
        _point_at(hub.url, tmp_path / "cache", monkeypatch)
        yield hub
    huggingface_hub.close_session()


def _point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME do at import; any other host is out of bounds."""
    look_up = socket.getaddrinfo

    def only_loopback(host: str, *args: object, **kwargs: object) -> object:
        assert host in ("127.0.0.1", b"127.0.0.1"), f"{host} is not the hub under test"
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_loopback)
    huggingface_hub.close_session()
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def _weight_files(tiny_dir) -> list[str]:
    return sorted(path.name for path in tiny_dir(CASE).glob("*.safetensors"))


def test_a_hub_model_loads_by_its_id_and_only_what_is_needed_is_fetched(hub, tiny_dir):
    llm = LLM.load("org/tiny", mesh=mesh_of(ONE_DEVICE))
    assert llm.config.family == "mistral"
    assert llm.config.sliding_windows[0] == 9
    assert hub.fetched() == sorted(path.name for path in tiny_dir(CASE).iterdir())


def test_what_arrives_is_what_was_published_and_comes_once(hub, tiny_dir):
    directory = find_model("org/tiny")
    assert {path.name for path in directory.iterdir()} == {path.name for path in tiny_dir(CASE).iterdir()}
    for path in tiny_dir(CASE).iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes()
    hub.requests.clear()
    assert find_model("org/tiny") == directory
    assert hub.fetched() == []


def test_every_file_that_text_needs_is_fetched(hub):
    directory = find_model("org/text")
    assert {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} == set(TEXT)


@pytest.mark.parametrize("revision", ["v1", commit_of("v1")], ids=["tag", "commit"])
def test_a_revision_is_fetched(hub, revision):
    directory = find_model("org/tiny", revision=revision)
    assert json.loads((directory / "config.json").read_text())["sliding_window"] == 7
    assert directory != find_model("org/tiny")


def test_a_fetch_cut_off_within_a_file_goes_on_from_there(hub, tiny_dir, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept is whole chunks
    name = _weight_files(tiny_dir)[0]
    content = (tiny_dir(CASE) / name).read_bytes()
    hub.cut_after[name] = 30_500
    directory = find_model("org/tiny")
    assert (directory / name).read_bytes() == content
    asked = [request.range for request in hub.requests if request.method == "GET" and request.path.endswith(name)]
    assert asked == [None, "bytes=30000-"]


def test_a_fetch_that_failed_is_taken_up_where_it_ended(hub, tiny_dir):
    *done, last = _weight_files(tiny_dir)
    hub.broken.add(last)
    with pytest.raises(CheckpointError, match=r"model 'org/tiny' .*could not be fetched: .*500.*the download resumes"):
        find_model("org/tiny")
    assert set(done) <= set(hub.fetched())
    hub.broken.clear()
    hub.requests.clear()
    assert (find_model("org/tiny") / last).read_bytes() == (tiny_dir(CASE) / last).read_bytes()
    assert hub.fetched() == [last]


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("org/tiny", "v9", "hub model 'org/tiny' has no revision 'v9': name a branch, tag or commit"),
        ("org/none", None, "model 'org/none' is not a local directory and the hub has no such model: check the name"),
        ("org/none", "v9", "the hub has no such model at revision 'v9': check the name"),
        ("org/a--b", None, "model 'org/a--b' is not a local directory and could not be fetched"),
        ("org/" + "n" * 100, None, "could not be fetched"),
    ],
)
def test_a_model_or_revision_the_hub_lacks(hub, model, revision, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        find_model(model, revision=revision)
    assert "\n" not in str(caught.value)
    assert hub.fetched() == []


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _point_at(f"http://127.0.0.1:{port}", tmp_path, monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"model 'org/tiny' .*could not be fetched: .*run again.*give a local"
    ) as e:
        find_model("org/tiny")
    assert "\n" not in str(e.value)


def test_a_fetched_model_is_found_without_the_hub(hub, monkeypatch):
    directory = find_model("org/tiny")
    _point_at("http://127.0.0.1:9", directory.parents[2], monkeypatch)
    assert find_model("org/tiny") == directory


def test_a_config_alone_is_fetched(hub):
    """find_config is told that what is no file may be a hub id; then nothing else comes."""
    config = json.loads(find_config("org/tiny", hub=True, revision="v1").read_text())
    assert (config["sliding_window"], hub.fetched()) == (7, ["config.json"])
    with pytest.raises(CheckpointError, match=r"'org/tiny' is not a config.json, a folder with one, or a preset"):
        find_config("org/tiny")
    with pytest.raises(CheckpointError, match="the hub has no such model"):
        find_config("org/none", hub=True)


def test_the_command_fetches_too(hub, tmp_path):
    """A process of its own, told of the hub by the environment alone; standard output stays pure."""
    (tmp_path / "ids.jsonl").write_text("[1, 2, 3]\n")
    command = [
        "score",
        "org/tiny",
        "--revision",
        "v1",
        "--ids",
        str(tmp_path / "ids.jsonl"),
        "--devices",
        "1",
        "--json",
    ]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "jaxmoe", *command],
        cwd=ROOT,
        env={key: value for key, value in env.items() if key != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["logprobs"]) == 2
    assert any(commit_of("v1") in request.path for request in hub.requests)
