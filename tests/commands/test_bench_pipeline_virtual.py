from __future__ import annotations

from fedsys.commands.bench import pipeline_virtual


def test_ratios_stay_below_what_the_busiest_resource_allows():
    figures = pipeline_virtual.run(
        None,
        {
            "models": ["vgg5", "vgg11"], "networks": ["4g", "wifi"], "machines": ["pi3"],
            "servers": ["edge_gpu"], "examples": 200,
        },
    )  # fmt: skip
    assert figures["cases"] == len(figures["rows"]) == 8
    for row in figures["rows"]:
        assert 1.0 <= row["iteration_ratio"] <= row["most"] * 1.001
        assert row["auto_s"] <= row["splitfed_s"] * 1.02
    ratio = {(r["model"], r["network"], r["codec"]): r["ratio"] for r in figures["rows"]}
    assert ratio["vgg5", "wifi", "fp32"] > ratio["vgg5", "4g", "fp32"]
    assert ratio["vgg11", "wifi", "int8"] > ratio["vgg11", "wifi", "fp32"] > 34.6
    assert "above 34.6 in" in figures["why"]
    chart = pipeline_virtual.chart(figures)
    assert chart.labels == ["vgg5", "vgg11"] and set(chart.series) == {"4g, pi3", "wifi, pi3"}
