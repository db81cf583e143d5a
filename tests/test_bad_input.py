"""Any input gives a result or a PosmaskError: no other error, no hang, and no unbounded memory.

Each test runs 60 cases in `make test` and 1,200 in `make test-all`, 10,800 in total.
"""

import json
import string
import struct
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from conftest import D_MODEL, MASKS, N_POSITIONS
from posmask.cli.commands import app
from posmask.data.tokens import pack, pad, split_of
from posmask.errors import DamagedFolder, PosmaskError
from posmask.masks import make_mask, mask_settings
from posmask.results import rows
from posmask.results.comparisons import read_verdicts
from posmask.sae.autoencoder import SparseAutoencoder
from posmask.sae.files import read_sae, write_sae
from posmask.sae.rules import rule_settings
from posmask.storage.manifest import read_manifest, write_folder
from posmask.study.study_file import read_study

sys.path.insert(0, str(Path(__file__).parent / "reliability"))
import contextlib

from tiny_study import STUDY

TEXT = STUDY.replace('["toy_order"]', "[]").replace('["toy"]', "[]")
QUIET = {
    "deadline": 20_000,  # milliseconds per case
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def cases(test):
    """Return a function that runs a property test with a given number of cases."""

    return lambda amount: settings(max_examples=amount, **QUIET)(test)()


amounts = pytest.mark.parametrize("amount", [60, pytest.param(1200, marks=pytest.mark.slow)])

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
SETTINGS = [
    f"{table}.{key}" for table, keys in tomllib.loads(TEXT).items() if isinstance(keys, dict) for key in keys
] + ["seeds", "name", "cells", "comparisons"]
values = st.one_of(
    st.text(max_size=30),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.lists(st.integers(-3, 9), max_size=4).map(str),
    st.sampled_from(['"open"', "[[]]", "{}", '{ kind = "slice" }', '{ kind = "topk", k = -1 }', "1979-05-27", "nan"]),
)


@amounts
def test_any_value_of_any_setting(amount, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(TEXT)

    @given(st.lists(st.tuples(st.sampled_from(SETTINGS) | st.text(max_size=20), values), min_size=1, max_size=3))
    def case(changes):
        with contextlib.suppress(PosmaskError):
            read_study(path, [f"{name}={value}" for name, value in changes])

    cases(case)(amount)


@amounts
def test_any_study_file(amount, tmp_path):
    path = tmp_path / "study.toml"
    content = TEXT.encode()

    @given(st.binary(max_size=200), st.integers(0, len(content)), st.integers(0, 40))
    def case(noise, start, length):
        path.write_bytes(content[:start] + noise + content[start + length :])
        with contextlib.suppress(PosmaskError):
            read_study(path)

    cases(case)(amount)


@pytest.fixture
def sae_folder(tmp_path):
    mask = make_mask(mask_settings(MASKS["slice"]), N_POSITIONS, 8)
    write_sae(SparseAutoencoder(D_MODEL, rule_settings({"kind": "topk", "k": 2}), mask), tmp_path)
    return tmp_path


@amounts
def test_any_header_of_a_file_of_weights(amount, sae_folder):
    path = sae_folder / "sae.safetensors"
    content = path.read_bytes()
    (n_header,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n_header])

    @given(
        st.one_of(
            st.binary(max_size=300),
            st.tuples(st.sampled_from(sorted(header)), st.sampled_from(["dtype", "shape", "data_offsets"]), anything),
            st.tuples(st.integers(0, 2**64 - 1), st.integers(0, len(content))),
        )
    )
    def case(change):
        if isinstance(change, bytes):
            path.write_bytes(change)
        elif isinstance(change[0], int):
            path.write_bytes(struct.pack("<Q", change[0]) + content[8 : change[1]])
        else:
            name, key, value = change
            changed = json.dumps({**header, name: {**header[name], key: value}}).encode()
            path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + n_header :])
        with contextlib.suppress(DamagedFolder):
            read_sae(sae_folder)

    cases(case)(amount)


