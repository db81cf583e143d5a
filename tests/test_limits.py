"""Small inputs that ask for much memory or time are refused within seconds, by stated limits."""

import json
import tracemalloc

import pytest
import torch
import zstandard
from safetensors.torch import save_file

import posmask
from conftest import MASKS, N_POSITIONS, make_sae, make_texts
from posmask.data.texts import read_texts
from posmask.errors import BadSetting, DamagedFolder, PosmaskError
from posmask.interop.reading import import_sae
from posmask.interop.saelens_files import export_saelens
from posmask.masks import make_mask, mask_settings
from posmask.results.rows import Row, header_of, read_rows
from posmask.sae.files import read_sae, write_sae
from posmask.storage import compressed
from posmask.storage.compressed import MOST_TIMES, unpacked
from posmask.study.study_file import read_study

HUGE = 10**12
MIB = 2**20


@pytest.fixture
def little_memory():
    """The test fails if Python objects (numpy arrays, bytes) take more than 300 MiB. Torch is not counted."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300 * MIB


def bomb(path, begin, piece, n_pieces):
    """Write a small compressed file that unpacks to `begin` and many repetitions of `piece`, a MiB or more."""
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    with path.open("wb") as file:
        file.write(packer.compress(begin))
        for _ in range(n_pieces):
            file.write(packer.compress(piece))
        file.write(packer.flush())
    assert path.stat().st_size < MIB


ROW = b"open,open,width,forward,0,l0,,4.0,nan,nan,9,\n"
TABLES = {"zeros": b"\0" * MIB, "one cell": b"a" * MIB, "line ends": b"\n" * MIB, "rows": ROW * (MIB // len(ROW))}


@pytest.mark.parametrize("content", TABLES)
def test_a_small_compressed_table_does_not_fill_the_memory(tmp_path, little_memory, content):
    path = tmp_path / "results.csv.zst"
    bomb(path, header_of(Row) + b",reason\n", TABLES[content], 400)
    with pytest.raises(DamagedFolder, match=r"unpack to more than 67,108,864, the limit for this size\).*zstd -d"):
        read_rows(path)


LINE = b'{"text": "a tree"}\n'
TEXTS = {
    "one text": (b'{"text": "', b"a" * MIB),
    "many texts": (b"", LINE * (MIB // len(LINE))),
    "deep nesting": (b'{"text": ', b"[" * MIB),
    "line ends": (b"", b"\n" * MIB),
}


@pytest.mark.parametrize("content", TEXTS)
def test_small_compressed_texts_do_not_fill_the_memory(tmp_path, content, monkeypatch):
    monkeypatch.setattr(compressed, "ALWAYS_ALLOWED", 2 * MIB)
    path = tmp_path / "texts.jsonl.zst"
    bomb(path, *TEXTS[content], 20)
    n_texts = 0

    def read():
        nonlocal n_texts
        for _ in read_texts(str(path)):
            n_texts += 1

    with pytest.raises(BadSetting, match=r"texts\.jsonl\.zst is damaged \(its [\d,]+ bytes unpack to more than"):
        read()
    assert n_texts <= 2 * MIB // len(LINE)


def test_several_frames_count_together(tmp_path):
    path = tmp_path / "texts.jsonl.zst"
    path.write_bytes(zstandard.compress(bytes(MIB)) * 100)
    with pytest.raises(ValueError, match="unpack to more than"):
        for _ in unpacked(path):
            pass


def test_ordinary_ratios_are_read(tmp_path):
    """Tables compress 13 times, and JSON with repeated fields up to 20 times."""
    assert MOST_TIMES >= 10 * 20
    path = tmp_path / "results.csv.zst"
    text = header_of(Row) + b",reason\n" + b"".join(ROW.replace(b"4.0", b"%d" % n) for n in range(2000))
    path.write_bytes(zstandard.compress(text, 19))
    assert [row.value for row in read_rows(path)] == list(range(2000))


STUDY_SIZES = [
    "corpus.n_positions",
    "sae.d_sae",
    "training.batch_tokens",
    "evaluation.shift_windows",
    "evaluation.retention_positions",
    "evaluation.causal_windows",
]


@pytest.mark.parametrize("key", STUDY_SIZES)
@pytest.mark.parametrize("value", [HUGE, 10**9, 10**30])
def test_absurd_sizes_in_a_study_are_refused_at_once(study_file, key, value):
    with pytest.raises(BadSetting):
        read_study(study_file, [f"{key}={value}"])


@pytest.mark.parametrize("text", ["9" * 5000, "1" + "0" * 400, "0x" + "f" * 5000, "-1" + "0" * 30, "[" * 5000])
@pytest.mark.parametrize("in_file", [True, False])
def test_absurd_numbers_and_nesting_in_a_study_are_refused(study_file, text, in_file):
    changes = [f"training.learning_rate={text}"]
    if in_file:
        study_file.write_text(study_file.read_text().replace("seeds = [0]", f"seeds = [{text}]"))
        changes = []
    with pytest.raises(BadSetting) as error:
        read_study(study_file, changes)
    assert len(str(error.value)) < 500


def test_the_longest_context_is_read_quickly(study_file):
    assert read_study(study_file, ["corpus.n_positions=131072"]).corpus.n_positions == 2**17
    with pytest.raises(BadSetting, match=r"corpus\.n_positions = 131073 must be at most 131072"):
        read_study(study_file, ["corpus.n_positions=131073"])


@pytest.mark.parametrize("n_positions", [HUGE, 10**8])
def test_absurd_contexts_in_python_are_refused_at_once(model_folder, tmp_path, n_positions):
    with pytest.raises(PosmaskError, match="position"):
        posmask.read_vectors(
            make_texts(40), str(model_folder), 2, tmp_path / "v", n_positions=n_positions, n_tokens=500
        )


@pytest.mark.parametrize("kind", MASKS)
def test_absurd_sizes_of_masks_are_refused_at_once(kind):
    settings = mask_settings(MASKS[kind])
    for n_positions, d_sae in ((HUGE, 32), (N_POSITIONS, HUGE), (10**400, 32), (2**16, 2**16)):
        with pytest.raises(BadSetting):
            make_mask(settings, n_positions, d_sae)
    for name, field in type(settings).model_fields.items():
        if field.annotation is int:
            with pytest.raises((BadSetting, ValueError)):
                make_mask(mask_settings({**MASKS[kind], name: HUGE, "n_splittings": 10**10}), N_POSITIONS, 32)


@pytest.mark.parametrize("kind", ["open", "slice", "switch", "split", "soft"])
@pytest.mark.parametrize(
    "changes", [{"n_positions": HUGE}, {"d_sae": HUGE}, {"d_model": HUGE}, {"d_sae": 10**5, "d_model": 10**5}]
)
def test_absurd_sizes_of_an_sae_s_description_are_refused_at_once(tmp_path, kind, changes):
    write_sae(make_sae(kind, rule="topk"), tmp_path / "sae")
    description = json.loads((tmp_path / "sae" / "sae.json").read_text())
    (tmp_path / "sae" / "sae.json").write_text(json.dumps({**description, **changes}))
    with pytest.raises(DamagedFolder, match="holds no readable SAE"):
        read_sae(tmp_path / "sae")


def test_a_small_folder_does_not_make_a_large_sae(tmp_path):
    """20 KB whose settings state 7 GB of weights."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file({"W_enc": torch.zeros(12, 32), "W_dec": torch.zeros(32, 12)}, theirs / "sae_weights.safetensors")
    cfg = {"architecture": "standard", "d_in": 30_000, "d_sae": 30_000, "metadata": {"context_size": 16}}
    cfg |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "sae_lens_version": "6.0.0"}
    (theirs / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(DamagedFolder, match=r"W_enc has the shape \[12, 32\], not \[30000, 30000\]"):
        import_sae(theirs, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_saelens_does_not_make_the_mask_of_absurd_settings(saelens, tmp_path):
    write_sae(make_sae("slice", rule="topk"), tmp_path / "sae")
    export_saelens(tmp_path / "sae", tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    (tmp_path / "out" / "cfg.json").write_text(json.dumps({**cfg, "n_positions": HUGE}))
    with pytest.raises(BadSetting, match=r"a mask of 1,000,000,000,000 positions"):
        saelens.SAE.load_from_disk(tmp_path / "out")
