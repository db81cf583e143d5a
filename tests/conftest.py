"""Shared fixtures: a random three-layer model, toy texts, their vectors, and small settings of every mask and rule."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

# With several threads each, parallel test processes slow each other's loops down up to twentyfold.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
# Triton kernels run in its interpreter, on the CPU. Triton reads this when the kernels are imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

from shape_checks import check_shapes

# Shape annotations are checked in tests only. `kernels` is excluded: numba compiles its functions.
_CHECKED = ["masks", "data", "sae", "training", "results.intervals", "evaluation", "probing"]
check_shapes([f"posmask.{name}" for name in _CHECKED])

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import compile_loops
from posmask.data import embedded
from posmask.data.activations import Activations, Batch, training_batches
from posmask.data.harvest import harvest
from posmask.data.sites import LanguageModel
from posmask.data.tokens import pack, split_of
from posmask.evaluation.latent_table import CLASSES, COLUMNS, LatentTable, position_bins
from posmask.evaluation.latents import LatentFacts
from posmask.evaluation.retention import PositionMass
from posmask.evaluation.stored_codes import StoredCodes
from posmask.kernels import backend, cpu
from posmask.masks import make_mask, mask_settings
from posmask.masks.base import Observed
from posmask.probing import datasets, order_tasks
from posmask.results.rows import read_rows
from posmask.sae.autoencoder import Codes, SparseAutoencoder
from posmask.sae.rules import rule_settings
from posmask.storage import layout
from posmask.study.study_file import read_study
from posmask.training.loop import train
from study_toml import tiny_study

# transformers and scikit-learn, which `posmask.study.run` needs, are imported in fixtures: the process that starts the
# workers of a parallel run imports this module, too, and needs neither.
torch.set_num_threads(1)  # The tensors are so small that a second thread would mostly wait.

# These run in another environment or in separate processes.
collect_ignore = [
    "study_in_a_process.py",
    "compile_loops.py",
    "compile_saelens.py",
    "compile_triton.py",
    "reliability",
]
collect_ignore_glob = ["interop/record_*.py", "interop/run_*.py"]


def pytest_configure(config):
    """Compile the loops before several workers would each do so, in one process per module."""
    is_worker = hasattr(config, "workerinput")
    if is_worker or not getattr(config.option, "numprocesses", None) or cpu.loops_are_compiled():
        return
    command = [sys.executable, str(Path(__file__).parent / "compile_loops.py")]
    processes = [subprocess.Popen([*command, module]) for module in compile_loops.MODULES]
    for process in processes:
        process.wait()  # If one fails, the tests show why.


def pytest_collection_modifyitems(items):
    """Large selections take up to half a minute each in Triton's interpreter; smaller ones run the same kernels."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("either_way") != "triton":
            continue
        k, n_latents, dtype = (parameters.get(name) for name in ("k", "n_latents", "dtype"))
        many = k is not None and (k >= 200 or (k >= 32 and dtype != torch.float32))
        wide = (n_latents == 4096 and not parameters["scattered"]) or (n_latents == 1100 and dtype == torch.bfloat16)
        if many or wide:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["numba", "integers", "torch", "triton"])
def either_way(request):
    """With the compiled loops of the CPU, without and with products of integers, torch operations, Triton kernels.

    Returns the name of the way; Triton's interpreter takes a tenth of a second per token.
    """
    if request.param == "triton":
        interpret_triton()
    with backend.use("numba", integers=True) if request.param == "integers" else backend.use(request.param, False):
        yield request.param


@pytest.fixture
def on_triton():
    """Triton kernels compute on all tensors, in the interpreter."""
    interpret_triton()
    with backend.use("triton"):
        yield


