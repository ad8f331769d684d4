"""The benchmark of generation: both sides say the same, every figure is there and means what its name says."""

import importlib
import json

import pytest

from command_line import EXIT_DONE, run

benchmark = importlib.import_module("benchmarks.generation")


def test_both_sides_say_the_same_and_all_figures_are_there(capsys):
    assert run(benchmark.main, ["--frames", "2", "--rounds", "1", "--together", "2", "--json"]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["sides"]) == {"ours", "int8"}
    assert found["sides"]["ours"]["equal_frames"] == 1.0 and found["sides"]["int8"]["speedup"] > 0
    assert found["peak_memory_mib"] > 100
    many = found["together"]
    assert many["conversations"] == 2 and many["equal_frames"] == 1.0
    assert many["speedup"] == pytest.approx(many["peer_ms_per_frame"] / many["ms_per_frame"])
    assert found["speedup"] == pytest.approx(found["peer_ms_per_frame"] / found["ms_per_frame"])
    assert found["real_time_factor"] == pytest.approx(found["ms_per_frame"] / 80)
    assert found["floor_ms_per_frame"] > 0 and 1 < found["gigabytes_per_s"] < 10_000
    for name, whole in found["with_additions_and_codec"].items():
        assert min(whole["first_audio_ms"], whole["real_time_factor"]) > 0
        assert whole.get("together_ratio", 0) > 0 or "acoustic frames" in name


@pytest.mark.parametrize("flag", ["--frames", "--rounds", "--threads", "--together"])
def test_counts_of_none_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([flag, "0"])
    assert "must be at least 1" in capsys.readouterr().err
