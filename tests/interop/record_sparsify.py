"""Record an SAE of EleutherAI's sparsify and what it computes, in its environment: `record_sparsify.py FOLDER`.

The environment: `pip install eai-sparsify==1.3.3`. FOLDER gets config.json, the SAE in layers.5, and
expected.safetensors with vectors, codes and reconstructions.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.__main__ import RunConfig

D_MODEL, D_SAE, K = 12, 60, 5
torch.manual_seed(0)
folder = Path(sys.argv[1])
cfg = SparseCoderConfig(num_latents=D_SAE, k=K)
sae = SparseCoder(D_MODEL, cfg)
with torch.no_grad():
    sae.encoder.bias.normal_()
    sae.b_dec.normal_()
    sae.W_dec.normal_()
    sae.set_decoder_norm_to_unit_norm()
sae.save_to_disk(folder / "layers.5")
run = RunConfig(cfg, model="EleutherAI/pythia-70m", dataset="EleutherAI/the_pile", ctx_len=2049)
(folder / "config.json").write_text(json.dumps(run.to_dict()), encoding="utf8")
vectors = torch.randn(40, D_MODEL)
with torch.no_grad():
    encoded = sae.encode(vectors)
    codes = torch.zeros(len(vectors), D_SAE).scatter(1, encoded.top_indices, encoded.top_acts)
    reconstructions = sae(vectors).sae_out
save_file({"vectors": vectors, "codes": codes, "reconstructions": reconstructions}, folder / "expected.safetensors")
