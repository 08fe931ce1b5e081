"""The arithmetic of the benchmarks: ratios, intervals, FLOPs and the table, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks.__main__ import Benchmark, Result, last_line, page, run
from tests.benchmarks.common import Interval, Seconds, interleave, json_line, paired_ratio, table
from tests.benchmarks.limits import forward_flops, matmul_peak


def test_the_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians() -> None:
    # ratios 4, 2, 0.5: the median of the peer over the median of ours would be 1
    found = paired_ratio(Seconds(ours=[1.0, 1.0, 4.0], peer=[4.0, 2.0, 2.0]))
    assert found == Interval(2.0, 0.5, 4.0)


@pytest.mark.parametrize(
    ("pairs", "low", "high"),
    # the classic table of 95 % intervals of a median
    [(1, 1, 1), (5, 1, 5), (6, 1, 6), (8, 1, 8), (9, 2, 8), (12, 3, 10), (15, 4, 12), (20, 6, 15)],
)
def test_the_interval_is_that_of_order_statistics(pairs: int, low: int, high: int) -> None:
    found = paired_ratio(Seconds([1.0] * pairs, [float(i + 1) for i in range(pairs)]))
    assert (found.low, found.high) == (low, high)
    assert found.ratio == (pairs + 1) / 2


def test_the_sides_take_turns_at_going_first() -> None:
    called = []
    now = iter(range(100))
    seconds = interleave(
        lambda: called.append("ours"),
        lambda: called.append("peer"),
        3,
        clock=lambda: float(next(now)),
    )
    assert called == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert seconds == Seconds([1.0] * 3, [1.0] * 3)


def test_the_line_holds_what_a_reader_needs() -> None:
    line = json_line("rollout", Interval(1.98765, 1.9, 2.1))
    assert json.loads(line) == {"benchmark": "rollout", "ratio": 1.988, "low": 1.9, "high": 2.1}


def test_columns_are_aligned() -> None:
    found = table(("side", "s"), [("ours", "1.5"), ("the peer", "10.25")])
    assert found.splitlines() == [
        "| side     |     s |",
        "|----------|------:|",
        "| ours     |   1.5 |",
        "| the peer | 10.25 |",
    ]


def test_flops_of_a_forward_by_hand() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    # attention 4 x 8 x 8, feed-forward 3 x 8 x 24 in each layer; the table of 50 x 8 is looked up
    body, head = 2 * (4 * 64 + 3 * 192), 50 * 8
    # rows of 3 and 1 tokens: 6 + 1 pairs of a token and one it sees
    pairs = 4 * 8 * 2 * 7
    assert forward_flops(llama, [3, 1]) == 2 * 4 * body + 2 * 4 * head + pairs
    assert forward_flops(llama, [3, 1], head_positions=2) == 2 * 4 * body + 2 * 2 * head + pairs
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=50))
    # 4 x 8 x 8 for attention, 2 x 8 x 32 for the feed-forward
    assert forward_flops(gpt2, [3, 1], 0) == 2 * 4 * 2 * (256 + 512) + pairs


def test_the_peak_is_that_of_a_computer() -> None:
    assert 1e8 < matmul_peak("fp32", size=256, seconds=0.05) < 1e14


def test_failed_and_missed_benchmarks_stand_in_the_table() -> None:
    def result(line: dict[str, float] | None, problem: str, aim: float | None = 2.0) -> Result:
        return Result(Benchmark("b", "m", (), 1.7, aim), "python", "said\n", line, problem, 1.0)

    good = {"ratio": 2.1, "low": 2.0, "high": 2.2}
    text = page(
        [
            result(good, ""),
            result({**good, "ratio": 1.8}, ""),
            result({**good, "ratio": 1.6}, ""),
            result(None, "failed with exit code 1"),
        ],
        60.0,
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    verdicts = [row[-1] for row in rows if row[:1] == ["b"]]
    assert verdicts == ["reached", "reached, below the aim", "MISSED", "failed with exit code 1"]
    assert text.count("said") == 4


def test_the_last_line_is_the_result_and_nothing_else_is() -> None:
    line = '{"benchmark": "b", "ratio": 1.5, "low": 1.4, "high": 1.6}'
    found = last_line(f"table\n{line}\n")
    assert found is not None
    assert found["ratio"] == 1.5
    for output in ("", f"{line}\ntable", "[1]", '{"benchmark": "b"}'):
        assert last_line(output) is None


def test_a_benchmark_that_is_missing_or_takes_too_long_is_reported() -> None:
    late = run(Benchmark("b", "rollout"), limit=0.01)
    assert (late.line, late.problem) == (None, "took longer than 0 s")
    missing = run(Benchmark("b", "no_such_benchmark"), limit=60)
    assert (missing.line, missing.problem) == (None, "failed with exit code 1")


def test_the_whole_command_runs_what_is_named_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, float] = {}

    def run(benchmark: Benchmark, limit: float) -> Result:
        limits[benchmark.name] = limit
        line = {"ratio": 2.0, "low": 1.9, "high": 2.1}
        return Result(benchmark, "python -m it", "said\n", line, "", 1.0)

    monkeypatch.setattr(benchmarks, "run", run)
    with pytest.raises(SystemExit) as ended:
        benchmarks.main(["rollout", "scale", "--page", str(tmp_path / "page.md"), "--minutes", "5"])
    assert not ended.value.code
    assert list(limits) == ["rollout", "scale"]
    assert max(limits.values()) <= 300
    assert "| rollout" in (tmp_path / "page.md").read_text()
    with pytest.raises(SystemExit) as ended:
        benchmarks.main(["rolout"])
    assert ended.value.code == 2
