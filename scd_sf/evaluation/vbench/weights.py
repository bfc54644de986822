"""Which files VBench 0.1.5 needs for a dimension, where in its cache, and where they come from.

Read from the wheel: ``vbench/utils.py`` (``init_submodules`` with ``local=True``), ``aesthetic_quality.py``,
``third_party/ViCLIP/simple_tokenizer.py``, ``third_party/tag2Text/tag2text.py`` and ``third_party/grit_src``. Their
sizes are stated nowhere in it. VBench unpickles some of these files: take them from these addresses only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scd_sf.files import refuse_lfs_pointer
from scd_sf.types import UserError, say

_HUB = "https://huggingface.co"
_CLIP = "https://openaipublic.azureedge.net/clip/models"
_USED = f"{_HUB}/OpenGVLab/VBench_Used_Models/resolve/main"
_DINO_FILE = "dino_vitbase16_pretrain.pth"


@dataclass(frozen=True)
class Weight:
    """``path`` inside the cache (a folder where ``how`` says so), ``url``, and ``how`` to get it there if not by plain
    download."""

    path: str
    url: str
    how: str = ""


_VIT_B = Weight(
    "clip_model/ViT-B-32.pt", f"{_CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt"
)
_VIT_L = Weight(
    "clip_model/ViT-L-14.pt", f"{_CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt"
)
_GRIT = Weight(
    "grit_model/grit_b_densecap_objectdet.pth",
    "https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth",
)
_VOCABULARY = Weight("bert-base-uncased/vocab.txt", f"{_HUB}/bert-base-uncased/resolve/main/vocab.txt")
_VICLIP = (
    Weight("ViCLIP/ViClip-InternVid-10M-FLT.pth", f"{_USED}/ViClip-InternVid-10M-FLT.pth"),
    Weight(
        "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
        "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
    ),
)
_RAFT = Weight(
    "raft_model/models/raft-things.pth",
    "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
    "unpack models.zip in raft_model/",
)
NEEDED: dict[str, tuple[Weight, ...]] = {
    "subject_consistency": (
        Weight(
            "dino_model/facebookresearch_dino_main/hubconf.py",
            "https://github.com/facebookresearch/dino",
            "git clone it as dino_model/facebookresearch_dino_main",
        ),
        Weight(f"dino_model/{_DINO_FILE}", f"https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/{_DINO_FILE}"),
    ),
    "background_consistency": (_VIT_B,),
    "temporal_flickering": (),
    "motion_smoothness": (
        Weight("amt_model/amt-s.pth", f"{_HUB}/lalala125/AMT/resolve/main/amt-s.pth"),
    ),
    "dynamic_degree": (_RAFT,),
    "aesthetic_quality": (
        _VIT_L,
        Weight(
            "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
            "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
        ),
    ),
    "imaging_quality": (
        Weight(
            "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
            "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        ),
    ),
    "object_class": (_GRIT, _VOCABULARY),
    "multiple_objects": (_GRIT, _VOCABULARY),
    "human_action": (
        Weight(
            "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
            f"{_USED}/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        ),
    ),
    "color": (_GRIT, _VOCABULARY),
    "spatial_relationship": (_GRIT, _VOCABULARY),
    "scene": (
        Weight(
            "caption_model/tag2text_swin_14m.pth",
            f"{_HUB}/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
        ),
        _VOCABULARY,
        Weight("bert-base-uncased/config.json", f"{_HUB}/bert-base-uncased/resolve/main/config.json"),
        Weight("bert-base-uncased/model.safetensors", f"{_HUB}/bert-base-uncased/resolve/main/model.safetensors"),
    ),
    "appearance_style": (_VIT_B,),
    "temporal_style": _VICLIP,
    "overall_consistency": _VICLIP,
}  # fmt: skip
DETECTRON2 = ("object_class", "multiple_objects", "color", "spatial_relationship")
"""These dimensions import detectron2, which no package index has: it is installed from its repository."""


def missing(dimensions: Sequence[str], cache: Path) -> list[tuple[str, Weight]]:
    """(dimension, file) for each file that is not in the cache, each file once."""
    seen: set[str] = set()
    found = []
    for name in dimensions:
        for weight in NEEDED[name]:
            if weight.path not in seen and not (cache / weight.path).is_file():
                found.append((name, weight))
            seen.add(weight.path)
    return found


def require(dimensions: Sequence[str], cache: Path) -> None:
    """UserError, after a line for each on stdout, if a file is missing, and if one is a pointer of Git LFS."""
    absent = missing(dimensions, cache)
    for name, weight in absent:
        how = f" ({weight.how})" if weight.how else ""
        say(f"missing for {name}: {cache / weight.path}, from {weight.url}{how}")
    if absent:
        raise UserError(
            f"{cache}: {len(absent)} files of VBench's networks are missing (listed above); put each at its place, or "
            "let VBench download them with download=true, or name other dimensions"
        )
    for weight in {weight for name in dimensions for weight in NEEDED[name]}:
        refuse_lfs_pointer(cache / weight.path)


def link_dino(cache: Path) -> None:
    """DINO's own hub code looks for its weights under TORCH_HOME (``cache/torch_home`` for us), not where VBench puts
    them: one link more."""
    source, target = cache / "dino_model" / _DINO_FILE, cache / "torch_home" / "hub" / "checkpoints" / _DINO_FILE
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(source.resolve())
