"""A selection of adapters as one LoRA in PEFT's files, which is what vLLM can load.

The task's pairs are on its linears, and the backbone's folded pairs on the taps (`tap.py`).
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from crma.method.backbone import FoldedPair
from crma.method.lora import Lora
from crma.store.peft_config import CONFIG, WEIGHTS
from crma.store.peft_key import PREFIX
from server.engine.vllm.plugin import TAP

Pair = tuple[str, Tensor, Tensor]  # module path, A [r, in], B [out, r] with the scaling in it


def write_folder(
    folder: Path, lora: Lora | None, backbone: Sequence[FoldedPair] | None, blocks: str
) -> None:
    """Write a selection, of which at least one part is there; nothing half-written is visible.

    Args:
        folder: does not exist yet.
        lora: as it serves (`prepare`): its scaling is 1.
        backbone: one pair for each block.
        blocks: the path of the blocks in the model, such as "model.layers".
    """
    pairs = list(_pairs(lora, backbone, blocks))
    # One rank for all, with rows and columns of zeros: they add nothing, and vLLM adds them anyway.
    rank = max(A.shape[0] for _, A, _ in pairs)
    tensors = {}
    for path, A, B in pairs:
        missing = rank - A.shape[0]
        wide_a = torch.nn.functional.pad(A, (0, 0, 0, missing))
        wide_b = torch.nn.functional.pad(B, (0, missing))
        tensors[f"{PREFIX}{path}.lora_A.weight"] = wide_a.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = wide_b.contiguous()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({path.rpartition(".")[2] for path, _, _ in pairs}),
    }
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    aside.mkdir(parents=True)
    try:
        save_file(tensors, aside / WEIGHTS)
        (aside / CONFIG).write_text(json.dumps(config))
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _pairs(lora: Lora | None, backbone: Sequence[FoldedPair] | None, blocks: str) -> Iterator[Pair]:
    if lora is not None:
        for path, pair in lora.pairs.items():
            yield path, pair.A, pair.scaled_b
    for index, folded in enumerate(backbone or ()):
        yield f"{blocks}.{index}.{TAP}", folded.A, folded.B
