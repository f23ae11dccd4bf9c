"""The page's style: colours of both schemes as CSS variables, and the little that a report needs.

Scope: CSS. Tables keep their first column in sight while they scroll; plots and cards form as many columns as fit.
Not here: what the colours are (`palette`).
"""

from __future__ import annotations

from normtune.reporting.palette import LEVELS, scheme


def style() -> str:
    light, dark = variables("light"), variables("dark")
    levels = ", ".join(f"var(--h{i})" for i in range(LEVELS))
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f".scale i {{ background: linear-gradient(to right, {levels}); }}\n{RULES}"
    )


def variables(name: str) -> str:
    return " ".join(f"--{key}: {value};" for key, value in scheme(name).items())


RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; color: var(--ink);
  background: var(--paper); margin: 0 auto; max-width: 78rem; padding: 1rem clamp(1rem, 3vw, 2rem) 4rem;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .5rem 0; } ul { padding-left: 1.2rem; }
.lead { font-size: 1.06rem; color: var(--muted); }
.note { border-left: 4px solid var(--accent); padding-left: .8rem; }
.caption, figcaption { color: var(--muted); font-size: .88rem; max-width: 46rem; margin: .5rem 0 0; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0; font-size: .93rem; }
nav a { padding: .15rem 0; }

.wide { overflow-x: auto; max-width: 100%; margin: .8rem 0 .2rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .38rem .6rem; text-align: left; vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; font-size: .85rem; vertical-align: bottom;
  border-bottom: 2px solid var(--line); }
th[scope=row] { font-weight: 500; position: sticky; left: 0; background: var(--paper); min-width: 7rem;
  padding-left: .1rem; }
thead th:first-child { position: sticky; left: 0; background: var(--paper); padding-left: .1rem; }
.number { text-align: right; white-space: nowrap; }
tbody small { display: block; font-weight: 400; color: var(--muted); font-size: .78rem; white-space: nowrap; }
.group th { padding: 1rem .1rem .3rem; color: var(--muted); font-size: .85rem; font-weight: 600; }
.group span { position: sticky; left: 0; }
.best { font-weight: 700; color: var(--good); } .told { font-weight: 700; }
.good { font-weight: 600; color: var(--good); }
.bad { font-weight: 600; color: var(--bad); } td .quiet { background: none; color: var(--muted); }

figure { margin: 1rem 0 1.6rem; }
.panels { display: grid; gap: 1.1rem 1.4rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.small-panels { grid-template-columns: repeat(auto-fill, minmax(min(45%, 8.6rem), 1fr)); gap: .8rem; }
.wide-panels { grid-template-columns: 1fr; } .wide-panels svg { max-width: 31rem; }
svg { display: block; width: 100%; height: auto; max-width: 27rem; overflow: visible; font-family: inherit; }
.small-panels svg { max-width: 15rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .6rem 0 0; font-size: .88rem; }
.legend b { margin-right: .4em; }
.scale { display: flex; align-items: center; gap: .5rem; font-size: .88rem; margin: .6rem 0 0; flex-wrap: wrap; }
.scale i { width: 9rem; height: .8rem; border: 1px solid var(--line); } .scale span { color: var(--muted); }

.card { display: flex; flex-wrap: wrap; gap: 1rem; border-top: 1px solid var(--line); padding: 1rem 0; }
h2 + .card { border-top: 0; padding-top: .4rem; }
.card img { width: 12rem; max-width: 100%; align-self: flex-start; border-radius: 4px; image-rendering: auto; }
.card > div { flex: 1 1 17rem; min-width: 0; } .card h3 { margin: 0 0 .4rem; white-space: pre-line; }
.card .wide { margin-top: 0; } .card td { overflow-wrap: anywhere; min-width: 9rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--raised); border-radius: 4px;
  padding: .7rem .9rem; font-size: .86rem; line-height: 1.45; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; line-height: 1.9; max-width: none; }
.tokens span, .tokens b { border-left: 1px solid var(--line); padding: .1rem .22em; font-weight: 400; }
.tokens b { color: var(--good); text-decoration: underline; background: var(--raised); }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); font-size: .92rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

@media (max-width: 40rem) {
  .stacked thead { display: none; }
  .stacked table, .stacked tbody, .stacked tr, .stacked th, .stacked td { display: block; width: 100%; }
  .stacked tr { border-bottom: 1px solid var(--line); padding: .6rem 0; }
  .stacked th, .stacked td { border: 0; padding: .12rem 0; text-align: left; white-space: normal; position: static; }
  .stacked th[scope=row] { font-weight: 600; }
  .stacked td[data-column]::before { content: attr(data-column) ": "; color: var(--muted); }
  th[scope=row] { min-width: 6.6rem; max-width: 7.6rem; overflow-wrap: anywhere; }
  th, td { padding-left: .4rem; padding-right: .5rem; }
  .stacked th[scope=row] { max-width: none; }
  .card img { width: 9rem; }
}
@media print { body { max-width: none; } details { display: block; } nav { display: none; } }
"""
