"""Files of every format that posmask reads, changed at random: a result or an error of posmask, never a traceback.

Each test runs 40 cases in `make test` and 1,000 in `make test-all`; those with a model, a run or a page 8 and 200.
"""

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import strategies as st
from safetensors.torch import save_file

from conftest import D_MODEL, D_SAE, N_POSITIONS, make_sae, make_texts, make_vectors
from mutations import amounts, changed_bytes, changed_folder, changed_json, few, refused_or_fine, run_cases
from posmask.data import models
from posmask.data.gguf import convert_gguf
from posmask.data.texts import content_of, read_texts
from posmask.data.tokens import pack
from posmask.interop.reading import dictionary_learning, read_external, remarks
from posmask.interop.saelens_files import export_saelens
from posmask.interop.weights import pickle_file
from posmask.sae.files import read_sae, write_sae

TEXTS = [*make_texts(8), "naïve – ‘quoted’ 漢字 🙂\u2028x"]
LINES = [json.dumps({"text": text, "n": [1, {"a": None}]}, ensure_ascii=False) for text in TEXTS]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis", "utf-7"]


@st.composite
def changed_texts(draw):
    """The name and content of a file of texts."""
    name = draw(st.sampled_from(["a.txt", "a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.jsonl"]))
    lines = list(LINES)
    if draw(st.booleans()):
        number = draw(st.integers(0, len(lines) - 1))
        lines[number] = draw(changed_json(lines[number]))
    content = "\n".join(lines).encode(draw(st.sampled_from(ENCODINGS)), "replace")
    if draw(st.booleans()):
        content = draw(changed_bytes(content))
    if name.endswith(".zst"):
        content = zstandard.compress(content)
        content = draw(st.one_of(st.just(content), changed_bytes(content)))
    if name.endswith(".gz"):
        content = gzip.compress(content)
    return name, content


@amounts
def test_any_file_of_texts(amount, tokenizer, tmp_path):
    def case(change):
        name, content = change
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / name).write_bytes(content)
        with refused_or_fine():
            content_of(str(tmp_path))
            pack(list(read_texts(str(tmp_path))), tokenizer, N_POSITIONS, 1)

    run_cases(case, changed_texts(), amount)


@few
def test_any_file_of_a_model(amount, model_folder, tmp_path):
    folder = tmp_path / "model"
    names = sorted(path.name for path in model_folder.iterdir())

    def case(change):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model_folder, folder)
        name, content = change
        (folder / name).write_bytes(content)
        with refused_or_fine():
            models.weights_identity(str(folder))
            layer = models.layer_number(str(folder), 0.5)
            models.vector_size(str(folder))
            models.load_outline(str(folder), layer)
            tokenizer = models.load_tokenizer(str(folder))
            tokens = pack(make_texts(8), tokenizer, N_POSITIONS, 1)
            model = models.load_model(str(folder), 2, "float32")
            model.check_length(N_POSITIONS)
            model.check_ids(tokens.id)
            assert model.vectors(tokens.id[:1]).shape[1] == N_POSITIONS

    run_cases(case, changed_folder(model_folder, names), amount)


@pytest.fixture
def gguf_file(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent / "reliability"))
    from gguf_model import write_tiny_gguf

    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@few
def test_any_gguf_file(amount, gguf_file, tmp_path):
    content = gguf_file.read_bytes()
    end_of_header = content.index(b"blk.0.attn_norm")
    out = tmp_path / "out"

    def case(changed):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        gguf_file.write_bytes(changed)
        with refused_or_fine():
            convert_gguf(gguf_file, out)

    in_header = changed_bytes(content[:end_of_header]).map(lambda begin: begin + content[end_of_header:])
    run_cases(case, st.one_of(in_header, changed_bytes(content)), amount)


def use(sae):
    """Encode vectors; finite weights may be so large that codes are infinite."""
    vectors, position = make_vectors(8)
    if sae.d_model == D_MODEL:
        assert sae.encode(vectors, position % sae.mask.n_positions).shape == (8, sae.d_sae)


