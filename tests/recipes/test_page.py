import math
import re

import pandas as pd
from matplotlib.figure import Figure

from recipes.reporting.page import Section, render


def test_the_page_holds_everything_and_refers_to_nothing():
    figure = Figure()
    figure.add_subplot().plot([0, 1])
    table = pd.DataFrame({"name": ["a & b", "<i>"], "value": [1.23456789, math.nan]})
    html = render(
        "Title <x>", ["first & second"], [Section("One", ["text"], table), Section("Two", (), None, figure, "c")]
    )
    assert "Title &lt;x&gt;" in html
    assert "first &amp; second" in html
    assert "a &amp; b" in html
    assert "&lt;i&gt;" in html
    assert "1.235" in html
    assert "–" in html
    assert re.findall(r'src="([^"]{0,30})', html) == ["data:image/png;base64,iVBORw0K"]
    assert not re.search(r"<link|<script|https?://|@import", html)


def test_lists_lines_to_sign_on_and_long_texts_have_their_place():
    table = pd.DataFrame({"short": ["x"], "long": ["a sentence that is much too long for one line of a table"]})
    people = (("Author", "Ada <x>"), ("Reviewer", None))
    html = render("T", [], [Section("One", table=table, items=["first & second"], signatures=people)])
    assert "<li>first &amp; second</li>" in html
    assert "Author: <b>Ada &lt;x&gt;</b>" in html
    assert "Reviewer: <b></b>" in html
    assert re.findall(r"<t[hd]( class=\"prose\")?>(short|long|x|a sentence)", html) == [
        ("", "short"),
        (' class="prose"', "long"),
        ("", "x"),
        (' class="prose"', "a sentence"),
    ]
