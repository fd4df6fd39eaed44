"""What the page on the input says of a GPU's demand is computed from its own tables."""

import re

import pytest

from benchmarks.input_ceiling import CORES, PAGE, rates, section

TEXT = PAGE.read_text()


def test_rates_are_those_of_the_tables():
    found = rates(TEXT)
    assert list(found) == ["Receipts", "Photographs"]
    for kind, rate in found.items():
        assert f"| **here**, uint8 | {rate:.0f} |" in TEXT.split(f"## {kind}\n")[1].split("\n## ")[0]


def test_a_page_without_its_tables_is_one_line():
    with pytest.raises(SystemExit, match=r"run python -m benchmarks\.input_pipeline"):
        rates("# Speed of the input")


def test_supply_over_demand_is_that_of_all_cores():
    text = section({"Receipts": 100.0, "Photographs": 50.0}, {"large": 20.0, "small": 1000.0})
    assert f"at most {CORES * 100:,} receipts or {CORES * 50} photographs" in text
    assert "| large | 20.0 | 0.2, 0.4 | 80.0x, 40.0x |" in text
    assert "| small | 1000.0 | 10.0, 20.0 | 1.6x, 0.8x |" in text
    assert "the input is short of some of these; the least is 0.8 times" in text


def test_the_page_has_the_section_of_its_own_figures():
    shown = TEXT.split("<!-- ceiling -->\n")[1].split("\n<!-- end of ceiling -->")[0]
    taken = {
        name: float(demand) for name, demand in re.findall(r"^\| ([^|]*?) \| ([\d.]+) \| .* \| .* \|$", shown, re.MULTILINE)
    }
    assert len(taken) == 4
    assert section(rates(TEXT), taken) == shown
