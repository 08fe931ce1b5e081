"""What a step has cost: counters of the machine, prices, sums."""

import json

import pytest

from pipeline import ledger
from pipeline.energy import EnergyMeter
from pipeline.errors import ConfigError
from pipeline.settings.cost import CostSettings


def zone(folder, name, label, microjoules, top=10**9):
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "name").write_text(f"{label}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{top}\n")


def test_energy_is_that_of_packages_and_memory_and_nothing_twice(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1_000_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 100_000)
    zone(tmp_path, "intel-rapl:1", "psys", 50_000_000)
    meter = EnergyMeter(CostSettings(), tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 7_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 2_500_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 600_000)
    zone(tmp_path, "intel-rapl:1", "psys", 60_000_000)
    assert meter.joules(busy_seconds=100) == (2.5, 1.0)


def test_a_counter_that_began_anew_loses_nothing(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    meter = EnergyMeter(CostSettings(), tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 2_000_000)
    assert meter.joules(0)[0] == pytest.approx(3.0)


def test_without_a_counter_energy_is_an_estimate_and_says_so(tmp_path):
    meter = EnergyMeter(CostSettings(watts_per_core=12.0), tmp_path)
    assert meter.joules(busy_seconds=10) == (120.0, 0.0)
    assert ledger.source({"energy_joules": 120.0, "energy_measured_share": 0.0}) == "an estimate"


def test_a_counter_that_may_not_be_read_counts_as_none(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert EnergyMeter(CostSettings(), tmp_path).joules(1.0) == (10.0, 0.0)


def test_codecarbon_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "codecarbon", None)
    with pytest.raises(ConfigError, match="not installed"):
        EnergyMeter(CostSettings(energy="codecarbon"))


def test_a_kilowatt_hour_has_its_carbon_and_an_hour_its_price():
    settings = CostSettings(price_per_hour=3.0, grams_per_kwh=500)
    assert ledger.worth(1800, 3.6e6, settings) == {"carbon_grams": 500.0, "money": 1.5}
    assert "money" not in ledger.worth(1800, 1.0, CostSettings())


def test_busy_seconds_are_of_all_ranks_and_the_use_of_all_their_devices():
    meter = ledger.Meter(processes=4)
    sum(i * i for i in range(300_000))
    cost = meter.cost({"tokens": 10, "flops": 8e9, "peak_flops_per_second": 1e9, "none": None})
    own = cost["busy_seconds"] / 4
    assert 0 < own <= cost["seconds"] * 1.5 + 0.02
    assert cost["utilisation"] == pytest.approx(8e9 / (cost["seconds"] * 4e9), rel=0.3)
    assert "none" not in cost
    assert json.loads(json.dumps(cost)) == cost


def test_a_total_adds_takes_the_most_and_weighs_shares():
    rows = [
        {"seconds": 10, "tokens": 5, "peak_memory_bytes": 7, "utilisation": 0.5,
         "energy_joules": 30.0, "energy_measured_share": 1.0},
        {"seconds": 30, "peak_memory_bytes": 9, "utilisation": 0.1,
         "energy_joules": 10.0, "energy_measured_share": 0.0, "human_minutes": 12},
        {"seconds": 5},
    ]  # fmt: skip
    total = ledger.total(rows)
    assert total["seconds"] == 45
    assert total["tokens"] == 5
    assert total["peak_memory_bytes"] == 9
    assert total["utilisation"] == pytest.approx((0.5 * 10 + 0.1 * 30) / 40)
    assert total["energy_measured_share"] == 0.75
    text = ledger.line(total)
    assert "75% measured" in text
    assert "12 minutes of people" in text
    assert ledger.total([]) == {}


def test_numbers_are_short():
    assert [ledger.big(x) for x in (0.5, 999.0, 999_999.0, 1234567.0, 2.5e12)] == [
        "0.5",
        "999",
        "1 M",
        "1.23 M",
        "2.5 T",
    ]
    assert (ledger.big(999.0, "B"), ledger.big(4e9, "FLOP")) == ("999 B", "4 GFLOP")
