"""Small models as diffusers keeps them, and what it computes with them.

tests/golden/make_cogvideox.py made the golden files.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "convert_cogvideox.py"
GOLDEN = ROOT / "tests" / "golden"
WHOLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{WHOLE}.index.json"


def golden(kind):
    tensors = load_file(GOLDEN / f"cogvideox_{kind}.safetensors")
    weights = {name[8:]: t for name, t in tensors.items() if name.startswith("weights.")}
    return weights, {name: t for name, t in tensors.items() if not name.startswith("weights.")}


def published(folder, weights):
    """As on a model hub: two files and an index of which weight is where."""
    names = sorted(weights)
    files = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    where = {name: files[at % 2] for at, name in enumerate(names)}
    (folder / "transformer").mkdir(parents=True)
    for file in files:
        held = {name: weights[name].contiguous() for name in names if where[name] == file}
        save_file(held, folder / "transformer" / file, metadata={"format": "pt"})
    (folder / "transformer" / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder
