"""The models that can be exported, one row each; read without torch, as a command line's help and messages want."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ..engines.errors import InvalidRequest
from ..engines.manifest import Defaults, Manifest, PolicyProfile

REPOSITORY = Path(__file__).parents[1]
TUNED = REPOSITORY / "benchmarks" / "results"


@dataclass(frozen=True)
class Model:
    """A name users type: its family's module, the checkpoint exported unless another is given, a request's defaults.

    The checkpoint is a folder, a hub id, or where each of its components is published, see find_checkpoint. `presets`
    tells users of the fields of an ExportRequest that name rows of the family's tables of sizes, if it has any. `tuned`
    is the file in a clone that has the profiles which were tuned for the checkpoint at its own sizes. Where several
    transformers take turns, `later_guidances` are those of the others by default.
    """

    family: str
    checkpoint: str | Mapping[str, str]
    defaults: Defaults
    presets: Mapping[str, str] = field(default_factory=dict)
    tuned: Path | None = None
    later_guidances: tuple[float, ...] = ()

    @property
    def comes_with_a_clone(self) -> bool:
        """Whether the checkpoint is a folder beside the package, which an installed one lacks; as the demos' are."""
        return isinstance(self.checkpoint, str) and Path(self.checkpoint).is_absolute()

    @property
    def can_be_had(self) -> bool:
        """Whether there is one to export: a published one, or one beside the package."""
        return not self.comes_with_a_clone or Path(str(self.checkpoint)).is_dir()

    def profiles(self) -> tuple[PolicyProfile, ...]:
        """Those that were tuned for it, if any were."""
        if self.tuned is None or not self.tuned.is_file():
            return ()
        return msgspec.json.decode(self.tuned.read_bytes(), type=_Tuned).profiles


class _Tuned(msgspec.Struct):
    """Of what benchmarks/tuned.py records."""

    profiles: tuple[PolicyProfile, ...]


COGVIDEOX = Defaults(
    prompt="a panda playing a guitar by a stream in a bamboo forest",
    negative_prompt="",
    steps=50,
    guidance=6.0,
    fps=8,
)
WAN = Defaults(
    prompt="a red fox running through fresh snow at the edge of a forest",
    negative_prompt="",
    steps=50,
    guidance=5.0,
    fps=16,
)
DEMO = Defaults(prompt="a red circle moving right", negative_prompt="", steps=50, guidance=2.0, fps=8)
OPEN_SORA_PRESETS = {
    "resolution": "Open-Sora: 144p to 720p, instead of height and width.",
    "aspect": "Open-Sora: height to width, such as 9:16.  [default: 9:16]",
    "duration": "Open-Sora: 2s, 4s, 8s or 16s, instead of frames.",
}
REGISTRY = {
    "latte": Model(
        family="latte",
        checkpoint="maxin-cn/Latte-1",
        defaults=Defaults(
            prompt="a dog in astronaut suit and sunglasses floating in space",
            negative_prompt="",
            steps=50,
            guidance=7.5,
            fps=8,
        ),
    ),
    "cogvideox-2b": Model(
        family="cogvideox",
        checkpoint="zai-org/CogVideoX-2b",
        defaults=COGVIDEOX,
    ),
    "cogvideox-5b": Model(
        family="cogvideox",
        checkpoint="zai-org/CogVideoX-5b",
        defaults=COGVIDEOX,
    ),
    "open-sora": Model(
        family="open_sora",
        # STDiT3 and its VAE are published apart, and their text encoder, T5-v1.1-XXL, only as a pickle; Latte-1 comes
        # with the same one as safetensors
        checkpoint={
            "transformer": "hpcai-tech/OpenSora-STDiT-v3",
            "vae": "hpcai-tech/OpenSora-VAE-v1.2",
            "text_encoder": "maxin-cn/Latte-1/text_encoder",
            "tokenizer": "maxin-cn/Latte-1/tokenizer",
        },
        defaults=Defaults(
            prompt="a waterfall in a green forest, seen from above",
            negative_prompt="",
            steps=30,
            guidance=7.0,
            fps=24,
        ),
        presets=OPEN_SORA_PRESETS,
    ),
    "wan-1.3b": Model(
        family="wan",
        checkpoint="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        defaults=WAN,
    ),
    "wan-14b": Model(
        family="wan",
        checkpoint="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        defaults=WAN,
    ),
    "wan-a14b": Model(
        family="wan",
        checkpoint="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        defaults=msgspec.structs.replace(WAN, steps=40, guidance=4.0),
        later_guidances=(3.0,),
    ),
    "wan-ti2v-5b": Model(
        family="wan",
        checkpoint="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        defaults=msgspec.structs.replace(WAN, fps=24),
    ),
    "latte-demo": Model(
        family="latte",
        checkpoint=str(REPOSITORY / "demo" / "latte"),
        defaults=DEMO,
        tuned=TUNED / "tuned_latte.json",
    ),
    "cogvideox-demo": Model(
        family="cogvideox",
        checkpoint=str(REPOSITORY / "demo" / "cogvideox"),
        defaults=DEMO,
        tuned=TUNED / "tuned_cogvideox.json",
    ),
    "open-sora-demo": Model(
        family="open_sora",
        checkpoint=str(REPOSITORY / "demo" / "open_sora"),
        defaults=msgspec.structs.replace(DEMO, steps=30, fps=24),
        presets=OPEN_SORA_PRESETS,
        tuned=TUNED / "tuned_open_sora.json",
    ),
    "wan-demo": Model(
        family="wan",
        checkpoint=str(REPOSITORY / "demo" / "wan"),
        defaults=DEMO,
        tuned=TUNED / "tuned_wan.json",
    ),
}


def find_model(name: str) -> Model:
    """The registry row of a model name. Raises InvalidRequest."""
    here = {known: row for known, row in REGISTRY.items() if row.can_be_had}
    if name in here:
        return here[name]
    if name in REGISTRY:
        raise InvalidRequest(
            f"model: got {name!r}, whose checkpoint comes with a clone of the repository and not with an installed "
            f"package, expected one of {', '.join(here)}"
        )
    raise InvalidRequest(f"model: got {name!r}, expected one of {', '.join(here)}")


def checkpoint_of(manifest: Manifest) -> str | None:
    """The checkpoint that a bundle was exported from: a folder, or a hub id.

    None where it cannot be told: a manifest holds a folder's name and not where it lies. Those of a clone are known.
    """
    model, source = REGISTRY.get(manifest.model), manifest.source.checkpoint
    known = model.checkpoint if model is not None and model.can_be_had else None
    if isinstance(known, str) and source in (known, Path(known).name):
        return known
    return source if manifest.source.revision is not None else None
