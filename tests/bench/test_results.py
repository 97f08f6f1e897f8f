"""Results become one row a case, and what is named on a command line becomes what is run."""

import xml.dom.minidom
from typing import Any

import pytest

from bench.contenders import with_references
from bench.matrix import Case, read_case
from scripts.measured import newest, picture, table


def row(name: str, step_s: float, ratio: float | None, **entries: Any) -> dict[str, Any]:
    return {"name": name, "step_s_median": step_s, "ratio_to_resident": ratio, "bit_equal": True, **entries}


def result(date: str, *rows: dict[str, Any], free_gib: float = 8.0, **entries: Any) -> dict[str, Any]:
    return {
        "machine": {"device": "card"},
        "family": "zimage",
        "size": "full",
        "free_gib": free_gib,
        "cfg": 1.0,
        "resolution": 1024,
        "batch": 1,
        "weights_gib": 11.5,
        "date": date,
        "contenders": list(rows),
        **entries,
    }


OLD = result("2026-01-01", row("resident", 0.2, 1.0), row("layerstream", 0.5, 2.5), row("dynamic", 0.6, 3.0))
NEW = result("2026-01-02", row("resident", 0.1, 1.0), row("layerstream", 0.11, 1.1))
OTHERS = result("2026-01-03", row("diffusers-group", 0.3, 1.5))


def test_the_newest_result_of_a_case_counts_and_is_completed_by_older_and_other_ones() -> None:
    (case,) = newest([OLD, NEW, OTHERS])
    times = {found["name"]: found["step_s_median"] for found in case["contenders"]}
    assert times == {"resident": 0.1, "layerstream": 0.11, "dynamic": 0.6, "diffusers-group": 0.3}
    assert case["date"] == "2026-01-02"


def test_cases_that_differ_are_kept_apart() -> None:
    cases = newest([OLD, result("2026-01-01", row("layerstream", 1.0, 2.0), free_gib=4.0), {**OLD, "cfg": 7.0}])
    assert [(case["free_gib"], case["cfg"]) for case in cases] == [(8.0, 1.0), (8.0, 7.0), (4.0, 1.0)]


def test_half_of_a_model_is_one_case_whatever_it_came_to() -> None:
    older = {**OLD, "free_gib": 7.281, "free_asked": "half", "resolution": "832x480x33"}
    newer = {**NEW, "free_gib": 7.294, "free_asked": "half", "resolution": "832x480x33"}
    (case,) = newest([older, newer])
    assert case["free_gib"] == 7.294
    line = table([case]).splitlines()[-1]
    assert "| Z-Image (11.5 GiB, 832x480x33) | 7.3 GiB (half) |" in line
    # One side and both sides of a square picture are the same case.
    assert len(newest([OLD, {**NEW, "resolution": "1024x1024", "free_asked": "8"}])) == 1


def test_the_table_gives_times_and_ratios_and_says_when_bits_differ() -> None:
    other = row("lowvram", 0.25, 2.5) | {"bit_equal": False}
    failed = {"name": "dynamic", "ran": True, "error": "out of memory"}
    heads, _, line = table(newest([result("2026-01-04", *NEW["contenders"], other, failed), OTHERS])).splitlines()
    assert "**LayerStream**" in heads and "mmgp" not in heads
    for cell in (
        "| 0.100 s |",
        "**0.110 s (1.10)**",
        "0.250 s (2.50), other bits",
        "| - |",
        "(1.50 of diffusers' own)",
    ):
        assert cell in line


def test_the_picture_is_well_formed_and_has_a_bar_for_each_time() -> None:
    results = newest([OLD, NEW, OTHERS])
    document = xml.dom.minidom.parseString(picture(results))
    bars = [node for node in document.getElementsByTagName("rect") if node.hasAttribute("x")]
    assert len(bars) == 4
    assert len({node.getAttribute("width") for node in bars}) == 4


def test_a_case_reads_as_family_memory_and_guidance() -> None:
    assert read_case("zimage:8") == Case("zimage", 8.0, 1.0)
    assert read_case("sdxl:2.5:7") == Case("sdxl", 2.5, 7.0)
    assert read_case("wan21-14b:half:6") == Case("wan21-14b", None, 6.0)
    for text in ("zimage", "unknown:8", "flux:8:1:1", "flux:much"):
        with pytest.raises(ValueError):
            read_case(text)


def test_another_librarys_reference_runs_before_what_is_compared_with_it() -> None:
    assert with_references(["resident", "layerstream"]) == ["resident", "layerstream"]
    assert with_references(["layerstream", "mmgp"]) == ["diffusers-resident", "layerstream", "mmgp"]
    named = ["diffusers-resident", "diffusers-group"]
    assert with_references(named) == named
