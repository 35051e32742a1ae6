"""Models and data of the hub: asked only if it answers, from the cache otherwise, and without a single request then."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

from lightning_ief.tasks import hub  # noqa: E402
from lightning_ief.tasks.hub import MissingError  # noqa: E402
from lightning_ief.tasks.text import SequenceClassifier, T5Classifier  # noqa: E402
from tests.tasks.text_stand_ins import write_bert, write_t5  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a hub that does not answer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


@pytest.fixture
def requests(monkeypatch):
    """What the hub's client asks for of the models and data here; it gets no answer."""
    asked = []

    def send(self, request, **options):
        if "nobody" in str(request.url):  # once a day it also asks who runs it
            asked.append(str(request.url))
        raise ConnectionError("no network")

    monkeypatch.setattr(type(huggingface_hub.utils.get_session()), "send", send)
    return asked


def cached(cache: Path, name: str, write: Callable[[Path], Path]) -> Path:
    """A model of the hub as its client keeps it."""
    repository = cache / "hub" / f"models--nobody--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return write(repository / "snapshots" / "abc")


def cached_dataset(cache: Path, config: str, label: int) -> None:
    """A data set as `datasets` keeps it once it was loaded from the hub."""
    source = cache / "train.parquet"
    datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [label, label]}).to_parquet(str(source))
    builder = datasets.load_dataset_builder("parquet", config, data_files={"train": str(source)})
    builder.download_and_prepare()
    folder = cache / "datasets" / "nobody___small_glue" / config / "0.0.0" / "abc"
    shutil.copytree(builder.cache_dir, folder)
    for file in folder.glob("parquet-*"):
        file.rename(folder / file.name.replace("parquet", "small_glue"))
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"config_name": config, "dataset_name": "small_glue"}))


def classifier(name: str) -> torch.nn.Module:
    return SequenceClassifier(3, f"nobody/{name}") if name == "bert" else T5Classifier(f"nobody/{name}")


@pytest.mark.parametrize(("name", "write"), [("t5", write_t5), ("bert", write_bert)])
def test_a_cached_model_is_loaded_without_a_request(name, write, cache, requests):
    folder = cached(cache, name, write)
    start = time.perf_counter()
    net = classifier(name).net
    tokenizer = hub.load(transformers.AutoTokenizer.from_pretrained, f"nobody/{name}", option="x")
    file = hub.load(huggingface_hub.hf_hub_download, f"nobody/{name}", "config.json", option="x")
    assert time.perf_counter() - start < 2.5
    assert requests == []
    assert tokenizer("the cat")["input_ids"] and Path(file) == folder / "config.json"
    expected = type(net).from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(net.state_dict()[key], expected[key]) for key in expected if "classifier" not in key)
    assert net.config.name_or_path == f"nobody/{name}"  # adapters that are exported name their model by it


def test_cached_data_are_loaded_without_a_request(cache, requests):
    cached_dataset(cache, "cola", 1)
    cached_dataset(cache, "sst2", 0)
    start = time.perf_counter()
    assert hub.load_dataset("nobody/small_glue", "cola", option="x")["train"]["label"][:] == [1, 1]
    assert hub.load_dataset("nobody/small_glue", "sst2", option="x")["train"]["label"][:] == [0, 0]
    assert time.perf_counter() - start < 2.5
    with pytest.raises(MissingError, match=r"x=nobody/small_glue is not in the cache .*--repo-type dataset"):
        hub.load_dataset("nobody/small_glue", "mrpc", option="x")
    assert requests == []


def tokenizer() -> object:
    return hub.load(transformers.AutoTokenizer.from_pretrained, "nobody/it", option="y")


def file() -> str:
    return hub.load(huggingface_hub.hf_hub_download, "nobody/it", "config.json", option="y")


@pytest.mark.parametrize("load", [lambda: classifier("bert"), lambda: classifier("t5"), tokenizer, file])
@pytest.mark.parametrize("offline", [False, True])
def test_what_is_not_cached_is_missing_at_once(cache, requests, monkeypatch, load, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    why = "HF_HUB_OFFLINE is set" if offline else "http://127.0.0.1:9 does not answer"
    start = time.perf_counter()
    with pytest.raises(
        MissingError, match=rf"=nobody/\w+ is not in the cache .*{why}.*`hf download nobody/\w+ --local"
    ):
        load()
    assert time.perf_counter() - start < 2.5
    assert requests == []


def test_a_folder_is_taken_as_it_is(cache, tmp_path):
    def loader(name: str, **options: bool) -> tuple[str, dict[str, bool]]:
        return name, options

    assert hub.load(loader, str(tmp_path), option="x") == (str(tmp_path), {})
    for name in ("./nowhere", "/nowhere", "~/nowhere", "a/b/c"):
        with pytest.raises(MissingError, match=f"x={name}: there is no such folder"):
            hub.load(loader, name, option="x")


def test_the_hub_is_asked_once_it_answers(cache, monkeypatch):
    """Whatever it answers; and the cache is, where it does not."""

    def loader(name: str, **options: bool) -> tuple[str, dict[str, bool]]:
        return name, options

    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(datasets, "load_dataset", lambda *names: names)
    server = HTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.load(loader, "some/thing", option="x") == ("some/thing", {})
        assert hub.load_dataset("some/thing", "cola", option="x") == ("some/thing", "cola")
    finally:
        server.shutdown()
        server.server_close()
    assert hub.load(loader, "some/thing", option="x") == ("some/thing", {"local_files_only": True})