@amounts
def test_any_description_of_an_sae(amount, sae_folder):
    path = sae_folder / "sae.json"
    description = json.loads(path.read_text())
    small = anything.filter(lambda value: not isinstance(value, int) or abs(value) < 10_000)

    @given(st.sampled_from([*description, "other"]), small)
    def case(name, value):
        path.write_text(json.dumps({**description, name: value}))
        with contextlib.suppress(PosmaskError):
            read_sae(sae_folder)

    cases(case)(amount)


@amounts
def test_any_manifest(amount, tmp_path):
    with write_folder(tmp_path / "cell", {"a": 1}) as draft:
        (draft / "x").write_text("x")
    path = tmp_path / "cell" / "manifest.json"
    manifest = json.loads(path.read_text())

    @given(st.sampled_from([*manifest, "other"]), anything, st.booleans())
    def case(name, value, replace_manifest):
        changed = value if replace_manifest else {**manifest, name: value}
        path.write_text(json.dumps(changed, indent=1) + "\n")
        try:
            read_manifest(tmp_path / "cell", verify=True)
        except DamagedFolder:
            pass
        else:
            assert repr(changed) == repr(manifest)

    cases(case)(amount)


@amounts
def test_any_text(amount, tokenizer):
    @given(st.lists(st.text(max_size=60), max_size=5))
    def case(texts):
        tokens = pad(texts or [""], tokenizer, N_POSITIONS)
        assert tokens.id.shape[1] == N_POSITIONS
        for text in texts:
            assert split_of(text) in ("training", "validation", "evaluation")
        with contextlib.suppress(PosmaskError):
            pack(texts, tokenizer, N_POSITIONS, 1)

    cases(case)(amount)


# Names come from settings, whose patterns allow no control characters.
name = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


@amounts
def test_any_written_row_is_read_back(amount, tmp_path):
    path = tmp_path / "rows.csv"
    part = name.map(lambda text: text.replace(";", ",").replace("=", ":"))

    @given(st.lists(st.builds(
        rows.Row, cell=name, mask=name, budget=name, gating=name, seed=st.integers(), metric=name,
        slice=st.dictionaries(part, part, max_size=3).map(rows.slice_text),
        value=st.floats(), ci_low=st.floats(), ci_high=st.floats(), n=st.integers(),
    ), max_size=4))  # fmt: skip
    def case(given_rows):
        rows.write_rows(path, given_rows)
        assert repr(rows.read_rows(path)) == repr(given_rows)

    cases(case)(amount)


@amounts
def test_any_table_of_results(amount, tmp_path):
    header = "cell,mask,budget,gating,seed,metric,slice,value,ci_low,ci_high,n\n"
    line = "open,open,width,forward,0,l0,,1.0,nan,nan,3\n"

    @given(st.binary(max_size=120), st.integers(0, len(line)), st.booleans())
    def case(noise, end, in_header):
        content = (header if not in_header else header[:end]).encode() + line[:end].encode() + noise
        (tmp_path / "results.csv").write_bytes(content)
        for read in (rows.read_rows, read_verdicts):
            with contextlib.suppress(DamagedFolder):
                read(tmp_path / "results.csv")

    cases(case)(amount)


@amounts
def test_any_command_line(amount, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    words = st.one_of(
        st.sampled_from([*(name for name in commands if name not in ("fetch", "doctor")), "--help", "--set", "--root",
                         "--jobs", "-1", "0", "--out", "--tokenizer", "a.toml", "..", "/", "/dev/null", ""]),
        st.text(string.printable, max_size=8),
    )  # fmt: skip

    @given(st.lists(words, max_size=5))
    def case(given_words):
        if given_words[:1] == ["order-tasks"] and "--help" not in given_words:
            given_words = [word for word in given_words if word != "--tokenizer"]  # it would query the hub
        result = CliRunner().invoke(app, given_words)
        assert result.exception is None or isinstance(result.exception, (SystemExit, PosmaskError, OSError)), (
            given_words,
            result.exception,
        )

    cases(case)(amount)
