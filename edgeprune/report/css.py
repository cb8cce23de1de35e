"""The style of report.html: two palettes as variables, system fonts, one column that fits a phone."""

from __future__ import annotations

# The lines of a plot that have names. Four of them are dashed, so that no two differ by their color alone much.
SERIES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
LIGHT = {
    "ground": "#ffffff",
    "raised": "#f5f6f8",
    "ink": "#181b20",
    "muted": "#5b636e",
    "line": "#dde1e6",
    "dense": "#868f9b",
    "compressed": "#0b69a8",
    "good": "#17703f",
    "bad": "#b0271c",
    "other": "#949ca7",
    "first": "#0b69a8",
    "second": "#b65a00",
    "third": "#17703f",
    "fourth": "#7b3fb5",
    "fifth": "#b0287f",
    "sixth": "#00767a",
    "seventh": "#7a5a1e",
    "eighth": "#b0271c",
}
DARK = {
    "ground": "#14171b",
    "raised": "#1d2127",
    "ink": "#e7e9ec",
    "muted": "#a0a8b2",
    "line": "#333941",
    "dense": "#7d8793",
    "compressed": "#5fb2e8",
    "good": "#6cc793",
    "bad": "#f28b80",
    "other": "#66707c",
    "first": "#5fb2e8",
    "second": "#f0a04b",
    "third": "#6cc793",
    "fourth": "#b99af0",
    "fifth": "#f08cc8",
    "sixth": "#4fc9c4",
    "seventh": "#c9ad6a",
    "eighth": "#f28b80",
}


def _variables(palette: dict[str, str]) -> str:
    return "".join(f"--{name}:{color};" for name, color in palette.items())