def interpret_triton():
    """Skip the test if Triton is not installed, and make its interpreter twice as fast.

    At each call of a function of a kernel the interpreter replaces the language again; once per module is enough.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install -e '.[gpu]'")
    from triton.runtime import interpreter

    replace_language = interpreter._patch_lang
    if replace_language.__name__ == "once":
        return
    replaced = set()

    def once(function):
        if id(function.__globals__) in replaced:
            return SimpleNamespace(restore=lambda: None)
        replaced.add(id(function.__globals__))
        scope = replace_language(function)
        restore = scope.restore
        scope.restore = lambda: (replaced.clear(), restore())
        return scope

    interpreter._patch_lang = once


N_POSITIONS = 16
D_MODEL = 12
D_SAE = 32

MASKS = {
    "open": {"kind": "open"},
    "slice": {"kind": "slice", "n_slices": 4},
    "hard": {"kind": "hard", "positions_per_latent": 4},
    "cohort": {"kind": "cohort", "n_cohorts": 8, "positions_per_latent": 4},
    "soft": {"kind": "soft", "low": 0.3, "high": 0.7},
    "importance": {"kind": "importance", "positions_per_latent": 4},
    "band": {"kind": "band", "growth": 1.5},
    "split": {"kind": "split", "start_latents": 8, "max_latents": 32, "n_windows": 4, "n_splittings": 3},
    "switch": {"kind": "switch", "n_experts": 4},
    "windows": {"kind": "windows", "cuts": [[], [6], [3, 6], [9]]},
}
FORWARD_ONLY = ("split", "switch")  # a router without positions, or latents that must be silent
KINDS = [
    (kind, gating)
    for kind in MASKS
    for gating in ("forward", "gradient")
    if (kind, gating) not in [(other, "gradient") for other in FORWARD_ONLY]
]

RULES = {
    "relu": {"kind": "relu", "l1_coefficient": 0.3},
    "topk": {"kind": "topk", "k": 4},
    "batchtopk": {"kind": "batchtopk", "k": 4},
    "matryoshka": {"kind": "matryoshka", "k": 4, "parts": (0.25, 0.5, 1.0)},
    "temporal": {"kind": "temporal", "k": 4, "parts": (0.25, 1.0), "contrast_weight": 30.0},
    "jumprelu": {"kind": "jumprelu", "l0_coefficient": 0.3, "initial_threshold": 0.4, "bandwidth": 0.5},
    "gated": {"kind": "gated", "l1_coefficient": 0.3},
}


def make_sae(
    kind, gating="forward", *, rule="topk", d_model=D_MODEL, d_sae=D_SAE, seed=0, dtype=torch.float32, **changes
):
    """Make an SAE as it is during training: perturbed parameters and a mask that has changed."""
    mask = make_mask(mask_settings({**MASKS[kind], "gating": gating, **changes}), N_POSITIONS, d_sae, seed)
    rule = RULES[rule] if isinstance(rule, str) else rule
    sae = SparseAutoencoder(d_model, rule_settings(rule), mask, seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias, *sae.rule.parameters()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=random)
        if rule["kind"] in ("batchtopk", "matryoshka", "temporal"):
            sae.rule.threshold.fill_(1.1)
    grow(sae)
    return sae.to(dtype)


def grow(sae, n_steps=10):
    """Run the steps of a mask that changes during training on random codes, up to the last one."""
    mask = sae.mask
    random = torch.Generator().manual_seed(3)
    token = torch.arange(200).repeat_interleave(5)
    for done in range(n_steps):
        mask.before_step(done, n_steps)
        if mask.learns and mask.settings.kind == "importance":
            mask.learn(torch.rand(N_POSITIONS, sae.d_sae, generator=random))
        if mask.watches:
            position = torch.randint(1, N_POSITIONS, (200,), generator=random)
            live = mask.live()[position[token]]
            latent = (torch.rand(live.shape, generator=random) * live).argmax(1)
            value = torch.rand(1000, generator=random)
            residual = torch.randn(200, sae.d_model, generator=random)
            mask.observe(Observed(position, token, latent, value, residual))
        mask.after_step(done + 1, n_steps)


def make_vectors(n_tokens, *, dtype=torch.float32, seed=1):
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n_tokens, D_MODEL, generator=random, dtype=dtype)
    position = torch.sort(torch.randint(1, N_POSITIONS, (n_tokens,), generator=random)).values.to(torch.int32)
    return vectors, position


def batch_of(vectors, position, text, keep=None):
    """Make a batch of one token per row, with the position in the context for every position origin."""
    position, text = position.to(torch.int32), text.to(torch.int32)
    keep = torch.ones(len(position)).bool() if keep is None else keep
    return Batch(vectors, position, torch.zeros_like(position), text, keep, position, position, position, position)


def codes_of(dense):
    """Return the sparse codes of a dense tensor."""
    token, latent = dense.nonzero(as_tuple=True)
    return Codes(token, latent, dense[token, latent], *dense.shape)


def train_on(sae, activations, settings, seed=0, after_step=lambda done: None, positions=None):
    """Train on harvested vectors; with `positions`, on the tokens at these positions only."""
    sae.center, sae.scale = activations.center_and_scale
    pairs = sae.rule.pairs_tokens
    batches = training_batches(activations, settings.batch_tokens, settings.n_steps, seed, pairs=pairs)
    if positions is not None:
        batches = (batch.select(positions[batch.position.long()]) for batch in batches)
    return train(sae, batches, settings, "test", after_step)


WORDS = "red blue green old new big small house tree road sea sky bird fish runs flies sleeps sings and or".split()


def make_texts(n_texts, *, seed=0, n_words=30):
    random = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n_words,), generator=random)) for _ in range(n_texts)]


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<bos>", "<eos>", *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def causal_lm():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=D_MODEL,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(causal_lm, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    causal_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_model(model_folder):
    from transformers import AutoModelForCausalLM

    return LanguageModel(AutoModelForCausalLM.from_pretrained(model_folder).eval(), layer=2)


@pytest.fixture(scope="session")
def activations(tokenizer, language_model, tmp_path_factory) -> Activations:
    tokens = pack(make_texts(200), tokenizer, N_POSITIONS, 3000)
    return harvest(tokens, language_model, tmp_path_factory.mktemp("run") / "activations", {"what": "test"}, "test")


@pytest.fixture(scope="session")
def saelens():
    """Import sae_lens and register the posmask architecture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Its imports use deprecated functions of its dependencies.
        sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed: pip install -e '.[saelens]'")
        import posmask.interop.saelens  # noqa: F401
    return sae_lens


