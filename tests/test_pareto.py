"""Bytes against KL: who is on the front, and a drawing that holds every point."""

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
from tools.pareto import Point, front, joined, plot, points_of, table


def point(megabytes: float, kl: float, name: str = "x") -> Point:
    return Point(name, "declared", megabytes, kl, kl * 0.9, kl * 1.1, 25.0, 0.8)


def row(name: str, megabytes: float, kl: float, mode: str = "declared") -> dict[str, object]:
    return {
        "name": name,
        "mode": mode,
        "megabytes": megabytes,
        "kl_mean": kl,
        "kl_interval": None,
        "perplexity": 25.0,
        "top1_agreement": 0.8,
    }


RESULTS = {
    "rows": [
        row("fp8", 163.1, 0.014),
        row("max", 133.9, 0.15),
        row("best <of> & all", 133.9, 0.09),
        row("everywhere", 116.5, 0.39),
        row("max", 133.9, 0.09, "weight_only"),
    ]
}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_the_front_beats_all_others_and_nobody_in_it(pairs: list[tuple[int, int]]) -> None:
    points = sorted(point(m, k) for m, k in pairs)
    best = front(points)
    assert best
    for one in points:
        is_beaten = any(
            (o.megabytes <= one.megabytes and o.kl < one.kl)
            or (o.megabytes < one.megabytes and o.kl <= one.kl)
            for o in best
        )
        assert is_beaten == (one not in best)


def test_a_later_run_replaces_a_checkpoint_and_adds_others() -> None:
    runs = [[point(2, 0.2, "a"), point(3, 0.1, "b")], [point(2, 0.15, "a"), point(2, 0.05, "c")]]
    assert [(p.name, p.kl) for p in joined(runs)] == [("c", 0.05), ("a", 0.15), ("b", 0.1)]


def test_the_table_marks_the_front_of_each_mode() -> None:
    lines = table(RESULTS, ["declared", "weight_only"]).splitlines()[2:]
    assert [line.startswith("| **") for line in lines] == [True, True, False, True, True]
    assert "0.0900" in lines[1] and "133.9" in lines[1]


def test_the_drawing_is_a_file_of_its_own_and_holds_every_point() -> None:
    drawn = plot(points_of(RESULTS, "declared"), title="a title")
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 4
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < width and 0 < float(circle.attrib["cy"]) < height
    assert any("best <of> & all" in (text.text or "") for text in root.iter() if text.text)
    assert plot([], title="nothing") == ""
    assert "133.9" in plot([point(133.9, 0.1)], title="one")