def _series() -> str:
    colored = "".join(
        f".{name}.line{{stroke:var(--{name})}}.{name}.point{{fill:var(--{name})}}"
        for name in (*SERIES, "other")
    )
    dashed = ",".join(f".{name}.line" for name in SERIES[len(SERIES) // 2 :])
    return f"{colored}{dashed}{{stroke-dasharray:6 3}}"


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:66rem;background:var(--ground);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
h1{margin:.15rem 0 .4rem;font-size:1.8rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;overflow-wrap:anywhere}
h1 small{font-size:1em;font-weight:400;color:var(--muted)}
h2{margin:0 0 .9rem;font-size:1.1rem;font-weight:650}
h3{margin:1.4rem 0 .3rem;font-size:.9375rem;font-weight:550}
h2+h3{margin-top:0}
p{margin:0 0 .5rem}
section{margin-top:2.75rem;min-width:0}
.eyebrow,.facts,.fine,.absent,.legend,caption,dt{color:var(--muted);font-size:.875rem}
.eyebrow{margin:0}
.facts span:not(:last-child)::after{content:"\\00b7";margin:0 .5rem}
.absent{font-style:italic}
.summary{max-width:44rem;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1px;margin:0 0 1.5rem;
background:var(--line);border:1px solid var(--line);border-radius:6px;overflow:hidden}
.tiles>div{background:var(--ground);padding:.85rem 1rem}
.tiles dd{margin:0}
.tiles .big{font-size:1.45rem;font-weight:650;line-height:1.35;letter-spacing:-.01em}
.good{color:var(--good)}.bad{color:var(--bad)}
.notes{margin:0;padding:.8rem 1rem .8rem 2.1rem;background:var(--raised);border-left:3px solid var(--muted);
border-radius:0 6px 6px 0;overflow-wrap:anywhere}
.notes li+li{margin-top:.35rem}
.scroll{overflow:auto;position:relative;border-top:1px solid var(--line);border-bottom:1px solid var(--line)}
.scroll:focus-visible,pre:focus-visible,summary:focus-visible{outline:2px solid var(--compressed);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.9375rem}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.long{max-height:34rem}
th,td{padding:.5rem .75rem;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
th:first-child{padding-left:0}
thead th{position:sticky;top:0;z-index:1;background:var(--ground);border-top:0;color:var(--muted);font-size:.8125rem;
font-weight:500;white-space:nowrap;box-shadow:0 1px 0 var(--line)}
tbody tr:first-child>*{border-top:0}
tbody th{font-weight:550}
td .fine,th .fine{display:block;font-size:.8125rem;font-weight:400}
.number{text-align:right;white-space:nowrap}
.how{color:var(--muted);min-width:11rem}
h4{margin:1.1rem 0 .2rem;font-size:.875rem;font-weight:550}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem}
.legend i{display:inline-block;width:.8rem;height:.55rem;margin-right:.45rem;background:var(--dense)}
.legend .key{display:inline-block;margin-right:.45rem;vertical-align:middle}
.legend i.compressed{background:var(--compressed)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:0 2.5rem}
.plots{table-layout:fixed;font-size:.8125rem}
.plots th,.plots td{padding:.22rem 1rem .22rem 0;border-top:0;vertical-align:middle}
.plots thead th{padding-top:.45rem;padding-bottom:.45rem}
.plots thead th:first-child{width:30%}
.two .plots thead th:first-child{width:38%}
.plots .number{width:var(--numbers);padding-right:.25rem}
.plots tbody th{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;font-weight:400;direction:rtl;text-align:left}
.plots bdi{direction:ltr}
.ends{display:flex;justify-content:space-between}
svg{display:block;overflow:visible}
svg.clip{overflow:hidden}
svg.skyline{width:100%;height:84px;margin:.25rem 0 1rem}
.dense{fill:var(--dense)}.compressed{fill:var(--compressed)}
.skyline .dense{fill-opacity:.45}
.rule{stroke:var(--line)}
.curve{fill:none;stroke:var(--compressed);stroke-width:2;vector-effect:non-scaling-stroke}
.dense.curve{stroke:var(--dense);stroke-dasharray:5 3}
.guide{stroke:var(--compressed);stroke-dasharray:2 3}
.dense.guide{stroke:var(--dense)}
.dot{stroke:var(--ground);stroke-width:1.5}
.whisker{stroke:var(--compressed);stroke-width:1.5}
.chart text{fill:var(--muted);font-size:.75rem}
.axes{padding:.6rem 1.5rem 2.2rem 3rem}
.axes.lines{padding:.6rem 1rem 3rem 4rem}
.line{fill:none;stroke-width:2;vector-effect:non-scaling-stroke}
.other.line{stroke-width:1;stroke-opacity:.8}
.point{stroke:var(--ground);stroke-width:1}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr));gap:0 2rem}
.axes .fine{margin:2rem 0 -1.5rem -3rem}
details{border-top:1px solid var(--line)}
details:last-child{border-bottom:1px solid var(--line)}
summary{padding:.65rem 0;cursor:pointer;font-weight:550}
h3~details{border:0}
h3~details summary{padding:.2rem 0 .6rem;font-size:.875rem;font-weight:400;color:var(--muted)}
details .scroll,details pre{margin-bottom:1rem}
details table{font-size:.8125rem}
details td:not(:last-child),details th{white-space:nowrap}
details td:last-child{min-width:10rem}
details td.number:last-child{min-width:0}
pre{overflow:auto;max-height:34rem;padding:.9rem 1rem;background:var(--raised);border-radius:6px;
line-height:1.5}
pre,code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.8125rem}
@media(max-width:46rem){
body{padding:1.5rem 1rem 3rem}
h1{font-size:1.45rem}
.two{grid-template-columns:1fr}
.tiles{grid-template-columns:1fr 1fr}
.tiles .big{font-size:1.2rem}
.compare,.compare thead,.compare tbody,.plots,.plots thead,.plots tbody{display:block}
.compare{font-size:.8125rem}
.compare tr{display:grid;grid-template-columns:1.45fr 1fr 1.1fr 1.2fr;border-top:1px solid var(--line);padding:.5rem 0}
.compare th,.compare td{padding:0 0 0 .4rem;border:0;white-space:normal}
.compare th:first-child,.compare .how{padding-left:0}
.compare thead tr{border:0}
.compare thead th{box-shadow:none;white-space:nowrap}
.compare thead th:last-child,.compare .fine{display:none}
.compare .how{grid-column:1/-1;font-size:.8125rem}
.plots tr{display:grid;grid-template-columns:1fr var(--numbers);column-gap:1rem;padding:.25rem 0}
.plots th,.plots td,.plots thead th{padding:.1rem 0;width:auto}
.plots tbody th,.plots thead th:first-child{grid-column:1/-1}
.plots thead{position:sticky;top:0;z-index:1;background:var(--ground)}
.plots thead th{position:static;box-shadow:none}
}
@media print{.long,pre{max-height:none;overflow:visible}thead th{position:static}}
"""

CSS = (
    (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light]){{{_variables(DARK)}}}}}"
        f":root[data-theme=dark]{{color-scheme:dark;{_variables(DARK)}}}"
        ":root[data-theme=light]{color-scheme:light}"
    )
    + _RULES
    + _series()
)
