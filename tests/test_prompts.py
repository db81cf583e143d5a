"""Texts that readers type into a served page: their codes are those of a run, only the page may ask, and it works in
Chromium."""

import http.client
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import posmask
from conftest import HOSTILE, N_POSITIONS, WORDS
from posmask.auditing import settings
from posmask.cli.commands import app
from posmask.data import harvest as harvesting
from posmask.data import models
from posmask.data.activations import Activations, evaluation_batches
from posmask.data.tokens import pad
from posmask.errors import BadSetting, DamagedFolder, NothingToDo, PosmaskError
from posmask.report import serving, write_audit_page, write_report, write_report_folder
from posmask.report.prompts import MOST_BYTES
from posmask.sae.files import read_sae, write_sae
from posmask.storage import layout, manifest
from posmask.study import prompts
from posmask.study.prompts import Prompts

TEXT = "red bird sings and old fish sleeps or blue sky runs"
OPEN, SLICE = "cells/open-seed0", "cells/slice-compute-seed0"


@pytest.fixture
def root(finish, tmp_path):
    finish(tmp_path / "run")
    return tmp_path / "run"


def identity_of(folder):
    return manifest.read_manifest(folder)["identity"]


def codes(root, name, text=TEXT):
    return Prompts([root]).codes(name, identity_of(root / name), text)


def entries(listed):
    """The codes of an answer, by token and latent."""
    rows = zip(listed["token"], listed["latent"], listed["value"], strict=True)
    return {(token, latent): value for token, latent, value in rows}


@pytest.mark.parametrize("name", [OPEN, SLICE])
def test_codes_are_those_of_harvested_vectors(root, name, tokenizer, language_model, tmp_path):
    tokens = pad([TEXT], tokenizer, N_POSITIONS)
    harvesting.harvest(tokens, language_model, tmp_path / "vectors", {"text": TEXT}, "text")
    (batch,) = evaluation_batches(Activations(tmp_path / "vectors"))
    kept, sae = batch.kept(), read_sae(root / name)
    found = codes(root, name)
    assert found["words"] == TEXT.split()
    assert found["position"] == kept.position.tolist() == [*range(1, 12)]
    assert found["left_out"] == 0
    assert found["state"] == ["encoded"] * 11
    assert set(found["masks"]) == ({"on", "lifted"} if name == SLICE else {"on"})
    for mask, listed in found["masks"].items():
        expected = sae.encode_batch(kept, use_mask=mask == "on")
        rows = zip(expected.token.tolist(), expected.latent.tolist(), expected.value.tolist(), strict=True)
        assert entries(listed) == {(token, latent): value for token, latent, value in rows}
        assert listed["active"] == expected.n_active().tolist()
        dense = sae.encode(kept.vectors, kept.position, use_mask=mask == "on")
        torch.testing.assert_close(dense, expected.dense())


def test_every_listed_latent_has_all_its_codes(root, monkeypatch):
    every = codes(root, OPEN)["masks"]["on"]
    monkeypatch.setattr(prompts, "_PER_TOKEN", 2)
    listed = codes(root, OPEN)["masks"]["on"]
    by_token = {token: [] for token, _ in entries(every)}
    for (token, latent), value in entries(every).items():
        by_token[token].append((value, latent))
    expected = {latent for found in by_token.values() for _, latent in sorted(found, reverse=True)[:2]}
    assert {*listed["latent"]} == expected < {*every["latent"]}
    assert entries(listed) == {key: value for key, value in entries(every).items() if key[1] in expected}
    assert listed["active"] == every["active"]


def test_a_text_beyond_the_context_is_cut(root):
    found = codes(root, OPEN, " ".join(WORDS))
    assert found["words"] == WORDS[: N_POSITIONS - 1]
    assert found["left_out"] == len(WORDS) - (N_POSITIONS - 1)