@amounts
@pytest.mark.parametrize(
    ("kind", "rule"), [("slice", "gated"), ("split", "batchtopk"), ("switch", "topk"), ("soft", "matryoshka")]
)
def test_any_file_of_an_sae(amount, kind, rule, tmp_path):
    folder = tmp_path / "sae"
    write_sae(make_sae(kind, rule=rule), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def case(change):
        name, content = change
        for other, kept in before.items():
            (folder / other).write_bytes(kept)
        (folder / name).write_bytes(content)
        with refused_or_fine():
            use(read_sae(folder))

    run_cases(case, changed_folder(folder, sorted(before)), amount)


HOOK = "blocks.1.hook_resid_post"
FORMATS = ["saelens", "saelens-lossy", "saelens 5", "sparsify", "gemma scope", "llama scope", "dictionary_learning"]


def write_external(folder, form):
    """Write a small SAE in another tool's format; return the names of its files."""
    if form.startswith("saelens"):
        sae = make_sae("slice", rule="topk")
        sae.decoder.data = torch.nn.functional.normalize(sae.decoder.data, dim=1)
        write_sae(sae, folder.parent / "cell", {"model": "gpt2", "layer": 2})
        cfg = export_saelens(folder.parent / "cell", folder, lossy=form != "saelens")
        if form == "saelens 5":
            cfg = {**cfg, "sae_lens_version": "5.0.0", "hook_point": "blocks.1.hook_resid_post", "context_size": 16}
            del cfg["metadata"]
            (folder / "cfg.json").write_text(json.dumps(cfg))
        return ["cfg.json", "sae_weights.safetensors"]
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    encoder = torch.randn(D_SAE, D_MODEL, generator=random)
    decoder = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=random), dim=1)
    zeros, threshold = {"enc": torch.zeros(D_SAE), "dec": torch.zeros(D_MODEL)}, torch.ones(D_SAE)
    if form == "sparsify":
        names = {"encoder.weight": encoder, "W_dec": decoder, "encoder.bias": zeros["enc"], "b_dec": zeros["dec"]}
        save_file(names, folder / "sae.safetensors")
        cfg = {"activation": "topk", "expansion_factor": 2, "normalize_decoder": True, "num_latents": D_SAE, "k": 4}
        cfg |= {"multi_topk": False, "skip_connection": False, "d_in": D_MODEL}
        (folder / "cfg.json").write_text(json.dumps(cfg))
        return ["cfg.json", "sae.safetensors"]
    if form == "gemma scope":
        arrays = {"W_enc": encoder.T, "W_dec": decoder, "b_enc": zeros["enc"], "b_dec": zeros["dec"]}
        np.savez(folder / "params.npz", threshold=threshold, **arrays)
        return ["params.npz"]
    if form == "llama scope":
        (folder / "checkpoints").mkdir()
        names = {"encoder.weight": encoder, "decoder.weight": decoder.T.contiguous()}
        names |= {"encoder.bias": zeros["enc"], "decoder.bias": zeros["dec"]}
        save_file(names, folder / "checkpoints" / "final.safetensors")
        settings = {"d_model": D_MODEL, "d_sae": D_SAE, "dataset_average_activation_norm": {"in": 3.0, "out": 3.0}}
        settings |= {"jump_relu_threshold": 0.5, "hook_point_in": "blocks.1.hook_resid_post"}
        (folder / "hyperparams.json").write_text(json.dumps(settings))
        return ["hyperparams.json", "checkpoints/final.safetensors"]
    names = {
        "encoder.weight": encoder,
        "decoder.weight": decoder.T,
        "encoder.bias": zeros["enc"],
        "b_dec": zeros["dec"],
    }
    torch.save({**names, "k": torch.tensor(4)}, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": D_MODEL, "dict_size": D_SAE, "k": 4}
    trainer |= {"lm_name": "gpt2", "submodule_name": "resid_post_layer_1"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": N_POSITIONS}}))
    return ["config.json"]  # Reading a pickle starts a process; see the test below.


@amounts
@pytest.mark.parametrize("form", FORMATS)
def test_any_file_of_an_sae_of_another_tool(amount, form, tmp_path, monkeypatch):
    folder = tmp_path / HOOK
    names = write_external(folder, form)
    before = {name: (folder / name).read_bytes() for name in names}
    if form == "dictionary_learning":
        tensors = pickle_file(folder / "ae.pt", allow_pickle=True)
        monkeypatch.setattr(dictionary_learning, "pickle_file", lambda path, allow_pickle: tensors)
    use(read_external(folder, n_positions=N_POSITIONS, allow_pickle=True, hook_name=HOOK)[0])

    def case(change):
        name, content = change
        for other, kept in before.items():
            (folder / other).write_bytes(kept)
        (folder / name).write_bytes(content)
        for n_positions in (None, N_POSITIONS):
            with refused_or_fine():
                sae, origin = read_external(folder, n_positions=n_positions, allow_pickle=True, hook_name=HOOK)
                use(sae)
                list(remarks(origin, sae.mask.n_positions))

    run_cases(case, changed_folder(folder, names), amount)


@pytest.mark.slow
def test_any_pickle_of_an_sae(tmp_path):
    folder = tmp_path / HOOK
    write_external(folder, "dictionary_learning")
    content = (folder / "ae.pt").read_bytes()

    def case(changed):
        (folder / "ae.pt").write_bytes(changed)
        with refused_or_fine():
            use(read_external(folder, allow_pickle=True)[0])

    run_cases(case, changed_bytes(content), 20)
