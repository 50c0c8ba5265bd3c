"""The sizes that Open-Sora 1.2 was trained on, and what may be asked for besides.

Aspects are height to width, so "9:16" lies and "16:9" stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....engines.errors import InvalidRequest
from ..base import ExportRequest, untrained
from .config import CHANNELS, VideoVAEConfig

RESOLUTIONS = ("144p", "240p", "360p", "480p", "720p")
# Height and width in pixels, at each of RESOLUTIONS.
ASPECTS: dict[str, tuple[tuple[int, int], ...]] = {
    "3:8": ((117, 312), (196, 522), (294, 784), (392, 1046), (588, 1568)),
    "9:21": ((125, 291), (210, 490), (314, 732), (420, 980), (628, 1466)),
    "12:25": ((133, 277), (222, 462), (332, 692), (444, 925), (666, 1388)),
    "1:2": ((135, 270), (226, 452), (340, 680), (452, 904), (678, 1356)),
    "9:17": ((139, 262), (232, 438), (350, 662), (466, 880), (698, 1318)),
    "27:50": ((141, 260), (236, 436), (352, 652), (470, 870), (706, 1306)),
    "9:16": ((144, 256), (240, 426), (360, 640), (480, 854), (720, 1280)),
    "5:8": ((151, 241), (252, 404), (380, 608), (506, 810), (758, 1212)),
    "2:3": ((156, 234), (262, 393), (392, 588), (522, 784), (784, 1176)),
    "3:4": ((166, 221), (276, 368), (416, 554), (554, 738), (832, 1110)),
    "1:1": ((192, 192), (320, 320), (480, 480), (640, 640), (960, 960)),
    "4:3": ((221, 165), (370, 278), (554, 416), (740, 555), (1108, 832)),
    "3:2": ((235, 156), (392, 262), (588, 392), (784, 522), (1176, 784)),
    "16:9": ((256, 144), (426, 240), (640, 360), (854, 480), (1280, 720)),
    "17:9": ((263, 139), (440, 232), (660, 350), (880, 466), (1320, 698)),
    "2:1": ((271, 135), (452, 226), (678, 340), (906, 454), (1358, 680)),
    "50:27": ((277, 132), (462, 222), (692, 332), (924, 444), (1386, 666)),  # Open-Sora's name for 25:12
}
DURATIONS = {"2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816}  # frames, at 24 a second
MAX_PIXELS = max(height * width for sizes in ASPECTS.values() for height, width in sizes)
MAX_FRAMES = max(DURATIONS.values())


@dataclass(frozen=True)
class VideoSize:
    """What is asked of the model: pixels and frames, whether or not they fill whole latents."""

    height: int
    width: int
    frames: int

    def latents(self, vae: VideoVAEConfig) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of the latents; pixels that do not fill one are left out of the video."""
        factor = vae.space_factor
        return CHANNELS, vae.latent_frames(self.frames), self.height // factor, self.width // factor


DEFAULT_SIZE = VideoSize(height=240, width=426, frames=51)


def preset_size(resolution: str, aspect: str) -> tuple[int, int]:
    """Height and width in pixels. Raises InvalidRequest for what is not in the table."""
    if resolution not in RESOLUTIONS:
        raise InvalidRequest(f"resolution: got {resolution!r}, expected one of {', '.join(RESOLUTIONS)}")
    if aspect not in ASPECTS:
        raise InvalidRequest(f"aspect: got {aspect!r}, expected one of {', '.join(ASPECTS)} (height to width)")
    return ASPECTS[aspect][RESOLUTIONS.index(resolution)]


def preset_frames(duration: str) -> int:
    """How many frames. Raises InvalidRequest for what is not in the table."""
    if duration not in DURATIONS:
        raise InvalidRequest(f"duration: got {duration!r}, expected one of {', '.join(DURATIONS)}")
    return DURATIONS[duration]


def video_size(request: ExportRequest, vae: VideoVAEConfig, default: VideoSize = DEFAULT_SIZE) -> VideoSize:
    """What a request asks for, by names or by numbers. Raises InvalidRequest, with the range that is allowed."""
    _refuse_both("resolution and aspect", (request.resolution, request.aspect), (request.height, request.width))
    _refuse_both("duration", (request.duration,), (request.frames,))
    if request.resolution is not None or request.aspect is not None:
        height, width = preset_size(
            "240p" if request.resolution is None else request.resolution,
            "9:16" if request.aspect is None else request.aspect,
        )
    else:
        height, width = request.height or default.height, request.width or default.width
    frames = request.frames or default.frames
    if request.duration is not None:
        frames = preset_frames(request.duration)
    for name, side in (("height", height), ("width", width)):
        if side < vae.space_factor:
            raise InvalidRequest(f"{name}: got {side}, expected {vae.space_factor} pixels or more")
    if height * width > MAX_PIXELS:
        raise InvalidRequest(
            f"height and width: got {height} x {width}, expected at most {MAX_PIXELS} pixels, as 720p has"
        )
    chunk = vae.micro_frame_size
    if frames > MAX_FRAMES or (frames > chunk and frames % chunk):
        raise InvalidRequest(
            f"frames: got {frames}, expected 1 to {chunk}, or a multiple of {chunk} up to {MAX_FRAMES}, the chunks "
            "that the VAE decodes"
        )
    return VideoSize(height, width, frames)


def size_cautions(size: VideoSize, trained: VideoSize | None) -> tuple[str, ...]:
    """What a checkpoint was not trained on: any size but `trained`, or where that is None, any that is in no table."""
    if trained is not None:
        return tuple(
            caution
            for name in ("height", "width", "frames")
            for caution in untrained(name, getattr(size, name), getattr(trained, name))
        )
    sides = {sides for sizes in ASPECTS.values() for sides in sizes}
    known = () if (size.height, size.width) in sides else (_no_row("resolution", f"{size.height} x {size.width}"),)
    return known + (() if size.frames in (1, *DURATIONS.values()) else (_no_row("duration", f"{size.frames} frames"),))


def _no_row(table: str, got: str) -> str:
    return f"{table}: {got} is in no table of what the checkpoint was trained on; videos may be torn or drift apart"


def _refuse_both(presets: str, names: tuple[object, ...], numbers: tuple[object, ...]) -> None:
    if any(name is not None for name in names) and any(number is not None for number in numbers):
        given = "frames" if presets == "duration" else "height and width"
        raise InvalidRequest(f"{presets}: got {given} as well, expected one or the other; leave one out")