STUDY = tiny_study("""
[[cells]]
name = "open"
mask = { kind = "open" }
[[cells]]
name = "slice-compute"
mask = { kind = "slice", n_slices = 4 }
budget = "compute"
measure_forgetting = true
[[comparisons]]
cell = "slice-compute"
against = "open + segments4"
""")


@pytest.fixture
def texts(monkeypatch):
    """Replace the embedded tables by a toy table; add a toy dataset and a toy order task made from it."""
    table = [(text, str(i % 2)) for i, text in enumerate(make_texts(1200, n_words=14))]
    monkeypatch.setattr(embedded, "read_table", lambda name: table)
    monkeypatch.setitem(datasets.DATASETS, "toy", {"even": ("words", "0"), "odd": ("words", "1")})

    def swapped(random, split):
        groups = []
        for text, _ in table:
            words = text.split()
            if split_of(text) == split and words[0] != words[-1]:
                groups.append((text, " ".join([words[-1], *words[1:-1], words[0]])))
        return iter(groups[:100]), iter(groups[100:])

    recipe = order_tasks.OrderRecipe(swapped, "Which end is first?", ("swapped", "intact"), "text", (), "local")
    monkeypatch.setitem(order_tasks.ORDER_TASKS, "toy_order", recipe)


@pytest.fixture
def study_file(tmp_path, model_folder, texts):
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY.replace("MODEL", str(model_folder)))
    return path


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """The root of the study that `finished` runs, and the rows that its run returned (None before it)."""
    return SimpleNamespace(root=tmp_path_factory.mktemp("finished") / "run", results=None)


@pytest.fixture
def finished(first_run, model_folder, texts):
    """The finished study of `study_file`, which runs once per session; read its folders, and write into copies only."""
    from posmask.study.run import run_study

    if first_run.results is None:
        path = first_run.root.with_suffix(".toml")
        path.write_text(STUDY.replace("MODEL", str(model_folder)))
        first_run.results = run_study(read_study(path), first_run.root, say=lambda line: None)
    return first_run


@pytest.fixture
def finish(finished):
    """Make a run folder in which the study of `study_file` is finished, and return its rows."""

    def finish(root):
        shutil.copytree(finished.root, root)
        return read_rows(root / layout.RESULTS_FILE)

    return finish


