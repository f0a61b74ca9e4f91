"""The live page as HTML and style: empty places that the script fills; nothing from elsewhere."""

from __future__ import annotations

from typing import Final

from fedsys.runs.report.style import CSS

_HEAD: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{}</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="page.css">
<script src="page.js" defer></script></head>
<body><main>
<h1><span id="name">…</span> <span id="status" class="badge" role="status">connecting</span></h1>
<p class="muted" id="chosen"></p>
<p id="error" class="error" hidden></p>
"""

PAGE: Final = (
    _HEAD.format("fedsys")
    + """<progress id="progress" max="1" value="0" aria-label="rounds done"></progress>
<div class="cards" id="cards"></div>
<section aria-label="Devices and edge servers">
<h2>Devices and edge servers</h2>
<figure class="panel"><div id="map"></div>
<p class="muted small">Green around a device: its share of the work. Below it: the last unit that it
trains, and the rate of its link to the edge server.</p>
<p id="chosen-device" class="small" aria-live="polite">Choose a device, with the mouse or with Tab,
to see what was decided for it and why.</p></figure>
</section>
<section aria-label="Curves"><h2>Curves</h2><div class="grid2" id="charts"></div></section>
<section aria-label="What happened"><h2>What happened</h2>
<ol id="happened" class="happened"><li class="muted">nothing so far</li></ol></section>
<section aria-label="Devices as a table"><h2>Decisions</h2>
<div class="scroll" tabindex="0" aria-label="table of decisions"><table id="devices"></table></div>
</section>
<footer>The figures are those of the run's folder. <span id="when"></span></footer>
</main></body></html>
"""
)

SERVED_PAGE: Final = (
    _HEAD.format("fedsys serve")
    + """<div class="cards" id="cards"></div>
<section aria-label="Hosts" id="hosts"><h2>Hosts</h2>
<figure class="panel"><div id="map"></div>
<p id="chosen-host" class="small" aria-live="polite">Choose a host, with the mouse or with Tab, to
see what runs there and how it is.</p></figure></section>
<section aria-label="Why"><h2>Why it is so</h2><div class="panel" id="why"></div></section>
<section aria-label="Portfolio" id="portfolio"><h2>Portfolio</h2>
<div class="grid2" id="front"></div></section>
<section aria-label="Curves"><h2>Curves</h2><div class="grid2" id="charts"></div></section>
<section aria-label="What happened"><h2>What happened</h2>
<ol id="happened" class="happened"><li class="muted">nothing so far</li></ol></section>
<section aria-label="Decisions as a table"><h2>Decisions</h2>
<div class="scroll" tabindex="0" aria-label="table of decisions"><table id="decided"></table></div>
</section>
<footer>The figures are those of the endpoint's status. <span id="when"></span></footer>
</main></body></html>
"""
)

STYLE: Final = (
    CSS
    + """
progress{width:100%;height:8px;accent-color:var(--accent)}
.badge.running{background:var(--warn-bg);color:var(--warn)}
.badge.finished{background:var(--good-bg);color:var(--good)}
.badge.failed,.badge.interrupted,.badge.gone{background:var(--bad-bg);color:var(--bad)}
.badge{font-size:13px;font-weight:600;padding:2px 9px;border-radius:9px;vertical-align:middle;
background:var(--line)}
.error{color:var(--bad)}
#map svg{display:block;width:100%;height:auto}
#map text{fill:var(--text);font-size:11.5px;text-anchor:middle}
#map text.cut{fill:var(--muted)}
#map .edge rect{fill:var(--panel);stroke:var(--accent);stroke-width:2}
#map .edge.lost rect{stroke:var(--bad);stroke-dasharray:4 3}
#map .edge.lost text{fill:var(--bad)}
#map .wire{stroke:var(--accent);fill:none;opacity:.55}
#map .wire.alone{stroke:var(--line);stroke-dasharray:3 4}
#map .wire.lost{stroke:var(--bad);stroke-dasharray:3 4}
#map .wire.moved{stroke:var(--c1);opacity:1}
#map .host{cursor:pointer}
#map .host rect{fill:var(--panel);stroke:var(--accent);stroke-width:2}
#map .host.idle rect{stroke:var(--line)}
#map .host.lost rect{stroke:var(--bad);stroke-dasharray:4 3}
#map .host.suspect rect,#map .host.leaving rect{stroke:var(--warn)}
#map .host.chosen rect,#map .host:focus rect{fill:var(--good-bg)}
#map .host:focus{outline:none}
#map .host:focus-visible rect{stroke-width:4}
#front .variant{cursor:pointer}
#front .variant circle{fill:var(--c0)}
#front .variant.now circle{fill:var(--c2);stroke:var(--text);stroke-width:1.5}
#front .variant:focus{outline:none}
#front .variant:focus-visible circle{stroke:var(--accent);stroke-width:3}
#map .device{cursor:pointer}
#map .device .body{fill:var(--panel);stroke:var(--line);stroke-width:5}
#map .device .share{fill:none;stroke:var(--c2);stroke-width:5}
#map .device.lost .body{stroke:var(--bad)}
#map .device:focus{outline:none}
#map .device:focus .body,#map .device.chosen .body{fill:var(--good-bg)}
#map .device:focus-visible .body{stroke:var(--accent)}
.card b{overflow-wrap:anywhere}
.card b.long{font-size:17px;line-height:29px}
.happened{max-height:260px;overflow:auto;padding:0 0 0 4px;margin:0;list-style:none}
.happened li{padding:3px 0;border-bottom:1px solid var(--line);font-size:13.5px;
overflow-wrap:anywhere}
.happened b{margin-right:6px}
.scroll{overflow-x:auto}
#devices,#decided{border-collapse:collapse;width:100%;font-size:13px}
#devices th,#devices td,#decided th,#decided td{text-align:left;padding:4px 10px 4px 0;
border-bottom:1px solid var(--line);
font-variant-numeric:tabular-nums;white-space:nowrap}
#devices td.why,#decided td.why{white-space:normal;min-width:220px}
.chart .name{font-size:12px}
"""
)
