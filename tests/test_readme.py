"""The README's example runs, and prints what it says."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_runs(capsys):
    text = README.read_text()
    section = text[text.index("<!-- example:begin") : text.index("<!-- example:end -->")]
    code = re.search(r"```python\n(.*?)```", section, re.S).group(1)
    exec(compile(code, "README.md", "exec"), {})
    bits, difference = (float(line) for line in capsys.readouterr().out.split())
    assert bits == 3.25
    assert 0 < difference < 1
