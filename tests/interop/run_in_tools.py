"""Run the examples of docs/saelens.md in other tools: `run_in_tools.py OUT.json TOOL..`, in an environment with them.

Runs in a folder that `stand_ins` wrote. Nothing is replaced: the name gpt2 resolves to the folder.
"""

import json
import re
import sys
from pathlib import Path

import torch
from sae_lens import SAE
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import posmask.interop.saelens  # noqa: F401

PAGE = Path(__file__).parent.parent.parent / "docs" / "saelens.md"
N_TEXTS, N_TOKENS = 16, 32


def run_example(tool, **names):
    """Run a tool's example of the page and return its variables."""
    block = re.search(rf"```python\n# not run here: {tool}\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL)[1]
    path = Path(f"example_{tool}.py")  # nnsight reads the source.
    path.write_text(block, encoding="utf8")
    names |= {"SAE": SAE, "torch": torch}
    exec(compile(block, str(path.absolute()), "exec"), names)
    return names


def read_texts():
    return [json.loads(line)["text"] for line in Path("texts/train.jsonl").read_text().splitlines()[:N_TEXTS]]


def texts_of_different_lengths():
    return [" ".join(text.split()[: 12 + 3 * number]) for number, text in enumerate(read_texts()[:3])]


def tokens_and_vectors():
    """Return tokens [text, position] and the vectors of layer 2 at them."""
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    tokens = tokenizer(read_texts(), return_tensors="pt", truncation=True, max_length=N_TOKENS)["input_ids"]
    return tokens, vectors_of(tokens)


@torch.no_grad()
def vectors_of(tokens):
    return AutoModel.from_pretrained("gpt2").eval()(tokens, output_hidden_states=True).hidden_states[2]


def difference(codes, expected):
    return float((codes.detach() - expected.detach()).abs().max())


def run_dashboard():
    """Compare what the dashboard of each export shows with the codes of the folded SAE."""
    tokens, vectors = tokens_and_vectors()
    results = {}
    for folder in sorted(Path().glob("saes*/*")):
        sae, folded = SAE.load_from_disk(folder), SAE.load_from_disk(folder)
        folded.fold_W_dec_norm()
        with torch.inference_mode():
            codes = folded.encode(vectors)[..., :3]
        dashboard = run_example("SAEDashboard", sae=sae, name="gpt2", tokens=tokens)["dashboard"]
        unknown, missing, frequency = [], [], []
        for feature in range(3):
            data = dashboard.feature_data_dict[feature]
            lines = [line.feat_acts for group in data.sequence_data.seq_group_data for line in group.seq_data]
            shown, actual = torch.tensor([value for line in lines for value in line]), codes[..., feature]
            unknown.append((shown[:, None] - actual.flatten()).abs().amin(1).max())
            missing.append(actual[:, 6:-5].max() - shown.max())  # It looks for maxima between these positions.
            percent = re.search(r"([0-9.]+)%", data.acts_histogram_data.title or "0%")  # None if it never fires.
            stated = float(percent[1]) / 100
            frequency.append(float((actual > 0).float().mean()) - stated)
        results[folder.name] = {
            "shown value that is no code": float(max(unknown)),
            "missing from the largest": float(max(missing)),
            "difference of frequency": max(map(abs, frequency)),
            "n_codes": int((codes > 0).sum()),
            "page": "MAX" in Path("dashboard.html").read_text(encoding="utf8"),
        }
    return results


def run_nnsight():
    from nnsight import LanguageModel

    model = LanguageModel("gpt2", device_map="cpu", dispatch=True)
    sae, texts = SAE.load_from_disk("saes/windows"), texts_of_different_lengths()
    names = run_example("nnsight", model=model, sae=sae, text=texts[1], texts=texts)
    expected = [expected_codes(sae, model.tokenizer(text, return_tensors="pt")["input_ids"]) for text in texts]
    inputs = model.tokenizer(texts[1], return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained("gpt2").generate(**inputs, max_new_tokens=3)
    generated = torch.cat([codes[0] for codes in names["codes_by_step"]])
    return {
        "padding": names["codes"].shape[1] - len(expected[0]),
        "padded texts": max(difference(names["codes"][i, -len(codes) :], codes) for i, codes in enumerate(expected)),
        "generated": difference(generated, expected_codes(sae, tokens[:, :-1])),
    }


def expected_codes(sae, tokens):

    with torch.no_grad():
        return sae.encode(vectors_of(tokens))[0]


def run_delphi():
    sae = SAE.load_from_disk("saes/windows")
    tokens, vectors = tokens_and_vectors()
    model, folder = AutoModel.from_pretrained("gpt2").eval(), Path("delphi")
    names = run_example("delphi", model=model, sae=sae, tokens=tokens, folder=folder)
    text, position, latent = names["cache"].cache.latent_locations["h.1"].T
    codes = torch.zeros(*tokens.shape, sae.cfg.d_sae)
    codes[text, position, latent] = names["cache"].cache.latent_activations["h.1"]
    return {
        "difference": difference(codes, sae.encode(vectors)),
        "files": sorted(path.name for path in (folder / "h.1").iterdir()),
    }


def run_dictionary_learning():
    from nnsight import LanguageModel

    model = LanguageModel("gpt2", device_map="cpu")
    sae = SAE.load_from_disk("saes/windows")
    texts = texts_of_different_lengths()
    expected = [expected_codes(sae, model.tokenizer(text, return_tensors="pt")["input_ids"]) for text in texts]
    vectors, seen = tokens_and_vectors()[1][:, 1:], []
    sae.hook_sae_acts_post.register_forward_hook(lambda module, args, codes: seen.append(codes))
    names = run_example("dictionary_learning", sae=sae, vectors=vectors, model=model, texts=texts)
    (flat, last), measures = seen, names["measures"]
    with torch.no_grad():
        codes = sae.encode(vectors, positions=torch.arange(1, N_TOKENS))
        rest = (vectors - sae.decode(codes)).flatten(0, 1)
    explained = 1 - rest.var(0).sum() / vectors.flatten(0, 1).var(0).sum()
    return {
        "codes": difference(flat, codes.flatten(0, 1)),
        "padded texts": max(difference(last[i, : len(codes)], codes) for i, codes in enumerate(expected)),
        "measures": {name: measures[name] for name in ("l0", "frac_variance_explained")},
        "expected": {"l0": float((codes > 0).sum(-1).float().mean()), "frac_variance_explained": float(explained)},
        "losses": [float(loss) for loss in names["losses"]],
    }


RUNS = {
    "SAEDashboard": run_dashboard,
    "nnsight": run_nnsight,
    "delphi": run_delphi,
    "dictionary_learning": run_dictionary_learning,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {tool: RUNS[tool]() for tool in sys.argv[2:]}
    Path(sys.argv[1]).write_text(json.dumps(results))
