"""VAE, text encoder and tokenizer of a Wan directory, copied: the files that a pipeline reads, by
name, and no others.

A link is followed where it stays in the directory, or in the same model's ``blobs`` of a Hugging
Face cache, where ``snapshots/REVISION`` is made of such links. Any other link to a file that is
read is refused: what it points to is not the model's. Code (``.py``) and pickles are never copied.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from scd_sf.files import refuse_lfs_pointer
from scd_sf.models.wan.text import REFERENCE, text_config, write_reference
from scd_sf.tensor_files import check_tensors, open_tensors
from scd_sf.types import UserError

_SHARD = r"(-\d{5}-of-\d{5})?"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
READ = {
    "vae": re.compile(
        rf"config\.json|diffusion_pytorch_model{_SHARD}\.safetensors(\.index\.json)?"
    ),
    "text_encoder": re.compile(rf"config\.json|model{_SHARD}\.safetensors(\.index\.json)?"),
    "tokenizer": re.compile("|".join(map(re.escape, _TOKENIZER))),
}


def copy_components(base: Path, out: Path) -> None:
    """Copy what :data:`READ` names of ``base`` below ``out``, and the reference to a text encoder
    if there is one.

    UserError for a link that leaves ``base``, for anything but files, for pointers of Git LFS, and
    for weights that are not finite.
    """
    for folder, names in READ.items():
        for file in sorted((base / folder).iterdir()) if (base / folder).is_dir() else ():
            if names.fullmatch(file.name):
                (out / folder).mkdir(exist_ok=True)
                _copy(file, base, out / folder / file.name)
    has_encoder = all((base / folder).is_dir() for folder in ("text_encoder", "tokenizer"))
    if (base / REFERENCE).is_file() and not has_encoder:
        _inside(base / REFERENCE, base)
        config = text_config(base)
        write_reference(
            out, replace(config, path=str(Path(config.path).resolve()) if config.path else "")
        )


def _copy(file: Path, base: Path, place: Path) -> None:
    real = _inside(file, base)
    refuse_lfs_pointer(real)
    if file.suffix == ".safetensors":
        check_tensors(open_tensors(file))
    shutil.copyfile(real, place)


def _inside(file: Path, base: Path) -> Path:
    """The file itself behind links, which must be the model's own."""
    real, root = file.resolve(), base.resolve()
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    if not real.is_file() or not any(real.is_relative_to(each) for each in roots):
        raise UserError(
            f"{file}: leads to {real}, which is no file of {base}; it is not copied: put the file there itself"
        )
    return real
