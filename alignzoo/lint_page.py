"""The findings of `alignzoo data lint` as one HTML file, with the texts of the worst rows. It loads nothing."""

from __future__ import annotations

from pathlib import Path

from alignzoo.data.lint import LintReport
from alignzoo.data.sources import display
from alignzoo.errors import DataError

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>alignzoo data lint</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3em .6em; border-bottom: 1px solid #8886; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.4 ui-monospace, monospace; }
dt { float: left; clear: left; width: 7em; color: #777; }
dd { margin-left: 7em; }
summary { cursor: pointer; }
.error { color: #b00; } .warning { color: #a60; } .note { color: #777; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } .error { color: #f77; }
  .warning { color: #fb5; } }
</style>
</head>
<body>
<h1>alignzoo data lint</h1>
<ul>
{% for s in report.sources %}
<li>{{ s.path }}: {{ s.rows }} rows, {{ s.usable }} usable, of format {{ s.format }} ({{ s.kind }})
{%- if s.held_out %}, held out{% endif %}
{%- if s.unused %}; columns not used: {{ s.unused | join(", ") }}{% endif %}</li>
{% endfor %}
<li>{{ report.held_out }}</li>
{% if not report.tokens %}<li>templates, tokens and lengths were not looked at</li>{% endif %}
</ul>
<table>
<tr><th>severity</th><th>finding</th><th>rows</th><th>share</th><th>what</th></tr>
{% for f in report.findings %}
<tr><td class="{{ f.severity }}">{{ f.severity }}</td><td><a href="#f{{ loop.index }}">{{ f.id }}</a></td>
<td>{{ f.count }} of {{ f.of }}</td><td>{{ "%.1f" | format(100 * f.share) }} %</td><td>{{ f.what }}</td></tr>
{% endfor %}
</table>
{% for f in report.findings %}
<h2 id="f{{ loop.index }}"><span class="{{ f.severity }}">{{ f.severity }}</span> {{ f.id }}</h2>
<p>{{ f.count }} of {{ f.of }}: {{ f.what }}{% if f.detail %}. {{ f.detail }}{% endif %}</p>
<dl>
{% if f.causes %}<dt>in training</dt><dd>{{ f.causes }}</dd>{% endif %}
{% if f.fix %}<dt>to do</dt><dd>{{ f.fix }}</dd>{% endif %}
</dl>
{% for row in f.rows %}
<details><summary>{{ row.where }}{% if row.detail %}: {{ row.detail }}{% endif %}</summary>
<table>{% for name, text in row.texts.items() %}<tr><th>{{ name }}</th><td><pre>{{ text }}</pre></td></tr>{% endfor %}
</table></details>
{% endfor %}
{% endfor %}
</body>
</html>
"""


def write_page(report: LintReport, path: Path) -> None:
    """Writes the page. What stands in rows is escaped. Raises DataError where the file cannot be written."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE).render(report=report)
    try:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DataError(f"{display(path)}: cannot be written", why=str(error)) from error
