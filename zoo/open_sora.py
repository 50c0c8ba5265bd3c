"""Open-Sora 1.2, which is not in diffusers: its eager code here is that of our own STDiT3 and VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.base import Config, Example, Family, Original, Published, Step
from zoo.components import FUSED_HEAD_DIM, IMAGE_BLOCKS, T5_XXL, TINY_T5, with_blocks, write_text

if TYPE_CHECKING:
    from foresight.engines.manifest import Manifest

STDIT3: Config = {
    "model_type": "STDiT3",
    "input_size": [None, None, None],
    "input_sq_size": 512,
    "in_channels": 4,
    "patch_size": [1, 2, 2],
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "pred_sigma": True,
    "drop_path": 0.0,
    "caption_channels": 4096,
    "model_max_length": 300,
    "qk_norm": True,
    "enable_flash_attn": True,
    "enable_layernorm_kernel": True,
    "enable_sequence_parallelism": False,
    "only_train_temporal": False,
    "freeze_y_embedder": True,
    "skip_y_embedder": False,
}
VAE: Config = {
    "model_type": "VideoAutoencoderPipeline",
    "architectures": ["VideoAutoencoderPipeline"],
    "cal_loss": False,
    "freeze_vae_2d": False,
    "from_pretrained": None,
    "micro_frame_size": 17,
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.1, 0.34, 0.27, 0.98],
    "vae_2d": {
        "type": "VideoAutoencoderKL",
        "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        "subfolder": "vae",
        "micro_batch_size": 4,
    },
    "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
}
TINY_IMAGE_VAE: Config = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
TINY_VAE: Config = {
    "model_type": "VideoAutoencoderPipeline",
    "vae_2d": {"type": "VideoAutoencoderKL", "config": with_blocks(TINY_IMAGE_VAE, *IMAGE_BLOCKS)},
    "vae_temporal": {
        "type": "VAE_Temporal",
        "filters": 8,
        "num_res_blocks": 1,
        "channel_multipliers": [1, 2, 2, 4],
        "temporal_downsample": [False, True, True],
        "num_groups": 4,
    },
}


def write_random(
    folder: Path,
    *,
    heads: int = 2,
    head_dim: int = 8,
    pairs: int = 2,
    patch: int = 2,
    input_size: tuple[int, int, int] | None = (5, 4, 6),
    text_tokens: int = 16,
    transformer: Config | None = None,
    text: Config | None = None,
    vae: Config | None = None,
    seed: int = 0,
) -> Path:
    """Write a random Open-Sora checkpoint and return its folder; `input_size` are frames, height, width of latents."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    t5 = TINY_T5 | (text or {})
    config: Config = {
        "model_type": "STDiT3",
        "hidden_size": heads * head_dim,
        "num_heads": heads,
        "depth": pairs,
        "patch_size": [1, patch, patch],
        "caption_channels": t5["d_model"],
        "model_max_length": text_tokens,
        "input_sq_size": 32,
        "input_size": list(input_size) if input_size else [None] * 3,
    } | (transformer or {})
    for component, content in (("transformer", config), ("vae", vae or TINY_VAE)):
        module = original(component, content)
        for name, parameter in module.named_parameters():
            if component == "transformer" and name.endswith("scale_shift_table"):
                torch.nn.init.normal_(parameter, std=0.5)
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(content, indent=1))
        save_file(module.state_dict(), folder / component / "model.safetensors", metadata={"format": "pt"})
    write_text(folder, t5)
    return folder


def original(component: str, config: Config) -> Any:
    """The transformer or the VAE, without weights."""
    from foresight.exporter.models.open_sora.config import STDiT3Config, VideoVAEConfig
    from foresight.exporter.models.open_sora.stdit3 import STDiT3
    from foresight.exporter.models.open_sora.vae import VideoVAE

    if component == "transformer":
        return STDiT3(STDiT3Config.from_json(config))
    return VideoVAE(VideoVAEConfig.from_json(config))


def load_original(checkpoint: Path, manifest: Manifest, step: Step) -> Original:
    """The transformer, with weights."""
    import torch
    from safetensors.torch import load_file

    from foresight.exporter.models.base import TORCH_DTYPES
    from foresight.exporter.models.open_sora import FPS

    folder = checkpoint / "transformer"
    with torch.device("meta"):
        module = original("transformer", json.loads((folder / "config.json").read_text(encoding="utf-8")))
    module.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    module.to(TORCH_DTYPES[manifest.dtype])
    arguments = {
        "latents": step.latents,
        "timestep": step.timestep,
        "text": step.text,
        "text_mask": torch.ones(step.text.shape[:2], dtype=torch.int64, device=step.text.device),
        "fps": FPS,
        "height": manifest.shape.height,
        "width": manifest.shape.width,
    }
    return Original(step, module, arguments)


FAMILY = Family(
    title="Open-Sora",
    published={
        "open-sora": Published(
            files={
                "transformer/config.json": STDIT3,
                "vae/config.json": VAE,
                "text_encoder/config.json": T5_XXL,
            },
            dtype="fp16",
            sizes={
                "Open-Sora 480p": {"resolution": "480p", "duration": "2s"},
                "Open-Sora 720p": {"resolution": "720p", "duration": "2s"},
            },
            small={"head_dim": FUSED_HEAD_DIM, "text_tokens": 32},
        )
    },
    # a trained empty prompt, and 34 frames, which two stages of the decoder make
    example=Example("open-sora", sizes={"frames": 34}),
    write_random=write_random,
    original=original,
    load_original=load_original,
)
