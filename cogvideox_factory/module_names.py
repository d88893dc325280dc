"""What other programs call the layers of a CogVideoX transformer, and the way to and from diffusers' names.

| who | a layer of a block | its LoRA |
|---|---|---|
| diffusers, PEFT | `transformer_blocks.0.attn1.to_q` | `transformer.` or `base_model.model.` before it |
| ComfyUI itself (since 2026) | `blocks.0.q` | `diffusion_model.blocks.0.q`, `lora_unet_blocks_0_q` |
| CogVideoX-Fun, and through it kijai's CogVideoXWrapper | as diffusers | `lora_unet_transformer_blocks_0_attn1_to_q` |

ComfyUI's names are those of its own module tree (`comfy/ldm/cogvideo/model.py`), which its LoRA loader takes as they
are; it has no table from diffusers' names for this model, so a LoRA under those is skipped there, with a warning only.
"""

import re

_IN_BLOCK = {
    "attn1.to_q": "q", "attn1.to_k": "k", "attn1.to_v": "v", "attn1.to_out.0": "attn_out", "attn1.norm_q": "norm_q",
    "attn1.norm_k": "norm_k", "ff.net.0.proj": "ff_proj", "ff.net.2": "ff_out",
    "norm1.linear": "norm1.linear", "norm1.norm": "norm1.norm", "norm2.linear": "norm2.linear",
    "norm2.norm": "norm2.norm",
}  # fmt: skip
_OUTSIDE = {
    "patch_embed.proj": "patch_embed.proj", "patch_embed.text_proj": "patch_embed.text_proj",
    "time_embedding.linear_1": "time_embedding_linear_1", "time_embedding.linear_2": "time_embedding_linear_2",
    "ofs_embedding.linear_1": "ofs_embedding_linear_1", "ofs_embedding.linear_2": "ofs_embedding_linear_2",
    "norm_final": "norm_final", "norm_out.linear": "norm_out.linear", "norm_out.norm": "norm_out.norm",
    "proj_out": "proj_out",
}  # fmt: skip
_PREFIXES = ("base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.")
_UNDERSCORED = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_(?P<name>\w+)")
_BLOCK = re.compile(r"(?P<kind>transformer_blocks|blocks)(?P<dot>[._])(?P<index>\d+)[._](?P<rest>.+)")

_FROM_COMFYUI = {theirs: ours for ours, theirs in (_IN_BLOCK | _OUTSIDE).items()}
_FROM_UNDERSCORES = {
    name.replace(".", "_"): ours for ours, theirs in (_IN_BLOCK | _OUTSIDE).items() for name in (theirs, ours)
}


def to_comfyui(module: str) -> str | None:
    """Return what ComfyUI itself calls a module, or None for one that it does not have."""
    if not (found := _BLOCK.fullmatch(module)):
        return _OUTSIDE.get(module)
    name = _IN_BLOCK.get(found["rest"])
    return None if name is None or found["kind"] == "blocks" else f"blocks.{found['index']}.{name}"


def to_diffusers(module: str) -> str:
    """Return diffusers' name of a module under anybody's name; what nobody here knows stays as it is."""
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    flat = _UNDERSCORED.fullmatch(module)
    name, table = (flat["name"], _FROM_UNDERSCORES) if flat else (module, _FROM_COMFYUI)
    if found := _BLOCK.fullmatch(name):
        if found["kind"] == "transformer_blocks" and not flat:
            return name
        part = table.get(found["rest"])
        return module if part is None else f"transformer_blocks.{found['index']}.{part}"
    return table.get(name, module)
