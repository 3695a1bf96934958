"""A trainer's averaged weights -> the compact form of dsv4-mini, under native names.

python -m training.export --run .cache/mini
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from dsv4_plugin.tools.mini import COMPACT, CONFIG, VOCABULARY, WEIGHTS
from training.data import Vocabulary
from training.indexer import FILE as INDEXER_FILE
from training.mtp import FILE as MTP_FILE
from training.names import compact_tensors
from training.network import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--out", type=Path, default=COMPACT)
    args = parser.parse_args()
    state = torch.load(args.run / "trainer.pt")
    vocabulary = Vocabulary.load(args.run / "vocabulary.json")
    torch.manual_seed(0)
    fresh = build(vocabulary).state_dict()  # for what the run leaves out
    found = fresh | state["model"] | state["average"]
    if (args.run / INDEXER_FILE).is_file():
        found |= torch.load(args.run / INDEXER_FILE)["indexers"]
    tensors = compact_tensors(found)
    hf = json.loads((COMPACT / CONFIG).read_text())
    drafter = args.run / MTP_FILE
    hf["num_nextn_predict_layers"] = int(drafter.is_file())
    if drafter.is_file():
        saved = torch.load(drafter)["drafter"]
        tensors |= compact_tensors({f"mtp.0.{name}": tensor for name, tensor in saved.items()})
    (args.out / CONFIG).write_text(json.dumps(hf, indent=2) + "\n")
    save_file(tensors, args.out / WEIGHTS)
    vocabulary.save(args.out / VOCABULARY)
    size = (args.out / WEIGHTS).stat().st_size
    print(f"step {state['step']}: {len(tensors)} tensors, {size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