def test_special_tokens_and_sinks_have_no_codes(root, monkeypatch):
    def second_is_a_sink(norms, keep, sink_norm):
        return torch.arange(len(norms)) == 2

    monkeypatch.setattr(harvesting, "sinks", second_is_a_sink)
    found = codes(root, OPEN, "red bird <eos> fish")
    assert found["words"] == ["red", "bird", "<eos>", "fish"]
    assert found["state"] == ["encoded", "sink", "special", "encoded"]
    assert {token for token, _ in entries(found["masks"]["on"])} == {0, 3}
    assert found["masks"]["on"]["active"] == [4, 0, 0, 4]


def move_model(root, model):
    model.rename(model.with_name("elsewhere"))


def change_model(root, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def damage_weights(root, model):
    file = root / OPEN / layout.WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def remove_cell(root, model):
    shutil.rmtree(root / OPEN)


def take_away_made_from(root, model):
    with manifest.write_folder(root / "cells" / "other", {"what": "something"}) as draft:
        shutil.copy(root / OPEN / layout.SAE_FILE, draft)
    remove_cell(root, model)
    (root / "cells" / "other").rename(root / OPEN)


@pytest.fixture
def movable(finish, study_file, model_folder, tmp_path, monkeypatch):
    """A run folder whose cells name a copy of the model, which a test may change."""
    finish(tmp_path / "run")
    root, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(model_folder, model)
    monkeypatch.setattr(prompts, "_model_name", lambda root, folder: str(model))
    return root, model


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        (move_model, BadSetting, r"model '.*model' is missing: there is no such folder.*check the path"),
        (change_model, BadSetting, r"model '.*' is not the one that open-seed0 was made with: .*put those back"),
        (damage_weights, DamagedFolder, rf"{layout.WEIGHTS_FILE}.*posmask run"),
        (remove_cell, BadSetting, rf"{OPEN} is not in .*run: if the page is of several studies, give all"),
        (take_away_made_from, DamagedFolder, r"does not state its model and contexts: `posmask run`"),
    ],
)
def test_what_is_missing_or_damaged_is_a_sentence(movable, change, kind, sentence):
    root, model = movable
    identity = identity_of(root / OPEN)
    change(root, model)
    if change is take_away_made_from:
        identity = identity_of(root / OPEN)
    with pytest.raises(kind, match=sentence) as raised:
        Prompts([root]).codes(OPEN, identity, TEXT)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("<eos> <bos>", NothingToDo, "no token but special ones.*type some words"),
        ("a \ud800", BadSetting, "lone surrogates.*give characters"),
    ],
)
def test_a_text_that_has_no_codes_is_a_sentence(root, text, kind, sentence):
    with pytest.raises(kind, match=sentence):
        codes(root, OPEN, text)


@pytest.mark.parametrize("text", ["\0", "🎉 red\u202e", "\n\n red \t", "red" * 300])
def test_any_other_text_has_codes(root, text):
    assert codes(root, OPEN, text)["masks"]["on"]["value"]


@pytest.mark.parametrize(
    "name", ["cells/..", "../run/cells/open-seed0", "baselines", "cells/", "", "cells/open-seed0/x"]
)
def test_only_cells_and_evaluated_saes_are_read(root, name):
    with pytest.raises(BadSetting, match=f"^{re.escape(name)} is not in "):
        Prompts([root]).codes(name, identity_of(root / OPEN), TEXT)


def test_a_cell_that_was_made_again_is_not_taken_for_the_page_s(root, tmp_path):
    with pytest.raises(BadSetting, match=r"made from other settings than the page shows.*write the page again"):
        Prompts([root]).codes(OPEN, "0123456789abcdef", TEXT)
    other = shutil.copytree(root, tmp_path / "other")
    shutil.rmtree(other / SLICE)
    with manifest.write_folder(tmp_path / "cell", {"what": "another study's"}):
        pass
    shutil.copytree(tmp_path / "cell", other / SLICE)
    both = Prompts([other, root]).codes(SLICE, identity_of(root / SLICE), TEXT)
    assert both == codes(root, SLICE)


def test_model_and_sae_are_read_once(root, monkeypatch):
    n_read = {"saes": 0, "models": 0}

    def counted(name, function):
        def call(*args, **options):
            n_read[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(prompts, "read_sae", counted("saes", read_sae))
    monkeypatch.setattr(models, "load_model", counted("models", models.load_model))
    served = Prompts([root])
    for name in (OPEN, OPEN, SLICE, SLICE):
        served.codes(name, identity_of(root / name), TEXT)
    assert n_read == {"saes": 2, "models": 1}


@pytest.mark.parametrize("is_audit", [True, False])
def test_an_evaluated_sae_is_encoded_with_the_model_of_its_run(root, model_folder, is_audit):
    """Its own files may have another name for the model."""
    sae = read_sae(root / OPEN)
    made_from = manifest.read_manifest(root / OPEN)["made_from"]
    made_from = {key: made_from[key] for key in ("model", "corpus")} | {"sae": "theirs"}
    with manifest.write_folder(root / "evaluated" / "theirs", made_from) as draft:
        write_sae(sae, draft, {"model": "a-name-of-another-tool"})
        if is_audit:
            (draft / layout.SUMMARY_FILE).write_text(json.dumps({"model": str(model_folder)}))
    if is_audit:
        expected = codes(root, OPEN)
        shutil.rmtree(root / "cells")
    else:
        expected = codes(root, OPEN)
    assert codes(root, "evaluated/theirs") == expected


# The server.


@pytest.fixture
def page(root):
    return write_report(root)


@pytest.fixture
def stub(tmp_path):
    """A file that the server takes for a page of this version."""
    version = importlib.metadata.version("posmask")
    path = tmp_path / "stub.html"
    path.write_text(f'<meta name="generator" content="posmask {version}"><body></body>')
    return path


ANSWER = {
    "words": ["a", "\u202e", HOSTILE, "b\n"],
    "position": [1, 2, 3, 4],
    "state": ["encoded", "sink", "encoded", "special"],
    "left_out": 7,
    "masks": {"on": {"token": [0, 2, 2], "latent": [3, 3, 5], "value": [0.5, 1.0, 0.25], "active": [1, 0, 2, 0]}},
}


def no_codes(folder, identity, text):
    raise AssertionError("a refused text was encoded")


def post(port, body, path="/prompts", **changes):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}", "Content-Type": "application/json"}
    headers |= {"Content-Length": str(len(body))} | {name.replace("_", "-"): value for name, value in changes.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("POST", path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    return response.status, response.read()


REQUEST = {"folder": OPEN, "identity": "1", "text": TEXT}


def test_the_page_gets_the_codes_of_its_text(stub, serve):
    asked = []
    port = serve(stub, lambda *request: asked.append(request) or ANSWER)
    status, content = post(port, REQUEST)
    assert (status, asked) == (200, [(OPEN, "1", TEXT)])
    shown = ["a", "⟨202E⟩", HOSTILE[:40] + "…", "b↵"]
    assert json.loads(content) == ANSWER | {"words": shown}
    assert post(port, REQUEST, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200


REFUSED = [
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": None}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Host": "evil.example:PORT", "Origin": "http://evil.example:PORT"}, 403),
    ({"Host": None}, 403),
    ({"Content_Type": "text/plain"}, 415),
    ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
    ({"Content_Type": None}, 415),
    ({"Content_Length": None}, 411),
    ({"Content_Length": "-1"}, 411),
    ({"Content_Length": "²"}, 411),
    ({"Content_Length": str(MOST_BYTES + 1)}, 413),
    ({"path": "/"}, 404),
    ({"path": "/prompts/../prompts"}, 404),
]


def test_others_may_not_ask(stub, serve, capfd):
    port = serve(stub, no_codes)
    for changes, expected in REFUSED:
        changes = {name: value and value.replace("PORT", str(port)) for name, value in changes.items()}
        changes |= {name: value.encode("utf8") for name, value in changes.items() if value and not value.isascii()}
        status, content = post(port, REQUEST, **changes)
        assert status == expected, changes
        assert TEXT.encode() not in content
    for method in ("OPTIONS", "PUT"):  # A browser asks with OPTIONS before a page of another site may send JSON.
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(method, "/prompts", headers={"Origin": "https://evil.example"})
        response = connection.getresponse()
        assert response.status == 501
        assert not [name for name, _ in response.getheaders() if name.lower().startswith("access-control")]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"text"',
        b"\xff",
        b"[" * 100_000,
        {},
        REQUEST | {"text": 1},
        REQUEST | {"folder": None},
    ],
)
def test_what_is_not_a_request_is_refused(stub, serve, body, capfd):
    assert post(serve(stub, no_codes), body)[0] == 400
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the text is empty: type at least one word"),
        ("é" * 20_001, "the text has 20,001 characters: give at most 20,000"),
    ],
)
def test_texts_of_an_impossible_length_are_named(stub, serve, text, sentence):
    status, content = post(serve(stub, no_codes), REQUEST | {"text": text})
    assert (status, json.loads(content)) == (200, {"error": sentence})