@pytest.fixture
def begin(finished):
    """Make a run folder with the harvests and the baselines of the study of `study_file`, and with these cells."""

    def begin(root, *cells):
        for name in ("activations", "baselines", *(f"cells/{cell}" for cell in cells)):
            shutil.copytree(finished.root / name, root / name, dirs_exist_ok=True)
        return root

    return begin


HOSTILE = "<img src=x onerror=alert(1)><script>alert(1)</script>"
SHOWN_WORDS = [" the", " dog", HOSTILE, "\u202eabc", "\x00\x07", "שלום", "x" * 1000, "\n", " =1+1"]


class Words:
    """A tokenizer with the one method that the latent browser needs."""

    def decode(self, ids):
        return SHOWN_WORDS[ids[0] % len(SHOWN_WORDS)]


def latent_table(d_sae, seed):
    """Make a table of latents of random numbers."""
    random = np.random.default_rng(seed)
    bins = position_bins(N_POSITIONS).numpy()
    starts = np.unique(bins[1:], return_index=True)[1] + 1
    rate = random.uniform(0, 0.2, (len(starts), d_sae)).astype(np.float32)
    columns = {name: random.uniform(0, 1, d_sae) for name in COLUMNS}
    columns |= {"latent": np.arange(d_sae), "firings": random.integers(1, 99, d_sae), "kind": np.array([""] * d_sae)}
    columns |= {"class": random.choice(CLASSES[:4], d_sae), "peak_position": random.integers(1, N_POSITIONS, d_sae)}
    columns["shift_content"][:2] = np.nan
    ends = {"bin_start": starts, "bin_end": np.append(starts[1:], N_POSITIONS) - 1}
    rates = {"rate": rate, "rate_low": rate / 2, "rate_high": rate * 1.5, "mean": rate, "null_rate": rate}
    return LatentTable(columns=columns, **ends, **rates, n_tokens=600, uses_rotations=True)


def write_latents(sae, folder, masks=("on", "lifted")):
    """Write the data of the latent browser of an SAE, with words that a page must not interpret.

    Args:
        masks: of the random tables of latents; empty writes none.
    """
    vectors, position = make_vectors(600)
    position = torch.arange(600, dtype=torch.int32) % (N_POSITIONS - 1) + 1
    batch = batch_of(vectors, position, torch.arange(600) // 30)
    batch.token_id[:] = torch.arange(600) % len(SHOWN_WORDS)
    codes = sae.sparse_encode(vectors, position)
    facts, used = LatentFacts(sae.d_sae), PositionMass(N_POSITIONS, sae.d_sae)
    facts.update(batch, codes)
    n_windows, length = 4, (N_POSITIONS - 1) // 5
    is_moved = (batch.position > length) & (batch.position <= (n_windows + 1) * length)
    moved = StoredCodes(sae.d_sae)
    moved.add(batch.select(is_moved), codes.select(is_moved))
    facts.add_shift(moved, n_windows, length)
    facts.tables = {mask: latent_table(sae.d_sae, seed) for seed, mask in enumerate(masks)}
    used.update(batch, codes)
    share = torch.rand(sae.d_sae, generator=torch.Generator().manual_seed(1))
    facts.add_positions(used, share, share, torch.full_like(share, 0.5), "context")
    for number, name in enumerate((HOSTILE, "toy")):
        facts.add_probe(name, torch.arange(3) + number, torch.tensor([1.5, -0.5, 0.25]))
    ends = torch.arange(sae.d_sae * 4).view(-1, 4) % len(SHOWN_WORDS), torch.rand(sae.d_sae, 4)
    facts.add_effects(ends, ends)
    facts.write(folder, Words())


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium): the page was not tried in a browser")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Open an address; the test fails if the browser console has a message at its end."""
    console_messages, contexts = [], []

    def opened(address, **settings):
        context = chromium.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True, **settings)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: console_messages.append(message.text))
        tab.on("pageerror", lambda error: console_messages.append(str(error)))
        tab.on("dialog", lambda dialog: console_messages.append(f"dialog: {dialog.message}"))
        tab.goto(address if isinstance(address, str) else address.as_uri())
        tab.wait_for_selector("html[data-ready]")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert console_messages == []


@pytest.fixture
def serve():
    """Serve a page in a thread and return the port."""
    from posmask.report import page_server

    servers = []

    def serve(page, codes=None):
        server = page_server(page, codes=codes)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_address[1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
