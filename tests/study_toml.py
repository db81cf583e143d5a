"""The TOML of a study that runs in seconds, and its variants. Imports nothing, so that scripts can use it too."""

import re

_SETTINGS = """
name = "tiny"
seeds = [0]
[model]
name = "MODEL"
layer = 2
precision = "float32"
[corpus]
n_positions = 16
training_tokens = 1500
heldout_tokens = 1500
tables = ["words"]
[sae]
d_sae = 32
rule = { kind = "topk", k = 4 }
[training]
n_steps = 20
batch_tokens = 256
learning_rate = 5e-3
[evaluation]
retention_positions = 4
shift_texts = 40
shift_windows = 4
model_contexts = 8
order_tasks = ["toy_order"]
order_train_groups = 30
order_test_groups = 10
order_poolings = ["segments4", "moment"]
probe_datasets = ["toy"]
probe_train = 40
probe_test = 10
ks = [1, 5, 20]
"""


def tiny_study(cells: str, **settings: str) -> str:
    """Return the study with these cells; its model is named MODEL.

    Args:
        settings: new lines for keys of the study, each in place of the line that sets the key.
    """
    text = _SETTINGS
    for key, lines in settings.items():
        text, n_replaced = re.subn(rf"^{key} = .*$", lambda _, lines=lines: lines, text, flags=re.MULTILINE)
        assert n_replaced == 1, key
    return text + cells.removeprefix("\n")
