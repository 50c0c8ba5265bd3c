"""Every setting is a point of every panel's mean and worst."""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks.curves import draw

SVG = "{http://www.w3.org/2000/svg}"


def test_every_setting_is_two_points_and_every_policy_two_lines_a_panel() -> None:
    rows = [
        {
            "setting": f"forecast {skipped}",
            "skipped_percent": skipped,
            "mean_psnr_db": 99.0 - skipped,
            "worst_psnr_db": 40.0,
        }
        for skipped in (50.0, 30.0)
    ]
    picture = ElementTree.fromstring(draw({"one": rows, "other": [*rows, rows[0] | {"setting": "schedule 20"}]}))
    titles = [title.text for title in picture.iter(f"{SVG}title")]
    assert titles[:4] == [
        "forecast 30.0: 30.0 %, 69.0 dB",
        "forecast 50.0: 50.0 %, 49.0 dB",
        "forecast 30.0: 30.0 %, 40.0 dB",
        "forecast 50.0: 50.0 %, 40.0 dB",
    ]
    assert len(titles) == 10
    heights = [float(circle.attrib["cy"]) for circle in picture.iter(f"{SVG}circle")]
    assert heights[0] < heights[1] < heights[2] == heights[3], "better is higher"
