"""The model files of `bench.stages`: random weights, written once, of the sizes that a 12 GB card struggles with.

`python -m bench.stage_files` writes those that are not there and prints one JSON line. Parents run it as a child,
because drawing the weights on the card leaves a CUDA context behind.
"""

from __future__ import annotations

import argparse
import json

# Z-Image with so many of its 30 layers has 6.8 GiB in bfloat16, as all of them have in 8 bits.
LAYERS = 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu makes narrow models")
    device = parser.parse_args().device
    import torch

    from scripts import checkpoint_cache, checkpoints

    vae = checkpoint_cache.vae("zimage", device=device)
    if device == "cpu":
        model = checkpoint_cache.diffusion_model("zimage", device=device)
        text = checkpoint_cache.text_encoder("zimage", device=device)
    else:
        model = checkpoint_cache.diffusion_model("zimage", size="full", layers=LAYERS, device=device)
        text = checkpoint_cache.text_encoder("zimage", size="full", dtype=torch.float8_e4m3fn, device=device)
    files = {"model_path": model, "text_path": text, "vae_path": vae}
    print(json.dumps({name: [str(path), checkpoints.stored_bytes(path)] for name, path in files.items()}))


if __name__ == "__main__":
    main()
