"""Rows of a survey: judged once, kept, and judged again when asked."""

from survey_rows import arguments, judged, write_page


def test_a_survey_goes_on_where_it_was_stopped(tmp_path, capsys):
    def run(*flags: str) -> list[int]:
        given = arguments("", tmp_path / "rows.jsonl").parse_args([*flags])
        return [row["number"] for row in judged(["a:x", "b:x", "b:y"], given, judge, lambda row: row["row"])]

    def judge(name: str) -> dict:
        asked.append(name)
        return {"row": name, "date": "today", "number": len(asked)}

    asked: list[str] = []
    assert run("*:x") == [1, 2] and run() == [1, 2, 3] and asked == ["a:x", "b:x", "b:y"]
    assert run("b:y", "--again") == [1, 2, 4] and run("--again", "--page") == [1, 2, 4]
    assert capsys.readouterr().out.split() == ["a:x", "b:x", "b:y", "b:y"]


def test_a_page_makes_its_folder(tmp_path):
    write_page(tmp_path / "docs" / "page.md", "# Page\n")
    assert (tmp_path / "docs" / "page.md").read_text() == "# Page\n"
