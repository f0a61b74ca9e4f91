"""The style sheet of the report: one column on a phone, two on a desk, light or dark as the reader.

The colours are those of the plots (Okabe and Ito), on dark ground a shade lighter.
"""

CSS = """
:root{--bg:#f5f6f8;--panel:#fff;--text:#1c2128;--muted:#616b78;--line:#e2e5ea;--accent:#0072b2;
--good:#00795a;--bad:#b3261e;--warn:#8a5a00;--good-bg:#e0f3ec;--bad-bg:#fbe6e4;--warn-bg:#fdf0d9;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;--c6:#7f7f7f;
--c7:#222;--on:#fff;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--panel:#1b212a;--text:#e6e9ee;
--muted:#9aa5b3;--line:#303844;--accent:#5fb4e8;--good:#4fd1a5;--bad:#ff8a80;--warn:#f0c060;
--good-bg:#12362c;--bad-bg:#43211f;--warn-bg:#3d2f12;--c0:#4aa8e0;--c1:#ff8a3d;--c2:#2fc99a;
--c3:#e39cc4;--c4:#f2b632;--c5:#8fd0f5;--c6:#a5a5a5;--c7:#f0f0f0;--on:#0c1116}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:17px;margin:34px 0 12px}
p{margin:6px 0}
.muted{color:var(--muted);font-weight:400}
.small{font-size:13px}
code,.mono{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
code{overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:12px;
margin:20px 0 8px}
.card,.panel,.table{background:var(--panel);border:1px solid var(--line);border-radius:10px}
.card{padding:12px 14px}
.card b{display:block;font-size:23px;line-height:1.25;font-weight:650;
font-variant-numeric:tabular-nums}
.card span{color:var(--muted);font-size:13px}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:14px}
.wide{display:grid;gap:14px;margin-top:14px}
.plot{display:block;max-width:min(100%,760px);height:auto;margin:0 auto;
background:#fff;border-radius:6px}
h3{font-size:15px;margin:18px 0 8px}
.panel{margin:0;padding:14px 16px 12px;min-width:0}
figcaption{font-weight:600;margin-bottom:8px}
.chart{display:block;width:100%;height:auto}
.chart text{fill:var(--muted);font-size:11.5px;font-variant-numeric:tabular-nums}
.chart text.on{fill:var(--on);font-size:10.5px}.chart text.off{fill:var(--text);font-size:10.5px}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--muted);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:5 4}.dot{stroke:none}.dot.dashed{stroke-dasharray:none}
.cell{fill:var(--c0)}
.line.k0{stroke:var(--c0)}.line.k1{stroke:var(--c1)}.line.k2{stroke:var(--c2)}
.line.k3{stroke:var(--c3)}.line.k4{stroke:var(--c4)}.line.k5{stroke:var(--c5)}
.line.k6{stroke:var(--c6)}.line.k7{stroke:var(--c7)}
.dot.k0,.bar.k0{fill:var(--c0)}.dot.k1,.bar.k1{fill:var(--c1)}.dot.k2,.bar.k2{fill:var(--c2)}
.dot.k3,.bar.k3{fill:var(--c3)}.dot.k4,.bar.k4{fill:var(--c4)}.dot.k5,.bar.k5{fill:var(--c5)}
.dot.k6,.bar.k6{fill:var(--c6)}.dot.k7,.bar.k7{fill:var(--c7)}
.b0{background:var(--c0)}.b1{background:var(--c1)}.b2{background:var(--c2)}
.b3{background:var(--c3)}.b4{background:var(--c4)}.b5{background:var(--c5)}
.b6{background:var(--c6)}.b7{background:var(--c7)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;margin:8px 0 0;padding:0;
font-size:13px;color:var(--muted)}
.legend li{display:flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.key{width:18px;height:8px;flex:none}.key .line{stroke-width:3}
.share{margin:10px 0}.share-name{display:flex;justify-content:space-between;gap:12px;
font-size:13px;overflow-wrap:anywhere}
.share-bar{display:flex;height:24px;border-radius:5px;overflow:hidden;margin-top:4px}
.piece{flex-basis:0;min-width:0;color:var(--on);font-size:11.5px;line-height:24px;
text-align:center;overflow:hidden}
.table{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:8px 14px;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-weight:500;white-space:nowrap}
tbody th{font-weight:500;overflow-wrap:break-word}
.parts{margin-top:10px}.parts td,.parts th{padding:6px 2px}
td{overflow-wrap:break-word;min-width:72px}
td.num,th.num{text-align:right;white-space:nowrap}
td.best{font-weight:700;color:var(--good)}
.badge{display:inline-block;border-radius:99px;padding:1px 10px;font-size:12.5px;font-weight:600;
white-space:nowrap;vertical-align:middle}
.finished{color:var(--good);background:var(--good-bg)}
.failed,.damaged{color:var(--bad);background:var(--bad-bg)}
.running,.interrupted{color:var(--warn);background:var(--warn-bg)}
.note{border-radius:10px;padding:10px 14px;margin:14px 0;overflow-wrap:anywhere}
.swatch{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:8px}
details{margin:10px 0}summary{cursor:pointer;color:var(--accent);padding:4px 0}
footer{margin-top:36px;color:var(--muted);font-size:13px}
@media(max-width:560px){main{padding:18px 12px 32px}h1{font-size:21px}
.cards{grid-template-columns:1fr 1fr;gap:8px}.card b{font-size:19px}.panel{padding:12px 10px}
th,td{padding:7px 9px}.chart text{font-size:14px}}
@media print{body{background:#fff}.card,.panel,.table{break-inside:avoid}}
"""