def test_the_longest_text_fits_in_a_request(stub, serve):
    port = serve(stub, lambda *request: ANSWER)
    body = json.dumps(REQUEST | {"text": "🎉" * 20_000}).encode()
    assert len(body) > 200_000
    assert post(port, body)[0] == 200


@pytest.mark.parametrize("error", [BadSetting("a: b"), DamagedFolder("a: b"), PermissionError("a")])
def test_errors_are_a_sentence_for_the_page(stub, serve, error, capfd):
    def fail(*request):
        raise error

    status, content = post(serve(stub, fail), REQUEST)
    assert status == 200
    assert json.loads(content)["error"].startswith("a: ")
    assert capfd.readouterr().err == ""


def test_an_error_of_posmask_is_printed_and_does_not_end_the_server(stub, serve, capfd):
    def fail(folder, identity, text):
        return ANSWER if text == "well" else 1 / 0

    port = serve(stub, fail)
    assert post(port, REQUEST)[0] == 500
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert post(port, REQUEST | {"text": "well"})[0] == 200


def test_texts_are_encoded_one_at_a_time(stub, serve):
    under_way, most = [], []

    def slow(*request):
        under_way.append(1)
        most.append(len(under_way))
        time.sleep(0.02)
        under_way.pop()
        return ANSWER

    port = serve(stub, slow)
    threads = [threading.Thread(target=post, args=(port, REQUEST)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def get(port, path="/"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


@pytest.mark.parametrize("in_folder", [False, True])
def test_only_a_served_page_has_the_box_and_may_connect(root, serve, in_folder):
    page = write_report_folder(root) if in_folder else write_report(root)
    file = page / "index.html" if in_folder else page
    on_disk = file.read_bytes()
    assert b"prompt" not in on_disk
    assert (b"connect-src 'self'" in on_disk) == in_folder  # Its data is in files beside it.
    assert (b"connect-src 'none'" in on_disk) != in_folder
    plain, with_box = serve(page), serve(page, no_codes)
    assert get(plain) == (200, on_disk)
    assert post(plain, REQUEST)[0] == 404
    for path in ("/", "/index.html") if in_folder else ("/",):
        status, content = get(with_box, path)
        assert status == 200
        assert content.count(b"Content-Security-Policy") == content.count(b"connect-src 'self'") == 1
        assert b"prompt-text" in content
    if in_folder:
        assert get(with_box, "/data/cell-0.gz") == get(plain, "/data/cell-0.gz")
    assert get(with_box, "/prompts")[0] == 404


def test_a_page_of_another_version_has_no_box(page, serve):
    content = page.read_text(encoding="utf8")
    page.write_text(re.sub('content="posmask [^"]*"', 'content="posmask 0.0.1"', content), encoding="utf8")
    port = serve(page, no_codes)
    assert b"prompt" not in get(port)[1]
    assert post(port, REQUEST)[0] == 404


@pytest.fixture
def serve_once(monkeypatch):
    """Run `posmask serve` and return its output and the server."""
    servers = []

    def interrupted(server):
        servers.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(serving.PageServer, "serve_forever", interrupted)

    def serve_once(*paths):
        result = CliRunner().invoke(app, ["serve", *map(str, paths), "--port", "0"])
        if isinstance(result.exception, PosmaskError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output, servers.pop()

    return serve_once


def test_serve_finds_the_cells_of_a_page(root, page, serve_once, tmp_path, monkeypatch):
    folder = write_report_folder(root, out=root / "all")
    elsewhere = Path(shutil.copy(page, tmp_path / "page.html"))
    monkeypatch.chdir(folder)
    for paths in ([root], [page], [folder], ["."], [elsewhere, root], [elsewhere, tmp_path / "none", root][::2]):
        output, server = serve_once(*paths)
        assert "Type a text into its section of latents" in output
        assert server.codes(OPEN, identity_of(root / OPEN), TEXT) == codes(root, OPEN)
    output, server = serve_once(elsewhere)
    assert "text" not in output
    assert server.codes is None
    with pytest.raises(BadSetting, match="none holds no cells: give the run folder"):
        serve_once(elsewhere, tmp_path / "none")
    page.write_text(page.read_text(encoding="utf8").replace('content="posmask ', 'content="posmask 0.0'))
    assert "write it again with `posmask report`" in serve_once(page)[0]


def test_serve_finds_the_page_of_an_audit(root, page, serve_once):
    page.rename(root / layout.AUDIT_FILE)
    assert f"serves {root / layout.AUDIT_FILE};" in serve_once(root)[0]


def test_serving_imports_no_torch_before_the_first_text(root, page):
    code = (
        "import sys; from posmask.report import serving; serving.PageServer.serve_forever = lambda server: None; "
        "from posmask.cli import commands; sys.argv = ['posmask', 'serve', sys.argv[1], '--port', '0']; "
        "import contextlib\nwith contextlib.suppress(SystemExit): commands.main()\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(page)], check=False).returncode == 0


# In Chromium.


@pytest.fixture
def type_text(serve, open_page):
    """Open a served page, type a text and wait for its latents."""

    def type_text(page, codes, text=TEXT, address="", expects=".found table", **settings):
        tab = open_page(f"http://127.0.0.1:{serve(page, codes)}/{address}", **settings)
        tab.locator("#prompt-text").scroll_into_view_if_needed()
        tab.wait_for_selector(".latent h3")
        tab.fill("#prompt-text", text)
        tab.click(".prompt-form button")
        tab.wait_for_selector(expects, timeout=60_000)
        return tab

    return type_text


def listed(tab):
    """The rows of the list: latent, activation, token and position."""
    cells = "[...line.children].slice(0, 3).map(cell => cell.textContent)"
    return tab.evaluate(f"[...document.querySelectorAll('tr[data-latent]')].map(line => {cells})")


def shown_number(value):
    """A number as the page writes activations."""
    return float(f"{value:.3g}")


def strongest(found, mask="on", at=None):
    rows = {}
    for (token, latent), value in entries(found["masks"][mask]).items():
        if (at is None and value > rows.get(latent, (0,))[0]) or token == at:
            rows[latent] = (value, token)
    order = sorted(rows, key=lambda latent: (-rows[latent][0], latent))
    return [(latent, *rows[latent]) for latent in order]


def check_list(tab, expected, found):
    rows = listed(tab)
    assert len(rows) == min(12, len(expected))
    for (latent, value, where), (number, activation, token) in zip(rows, expected, strict=False):
        assert int(latent) == number
        assert float(value) == pytest.approx(activation, rel=0.006)
        assert where == f"@{found['position'][token]}{found['words'][token]}"


def test_a_text_shows_the_latents_that_fire(root, page, type_text):
    asked = Prompts([root])
    tab = type_text(page, asked.codes)
    found = codes(root, OPEN)
    assert tab.locator(".typed button").all_text_contents() == TEXT.split()
    assert "open, seed 0: 11 tokens at positions 1–11 after BOS." in tab.inner_text(".prompt .note")
    assert tab.locator("select[aria-label=Mask]").count() == 0  # An open mask cannot be lifted.
    check_list(tab, strongest(found), found)
    for _ in range(5):
        if tab.locator("text=/Show \\d+ more/").count():
            tab.click("text=/Show \\d+ more/")
    assert len(listed(tab)) == len(strongest(found))
    tips = [
        bars
        for _, latent in sorted({(0, row[0]) for row in listed(tab)})
        for bars in [
            tab.eval_on_selector_all(f"tr[data-latent='{latent}'] .code", "all => all.map(one => one.dataset.tip)")
        ]
    ]
    assert sum(map(len, tips)) == len(found["masks"]["on"]["value"])

    tab.click(".typed button >> nth=4")
    assert tab.inner_text(".found h4").startswith("Strongest at old, position 5")
    check_list(tab, strongest(found, at=4), found)
    tab.click("text=whole text")
    check_list(tab, strongest(found), found)

    latent = strongest(found)[2][0]
    tab.click(f"tr[data-latent='{latent}'] button")
    tab.wait_for_selector(f".latent h3:text('Latent {latent} of open')")
    assert f"latent={latent}" in tab.url
    shades = tab.eval_on_selector_all(".typed button", "all => all.map(one => one.style.getPropertyValue('--a'))")
    own = {token: value for (token, number), value in entries(found["masks"]["on"]).items() if number == latent}
    expected = [f"{round(12 + 78 * own[t] / max(own.values()))}%" if t in own else "0%" for t in range(11)]
    assert shades == expected


def test_the_mask_is_lifted_and_the_cell_changed(root, page, type_text):
    tab = type_text(page, Prompts([root]).codes, address="#cell=slice-compute")
    found = codes(root, SLICE)
    check_list(tab, strongest(found), found)
    tab.select_option("select[aria-label=Mask]", "lifted")
    check_list(tab, strongest(found, "lifted"), found)
    assert strongest(found) != strongest(found, "lifted")
    tab.select_option("select[aria-label=Cell]", label=tab.locator("select[aria-label=Cell] option").first.inner_text())
    tab.wait_for_selector(".prompt .note:has-text('open, seed 0')")
    found = codes(root, OPEN)
    check_list(tab, strongest(found), found)


def test_a_page_of_an_audit_takes_texts(root, type_text, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "TABLES", ("words",))
    audit = tmp_path / "audit"
    report = posmask.audit(root / SLICE, tokens=1200, order=False, root=audit)
    name = f"evaluated/{report.folder.name}"
    tab = type_text(write_audit_page(audit, [report.folder.name]), Prompts([audit]).codes)
    found = codes(audit, name)
    check_list(tab, strongest(found), found)
    tab.select_option("select[aria-label=Mask]", "lifted")
    check_list(tab, strongest(found, "lifted"), found)


def test_everything_works_by_keyboard(root, page, serve, open_page):
    tab = open_page(f"http://127.0.0.1:{serve(page, Prompts([root]).codes)}/#cell=open")
    tab.wait_for_selector(".latent h3")
    tab.focus("#prompt-text")
    tab.keyboard.type("red bird\nsings")
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector(".found table", timeout=60_000)
    tab.keyboard.press("Tab")  # Encode
    tab.keyboard.press("Tab")  # back to the list
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "red"
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.textContent") == "bird"
    assert tab.inner_text("#tip").startswith("bird, position 2: 4 latents fire; ")
    tab.keyboard.press("Enter")
    assert tab.inner_text(".found h4").startswith("Strongest at bird, position 2")
    tab.keyboard.press("Tab")  # whole text
    tab.keyboard.press("Tab")
    latent = tab.evaluate("document.activeElement.closest('tr').dataset.latent")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(f".latent h3:text('Latent {latent} of open')")
    assert tab.evaluate("document.activeElement.closest('tr').dataset.latent") == latent
    tab.locator(".back").focus()
    tab.keyboard.press("Enter")
    assert tab.locator(".prompt").is_hidden()
    assert tab.locator("#latent-list tbody tr").count() > 4
    assert tab.evaluate("document.activeElement.id") == "prompt-text"


def test_words_are_never_html(page, type_text):
    asked = []
    tab = type_text(page, lambda *request: asked.append(request) or ANSWER, text=f"{HOSTILE}\0🎉\n x")
    assert asked[0][2] == f"{HOSTILE}\0🎉\n x"
    assert tab.locator(".typed button").all_text_contents() == ["a", "⟨202E⟩", HOSTILE[:40] + "…", "b↵"]
    assert tab.locator(".prompt img, .prompt script").count() == 0
    assert "The 7 tokens after them are left out" in tab.inner_text(".prompt .note")
    tips = tab.eval_on_selector_all(".typed button", "all => all.map(one => one.dataset.tip)")
    assert tips[0] == "a, position 1: 1 latents fire; 3 (0.500)"
    assert tips[1].endswith("position 2: an attention sink, not encoded")
    assert tips[3].endswith("position 4: a special token, not encoded")
    assert listed(tab)[0][:2] == ["3", "1.00"]


def test_errors_are_shown_in_the_box(page, type_text):
    def fail(*request):
        raise BadSetting(f"model {HOSTILE!r} is missing: run `posmask fetch`")

    tab = type_text(page, fail, expects=".prompt code")
    assert tab.inner_text(".prompt p") == f"model {HOSTILE!r} is missing: run posmask fetch"
    tab.fill("#prompt-text", "é" * 20_001)
    tab.click(".prompt-form button")
    tab.wait_for_selector(".prompt p:has-text('the text has 20,001 characters: give at most 20,000')")
    tab.click("text=Back to the list")
    assert tab.locator("#latent-list tbody tr").count() > 4


def test_a_late_answer_does_not_replace_a_later_one(page, type_text):
    release = threading.Event()

    def slow(folder, identity, text):
        if text == "first":
            release.wait(10)
        return ANSWER | {"words": [text, "b", "c", "d"]}

    tab = type_text(page, slow, text="first", expects=".prompt p")
    tab.fill("#prompt-text", "second")
    tab.click(".prompt-form button")
    release.set()
    tab.wait_for_selector(".typed button:has-text('second')")
    tab.wait_for_timeout(200)
    assert tab.locator(".typed button").first.inner_text() == "second"


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1024, "dark"), (390, "light")])
def test_the_box_is_accessible_and_fits(root, page, serve, open_page, width, scheme):
    axe = pytest.importorskip("axe_core_python")
    tab = open_page(f"http://127.0.0.1:{serve(page, Prompts([root]).codes)}/#cell=slice-compute", color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 844})
    tab.wait_for_selector(".latent h3")
    tab.fill("#prompt-text", TEXT)
    tab.click(".prompt-form button")
    tab.wait_for_selector(".found table", timeout=60_000)
    tab.click("tr[data-latent] button")
    tab.click(".typed button >> nth=2")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.add_script_tag(content=(Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf8"))
    violations = tab.evaluate("axe.run('.browse', {resultTypes: ['violations']})")["violations"]
    serious = [violation for violation in violations if violation["impact"] in ("serious", "critical")]
    assert [(v["id"], [node["html"][:150] for node in v["nodes"][:3]]) for v in serious] == []
